//! Packets to and from pods behind VXLAN, against headers written here byte by byte.

#[allow(dead_code)] // other tests use the rest of it
mod rig;

use forwarder::verdict::{Reason, Verdict};
use rig::{
    CLIENT, CLIENT_MAC, Gateway, INSIDE, NODE_MAC, OUTSIDE, POD_1, POD_2, VIP, VTEP_MAC, addr,
    checksums_right, destination, echo, port_mac, ports, set_ttl, source, syn, tcp, udp,
};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Node and gateway, as ends of the tunnel.
const ENDS: [(&str, &str); 2] = [("10.0.0.2", "10.0.0.1"), ("fd00:1::2", "fd00:1::1")];
/// Clients with a pod of the same family, both behind [`ENDS`].
const PAIRS: [(&str, &str); 2] = [("198.51.100.7", "10.244.1.5"), ("2001:db8:9::7", "fd00:244:0:1::5")];

/// A gateway with the pods of node 1 behind a tunnel.
fn gateway((node, local): (&str, &str)) -> Gateway {
    let mut gateway = Gateway::new();
    gateway.tunnel(addr(node), addr(local), &["10.244.1.0/24", "fd00:244:0:1::/64"]);
    gateway
}

/// Where the VXLAN header is, by the version of the outer packet.
fn vxlan_at(frame: &[u8]) -> usize {
    if frame[12..14] == [8, 0] { 42 } else { 62 }
}

/// `inner` as a node sends it.
fn wrapped((node, local): (&str, &str), inner: &[u8]) -> Vec<u8> {
    let vxlan = [8, 0, 0, 0, 0, 0, 7, 0];
    udp(addr(node), 51_000, addr(local), 4789, &[&vxlan[..], inner].concat())
}

/// What is in a frame to the node of `ends`, after a look at everything around it.
fn unwrapped(ends: (&str, &str), frame: &[u8]) -> Vec<u8> {
    assert_eq!(frame[..12], [NODE_MAC, port_mac(INSIDE)].concat());
    assert_eq!((source(frame), destination(frame)), (addr(ends.1), addr(ends.0)));
    let vxlan = vxlan_at(frame);
    let (from, to) = ports(frame);
    assert!(from >= 49_152 && to == 4789, "{from} {to}");
    let udp_len = usize::from(u16::from_be_bytes([frame[vxlan - 4], frame[vxlan - 3]]));
    assert_eq!(vxlan - 8 + udp_len, frame.len());
    if vxlan == 42 {
        assert_eq!(
            (&frame[20..23], &frame[40..42]),
            (&[0x40, 0, 64][..], &[0, 0][..]),
            "DF, TTL, no checksum"
        );
        assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
    } else {
        assert_eq!(frame[21], 64);
        assert!(checksums_right(frame));
    }
    assert_eq!(frame[vxlan..vxlan + 8], [8, 0, 0, 0, 0, 0, 7, 0]);
    let inner = &frame[vxlan + 8..];
    assert_eq!(inner[..12], [VTEP_MAC, port_mac(INSIDE)].concat());
    inner.to_vec()
}

#[test]
fn what_goes_in_is_what_would_have_gone_without_a_tunnel() {
    for ends in ENDS {
        for (client, pod) in PAIRS {
            let (client, pod) = (addr(client), addr(pod));
            let vip = if pod.is_v4() { VIP } else { addr("2001:db8::10") };
            for packet in [
                udp(client, 4242, pod, 53, b"odd"),
                tcp(client, 4242, pod, 80, ACK, b"data"),
                echo(client, pod, 9, b"ping"),
                tcp(client, 4242, vip, 80, SYN, b""),
            ] {
                let plain = Gateway::new().forwarded(OUTSIDE, INSIDE, &packet);
                if !pod.is_v4() || destination(&plain) == POD_1 {
                    let out = gateway(ends).forwarded(OUTSIDE, INSIDE, &packet);
                    assert_eq!(unwrapped(ends, &out)[12..], plain[12..]);
                }
            }
        }
    }
}

#[test]
fn what_comes_out_is_what_would_have_come_without_a_tunnel() {
    for ends in ENDS {
        for (client, pod) in PAIRS {
            let (client, pod) = (addr(client), addr(pod));
            for packet in [
                udp(pod, 53, client, 4242, b"odd"),
                tcp(pod, 80, client, 4242, ACK, b"data"),
                echo(pod, client, 9, b"ping"),
            ] {
                let plain = Gateway::new().forwarded(INSIDE, OUTSIDE, &packet);
                assert_eq!(gateway(ends).forwarded(INSIDE, OUTSIDE, &wrapped(ends, &packet)), plain);
            }
        }
    }
}

#[test]
fn answers_of_a_service_find_their_connection() {
    let mut gateway = gateway(ENDS[0]);
    let vip = addr("2001:db8::10");
    let (client, pod) = (addr(PAIRS[1].0), addr(PAIRS[1].1));
    let there = gateway.forwarded(OUTSIDE, INSIDE, &tcp(client, 4242, vip, 80, SYN, b""));
    assert_eq!(ports(&unwrapped(ENDS[0], &there)), (4242, 8080));
    let answer = wrapped(ENDS[0], &tcp(pod, 8080, client, 4242, SYN | ACK, b""));
    let back = gateway.forwarded(INSIDE, OUTSIDE, &answer);
    assert_eq!((source(&back), ports(&back)), (vip, (80, 4242)));
    assert!(checksums_right(&back));
}

#[test]
fn from_tunnel_to_tunnel_and_from_tunnel_to_a_plain_route() {
    let mut gateway = gateway(ENDS[0]);
    gateway.tunnel(addr("10.0.0.3"), addr("10.0.0.1"), &["10.244.3.0/24"]);
    let far = addr("10.244.3.9");
    let packet = udp(POD_1, 1, far, 2, b"hello");
    let out = gateway.forwarded(INSIDE, INSIDE, &wrapped(ENDS[0], &packet));
    let inner = unwrapped(("10.0.0.3", "10.0.0.1"), &out);
    assert_eq!((source(&inner), destination(&inner), inner[22]), (POD_1, far, 63), "one hop");
    let out = gateway.forwarded(INSIDE, INSIDE, &wrapped(ENDS[0], &udp(POD_1, 1, POD_2, 2, b"hello")));
    assert_eq!((source(&out), destination(&out), out.len()), (POD_1, POD_2, 14 + 20 + 8 + 5));
    let out = gateway.forwarded(INSIDE, INSIDE, &udp(POD_2, 1, POD_1, 2, b"hello"));
    assert_eq!(source(&unwrapped(ENDS[0], &out)), POD_2);
}

#[test]
fn a_connection_has_one_source_port_and_others_have_others() {
    let mut gateway = gateway(ENDS[1]);
    let mut port =
        |from: u16| ports(&gateway.forwarded(OUTSIDE, INSIDE, &udp(CLIENT, from, POD_1, 53, b""))).0;
    let first: Vec<u16> = (0..50).map(|from| port(1000 + from)).collect();
    let again: Vec<u16> = (0..50).map(|from| port(1000 + from)).collect();
    assert_eq!(first, again);
    let different: std::collections::BTreeSet<u16> = first.into_iter().collect();
    assert!(different.len() > 40, "{different:?}");
}

#[test]
fn unfinished_checksums_are_finished() {
    for ends in ENDS {
        for (client, pod) in PAIRS {
            let mut packet = tcp(addr(pod), 80, addr(client), 4242, ACK, b"data");
            let right = packet.clone();
            let l4 = if addr(pod).is_v4() { 34 } else { 54 };
            let pseudo = forwarder::wire::checksum::pseudo_sum(addr(pod), addr(client), 6, 24);
            let unfinished = forwarder::wire::checksum::fold(pseudo).to_be_bytes();
            packet[l4 + 16..l4 + 18].copy_from_slice(&unfinished);
            let mut gateway = gateway(ends);
            let expected = gateway.forwarded(INSIDE, OUTSIDE, &wrapped(ends, &right));
            assert_eq!(gateway.forwarded(INSIDE, OUTSIDE, &wrapped(ends, &packet)), expected);
            // On the way in they are finished before the outer checksum is.
            let mut packet = tcp(addr(client), 4242, addr(pod), 80, ACK, b"data");
            packet[l4 + 16..l4 + 18].copy_from_slice(&unfinished);
            let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
            assert!(checksums_right(&unwrapped(ends, &out)));
        }
    }
}

/// RFC 6040 section 4.2, on whole frames; and DSCP stays.
#[test]
fn ecn_is_combined_on_the_way_out_and_copied_on_the_way_in() {
    let set = |frame: &mut [u8], at: usize, tos: u8| {
        if frame[at] >> 4 == 4 {
            frame[at + 1] = tos;
            frame[at + 10..at + 12].fill(0);
            let sum = forwarder::wire::checksum::checksum(&frame[at..at + 20]);
            frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
        } else {
            frame[at] = 0x60 | tos >> 4;
            frame[at + 1] = tos << 4;
        }
    };
    let get = |frame: &[u8], at: usize| match frame[at] >> 4 {
        4 => frame[at + 1],
        _ => frame[at] << 4 | frame[at + 1] >> 4,
    };
    let table = [
        [Some(0), Some(0), Some(0), None],
        [Some(1), Some(1), Some(1), Some(3)],
        [Some(2), Some(1), Some(2), Some(3)],
        [Some(3); 4],
    ];
    for ends in ENDS {
        for (client, pod) in PAIRS {
            for (inner, outer) in (0..16u8).map(|i| (i / 4, i % 4)) {
                let mut gateway = gateway(ends);
                let mut packet = udp(addr(pod), 53, addr(client), 4242, b"answer");
                set(&mut packet, 14, 0xb8 | inner);
                let mut frame = wrapped(ends, &packet);
                set(&mut frame, 14, 0x28 | outer);
                let (verdict, out) = gateway.judge(INSIDE, &frame);
                match table[usize::from(inner)][usize::from(outer)] {
                    None => assert_eq!(verdict, Verdict::Drop(Reason::OverlayEcn)),
                    Some(ecn) => {
                        assert_eq!(verdict, Verdict::Forward { port: OUTSIDE });
                        assert_eq!(get(&out, 14), 0xb8 | ecn, "inner {inner} outer {outer}");
                        assert!(checksums_right(&out));
                    }
                }
                let mut packet = udp(addr(client), 4242, addr(pod), 53, b"question");
                set(&mut packet, 14, 0xb8 | inner);
                let out = gateway.forwarded(OUTSIDE, INSIDE, &packet);
                assert_eq!((get(&out, 14), get(&unwrapped(ends, &out), 14)), (0xb8 | inner, 0xb8 | inner));
            }
        }
    }
}

#[test]
fn who_may_not_send_is_dropped_by_name() {
    let ends = ENDS[0];
    let mut gateway = gateway(ends);
    gateway.tunnel(addr("10.0.0.3"), addr("10.0.0.1"), &["10.244.3.0/24"]);
    let good = udp(POD_1, 53, CLIENT, 4242, b"answer");
    let change = |at: usize, byte: u8| {
        let mut frame = wrapped(ends, &good);
        frame[at] = byte;
        frame
    };
    let mut arp = good.clone();
    arp[12..14].copy_from_slice(&[8, 6]);
    let discovery = rig::other(addr("fd00:244:0:1::5"), addr("fd00:1::1"), 58);
    for (port, frame, reason) in [
        (INSIDE, wrapped(("10.0.0.9", ends.1), &good), Reason::OverlaySource),
        (OUTSIDE, wrapped(ends, &good), Reason::OverlaySource),
        (INSIDE, wrapped(("10.0.0.3", ends.1), &good), Reason::OverlayInnerSource),
        (INSIDE, wrapped(ends, &udp(CLIENT, 53, POD_2, 4242, b"")), Reason::OverlayInnerSource),
        (INSIDE, wrapped(ends, &udp(POD_2, 53, CLIENT, 4242, b"")), Reason::OverlayInnerSource),
        (INSIDE, change(42, 0), Reason::OverlayNetwork),
        (INSIDE, change(48, 8), Reason::OverlayNetwork),
        (INSIDE, change(50, 0xff), Reason::OverlayPayload),
        (INSIDE, wrapped(ends, &arp), Reason::OverlayPayload),
        (INSIDE, wrapped(ends, &udp(POD_1, 1, addr("224.0.0.5"), 1, b"")), Reason::OverlayPayload),
        (INSIDE, wrapped(ends, &udp(addr("fe80::1"), 1, addr("fe80::2"), 1, b"")), Reason::OverlayPayload),
        (INSIDE, change(39, 200), Reason::Truncated),
        (INSIDE, change(39, 29), Reason::Truncated),
        (INSIDE, change(72, 3), Reason::BadIpChecksum),
    ] {
        assert_eq!(gateway.judge(port, &frame).0, Verdict::Drop(reason));
    }
    let mut discovery = discovery;
    discovery[54] = 136;
    let verdict = gateway.judge(INSIDE, &wrapped(ends, &discovery)).0;
    assert_eq!(verdict, Verdict::Drop(Reason::OverlayPayload), "neighbor discovery");
    // The node itself may speak to pods.
    let out = gateway.forwarded(INSIDE, INSIDE, &wrapped(ends, &udp(addr(ends.0), 1, POD_2, 2, b"")));
    assert_eq!(source(&out), addr(ends.0));
    // Another port, or another address of ours, is the kernel's.
    let other = udp(addr(ends.0), 51_000, addr(ends.1), 4790, b"something");
    assert_eq!(gateway.judge(INSIDE, &other).0, Verdict::Punt);
    let other = wrapped((ends.0, "198.51.100.1"), &good);
    assert_eq!(gateway.judge(INSIDE, &other).0, Verdict::Punt);
}

#[test]
fn truncated_packets_are_dropped_wherever_they_end() {
    for ends in ENDS {
        for (client, pod) in PAIRS {
            let mut gateway = gateway(ends);
            let inner = udp(addr(pod), 53, addr(client), 4242, b"answer");
            let whole = wrapped(ends, &inner);
            for len in 0..whole.len() {
                let verdict = gateway.judge(INSIDE, &whole[..len]).0;
                assert_eq!(verdict, Verdict::Drop(Reason::Truncated), "{len} bytes");
            }
            // The same in an outer packet that is sound.
            for len in 0..inner.len() {
                let verdict = gateway.judge(INSIDE, &wrapped(ends, &inner[..len])).0;
                assert_eq!(verdict, Verdict::Drop(Reason::Truncated), "{len} bytes inside");
            }
        }
    }
}

#[test]
fn answers_of_the_gateway_go_back_by_the_tunnel() {
    for ends in ENDS {
        let mut gateway = gateway(ends);
        let mut last = udp(POD_1, 1, POD_2, 2, b"hello");
        set_ttl(&mut last, 1);
        let back = gateway.answered(INSIDE, Reason::TtlExceeded, &wrapped(ends, &last));
        assert_eq!(back[6..12], port_mac(INSIDE));
        let inner = unwrapped_answer(ends, &back);
        assert_eq!((source(&inner), destination(&inner)), (addr("10.0.0.1"), POD_1));
        assert!(checksums_right(&inner));
        // A ping of an address of a Service, and a connection to a port that it does not have.
        let back =
            gateway.answered(INSIDE, Reason::EchoAnswered, &wrapped(ends, &echo(POD_1, VIP, 9, b"ping")));
        let inner = unwrapped_answer(ends, &back);
        assert_eq!((source(&inner), destination(&inner)), (VIP, POD_1));
        let closed = tcp(POD_1, 4242, VIP, 81, SYN, b"");
        let back = gateway.answered(INSIDE, Reason::UnknownPort, &wrapped(ends, &closed));
        let inner = unwrapped_answer(ends, &back);
        assert_eq!((ports(&inner), inner[47] & 4), ((81, 4242), 4), "a RST");
    }
}

/// As [`unwrapped`], of an answer to the frame of a test, whose sender has the link-layer address of a client.
fn unwrapped_answer(ends: (&str, &str), frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    assert_eq!(frame[..6], CLIENT_MAC);
    frame[..6].copy_from_slice(&NODE_MAC);
    unwrapped(ends, &frame)
}

#[test]
fn sizes_are_those_of_what_fits_inside() {
    for (ends, mtu) in ENDS.into_iter().zip([1450u16, 1430]) {
        let mut gateway = gateway(ends);
        let with_len = |ip_len: u16| {
            let mut packet = udp(CLIENT, 4242, POD_1, 53, &vec![7; usize::from(ip_len) - 28]);
            packet[20] = 0x40;
            packet[24..26].fill(0);
            let sum = forwarder::wire::checksum::checksum(&packet[14..34]);
            packet[24..26].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        let out = gateway.forwarded(OUTSIDE, INSIDE, &with_len(mtu));
        assert_eq!(out.len(), 1514);
        unwrapped(ends, &out);
        let back = gateway.answered(OUTSIDE, Reason::PacketTooBig, &with_len(mtu + 1));
        assert_eq!(u16::from_be_bytes([back[40], back[41]]), mtu);
        // Segments: what is announced to whom is on the other side of the tunnel.
        let mss = |bytes: u16| [&[2, 4][..], &bytes.to_be_bytes()].concat();
        let out = gateway.forwarded(OUTSIDE, INSIDE, &syn(CLIENT, 1, POD_1, 80, 0, &mss(1460)));
        assert_eq!(rig::options(&unwrapped(ends, &out)), mss(mtu - 40));
        let answer = wrapped(ends, &syn(POD_1, 80, CLIENT, 1, ACK, &mss(1460)));
        assert_eq!(rig::options(&gateway.forwarded(INSIDE, OUTSIDE, &answer)), mss(mtu - 40));
    }
}

/// Tags belong to the links on both sides of the gateway, not into the tunnel.
#[test]
fn vlan_tags_stay_outside() {
    let tagged = |frame: &[u8]| [&frame[..12], &[0x81, 0, 0, 42], &frame[12..]].concat();
    for ends in ENDS {
        let mut gateway = gateway(ends);
        let packet = udp(CLIENT, 4242, POD_1, 53, b"question");
        let plain = gateway.forwarded(OUTSIDE, INSIDE, &packet);
        assert_eq!(gateway.forwarded(OUTSIDE, INSIDE, &tagged(&packet)), tagged(&plain));
        let packet = wrapped(ends, &udp(POD_1, 53, CLIENT, 4242, b"answer"));
        let plain = gateway.forwarded(INSIDE, OUTSIDE, &packet);
        assert_eq!(gateway.forwarded(INSIDE, OUTSIDE, &tagged(&packet)), tagged(&plain));
    }
}

#[test]
fn the_way_through_a_tunnel_is_told() {
    let mut gateway = gateway(ENDS[0]);
    let steps = gateway.trace(OUTSIDE, &udp(CLIENT, 4242, POD_1, 53, b""));
    let told = "inside a VXLAN packet from 10.0.0.1 to 10.0.0.2".to_owned();
    assert!(steps.contains(&told), "{steps:#?}");
    let steps = gateway.trace(INSIDE, &wrapped(ENDS[0], &udp(POD_1, 53, CLIENT, 4242, b"")));
    let told = "inside a VXLAN packet from 10.0.0.2 to 10.0.0.1".to_owned();
    assert_eq!(steps[0], told, "{steps:#?}");
}
