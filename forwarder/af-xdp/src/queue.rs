//! The four rings of one queue, with frames instead of addresses. No system call in here: [`crate::Socket`] adds them,
//! and tests put a twin of the kernel at the other end.

#![allow(unsafe_code)]

use crate::burst::Burst;
use crate::frame::{Frame, FramePool, RX_HEADROOM};
use crate::ledger::Owner;
use crate::ring::{CONTINUES, Consumer, Desc, Producer};
use crate::umem::Umem;

/// What the rings of one queue refused. All 0 unless the kernel (or who else can write the rings) is at fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Refused {
    /// Descriptors from the RX ring that lie outside the UMEM or name a chunk that the kernel did not have.
    pub rx: u64,
    /// Addresses from the completion ring that name a chunk that was not on its way out.
    pub completions: u64,
    /// Empty frames that were to be sent; the kernel would swallow their chunk.
    pub tx_empty: u64,
}

/// Where the frames of one queue are that are neither free nor in the hands of the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QueueFrames {
    /// On the fill ring: they wait for packets.
    pub fill: u32,
    /// Packets on the RX ring that were not received yet.
    pub rx: u32,
    /// Packets on the TX ring that the kernel has not taken yet.
    pub tx: u32,
    /// Packets on the completion ring: sent, not taken back yet.
    pub completion: u32,
    /// On none of the rings: taken by the kernel or the driver.
    pub kernel: u32,
}

impl QueueFrames {
    /// All of them.
    pub fn total(&self) -> u32 {
        self.fill + self.rx + self.tx + self.completion + self.kernel
    }
}

/// An RX entry that recovery found to be done with already.
pub(crate) const TOMBSTONE: Desc = Desc { addr: u64::MAX, len: 0, options: 0 };

/// The rings of one queue.
pub(crate) struct Queue {
    pub(crate) umem: Umem,
    pub(crate) port: u8,
    pub(crate) rx: Consumer<Desc>,
    pub(crate) tx: Producer<Desc>,
    pub(crate) fill: Producer<u64>,
    pub(crate) completion: Consumer<u64>,
    /// Chunks that were filled and did not come back; never more than the fill ring holds, so that it has room always.
    pub(crate) in_kernel: u32,
    /// Frames that were sent and not completed.
    pub(crate) in_flight: u32,
    pub(crate) refused: Refused,
}

impl Queue {
    /// Chunk and offset of an address, if it is inside the UMEM.
    #[inline]
    pub(crate) fn locate(&self, addr: u64) -> Option<(u32, u32)> {
        let region = self.umem.0;
        let chunk = addr >> region.chunk_shift();
        let offset = (addr & u64::from(region.chunk_len() - 1)) as u32;
        (chunk < u64::from(region.chunks())).then_some((chunk as u32, offset))
    }

    /// Chunk and offset of an RX descriptor, if the kernel may hand it over.
    #[inline]
    fn received(&self, desc: Desc) -> Option<(u32, u32)> {
        let (chunk, offset) = self.locate(desc.addr)?;
        let region = self.umem.0;
        let fits = desc.len <= region.chunk_len() && offset + desc.len <= region.chunk_len();
        (fits && region.word(chunk).is_fill_of(self.port)).then_some((chunk, offset))
    }

    /// Takes at most `max` whole packets from the RX ring. Their entries stay in the ring until [`Queue::release`].
    pub(crate) fn receive(&mut self, pool: &mut FramePool, burst: &mut Burst, max: usize) -> usize {
        let want = max.min(self.rx.len() as usize) as u32;
        let mut ready = self.rx.peek(want);
        let mut packets = 0;
        let mut offset = 0;
        while packets < max && offset < ready {
            let desc = self.rx.get(offset);
            if desc.options & CONTINUES == 0 {
                offset += 1;
                packets += usize::from(self.take_whole(desc, burst));
                continue;
            }
            // Rare: a packet of several segments. Wait for all of them.
            ready = self.rx.peek(self.rx.len());
            let mut segments = 1;
            while offset + segments < ready && self.rx.get(offset + segments - 1).options & CONTINUES != 0 {
                segments += 1;
            }
            if self.rx.get(offset + segments - 1).options & CONTINUES != 0 {
                break;
            }
            packets += usize::from(self.take_segments(offset, segments, pool, burst));
            offset += segments;
        }
        self.rx.advance(offset);
        pool.unreleased += offset;
        packets
    }

    /// Makes the frame of a descriptor.
    #[inline]
    fn take(&mut self, desc: Desc) -> Option<Frame> {
        let Some((chunk, offset)) = self.received(desc) else {
            self.refused.rx += u64::from(desc != TOMBSTONE);
            return None;
        };
        self.umem.0.set(chunk, Owner::Peeked { port: self.port });
        self.in_kernel = self.in_kernel.saturating_sub(1);
        // SAFETY: the ledger said that the kernel had the chunk, so that there is no frame of it, and says now that we
        // have it, so that no other descriptor makes another one. `received` has checked chunk, offset and length.
        Some(unsafe { Frame::new(self.umem.0, chunk, offset as u16, desc.len as u16) })
    }

    #[inline]
    fn take_whole(&mut self, desc: Desc, burst: &mut Burst) -> bool {
        let Some(frame) = self.take(desc) else { return false };
        // Its headers are in the cache of the CPU that received it: they are on their way while the rest of the burst is taken.
        frame.prefetch();
        burst.push(frame);
        true
    }

    /// A packet of several segments: all of them or, if one is refused, none.
    #[cold]
    fn take_segments(&mut self, offset: u32, segments: u32, pool: &mut FramePool, burst: &mut Burst) -> bool {
        let frames: Vec<Option<Frame>> = (0..segments).map(|i| self.take(self.rx.get(offset + i))).collect();
        if frames.iter().any(Option::is_none) {
            frames.into_iter().flatten().for_each(|frame| pool.push(frame));
            return false;
        }
        for (i, frame) in frames.into_iter().flatten().enumerate() {
            if i == 0 { burst.push(frame) } else { burst.push_tail(frame) }
        }
        true
    }

    /// Gives the RX entries of everything received back to the kernel. What the process still keeps of it is its own
    /// from here on, and does not come again after a crash.
    pub(crate) fn release(&mut self, pool: &mut FramePool) {
        let n = self.rx.unreleased();
        for i in 0..n {
            if let Some((chunk, _)) = self.locate(self.rx.get_unreleased(i).addr)
                && self.umem.0.word(chunk).is_peeked()
            {
                self.umem.0.set(chunk, Owner::Held);
            }
        }
        self.rx.release();
        pool.unreleased -= n;
        if pool.unreleased == 0 {
            self.umem.0.restart_journal();
        }
    }

    /// Puts packets from the front of `burst` on the TX ring, as many as fit whole; the rest stays in `burst`.
    pub(crate) fn transmit(&mut self, pool: &mut FramePool, burst: &mut Burst) -> usize {
        let frames = (burst.heads.len() + burst.tails.len()) as u32;
        let mut room = self.tx.reserve(frames.min(self.tx.len()));
        let mut tails = burst.tails.iter().peekable();
        let (mut sent, mut empty) = (0, 0);
        for (i, head) in burst.heads.iter().enumerate() {
            let mut segments = 1;
            if !burst.tails.is_empty() {
                segments += tails.clone().take_while(|t| usize::from(t.of) == i).count() as u32;
            }
            if segments > room {
                break;
            }
            if head.is_empty() {
                empty += 1;
                break;
            }
            room -= segments;
            // All slots of a packet come before its first word: recovery takes that word for the whole packet.
            let first = self.tx.next();
            self.put(head, segments > 1);
            for (left, tail) in (0..segments - 1).rev().zip(tails.clone()) {
                self.put(&tail.frame, left > 0);
            }
            self.mark_sent(head, first);
            for n in 1..segments {
                let tail = tails.next().expect("counted above");
                self.mark_sent(&tail.frame, first.wrapping_add(n));
            }
            sent += 1;
        }
        self.tx.submit();
        burst.remove_front(sent, drop);
        if empty > 0 {
            self.refused.tx_empty += 1;
            burst.remove_front(1, |frame| pool.push(frame));
            return sent + 1 + self.transmit(pool, burst);
        }
        sent
    }

    /// Writes the next slot; the word comes later, then the producer.
    #[inline]
    fn put(&mut self, frame: &Frame, continues: bool) {
        assert!(frame.umem() == self.umem, "a frame leaves by a socket of its own UMEM");
        let options = if continues { CONTINUES } else { 0 };
        self.tx.put(Desc { addr: frame.addr(), len: frame.len() as u32, options });
    }

    #[inline]
    fn mark_sent(&mut self, frame: &Frame, index: u32) {
        self.umem.0.set(frame.chunk(), Owner::Tx { port: self.port, index });
        self.in_flight += 1;
    }

    /// Takes sent frames back.
    pub(crate) fn complete(&mut self, pool: &mut FramePool) -> usize {
        if self.in_flight == 0 {
            return 0;
        }
        let n = self.completion.peek(self.completion.len());
        for i in 0..n {
            let known = self.locate(self.completion.get(i));
            match known.filter(|&(chunk, _)| self.umem.0.word(chunk).is_tx_of(self.port)) {
                Some((chunk, _)) => {
                    // SAFETY: the ledger said that the kernel had the chunk for sending, so that there is no frame of it;
                    // `push` marks it free, so that it cannot be completed twice.
                    pool.push(unsafe { Frame::new(self.umem.0, chunk, RX_HEADROOM, 0) });
                    self.in_flight = self.in_flight.saturating_sub(1);
                }
                None => self.refused.completions += 1,
            }
        }
        self.completion.advance(n);
        self.completion.release();
        n as usize
    }

    /// Where the frames of this queue are; together as many as were given to the kernel and did not come back.
    ///
    /// The kernel goes on meanwhile, so each pair of rings is read against the stream: what moves from one to the other
    /// between the two looks counts as the kernel's, and nothing counts twice. Call it between bursts: what was received
    /// and not released is the process's.
    pub(crate) fn frames(&mut self) -> QueueFrames {
        let rx = self.rx.peek(self.rx.len()).min(self.in_kernel);
        let fill = self.fill.pending().min(self.in_kernel - rx);
        let completion = self.completion.peek(self.completion.len()).min(self.in_flight);
        let tx = self.tx.pending().min(self.in_flight - completion);
        let kernel = (self.in_kernel - rx - fill) + (self.in_flight - completion - tx);
        QueueFrames { fill, rx, tx, completion, kernel }
    }

    /// Gives free frames to the kernel until it has as many as the fill ring holds. Does nothing while received frames
    /// of any socket of this pool are not released.
    pub(crate) fn refill(&mut self, pool: &mut FramePool) -> usize {
        debug_assert!(pool.unreleased == 0, "release every burst before a refill");
        if pool.unreleased != 0 {
            return 0;
        }
        assert!(pool.umem() == self.umem, "frames go to a socket of their own UMEM");
        let owed = self.fill.len().saturating_sub(self.in_kernel).min(pool.len() as u32);
        let n = self.fill.reserve(owed);
        for _ in 0..n {
            let Some(frame) = pool.pop() else { break };
            let index = self.fill.next();
            self.fill.put(u64::from(frame.chunk()) << self.umem.0.chunk_shift());
            self.umem.0.set(frame.chunk(), Owner::Fill { port: self.port, index });
            self.in_kernel += 1;
        }
        self.fill.submit();
        n as usize
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod kernel_twin {
    //! The kernel's ends of the four rings.

    use std::sync::Arc;

    use super::*;
    use crate::ring::HeapRing;

    /// Rings in memory, which outlive both ends.
    #[derive(Clone)]
    pub(crate) struct Rings {
        pub(crate) rx: Arc<HeapRing<Desc>>,
        pub(crate) tx: Arc<HeapRing<Desc>>,
        pub(crate) fill: Arc<HeapRing<u64>>,
        pub(crate) completion: Arc<HeapRing<u64>>,
    }

    impl Rings {
        pub(crate) fn new(len: u32, start: u32) -> Rings {
            Rings {
                rx: HeapRing::new(len, start),
                tx: HeapRing::new(len, start),
                fill: HeapRing::new(len, start),
                completion: HeapRing::new(len, start),
            }
        }

        /// The process's end, as after opening or inheriting a socket.
        pub(crate) fn queue(&self, umem: Umem, port: u8) -> Queue {
            Queue {
                umem,
                port,
                rx: Consumer::heap(self.rx.clone()),
                tx: Producer::heap(self.tx.clone()),
                fill: Producer::heap(self.fill.clone()),
                completion: Consumer::heap(self.completion.clone()),
                in_kernel: 0,
                in_flight: 0,
                refused: Refused::default(),
            }
        }
    }

    /// The kernel: takes chunks from the fill ring, keeps some of them inside, sends and completes.
    pub(crate) struct Kernel {
        umem: Umem,
        pub(crate) rx: Producer<Desc>,
        pub(crate) tx: Consumer<Desc>,
        pub(crate) fill: Consumer<u64>,
        pub(crate) completion: Producer<u64>,
        inside: Vec<u64>,
        /// Sent, but not completed; a slot of the completion ring is kept for each.
        sent: u32,
    }

    impl Kernel {
        pub(crate) fn new(umem: Umem, rings: &Rings) -> Kernel {
            Kernel {
                umem,
                rx: Producer::heap(rings.rx.clone()),
                tx: Consumer::heap(rings.tx.clone()),
                fill: Consumer::heap(rings.fill.clone()),
                completion: Producer::heap(rings.completion.clone()),
                inside: Vec::new(),
                sent: 0,
            }
        }

        fn chunk(&mut self) -> Option<u64> {
            self.inside.pop().or_else(|| {
                (self.fill.peek(1) == 1).then(|| {
                    let addr = self.fill.get(0);
                    self.fill.advance(1);
                    self.fill.release();
                    addr
                })
            })
        }

        /// A packet comes in, one segment an element. False: no chunk or no room, the packet is dropped.
        pub(crate) fn deliver(&mut self, segments: &[&[u8]]) -> bool {
            let chunks: Vec<u64> = (0..segments.len()).map_while(|_| self.chunk()).collect();
            if chunks.len() < segments.len() || self.rx.reserve(segments.len() as u32) < segments.len() as u32
            {
                self.inside.extend(chunks); // the kernel's own free list
                return false;
            }
            for (i, (segment, addr)) in segments.iter().zip(chunks).enumerate() {
                let addr = addr + u64::from(RX_HEADROOM);
                let base = self.umem.0.chunk_ptr(0).as_ptr();
                // SAFETY: the process gave this chunk to the kernel.
                unsafe { base.add(addr as usize).copy_from_nonoverlapping(segment.as_ptr(), segment.len()) };
                let options = if i + 1 < segments.len() { CONTINUES } else { 0 };
                self.rx.put(Desc { addr, len: segment.len() as u32, options });
            }
            self.rx.submit();
            true
        }

        /// Sends what is on the TX ring, as far as it can be completed: the packets, and their addresses for
        /// [`Kernel::complete`].
        pub(crate) fn send(&mut self) -> Vec<(Vec<u8>, Vec<u64>)> {
            let n = self.tx.peek(self.tx.len());
            let mut room = (self.completion.reserve(u32::MAX)).saturating_sub(self.sent);
            let (mut packets, mut taken) = (vec![], 0);
            let (mut bytes, mut addrs) = (vec![], vec![]);
            for i in 0..n {
                let desc = self.tx.get(i);
                let base = self.umem.0.chunk_ptr(0).as_ptr();
                // SAFETY: the process gave this chunk to the kernel for sending.
                bytes.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(base.add(desc.addr as usize), desc.len as usize)
                });
                addrs.push(desc.addr);
                if desc.options & CONTINUES == 0 {
                    if (addrs.len() as u32) > room {
                        addrs.clear();
                        break;
                    }
                    room -= addrs.len() as u32;
                    taken = i + 1;
                    packets.push((std::mem::take(&mut bytes), std::mem::take(&mut addrs)));
                }
            }
            assert!(addrs.is_empty(), "a packet without its last segment was submitted");
            self.sent += taken;
            self.tx.advance(taken);
            self.tx.release();
            packets
        }

        pub(crate) fn complete(&mut self, addrs: &[u64]) {
            for &addr in addrs {
                assert_eq!(self.completion.reserve(1), 1);
                self.completion.put(addr);
                self.sent = self.sent.saturating_sub(1);
            }
            self.completion.submit();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::kernel_twin::{Kernel, Rings};
    use super::*;

    fn rig(chunks: u32, len: u32) -> (FramePool, Queue, Kernel) {
        let umem = Umem::anonymous(chunks, 2048);
        let pool = umem.take_frames().unwrap();
        let rings = Rings::new(len, u32::MAX - 3);
        (pool, rings.queue(umem, 0), Kernel::new(umem, &rings))
    }

    #[test]
    fn packets_go_round_and_every_frame_comes_back() {
        let (mut pool, mut queue, mut kernel) = rig(16, 8);
        assert_eq!(queue.refill(&mut pool), 8);
        let mut burst = Burst::default();
        for round in 0..100u8 {
            for i in 0..5 {
                assert!(kernel.deliver(&[&[round, i, 0xee]]));
            }
            assert_eq!(queue.receive(&mut pool, &mut burst, 64), 5);
            for (i, frame) in burst.heads.iter_mut().enumerate() {
                assert_eq!(frame.data(), [round, i as u8, 0xee]);
                frame.head_mut()[2] = 0xff;
            }
            assert_eq!(queue.transmit(&mut pool, &mut burst), 5);
            assert!(burst.is_empty());
            queue.release(&mut pool);
            queue.refill(&mut pool);
            for (i, (packet, addrs)) in kernel.send().into_iter().enumerate() {
                assert_eq!(packet, [round, i as u8, 0xff]);
                kernel.complete(&addrs);
            }
            assert_eq!(queue.complete(&mut pool), 5);
        }
        queue.refill(&mut pool);
        assert_eq!((pool.len(), queue.in_kernel, queue.in_flight), (8, 8, 0));
        assert_eq!(queue.refused, Refused::default());
    }

    #[test]
    fn every_frame_is_somewhere() {
        let (mut pool, mut queue, mut kernel) = rig(16, 4);
        let frames = |pool: &FramePool, queue: &mut Queue| {
            let frames = queue.frames();
            assert_eq!(pool.len() as u32 + frames.total(), 16);
            (frames.fill, frames.rx, frames.tx, frames.completion, frames.kernel)
        };
        assert_eq!(frames(&pool, &mut queue), (0, 0, 0, 0, 0));
        queue.refill(&mut pool);
        assert_eq!(frames(&pool, &mut queue), (4, 0, 0, 0, 0));
        kernel.deliver(&[b"one"]);
        kernel.deliver(&[b"two"]);
        assert_eq!(frames(&pool, &mut queue), (2, 2, 0, 0, 0));
        // Too long for what is left: its first chunks stay inside the kernel.
        assert!(!kernel.deliver(&[b"a", b"b", b"c"]));
        assert_eq!(frames(&pool, &mut queue), (0, 2, 0, 0, 2));
        let mut burst = Burst::default();
        queue.receive(&mut pool, &mut burst, 64);
        queue.transmit(&mut pool, &mut burst);
        queue.release(&mut pool);
        assert_eq!(frames(&pool, &mut queue), (0, 0, 2, 0, 2));
        let sent = kernel.send();
        assert_eq!(frames(&pool, &mut queue), (0, 0, 0, 0, 4));
        kernel.complete(&sent[0].1);
        assert_eq!(frames(&pool, &mut queue), (0, 0, 0, 1, 3));
        queue.complete(&mut pool);
        assert_eq!(frames(&pool, &mut queue), (0, 0, 0, 0, 3));
    }

    #[test]
    fn what_does_not_fit_on_the_tx_ring_stays_whole() {
        let (mut pool, mut queue, mut kernel) = rig(16, 4);
        let mut burst = Burst::default();
        burst.push(pool.frame_from(b"a").unwrap());
        burst.push(pool.frame_from(b"b").unwrap());
        burst.push_tail(pool.frame_from(b"c").unwrap());
        burst.push(pool.frame_from(b"d").unwrap());
        burst.push_tail(pool.frame_from(b"e").unwrap());
        assert_eq!(burst.packet_len(1), 2);
        assert_eq!(queue.transmit(&mut pool, &mut burst), 2);
        assert_eq!((burst.len(), burst.tails.len(), burst.tails[0].of), (1, 1, 0));
        let sent = kernel.send();
        assert_eq!(sent.iter().map(|(bytes, _)| &bytes[..]).collect::<Vec<_>>(), [&b"a"[..], b"bc"]);
        sent.iter().for_each(|(_, addrs)| kernel.complete(addrs));
        assert_eq!(queue.complete(&mut pool), 3);
        assert_eq!(queue.transmit(&mut pool, &mut burst), 1);
        assert_eq!(kernel.send()[0].0, b"de");
    }

    #[test]
    fn empty_frames_are_not_sent_and_not_lost() {
        let (mut pool, mut queue, mut kernel) = rig(4, 4);
        let mut burst = Burst::default();
        burst.push(pool.frame_from(b"a").unwrap());
        burst.push(pool.pop().unwrap());
        burst.push(pool.frame_from(b"b").unwrap());
        assert_eq!(queue.transmit(&mut pool, &mut burst), 3);
        assert_eq!(kernel.send().len(), 2);
        assert_eq!((queue.refused.tx_empty, pool.len(), queue.in_flight), (1, 2, 2));
    }

    #[test]
    fn long_packets_come_whole_or_not_yet() {
        let (mut pool, mut queue, mut kernel) = rig(16, 8);
        queue.refill(&mut pool);
        let mut burst = Burst::default();
        assert!(kernel.deliver(&[b"one"]));
        assert!(kernel.deliver(&[b"two", b"-", b"parts"]));
        assert_eq!(queue.receive(&mut pool, &mut burst, 1), 1);
        assert_eq!(queue.receive(&mut pool, &mut burst, 1), 1);
        assert_eq!((burst.packet_len(0), burst.packet_len(1), burst.tails.len()), (3, 9, 2));
        // The kernel shows the first part only.
        let addr = u64::from(RX_HEADROOM) + kernel.fill.get(0);
        kernel.fill.advance(2);
        kernel.rx.reserve(2);
        kernel.rx.put(Desc { addr, len: 3, options: CONTINUES });
        kernel.rx.submit();
        assert_eq!(queue.receive(&mut pool, &mut burst, 8), 0);
        kernel.rx.put(Desc { addr: addr + 2048, len: 3, options: 0 });
        kernel.rx.submit();
        queue.receive(&mut pool, &mut burst, 8);
        assert_eq!(burst.len() as u64 + queue.refused.rx, 3);
    }

    #[test]
    fn forged_descriptors_are_refused_and_counted() {
        let (mut pool, mut queue, mut kernel) = rig(16, 8);
        queue.refill(&mut pool);
        let ours = pool.pop().unwrap();
        let (good, good_addr) = (kernel.fill.get(0) + 256, kernel.fill.get(1) + 256);
        let forged = [
            Desc { addr: 16 * 2048, len: 60, options: 0 }, // one past the end
            Desc { addr: u64::MAX - 4, len: 60, options: 0 }, // far outside
            Desc { addr: good, len: 1793, options: 0 },    // longer than the chunk
            Desc { addr: good, len: u32::MAX, options: 0 }, // overflows
            Desc { addr: ours.addr(), len: 60, options: 0 }, // a frame that the process has
            Desc { addr: good, len: 60, options: 0 },      // right
            Desc { addr: good, len: 60, options: 0 },      // the same once more
        ];
        kernel.rx.reserve(forged.len() as u32);
        forged.iter().for_each(|&desc| kernel.rx.put(desc));
        kernel.rx.submit();
        let mut burst = Burst::default();
        assert_eq!(queue.receive(&mut pool, &mut burst, 64), 1);
        assert_eq!(queue.refused.rx, 6);
        queue.release(&mut pool);

        // Completions of chunks that are not on their way out.
        queue.transmit(&mut pool, &mut burst);
        kernel.complete(&[ours.addr(), u64::MAX, good_addr, good, good]);
        queue.complete(&mut pool);
        assert_eq!((queue.refused.completions, queue.in_flight), (4, 0));
        pool.push(ours);
        assert_eq!(pool.len() as u32 + queue.in_kernel, 16);
    }

    #[test]
    fn a_frame_that_is_kept_is_the_process_s_own_after_the_release() {
        let (mut pool, mut queue, mut kernel) = rig(4, 2);
        queue.refill(&mut pool);
        let mut burst = Burst::default();
        kernel.deliver(&[b"waits"]);
        queue.receive(&mut pool, &mut burst, 1);
        let kept = burst.heads.pop().unwrap();
        assert_eq!(queue.umem.owner(kept.chunk()), Owner::Peeked { port: 0 });
        queue.release(&mut pool);
        assert_eq!(queue.umem.owner(kept.chunk()), Owner::Held);
        burst.push(kept);
        queue.transmit(&mut pool, &mut burst);
        assert_eq!(kernel.send()[0].0, b"waits");
    }
}
