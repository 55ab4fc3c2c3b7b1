//! Packets inside packets: between us and nodes whose pods are behind a tunnel.
//!
//! The parse stage looks into packets that come by a tunnel ([`is_ours`], [`open`], [`check_inner`]), and from there on the inner one
//! is judged like any other, with the outer headers still in front of it. The rewrite takes them off and puts new ones on
//! ([`rewrite`]). What is special about VXLAN is in `vxlan.rs`; another encapsulation is another file beside it.
//!
//! DSCP and ECN are copied to the outer header, and congestion that is met outside is told inside (RFC 6040, normal mode). The outer
//! hop count is our own; the inner one counts the gateway as the router that it is. Outer packets are never fragmented: routes
//! through a tunnel have the MTU that fits inside.

mod vxlan;
#[cfg(test)]
mod tests;

use af_xdp::{Frame, HEAD_LEN};

use crate::addr::{Addr, protocol};
use crate::packet::{Layer4, Packet, Part, Rewrite};
use crate::tables::{Fib, Overlay, PortSettings, Route, Tunnel};
use crate::verdict::{Reason, Verdict};
use crate::wire::checksum::{self, Delta};
use crate::wire::{ethernet, ipv4, ipv6};

/// TTL and hop limit of outer headers.
const OWN_TTL: u8 = 64;
/// ECN of an IP header (RFC 3168 section 5).
mod ecn {
    /// Its bits.
    pub const MASK: u8 = 3;
    /// The ends do not know of ECN.
    pub const NOT_ECT: u8 = 0;
    /// They do.
    pub const ECT_1: u8 = 1;
    /// They do.
    pub const ECT_0: u8 = 2;
    /// Congestion experienced.
    pub const CE: u8 = 3;
}

/// Bytes of outer headers with two VLAN tags at most.
const MAX_LEN: usize = ethernet::HEADER_LEN + 2 * ethernet::TAG_LEN + ipv6::HEADER_LEN + vxlan::LEN;

/// How much longer packets become in a tunnel to `node`.
pub const fn overhead(node: Addr) -> u16 {
    (ip_header_len(node) + vxlan::LEN) as u16
}

const fn ip_header_len(node: Addr) -> usize {
    if node.is_v4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN }
}

/// Where the inner packet is.
pub struct Inner {
    /// What it is.
    pub ethertype: u16,
    /// Where its IP header begins.
    pub l3: usize,
    /// Bytes from there on.
    pub available: usize,
    /// ECN of the outer header.
    ecn: u8,
}

/// True for a packet to our end of a tunnel, of which the IP header is read. Fragments are not until all of them are there.
#[inline]
pub fn is_ours(packet: &Packet, overlay: &Overlay) -> bool {
    let port_at = usize::from(packet.l4) + 2;
    packet.tuple.protocol == protocol::UDP
        && (packet.layer4 != Layer4::Fragment || matches!(packet.part, Part::First(_)))
        && packet.frame.data().get(port_at..port_at + 2) == Some(&overlay.port.to_be_bytes())
        && overlay.addresses.contains(&packet.tuple.dst)
}

/// Looks into a packet that [`is_ours`]. The UDP checksum is not verified, since what is inside has its own (RFC 7348 section 5 lets a
/// receiver choose).
pub fn open(packet: &mut Packet, overlay: &Overlay, port: PortSettings) -> Result<Inner, Verdict> {
    let tunnel = overlay.tunnel_of(packet.tuple.src).filter(|_| port.inside);
    let tunnel = tunnel.ok_or(Verdict::Drop(Reason::OverlaySource))?;
    if packet.layer4 == Layer4::Fragment {
        return Err(Verdict::Drop(Reason::OverlayFragment));
    }
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let data = packet.frame.data();
    let len = l3 + usize::from(packet.ip_len) - l4;
    let (ethertype, available) = vxlan::open(&data[l4..], len, overlay).map_err(Verdict::Drop)?;
    let ecn = tos(&data[l3..]) & ecn::MASK;
    packet.from_tunnel = Some(tunnel);
    Ok(Inner { ethertype, l3: l4 + vxlan::LEN, available, ecn })
}

/// What is the kernel's on a link is nobody's in a tunnel.
pub fn no_punt(verdict: Verdict) -> Verdict {
    if verdict == Verdict::Punt { Verdict::Drop(Reason::OverlayPayload) } else { verdict }
}

/// Judges an inner packet whose IP header is read: its source must be a pod of the node that sent it, or the node; neighbor discovery
/// has no place in a tunnel; and it must be able to bear the news of congestion.
pub fn check_inner(packet: &Packet, inner: &Inner, fib: &Fib) -> Result<(), Verdict> {
    let source = packet.tuple.src;
    let tunnel_of_route = match fib.routes.lookup(source) {
        Some(Route::NextHop(hop)) => fib.next_hops.get(hop as usize).and_then(|hop| hop.tunnel),
        _ => None,
    };
    let node = tunnel(packet.from_tunnel, fib).map(|(_, tunnel)| tunnel.node);
    if tunnel_of_route != packet.from_tunnel && node != Some(source) {
        return Err(Verdict::Drop(Reason::OverlayInnerSource));
    }
    let data = packet.frame.data();
    if packet.tuple.protocol == protocol::ICMPV6
        && matches!(data.get(usize::from(packet.l4)), Some(133..=137))
    {
        return Err(Verdict::Drop(Reason::OverlayPayload));
    }
    let own = tos(&data[usize::from(packet.l3)..]) & ecn::MASK;
    combine(own, inner.ecn).map(|_| ()).ok_or(Verdict::Drop(Reason::OverlayEcn))
}

/// ECN of a packet that leaves a tunnel, RFC 6040 section 4.2; none: it must be dropped.
fn combine(inner: u8, outer: u8) -> Option<u8> {
    match (inner, outer) {
        (ecn::NOT_ECT, ecn::CE) => None,
        (ecn::NOT_ECT, _) => Some(ecn::NOT_ECT),
        (ecn::CE, _) | (_, ecn::CE) => Some(ecn::CE),
        (ecn::ECT_0, ecn::ECT_1) => Some(ecn::ECT_1),
        _ => Some(inner),
    }
}

/// Rewrites the frame of one packet by `apply`, taking it out of the tunnel that it came by and putting it into the one that it leaves
/// by, if there are any. False: it does not fit.
#[inline]
pub fn rewrite(
    packet: &mut Packet,
    tails: &[Frame],
    fib: &Fib,
    apply: impl Fn(&mut Packet, &[Frame], &Fib) -> bool,
) -> bool {
    // An answer is made of what it answers. Everything else is changed where it is, so that it can be had back as it came.
    let is_replaced = matches!(packet.rewrite, Rewrite::Answer(_) | Rewrite::Reset);
    if packet.from_tunnel.is_some() && is_replaced {
        strip(packet);
    }
    let fits = apply(packet, tails, fib);
    if packet.from_tunnel.is_some() && !is_replaced {
        strip(packet);
    }
    fits && encapsulate(packet, tails, fib)
}

/// Takes the outer headers off a packet that came by a tunnel. The link-layer header of the outer packet, with its VLAN tags, is that of
/// the inner one from here on, so that an answer finds its way back.
#[cold]
pub fn strip(packet: &mut Packet) {
    let inner_l3 = usize::from(packet.l3);
    let Some((_, outer_l3)) = ethernet::payload(packet.frame.data()) else { return };
    let frame = &mut packet.frame;
    let is_in_head = inner_l3 + ipv4::HEADER_LEN <= HEAD_LEN;
    let data = if is_in_head { frame.head_mut() } else { frame.data_mut() };
    let outer_ecn = tos(&data[outer_l3..]) & ecn::MASK;
    let inner = &mut data[inner_l3..];
    if let Some(ecn) = combine(tos(inner) & ecn::MASK, outer_ecn) {
        set_ecn(inner, ecn);
    }
    let shift = inner_l3 - outer_l3;
    // The inner ethertype stands right before the inner IP header already.
    data.copy_within(..outer_l3 - 2, shift);
    let _ = frame.trim_front(shift);
    packet.l3 -= shift as u16;
    packet.l4 -= shift as u16;
}

/// Puts a packet that is ready to leave into its tunnel, if it leaves by one: an answer goes back by the one that its cause came by.
/// A datagram that is to be cut is left alone; its pieces go in by [`encapsulate_pieces`].
#[inline]
fn encapsulate(packet: &mut Packet, tails: &[Frame], fib: &Fib) -> bool {
    let is_answer = matches!(packet.verdict, Verdict::Answer { .. });
    let by = if is_answer { packet.from_tunnel } else { packet.to_tunnel };
    if by.is_none() || packet.cut_to != 0 && !is_answer {
        return true;
    }
    let Some((overlay, tunnel)) = tunnel(by, fib) else { return false };
    let l3 = usize::from(packet.l3);
    let tails = if packet.tail_len == 0 { &[] } else { tails };
    let ip_len = if tails.is_empty() { packet.frame.len() - l3 } else { usize::from(packet.ip_len) };
    put_in(&mut packet.frame, tails, l3, ip_len, packet.hash, overlay, tunnel)
}

/// Puts the pieces of the datagram that begins with `first` into its tunnel, if it leaves by one.
pub fn encapsulate_pieces(first: &Packet, pieces: &mut [Frame], fib: &Fib) {
    let Some((overlay, tunnel)) = tunnel(first.to_tunnel, fib) else { return };
    for piece in pieces {
        let l3 = usize::from(first.l3);
        let ip_len = piece.len() - l3;
        // A piece begins where every frame does, with more room before it than any header takes.
        let _ = put_in(piece, &[], l3, ip_len, first.hash, overlay, tunnel);
    }
}

#[inline]
fn tunnel(index: Option<u16>, fib: &Fib) -> Option<(&Overlay, &Tunnel)> {
    let index = index?;
    let overlay = fib.overlay.as_deref()?;
    Some((overlay, overlay.tunnels.get(usize::from(index))?))
}

/// Writes all outer headers before a packet whose IP header is at `l3`. Its link-layer header is that of the outer packet, tags
/// included; the inner one gets another.
#[cold]
fn put_in(
    frame: &mut Frame,
    tails: &[Frame],
    l3: usize,
    ip_len: usize,
    hash: u64,
    overlay: &Overlay,
    tunnel: &Tunnel,
) -> bool {
    let ip_header_len = ip_header_len(tunnel.node);
    let Ok(len) = u16::try_from(ip_header_len + vxlan::LEN + ip_len) else { return false };
    let Some(link) = frame.data().get(..l3) else { return false };
    let traffic_class = tos(&frame.data()[l3..]);
    let source = ethernet::source(link);

    let mut headers = [0u8; MAX_LEN];
    let l4 = l3 + ip_header_len;
    let headers = &mut headers[..l4 + vxlan::LEN - ethernet::HEADER_LEN];
    headers[..l3].copy_from_slice(link);
    let ethertype = if tunnel.node.is_v4() { ethernet::ethertype::IPV4 } else { ethernet::ethertype::IPV6 };
    headers[l3 - 2..l3].copy_from_slice(&ethertype.to_be_bytes());
    write_ip_header(&mut headers[l3..], len, traffic_class, hash, tunnel);
    vxlan::write(&mut headers[l4..], ip_len as u16, hash, overlay);

    // The inner ethertype stands right before the inner IP header already.
    let inner_link = l3 - ethernet::HEADER_LEN;
    ethernet::set_addresses(&mut frame.head_mut()[inner_link..], tunnel.mac, source);
    if frame.trim_front(inner_link).is_err() {
        return false;
    }
    if !tunnel.node.is_v4() {
        let parts = [&headers[l4..], frame.data()].into_iter().chain(tails.iter().map(Frame::data));
        let sum = vxlan::checksum_of(parts, vxlan::LEN + ip_len, tunnel);
        headers[l4 + 6..l4 + 8].copy_from_slice(&sum.to_be_bytes());
    }
    frame.push_header(headers).is_ok()
}

/// The outer IP header of a packet of `len` bytes. It is never fragmented, so that its identification may be 0 (RFC 6864 section 4.1);
/// the flow label tells connections apart (RFC 6438).
fn write_ip_header(to: &mut [u8], len: u16, traffic_class: u8, hash: u64, tunnel: &Tunnel) {
    if tunnel.node.is_v4() {
        let header = &mut to[..ipv4::HEADER_LEN];
        header[0] = 0x45;
        header[1] = traffic_class;
        header[2..4].copy_from_slice(&len.to_be_bytes());
        header[6..8].copy_from_slice(&ipv4::DONT_FRAGMENT.to_be_bytes());
        header[8] = OWN_TTL;
        header[9] = protocol::UDP;
        header[12..16].copy_from_slice(&tunnel.local.v4_bits().to_be_bytes());
        header[16..20].copy_from_slice(&tunnel.node.v4_bits().to_be_bytes());
        let sum = checksum::checksum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        let header = &mut to[..ipv6::HEADER_LEN];
        let word = 6 << 28 | u32::from(traffic_class) << 20 | (hash >> 44) as u32;
        header[0..4].copy_from_slice(&word.to_be_bytes());
        header[4..6].copy_from_slice(&(len - ipv6::HEADER_LEN as u16).to_be_bytes());
        header[6] = protocol::UDP;
        header[7] = OWN_TTL;
        header[8..24].copy_from_slice(&tunnel.local.0.to_be_bytes());
        header[24..40].copy_from_slice(&tunnel.node.0.to_be_bytes());
    }
}

/// DSCP and ECN of an IP header of either version.
fn tos(header: &[u8]) -> u8 {
    if header[0] >> 4 == 4 { header[1] } else { header[0] << 4 | header[1] >> 4 }
}

/// Writes the ECN of an IP header of either version.
fn set_ecn(header: &mut [u8], ecn: u8) {
    let old = u16::from_be_bytes([header[0], header[1]]);
    if header[0] >> 4 == 4 {
        header[1] = header[1] & !ecn::MASK | ecn;
        let new = u16::from_be_bytes([header[0], header[1]]);
        let sum = Delta::ZERO.word(old, new).apply(u16::from_be_bytes([header[10], header[11]]));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        header[1] = header[1] & !(ecn::MASK << 4) | ecn << 4;
    }
}
