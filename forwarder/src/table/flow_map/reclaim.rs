//! Records in nobody's use, and when a removed record may be used again (quiescent-state-based reclamation).
//!
//! A removed record is first unlinked from the index, so that no later lookup finds it; then it waits until every worker that is online
//! has passed a quiescent state, so that no earlier lookup still holds it. A sleeping worker is offline and holds nothing up.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crossbeam::utils::CachePadded;

use super::sync::{AtomicU64, Ordering, fence};

/// The stamp of a worker that holds nothing; epochs start above it.
const OFFLINE: u64 = 0;
const FIRST_EPOCH: u64 = 1;
/// Retired in this burst: the epoch to wait for is not known before the burst is over.
const UNSTAMPED: u64 = u64::MAX;
/// How many removed records a worker lets wait before it stops ageing. Reserved, so that no worker allocates.
const RETIRED_MAX: usize = 4096;

/// A bit for each record that is free. Two levels, so that the last free record of ten million is found in a few loads.
pub(super) struct FreeRecords {
    words: Box<[AtomicU64]>,
    /// A bit for each word that may have bits.
    summary: Box<[AtomicU64]>,
    /// How many records a worker takes at once: 64, fewer in small maps, where a worker would take all.
    batch: u32,
}

impl FreeRecords {
    /// All of `records` are taken.
    pub fn new(records: u32, workers: usize) -> FreeRecords {
        let words = (records as usize).div_ceil(64);
        FreeRecords {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            summary: (0..words.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            batch: (records / (8 * workers.max(1) as u32)).clamp(1, 64),
        }
    }

    /// How many words of 64 records there are.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// True if all 64 records of `word` are free.
    pub fn is_all_free(&self, word: usize) -> bool {
        self.words[word].load(Ordering::Relaxed) == u64::MAX
    }

    /// Gives back the records of `word` that have their bit in `mask`.
    pub fn release(&self, word: usize, mask: u64) {
        if mask != 0 && self.words[word].fetch_or(mask, Ordering::AcqRel) == 0 {
            self.summary[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    /// Takes some free records of one word, looking from word `start` on and around.
    pub fn claim(&self, start: usize) -> Option<(usize, u64)> {
        let sections = self.summary.len();
        for step in 0..=sections {
            let section = (start / 64 + step) % sections;
            let mut candidates = self.summary[section].load(Ordering::Acquire);
            let before_start = (1u64 << (start % 64)) - 1;
            if step == 0 {
                candidates &= !before_start;
            } else if step == sections {
                candidates &= before_start;
            }
            while candidates != 0 {
                let bit = candidates & candidates.wrapping_neg();
                candidates ^= bit;
                let word = section * 64 + bit.trailing_zeros() as usize;
                let (taken, rest) = self.take(word);
                if rest == 0 {
                    self.summary[section].fetch_and(!bit, Ordering::AcqRel);
                    // Released into meanwhile, by somebody who found the bit still set.
                    if self.words[word].load(Ordering::Acquire) != 0 {
                        self.summary[section].fetch_or(bit, Ordering::AcqRel);
                    }
                }
                if taken != 0 {
                    return Some((word, taken));
                }
            }
        }
        None
    }

    /// Takes the lowest `batch` bits of a word; returns what was taken and what is left.
    fn take(&self, word: usize) -> (u64, u64) {
        let mut bits = self.words[word].load(Ordering::Acquire);
        loop {
            let mut rest = bits;
            for _ in 0..self.batch {
                rest &= rest.wrapping_sub(1);
            }
            match self.words[word].compare_exchange_weak(bits, rest, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (bits ^ rest, rest),
                Err(now) => bits = now,
            }
        }
    }
}

/// What one worker keeps for itself.
pub(super) struct Keeping {
    /// Word of [`FreeRecords`] that `free` belongs to.
    word: usize,
    /// Records taken and not used yet.
    free: u64,
    /// Removed records and the epoch that frees them, oldest first.
    retired: VecDeque<(u64, u32)>,
    /// How many at the end of `retired` have no epoch yet.
    unstamped: usize,
    /// Where ageing goes on: a record.
    pub cursor: u32,
}

/// What all workers share about one of them: a line of its own.
struct Seat {
    /// The latest epoch that the worker saw while it held nothing, or [`OFFLINE`].
    seen: AtomicU64,
    /// Present while nobody is this worker.
    keeping: Mutex<Option<Box<Keeping>>>,
}

/// The workers and the epoch.
pub(super) struct Workers {
    epoch: CachePadded<AtomicU64>,
    seats: Box<[CachePadded<Seat>]>,
}

impl Workers {
    /// `words`: of [`FreeRecords`]; each worker starts to look for free records in its own share of them.
    pub fn new(count: usize, words: usize) -> Workers {
        let seat = |i: usize| {
            let word = words * i / count;
            let retired = VecDeque::with_capacity(RETIRED_MAX);
            let keeping = Keeping { word, free: 0, retired, unstamped: 0, cursor: word as u32 * 64 };
            CachePadded::new(Seat {
                seen: AtomicU64::new(OFFLINE),
                keeping: Mutex::new(Some(Box::new(keeping))),
            })
        };
        Workers {
            epoch: CachePadded::new(AtomicU64::new(FIRST_EPOCH)),
            seats: (0..count).map(seat).collect(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.seats.len()
    }

    /// Takes what worker `index` keeps; None if somebody has it.
    pub fn sit(&self, index: usize) -> Option<Box<Keeping>> {
        self.seats[index].keeping.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Gives it back.
    pub fn stand_up(&self, index: usize, keeping: Box<Keeping>) {
        self.offline(index);
        *self.seats[index].keeping.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeping);
    }

    /// From now on worker `index` may hold records.
    pub fn online(&self, index: usize) {
        self.seats[index].seen.store(self.epoch.load(Ordering::Acquire), Ordering::Relaxed);
        // Pairs with the fence in `reclaim`: either that one sees this worker online, or this worker's lookups see the records unlinked.
        fence(Ordering::SeqCst);
    }

    /// Worker `index` holds nothing until it is online again.
    pub fn offline(&self, index: usize) {
        self.seats[index].seen.store(OFFLINE, Ordering::Release);
    }

    /// Worker `index` holds nothing at this moment. Frees the records that it retired and nobody else can hold any more.
    pub fn quiescent(&self, index: usize, keeping: &mut Keeping, free: &FreeRecords) {
        let seen = &self.seats[index].seen;
        if keeping.unstamped == 0 {
            let epoch = self.epoch.load(Ordering::Acquire);
            // Its own line stays clean while nothing is removed anywhere.
            if seen.load(Ordering::Relaxed) != epoch {
                seen.store(epoch, Ordering::Release);
            }
        } else {
            let epoch = self.epoch.fetch_add(1, Ordering::AcqRel) + 1;
            let stamped = keeping.retired.len() - keeping.unstamped;
            for (stamp, _) in keeping.retired.range_mut(stamped..) {
                *stamp = epoch;
            }
            keeping.unstamped = 0;
            seen.store(epoch, Ordering::Release);
        }
        if !keeping.retired.is_empty() {
            self.reclaim(keeping, free);
        }
    }

    fn reclaim(&self, keeping: &mut Keeping, free: &FreeRecords) {
        fence(Ordering::SeqCst);
        let online =
            self.seats.iter().map(|seat| seat.seen.load(Ordering::Acquire)).filter(|s| *s != OFFLINE);
        let passed = online.min().unwrap_or(u64::MAX - 1);
        let (mut word, mut mask) = (0, 0u64);
        while let Some((_, record)) = keeping.retired.pop_front_if(|(stamp, _)| *stamp <= passed) {
            // Neighbors are given back together: ageing removes them in order.
            if record as usize / 64 != word {
                free.release(word, mask);
                (word, mask) = (record as usize / 64, 0);
            }
            mask |= 1 << (record % 64);
        }
        free.release(word, mask);
    }
}

impl Keeping {
    /// A record in nobody's use.
    pub fn allocate(&mut self, free: &FreeRecords) -> Option<u32> {
        if self.free == 0 {
            (self.word, self.free) = free.claim(self.word)?;
        }
        let bit = self.free.trailing_zeros();
        self.free &= self.free - 1;
        Some(self.word as u32 * 64 + bit)
    }

    /// The records that come next, as far as they are taken already.
    pub fn next_free(&self) -> impl Iterator<Item = u32> {
        let (first, mut free) = (self.word as u32 * 64, self.free);
        std::iter::from_fn(move || {
            let bit = (free != 0).then(|| free.trailing_zeros())?;
            free &= free - 1;
            Some(first + bit)
        })
    }

    /// Gives back a record that was never published.
    pub fn give_back(&mut self, free: &FreeRecords, record: u32) {
        let (word, bit) = (record as usize / 64, 1u64 << (record % 64));
        if word == self.word { self.free |= bit } else { free.release(word, bit) }
    }

    /// Lets an unlinked record wait until nobody holds it.
    pub fn retire(&mut self, record: u32) {
        self.retired.push_back((UNSTAMPED, record));
        self.unstamped += 1;
    }

    /// True while there is room for `more` records to wait.
    pub fn has_room(&self, more: usize) -> bool {
        self.retired.len() + more <= RETIRED_MAX
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_claimed_once_and_found_again() {
        let free = FreeRecords::new(10_000, 1);
        for word in 0..free.words() {
            free.release(word, if word == 156 { 0xffff } else { u64::MAX });
        }
        let mut seen = vec![false; 10_000];
        while let Some((word, mut mask)) = free.claim(77) {
            while mask != 0 {
                let record = word * 64 + mask.trailing_zeros() as usize;
                mask &= mask - 1;
                assert!(!std::mem::replace(&mut seen[record], true), "{record} claimed twice");
            }
        }
        assert!(seen.iter().all(|s| *s));
        free.release(3, 1 << 9);
        assert_eq!(free.claim(150), Some((3, 1 << 9)));
        assert_eq!(free.claim(3), None);
    }

    #[test]
    fn small_maps_are_claimed_in_small_batches() {
        let free = FreeRecords::new(64, 4);
        free.release(0, u64::MAX);
        assert_eq!(free.claim(0), Some((0, 0b11)));
        assert_eq!(free.claim(0), Some((0, 0b1100)));
    }

    #[test]
    fn a_retired_record_waits_for_every_worker_that_is_online() {
        let free = FreeRecords::new(64, 2);
        let workers = Workers::new(2, 1);
        let mut keeping = workers.sit(0).unwrap();
        assert!(workers.sit(0).is_none());
        workers.online(0);
        workers.online(1);
        keeping.retire(5);
        workers.quiescent(0, &mut keeping, &free);
        assert_eq!(free.claim(0), None, "worker 1 may hold it");
        workers.offline(1);
        workers.quiescent(0, &mut keeping, &free);
        assert_eq!(free.claim(0), Some((0, 1 << 5)));

        workers.online(1);
        keeping.retire(6);
        workers.quiescent(0, &mut keeping, &free);
        let mut other = workers.sit(1).unwrap();
        workers.quiescent(1, &mut other, &free);
        workers.quiescent(0, &mut keeping, &free);
        assert_eq!(free.claim(0), Some((0, 1 << 6)));
        workers.stand_up(0, keeping);
        assert!(workers.sit(0).is_some());
    }
}
