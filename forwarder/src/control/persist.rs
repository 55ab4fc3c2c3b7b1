//! Accepted objects on disk, so that a restart resumes the same tables by itself.
//!
//! The state directory holds *snapshots*, all objects at one moment, and *journals*, the changes since:
//! `objects-0000000007.snapshot` and `objects-0000000007.journal`. A change is appended to the newest journal before it
//! is published and synced before its client is answered. When a journal has grown past its snapshot a new journal is
//! begun, and a new snapshot is written beside it (temporary file, fsync, rename, fsync of the directory). The
//! snapshot and journal before those are kept.
//!
//! Loading takes the newest good snapshot N and then the journals N, N+1, ... in order. So a missing or damaged snapshot
//! costs nothing while the one before it and its journal are there, and a crash between any two writes is harmless.
//!
//! Both files are lines: eight hexadecimal digits of the CRC-32 of the rest, a space, JSON. The first line says what the
//! file is; the lines of a change count only when its `commit` line is there, so a half-written change is no change.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of both file formats; a file of another version is refused.
const FORMAT_VERSION: u32 = 1;

/// A journal may always grow to this size, bytes, before a new snapshot is worth its writing.
const JOURNAL_MIN_BYTES: u64 = 4 << 20;

/// Why state could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// An operation on a file failed.
    #[error("cannot {action} {path}: {source}; {remedy}", path = path.display(), remedy = remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no journal to append to: [`StateDir::rotate`] comes first.
    #[error("no journal is open in {}", .0.display())]
    NoJournal(PathBuf),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space there or set [control] state_dir to another file system"
        }
        io::ErrorKind::PermissionDenied => {
            "give the directory of [control] state_dir to the data plane's user"
        }
        io::ErrorKind::NotFound => "create the directory of [control] state_dir",
        io::ErrorKind::ReadOnlyFilesystem => "set [control] state_dir to a writable file system",
        _ => "check [control] state_dir",
    }
}

/// The first line of a file and the last line of a change.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mark {
    Begin { version: u32, kind: Kind, sequence: u64 },
    Commit { generation: u64, lines: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Snapshot,
    Journal,
}

impl Kind {
    fn file_name(self, sequence: u64) -> String {
        match self {
            Kind::Snapshot => format!("objects-{sequence:010}.snapshot"),
            Kind::Journal => format!("objects-{sequence:010}.journal"),
        }
    }

    fn of_file_name(name: &str) -> Option<(Kind, u64)> {
        let (sequence, kind) = name.strip_prefix("objects-")?.split_once('.')?;
        let kind = match kind {
            "snapshot" => Kind::Snapshot,
            "journal" => Kind::Journal,
            _ => return None,
        };
        // Ten digits, so that the next number always exists.
        (sequence.len() == 10).then(|| sequence.parse().ok()).flatten().map(|sequence| (kind, sequence))
    }
}

/// What was found on disk.
#[derive(Debug, Default)]
pub struct Restored {
    /// Generation of the last change; 0 if there was none.
    pub generation: u64,
    /// The lines of all changes, oldest first, as they were appended.
    pub lines: Vec<String>,
    /// What was damaged and what was used instead, for the log and `towpathctl status`.
    pub notes: Vec<String>,
}

/// The state directory, opened for appending. One thread owns it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    sequence: u64,
    journal: Option<(File, u64)>,
    snapshot_bytes: u64,
}

impl StateDir {
    /// Reads what is in `path` and opens the newest journal if it is whole.
    ///
    /// Damaged files are renamed to `*.bad` and spoken of in [`Restored::notes`].
    ///
    /// # Errors
    /// Only if the directory cannot be listed. A directory that cannot be written to is found out by the first change.
    pub fn open(path: &Path) -> Result<(StateDir, Restored), PersistError> {
        let mut names = Vec::new();
        let io = |source| PersistError::Io { action: "list", path: path.to_owned(), source };
        for entry in fs::read_dir(path).map_err(io)? {
            names.extend(entry.map_err(io)?.file_name().into_string());
        }
        let mut snapshots: Vec<u64> = sequences(&names, Kind::Snapshot);
        let journals: Vec<u64> = sequences(&names, Kind::Journal);
        let mut dir = StateDir {
            path: path.to_owned(),
            sequence: snapshots.iter().chain(&journals).copied().max().unwrap_or(0),
            journal: None,
            snapshot_bytes: 0,
        };

        let mut restored = Restored::default();
        let mut base = None;
        while let Some(sequence) = snapshots.pop() {
            let content = dir.read(Kind::Snapshot, sequence);
            match content.damage {
                None => {
                    restored.generation = content.generation;
                    restored.lines = content.lines;
                    dir.snapshot_bytes = content.good_bytes;
                    base = Some(sequence);
                    break;
                }
                Some(damage) => restored.notes.push(dir.set_aside(Kind::Snapshot, sequence, &damage)),
            }
        }
        // Without any snapshot the first journal ever is a whole history too.
        let from = base.unwrap_or(1);
        if base.is_none() && journals.first().is_some_and(|first| *first > from) {
            restored.notes.push(format!(
                "{}: no good snapshot is left, starting without objects; apply them again",
                path.display()
            ));
            return Ok((dir, restored));
        }
        dir.replay(from, &journals, &mut restored);
        Ok((dir, restored))
    }

    /// Adds the changes of the journals from `from` on, as far as they are whole and follow each other.
    fn replay(&mut self, from: u64, journals: &[u64], restored: &mut Restored) {
        for (expected, &sequence) in (from..).zip(journals.iter().filter(|s| **s >= from)) {
            if sequence != expected {
                restored.notes.push(format!(
                    "{}: {} is missing, so later changes are not restored; apply the objects again",
                    self.path.display(),
                    Kind::Journal.file_name(expected)
                ));
                return;
            }
            let content = self.read(Kind::Journal, sequence);
            restored.lines.extend(content.lines);
            restored.generation = restored.generation.max(content.generation);
            match content.damage {
                None if sequence == self.sequence => self.journal = self.reopen(sequence, content.good_bytes),
                None => {}
                Some(damage) if content.torn_tail && sequence == self.sequence => {
                    restored.notes.push(format!(
                        "{}: {damage}; that change was never answered and is left out",
                        Kind::Journal.file_name(sequence)
                    ));
                    self.journal = self.reopen(sequence, content.good_bytes);
                }
                Some(damage) => {
                    restored.notes.push(self.set_aside(Kind::Journal, sequence, &damage));
                    return;
                }
            }
        }
    }

    fn file(&self, kind: Kind, sequence: u64) -> PathBuf {
        self.path.join(kind.file_name(sequence))
    }

    fn read(&self, kind: Kind, sequence: u64) -> Content {
        match fs::read(self.file(kind, sequence)) {
            Ok(bytes) => Content::parse(&bytes, kind, sequence),
            Err(error) => Content { damage: Some(error.to_string()), ..Content::default() },
        }
    }

    /// Opens the journal for appending after its good part.
    fn reopen(&self, sequence: u64, good_bytes: u64) -> Option<(File, u64)> {
        let path = self.file(Kind::Journal, sequence);
        let mut file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
        file.set_len(good_bytes).ok()?;
        file.seek(SeekFrom::End(0)).ok()?;
        Some((file, good_bytes))
    }

    /// Renames a damaged file, so that it is neither read again nor lost. Returns the note about it.
    fn set_aside(&self, kind: Kind, sequence: u64, damage: &str) -> String {
        let path = self.file(kind, sequence);
        let mut bad = path.clone().into_os_string();
        bad.push(".bad");
        let kept = match fs::rename(&path, &bad) {
            Ok(()) => format!("kept as {}", Path::new(&bad).display()),
            Err(error) => format!("and it could not be renamed ({error})"),
        };
        format!("{}: {damage}; using what came before it, {kept}", path.display())
    }

    /// Appends one change, all or nothing: after an error the journal is as it was before.
    ///
    /// The bytes are in the kernel afterwards (they survive the death of this process), and on disk after
    /// [`StateDir::sync`].
    ///
    /// # Errors
    /// No space, no permission, or no journal open.
    pub fn append<S: AsRef<str>>(&mut self, generation: u64, lines: &[S]) -> Result<(), PersistError> {
        let path = self.file(Kind::Journal, self.sequence);
        let Some((file, len)) = &mut self.journal else {
            return Err(PersistError::NoJournal(self.path.clone()));
        };
        let mut bytes =
            Vec::with_capacity(lines.iter().map(|line| line.as_ref().len() + 10).sum::<usize>() + 64);
        for line in lines {
            push_line(&mut bytes, line.as_ref());
        }
        push_mark(&mut bytes, &Mark::Commit { generation, lines: lines.len() as u64 });
        match file.write_all(&bytes) {
            Ok(()) => {
                *len += bytes.len() as u64;
                Ok(())
            }
            Err(source) => {
                let undone = file.set_len(*len).and_then(|()| file.seek(SeekFrom::Start(*len)));
                if undone.is_err() {
                    // What stands at the end is not known: the next change begins a new journal.
                    self.journal = None;
                }
                Err(PersistError::Io { action: "write", path, source })
            }
        }
    }

    /// Takes the last appended change back (it turned out that it cannot be published).
    pub fn undo(&mut self, bytes_before: u64) {
        if let Some((file, len)) = &mut self.journal {
            match file.set_len(bytes_before).and_then(|()| file.seek(SeekFrom::Start(bytes_before))) {
                Ok(_) => *len = bytes_before,
                Err(_) => self.journal = None,
            }
        }
    }

    /// Size of the journal now, bytes, for [`StateDir::undo`].
    pub fn journal_bytes(&self) -> u64 {
        self.journal.as_ref().map_or(0, |(_, len)| *len)
    }

    /// Waits until every appended change is on disk.
    ///
    /// # Errors
    /// The disk failed.
    pub fn sync(&mut self) -> Result<(), PersistError> {
        let path = self.file(Kind::Journal, self.sequence);
        match &self.journal {
            Some((file, _)) => {
                file.sync_data().map_err(|source| PersistError::Io { action: "sync", path, source })
            }
            None => Err(PersistError::NoJournal(self.path.clone())),
        }
    }

    /// True if [`StateDir::rotate`] is due: there is no journal, or it has outgrown its snapshot.
    pub fn wants_rotation(&self) -> bool {
        self.journal.as_ref().is_none_or(|(_, len)| *len > JOURNAL_MIN_BYTES.max(2 * self.snapshot_bytes))
    }

    /// True if there is no journal to append to, so that rotation cannot wait.
    pub fn needs_rotation(&self) -> bool {
        self.journal.is_none()
    }

    /// Begins a new journal. The snapshot that belongs before it is written by the returned job, on any thread.
    ///
    /// # Errors
    /// No space, no permission; the old journal stays open, if there was one.
    pub fn rotate(&mut self) -> Result<SnapshotJob, PersistError> {
        let sequence = self.sequence + 1;
        let path = self.file(Kind::Journal, sequence);
        let created = (|| {
            let mut file = create(&path)?;
            let mut bytes = Vec::new();
            push_mark(&mut bytes, &Mark::Begin { version: FORMAT_VERSION, kind: Kind::Journal, sequence });
            file.write_all(&bytes)?;
            file.sync_all()?;
            sync_directory(&self.path)?;
            Ok((file, bytes.len() as u64))
        })();
        match created {
            Ok(journal) => {
                self.journal = Some(journal);
                self.sequence = sequence;
                Ok(SnapshotJob { path: self.path.clone(), sequence })
            }
            Err(source) => {
                // An empty journal left behind would be taken for the newest one.
                let _ = fs::remove_file(&path);
                Err(PersistError::Io { action: "create", path, source })
            }
        }
    }

    /// Notes how large a finished snapshot is, bytes.
    pub fn snapshot_written(&mut self, bytes: u64) {
        self.snapshot_bytes = bytes;
    }
}

/// A snapshot to be written: everything up to the beginning of the journal with the same number.
#[derive(Debug)]
pub struct SnapshotJob {
    path: PathBuf,
    sequence: u64,
}

impl SnapshotJob {
    /// Writes the snapshot and removes files that are no longer needed. Returns its size in bytes.
    ///
    /// # Errors
    /// No space or a failing disk. Nothing is lost then: the older snapshot and the journals still say everything.
    pub fn write(
        self,
        generation: u64,
        lines: impl IntoIterator<Item = String>,
    ) -> Result<u64, PersistError> {
        let path = self.path.join(Kind::Snapshot.file_name(self.sequence));
        let temporary = path.with_extension("snapshot.tmp");
        let written = (|| {
            let mut file = BufWriter::with_capacity(1 << 20, create(&temporary)?);
            let mut buffer = Vec::new();
            let begin =
                Mark::Begin { version: FORMAT_VERSION, kind: Kind::Snapshot, sequence: self.sequence };
            push_mark(&mut buffer, &begin);
            let mut count = 0;
            let mut size = 0;
            for line in lines {
                push_line(&mut buffer, &line);
                count += 1;
                file.write_all(&buffer)?;
                size += buffer.len() as u64;
                buffer.clear();
            }
            push_mark(&mut buffer, &Mark::Commit { generation, lines: count });
            file.write_all(&buffer)?;
            size += buffer.len() as u64;
            file.into_inner()?.sync_all()?;
            fs::rename(&temporary, &path)?;
            sync_directory(&self.path)?;
            Ok(size)
        })();
        match written {
            Ok(size) => {
                self.remove_older();
                Ok(size)
            }
            Err(source) => {
                let _ = fs::remove_file(&temporary);
                Err(PersistError::Io { action: "write", path, source })
            }
        }
    }

    /// Keeps this snapshot and the good one before it with its journals.
    fn remove_older(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        let names: Vec<String> = entries.flatten().flat_map(|e| e.file_name().into_string()).collect();
        let Some(keep_from) =
            sequences(&names, Kind::Snapshot).into_iter().rfind(|sequence| *sequence < self.sequence)
        else {
            return;
        };
        for name in names {
            if Kind::of_file_name(&name).is_some_and(|(_, sequence)| sequence < keep_from) {
                let _ = fs::remove_file(self.path.join(name));
            }
        }
    }
}

/// Sequence numbers of the files of one kind, ascending.
fn sequences(names: &[String], kind: Kind) -> Vec<u64> {
    let mut found: Vec<u64> =
        names.iter().filter_map(|n| Kind::of_file_name(n)).filter(|f| f.0 == kind).map(|f| f.1).collect();
    found.sort_unstable();
    found
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// What a file says, as far as it is whole.
#[derive(Default)]
struct Content {
    generation: u64,
    lines: Vec<String>,
    /// Length of the part that is whole.
    good_bytes: u64,
    /// Why the rest is not.
    damage: Option<String>,
    /// Nothing whole stands behind the damage: a write was cut short.
    torn_tail: bool,
}

impl Content {
    fn parse(bytes: &[u8], kind: Kind, sequence: u64) -> Content {
        let mut content = Content::default();
        let mut open = Vec::new();
        let mut offset = 0;
        let (mut begun, mut committed) = (false, false);
        while offset < bytes.len() {
            let line_number = content.lines.len() + open.len() + 1;
            let damage = |what: &str| Some(format!("{what} at byte {offset} (entry {line_number})"));
            let Some(end) = bytes[offset..].iter().position(|b| *b == b'\n').map(|n| offset + n) else {
                content.damage = damage("the last line is cut short");
                content.torn_tail = true;
                return content;
            };
            let Some(text) = checked(&bytes[offset..end]) else {
                content.damage = damage("checksum mismatch");
                content.torn_tail = !has_commit(&bytes[end + 1..]);
                return content;
            };
            match serde_json::from_str::<Mark>(text) {
                Ok(Mark::Begin { version, .. }) if version != FORMAT_VERSION => {
                    content.damage = Some(format!(
                        "format version {version}, but this towpathd reads version {FORMAT_VERSION}"
                    ));
                    return content;
                }
                Ok(Mark::Begin { kind: k, sequence: s, .. }) if !begun && k == kind && s == sequence => {
                    begun = true
                }
                Ok(Mark::Commit { generation, lines }) if begun && lines == open.len() as u64 => {
                    committed = true;
                    content.generation = generation;
                    content.lines.append(&mut open);
                }
                Ok(_) => {
                    content.damage = damage("the file is not what its name says, or lines are missing");
                    return content;
                }
                Err(_) if begun => open.push(text.to_owned()),
                Err(_) => {
                    content.damage = damage("no header");
                    return content;
                }
            }
            offset = end + 1;
            if open.is_empty() {
                content.good_bytes = offset as u64;
            }
        }
        if !begun {
            content.damage = Some("the file is empty".to_owned());
        } else if !open.is_empty() {
            content.damage = Some("the last change has no commit line".to_owned());
            content.torn_tail = true;
        } else if kind == Kind::Snapshot && !committed {
            content.damage = Some("the snapshot has no commit line".to_owned());
        }
        content
    }
}

/// True if a whole commit line stands somewhere in `bytes`.
fn has_commit(bytes: &[u8]) -> bool {
    bytes
        .split(|b| *b == b'\n')
        .filter_map(checked)
        .any(|text| matches!(serde_json::from_str(text), Ok(Mark::Commit { .. })))
}

fn push_mark(bytes: &mut Vec<u8>, mark: &Mark) {
    push_line(bytes, &serde_json::to_string(mark).expect("numbers and names serialize"));
}

fn push_line(bytes: &mut Vec<u8>, line: &str) {
    debug_assert!(!line.contains('\n'));
    // Writing to memory cannot fail.
    let _ = writeln!(bytes, "{:08x} {line}", crc32(line.as_bytes()));
}

/// The text of a line, if its checksum is right.
fn checked(line: &[u8]) -> Option<&str> {
    let (sum, text) = line.split_at_checked(9)?;
    let expected = format!("{:08x} ", crc32(text));
    (sum == expected.as_bytes()).then(|| std::str::from_utf8(text).ok()).flatten()
}

/// CRC-32 as in IEEE 802.3 (reflected, polynomial 0xEDB88320).
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut value = i as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0xEDB8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[i] = value;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(range: std::ops::Range<u32>) -> Vec<String> {
        range.map(|i| format!("{{\"put\":{{\"n\":{i}}}}}")).collect()
    }

    /// A directory with snapshot 1 (empty), two changes, snapshot 2 and one more change: lines 0..6.
    fn filled() -> tempfile::TempDir {
        let tmp = tempfile::tempdir().unwrap();
        let (mut dir, restored) = StateDir::open(tmp.path()).unwrap();
        assert_eq!((restored.generation, restored.lines.len()), (0, 0));
        dir.rotate().unwrap().write(0, []).unwrap();
        dir.append(1, &lines(0..2)).unwrap();
        dir.append(2, &lines(2..4)).unwrap();
        dir.sync().unwrap();
        dir.rotate().unwrap().write(2, lines(0..4)).unwrap();
        dir.append(3, &lines(4..6)).unwrap();
        tmp
    }

    fn restore(path: &Path) -> Restored {
        StateDir::open(path).unwrap().1
    }

    #[test]
    fn checksum_is_the_standard_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_restart_finds_every_change_and_goes_on_appending() {
        let tmp = filled();
        for generation in 4..7 {
            let (mut dir, restored) = StateDir::open(tmp.path()).unwrap();
            assert_eq!(restored.generation, generation - 1);
            assert_eq!(restored.lines, lines(0..generation as u32 * 2 - 2));
            assert!(restored.notes.is_empty(), "{:?}", restored.notes);
            let n = generation as u32 * 2;
            dir.append(generation, &lines(n - 2..n)).unwrap();
        }
    }

    #[test]
    fn a_journal_cut_at_any_byte_gives_whole_changes_only() {
        let tmp = filled();
        let path = tmp.path().join("objects-0000000002.journal");
        let whole = fs::read(&path).unwrap();
        let header = whole.iter().position(|b| *b == b'\n').unwrap() + 1;
        for cut in header..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut dir, restored) = StateDir::open(tmp.path()).unwrap();
            assert_eq!(restored.lines, lines(0..4), "cut at {cut}");
            assert_eq!(restored.generation, 2);
            assert_eq!(restored.notes.is_empty(), cut == header, "cut at {cut}: {:?}", restored.notes);
            // And the next change lands where the half-written one stood.
            dir.append(3, &lines(4..5)).unwrap();
            assert_eq!(restore(tmp.path()).lines, lines(0..5));
        }
    }

    #[test]
    fn any_flipped_bit_in_a_snapshot_leads_to_the_one_before() {
        let tmp = filled();
        let path = tmp.path().join("objects-0000000002.snapshot");
        let whole = fs::read(&path).unwrap();
        for byte in (0..whole.len()).step_by(3) {
            let mut bad = whole.clone();
            bad[byte] ^= 1 << (byte % 8);
            fs::write(&path, &bad).unwrap();
            let restored = restore(tmp.path());
            assert_eq!(restored.lines, lines(0..6), "byte {byte}");
            assert_eq!(restored.generation, 3);
            assert_eq!(restored.notes.len(), 1, "byte {byte}: {:?}", restored.notes);
            assert!(restored.notes[0].contains("objects-0000000002.snapshot"), "{:?}", restored.notes);
            assert!(path.with_extension("snapshot.bad").exists());
        }
    }

    #[test]
    fn every_way_to_lose_a_file_ends_in_words_not_in_a_crash() {
        type Harm = fn(&Path);
        let cases: [(&str, Harm, usize, usize); 7] = [
            ("snapshot 2 gone", |d| fs::remove_file(d.join("objects-0000000002.snapshot")).unwrap(), 6, 0),
            ("journal 2 gone", |d| fs::remove_file(d.join("objects-0000000002.journal")).unwrap(), 4, 0),
            (
                "journal 1 and snapshot 2 gone",
                |d| {
                    fs::remove_file(d.join("objects-0000000001.journal")).unwrap();
                    fs::remove_file(d.join("objects-0000000002.snapshot")).unwrap();
                },
                0,
                1,
            ),
            ("an empty snapshot", |d| fs::write(d.join("objects-0000000002.snapshot"), "").unwrap(), 6, 1),
            (
                "both snapshots damaged, all journals there",
                |d| {
                    fs::write(d.join("objects-0000000001.snapshot"), "x\n").unwrap();
                    fs::write(d.join("objects-0000000002.snapshot"), [0xff; 100]).unwrap();
                },
                6,
                2,
            ),
            (
                "a journal that is a directory",
                |d| {
                    fs::remove_file(d.join("objects-0000000002.journal")).unwrap();
                    fs::create_dir(d.join("objects-0000000002.journal")).unwrap();
                },
                4,
                1,
            ),
            (
                "strange files",
                |d| {
                    fs::write(d.join("objects-.snapshot"), "").unwrap();
                    fs::write(d.join("objects-0000000009.snapshot.tmp"), "half").unwrap();
                    fs::write(d.join("notes"), "hello").unwrap();
                },
                6,
                0,
            ),
        ];
        for (name, harm, expected_lines, expected_notes) in cases {
            let tmp = filled();
            harm(tmp.path());
            let (mut dir, restored) = StateDir::open(tmp.path()).unwrap();
            assert_eq!(restored.lines.len(), expected_lines, "{name}: {:?}", restored.notes);
            assert_eq!(restored.notes.len(), expected_notes, "{name}: {:?}", restored.notes);
            if dir.needs_rotation() {
                let all = restored.lines.clone();
                dir.rotate().unwrap().write(restored.generation, all).unwrap();
            }
            dir.append(9, &lines(100..101)).unwrap();
            assert_eq!(restore(tmp.path()).lines.len(), expected_lines + 1, "{name}");
        }
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let tmp = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        push_mark(&mut bytes, &Mark::Begin { version: 9, kind: Kind::Snapshot, sequence: 1 });
        fs::write(tmp.path().join("objects-0000000001.snapshot"), bytes).unwrap();
        let restored = restore(tmp.path());
        assert!(restored.notes[0].contains("format version 9"), "{:?}", restored.notes);
    }

    #[test]
    fn a_change_that_was_undone_is_gone() {
        let tmp = filled();
        let (mut dir, _) = StateDir::open(tmp.path()).unwrap();
        let before = dir.journal_bytes();
        dir.append(4, &lines(6..9)).unwrap();
        dir.undo(before);
        dir.append(4, &lines(6..7)).unwrap();
        assert_eq!(restore(tmp.path()).lines, lines(0..7));
    }

    #[test]
    fn a_full_disk_refuses_the_change_and_keeps_what_was() {
        let tmp = filled();
        let (mut dir, _) = StateDir::open(tmp.path()).unwrap();
        // /dev/full answers every write with ENOSPC.
        let (journal, len) = dir.journal.take().unwrap();
        dir.journal = Some((OpenOptions::new().write(true).open("/dev/full").unwrap(), len));
        let error = dir.append(4, &lines(6..8)).unwrap_err().to_string();
        assert!(error.contains("No space left") && error.contains("state_dir"), "{error}");
        dir.journal = Some((journal, len));
        dir.append(4, &lines(6..7)).unwrap();
        assert_eq!(restore(tmp.path()).lines, lines(0..7));
    }

    #[test]
    fn old_files_go_and_one_older_pair_stays() {
        let tmp = filled();
        let (mut dir, mut restored) = StateDir::open(tmp.path()).unwrap();
        for generation in 4..9 {
            let new = lines(generation * 10..generation * 10 + 1);
            dir.append(u64::from(generation), &new).unwrap();
            restored.lines.extend(new);
            dir.rotate().unwrap().write(u64::from(generation), restored.lines.clone()).unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(tmp.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = ["objects-0000000006.journal", "objects-0000000006.snapshot"]
            .into_iter()
            .chain(["objects-0000000007.journal", "objects-0000000007.snapshot"]);
        assert_eq!(names, expected.collect::<Vec<_>>());
        assert_eq!(restore(tmp.path()).lines, restored.lines);
    }
}
