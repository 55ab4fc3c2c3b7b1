//! A full flow table: connections that go on without an entry, those that may not, and everybody else's, which must not notice.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use std::collections::BTreeMap;

use forwarder::addr::Addr;
use forwarder::stats::Counter;
use forwarder::verdict::{Reason, Verdict};
use rig::{CLIENT, Gateway, HEAD, INSIDE, OUTSIDE, VIP, addr, checksums_right, describe, tcp, udp};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const CAPACITY: u32 = 1_024;

const FULL: Verdict = Verdict::Drop(Reason::FlowTableFull);

/// A Service `web` at 203.0.113.`ip` and 2001:db8::`ip`, with three pods of each family. `spec`: more of it.
fn web(name: &str, ip: u8, annotation: &str, spec: &str) -> String {
    let slice = |family: &str, pod: &str| {
        let endpoints: Vec<_> =
            (1..4).map(|i| format!("{{addresses: ['{pod}{i}'], nodeName: n1}}")).collect();
        format!(
            "---\nkind: EndpointSlice\nmetadata: {{name: {name}-{0}, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: {family}\nports: [{{name: http, port: 8080}}, {{name: dns, port: 5353, protocol: UDP}}]\nendpoints: [{1}]\n",
            family.to_lowercase(),
            endpoints.join(", ")
        )
    };
    format!(
        "kind: Service\nmetadata: {{name: {name}, namespace: default, annotations: {{{annotation}}}}}\n\
         spec:\n  type: LoadBalancer\n  clusterIP: 10.96.0.{ip}\n  clusterIPs: [10.96.0.{ip}, 'fd00:96::{ip}']\n  {spec}\n\
         \x20 ports: [{{name: http, port: 80, nodePort: 300{ip}}}, {{name: dns, port: 53, protocol: UDP, nodePort: 301{ip}}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{ip}}}, {{ip: '2001:db8::{ip}'}}]}}}}\n{}{}",
        slice("IPv4", "10.244.1."),
        slice("IPv6", "fd00:244:0:1::")
    )
}

const LOCAL: &str = "externalTrafficPolicy: Local";

fn gateway(objects: &str) -> Gateway {
    Gateway::of_objects(HEAD, CAPACITY, objects)
}

fn client(i: u32) -> (Addr, u16) {
    (Addr::v4(0xc633_6402 + i / 500), 10_000 + (i % 500) as u16)
}

/// Fills the table with UDP flows of clients that nobody else is.
fn fill(gateway: &mut Gateway) {
    let mut i = 0;
    while gateway.flows() < CAPACITY as usize {
        let port = 1_024 + (i % 60_000) as u16;
        gateway.forwarded(OUTSIDE, INSIDE, &udp(Addr::v4(0xc0a8_0001), port, VIP, 53, b"?"));
        i += 1;
    }
}

/// A request and its answer. Returns the endpoint.
fn ask(gateway: &mut Gateway, src: Addr, port: u16, vip: Addr) -> Addr {
    let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(src, port, vip, 53, b"?"));
    let pod = rig::destination(&out);
    assert!(checksums_right(&out));
    assert_eq!((rig::source(&out), rig::ports(&out)), (src, (port, 5353)));
    let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5353, src, port, b"!"));
    assert!(checksums_right(&back));
    assert_eq!((rig::source(&back), rig::ports(&back)), (vip, (53, port)), "{}", describe(&back));
    pod
}

/// The reliability test O4, in small.
#[test]
fn four_times_as_many_flows_as_fit_are_all_answered() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    let established: Vec<_> = (0..100).map(|i| (client(100_000 + i), rig::addr("10.244.1.1"))).collect();
    let mut established: Vec<_> = established
        .into_iter()
        .map(|((src, port), _)| {
            let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, SYN, b""));
            let pod = rig::destination(&out);
            gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 8080, src, port, SYN | ACK, b""));
            gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, ACK, b""));
            (src, port, pod)
        })
        .collect();
    let offered = 4 * CAPACITY;
    let mut pods = BTreeMap::new();
    for i in 0..offered {
        let (src, port) = client(i);
        pods.insert(i, ask(&mut gateway, src, port, VIP));
    }
    assert_eq!(gateway.flows(), CAPACITY as usize, "exactly as many as fit");
    // Requests and answers of all that found no room.
    let overflow = u64::from(offered - (CAPACITY - 100));
    assert_eq!(gateway.count(Counter::stateless_forwarded), 2 * overflow);
    // Again: the same endpoint.
    for i in 0..offered {
        let (src, port) = client(i);
        assert_eq!(ask(&mut gateway, src, port, VIP), pods[&i]);
    }
    assert_eq!(gateway.count(Counter::stateless_forwarded), 4 * overflow);
    // Established connections are all there.
    for (src, port, pod) in &mut established {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(*src, *port, VIP, 80, ACK, b"x"));
        assert_eq!(rig::destination(&out), *pod);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(*pod, 8080, *src, *port, ACK, b"y"));
        assert_eq!(rig::source(&back), VIP);
    }
    assert_eq!(gateway.count(Counter::stateless_forwarded), 4 * overflow);
    assert_eq!(gateway.reason(Reason::FlowTableFull), 0);
    gateway.rest(301);
    assert_eq!(gateway.flows(), 100, "UDP is over");
    gateway.rest(7_441);
    assert_eq!(gateway.flows(), 0);
}

#[test]
fn ipv6_goes_on_too() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    for i in 0..50 {
        ask(&mut gateway, Addr::v6(0x2001_0db8 << 96 | 7 << 64 | i), 4_000, addr("2001:db8::10"));
    }
    assert_eq!(gateway.count(Counter::stateless_forwarded), 100);
}

#[test]
fn a_tcp_connection_lives_without_an_entry_from_syn_to_fin() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    let to = |gateway: &mut Gateway, flags, payload: &[u8]| {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, VIP, 80, flags, payload));
        rig::destination(&out)
    };
    let pod = to(&mut gateway, SYN, b"");
    let from = |gateway: &mut Gateway, flags, payload: &[u8]| {
        let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 8080, CLIENT, 4242, flags, payload));
        assert_eq!((rig::source(&back), rig::ports(&back)), (VIP, (80, 4242)));
    };
    from(&mut gateway, SYN | ACK, b"");
    assert_eq!(to(&mut gateway, ACK, b""), pod);
    assert_eq!(to(&mut gateway, ACK, b"GET /"), pod);
    // The server may be silent for two hours.
    gateway.now_s += 7_000;
    from(&mut gateway, ACK, b"200");
    from(&mut gateway, FIN | ACK, b"");
    assert_eq!(to(&mut gateway, FIN | ACK, b""), pod);
    assert_eq!(to(&mut gateway, RST, b""), pod);
    from(&mut gateway, RST, b"");
    // The end of a connection that nobody knows is still dropped.
    let unknown = gateway.judge(OUTSIDE, &tcp(CLIENT, 4343, VIP, 80, FIN | ACK, b"")).0;
    assert_eq!(unknown, Verdict::Drop(Reason::NoFlow));
}

#[test]
fn a_syn_flood_leaves_the_way_to_real_clients() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    for i in 0..5_000 {
        let (src, port) = client(i);
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(src, port, VIP, 80, SYN, b""));
    }
    assert_eq!((gateway.flows(), gateway.embryonic_flows()), (256, 256), "the share of half-open ones");
    for port in 1_000..1_100 {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, SYN, b""));
        let pod = rig::destination(&out);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(pod, 8080, CLIENT, port, SYN | ACK, b""));
        assert_eq!(rig::source(&back), VIP);
        // The handshake done, it gets the entry of an established connection.
        let out = gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, ACK, b""));
        assert_eq!(rig::destination(&out), pod);
    }
    assert_eq!((gateway.flows(), gateway.embryonic_flows()), (356, 256));
    gateway.rest(241);
    assert_eq!(gateway.flows(), 100);
}

#[test]
fn once_there_is_room_a_connection_gets_its_entry() {
    for algorithm in ["maglev", "random", "least-connections"] {
        let annotation = format!("towpath.dev/lb-algorithm: {algorithm}");
        let mut gateway = gateway(&web("web", 10, &annotation, LOCAL));
        fill(&mut gateway);
        let places: Vec<_> =
            (0..100).map(|i| (client(i), ask(&mut gateway, client(i).0, client(i).1, VIP))).collect();
        let open = |gateway: &mut Gateway, flags| -> Vec<Addr> {
            let one = |port| {
                rig::destination(&gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, port, VIP, 80, flags, b"")))
            };
            (2_000..2_100).map(one).collect()
        };
        let tcp_places = open(&mut gateway, SYN);
        gateway.rest(31);
        assert_eq!(gateway.flows(), 0, "{algorithm}: nobody answered those that filled the table");
        for ((src, port), pod) in places {
            assert_eq!(ask(&mut gateway, src, port, VIP), pod, "{algorithm}");
        }
        // The SYN again, as a client sends it that had no answer.
        assert_eq!(open(&mut gateway, SYN), tcp_places, "{algorithm}");
        assert_eq!(gateway.flows(), 200);
        let before = gateway.count(Counter::stateless_forwarded);
        assert_eq!(open(&mut gateway, ACK), tcp_places, "{algorithm}");
        assert_eq!(gateway.count(Counter::stateless_forwarded), before);
    }
}

#[test]
fn what_cannot_be_told_apart_is_refused_and_counted() {
    let policies = format!("{LOCAL}\n  sessionAffinity: ClientIP");
    for (objects, why) in [
        (web("web", 10, "", "externalTrafficPolicy: Cluster"), "masqueraded"),
        (web("web", 10, "", &policies), "session affinity goes by memory"),
        (format!("{}---\n{}", web("web", 10, "", LOCAL), web("shop", 20, "", LOCAL)), "two VIPs lead there"),
    ] {
        let mut gateway = gateway(&objects);
        fill(&mut gateway);
        for port in 5_000..5_010 {
            assert_eq!(gateway.judge(OUTSIDE, &udp(CLIENT, port, VIP, 53, b"?")).0, FULL, "{why}");
            assert_eq!(gateway.judge(OUTSIDE, &tcp(CLIENT, port, VIP, 80, SYN, b"")).0, FULL, "{why}");
        }
        assert_eq!(gateway.reason(Reason::FlowTableFull), 20, "{why}");
        assert_eq!(gateway.count(Counter::stateless_forwarded), 0, "{why}");
    }
    // ClusterIPs and NodePorts of a Service whose VIP may.
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    let pod = addr("10.244.9.9");
    for (port, packet) in [
        (INSIDE, udp(pod, 5_000, addr("10.96.0.10"), 53, b"?")),
        (INSIDE, udp(pod, 5_000, VIP, 53, b"?")),
        (OUTSIDE, udp(CLIENT, 5_000, addr("198.51.100.1"), 30110, b"?")),
    ] {
        assert_eq!(gateway.judge(port, &packet).0, FULL, "{}", describe(&packet));
    }
    ask(&mut gateway, CLIENT, 5_000, VIP);
}

/// Who speaks to an endpoint by its own address has no entry either.
#[test]
fn connections_to_endpoints_by_their_address_are_not_touched() {
    let node = "---\nkind: Node\nmetadata: {name: n1}\nstatus: {addresses: [{type: InternalIP, address: 10.0.0.2}]}\n";
    let mut gateway = gateway(&format!("{}{node}", web("web", 10, "", LOCAL)));
    fill(&mut gateway);
    let pod = addr("10.244.1.1");
    // Many connections without an entry to every endpoint, and marks of all of them.
    for (src, port) in (0..200).map(client) {
        ask(&mut gateway, src, port, VIP);
    }
    // Pods and nodes: never.
    for other in [addr("10.244.9.9"), addr("10.0.0.2")] {
        for port in 0..500 {
            let (verdict, back) = gateway.judge(INSIDE, &udp(pod, 5353, other, 20_000 + port, b"!"));
            assert!(matches!(verdict, Verdict::Forward { .. }));
            assert_eq!((rig::source(&back), rig::ports(&back).0), (pod, 5353));
        }
    }
    // Clients outside: unless their tuple looks marked, which few do.
    let touched = (0..500).filter(|port| {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, 20_000 + port, pod, 5353, b"?"));
        assert_eq!(rig::destination(&out), pod);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5353, CLIENT, 20_000 + port, b"!"));
        rig::source(&back) != pod
    });
    let touched = touched.count();
    println!("{touched} of 500 connections by address look like one without an entry");
    assert!(touched < 40, "{touched}");
    // And those of other ports of the endpoint: never.
    for port in 0..500 {
        let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 9, CLIENT, 20_000 + port, b"!"));
        assert_eq!(rig::source(&back), pod);
    }
}

/// A connection with an entry must not get the answers of one without: it takes another source port.
#[test]
fn another_vip_does_not_take_the_answers_of_a_connection_without_an_entry() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    let node_port = addr("198.51.100.1");
    let places: Vec<_> = (5_000..5_100).map(|port| (port, ask(&mut gateway, CLIENT, port, VIP))).collect();
    gateway.rest(31);
    let mut moved = 0;
    for (port, pod) in places {
        let out = gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, port, node_port, 30110, b"?"));
        if rig::destination(&out) == pod {
            assert_ne!(rig::ports(&out).0, port);
            moved += 1;
        }
        let there = rig::destination(&out);
        let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(there, 5353, CLIENT, rig::ports(&out).0, b"!"));
        assert_eq!((rig::source(&back), rig::ports(&back)), (node_port, (30110, port)));
        // The one without an entry goes on.
        let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5353, CLIENT, port, b"!"));
        assert_eq!((rig::source(&back), rig::ports(&back)), (VIP, (53, port)));
    }
    assert!(moved > 10, "{moved} of 100 went to the same endpoint");
}

#[test]
fn icmp_errors_about_them_are_translated() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    let request = udp(CLIENT, 1_000, VIP, 53, b"?");
    let out = gateway.forwarded(OUTSIDE, INSIDE, &request);
    let pod = rig::destination(&out);
    let error = gateway.forwarded(INSIDE, OUTSIDE, &rig::unreachable(pod, CLIENT, &out[14..]));
    assert!(describe(&error).starts_with("icmp 203.0.113.10 > 198.51.100.7 3/3"), "{}", describe(&error));
    assert!(checksums_right(&error));
    assert_eq!(error[42 + 12..42 + 28], request[26..42], "as the client sent it");
    let answer = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5353, CLIENT, 1_000, b"!"));
    let router = addr("198.51.100.200");
    let error = gateway.forwarded(OUTSIDE, INSIDE, &rig::unreachable(router, VIP, &answer[14..]));
    assert_eq!((rig::source(&error), rig::destination(&error)), (router, pod));
    assert!(checksums_right(&error));
    // About a packet that nobody sent.
    let unknown = rig::unreachable(router, VIP, &udp(VIP, 53, CLIENT, 1_001, b"!")[14..]);
    assert_eq!(gateway.judge(OUTSIDE, &unknown).0, Verdict::Drop(Reason::NoFlow));
}

#[test]
fn a_trace_says_that_there_is_no_room() {
    let mut gateway = gateway(&web("web", 10, "", LOCAL));
    fill(&mut gateway);
    let pod = ask(&mut gateway, CLIENT, 1_000, VIP);
    let before = gateway.count(Counter::stateless_forwarded);
    let has =
        |steps: Vec<String>, words: &str| assert!(steps.iter().any(|s| s.contains(words)), "{steps:#?}");
    has(gateway.trace(OUTSIDE, &udp(CLIENT, 1_000, VIP, 53, b"?")), "has no room: goes on without an entry");
    has(
        gateway.trace(INSIDE, &udp(pod, 5353, CLIENT, 1_000, b"!")),
        "without an entry: becomes udp 203.0.113.10:53 >",
    );
    has(gateway.trace(INSIDE, &udp(addr("10.244.9.9"), 1, VIP, 53, b"?")), "flow_table_full");
    assert_eq!(gateway.count(Counter::stateless_forwarded), before);
    // A trace marks nothing; one of three endpoints would be marked for each port.
    let mut marked = 0;
    for port in 2_000..2_050 {
        gateway.trace(OUTSIDE, &udp(CLIENT, port, VIP, 53, b"?"));
        for pod in ["10.244.1.1", "10.244.1.2", "10.244.1.3"].map(addr) {
            let back = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5353, CLIENT, port, b"!"));
            marked += u32::from(rig::source(&back) != pod);
        }
    }
    assert!(marked < 10, "{marked}");
}
