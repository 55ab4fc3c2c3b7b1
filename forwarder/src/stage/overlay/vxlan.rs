//! Ethernet in VXLAN in UDP (RFC 7348): what stands between the outer IP header and the inner one.
//!
//! A network identifier leads from one node to us, so Ethernet means nothing inside: our packets are addressed to the node's
//! VXLAN device, which Linux would drop them without, and theirs may be to any unicast address.

use crate::addr::Addr;
use crate::tables::{Overlay, Tunnel};
use crate::verdict::Reason;
use crate::wire::{checksum, ethernet, udp, vxlan};

/// Bytes between the two IP headers: UDP, VXLAN, Ethernet.
pub const LEN: usize = udp::HEADER_LEN + vxlan::HEADER_LEN + ethernet::HEADER_LEN;

/// First source port; all ports from it on are used (RFC 7348 section 5).
const SOURCE_PORTS: u16 = 0xc000;

/// Reads what begins with the UDP header, of which `in_frame` is here and `len` bytes exist. Returns the inner ethertype and how many
/// bytes there are from the inner IP header on, which begins after [`LEN`].
pub fn open(in_frame: &[u8], len: usize, overlay: &Overlay) -> Result<(u16, usize), Reason> {
    let headers: &[u8; LEN] = in_frame.first_chunk().ok_or(Reason::Truncated)?;
    let (udp_header, rest) = headers.split_at(udp::HEADER_LEN);
    let udp_len = usize::from(u16::from_be_bytes([udp_header[4], udp_header[5]]));
    if udp_len > len || udp_len < LEN {
        return Err(Reason::Truncated);
    }
    let (vxlan_header, inner) = rest.split_at(vxlan::HEADER_LEN);
    let network = vxlan_header.first_chunk().and_then(vxlan::network);
    if network != Some(overlay.vni) {
        return Err(Reason::OverlayNetwork);
    }
    if inner[0] & 1 != 0 {
        return Err(Reason::OverlayPayload);
    }
    match u16::from_be_bytes([inner[12], inner[13]]) {
        ethertype @ (ethernet::ethertype::IPV4 | ethernet::ethertype::IPV6) => Ok((ethertype, udp_len - LEN)),
        _ => Err(Reason::OverlayPayload),
    }
}

/// Writes UDP and VXLAN headers into `headers`, which are zero. The checksum stays zero, which is for IPv4 only; see [`checksum_of`]. `len`: bytes of
/// the inner packet. `hash`: of its connection, so that routers keep it on one way and others on other ways.
pub fn write(headers: &mut [u8], len: u16, hash: u64, overlay: &Overlay) {
    let (udp_header, rest) = headers.split_at_mut(udp::HEADER_LEN);
    udp_header[0..2].copy_from_slice(&source_port(hash).to_be_bytes());
    udp_header[2..4].copy_from_slice(&overlay.port.to_be_bytes());
    udp_header[4..6].copy_from_slice(&(len + LEN as u16).to_be_bytes());
    rest[..vxlan::HEADER_LEN].copy_from_slice(&vxlan::header(overlay.vni));
}

fn source_port(hash: u64) -> u16 {
    SOURCE_PORTS | (hash >> 48) as u16
}

/// The UDP checksum of a packet in `tunnel`, whose `len` bytes from the UDP header on are `parts`. Over IPv6 it may be zero
/// between ends that agree on it (RFC 6935); Linux drops such packets unless told otherwise, so that it is computed here.
pub fn checksum_of<'a>(parts: impl Iterator<Item = &'a [u8]>, len: usize, tunnel: &Tunnel) -> u16 {
    let (local, node): (Addr, Addr) = (tunnel.local, tunnel.node);
    let mut total = checksum::pseudo_sum(local, node, crate::addr::protocol::UDP, len);
    let (mut left, mut odd) = (len, false);
    for part in parts {
        let part = &part[..part.len().min(left)];
        let sum = checksum::fold(checksum::sum(part));
        // A part that begins at an odd offset sums with its bytes exchanged (RFC 1071 section 2 B).
        total += u64::from(if odd { sum.swap_bytes() } else { sum });
        left -= part.len();
        odd ^= part.len() % 2 == 1;
    }
    match !checksum::fold(total) {
        0 => 0xffff,
        sum => sum,
    }
}
