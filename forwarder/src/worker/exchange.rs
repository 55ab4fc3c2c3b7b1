//! Ways between workers for fragments: those of one datagram may come in by different queues, the first one where its ports lead, the
//! others where its addresses do. One worker gathers them all, whichever took them.
//!
//! Each worker has its own packet memory, so that bytes are copied. Both queues of an inbox are bounded and lock-free, and the buffers
//! go back and forth, so that nothing is allocated.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crossbeam::queue::ArrayQueue;

use super::reassembly::Key;
use crate::control::publish::WorkerLink;

/// Fragments that wait for one worker at most: four bursts.
const PARCELS: usize = 256;
/// Bytes of a buffer at first. Longer frames make it grow once.
const BUFFER_LEN: usize = 2048;

/// A fragment for another worker.
pub struct Parcel {
    /// Index of the port that it came in by.
    pub port: u8,
    /// The number that captures call it by.
    pub id: u64,
    /// The frame, from the Ethernet header on.
    pub bytes: Vec<u8>,
}

/// What others have for one worker.
struct Inbox {
    full: ArrayQueue<Parcel>,
    empty: ArrayQueue<Vec<u8>>,
    owner: Arc<WorkerLink>,
}

/// The inboxes of all workers.
pub struct Exchange {
    /// Keyed at random, so that nobody outside can choose who gathers.
    hasher: RandomState,
    inboxes: Box<[Inbox]>,
}

impl Exchange {
    /// Inboxes for `workers`. Takes no memory for one worker alone.
    pub fn new(workers: &[Arc<WorkerLink>]) -> Arc<Exchange> {
        let parcels = if workers.len() > 1 { PARCELS } else { 0 };
        let inbox = |owner: &Arc<WorkerLink>| {
            let empty = ArrayQueue::new(parcels.max(1));
            for _ in 0..parcels {
                let _ = empty.push(Vec::with_capacity(BUFFER_LEN));
            }
            Inbox { full: ArrayQueue::new(parcels.max(1)), empty, owner: owner.clone() }
        };
        let inboxes = workers.iter().map(inbox).collect();
        Arc::new(Exchange { hasher: RandomState::new(), inboxes })
    }

    /// The worker that gathers a datagram.
    pub fn gatherer(&self, key: &Key) -> usize {
        match self.inboxes.len() {
            0 | 1 => 0,
            workers => (self.hasher.hash_one(key) % workers as u64) as usize,
        }
    }

    /// Hands a frame that came in by `port` and that captures call `id` to worker `to`; `fill` gets an empty buffer for its bytes.
    /// False: its inbox is full. [`Exchange::wake`] has to follow.
    pub fn send(&self, to: usize, port: u8, id: u64, fill: impl FnOnce(&mut Vec<u8>)) -> bool {
        let Some(inbox) = self.inboxes.get(to) else { return false };
        let Some(mut bytes) = inbox.empty.pop() else { return false };
        bytes.clear();
        fill(&mut bytes);
        // There are as many places as buffers.
        inbox.full.push(Parcel { port, id, bytes }).is_ok()
    }

    /// Wakes a worker that was sent something, if it sleeps.
    pub fn wake(&self, worker: usize) {
        let Some(inbox) = self.inboxes.get(worker) else { return };
        // With the fence in `is_empty`: either this sees that it sleeps, or it sees what was sent.
        fence(Ordering::SeqCst);
        if inbox.owner.is_asleep() {
            inbox.owner.wake();
        }
    }

    /// The oldest frame for `worker`. Its buffer is to be given back.
    pub fn receive(&self, worker: usize) -> Option<Parcel> {
        self.inboxes.get(worker)?.full.pop()
    }

    /// Takes the buffer of a frame back that `worker` received.
    pub fn give_back(&self, worker: usize, parcel: Parcel) {
        if let Some(inbox) = self.inboxes.get(worker) {
            let _ = inbox.empty.push(parcel.bytes);
        }
    }

    /// True if there is nothing for `worker`. It has said before that it is asleep, if it wants to be woken by what comes after.
    pub fn is_empty(&self, worker: usize) -> bool {
        fence(Ordering::SeqCst);
        self.inboxes.get(worker).is_none_or(|inbox| inbox.full.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::control::publish::Publisher;

    #[test]
    fn an_inbox_is_bounded_and_its_buffers_come_back() {
        let publisher = Publisher::new(2).unwrap();
        let exchange = Exchange::new(publisher.workers());
        for round in 0..3u8 {
            for i in 0..PARCELS {
                assert!(exchange.send(1, round, 0, |bytes| bytes.extend([i as u8; 3])));
            }
            assert!(!exchange.send(1, round, 0, |_| unreachable!("no buffer is left")));
            assert!(exchange.is_empty(0) && !exchange.is_empty(1));
            for i in 0..PARCELS {
                let parcel = exchange.receive(1).unwrap();
                assert_eq!((parcel.port, &parcel.bytes[..]), (round, &[i as u8; 3][..]));
                exchange.give_back(1, parcel);
            }
            assert!(exchange.receive(1).is_none());
        }
    }

    #[test]
    fn alone_a_worker_gathers_everything_itself() {
        let publisher = Publisher::new(1).unwrap();
        let exchange = Exchange::new(publisher.workers());
        assert!(!exchange.send(0, 0, 0, |_| unreachable!("there is no buffer")));
    }

    /// Every parcel arrives once, from two senders at a time.
    #[test]
    fn parcels_of_several_senders_arrive_once() {
        const EACH: u32 = 20_000;
        let publisher = Publisher::new(3).unwrap();
        let exchange = Exchange::new(publisher.workers());
        let done = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut seen = vec![0u8; 2 * EACH as usize];
                loop {
                    let over = done.load(Ordering::Acquire);
                    while let Some(parcel) = exchange.receive(2) {
                        let number = u32::from_be_bytes(parcel.bytes[..].try_into().unwrap());
                        seen[number as usize] += 1;
                        exchange.give_back(2, parcel);
                    }
                    if over {
                        return seen;
                    }
                    thread::yield_now();
                }
            });
            let senders: Vec<_> = (0..2)
                .map(|sender| {
                    let exchange = &exchange;
                    scope.spawn(move || {
                        for number in sender * EACH..(sender + 1) * EACH {
                            while !exchange.send(2, 0, 0, |bytes| bytes.extend(number.to_be_bytes())) {
                                thread::yield_now();
                            }
                        }
                    })
                })
                .collect();
            senders.into_iter().for_each(|sender| sender.join().unwrap());
            done.store(true, Ordering::Release);
            receiver.join().unwrap()
        });
        assert!(seen.iter().all(|count| *count == 1));
    }
}
