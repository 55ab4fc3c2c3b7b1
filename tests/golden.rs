//! Golden packets through the pure pipeline: what Linux made of each, byte for byte, or an entry of the ledger.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use forwarder::verdict::Verdict;
use tests::case::{Case, Emitted, Step};
use tests::decode::difference;
use tests::ledger::{self, Judgement};
use tests::pure::{Outcome, Pure};

/// Empty if the outcome is as recorded.
fn mismatch(step: &Step, outcome: &Outcome) -> String {
    // What is not ours goes to the kernel untouched, which then does what it did when the case was recorded.
    if outcome.verdict == Verdict::Punt || ledger::same(&step.expected, &outcome.emitted) {
        return String::new();
    }
    let lines = |emitted: &[Emitted]| emitted.iter().flat_map(Emitted::lines).collect::<Vec<_>>();
    format!("verdict {:?}\n{}", outcome.verdict, difference(&lines(&step.expected), &lines(&outcome.emitted)))
}

#[test]
fn the_pipeline_does_what_linux_does() {
    let mut pure = Pure::golden().unwrap();
    let cases = Case::all().unwrap();
    assert!(cases.len() >= 80, "only {} golden cases", cases.len());
    let mut failures = String::new();
    let mut failed = 0;
    for case in &cases {
        let outcomes = pure.play(case);
        if let Some(entry) = &case.ledger {
            let emitted: Vec<Vec<Emitted>> = outcomes.iter().map(|o| o.emitted.clone()).collect();
            if let Judgement::Wrong(why) = ledger::judge(entry, case, &emitted) {
                failed += 1;
                let _ = writeln!(failures, "{} (ledger {entry}): {why}", case.name);
            }
            continue;
        }
        for (number, (step, outcome)) in case.steps.iter().zip(&outcomes).enumerate() {
            let text = mismatch(step, outcome);
            if !text.is_empty() {
                failed += 1;
                let _ =
                    writeln!(failures, "{} step {}: {}\n{text}", case.name, number + 1, case.about.trim());
            }
        }
    }
    assert!(failed == 0, "{failed} differences from Linux:\n\n{failures}");
}

/// VLAN tags change nothing else, and leave as they came (IEEE 802.1Q, 802.1ad).
#[test]
fn tagged_packets_leave_with_their_tags() {
    let outer_and_inner = [0x88, 0xa8, 0x00, 0x64, 0x81, 0x00, 0x20, 0x2a];
    for tags in [&outer_and_inner[4..], &outer_and_inner[..]] {
        let (mut untagged, mut pure) = (Pure::golden().unwrap(), Pure::golden().unwrap());
        for case in Case::all().unwrap() {
            let tagged = pure.play(&case.tagged(tags));
            for (number, (plain, tagged)) in untagged.play(&case).iter().zip(&tagged).enumerate() {
                let at = || format!("{} step {} with tags {tags:02x?}", case.name, number + 1);
                assert_eq!(plain.verdict, tagged.verdict, "{}", at());
                let frames = |outcome: &Outcome| -> Vec<Vec<u8>> {
                    outcome.emitted.iter().map(|out| out.frame.clone()).collect()
                };
                let mut with_tags = frames(plain);
                for frame in &mut with_tags {
                    frame.splice(12..12, tags.iter().copied());
                }
                assert_eq!(with_tags, frames(tagged), "{}", at());
            }
        }
    }
}

/// Punting may not hide anything: only cases that name the kernel's work may be punted.
#[test]
fn only_what_is_the_kernels_work_is_punted() {
    let mut pure = Pure::golden().unwrap();
    let mut punted = BTreeMap::new();
    for case in Case::all().unwrap() {
        if pure.play(&case).iter().any(|outcome| outcome.verdict == Verdict::Punt) {
            punted.insert(case.name, case.ledger);
        }
    }
    for (name, ledger) in &punted {
        assert!(
            ledger.as_deref() == Some("kernel-path"),
            "{name} is punted but is not meant to be: {punted:?}"
        );
    }
}

#[test]
fn the_ledger_is_short_and_every_entry_is_used() {
    let cases = Case::all().unwrap();
    assert!(ledger::ENTRIES.len() <= 8);
    for entry in ledger::ENTRIES {
        assert!(
            cases.iter().any(|case| case.ledger.as_deref() == Some(entry.name)),
            "{} is never used",
            entry.name
        );
    }
    for case in &cases {
        if let Some(name) = &case.ledger {
            assert!(ledger::ENTRIES.iter().any(|entry| entry.name == name), "{}: no entry {name}", case.name);
        }
    }
}
