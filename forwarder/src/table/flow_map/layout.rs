//! What lies in the region: slots, buckets and records, all of them atomics.
//!
//! Nothing here is a pointer, so the region can be mapped anywhere and by the next process. A change of anything in this file is a
//! change of [`LAYOUT_VERSION`](super::region::LAYOUT_VERSION).

use super::hash::Packed;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use super::{Direction, NewFlow};
use crate::addr::{Addr, Tuple};

/// Slots in a bucket: one cache line of 64 bytes.
#[cfg(not(loom))]
pub(super) const WAYS: usize = 8;
/// Few enough that a model stays small.
#[cfg(loom)]
pub(super) const WAYS: usize = 2;

/// A cache line of slots.
#[repr(C, align(64))]
pub(super) struct Bucket {
    pub slots: [AtomicU64; WAYS],
}

/// What a slot holds: `tag:29 | extended:1 | reply:1 | used:1 | record:32`. Zero is an empty slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot(pub u64);

impl Slot {
    /// Set in every slot that is not empty.
    pub const USED: u64 = 1 << 32;
    const REPLY: u64 = 1 << 33;
    const EXTENDED: u64 = 1 << 34;
    const TAG_SHIFT: u32 = 35;
    /// What must be equal for a record to be worth a look.
    pub const MATCH: u64 = u64::MAX << Self::TAG_SHIFT | Self::USED;

    /// The bits under [`Self::MATCH`] that entries of `hash` have. The tag is the low part of the hash.
    #[inline]
    pub fn wanted(hash: u64) -> u64 {
        hash << Self::TAG_SHIFT | Self::USED
    }

    pub fn new(hash: u64, direction: Direction, extended: bool, record: u32) -> Slot {
        let reply = if direction == Direction::Reply { Self::REPLY } else { 0 };
        let extended = if extended { Self::EXTENDED } else { 0 };
        Slot(Self::wanted(hash) | reply | extended | u64::from(record))
    }

    #[inline]
    pub fn is_used(self) -> bool {
        self.0 & Self::USED != 0
    }

    #[inline]
    pub fn record(self) -> u32 {
        self.0 as u32
    }

    #[inline]
    pub fn direction(self) -> Direction {
        if self.0 & Self::REPLY == 0 { Direction::Original } else { Direction::Reply }
    }

    #[inline]
    pub fn is_extended(self) -> bool {
        self.0 & Self::EXTENDED != 0
    }
}

/// How far a record has come. The state word is the only truth: slots that lead to a record which is not live are as good as empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Life {
    /// In nobody's use, or on its way back there.
    Dead = 0,
    /// Being published: known to inserters only.
    Pending = 1,
    /// A flow.
    Live = 2,
    /// Removed by a control thread; a worker will take it out of the index.
    Condemned = 3,
}

/// The state word: `last_seen_s:32 | flags:16 | phase:4 | life:2 | incarnation:10`.
///
/// One word, so that removal and use of a flow cannot both succeed: whoever changes the word knows what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct State(pub u64);

impl State {
    const INCARNATION_BITS: u32 = 10;
    const LIFE_SHIFT: u32 = 10;
    const PHASE_SHIFT: u32 = 12;
    const FLAGS_SHIFT: u32 = 16;
    const SEEN_SHIFT: u32 = 32;

    #[inline]
    pub fn life(self) -> Life {
        match self.0 >> Self::LIFE_SHIFT & 3 {
            0 => Life::Dead,
            1 => Life::Pending,
            2 => Life::Live,
            _ => Life::Condemned,
        }
    }

    #[inline]
    pub fn is_live(self) -> bool {
        self.0 >> Self::LIFE_SHIFT & 3 == Life::Live as u64
    }

    /// Counts the uses of a record, modulo 1,024.
    #[inline]
    pub fn incarnation(self) -> u16 {
        (self.0 & ((1 << Self::INCARNATION_BITS) - 1)) as u16
    }

    #[inline]
    pub fn phase(self) -> u8 {
        (self.0 >> Self::PHASE_SHIFT & 15) as u8
    }

    #[inline]
    pub fn flags(self) -> u16 {
        (self.0 >> Self::FLAGS_SHIFT) as u16
    }

    #[inline]
    pub fn last_seen_s(self) -> u32 {
        (self.0 >> Self::SEEN_SHIFT) as u32
    }

    pub fn with_life(self, life: Life) -> State {
        State(self.0 & !(3 << Self::LIFE_SHIFT) | (life as u64) << Self::LIFE_SHIFT)
    }

    pub fn with_phase(self, phase: u8) -> State {
        State(self.0 & !(15 << Self::PHASE_SHIFT) | u64::from(phase & 15) << Self::PHASE_SHIFT)
    }

    pub fn with_flags(self, flags: u16) -> State {
        State(self.0 & !(0xffff << Self::FLAGS_SHIFT) | u64::from(flags) << Self::FLAGS_SHIFT)
    }

    pub fn with_last_seen_s(self, now_s: u32) -> State {
        State(self.0 & 0xffff_ffff | u64::from(now_s) << Self::SEEN_SHIFT)
    }

    /// The first state of the next use of this record.
    pub fn reborn(self, flow: &NewFlow, now_s: u32) -> State {
        let incarnation = (self.0 + 1) & ((1 << Self::INCARNATION_BITS) - 1);
        State(incarnation)
            .with_life(Life::Pending)
            .with_phase(flow.phase)
            .with_flags(flow.flags)
            .with_last_seen_s(now_s)
    }
}

/// A connection: one cache line for IPv4; the addresses of others are in the [`Extension`] of the same index.
///
/// Everything but `state` and `next_hop` is written while the record is pending and unpublished, and never again in that use. The tally
/// has a meaning in one process only: the next one gives flows tallies of its own before workers run.
#[repr(C, align(64))]
pub(super) struct Record {
    pub state: AtomicU64,
    /// By direction: source and destination, 32 bits each; unused with an extension.
    addrs: [AtomicU64; 2],
    /// By direction, original low: source and destination port.
    ports: AtomicU64,
    /// `timeout_s:32 | tally:20 | unused:2 | one_way:1 | extended:1 | protocol:8`, see the constants.
    shape: AtomicU64,
    service: AtomicU64,
    /// `created_s:32 | generation:32`.
    birth: AtomicU64,
    pub next_hop: [AtomicU32; 2],
}

/// The addresses of a flow that is not IPv4 throughout: by direction, source then destination, low word first.
#[repr(C, align(64))]
pub(super) struct Extension {
    words: [AtomicU64; 8],
}

const EXTENDED: u64 = 1 << 8;
const ONE_WAY: u64 = 1 << 9;
const TALLY_SHIFT: u32 = 12;
/// Tallies have 20 bits.
pub(super) const TALLIES_MAX: u32 = 1 << 20;
const TALLY: u64 = (TALLIES_MAX as u64 - 1) << TALLY_SHIFT;

/// The second tuple of a record: the reply, or of a one-way entry its endpoint as a source.
fn second_tuple(flow: &NewFlow) -> Tuple {
    flow.reply.unwrap_or(Tuple {
        src: flow.endpoint_addr,
        dst: if flow.endpoint_addr.is_v4() { Addr::v4(0) } else { Addr::UNSPECIFIED },
        src_port: flow.endpoint_port,
        dst_port: 0,
        protocol: flow.original.protocol,
    })
}

/// True if `flow` needs an [`Extension`].
pub(super) fn is_extended(flow: &NewFlow) -> bool {
    !(Packed::new(&flow.original).v4 && Packed::new(&second_tuple(flow)).v4)
}

impl Record {
    /// Writes everything but the state. The caller owns the record, which no slot leads to.
    pub fn fill(&self, extension: &Extension, flow: &NewFlow, now_s: u32) {
        let tuples = [Packed::new(&flow.original), Packed::new(&second_tuple(flow))];
        let extended = is_extended(flow);
        for (i, tuple) in tuples.iter().enumerate() {
            if extended {
                let words = [tuple.src, tuple.src >> 64, tuple.dst, tuple.dst >> 64];
                for (cell, word) in extension.words[4 * i..4 * i + 4].iter().zip(words) {
                    cell.store(word as u64, Ordering::Relaxed);
                }
            } else {
                self.addrs[i].store(tuple.v4_addrs(), Ordering::Relaxed);
            }
        }
        let ports = u64::from(tuples[1].ports) << 32 | u64::from(tuples[0].ports);
        self.ports.store(ports, Ordering::Relaxed);
        let shape = u64::from(flow.timeout_s) << 32
            | u64::from(flow.tally % TALLIES_MAX) << TALLY_SHIFT
            | if flow.reply.is_none() { ONE_WAY } else { 0 }
            | if extended { EXTENDED } else { 0 }
            | u64::from(flow.original.protocol);
        self.shape.store(shape, Ordering::Relaxed);
        self.service.store(flow.service, Ordering::Relaxed);
        self.birth.store(u64::from(now_s) << 32 | u64::from(flow.generation), Ordering::Relaxed);
        self.next_hop[0].store(0, Ordering::Relaxed);
        self.next_hop[1].store(0, Ordering::Relaxed);
    }

    /// Full comparison of one direction: no two flows are ever mixed for having one hash and tag.
    #[inline]
    pub fn has(&self, extension: &Extension, direction: Direction, tuple: &Packed) -> bool {
        let i = direction as usize;
        let shape = self.shape.load(Ordering::Relaxed);
        let ports = (self.ports.load(Ordering::Relaxed) >> (32 * i)) as u32;
        if ports != tuple.ports || shape as u8 != tuple.protocol {
            return false;
        }
        if shape & EXTENDED == 0 {
            return tuple.v4 && self.addrs[i].load(Ordering::Relaxed) == tuple.v4_addrs();
        }
        let (src, dst) = extension.addrs(direction);
        src == tuple.src && dst == tuple.dst
    }

    /// One of the two tuples; of a one-way entry [`Direction::Reply`] is its endpoint as a source.
    #[inline(always)]
    pub fn tuple(&self, extension: &Extension, direction: Direction) -> Tuple {
        let i = direction as usize;
        let shape = self.shape.load(Ordering::Relaxed);
        let ports = (self.ports.load(Ordering::Relaxed) >> (32 * i)) as u32;
        let (src, dst) = if shape & EXTENDED == 0 {
            let addrs = self.addrs[i].load(Ordering::Relaxed);
            (Addr::v4((addrs >> 32) as u32), Addr::v4(addrs as u32))
        } else {
            let (src, dst) = extension.addrs(direction);
            (Addr(src), Addr(dst))
        };
        Tuple { src, dst, src_port: (ports >> 16) as u16, dst_port: ports as u16, protocol: shape as u8 }
    }

    #[inline]
    pub fn is_one_way(&self) -> bool {
        self.shape.load(Ordering::Relaxed) & ONE_WAY != 0
    }

    #[inline]
    pub fn is_extended(&self) -> bool {
        self.shape.load(Ordering::Relaxed) & EXTENDED != 0
    }

    /// The timeout of its own, or 0.
    #[inline]
    pub fn timeout_s(&self) -> u32 {
        (self.shape.load(Ordering::Relaxed) >> 32) as u32
    }

    /// The tally that the flow counts towards, or 0.
    #[inline]
    pub fn tally(&self) -> u32 {
        ((self.shape.load(Ordering::Relaxed) & TALLY) >> TALLY_SHIFT) as u32
    }

    /// Changes the tally. While no worker runs.
    pub fn set_tally(&self, tally: u32) {
        let others = self.shape.load(Ordering::Relaxed) & !TALLY;
        self.shape.store(others | u64::from(tally % TALLIES_MAX) << TALLY_SHIFT, Ordering::Relaxed);
    }

    #[inline]
    pub fn service(&self) -> u64 {
        self.service.load(Ordering::Relaxed)
    }

    #[inline]
    pub fn created_s(&self) -> u32 {
        (self.birth.load(Ordering::Relaxed) >> 32) as u32
    }

    #[inline]
    pub fn generation(&self) -> u32 {
        self.birth.load(Ordering::Relaxed) as u32
    }

    #[inline]
    pub fn state(&self, order: Ordering) -> State {
        State(self.state.load(order))
    }

    /// Changes the state word if it is still `from`.
    #[inline]
    pub fn change(&self, from: State, to: State) -> Result<(), State> {
        match self.state.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(now) => Err(State(now)),
        }
    }
}

impl Extension {
    #[inline]
    fn addrs(&self, direction: Direction) -> (u128, u128) {
        let word = |i: usize| u128::from(self.words[4 * direction as usize + i].load(Ordering::Relaxed));
        (word(1) << 64 | word(0), word(3) << 64 | word(2))
    }
}

#[cfg(loom)]
mod modelled {
    use super::*;

    impl Default for Bucket {
        fn default() -> Bucket {
            Bucket { slots: std::array::from_fn(|_| AtomicU64::new(0)) }
        }
    }

    impl Default for Record {
        fn default() -> Record {
            let word = || AtomicU64::new(0);
            Record {
                state: word(),
                addrs: [word(), word()],
                ports: word(),
                shape: word(),
                service: word(),
                birth: word(),
                next_hop: [AtomicU32::new(0), AtomicU32::new(0)],
            }
        }
    }

    impl Default for Extension {
        fn default() -> Extension {
            Extension { words: std::array::from_fn(|_| AtomicU64::new(0)) }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_line() {
        assert_eq!(size_of::<Bucket>(), 64);
        assert_eq!(size_of::<Record>(), 64);
        assert_eq!(size_of::<Extension>(), 64);
    }

    #[test]
    fn the_parts_of_a_state_do_not_touch_each_other() {
        let state =
            State(0x3ff).with_life(Life::Live).with_phase(15).with_flags(0xffff).with_last_seen_s(u32::MAX);
        assert_eq!(state.0, u64::MAX ^ 1 << State::LIFE_SHIFT);
        assert_eq!(state.with_phase(0).flags(), 0xffff);
        assert_eq!(state.with_flags(0).phase(), 15);
        assert_eq!(state.with_last_seen_s(0).flags(), 0xffff);
        assert_eq!(state.with_life(Life::Dead).incarnation(), 0x3ff);
        assert_eq!(state.with_life(Life::Condemned).life(), Life::Condemned);
        let reborn = state.reborn(&NewFlow { phase: 3, flags: 5, ..NewFlow::default() }, 9);
        assert_eq!((reborn.incarnation(), reborn.life()), (0, Life::Pending));
        assert_eq!((reborn.phase(), reborn.flags(), reborn.last_seen_s()), (3, 5, 9));
    }
}
