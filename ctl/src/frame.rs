//! One line about the bytes of a frame, close to what tcpdump prints.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use forwarder::addr::protocol;
use forwarder::wire::{ethernet, icmp, ipv4, ipv6, tcp, udp};
use zerocopy::FromBytes;

/// Letters of TCP flags as tcpdump has them, from the lowest bit on.
const FLAGS: [char; 8] = ['F', 'S', 'R', 'P', '.', 'U', 'E', 'W'];

/// The frame in words. `data`: its first bytes; `len`: its length.
pub fn summary(data: &[u8], len: u32) -> String {
    let Some((ethertype, l3)) = ethernet::payload(data) else { return format!("runt length {len}") };
    let packet = data.get(l3..).unwrap_or_default();
    let known = match ethertype {
        ethernet::ethertype::IPV4 => v4(packet),
        ethernet::ethertype::IPV6 => v6(packet),
        ethernet::ethertype::ARP => Some(format!("arp length {len}")),
        _ => None,
    };
    known.unwrap_or_else(|| format!("ethertype {ethertype:#06x} length {len}"))
}

fn v4(packet: &[u8]) -> Option<String> {
    let (header, _) = ipv4::Header::ref_from_prefix(packet).ok()?;
    let src = IpAddr::V4(Ipv4Addr::from_bits(header.src.get()));
    let dst = IpAddr::V4(Ipv4Addr::from_bits(header.dst.get()));
    let len = usize::from(header.total_len.get()).saturating_sub(header.header_len());
    let offset = header.fragment.get() & ipv4::OFFSET_MASK;
    if offset > 0 {
        let offset = u32::from(offset) * 8;
        return Some(format!("{} {src} > {dst} fragment at {offset} length {len}", name(header.protocol)));
    }
    let payload = packet.get(header.header_len()..).unwrap_or_default();
    Some(layer4(header.protocol, src, dst, payload, len))
}

fn v6(packet: &[u8]) -> Option<String> {
    let (header, rest) = ipv6::Header::ref_from_prefix(packet).ok()?;
    let src = IpAddr::V6(Ipv6Addr::from_bits(header.src.get()));
    let dst = IpAddr::V6(Ipv6Addr::from_bits(header.dst.get()));
    let len = usize::from(header.payload_len.get());
    let Ok(chain) = ipv6::walk(header.next_header, rest) else {
        return Some(format!("{} {src} > {dst} length {len}", name(header.next_header)));
    };
    let len = len.saturating_sub(chain.len);
    if let Some(fragment) = chain.fragment.filter(|fragment| fragment.offset > 0) {
        let offset = fragment.offset;
        return Some(format!("{} {src} > {dst} fragment at {offset} length {len}", name(chain.protocol)));
    }
    let payload = rest.get(chain.len..).unwrap_or_default();
    Some(layer4(chain.protocol, src, dst, payload, len))
}

/// `payload`: what was kept from the layer-4 header on; `len`: how long it is.
fn layer4(number: u8, src: IpAddr, dst: IpAddr, payload: &[u8], len: usize) -> String {
    let ports = |src_port, dst_port| {
        format!("{} {} > {}", name(number), SocketAddr::new(src, src_port), SocketAddr::new(dst, dst_port))
    };
    let found = match number {
        protocol::TCP => tcp::Header::ref_from_prefix(payload).ok().map(|(header, _)| {
            let ends = ports(header.src_port.get(), header.dst_port.get());
            let flags: String = FLAGS
                .iter()
                .enumerate()
                .filter(|(bit, _)| header.flags >> bit & 1 == 1)
                .map(|(_, c)| c)
                .collect();
            let ack = match header.flags & tcp::ACK {
                0 => String::new(),
                _ => format!(" ack {}", header.ack.get()),
            };
            let (seq, window) = (header.seq.get(), header.window.get());
            let len = len.saturating_sub(header.header_len());
            format!("{ends} [{flags}] seq {seq}{ack} win {window} length {len}")
        }),
        protocol::UDP => udp::Header::ref_from_prefix(payload).ok().map(|(header, _)| {
            let ends = ports(header.src_port.get(), header.dst_port.get());
            format!("{ends} length {}", len.saturating_sub(udp::HEADER_LEN))
        }),
        protocol::SCTP => payload.first_chunk::<4>().map(|[s0, s1, d0, d1]| {
            let ends = ports(u16::from_be_bytes([*s0, *s1]), u16::from_be_bytes([*d0, *d1]));
            format!("{ends} length {len}")
        }),
        protocol::ICMP | protocol::ICMPV6 => payload.first_chunk::<8>().map(|header| {
            let what = icmp_message(number, header);
            format!("{} {src} > {dst} {what} length {len}", name(number))
        }),
        _ => None,
    };
    found.unwrap_or_else(|| format!("{} {src} > {dst} length {len}", name(number)))
}

fn icmp_message(number: u8, header: &[u8; 8]) -> String {
    let [kind, code, _, _, i0, i1, s0, s1] = *header;
    let (id, seq) = (u16::from_be_bytes([i0, i1]), u16::from_be_bytes([s0, s1]));
    let is_v4 = number == protocol::ICMP;
    match (is_v4, kind, code) {
        (true, icmp::v4::ECHO_REQUEST, _) | (false, icmp::v6::ECHO_REQUEST, _) => {
            format!("echo request id {id} seq {seq}")
        }
        (true, icmp::v4::ECHO_REPLY, _) | (false, icmp::v6::ECHO_REPLY, _) => {
            format!("echo reply id {id} seq {seq}")
        }
        (true, icmp::v4::UNREACHABLE, icmp::v4::CODE_PORT)
        | (false, icmp::v6::UNREACHABLE, icmp::v6::CODE_PORT) => "port unreachable".to_owned(),
        (true, icmp::v4::UNREACHABLE, icmp::v4::CODE_TOO_BIG) => format!("too big, mtu {seq}"),
        (false, icmp::v6::TOO_BIG, _) => {
            format!("too big, mtu {}", u32::from_be_bytes([i0, i1, s0, s1]))
        }
        (true, icmp::v4::UNREACHABLE, _) | (false, icmp::v6::UNREACHABLE, _) => {
            format!("unreachable, code {code}")
        }
        (true, icmp::v4::TIME_EXCEEDED, _) | (false, icmp::v6::TIME_EXCEEDED, _) => {
            "time exceeded".to_owned()
        }
        _ => format!("type {kind} code {code}"),
    }
}

fn name(number: u8) -> String {
    forwarder::control::flow::protocol_name(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ethertype: u16, packet: &[&[u8]]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet.concat());
        frame
    }

    fn ip4(protocol: u8, fragment: u16, payload: usize) -> Vec<u8> {
        let mut header = vec![0x45, 0];
        header.extend((20 + payload as u16).to_be_bytes());
        header.extend([0, 0]);
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0, 198, 51, 100, 7, 203, 0, 113, 10]);
        header
    }

    fn ip6(next_header: u8, payload: u16) -> Vec<u8> {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(payload.to_be_bytes());
        header.extend([next_header, 64]);
        for last in [1u8, 2] {
            header.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        header
    }

    const TCP: [u8; 20] = [0x10, 0x92, 0, 80, 0, 0, 0, 9, 0, 0, 0, 5, 0x50, 0x12, 0xfa, 0xf0, 0, 0, 0, 0];

    #[test]
    fn frames_in_words() {
        let udp = [0x10, 0x92, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4];
        for (bytes, text) in [
            (
                frame(0x0800, &[&ip4(6, 0, 24), &TCP, b"data"]),
                "tcp 198.51.100.7:4242 > 203.0.113.10:80 [S.] seq 9 ack 5 win 64240 length 4",
            ),
            (frame(0x0800, &[&ip4(17, 0, 12), &udp]), "udp 198.51.100.7:4242 > 203.0.113.10:53 length 4"),
            (frame(0x86dd, &[&ip6(17, 12), &udp]), "udp [2001:db8::1]:4242 > [2001:db8::2]:53 length 4"),
            (
                frame(0x86dd, &[&ip6(0, 20), &[17, 0, 1, 4, 0, 0, 0, 0], &udp]),
                "udp [2001:db8::1]:4242 > [2001:db8::2]:53 length 4",
            ),
            (frame(0x0800, &[&ip4(132, 0, 12), &udp]), "sctp 198.51.100.7:4242 > 203.0.113.10:53 length 12"),
            (
                frame(0x0800, &[&ip4(1, 0, 8), &[8, 0, 0, 0, 0, 7, 0, 1]]),
                "icmp 198.51.100.7 > 203.0.113.10 echo request id 7 seq 1 length 8",
            ),
            (
                frame(0x0800, &[&ip4(1, 0, 8), &[3, 4, 0, 0, 0, 0, 5, 0]]),
                "icmp 198.51.100.7 > 203.0.113.10 too big, mtu 1280 length 8",
            ),
            (
                frame(0x86dd, &[&ip6(58, 8), &[1, 4, 0, 0, 0, 0, 0, 0]]),
                "icmpv6 2001:db8::1 > 2001:db8::2 port unreachable length 8",
            ),
            (
                frame(0x0800, &[&ip4(17, 0x2003, 12), &udp]),
                "udp 198.51.100.7 > 203.0.113.10 fragment at 24 length 12",
            ),
            (
                frame(0x86dd, &[&ip6(44, 20), &[17, 0, 0, 16, 0, 0, 0, 7], &udp]),
                "udp 2001:db8::1 > 2001:db8::2 fragment at 16 length 12",
            ),
            (frame(0x0800, &[&ip4(47, 0, 12), &udp]), "47 198.51.100.7 > 203.0.113.10 length 12"),
            (frame(0x0806, &[&[0; 28]]), "arp length 42"),
            (frame(0x88cc, &[&[0; 28]]), "ethertype 0x88cc length 42"),
            (frame(0x0800, &[&[0x45; 3]]), "ethertype 0x0800 length 17"),
            (b"runt".to_vec(), "runt length 4"),
        ] {
            assert_eq!(summary(&bytes, bytes.len() as u32), text);
        }
    }

    #[test]
    fn a_frame_cut_anywhere_is_no_trouble() {
        for whole in [
            frame(0x0800, &[&ip4(6, 0, 24), &TCP, b"data"]),
            frame(0x86dd, &[&ip6(0, 28), &[6, 0, 1, 4, 0, 0, 0, 0], &TCP]),
            frame(0x0800, &[&ip4(1, 0, 8), &[3, 4, 0, 0, 0, 0, 5, 0]]),
            vec![0xff; 80],
        ] {
            for cut in 0..whole.len() {
                assert!(!summary(&whole[..cut], whole.len() as u32).is_empty());
            }
        }
    }
}
