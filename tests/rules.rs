//! Rules of Kubernetes from manifests to packets: objects are compiled, packets go through the pipeline, time is passed in.
//!
//! What the compiler's own tests show of lists and verdicts is shown there; here is what needs packets, time and changes.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use config::gateway::Gateway;
use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use forwarder::verdict::{Reason, Verdict};
use tests::case::Side;
use tests::pure::{Outcome, Pure};

const GATEWAY: &str = r#"
[gateway]
name = "gw-1"
cluster_cidrs = ["10.244.0.0/16"]
service_cidrs = ["10.96.0.0/16", "10.112.0.0/16"]
return = "routed"
[workers]
cpus = [0]
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
expose_cluster_ips = true
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"#;

const CLIENT: &str = "10.1.0.2";
const OTHER_CLIENT: &str = "10.1.0.3";
const VIP: &str = "203.0.113.10";
const CLUSTER_IP: &str = "10.96.0.10";
const NODE_IP: &str = "10.1.0.1";
const POD: &str = "10.244.1.99";

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const FIN_ACK: u8 = 0x11;

/// A Service `web` with ports http (TCP 80, NodePort 30080), alt (TCP 81, to the same port of its endpoints) and dns (UDP 53, NodePort 30080 as well), on all kinds of
/// addresses. `spec`: more of its spec.
fn service(spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: gw-1}}\nstatus: {{addresses: [{{type: InternalIP, address: {NODE_IP}}}]}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: web}}\nspec:\n  type: LoadBalancer\n  \
         clusterIP: {CLUSTER_IP}\n  clusterIPs: [{CLUSTER_IP}]\n  ports:\n  \
         - {{name: http, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}}\n  \
         - {{name: alt, protocol: TCP, port: 81, targetPort: 8080}}\n  \
         - {{name: dns, protocol: UDP, port: 53, targetPort: 5353, nodePort: 30080}}\n  \
         - {{name: sig, protocol: SCTP, port: 80, targetPort: 9080, nodePort: 30080}}\n{spec}\
         status: {{loadBalancer: {{ingress: [{{ip: {VIP}}}]}}}}\n"
    )
}

/// A slice of it. Endpoints: `11` ready, `11-` serving and terminating, `11!` not ready.
fn slice(name: &str, endpoints: &[&str]) -> String {
    let mut text = format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: default, name: {name}, \
         labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports:\n\
         - {{name: http, protocol: TCP, port: 8080}}\n- {{name: alt, protocol: TCP, port: 8080}}\n- {{name: dns, protocol: UDP, port: 5353}}\n- {{name: sig, protocol: SCTP, port: 9080}}\n\
         endpoints:\n"
    );
    for endpoint in endpoints {
        let host = endpoint.trim_end_matches(['-', '!']);
        let conditions = match &endpoint[host.len()..] {
            "-" => "{ready: false, serving: true, terminating: true}",
            "!" => "{ready: false, serving: false, terminating: false}",
            _ => "{ready: true}",
        };
        let _ =
            writeln!(text, "- {{addresses: [10.244.1.{host}], nodeName: node-1, conditions: {conditions}}}");
    }
    if endpoints.is_empty() {
        text = text.replace("endpoints:\n", "endpoints: []\n");
    }
    text
}

fn gateway(objects: &str) -> Pure {
    let gateway = Gateway::parse(GATEWAY, "gateway.toml").unwrap();
    Pure::new(gateway, objects).unwrap()
}

/// A packet of a client to a gateway: source, destination, protocol by `kind`.
#[derive(Clone, Copy)]
enum Packet {
    Tcp(u8),
    Udp,
    Sctp,
}

fn frame(src: (&str, u16), dst: (&str, u16), kind: Packet) -> (Side, Vec<u8>) {
    let outside = src.0.starts_with("10.1.") || src.0.starts_with("198.51.");
    let side = if outside { Side::Outside } else { Side::Inside };
    let gateway_mac = if side == Side::Outside { [2, 0, 0, 0, 0, 1] } else { [2, 0, 0, 0, 1, 1] };
    let bytes = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => panic!("IPv4 only"),
    };
    let ip = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], gateway_mac).ipv4(bytes(src.0), bytes(dst.0), 64);
    let mut frame = Vec::new();
    match kind {
        Packet::Udp => ip.udp(src.1, dst.1).write(&mut frame, b"question"),
        Packet::Tcp(flags) => {
            let mut header = etherparse::TcpHeader::new(src.1, dst.1, 1000, 8192);
            (header.syn, header.rst) = (flags & SYN != 0, flags & RST != 0);
            (header.ack, header.fin) = (flags & ACK != 0, flags & 1 != 0);
            ip.tcp_header(header).write(&mut frame, &[])
        }
        Packet::Sctp => {
            let mut header = [0u8; 16];
            header[..2].copy_from_slice(&src.1.to_be_bytes());
            header[2..4].copy_from_slice(&dst.1.to_be_bytes());
            forwarder::wire::sctp::set_checksum(&mut header);
            ip.write(&mut frame, IpNumber(132), &header)
        }
    }
    .unwrap();
    (side, frame)
}

fn send(gateway: &mut Pure, src: (&str, u16), dst: (&str, u16), kind: Packet) -> Outcome {
    let (side, frame) = frame(src, dst, kind);
    gateway.feed(side, &frame)
}

/// Source and destination, with ports, of what was forwarded.
fn forwarded(outcome: &Outcome) -> ((String, u16), (String, u16)) {
    let Verdict::Forward { .. } = outcome.verdict else { panic!("{:?}", outcome.verdict) };
    let frame = &outcome.emitted.first().expect("a frame leaves").frame;
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("not IPv4") };
    let (src_port, dst_port) = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        _ => {
            let payload = ip.payload().payload;
            (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]))
        }
    };
    let header = ip.header();
    ((header.source_addr().to_string(), src_port), (header.destination_addr().to_string(), dst_port))
}

/// The endpoint that a new connection gets.
fn endpoint(gateway: &mut Pure, src: (&str, u16), dst: (&str, u16), kind: Packet) -> String {
    forwarded(&send(gateway, src, dst, kind)).1.0
}

/// The endpoints of 60 connections from one client.
fn spread(gateway: &mut Pure, client: &str, dst: (&str, u16), first_port: u16) -> BTreeSet<String> {
    (0..60).map(|i| endpoint(gateway, (client, first_port + i), dst, Packet::Tcp(SYN))).collect()
}

const AFFINITY: &str = "  externalTrafficPolicy: Local\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 100}}\n";
const LOCAL: &str = "  externalTrafficPolicy: Local\n";

/// Rules 8.1, 8.2.
#[test]
fn affinity_is_by_client_and_service_port_whatever_address_was_asked() {
    let mut gateway = gateway(&(service(AFFINITY) + &slice("a", &["11", "12", "13", "14"])));
    let first = endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN));
    for (port, dst) in [(2001, (VIP, 80)), (2002, (CLUSTER_IP, 80)), (2003, (NODE_IP, 30080))] {
        for more in 0..20 {
            let got = endpoint(&mut gateway, (CLIENT, port + 100 * more), dst, Packet::Tcp(SYN));
            assert_eq!(got, first, "{dst:?}");
        }
    }
    // Other clients are spread, and so are other ports of the Service.
    let others: BTreeSet<String> = (10..60)
        .map(|host| endpoint(&mut gateway, (&format!("10.1.0.{host}"), 2000), (VIP, 80), Packet::Tcp(SYN)))
        .collect();
    assert_eq!(others.len(), 4);
    let differs = |host: u16| {
        let client = format!("10.1.0.{host}");
        let web = endpoint(&mut gateway, (&client, 3000), (VIP, 80), Packet::Tcp(SYN));
        web != endpoint(&mut gateway, (&client, 3001), (VIP, 81), Packet::Tcp(SYN))
    };
    assert!((10..60).map(differs).filter(|differs| *differs).count() > 10);
}

/// Rules 8.3, 8.4.
#[test]
fn affinity_is_refreshed_by_connections_not_by_packets_and_random_after_it_expired() {
    let mut gateway = gateway(&(service(AFFINITY) + &slice("a", &["11", "12", "13", "14"])));
    let first = endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN));
    // New connections within the time keep it, for ever.
    for i in 1..20 {
        gateway.now_s += 90;
        assert_eq!(endpoint(&mut gateway, (CLIENT, 2000 + i), (VIP, 80), Packet::Tcp(SYN)), first);
    }
    // Packets of a connection do not: over many rounds the choice after them is another one sooner or later.
    let mut seen = BTreeSet::new();
    for round in 0..40u16 {
        let port = 10_000 + 100 * round;
        let before = endpoint(&mut gateway, (CLIENT, port), (VIP, 80), Packet::Tcp(SYN));
        for _ in 0..4 {
            gateway.now_s += 30;
            assert_eq!(endpoint(&mut gateway, (CLIENT, port), (VIP, 80), Packet::Tcp(ACK)), before);
        }
        seen.insert(endpoint(&mut gateway, (CLIENT, port + 1), (VIP, 80), Packet::Tcp(SYN)));
    }
    assert_eq!(seen.len(), 4, "a stable choice after the time would be no choice");
}

/// Rule 8.5.
#[test]
fn affinity_lasts_only_while_the_endpoint_is_in_the_list() {
    let all = ["11", "12", "13", "14"];
    let mut gateway = gateway(&(service(AFFINITY) + &slice("a", &all)));
    let first = endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN));
    let host = first.rsplit('.').next().unwrap();
    for gone in ["!", "-"] {
        let rest: Vec<String> = all
            .iter()
            .map(|one| if *one == host { format!("{one}{gone}") } else { (*one).to_owned() })
            .collect();
        let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
        gateway.apply(&(service(AFFINITY) + &slice("a", &rest))).unwrap();
        let next = endpoint(&mut gateway, (CLIENT, 3000), (VIP, 80), Packet::Tcp(SYN));
        assert_ne!(next, first, "{gone}");
        // And the new one is remembered.
        for port in 3001..3010 {
            assert_eq!(endpoint(&mut gateway, (CLIENT, port), (VIP, 80), Packet::Tcp(SYN)), next);
        }
    }
}

/// Rule 8.6.
#[test]
fn affinity_is_switched_at_run_time() {
    let slices = slice("a", &["11", "12", "13", "14"]);
    let mut gateway = gateway(&(service(LOCAL) + &slices));
    assert_eq!(spread(&mut gateway, CLIENT, (VIP, 80), 2000).len(), 4);
    gateway.apply(&(service(AFFINITY) + &slices)).unwrap();
    assert_eq!(spread(&mut gateway, CLIENT, (VIP, 80), 3000).len(), 1);
    gateway.apply(&(service(LOCAL) + &slices)).unwrap();
    assert_eq!(spread(&mut gateway, CLIENT, (VIP, 80), 4000).len(), 4);
}

/// Rule 9.1.
#[test]
fn an_established_connection_keeps_its_endpoint_whatever_changes() {
    let mut gateway = gateway(&(service(LOCAL) + &slice("a", &["11", "12"])));
    let first = endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN));
    let host = first.rsplit('.').next().unwrap();
    let other = if host == "11" { "12" } else { "11" };
    for endpoints in [
        vec![other.to_owned(), format!("{host}-")],
        vec![other.to_owned(), format!("{host}!")],
        vec![other.to_owned(), "13".into(), "14".into()],
        vec![],
    ] {
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        gateway.apply(&(service(LOCAL) + &slice("a", &endpoints))).unwrap();
        // A SYN in the middle of it is for the endpoint to judge (RFC 5961 section 4).
        for flags in [ACK, SYN] {
            assert_eq!(endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(flags)), first);
        }
        let back = send(&mut gateway, (&first, 8080), (CLIENT, 2000), Packet::Tcp(ACK));
        assert_eq!(forwarded(&back).0, (VIP.to_owned(), 80));
    }
    // Not even when the Service is gone.
    gateway.apply(&slice("a", &[])).unwrap();
    assert_eq!(endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(ACK)), first);
}

/// Rules 9.5, 4.7. What stands outside of every window is for the ends to judge: nothing is answered, the flow goes on.
#[test]
fn segments_out_of_the_blue_end_nothing() {
    let mut gateway = gateway(&(service(LOCAL) + &slice("a", &["11"])));
    let first = endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN));
    send(&mut gateway, (&first, 8080), (CLIENT, 2000), Packet::Tcp(SYN | ACK));
    send(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(ACK));
    for flags in [RST, FIN_ACK, RST | ACK] {
        for _ in 0..3 {
            // From both sides, forwarded for the receiver to judge; its next packet finds the flow as it was.
            let out = send(&mut gateway, (&first, 8080), (CLIENT, 2000), Packet::Tcp(flags));
            assert_eq!(forwarded(&out).0, (VIP.to_owned(), 80));
            send(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(flags));
            gateway.now_s += 60;
            assert_eq!(endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(ACK)), first);
        }
    }
    assert_eq!(gateway.flows(), 1);
    // What belongs to no flow and begins none provokes no RST either.
    for flags in [RST, FIN_ACK, SYN | ACK] {
        let outcome = send(&mut gateway, (OTHER_CLIENT, 2000), (VIP, 80), Packet::Tcp(flags));
        assert_eq!(outcome.verdict, Verdict::Drop(Reason::NoFlow));
    }
    assert_eq!(gateway.flows(), 1);
}

/// Rules 4.7, 3.4: a client that asked before there were endpoints is served once there are, from the same port.
#[test]
fn a_refused_datagram_leaves_nothing_behind() {
    let mut gateway = gateway(&(service(LOCAL) + &slice("a", &[])));
    for _ in 0..3 {
        let outcome = send(&mut gateway, (CLIENT, 12345), (VIP, 53), Packet::Udp);
        assert_eq!(outcome.reason(), Some(Reason::NoEndpoints));
    }
    assert_eq!(gateway.flows(), 0);
    gateway.apply(&(service(LOCAL) + &slice("a", &["11"]))).unwrap();
    assert_eq!(endpoint(&mut gateway, (CLIENT, 12345), (VIP, 53), Packet::Udp), "10.244.1.11");
}

/// Rule 2.4: slices of one change count together, whatever their order.
#[test]
fn an_endpoint_that_moves_between_slices_never_blinks_out() {
    let before = slice("a", &["11", "12"]) + &slice("b", &["13"]);
    let after = slice("b", &["13", "12"]) + &slice("a", &["11"]);
    let mut gateway = gateway(&(service(LOCAL) + &before));
    let all: BTreeSet<String> = ["10.244.1.11", "10.244.1.12", "10.244.1.13"].map(str::to_owned).into();
    assert_eq!(spread(&mut gateway, CLIENT, (VIP, 80), 2000), all);
    let chosen: Vec<String> =
        (0..50).map(|i| endpoint(&mut gateway, (CLIENT, 5000 + i), (VIP, 80), Packet::Tcp(SYN))).collect();
    gateway.apply(&(service(LOCAL) + &after)).unwrap();
    // The list is the same, and so is every choice: a client that no flow is known of stays where it was.
    for (i, before) in chosen.iter().enumerate() {
        let again = endpoint(&mut gateway, (OTHER_CLIENT, 5000 + i as u16), (VIP, 80), Packet::Tcp(SYN));
        assert!(all.contains(&again));
        assert_eq!(&endpoint(&mut gateway, (CLIENT, 5000 + i as u16), (VIP, 80), Packet::Tcp(ACK)), before);
    }
}

/// Rule 5.8.
#[test]
fn a_taken_source_port_is_replaced() {
    let mut gateway = gateway(&(service("") + &slice("a", &["11"])));
    let mut seen = BTreeSet::new();
    for host in 2..30 {
        let client = format!("198.51.100.{host}");
        let out = forwarded(&send(&mut gateway, (&client, 61_234), (VIP, 80), Packet::Tcp(SYN)));
        assert_eq!(out.0.0, "10.2.0.1");
        assert!(seen.insert(out.0.1), "port {} twice", out.0.1);
        let back = forwarded(&send(
            &mut gateway,
            ("10.244.1.11", 8080),
            ("10.2.0.1", out.0.1),
            Packet::Tcp(SYN | ACK),
        ));
        assert_eq!(back, ((VIP.to_owned(), 80), (client, 61_234)));
    }
    assert!(seen.contains(&61_234), "the first one keeps its port");
}

/// Rules 6.6, 7.2, 11.2.
#[test]
fn one_number_is_a_frontend_for_each_protocol() {
    let mut gateway = gateway(&(service("") + &slice("a", &["11"])));
    for (dst, kind, expected) in [
        ((VIP, 80), Packet::Tcp(SYN), 8080),
        ((VIP, 80), Packet::Sctp, 9080),
        ((NODE_IP, 30080), Packet::Tcp(SYN), 8080),
        ((NODE_IP, 30080), Packet::Udp, 5353),
        ((NODE_IP, 30080), Packet::Sctp, 9080),
    ] {
        let out = forwarded(&send(&mut gateway, (CLIENT, 61_500), dst, kind));
        assert_eq!(out.1, ("10.244.1.11".to_owned(), expected), "{dst:?}");
        let back = forwarded(&send(
            &mut gateway,
            ("10.244.1.11", expected),
            ("10.2.0.1", out.0.1),
            match kind {
                Packet::Tcp(_) => Packet::Tcp(SYN | ACK),
                other => other,
            },
        ));
        assert_eq!(back, ((dst.0.to_owned(), dst.1), (CLIENT.to_owned(), 61_500)));
    }
    let outcome = send(&mut gateway, (CLIENT, 61_501), (VIP, 80), Packet::Udp);
    assert_eq!(outcome.reason(), Some(Reason::UnknownPort));
}

/// Rules 1.5, 11.3, 6.5, 6.1.
#[test]
fn what_is_not_for_packets_changes_nothing() {
    let spec = "  loadBalancerClass: example.com/other\n  allocateLoadBalancerNodePorts: false\n  healthCheckNodePort: 0\n";
    let objects = service(spec)
        .replace("port: 80, targetPort: 8080, nodePort: 30080", "port: 80, appProtocol: kubernetes.io/h2c");
    let mut gateway = gateway(&(objects + &slice("a", &["11"])));
    assert_eq!(endpoint(&mut gateway, (CLIENT, 2000), (VIP, 80), Packet::Tcp(SYN)), "10.244.1.11");
    // Without a NodePort the number is the kernel's business.
    let outcome = send(&mut gateway, (CLIENT, 2001), (NODE_IP, 30080), Packet::Tcp(SYN));
    assert_eq!(outcome.verdict, Verdict::Punt);
}

/// Rules 4.5, 4.6, 14.6.
#[test]
fn unknown_ports_are_rejected_and_unknown_addresses_dropped() {
    let mut gateway = gateway(&(service("") + &slice("a", &["11"])));
    for client in [CLIENT, POD] {
        for addr in [CLUSTER_IP, VIP] {
            let outcome = send(&mut gateway, (client, 2000), (addr, 4242), Packet::Tcp(SYN));
            assert_eq!(
                outcome.verdict,
                Verdict::Answer { port: u8::from(client == POD), reason: Reason::UnknownPort }
            );
        }
        for addr in ["10.96.7.7", "10.112.7.7"] {
            let outcome = send(&mut gateway, (client, 2000), (addr, 80), Packet::Udp);
            assert_eq!(outcome.verdict, Verdict::Drop(Reason::UnknownService));
        }
    }
    assert_eq!(gateway.flows(), 0);
}

/// Rules 5.1, 5.2, 5.4, 5.5, 5.6.
#[test]
fn who_sees_whose_address() {
    for (spec, client, dst, keeps) in [
        ("", CLIENT, (VIP, 80), false),
        ("", CLIENT, (NODE_IP, 30080), false),
        (LOCAL, CLIENT, (VIP, 80), true),
        (LOCAL, CLIENT, (NODE_IP, 30080), true),
        ("", CLIENT, (CLUSTER_IP, 80), false),
        ("", POD, (CLUSTER_IP, 80), true),
        ("", POD, (VIP, 80), false),
        (LOCAL, POD, (VIP, 80), true),
        ("", "10.2.0.12", (CLUSTER_IP, 80), false),
        ("", "10.244.1.11", (CLUSTER_IP, 80), false),
    ] {
        let mut gateway = gateway(&(service(spec) + &slice("a", &["11"])));
        let out = forwarded(&send(&mut gateway, (client, 2000), dst, Packet::Tcp(SYN)));
        assert_eq!(out.1, ("10.244.1.11".to_owned(), 8080));
        assert_eq!(out.0.0 == client, keeps, "{client} to {dst:?} with {spec:?} arrives as {}", out.0.0);
    }
}

/// Rules 9.5, 9.6.
#[test]
fn idle_times_are_those_of_the_rfcs() {
    let client = (CLIENT, 2000);
    let answer = |gateway: &mut Pure, from: u16, kind| {
        send(gateway, ("10.244.1.11", from), client, kind);
    };
    /// Name of a phase, for how many seconds a flow may idle there, and how it comes there.
    type Phase<'a> = (&'a str, u32, &'a dyn Fn(&mut Pure));
    let phases: [Phase<'_>; 7] = [
        ("opening", 240, &|gateway| {
            send(gateway, client, (VIP, 80), Packet::Tcp(SYN));
        }),
        ("established", 7_440, &|gateway| {
            send(gateway, client, (VIP, 80), Packet::Tcp(SYN));
            answer(gateway, 8080, Packet::Tcp(SYN | ACK));
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
        }),
        ("established, in spite of a RST that the other end did not believe", 7_440, &|gateway| {
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
            answer(gateway, 8080, Packet::Tcp(RST));
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
        }),
        ("half closed", 7_440, &|gateway| {
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
            answer(gateway, 8080, Packet::Tcp(FIN_ACK));
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
        }),
        ("closed", 240, &|gateway| {
            send(gateway, client, (VIP, 80), Packet::Tcp(ACK));
            answer(gateway, 8080, Packet::Tcp(FIN_ACK));
            send(gateway, client, (VIP, 80), Packet::Tcp(FIN_ACK));
        }),
        ("one datagram", 30, &|gateway| {
            send(gateway, client, (VIP, 53), Packet::Udp);
        }),
        ("question and answer", 300, &|gateway| {
            send(gateway, client, (VIP, 53), Packet::Udp);
            answer(gateway, 5353, Packet::Udp);
        }),
    ];
    for (name, idle_s, make) in phases {
        let mut gateway = gateway(&(service(LOCAL) + &slice("a", &["11"])));
        make(&mut gateway);
        gateway.now_s += idle_s;
        gateway.age();
        assert_eq!(gateway.flows(), 1, "{name}: gone before {idle_s} s");
        gateway.now_s += 2;
        gateway.age();
        assert_eq!(gateway.flows(), 0, "{name}: still there after {idle_s} s");
    }
}
