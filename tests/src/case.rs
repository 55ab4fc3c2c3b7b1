//! Golden cases: one text file each, written by `scripts/golden record`, read by the tests.
//!
//! ```text
//! # UDP to a Service: destination translated, TTL one less.
//! ledger fragments                 (only where Towpath differs on purpose, see ledger.rs)
//! in outside
//!   | ethernet 02:00:00:00:00:02 > 02:00:00:00:00:01      (for the reader; the hex counts)
//!   020000000001 ...
//! out inside
//!   ...
//! ```
//!
//! Every `in` is one frame that comes in by that port; the `out` and `answer` entries up to the next `in` are what Linux
//! made of it, in order. `answer` is a packet that Linux made itself, see [`Strictness::Answer`].

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::decode::{Strictness, decode, hex, unhex};

/// A port of the gateway, by its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where clients are; port 0.
    Outside,
    /// Where nodes and pods are; port 1.
    Inside,
}

impl Side {
    /// Its name in case files.
    pub const fn name(self) -> &'static str {
        match self {
            Side::Outside => "outside",
            Side::Inside => "inside",
        }
    }

    /// The other port.
    pub const fn other(self) -> Side {
        match self {
            Side::Outside => Side::Inside,
            Side::Inside => Side::Outside,
        }
    }

    fn parse(name: &str) -> Option<Side> {
        [Side::Outside, Side::Inside].into_iter().find(|side| side.name() == name)
    }
}

/// One frame that leaves the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emitted {
    /// By which port.
    pub side: Side,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// How closely it is compared.
    pub strictness: Strictness,
}

impl Emitted {
    /// The frame as lines, its port first.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("leaves by {}", self.side.name())];
        lines.extend(decode(&self.frame, self.strictness));
        lines
    }
}

/// One frame in and what comes of it.
#[derive(Clone, Debug)]
pub struct Step {
    /// By which port it comes in.
    pub side: Side,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// What leaves, in order.
    pub expected: Vec<Emitted>,
}

/// A golden case.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file's name without its ending.
    pub name: String,
    /// What it shows, in one sentence or a few.
    pub about: String,
    /// Entry of the ledger of allowed differences, where Towpath must not do what Linux does.
    pub ledger: Option<String>,
    /// Frames in order; later ones find the flows of earlier ones.
    pub steps: Vec<Step>,
}

impl Case {
    /// Reads a case file.
    pub fn read(path: &Path) -> Result<Case> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Case::parse(name, &text).with_context(|| format!("{}", path.display()))
    }

    /// Every case of the repository, by name.
    pub fn all() -> Result<Vec<Case>> {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(folder().join("cases"))?.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|ending| ending == "case"));
        paths.sort();
        paths.iter().map(|path| Case::read(path)).collect()
    }

    /// The same case with `tags`, VLAN tags of four bytes each, in every frame that comes in and leaves.
    pub fn tagged(&self, tags: &[u8]) -> Case {
        let mut case = self.clone();
        for step in &mut case.steps {
            for frame in
                std::iter::once(&mut step.frame).chain(step.expected.iter_mut().map(|out| &mut out.frame))
            {
                frame.splice(12..12, tags.iter().copied());
            }
        }
        case
    }

    fn parse(name: String, text: &str) -> Result<Case> {
        let mut case = Case { name, about: String::new(), ledger: None, steps: Vec::new() };
        for (number, line) in text.lines().enumerate() {
            let at = || format!("line {}: {line:?}", number + 1);
            if let Some(about) = line.strip_prefix('#') {
                case.about += about;
                continue;
            }
            if line.starts_with(' ') {
                let line = line.trim_start();
                if !line.starts_with('|') {
                    let bytes = unhex(line).with_context(|| format!("{}: not hex", at()))?;
                    let step =
                        case.steps.last_mut().with_context(|| format!("{}: bytes before `in`", at()))?;
                    step.expected.last_mut().map_or(&mut step.frame, |out| &mut out.frame).extend(bytes);
                }
                continue;
            }
            let mut words = line.split_whitespace();
            let (word, argument) = (words.next(), words.next().unwrap_or_default());
            let side = || Side::parse(argument).with_context(|| format!("{}: outside or inside", at()));
            match word {
                None => {}
                Some("ledger") => case.ledger = Some(argument.to_owned()),
                Some("in") => {
                    case.steps.push(Step { side: side()?, frame: Vec::new(), expected: Vec::new() });
                }
                Some(kind @ ("out" | "answer")) => {
                    let strictness = if kind == "out" { Strictness::Exact } else { Strictness::Answer };
                    let out = Emitted { side: side()?, frame: Vec::new(), strictness };
                    let step = case.steps.last_mut().with_context(|| format!("{}: before `in`", at()))?;
                    step.expected.push(out);
                }
                Some(_) => bail!("{}: not a word of a case file", at()),
            }
        }
        if case.steps.is_empty() || case.steps.iter().any(|step| step.frame.is_empty()) {
            bail!("a case needs a frame after each `in`");
        }
        Ok(case)
    }

    /// The text of the case file.
    pub fn text(&self) -> String {
        let mut text = format!("# {}\n", self.about.trim());
        if let Some(ledger) = &self.ledger {
            let _ = writeln!(text, "ledger {ledger}");
        }
        for step in &self.steps {
            write_frame(&mut text, &format!("in {}", step.side.name()), &step.frame);
            for out in &step.expected {
                let kind = if out.strictness == Strictness::Exact { "out" } else { "answer" };
                write_frame(&mut text, &format!("{kind} {}", out.side.name()), &out.frame);
            }
        }
        text
    }

    /// Writes the case file into the repository.
    pub fn write(&self) -> Result<()> {
        let path = folder().join("cases").join(format!("{}.case", self.name));
        std::fs::write(&path, self.text()).with_context(|| format!("{}", path.display()))
    }
}

/// tests/golden of the repository.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// A heading, the decoded frame without its payload, and the bytes.
fn write_frame(text: &mut String, heading: &str, frame: &[u8]) {
    let _ = writeln!(text, "\n{heading}");
    for line in decode(frame, Strictness::Exact) {
        let shown: String = line.chars().take(140).collect();
        let _ = writeln!(text, "  | {shown}{}", if shown.len() < line.len() { " ..." } else { "" });
    }
    for chunk in frame.chunks(40) {
        let words: Vec<String> = chunk.chunks(4).map(hex).collect();
        let _ = writeln!(text, "  {}", words.join(" "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_survives_the_round_trip() {
        let case = Case {
            name: "x".into(),
            about: "Some words.".into(),
            ledger: Some("land".into()),
            steps: vec![Step {
                side: Side::Outside,
                frame: (0..90).collect(),
                expected: vec![Emitted {
                    side: Side::Inside,
                    frame: (7..80).collect(),
                    strictness: Strictness::Answer,
                }],
            }],
        };
        let again = Case::parse("x".into(), &case.text()).unwrap();
        assert_eq!(again.text(), case.text());
        assert_eq!(again.steps[0].frame, case.steps[0].frame);
        assert_eq!(again.steps[0].expected, case.steps[0].expected);
    }

    #[test]
    fn tags_stand_before_the_ethertype_of_every_frame() {
        let text = "# x\nin outside\n  02000000 00010200 00000002 0800abcd\nout inside\n  02000000 00020200 00000001 080045\n";
        let case = Case::parse("x".into(), text).unwrap().tagged(&[0x81, 0, 0, 5]);
        assert_eq!(case.steps[0].frame[10..], [0, 2, 0x81, 0, 0, 5, 8, 0, 0xab, 0xcd]);
        assert_eq!(case.steps[0].expected[0].frame[10..], [0, 1, 0x81, 0, 0, 5, 8, 0, 0x45]);
    }

    #[test]
    fn a_line_that_means_nothing_is_named() {
        let error = Case::parse("x".into(), "in outside\n  00\nsideways\n").unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
    }
}
