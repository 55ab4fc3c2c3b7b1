//! Records golden cases: `cases.py | golden record`, see scripts/golden.

use std::io::BufRead;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tests::case::{Case, Side, Step};
use tests::decode::unhex;
use tests::oracle::Oracle;

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
    if std::env::args().nth(1).as_deref() != Some("record") {
        bail!("usage: tests/golden/cases.py | golden record");
    }
    let oracle = Oracle::new("record")?;
    let mut recorded = 0;
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
        for (i, emitted) in oracle.play(&case)?.into_iter().enumerate() {
            case.steps[i].expected = emitted;
        }
        case.write()?;
        recorded += 1;
    }
    eprintln!("golden: {recorded} cases recorded from this kernel");
    Ok(())
}
