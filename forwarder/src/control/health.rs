//! Watches the heartbeats of workers: one without progress for 100 ms is seen and reported.

use std::sync::Arc;

use config::fault::{Code, Fault};

use super::publish::WorkerLink;

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
