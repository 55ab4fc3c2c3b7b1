//! Sends at a constant rate, whatever comes back.

use af_xdp::{Burst, Kick};

use crate::clock::now_ns;
use crate::flow::{Flow, Flows, Kind};
use crate::place::Port;

const BURST: usize = 64;

/// How to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where flows come from and go to.
    pub flows: Flows,
    /// Packets a second.
    pub rate: f64,
    /// Flows at one time.
    pub concurrent: u32,
    /// New flows a second; each takes the place of the oldest one.
    pub new_flows: f64,
    /// Seconds before the measurement.
    pub warm_up_s: f64,
    /// Seconds of measurement.
    pub time_s: f64,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Packets of the measurement.
    pub packets: u64,
    /// Flows begun, over all.
    pub flows: u64,
    /// The longest time by which a packet left late, in nanoseconds.
    pub late_max_ns: u64,
    /// When the first packet of the measurement was due.
    pub from_ns: u64,
    /// When the last one had left.
    pub to_ns: u64,
}

/// Sends a [`Load`], a burst at a time. Flows take turns over the ports.
pub struct Generator {
    load: Load,
    flows: Vec<Flow>,
    /// What each port is to send.
    bursts: Vec<Burst>,
    /// What is left to do, the current one first.
    phases: Vec<(Kind, f64)>,
    /// Of the current phase: when it began, and how many packets and new flows it has had.
    start_ns: u64,
    next: u64,
    renewed: u64,
    sent: Sent,
}

impl Generator {
    /// A generator over so many ports, whose first packet is due now.
    pub fn new(ports: usize, load: Load) -> Generator {
        let flows: Vec<Flow> = (0..load.concurrent).map(|id| Flow::new(&load.flows, id)).collect();
        let mut generator = Generator {
            sent: Sent { flows: flows.len() as u64, ..Sent::default() },
            flows,
            bursts: (0..ports).map(|_| Burst::with_capacity(BURST)).collect(),
            phases: vec![(Kind::WarmUp, load.warm_up_s), (Kind::Measured, load.time_s)],
            start_ns: 0,
            next: 0,
            renewed: 0,
            load,
        };
        generator.begin_phase();
        generator
    }

    fn begin_phase(&mut self) {
        self.flows.iter_mut().for_each(Flow::restart);
        (self.next, self.renewed) = (0, 0);
        self.start_ns = now_ns();
    }

    /// When packet `number` of this phase should leave.
    fn intended_ns(&self, number: u64) -> u64 {
        self.start_ns + (number as f64 * 1e9 / self.load.rate) as u64
    }

    /// Sends what is due, at most a burst a port. False once everything is sent.
    pub fn step(&mut self, ports: &mut [Port]) -> bool {
        let Some(&(kind, time_s)) = self.phases.first() else { return false };
        let total = (self.load.rate * time_s) as u64;
        let now = now_ns();
        // What could not be sent in time is not made up for later: the report says that fewer were sent.
        let is_over = (now - self.start_ns) as f64 > time_s * 1e9;
        if (self.next == total || is_over) && self.bursts.iter().all(Burst::is_empty) {
            return self.end_phase(kind, ports);
        }
        let total = if is_over { self.next } else { total };
        // The first packet is due at the start, not an interval later.
        let due = (((now - self.start_ns) as f64 * self.load.rate / 1e9) as u64 + 1).min(total);
        if self.next < due && kind == Kind::Measured {
            self.sent.late_max_ns =
                self.sent.late_max_ns.max(now.saturating_sub(self.intended_ns(self.next)));
        }
        while self.next < due {
            let at = (self.next % u64::from(self.load.concurrent)) as usize;
            let port = at % ports.len();
            if self.bursts[port].len() == BURST {
                break;
            }
            let Some(mut frame) = ports[port].pool.pop() else { break };
            let intended_ns = self.intended_ns(self.next);
            let wanted = (self.load.new_flows * (intended_ns - self.start_ns) as f64 / 1e9) as u64;
            if self.renewed < wanted {
                self.flows[at] = Flow::new(&self.load.flows, self.sent.flows as u32);
                self.sent.flows += 1;
                self.renewed += 1;
            }
            let flow = &mut self.flows[at];
            frame.set_len(flow.frame_len()).expect("the length was checked at the start");
            flow.next(kind, intended_ns, frame.data_mut());
            self.bursts[port].push(frame);
            self.next += 1;
        }
        for (Port { socket, pool }, burst) in ports.iter_mut().zip(&mut self.bursts) {
            if !burst.is_empty() {
                socket.transmit(pool, burst);
            }
            socket.kick();
            socket.complete(pool);
        }
        true
    }

    /// Packets of the measurement so far.
    pub fn progress(&self) -> u64 {
        if matches!(self.phases.first(), Some((Kind::Measured, _))) { self.next } else { 0 }
    }

    fn end_phase(&mut self, kind: Kind, ports: &mut [Port]) -> bool {
        // Nothing is left on the rings; an interface that went down does not keep us for ever.
        for Port { socket, pool } in ports {
            for _ in 0..1000 {
                if socket.kick() != Kick::Left {
                    break;
                }
                socket.complete(pool);
            }
        }
        if kind == Kind::Measured {
            self.sent.packets = self.next;
            self.sent.from_ns = self.start_ns;
            self.sent.to_ns = now_ns();
        }
        self.phases.remove(0);
        self.begin_phase();
        !self.phases.is_empty()
    }

    /// What was sent.
    pub fn finish(self) -> Sent {
        self.sent
    }
}
