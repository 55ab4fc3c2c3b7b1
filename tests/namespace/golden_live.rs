//! Golden packets live: the kernel's gateway and Towpath's side by side, the same frames into both.

use std::fmt::Write as _;
use std::time::Duration;

use tests::case::{Case, Emitted, folder};
use tests::decode::difference;
use tests::gateway::Towpathd;
use tests::ledger::{self, Judgement};
use tests::oracle::Oracle;
use tests::twin::Twin;

/// Makes a gateway Towpath's, with the objects of tests/golden.
fn towpath(twin: &mut Twin) -> Towpathd {
    let config = std::fs::read_to_string(folder().join("gateway.toml")).unwrap();
    let daemon = Towpathd::start(&twin.gateway, &config).unwrap();
    daemon.apply(&std::fs::read_to_string(folder().join("objects.yaml")).unwrap()).unwrap();
    twin.wait_until_it_forwards().unwrap();
    daemon
}

/// Nothing is under way any more, and the sums match. Every drop reason is allowed here.
fn finish(daemon: Towpathd, twin: &Twin) {
    let leftovers = twin.leftovers().unwrap();
    assert!(leftovers.is_empty(), "after the last case: {leftovers:02x?}");
    let all: Vec<&str> = forwarder::verdict::Reason::ALL.iter().map(|reason| reason.name()).collect();
    daemon.finish(&all).unwrap();
}

fn lines(emitted: &[Emitted]) -> Vec<String> {
    emitted.iter().flat_map(Emitted::lines).collect()
}

/// Differences between what was expected at each step of a case and what came, for people.
fn differences(case: &Case, expected: &[Vec<Emitted>], got: &[Vec<Emitted>]) -> Vec<String> {
    if let Some(entry) = case.ledger.as_deref().filter(|entry| *entry != "kernel-path") {
        return match ledger::judge(entry, case, got) {
            Judgement::Meant => Vec::new(),
            Judgement::Wrong(why) => vec![format!("{} (ledger {entry}): {why}", case.name)],
        };
    }
    let steps =
        expected.iter().zip(got).enumerate().filter(|(_, (expected, got))| !ledger::same(expected, got));
    steps
        .map(|(number, (expected, got))| {
            let mut text = format!("{} step {}: {}\n", case.name, number + 1, case.about.trim());
            let _ = write!(text, "{}", difference(&lines(expected), &lines(got)));
            text
        })
        .collect()
}

#[test]
fn towpath_does_on_the_wire_what_linux_does_beside_it() {
    let mut oracle = Oracle::new("oracle").unwrap();
    let mut twin = Twin::new("live").unwrap();
    let daemon = towpath(&mut twin);
    let mut failures = Vec::new();
    let cases = Case::all().unwrap();
    for case in &cases {
        let linux = oracle.play(case, Duration::ZERO).unwrap();
        // The recording is of another kernel, perhaps: what counts is the one beside us.
        for (number, step) in
            case.steps.iter().enumerate().filter(|(i, step)| !ledger::same(&step.expected, &linux[*i]))
        {
            let text = difference(&lines(&step.expected), &lines(&linux[number]));
            println!("{} step {}: this kernel differs from the recorded one\n{text}", case.name, number + 1);
        }
        failures.extend(differences(case, &linux, &twin.play(case, Duration::ZERO).unwrap()));
    }
    assert!(
        failures.is_empty(),
        "{} differences in {} cases:\n\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
    finish(daemon, &twin);
}

/// VLAN tags are none of our business: the same cases with tags, the same frames out with the same tags (IEEE 802.1Q, 802.1ad).
/// The kernel here has no VLAN devices: what was recorded counts.
fn leave_with_their_tags(name: &str, tags: &[u8]) {
    let mut twin = Twin::new(name).unwrap();
    // Room for the second tag beside full-sized packets.
    for (namespace, interface) in
        [(&twin.gateway, "g0"), (&twin.gateway, "g1"), (&twin.far, "w0"), (&twin.far, "w1")]
    {
        namespace.ip(&format!("link set {interface} mtu 1508")).unwrap();
    }
    let daemon = towpath(&mut twin);
    let mut failures = Vec::new();
    let cases = Case::all().unwrap();
    for case in &cases {
        let mut case = case.tagged(tags);
        if case.ledger.as_deref() == Some("kernel-path") {
            // The kernel has no interface with this tag.
            case.steps.iter_mut().for_each(|step| step.expected.clear());
        }
        let expected: Vec<_> = case.steps.iter().map(|step| step.expected.clone()).collect();
        let got = twin.play(&case, Duration::ZERO).unwrap();
        failures.extend(differences(&case, &expected, &got));
    }
    assert!(
        failures.is_empty(),
        "{} differences in {} cases:\n\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
    finish(daemon, &twin);
}

#[test]
fn tagged_packets_leave_with_their_tag() {
    leave_with_their_tags("tag", &[0x81, 0x00, 0x20, 0x2a]);
}

#[test]
fn doubly_tagged_packets_leave_with_both_tags() {
    leave_with_their_tags("tags", &[0x88, 0xa8, 0x00, 0x64, 0x81, 0x00, 0x20, 0x2a]);
}
