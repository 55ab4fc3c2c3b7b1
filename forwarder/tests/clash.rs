//! One client address and port to several frontends that lead to one endpoint: the reliability test E4.
//!
//! The answers of such connections would have one tuple, so that nobody could tell them apart: all but one need another source port.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use std::collections::{HashMap, HashSet};

use forwarder::addr::Addr;
use forwarder::pipeline::Rng;
use forwarder::verdict::Verdict;
use rig::{Gateway, HEAD, INSIDE, OUTSIDE, addr, tcp, udp};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Two Services with the same pod behind each: one that keeps clients' addresses and one that masquerades; and a third as the first.
fn objects() -> String {
    let mut text = String::new();
    for (name, ip, policy) in [("web", 10, "Local"), ("shop", 20, "Cluster"), ("twin", 30, "Local")] {
        text += &format!(
            "---\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  type: LoadBalancer\n  \
             clusterIP: 10.96.0.{ip}\n  clusterIPs: [10.96.0.{ip}, 'fd00:96::{ip}']\n  externalTrafficPolicy: {policy}\n  \
             ports: [{{name: http, port: 80, nodePort: 300{ip}}}, {{name: dns, port: 80, protocol: UDP, nodePort: 300{ip}}}]\n\
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{ip}}}, {{ip: '2001:db8::{ip}'}}]}}}}\n"
        );
        for (family, pod) in [("IPv4", "10.244.1.1"), ("IPv6", "fd00:244:0:1::1")] {
            text += &format!(
                "---\nkind: EndpointSlice\nmetadata: {{name: {name}-{}, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
                 addressType: {family}\nports: [{{name: http, port: 8080}}, {{name: dns, port: 8080, protocol: UDP}}]\n\
                 endpoints: [{{addresses: ['{pod}'], nodeName: n1}}]\n",
                family.to_lowercase()
            );
        }
    }
    text.trim_start_matches("---\n").to_owned()
}

/// Where a client of one side can reach the pod: address and port, of one family.
fn frontends(side: u8, v4: bool) -> Vec<(Addr, u16)> {
    let mut all = Vec::new();
    for ip in [10, 20, 30] {
        let (vip, cluster_ip) = match v4 {
            true => (format!("203.0.113.{ip}"), format!("10.96.0.{ip}")),
            false => (format!("2001:db8::{ip}"), format!("fd00:96::{ip}")),
        };
        all.push((addr(&vip), 80));
        match side {
            INSIDE => all.push((addr(&cluster_ip), 80)),
            _ => all.push((addr(if v4 { "198.51.100.1" } else { "2001:db8:1::1" }), 30_000 + ip)),
        }
    }
    all
}

type Sender = (Addr, u16);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Connection {
    side: u8,
    client: Sender,
    frontend: Sender,
    is_tcp: bool,
}

fn packet(is_tcp: bool, from: Sender, to: Sender, flags: u8, payload: &[u8]) -> Vec<u8> {
    match is_tcp {
        true => tcp(from.0, from.1, to.0, to.1, flags, payload),
        false => udp(from.0, from.1, to.0, to.1, payload),
    }
}

fn forwarded(gateway: &mut Gateway, side: u8, bytes: &[u8]) -> Vec<u8> {
    let (verdict, out) = gateway.judge(side, bytes);
    assert!(matches!(verdict, Verdict::Forward { .. }), "{verdict:?}: {}", rig::describe(bytes));
    out
}

/// Who the pod thinks the client is.
fn send(gateway: &mut Gateway, connection: &Connection, flags: u8, payload: &[u8]) -> (Addr, Sender) {
    let Connection { side, client, frontend, is_tcp } = *connection;
    let out = forwarded(gateway, side, &packet(is_tcp, client, frontend, flags, payload));
    assert_eq!(rig::ports(&out).1, 8080);
    assert!(out.ends_with(payload));
    (rig::destination(&out), (rig::source(&out), rig::ports(&out).0))
}

#[test]
fn no_two_connections_to_one_endpoint_mix() {
    let mut gateway = Gateway::of_objects(HEAD, 65_536, &objects());
    let mut rng = Rng::new(44);
    let mut random = |below: u64| (rng.next() >> 32) % below;
    let mut open: HashMap<Connection, (Addr, Sender)> = HashMap::new();
    let mut taken = HashSet::new();
    // Few clients and few ports, so that most tries clash with others.
    for _ in 0..10_000 {
        let (v4, is_tcp, side) =
            (random(2) == 0, random(2) == 0, if random(3) == 0 { INSIDE } else { OUTSIDE });
        let host = 1 + random(8);
        let client = match (side, v4) {
            (INSIDE, true) => addr(&format!("10.244.2.{host}")),
            (INSIDE, false) => addr(&format!("fd00:244:0:2::{host}")),
            (_, true) => addr(&format!("192.0.2.{host}")),
            (_, false) => addr(&format!("2001:db8:c::{host}")),
        };
        let all = frontends(side, v4);
        let frontend = all[random(all.len() as u64) as usize];
        let connection = Connection { side, client: (client, 2_000 + random(40) as u16), frontend, is_tcp };
        let seen_as = send(&mut gateway, &connection, SYN, b"");
        match open.insert(connection, seen_as) {
            Some(before) => assert_eq!(before, seen_as, "{connection:?} moved"),
            None => assert!(taken.insert((seen_as, is_tcp)), "{connection:?} has the answers of another"),
        }
    }
    let renamed = open.iter().filter(|(connection, (_, seen_as))| *seen_as != connection.client).count();
    println!("{} connections, {renamed} of them with another source", open.len());
    assert!(open.len() > 5_000 && renamed > 2_000);
    // Every one of them, both ways, after all the others were made.
    for (index, (connection, (pod, seen_as))) in open.iter().enumerate() {
        let payload = format!("bytes of {index}");
        assert_eq!(send(&mut gateway, connection, ACK, payload.as_bytes()), (*pod, *seen_as));
        let answer = packet(connection.is_tcp, (*pod, 8080), *seen_as, ACK, payload.as_bytes());
        let back = forwarded(&mut gateway, INSIDE, &answer);
        let from = (rig::source(&back), rig::ports(&back).0);
        let to = (rig::destination(&back), rig::ports(&back).1);
        assert_eq!((from, to), (connection.frontend, connection.client));
        assert!(back.ends_with(payload.as_bytes()) && rig::checksums_right(&back));
    }
}

/// The reliability test E5: a client's port is used again at once, through one VIP.
#[test]
fn a_port_can_be_used_again_at_once() {
    let mut gateway = Gateway::of_objects(HEAD, 1_024, &objects());
    let connection = Connection {
        side: OUTSIDE,
        client: (addr("192.0.2.7"), 4_242),
        frontend: (addr("203.0.113.10"), 80),
        is_tcp: true,
    };
    for _ in 0..5_000 {
        let (pod, seen_as) = send(&mut gateway, &connection, SYN, b"");
        assert_eq!(seen_as, connection.client);
        let answer = |gateway: &mut Gateway, flags| {
            forwarded(gateway, INSIDE, &tcp(pod, 8080, seen_as.0, seen_as.1, flags, b""))
        };
        answer(&mut gateway, SYN | ACK);
        send(&mut gateway, &connection, ACK, b"GET /");
        send(&mut gateway, &connection, FIN | ACK, b"");
        answer(&mut gateway, FIN | ACK);
        send(&mut gateway, &connection, ACK, b"");
        assert_eq!(gateway.flows(), 1);
    }
}
