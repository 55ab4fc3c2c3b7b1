//! Packets that tell when a gateway is done with another one: whatever came in before a marker by the same port has been judged
//! when the marker leaves, and whatever was to leave by the marker's port before it has left.
//!
//! Markers are datagrams between pods and the client that are merely routed, so that no gateway has a reason to keep, answer
//! or hold them up. They have a number, by which one that comes late is known.

use anyhow::Result;
use etherparse::PacketBuilder;

use crate::case::Side;

const WORD: &[u8; 8] = b"a marker";
/// Ethernet, IPv4 and UDP headers.
const HEADERS_LEN: usize = 14 + 20 + 8;

/// A marker that comes in by `side` of the twin and leaves by the other one.
pub fn marker(side: Side, number: u64) -> Result<Vec<u8>> {
    let (client, pod) = ([10, 1, 0, 2], [10, 244, 2, 99]);
    let ethernet = match side {
        Side::Outside => {
            PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]).ipv4(client, pod, 64)
        }
        Side::Inside => {
            PacketBuilder::ethernet2([2, 0, 0, 0, 1, 0x12], [2, 0, 0, 0, 1, 1]).ipv4(pod, client, 64)
        }
    };
    let mut frame = Vec::new();
    ethernet.udp(9, 9).write(&mut frame, &[&WORD[..], &number.to_be_bytes()].concat())?;
    Ok(frame)
}

/// The number of a marker; `None`: the frame is none.
pub fn number(frame: &[u8]) -> Option<u64> {
    let number = frame.get(HEADERS_LEN..)?.strip_prefix(WORD)?;
    number.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_known_by_its_number() {
        for side in [Side::Outside, Side::Inside] {
            let frame = marker(side, 7).unwrap();
            assert_eq!(number(&frame), Some(7));
            assert_eq!(number(&frame[..frame.len() - 1]), None);
        }
        assert_eq!(number(&[0; 58]), None);
    }
}
