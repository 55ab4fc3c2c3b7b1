//! Checks the headers and writes what they say into the packet's metadata.
//!
//! What Linux drops silently is dropped here with a reason (RFC 1812 section 5.2.2, net/ipv4/ip_input.c `ip_rcv_core`); what the
//! kernel handles for itself (ARP, neighbor discovery, multicast, link-local) is punted.

use zerocopy::FromBytes;

use config::gateway::SourceChecks;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Fragment, Layer4, Packet, Part};
use crate::pipeline::Context;
use crate::stage::flow::check_source;
use crate::stage::overlay;
use crate::tables::{Fib, PortSettings, Tables};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};
use crate::wire::{checksum, ethernet, icmp, ipv4, ipv6, sctp, tcp, udp};

/// Parses a burst. Packets that are malformed or not ours have a verdict afterwards, all others their tuple.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    for (index, packet) in burst.iter_mut().enumerate() {
        let parsed = if read_plain(packet, cx.tables, cx.fib) {
            Ok(())
        } else {
            packet_headers(packet, cx.tables, cx.fib)
        };
        if let (Some(tunnel), Some(overlay)) = (packet.from_tunnel, &cx.fib.overlay) {
            trace.step(index, || Step::Decapsulate(overlay.tunnels[usize::from(tunnel)]));
        }
        match parsed {
            Ok(()) => trace.step(index, || Step::Parsed(packet.tuple)),
            Err(verdict) => packet.verdict = verdict,
        }
    }
}

/// Fills the metadata of one packet, or says what becomes of it at once.
#[inline(never)]
fn packet_headers(packet: &mut Packet, tables: &Tables, fib: &Fib) -> Result<(), Verdict> {
    let data = packet.frame.data();
    let (ethertype, l3) = ethernet::payload(data).ok_or(Verdict::Drop(Reason::Truncated))?;
    let available = data.len() - l3 + packet.tail_len as usize;
    let checks = tables.settings.source_checks;
    packet_ip(packet, ethertype, l3, available, checks)?;
    check_link_destination(packet, fib)?;
    let settings = tables.settings.ports.get(usize::from(packet.port)).copied().unwrap_or_default();
    if let Some(overlay) = &fib.overlay
        && overlay::is_ours(packet, overlay)
    {
        let inner = overlay::open(packet, overlay, settings)?;
        packet_ip(packet, inner.ethertype, inner.l3, inner.available, checks).map_err(overlay::no_punt)?;
        overlay::check_inner(packet, &inner, fib)?;
    }
    packet.out = packet.tuple;
    if packet.layer4 != Layer4::Fragment {
        parse_l4(packet, 0, settings);
        return Ok(());
    }
    match packet.part {
        Part::First(_) => parse_first_fragment(packet, settings),
        Part::Later => Ok(()),
        // Spoofed ones must not take the room of others while they wait.
        Part::Whole | Part::Fragment(_) => {
            check_source(packet.tuple.src, packet.port, tables, fib).map_err(drop)?;
            Err(Verdict::Gather)
        }
    }
}

/// Reads the IP header at `l3` of the frame, behind which there are `available` bytes, itself included.
#[inline]
fn packet_ip(
    packet: &mut Packet,
    ethertype: u16,
    l3: usize,
    available: usize,
    checks: SourceChecks,
) -> Result<(), Verdict> {
    packet.l3 = l3 as u16;
    match ethertype {
        ethernet::ethertype::IPV4 => parse_v4(packet, available, checks),
        ethernet::ethertype::IPV6 => parse_v6(packet, available, checks),
        _ => Err(Verdict::Punt),
    }
}

/// Reads what most packets are: whole, TCP or UDP over IPv4, without tags and options, and in order. False: something is odd about the
/// packet, be it ever so slightly, and is left to those who look at one thing after the other.
#[inline(always)]
fn read_plain(packet: &mut Packet, tables: &Tables, fib: &Fib) -> bool {
    const L3: usize = ethernet::HEADER_LEN;
    const L4: usize = L3 + ipv4::HEADER_LEN;
    let data = packet.frame.data();
    let Some(head) = data.first_chunk::<{ L4 + udp::HEADER_LEN }>() else { return false };
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (first, second, third) = (word(L3), word(L3 + 4), word(L3 + 8));
    let (src, dst) = (word(L3 + 12), word(L3 + 16));
    let total_len = first as u16;
    let available = data.len() - L3 + packet.tail_len as usize;
    let l4_len = u32::from(total_len).wrapping_sub(ipv4::HEADER_LEN as u32);
    let whole =
        second & u32::from(ipv4::MORE_FRAGMENTS | ipv4::OFFSET_MASK) == 0 && packet.part == Part::Whole;
    // 1 to 223, but for 127: neither is multicast, reserved, loopback or "this network".
    let is_unicast = |addr: u32| (addr >> 24).wrapping_sub(1) < 223 && addr >> 24 != 127;
    let sum = u64::from(first) + u64::from(second) + u64::from(third) + u64::from(src) + u64::from(dst);
    if head[12..14] != ethernet::ethertype::IPV4.to_be_bytes()
        || first >> 24 != 0x45
        || !whole
        || !is_unicast(src)
        || !is_unicast(dst)
        || src == dst
        || checksum::fold(sum) != u16::MAX
        || usize::from(total_len) > available
        || usize::from(total_len) < ipv4::HEADER_LEN + udp::HEADER_LEN
        || fib.ports.get(usize::from(packet.port)).is_some_and(|link| link.mac != head[..6])
    {
        return false;
    }
    let (layer4, checksum) = match (third >> 16) as u8 {
        protocol::UDP => {
            let len_and_checksum = word(L4 + 4);
            let may_be_tunneled = fib.overlay.as_ref().is_some_and(|overlay| word(L4) as u16 == overlay.port);
            if !(udp::HEADER_LEN as u32..=l4_len).contains(&(len_and_checksum >> 16)) || may_be_tunneled {
                return false;
            }
            (Layer4::Udp, len_and_checksum as u16)
        }
        protocol::TCP => {
            let Some(header) = data[L4..].first_chunk::<{ tcp::HEADER_LEN }>() else { return false };
            if !(tcp::HEADER_LEN as u32..=l4_len).contains(&(u32::from(header[12] >> 4) * 4)) {
                return false;
            }
            let checksum = [header[tcp::CHECKSUM_OFFSET], header[tcp::CHECKSUM_OFFSET + 1]];
            (Layer4::Tcp { flags: header[13] }, u16::from_be_bytes(checksum))
        }
        _ => return false,
    };
    let settings = tables.settings.ports.get(usize::from(packet.port));
    let pseudo = u64::from(src) + u64::from(dst) + u64::from(third >> 16 & 0xff) + u64::from(l4_len);
    packet.partial_checksum =
        settings.is_some_and(|port| port.partial_checksums) && checksum == checksum::fold(pseudo);
    let ports = word(L4);
    packet.tuple = Tuple {
        src: Addr::v4(src),
        dst: Addr::v4(dst),
        src_port: (ports >> 16) as u16,
        dst_port: ports as u16,
        protocol: (third >> 16) as u8,
    };
    packet.out = packet.tuple;
    (packet.l3, packet.l4) = (L3 as u16, L4 as u16);
    (packet.ip_len, packet.longest) = (total_len, total_len);
    packet.ttl = (third >> 24) as u8;
    packet.dont_fragment = second & u32::from(ipv4::DONT_FRAGMENT) != 0;
    packet.layer4 = layer4;
    true
}

fn drop(reason: Reason) -> Verdict {
    Verdict::Drop(reason)
}

fn parse_v4(packet: &mut Packet, available: usize, checks: SourceChecks) -> Result<(), Verdict> {
    let l3 = usize::from(packet.l3);
    let bytes = &packet.frame.data()[l3..];
    let (header, _) = ipv4::Header::ref_from_prefix(bytes).map_err(|_| drop(Reason::Truncated))?;
    let (header_len, total_len) = (header.header_len(), usize::from(header.total_len.get()));
    if header.version_ihl >> 4 != 4 || header_len < ipv4::HEADER_LEN || total_len < header_len {
        return Err(drop(Reason::BadIpHeader));
    }
    if total_len > available || header_len > bytes.len() {
        return Err(drop(Reason::Truncated));
    }
    if checksum::checksum(&bytes[..header_len]) != 0 {
        return Err(drop(Reason::BadIpChecksum));
    }
    if header_len > ipv4::HEADER_LEN && ipv4::has_source_route(&bytes[ipv4::HEADER_LEN..header_len]) {
        return Err(drop(Reason::SourceRoute));
    }
    let (src, dst) = (header.src.get(), header.dst.get());
    // RFC 1812 section 5.3.7, RFC 6890.
    if checks.martian_source && matches!(src >> 24, 0 | 127 | 224..=255) {
        return Err(drop(Reason::MartianSource));
    }
    match dst >> 24 {
        224..=239 => return Err(Verdict::Punt),
        0 | 127 => return Err(drop(Reason::MartianDestination)),
        240..=255 if dst != u32::MAX => return Err(drop(Reason::MartianDestination)),
        255 => return Err(Verdict::Punt),
        _ => {}
    }
    if checks.land && src == dst {
        return Err(drop(Reason::Land));
    }
    let header = *header;
    packet.tuple =
        Tuple { src: Addr::v4(src), dst: Addr::v4(dst), src_port: 0, dst_port: 0, protocol: header.protocol };
    packet.l4 = (l3 + header_len) as u16;
    packet.ip_len = total_len as u16;
    packet.longest = total_len as u16;
    packet.ttl = header.ttl;
    packet.dont_fragment = header.fragment.get() & ipv4::DONT_FRAGMENT != 0;
    packet.layer4 = Layer4::Other;
    if header.is_fragment() {
        let more = header.fragment.get() & ipv4::MORE_FRAGMENTS != 0;
        let (id, offset) = (u32::from(header.id.get()), header.fragment_offset());
        packet.found_fragment(Fragment { id, offset, more, data: packet.l4 });
    }
    Ok(())
}

fn parse_v6(packet: &mut Packet, available: usize, checks: SourceChecks) -> Result<(), Verdict> {
    let l3 = usize::from(packet.l3);
    let bytes = &packet.frame.data()[l3..];
    let (header, rest) = ipv6::Header::ref_from_prefix(bytes).map_err(|_| drop(Reason::Truncated))?;
    if header.version_class_label.get() >> 28 != 6 {
        return Err(drop(Reason::BadIpHeader));
    }
    let total_len = ipv6::HEADER_LEN + usize::from(header.payload_len.get());
    if total_len > available || total_len > usize::from(u16::MAX) {
        return Err(drop(Reason::Truncated));
    }
    let (src, dst) = (header.src.get(), header.dst.get());
    // RFC 4291 section 2; mapped addresses never appear on the wire (RFC 6890), and would be taken for IPv4.
    if checks.martian_source && (src <= 1 || src >> 120 == 0xff) || Addr(src).is_v4() {
        return Err(drop(Reason::MartianSource));
    }
    if dst >> 120 == 0xff || dst >> 118 == 0xfe80 >> 6 {
        return Err(Verdict::Punt);
    }
    if dst <= 1 || Addr(dst).is_v4() {
        return Err(drop(Reason::MartianDestination));
    }
    if src >> 118 == 0xfe80 >> 6 {
        // A link-local source asks a neighbor (RFC 4291 section 2.5.6): never routed, the kernel may answer.
        return Err(Verdict::Punt);
    }
    if checks.land && src == dst {
        return Err(drop(Reason::Land));
    }
    let payload = &rest[..rest.len().min(total_len - ipv6::HEADER_LEN)];
    let chain = ipv6::walk(header.next_header, payload).map_err(drop)?;
    let hop_limit = header.hop_limit;
    packet.tuple =
        Tuple { src: Addr::v6(src), dst: Addr::v6(dst), src_port: 0, dst_port: 0, protocol: chain.protocol };
    packet.l4 = (l3 + ipv6::HEADER_LEN + chain.len) as u16;
    packet.ip_len = total_len as u16;
    packet.longest = total_len as u16;
    packet.ttl = hop_limit;
    packet.dont_fragment = true;
    packet.layer4 = Layer4::Other;
    if let Some(ipv6::FragmentHeader { end, offset, more, id }) = chain.fragment {
        let data = (l3 + ipv6::HEADER_LEN + end) as u16;
        packet.found_fragment(Fragment { id, offset, more, data });
    }
    Ok(())
}

/// A unicast packet must come in a unicast frame to the port (RFC 1812 section 5.3.4).
fn check_link_destination(packet: &Packet, fib: &Fib) -> Result<(), Verdict> {
    let destination = ethernet::destination(packet.frame.data());
    match fib.ports.get(usize::from(packet.port)) {
        Some(link) if link.mac != destination => Err(drop(Reason::NotOurMac)),
        _ => Ok(()),
    }
}

/// The first fragment of a datagram that is all here: read as the datagram, but for the layer-4 header, which must be in this fragment
/// as a whole (RFC 1858 section 3, RFC 7112 section 5).
fn parse_first_fragment(packet: &mut Packet, settings: PortSettings) -> Result<(), Verdict> {
    let Part::First(datagram) = packet.part else { return Ok(()) };
    packet.longest = datagram.longest;
    packet.dont_fragment = datagram.dont_fragment || !packet.tuple.src.is_v4();
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let data = packet.frame.data();
    let bytes = data.get(usize::from(packet.l4)..end.min(data.len())).unwrap_or_default();
    let needed = match packet.tuple.protocol {
        protocol::TCP => bytes.get(12).map_or(tcp::HEADER_LEN, |offset| usize::from(offset >> 4) * 4),
        protocol::SCTP => sctp::HEADER_LEN,
        protocol::UDP | protocol::ICMP | protocol::ICMPV6 => udp::HEADER_LEN,
        _ => 0,
    };
    if bytes.len() < needed {
        return Err(drop(Reason::FragmentTiny));
    }
    // Linux finishes checksums before it fragments (ip_do_fragment, ip6_fragment).
    parse_l4(packet, datagram.later_len, PortSettings { partial_checksums: false, ..settings });
    Ok(())
}

/// Reads ports and flags. A header that contradicts its lengths leaves [`Layer4::Malformed`]: such a packet may be routed, as
/// Linux does, but is never translated. `later_len`: bytes of layer 4 in further fragments.
fn parse_l4(packet: &mut Packet, later_len: u16, settings: PortSettings) {
    let data = packet.frame.data();
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let l4_len = end - usize::from(packet.l4) + usize::from(later_len);
    let bytes = &data[usize::from(packet.l4).min(data.len())..end.min(data.len())];
    let v4 = packet.tuple.src.is_v4();
    let (layer4, ports) = match (packet.tuple.protocol, v4) {
        (protocol::TCP, _) => match tcp::Header::ref_from_prefix(bytes) {
            Ok((header, _)) if (tcp::HEADER_LEN..=l4_len).contains(&header.header_len()) => {
                packet.partial_checksum =
                    settings.partial_checksums && is_partial(&packet.tuple, l4_len, header.checksum.get());
                (Layer4::Tcp { flags: header.flags }, (header.src_port.get(), header.dst_port.get()))
            }
            _ => (Layer4::Malformed, (0, 0)),
        },
        (protocol::UDP, _) => match udp::Header::ref_from_prefix(bytes) {
            // RFC 768; over IPv6 a checksum is required (RFC 8200 section 8.1).
            Ok((header, _))
                if (udp::HEADER_LEN..=l4_len).contains(&usize::from(header.len.get()))
                    && (v4 || header.checksum.get() != 0) =>
            {
                packet.partial_checksum =
                    settings.partial_checksums && is_partial(&packet.tuple, l4_len, header.checksum.get());
                (Layer4::Udp, (header.src_port.get(), header.dst_port.get()))
            }
            _ => (Layer4::Malformed, (0, 0)),
        },
        (protocol::SCTP, _) => match bytes {
            [s0, s1, d0, d1, ..] if bytes.len() >= sctp::HEADER_LEN => {
                // Linux leaves the checksum to a device that says it can (NETIF_F_SCTP_CRC, which veth does): zero.
                let checksum = &bytes[sctp::CHECKSUM_OFFSET..sctp::HEADER_LEN];
                packet.partial_checksum = settings.partial_checksums && checksum == [0; 4];
                (Layer4::Sctp, (u16::from_be_bytes([*s0, *s1]), u16::from_be_bytes([*d0, *d1])))
            }
            _ => (Layer4::Malformed, (0, 0)),
        },
        (protocol::ICMP, true) => match bytes {
            [kind, _, _, _, i0, i1, _, _, ..] => {
                let id = u16::from_be_bytes([*i0, *i1]);
                match *kind {
                    icmp::v4::ECHO_REQUEST => (Layer4::Echo { request: true }, (id, id)),
                    icmp::v4::ECHO_REPLY => (Layer4::Echo { request: false }, (id, id)),
                    kind if icmp::v4::is_error(kind) => (Layer4::IcmpError, (0, 0)),
                    _ => (Layer4::IcmpOther, (0, 0)),
                }
            }
            _ => (Layer4::Malformed, (0, 0)),
        },
        (protocol::ICMPV6, false) => match bytes {
            [kind, _, _, _, i0, i1, _, _, ..] => {
                let id = u16::from_be_bytes([*i0, *i1]);
                match *kind {
                    icmp::v6::ECHO_REQUEST => (Layer4::Echo { request: true }, (id, id)),
                    icmp::v6::ECHO_REPLY => (Layer4::Echo { request: false }, (id, id)),
                    // Neighbor discovery and router messages (RFC 4861) are the kernel's.
                    133..=137 => {
                        packet.verdict = Verdict::Punt;
                        (Layer4::IcmpOther, (0, 0))
                    }
                    kind if icmp::v6::is_error(kind) => (Layer4::IcmpError, (0, 0)),
                    _ => (Layer4::IcmpOther, (0, 0)),
                }
            }
            _ => (Layer4::Malformed, (0, 0)),
        },
        _ => (Layer4::Other, (0, 0)),
    };
    packet.layer4 = layer4;
    (packet.tuple.src_port, packet.tuple.dst_port) = ports;
    packet.out = packet.tuple;
}

/// True if `field` is the folded pseudo-header sum, which Linux leaves for the hardware to finish (CHECKSUM_PARTIAL).
#[inline]
fn is_partial(tuple: &Tuple, l4_len: usize, field: u16) -> bool {
    field == checksum::fold(checksum::pseudo_sum(tuple.src, tuple.dst, tuple.protocol, l4_len))
}
