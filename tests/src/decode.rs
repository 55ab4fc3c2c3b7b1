//! Frames as lines of text, for golden files and for differences that a person can read.
//!
//! Written apart from the forwarder's own parsing on purpose: it is the slow twin that judges it. It takes any bytes; what
//! it cannot make sense of is shown as hex.

use std::net::{Ipv4Addr, Ipv6Addr};

/// How closely two frames are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Every byte shows.
    Exact,
    /// For packets that a gateway makes itself (ICMP errors, RST, echo replies), where routers are free: the IPv4
    /// identification, its "don't fragment" (RFC 6864 section 4.1) and the IPv6 flow label are left out; an ICMP error is taken
    /// with the first 8 bytes behind the inner header (RFC 792), however much more is quoted, and with or without the hop
    /// that was already counted in the quoted TTL.
    Answer,
}

/// The frame as lines, one header a line. Checksums show as `ok`, or with the value that they should have.
pub fn decode(frame: &[u8], strictness: Strictness) -> Vec<String> {
    let mut lines = Vec::new();
    if frame.len() < 14 {
        lines.push(format!("runt {}", hex(frame)));
        return lines;
    }
    lines.push(format!("ethernet {} > {}", mac(&frame[6..12]), mac(&frame[0..6])));
    let mut rest = &frame[12..];
    while rest.len() >= 4 && matches!(u16_at(rest, 0), 0x8100 | 0x88a8) {
        lines.push(format!("vlan {:#06x} tci {:#06x}", u16_at(rest, 0), u16_at(rest, 2)));
        rest = &rest[4..];
    }
    let ethertype = if rest.len() >= 2 { u16_at(rest, 0) } else { 0 };
    let packet = rest.get(2..).unwrap_or_default();
    match ethertype {
        0x0800 => ipv4(packet, strictness, Depth::Outer, &mut lines),
        0x86dd => ipv6(packet, strictness, Depth::Outer, &mut lines),
        other => lines.push(format!("ethertype {other:#06x} {}", hex(packet))),
    }
    lines
}

/// The lines of both, `-` before what was expected and is not there, `+` before what is there instead.
pub fn difference(expected: &[String], got: &[String]) -> String {
    let mut text = String::new();
    for i in 0..expected.len().max(got.len()) {
        match (expected.get(i), got.get(i)) {
            (Some(e), Some(g)) if e == g => text += &format!("    {e}\n"),
            (e, g) => {
                text += &e.map(|line| format!("  - {line}\n")).unwrap_or_default();
                text += &g.map(|line| format!("  + {line}\n")).unwrap_or_default();
            }
        }
    }
    text
}

/// Bytes as hex digits without separators.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hex digits, blanks between them allowed, as bytes.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Whether a packet is the one on the wire, or the one quoted inside an ICMP error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    Outer,
    Quoted,
}

/// The sum of RFC 1071 over `parts`, folded and inverted: 0 if a checksum inside is right.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// `ok`, or what is there and what should be.
fn verdict(stored: u16, difference: u16) -> String {
    if difference == 0 {
        return "ok".into();
    }
    // One's complement: what is missing to the sum is added to what is stored.
    let mut right = u32::from(stored) + u32::from(difference);
    right = (right & 0xffff) + (right >> 16);
    format!("{stored:#06x} (right is {right:#06x})")
}

fn ipv4(packet: &[u8], strictness: Strictness, depth: Depth, lines: &mut Vec<String>) {
    let header_len = packet.first().map_or(0, |b| usize::from(b & 15) * 4);
    if header_len < 20 || packet.len() < header_len || packet[0] >> 4 != 4 {
        lines.push(format!("ipv4? {}", hex(packet)));
        return;
    }
    let (header, total) = (&packet[..header_len], usize::from(u16_at(packet, 2)));
    let fragment = u16_at(packet, 6);
    let mut line = format!(
        "ipv4 {} > {} protocol {} tos {:#04x} ",
        v4(&packet[12..]),
        v4(&packet[16..]),
        packet[9],
        packet[1],
    );
    if strictness == Strictness::Exact || depth == Depth::Outer {
        line += &format!("ttl {} ", packet[8]);
    }
    if strictness == Strictness::Exact || depth == Depth::Quoted {
        let offset = (fragment & 0x1fff) * 8;
        line += &format!(
            "flags {:#x} offset {offset} id {:#06x} length {total} ",
            fragment >> 13,
            u16_at(packet, 4)
        );
    }
    line += &format!("checksum {}", verdict(u16_at(packet, 10), checksum(&[header])));
    if header_len > 20 {
        line += &format!(" options {}", hex(&header[20..]));
    }
    lines.push(line);
    let end = total.clamp(header_len, packet.len());
    let body = &packet[header_len..end];
    let pseudo = [&packet[12..20], &[0, packet[9]], &(body.len() as u16).to_be_bytes()].concat();
    if fragment & 0x1fff != 0 {
        lines.push(format!("fragment {}", hex(body)));
    } else {
        let whole = fragment & 0x2000 == 0 && total <= packet.len();
        transport(packet[9], body, whole.then_some(&pseudo[..]), strictness, depth, lines);
    }
    if end < packet.len() {
        lines.push(format!("trailer {}", hex(&packet[end..])));
    }
}

fn ipv6(packet: &[u8], strictness: Strictness, depth: Depth, lines: &mut Vec<String>) {
    if packet.len() < 40 || packet[0] >> 4 != 6 {
        lines.push(format!("ipv6? {}", hex(packet)));
        return;
    }
    let length = usize::from(u16_at(packet, 4));
    let mut line = format!(
        "ipv6 {} > {} next {} class {:#04x}",
        v6(&packet[8..]),
        v6(&packet[24..]),
        packet[6],
        (u16_at(packet, 0) >> 4) as u8,
    );
    if strictness == Strictness::Exact || depth == Depth::Outer {
        line += &format!(" hops {}", packet[7]);
    }
    if strictness == Strictness::Exact || depth == Depth::Quoted {
        let label = u32::from(u16_at(packet, 0) & 15) << 16 | u32::from(u16_at(packet, 2));
        line += &format!(" label {label:#x} length {length}");
    }
    lines.push(line);
    let end = (40 + length).min(packet.len());
    let (mut next, mut body, mut fragment) = (packet[6], &packet[40..end], 0);
    // Extension headers, RFC 8200 section 4: hop-by-hop, routing, fragment, destination options.
    while let (0 | 43 | 44 | 60, true) = (next, body.len() >= 8) {
        let len = if next == 44 { 8 } else { 8 + usize::from(body[1]) * 8 };
        if body.len() < len {
            break;
        }
        fragment |= if next == 44 { u16_at(body, 2) & 0xfff9 } else { 0 };
        lines.push(format!("extension {next} next {} {}", body[0], hex(&body[1..len])));
        (next, body) = (body[0], &body[len..]);
    }
    let pseudo = [&packet[8..40], &(body.len() as u32).to_be_bytes(), &[0, 0, 0, next]].concat();
    if fragment > 1 {
        lines.push(format!("fragment {}", hex(body)));
    } else {
        let whole = fragment == 0 && 40 + length <= packet.len();
        transport(next, body, whole.then_some(&pseudo[..]), strictness, depth, lines);
    }
    if end < packet.len() {
        lines.push(format!("trailer {}", hex(&packet[end..])));
    }
}

/// `pseudo`: the pseudo header, or none if the packet is not whole and its checksum cannot be told.
fn transport(
    protocol: u8,
    body: &[u8],
    pseudo: Option<&[u8]>,
    strictness: Strictness,
    depth: Depth,
    lines: &mut Vec<String>,
) {
    let lenient = strictness == Strictness::Answer && depth == Depth::Quoted;
    let sum = |stored: usize, parts: &[&[u8]]| match pseudo {
        Some(_) if !lenient => format!("checksum {}", verdict(u16_at(body, stored), checksum(parts))),
        // Not all of it is here: the value itself.
        _ => format!("checksum {:#06x}", u16_at(body, stored)),
    };
    let parts = [pseudo.unwrap_or_default(), body];
    match protocol {
        6 if body.len() >= 20 => {
            let header_len = (usize::from(body[12] >> 4) * 4).clamp(20, body.len());
            let mut line = format!(
                "tcp {} > {} seq {} ack {} flags {:#04x} window {} urgent {} {}",
                u16_at(body, 0),
                u16_at(body, 2),
                u32_at(body, 4),
                u32_at(body, 8),
                body[13],
                u16_at(body, 14),
                u16_at(body, 18),
                sum(16, &parts),
            );
            if lenient {
                // Past the eight bytes of RFC 792 routers differ in how much they quote.
                lines.push(format!("tcp {} > {} seq {}", u16_at(body, 0), u16_at(body, 2), u32_at(body, 4)));
                return;
            }
            if body[12] >> 4 != 5 {
                line += &format!(" offset {} options {}", body[12] >> 4, hex(&body[20..header_len]));
            }
            lines.push(line);
            payload(&body[header_len..], lines);
        }
        17 if body.len() >= 8 => {
            let zero = u16_at(body, 6) == 0;
            let sum = if zero { "checksum none".to_owned() } else { sum(6, &parts) };
            lines.push(format!(
                "udp {} > {} length {} {sum}",
                u16_at(body, 0),
                u16_at(body, 2),
                u16_at(body, 4)
            ));
            if !lenient {
                payload(&body[8..], lines);
            }
        }
        1 | 58 if body.len() >= 8 => {
            let name = if protocol == 1 { "icmp" } else { "icmpv6" };
            let sum = sum(2, if protocol == 1 { &parts[1..] } else { &parts });
            lines.push(format!("{name} {}/{} {} {sum}", body[0], body[1], hex(&body[4..8])));
            let error = if protocol == 1 { matches!(body[0], 3 | 4 | 5 | 11 | 12) } else { body[0] < 128 };
            if error && depth == Depth::Outer {
                lines.push("quotes".into());
                let quoted = if protocol == 1 { ipv4 } else { ipv6 };
                quoted(&body[8..], strictness, Depth::Quoted, lines);
                if strictness == Strictness::Answer {
                    lines.retain(|line| !line.starts_with("trailer"));
                }
            } else if !lenient {
                payload(&body[8..], lines);
            }
        }
        _ => lines.push(format!("protocol {protocol} {}", hex(body))),
    }
}

fn payload(bytes: &[u8], lines: &mut Vec<String>) {
    if !bytes.is_empty() {
        lines.push(format!("payload {} bytes {}", bytes.len(), hex(bytes)));
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn v4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

fn v6(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    octets.into()
}

fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 UDP datagram, checksums right, from RFC 1071 arithmetic done by hand.
    const DATAGRAM: &str =
        "020000000001 020000000002 0800 4500001e000100004011 66cb 0a010002 0a000001 07d00035000a 0000 6869";

    #[test]
    fn a_datagram_reads_as_three_lines_and_its_payload() {
        let lines = decode(&unhex(DATAGRAM).unwrap(), Strictness::Exact);
        assert_eq!(lines[0], "ethernet 02:00:00:00:00:02 > 02:00:00:00:00:01");
        assert!(lines[1].starts_with("ipv4 10.1.0.2 > 10.0.0.1 protocol 17 tos 0x00 ttl 64"), "{}", lines[1]);
        assert!(lines[2].starts_with("udp 2000 > 53 length 10 checksum none"), "{}", lines[2]);
        assert_eq!(lines[3], "payload 2 bytes 6869");
    }

    #[test]
    fn a_wrong_checksum_shows_with_the_right_one() {
        let mut frame = unhex(DATAGRAM).unwrap();
        let right = u16::from_be_bytes([frame[24], frame[25]]);
        frame[24] ^= 0x40;
        let lines = decode(&frame, Strictness::Exact);
        assert!(lines[1].contains("right is"), "{}", lines[1]);
        assert!(lines[1].contains(&format!("right is {right:#06x}")), "{}", lines[1]);
    }

    #[test]
    fn any_prefix_of_a_frame_can_be_read() {
        let frame = unhex(DATAGRAM).unwrap();
        for len in 0..=frame.len() {
            assert!(!decode(&frame[..len], Strictness::Exact).is_empty());
        }
    }

    #[test]
    fn a_difference_marks_only_the_lines_that_differ() {
        let text = difference(&["a".into(), "b".into()], &["a".into(), "c".into(), "d".into()]);
        assert_eq!(text, "    a\n  - b\n  + c\n  + d\n");
    }
}
