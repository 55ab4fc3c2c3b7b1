//! One pinned thread: takes bursts from its queue of every port, has them judged, and puts them where they belong.
//!
//! ```text
//! for each port: receive (not released yet) -> pipeline -> frames sorted by the port that they leave by;
//!                fragments wait for the others of their datagram, which then goes through the pipeline as one
//! for each port: transmit, kick                        -> the kernel has them
//! for each port: release, complete, refill             -> the kernel has room again
//! ```
//!
//! The order is what makes a `kill -9` harmless: receive entries are released only after their packets are on a transmit
//! ring, so whatever was under way comes again (see [`af_xdp::ledger`]). No lock, allocation, log or clock call is made for
//! a packet; the clock is read once a round. Every packet received is counted once more as forwarded, answered,
//! punted or dropped for a reason, or is held: the sums match exactly.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use config::gateway::Poll;

use crate::control::publish::{Reader, WorkerLink};
use crate::packet::{BURST, Packet, Part};
use crate::pipeline::{self, AnswerBudget, Context, Rng};
use crate::port::xsk::steer::Heartbeats;
use crate::port::{Burst, Frame, FramePool, Kick, Port};
use crate::stats::{Counter, Counters};
use crate::table::flow_map::{FlowMap, FlowWorker};
use crate::tables::{Fib, Tables};
use crate::verdict::{Reason, Verdict};

use batch::Batch;
use capture::{OpenTap, Tap};
use exchange::Exchange;
use gather::Gathering;
use hold::{Holding, Resolve};
use idle::Idle;
use punt::Punt;
use reassembly::Limits;

pub mod batch;
pub mod capture;
pub mod cut;
pub mod exchange;
pub mod frames;
pub mod gather;
pub mod hold;
pub mod idle;
pub mod punt;
pub mod reassembly;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// The whole flow table is looked at for expired flows in about this time.
const AGEING_ROUND_NS: u64 = 4 * SECOND_NS;
/// Flow records looked at in one round at most: about 20 us if every one of them is to go.
const AGEING_STEP: usize = 64;
/// RSTs, ICMP errors and echo replies of one worker in a second.
const ANSWERS_PER_S: u32 = 1_000;

/// What a worker is made of.
pub struct Worker<P> {
    /// Which worker, and so which queue of every port.
    pub index: usize,
    /// Its queue of every port; all of one packet memory.
    pub ports: Vec<P>,
    /// The free frames of that memory.
    pub pool: FramePool,
    /// Ways back to the kernel, by port.
    pub punts: Vec<Punt>,
    /// Its view of the published tables.
    pub reader: Reader,
    /// Connections, shared by all workers.
    pub flows: Arc<FlowMap>,
    /// Clients that session affinity remembers, shared by all workers.
    pub affinity: Arc<FlowMap>,
    /// Where the steering program and the keeper look whether it lives.
    pub heartbeats: Arc<Heartbeats>,
    /// How it asks for next hops to be resolved.
    pub resolve: Resolve,
    /// What it may hold of fragments.
    pub fragments: Limits,
    /// Its way to other workers for fragments.
    pub exchange: Arc<Exchange>,
    /// What it does when there is nothing to do.
    pub poll: Poll,
}

impl<P: Port> Worker<P> {
    /// Forwards until `stop` is set and the worker is woken. On the thread that is to be the worker, already pinned.
    pub fn run(self, stop: &AtomicBool) {
        let mut running = Running::new(self, clock_ns());
        while !stop.load(Ordering::Relaxed) {
            let now_ns = clock_ns();
            if running.round(now_ns) == 0 {
                running.rest(now_ns);
            }
        }
    }
}

/// A worker at work, round by round: on its thread, or wherever the clock is another one.
pub struct Running<P> {
    index: usize,
    reader: Reader,
    link: Arc<WorkerLink>,
    heartbeats: Arc<Heartbeats>,
    judge: Judge,
    rings: Rings<P>,
    batch: Batch,
    holding: Holding,
    gathering: Gathering,
    tap: Tap,
    generations: Generations,
    account_due: frames::Due,
    idle: Idle,
}

/// What a round is made by.
struct Round<'a> {
    tables: &'a Tables,
    fib: &'a Fib,
    now_ns: u64,
    counters: &'a Counters,
}

impl<P: Port> Running<P> {
    /// `seed`: any number, for spreading.
    pub fn new(worker: Worker<P>, seed: u64) -> Running<P> {
        let ports = worker.ports.len();
        let tap = Tap::new(worker.index, worker.reader.workers(), ports, worker.flows.clone());
        Running {
            index: worker.index,
            link: worker.reader.link().clone(),
            reader: worker.reader,
            heartbeats: worker.heartbeats,
            judge: Judge {
                flow_worker: worker.flows.worker(worker.index),
                affinity_worker: worker.affinity.worker(worker.index),
                ageing: Ageing::default(),
                rng: Rng::new(seed ^ ((worker.index as u64) << 56)),
                answers: AnswerBudget::new(ANSWERS_PER_S),
                flows: worker.flows,
                affinity: worker.affinity,
            },
            rings: Rings {
                out: (0..ports).map(|_| Outgoing::new(ports * BURST)).collect(),
                ports: worker.ports,
                pool: worker.pool,
                punts: worker.punts,
            },
            batch: Batch::default(),
            holding: Holding::new(worker.resolve),
            gathering: Gathering::new(worker.index, worker.fragments, worker.exchange),
            tap,
            generations: Generations::default(),
            account_due: frames::Due::default(),
            idle: Idle::new(worker.poll),
        }
    }

    /// One burst of every port, from receive ring to transmit ring. Returns how many packets came. `now_ns`: of a clock that
    /// does not go back.
    pub fn round(&mut self, now_ns: u64) -> usize {
        let Running { reader, link, judge, rings, batch, holding, gathering, tap, .. } = self;
        let counters = link.counters();
        self.heartbeats.beat(self.index, now_ns);
        link.beat(now_ns);
        let (tables, fib, captures) = reader.load();
        let tap = &mut tap.open(captures, tables, now_ns);
        self.generations.begin(tables.generation, &rings.ports);
        let round = Round { tables, fib, now_ns, counters };

        // Those that have waited leave before those that come now.
        holding.again(batch, fib.epoch, |batch, holding| {
            judge.judge(&mut batch.packets, &round);
            batch.follow();
            if let Some(tap) = tap {
                tap.came_before(batch);
            }
            rings.dispatch(batch, holding, gathering, &round, tap);
        });
        let mut received = gathering.take_over(batch, &mut rings.pool, counters, tap);
        if received > 0 {
            settle(batch, judge, rings, holding, gathering, &round, tap);
        }
        for port in 0..rings.ports.len() {
            let count = rings.ports[port].rx_burst(&mut rings.pool, &mut batch.received, BURST);
            if count == 0 {
                continue;
            }
            received += count;
            counters.add(Counter::rx_bytes, batch.unpack(port as u8));
            counters.add(Counter::rx_packets, batch.packets.len() as u64);
            settle(batch, judge, rings, holding, gathering, &round, tap);
        }
        gathering.expire(now_ns, &mut rings.pool, counters, tap);
        holding.expire(now_ns, |packet, tails| {
            counters.count(Reason::NeighborUnresolved);
            if let Some(tap) = tap {
                tap.dropped(&packet, Reason::NeighborUnresolved);
            }
            rings.recycle(packet.frame, tails);
        });

        rings.transmit(counters, tap);
        gathering.wake_others();
        rings.give_back();
        if let Some(generation) = self.generations.settled(&mut rings.ports) {
            link.set_in_force(generation);
        }
        judge.quiescent(now_ns, received == 0, counters);
        if received > 0 {
            counters.add(Counter::bursts, 1);
            self.idle.busy(now_ns);
        }
        if self.account_due.is_due(now_ns) {
            self.account();
        }
        received
    }

    /// Its ports, by index.
    pub fn ports_mut(&mut self) -> &mut [P] {
        &mut self.rings.ports
    }

    /// At the end of a round: tells where the frames are.
    fn account(&mut self) {
        let Rings { ports, pool, .. } = &mut self.rings;
        let held = self.holding.frames() + self.gathering.frames();
        self.link.frames().publish(pool, held, ports);
    }

    /// After a round without packets: spins, or sleeps until something happens.
    fn rest(&mut self, now_ns: u64) {
        let at_rest = !self.rings.unsent() && self.generations.is_settled();
        if !at_rest || !self.idle.may_sleep(now_ns) {
            return af_xdp::pause();
        }
        self.account();
        self.link.set_asleep(true);
        if !self.gathering.has_mail() {
            self.link.counters().add(Counter::sleeps, 1);
            self.judge.offline();
            idle::sleep(&self.rings.ports, &self.link);
            self.judge.online();
        }
        self.link.set_asleep(false);
    }
}

/// Has a batch judged and puts its packets where they belong, and then the datagrams that its fragments complete.
fn settle<P: Port>(
    batch: &mut Batch,
    judge: &mut Judge,
    rings: &mut Rings<P>,
    holding: &mut Holding,
    gathering: &mut Gathering,
    round: &Round<'_>,
    tap: &mut Option<OpenTap<'_>>,
) {
    judge.judge(&mut batch.packets, round);
    rings.dispatch(batch, holding, gathering, round, tap);
    while gathering.take_complete(batch, round.counters) {
        judge.judge(&mut batch.packets, round);
        batch.follow();
        rings.dispatch(batch, holding, gathering, round, tap);
    }
}

/// Nanoseconds of CLOCK_MONOTONIC; a read of the vDSO, no system call.
fn clock_ns() -> u64 {
    crate::keeper::supervise::monotonic_ns()
}

/// The pipeline and what it keeps from burst to burst.
struct Judge {
    flows: Arc<FlowMap>,
    flow_worker: FlowWorker,
    affinity: Arc<FlowMap>,
    affinity_worker: FlowWorker,
    ageing: Ageing,
    rng: Rng,
    answers: AnswerBudget,
}

impl Judge {
    /// Gives every packet a verdict. A packet over which the pipeline panics is dropped and counted; the others are judged
    /// again without it, which gives them the same verdicts, since no frame changes before all have one.
    fn judge(&mut self, packets: &mut [Packet], round: &Round<'_>) {
        let mut cx = Context {
            tables: round.tables,
            fib: round.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: (round.now_ns / SECOND_NS) as u32,
            rng: &mut self.rng,
            answers: &mut self.answers,
            counters: round.counters,
            read_only: false,
        };
        let mut run = |packets: &mut [Packet]| {
            catch_unwind(AssertUnwindSafe(|| pipeline::run(packets, &mut cx, &mut ()))).is_ok()
        };
        if !run(packets) {
            for packet in packets {
                packet.begin_again();
                if !run(std::slice::from_mut(packet)) {
                    packet.verdict = Verdict::Drop(Reason::InternalError);
                }
            }
        }
    }

    /// Between bursts, when no flow is held: gives expired flows and old records back, a few at a time.
    fn quiescent(&mut self, now_ns: u64, idle: bool, counters: &Counters) {
        let now_s = (now_ns / SECOND_NS) as u32;
        let most = if idle { 16 * AGEING_STEP } else { AGEING_STEP };
        let count = self.ageing.due(now_ns, self.flows.capacity(), most);
        if count > 0 {
            let expired = self.flows.age(&mut self.flow_worker, now_s, count);
            counters.add(Counter::flows_expired, expired as u64);
            self.affinity.age(&mut self.affinity_worker, now_s, count.div_ceil(4));
        }
        self.flows.quiescent(&mut self.flow_worker);
        self.affinity.quiescent(&mut self.affinity_worker);
    }

    fn offline(&mut self) {
        self.flows.offline(&mut self.flow_worker);
        self.affinity.offline(&mut self.affinity_worker);
    }

    fn online(&mut self) {
        self.flows.online(&mut self.flow_worker);
        self.affinity.online(&mut self.affinity_worker);
    }
}

/// How many flow records are due to be looked at.
#[derive(Default)]
struct Ageing {
    last_ns: u64,
}

impl Ageing {
    /// At most `most`; the time of those not granted is carried over, up to a second.
    fn due(&mut self, now_ns: u64, capacity: usize, most: usize) -> usize {
        let elapsed_ns = now_ns.saturating_sub(self.last_ns).min(SECOND_NS);
        let record_ns = (AGEING_ROUND_NS / capacity.max(1) as u64).max(1);
        let count = ((elapsed_ns / record_ns) as usize).min(most);
        if count > 0 {
            self.last_ns = now_ns - elapsed_ns + count as u64 * record_ns;
        }
        count
    }
}

/// Which generation is in force: every frame rewritten under an older one has been taken off the transmit rings.
#[derive(Default)]
struct Generations {
    current: u64,
    settling: Option<u64>,
    marks: Vec<u32>,
}

impl Generations {
    /// Before the first burst under `generation`: notes how far the transmit rings are filled with older frames.
    /// One generation settles at a time, so that frequent changes do not put it off for ever.
    fn begin<P: Port>(&mut self, generation: u64, ports: &[P]) {
        if generation != self.current && self.settling.is_none() {
            self.current = generation;
            self.settling = Some(generation);
            self.marks.clear();
            self.marks.extend(ports.iter().map(P::tx_mark));
        }
    }

    /// The generation that came in force just now, if one did.
    fn settled<P: Port>(&mut self, ports: &mut [P]) -> Option<u64> {
        self.settling?;
        let sent = ports.iter_mut().zip(&self.marks).all(|(port, mark)| port.is_sent(*mark));
        if sent { self.settling.take() } else { None }
    }

    fn is_settled(&self) -> bool {
        self.settling.is_none()
    }
}

/// Why a frame is on its way out.
#[derive(Clone, Copy)]
enum Leaving {
    Forwarded {
        /// So many received packets end with it: one, but where a datagram is cut, all of its fragments with the last piece.
        packets: u16,
        /// Their connection goes on without an entry in the flow table.
        is_stateless: bool,
    },
    Answer(Reason),
}

/// Packets that leave by one port in this round.
struct Outgoing {
    burst: Burst,
    /// For each packet of `burst`: why, and its length in bytes.
    packets: Vec<(Leaving, u32)>,
    /// The kernel has not taken everything off the transmit ring yet.
    unsent: bool,
}

impl Outgoing {
    fn new(packets: usize) -> Outgoing {
        Outgoing { burst: Burst::with_capacity(packets), packets: Vec::with_capacity(packets), unsent: false }
    }
}

/// The worker's queues.
struct Rings<P> {
    ports: Vec<P>,
    pool: FramePool,
    punts: Vec<Punt>,
    out: Vec<Outgoing>,
}

impl<P: Port> Rings<P> {
    /// Rewrites what leaves and sorts the batch by verdict.
    fn dispatch(
        &mut self,
        batch: &mut Batch,
        holding: &mut Holding,
        gathering: &mut Gathering,
        round: &Round<'_>,
        tap: &mut Option<OpenTap<'_>>,
    ) {
        let Round { counters, now_ns, .. } = *round;
        match tap {
            None => batch.rewrite(round.fib, &mut self.pool),
            Some(tap) => {
                tap.received(batch);
                batch.rewrite(round.fib, &mut self.pool);
                tap.rewritten(batch);
            }
        }
        let deadline_ns = batch.deadline_ns;
        let (mut pieces, mut piece_counts) = (batch.pieces.drain(..), batch.piece_counts.drain(..));
        let mut tails = batch.tails.drain(..);
        for (packet, tail_count) in batch.packets.drain(..).zip(batch.tail_counts.drain(..)) {
            let mut tails = tails.by_ref().take(usize::from(tail_count));
            match packet.verdict {
                Verdict::Forward { port } if packet.cut_to != 0 => {
                    if packet.part != Part::Later {
                        let count = piece_counts.next().unwrap_or(0);
                        self.leave_cut(port, &packet, pieces.by_ref().take(usize::from(count)));
                        counters.add(Counter::datagrams_cut, 1);
                    }
                    self.recycle(packet.frame, tails);
                }
                Verdict::Forward { port } => {
                    let leaving = Leaving::Forwarded { packets: 1, is_stateless: packet.is_stateless };
                    self.leave(port, leaving, packet.frame, tails);
                }
                Verdict::Answer { port, reason } => {
                    tails.for_each(|tail| self.pool.push(tail));
                    self.leave(port, Leaving::Answer(reason), packet.frame, std::iter::empty());
                }
                Verdict::Punt => {
                    let punted =
                        self.punts[usize::from(packet.port)].send(&packet, tails.by_ref(), &mut self.pool);
                    match punted {
                        true => counters.add(Counter::punted, 1),
                        false => {
                            counters.count(Reason::PuntFailed);
                            if let Some(tap) = tap {
                                tap.dropped(&packet, Reason::PuntFailed);
                            }
                        }
                    }
                    self.pool.push(packet.frame);
                }
                Verdict::Hold { port } => {
                    match holding.hold(port, packet, tails.by_ref(), deadline_ns, now_ns) {
                        Some(refused) => {
                            counters.count(Reason::NeighborUnresolved);
                            if let Some(tap) = tap {
                                tap.dropped(&refused, Reason::NeighborUnresolved);
                            }
                            self.recycle(refused.frame, tails);
                        }
                        // One that was held before is counted already.
                        None => counters.add(Counter::held, u64::from(deadline_ns == 0)),
                    }
                }
                Verdict::Gather => {
                    gathering.gather(packet, tails, &mut self.pool, now_ns, counters, tap);
                }
                Verdict::Drop(reason) => {
                    counters.count(reason);
                    self.recycle(packet.frame, tails);
                }
                Verdict::Undecided => {
                    counters.count(Reason::InternalError);
                    self.recycle(packet.frame, tails);
                }
            }
        }
    }

    fn leave(&mut self, port: u8, leaving: Leaving, head: Frame, tails: impl Iterator<Item = Frame>) {
        let out = &mut self.out[usize::from(port)];
        let mut len = head.len();
        out.burst.push(head);
        for tail in tails {
            len += tail.len();
            out.burst.push_tail(tail);
        }
        out.packets.push((leaving, len as u32));
    }

    /// The pieces of a datagram, in place of all its fragments.
    fn leave_cut(&mut self, port: u8, first: &Packet, pieces: impl Iterator<Item = Frame>) {
        let fragments = if let Part::First(datagram) = first.part { datagram.fragments } else { 1 };
        let mut pieces = pieces.peekable();
        while let Some(piece) = pieces.next() {
            let packets = if pieces.peek().is_none() { fragments } else { 0 };
            let leaving = Leaving::Forwarded { packets, is_stateless: first.is_stateless };
            self.leave(port, leaving, piece, std::iter::empty());
        }
    }

    fn recycle(&mut self, head: Frame, tails: impl IntoIterator<Item = Frame>) {
        self.pool.push(head);
        tails.into_iter().for_each(|tail| self.pool.push(tail));
    }

    /// Puts everything on the transmit rings and has the kernel send it. What finds no room is dropped and counted.
    fn transmit(&mut self, counters: &Counters, tap: &mut Option<OpenTap<'_>>) {
        for (index, (port, out)) in self.ports.iter_mut().zip(&mut self.out).enumerate() {
            let total = out.packets.len();
            if total == 0 {
                if out.unsent {
                    out.unsent = port.kick() == Kick::Left;
                }
                continue;
            }
            let mut sent = port.tx_burst(&mut self.pool, &mut out.burst);
            out.unsent = port.kick() == Kick::Left;
            if sent < total {
                // The ring was full: the kernel has just made room, unless the device is stuck.
                port.complete(&mut self.pool);
                sent += port.tx_burst(&mut self.pool, &mut out.burst);
                out.unsent = port.kick() == Kick::Left;
                if let Some(tap) = tap {
                    tap.unsent(index, &out.burst);
                }
            }
            let (mut forwarded, mut stateless, mut answered, mut bytes) = (0, 0, 0, 0);
            for (leaving, len) in &out.packets[..sent] {
                bytes += u64::from(*len);
                match leaving {
                    Leaving::Forwarded { packets, is_stateless } => {
                        forwarded += u64::from(*packets);
                        stateless += u64::from(*packets) * u64::from(*is_stateless);
                    }
                    Leaving::Answer(reason) => {
                        answered += 1;
                        counters.count(*reason);
                    }
                }
            }
            counters.add(Counter::forwarded, forwarded);
            counters.add(Counter::stateless_forwarded, stateless);
            counters.add(Counter::answered, answered);
            counters.add(Counter::tx_packets, sent as u64);
            counters.add(Counter::tx_bytes, bytes);
            for (leaving, _) in &out.packets[sent..] {
                let packets = if let Leaving::Forwarded { packets, .. } = leaving { *packets } else { 1 };
                (0..packets).for_each(|_| counters.count(Reason::TxRingFull));
            }
            out.burst.recycle(&mut self.pool);
            out.packets.clear();
        }
    }

    /// After [`Rings::transmit`]: gives receive entries back, takes sent frames back, and fills up.
    fn give_back(&mut self) {
        // All releases come first: a frame that is received and not released may not go to another ring.
        for port in &mut self.ports {
            port.release_rx(&mut self.pool);
            port.complete(&mut self.pool);
        }
        for port in &mut self.ports {
            port.refill(&mut self.pool);
        }
    }

    fn unsent(&self) -> bool {
        self.out.iter().any(|out| out.unsent)
    }
}

#[cfg(test)]
mod tests;
