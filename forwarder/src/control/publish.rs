//! Publishing tables: one release store, and nothing is ever freed on a worker.
//!
//! [`Publisher`] holds the two snapshots that packets are judged by, and the captures that run. Each worker owns a
//! [`Reader`], which looks at them once a round through [`arc_swap::Cache`] (one relaxed load and a comparison while nothing
//! changes). A snapshot that was replaced stays in a list here until no worker and no dump holds it any more, so that its
//! last reference is always dropped by a control thread: [`Publisher::reap`]. A worker that is stuck keeps the one snapshot
//! that it works with, not those published since.
//!
//! A worker says which generation it has *in force*: every frame that it rewrote under an older one has left its
//! transmit rings. Control waits for that before it answers a commit, and before it takes steering entries away.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Cache};
use crossbeam::utils::CachePadded;
use rustix::event::{EventfdFlags, eventfd};

use crate::capture::Captures;
use crate::stats::Counters;
use crate::tables::{Fib, Tables};
use crate::worker::frames::Frames;

/// What one worker and the control threads share. The worker writes everything but the wake-up.
#[derive(Debug)]
pub struct WorkerLink {
    index: usize,
    in_force: CachePadded<AtomicU64>,
    heartbeat_ns: CachePadded<AtomicU64>,
    asleep: AtomicBool,
    counters: Counters,
    frames: CachePadded<Frames>,
    wake: OwnedFd,
}

impl WorkerLink {
    fn new(index: usize) -> rustix::io::Result<WorkerLink> {
        Ok(WorkerLink {
            index,
            in_force: CachePadded::new(AtomicU64::new(0)),
            heartbeat_ns: CachePadded::new(AtomicU64::new(0)),
            asleep: AtomicBool::new(false),
            counters: Counters::default(),
            frames: CachePadded::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Which worker this is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The worker's counters; only the worker itself adds to them.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Where the worker's frames were when it last told.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Worker: every frame rewritten under an older generation has left, from now on only `generation` shows.
    #[inline]
    pub fn set_in_force(&self, generation: u64) {
        self.in_force.store(generation, Ordering::Release);
    }

    /// The generation that the worker has in force; 0 before its first burst.
    pub fn in_force(&self) -> u64 {
        self.in_force.load(Ordering::Acquire)
    }

    /// Worker: alive at `now_ns` (CLOCK_MONOTONIC). Called every loop, and at least every 50 ms while it sleeps.
    #[inline]
    pub fn beat(&self, now_ns: u64) {
        self.heartbeat_ns.store(now_ns, Ordering::Relaxed);
    }

    /// When the worker last said that it is alive, nanoseconds of CLOCK_MONOTONIC; 0 before it started.
    pub fn heartbeat_ns(&self) -> u64 {
        self.heartbeat_ns.load(Ordering::Relaxed)
    }

    /// Worker: it begins to sleep for want of packets, or has woken up. For people, and for workers that have something
    /// for this one.
    pub fn set_asleep(&self, asleep: bool) {
        self.asleep.store(asleep, Ordering::Relaxed);
    }

    /// True if the worker sleeps for want of packets.
    pub fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::Relaxed)
    }

    /// Wakes the worker if it sleeps. Any thread; costs one write to an eventfd.
    pub fn wake(&self) {
        // The only error is a counter at its maximum, and then the worker has been woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The descriptor that a sleeping worker polls for reading beside its sockets.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Worker: takes the wake-up back after a sleep, so that the next sleep is one.
    pub fn clear_wake(&self) {
        let mut count = [0u8; 8];
        // EAGAIN: it was woken by a packet or by the clock.
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

/// The current value of one kind of snapshot, and those that somebody may still be reading.
struct Slot<T> {
    current: Arc<ArcSwap<T>>,
    retired: Mutex<Vec<Arc<T>>>,
}

impl<T> Slot<T> {
    fn new(value: T) -> Slot<T> {
        Slot { current: Arc::new(ArcSwap::from_pointee(value)), retired: Mutex::new(Vec::new()) }
    }

    fn publish(&self, value: Arc<T>) {
        // The list is locked first: the old snapshot must be in it before a worker can let go of it.
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current.swap(value);
        retired.push(old);
    }

    /// Frees every old snapshot whose only reference is ours. Nobody can take a new reference to it, since it
    /// is no longer the current one and `swap` has settled the loads that were under way. Returns how many remain.
    fn reap(&self) -> usize {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let (free, kept): (Vec<_>, Vec<_>) = retired.drain(..).partition(|old| Arc::strong_count(old) == 1);
        // What a worker did with a snapshot comes before its letting go of it, which the counts have just shown.
        fence(Ordering::Acquire);
        *retired = kept;
        let left = retired.len();
        drop(retired);
        // Freeing a large snapshot takes milliseconds: not under the lock that a publish waits for.
        drop(free);
        left
    }
}

/// How many workers have a generation in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// The generation asked about.
    pub generation: u64,
    /// Workers that have it, or a later one, in force.
    pub workers: usize,
    /// Workers in all.
    pub of: usize,
}

impl InForce {
    /// True if every worker has it in force.
    pub fn everywhere(&self) -> bool {
        self.workers == self.of
    }
}

/// Where control puts tables and workers take them from.
pub struct Publisher {
    tables: Slot<Tables>,
    fib: Slot<Fib>,
    captures: Slot<Captures>,
    workers: Box<[Arc<WorkerLink>]>,
}

impl Publisher {
    /// An empty publisher (generation 0, epoch 0) for `workers` workers.
    ///
    /// # Errors
    /// The kernel gives no eventfd (EMFILE: raise LimitNOFILE).
    pub fn new(workers: usize) -> rustix::io::Result<Arc<Publisher>> {
        let workers = (0..workers).map(|i| WorkerLink::new(i).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Arc::new(Publisher {
            tables: Slot::new(Tables::default()),
            fib: Slot::new(Fib::default()),
            captures: Slot::new(Captures::default()),
            workers,
        }))
    }

    /// What worker `index` reads through, on its own thread.
    pub fn reader(&self, index: usize) -> Reader {
        Reader {
            tables: Cache::new(self.tables.current.clone()),
            fib: Cache::new(self.fib.current.clone()),
            captures: Cache::new(self.captures.current.clone()),
            workers: self.workers.len(),
            link: self.workers[index].clone(),
        }
    }

    /// What control and the workers share, by worker index.
    pub fn workers(&self) -> &[Arc<WorkerLink>] {
        &self.workers
    }

    /// The service tables now. Any thread but a worker's.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.current.load_full()
    }

    /// The forwarding table now. Any thread but a worker's.
    pub fn fib(&self) -> Arc<Fib> {
        self.fib.current.load_full()
    }

    /// Makes `tables` what the next burst of every worker is judged by, and wakes the sleepers.
    pub fn publish_tables(&self, tables: Arc<Tables>) {
        self.tables.publish(tables);
        self.wake_all();
    }

    /// Makes `fib` what the next burst of every worker is routed by, and wakes the sleepers.
    pub fn publish_fib(&self, fib: Arc<Fib>) {
        self.fib.publish(fib);
        self.wake_all();
        self.fib.reap();
    }

    /// Makes `captures` what every worker captures from its next burst on, and wakes the sleepers.
    pub fn publish_captures(&self, captures: Captures) {
        self.captures.publish(Arc::new(captures));
        self.wake_all();
    }

    /// True once no worker writes records for captures that were replaced; frees them.
    pub fn captures_are_settled(&self) -> bool {
        self.captures.reap() == 0
    }

    fn wake_all(&self) {
        self.workers.iter().for_each(|worker| worker.wake());
    }

    /// Frees old snapshots that nobody reads any more. Control thread, after a publish and every few milliseconds.
    /// Returns how many old snapshots are still being read.
    pub fn reap(&self) -> usize {
        self.tables.reap() + self.fib.reap() + self.captures.reap()
    }

    /// How many workers have `generation` in force now.
    pub fn in_force(&self, generation: u64) -> InForce {
        let workers = self.workers.iter().filter(|worker| worker.in_force() >= generation).count();
        InForce { generation, workers, of: self.workers.len() }
    }

    /// Waits until every worker has `generation` in force, at most `timeout`.
    pub fn wait_in_force(&self, generation: u64, timeout: Duration) -> InForce {
        let start = Instant::now();
        loop {
            let now = self.in_force(generation);
            let waited = start.elapsed();
            if now.everywhere() || waited >= timeout {
                return now;
            }
            std::thread::sleep(look_again_after(waited));
        }
    }
}

/// How long to sleep before looking again at generations in force: a worker that runs takes microseconds, one that is
/// stuck is not worth a busy control thread.
pub fn look_again_after(waited: Duration) -> Duration {
    (waited / 4).clamp(Duration::from_micros(20), Duration::from_millis(5))
}

/// A worker's view of the published tables. Owned by the worker's thread.
pub struct Reader {
    tables: Cache<Arc<ArcSwap<Tables>>, Arc<Tables>>,
    fib: Cache<Arc<ArcSwap<Fib>>, Arc<Fib>>,
    captures: Cache<Arc<ArcSwap<Captures>>, Arc<Captures>>,
    workers: usize,
    link: Arc<WorkerLink>,
}

impl Reader {
    /// The tables for the next burst, and the captures. Never frees what it lets go of.
    #[inline]
    pub fn load(&mut self) -> (&Tables, &Fib, &Captures) {
        (self.tables.load(), self.fib.load(), self.captures.load())
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// What this worker tells the control threads.
    pub fn link(&self) -> &Arc<WorkerLink> {
        &self.link
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn generation(generation: u64) -> Arc<Tables> {
        Arc::new(Tables { generation, ..Tables::default() })
    }

    /// Notes on which thread it is dropped.
    struct Tracked(Arc<Mutex<Vec<thread::ThreadId>>>);

    impl Drop for Tracked {
        fn drop(&mut self) {
            self.0.lock().unwrap().push(thread::current().id());
        }
    }

    #[test]
    fn snapshots_are_freed_by_the_publishing_thread_only() {
        let drops = Arc::new(Mutex::new(Vec::new()));
        let slot = Slot::new(Tracked(drops.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let mut cache = Cache::new(slot.current.clone());
                let stop = stop.clone();
                thread::spawn(move || {
                    let mut loads = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        assert!(Arc::strong_count(cache.load()) > 0);
                        loads += 1;
                    }
                    loads
                })
            })
            .collect();
        const PUBLISHES: usize = 20_000;
        for i in 0..PUBLISHES {
            slot.publish(Arc::new(Tracked(drops.clone())));
            if i % 7 == 0 {
                slot.reap();
            }
        }
        // While the workers run they keep loading, so each lets go of everything but the newest.
        let start = Instant::now();
        while slot.reap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "old snapshots are still held");
            thread::yield_now();
        }
        assert_eq!(drops.lock().unwrap().len(), PUBLISHES, "all but the current one are freed");
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
        let here = thread::current().id();
        assert!(drops.lock().unwrap().iter().all(|id| *id == here), "a worker freed a snapshot");
    }

    #[test]
    fn a_stuck_reader_keeps_one_snapshot_alive() {
        let publisher = Publisher::new(2).unwrap();
        let mut stuck = publisher.reader(0);
        let mut running = publisher.reader(1);
        publisher.publish_tables(generation(1));
        assert_eq!(stuck.load().0.generation, 1);
        for g in 2..50 {
            publisher.publish_tables(generation(g));
            assert_eq!(running.load().0.generation, g);
            publisher.reap();
        }
        assert_eq!(publisher.reap(), 1, "generation 1, which the stuck worker holds");
        assert_eq!(stuck.load().0.generation, 49);
        assert_eq!(publisher.reap(), 0);
    }

    #[test]
    fn waits_for_every_worker_and_says_how_many() {
        let publisher = Publisher::new(2).unwrap();
        publisher.publish_tables(generation(3));
        publisher.workers()[0].set_in_force(3);
        let partly = publisher.wait_in_force(3, Duration::from_millis(5));
        assert_eq!(partly, InForce { generation: 3, workers: 1, of: 2 });
        assert!(!partly.everywhere());

        let late = publisher.clone();
        let worker = thread::spawn(move || {
            let mut reader = late.reader(1);
            let generation = reader.load().0.generation;
            reader.link().set_in_force(generation);
        });
        assert!(publisher.wait_in_force(3, Duration::from_secs(20)).everywhere());
        worker.join().unwrap();
    }

    #[test]
    fn a_sleeping_worker_is_woken_by_both_kinds_of_publish() {
        use rustix::event::{PollFd, PollFlags, poll};
        let publisher = Publisher::new(1).unwrap();
        let link = publisher.workers()[0].clone();
        let readable = || {
            let mut fds = [PollFd::new(&link.wake, PollFlags::IN)];
            poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
        };
        assert!(!readable());
        publisher.publish_tables(generation(1));
        publisher.publish_tables(generation(2));
        assert!(readable());
        link.clear_wake();
        assert!(!readable());
        publisher.publish_fib(Arc::new(Fib::default()));
        assert!(readable());
    }
}
