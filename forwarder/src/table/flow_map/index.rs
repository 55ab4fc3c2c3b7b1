//! Slots: where a hash may lie, and how entries get in and out.

use super::hash::Packed;
use super::layout::{Bucket, Record, Slot, State, WAYS};
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

/// Some ways of a bucket, a bit each, from the lowest on.
#[derive(Clone, Copy)]
struct Ways(u32);

impl Ways {
    /// Those whose slots have the bits of `wanted` under `mask`; of both only the high halves count.
    #[inline]
    fn with(bucket: &Bucket, mask: u64, wanted: u64) -> Ways {
        debug_assert!((mask | wanted) & u64::from(u32::MAX) == 0, "the low half of a slot is its record");
        #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
        {
            use std::arch::x86_64::{
                __m128i, _mm_and_si128, _mm_castps_si128, _mm_castsi128_ps, _mm_cmpeq_epi32, _mm_movemask_ps,
                _mm_set1_epi32, _mm_shuffle_ps,
            };
            // SAFETY: SSE2 is part of x86-64. A bucket is four aligned vectors. Other threads may store slots meanwhile: each is an
            // aligned word of its half of a vector, which the processor reads whole, as a relaxed load would; volatile, so that the
            // compiler reads it here and once. What is found in a slot is loaded again before it is used.
            unsafe {
                let vectors = std::ptr::from_ref(bucket).cast::<__m128i>();
                let half = |at: usize| {
                    let (a, b) = (vectors.add(at).read_volatile(), vectors.add(at + 1).read_volatile());
                    let high = _mm_shuffle_ps::<0b11_01_11_01>(_mm_castsi128_ps(a), _mm_castsi128_ps(b));
                    let masked = _mm_and_si128(_mm_castps_si128(high), _mm_set1_epi32((mask >> 32) as i32));
                    let equal = _mm_cmpeq_epi32(masked, _mm_set1_epi32((wanted >> 32) as i32));
                    _mm_movemask_ps(_mm_castsi128_ps(equal)) as u32
                };
                Ways(half(0) | half(2) << 4)
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
        {
            let has = |cell: &super::sync::AtomicU64| cell.load(Ordering::Relaxed) & mask == wanted;
            let ways = bucket.slots.iter().enumerate();
            Ways(ways.fold(0, |ways, (way, cell)| ways | u32::from(has(cell)) << way))
        }
    }

    /// Those that are in use.
    #[inline]
    fn used(bucket: &Bucket) -> Ways {
        Ways::with(bucket, Slot::USED, Slot::USED)
    }

    fn count(self) -> usize {
        self.0.count_ones() as usize
    }
}

impl Iterator for Ways {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let way = (self.0 != 0).then(|| self.0.trailing_zeros())?;
        self.0 &= self.0 - 1;
        Some(way as usize)
    }
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
        let bucket = &self.region.buckets()[bucket];
        let mut slots = Ways::with(bucket, Slot::MATCH, wanted)
            .map(|way| Slot(bucket.slots[way].load(Ordering::Acquire)));
        slots.find(|slot| slot.0 & Slot::MATCH == wanted)
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
            let bucket = &self.region.buckets()[bucket];
            for way in Ways::with(bucket, Slot::MATCH, probe.wanted) {
                let slot = Slot(bucket.slots[way].load(Ordering::Acquire));
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
            let slots = &self.region.buckets()[bucket].slots;
            for way in Ways::with(&self.region.buckets()[bucket], Slot::MATCH, probe.wanted) {
                let slot = Slot(slots[way].load(Ordering::Acquire));
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
        let used = |bucket: usize| Ways::used(&buckets[bucket]).count();
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
            for way in Ways::with(&buckets[bucket], Slot::USED, 0) {
                if buckets[bucket].slots[way]
                    .compare_exchange(0, slot.0, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
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
