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

/// Writes the length of what follows IP headers into them, and the checksum of IPv4.
fn set_lengths(headers: &mut [u8], payload_len: usize) {
    let headers_len = headers.len() - 14;
    if headers[12..14] == [0x08, 0x00] {
        headers[16..18].copy_from_slice(&((headers_len + payload_len) as u16).to_be_bytes());
        headers[24..26].fill(0);
        let words = headers[14..].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        headers[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    } else {
        headers[18..20].copy_from_slice(&((headers_len - 40 + payload_len) as u16).to_be_bytes());
    }
}

/// True if the frame is a fragment.
pub fn is_fragment(frame: &[u8]) -> bool {
    take_apart(frame).is_some()
}

fn take_apart(frame: &[u8]) -> Option<Fragment> {
    let packet = frame.get(14..)?;
    match frame.get(12..14)? {
        [0x08, 0x00] if packet.len() >= 20 => {
            let header_len = usize::from(packet[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            let word = u16::from_be_bytes([packet[6], packet[7]]);
            let data = packet.get(header_len..total)?.to_vec();
            let mut headers = frame[..14 + header_len].to_vec();
            headers[14 + 6..14 + 8].fill(0);
            let key = (packet[12..20].to_vec(), packet[4..6].to_vec(), packet[9]);
            let (offset, more) = (usize::from(word & 0x1fff) * 8, word & 0x2000 != 0);
            let congested = packet[1] & 3 == 3;
            (offset > 0 || more).then_some(Fragment { key, headers, offset, more, data, congested })
        }
        [0x86, 0xdd] if packet.len() >= 40 => {
            let end = 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            let (mut next_at, mut at) = (6, 40);
            while matches!(packet[next_at], 0 | 43 | 60) {
                (next_at, at) = (at, at + 8 + usize::from(*packet.get(at + 1)?) * 8);
                packet.get(at)?;
            }
            if packet[next_at] != 44 {
                return None;
            }
            let header = packet.get(at..at + 8)?;
            let word = u16::from_be_bytes([header[2], header[3]]);
            let mut headers = frame[..14 + at].to_vec();
            headers[14 + next_at] = header[0];
            let key = (packet[8..40].to_vec(), header[4..8].to_vec(), 0);
            let congested = packet[1] >> 4 & 3 == 3;
            let (offset, more) = (usize::from(word & 0xfff8), word & 1 != 0);
            let data = packet.get(at + 8..end)?.to_vec();
            Some(Fragment { key, headers, offset, more, data, congested })
        }
        _ => None,
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
        frame[15] |= if frame[12..14] == [0x08, 0x00] { 3 } else { 0x30 };
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
