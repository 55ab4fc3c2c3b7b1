//! Manifests from files, folders and standard input, with kubectl's `-f`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use config::fault::Code;
use config::object::{Manifest, folder, parse};

use crate::Usage;
use crate::print::{self, Color, Paint, Tint, notice};

/// Where objects come from.
#[derive(clap::Args, Clone, Debug)]
pub struct SourceArgs {
    /// A file, a folder or - for standard input; may be given several times
    #[arg(short = 'f', long = "filename", value_name = "FILE", value_hint = clap::ValueHint::AnyPath)]
    pub files: Vec<PathBuf>,
    /// Folders within folders too
    #[arg(short = 'R', long)]
    pub recursive: bool,
}

/// Reads every object. Warnings and skipped kinds are told on standard error.
///
/// # Errors
/// A file that cannot be read, or objects at fault, each of which is told on standard error. Then nothing is returned.
pub fn read(args: &SourceArgs, color: Color) -> Result<Vec<Manifest>> {
    let paint = Paint::for_stderr(color);
    let mut manifests = Vec::new();
    let mut faults = 0;
    let mut skipped: Vec<(String, u32)> = Vec::new();
    for file in expand(&args.files, args.recursive)? {
        let name = file.to_string_lossy();
        let found = parse(&text(&file)?, &name);
        manifests.extend(found.manifests);
        for warning in &found.warnings {
            if warning.code == Code::SkippedKind {
                let kind = warning.value.clone().or(warning.object.clone()).unwrap_or_default();
                let kind = kind.split(' ').next().unwrap_or_default().to_owned();
                match skipped.iter_mut().find(|s| s.0 == kind) {
                    Some((_, count)) => *count += 1,
                    None => skipped.push((kind, 1)),
                }
            } else {
                notice(&print::fault(paint, Tint::Warn, "warning:", warning));
            }
        }
        for fault in &found.faults {
            notice(&print::fault(paint, Tint::Bad, "error:", fault));
        }
        faults += found.faults.len();
    }
    for (kind, count) in &skipped {
        let objects = if *count == 1 { "object" } else { "objects" };
        notice(&format!("skipped {count} {objects} of kind {kind}, which Towpath does not use"));
    }
    match faults {
        0 => Ok(manifests),
        1 => bail!("1 object is at fault: nothing was done"),
        n => bail!("{n} objects are at fault: nothing was done"),
    }
}

/// Files as given; folders become their manifests by name, as kubectl takes them.
fn expand(given: &[PathBuf], recursive: bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut stdin = false;
    for path in given {
        if path.as_os_str() == "-" {
            if std::mem::replace(&mut stdin, true) {
                bail!(Usage("-f - can be given once: standard input is read to its end".into()));
            }
            files.push(path.clone());
        } else if path.is_dir() {
            let found = folder(path, recursive)?;
            if found.is_empty() {
                bail!(
                    "{} has no .yaml, .yml or .json file{}",
                    path.display(),
                    if recursive { "" } else { "; add -R for folders within it" }
                );
            }
            files.extend(found);
        } else if path.to_str().is_some_and(|p| p.starts_with("http://") || p.starts_with("https://")) {
            bail!(
                "{0} is a URL: fetch it first, such as `curl -fsS {0} | towpathctl ... -f -`",
                path.display()
            );
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        bail!(Usage("no objects: name a file, a folder or - with -f".into()));
    }
    Ok(files)
}

fn text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    if path.as_os_str() == "-" {
        std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
    } else {
        bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        anyhow::anyhow!("{}:{line}: not UTF-8 text: is this a manifest?", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_taken_by_name_and_not_deeper_than_asked() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("deeper")).unwrap();
        for name in ["b.yaml", "a.yml", "c.json", "notes.txt", "deeper/d.yaml"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |recursive| -> Vec<String> {
            let files = expand(&[dir.path().to_owned()], recursive).unwrap();
            files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(false), ["a.yml", "b.yaml", "c.json"]);
        assert_eq!(names(true), ["a.yml", "b.yaml", "c.json", "d.yaml"]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        for (given, word) in [
            (vec![], "no objects"),
            (vec!["-".into(), "-".into()], "once"),
            (vec![dir.path().to_owned()], "no .yaml"),
            (vec!["https://example.com/a.yaml".into()], "curl"),
        ] {
            let error = expand(&given, false).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn binary_files_are_named_with_the_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"kind: Service\n\xff\xfe").unwrap();
        let error = text(file.path()).unwrap_err().to_string();
        assert!(error.contains(":2: not UTF-8"), "{error}");
    }
}
