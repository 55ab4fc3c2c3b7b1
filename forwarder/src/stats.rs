//! Counters: each worker writes its own, readers sum them. No locks, no read-modify-write on shared lines.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::verdict::Reason;

/// Declares the counters of a worker that are not drop reasons.
macro_rules! counters {
    ($($field:ident: $help:literal;)*) => {
        /// A counter of a worker.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Counter { $(#[doc = $help] #[allow(non_camel_case_types)] $field),* }

        impl Counter {
            /// Every counter, in order.
            pub const ALL: &'static [Counter] = &[$(Counter::$field),*];

            /// Its name in statistics.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$field => stringify!($field)),* }
            }

            /// One sentence for operators.
            pub const fn help(self) -> &'static str {
                match self { $(Counter::$field => $help),* }
            }
        }
    };
}

counters! {
    rx_packets: "Packets taken from receive rings.";
    rx_bytes: "Bytes taken from receive rings.";
    tx_packets: "Packets put on transmit rings, answers included.";
    tx_bytes: "Bytes put on transmit rings.";
    forwarded: "Packets forwarded.";
    stateless_forwarded: "Packets forwarded, of them, whose connection found no room in the flow table and goes by consistent hash.";
    answered: "Packets answered by the gateway itself (RST, ICMP error, echo reply).";
    punted: "Packets handed to the kernel untouched.";
    held: "Packets that had to wait for a next hop.";
    fragments_gathered: "Fragments that began to wait for the others of their datagram.";
    fragments_released: "Fragments that ceased to wait: their datagram was complete, or was given up.";
    fragments_handed_over: "Fragments passed to the worker that gathers their datagram.";
    fragments_taken_over: "Fragments that other workers passed to this one.";
    datagrams_complete: "Datagrams all of whose fragments were there.";
    datagrams_cut: "Datagrams cut into fragments that fit the way out.";
    flows_created: "Flows created.";
    flows_expired: "Flows expired.";
    bursts: "Bursts that were not empty.";
    sleeps: "Times that the worker slept for want of packets.";
}

const COUNTERS: usize = Counter::ALL.len();
const REASONS: usize = Reason::ALL.len();

/// The counters of one worker; only that worker writes.
#[derive(Debug)]
pub struct Counters {
    counts: CachePadded<[AtomicU64; COUNTERS]>,
    reasons: CachePadded<[AtomicU64; REASONS]>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            counts: CachePadded::new([const { AtomicU64::new(0) }; COUNTERS]),
            reasons: CachePadded::new([const { AtomicU64::new(0) }; REASONS]),
        }
    }
}

impl Counters {
    /// Adds `n`. Only the owning worker may call this: load and store, no locked instruction.
    #[inline]
    pub fn add(&self, counter: Counter, n: u64) {
        let cell = &self.counts[counter as usize];
        cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Counts one packet dropped or answered for `reason`. Only the owning worker may call this.
    #[inline]
    pub fn count(&self, reason: Reason) {
        let cell = &self.reasons[reason as usize];
        cell.store(cell.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// The value of a counter. Any thread.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counts[counter as usize].load(Ordering::Relaxed)
    }

    /// How many packets were dropped or answered for `reason`. Any thread.
    pub fn reason(&self, reason: Reason) -> u64 {
        self.reasons[reason as usize].load(Ordering::Relaxed)
    }
}

/// The sum of the counters of several workers at about one moment. Not shared with anybody.
pub fn sum<'c>(workers: impl IntoIterator<Item = &'c Counters>) -> Counters {
    let total = Counters::default();
    for worker in workers {
        for (cell, value) in total.counts.iter().zip(worker.counts.iter()) {
            cell.store(cell.load(Ordering::Relaxed) + value.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (cell, value) in total.reasons.iter().zip(worker.reasons.iter()) {
            cell.store(cell.load(Ordering::Relaxed) + value.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_workers() {
        let workers = [Counters::default(), Counters::default()];
        workers[0].add(Counter::forwarded, 2);
        workers[1].add(Counter::forwarded, 40);
        workers[1].count(Reason::NoRoute);
        let total = sum(&workers);
        assert_eq!((total.get(Counter::forwarded), total.reason(Reason::NoRoute)), (42, 1));
        assert_eq!(workers[0].get(Counter::forwarded), 2, "nothing is taken from the workers");
    }

    #[test]
    fn counts_by_name() {
        let counters = Counters::default();
        counters.add(Counter::rx_packets, 2);
        counters.add(Counter::rx_packets, 3);
        counters.count(Reason::NoRoute);
        assert_eq!(counters.get(Counter::rx_packets), 5);
        assert_eq!(counters.reason(Reason::NoRoute), 1);
        assert_eq!(Counter::rx_packets.name(), "rx_packets");
    }
}
