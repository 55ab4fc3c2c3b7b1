//! Golden packets live: the kernel's gateway and Towpath's side by side, the same frames into both.

use std::fmt::Write as _;
use std::time::Duration;

use tests::case::{Case, Emitted, folder};
use tests::decode::difference;
use tests::gateway::Towpathd;
use tests::ledger::{self, Judgement};
use tests::oracle::Oracle;
use tests::twin::Twin;

/// How long to wait for what should not come.
const QUIET: Duration = Duration::from_millis(15);

fn lines(emitted: &[Emitted]) -> Vec<String> {
    emitted.iter().flat_map(Emitted::lines).collect()
}

#[test]
fn towpath_does_on_the_wire_what_linux_does_beside_it() {
    let oracle = Oracle::new("oracle").unwrap();
    let twin = Twin::new("live").unwrap();
    let config = std::fs::read_to_string(folder().join("gateway.toml")).unwrap();
    let daemon = Towpathd::start(&twin.gateway, &config).unwrap();
    daemon.apply(&std::fs::read_to_string(folder().join("objects.yaml")).unwrap()).unwrap();

    let mut failures = String::new();
    let mut failed = 0;
    let cases = Case::all().unwrap();
    for case in &cases {
        let linux = oracle.play(case, QUIET).unwrap();
        let towpath = twin.play(case, QUIET).unwrap();
        if let Some(entry) = case.ledger.as_deref().filter(|entry| *entry != "kernel-path") {
            if let Judgement::Wrong(why) = ledger::judge(entry, case, &towpath) {
                failed += 1;
                let _ = writeln!(failures, "{} (ledger {entry}): {why}", case.name);
            }
            continue;
        }
        for (number, step) in case.steps.iter().enumerate() {
            // The recording is of another kernel, perhaps: what counts is the one beside us.
            if !ledger::same(&step.expected, &linux[number]) {
                println!("{} step {}: this kernel differs from the recorded one", case.name, number + 1);
            }
            if !ledger::same(&linux[number], &towpath[number]) {
                failed += 1;
                let text = difference(&lines(&linux[number]), &lines(&towpath[number]));
                let _ =
                    writeln!(failures, "{} step {}: {}\n{text}", case.name, number + 1, case.about.trim());
            }
        }
    }
    assert!(failed == 0, "{failed} differences in {} cases:\n\n{failures}", cases.len());
    // Every drop reason is allowed here; the sums must match all the same.
    let all: Vec<&str> = forwarder::verdict::Reason::ALL.iter().map(|reason| reason.name()).collect();
    daemon.finish(&all).unwrap();
}
