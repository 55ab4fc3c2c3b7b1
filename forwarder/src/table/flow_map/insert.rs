//! Publication of a flow, and what happens when two workers publish the same tuple at once.

use super::hash::Packed;
use super::index::Place;
use super::layout::{Life, Record, Slot, State, is_extended};
use super::sync::{Ordering, fence};
use super::{Direction, FlowMap, FlowRef, FlowWorker, NewFlow, ONE_EMBRYONIC};

/// How often an insert looks at a pending rival in a lower slot before it strikes it out.
const PATIENCE: u32 = if cfg!(loom) { 1 } else { 64 };

/// Why a flow was not inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// Another flow has the reply tuple: its packets could not be told apart.
    #[error("another flow has the reply tuple")]
    ReplyTaken,
    /// No free record, or no free slot.
    #[error("the flow table is full")]
    Full,
    /// The share of embryonic flows is used up.
    #[error("the share of embryonic flows is used up")]
    EmbryonicFull,
}

/// The flow that has the original tuple now.
#[derive(Clone, Copy, Debug)]
pub struct Inserted<'m> {
    /// The flow.
    pub flow: FlowRef<'m>,
    /// Which of its tuples the original tuple of the new flow is. [`Direction::Original`] if `is_new`.
    pub direction: Direction,
    /// False if it was there already, or another worker was faster.
    pub is_new: bool,
}

/// A tuple to be published.
#[derive(Clone, Copy)]
struct End {
    direction: Direction,
    tuple: Packed,
    hash: u64,
}

/// Why an attempt did not make a flow.
enum Conflict {
    /// A live flow has the tuple of this direction.
    Taken(Direction, Slot),
    /// A rival struck this record out: try again.
    StruckOut,
    /// Both buckets are full.
    NoSlot,
}

impl FlowMap {
    /// Publishes a flow.
    ///
    /// If a flow with this original tuple is there or is published meanwhile, that one is returned. Lock-free: another thread that
    /// stops in the middle of an insert delays nobody. Cost: two to four cache misses.
    pub fn insert(
        &self,
        worker: &mut FlowWorker,
        new: &NewFlow,
        now_s: u32,
    ) -> Result<Inserted<'_>, InsertError> {
        let end = |direction, tuple| {
            let tuple = Packed::new(tuple);
            End { direction, tuple, hash: self.key.hash(&tuple) }
        };
        let original = end(Direction::Original, &new.original);
        let reply = new.reply.as_ref().map(|tuple| end(Direction::Reply, tuple));
        if reply.is_some_and(|reply| reply.tuple == original.tuple) {
            // Such a flow could not say which way its packets go.
            return Err(InsertError::ReplyTaken);
        }
        if let Some((slot, record)) = self.find(&original.tuple, original.hash, State::is_live) {
            return Ok(self.found(slot, record));
        }
        if let Some(reply) = &reply
            && let Some((slot, record)) = self.find(&reply.tuple, reply.hash, State::is_live)
        {
            return self.reply_taken(&original, slot, record);
        }
        let weight = self.weight(new.phase);
        self.reserve(weight)?;
        self.tally_up(new.tally);
        let result = self.publish(worker, new, now_s, reply.as_ref(), &original);
        if !result.is_ok_and(|inserted| inserted.is_new) {
            self.counts.fetch_sub(weight, Ordering::Relaxed);
            self.tally_down(new.tally);
        }
        result
    }

    fn found<'m>(&'m self, slot: Slot, record: &'m Record) -> Inserted<'m> {
        Inserted { flow: self.flow(slot.record(), record), direction: slot.direction(), is_new: false }
    }

    /// The reply tuple belongs to a live flow: perhaps to the one that another worker just made of the same packet.
    fn reply_taken<'m>(
        &'m self,
        original: &End,
        slot: Slot,
        record: &'m Record,
    ) -> Result<Inserted<'m>, InsertError> {
        let flow = self.flow(slot.record(), record);
        if slot.direction() == Direction::Reply && Packed::new(&flow.original()) == original.tuple {
            return Ok(Inserted { flow, direction: Direction::Original, is_new: false });
        }
        Err(InsertError::ReplyTaken)
    }

    /// Counts the flow before it exists, so that the share of embryonic flows is never exceeded, and nobody looks for a free record in
    /// a full map.
    fn reserve(&self, weight: u64) -> Result<(), InsertError> {
        let before = self.counts.fetch_add(weight, Ordering::Relaxed);
        if before as u32 >= self.config.capacity {
            self.counts.fetch_sub(weight, Ordering::Relaxed);
            return Err(InsertError::Full);
        }
        if weight >= ONE_EMBRYONIC && before >> 32 >= u64::from(self.embryonic_limit) {
            self.counts.fetch_sub(weight, Ordering::Relaxed);
            return Err(InsertError::EmbryonicFull);
        }
        Ok(())
    }

    fn publish(
        &self,
        worker: &mut FlowWorker,
        new: &NewFlow,
        now_s: u32,
        reply: Option<&End>,
        original: &End,
    ) -> Result<Inserted<'_>, InsertError> {
        let extended = is_extended(new);
        loop {
            let index = worker.keeping().allocate(&self.free).ok_or(InsertError::Full)?;
            if extended && !self.region.populate_extension(index) {
                worker.keeping().give_back(&self.free, index);
                return Err(InsertError::Full);
            }
            let record = &self.region.records()[index as usize];
            let pending = record.state(Ordering::Relaxed).reborn(new, now_s);
            // Before the words: a control thread that copies the last flow of this record sees that it is gone.
            record.state.store(pending.0, Ordering::Relaxed);
            fence(Ordering::Release);
            record.fill(&self.region.extensions()[index as usize], new, now_s);

            let conflict = reply
                .into_iter()
                .chain([original])
                .try_for_each(|end| self.publish_end(end, index, record, extended))
                .and_then(|()| {
                    record.change(pending, pending.with_life(Life::Live)).map_err(|_| Conflict::StruckOut)
                });
            let Err(conflict) = conflict else {
                let flow = self.flow(index, record);
                return Ok(Inserted { flow, direction: Direction::Original, is_new: true });
            };
            self.withdraw(worker, index, record, reply, original);
            match conflict {
                Conflict::StruckOut => {}
                Conflict::NoSlot => return Err(InsertError::Full),
                Conflict::Taken(Direction::Original, slot) => {
                    return Ok(self.found(slot, &self.region.records()[slot.record() as usize]));
                }
                Conflict::Taken(Direction::Reply, slot) => {
                    return self.reply_taken(original, slot, &self.region.records()[slot.record() as usize]);
                }
            }
        }
    }

    /// Sets one slot, then makes sure that no other record with this tuple is live or will be.
    fn publish_end(&self, end: &End, index: u32, record: &Record, extended: bool) -> Result<(), Conflict> {
        let slot = Slot::new(end.hash, end.direction, extended, index);
        let own = self.place(end.hash, slot).ok_or(Conflict::NoSlot)?;
        // Set the slot, then look: of two inserts that do so at least one sees the other.
        fence(Ordering::SeqCst);
        for round in 0..=PATIENCE {
            let mut live = None;
            let mut waiting = false;
            self.rivals(&end.tuple, end.hash, index, |place: Place, slot, rival| {
                let state = rival.state(Ordering::Acquire);
                match state.life() {
                    Life::Live => live = Some(slot),
                    // Both may see each other: the lower slot goes on, the higher one gives it some time.
                    Life::Pending if place < own && round < PATIENCE => waiting = true,
                    Life::Pending => match rival.change(state, state.with_life(Life::Dead)) {
                        Err(now) if now.is_live() && now.incarnation() == state.incarnation() => {
                            live = Some(slot)
                        }
                        _ => {}
                    },
                    Life::Dead | Life::Condemned => {}
                }
            });
            if let Some(slot) = live {
                return Err(Conflict::Taken(end.direction, slot));
            }
            if !waiting {
                return Ok(());
            }
            if record.state(Ordering::Acquire).life() != Life::Pending {
                return Err(Conflict::StruckOut);
            }
            #[cfg(loom)]
            ::loom::thread::yield_now();
            #[cfg(not(loom))]
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Takes back what is published of a record that will not be a flow.
    fn withdraw(
        &self,
        worker: &mut FlowWorker,
        index: u32,
        record: &Record,
        reply: Option<&End>,
        original: &End,
    ) {
        let dead = record.state(Ordering::Relaxed).with_life(Life::Dead);
        record.state.store(dead.0, Ordering::Release);
        for end in reply.into_iter().chain([original]) {
            self.unplace(end.hash, end.direction, index);
        }
        // Others may be looking at it.
        worker.keeping().retire(index);
    }
}
