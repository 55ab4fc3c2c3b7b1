//! docs/kubernetes-e2e.md: which upstream tests there are, and what became of them in the run that wrote it.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::scenario::{Group, Ours};

const HEAD: &str = "# Kubernetes' own network tests

The network tests of Kubernetes (1.33 and later, `test/e2e/network`) that packets can decide, as scenarios on real sockets between
network namespaces: `scripts/test e2e`, or `scripts/test e2e session affinity` for those whose upstream name has the words. The
sources are in `tests/e2e`. Tags in brackets are left out of the names.

The gateway stands for the node whose Service proxy a client asks, so *local* is what is on the gateway's own node. Clients are pods,
nodes, or outside; every scenario speaks both IP families unless it is about one. Where upstream waits until a change has taken effect,
here the very next packet must see it; only UDP flows of a pod that is gone and healthCheckNodePorts may follow a moment later. After each
scenario every packet that the gateway received is accounted for, none was dropped for a reason that the scenario did not give, and nothing
was logged as an error.

This file is written by `scripts/test e2e --table`; a run of everything fails if it is out of date.
";

/// What became of the scenario of an upstream name; `None`: it did not run.
pub type Outcome<'o> = &'o dyn Fn(&Group, &str) -> Option<bool>;

/// The file's contents.
pub fn render(groups: &[&Group], passed: Outcome<'_>) -> String {
    let mut text = HEAD.to_owned();
    let mut totals = [("pass", 0), ("FAIL", 0), ("not applicable", 0)];
    let mut body = String::new();
    let mut title = "";
    for group in groups {
        if group.name != title {
            title = group.name;
            let _ = writeln!(body, "\n## {title}\n\n| upstream | scenario | result |\n| --- | --- | --- |");
        }
        for scenario in group.scenarios {
            let (index, name, result) = match &scenario.ours {
                Ours::Runs { name, .. } => {
                    let index = usize::from(passed(group, scenario.upstream) != Some(true));
                    (index, format!("`{}`", name.trim_start_matches("e2e::")), totals[index].0.to_owned())
                }
                Ours::NotApplicable(why) => (2, String::new(), format!("not applicable: {why}")),
            };
            totals[index].1 += 1;
            let _ = writeln!(body, "| {} | {name} | {result} |", scenario.upstream);
        }
    }
    let sum: usize = totals.iter().map(|(_, count)| count).sum();
    let totals: Vec<String> = totals
        .iter()
        .filter(|(_, count)| *count > 0)
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    let _ = writeln!(text, "\nOf {sum} tests: {}.", totals.join(", "));
    text + &body
}

/// Writes the file.
pub fn write(text: &str) -> Result<()> {
    let path = path();
    std::fs::create_dir_all(path.parent().context("docs")?)?;
    std::fs::write(&path, text).with_context(|| path.display().to_string())
}

/// Fails unless the file says the same.
pub fn compare(text: &str) -> Result<()> {
    let written = std::fs::read_to_string(path()).unwrap_or_default();
    let differs = written.lines().zip(text.lines()).find(|(old, new)| old != new);
    ensure!(
        written == text,
        "docs/kubernetes-e2e.md is not what this run found; write it by `scripts/test e2e --table`. First difference: {differs:?}"
    );
    Ok(())
}

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/kubernetes-e2e.md")
}
