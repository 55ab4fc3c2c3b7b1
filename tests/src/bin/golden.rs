//! Records golden cases, `cases.py | golden record` (see scripts/golden), and writes them as seeds, `golden seeds FOLDER` (see
//! scripts/fuzz).

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tests::case::{Case, Side, Step, folder};
use tests::decode::unhex;
use tests::ledger::{same, same_datagrams};
use tests::oracle::Oracle;

/// How long to listen after each frame, since nothing says yet what is to be expected.
const LINGER: Duration = Duration::from_millis(120);

/// A case as tests/golden/cases.py prints it, one JSON object a line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    name: String,
    about: String,
    ledger: Option<String>,
    /// Side and frame in hex.
    frames: Vec<(String, String)>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["record"] => record(),
        ["seeds", folder] => seeds(Path::new(folder)),
        _ => bail!("usage: tests/golden/cases.py | golden record\n       golden seeds FOLDER"),
    }
}

/// Writes every case as a seed for fuzzing.
fn seeds(to: &Path) -> Result<()> {
    for case in Case::all()? {
        std::fs::write(to.join(&case.name), tests::frames::join(&case))?;
    }
    Ok(())
}

/// Writes the case files anew.
fn record() -> Result<()> {
    let mut oracle = Oracle::new("record")?;
    let mut known: BTreeMap<String, Case> =
        Case::all()?.into_iter().map(|case| (case.name.clone(), case)).collect();
    let mut count = 0;
    for line in std::io::stdin().lock().lines() {
        let input: Input = serde_json::from_str(&line?).context("a line of cases.py")?;
        let mut steps = Vec::new();
        for (side, frame) in &input.frames {
            let side = match side.as_str() {
                "outside" => Side::Outside,
                "inside" => Side::Inside,
                other => bail!("{}: side {other:?}", input.name),
            };
            let frame = unhex(frame).with_context(|| format!("{}: hex", input.name))?;
            steps.push(Step { side, frame, expected: Vec::new() });
        }
        let mut case = Case { name: input.name, about: input.about, ledger: input.ledger, steps };
        let recorded = oracle.play(&case, LINGER)?;
        let before = known.remove(&case.name);
        for (i, emitted) in recorded.into_iter().enumerate() {
            let kept = before.as_ref().and_then(|before| before.steps.get(i)).map(|step| &step.expected);
            // What differs by an identification that the kernel draws by lot is no news.
            let no_news =
                |kept: &&Vec<_>| same(kept, &emitted) || same_datagrams(&case.steps[i], kept, &emitted);
            case.steps[i].expected = kept.filter(no_news).cloned().unwrap_or(emitted);
        }
        case.write()?;
        count += 1;
    }
    for name in known.keys() {
        std::fs::remove_file(folder().join("cases").join(format!("{name}.case")))?;
    }
    eprintln!("golden: {count} cases recorded from this kernel");
    Ok(())
}
