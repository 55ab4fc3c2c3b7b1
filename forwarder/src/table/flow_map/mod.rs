//! The flow table: one lock-free map of connections that all workers share, in a mapped file that outlives the process.
//!
//! A connection has two tuples, as they stand on the wire when its packets come in: `original` (the client's) and `reply` (the
//! endpoint's answers). Both lead to one record. Any worker may meet either, so there is nothing to hand over between workers.
//!
//! - **Readers never wait.** A lookup reads one or two cache lines of slots, then one record (two for IPv6), and compares it in full.
//! - **Publication.** A record is written completely, its slots are set (reply first), conflicts are looked for, and one
//!   compare-and-swap of its state word from pending to live makes it a flow. Tuples, service and endpoint never change after.
//!   Of two inserts of one tuple at most one becomes live: each looks for the other after it has set its slot, so at least one of
//!   them sees the other, and it either gives way to a live flow or strikes out the pending one.
//! - **Removal** takes the state word from live to dead by compare-and-swap, then clears the slots; the record is used again only
//!   after every worker that is online has passed a quiescent state (`reclaim`).
//! - **Restart.** The state word is the only truth. [`FlowMap::open`] keeps every live record and clears each slot that leads
//!   elsewhere, so a process may be killed at any instruction.
//! - **Floods.** Flows in an embryonic phase may use a share of the map only, counted exactly, so that half-open connections
//!   neither evict nor starve established ones. Nothing is ever evicted. What finds no room can be marked, so that it is known again.
//! - **Tallies.** A flow may count towards a number of the caller's, exactly, from its insertion to its end, whatever ends it.
//!
//! Files in the order of reading: `layout` (what lies in the region), `region` (the mapping), `index` (slots), `insert`, `remove`
//! (and ageing), `reclaim`, `recover`, `mark`; `view` is what callers see of a flow. All time is passed in, in seconds of CLOCK_MONOTONIC.
#![allow(unsafe_code)]

mod hash;
mod index;
mod insert;
mod layout;
#[cfg(all(test, loom))]
mod loom;
mod mark;
mod reclaim;
mod recover;
#[cfg(not(loom))]
mod region;
#[cfg(loom)]
#[path = "region_modelled.rs"]
mod region;
mod remove;
mod sync;
#[cfg(all(test, not(loom)))]
mod tests;
mod view;

use std::fmt;
use std::io;
use std::sync::Arc;

use crossbeam::utils::CachePadded;

use super::prefetch;
use crate::addr::{Addr, Tuple};
use hash::{HashKey, Packed};
use layout::Slot;
use reclaim::{FreeRecords, Keeping, Workers};
use region::{Header, Region, Sizes};
use sync::{AtomicU32, AtomicU64, Ordering};

pub use insert::{InsertError, Inserted};
pub use view::{Candidate, FlowId, FlowRef, FlowSnapshot, Hit};

/// How a map is made. See [`Default`] for the usual values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowMapConfig {
    /// How many connections (and one-way entries) fit.
    pub capacity: u32,
    /// How much of the capacity flows in an embryonic phase may use, percent.
    pub embryonic_share: u32,
    /// Idle timeout of each phase, seconds. A flow goes when it has been idle for longer.
    pub timeouts_s: [u32; 16],
    /// A bit for each phase that is embryonic: not yet confirmed by its peer.
    pub embryonic_phases: u16,
    /// How many workers there are at most.
    pub workers: usize,
    /// How many tallies there are, at most [`TALLIES_MAX`]; 4 bytes each.
    pub tallies: u32,
}

/// Tallies at most: numbers below this one are counted, 0 is nobody's.
pub const TALLIES_MAX: u32 = layout::TALLIES_MAX;

impl Default for FlowMapConfig {
    /// 262,144 connections, one worker, a quarter for embryonic flows, phase 0 alone embryonic, 240 s (RFC 5382 REQ-5, transitory), no
    /// tallies.
    fn default() -> Self {
        FlowMapConfig {
            capacity: 262_144,
            embryonic_share: 25,
            timeouts_s: [240; 16],
            embryonic_phases: 1,
            workers: 1,
            tallies: 0,
        }
    }
}

/// Why a region could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum FlowMapError {
    /// A system call on the file failed.
    #[error("cannot {action} the flow region: {error}")]
    File {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The file system is too full.
    #[error(
        "no room for the flow region: {needed} bytes are needed ({full} with IPv6 flows): {error}; \
         lower [flows] capacity or enlarge the tmpfs"
    )]
    NoRoom {
        /// Bytes that are allocated at the start.
        needed: u64,
        /// Bytes with every record in use by an IPv6 flow.
        full: u64,
        /// What the kernel said.
        error: io::Error,
    },
    /// The flows have to be moved first.
    #[error("the flow region has room for {found} connections, not for {expected}")]
    Capacity {
        /// In the file.
        found: u32,
        /// Asked for.
        expected: u32,
    },
    /// There is no hash key without random numbers.
    #[error("getrandom failed: {error}")]
    Random {
        /// What the kernel said.
        error: io::Error,
    },
    /// The configuration makes no sense.
    #[error("flow map: {field} = {value}: {remedy}")]
    Config {
        /// Field of [`FlowMapConfig`].
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        remedy: &'static str,
    },
}

impl FlowMapError {
    fn file(action: &'static str) -> impl Fn(io::Error) -> FlowMapError {
        move |error| FlowMapError::File { action, error }
    }
}

/// Why a region was started without flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyReason {
    /// The file is new.
    New,
    /// The file is something else.
    Foreign,
    /// Another version of Towpath wrote it.
    LayoutVersion {
        /// In the file.
        found: u64,
        /// Of this version.
        expected: u64,
    },
    /// The header is damaged.
    Checksum,
    /// The file is cut off or has grown.
    Length {
        /// Bytes.
        found: u64,
        /// Bytes.
        expected: u64,
    },
}

impl fmt::Display for EmptyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EmptyReason::New => write!(f, "the flow region is new"),
            EmptyReason::Foreign => write!(f, "the file is not a flow region"),
            EmptyReason::LayoutVersion { found, expected } => {
                write!(f, "the flow region has layout version {found}, this build has {expected}")
            }
            EmptyReason::Checksum => write!(f, "the header of the flow region is damaged"),
            EmptyReason::Length { found, expected } => {
                write!(f, "the flow region has {found} bytes instead of {expected}")
            }
        }
    }
}

/// What [`FlowMap::open`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Flows that go on.
    pub kept: u32,
    /// Records whose flow was being made or removed when the last process died.
    pub scrubbed: u32,
    /// Slots that led to no flow.
    pub cleared_slots: u32,
    /// Slots of kept flows that were missing or wrong and were set again. Not 0 only if the region was damaged.
    pub relinked: u32,
    /// Of a copy: flows for which the new capacity had no room.
    pub left_out: u32,
    /// Why there are no flows, if the region was started anew.
    pub empty: Option<EmptyReason>,
}

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Direction {
    /// As the first packet.
    Original = 0,
    /// Back.
    Reply = 1,
}

/// A flow to be inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NewFlow {
    /// Packets of the client as they come in.
    pub original: Tuple,
    /// Packets of the endpoint as they come in. None makes a one-way entry that maps a tuple to an endpoint, such as a session affinity.
    pub reply: Option<Tuple>,
    /// Below 16; chooses the timeout.
    pub phase: u8,
    /// A timeout of its own, seconds; 0: that of the phase.
    pub timeout_s: u32,
    /// Stable id of the service port.
    pub service: u64,
    /// Of a one-way entry: its value. A flow with a reply does not store it: its endpoint is the source of its replies.
    pub endpoint_addr: Addr,
    /// As `endpoint_addr`.
    pub endpoint_port: u16,
    /// Of the tables that the flow was made under.
    pub generation: u32,
    /// The caller's.
    pub flags: u16,
    /// What it counts towards while it lives, below [`TALLIES_MAX`]; 0: nothing.
    pub tally: u32,
}

/// The map. Shared by reference or `Arc`; every method may be called by any thread, those that take a [`FlowWorker`] by its owner.
pub struct FlowMap {
    region: Region,
    key: HashKey,
    config: FlowMapConfig,
    embryonic_limit: u32,
    free: FreeRecords,
    workers: Arc<Workers>,
    /// Live flows low, embryonic ones high, reservations of running inserts included.
    counts: CachePadded<AtomicU64>,
    /// Live flows by tally, reservations of running inserts included.
    tallies: Box<[AtomicU32]>,
    /// Something was marked, perhaps by an earlier process. Saves everybody else the look at the marks.
    has_marks: AtomicU32,
}

const ONE_FLOW: u64 = 1;
const ONE_EMBRYONIC: u64 = 1 << 32;

/// What one worker thread holds of a map: its free records, its removed ones that wait, its place in ageing.
///
/// It is online from the start: [`FlowMap::quiescent`] must be called between bursts, [`FlowMap::offline`] before sleeping. Dropping it
/// lets another thread become this worker.
pub struct FlowWorker {
    index: usize,
    workers: Arc<Workers>,
    keeping: Option<Box<Keeping>>,
}

impl FlowWorker {
    fn keeping(&mut self) -> &mut Keeping {
        self.keeping.as_mut().expect("present until dropped")
    }
}

impl Drop for FlowWorker {
    fn drop(&mut self) {
        if let Some(keeping) = self.keeping.take() {
            self.workers.stand_up(self.index, keeping);
        }
    }
}

impl fmt::Debug for FlowWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowWorker").field("index", &self.index).finish_non_exhaustive()
    }
}

impl fmt::Debug for FlowMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("FlowMap")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl FlowMap {
    /// Maps the region in `file`, which is made or extended as needed, and goes on with every flow in it.
    ///
    /// If the region is of another layout version or its header is damaged, it is started without flows and [`Recovery::empty`] says
    /// why. The caller sees to it that only one process has the region open. Cost: a pass over state words and slots.
    ///
    /// # Errors
    /// The region has another capacity ([`FlowMap::copy`] is what moves its flows), or there is no room.
    pub fn open(file: &std::fs::File, config: FlowMapConfig) -> Result<(FlowMap, Recovery), FlowMapError> {
        FlowMap::open_or_new(file, config, None)
    }

    /// The same; a region that is made has this `key`, if it is given.
    fn open_or_new(
        file: &std::fs::File,
        config: FlowMapConfig,
        key: Option<[u64; 2]>,
    ) -> Result<(FlowMap, Recovery), FlowMapError> {
        let sizes = check(&config)?;
        let found = match Header::read(file) {
            Ok(header) if header.sizes != sizes => {
                let (found, expected) = (header.sizes.records, config.capacity);
                return Err(FlowMapError::Capacity { found, expected });
            }
            found => found,
        };
        let (region, key, empty) = Region::open(file, sizes, found, key)?;
        let mut map = FlowMap::over(region, key, config);
        let recovery = Recovery { empty, ..map.recover() };
        Ok((map, recovery))
    }

    /// A map in memory of this process only, for tests, benches and explanations.
    ///
    /// # Panics
    /// If the configuration makes no sense or there is no memory.
    pub fn anonymous(config: FlowMapConfig) -> FlowMap {
        let sizes = check(&config).unwrap_or_else(|error| panic!("{error}"));
        let (region, key) = Region::anonymous(sizes).unwrap_or_else(|error| panic!("{error}"));
        let mut map = FlowMap::over(region, key, config);
        map.recover();
        map
    }

    fn over(region: Region, key: [u64; 2], config: FlowMapConfig) -> FlowMap {
        let free = FreeRecords::new(config.capacity, config.workers);
        let limit = u64::from(config.capacity) * u64::from(config.embryonic_share) / 100;
        FlowMap {
            region,
            key: HashKey::new(key),
            embryonic_limit: limit.max(1) as u32,
            // One seat more, for traces: it looks up, but has no share of the ageing.
            workers: Arc::new(Workers::new(config.workers + 1, free.words())),
            free,
            config,
            counts: CachePadded::new(AtomicU64::new(0)),
            tallies: (0..config.tallies.min(TALLIES_MAX)).map(|_| AtomicU32::new(0)).collect(),
            has_marks: AtomicU32::new(0),
        }
    }

    /// Becomes worker `index`, below [`FlowMapConfig::workers`], online; or, with that number itself, an observer, which has no
    /// share of the ageing.
    ///
    /// # Panics
    /// If there is no such worker or another thread is it.
    pub fn worker(&self, index: usize) -> FlowWorker {
        assert!(index < self.workers.len(), "worker {index} of {}", self.workers.len());
        let keeping = self.workers.sit(index);
        assert!(keeping.is_some(), "worker {index} of the flow map is taken");
        self.workers.online(index);
        FlowWorker { index, workers: Arc::clone(&self.workers), keeping }
    }

    /// The keyed hash of a tuple. It means nothing outside this map.
    #[inline]
    pub fn hash(&self, tuple: &Tuple) -> u64 {
        self.key.hash(&Packed::new(tuple))
    }

    /// First pass over a burst: asks for the line of slots where `hash` most likely is.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        let probe = self.probe(hash);
        prefetch(&self.region.buckets()[probe.first]);
    }

    /// Asks for both lines of slots that `hash` may lie in, ahead of an insert.
    #[inline]
    pub fn prefetch_both(&self, hash: u64) {
        let probe = self.probe(hash);
        prefetch(&self.region.buckets()[probe.first]);
        prefetch(&self.region.buckets()[probe.second]);
    }

    /// Asks for the records that this worker's next inserts write, at most `count`.
    pub fn prefetch_free(&self, worker: &mut FlowWorker, count: usize) {
        for index in worker.keeping().next_free().take(count) {
            prefetch(&self.region.records()[index as usize]);
        }
    }

    /// Second pass over a burst: asks for the record that `hash` most likely leads to, or else for the other line of slots. What it
    /// found is for [`Self::lookup_from`].
    #[inline]
    pub fn prefetch_record(&self, hash: u64) -> Candidate {
        let probe = self.probe(hash);
        match self.first_match(probe.first, probe.wanted) {
            Some(slot) => {
                let record = slot.record() as usize;
                if let Some(record) = self.region.records().get(record) {
                    prefetch(record);
                }
                if slot.is_extended()
                    && let Some(extension) = self.region.extensions().get(record)
                {
                    prefetch(extension);
                }
                Candidate(slot.0)
            }
            None => {
                prefetch(&self.region.buckets()[probe.second]);
                Candidate::default()
            }
        }
    }

    /// As [`Self::lookup`], looking first at what [`Self::prefetch_record`] found since the worker's last quiescent state.
    #[inline]
    pub fn lookup_from(&self, candidate: Candidate, tuple: &Tuple, hash: u64) -> Option<Hit<'_>> {
        let slot = Slot(candidate.0);
        if candidate != Candidate::default()
            && let Some(record) = self.matching(slot, &Packed::new(tuple))
            && record.state(Ordering::Acquire).is_live()
        {
            return Some(Hit { direction: slot.direction(), flow: self.flow(slot.record(), record) });
        }
        self.lookup(tuple, hash)
    }

    /// The flow that `tuple` belongs to, in either direction. `hash`: from [`Self::hash`]. Lock-free.
    ///
    /// The flow may be held until the worker's next quiescent state.
    #[inline(never)]
    pub fn lookup(&self, tuple: &Tuple, hash: u64) -> Option<Hit<'_>> {
        let packed = Packed::new(tuple);
        let (slot, record) = self.find(&packed, hash, |state| state.is_live())?;
        Some(Hit { direction: slot.direction(), flow: self.flow(slot.record(), record) })
    }

    /// True if no flow has this tuple in either direction: for the choice of a source port.
    pub fn is_free(&self, tuple: &Tuple) -> bool {
        let packed = Packed::new(tuple);
        let taken = |state: layout::State| matches!(state.life(), layout::Life::Live | layout::Life::Pending);
        self.find(&packed, self.key.hash(&packed), taken).is_none()
    }

    /// Between bursts: this worker holds no [`FlowRef`]. Frees removed records that nobody can hold any more.
    pub fn quiescent(&self, worker: &mut FlowWorker) {
        let index = worker.index;
        self.workers.quiescent(index, worker.keeping(), &self.free);
    }

    /// Before sleeping: this worker holds no [`FlowRef`] and touches the map no more until it is [`Self::online`].
    pub fn offline(&self, worker: &mut FlowWorker) {
        self.quiescent(worker);
        self.workers.offline(worker.index);
    }

    /// After sleeping.
    pub fn online(&self, worker: &mut FlowWorker) {
        self.workers.online(worker.index);
    }

    /// How many flows there are, one-way entries included.
    pub fn len(&self) -> usize {
        self.counts.load(Ordering::Relaxed) as u32 as usize
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many flows fit.
    pub fn capacity(&self) -> usize {
        self.config.capacity as usize
    }

    /// How many flows are in an embryonic phase.
    pub fn embryonic_len(&self) -> usize {
        (self.counts.load(Ordering::Relaxed) >> 32) as usize
    }

    /// How many flows may be in an embryonic phase.
    pub fn embryonic_capacity(&self) -> usize {
        self.embryonic_limit as usize
    }

    /// True if a flow in `phase` would be inserted now, as far as the counts tell.
    #[inline]
    pub fn has_room(&self, phase: u8) -> bool {
        let counts = self.counts.load(Ordering::Relaxed);
        let is_embryonic_full = self.is_embryonic(phase) && counts >> 32 >= u64::from(self.embryonic_limit);
        (counts as u32) < self.config.capacity && !is_embryonic_full
    }

    /// How many flows count towards `tally`. Any thread.
    #[inline]
    pub fn tally(&self, tally: u32) -> u32 {
        self.tallies.get(tally as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    fn tally_up(&self, tally: u32) {
        if tally != 0
            && let Some(count) = self.tallies.get(tally as usize)
        {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tally_down(&self, tally: u32) {
        if tally != 0
            && let Some(count) = self.tallies.get(tally as usize)
        {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Idle timeout of a phase, seconds.
    #[inline]
    pub fn timeout_s(&self, phase: u8) -> u32 {
        self.config.timeouts_s[usize::from(phase & 15)]
    }

    /// Bytes of the region, IPv6 extensions included.
    pub fn region_bytes(capacity: u32) -> usize {
        Sizes::for_capacity(capacity).len()
    }

    fn is_embryonic(&self, phase: u8) -> bool {
        self.config.embryonic_phases >> (phase & 15) & 1 != 0
    }

    /// What a flow in `phase` adds to the counts.
    fn weight(&self, phase: u8) -> u64 {
        ONE_FLOW + if self.is_embryonic(phase) { ONE_EMBRYONIC } else { 0 }
    }
}

fn check(config: &FlowMapConfig) -> Result<Sizes, FlowMapError> {
    let wrong = |field, value: u64, remedy| Err(FlowMapError::Config { field, value, remedy });
    if !(1..=1 << 30).contains(&config.capacity) {
        return wrong("capacity", config.capacity.into(), "choose 1 to 1073741824 connections");
    }
    if !(1..=100).contains(&config.embryonic_share) {
        return wrong("embryonic_share", config.embryonic_share.into(), "choose 1 to 100 percent");
    }
    if config.tallies > TALLIES_MAX {
        return wrong("tallies", config.tallies.into(), "choose 0 to 1048576 tallies");
    }
    if !(1..=1024).contains(&config.workers) {
        return wrong("workers", config.workers as u64, "choose 1 to 1024 workers");
    }
    if let Some(timeout) = config.timeouts_s.iter().find(|t| !(1..=1 << 30).contains(*t)) {
        return wrong("timeouts_s", u64::from(*timeout), "choose 1 s to 2^30 s");
    }
    Ok(Sizes::for_capacity(config.capacity))
}
