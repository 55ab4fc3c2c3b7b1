//! Removal: by a worker, by ageing, by a control thread.

use super::hash::Packed;
use super::layout::{Life, Record, State};
use super::sync::Ordering;
use super::{Direction, FlowId, FlowMap, FlowWorker};

/// Room that ageing leaves in a worker's list of removed records for the removals that packets cause.
const ROOM_FOR_PACKETS: usize = 1024;

impl FlowMap {
    /// Removes a flow that this worker found in this burst. Nothing happens if it is gone already.
    pub fn remove(&self, worker: &mut FlowWorker, flow: FlowId) {
        let Some(record) = self.region.records().get(flow.index() as usize) else { return };
        if !worker.keeping().has_room(1) {
            // Another worker holds up reuse: let ageing come back to it.
            self.remove_from_control(flow);
            return;
        }
        let mut state = record.state(Ordering::Acquire);
        while matches!(state.life(), Life::Live | Life::Condemned)
            && state.incarnation() == flow.incarnation()
        {
            match self.kill(worker, flow.index(), record, state) {
                Ok(()) => return,
                Err(now) => state = now,
            }
        }
    }

    /// Takes a flow out of use from any thread; a worker's ageing then takes it out of the index. Returns false if it is gone already.
    ///
    /// Lookups miss the flow from this moment on.
    pub fn remove_from_control(&self, flow: FlowId) -> bool {
        let Some(record) = self.region.records().get(flow.index() as usize) else { return false };
        let mut state = record.state(Ordering::Acquire);
        while state.is_live() && state.incarnation() == flow.incarnation() {
            // Read first: once it is condemned, a worker may make another flow of the record.
            let tally = record.tally();
            match record.change(state, state.with_life(Life::Condemned)) {
                Ok(()) => {
                    self.counts.fetch_sub(self.weight(state.phase()), Ordering::Relaxed);
                    self.tally_down(tally);
                    return true;
                }
                Err(now) => state = now,
            }
        }
        false
    }

    /// Looks at the next `count` records of this worker's share and removes those that have been idle for longer than their timeout.
    ///
    /// To be called every burst or every millisecond: the work is bounded by `count`, however many flows expire at once (64 records:
    /// about 0.2 us without removals, 20 us with 64 of them). Stretches of free records are skipped 64 at a step. Returns how
    /// many flows it removed, those removed by control threads included. A whole round takes `capacity / workers / count` calls.
    pub fn age(&self, worker: &mut FlowWorker, now_s: u32, count: usize) -> usize {
        let words = self.free.words();
        let workers = self.config.workers;
        let start = (words * worker.index / workers * 64) as u32;
        let end = ((words * (worker.index + 1) / workers * 64) as u32).min(self.config.capacity);
        if start >= end {
            return 0;
        }
        let mut cursor = worker.keeping().cursor;
        let mut removed = 0;
        for _ in 0..count.min((end - start) as usize) {
            if !(start..end).contains(&cursor) {
                cursor = start;
            }
            if cursor.is_multiple_of(64) && self.free.is_all_free(cursor as usize / 64) {
                cursor += 64;
                continue;
            }
            if !worker.keeping().has_room(ROOM_FOR_PACKETS) {
                break;
            }
            removed += usize::from(self.age_one(worker, cursor, now_s));
            cursor += 1;
        }
        worker.keeping().cursor = cursor;
        removed
    }

    fn age_one(&self, worker: &mut FlowWorker, index: u32, now_s: u32) -> bool {
        let record = &self.region.records()[index as usize];
        let state = record.state(Ordering::Acquire);
        let is_over = match state.life() {
            Life::Dead | Life::Pending => false,
            Life::Condemned => true,
            Life::Live => {
                let own = record.timeout_s();
                let timeout_s =
                    if own == 0 { self.config.timeouts_s[usize::from(state.phase())] } else { own };
                match now_s.wrapping_sub(state.last_seen_s()) as i32 {
                    // Seen by a worker that read the clock later. Far in the future: the region is older than this boot, so the idle
                    // time starts now.
                    idle_s if idle_s < -60 => {
                        let _ = record.change(state, state.with_last_seen_s(now_s));
                        false
                    }
                    idle_s if idle_s < 0 => false,
                    idle_s => idle_s as u32 > timeout_s,
                }
            }
        };
        // If it was touched meanwhile, the state word has changed and the flow stays.
        is_over && self.kill(worker, index, record, state).is_ok()
    }

    /// Ends a live or condemned flow if its state is still `from`, and takes it out of the index.
    fn kill(&self, worker: &mut FlowWorker, index: u32, record: &Record, from: State) -> Result<(), State> {
        record.change(from, from.with_life(Life::Dead))?;
        if from.is_live() {
            self.counts.fetch_sub(self.weight(from.phase()), Ordering::Relaxed);
            self.tally_down(record.tally());
        }
        let extension = &self.region.extensions()[index as usize];
        for direction in [Direction::Original, Direction::Reply] {
            if direction == Direction::Original || !record.is_one_way() {
                let tuple = Packed::new(&record.tuple(extension, direction));
                self.unplace(self.key.hash(&tuple), direction, index);
            }
        }
        worker.keeping().retire(index);
        Ok(())
    }
}
