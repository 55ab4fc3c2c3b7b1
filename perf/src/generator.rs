//! Sends at a constant rate, whatever comes back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use af_xdp::{Burst, FramePool, Kick, Socket};

use crate::clock::now_ns;
use crate::flow::{Flow, Flows, Kind};

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

/// The generator's thread. `progress`: packets of the measurement so far.
pub fn send(
    mut socket: Socket,
    mut pool: FramePool,
    load: &Load,
    progress: &AtomicU64,
    stop: &AtomicBool,
) -> Sent {
    let mut flows: Vec<Flow> = (0..load.concurrent).map(|id| Flow::new(&load.flows, id)).collect();
    let mut sent = Sent { flows: flows.len() as u64, ..Sent::default() };
    let phases = [(Kind::WarmUp, load.warm_up_s), (Kind::Measured, load.time_s)];
    for (kind, time_s) in phases {
        let start = now_ns();
        let packets = (load.rate * time_s) as u64;
        flows.iter_mut().for_each(Flow::restart);
        let mut renewed = 0u64;
        let mut next = 0u64;
        let mut burst = Burst::with_capacity(BURST);
        while (next < packets || !burst.is_empty()) && !stop.load(Ordering::Relaxed) {
            let now = now_ns();
            let due = (((now - start) as f64 * load.rate / 1e9) as u64).min(packets);
            let first = next;
            while next < due && burst.len() < BURST {
                let intended = start + (next as f64 * 1e9 / load.rate) as u64;
                let Some(mut frame) = pool.pop() else { break };
                let wanted = (load.new_flows * (intended - start) as f64 / 1e9) as u64;
                let at = (next % u64::from(load.concurrent)) as usize;
                if renewed < wanted {
                    flows[at] = Flow::new(&load.flows, sent.flows as u32);
                    sent.flows += 1;
                    renewed += 1;
                }
                let flow = &mut flows[at];
                frame.set_len(flow.frame_len()).expect("the length was checked at the start");
                flow.next(kind, intended, frame.data_mut());
                burst.push(frame);
                next += 1;
            }
            if next > first && kind == Kind::Measured {
                let intended = start + (first as f64 * 1e9 / load.rate) as u64;
                sent.late_max_ns = sent.late_max_ns.max(now.saturating_sub(intended));
                progress.store(next, Ordering::Relaxed);
            }
            if burst.is_empty() {
                std::hint::spin_loop();
            } else {
                socket.transmit(&mut pool, &mut burst);
            }
            if socket.kick() == Kick::Down {
                break;
            }
            socket.complete(&mut pool);
        }
        while socket.kick() == Kick::Left {
            socket.complete(&mut pool);
        }
        if kind == Kind::Measured {
            sent.packets = next - burst.len() as u64;
            sent.from_ns = start;
            sent.to_ns = now_ns();
        }
    }
    sent
}
