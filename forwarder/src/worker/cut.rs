//! Cuts IPv4 datagrams that are too long for their way out (RFC 791 section 2.3, as ip_do_fragment of Linux does it).

use std::iter;

use crate::packet::Packet;
use crate::port::{Frame, FramePool};
use crate::wire::{checksum, ipv4};

/// ECN "congestion experienced" (RFC 3168 section 5).
const CONGESTION: u8 = 3;

/// A datagram in one packet or in fragments, ready to leave but for its length.
pub struct Source<'a> {
    /// Its fragments in order; the first one has the IP header that all pieces get.
    pub packets: &'a [Packet],
    /// Further segments of all of them, in order.
    pub tails: &'a [Frame],
    /// How many of `tails` belong to each packet.
    pub tail_counts: &'a [u16],
}

impl Source<'_> {
    /// The payload in order, in as many slices as it lies in.
    fn payload(&self) -> impl Iterator<Item = &[u8]> {
        let mut tails = self.tails;
        self.packets.iter().zip(self.tail_counts).flat_map(move |(packet, count)| {
            let (own, rest) = tails.split_at(usize::from(*count));
            tails = rest;
            let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
            let mut left = l3 + usize::from(packet.ip_len) - l4;
            let head = packet.frame.data().get(l4..).unwrap_or_default();
            iter::once(head).chain(own.iter().map(Frame::data)).map(move |slice| {
                let slice = &slice[..slice.len().min(left)];
                left -= slice.len();
                slice
            })
        })
    }
}

/// Appends the pieces of `datagram` to `pieces`, in frames of `pool`, each with at most [`Packet::cut_to`] bytes from the IP header on.
/// Returns how many there are. `None`: the way out takes no fragment at all, or there are too few frames; nothing is taken then.
///
/// Worker thread; copies the whole datagram.
pub fn cut(datagram: &Source<'_>, pool: &mut FramePool, pieces: &mut Vec<Frame>) -> Option<u16> {
    let [first, ..] = datagram.packets else { return None };
    let (l3, l4) = (usize::from(first.l3), usize::from(first.l4));
    let congested = datagram.packets.iter().any(|packet| {
        packet.frame.data().get(usize::from(packet.l3) + 1).is_some_and(|tos| tos & CONGESTION == CONGESTION)
    });
    let mut headers = [0; ipv4::MAX_HEADER_LEN + 32];
    let headers = headers.get_mut(..l4)?;
    headers.copy_from_slice(first.frame.data().get(..l4)?);
    headers[l3 + 1] |= if congested { CONGESTION } else { 0 };
    let room = usize::from(first.cut_to).checked_sub(l4 - l3).filter(|room| *room >= 8)?;

    let before = pieces.len();
    let mut payload = datagram.payload().filter(|slice| !slice.is_empty());
    let mut rest: &[u8] = &[];
    let (mut offset, mut left) = (0, datagram.payload().map(<[u8]>::len).sum::<usize>());
    while left > 0 {
        let Some(mut frame) = pool.pop() else { break };
        let most = room.min(frame.capacity() - l4);
        let len = if left <= most { left } else { most & !7 };
        left -= len;
        if frame.set_len(l4 + len).is_err() {
            pool.push(frame);
            break;
        }
        if offset > 0 {
            ipv4::keep_copied_options(&mut headers[l3 + ipv4::HEADER_LEN..]);
        }
        number(&mut headers[l3..], len, offset, left > 0);
        let (to, mut data) = frame.data_mut().split_at_mut(l4);
        to.copy_from_slice(headers);
        while !data.is_empty() {
            if rest.is_empty() {
                let Some(slice) = payload.next() else { break };
                rest = slice;
            }
            let (part, after) = rest.split_at(rest.len().min(data.len()));
            let (to, more) = data.split_at_mut(part.len());
            to.copy_from_slice(part);
            (data, rest) = (more, after);
        }
        pieces.push(frame);
        offset += len;
    }
    if left > 0 {
        pieces.drain(before..).for_each(|frame| pool.push(frame));
        return None;
    }
    Some((pieces.len() - before) as u16)
}

/// Writes length, place and checksum of a fragment into its IP header.
fn number(header: &mut [u8], data_len: usize, offset: usize, more: bool) {
    let total_len = (header.len() + data_len) as u16;
    let word = (offset / 8) as u16 | if more { ipv4::MORE_FRAGMENTS } else { 0 };
    header[2..4].copy_from_slice(&total_len.to_be_bytes());
    header[6..8].copy_from_slice(&word.to_be_bytes());
    header[10..12].fill(0);
    let sum = checksum::checksum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}
