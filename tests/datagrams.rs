//! A datagram in fragments is translated as it would be in one packet: the same datagrams into two gateways, whole into the one, in
//! pieces of any size and in any order into the other. With SCTP, which Linux's gateway beside the golden packets does not have.

use std::net::IpAddr;

use config::gateway::Gateway;
use etherparse::{IpNumber, PacketBuilder, TcpHeader};
use forwarder::packet::BURST;
use forwarder::pipeline::Rng;
use forwarder::verdict::{Reason, Verdict};
use tests::case::{Side, folder};
use tests::decode::{Strictness, decode, difference};
use tests::fragments::{cut, join};
use tests::length;
use tests::pure::Pure;

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

fn gateway() -> Pure {
    let file = folder().join("gateway.toml");
    let gateway = Gateway::load(&file).unwrap();
    let ports = "{name: tcp, protocol: TCP, port: 80}, {name: udp, protocol: UDP, port: 80}, {name: sctp, protocol: SCTP, port: 80}";
    let targets = ports.replace("port: 80", "port: 8080");
    let mut objects = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: web}}\nspec: {{type: LoadBalancer, \
         clusterIPs: [10.96.0.10, 'fd00:96::10'], ipFamilies: [IPv4, IPv6], ipFamilyPolicy: RequireDualStack, ports: [{ports}]}}\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}, {{ip: '2001:db8::10'}}]}}}}\n"
    );
    for (family, pod) in [("IPv4", "10.244.1.10"), ("IPv6", "fd00:244:1::10")] {
        objects += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: default, name: web-{}, \
             labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports: [{targets}]\n\
             endpoints: [{{addresses: ['{pod}'], nodeName: node-1, conditions: {{ready: true}}}}]\n",
            family.to_lowercase()
        );
    }
    Pure::new(gateway, &objects).unwrap()
}

/// A frame from `src` to `dst`.
fn frame(side: Side, protocol: u8, src: (&str, u16), dst: (&str, u16), payload: &[u8]) -> Vec<u8> {
    let to = if side == Side::Outside { [2, 0, 0, 0, 0, 1] } else { [2, 0, 0, 0, 1, 1] };
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], to);
    let ip = match (src.0.parse().unwrap(), dst.0.parse().unwrap()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        _ => panic!("two families"),
    };
    let mut frame = Vec::new();
    match protocol {
        TCP => {
            let header = TcpHeader { ack: true, ..TcpHeader::new(src.1, dst.1, 1000, 8192) };
            ip.tcp_header(header).write(&mut frame, payload).unwrap();
        }
        UDP => ip.udp(src.1, dst.1).write(&mut frame, payload).unwrap(),
        _ => {
            let mut packet = [&src.1.to_be_bytes()[..], &dst.1.to_be_bytes(), &[0; 8], payload].concat();
            forwarder::wire::sctp::set_checksum(&mut packet);
            ip.write(&mut frame, IpNumber(protocol), &packet).unwrap();
        }
    }
    frame
}

/// The two gateways, and what they are asked.
struct Twins {
    whole: Pure,
    pieces: Pure,
    rng: Rng,
    next_id: u32,
}

impl Twins {
    fn below(&mut self, n: usize) -> usize {
        (self.rng.next() >> 33) as usize % n
    }

    /// Feeds `frame` whole to the one gateway and in pieces to the other, and compares what leaves. Returns it.
    fn feed(&mut self, side: Side, protocol: u8, frame: &[u8]) -> Vec<u8> {
        self.next_id += 1;
        let v4 = frame[12..14] == [0x08, 0x00];
        // In one piece it has the identification of the others, and no "don't fragment".
        let one = if v4 { cut(frame, self.next_id, frame.len()).remove(0) } else { frame.to_vec() };
        let whole = self.whole.feed(side, &one);
        assert_eq!(whole.emitted.len(), 1, "{:?}", whole.verdict);
        let headers_len = if v4 { 34 } else { 54 };
        let data_len = frame.len() - headers_len;
        // As many pieces as may be, at most, and at least two.
        let least = data_len.div_ceil(BURST).div_ceil(8);
        let size = 8 * (least + self.below(data_len.div_ceil(8) - least));
        let mut pieces = cut(frame, self.next_id, size);
        for at in (1..pieces.len()).rev() {
            let other = self.below(at + 1);
            pieces.swap(at, other);
        }
        let mut left = Vec::new();
        let mut verdict = Verdict::Gather;
        for (number, piece) in pieces.iter().enumerate() {
            // Now and then twice, but not after the datagram has left.
            for _ in 0..1 + usize::from(number + 1 < pieces.len() && self.below(5) == 0) {
                let outcome = self.pieces.feed(side, piece);
                left.extend(outcome.emitted.into_iter().map(|out| out.frame));
                verdict = outcome.verdict;
            }
        }
        let needed = match protocol {
            TCP => 20,
            SCTP => 12,
            _ => 8,
        };
        if size < needed {
            assert_eq!(
                (verdict, left.len()),
                (Verdict::Drop(Reason::FragmentTiny), 0),
                "{size} bytes a piece"
            );
            // So that both have the connection.
            self.pieces.feed(side, &one);
        } else {
            assert_eq!(left.len(), pieces.len(), "{size} bytes a piece: {verdict:?}");
            assert!(left.iter().all(|piece| piece.len() <= headers_len + 8 + size));
            let (joined, expected) = (join(&left), &whole.emitted[0].frame);
            let lines = |frame: &[u8]| decode(frame, Strictness::Exact);
            assert_eq!(joined.len(), 1, "{size} bytes a piece");
            assert!(joined[0] == *expected, "{}", difference(&lines(expected), &lines(&joined[0])));
        }
        whole.emitted[0].frame.clone()
    }
}

#[test]
fn pieces_become_what_the_whole_becomes() {
    let mut twins = Twins { whole: gateway(), pieces: gateway(), rng: Rng::new(7), next_id: 0 };
    for round in 0..length::pick(600, 20_000u32) {
        let protocol = [TCP, UDP, SCTP][twins.below(3)];
        let (client, vip, pod) = if twins.below(2) == 0 {
            ("10.1.0.2", "203.0.113.10", "10.244.1.10")
        } else {
            ("fd00:1::2", "2001:db8::10", "fd00:244:1::10")
        };
        let port = 61_000 + (round % 1_000) as u16;
        let payload: Vec<u8> = (0..8 + twins.below(1_380)).map(|_| twins.rng.next() as u8).collect();
        let request = frame(Side::Outside, protocol, (client, port), (vip, 80), &payload);
        let sent = twins.feed(Side::Outside, protocol, &request);
        // The Service masquerades: the answer goes to whom the pod saw.
        let (gateway, l4) = if client.contains(':') { ("fd00:2::1", 54) } else { ("10.2.0.1", 34) };
        let seen = u16::from_be_bytes([sent[l4], sent[l4 + 1]]);
        let reply = frame(Side::Inside, protocol, (pod, 8080), (gateway, seen), &payload);
        twins.feed(Side::Inside, protocol, &reply);
    }
}

/// No router makes them (RFC 1812 section 4.3.2.3), and a translation would have to trust a checksum over bytes elsewhere.
#[test]
fn an_icmp_error_in_fragments_about_a_connection_goes_nowhere() {
    let mut gateway = Pure::golden().unwrap();
    let client = ("10.1.0.2", 61_007);
    gateway.feed(Side::Outside, &frame(Side::Outside, UDP, client, ("203.0.113.10", 53), b"question"));
    let quoted = frame(Side::Inside, UDP, client, ("10.244.1.10", 5353), &[7; 200]);
    let mut error = Vec::new();
    let unreachable =
        etherparse::Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::Port);
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 1, 1])
        .ipv4([10, 244, 1, 10], [10, 1, 0, 2], 64)
        .icmpv4(unreachable)
        .write(&mut error, &quoted[14..])
        .unwrap();
    assert_eq!(gateway.feed(Side::Inside, &error).emitted.len(), 1);
    let outcomes: Vec<_> =
        cut(&error, 9, 104).iter().map(|piece| gateway.feed(Side::Inside, piece).verdict).collect();
    assert_eq!(outcomes, [Verdict::Gather, Verdict::Gather, Verdict::Drop(Reason::BadL4Checksum)]);
}
