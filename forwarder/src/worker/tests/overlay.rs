//! Pods behind tunnels: what is cut, gathered, punted or longer than a frame on the way.

use super::fragments::{datagram, fragments, joined};
use super::*;
use crate::addr::protocol;
use crate::tables::{Overlay, Tunnel};
use crate::wire::checksum;

const VXLAN: [u8; 8] = [8, 0, 0, 0, 0, 0, 7, 0];
const ENDS: [(&str, &str); 2] = [("10.1.0.2", "10.1.0.1"), ("fd00:1::2", "fd00:1::1")];

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

impl Rig {
    /// Puts 10.2.0.0/16 behind a tunnel, inside of which `mtu` fits.
    fn publish_tunnel(&mut self, (node, local): (&str, &str), mtu: u16) {
        let link = |port| PortLink { mac: mac(port), mtu: 9_100, up: true, ..PortLink::default() };
        let hop = |port, gateway: &str, tunnel| NextHop {
            port,
            gateway: addr(gateway),
            mac: Some(NEXT_HOP_MAC),
            mtu: if port == 1 { mtu } else { 9_100 },
            tunnel,
        };
        let tunnel = Tunnel { node: addr(node), local: addr(local), mac: [2, 0, 0, 0, 9, 9] };
        let addresses = vec![addr(local)];
        let routes = [
            (net("10.2.0.0/16"), Route::NextHop(0)),
            (net("198.51.100.0/24"), Route::NextHop(1)),
            (net("192.0.2.1/32"), Route::Local),
        ];
        self.publisher.publish_fib(Arc::new(Fib {
            epoch: 2,
            routes: Arc::new(Lpm::build(routes)),
            next_hops: vec![hop(1, node, Some(0)), hop(0, "198.51.100.1", None)],
            ports: vec![link(0), link(1)],
            overlay: Some(Arc::new(Overlay { vni: 7, port: 4789, addresses, tunnels: vec![tunnel] })),
        }));
    }

    fn sent_outside(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.running.rings.ports[0].sent()).collect()
    }
}

/// A datagram of a pod behind the tunnel.
fn answer(to: [u8; 4], len: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 9, 9], [2, 0, 0, 0, 7, 7])
        .ipv4([10, 2, 0, 77], to, 64)
        .udp(53, 4242);
    let mut bytes = Vec::new();
    let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    builder.write(&mut bytes, &payload).unwrap();
    bytes
}

/// As the node sends it, over IPv4.
fn wrapped(inner: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(NEXT_HOP_MAC, mac(1)).ipv4([10, 1, 0, 2], [10, 1, 0, 1], 64);
    let mut bytes = Vec::new();
    builder.udp(50_000, 4789).write(&mut bytes, &[&VXLAN[..], inner].concat()).unwrap();
    bytes
}

/// What is inside, IPv4 outside.
fn unwrapped(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    assert!(frames.iter().all(|frame| frame[42..50] == VXLAN));
    frames.into_iter().map(|frame| frame[50..].to_vec()).collect()
}

#[test]
fn what_is_too_long_for_a_tunnel_is_cut_and_every_piece_put_in() {
    let mut rig = Rig::new();
    rig.publish_tunnel(ENDS[0], 1450);
    let whole = datagram("10.2.0.77", 1472);
    rig.running.rings.ports[0].deliver(whole.clone());
    for piece in fragments(&whole, 7, 1480) {
        rig.running.rings.ports[0].deliver(piece);
    }
    while rig.round() > 0 {}
    let sent = rig.sent();
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1508, 140, 1508, 140]);
    // Pieces of one datagram take one way.
    assert_eq!(sent[0][34..36], sent[1][34..36]);
    let inner = unwrapped(sent);
    for pieces in inner.chunks(2) {
        assert_eq!(joined(pieces), whole[34..]);
    }
    assert_eq!((rig.count(Counter::forwarded), rig.count(Counter::datagrams_cut)), (2, 2));
    rig.check_conservation();
}

#[test]
fn inner_fragments_are_gathered_and_outer_ones_dropped() {
    let mut rig = Rig::new();
    rig.publish_tunnel(ENDS[0], 1450);
    let whole = answer([198, 51, 100, 7], 2000);
    let pieces = fragments(&whole, 9, 1424);
    for piece in pieces.iter().rev() {
        rig.running.rings.ports[1].deliver(wrapped(piece));
    }
    while rig.round() > 0 {}
    let sent = rig.sent_outside();
    assert_eq!(sent.len(), 2);
    assert!(sent.iter().all(|frame| frame[..12] == [NEXT_HOP_MAC, mac(0)].concat()));
    assert_eq!(joined(&sent), whole[34..]);
    rig.check_conservation();

    for piece in fragments(&wrapped(&answer([198, 51, 100, 7], 100)), 10, 80) {
        rig.running.rings.ports[1].deliver(piece);
    }
    while rig.round() > 0 {}
    assert_eq!(rig.reason(Reason::OverlayFragment), 2);
    assert_eq!(rig.sent_outside().len(), 0);
    rig.check_conservation();
}

#[test]
fn the_kernel_gets_what_is_inside() {
    let mut rig = Rig::new();
    rig.publish_tunnel(ENDS[0], 1450);
    let inner = answer([192, 0, 2, 1], 30);
    rig.running.rings.ports[1].deliver(wrapped(&inner));
    rig.round();
    let mut frame = [0; 256];
    let len = rustix::io::read(&rig.taps[1], &mut frame).unwrap();
    // In the link-layer header of the outer packet, which is for the port.
    assert_eq!(frame[10..22], [mac(1), NEXT_HOP_MAC].concat());
    assert_eq!(frame[22..len], inner[12..]);
    rig.check_conservation();
}

/// Over IPv6 the outer checksum covers every byte, in however many frames.
#[test]
fn jumbo_packets_go_in_and_come_out_whole() {
    for (node, local) in ENDS {
        let mut rig = Rig::new();
        rig.publish_tunnel((node, local), 9_000);
        let whole = datagram("10.2.0.77", 5_001);
        rig.running.rings.ports[0].deliver(whole.clone());
        rig.round();
        let sent = rig.sent();
        let udp = if addr(node).is_v4() { 34 } else { 54 };
        assert_eq!((sent.len(), sent[0].len()), (1, udp + 16 + whole.len()));
        let frame = &sent[0];
        assert_eq!(frame[udp + 16 + 34..], whole[34..]);
        let sum = checksum::pseudo_sum(addr(local), addr(node), protocol::UDP, frame.len() - udp);
        match addr(node).is_v4() {
            true => assert_eq!(frame[udp + 6..udp + 8], [0, 0]),
            false => assert_eq!(checksum::fold(sum + checksum::sum(&frame[udp..])), 0xffff),
        }
        rig.check_conservation();
    }
    let mut rig = Rig::new();
    rig.publish_tunnel(ENDS[0], 9_000);
    let whole = answer([198, 51, 100, 7], 5_001);
    rig.running.rings.ports[1].deliver(wrapped(&whole));
    rig.round();
    let sent = rig.sent_outside();
    assert_eq!((sent.len(), &sent[0][34..]), (1, &whole[34..]));
    rig.check_conservation();
}
