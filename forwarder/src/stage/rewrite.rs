//! Changes the frame as the stages before decided. The only stage that writes into frames, one packet at a time, last of all.
//!
//! Checksums change incrementally (RFC 1624 section 3), so that a corrupt packet stays corrupt; a zero UDP checksum stays zero
//! (RFC 768). Checksums that Linux left for the hardware are finished here.

use af_xdp::{Frame, HEAD_LEN};
use zerocopy::FromBytes;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Answer, Layer4, Packet, Part, Rewrite};
use crate::stage::icmp_error;
use crate::tables::Fib;
use crate::wire::checksum::{self, Delta};
use crate::wire::{ethernet, icmp, ipv4, ipv6, sctp, tcp, udp};

/// TTL and hop limit of packets of our own (RFC 1700, net.ipv4.ip_default_ttl).
const OWN_TTL: u8 = 64;
/// An ICMP error quotes as much as fits this many bytes, IP header included (RFC 1812 section 4.3.2.3).
const MAX_ERROR_V4: usize = 576;

/// Rewrites the frame of one packet whose verdict is forward or answer. `tails`: the frame's further descriptors; after an answer
/// [`Packet::tail_len`] is 0 and they are not part of the packet any more.
///
/// Worker thread; no lookup, no allocation. Returns false if an answer does not fit the frame; nothing is to be sent then.
pub fn apply(packet: &mut Packet, tails: &[Frame], fib: &Fib) -> bool {
    match packet.rewrite {
        Rewrite::Answer(answer) => return write_answer(packet, answer, fib),
        Rewrite::Reset => return write_reset_onwards(packet),
        Rewrite::Route | Rewrite::Translate => {}
        Rewrite::IcmpError { .. } => translate_error(packet),
    }
    if packet.mss_limit != 0 {
        lower_mss(packet);
    }
    trim(packet);
    change_headers(packet);
    if packet.partial_checksum {
        finish_checksum(packet, tails);
    }
    true
}

/// Writes what nearly every packet needs: addresses, ports, one hop less, and the link layer.
#[inline]
fn change_headers(packet: &mut Packet) {
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let translates = packet.rewrite == Rewrite::Translate;
    if translates && packet.layer4 == Layer4::Sctp {
        translate_sctp(packet);
    }
    let Packet { frame, tuple: old, out: new, macs, layer4, partial_checksum: partial, ttl, .. } = packet;
    let data = if l4 + tcp::HEADER_LEN <= HEAD_LEN { frame.head_mut() } else { frame.data_mut() };
    if translates && (l3, l4) == (ethernet::HEADER_LEN, PLAIN_V4_L4) && !*partial {
        let is_done = match layer4 {
            Layer4::Udp => translate_plain::<{ PLAIN_V4_L4 + udp::CHECKSUM_OFFSET }>(data, old, new),
            Layer4::Tcp { .. } => translate_plain::<{ PLAIN_V4_L4 + tcp::CHECKSUM_OFFSET }>(data, old, new),
            _ => false,
        };
        if is_done {
            return ethernet::set_addresses(data, macs.0, macs.1);
        }
    }
    if translates && *layer4 != Layer4::Sctp {
        translate(data, (l3, l4), (old, new), *layer4, *partial);
    }
    set_ttl(data, l3, old.src.is_v4(), ttl.wrapping_sub(1));
    ethernet::set_addresses(data, macs.0, macs.1);
}

/// Where layer 4 begins behind an Ethernet header without tags and an IPv4 header without options.
const PLAIN_V4_L4: usize = ethernet::HEADER_LEN + ipv4::HEADER_LEN;

/// [`translate`] and [`set_ttl`] for TCP and UDP over IPv4 without tags and options, which is what most packets are: every place is
/// known, and each checksum is written once. `CHECKSUM`: where that of layer 4 is. False: it is not in the frame, nothing is done.
#[inline]
fn translate_plain<const CHECKSUM: usize>(data: &mut [u8], old: &Tuple, new: &Tuple) -> bool {
    const L3: usize = ethernet::HEADER_LEN;
    const L4: usize = PLAIN_V4_L4;
    if data.len() < CHECKSUM + 2 {
        return false;
    }
    // Words of 32 bits fold to the sum of their halves, so they may be added as they are.
    let change = |old: u32, new: u32| u64::from(!old) + u64::from(new);
    let addresses =
        change(old.src.v4_bits(), new.src.v4_bits()) + change(old.dst.v4_bits(), new.dst.v4_bits());
    let ports = |tuple: &Tuple| u32::from(tuple.src_port) << 16 | u32::from(tuple.dst_port);
    let layer4 = addresses + change(ports(old), ports(new));
    // One hop less: 0x0100 less in the word that TTL and protocol are.
    data[L3 + 8] = data[L3 + 8].wrapping_sub(1);
    let hop = u64::from(!0x0100u16);
    let sum = !checksum::fold(u64::from(!word_at(data, L3 + 10)) + addresses + hop);
    put_word(data, L3 + 10, sum);
    data[L3 + 12..L3 + 16].copy_from_slice(&new.src.v4_bits().to_be_bytes());
    data[L3 + 16..L3 + 20].copy_from_slice(&new.dst.v4_bits().to_be_bytes());
    data[L4..L4 + 4].copy_from_slice(&ports(new).to_be_bytes());
    let is_udp = CHECKSUM == L4 + udp::CHECKSUM_OFFSET;
    let old = word_at(data, CHECKSUM);
    if !(is_udp && old == 0) {
        let sum = match !checksum::fold(u64::from(!old) + layer4) {
            0 if is_udp => 0xffff,
            sum => sum,
        };
        put_word(data, CHECKSUM, sum);
    }
    true
}

/// Cuts link-layer padding off, so that no byte past the IP length leaves (CVE-2003-0001 is what happens otherwise).
fn trim(packet: &mut Packet) {
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    if packet.tail_len == 0 && packet.frame.data().len() > end {
        let _ = packet.frame.set_len(end);
    }
}

/// The bytes of the headers, to be changed: by the way that a restart can undo, if they are few enough.
#[inline]
fn headers_mut(packet: &mut Packet) -> &mut [u8] {
    bytes_mut(packet, usize::from(packet.l4) + tcp::HEADER_LEN)
}

/// At least the first `end` bytes, as far as the frame has them, to be changed in the same way.
#[inline]
fn bytes_mut(packet: &mut Packet, end: usize) -> &mut [u8] {
    if end <= HEAD_LEN { packet.frame.head_mut() } else { packet.frame.data_mut() }
}

fn word_at(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

fn put_word(data: &mut [u8], at: usize, word: u16) {
    data[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

/// Writes the addresses of an IP header at `l3`; returns how they change sums over them.
fn set_addresses(data: &mut [u8], l3: usize, old: (Addr, Addr), new: (Addr, Addr)) -> Delta {
    let delta = Delta::ZERO.addr(old.0, new.0).addr(old.1, new.1);
    if old.0.is_v4() {
        data[l3 + 12..l3 + 16].copy_from_slice(&new.0.v4_bits().to_be_bytes());
        data[l3 + 16..l3 + 20].copy_from_slice(&new.1.v4_bits().to_be_bytes());
        let sum = delta.apply(word_at(data, l3 + 10));
        put_word(data, l3 + 10, sum);
    } else {
        data[l3 + 8..l3 + 24].copy_from_slice(&new.0.0.to_be_bytes());
        data[l3 + 24..l3 + 40].copy_from_slice(&new.1.0.to_be_bytes());
    }
    delta
}

/// Writes ports at `l4` and updates the layer-4 checksum there, as far as `data` reaches.
fn set_ports(data: &mut [u8], l4: usize, protocol: u8, old: (u16, u16), new: (u16, u16), addresses: Delta) {
    put_word(data, l4, new.0);
    put_word(data, l4 + 2, new.1);
    let delta = addresses.word(old.0, new.0).word(old.1, new.1);
    let at = l4
        + match protocol {
            protocol::TCP => tcp::CHECKSUM_OFFSET,
            protocol::UDP => udp::CHECKSUM_OFFSET,
            _ => return,
        };
    if data.len() < at + 2 {
        return;
    }
    let old = word_at(data, at);
    if protocol == protocol::UDP && old == 0 {
        return;
    }
    let sum = match delta.apply(old) {
        0 if protocol == protocol::UDP => 0xffff,
        sum => sum,
    };
    put_word(data, at, sum);
}

/// Writes the identifier of an ICMP echo message at `l4`, old and new in `id`, and updates its checksum, which covers addresses in
/// ICMPv6 only (RFC 4443 section 2.3).
fn set_echo_id(data: &mut [u8], l4: usize, id: (u16, u16), is_v4: bool, addresses: Delta) {
    put_word(data, l4 + 4, id.1);
    let delta = if is_v4 { Delta::ZERO } else { addresses }.word(id.0, id.1);
    let sum = delta.apply(word_at(data, l4 + 2));
    put_word(data, l4 + 2, sum);
}

/// Writes `new` into the headers at `l3` and `l4`, which have `old`.
fn translate(
    data: &mut [u8],
    (l3, l4): (usize, usize),
    (old, new): (&Tuple, &Tuple),
    layer4: Layer4,
    partial: bool,
) {
    let addresses = set_addresses(data, l3, (old.src, old.dst), (new.src, new.dst));
    match layer4 {
        Layer4::Tcp { .. } | Layer4::Udp if !partial => {
            let ports = ((old.src_port, old.dst_port), (new.src_port, new.dst_port));
            set_ports(data, l4, old.protocol, ports.0, ports.1, addresses);
        }
        Layer4::Tcp { .. } | Layer4::Udp => {
            put_word(data, l4, new.src_port);
            put_word(data, l4 + 2, new.dst_port);
        }
        // Requests and replies are told apart by their direction only: in both, one identifier is both ports.
        Layer4::Echo { .. } => {
            set_echo_id(data, l4, (old.src_port, new.src_port), old.src.is_v4(), addresses)
        }
        _ => {}
    }
}

/// SCTP's CRC covers the ports, but no address (RFC 9260 section 6.8).
fn translate_sctp(packet: &mut Packet) {
    let (old, new) = (packet.tuple, packet.out);
    let (l3, l4, l4_len) = (usize::from(packet.l3), usize::from(packet.l4), packet.layer4_len());
    let data = packet.frame.data_mut();
    set_addresses(data, l3, (old.src, old.dst), (new.src, new.dst));
    let ports = [data[l4], data[l4 + 1], data[l4 + 2], data[l4 + 3]];
    put_word(data, l4, new.src_port);
    put_word(data, l4 + 2, new.dst_port);
    if packet.partial_checksum {
        return;
    }
    let changed = [data[l4], data[l4 + 1], data[l4 + 2], data[l4 + 3]];
    let at = l4 + sctp::CHECKSUM_OFFSET;
    let checksum = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
    let checksum = sctp::update_checksum(checksum, ports, changed, l4_len - 4);
    data[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// Lowers maximum segment sizes to the packet's limit (RFC 9293 section 3.7.1).
fn lower_mss(packet: &mut Packet) {
    let (l4, limit, partial) = (usize::from(packet.l4), packet.mss_limit, packet.partial_checksum);
    let end = l4 + packet.tcp_header().len();
    let data = &mut bytes_mut(packet, end)[..end];
    let segment = &mut data[l4..];
    let (mut delta, mut from) = (Delta::ZERO, tcp::HEADER_LEN);
    while let Some(at) = tcp::next_mss(segment, from) {
        from = at + 2;
        let old = word_at(segment, at);
        if old > limit {
            put_word(segment, at, limit);
            // A word at an odd offset counts in the sum with its bytes exchanged (RFC 1071 section 2 B).
            let counted = |word: u16| if at % 2 == 1 { word.swap_bytes() } else { word };
            delta = delta.word(counted(old), counted(limit));
        }
    }
    if !partial {
        let sum = delta.apply(word_at(segment, tcp::CHECKSUM_OFFSET));
        put_word(segment, tcp::CHECKSUM_OFFSET, sum);
    }
}

/// Translates an ICMP error and the packet that it quotes, RFC 5508 section 4.2.
fn translate_error(packet: &mut Packet) {
    let Rewrite::IcmpError { quoted_from, quoted_to } = packet.rewrite else { return };
    let Some(quote) = icmp_error::quote(packet) else { return };
    let (old, new) = (packet.tuple, packet.out);
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let end = l3 + usize::from(packet.ip_len);
    let data = packet.frame.data_mut();
    let end = end.min(data.len());
    set_addresses(data, l3, (old.src, old.dst), (new.src, new.dst));
    let addresses = set_addresses(
        &mut data[..end],
        quote.l3,
        (quoted_from.src, quoted_from.dst),
        (quoted_to.src, quoted_to.dst),
    );
    if matches!(quote.protocol, protocol::ICMP | protocol::ICMPV6) {
        let id = (quoted_from.src_port, quoted_to.src_port);
        set_echo_id(&mut data[..end], quote.l4, id, old.src.is_v4(), addresses);
    } else {
        let ports = ((quoted_from.src_port, quoted_from.dst_port), (quoted_to.src_port, quoted_to.dst_port));
        set_ports(&mut data[..end], quote.l4, quote.protocol, ports.0, ports.1, addresses);
    }
    set_icmp_checksum(&mut data[l4..end], new.src, new.dst);
}

/// Computes the checksum of a whole ICMP or ICMPv6 message anew.
fn set_icmp_checksum(message: &mut [u8], src: Addr, dst: Addr) {
    put_word(message, 2, 0);
    let pseudo =
        if src.is_v4() { 0 } else { checksum::pseudo_sum(src, dst, protocol::ICMPV6, message.len()) };
    let sum = !checksum::fold(checksum::sum(message) + pseudo);
    put_word(message, 2, sum);
}

/// Writes TTL or hop limit.
fn set_ttl(data: &mut [u8], l3: usize, v4: bool, ttl: u8) {
    if v4 {
        let old = word_at(data, l3 + 8);
        let new = u16::from_be_bytes([ttl, data[l3 + 9]]);
        put_word(data, l3 + 8, new);
        let sum = Delta::ZERO.word(old, new).apply(word_at(data, l3 + 10));
        put_word(data, l3 + 10, sum);
    } else {
        data[l3 + 7] = ttl;
    }
}

/// Computes the TCP or UDP checksum that Linux left unfinished.
fn finish_checksum(packet: &mut Packet, tails: &[Frame]) {
    let l4 = usize::from(packet.l4);
    if packet.layer4 == Layer4::Sctp {
        let l4_len = packet.layer4_len();
        let data = packet.frame.data();
        let first = &data[l4..data.len().min(l4 + l4_len)];
        let parts = std::iter::once(first).chain(tails.iter().map(|frame| frame.data()));
        let checksum = sctp::checksum_of(parts, l4_len).to_le_bytes();
        packet.frame.data_mut()[l4 + sctp::CHECKSUM_OFFSET..][..checksum.len()].copy_from_slice(&checksum);
        return;
    }
    let out = packet.out;
    let (at, is_udp) = match packet.layer4 {
        Layer4::Tcp { .. } => (l4 + tcp::CHECKSUM_OFFSET, false),
        Layer4::Udp => (l4 + udp::CHECKSUM_OFFSET, true),
        _ => return,
    };
    let l4_len = packet.layer4_len();
    put_word(headers_mut(packet), at, 0);
    let data = packet.frame.data();
    let first = &data[l4..data.len().min(l4 + l4_len)];
    let mut total = checksum::pseudo_sum(out.src, out.dst, out.protocol, l4_len) + checksum::sum(first);
    let (mut left, mut odd) = (l4_len - first.len(), first.len() % 2 == 1);
    for tail in tails.iter().map(|frame| frame.data()) {
        let part = &tail[..tail.len().min(left)];
        let sum = checksum::fold(checksum::sum(part));
        // A part that begins at an odd offset sums with its bytes exchanged (RFC 1071 section 2 B).
        total += u64::from(if odd { sum.swap_bytes() } else { sum });
        left -= part.len();
        odd ^= part.len() % 2 == 1;
    }
    let sum = match !checksum::fold(total) {
        0 if is_udp => 0xffff,
        sum => sum,
    };
    put_word(headers_mut(packet), at, sum);
}

/// Turns the frame into an answer to its sender.
fn write_answer(packet: &mut Packet, answer: Answer, fib: &Fib) -> bool {
    packet.tail_len = 0;
    let written = match answer {
        Answer::EchoReply => write_echo_reply(packet),
        Answer::Reset => write_reset(packet),
        Answer::PortUnreachable | Answer::NoRoute | Answer::TimeExceeded | Answer::TooBig { .. } => {
            write_icmp_error(packet, answer, fib)
        }
    };
    if written {
        let data = packet.frame.data_mut();
        let (destination, source) = (ethernet::source(data), ethernet::destination(data));
        ethernet::set_addresses(data, destination, source);
    }
    written
}

/// RFC 792, RFC 4443 section 4.2: the same message back, in the same fragments if it came in fragments.
fn write_echo_reply(packet: &mut Packet) -> bool {
    trim(packet);
    let (src, dst) = (packet.tuple.dst, packet.tuple.src);
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let data = packet.frame.data_mut();
    if data.len() < l3 + usize::from(packet.ip_len) {
        return false;
    }
    let v4 = src.is_v4();
    if packet.part != Part::Later {
        let old = word_at(data, l4);
        data[l4] = if v4 { icmp::v4::ECHO_REPLY } else { icmp::v6::ECHO_REPLY };
        let sum = Delta::ZERO.word(old, word_at(data, l4)).apply(word_at(data, l4 + 2));
        put_word(data, l4 + 2, sum);
    }
    set_addresses(data, l3, (dst, src), (src, dst));
    set_ttl(data, l3, v4, OWN_TTL);
    true
}

/// RFC 9293 section 3.10.7.1: the RST that a closed port sends.
fn write_reset(packet: &mut Packet) -> bool {
    let l4 = usize::from(packet.l4);
    let l4_len = packet.layer4_len();
    let Ok((header, _)) = tcp::Header::ref_from_prefix(&packet.frame.data()[l4..]) else { return false };
    let control = u32::from(header.flags & (tcp::SYN | tcp::FIN) != 0);
    let segment_len = (l4_len - header.header_len()) as u32 + control;
    let (seq, ack, flags) = if header.flags & tcp::ACK != 0 {
        (header.ack.get(), 0, tcp::RST)
    } else {
        (0, header.seq.get().wrapping_add(segment_len), tcp::RST | tcp::ACK)
    };
    write_tcp_header(packet, packet.tuple.reversed(), seq, ack, flags)
}

/// A RST to where the packet was going, in place of its first byte: what the receiver waits for, if nothing was lost before.
fn write_reset_onwards(packet: &mut Packet) -> bool {
    let l4 = usize::from(packet.l4);
    let Ok((header, _)) = tcp::Header::ref_from_prefix(&packet.frame.data()[l4..]) else { return false };
    let (seq, ack, flags) = (header.seq.get(), header.ack.get(), header.flags & tcp::ACK | tcp::RST);
    packet.tail_len = 0;
    let written = write_tcp_header(packet, packet.out, seq, ack, flags);
    if written {
        let (destination, source) = packet.macs;
        ethernet::set_addresses(packet.frame.data_mut(), destination, source);
    }
    written
}

/// Replaces the packet by a TCP header without options, with `tuple`.
fn write_tcp_header(packet: &mut Packet, tuple: Tuple, seq: u32, ack: u32, flags: u8) -> bool {
    let mut header = [0u8; tcp::HEADER_LEN];
    header[0..2].copy_from_slice(&tuple.src_port.to_be_bytes());
    header[2..4].copy_from_slice(&tuple.dst_port.to_be_bytes());
    header[4..8].copy_from_slice(&seq.to_be_bytes());
    header[8..12].copy_from_slice(&ack.to_be_bytes());
    header[12] = (tcp::HEADER_LEN as u8 / 4) << 4;
    header[13] = flags;
    let pseudo = checksum::pseudo_sum(tuple.src, tuple.dst, protocol::TCP, tcp::HEADER_LEN);
    let sum = !checksum::fold(checksum::sum(&header) + pseudo);
    put_word(&mut header, tcp::CHECKSUM_OFFSET, sum);
    let Some(l4) = write_ip_header(packet, tuple.src, tuple.dst, protocol::TCP, tcp::HEADER_LEN) else {
        return false;
    };
    packet.frame.data_mut()[l4..l4 + tcp::HEADER_LEN].copy_from_slice(&header);
    true
}

/// Writes an IP header of ours without options at the packet's layer 3 and cuts the frame to `payload_len` bytes after it.
/// Returns where the payload begins; `None` if the frame has no room.
fn write_ip_header(
    packet: &mut Packet,
    src: Addr,
    dst: Addr,
    protocol: u8,
    payload_len: usize,
) -> Option<usize> {
    let l3 = usize::from(packet.l3);
    if src.is_v4() {
        let l4 = l3 + ipv4::HEADER_LEN;
        packet.frame.set_len(l4 + payload_len).ok()?;
        let mut header = [0u8; ipv4::HEADER_LEN];
        header[0] = 0x45;
        // ICMP errors have the precedence of internetwork control (RFC 1812 section 4.3.2.5).
        header[1] = if protocol == crate::addr::protocol::ICMP { 0xc0 } else { 0 };
        put_word(&mut header, 2, (ipv4::HEADER_LEN + payload_len) as u16);
        put_word(&mut header, 6, ipv4::DONT_FRAGMENT);
        header[8] = OWN_TTL;
        header[9] = protocol;
        header[12..16].copy_from_slice(&src.v4_bits().to_be_bytes());
        header[16..20].copy_from_slice(&dst.v4_bits().to_be_bytes());
        let sum = checksum::checksum(&header);
        put_word(&mut header, 10, sum);
        packet.frame.data_mut()[l3..l4].copy_from_slice(&header);
        Some(l4)
    } else {
        let l4 = l3 + ipv6::HEADER_LEN;
        packet.frame.set_len(l4 + payload_len).ok()?;
        let mut header = [0u8; ipv6::HEADER_LEN];
        header[0] = 0x60;
        put_word(&mut header, 4, payload_len as u16);
        header[6] = protocol;
        header[7] = OWN_TTL;
        header[8..24].copy_from_slice(&src.0.to_be_bytes());
        header[24..40].copy_from_slice(&dst.0.to_be_bytes());
        packet.frame.data_mut()[l3..l4].copy_from_slice(&header);
        Some(l4)
    }
}

/// An ICMP error that quotes the packet as it came (RFC 792, RFC 1191, RFC 4443 section 3).
fn write_icmp_error(packet: &mut Packet, answer: Answer, fib: &Fib) -> bool {
    let v4 = packet.tuple.src.is_v4();
    let (kind, code, word) = match (answer, v4) {
        (Answer::NoRoute, true) => (icmp::v4::UNREACHABLE, icmp::v4::CODE_NET, 0),
        (Answer::NoRoute, false) => (icmp::v6::UNREACHABLE, icmp::v6::CODE_NO_ROUTE, 0),
        (Answer::TimeExceeded, true) => (icmp::v4::TIME_EXCEEDED, 0, 0),
        (Answer::TimeExceeded, false) => (icmp::v6::TIME_EXCEEDED, 0, 0),
        (Answer::TooBig { mtu }, true) => (icmp::v4::UNREACHABLE, icmp::v4::CODE_TOO_BIG, u32::from(mtu)),
        (Answer::TooBig { mtu }, false) => (icmp::v6::TOO_BIG, 0, u32::from(mtu)),
        (_, true) => (icmp::v4::UNREACHABLE, icmp::v4::CODE_PORT, 0),
        (_, false) => (icmp::v6::UNREACHABLE, icmp::v6::CODE_PORT, 0),
    };
    let source = packet.error_source.or(fib.own_address(packet.port, v4)).unwrap_or(packet.tuple.dst);
    let ip_header_len = if v4 { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
    let max = if v4 { MAX_ERROR_V4 } else { ipv6::MIN_MTU };
    let l3 = usize::from(packet.l3);
    let in_frame = packet.frame.data().len() - l3;
    let quoted = usize::from(packet.ip_len).min(in_frame).min(max - ip_header_len - icmp::HEADER_LEN);
    // The new headers go in front of the quoted packet; the link-layer header moves ahead of them.
    let mut link_header = [0u8; ethernet::HEADER_LEN + 2 * ethernet::TAG_LEN];
    link_header[..l3].copy_from_slice(&packet.frame.data()[..l3]);
    if packet.frame.prepend(ip_header_len + icmp::HEADER_LEN).is_err() {
        return false;
    }
    packet.frame.data_mut()[..l3].copy_from_slice(&link_header[..l3]);
    let protocol = if v4 { protocol::ICMP } else { protocol::ICMPV6 };
    let message_len = icmp::HEADER_LEN + quoted;
    let Some(l4) = write_ip_header(packet, source, packet.tuple.src, protocol, message_len) else {
        return false;
    };
    let destination = packet.tuple.src;
    let message = &mut packet.frame.data_mut()[l4..l4 + message_len];
    message[0] = kind;
    message[1] = code;
    message[4..8].copy_from_slice(&word.to_be_bytes());
    set_icmp_checksum(message, source, destination);
    true
}
