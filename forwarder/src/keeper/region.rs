//! The regions of flows and of session affinity: how they are made, and how flows move to another capacity.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use config::fault::{Code, Fault};
use config::gateway::Gateway;
use rustix::fs::{FlockOperation, flock};
use tracing::info;

use crate::stage::flow::{self, Phase};
use crate::table::flow_map::{FlowMap, FlowMapConfig, TALLIES_MAX};

/// The flow map of a gateway.
pub fn flows(gateway: &Gateway) -> FlowMapConfig {
    FlowMapConfig {
        capacity: gateway.flows.capacity,
        timeouts_s: flow::timeouts_s(&gateway.flows),
        embryonic_phases: Phase::EMBRYONIC,
        workers: gateway.workers.cpus.len(),
        tallies: TALLIES_MAX,
        ..FlowMapConfig::default()
    }
}

/// What session affinity of a gateway remembers.
pub fn affinity(gateway: &Gateway) -> FlowMapConfig {
    let capacity = gateway.flows.affinity_entries();
    FlowMapConfig {
        capacity,
        embryonic_phases: 0,
        tallies: FlowMapConfig::default().tallies,
        ..flows(gateway)
    }
}

/// Opens the file of a region, creating it if needed.
pub(super) fn open(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// True if `path` names the file that `file` is.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    let place = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => place(ours) == place(there),
        _ => false,
    }
}

/// The path with `ending` behind its name.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(ending);
    beside.into()
}

/// The fault of a region that cannot be opened.
pub(super) fn cannot_open(path: &Path, cause: &io::Error) -> Fault {
    Fault::new(Code::Invalid, format!("cannot be opened: {cause}"))
        .field("flows.region")
        .value(path.display())
        .remedy("name a file on a tmpfs such as /run/towpath/flows, in a directory that root may write to")
}

/// A region that has taken the place of another one.
pub(super) struct Moved {
    /// Holds the exclusive lock of its file.
    pub locked: File,
    /// Another description of the same file.
    pub region: File,
}

/// Moves the flows of `region`, which lies at `path`, into a file of the capacity of `config` that takes its name; `None` if it has
/// that capacity already, or holds no flows that could move.
///
/// They are copied aside, and one rename(2) puts the copy in the place of the old file: a process that is killed at any moment leaves
/// either, whole. The lock of the new file is taken before it has the name, so that nobody else gets it.
pub(super) fn resize(
    path: &Path,
    region: &File,
    config: FlowMapConfig,
    what: &str,
) -> Result<Option<Moved>, Fault> {
    let from = match FlowMap::capacity_of(region) {
        Some(from) if from != config.capacity => from,
        _ => return Ok(None),
    };
    let aside = beside(path, ".new");
    let fault = |cause: io::Error| cannot_open(&aside, &cause);
    let locked = open(&aside).map_err(fault)?;
    flock(&locked, FlockOperation::NonBlockingLockExclusive).map_err(|cause| fault(cause.into()))?;
    let new = open(&aside).map_err(fault)?;
    let recovery = FlowMap::copy(region, &new, config).map_err(|cause| {
        let _ = std::fs::remove_file(&aside);
        let complaint = format!("{from} cannot become {}: {cause}", config.capacity);
        Fault::new(Code::Limit, complaint).field("flows.capacity").value(config.capacity).remedy(
            "there must be room for both while they move; or remove the region to begin without flows",
        )
    })?;
    std::fs::rename(&aside, path).map_err(fault)?;
    let (kept, left_out) = (recovery.kept, recovery.left_out);
    info!(from, to = config.capacity, kept, left_out, "{what}: moved to another capacity");
    Ok(Some(Moved { locked, region: new }))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::addr::{Addr, Tuple};
    use crate::keeper::lock::RegionLock;
    use crate::table::flow_map::NewFlow;

    const PATH_ENV: &str = "TOWPATH_TEST_REGION_TO_RESIZE";
    const CAPACITIES: [u32; 2] = [3_000, 5_000];
    const FLOWS: u32 = 2_000;

    fn gateway(capacity: u32) -> Gateway {
        let text = include_str!("../../../config/examples/gateway.toml");
        let mut gateway = Gateway::parse(text, "gateway.toml").unwrap();
        gateway.flows.capacity = capacity;
        gateway
    }

    fn tuple(number: u32) -> Tuple {
        let (src, dst) = (Addr::v4(0xc633_6407), Addr::v4(0xcb00_710a));
        Tuple { src, dst, src_port: number as u16, dst_port: 80, protocol: 6 }
    }

    /// Opens the region with the capacity that it has.
    fn reopen(path: &Path) -> (u32, FlowMap) {
        let file = open(path).unwrap();
        let capacity = FlowMap::capacity_of(&file).unwrap();
        (capacity, FlowMap::open(&file, flows(&gateway(capacity))).unwrap().0)
    }

    fn assert_all_there(map: &FlowMap, when: &str) {
        assert_eq!(map.len() as u32, FLOWS, "{when}");
        for number in 0..FLOWS {
            let original = tuple(number);
            assert!(map.lookup(&original, map.hash(&original)).is_some(), "flow {number} is gone {when}");
        }
    }

    #[test]
    fn a_start_with_another_capacity_finds_every_flow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        fill(&path);
        for capacity in [5_000, 3_000, 3_000] {
            let mut lock = RegionLock::take(&path).unwrap();
            lock.resize(&gateway(capacity)).unwrap();
            assert!(is_at(lock.region(), &path), "the data plane gets the file that has the name");
            assert!(RegionLock::take(&path).is_err(), "the new file is locked too");
            drop(lock);
            let (found, map) = reopen(&path);
            assert_eq!(found, capacity);
            assert_all_there(&map, "after a move");
        }
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        assert_eq!(names, ["flows", "flows.affinity"]);
    }

    #[test]
    fn whoever_waited_for_the_old_file_gets_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        fill(&path);
        let mut first = RegionLock::take(&path).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| RegionLock::take(&path).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            first.resize(&gateway(CAPACITIES[1])).unwrap();
            drop(first);
            assert!(is_at(waiting.join().unwrap().region(), &path));
        });
    }

    fn fill(path: &Path) {
        let lock = RegionLock::take(path).unwrap();
        let (map, _) = FlowMap::open(lock.region(), flows(&gateway(CAPACITIES[0]))).unwrap();
        let mut worker = map.worker(0);
        for number in 0..FLOWS {
            let original = tuple(number);
            let flow = NewFlow { original, reply: Some(original.reversed()), phase: 1, ..NewFlow::default() };
            map.insert(&mut worker, &flow, 1).unwrap();
        }
    }

    #[test]
    fn a_kill_in_the_middle_of_a_move_loses_no_flow() {
        if let Ok(path) = std::env::var(PATH_ENV) {
            // The child: moves to and fro until it is killed.
            let mut lock = RegionLock::take(Path::new(&path)).unwrap();
            for capacity in CAPACITIES.iter().rev().cycle() {
                lock.resize(&gateway(*capacity)).unwrap();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        fill(&path);
        let (mut aside, mut moved) = (0, [0; 2]);
        for kill in 0..40u64 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "keeper::region::tests::a_kill_in_the_middle_of_a_move_loses_no_flow"])
                .args(["--nocapture", "--test-threads=1"])
                .env(PATH_ENV, &path)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_micros(10_000 + kill * 7_919 % 30_000));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            assert_eq!(signal, Some(9), "the child ended by itself");
            aside += u32::from(beside(&path, ".new").exists());
            let (capacity, map) = reopen(&path);
            moved[usize::from(capacity == CAPACITIES[1])] += 1;
            assert_all_there(&map, &format!("after kill {kill}, capacity {capacity}"));
        }
        println!("{aside} of 40 kills in the middle of a move; found {moved:?} times with either capacity");
        assert!(aside > 0, "no kill was in the middle of a move");
    }
}
