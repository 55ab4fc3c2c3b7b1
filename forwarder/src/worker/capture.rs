//! What captures see of a worker's packets. While none runs, a worker passes by here with one branch a burst.
//!
//! A packet is seen as it was received, once its verdict is known and before its frame changes; then as it leaves or as it is
//! dropped. Its number links the two. Copying is bounded in each round; what does not fit is counted as missed by its
//! capture, and no packet waits for any of this.

use std::sync::Arc;

use config::capture::Point;

use super::{batch::Batch, hold};
use crate::addr::{Tuple, protocol};
use crate::capture::{Capture, Captures, Note, Record};
use crate::packet::{Answer, BURST, Packet, Part, Rewrite};
use crate::port::{Burst, Frame};
use crate::table::flow_map::FlowMap;
use crate::tables::{FrontendKey, Tables};
use crate::verdict::{Reason, Verdict};

/// What a worker may spend on records in one round, over all captures: copying so many bytes. Enough for one capture of
/// everything, a full burst with both frames of each packet; several of them must miss some when rounds are full.
const BUDGET: usize = 256 << 10;
/// A record costs this beside the bytes that are copied.
const RECORD_COST: usize = 512;

/// A worker's place for captures.
pub struct Tap {
    worker: usize,
    workers: u64,
    flows: Arc<FlowMap>,
    /// Packets seen so far.
    seen: u64,
    /// Of the batch under judgement.
    notes: Vec<Note>,
    /// By port: of what leaves in this round, in the order of its burst.
    leaving: Vec<Vec<Note>>,
}

impl Tap {
    /// For worker `worker` of `workers`, with `ports` ports.
    pub fn new(worker: usize, workers: usize, ports: usize, flows: Arc<FlowMap>) -> Tap {
        Tap {
            worker,
            workers: workers as u64,
            flows,
            seen: 0,
            notes: Vec::with_capacity(BURST),
            leaving: (0..ports).map(|_| Vec::with_capacity(ports * BURST + hold::MOST)).collect(),
        }
    }

    /// At the start of a round: opens the tap if captures run.
    #[inline]
    pub fn open<'r>(
        &'r mut self,
        captures: &'r Captures,
        tables: &'r Tables,
        now_ns: u64,
    ) -> Option<OpenTap<'r>> {
        if captures.0.is_empty() {
            return None;
        }
        self.leaving.iter_mut().for_each(Vec::clear);
        Some(OpenTap { tap: self, captures: &captures.0, tables, now_ns, budget: BUDGET })
    }
}

/// A tap in one round.
pub struct OpenTap<'r> {
    tap: &'r mut Tap,
    captures: &'r [Arc<Capture>],
    tables: &'r Tables,
    now_ns: u64,
    budget: usize,
}

impl OpenTap<'_> {
    /// These packets came before and were held: they are not seen as they came, once more.
    pub(super) fn came_before(&mut self, batch: &mut Batch) {
        for packet in &mut batch.packets {
            self.number(packet);
        }
    }

    /// After judgement, before any frame changes.
    pub(super) fn received(&mut self, batch: &mut Batch) {
        self.tap.notes.clear();
        let mut tail = 0;
        for index in 0..batch.packets.len() {
            let comes_now = self.number(&mut batch.packets[index]);
            let packet = &batch.packets[index];
            let tails = &batch.tails[tail..tail + usize::from(batch.tail_counts[index])];
            tail += tails.len();
            let note = self.note(packet);
            self.tap.notes.push(note);
            // The fragments of a datagram that is complete were seen one by one.
            if comes_now && matches!(packet.part, Part::Whole | Part::Fragment(_)) {
                self.write(Point::Rx, packet.port, &note, packet.frame.data(), tails);
            }
        }
    }

    /// Gives a packet its number. False: it has one.
    fn number(&mut self, packet: &mut Packet) -> bool {
        let is_new = packet.id == 0;
        if is_new {
            self.tap.seen += 1;
            packet.id = self.tap.seen * self.tap.workers + self.tap.worker as u64;
        }
        is_new
    }

    /// After the rewrite, before the batch is sorted.
    pub(super) fn rewritten(&mut self, batch: &Batch) {
        let (mut pieces, mut piece_counts) = (&batch.pieces[..], batch.piece_counts.iter());
        for (index, (packet, tails)) in batch.each().enumerate() {
            let note = Note { verdict: packet.verdict, ..self.tap.notes[index] };
            match packet.verdict {
                Verdict::Forward { port } if packet.cut_to != 0 => {
                    // The first fragment stands for the datagram.
                    let of_first = packet.part != Part::Later;
                    let count = if of_first { piece_counts.next().copied().unwrap_or(0) } else { 0 };
                    let (own, rest) = pieces.split_at(usize::from(count));
                    own.iter().for_each(|piece| self.leaves(port, &note, piece, &[]));
                    pieces = rest;
                }
                Verdict::Forward { port } => self.leaves(port, &note, &packet.frame, tails),
                Verdict::Answer { port, .. } => self.leaves(port, &note, &packet.frame, &[]),
                Verdict::Drop(_) => self.write(Point::Drop, packet.port, &note, packet.frame.data(), tails),
                // It is counted so.
                Verdict::Undecided => {
                    let note = Note { verdict: Verdict::Drop(Reason::InternalError), ..note };
                    self.write(Point::Drop, packet.port, &note, packet.frame.data(), tails);
                }
                Verdict::Punt | Verdict::Hold { .. } | Verdict::Gather => {}
            }
        }
    }

    fn leaves(&mut self, port: u8, note: &Note, head: &Frame, tails: &[Frame]) {
        self.write(Point::PostNat, port, note, head.data(), tails);
        self.tap.leaving[usize::from(port)].push(*note);
    }

    /// A packet is dropped after its verdict was another. Only its first segment is kept.
    #[cold]
    pub fn dropped(&mut self, packet: &Packet, reason: Reason) {
        let note = Note { verdict: Verdict::Drop(reason), ..self.note(packet) };
        let len = packet.frame.len() + packet.tail_len as usize;
        self.write_parts(Point::Drop, packet.port, &note, len, std::iter::once(packet.frame.data()));
    }

    /// A frame of another worker is dropped before it is a packet here.
    #[cold]
    pub fn lost(&mut self, id: u64, port: u8, frame: &[u8], reason: Reason) {
        let note = Note { id, verdict: Verdict::Drop(reason), ..Note::default() };
        self.write(Point::Drop, port, &note, frame, &[]);
    }

    /// The last packets that were to leave by `port` found no room on its ring: those that are left in `burst`.
    #[cold]
    pub fn unsent(&mut self, port: usize, burst: &Burst) {
        let first = self.tap.leaving[port].len().saturating_sub(burst.len());
        for (index, head) in burst.heads.iter().enumerate() {
            let Some(note) = self.tap.leaving[port].get(first + index) else { return };
            let note = Note { verdict: Verdict::Drop(Reason::TxRingFull), ..*note };
            let len = burst.packet_len(index);
            self.write_parts(Point::Drop, port as u8, &note, len, std::iter::once(head.data()));
        }
    }

    /// What is known of a packet that has been judged.
    fn note(&self, packet: &Packet) -> Note {
        let flow = packet.flow.and_then(|(id, direction)| {
            let flow = self.tap.flows.snapshot(id.index()).filter(|flow| flow.id == id)?;
            Some((flow, direction))
        });
        let mut note = Note {
            id: packet.id,
            before: packet.tuple,
            after: after(packet),
            verdict: packet.verdict,
            ..Note::default()
        };
        if let Some((flow, direction)) = flow {
            note.service = flow.service;
            note.endpoint = Some((flow.endpoint_addr, flow.endpoint_port));
            note.flow = Some((direction, flow.generation));
        } else if let Some(choice) = packet.choice {
            note.service = choice.service;
            note.endpoint = Some((packet.out.dst, packet.out.dst_port));
        } else {
            let Tuple { dst, dst_port, protocol, .. } = packet.tuple;
            let key = FrontendKey { addr: dst, port: dst_port, protocol };
            note.service = self.tables.frontends.get(&key).map_or(0, |frontend| frontend.service.stable_id);
            // A connection that goes on without a flow.
            let is_translated = note.service != 0 && packet.out.dst != dst;
            note.endpoint = is_translated.then_some((packet.out.dst, packet.out.dst_port));
        }
        note
    }

    fn write(&mut self, point: Point, port: u8, note: &Note, head: &[u8], tails: &[Frame]) {
        let len = head.len() + tails.iter().map(Frame::len).sum::<usize>();
        let parts = std::iter::once(head).chain(tails.iter().map(Frame::data));
        self.write_parts(point, port, note, len, parts);
    }

    /// Writes a record for each capture that wants it.
    fn write_parts<'p>(
        &mut self,
        point: Point,
        port: u8,
        note: &Note,
        len: usize,
        parts: impl Iterator<Item = &'p [u8]> + Clone,
    ) {
        for capture in self.captures {
            if !capture.wants(point, port, note) {
                continue;
            }
            let ring = &capture.rings[self.tap.worker];
            let cost = RECORD_COST + len.min(capture.snaplen);
            if cost > self.budget {
                ring.refuse();
                continue;
            }
            let record = Record {
                note: *note,
                time_ns: self.now_ns,
                generation: self.tables.generation,
                point,
                port,
                len: len as u32,
            };
            if ring.push(&record.encode(), cut(parts.clone(), capture.snaplen)) {
                self.budget -= cost;
            }
        }
    }
}

/// Addresses and ports as the packet leaves.
fn after(packet: &Packet) -> Tuple {
    let back = packet.tuple.reversed();
    match packet.rewrite {
        Rewrite::Answer(Answer::Reset | Answer::EchoReply) => back,
        Rewrite::Answer(_) => {
            let protocol = if back.dst.is_v4() { protocol::ICMP } else { protocol::ICMPV6 };
            Tuple { src_port: 0, dst_port: 0, protocol, ..back }
        }
        Rewrite::Route | Rewrite::Translate | Rewrite::IcmpError { .. } | Rewrite::Reset => packet.out,
    }
}

/// The first `most` bytes of all parts.
fn cut<'p>(
    parts: impl Iterator<Item = &'p [u8]> + Clone,
    most: usize,
) -> impl Iterator<Item = &'p [u8]> + Clone {
    let mut left = most;
    parts.map_while(move |part| {
        let part = &part[..part.len().min(left)];
        left -= part.len();
        (!part.is_empty()).then_some(part)
    })
}
