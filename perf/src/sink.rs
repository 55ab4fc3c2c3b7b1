//! Receives, and tells what happened to each packet.

use std::net::IpAddr;

use af_xdp::Burst;
use hdrhistogram::Histogram;

use crate::clock::now_ns;
use crate::flow::{Flows, Kind, Seen, turn_back};
use crate::place::Port;
use crate::range::Target;

/// What was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// Different packets of the measurement.
    pub packets: u64,
    /// Packets that came more than once, counted once for each time too many.
    pub duplicates: u64,
    /// Packets that came after a later one of their flow (RFC 4737 section 3).
    pub reordered: u64,
    /// Packets at an address and port that they may not reach, or at another one than their flow before.
    pub wrong_endpoint: u64,
    /// Packets with a wrong checksum.
    pub damaged: u64,
    /// Packets that are not of this run: of somebody else, or left over from a run before.
    pub foreign: u64,
    /// Packets dropped by the kernel in front of the sink: the sink was too slow, the gateway is not at fault.
    pub sink_dropped: u64,
    /// From the intended time of sending to the receipt, in nanoseconds.
    pub latency_ns: Histogram<u64>,
}

/// A flow as the sink knows it: 64 sequence numbers back can be told apart.
#[derive(Clone, Copy, Default)]
struct FlowState {
    /// Behind the highest sequence number.
    next: u32,
    /// Bit `i`: number `next - 1 - i` was seen.
    seen: u64,
    /// Index into the endpoints, plus 1.
    endpoint: u32,
}

enum Order {
    New,
    Late,
    Twice,
}

impl FlowState {
    fn see(&mut self, sequence: u32) -> Order {
        if sequence >= self.next {
            let ahead = sequence - self.next + 1;
            self.seen = if ahead < 64 { self.seen << ahead } else { 0 } | 1;
            self.next = sequence + 1;
            return Order::New;
        }
        let behind = self.next - 1 - sequence;
        let bit = 1u64.checked_shl(behind).unwrap_or(0);
        if bit == 0 {
            return Order::Late; // cannot be told from a duplicate any more
        }
        if self.seen & bit != 0 {
            return Order::Twice;
        }
        self.seen |= bit;
        Order::Late
    }
}

/// Where packets are judged.
pub enum Side {
    /// Requests, by the endpoint that they reach.
    Endpoint,
    /// Answers, by whom they come from; each must reach the client of its flow.
    Client(Flows),
}

/// Judges packets one by one.
pub struct Judge {
    side: Side,
    expected: Vec<Target>,
    since_ns: u64,
    endpoints: Vec<(IpAddr, u16)>,
    flows: Vec<Box<[FlowState]>>,
    received: Received,
}

const PAGE: usize = 1 << 16;

impl Judge {
    /// A judge that lets packets arrive at `expected` only (or come from there, on the client's side); anywhere, if that is
    /// empty. Packets that should have left before `since_ns` are of another run: rings that are full when a run ends give
    /// their packets to the next.
    pub fn new(side: Side, expected: Vec<Target>, since_ns: u64) -> Judge {
        Judge {
            side,
            expected,
            since_ns,
            endpoints: vec![],
            flows: vec![],
            received: Received {
                packets: 0,
                duplicates: 0,
                reordered: 0,
                wrong_endpoint: 0,
                damaged: 0,
                foreign: 0,
                sink_dropped: 0,
                latency_ns: Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("valid bounds"),
            },
        }
    }

    fn flow(&mut self, id: u32) -> &mut FlowState {
        let (page, at) = (id as usize / PAGE, id as usize % PAGE);
        while self.flows.len() <= page {
            self.flows.push(vec![FlowState::default(); PAGE].into());
        }
        &mut self.flows[page][at]
    }

    /// Number of an endpoint, counted from 1; 0 if packets may not arrive there.
    fn endpoint(&mut self, endpoint: (IpAddr, u16)) -> u32 {
        if let Some(at) = self.endpoints.iter().position(|&known| known == endpoint) {
            return at as u32 + 1;
        }
        let may = self.expected.iter().any(|t| t.port == endpoint.1 && t.addrs.contains(endpoint.0));
        if !may && !self.expected.is_empty() {
            return 0;
        }
        self.endpoints.push(endpoint);
        self.endpoints.len() as u32
    }

    /// A packet came at `now_ns`. False if it is damaged or not of this run.
    pub fn judge(&mut self, packet: &[u8], now_ns: u64) -> bool {
        let Some(seen) = Seen::read(packet) else {
            self.received.foreign += 1;
            return false;
        };
        if !seen.intact {
            self.received.damaged += 1;
            return false;
        }
        if seen.intended_ns < self.since_ns {
            self.received.foreign += 1;
            return false;
        }
        self.count(&seen, now_ns);
        true
    }

    fn count(&mut self, seen: &Seen, now_ns: u64) {
        let endpoint = match &self.side {
            Side::Endpoint => self.endpoint(seen.to),
            Side::Client(flows) if flows.client(seen.flow) == seen.to => self.endpoint(seen.from),
            Side::Client(_) => 0,
        };
        let flow = self.flow(seen.flow);
        let moved = flow.endpoint != 0 && flow.endpoint != endpoint;
        flow.endpoint = endpoint;
        if seen.kind == Kind::WarmUp {
            return;
        }
        let order = flow.see(seen.sequence);
        self.received.wrong_endpoint += u64::from(moved || endpoint == 0);
        match order {
            Order::Twice => {
                self.received.duplicates += 1;
                return;
            }
            Order::Late => self.received.reordered += 1,
            Order::New => {}
        }
        self.received.packets += 1;
        self.received.latency_ns.saturating_record(now_ns.saturating_sub(seen.intended_ns).max(1));
    }

    /// What was judged.
    pub fn finish(self) -> Received {
        self.received
    }
}

/// Receives into a [`Judge`], a burst at a time.
pub struct Sink {
    judge: Judge,
    burst: Burst,
    answers: Burst,
    last_ns: u64,
}

impl Sink {
    /// A sink on one side that knows of `expected` only; of anything, if that is empty.
    pub fn new(side: Side, expected: Vec<Target>) -> Sink {
        let now_ns = now_ns();
        Sink {
            judge: Judge::new(side, expected, now_ns),
            burst: Burst::with_capacity(64),
            answers: Burst::with_capacity(64),
            last_ns: now_ns,
        }
    }

    /// Judges what has come, at most a burst a port. False if nothing has.
    pub fn step(&mut self, ports: &mut [Port]) -> bool {
        let mut any = false;
        for Port { socket, pool } in ports {
            if socket.receive(pool, &mut self.burst, 64) > 0 {
                any = true;
                self.last_ns = now_ns();
                for frame in &self.burst.heads {
                    self.judge.judge(frame.data(), self.last_ns);
                }
                self.burst.recycle(pool);
                socket.release(pool);
                socket.refill(pool);
            }
        }
        any
    }

    /// Judges what has come, as [`Sink::step`] does, and sends it back to where it says it comes from; not what is damaged.
    pub fn echo(&mut self, ports: &mut [Port]) -> bool {
        let mut any = false;
        for Port { socket, pool } in ports {
            if socket.receive(pool, &mut self.burst, 64) > 0 {
                any = true;
                self.last_ns = now_ns();
                for mut frame in self.burst.heads.drain(..) {
                    if self.judge.judge(frame.data(), self.last_ns) {
                        turn_back(frame.data_mut());
                        self.answers.push(frame);
                    } else {
                        pool.push(frame);
                    }
                }
                socket.transmit(pool, &mut self.answers);
                self.answers.recycle(pool); // the ring is full: dropped
                socket.kick();
                socket.release(pool);
            }
            socket.complete(pool);
            socket.refill(pool);
        }
        any
    }

    /// True if nothing has come for so long.
    pub fn is_silent(&self, for_ns: u64) -> bool {
        now_ns().saturating_sub(self.last_ns) > for_ns
    }

    /// Packets so far.
    pub fn progress(&self) -> u64 {
        self.judge.received.packets
    }

    /// What was received.
    pub fn finish(self, ports: &[Port]) -> Received {
        let mut received = self.judge.finish();
        for port in ports {
            let kernel = port.socket.statistics().unwrap_or_default();
            received.sink_dropped +=
                kernel.rx_dropped + kernel.rx_ring_full + kernel.rx_fill_ring_empty_descs;
        }
        received
    }
}

impl Received {
    /// Adds the mistakes that were noticed at the other side, on the way there.
    pub fn add_mistakes(&mut self, other: &Received) {
        self.duplicates += other.duplicates;
        self.wrong_endpoint += other.wrong_endpoint;
        self.damaged += other.damaged;
        self.sink_dropped += other.sink_dropped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Flow, Flows};

    #[test]
    fn every_fate_is_counted_apart() {
        let flows = Flows {
            src_mac: [2; 6],
            dst_mac: [2; 6],
            src: "10.0.0.1".parse().unwrap(),
            dst: "10.0.1.1-10.0.1.9:80".parse().unwrap(),
            frame_len: 60,
        };
        let mut flow = Flow::new(&flows, 3);
        let packets: Vec<Vec<u8>> = (0..100)
            .map(|i| {
                let mut packet = vec![0; 60];
                flow.next(Kind::Measured, 1000 + i, &mut packet);
                packet
            })
            .collect();
        let mut judge = Judge::new(Side::Endpoint, vec!["10.0.1.1-10.0.1.4:80".parse().unwrap()], 1000);
        for i in [0, 1, 3, 2, 3, 3, 4] {
            judge.judge(&packets[i], 3000);
        }
        let mut damaged = packets[5].clone();
        damaged[59] ^= 1;
        judge.judge(&damaged, 3000);
        judge.judge(&[0; 60], 3000);
        // The same flow at another endpoint that it may reach, then flow 8 at one that it may not.
        let mut elsewhere = vec![0; 60];
        let mut other = Flow::new(&Flows { dst: "10.0.1.2:80".parse().unwrap(), ..flows.clone() }, 3);
        for _ in 0..=6 {
            other.next(Kind::Measured, 1000, &mut elsewhere);
        }
        judge.judge(&elsewhere, 3000);
        Flow::new(&flows, 8).next(Kind::Measured, 1000, &mut elsewhere);
        judge.judge(&elsewhere, 3000);
        // Left over from a run before.
        Flow::new(&flows, 3).next(Kind::Measured, 999, &mut elsewhere);
        judge.judge(&elsewhere, 3000);
        let received = judge.finish();
        assert_eq!((received.packets, received.duplicates, received.reordered), (7, 2, 1));
        assert_eq!((received.wrong_endpoint, received.damaged, received.foreign), (2, 1, 2));
        assert_eq!(received.latency_ns.len(), 7);
        assert_eq!(received.latency_ns.max(), 2000);
    }

    #[test]
    fn answers_come_from_the_service_and_to_the_client_of_their_flow() {
        let flows = Flows {
            src_mac: [2; 6],
            dst_mac: [2; 6],
            src: "10.0.0.1-10.0.0.9".parse().unwrap(),
            dst: "10.0.1.1:80".parse().unwrap(),
            frame_len: 60,
        };
        let mut judge = Judge::new(Side::Client(flows.clone()), vec![flows.dst], 0);
        let elsewhere = Flows { dst: "10.0.1.2:80".parse().unwrap(), ..flows.clone() };
        let others = Flows { src: "10.0.0.2-10.0.0.9".parse().unwrap(), ..flows.clone() };
        let mut packet = vec![0; 60];
        for (id, of, wrong) in [(0, &flows, 0), (1, &elsewhere, 1), (2, &others, 2)] {
            Flow::new(of, id).next(Kind::Measured, 1, &mut packet);
            turn_back(&mut packet);
            judge.judge(&packet, 2);
            assert_eq!(judge.received.wrong_endpoint, wrong);
        }
    }

    #[test]
    fn the_window_agrees_with_a_set() {
        let mut state = FlowState::default();
        let mut set = std::collections::HashSet::new();
        let mut number = 1u32;
        let mut highest = 0;
        for step in 0..10_000u32 {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let sequence = (step + (number >> 16) % 60).saturating_sub(30);
            let twice = !set.insert(sequence);
            let late = sequence < highest;
            if highest.saturating_sub(sequence) > 63 {
                continue;
            }
            match state.see(sequence) {
                Order::Twice => assert!(twice, "step {step}"),
                Order::Late => assert!(late && !twice, "step {step}"),
                Order::New => assert!(!late && !twice, "step {step}"),
            }
            highest = highest.max(sequence + 1);
        }
    }
}
