//! How the gateway is. Here the heartbeats of workers are watched: one without progress for 100 ms is seen and reported.
//!
//! What load balancers and Kubernetes are told of it, in this order: [`update`] follows changes on their way into force, [`verdict`]
//! judges and writes the answers, [`server`] serves them by [`http`], for [`Health`], which the threads share, and [`Probes`].

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use config::fault::{Code, Fault};
use k8s_openapi::jiff::Timestamp;
use rustix::event::{EventfdFlags, eventfd};

use super::compile::health::HealthTables;
use super::publish::WorkerLink;
use super::{Shared, metrics};
use crate::addr::Addr;

pub mod http;
pub mod server;
pub mod update;
pub mod verdict;

use http::{Response, Status};
use server::{Backend, Target};
use update::Updates;
use verdict::Verdict;

/// Service packets of a worker whose last heartbeat is older than this are dropped by the steering program (`heartbeat_max_ns` in
/// steer.bpf.c): it does not live.
pub const DEAD_AFTER_NS: u64 = 1_000_000_000;

/// A worker whose last heartbeat is older than this is stuck. A sleeping worker beats every 50 ms.
pub const STUCK_AFTER_NS: u64 = 100_000_000;

/// If the watcher itself did not run for this long, the machine was busy or asleep, and nothing is concluded.
const BLIND_AFTER_NS: u64 = STUCK_AFTER_NS;

/// Nanoseconds of CLOCK_MONOTONIC, the clock of heartbeats.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Seconds of CLOCK_MONOTONIC, the clock of flows.
pub fn monotonic_s() -> u32 {
    (monotonic_ns() / 1_000_000_000) as u32
}

/// The time by the clock of the cluster, which may jump: for people and for what others have written down, never for a timeout.
pub fn wall_clock() -> Timestamp {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    Timestamp::new(since.as_secs() as i64, since.subsec_nanos() as i32).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// How long ago the worker's last heartbeat was, nanoseconds; `None` before its first one.
pub fn heartbeat_age_ns(worker: &WorkerLink, now_ns: u64) -> Option<u64> {
    match worker.heartbeat_ns() {
        0 => None,
        beat => Some(now_ns.saturating_sub(beat)),
    }
}

/// What changed since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker makes no progress.
    Stuck {
        /// Its index.
        worker: usize,
        /// Since how long, milliseconds.
        age_ms: u64,
    },
    /// It goes on.
    Recovered {
        /// Its index.
        worker: usize,
        /// How long it made none, milliseconds, to the precision of the watch.
        after_ms: u64,
    },
}

/// Remembers which workers are stuck.
#[derive(Debug, Default)]
pub struct Watch {
    last_look_ns: u64,
    /// By worker: since when it has been stuck.
    stuck_since_ns: Vec<Option<u64>>,
    /// By worker: how often it was.
    stalls: Vec<u64>,
}

impl Watch {
    /// Looks at every heartbeat. To be called at least every 50 ms.
    pub fn look(&mut self, workers: &[Arc<WorkerLink>], now_ns: u64) -> Vec<Event> {
        self.stuck_since_ns.resize(workers.len(), None);
        self.stalls.resize(workers.len(), 0);
        let was_blind = now_ns.saturating_sub(self.last_look_ns) > BLIND_AFTER_NS;
        self.last_look_ns = now_ns;
        let mut events = Vec::new();
        for (index, worker) in workers.iter().enumerate() {
            let Some(age) = heartbeat_age_ns(worker, now_ns) else { continue };
            match self.stuck_since_ns[index] {
                None if age > STUCK_AFTER_NS && !was_blind => {
                    self.stuck_since_ns[index] = Some(now_ns - age);
                    self.stalls[index] += 1;
                    events.push(Event::Stuck { worker: index, age_ms: age / 1_000_000 });
                }
                Some(since) if age <= STUCK_AFTER_NS => {
                    self.stuck_since_ns[index] = None;
                    let after_ms = now_ns.saturating_sub(age).saturating_sub(since) / 1_000_000;
                    events.push(Event::Recovered { worker: index, after_ms });
                }
                _ => {}
            }
        }
        events
    }

    /// How often worker `index` was stuck.
    pub fn stalls(&self, index: usize) -> u64 {
        self.stalls.get(index).copied().unwrap_or(0)
    }
}

/// For `status`: every worker that is stuck, has not started, or has lost frames.
pub fn problems(workers: &[Arc<WorkerLink>], now_ns: u64) -> Vec<Fault> {
    let mut problems = Vec::new();
    for worker in workers {
        let (missing, total) = (worker.frames().missing(), worker.frames().total());
        if missing != 0 {
            let fault =
                Fault::new(Code::Other, format!("{missing} of its {total} frames are missing: a bug"))
                    .object(format!("worker {}", worker.index()));
            problems.push(fault.remedy("report it with `towpathctl get workers -o json` and the log"));
        }
        let message = match heartbeat_age_ns(worker, now_ns) {
            None => "has not started".to_owned(),
            Some(age) if age > STUCK_AFTER_NS => format!("has made no progress for {} ms", age / 1_000_000),
            Some(_) => continue,
        };
        let fault = Fault::new(Code::Other, message).object(format!("worker {}", worker.index()));
        problems.push(
            fault.remedy("see the log; the keeper starts the data plane again after 2 s without progress"),
        );
    }
    problems
}

/// What the health server and the threads of control share.
#[derive(Debug)]
pub struct Health {
    /// When this process began, for what happened before it.
    pub started: Timestamp,
    tables: Mutex<Arc<HealthTables>>,
    updates: Mutex<Updates>,
    commit_beat_ns: AtomicU64,
    changed: OwnedFd,
}

impl Health {
    /// Of a gateway that has nothing to tell yet.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> std::io::Result<Health> {
        Ok(Health {
            started: wall_clock(),
            tables: Mutex::default(),
            updates: Mutex::default(),
            commit_beat_ns: AtomicU64::new(monotonic_ns()),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// What is told of the newest generation.
    pub fn tables(&self) -> Arc<HealthTables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells of a new generation. Costs nothing if there is nothing new to tell.
    pub fn set_tables(&self, tables: &Arc<HealthTables>) {
        let mut current = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&current, tables) {
            *current = tables.clone();
            drop(current);
            // The only error is a full counter, and then the server has been woken already.
            let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
        }
    }

    /// Changes on their way. Held for a moment only.
    pub fn updates(&self) -> MutexGuard<'_, Updates> {
        self.updates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commit thread: it makes progress.
    pub fn beat_commit(&self) {
        self.commit_beat_ns.store(monotonic_ns(), Ordering::Relaxed);
    }

    /// When the commit thread last made progress, nanoseconds of CLOCK_MONOTONIC.
    pub fn commit_beat_ns(&self) -> u64 {
        self.commit_beat_ns.load(Ordering::Relaxed)
    }
}

/// Opens a socket that listens at an address and does not block. Errors are words for the operator.
pub type Open = Box<dyn Fn(SocketAddr) -> Result<TcpListener, String> + Send>;

/// What the health server serves.
pub struct Probes {
    shared: Arc<Shared>,
    open: Open,
}

impl Probes {
    /// `open`: the keeper's part.
    pub fn new(shared: Arc<Shared>, open: Open) -> Probes {
        Probes { shared, open }
    }

    fn gateway(&self, path: &str) -> Response {
        let shared = &self.shared;
        let count = |response: Response, probe: metrics::Probe| {
            shared.metrics.count_probe(probe, response.status.0);
            response
        };
        match path {
            "/healthz" => {
                let is_leaving = shared.health.tables().node_is_leaving;
                let answer = Verdict::of(shared).healthz(is_leaving, wall_clock());
                count(answer, metrics::Probe::Healthz)
            }
            "/livez" => count(Verdict::of(shared).livez(wall_clock()), metrics::Probe::Livez),
            "/metrics" if shared.gateway.health.metrics => {
                Response::new(Status::OK, metrics::MEDIA_TYPE, metrics::text(shared))
            }
            _ => Response::refusal(
                Status::NOT_FOUND,
                "here are /healthz, /livez and, unless switched off, /metrics",
            ),
        }
    }
}

impl Backend for Probes {
    fn targets(&self) -> BTreeMap<SocketAddr, Target> {
        let section = &self.shared.gateway.health;
        let mut targets: BTreeMap<_, _> =
            section.listen.0.into_iter().map(|addr| (addr, Target::Gateway)).collect();
        if section.node_ports {
            for (service, check) in &self.shared.health.tables().checks {
                let at = |addr: &Addr| SocketAddr::new(IpAddr::from(*addr), check.port);
                let target = || Target::Service(service.clone());
                targets.extend(check.addresses.iter().map(|addr| (at(addr), target())));
            }
        }
        targets
    }

    fn changed(&self) -> BorrowedFd<'_> {
        self.shared.health.changed.as_fd()
    }

    fn clear_changed(&self) {
        // EAGAIN: nothing has changed.
        let _ = rustix::io::read(&self.shared.health.changed, &mut [0; 8]);
    }

    fn listen(&self, addr: SocketAddr) -> Result<TcpListener, String> {
        (self.open)(addr)
    }

    fn note_failures(&self, failures: &[(SocketAddr, String)]) {
        let Some((addr, why)) = failures.first() else { return self.shared.solved("health") };
        let others = match failures.len() - 1 {
            0 => String::new(),
            n => format!(", and {n} more"),
        };
        let fault =
            Fault::new(Code::Other, format!("the health server cannot listen at {addr}: {why}{others}"));
        let fault = if self.shared.gateway.health.listen.0 == Some(*addr) {
            fault.field("health.listen").value(addr).remedy("free the port, or choose another or \"off\"")
        } else {
            fault.remedy("give the Service another healthCheckNodePort, or see [gateway] nodeport_addresses")
        };
        tracing::warn!("{fault}");
        self.shared.problem("health", fault);
    }

    fn respond(&self, target: &Target, at: SocketAddr, path: &str) -> Response {
        let Target::Service(service) = target else { return self.gateway(path) };
        match self.shared.health.tables().checks.get(service) {
            Some(check) => {
                let family = Addr::from(at.ip().to_canonical()).family();
                Verdict::of(&self.shared).service(service, check, family)
            }
            // It is gone since the client connected.
            None => Response::refusal(Status::NOT_FOUND, "the Service has no healthCheckNodePort any more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::publish::Publisher;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_worker_without_progress_is_reported_once_and_again_when_it_goes_on() {
        let publisher = Publisher::new(2).unwrap();
        let workers = publisher.workers();
        let mut watch = Watch::default();
        let start = 1_000 * MS;
        assert!(watch.look(workers, start).is_empty(), "not started is not stuck");
        assert_eq!(problems(workers, start).len(), 2);
        let mut events = Vec::new();
        for t in (0..600).step_by(20) {
            let now = start + t * MS;
            workers[0].beat(now);
            // The second one stops at 100 ms and goes on at 400 ms.
            if !(100..400).contains(&t) {
                workers[1].beat(now);
            }
            events.extend(watch.look(workers, now));
            assert_eq!(problems(workers, now).len(), usize::from((200..400).contains(&t)), "at {t} ms");
        }
        assert_eq!(
            events,
            [Event::Stuck { worker: 1, age_ms: 120 }, Event::Recovered { worker: 1, after_ms: 320 }]
        );
        assert_eq!((watch.stalls(0), watch.stalls(1)), (0, 1));
    }

    #[test]
    fn a_watcher_that_was_not_run_itself_concludes_nothing() {
        let publisher = Publisher::new(1).unwrap();
        let mut watch = Watch::default();
        publisher.workers()[0].beat(1_000 * MS);
        watch.look(publisher.workers(), 1_000 * MS);
        assert!(watch.look(publisher.workers(), 9_000 * MS).is_empty(), "the whole machine may have slept");
        assert_eq!(watch.look(publisher.workers(), 9_020 * MS).len(), 1);
    }
}
