//! Datagrams whose fragments are not all here yet. They are not put together: once all are here they go on as they came, in order,
//! so that a translation can be found for the whole datagram (RFC 3022 section 6.3, as nf_defrag_ipv4 and nf_defrag_ipv6 of Linux).
//!
//! | what comes | what happens |
//! | --- | --- |
//! | a fragment whose bytes are all there already, the same | it is dropped |
//! | any other overlap, another end, bytes behind the end | the datagram is dropped (RFC 5722) |
//! | an empty fragment, one in the middle that is no multiple of 8 bytes, one that ends beyond 65,535 bytes | the datagram is dropped |
//! | too many fragments, frames or datagrams | the datagram that has waited for longest is dropped |
//! | nothing more, for `[fragments] ipv4_s` or `ipv6_s` seconds after the first to come | the datagram is dropped |
//!
//! Memory is bounded and taken at the start; what grows later is only the list of a datagram with many fragments, up to [`BURST`].

use std::collections::{HashMap, VecDeque};

use config::gateway::FragmentsSection;

use super::batch::Batch;
use crate::addr::{Addr, Tuple};
use crate::packet::{BURST, Datagram, Fragment, Packet, Part};
use crate::port::Frame;
use crate::verdict::Reason;
use crate::wire::ipv6;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// Fragments of a datagram that its list holds without growing: 9,000 bytes over links of 1,500.
const FEW: usize = 8;
/// No slot.
const NONE: u32 = u32::MAX;

/// What a worker may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Frames of packet memory.
    pub frames: usize,
    /// Datagrams, at least one.
    pub datagrams: usize,
    /// How long fragments of IPv4 wait, nanoseconds.
    pub ipv4_ns: u64,
    /// How long fragments of IPv6 wait, nanoseconds.
    pub ipv6_ns: u64,
}

impl From<&FragmentsSection> for Limits {
    fn from(section: &FragmentsSection) -> Limits {
        Limits {
            frames: section.frames as usize,
            datagrams: section.datagrams as usize,
            ipv4_ns: u64::from(section.ipv4_s) * SECOND_NS,
            ipv6_ns: u64::from(section.ipv6_s) * SECOND_NS,
        }
    }
}

/// What the fragments of a datagram have in common (RFC 791 section 3.2, RFC 8200 section 4.5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    src: Addr,
    dst: Addr,
    id: u32,
    /// 0 for IPv6, where only the first fragment says it.
    protocol: u8,
}

impl Key {
    /// The key of `fragment`, which is what the headers say of `packet`.
    pub fn of(packet: &Packet, fragment: Fragment) -> Key {
        let tuple = &packet.tuple;
        let protocol = if tuple.src.is_v4() { tuple.protocol } else { 0 };
        Key { src: tuple.src, dst: tuple.dst, id: fragment.id, protocol }
    }
}

/// A fragment that waits.
struct Piece {
    frame: Frame,
    /// Its further segments; does not allocate without any.
    tails: Vec<Frame>,
    tail_len: u32,
    port: u8,
    /// See [`Packet::id`].
    id: u64,
    dont_fragment: bool,
    ip_len: u16,
    /// Where its data begins in the frame.
    data: u16,
    /// Where the data belongs in the datagram.
    offset: u16,
    /// Bytes of data.
    len: u16,
}

impl Piece {
    fn new(packet: Packet, tails: impl Iterator<Item = Frame>, fragment: Fragment) -> Piece {
        Piece {
            len: data_len(&packet, fragment) as u16,
            offset: fragment.offset,
            data: fragment.data,
            ip_len: packet.ip_len,
            dont_fragment: packet.dont_fragment,
            port: packet.port,
            id: packet.id,
            tail_len: packet.tail_len,
            frame: packet.frame,
            tails: tails.collect(),
        }
    }

    /// The packet again, with as much of what was found out about it as its key holds.
    fn into_packet(self, key: &Key) -> (Packet, Vec<Frame>) {
        let tuple = Tuple { src: key.src, dst: key.dst, protocol: key.protocol, ..Tuple::default() };
        let packet = Packet::new(self.frame, self.tail_len, self.port);
        (Packet { id: self.id, tuple, out: tuple, ..packet }, self.tails)
    }

    fn end(&self) -> u16 {
        self.offset + self.len
    }

    fn frames(&self) -> usize {
        1 + self.tails.len()
    }

    /// The data from byte `from` of the datagram on, in as many slices as it lies in.
    fn data_from(&self, from: u16) -> impl Iterator<Item = &[u8]> {
        let mut skip = usize::from(self.data) + usize::from(from - self.offset);
        std::iter::once(&self.frame).chain(&self.tails).map(move |frame| {
            let (skipped, rest) = frame.data().split_at(skip.min(frame.len()));
            skip -= skipped.len();
            rest
        })
    }

    /// True if both, which cover it, have the same bytes at `from` to `to` of the datagram.
    fn agrees(&self, other: &Piece, from: u16, to: u16) -> bool {
        let len = usize::from(to - from);
        self.data_from(from).flatten().take(len).eq(other.data_from(from).flatten().take(len))
    }
}

/// A datagram that is not complete.
struct Waiting {
    key: Key,
    /// In order; they do not overlap.
    pieces: Vec<Piece>,
    /// Bytes of data in all pieces.
    len: u16,
    /// Bytes of the whole payload, once the last fragment is here.
    end: Option<u16>,
    /// When the first fragment came.
    since_ns: u64,
    /// Neighbors in the queue of its family.
    older: u32,
    newer: u32,
}

impl Waiting {
    /// A slot that nothing waits in.
    fn empty() -> Waiting {
        let key = Key { src: Addr::UNSPECIFIED, dst: Addr::UNSPECIFIED, id: 0, protocol: 0 };
        let pieces = Vec::with_capacity(FEW);
        Waiting { key, pieces, len: 0, end: None, since_ns: 0, older: NONE, newer: NONE }
    }

    /// Why `piece` cannot be one of the pieces, if it cannot. `more`: it is not the last fragment.
    fn refuses(&self, piece: &Piece, more: bool) -> Option<Reason> {
        let end = piece.end();
        let contradicts = match self.end {
            Some(known) => end > known || !more && end != known,
            None => !more && self.pieces.last().is_some_and(|last| last.end() > end),
        };
        if contradicts {
            return Some(Reason::FragmentOverlap);
        }
        if self.pieces.len() >= BURST {
            return Some(Reason::FragmentLimit);
        }
        let first = self.pieces.partition_point(|held| held.end() <= piece.offset);
        let mut overlapped = self.pieces[first..].iter().take_while(|held| held.offset < end).peekable();
        overlapped.peek()?;
        let mut agreed = piece.offset;
        for held in overlapped {
            let to = held.end().min(end);
            if held.offset > agreed || !held.agrees(piece, agreed, to) {
                return Some(Reason::FragmentOverlap);
            }
            agreed = to;
        }
        Some(if agreed == end { Reason::FragmentDuplicate } else { Reason::FragmentOverlap })
    }

    /// What the first fragment is to know of the others, once all are here.
    fn datagram(&self) -> Datagram {
        let longest = self.pieces.iter().map(|piece| piece.ip_len).max().unwrap_or(0);
        let first_len = self.pieces.first().map_or(0, |piece| piece.len);
        Datagram {
            fragments: self.pieces.len() as u16,
            later_len: self.len - first_len,
            longest,
            // As in ip_frag_reasm of Linux: a short one alone must not keep long ones from being cut.
            dont_fragment: self.pieces.iter().any(|piece| piece.dont_fragment && piece.ip_len == longest),
        }
    }
}

/// The datagrams of one family, by age.
#[derive(Clone, Copy)]
struct Queue {
    oldest: u32,
    newest: u32,
}

/// The fragments that wait in one worker.
pub struct Reassembly {
    limits: Limits,
    slots: Vec<Waiting>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    /// IPv4, IPv6.
    queues: [Queue; 2],
    /// Slots of datagrams that are complete and not taken yet.
    complete: VecDeque<u32>,
    /// Of those that wait.
    fragments: usize,
    frames: usize,
}

impl Reassembly {
    /// Takes the memory for as many datagrams as `limits` say.
    pub fn new(limits: Limits) -> Reassembly {
        // Those of a burst that are complete wait to be taken.
        let slots = limits.datagrams + BURST;
        Reassembly {
            limits,
            slots: (0..slots).map(|_| Waiting::empty()).collect(),
            free: (0..slots as u32).rev().collect(),
            // Twice, so that it need not grow for the places of those that are gone.
            by_key: HashMap::with_capacity(2 * slots),
            queues: [Queue { oldest: NONE, newest: NONE }; 2],
            complete: VecDeque::with_capacity(slots),
            fragments: 0,
            frames: 0,
        }
    }

    /// How many fragments wait.
    pub fn len(&self) -> usize {
        self.fragments
    }

    /// True if none does.
    pub fn is_empty(&self) -> bool {
        self.fragments == 0
    }

    /// How many frames they are in.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Takes a fragment, as the parse stage left it. `give_up` gets each fragment that is dropped, this one or others.
    pub fn add(
        &mut self,
        packet: Packet,
        tails: impl Iterator<Item = Frame>,
        now_ns: u64,
        give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>),
    ) {
        let Part::Fragment(fragment) = packet.part else {
            return give_up(Reason::InternalError, packet, tails.collect());
        };
        let key = Key::of(&packet, fragment);
        let known = self.by_key.get(&key).copied();
        if is_malformed(&packet, fragment) {
            if let Some(slot) = known {
                self.discard(slot, Reason::FragmentMalformed, give_up);
            }
            return give_up(Reason::FragmentMalformed, packet, tails.collect());
        }
        let piece = Piece::new(packet, tails, fragment);
        match known.and_then(|slot| self.slots[slot as usize].refuses(&piece, fragment.more)) {
            None => self.keep(key, piece, fragment.more, now_ns, give_up),
            Some(reason) => {
                if let Some(slot) = known
                    && reason != Reason::FragmentDuplicate
                {
                    self.discard(slot, reason, give_up);
                }
                let (packet, tails) = piece.into_packet(&key);
                give_up(reason, packet, tails);
            }
        }
    }

    /// Keeps a fragment that fits in with the others of its datagram, whatever has to go for it.
    fn keep(
        &mut self,
        key: Key,
        piece: Piece,
        more: bool,
        now_ns: u64,
        give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>),
    ) {
        while self.frames + piece.frames() > self.limits.frames {
            if !self.discard_oldest(give_up) {
                let (packet, tails) = piece.into_packet(&key);
                return give_up(Reason::FragmentLimit, packet, tails);
            }
        }
        let known = self.by_key.get(&key).copied();
        let Some(slot) = known.or_else(|| self.open(key, now_ns, give_up)) else {
            let (packet, tails) = piece.into_packet(&key);
            return give_up(Reason::FragmentLimit, packet, tails);
        };
        self.fragments += 1;
        self.frames += piece.frames();
        let waiting = &mut self.slots[slot as usize];
        waiting.len += piece.len;
        if !more {
            waiting.end = Some(piece.end());
        }
        let place = waiting.pieces.partition_point(|held| held.offset < piece.offset);
        waiting.pieces.insert(place, piece);
        if waiting.end == Some(waiting.len) {
            self.close(slot);
            self.complete.push_back(slot);
        }
    }

    /// Moves complete datagrams to `batch`, as many as have room there. Returns how many.
    pub fn take_complete(&mut self, batch: &mut Batch) -> usize {
        let mut taken = 0;
        while let Some(slot) = self.complete.front().copied()
            && self.slots[slot as usize].pieces.len() <= batch.room()
        {
            self.complete.pop_front();
            let waiting = &mut self.slots[slot as usize];
            let mut part = Part::First(waiting.datagram());
            for piece in waiting.pieces.drain(..) {
                let (mut packet, tails) = piece.into_packet(&waiting.key);
                packet.part = std::mem::replace(&mut part, Part::Later);
                batch.push(packet, tails);
            }
            self.free.push(slot);
            taken += 1;
        }
        taken
    }

    /// Gives up the datagrams that have waited for too long.
    pub fn expire(&mut self, now_ns: u64, give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>)) {
        for (queue, patience_ns) in [(0, self.limits.ipv4_ns), (1, self.limits.ipv6_ns)] {
            while let Some(waiting) = self.slots.get(self.queues[queue].oldest as usize)
                && waiting.since_ns.saturating_add(patience_ns) <= now_ns
            {
                self.discard(self.queues[queue].oldest, Reason::FragmentTimeout, give_up);
            }
        }
    }

    /// Makes a place for a new datagram, the newest of its family. `None`: too many complete ones have not been taken.
    fn open(
        &mut self,
        key: Key,
        now_ns: u64,
        give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>),
    ) -> Option<u32> {
        if self.by_key.len() >= self.limits.datagrams {
            self.discard_oldest(give_up);
        }
        let slot = self.free.pop()?;
        let queue = &mut self.queues[queue_of(&key)];
        let older = std::mem::replace(&mut queue.newest, slot);
        match self.slots.get_mut(older as usize) {
            Some(older) => older.newer = slot,
            None => queue.oldest = slot,
        }
        let waiting = &mut self.slots[slot as usize];
        (waiting.key, waiting.len, waiting.end, waiting.since_ns) = (key, 0, None, now_ns);
        (waiting.older, waiting.newer) = (older, NONE);
        self.by_key.insert(key, slot);
        Some(slot)
    }

    /// Takes a datagram out of its queue: it does not wait any more, and no fragment finds it.
    fn close(&mut self, slot: u32) {
        let waiting = &self.slots[slot as usize];
        let (key, older, newer) = (waiting.key, waiting.older, waiting.newer);
        self.fragments -= waiting.pieces.len();
        self.frames -= waiting.pieces.iter().map(Piece::frames).sum::<usize>();
        self.by_key.remove(&key);
        let queue = &mut self.queues[queue_of(&key)];
        match self.slots.get_mut(older as usize) {
            Some(older) => older.newer = newer,
            None => queue.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(newer) => newer.older = older,
            None => queue.newest = older,
        }
    }

    /// Drops a datagram that is not complete.
    fn discard(&mut self, slot: u32, reason: Reason, give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>)) {
        self.close(slot);
        let Waiting { key, pieces, .. } = &mut self.slots[slot as usize];
        for piece in pieces.drain(..) {
            let (packet, tails) = piece.into_packet(key);
            give_up(reason, packet, tails);
        }
        self.free.push(slot);
    }

    /// Drops the datagram that has waited for longest. False if none waits.
    fn discard_oldest(&mut self, give_up: &mut impl FnMut(Reason, Packet, Vec<Frame>)) -> bool {
        let oldest = self.queues.iter().map(|queue| queue.oldest).filter(|slot| *slot != NONE);
        let Some(slot) = oldest.min_by_key(|slot| self.slots[*slot as usize].since_ns) else { return false };
        self.discard(slot, Reason::FragmentLimit, give_up);
        true
    }
}

/// Which queue a datagram waits in.
fn queue_of(key: &Key) -> usize {
    usize::from(!key.src.is_v4())
}

/// Bytes of data in a fragment.
fn data_len(packet: &Packet, fragment: Fragment) -> usize {
    (usize::from(packet.l3) + usize::from(packet.ip_len)).saturating_sub(usize::from(fragment.data))
}

/// True for a fragment that no datagram can have.
fn is_malformed(packet: &Packet, fragment: Fragment) -> bool {
    let len = data_len(packet, fragment);
    // What counts towards the length of the datagram besides the data: for IPv4 the header, for IPv6 its extensions.
    let uncounted = if packet.tuple.src.is_v4() { 0 } else { ipv6::HEADER_LEN + ipv6::FRAGMENT_HEADER_LEN };
    let headers = usize::from(fragment.data - packet.l3) - uncounted;
    let end = headers + usize::from(fragment.offset) + len;
    len == 0 || fragment.more && !len.is_multiple_of(8) || end > usize::from(u16::MAX)
}

#[cfg(test)]
mod tests;
