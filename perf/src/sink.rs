//! Receives, and tells what happened to each packet.

use std::net::IpAddr;

use af_xdp::{Burst, FramePool, Socket};
use hdrhistogram::Histogram;

use crate::clock::now_ns;
use crate::flow::{Kind, Seen};
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

/// Judges packets one by one.
pub struct Judge {
    expected: Vec<Target>,
    since_ns: u64,
    endpoints: Vec<(IpAddr, u16)>,
    flows: Vec<Box<[FlowState]>>,
    received: Received,
}

const PAGE: usize = 1 << 16;

impl Judge {
    /// A judge that lets packets arrive at `expected` only; anywhere, if that is empty. Packets that should have left before
    /// `since_ns` are of another run: rings that are full when a run ends give their packets to the next.
    pub fn new(expected: Vec<Target>, since_ns: u64) -> Judge {
        Judge {
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

    /// A packet came at `now_ns`.
    pub fn judge(&mut self, packet: &[u8], now_ns: u64) {
        let Some(seen) = Seen::read(packet) else {
            self.received.foreign += 1;
            return;
        };
        if !seen.intact {
            self.received.damaged += 1;
            return;
        }
        if seen.intended_ns < self.since_ns {
            self.received.foreign += 1;
            return;
        }
        let endpoint = self.endpoint(seen.endpoint);
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
    socket: Socket,
    pool: FramePool,
    judge: Judge,
    burst: Burst,
    last_ns: u64,
}

impl Sink {
    /// A sink that lets packets arrive at `expected` only; anywhere, if that is empty.
    pub fn new(socket: Socket, pool: FramePool, expected: Vec<Target>) -> Sink {
        let now_ns = now_ns();
        let judge = Judge::new(expected, now_ns);
        Sink { socket, pool, judge, burst: Burst::with_capacity(64), last_ns: now_ns }
    }

    /// Judges what has come, at most a burst. False if nothing has.
    pub fn step(&mut self) -> bool {
        if self.socket.receive(&mut self.pool, &mut self.burst, 64) == 0 {
            return false;
        }
        self.last_ns = now_ns();
        self.burst.heads.iter().for_each(|frame| self.judge.judge(frame.data(), self.last_ns));
        self.burst.recycle(&mut self.pool);
        self.socket.release(&mut self.pool);
        self.socket.refill(&mut self.pool);
        true
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
    pub fn finish(self) -> Received {
        let kernel = self.socket.statistics().unwrap_or_default();
        let mut received = self.judge.finish();
        received.sink_dropped = kernel.rx_dropped + kernel.rx_ring_full + kernel.rx_fill_ring_empty_descs;
        received
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
        let mut judge = Judge::new(vec!["10.0.1.1-10.0.1.4:80".parse().unwrap()], 1000);
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
