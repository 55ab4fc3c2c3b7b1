//! Frames out of arbitrary bytes, and what must hold for any frame at all.

use forwarder::verdict::Verdict;

use crate::case::{Case, Side};
use crate::decode::{Strictness, decode};
use crate::fragments;
use crate::pure::Outcome;

/// Longest frame that fits one frame of packet memory with its headroom.
const MAX_FRAME: usize = 3500;

/// Cuts `input` into frames: a byte whose lowest bit is the side, two bytes of length (big endian), the frame. A length beyond
/// the end means the rest.
pub fn split(input: &[u8]) -> impl Iterator<Item = (Side, &[u8])> {
    let mut rest = input;
    std::iter::from_fn(move || {
        let (header, tail) = rest.split_at_checked(3)?;
        let len = usize::from(u16::from_be_bytes([header[1], header[2]])).min(tail.len()).min(MAX_FRAME);
        let (frame, after) = tail.split_at(len);
        rest = after;
        Some((if header[0] & 1 == 0 { Side::Outside } else { Side::Inside }, frame))
    })
}

/// A case in the form that [`split`] reads.
pub fn join(case: &Case) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in &case.steps {
        bytes.push(u8::from(step.side == Side::Inside));
        bytes.extend((step.frame.len() as u16).to_be_bytes());
        bytes.extend(&step.frame);
    }
    bytes
}

/// Checks what holds for any frame.
///
/// # Panics
/// If a packet was forwarded that is longer than what came, or a right checksum became wrong or a wrong one right.
pub fn check(outcome: &Outcome) {
    let Verdict::Forward { .. } = outcome.verdict else { return };
    let longest = outcome.came.iter().map(Vec::len).max().unwrap_or(0);
    let left: Vec<Vec<u8>> = outcome.emitted.iter().map(|out| out.frame.clone()).collect();
    for frame in &left {
        assert!(frame.len() <= longest, "{longest} bytes in, {} out", frame.len());
    }
    let wrong = |frames: &[Vec<u8>]| -> usize {
        let lines = frames.iter().flat_map(|frame| decode(frame, Strictness::Exact));
        lines.filter(|line| line.contains("(right is")).count()
    };
    if outcome.came.len() > 1 || left.len() > 1 {
        for frame in &left {
            let lines = decode(frame, Strictness::Exact);
            let ip = lines.iter().find(|line| line.starts_with("ip"));
            assert!(ip.is_some_and(|line| !line.contains("right is")), "{lines:#?}");
        }
    }
    let (came, left) = (fragments::join(&outcome.came), fragments::join(&left));
    let shown = |frames: &[Vec<u8>]| -> Vec<Vec<String>> {
        frames.iter().map(|frame| decode(frame, Strictness::Exact)).collect()
    };
    assert_eq!((came.len(), left.len()), (1, 1), "{:#?}\n{:#?}", shown(&came), shown(&left));
    assert_eq!(
        wrong(&came),
        wrong(&left),
        "wrong checksums before and after:\n{:#?}\n{:#?}",
        shown(&came),
        shown(&left)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_survive_the_round_trip() {
        for case in Case::all().unwrap() {
            let joined = join(&case);
            let again: Vec<_> = split(&joined).collect();
            assert_eq!(again.len(), case.steps.len());
            for ((side, frame), step) in again.into_iter().zip(&case.steps) {
                assert_eq!((side, frame), (step.side, &step.frame[..]));
            }
        }
    }
}
