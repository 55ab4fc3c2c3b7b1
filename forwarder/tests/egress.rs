//! Connections of pods to the outside that are masqueraded: which ones, to which address, and what comes back.

use std::collections::HashSet;

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use forwarder::addr::{Addr, Tuple};
use forwarder::verdict::{Reason, Verdict};
use rig::{
    CLIENT, CLUSTER_IP, Gateway, HEAD, INSIDE, OUTSIDE, POD_1, POD_2, addr, checksums_right, destination,
    echo, ports, source, tcp, udp, unreachable,
};

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Addresses of the gateway's outside port.
const OWN: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];

const OBJECTS: &str = "kind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [10.244.1.0/24, 'fd00:244:0:1::/64']}\n\
    status: {addresses: [{type: InternalIP, address: 10.0.0.2}]}\n";

fn gateway(egress: &str) -> Gateway {
    Gateway::of_objects(&format!("{HEAD}{egress}"), 1024, OBJECTS)
}

#[test]
fn a_pod_reaches_the_outside_by_the_address_of_the_gateway_and_is_answered() {
    let mut gateway = gateway("[[egress]]\n");
    for (pod, client, own) in
        [(POD_1, CLIENT, OWN[0]), (addr("fd00:244:0:1::5"), addr("2001:db8:9::7"), OWN[1])]
    {
        for protocol in [tcp(pod, 4242, client, 443, SYN, b""), udp(pod, 4242, client, 53, b"question")] {
            let (_, asked) = ports(&protocol);
            let out = gateway.forwarded(INSIDE, OUTSIDE, &protocol);
            let (src_port, dst_port) = ports(&out);
            assert_eq!((source(&out), destination(&out), dst_port), (addr(own), client, asked));
            assert!(src_port >= 61_000 && checksums_right(&out));
            let answer = match asked {
                443 => tcp(client, asked, addr(own), src_port, SYN | ACK, b""),
                _ => udp(client, asked, addr(own), src_port, b"answer"),
            };
            let back = gateway.forwarded(OUTSIDE, INSIDE, &answer);
            assert_eq!((source(&back), destination(&back), ports(&back)), (client, pod, (asked, 4242)));
            assert!(checksums_right(&back));
        }
    }
    // Without a rule, as it is.
    let mut plain = self::gateway("");
    assert_eq!(source(&plain.forwarded(INSIDE, OUTSIDE, &udp(POD_1, 1, CLIENT, 53, b""))), POD_1);
    assert_eq!(plain.flows(), 0);
}

#[test]
fn pings_of_several_pods_are_told_apart_and_so_are_errors_about_them() {
    let mut gateway = gateway("[[egress]]\n");
    for (pods, client, own) in [
        ([POD_1, POD_2], CLIENT, OWN[0]),
        (["fd00:244:0:1::5", "fd00:244:0:1::6"].map(addr), addr("2001:db8:9::7"), OWN[1]),
    ] {
        let sent = pods.map(|pod| gateway.forwarded(INSIDE, OUTSIDE, &echo(pod, client, 7, b"ping")));
        let ids = sent.clone().map(|out| {
            assert!(source(&out) == addr(own) && checksums_right(&out));
            identifier(&out)
        });
        assert!(ids[0] != ids[1] && ids.iter().all(|id| *id >= 61_000), "{ids:?}");
        for (pod, out) in pods.into_iter().zip(sent) {
            let back = gateway.forwarded(OUTSIDE, INSIDE, &answered(&out));
            assert_eq!((destination(&back), identifier(&back)), (pod, 7));
            assert!(checksums_right(&back));
            let error = unreachable(client, addr(own), &out[14..]);
            let back = gateway.forwarded(OUTSIDE, INSIDE, &error);
            assert!(destination(&back) == pod && checksums_right(&back));
            // What is quoted is what the pod sent: the identifier stands eight bytes before the end.
            assert_eq!(identifier(&back), 7);
        }
    }
}

/// Identifier of an echo message in front of four bytes.
fn identifier(packet: &[u8]) -> u16 {
    let at = packet.len() - 8;
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

/// The answer to an echo request: addresses exchanged, another type, the checksum anew.
fn answered(request: &[u8]) -> Vec<u8> {
    rig::echo_reply(destination(request), source(request), identifier(request), b"ping")
}

#[test]
fn rules_say_which_pods_which_destinations_and_which_addresses() {
    let mut gateway = gateway(
        "[[egress]]\npods = ['10.244.1.0/24']\ndestinations = ['192.0.2.0/24']\naddresses = ['198.51.100.77']\n\
         [[egress]]\npods = ['10.244.1.0/24']\nexcept = ['203.0.113.0/24', '198.18.0.0/15']\n",
    );
    for (pod, to, expected) in [
        (POD_1, "192.0.2.9", "198.51.100.77"),
        (POD_1, "198.51.100.7", OWN[0]),
        (POD_1, "198.18.3.4", "10.244.1.5"),
        (POD_2, "192.0.2.9", "10.244.2.6"),
    ] {
        let out = gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 5, addr(to), 53, b""));
        assert_eq!(source(&out), addr(expected), "{to}");
    }
    // The network model: pods and nodes see pods' own addresses.
    for (to, port) in [(POD_2, INSIDE), (addr("10.0.0.2"), OUTSIDE)] {
        let out = gateway.forwarded(INSIDE, port, &tcp(POD_1, 5, to, 80, SYN, b""));
        assert_eq!(source(&out), POD_1);
    }
    let unknown = gateway.judge(INSIDE, &udp(POD_1, 5, CLUSTER_IP, 53, b""));
    assert_eq!(unknown.0, Verdict::Drop(Reason::UnknownService));
}

#[test]
fn who_asks_a_pod_by_its_own_address_is_answered_from_there() {
    let mut gateway = gateway("[[egress]]\n");
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, POD_1, 80, SYN, b""));
    let back = gateway.forwarded(INSIDE, OUTSIDE, &tcp(POD_1, 80, CLIENT, 4242, SYN | ACK, b""));
    assert_eq!((source(&back), ports(&back)), (POD_1, (80, 4242)));
    gateway.forwarded(OUTSIDE, INSIDE, &echo(CLIENT, POD_1, 9, b"ping"));
    let back = gateway.forwarded(INSIDE, OUTSIDE, &rig::echo_reply(POD_1, CLIENT, 9, b"ping"));
    assert_eq!(source(&back), POD_1);
}

#[test]
fn what_cannot_be_masqueraded_does_not_leave_with_the_address_of_the_pod() {
    let mut gateway = gateway("[[egress]]\n");
    for (packet, reason) in [
        (tcp(POD_1, 5, CLIENT, 80, RST, b""), Reason::NoFlow),
        (tcp(POD_1, 5, CLIENT, 80, SYN | ACK, b""), Reason::NoFlow),
        (rig::echo_reply(POD_1, CLIENT, 9, b"ping"), Reason::NoFlow),
        (unreachable(POD_1, CLIENT, &udp(CLIENT, 1, POD_1, 2, b"12345678")[14..]), Reason::NoFlow),
        (rig::other(POD_1, CLIENT, 47), Reason::EgressProtocol),
    ] {
        assert_eq!(gateway.judge(INSIDE, &packet).0, Verdict::Drop(reason), "{}", rig::describe(&packet));
    }
    assert_eq!(gateway.flows(), 0);
}

#[test]
fn ports_that_are_used_up_are_told_and_never_given_twice() {
    let head = format!("{HEAD}[snat]\nports = '61000-61003'\n[[egress]]\n");
    let mut gateway = Gateway::of_objects(&head, 1024, OBJECTS);
    let established = |gateway: &mut Gateway, port: u16| {
        let out = gateway.judge(INSIDE, &tcp(POD_1, port, CLIENT, 443, ACK, b""));
        matches!(out.0, Verdict::Forward { .. }).then(|| ports(&out.1).0)
    };
    let given: HashSet<u16> = (0..4).filter_map(|port| established(&mut gateway, 100 + port)).collect();
    assert_eq!(given.len(), 4);
    assert_eq!(established(&mut gateway, 200), None);
    assert_eq!(gateway.reason(Reason::SnatPortsExhausted), 1);
    // Towards another destination the same ports are free (RFC 4787 section 4.1, endpoint-dependent mapping).
    gateway.forwarded(INSIDE, OUTSIDE, &tcp(POD_1, 300, addr("198.51.100.8"), 443, ACK, b""));
}

/// Two hosts ping each other with one identifier.
#[test]
fn a_ping_is_never_taken_for_an_answer() {
    let mut gateway = gateway("[[egress]]\n");
    gateway.forwarded(OUTSIDE, INSIDE, &echo(CLIENT, POD_1, 9, b"ping"));
    assert_eq!(gateway.judge(INSIDE, &echo(POD_1, CLIENT, 9, b"ping")).0, Verdict::Drop(Reason::NoFlow));
    gateway.forwarded(INSIDE, OUTSIDE, &rig::echo_reply(POD_1, CLIENT, 9, b"ping"));
}

#[test]
fn what_leaves_by_no_port_of_ours_is_left_to_the_kernel() {
    let mut gateway = gateway("[[egress]]\n");
    let elsewhere = addr("172.31.0.9");
    for packet in [udp(POD_1, 1, elsewhere, 53, b""), tcp(POD_1, 80, elsewhere, 4242, SYN | ACK, b"")] {
        assert_eq!(gateway.judge(INSIDE, &packet).0, Verdict::Punt);
    }
}

#[test]
fn errors_on_the_way_out_come_from_the_gateway() {
    let mut gateway = gateway("[[egress]]\n");
    gateway.forwarded(INSIDE, OUTSIDE, &echo(POD_1, CLIENT, 9, b"ping"));
    let mut last = echo(POD_1, CLIENT, 9, b"ping");
    rig::set_ttl(&mut last, 1);
    let error = gateway.answered(INSIDE, Reason::TtlExceeded, &last);
    assert_eq!((source(&error), destination(&error)), (addr("10.0.0.1"), POD_1));
}

#[test]
fn an_endpoint_whose_flow_was_forgotten_does_not_begin_another_one() {
    let service = "---\nkind: Service\nmetadata: {name: web}\nspec: {type: LoadBalancer, clusterIP: 10.96.0.10, \
        externalTrafficPolicy: Local, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 53, targetPort: 53, protocol: UDP}]}\n\
        status: {loadBalancer: {ingress: [{ip: 203.0.113.10}]}}\n---\nkind: EndpointSlice\n\
        metadata: {name: web, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\n\
        ports: [{name: a, port: 8080}, {name: b, port: 53, protocol: UDP}]\n\
        endpoints: [{addresses: [10.244.1.5], nodeName: n1, conditions: {ready: true}}]\n";
    let mut gateway =
        Gateway::of_objects(&format!("{HEAD}[[egress]]\n"), 1024, &(OBJECTS.to_owned() + service));
    for packet in [tcp(POD_1, 8080, CLIENT, 4242, ACK, b"data"), udp(POD_1, 53, CLIENT, 4242, b"late")] {
        assert_eq!(gateway.judge(INSIDE, &packet).0, Verdict::Drop(Reason::NoFlow));
    }
    // What it begins itself goes out, from the same port too.
    for packet in [tcp(POD_1, 8080, CLIENT, 4242, SYN, b""), tcp(POD_1, 8081, CLIENT, 443, ACK, b"")] {
        assert_eq!(source(&gateway.forwarded(INSIDE, OUTSIDE, &packet)), addr(OWN[0]));
    }
}

/// Whoever asks a pod by its own address needs no translation, and so no room.
#[test]
fn without_room_nothing_is_lost_that_is_not_translated() {
    let mut gateway = Gateway::of_objects(&format!("{HEAD}[[egress]]\n"), 16, OBJECTS);
    for port in 0..40 {
        gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242 + port, POD_1, 80, ACK, b""));
    }
    let full = gateway.judge(INSIDE, &tcp(POD_1, 1, CLIENT, 443, ACK, b"")).0;
    assert_eq!(full, Verdict::Drop(Reason::FlowTableFull));
    // What no connection begins with makes no flow.
    let mut gateway = self::gateway("[[egress]]\n");
    gateway.forwarded(OUTSIDE, INSIDE, &tcp(CLIENT, 4242, POD_1, 80, 0, b""));
    assert_eq!(gateway.flows(), 0);
}

/// No two connections have answers with the same tuple.
#[test]
fn a_million_flows_have_a_million_reply_tuples() {
    let flows = 1_000_000;
    let head = format!("{HEAD}[snat]\nports = '40000-65535'\n[[egress]]\n");
    let mut gateway = Gateway::of_objects(&head, flows + flows / 8, OBJECTS);
    let mut replies: HashSet<Tuple> = HashSet::with_capacity(flows as usize);
    // A tenth of the ports of each of many destinations, from pods that use the same ports of their own.
    for index in 0..flows {
        let pod = Addr::v4(0x0af4_0101 + index % 250);
        let to = Addr::v4(0xc612_0000 + index / 20_000);
        let out =
            gateway.forwarded(INSIDE, OUTSIDE, &udp(pod, 1024 + (index / 250 % 80) as u16, to, 53, b""));
        let (src_port, dst_port) = ports(&out);
        let reply =
            Tuple { src: to, dst: source(&out), src_port: dst_port, dst_port: src_port, protocol: 17 };
        assert!(replies.insert(reply), "{reply} twice, after {index} flows");
    }
    assert_eq!(gateway.flows(), flows as usize);
}
