//! The life of the data plane: start it, hear its requests, watch its heartbeats, start it again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tracing::{error, info, warn};

use super::manifest::{Inherited, Manifest};
use super::requests::{Answer, Reply, Request, Requests};
use crate::port::xsk::steer::Heartbeats;

/// A worker that has not been heard of for this long is reported.
const LATE_NS: u64 = 100_000_000;
/// A worker that has not been heard of for this long is stuck: the data plane is killed and started again.
const STUCK_NS: u64 = 2_000_000_000;
/// A data plane whose workers have not begun after this long is killed and started again.
const STARTUP: Duration = Duration::from_secs(30);
/// A data plane that lived less than this since it was ready died fast.
const FAST: Duration = Duration::from_millis(200);
/// How often heartbeats are looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 25_000_000 };

/// What glibc's allocator is to do in the data plane (the GNU C library manual, "Memory Allocation Tunables"). Tables lie in huge pages,
/// which only the first arena is given; what a large change took goes back to the kernel with it, where glibc would otherwise keep
/// as much as the largest block it ever had.
const ALLOCATOR: &str = "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:\
                         glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=1048576";

/// How long to wait before the next start after `fast_deaths` fast deaths in a row: not at all after the first, which may
/// be a coincidence, then twice as long each time, at most five seconds.
fn backoff(fast_deaths: u32) -> Duration {
    match fast_deaths {
        0 | 1 => Duration::ZERO,
        n => Duration::from_millis(10 << (n - 2).min(9)).min(Duration::from_secs(5)),
    }
}

/// The running data plane.
struct Child {
    child: std::process::Child,
    pidfd: OwnedFd,
    requests: Requests,
    started: Instant,
    started_ns: u64,
    ready: Option<Instant>,
    /// It was killed because it does not speak any more; only its end is waited for.
    silent: bool,
}

/// Nanoseconds of CLOCK_MONOTONIC, the clock of the heartbeats.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Child {
    /// Starts the data plane: this program once more, with the hidden subcommand and the descriptors of the manifest.
    fn start(manifest: &mut Manifest) -> io::Result<Child> {
        let (ours, theirs) = UnixStream::pair()?;
        manifest.keeper = Inherited::of(&theirs);
        let written = manifest.write()?;
        // The program that runs, even if its file has been replaced meanwhile by another version.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("towpathd")
            .args(["data-plane", "--manifest-fd", &written.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .env("GLIBC_TUNABLES", ALLOCATOR)
            // Ctrl-C in a terminal is for the keeper, which stops the data plane in its own way.
            .process_group(0);
        let started = Instant::now();
        let started_ns = monotonic_ns();
        let child = manifest.while_inherited(&written, || command.spawn())?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        info!(pid = child.id(), "data plane started");
        Ok(Child {
            child,
            pidfd,
            requests: Requests::new(ours),
            started,
            started_ns,
            ready: None,
            silent: false,
        })
    }

    fn kill(&self) {
        // The only error is that it is dead already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// What one look at the heartbeats found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pulse {
    Fine,
    Late,
    Stuck,
}

/// `last_ns`: the last heartbeat; `started_ns`: when this data plane was started. Before its first heartbeat the
/// worker of this data plane has not begun, and is judged by [`STARTUP`] elsewhere.
fn pulse(last_ns: u64, started_ns: u64, now_ns: u64) -> Pulse {
    match now_ns.saturating_sub(last_ns) {
        _ if last_ns < started_ns => Pulse::Fine,
        age if age > STUCK_NS => Pulse::Stuck,
        age if age > LATE_NS => Pulse::Late,
        _ => Pulse::Fine,
    }
}

/// Why [`Supervisor::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// SIGTERM or SIGINT.
    Stopped,
}

/// What the keeper does besides keeping the data plane alive.
pub trait Duties {
    /// Does what the data plane asked for. None: it gets no answer, for it is about to be started anew.
    fn act(&mut self, request: Request) -> Option<Answer>;

    /// The first data plane forwards.
    fn on_ready(&mut self);

    /// A look found all well.
    fn on_healthy(&mut self);

    /// True if `manifest` is another one now, so that the data plane must be started anew. `forwards`: the one that runs has begun.
    fn change(&mut self, manifest: &mut Manifest, forwards: bool) -> bool;

    /// After a [change](Duties::change): no data plane runs, and the next one is started after this.
    fn between(&mut self);
}

/// Runs the data plane until it is told to stop.
pub struct Supervisor<'a> {
    /// Everything that a data plane is started with.
    pub manifest: Manifest,
    /// The heartbeats of the workers.
    pub heartbeats: &'a Heartbeats,
    /// Becomes readable when the keeper is to stop.
    pub stop: UnixStream,
}

impl Supervisor<'_> {
    /// Starts the data plane, again and again, and does for it what it asks for. Returns when told to stop,
    /// with the data plane dead.
    ///
    /// # Errors
    /// The first data plane could not even be started, or died before it was ready: there is something wrong that
    /// another try would not mend.
    pub fn run(mut self, duties: &mut impl Duties) -> anyhow::Result<Ended> {
        let workers = self.manifest.gateway.workers.cpus.len();
        let mut pulses = vec![Pulse::Fine; workers];
        let mut fast_deaths = 0;
        let mut ever_ready = false;
        let mut next_start = Instant::now();
        let mut running: Option<Child> = None;
        loop {
            if running.is_none() && Instant::now() >= next_start {
                match Child::start(&mut self.manifest) {
                    Ok(child) => running = Some(child),
                    Err(cause) if !ever_ready => return Err(cause.into()),
                    Err(cause) => {
                        error!("data plane cannot be started: {cause}; trying again in a second");
                        next_start = Instant::now() + Duration::from_secs(1);
                    }
                }
            }

            let (stop, died, asked) = self.wait(running.as_ref(), next_start)?;
            if stop {
                if let Some(mut child) = running.take() {
                    child.kill();
                    child.reap()?;
                }
                return Ok(Ended::Stopped);
            }
            let Some(child) = running.as_mut() else { continue };

            let mut became_ready = false;
            if asked && !died {
                let answered = child.requests.answer(|request| {
                    if matches!(request, Request::Ready) {
                        became_ready = true;
                        return Some(Reply::Done.into());
                    }
                    duties.act(request)
                });
                if let Err(cause) = answered {
                    // The end of the stream comes a moment before the end of the process: mostly it is dying already.
                    info!(pid = child.child.id(), "data plane does not speak any more ({cause})");
                    child.silent = true;
                    child.kill();
                }
            }
            if became_ready {
                child.ready = Some(Instant::now());
                let after_ms = child.started.elapsed().as_millis() as u64;
                info!(pid = child.child.id(), after_ms, "data plane forwards");
                if !ever_ready {
                    ever_ready = true;
                    duties.on_ready();
                }
            }
            if died {
                let status = child.reap()?;
                let lived = child.ready.map(|ready| ready.elapsed());
                if !ever_ready {
                    anyhow::bail!(
                        "the data plane ended before it forwarded anything ({status}); see its last words above"
                    );
                }
                self.manifest.restarts += 1;
                fast_deaths = if lived.is_some_and(|lived| lived > FAST) { 0 } else { fast_deaths + 1 };
                let wait = backoff(fast_deaths);
                next_start = Instant::now() + wait;
                error!(
                    pid = child.child.id(),
                    "data plane died ({status}); starting it again after {} ms",
                    wait.as_millis()
                );
                running = None;
                continue;
            }
            if duties.change(&mut self.manifest, child.ready.is_some()) {
                let ports = self.manifest.gateway.ports.len();
                info!(pid = child.child.id(), ports, "starting the data plane anew with other ports");
                child.kill();
                child.reap()?;
                duties.between();
                running = None;
                continue;
            }
            if self.look(child, &mut pulses) {
                duties.on_healthy();
            }
        }
    }

    /// Waits for something to happen, at most until the next look at the heartbeats or the next start.
    /// Returns: told to stop; data plane dead; data plane asks something.
    fn wait(&self, child: Option<&Child>, next_start: Instant) -> io::Result<(bool, bool, bool)> {
        let mut timeout = LOOK;
        if child.is_none() {
            let left = next_start.saturating_duration_since(Instant::now()).min(Duration::from_millis(25));
            timeout.tv_nsec = left.subsec_nanos().into();
        }
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
        if let Some(child) = child {
            fds.push(PollFd::from_borrowed_fd(child.pidfd.as_fd(), PollFlags::IN));
            if !child.silent {
                fds.push(PollFd::new(child.requests.stream(), PollFlags::IN));
            }
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
        let happened = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((happened(0), happened(1), happened(2)))
    }

    /// Looks at every heartbeat. True if all is well. `pulses`: what the last look found, so that changes alone are logged.
    fn look(&self, child: &Child, pulses: &mut [Pulse]) -> bool {
        let now_ns = monotonic_ns();
        if child.ready.is_none() && child.started.elapsed() > STARTUP {
            error!(
                pid = child.child.id(),
                "data plane did not begin within {} s: killing it",
                STARTUP.as_secs()
            );
            child.kill();
            return false;
        }
        let mut healthy = child.ready.is_some();
        for (worker, before) in pulses.iter_mut().enumerate() {
            let last_ns = self.heartbeats.last_ns(worker);
            let state = pulse(last_ns, child.started_ns, now_ns);
            healthy &= state == Pulse::Fine;
            let silent_ms = now_ns.saturating_sub(last_ns) / 1_000_000;
            match state {
                _ if state == *before => {}
                Pulse::Late => warn!(worker, silent_ms, "worker makes no progress"),
                Pulse::Fine => info!(worker, "worker makes progress again"),
                Pulse::Stuck => {
                    let pid = child.child.id();
                    error!(worker, silent_ms, pid, "worker is stuck: killing the data plane");
                    child.kill();
                }
            }
            *before = state;
        }
        healthy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_death_is_mended_at_once_and_a_crash_loop_slows_down() {
        assert_eq!(backoff(0), Duration::ZERO);
        assert_eq!(backoff(1), Duration::ZERO);
        let waits: Vec<_> = (2..40).map(backoff).collect();
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(waits[0], Duration::from_millis(10));
        assert_eq!(*waits.last().unwrap(), Duration::from_secs(5));
    }

    #[test]
    fn a_pulse_counts_from_the_first_beat_of_this_data_plane() {
        let second = 1_000_000_000;
        assert_eq!(pulse(5 * second, 10 * second, 20 * second), Pulse::Fine, "a beat of the one before");
        assert_eq!(pulse(11 * second, 10 * second, 11 * second + LATE_NS), Pulse::Fine);
        assert_eq!(pulse(11 * second, 10 * second, 11 * second + LATE_NS + 1), Pulse::Late);
        assert_eq!(pulse(11 * second, 10 * second, 14 * second), Pulse::Stuck);
        assert_eq!(
            pulse(12 * second, 10 * second, 11 * second),
            Pulse::Fine,
            "a beat after our clock was read"
        );
    }
}
