//! Finds every frame again after the process that had them was killed.
//!
//! The kernel goes on meanwhile: it puts packets on RX rings, sends, completes. So nothing here depends on where the
//! kernel's own indices stand, only on words and indices that the dead process wrote. In this order:
//!
//! 1. Entries of the RX rings that were not released. A packet whose frames are as received, or can be restored from the
//!    journal, comes again. All others are done with: they become tombstones, so that a frame that goes round once more
//!    is not taken for the old packet.
//! 2. Packets that were written to a TX ring, but not shown to the kernel: shown now.
//! 3. Completions that were not released: their frames are free.
//! 4. Every other frame: published on a fill or TX ring, then the kernel has it and returns it; else it is free.
//!
//! Each step can be repeated from the start: a death during recovery is recovered from in the same way. The test below
//! dies before every single store, of the work and of the recovery.
//!
//! That the kernel plays along is shown by `tests/kill.rs`, over real rings on veth (Linux 6.18): bound sockets stay in
//! working order while nobody has their rings mapped, packets gather in the RX ring meanwhile (4,096 entries are 40 ms at
//! 100,000 packets a second; a new process needs about 5 ms), and a forwarder that was killed 15 times in two seconds
//! under 40,000 packets a second lost and doubled none.

use crate::frame::FramePool;
use crate::ledger::Owner;
use crate::queue::{Queue, TOMBSTONE};
use crate::ring::CONTINUES;
use crate::umem::Umem;

/// What recovery found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// Received packets that were not handled yet: they come again.
    pub again: u32,
    /// Received packets that were being rewritten: put back as they came, they come again. Part of `again`.
    pub restored: u32,
    /// Received packets that were being rewritten and could not be restored: lost.
    pub interrupted: u32,
    /// Packets that were kept for later (waiting for a next hop): lost.
    pub held: u32,
    /// Frames that were ready on a TX ring: sent now.
    pub submitted: u32,
    /// Frames that were sent before and came back.
    pub completed: u32,
}

/// Makes the pool of free frames of `umem`, and sets `queues` going where their last user stopped.
///
/// `queues` are all that share `umem`, each with a port number of its own. What a port had that is not among them is free: its sockets
/// must be closed.
pub(crate) fn recover(umem: Umem, queues: &mut [&mut Queue]) -> (FramePool, Recovered) {
    let mut found = Recovered::default();
    let mut by_port = [None; 256];
    for (index, queue) in queues.iter().enumerate() {
        by_port[usize::from(queue.port)] = Some(index);
    }
    for queue in queues.iter_mut() {
        receive_again(umem, queue, &mut found);
    }
    for queue in queues.iter_mut() {
        submit_written(umem, queue, &mut found);
        drain_completions(umem, queue, &mut found);
        queue.in_kernel = 0;
        queue.in_flight = 0;
    }
    let mut free = vec![];
    for chunk in (0..umem.chunks()).rev() {
        match umem.owner(chunk) {
            Owner::Free => {}
            Owner::Fill { port, index } => {
                if let Some(queue) = by_port[usize::from(port)].map(|at| &mut queues[at])
                    && is_published(index, queue.fill.next())
                {
                    queue.in_kernel += 1;
                    continue;
                }
            }
            Owner::Tx { port, index } => {
                if let Some(queue) = by_port[usize::from(port)].map(|at| &mut queues[at])
                    && is_published(index, queue.tx.next())
                {
                    queue.in_flight += 1;
                    continue;
                }
            }
            owner => found.held += u32::from(owner == Owner::Held),
        }
        umem.0.set(chunk, Owner::Free);
        free.push(chunk);
    }
    (FramePool::new(umem, free), found)
}

/// True if the producer has passed `index`.
fn is_published(index: u32, producer: u32) -> bool {
    (producer.wrapping_sub(index) as i32) > 0
}

/// Sorts what lies in the RX ring into packets that come again and tombstones.
fn receive_again(umem: Umem, queue: &mut Queue, found: &mut Recovered) {
    let ready = queue.rx.peek(queue.rx.len());
    let mut first = 0;
    while first < ready {
        let mut end = first + 1;
        while end < ready && queue.rx.get(end - 1).options & CONTINUES != 0 {
            end += 1;
        }
        if end == ready && queue.rx.get(end - 1).options & CONTINUES != 0 {
            // The kernel has not shown the rest of this packet, so nobody has taken any of it.
            break;
        }
        let segments: Vec<Option<(u32, u32)>> =
            (first..end).map(|i| queue.locate(queue.rx.get(i).addr)).collect();
        if !as_received(umem, queue, &segments, found) {
            // Words first: while entries are left without a tombstone, their words say that they are done with.
            for &(chunk, _) in segments.iter().flatten() {
                match umem.owner(chunk) {
                    Owner::Tx { .. } | Owner::Free => continue,
                    Owner::Rewriting { .. } => found.interrupted += 1,
                    Owner::Held => found.held += 1,
                    Owner::Fill { .. } | Owner::Peeked { .. } => {}
                }
                umem.0.set(chunk, Owner::Free);
            }
            (first..end).for_each(|i| queue.rx.overwrite(i, TOMBSTONE));
        }
        first = end;
    }
}

/// If all segments of a packet are as the kernel wrote them, or can be made so, gives them the state of chunks that the
/// kernel hands over.
fn as_received(umem: Umem, queue: &Queue, segments: &[Option<(u32, u32)>], found: &mut Recovered) -> bool {
    let mut restored = false;
    for &segment in segments {
        let Some((chunk, offset)) = segment else { return false };
        let usable = match umem.owner(chunk) {
            Owner::Fill { port, .. } | Owner::Peeked { port } => port == queue.port,
            Owner::Rewriting { slot: Some(slot) } => {
                restored = true;
                umem.0.undo(chunk, offset, slot)
            }
            _ => false,
        };
        if !usable {
            return false;
        }
    }
    for &(chunk, _) in segments.iter().flatten() {
        if !umem.0.word(chunk).is_fill_of(queue.port) {
            umem.0.set(chunk, Owner::Fill { port: queue.port, index: queue.fill.next().wrapping_sub(1) });
        }
    }
    found.again += 1;
    found.restored += u32::from(restored);
    true
}

/// Submits the packets that were written behind the producer of the TX ring.
///
/// All slots of a packet are written before the word of its first frame, so that word stands for the whole packet.
fn submit_written(umem: Umem, queue: &mut Queue, found: &mut Recovered) {
    let mut written = 0;
    while written < queue.tx.len() {
        let mut index = queue.tx.next().wrapping_add(written);
        let mut desc = queue.tx.read(index);
        let sent = |chunk, index| umem.owner(chunk) == Owner::Tx { port: queue.port, index };
        if !queue.locate(desc.addr).is_some_and(|(chunk, _)| sent(chunk, index)) {
            break;
        }
        written += 1;
        while desc.options & CONTINUES != 0 && written < queue.tx.len() {
            index = index.wrapping_add(1);
            desc = queue.tx.read(index);
            if let Some((chunk, _)) = queue.locate(desc.addr) {
                umem.0.set(chunk, Owner::Tx { port: queue.port, index });
            }
            written += 1;
        }
    }
    found.submitted += written;
    queue.tx.submit_found(written);
}

/// Frees what the kernel has sent. Nothing is used again before its completion is released.
fn drain_completions(umem: Umem, queue: &mut Queue, found: &mut Recovered) {
    let n = queue.completion.peek(queue.completion.len());
    for i in 0..n {
        if let Some((chunk, _)) = queue.locate(queue.completion.get(i))
            && umem.0.word(chunk).is_tx_of(queue.port)
        {
            umem.0.set(chunk, Owner::Free);
            found.completed += 1;
        }
    }
    queue.completion.advance(n);
    queue.completion.release();
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::burst::Burst;
    use crate::crash;
    use crate::queue::kernel_twin::{Kernel, Rings};

    const CHUNKS: u32 = 40;
    const PACKETS: u8 = 24;

    /// What a packet is to the process under test; its number is byte 1.
    fn is_dropped(number: u8) -> bool {
        number % 5 == 4
    }

    fn is_jumbo(number: u8) -> bool {
        number % 4 == 2
    }

    /// The kernel with both ports, and the wire: how often each packet left.
    struct World {
        umem: Umem,
        rings: [Rings; 2],
        kernels: [Kernel; 2],
        /// Sent and not completed yet, per port.
        sent: [Vec<u64>; 2],
        next: u8,
        wire: BTreeMap<Vec<u8>, u32>,
    }

    impl World {
        fn new(umem: Umem) -> World {
            let rings = [Rings::new(8, u32::MAX - 9), Rings::new(8, u32::MAX - 5)];
            let kernels = [Kernel::new(umem, &rings[0]), Kernel::new(umem, &rings[1])];
            World { umem, rings, kernels, sent: Default::default(), next: 0, wire: BTreeMap::new() }
        }

        /// The kernel goes on: at most `n` packets come in, what is on the TX rings leaves, and what left earlier completes.
        fn step(&mut self, n: u8) {
            crash::suspended(|| {
                for kernel in 0..2 {
                    let done = std::mem::take(&mut self.sent[kernel]);
                    self.kernels[kernel].complete(&done);
                    for (bytes, addrs) in self.kernels[kernel].send() {
                        *self.wire.entry(bytes).or_default() += 1;
                        self.sent[kernel].extend(addrs);
                    }
                }
                for _ in 0..n {
                    if self.next == PACKETS {
                        break;
                    }
                    let kernel = &mut self.kernels[usize::from(self.next / 3 % 2)];
                    let packet = [0, self.next, 0x55];
                    let taken = if is_jumbo(self.next) {
                        kernel.deliver(&[&packet, b"more", b"end"])
                    } else {
                        kernel.deliver(&[&packet])
                    };
                    if !taken {
                        break; // waits outside; its chunks stay inside the kernel
                    }
                    self.next += 1;
                }
            });
        }
    }

    /// Forwards everything from each port to the other one, as a worker does. The rewrite counts up, so that one that is
    /// done twice, or half, is seen on the wire.
    fn forward(world: &mut World, queues: &mut [&mut Queue; 2], pool: &mut FramePool, rounds: usize) {
        let mut burst = Burst::default();
        for round in 0..rounds {
            for i in 0..2 {
                let (from, to) = match queues {
                    [a, b] if i == 0 => (a, b),
                    [a, b] => (b, a),
                };
                from.receive(pool, &mut burst, 4);
                let mut out = Burst::default();
                let mut tails = std::mem::take(&mut burst.tails).into_iter().peekable();
                for (at, mut frame) in burst.heads.drain(..).enumerate() {
                    let number = frame.data()[1];
                    if !is_dropped(number) {
                        frame.head_mut()[0] += 1;
                        frame.head_mut()[2] += number;
                        out.push(frame);
                    } else {
                        pool.push(frame);
                    }
                    while let Some(tail) = tails.next_if(|t| usize::from(t.of) == at) {
                        if is_dropped(number) { pool.push(tail.frame) } else { out.push_tail(tail.frame) }
                    }
                }
                to.transmit(pool, &mut out);
                assert!(out.is_empty(), "the TX ring is long enough");
                if round % 2 == 0 {
                    world.step(3);
                }
                from.release(pool);
                to.complete(pool);
                from.refill(pool);
            }
        }
        world.step(3);
    }

    /// A process: finds the frames, then forwards.
    fn process(world: &mut World, rounds: usize) -> Recovered {
        let mut a = world.rings[0].queue(world.umem, 0);
        let mut b = world.rings[1].queue(world.umem, 1);
        let (mut pool, found) = recover(world.umem, &mut [&mut a, &mut b]);
        a.refill(&mut pool);
        b.refill(&mut pool);
        forward(world, &mut [&mut a, &mut b], &mut pool, rounds);
        assert_eq!(pool.len() as u32 + a.in_kernel + b.in_kernel + a.in_flight + b.in_flight, CHUNKS);
        assert_eq!((a.refused, b.refused), Default::default());
        found
    }

    /// The last process lives: everything must have come out, once, and every frame must be back.
    fn check(world: &mut World, what: &str) {
        process(world, 12);
        let mut a = world.rings[0].queue(world.umem, 0);
        let mut b = world.rings[1].queue(world.umem, 1);
        world.step(0);
        world.step(0);
        let (pool, _) = recover(world.umem, &mut [&mut a, &mut b]);
        assert_eq!((a.in_flight, b.in_flight), (0, 0), "{what}");
        assert_eq!(pool.len() as u32 + a.in_kernel + b.in_kernel, CHUNKS, "{what}");
        assert_eq!(world.next, PACKETS, "{what}");
        for number in 0..PACKETS {
            let mut packet = vec![1, number, 0x55 + number];
            if is_jumbo(number) {
                packet.extend_from_slice(b"moreend");
            }
            let seen = world.wire.remove(&packet).unwrap_or(0);
            assert_eq!(seen, u32::from(!is_dropped(number)), "packet {number} on the wire, {what}");
        }
        assert!(world.wire.is_empty(), "{what}: {:?}", world.wire);
    }

    fn fresh(umem: Umem) -> World {
        (0..CHUNKS).for_each(|chunk| umem.0.set(chunk, Owner::Free));
        World::new(umem)
    }

    #[test]
    fn no_frame_and_no_packet_is_lost_or_doubled_wherever_the_process_dies() {
        let umem = Umem::anonymous(CHUNKS, 2048);
        let mut world = fresh(umem);
        let (_, steps) = crash::run(None, || process(&mut world, 8)).unwrap();
        assert!(steps > 250, "{steps} steps");
        for death in 0..steps {
            let mut world = fresh(umem);
            assert!(crash::run(Some(death), || process(&mut world, 8)).is_none());
            world.step(2);
            check(&mut world, &format!("killed before step {death}"));
        }
    }

    #[test]
    fn a_death_during_recovery_is_recovered_from() {
        let umem = Umem::anonymous(CHUNKS, 2048);
        let mut world = fresh(umem);
        let (_, steps) = crash::run(None, || process(&mut world, 8)).unwrap();
        for death in (0..steps).step_by(8) {
            // Dies in the recovery and in the first work after it.
            for second in 0..70 {
                let mut world = fresh(umem);
                assert!(crash::run(Some(death), || process(&mut world, 8)).is_none());
                world.step(2);
                if crash::run(Some(second), || process(&mut world, 1)).is_none() {
                    world.step(1);
                }
                check(&mut world, &format!("killed before step {death}, then before step {second}"));
            }
        }
    }

    #[test]
    fn frames_of_a_port_that_is_gone_are_free_and_the_others_keep_theirs() {
        let umem = Umem::anonymous(12, 2048);
        let rings = [Rings::new(4, 0), Rings::new(4, 0)];
        let mut pool = umem.take_frames().unwrap();
        let mut queues = [rings[0].queue(umem, 3), rings[1].queue(umem, 9)];
        let mut kernel = Kernel::new(umem, &rings[1]);
        queues.iter_mut().for_each(|queue| _ = queue.refill(&mut pool));
        let mut out = Burst::default();
        out.push(pool.frame_from(b"to nobody").unwrap());
        queues[0].transmit(&mut pool, &mut out);
        kernel.deliver(&[b"stays"]);

        let mut stays = rings[1].queue(umem, 9);
        let (mut pool, found) = recover(umem, &mut [&mut stays]);
        assert_eq!(found, Recovered { again: 1, ..Recovered::default() });
        assert_eq!((pool.len(), stays.in_kernel), (8, 4));
        let mut burst = Burst::default();
        assert_eq!(stays.receive(&mut pool, &mut burst, 4), 1);
        assert_eq!(burst.heads[0].data(), b"stays");
    }

    #[test]
    fn what_cannot_be_restored_is_counted_and_its_frame_is_free() {
        let umem = Umem::anonymous(4, 2048);
        let rings = Rings::new(4, 0);
        let mut kernel = Kernel::new(umem, &rings);
        let mut queue = rings.queue(umem, 0);
        let mut pool = umem.take_frames().unwrap();
        queue.refill(&mut pool);
        for packet in [b"whole", b"heads", b"fresh"] {
            kernel.deliver(&[packet]);
        }
        let mut burst = Burst::default();
        queue.receive(&mut pool, &mut burst, 4);
        burst.heads[0].data_mut().fill(b'x');
        burst.heads[1].head_mut().fill(b'x');

        let mut queue = rings.queue(umem, 0);
        let (mut pool, found) = recover(umem, &mut [&mut queue]);
        assert_eq!(found, Recovered { again: 2, restored: 1, interrupted: 1, ..Recovered::default() });
        assert_eq!((pool.len(), queue.in_kernel), (1, 3));
        burst = Burst::default();
        assert_eq!(queue.receive(&mut pool, &mut burst, 4), 2);
        assert_eq!((burst.heads[0].data(), burst.heads[1].data()), (&b"heads"[..], &b"fresh"[..]));
    }
}
