//! After a restart: what the last process left in the region becomes a map again.

use std::fs::File;

use super::hash::Packed;
use super::layout::{Life, Slot, State};
use super::sync::Ordering;
use super::{Direction, FlowMap, FlowMapConfig, FlowMapError, Header, NewFlow, Recovery};

/// A bit a record.
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: usize) -> Bits {
        Bits(vec![0; len.div_ceil(64)])
    }

    fn get(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 != 0
    }

    /// Sets a bit; false if it was set.
    fn set(&mut self, i: usize) -> bool {
        let (word, bit) = (&mut self.0[i / 64], 1 << (i % 64));
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }
}

impl FlowMap {
    /// Capacity of the region in `file`; `None` if there is none that could be gone on with.
    pub fn capacity_of(file: &File) -> Option<u32> {
        Header::read(file).ok().map(|header| header.sizes.records)
    }

    /// Copies the flows and the marks of the region in `old`, of whatever capacity, into `new`, whose contents are replaced by a region of the
    /// capacity of `config`. Flows that are not embryonic go first, in case there is less room.
    ///
    /// The flows in `old` stay: until the caller puts `new` in its place, a process that is killed has lost nothing. Nobody else may
    /// have either open.
    pub fn copy(old: &File, new: &File, config: FlowMapConfig) -> Result<Recovery, FlowMapError> {
        let from = FlowMap::capacity_of(old).unwrap_or(config.capacity);
        // Marks go by the hash, so the key must stay.
        let key = Header::read(old).ok().map(|header| header.key);
        let (old, recovery) = FlowMap::open(old, FlowMapConfig { capacity: from, ..config })?;
        let mut flows: Vec<(NewFlow, u32, u32)> = (0..from).filter_map(|index| old.to_move(index)).collect();
        flows.sort_by_key(|(flow, ..)| old.is_embryonic(flow.phase));
        let marks = old.marks();
        drop(old);
        new.set_len(0).map_err(FlowMapError::file("empty"))?;
        let (map, _) = FlowMap::open_or_new(new, config, key)?;
        map.set_marks(&marks);
        let mut worker = map.worker(0);
        for (flow, created_s, last_seen_s) in &flows {
            if let Ok(inserted) = map.insert(&mut worker, flow, *created_s) {
                inserted.flow.touch(*last_seen_s);
            }
        }
        drop(worker);
        let kept = map.len() as u32;
        let left_out = flows.len() as u32 - kept;
        Ok(Recovery { kept, left_out, ..recovery })
    }

    /// The flow in record `index` with the times of its birth and its last packet. Cached next hops stay behind.
    fn to_move(&self, index: u32) -> Option<(NewFlow, u32, u32)> {
        let flow = self.snapshot(index)?;
        let new = NewFlow {
            original: flow.original,
            reply: flow.reply,
            phase: flow.phase,
            timeout_s: self.region.records()[index as usize].timeout_s(),
            service: flow.service,
            endpoint_addr: flow.endpoint_addr,
            endpoint_port: flow.endpoint_port,
            generation: flow.generation,
            flags: flow.flags,
            tally: 0,
        };
        Some((new, flow.created_s, flow.last_seen_s))
    }

    /// Keeps live records, frees all others and makes the slots agree. Nobody else uses the region yet.
    ///
    /// Two sequential passes, over state words and over slots; a bit a record in between stays in the cache.
    pub(super) fn recover(&mut self) -> Recovery {
        let mut recovery = Recovery::default();
        let live = self.sort_records(&mut recovery);
        let linked = self.sweep_slots(&live, &mut recovery);
        self.relink(&live, &linked, &mut recovery);
        self.find_marks();
        recovery
    }

    fn sort_records(&mut self, recovery: &mut Recovery) -> Bits {
        let records = self.region.records();
        let mut live = Bits::new(records.len());
        let mut counts = 0;
        for (word, chunk) in records.chunks(64).enumerate() {
            let mut free = 0u64;
            for (i, record) in chunk.iter().enumerate() {
                let state = record.state(Ordering::Relaxed);
                match state.life() {
                    Life::Live => {
                        live.set(word * 64 + i);
                        recovery.kept += 1;
                        counts += self.weight(state.phase());
                        if record.tally() != 0 {
                            record.set_tally(0);
                        }
                        continue;
                    }
                    Life::Pending | Life::Condemned => {
                        recovery.scrubbed += 1;
                        record.state.store(state.with_life(Life::Dead).0, Ordering::Relaxed);
                    }
                    Life::Dead => {}
                }
                free |= 1 << i;
            }
            self.free.release(word, free);
        }
        self.counts.store(counts, Ordering::Relaxed);
        live
    }

    /// Clears slots that lead to no live record or lead there a second time; returns which records have their slot, by direction.
    fn sweep_slots(&self, live: &Bits, recovery: &mut Recovery) -> [Bits; 2] {
        let records = self.region.records().len();
        let mut linked = [Bits::new(records), Bits::new(records)];
        for cell in self.region.buckets().iter().flat_map(|bucket| &bucket.slots) {
            let slot = Slot(cell.load(Ordering::Relaxed));
            let record = slot.record() as usize;
            if slot.0 == 0 {
                continue;
            }
            let is_good = slot.is_used()
                && record < records
                && live.get(record)
                && linked[slot.direction() as usize].set(record);
            if !is_good {
                cell.store(0, Ordering::Relaxed);
                recovery.cleared_slots += 1;
            }
        }
        linked
    }

    /// Gives live records the slots that they lack. Slots are never missing unless the region was damaged.
    fn relink(&self, live: &Bits, linked: &[Bits; 2], recovery: &mut Recovery) {
        let (records, extensions) = (self.region.records(), self.region.extensions());
        for (word, bits) in live.0.iter().enumerate() {
            let complete = linked[0].0[word] & linked[1].0[word];
            let mut suspects = bits & !complete;
            while suspects != 0 {
                let index = word * 64 + suspects.trailing_zeros() as usize;
                suspects &= suspects - 1;
                let record = &records[index];
                for direction in [Direction::Original, Direction::Reply] {
                    let is_needed = direction == Direction::Original || !record.is_one_way();
                    if !is_needed || linked[direction as usize].get(index) {
                        continue;
                    }
                    let tuple = Packed::new(&record.tuple(&extensions[index], direction));
                    let hash = self.key.hash(&tuple);
                    let slot = Slot::new(hash, direction, record.is_extended(), index as u32);
                    if self.find(&tuple, hash, State::is_live).is_none() && self.place(hash, slot).is_some() {
                        recovery.relinked += 1;
                    }
                }
            }
        }
    }
}
