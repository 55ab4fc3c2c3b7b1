//! Connections that begin together, that end, and that find no source port: the whole pipeline with Services of manifests.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use std::collections::BTreeSet;

use forwarder::addr::Addr;
use forwarder::verdict::{Reason, Verdict};
use rig::{CLIENT, Gateway, HEAD, INSIDE, OUTSIDE, VIP, addr, destination, sctp, tcp, udp};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// A Service at [`VIP`] with ten pods. `spec`: more of its spec, `annotations`: its own.
fn web(spec: &str, annotations: &str) -> String {
    let endpoints: Vec<_> =
        (1..=10).map(|pod| format!("{{addresses: [10.244.1.{pod}], nodeName: n1}}")).collect();
    let ports = "ports: [{name: t, port: 80}, {name: u, port: 53, protocol: UDP}, {name: s, port: 5060, protocol: SCTP}]";
    format!(
        "kind: Service\nmetadata: {{name: web, namespace: default, annotations: {{{annotations}}}}}\n\
         spec: {{type: LoadBalancer, clusterIP: 10.96.0.10, {spec}, {ports}}}\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}]}}}}\n---\n\
         kind: EndpointSlice\nmetadata: {{name: web, namespace: default, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\n{ports}\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

const LOCAL: &str = "externalTrafficPolicy: Local";
const CLUSTER: &str = "externalTrafficPolicy: Cluster";

fn affinity(timeout_s: u32) -> String {
    format!(
        "{LOCAL}, sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {timeout_s}}}}}"
    )
}

/// One endpoint only, so that every connection needs a source port towards it.
fn one_endpoint(text: &str) -> String {
    let first = "endpoints: [{addresses: [10.244.1.1], nodeName: n1}";
    text.replace(&text[text.find("endpoints: [{").unwrap()..], &format!("{first}]\n"))
}

/// Rules 8.1, 8.2.
#[test]
fn connections_of_one_client_that_begin_together_meet_one_endpoint() {
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(&affinity(10_800), ""));
    let mut chosen = BTreeSet::new();
    for client in 0..20u32 {
        let client = Addr::v4(0xc633_6402 + client);
        let syns: Vec<_> = (0..8).map(|port| tcp(client, 4_000 + port, VIP, 80, SYN, b"")).collect();
        let went: BTreeSet<Addr> =
            gateway.forwarded_together(OUTSIDE, &syns).iter().map(|out| destination(out)).collect();
        assert_eq!(went.len(), 1, "{went:?}");
        gateway.now_s += 5;
        let later = gateway.forwarded(OUTSIDE, INSIDE, &tcp(client, 5_000, VIP, 80, SYN, b""));
        assert_eq!(went.first(), Some(&destination(&later)), "and it is remembered");
        chosen.extend(went);
    }
    assert!(chosen.len() > 4, "clients are spread: {chosen:?}");
}

#[test]
fn datagrams_of_one_socket_that_come_together_meet_one_endpoint() {
    for algorithm in ["random", "least-connections"] {
        let objects = web(LOCAL, &format!("towpath.dev/lb-algorithm: {algorithm}"));
        let mut gateway = Gateway::of_objects(HEAD, 16_384, &objects);
        for port in 4_000..4_040 {
            let queries = vec![udp(CLIENT, port, VIP, 53, b"A"), udp(CLIENT, port, VIP, 53, b"AAAA")];
            let out = gateway.forwarded_together(OUTSIDE, &queries);
            assert_eq!(destination(&out[0]), destination(&out[1]), "{algorithm}");
            assert_eq!(out[0][..6], out[1][..6], "{algorithm}: one next hop");
        }
        assert_eq!(gateway.flows(), 40);
    }
}

/// Rules 8.1, 8.4.
#[test]
fn another_timeout_of_session_affinity_counts_for_clients_that_are_known() {
    let connect = |gateway: &mut Gateway, port| {
        destination(&gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, SYN, b"")))
    };
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(&affinity(10_800), ""));
    let first = connect(&mut gateway, 1);
    gateway.now_s += 60;
    assert_eq!(connect(&mut gateway, 2), first);
    // Shorter: forgotten between two connections, however often it comes.
    gateway.apply(&web(&affinity(10), ""));
    let mut seen = BTreeSet::new();
    for port in 10..40 {
        gateway.now_s += 60;
        seen.insert(connect(&mut gateway, port));
    }
    assert!(seen.len() > 2, "{seen:?}");
    // Longer: remembered over a pause that would have been too long before.
    let last = connect(&mut gateway, 50);
    gateway.apply(&web(&affinity(10_800), ""));
    gateway.now_s += 5;
    assert_eq!(connect(&mut gateway, 51), last);
    gateway.rest(60);
    assert_eq!(connect(&mut gateway, 52), last);
}

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const SHUTDOWN_COMPLETE: u8 = 14;

/// Sends chunks from the client (`true`) and from the endpoint, which was `endpoint` so far; returns the endpoint.
fn associate(gateway: &mut Gateway, chunks: &[(bool, u8)], mut endpoint: Addr) -> Addr {
    for (from_client, chunk) in chunks {
        if *from_client {
            endpoint =
                destination(&gateway.forwarded(OUTSIDE, INSIDE, &sctp(CLIENT, 36_412, VIP, 5060, *chunk)));
        } else {
            gateway.forwarded(INSIDE, OUTSIDE, &sctp(endpoint, 5060, CLIENT, 36_412, *chunk));
        }
    }
    endpoint
}

const SETUP: [(bool, u8); 4] = [(true, INIT), (false, INIT_ACK), (true, COOKIE_ECHO), (false, COOKIE_ACK)];

/// Rule 9.6.
#[test]
fn an_sctp_association_lasts_and_what_comes_after_it_is_a_new_one() {
    for end in [
        &[(true, SHUTDOWN), (false, SHUTDOWN_ACK), (true, SHUTDOWN_COMPLETE)][..],
        &[(true, ABORT)],
        &[(false, ABORT)],
    ] {
        let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(LOCAL, ""));
        let first = associate(&mut gateway, &SETUP[..1], CLIENT);
        assert_eq!(gateway.embryonic_flows(), 1);
        associate(&mut gateway, &SETUP[1..], first);
        assert_eq!(gateway.embryonic_flows(), 0);
        gateway.rest(7_000);
        assert_eq!(gateway.flows(), 1);
        associate(&mut gateway, end, first);
        // Its endpoint is gone; the client begins anew from the same port.
        let other = web(LOCAL, "")
            .replace(&format!("{{addresses: [{first}], nodeName: n1}}"), "{addresses: [10.244.1.99]}");
        gateway.apply(&other);
        let second = associate(&mut gateway, &SETUP, CLIENT);
        assert_ne!(second, first, "{end:?}");
        associate(&mut gateway, end, second);
        gateway.rest(241);
        assert_eq!(gateway.flows(), 0, "{end:?}");
    }
}

#[test]
fn an_init_that_nobody_answers_is_let_go() {
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(LOCAL, ""));
    associate(&mut gateway, &SETUP[..1], CLIENT);
    gateway.rest(241);
    assert_eq!(gateway.flows(), 0);
}

/// RFC 9260 section 6.8; on veth Linux leaves the checksum to the device.
#[test]
fn sctp_checksums_are_finished_and_wrong_ones_stay_wrong() {
    let l4 = |out: &[u8]| out[34..].to_vec();
    let is_right = |out: &[u8]| {
        let mut again = l4(out);
        forwarder::wire::sctp::set_checksum(&mut again);
        again == l4(out)
    };
    let pod = addr("10.244.1.5");
    for (to, port) in [(VIP, 5060), (pod, 5060)] {
        let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(LOCAL, ""));
        let whole = sctp(CLIENT, 36_412, to, port, INIT);
        assert!(is_right(&gateway.forwarded(OUTSIDE, INSIDE, &whole)));
        let mut unfinished = whole.clone();
        unfinished[42..46].fill(0);
        assert!(is_right(&gateway.forwarded(OUTSIDE, INSIDE, &unfinished)), "unfinished to {to}");
        let mut corrupt = whole.clone();
        corrupt[50] ^= 0x40;
        assert!(!is_right(&gateway.forwarded(OUTSIDE, INSIDE, &corrupt)), "corrupt to {to}");
    }
}

/// As with Linux, which lets the entry of a connection that is dead end while its client asks again and again.
#[test]
fn asking_again_keeps_no_dead_connection_alive() {
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &web(LOCAL, ""));
    let pod = destination(&gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b"")));
    gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 80, CLIENT, 4242, SYN | ACK, b""));
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, ACK, b""));
    for _ in 0..3 {
        gateway.rest(2_000);
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b""));
    }
    assert_eq!(gateway.flows(), 1);
    gateway.rest(1_441);
    assert_eq!(gateway.flows(), 0);
}

/// Opens a connection from `port` as far as its client's ACK; true if it was let in.
fn connects(gateway: &mut Gateway, port: u16) -> bool {
    let (verdict, out) = gateway.judge(OUTSIDE, &tcp(CLIENT, port, VIP, 80, SYN, b""));
    match verdict {
        Verdict::Forward { .. } => {}
        Verdict::Drop(Reason::SnatPortsExhausted) => return false,
        other => panic!("{other:?}"),
    }
    let (source, number) = (rig::source(&out), u16::from_be_bytes([out[34], out[35]]));
    gateway.forwarded(INSIDE, OUTSIDE, &tcp(destination(&out), 80, source, number, SYN | ACK, b""));
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, ACK, b""));
    true
}

/// Rule 5.8.
#[test]
fn ports_of_connections_that_are_over_are_used_again() {
    let head = format!("{HEAD}\n[snat]\nports = '61000-61003'\n");
    let mut gateway = Gateway::of_objects(&head, 16_384, &one_endpoint(&web(CLUSTER, "")));
    for port in 1..=4 {
        assert!(connects(&mut gateway, port));
    }
    assert!(!connects(&mut gateway, 5), "all four are in use");
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 2, VIP, 80, RST, b""));
    assert!(connects(&mut gateway, 5));
    assert!(!connects(&mut gateway, 6));
    assert_eq!(gateway.flows(), 4);
    for port in [1, 3, 4, 5] {
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, ACK, b"still there"));
    }
}

/// Rule 5.8.
#[test]
fn a_flood_that_nobody_answers_holds_no_port_against_others() {
    let head = format!("{HEAD}\n[snat]\nports = '61000-61199'\n");
    let mut gateway = Gateway::of_objects(&head, 16_384, &one_endpoint(&web(CLUSTER, "")));
    for port in 1..=100 {
        assert!(connects(&mut gateway, port));
    }
    let datagram = |port: u32| udp(Addr::v4(0xc633_6500 + port), 9, VIP, 53, b"flood");
    for port in 0..2_000 {
        gateway.forwarded(OUTSIDE, INSIDE, &datagram(port));
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(Addr::v4(0xc633_6500 + port), 9, VIP, 80, SYN, b""));
    }
    assert!((101..=200).all(|port| connects(&mut gateway, port)), "half-open ones give way");
    assert!((1..=200).all(|port| {
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, ACK, b"x"));
        true
    }));
    assert!(!connects(&mut gateway, 201), "established ones do not");
}

/// Rule 5.8.
#[test]
fn all_addresses_to_masquerade_to_are_used() {
    let head = format!(
        "{HEAD}\n[snat]\naddresses = ['192.0.2.10', '192.0.2.11', '2001:db8::99']\nports = '61000-61003'\n"
    );
    let mut gateway = Gateway::of_objects(&head, 16_384, &one_endpoint(&web(CLUSTER, "")));
    assert!((1..=8).all(|port| connects(&mut gateway, port)));
    assert!(!connects(&mut gateway, 9));
}

#[test]
fn a_connection_straight_to_an_endpoint_does_not_mix_with_one_through_its_service() {
    let objects = one_endpoint(&web(LOCAL, ""));
    let mut gateway = Gateway::of_objects(HEAD, 16_384, &objects);
    let pod = addr("10.244.1.1");
    let ports_of = |out: &[u8]| rig::ports(out);
    for (protocol, port) in [("tcp", 80), ("udp", 53)] {
        let packet = |to| match protocol {
            "tcp" => tcp(CLIENT, 4242, to, port, SYN, b""),
            _ => udp(CLIENT, 4242, to, port, b"?"),
        };
        let answer = |to| match protocol {
            "tcp" => tcp(pod, port, CLIENT, to, SYN | ACK, b""),
            _ => udp(pod, port, CLIENT, to, b"!"),
        };
        // Without a Service's connection it is routed as it is, and leaves nothing behind.
        let alone = gateway.forwarded(OUTSIDE, INSIDE, &packet(pod));
        assert_eq!(ports_of(&alone), (4242, port));
        let before = gateway.flows();
        let through = gateway.forwarded(OUTSIDE, INSIDE, &packet(VIP));
        assert_eq!(ports_of(&through), (4242, port));
        let straight = gateway.forwarded(OUTSIDE, INSIDE, &packet(pod));
        let (other, _) = ports_of(&straight);
        assert_ne!(other, 4242, "{protocol}");
        assert_eq!(gateway.flows(), before + 2);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &answer(4242));
        assert_eq!((rig::source(&back), ports_of(&back)), (VIP, (port, 4242)));
        let back = gateway.forwarded(INSIDE, OUTSIDE, &answer(other));
        assert_eq!((rig::source(&back), ports_of(&back)), (pod, (port, 4242)), "{protocol}");
        assert_eq!(ports_of(&gateway.forwarded(OUTSIDE, INSIDE, &packet(pod))).0, other, "it stays so");
    }
}

/// A RST stands for a packet that was to be cut.
#[test]
fn a_reset_in_place_of_a_long_packet_is_not_cut() {
    let mut gateway =
        Gateway::of_objects(HEAD, 16_384, &web(LOCAL, "towpath.dev/on-endpoint-removed: reset"));
    let pod = destination(&gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, SYN, b"")));
    gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 80, CLIENT, 4242, SYN | ACK, b""));
    gateway.set_mtu(INSIDE, 576, 576);
    gateway.reset_flows();
    let mut long = tcp(CLIENT, 4242, VIP, 80, ACK, &[7; 1_000]);
    // May be cut: without DF.
    long[20] = 0;
    rig::set_ttl(&mut long, 64);
    let (verdict, out) = gateway.judge(OUTSIDE, &long);
    assert_eq!(verdict, Verdict::Answer { port: INSIDE, reason: Reason::EndpointRemoved });
    assert!(out.len() < 100, "a RST of {} bytes", out.len());
}
