//! Where the frames of a worker are, for `towpathctl get workers`: every frame of its memory is in exactly one place at the end of
//! every round. The worker publishes it before it sleeps, and every few milliseconds while it does not; no packet pays for it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use crate::port::xsk::steer::MAX_PORTS;
use crate::port::{FramePool, Port, QueueAccount, QueueFrames, Refused};

/// How often a worker that has no time to sleep publishes.
const EVERY_NS: u64 = 10_000_000;

/// The published account; the worker writes, anybody reads. Numbers of about one moment, but for `missing`, which the worker
/// computes itself.
#[derive(Debug, Default)]
pub struct Frames {
    total: AtomicU64,
    free: AtomicU64,
    held: AtomicU64,
    missing: AtomicI64,
    queues: [Queue; MAX_PORTS as usize],
}

/// [`QueueAccount`] in atomics.
#[derive(Debug, Default)]
struct Queue {
    fill: AtomicU64,
    rx: AtomicU64,
    tx: AtomicU64,
    completion: AtomicU64,
    kernel: AtomicU64,
    rx_refused: AtomicU64,
    completions_refused: AtomicU64,
    tx_empty: AtomicU64,
    lost_sends: AtomicU64,
}

fn put(cell: &AtomicU64, value: impl Into<u64>) {
    cell.store(value.into(), Ordering::Relaxed);
}

fn get(cell: &AtomicU64) -> u64 {
    cell.load(Ordering::Relaxed)
}

impl Queue {
    fn put(&self, account: &QueueAccount) {
        let QueueAccount { frames, refused, lost_sends } = account;
        put(&self.fill, frames.fill);
        put(&self.rx, frames.rx);
        put(&self.tx, frames.tx);
        put(&self.completion, frames.completion);
        put(&self.kernel, frames.kernel);
        put(&self.rx_refused, refused.rx);
        put(&self.completions_refused, refused.completions);
        put(&self.tx_empty, refused.tx_empty);
        put(&self.lost_sends, *lost_sends);
    }
}

impl Frames {
    /// Worker, at the end of a round: nothing of a burst is under way any more. `held`: frames of packets that wait.
    pub(super) fn publish<P: Port>(&self, pool: &FramePool, held: usize, ports: &mut [P]) {
        let mut on_rings = 0;
        for (port, queue) in ports.iter_mut().zip(&self.queues) {
            let account = port.account();
            on_rings += u64::from(account.frames.total());
            queue.put(&account);
        }
        let (total, free, held) = (u64::from(pool.umem().chunks()), pool.len() as u64, held as u64);
        put(&self.total, total);
        put(&self.free, free);
        put(&self.held, held);
        self.missing.store(total as i64 - (free + held + on_rings) as i64, Ordering::Relaxed);
    }

    /// Frames of the worker's memory; 0 before it has published.
    pub fn total(&self) -> u64 {
        get(&self.total)
    }

    /// Frames that are free.
    pub fn free(&self) -> u64 {
        get(&self.free)
    }

    /// Frames of packets that wait: for a next hop, or for other fragments.
    pub fn held(&self) -> u64 {
        get(&self.held)
    }

    /// Frames that are nowhere; negative if some are in two places. Anything but 0 is a bug.
    pub fn missing(&self) -> i64 {
        self.missing.load(Ordering::Relaxed)
    }

    /// What the queue of `port` last told of itself.
    pub fn queue(&self, port: usize) -> QueueAccount {
        let Some(queue) = self.queues.get(port) else { return QueueAccount::default() };
        QueueAccount {
            frames: QueueFrames {
                fill: get(&queue.fill) as u32,
                rx: get(&queue.rx) as u32,
                tx: get(&queue.tx) as u32,
                completion: get(&queue.completion) as u32,
                kernel: get(&queue.kernel) as u32,
            },
            refused: Refused {
                rx: get(&queue.rx_refused),
                completions: get(&queue.completions_refused),
                tx_empty: get(&queue.tx_empty),
            },
            lost_sends: get(&queue.lost_sends),
        }
    }
}

/// When to publish next.
#[derive(Default)]
pub(super) struct Due {
    next_ns: u64,
}

impl Due {
    /// True once every few milliseconds.
    #[inline]
    pub(super) fn is_due(&mut self, now_ns: u64) -> bool {
        let is_due = now_ns >= self.next_ns;
        if is_due {
            self.next_ns = now_ns + EVERY_NS;
        }
        is_due
    }
}
