//! One ring: a power-of-two array of slots with a producer and a consumer index that wrap at 2^32.
//!
//! One side is this process, the other the kernel (or its twin in a test). Slots are read only after an acquire load of
//! the other side's index and handed over by a release store of the own one. Whatever the other side's index says, a
//! half never touches more slots than the ring has, and always inside the array.

#![allow(unsafe_code)]

use std::ptr::NonNull;
#[cfg(test)]
use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(loom)]
use loom::cell::UnsafeCell as Cell;
#[cfg(not(loom))]
use plain::Cell;

#[cfg(not(loom))]
mod plain {
    /// `std::cell::UnsafeCell` with loom's two methods.
    #[repr(transparent)]
    pub(super) struct Cell<T>(std::cell::UnsafeCell<T>);

    impl<T> Cell<T> {
        #[cfg(test)]
        pub(super) fn new(value: T) -> Cell<T> {
            Cell(std::cell::UnsafeCell::new(value))
        }

        #[inline(always)]
        pub(super) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        #[inline(always)]
        pub(super) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}

/// A descriptor of the RX and TX rings, `struct xdp_desc`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub(crate) struct Desc {
    /// Bytes from the start of the UMEM.
    pub(crate) addr: u64,
    /// Bytes of this segment.
    pub(crate) len: u32,
    /// [`CONTINUES`] or 0.
    pub(crate) options: u32,
}

/// `XDP_PKT_CONTD`: the next descriptor belongs to the same packet.
pub(crate) const CONTINUES: u32 = 1;

/// A ring in ordinary memory.
#[cfg(test)]
pub(crate) struct HeapRing<T> {
    producer: AtomicU32,
    consumer: AtomicU32,
    flags: AtomicU32,
    slots: Box<[Cell<T>]>,
}

// SAFETY: slots are handed from one half to the other by release stores and acquire loads of the indices.
#[cfg(test)]
unsafe impl<T: Send> Send for HeapRing<T> {}
// SAFETY: as above; each slot is accessed by one half at a time.
#[cfg(test)]
unsafe impl<T: Send> Sync for HeapRing<T> {}

#[cfg(test)]
impl<T: Copy + Default> HeapRing<T> {
    /// An empty ring of `len` slots whose indices start at `start`.
    pub(crate) fn new(len: u32, start: u32) -> Arc<HeapRing<T>> {
        assert!(len.is_power_of_two());
        Arc::new(HeapRing {
            producer: AtomicU32::new(start),
            consumer: AtomicU32::new(start),
            flags: AtomicU32::new(0),
            slots: (0..len).map(|_| Cell::new(T::default())).collect(),
        })
    }
}

/// The memory of a ring, seen from one side.
struct Memory<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<Cell<T>>,
    len: u32,
    /// Keeps the memory alive: a mapping, or in tests a `HeapRing`.
    _backing: Box<dyn Send>,
}

// SAFETY: the pointers refer to `_backing`, which moves along and is `Send`; indices are atomics, and slots are handed
// from one side to the other by release stores and acquire loads of the indices.
unsafe impl<T: Send> Send for Memory<T> {}

impl<T: Copy + Send + 'static> Memory<T> {
    #[cfg(test)]
    fn heap(ring: Arc<HeapRing<T>>) -> Memory<T> {
        Memory {
            producer: NonNull::from(&ring.producer),
            consumer: NonNull::from(&ring.consumer),
            flags: NonNull::from(&ring.flags),
            slots: NonNull::from(&ring.slots[0]),
            len: ring.slots.len() as u32,
            _backing: Box::new(ring),
        }
    }

    /// A ring that the kernel shares. `None` if the parts do not fit into the mapping or are misaligned.
    #[cfg(not(loom))]
    fn mapped(
        mapping: memmap2::MmapRaw,
        offsets: &rustix::net::xdp::XdpRingOffset,
        len: u32,
    ) -> Option<Memory<T>> {
        let base = NonNull::new(mapping.as_mut_ptr())?;
        let flags = offsets.flags?;
        let inside = |offset: u64, bytes: u64, align: usize| {
            offset.checked_add(bytes).is_some_and(|end| end <= mapping.len() as u64)
                && (offset as usize).is_multiple_of(align)
        };
        let slots_len = u64::from(len) * size_of::<T>() as u64;
        if !len.is_power_of_two()
            || ![offsets.producer, offsets.consumer, flags].iter().all(|&o| inside(o, 4, 4))
            || !inside(offsets.desc, slots_len, align_of::<T>())
        {
            return None;
        }
        // SAFETY: each offset was just checked to lie inside the mapping with its whole object, aligned.
        let at = |offset: u64| unsafe { base.add(offset as usize) };
        Some(Memory {
            producer: at(offsets.producer).cast(),
            consumer: at(offsets.consumer).cast(),
            flags: at(flags).cast(),
            slots: at(offsets.desc).cast(),
            len,
            _backing: Box::new(mapping),
        })
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points into `_backing`, which lives as long as `self`.
        unsafe { self.producer.as_ref() }
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.consumer.as_ref() }
    }

    #[inline]
    fn slot(&self, index: u32) -> &Cell<T> {
        // SAFETY: the index is reduced to the length of the array, a power of two; the array lives as long as `self`.
        unsafe { self.slots.add((index & (self.len - 1)) as usize).as_ref() }
    }

    #[inline]
    fn read(&self, index: u32) -> T {
        // SAFETY: any bit pattern is a valid `T` (plain integers). The kernel might change the slot meanwhile if it broke
        // the protocol, hence a volatile read: one copy, checked afterwards.
        self.slot(index).with(|slot| unsafe { slot.read_volatile() })
    }

    #[inline]
    fn write(&self, index: u32, value: T) {
        crash_point();
        // SAFETY: as in `read`.
        self.slot(index).with_mut(|slot| unsafe { slot.write_volatile(value) });
    }

    #[inline]
    fn needs_wakeup(&self) -> bool {
        // SAFETY: as in `producer`.
        unsafe { self.flags.as_ref() }.load(Ordering::Relaxed) & 1 != 0
    }
}

#[inline(always)]
fn crash_point() {
    #[cfg(all(test, not(loom)))]
    crate::crash::point();
}

/// The half that writes a ring: the process for fill and TX, the kernel for RX and completion.
pub(crate) struct Producer<T> {
    memory: Memory<T>,
    next: u32,
    submitted: u32,
    consumer_seen: u32,
}

impl<T: Copy + Send + 'static> Producer<T> {
    fn attach(memory: Memory<T>) -> Producer<T> {
        let next = memory.producer().load(Ordering::Acquire);
        let consumer_seen = memory.consumer().load(Ordering::Acquire);
        Producer { memory, next, submitted: next, consumer_seen }
    }

    /// The producing half of a ring in ordinary memory, going on where its indices stand.
    #[cfg(test)]
    pub(crate) fn heap(ring: Arc<HeapRing<T>>) -> Producer<T> {
        Producer::attach(Memory::heap(ring))
    }

    /// The producing half of a ring that the kernel shares.
    #[cfg(not(loom))]
    pub(crate) fn mapped(
        mapping: memmap2::MmapRaw,
        offsets: &rustix::net::xdp::XdpRingOffset,
        len: u32,
    ) -> Option<Producer<T>> {
        Memory::mapped(mapping, offsets, len).map(Producer::attach)
    }

    /// How many of `want` slots are free for [`Producer::put`]. Looks at the consumer only if the last look is not enough.
    #[inline]
    pub(crate) fn reserve(&mut self, want: u32) -> u32 {
        if self.room() < want {
            self.consumer_seen = self.memory.consumer().load(Ordering::Acquire);
        }
        self.room().min(want)
    }

    #[inline]
    fn room(&self) -> u32 {
        self.memory.len.saturating_sub(self.next.wrapping_sub(self.consumer_seen))
    }

    /// Index of the next slot to be written.
    #[inline]
    pub(crate) fn next(&self) -> u32 {
        self.next
    }

    /// Writes a reserved slot; the other side sees it after [`Producer::submit`].
    #[inline]
    pub(crate) fn put(&mut self, value: T) {
        debug_assert!(self.room() > 0, "a slot is reserved before it is written");
        self.memory.write(self.next, value);
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the other side everything that was put.
    #[inline]
    pub(crate) fn submit(&mut self) {
        if self.submitted != self.next {
            crash_point();
            self.submitted = self.next;
            self.memory.producer().store(self.next, Ordering::Release);
        }
    }

    /// How many submitted slots the other side has not consumed.
    #[inline]
    pub(crate) fn pending(&mut self) -> u32 {
        self.consumer_seen = self.memory.consumer().load(Ordering::Acquire);
        self.submitted.wrapping_sub(self.consumer_seen).min(self.memory.len)
    }

    /// A slot as it was last written, by whatever process.
    pub(crate) fn read(&self, index: u32) -> T {
        self.memory.read(index)
    }

    /// Submits `n` slots that an earlier process has written, but not shown.
    pub(crate) fn submit_found(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        self.submit();
    }

    /// True if the kernel sleeps and wants a system call to go on.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.memory.needs_wakeup()
    }

    /// Number of slots.
    #[inline]
    pub(crate) fn len(&self) -> u32 {
        self.memory.len
    }
}

/// The half that reads a ring: the process for RX and completion, the kernel for fill and TX.
pub(crate) struct Consumer<T> {
    memory: Memory<T>,
    next: u32,
    released: u32,
    producer_seen: u32,
}

impl<T: Copy + Send + 'static> Consumer<T> {
    fn attach(memory: Memory<T>) -> Consumer<T> {
        let next = memory.consumer().load(Ordering::Acquire);
        Consumer { memory, next, released: next, producer_seen: next }
    }

    /// The consuming half of a ring in ordinary memory, going on where its indices stand.
    #[cfg(test)]
    pub(crate) fn heap(ring: Arc<HeapRing<T>>) -> Consumer<T> {
        Consumer::attach(Memory::heap(ring))
    }

    /// The consuming half of a ring that the kernel shares.
    #[cfg(not(loom))]
    pub(crate) fn mapped(
        mapping: memmap2::MmapRaw,
        offsets: &rustix::net::xdp::XdpRingOffset,
        len: u32,
    ) -> Option<Consumer<T>> {
        Memory::mapped(mapping, offsets, len).map(Consumer::attach)
    }

    /// How many slots can be read, at most `want`, counted from the first that was not read yet. Looks at the producer
    /// only if the last look is not enough.
    #[inline]
    pub(crate) fn peek(&mut self, want: u32) -> u32 {
        if self.known() < want {
            self.producer_seen = self.memory.producer().load(Ordering::Acquire);
        }
        self.known().min(want)
    }

    /// A producer that runs more than a ring ahead, or backwards, is believed for a ring's length at most.
    #[inline]
    fn known(&self) -> u32 {
        let unread_room = self.memory.len - self.next.wrapping_sub(self.released);
        self.producer_seen.wrapping_sub(self.next).min(unread_room)
    }

    /// The slot `offset` behind the first that was not read yet.
    #[inline]
    pub(crate) fn get(&self, offset: u32) -> T {
        self.memory.read(self.next.wrapping_add(offset))
    }

    /// Marks `n` peeked slots as read; the other side does not get them back yet.
    #[inline]
    pub(crate) fn advance(&mut self, n: u32) {
        debug_assert!(n <= self.known());
        self.next = self.next.wrapping_add(n);
    }

    /// How many slots were read, but not released.
    #[inline]
    pub(crate) fn unreleased(&self) -> u32 {
        self.next.wrapping_sub(self.released)
    }

    /// The slot `offset` behind the first that was not released yet.
    #[inline]
    pub(crate) fn get_unreleased(&self, offset: u32) -> T {
        self.memory.read(self.released.wrapping_add(offset))
    }

    /// Gives everything that was read back to the other side.
    #[inline]
    pub(crate) fn release(&mut self) {
        if self.released != self.next {
            crash_point();
            self.released = self.next;
            self.memory.consumer().store(self.next, Ordering::Release);
        }
    }

    /// Overwrites the slot `offset` behind the first unread one; recovery marks entries that are done with.
    pub(crate) fn overwrite(&mut self, offset: u32, value: T) {
        self.memory.write(self.next.wrapping_add(offset), value);
    }

    /// Number of slots.
    #[inline]
    pub(crate) fn len(&self) -> u32 {
        self.memory.len
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Put(u32),
        Submit,
        Read(u32),
        Release,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u32..20).prop_map(Op::Put),
            Just(Op::Submit),
            (0u32..20).prop_map(Op::Read),
            Just(Op::Release),
        ]
    }

    proptest! {
        /// Both halves against queues, across the wrap of the indices at 2^32.
        #[test]
        fn agrees_with_an_oracle(
            ops in prop::collection::vec(op(), 0..400),
            before_wrap in 0u32..40,
            len_log2 in 0u32..5,
        ) {
            let len = 1 << len_log2;
            let ring = HeapRing::<u64>::new(len, 0u32.wrapping_sub(before_wrap));
            let mut producer = Producer::heap(ring.clone());
            let mut consumer = Consumer::heap(ring);
            let (mut put, mut shown, mut unreleased) = (VecDeque::new(), VecDeque::new(), 0);
            let mut value = 0u64;
            for op in ops {
                match op {
                    Op::Put(want) => {
                        let free = len - (put.len() + shown.len()) as u32 - unreleased;
                        let got = producer.reserve(want);
                        prop_assert_eq!(got, want.min(free));
                        for _ in 0..got {
                            value += 1;
                            producer.put(value);
                            put.push_back(value);
                        }
                    }
                    Op::Submit => {
                        producer.submit();
                        shown.append(&mut put);
                    }
                    Op::Read(want) => {
                        let got = consumer.peek(want);
                        prop_assert_eq!(got, want.min(shown.len() as u32));
                        for i in 0..got {
                            prop_assert_eq!(consumer.get(i), shown.pop_front().unwrap());
                        }
                        consumer.advance(got);
                        unreleased += got;
                    }
                    Op::Release => {
                        consumer.release();
                        unreleased = 0;
                    }
                }
                prop_assert_eq!(consumer.unreleased(), unreleased);
                prop_assert_eq!(producer.pending(), shown.len() as u32 + unreleased);
            }
        }

        /// Whatever the other side's index says, no half goes beyond the ring.
        #[test]
        fn forged_indices_are_clamped(index in any::<u32>(), own in any::<u32>()) {
            let ring = HeapRing::<u64>::new(8, own);
            let mut producer = Producer::heap(ring.clone());
            let mut consumer = Consumer::heap(ring.clone());
            ring.producer.store(index, Ordering::Relaxed);
            prop_assert!(consumer.peek(u32::MAX) <= 8);
            ring.consumer.store(index, Ordering::Relaxed);
            prop_assert!(producer.reserve(u32::MAX) <= 8);
            prop_assert!(producer.pending() <= 8);
        }
    }

    #[test]
    fn a_new_half_goes_on_where_the_old_one_stopped() {
        let ring = HeapRing::<u64>::new(4, u32::MAX - 1);
        let mut producer = Producer::heap(ring.clone());
        for value in 0..3 {
            assert_eq!(producer.reserve(1), 1);
            producer.put(value);
        }
        producer.submit();
        drop(producer);
        let mut producer = Producer::heap(ring.clone());
        assert_eq!(producer.reserve(4), 1);
        producer.put(3);
        producer.submit();
        let mut consumer = Consumer::heap(ring.clone());
        assert_eq!(consumer.peek(9), 4);
        consumer.advance(2);
        consumer.release();
        consumer.advance(1); // read, but not released: comes again
        let mut consumer = Consumer::heap(ring);
        assert_eq!(consumer.peek(9), 2);
        assert_eq!((consumer.get(0), consumer.get(1)), (2, 3));
    }
}

/// Every interleaving that the memory model allows: `RUSTFLAGS="--cfg loom" cargo test -p af-xdp --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    #[test]
    fn loom_slots_are_handed_over_whole_and_in_order() {
        loom::model(|| {
            let ring = HeapRing::<u64>::new(2, u32::MAX);
            let mut consumer = Consumer::heap(ring.clone());
            let mut producer = Producer::heap(ring);
            let writer = loom::thread::spawn(move || {
                let mut value = 0;
                while value < 3 {
                    if producer.reserve(1) == 1 {
                        producer.put(value);
                        producer.submit();
                        value += 1;
                    } else {
                        loom::thread::yield_now();
                    }
                }
            });
            let mut expected = 0;
            while expected < 3 {
                let got = consumer.peek(2);
                for i in 0..got {
                    assert_eq!(consumer.get(i), expected);
                    expected += 1;
                }
                consumer.advance(got);
                consumer.release();
                if got == 0 {
                    loom::thread::yield_now();
                }
            }
            writer.join().unwrap();
        });
    }
}
