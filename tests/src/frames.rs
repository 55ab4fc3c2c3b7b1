//! Frames out of arbitrary bytes, and what must hold for any frame at all.

use forwarder::verdict::Verdict;

use crate::case::{Case, Side};
use crate::decode::{Strictness, decode};
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
/// If a packet was forwarded that is longer than the one that came, or a right checksum became wrong or a wrong one right.
pub fn check(frame: &[u8], outcome: &Outcome) {
    let (Verdict::Forward { .. }, Some(out)) = (outcome.verdict, &outcome.emitted) else { return };
    assert!(out.frame.len() <= frame.len(), "{} bytes in, {} out", frame.len(), out.frame.len());
    let wrong = |frame: &[u8]| {
        let lines = decode(frame, Strictness::Exact);
        lines.iter().filter(|line| line.contains("(right is")).count()
    };
    let (before, after) = (wrong(frame), wrong(&out.frame));
    assert_eq!(
        before,
        after,
        "wrong checksums before and after:\n{:#?}\n{:#?}",
        decode(frame, Strictness::Exact),
        decode(&out.frame, Strictness::Exact)
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
