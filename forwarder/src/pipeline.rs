//! The whole walk of a packet on one screen.
//!
//! A pure function: a burst, the tables of one generation, the flow tables, the time and a source of randomness in; verdicts out.
//! No clock, no I/O, no lock, no log, no allocation. So the same code runs in the daemon, in `towpathctl trace` and `explain`, in
//! golden tests, in fuzzing and in benches.

use af_xdp::Frame;

use crate::packet::{Packet, Rewrite};
use crate::stage::{flow, icmp_error, nat, overlay, parse, reset, rewrite, route, service};
use crate::stats::{Counter, Counters};
use crate::table::flow_map::{FlowMap, FlowWorker};
use crate::tables::{Fib, Tables};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};

/// Judges a burst of at most [`crate::packet::BURST`] packets. Afterwards each has a verdict and no frame has changed; a packet that
/// is judged again gets the same verdict.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    parse::run(burst, cx, trace);
    flow::run(burst, cx, trace);
    icmp_error::run(burst, cx, trace);
    service::run(burst, cx, trace);
    route::run(burst, cx, trace);
    nat::run(burst, cx, trace);
    limit_answers(burst, cx);
    for (index, packet) in burst.iter().enumerate() {
        if let (Verdict::Answer { .. }, Rewrite::Answer(answer)) = (packet.verdict, packet.rewrite) {
            trace.step(index, || Step::Answer(answer));
        }
        trace.step(index, || Step::Verdict(packet.verdict));
    }
}

/// Rewrites the frame of one packet as [`run`] decided. To be called for verdicts forward and answer, right before the packet goes
/// on a transmit ring. False: the answer does not fit the frame, nothing is to be sent.
#[inline]
pub fn rewrite(packet: &mut Packet, tails: &[Frame], fib: &Fib) -> bool {
    overlay::rewrite(packet, tails, fib, rewrite::apply)
}

/// What the pipeline reads and writes besides the burst.
pub struct Context<'a> {
    /// Services, of one generation.
    pub tables: &'a Tables,
    /// Routes and next hops, of one epoch.
    pub fib: &'a Fib,
    /// Connections.
    pub flows: &'a FlowMap,
    /// This worker's part in `flows`.
    pub flow_worker: &'a mut FlowWorker,
    /// Clients that session affinity remembers.
    pub affinity: &'a FlowMap,
    /// This worker's part in `affinity`.
    pub affinity_worker: &'a mut FlowWorker,
    /// Seconds of the monotonic clock.
    pub now_s: u32,
    /// Source of randomness.
    pub rng: &'a mut Rng,
    /// Answers that may still be sent.
    pub answers: &'a mut AnswerBudget,
    /// Counters of this worker.
    pub counters: &'a Counters,
    /// Leave flows and affinity as they are: for traces on live tables.
    pub read_only: bool,
}

/// A small random generator (xorshift64*, Vigna 2016): for spreading, not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// `seed`: any number.
    pub fn new(seed: u64) -> Rng {
        Rng(seed | 1)
    }

    /// The next 64 random bits.
    #[inline]
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// How many RSTs, ICMP errors and echo replies a worker may send (RFC 1812 section 4.3.2.8): a token bucket.
#[derive(Clone, Debug)]
pub struct AnswerBudget {
    tokens: u32,
    per_second: u32,
    second: u32,
}

impl AnswerBudget {
    /// `per_second`: answers in each second.
    pub fn new(per_second: u32) -> AnswerBudget {
        AnswerBudget { tokens: per_second, per_second, second: 0 }
    }

    /// Takes one token, if there is one.
    fn take(&mut self, now_s: u32) -> bool {
        if self.second != now_s {
            (self.second, self.tokens) = (now_s, self.per_second);
        }
        let left = self.tokens > 0;
        self.tokens -= u32::from(left);
        left
    }
}

fn limit_answers(burst: &mut [Packet], cx: &mut Context<'_>) {
    for packet in burst {
        if packet.rewrite == Rewrite::Reset {
            reset::decide(packet);
        }
        let Verdict::Answer { reason, .. } = packet.verdict else { continue };
        if !cx.answers.take(cx.now_s) {
            packet.drop(Reason::AnswerLimit);
        } else if reason == Reason::EndpointRemoved {
            reset::note(packet, cx);
        }
    }
}

/// Counts the verdicts of a burst. A held packet is counted when it is judged again.
pub fn count(burst: &[Packet], counters: &Counters) {
    let (mut forwarded, mut stateless, mut answered, mut punted, mut held, mut gathered) = (0, 0, 0, 0, 0, 0);
    for packet in burst {
        match packet.verdict {
            Verdict::Forward { .. } => {
                forwarded += 1;
                stateless += u64::from(packet.is_stateless);
            }
            Verdict::Answer { reason, .. } => {
                answered += 1;
                counters.count(reason);
            }
            Verdict::Punt => punted += 1,
            Verdict::Hold { .. } => held += 1,
            Verdict::Gather => gathered += 1,
            Verdict::Drop(reason) => counters.count(reason),
            Verdict::Undecided => unreachable!("every packet has a verdict after the pipeline"),
        }
    }
    counters.add(Counter::forwarded, forwarded);
    counters.add(Counter::stateless_forwarded, stateless);
    counters.add(Counter::answered, answered);
    counters.add(Counter::punted, punted);
    counters.add(Counter::held, held);
    counters.add(Counter::fragments_gathered, gathered);
}
