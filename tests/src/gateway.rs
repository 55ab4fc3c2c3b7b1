//! A running towpathd: started inside a namespace, asked by `towpathctl`, and checked at the end of every test.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use config::control::{FramesRow, Stats, Status};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::namespace::Namespace;
use crate::process::Process;

/// How long a start, a stop or an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The built binaries: TOWPATH_BIN, or the release build, or the debug build.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("TOWPATH_BIN") {
        return Ok(Path::new(&folder).join(name));
    }
    // target/debug/deps/TEST -> target
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(3).context("the folder of builds")?;
    let found =
        ["release", "debug"].iter().map(|profile| target.join(profile).join(name)).find(|path| path.exists());
    found.with_context(|| format!("{name} is not built; run: cargo build --release -p forwarder -p ctl"))
}

/// towpathd in a namespace, with a folder of its own for socket, state and flows.
#[derive(Debug)]
pub struct Towpathd {
    process: Process,
    folder: TempDir,
    region: PathBuf,
    namespace: String,
    resources: Resources,
    /// How often the test killed the data plane.
    kills: AtomicU32,
    seen: Seen,
}

/// What the last check has judged; the next one judges what came since.
#[derive(Debug, Default)]
struct Seen {
    log_bytes: usize,
    drops: BTreeMap<String, u64>,
    data_plane: Option<u32>,
}

/// What a process must not collect while packets flow.
#[derive(Clone, Copy, Debug)]
struct Resources {
    descriptors: usize,
    threads: usize,
    resident_kib: u64,
}

impl Towpathd {
    /// Starts the daemon with the gateway file `config`, whose `[control]` and `[flows] region` are given here, and waits until
    /// it answers.
    pub fn start(namespace: &Namespace, config: &str) -> Result<Towpathd> {
        let folder = tempfile::Builder::new().prefix(namespace.name()).tempdir()?;
        // The data plane runs as another account, and reaches its state through here.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
        let region = PathBuf::from(format!("/dev/shm/{}-flows", namespace.name()));
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, with_paths(config, folder.path(), &region))?;
        let log = folder.path().join("towpathd.log");
        let program = binary("towpathd")?;
        let args = ["--config", &file.to_string_lossy()];
        let process = Process::start(namespace, &program.to_string_lossy(), &args, &log)?;
        let nothing = Resources { descriptors: 0, threads: 0, resident_kib: 0 };
        let name = namespace.name().to_owned();
        let mut daemon = Towpathd {
            process,
            folder,
            region,
            namespace: name,
            resources: nothing,
            kills: AtomicU32::new(0),
            seen: Seen::default(),
        };
        daemon.wait_until_ready()?;
        Ok(daemon)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let ctl = binary("towpathctl")?;
        self.process.wait_until(PATIENCE, || {
            let mut command = std::process::Command::new(&ctl);
            command.args(["--socket", &socket.to_string_lossy(), "status"]);
            command.output().is_ok_and(|output| output.status.success())
        })
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// A file of the daemon's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The keeper's pid.
    pub fn keeper(&self) -> u32 {
        self.process.pid()
    }

    /// The data plane's pid, while one runs.
    pub fn data_plane(&self) -> Option<u32> {
        children(self.keeper()).into_iter().next()
    }

    /// What both processes logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Runs `towpathctl ARGS`, and returns how it ended.
    pub fn ctl_output(&self, args: &[&str]) -> Result<Output> {
        let mut command = std::process::Command::new(binary("towpathctl")?);
        command.arg("--socket").arg(self.socket()).args(args);
        command.output().context("towpathctl does not start")
    }

    /// Runs `towpathctl ARGS` and returns what it printed; an exit code other than 0 is an error.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let output = self.ctl_output(args)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "towpathctl {}: {}\n{}{}\n{}",
            args.join(" "),
            output.status,
            text(&output.stdout),
            text(&output.stderr),
            self.log()
        );
        Ok(text(&output.stdout))
    }

    /// Applies manifests: one change.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let file = self.file("apply.yaml");
        std::fs::write(&file, manifests)?;
        self.ctl(&["apply", "-f", &file.to_string_lossy()])
    }

    /// Makes these manifests the whole state, in one change: what is not among them goes.
    pub fn replace(&self, manifests: &str) -> Result<String> {
        let file = self.file("replace.yaml");
        std::fs::write(&file, manifests)?;
        self.ctl(&["apply", "--prune", "-f", &file.to_string_lossy()])
    }

    /// Counters, of the data plane that runs now.
    pub fn stats(&self) -> Result<Stats> {
        serde_json::from_str(&self.ctl(&["stats", "-o", "json"])?).context("stats -o json")
    }

    /// Health.
    pub fn status(&self) -> Result<Status> {
        serde_json::from_str(&self.ctl(&["status", "-o", "json"])?).context("status -o json")
    }

    /// Drop reasons that are not zero.
    pub fn drops(&self) -> Result<BTreeMap<String, u64>> {
        let drops = self.stats()?.drops;
        Ok(drops.into_iter().filter(|count| count.value > 0).map(|count| (count.name, count.value)).collect())
    }

    /// Kills the data plane as `kill -9` does, and returns the pid of the next one.
    pub fn kill_data_plane(&self) -> Result<u32> {
        let victim = self.data_plane().context("no data plane runs")?;
        self.kills.fetch_add(1, Ordering::Relaxed);
        kill(victim)?;
        let start = Instant::now();
        loop {
            match self.data_plane() {
                Some(next) if next != victim => return Ok(next),
                _ if start.elapsed() > PATIENCE => bail!("no data plane was started again:\n{}", self.log()),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Kills keeper and data plane as `kill -9` does, and starts the daemon again on what they left.
    pub fn kill_all_and_restart(&mut self, namespace: &Namespace) -> Result<()> {
        let victim = self.data_plane();
        self.process.signal(Signal::KILL)?;
        if let Some(victim) = victim {
            // The data plane may have ended with its keeper already.
            let _ = kill(victim);
        }
        // The log begins anew.
        self.seen = Seen::default();
        self.process = Process::start(
            namespace,
            &binary("towpathd")?.to_string_lossy(),
            &["--config", &self.file("gateway.toml").to_string_lossy()],
            &self.file("towpathd.log"),
        )?;
        self.wait_until_ready()
    }

    /// Notes what the processes hold now, after warm-up; [`Towpathd::finish`] compares.
    pub fn warmed_up(&mut self) -> Result<()> {
        self.resources = self.at_rest()?;
        Ok(())
    }

    /// The checks that hold at any time while no packet moves, over what came since the last of them. `allowed`: drop reasons
    /// that the test gives.
    ///
    /// - A1: every packet received was forwarded, answered, punted, held or dropped for a reason, exactly.
    /// - A2: every frame is somewhere, exactly, and no descriptor was refused by the kernel or by us.
    /// - A3: the log has no panic and no error.
    /// - A5: only drop reasons on the list.
    pub fn check(&mut self, allowed: &[&str]) -> Result<()> {
        let stats = self.settled()?;
        conserved(&stats)?;
        nothing_refused(&self.status()?)?;
        self.every_frame_is_somewhere()?;
        self.clean_log()?;
        // A data plane counts from its start.
        let data_plane = self.data_plane();
        if self.seen.data_plane != data_plane {
            self.seen.drops.clear();
        }
        let drops = self.drops()?;
        let before = std::mem::replace(&mut self.seen.drops, drops.clone());
        self.seen.data_plane = data_plane;
        for (reason, count) in drops {
            let new = count - before.get(&reason).copied().unwrap_or(0);
            ensure!(new == 0 || allowed.contains(&reason.as_str()), "A5: {new} packets dropped for {reason}");
        }
        Ok(())
    }

    /// The checks that every test ends with, and a clean stop: those of [`Towpathd::check`], and
    ///
    /// - A4: descriptors and threads as after warm-up, memory within reach of it.
    pub fn finish(mut self, allowed: &[&str]) -> Result<()> {
        self.check(allowed)?;
        if self.resources.descriptors > 0 {
            let (before, now) = (self.resources, self.at_rest()?);
            ensure!(
                now.descriptors == before.descriptors && now.threads == before.threads,
                "A4: {before:?} after warm-up, {now:?} at the end"
            );
            let grown = now.resident_kib.saturating_sub(before.resident_kib);
            ensure!(grown <= 8 * 1024, "A4: memory grew by {grown} KiB");
        }
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(PATIENCE)?;
        ensure!(status.success(), "the daemon ended with {status}:\n{}", self.log());
        self.clean_log()
    }

    /// A3, over what was logged since the last time.
    fn clean_log(&mut self) -> Result<()> {
        let log = self.log();
        // The last line may be half written.
        let end = log.rfind('\n').map_or(0, |end| end + 1);
        for line in log.get(self.seen.log_bytes..end).unwrap_or(&log).lines() {
            let bad =
                ["panicked", " ERROR ", "BUG", "stack backtrace"].iter().any(|word| line.contains(word));
            // A data plane that the test killed is reported as dead, once for each time.
            if line.contains("data plane died (signal: 9 (SIGKILL))") && *self.kills.get_mut() > 0 {
                *self.kills.get_mut() -= 1;
                continue;
            }
            ensure!(!bad, "A3: the log says: {line}\n{log}");
        }
        self.seen.log_bytes = end;
        Ok(())
    }

    /// Counters once no packet moves any more.
    fn settled(&self) -> Result<Stats> {
        // Workers count their sleeps, too, when nothing moves.
        let moved = |stats: &Stats| (total(stats, "rx_packets"), total(stats, "tx_packets"));
        let mut last = self.stats()?;
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.stats()?;
            if moved(&now) == moved(&last) && conserved(&now).is_ok() {
                return Ok(now);
            }
            last = now;
        }
        Ok(last)
    }

    /// A2: the frames of each worker add up. Waits for moments at which none moves.
    fn every_frame_is_somewhere(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let stats = self.stats()?;
            ensure!(!stats.workers.is_empty(), "A2: no worker");
            let mut exact = true;
            for worker in &stats.workers {
                let FramesRow { total, free, held, fill, rx, tx, completion, kernel, missing } =
                    worker.frames;
                ensure!(total > 0 && missing == 0, "A2: worker {}: {:?}", worker.index, worker.frames);
                exact &= total == free + held + fill + rx + tx + completion + kernel;
            }
            if exact {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "A2: frames do not add up: {:#?}", stats.workers);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the data plane holds once nothing of it comes and goes: the client that asked last may not be closed yet.
    fn at_rest(&self) -> Result<Resources> {
        let (mut last, mut same) = (self.measure()?, 0);
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.measure()?;
            same =
                if (now.descriptors, now.threads) == (last.descriptors, last.threads) { same + 1 } else { 0 };
            last = now;
            if same == 5 {
                break;
            }
        }
        Ok(last)
    }

    fn measure(&self) -> Result<Resources> {
        let pid = self.data_plane().context("no data plane runs")?;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let count = |folder: &str| std::fs::read_dir(proc.join(folder)).map(Iterator::count);
        let status = std::fs::read_to_string(proc.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("0 kB");
        let resident_kib = resident.trim().trim_end_matches(" kB").parse()?;
        Ok(Resources { descriptors: count("fd")?, threads: count("task")?, resident_kib })
    }
}

impl Drop for Towpathd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("towpathd in {} logged:\n{}", self.namespace, self.log());
        }
        for ending in ["", ".affinity", ".ports"] {
            let _ = std::fs::remove_file(format!("{}{ending}", self.region.display()));
        }
    }
}

/// A1: received packets are those forwarded, answered, punted, held and dropped.
fn conserved(stats: &Stats) -> Result<()> {
    let reasons: u64 = stats.drops.iter().map(|count| count.value).sum();
    let waiting = total(stats, "fragments_gathered") - total(stats, "fragments_released");
    // A packet that was answered has a reason too, so that answers are counted among the reasons.
    let ended = total(stats, "forwarded") + total(stats, "punted") + reasons;
    // Fragments between two workers are on their way.
    let received = total(stats, "rx_packets");
    let (sent, taken) = (total(stats, "fragments_handed_over"), total(stats, "fragments_taken_over"));
    ensure!(
        received + taken == ended + waiting + sent && sent == taken,
        "A1: {received} packets received, {ended} ended, {waiting} fragments wait, {sent} of them were handed to another \
         worker and {taken} taken: {stats:#?}"
    );
    Ok(())
}

/// A2: neither the kernel nor we refused a descriptor of any ring.
fn nothing_refused(status: &Status) -> Result<()> {
    for port in &status.ports {
        for name in ["rx_invalid_descs", "tx_invalid_descs", "rx_refused", "completions_refused", "tx_empty"]
        {
            let value =
                port.counters.get(name).with_context(|| format!("A2: {} has no {name}", port.name))?;
            ensure!(*value == 0, "A2: {} {name} is {value}", port.name);
        }
    }
    Ok(())
}

fn total(stats: &Stats, name: &str) -> u64 {
    stats.totals.iter().find(|count| count.name == name).map_or(0, |count| count.value)
}

/// The gateway file with the paths of this run: `[control]` may be in it, `[flows]` must be.
pub fn with_paths(config: &str, folder: &Path, region: &Path) -> String {
    let folder = folder.display();
    let control = format!("[control]\nsocket = \"{folder}/control.sock\"\nstate_dir = \"{folder}/state\"");
    let flows = format!("[flows]\nregion = \"{}\"", region.display());
    let config = config.replacen("[flows]", &flows, 1);
    match config.contains("[control]") {
        true => config.replacen("[control]", &control, 1),
        false => format!("{config}\n{control}\n"),
    }
}

/// Pids of the children of a process.
fn children(pid: u32) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn kill(pid: u32) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid as i32).context("pid 0")?;
    rustix::process::kill_process(pid, Signal::KILL).context("kill -9")
}
