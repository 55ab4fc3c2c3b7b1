//! Fragments put together, the slow way: the twin that judges what the forwarder does with them.

use std::collections::BTreeMap;

/// What the fragments of a datagram have in common: addresses, identification, and for IPv4 the protocol.
type Key = (Vec<u8>, Vec<u8>, u8);

/// A fragment, taken apart.
struct Fragment {
    key: Key,
    /// Ethernet and IP headers as they are to be in front of the whole payload, but for length and checksum.
    headers: Vec<u8>,
    offset: usize,
    more: bool,
    data: Vec<u8>,
    congested: bool,
}

/// Puts each datagram whose fragments are all among `frames` in place of its last one; everything else stays. A datagram has the
/// headers of its first fragment, and has met congestion if one of them has (RFC 3168 section 5.3).
pub fn join(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut waiting: BTreeMap<Key, Vec<Fragment>> = BTreeMap::new();
    let (mut joined, mut lone) = (Vec::new(), Vec::new());
    for frame in frames {
        let Some(fragment) = take_apart(frame) else {
            joined.push(frame.clone());
            continue;
        };
        let key = fragment.key.clone();
        let pieces = waiting.entry(key.clone()).or_default();
        lone.push((key.clone(), frame.clone()));
        pieces.push(fragment);
        if let Some(whole) = put_together(pieces) {
            waiting.remove(&key);
            lone.retain(|(other, _)| *other != key);
            joined.push(whole);
        }
    }
    joined.extend(lone.into_iter().map(|(_, frame)| frame));
    joined
}

/// Cuts the IP packet of an untagged frame, without options or extensions, into fragments of `size` bytes of data each.
pub fn cut(frame: &[u8], id: u32, size: usize) -> Vec<Vec<u8>> {
    let v4 = frame[12..14] == [0x08, 0x00];
    let (headers, data) = frame.split_at(14 + if v4 { 20 } else { 40 });
    let piece = |(number, part): (usize, &[u8])| {
        let (offset, more) = (number * size, (number + 1) * size < data.len());
        let mut piece = headers.to_vec();
        if v4 {
            let word = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
            piece[18..20].copy_from_slice(&(id as u16).to_be_bytes());
            piece[20..22].copy_from_slice(&word.to_be_bytes());
            set_lengths(&mut piece, part.len());
        } else {
            let word = offset as u16 | u16::from(more);
            set_lengths(&mut piece, 8 + part.len());
            let next = std::mem::replace(&mut piece[20], 44);
            piece.extend([next, 0]);
            piece.extend(word.to_be_bytes());
            piece.extend(id.to_be_bytes());
        }
        piece.extend_from_slice(part);
        piece
    };
    data.chunks(size).enumerate().map(piece).collect()
}

/// Writes the length of what follows IP headers into them, and the checksum of IPv4. `headers`: from the Ethernet header on.
fn set_lengths(headers: &mut [u8], payload_len: usize) {
    let Some(l3) = network_header(headers) else { return };
    let ip = &mut headers[l3..];
    let len = ip.len() + payload_len;
    if ip[0] >> 4 == 4 {
        ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        ip[10..12].fill(0);
        let mut sum: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    } else {
        ip[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    }
}

/// Where the IP header begins, behind at most two tags.
fn network_header(frame: &[u8]) -> Option<usize> {
    let mut at = 12;
    while at < 20 && matches!(frame.get(at..at + 2)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    matches!(frame.get(at..at + 2)?, [0x08, 0x00] | [0x86, 0xdd]).then_some(at + 2)
}

/// True if the frame is a fragment.
pub fn is_fragment(frame: &[u8]) -> bool {
    take_apart(frame).is_some()
}

fn take_apart(frame: &[u8]) -> Option<Fragment> {
    let l3 = network_header(frame)?;
    let packet = &frame[l3..];
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let header_len = usize::from(packet[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            let word = u16::from_be_bytes([packet[6], packet[7]]);
            let data = packet.get(header_len..total)?.to_vec();
            let mut headers = frame[..l3 + header_len].to_vec();
            headers[l3 + 6..l3 + 8].fill(0);
            let key = (packet[12..20].to_vec(), packet[4..6].to_vec(), packet[9]);
            let (offset, more) = (usize::from(word & 0x1fff) * 8, word & 0x2000 != 0);
            let congested = packet[1] & 3 == 3;
            (offset > 0 || more).then_some(Fragment { key, headers, offset, more, data, congested })
        }
        6 if packet.len() >= 40 => {
            let end = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            let (next_at, at) = fragment_header(packet)?;
            let header = packet.get(at..at + 8)?;
            let word = u16::from_be_bytes([header[2], header[3]]);
            let mut headers = frame[..l3 + at].to_vec();
            headers[l3 + next_at] = header[0];
            let key = (packet[8..40].to_vec(), header[4..8].to_vec(), 0);
            let congested = packet[1] >> 4 & 3 == 3;
            let (offset, more) = (usize::from(word & 0xfff8), word & 1 != 0);
            let data = packet.get(at + 8..end)?.to_vec();
            Some(Fragment { key, headers, offset, more, data, congested })
        }
        _ => None,
    }
}

/// Where an IPv6 packet says that a fragment header follows, and where that is: the one of a fragment, or else the last atomic one.
fn fragment_header(packet: &[u8]) -> Option<(usize, usize)> {
    let (mut next_at, mut at, mut atomic) = (6, 40, None);
    loop {
        let header = packet.get(at..at + 8);
        match (packet[next_at], header) {
            (44, Some(header)) if u16::from_be_bytes([header[2], header[3]]) & 0xfff9 != 0 => {
                return Some((next_at, at));
            }
            (44, Some(_)) => {
                atomic = Some((next_at, at));
                (next_at, at) = (at, at + 8);
            }
            (0 | 43 | 60 | 135 | 139 | 140, Some(header)) => {
                (next_at, at) = (at, at + 8 + usize::from(header[1]) * 8);
            }
            _ => return atomic,
        }
    }
}

/// The frame of a datagram all of whose fragments are there, none twice.
fn put_together(pieces: &mut [Fragment]) -> Option<Vec<u8>> {
    pieces.sort_by_key(|piece| piece.offset);
    let mut payload = Vec::new();
    for piece in pieces.iter() {
        if piece.offset != payload.len() {
            return None;
        }
        payload.extend_from_slice(&piece.data);
    }
    if pieces.last()?.more {
        return None;
    }
    let mut frame = pieces[0].headers.clone();
    if pieces.iter().any(|piece| piece.congested) {
        let l3 = network_header(&frame)?;
        frame[l3 + 1] |= if frame[l3] >> 4 == 4 { 3 } else { 0x30 };
    }
    set_lengths(&mut frame, payload.len());
    frame.extend(payload);
    Some(frame)
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::case::Case;
    use crate::decode::{Strictness, decode};

    #[test]
    fn what_is_cut_is_joined_in_any_order() {
        let ethernet = || PacketBuilder::ethernet2([2; 6], [4; 6]);
        for builder in
            [ethernet().ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64), ethernet().ipv6([1; 16], [2; 16], 64)]
        {
            let mut whole = Vec::new();
            builder.udp(7, 9).write(&mut whole, &[5; 1000]).unwrap();
            // "Don't fragment", which etherparse sets, does not survive.
            if whole[12..14] == [0x08, 0x00] {
                whole[20..22].fill(0);
                let len = whole.len() - 34;
                set_lengths(&mut whole[..34], len);
            }
            let mut pieces = cut(&whole, 0, 400);
            assert_eq!(pieces.len(), 3);
            pieces.reverse();
            assert_eq!(join(&pieces), [whole]);
            assert_eq!(join(&pieces[..2]), pieces[..2]);
        }
    }

    #[test]
    fn what_linux_sends_in_fragments_is_whole_and_sound() {
        let mut joined_in_all = 0;
        for case in Case::all().unwrap() {
            for step in &case.steps {
                let frames: Vec<Vec<u8>> = step.expected.iter().map(|out| out.frame.clone()).collect();
                let joined = join(&frames);
                assert!(joined.iter().all(|frame| !is_fragment(frame)), "{}", case.name);
                if joined.len() < frames.len() {
                    joined_in_all += 1;
                    let lines = decode(&joined[0], Strictness::Exact);
                    assert!(lines.iter().all(|line| !line.contains("right is")), "{}: {lines:#?}", case.name);
                }
            }
        }
        assert!(joined_in_all > 60, "{joined_in_all}");
    }
}
