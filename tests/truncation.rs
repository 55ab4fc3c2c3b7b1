//! Every golden packet cut at every byte, and every length field set to what it should not be: never a panic, and never is a
//! packet forwarded that is longer than what came in.

use forwarder::verdict::Verdict;
use tests::case::{Case, Step};
use tests::pure::Pure;

fn feed(pure: &mut Pure, step: &Step, frame: &[u8], what: &str) {
    let outcome = pure.feed(step.side, frame);
    let longest = outcome.came.iter().map(Vec::len).max().unwrap_or(0);
    for out in outcome.emitted.iter().filter(|_| matches!(outcome.verdict, Verdict::Forward { .. })) {
        assert!(out.frame.len() <= longest, "{what}: {longest} bytes in, {} out", out.frame.len());
    }
}

#[test]
fn every_packet_cut_at_every_byte() {
    let mut pure = Pure::golden().unwrap();
    let mut fed = 0u64;
    for case in Case::all().unwrap() {
        for step in &case.steps {
            for len in 0..step.frame.len() {
                feed(&mut pure, step, &step.frame[..len], &format!("{} cut at {len}", case.name));
                fed += 1;
            }
            // The connection that later packets of the case need.
            pure.feed(step.side, &step.frame);
        }
    }
    println!("{fed} truncated packets");
    assert!(fed > 20_000);
}

#[test]
fn every_length_field_set_wrong() {
    let mut pure = Pure::golden().unwrap();
    for case in Case::all().unwrap() {
        for step in &case.steps {
            let len = step.frame.len() as u16;
            // IPv4 total length, IPv6 payload length, UDP length in both families, and those quoted in ICMP errors.
            for at in [16, 18, 38, 58, 44, 66, 66 + 20, 94 + 2, 62 + 4] {
                for value in [
                    0,
                    1,
                    7,
                    8,
                    9,
                    19,
                    20,
                    21,
                    39,
                    40,
                    41,
                    len - 15,
                    len - 14,
                    len - 13,
                    len,
                    0x7fff,
                    u16::MAX,
                ] {
                    let mut frame = step.frame.clone();
                    let Some(field) = frame.get_mut(at..at + 2) else { continue };
                    field.copy_from_slice(&value.to_be_bytes());
                    feed(&mut pure, step, &frame, &format!("{} with {value} at {at}", case.name));
                }
            }
            // Header length nibbles.
            for at in [14, 46, 66, 62, 82] {
                for value in 0..=255 {
                    let mut frame = step.frame.clone();
                    let Some(field) = frame.get_mut(at) else { continue };
                    *field = value;
                    feed(&mut pure, step, &frame, &format!("{} with {value} at {at}", case.name));
                }
            }
        }
    }
}
