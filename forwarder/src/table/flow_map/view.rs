//! What callers see of a flow.

use std::fmt;

use super::layout::{Extension, Life, Record, State};
use super::sync::{Ordering, fence};
use super::{Direction, FlowMap, ONE_EMBRYONIC};
use crate::addr::{Addr, Tuple};

/// Names one flow: a record and which of its uses, so that a later flow in the same record is not mistaken for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowId {
    index: u32,
    incarnation: u16,
}

impl FlowId {
    /// Below the capacity of the map.
    #[inline]
    pub fn index(self) -> u32 {
        self.index
    }

    pub(super) fn incarnation(self) -> u16 {
        self.incarnation
    }
}

/// A slot that most likely leads to the flow of a hash; by default none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Candidate(pub(super) u64);

/// A flow and which way the packet goes.
#[derive(Clone, Copy, Debug)]
pub struct Hit<'m> {
    /// Which tuple of the flow was looked up.
    pub direction: Direction,
    /// The flow.
    pub flow: FlowRef<'m>,
}

impl Hit<'_> {
    /// What the packet must become: the reverse of what comes back. None for a one-way entry.
    #[inline(always)]
    pub fn translated(&self) -> Option<Tuple> {
        match self.direction {
            Direction::Original => self.flow.reply().map(|tuple| tuple.reversed()),
            Direction::Reply => Some(self.flow.original().reversed()),
        }
    }
}

/// A flow. Workers may hold it until their next quiescent state; what it says of a flow that was removed meanwhile stays true until then.
#[derive(Clone, Copy)]
pub struct FlowRef<'m> {
    map: &'m FlowMap,
    index: u32,
    record: &'m Record,
}

impl fmt::Debug for FlowRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flow {} ({})", self.index, self.original())
    }
}

impl FlowRef<'_> {
    #[inline]
    fn state(&self) -> State {
        self.record.state(Ordering::Relaxed)
    }

    #[inline]
    fn extension(&self) -> &Extension {
        &self.map.region.extensions()[self.index as usize]
    }

    /// Its name.
    #[inline]
    pub fn id(&self) -> FlowId {
        FlowId { index: self.index, incarnation: self.state().incarnation() }
    }

    /// The client's packets as they come in.
    #[inline(always)]
    pub fn original(&self) -> Tuple {
        self.record.tuple(self.extension(), Direction::Original)
    }

    /// The endpoint's packets as they come in; None for a one-way entry.
    #[inline(always)]
    pub fn reply(&self) -> Option<Tuple> {
        (!self.record.is_one_way()).then(|| self.record.tuple(self.extension(), Direction::Reply))
    }

    /// Where the flow leads: the source of its replies, or the value of a one-way entry.
    #[inline]
    pub fn endpoint(&self) -> (Addr, u16) {
        let tuple = self.record.tuple(self.extension(), Direction::Reply);
        (tuple.src, tuple.src_port)
    }

    /// Chooses the timeout; the caller's meaning.
    #[inline]
    pub fn phase(&self) -> u8 {
        self.state().phase()
    }

    /// Changes the phase, below 16, and with it the timeout. Nothing happens to a flow that was removed meanwhile.
    pub fn set_phase(&self, phase: u8) {
        if let Ok(before) = self.update(|state| state.with_phase(phase)) {
            self.map.count_phase(before.phase(), phase);
        }
    }

    /// As [`Self::set_phase`], if the phase is still `from`: another thread may have decided otherwise meanwhile.
    pub fn change_phase(&self, from: u8, to: u8) {
        let changed = self.update(|state| if state.phase() == from { state.with_phase(to) } else { state });
        if let Ok(before) = changed
            && before.phase() == from
        {
            self.map.count_phase(from, to);
        }
    }

    /// The caller's flags.
    #[inline]
    pub fn flags(&self) -> u16 {
        self.state().flags()
    }

    /// Sets the flags that have their bit in `bits`.
    pub fn set_flags(&self, bits: u16) {
        let _ = self.update(|state| state.with_flags(state.flags() | bits));
    }

    /// The flow was seen: it writes only if the last time is a second old, so a busy flow's line stays shared.
    #[inline]
    pub fn touch(&self, now_s: u32) {
        if now_s.wrapping_sub(self.state().last_seen_s()) as i32 > 0 {
            self.touch_late(now_s);
        }
    }

    #[cold]
    fn touch_late(&self, now_s: u32) {
        let _ = self.update(|state| {
            let is_newer = now_s.wrapping_sub(state.last_seen_s()) as i32 > 0;
            if is_newer { state.with_last_seen_s(now_s) } else { state }
        });
    }

    /// Changes the state word of a live flow; returns what it was. Err if the flow is gone.
    fn update(&self, change: impl Fn(State) -> State) -> Result<State, State> {
        let mut state = self.record.state(Ordering::Relaxed);
        loop {
            if !state.is_live() {
                return Err(state);
            }
            let wanted = change(state);
            if wanted == state {
                return Ok(state);
            }
            match self.record.change(state, wanted) {
                Ok(()) => return Ok(state),
                Err(now) => state = now,
            }
        }
    }

    /// When the flow was last touched.
    #[inline]
    pub fn last_seen_s(&self) -> u32 {
        self.state().last_seen_s()
    }

    /// When it was inserted.
    #[inline]
    pub fn created_s(&self) -> u32 {
        self.record.created_s()
    }

    /// The timeout of its own, seconds, or 0.
    #[inline]
    pub fn timeout_s(&self) -> u32 {
        self.record.timeout_s()
    }

    /// Stable id of the service port.
    #[inline]
    pub fn service(&self) -> u64 {
        self.record.service()
    }

    /// Generation of the tables that it was made under.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.record.generation()
    }

    /// The cached next hop of a direction, 0 at first. The map does not know what it means.
    #[inline]
    pub fn next_hop(&self, direction: Direction) -> u32 {
        self.record.next_hop[direction as usize].load(Ordering::Relaxed)
    }

    /// Caches a next hop.
    #[inline]
    pub fn set_next_hop(&self, direction: Direction, next_hop: u32) {
        self.record.next_hop[direction as usize].store(next_hop, Ordering::Relaxed);
    }
}

/// A copy of a flow for control threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowSnapshot {
    /// For [`FlowMap::remove_from_control`].
    pub id: FlowId,
    /// See [`FlowRef::original`].
    pub original: Tuple,
    /// See [`FlowRef::reply`].
    pub reply: Option<Tuple>,
    /// See [`FlowRef::phase`].
    pub phase: u8,
    /// See [`FlowRef::flags`].
    pub flags: u16,
    /// Seconds of idleness that the flow is allowed, its own or its phase's.
    pub timeout_s: u32,
    /// See [`FlowRef::last_seen_s`].
    pub last_seen_s: u32,
    /// See [`FlowRef::created_s`].
    pub created_s: u32,
    /// See [`FlowRef::service`].
    pub service: u64,
    /// See [`FlowRef::endpoint`].
    pub endpoint_addr: Addr,
    /// See [`FlowRef::endpoint`].
    pub endpoint_port: u16,
    /// See [`FlowRef::generation`].
    pub generation: u32,
}

impl FlowMap {
    #[inline]
    pub(super) fn flow<'m>(&'m self, index: u32, record: &'m Record) -> FlowRef<'m> {
        FlowRef { map: self, index, record }
    }

    /// Counts a live flow that went from one phase to another.
    fn count_phase(&self, from: u8, to: u8) {
        match (self.is_embryonic(from), self.is_embryonic(to)) {
            (true, false) => self.counts.fetch_sub(ONE_EMBRYONIC, Ordering::Relaxed),
            (false, true) => self.counts.fetch_add(ONE_EMBRYONIC, Ordering::Relaxed),
            _ => 0,
        };
    }

    /// Changes the phase of a flow from a control thread. Returns false if the flow is gone.
    pub fn set_phase_from_control(&self, flow: FlowId, phase: u8) -> bool {
        let Some(record) = self.region.records().get(flow.index as usize) else { return false };
        let mut state = record.state(Ordering::Acquire);
        while state.is_live() && state.incarnation() == flow.incarnation {
            match record.change(state, state.with_phase(phase)) {
                Ok(()) => {
                    self.count_phase(state.phase(), phase);
                    return true;
                }
                Err(now) => state = now,
            }
        }
        false
    }

    /// Has a flow count towards `tally`, after a restart: flows that were found again count towards none. While no worker runs.
    pub fn assign_tally(&self, flow: FlowId, tally: u32) {
        let Some(record) = self.region.records().get(flow.index as usize) else { return };
        let state = record.state(Ordering::Acquire);
        if state.is_live() && state.incarnation() == flow.incarnation {
            self.tally_down(record.tally());
            record.set_tally(tally);
            self.tally_up(tally);
        }
    }

    /// A copy of the flow in record `index`, below the capacity, if there is one: whole, never half of one flow and half of another.
    ///
    /// Any thread, no worker is disturbed. A dump goes over all indexes; it has each flow that lived throughout exactly once.
    pub fn snapshot(&self, index: u32) -> Option<FlowSnapshot> {
        let record = self.region.records().get(index as usize)?;
        let state = record.state(Ordering::Acquire);
        if state.life() != Life::Live {
            return None;
        }
        let flow = self.flow(index, record);
        let own = record.timeout_s();
        let endpoint = flow.endpoint();
        let snapshot = FlowSnapshot {
            id: FlowId { index, incarnation: state.incarnation() },
            original: flow.original(),
            reply: flow.reply(),
            phase: state.phase(),
            flags: state.flags(),
            timeout_s: if own == 0 { self.config.timeouts_s[usize::from(state.phase())] } else { own },
            last_seen_s: state.last_seen_s(),
            created_s: record.created_s(),
            service: record.service(),
            endpoint_addr: endpoint.0,
            endpoint_port: endpoint.1,
            generation: record.generation(),
        };
        // An insert changes the state before it writes any word: if the incarnation is the same, so were the words.
        fence(Ordering::Acquire);
        let after = record.state(Ordering::Relaxed);
        (after.incarnation() == state.incarnation()).then_some(snapshot)
    }
}
