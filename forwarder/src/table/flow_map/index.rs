//! Slots: where a hash may lie, and how entries get in and out.

use super::hash::Packed;
use super::layout::{Record, Slot, State, WAYS};
use super::sync::Ordering;
use super::{Direction, FlowMap};

/// The first bucket of a hash is taken while it has fewer entries than this, so that most lookups need one line; then the emptier of
/// the two. In a full map 73 % lie in the first bucket (62 % if the emptier is always taken), in a half-full one nearly all.
const FIRST_BELOW: usize = if WAYS == 8 { 5 } else { 1 };

/// Where a hash may lie.
#[derive(Clone, Copy)]
pub(super) struct Probe {
    pub first: usize,
    pub second: usize,
    /// The bits under [`Slot::MATCH`].
    pub wanted: u64,
}

/// A bucket and a slot in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    pub bucket: usize,
    pub way: usize,
}

impl FlowMap {
    /// The first bucket comes from the high half of the hash, the second one from the first and the tag: so entries of one bucket
    /// have independent tags, whichever of the two it is to them.
    #[inline]
    pub(super) fn probe(&self, hash: u64) -> Probe {
        let buckets = self.region.buckets().len() as u64;
        let first = ((hash >> 32) * buckets) >> 32;
        let spread = u64::from((hash as u32 & 0x1fff_ffff).wrapping_mul(0x9e37_79b1));
        let step = 1 + ((spread * (buckets - 1)) >> 32);
        let second = if first + step >= buckets { first + step - buckets } else { first + step };
        Probe { first: first as usize, second: second as usize, wanted: Slot::wanted(hash) }
    }

    /// The first slot of a bucket with the wanted bits.
    #[inline]
    pub(super) fn first_match(&self, bucket: usize, wanted: u64) -> Option<Slot> {
        let slots = &self.region.buckets()[bucket].slots;
        slots.iter().map(|s| Slot(s.load(Ordering::Acquire))).find(|s| s.0 & Slot::MATCH == wanted)
    }

    /// The record that has `tuple` in the direction of the slot, in a state that is `accepted`.
    #[inline]
    pub(super) fn find(
        &self,
        tuple: &Packed,
        hash: u64,
        accepted: impl Fn(State) -> bool,
    ) -> Option<(Slot, &Record)> {
        let probe = self.probe(hash);
        for bucket in [probe.first, probe.second] {
            for cell in &self.region.buckets()[bucket].slots {
                let slot = Slot(cell.load(Ordering::Acquire));
                if slot.0 & Slot::MATCH == probe.wanted
                    && let Some(record) = self.matching(slot, tuple)
                    && accepted(record.state(Ordering::Acquire))
                {
                    return Some((slot, record));
                }
            }
        }
        None
    }

    /// The record of a slot if it has `tuple` in the slot's direction.
    #[inline]
    pub(super) fn matching(&self, slot: Slot, tuple: &Packed) -> Option<&Record> {
        let index = slot.record() as usize;
        // A damaged region may hold any index; it must cost a flow, not the process.
        let (record, extension) = (self.region.records().get(index)?, self.region.extensions().get(index)?);
        record.has(extension, slot.direction(), tuple).then_some(record)
    }

    /// Every other entry of `tuple` than those of record `own`, in whatever state, with its place.
    pub(super) fn rivals(
        &self,
        tuple: &Packed,
        hash: u64,
        own: u32,
        mut each: impl FnMut(Place, Slot, &Record),
    ) {
        let probe = self.probe(hash);
        for bucket in [probe.first, probe.second] {
            for (way, cell) in self.region.buckets()[bucket].slots.iter().enumerate() {
                let slot = Slot(cell.load(Ordering::Acquire));
                if slot.0 & Slot::MATCH == probe.wanted
                    && slot.record() != own
                    && let Some(record) = self.matching(slot, tuple)
                {
                    each(Place { bucket, way }, slot, record);
                }
            }
        }
    }

    /// Puts `slot` into one of the two buckets of its hash; None if both are full.
    pub(super) fn place(&self, hash: u64, slot: Slot) -> Option<Place> {
        let probe = self.probe(hash);
        let buckets = self.region.buckets();
        let used = |bucket: usize| {
            let slots = &buckets[bucket].slots;
            slots.iter().filter(|s| s.load(Ordering::Relaxed) != 0).count()
        };
        loop {
            let first = used(probe.first);
            let bucket = if first < FIRST_BELOW {
                probe.first
            } else {
                let second = used(probe.second);
                if first >= WAYS && second >= WAYS {
                    return None;
                }
                if second < first { probe.second } else { probe.first }
            };
            for (way, cell) in buckets[bucket].slots.iter().enumerate() {
                if cell.load(Ordering::Relaxed) == 0
                    && cell.compare_exchange(0, slot.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                {
                    return Some(Place { bucket, way });
                }
            }
            // Others filled the bucket meanwhile: look again. Each round means that somebody else got on.
        }
    }

    /// Clears the slot of `record` in `direction`, if it has one. Only the owner of a dead record may call this.
    pub(super) fn unplace(&self, hash: u64, direction: Direction, record: u32) {
        let probe = self.probe(hash);
        let exact =
            !(Slot::new(0, Direction::Original, true, 0).0 ^ Slot::new(0, Direction::Original, false, 0).0);
        let wanted = Slot::new(hash, direction, false, record).0;
        for bucket in [probe.first, probe.second] {
            for cell in &self.region.buckets()[bucket].slots {
                if cell.load(Ordering::Relaxed) & exact == wanted {
                    cell.store(0, Ordering::Release);
                    return;
                }
            }
        }
    }
}
