//! Counters of rings, for people: what was lost in them before the pipeline saw it, and what the kernel or we refused.
//!
//! A packet that is lost in a ring is not among those received, so that it is in no sum of the pipeline: received packets are
//! those forwarded, answered, punted or dropped for a reason, whatever the rings lost.

use std::collections::BTreeMap;

use config::control::Count;

use super::Shared;

/// A counter of the kernel that means lost packets: its name, its value, and what it counts.
type Loss = (&'static str, fn(&af_xdp::Statistics) -> u64, &'static str);

const LOSSES: [Loss; 3] = [
    (
        "rx_ring_full",
        |kernel| kernel.rx_ring_full,
        "Packets that found the receive ring full: the worker was late. More room: [rings] rx.",
    ),
    (
        "rx_dropped",
        |kernel| kernel.rx_dropped,
        "Packets that found no free frame or were too long for one. More room: [rings] fill.",
    ),
    (
        "rx_fill_ring_empty_descs",
        |kernel| kernel.rx_fill_ring_empty_descs,
        "Times that no free frame was left; but for zero copy, packets of rx_dropped.",
    ),
];

impl Shared {
    /// What the rings of all ports lost.
    pub(super) fn ring_losses(&self) -> Vec<Count> {
        let kernel: Vec<_> = (0..self.gateway.ports.len()).map(&self.socket_counters).collect();
        let count = |(name, value, help): &Loss| Count {
            name: (*name).to_owned(),
            value: kernel.iter().map(value).sum(),
            help: (*help).to_owned(),
        };
        LOSSES.iter().map(count).collect()
    }

    /// Counters of the rings of a port, all workers together, by name.
    pub(super) fn port_counters(&self, port: usize) -> BTreeMap<String, u64> {
        let kernel = (self.socket_counters)(port);
        let queues: Vec<_> =
            self.publisher.workers().iter().map(|worker| worker.frames().queue(port)).collect();
        let sum = |value: fn(&crate::port::QueueAccount) -> u64| queues.iter().map(value).sum::<u64>();
        let counters = [
            ("rx_dropped", kernel.rx_dropped),
            ("rx_ring_full", kernel.rx_ring_full),
            ("rx_fill_ring_empty_descs", kernel.rx_fill_ring_empty_descs),
            ("rx_invalid_descs", kernel.rx_invalid_descs),
            ("tx_invalid_descs", kernel.tx_invalid_descs),
            ("tx_ring_empty_descs", kernel.tx_ring_empty_descs),
            ("rx_refused", sum(|queue| queue.refused.rx)),
            ("completions_refused", sum(|queue| queue.refused.completions)),
            ("tx_empty", sum(|queue| queue.refused.tx_empty)),
            ("lost_sends", sum(|queue| queue.lost_sends)),
        ];
        counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
