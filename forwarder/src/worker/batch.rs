//! Packets under judgement with all their frames: from one port, from the holding queue, or datagrams whose fragments are all there.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::cut;
use crate::packet::{BURST, Packet, Part};
use crate::pipeline;
use crate::port::{Burst, Frame, FramePool};
use crate::stage::overlay;
use crate::tables::Fib;
use crate::verdict::{Reason, Verdict};

/// At most [`BURST`] packets. The fragments of a datagram follow each other in order, and are all in one batch.
pub struct Batch {
    /// As they came from the ring.
    pub(super) received: Burst,
    /// The packets.
    pub packets: Vec<Packet>,
    /// Further segments of all of them, in order.
    pub tails: Vec<Frame>,
    /// How many of `tails` belong to each packet.
    pub tail_counts: Vec<u16>,
    /// When the held ones of them are given up; 0 for those that have not been held.
    pub(super) deadline_ns: u64,
    /// What leaves in place of the datagrams with [`Packet::cut_to`], in order.
    pub pieces: Vec<Frame>,
    /// How many of `pieces` each of these datagrams has become.
    pub piece_counts: Vec<u16>,
}

impl Default for Batch {
    fn default() -> Batch {
        Batch {
            received: Burst::with_capacity(BURST),
            packets: Vec::with_capacity(BURST),
            tails: Vec::with_capacity(BURST),
            tail_counts: Vec::with_capacity(BURST),
            deadline_ns: 0,
            pieces: Vec::with_capacity(BURST),
            piece_counts: Vec::with_capacity(BURST),
        }
    }
}

impl Batch {
    /// How many packets have room.
    pub fn room(&self) -> usize {
        BURST - self.packets.len().min(BURST)
    }

    /// Appends a packet and its further segments.
    pub fn push(&mut self, packet: Packet, tails: impl IntoIterator<Item = Frame>) {
        let before = self.tails.len();
        self.tails.extend(tails);
        self.tail_counts.push((self.tails.len() - before) as u16);
        self.packets.push(packet);
    }

    /// Makes packets of what was received from `port`. Returns their bytes.
    pub(super) fn unpack(&mut self, port: u8) -> u64 {
        let mut bytes = 0;
        let mut tails = self.received.tails.drain(..).peekable();
        for (index, frame) in self.received.heads.drain(..).enumerate() {
            let (mut count, mut tail_len) = (0, 0);
            while let Some(tail) = tails.next_if(|tail| usize::from(tail.of) == index) {
                tail_len += tail.frame.len();
                count += 1;
                self.tails.push(tail.frame);
            }
            bytes += (frame.len() + tail_len) as u64;
            self.tail_counts.push(count);
            self.packets.push(Packet::new(frame, tail_len as u32, port));
        }
        bytes
    }

    /// Every packet with its further segments.
    pub(super) fn each(&self) -> impl Iterator<Item = (&Packet, &[Frame])> {
        let mut tails = &self.tails[..];
        self.packets.iter().zip(&self.tail_counts).map(move |(packet, count)| {
            let (own, rest) = tails.split_at(usize::from(*count));
            tails = rest;
            (packet, own)
        })
    }

    /// After judging: gives later fragments the verdict of the first one of their datagram.
    pub fn follow(&mut self) {
        for index in 1..self.packets.len() {
            if self.packets[index].part == Part::Later
                && let (before, [packet, ..]) = self.packets.split_at_mut(index)
                && let Some(first) = before.iter().rfind(|packet| packet.part != Part::Later)
            {
                packet.follow(first);
            }
        }
    }

    /// Rewrites the frames that leave, and cuts what is too long for its way. A packet whose answer does not fit its frame, or
    /// over which this panics, is dropped, with all fragments of its datagram.
    pub fn rewrite(&mut self, fib: &Fib, pool: &mut FramePool) {
        let (mut next, mut tail) = (0, 0);
        while next < self.packets.len() {
            let finished = catch_unwind(AssertUnwindSafe(|| {
                while let Some(packet) = self.packets.get_mut(next) {
                    let tails = &self.tails[tail..tail + usize::from(self.tail_counts[next])];
                    let leaves = matches!(packet.verdict, Verdict::Forward { .. } | Verdict::Answer { .. });
                    if leaves && !pipeline::rewrite(packet, tails, fib) {
                        self.drop_datagram(next, Reason::TxTooLong);
                    } else if leaves && packet.cut_to != 0 && packet.part != Part::Later {
                        self.cut(next, tail, pool, fib);
                    } else if packet.verdict == Verdict::Punt && packet.from_tunnel.is_some() {
                        overlay::strip(packet);
                    }
                    tail += usize::from(self.tail_counts[next]);
                    next += 1;
                }
            }));
            if finished.is_err() {
                self.drop_datagram(next, Reason::InternalError);
                tail += usize::from(self.tail_counts[next]);
                next += 1;
            }
        }
    }

    /// Drops the packet at `index`, and the later fragments of its datagram.
    fn drop_datagram(&mut self, index: usize, reason: Reason) {
        self.packets[index].drop(reason);
        let rest = self.packets[index + 1..].iter_mut();
        rest.take_while(|packet| packet.part == Part::Later).for_each(|packet| packet.drop(reason));
    }

    /// Cuts the datagram that begins at packet `first`, whose further segments begin at `tail`.
    #[cold]
    fn cut(&mut self, first: usize, tail: usize, pool: &mut FramePool, fib: &Fib) {
        let later = self.packets[first + 1..].iter().take_while(|packet| packet.part == Part::Later).count();
        let range = first..first + 1 + later;
        let datagram = cut::Source {
            packets: &self.packets[range.clone()],
            tails: &self.tails[tail..],
            tail_counts: &self.tail_counts[range],
        };
        match cut::cut(&datagram, pool, &mut self.pieces) {
            Some(count) => {
                self.piece_counts.push(count);
                let pieces = self.pieces.len() - usize::from(count)..;
                overlay::encapsulate_pieces(&self.packets[first], &mut self.pieces[pieces], fib);
            }
            None => self.drop_datagram(first, Reason::FragmentLimit),
        }
    }
}
