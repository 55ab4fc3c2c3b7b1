//! Fragments on the way to the others of their datagram: here, or at the worker that gathers that datagram.

use std::sync::Arc;

use super::batch::Batch;
use super::capture::OpenTap;
use super::exchange::Exchange;
use super::reassembly::{Key, Limits, Reassembly};
use crate::packet::{Packet, Part};
use crate::port::{Frame, FramePool, copy_in};
use crate::stats::{Counter, Counters};
use crate::verdict::Reason;

/// One worker's part in gathering fragments.
pub struct Gathering {
    reassembly: Reassembly,
    exchange: Arc<Exchange>,
    worker: usize,
    /// Workers that were sent something in this round, one bit each.
    sent_to: u64,
}

impl Gathering {
    /// `worker`: which one this is.
    pub fn new(worker: usize, limits: Limits, exchange: Arc<Exchange>) -> Gathering {
        Gathering { reassembly: Reassembly::new(limits), exchange, worker, sent_to: 0 }
    }

    /// How many fragments wait here.
    pub fn len(&self) -> usize {
        self.reassembly.len()
    }

    /// True if none does.
    pub fn is_empty(&self) -> bool {
        self.reassembly.is_empty()
    }

    /// How many frames they are in.
    pub fn frames(&self) -> usize {
        self.reassembly.frames()
    }

    /// Takes a fragment. Its frames wait here, or go back to `pool`.
    pub fn gather(
        &mut self,
        packet: Packet,
        tails: impl Iterator<Item = Frame>,
        pool: &mut FramePool,
        now_ns: u64,
        counters: &Counters,
        tap: &mut Option<OpenTap<'_>>,
    ) {
        if let Part::Fragment(fragment) = packet.part {
            let gatherer = self.exchange.gatherer(&Key::of(&packet, fragment));
            if gatherer != self.worker {
                return self.hand_over(gatherer, packet, tails, pool, counters, tap);
            }
        }
        counters.add(Counter::fragments_gathered, 1);
        self.reassembly.add(packet, tails, now_ns, &mut give_up(pool, counters, tap));
    }

    /// Copies a fragment to another worker.
    fn hand_over(
        &mut self,
        to: usize,
        packet: Packet,
        tails: impl Iterator<Item = Frame>,
        pool: &mut FramePool,
        counters: &Counters,
        tap: &mut Option<OpenTap<'_>>,
    ) {
        let mut tails = tails;
        let sent = self.exchange.send(to, packet.port, packet.id, |bytes| {
            bytes.extend_from_slice(packet.frame.data());
            for tail in tails.by_ref() {
                bytes.extend_from_slice(tail.data());
                pool.push(tail);
            }
        });
        tails.for_each(|tail| pool.push(tail));
        if sent {
            self.sent_to |= 1 << to;
            counters.add(Counter::fragments_handed_over, 1);
        } else {
            counters.count(Reason::FragmentLimit);
            if let Some(tap) = tap {
                tap.dropped(&packet, Reason::FragmentLimit);
            }
        }
        pool.push(packet.frame);
    }

    /// Takes what other workers have for this one, as much as `batch` has room for. Returns how much.
    pub fn take_over(
        &mut self,
        batch: &mut Batch,
        pool: &mut FramePool,
        counters: &Counters,
        tap: &mut Option<OpenTap<'_>>,
    ) -> usize {
        let mut taken = 0;
        while batch.room() > 0
            && let Some(parcel) = self.exchange.receive(self.worker)
        {
            taken += 1;
            if copy_in(&parcel.bytes, pool, &mut batch.received) {
                batch.unpack(parcel.port);
                batch.packets.iter_mut().rev().take(1).for_each(|packet| packet.id = parcel.id);
            } else {
                counters.count(Reason::FragmentLimit);
                if let Some(tap) = tap {
                    tap.lost(parcel.id, parcel.port, &parcel.bytes, Reason::FragmentLimit);
                }
            }
            self.exchange.give_back(self.worker, parcel);
        }
        if taken > 0 {
            counters.add(Counter::fragments_taken_over, taken as u64);
        }
        taken
    }

    /// Moves datagrams that are complete to `batch`, as many as have room. False if there is none.
    pub fn take_complete(&mut self, batch: &mut Batch, counters: &Counters) -> bool {
        let datagrams = self.reassembly.take_complete(batch);
        if datagrams > 0 {
            counters.add(Counter::datagrams_complete, datagrams as u64);
            counters.add(Counter::fragments_released, batch.packets.len() as u64);
        }
        datagrams > 0
    }

    /// Gives up what has waited for too long.
    pub fn expire(
        &mut self,
        now_ns: u64,
        pool: &mut FramePool,
        counters: &Counters,
        tap: &mut Option<OpenTap<'_>>,
    ) {
        self.reassembly.expire(now_ns, &mut give_up(pool, counters, tap));
    }

    /// At the end of a round: wakes those that were sent something.
    pub fn wake_others(&mut self) {
        while self.sent_to != 0 {
            self.exchange.wake(self.sent_to.trailing_zeros() as usize);
            self.sent_to &= self.sent_to - 1;
        }
    }

    /// True if other workers have something for this one. See [`Exchange::is_empty`].
    pub fn has_mail(&self) -> bool {
        !self.exchange.is_empty(self.worker)
    }
}

/// Counts a fragment that is given up, and frees its frames.
fn give_up(
    pool: &mut FramePool,
    counters: &Counters,
    tap: &mut Option<OpenTap<'_>>,
) -> impl FnMut(Reason, Packet, Vec<Frame>) {
    move |reason, packet, tails| {
        counters.count(reason);
        counters.add(Counter::fragments_released, 1);
        if let Some(tap) = tap {
            tap.dropped(&packet, reason);
        }
        pool.push(packet.frame);
        tails.into_iter().for_each(|tail| pool.push(tail));
    }
}
