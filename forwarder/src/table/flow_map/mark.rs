//! Marks: what was let through without an entry because the map was full, so that its answers are known again.
//!
//! A mark is the time at which a hash was last marked, in a cell that the hash chooses; nothing else is kept. So a marked hash is always
//! recognized within its time, and one that was not marked may look so: the more connections go on without an entry, the more
//! often. Marks lie in the region and so outlive the process.

use super::FlowMap;
use super::sync::{AtomicU16, Ordering};

/// Seconds of CLOCK_MONOTONIC are cut to steps of 16 s, so that 16 bits last for twelve days.
const STEP_SHIFT: u32 = 4;
/// Most seconds that can be asked for: half of what 16 bits of steps hold.
const WITHIN_MAX_S: u32 = 0x7fff << STEP_SHIFT;
/// Workers read the clock at different moments.
const SKEW: i16 = 4;

/// Never 0, which is a cell without a mark.
fn step(now_s: u32) -> u16 {
    ((now_s >> STEP_SHIFT) as u16).max(1)
}

impl FlowMap {
    /// Marks `hash`, from [`Self::hash`]. Any thread; it writes only if the last mark is 16 s old.
    pub fn mark(&self, hash: u64, now_s: u32) {
        let Some(cell) = self.mark_cell(hash) else { return };
        let step = step(now_s);
        if cell.load(Ordering::Relaxed) != step {
            cell.store(step, Ordering::Relaxed);
        }
        if !self.has_marks() {
            self.has_marks.store(1, Ordering::Relaxed);
        }
    }

    /// True if anything was ever marked: nobody else needs to look.
    #[inline]
    pub fn has_marks(&self) -> bool {
        self.has_marks.load(Ordering::Relaxed) != 0
    }

    /// True if `hash` was marked in the last `within_s` seconds, or looks so.
    pub fn is_marked(&self, hash: u64, now_s: u32, within_s: u32) -> bool {
        let Some(cell) = self.mark_cell(hash) else { return false };
        let marked = cell.load(Ordering::Relaxed);
        let age = step(now_s).wrapping_sub(marked) as i16;
        // A step more, since both times were cut.
        let most = (within_s.min(WITHIN_MAX_S) >> STEP_SHIFT) as i16;
        marked != 0 && age >= -SKEW && age <= most.saturating_add(1)
    }

    /// The slots of the index come from the same bits: a mark says nothing of them.
    fn mark_cell(&self, hash: u64) -> Option<&AtomicU16> {
        let cells = self.region.marks();
        cells.get((((hash >> 32) * cells.len() as u64) >> 32) as usize)
    }

    /// All cells, for [`Self::set_marks`] of a map with the same key.
    pub(super) fn marks(&self) -> Vec<u16> {
        self.region.marks().iter().map(|cell| cell.load(Ordering::Relaxed)).collect()
    }

    /// Takes the marks of a map with the same key and any number of cells over: each cell gets the newest mark of those that have a hash
    /// in common with it, so that no mark is missed.
    pub(super) fn set_marks(&self, old: &[u16]) {
        let cells = self.region.marks();
        for (index, cell) in cells.iter().enumerate() {
            let first = index * old.len() / cells.len();
            let end = ((index + 1) * old.len()).div_ceil(cells.len());
            let is_newer = |a: u16, b: u16| a != 0 && (b == 0 || a.wrapping_sub(b).cast_signed() > 0);
            let newest = old[first..end]
                .iter()
                .fold(0, |newest, mark| if is_newer(*mark, newest) { *mark } else { newest });
            cell.store(newest, Ordering::Relaxed);
        }
        self.find_marks();
    }

    /// After a restart.
    pub(super) fn find_marks(&self) {
        if self.region.marks().iter().any(|cell| cell.load(Ordering::Relaxed) != 0) {
            self.has_marks.store(1, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::table::flow_map::FlowMapConfig;

    fn map() -> FlowMap {
        FlowMap::anonymous(FlowMapConfig { capacity: 1_024, ..FlowMapConfig::default() })
    }

    /// A different hash for each `i`.
    fn hash(i: u64) -> u64 {
        let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (z ^ z >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    #[test]
    fn a_mark_is_seen_for_its_time_whatever_else_is_marked() {
        let map = map();
        assert!(!map.is_marked(hash(1), 5_000, 300));
        (0..4_096).for_each(|i| map.mark(hash(i), 5_000));
        for i in 0..4_096 {
            assert!(map.is_marked(hash(i), 5_000, 300));
            assert!(map.is_marked(hash(i), 5_300, 300), "within its time");
            assert!(map.is_marked(hash(i), 4_990, 300), "by a worker whose clock is behind");
            assert!(!map.is_marked(hash(i), 5_332, 300), "after its time");
        }
    }

    #[test]
    fn few_look_marked_that_are_not() {
        let map = map();
        (0..1_024).for_each(|i| map.mark(hash(i), 5_000));
        let wrong = (10_000..20_000).filter(|i| map.is_marked(hash(*i), 5_000, 300)).count();
        println!("{wrong} of 10,000 look marked, with as many marks as flows");
        assert!((800..1_600).contains(&wrong), "{wrong}");
        // After their time none do.
        assert_eq!((10_000..20_000).filter(|i| map.is_marked(hash(*i), 15_000, 7_440)).count(), 0);
    }

    #[test]
    fn marks_outlive_the_process() {
        let file = tempfile::tempfile().unwrap();
        let config = FlowMapConfig { capacity: 64, ..FlowMapConfig::default() };
        let (map, _) = FlowMap::open(&file, config).unwrap();
        map.mark(hash(7), 100);
        drop(map);
        let (map, _) = FlowMap::open(&file, config).unwrap();
        assert!(map.is_marked(hash(7), 110, 60));
    }

    #[test]
    fn marks_come_along_to_another_capacity() {
        let (file, end) = (tempfile::tempfile().unwrap(), 500);
        let config = |capacity| FlowMapConfig { capacity, ..FlowMapConfig::default() };
        let (map, _) = FlowMap::open(&file, config(1_000)).unwrap();
        for odd in [0, 1] {
            (odd..end).step_by(2).for_each(|i| map.mark(hash(i), 1_000 + 160 * odd as u32));
        }
        drop(map);
        for capacity in [64, 999, 1_000, 1_001, 2_500] {
            let to = tempfile::tempfile().unwrap();
            FlowMap::copy(&file, &to, config(capacity)).unwrap();
            let (map, _) = FlowMap::open(&to, config(capacity)).unwrap();
            assert!(map.has_marks());
            for i in 0..end {
                assert!(
                    map.is_marked(hash(i), 1_000 + 160 * (i as u32 % 2), 60) || i % 2 == 0,
                    "{i} of {capacity}"
                );
                assert!(map.is_marked(hash(i), 1_160, 300), "{i} of {capacity}");
            }
        }
    }

    #[test]
    fn the_longest_time_is_no_overflow() {
        let map = map();
        map.mark(hash(1), 1_000);
        assert!(map.is_marked(hash(1), 1_000 + WITHIN_MAX_S, u32::MAX));
    }
}
