//! Records of any length from one thread to another, through memory of a fixed size: neither ever waits for the other.
//!
//! A ring of words with a place to write and a place to read, each moved by one thread only. What finds no room is refused
//! and counted. Every word is an atomic, written relaxed and published by the release store of the place to write, so
//! that the ring needs no unsafe code; on x86-64 and arm64 these are plain stores.
//!
//! ```text
//! record: words that follow | header words | bytes of a part | its words | bytes of the next part | ...
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

/// A ring between the thread that calls [`push`](RecordRing::push) and the one that calls [`pop`](RecordRing::pop). More
/// threads than these two garble records, but not memory.
#[derive(Debug)]
pub struct RecordRing {
    /// A power of two of them.
    words: Box<[AtomicU64]>,
    /// Words ever written; only the writer changes it.
    written: CachePadded<AtomicU64>,
    /// Words ever read; only the reader changes it.
    read: CachePadded<AtomicU64>,
    /// Records that found no room; only the writer changes it.
    refused: CachePadded<AtomicU64>,
}

impl RecordRing {
    /// An empty ring of at least `bytes`. All of its memory is touched here, so that the writer meets no page fault.
    pub fn new(bytes: usize) -> RecordRing {
        let words = bytes.div_ceil(8).next_power_of_two();
        RecordRing {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            written: CachePadded::default(),
            read: CachePadded::default(),
            refused: CachePadded::default(),
        }
    }

    #[inline]
    fn word(&self, at: u64) -> &AtomicU64 {
        &self.words[at as usize & (self.words.len() - 1)]
    }

    /// Writer: appends a record of a header and the bytes of all parts. False: there is no room, which is counted. Copies the
    /// bytes; no allocation, no loop that depends on the reader.
    pub fn push<'p>(&self, header: &[u64], parts: impl Iterator<Item = &'p [u8]> + Clone) -> bool {
        let words_of = |part: &[u8]| 1 + part.len().div_ceil(8) as u64;
        let follow = header.len() as u64 + parts.clone().map(words_of).sum::<u64>();
        let written = self.written.load(Ordering::Relaxed);
        // Acquire: what the reader has read is read before it is written over.
        let free = self.words.len() as u64 - (written - self.read.load(Ordering::Acquire));
        if follow + 1 > free {
            self.refuse();
            return false;
        }
        let mut at = written;
        let mut put = |word: u64| {
            self.word(at).store(word, Ordering::Relaxed);
            at += 1;
        };
        put(follow);
        header.iter().for_each(|word| put(*word));
        for part in parts {
            put(part.len() as u64);
            let (words, rest) = part.as_chunks::<8>();
            words.iter().for_each(|word| put(u64::from_le_bytes(*word)));
            if !rest.is_empty() {
                let mut last = [0; 8];
                last[..rest.len()].copy_from_slice(rest);
                put(u64::from_le_bytes(last));
            }
        }
        self.written.store(at, Ordering::Release);
        true
    }

    /// Writer: counts a record that it did not even try to push.
    #[inline]
    pub fn refuse(&self) {
        self.refused.store(self.refused.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Reader: takes the oldest record, which was pushed with a header of the length of `header`. Its bytes replace those of
    /// `bytes`. False: there is none.
    pub fn pop(&self, header: &mut [u64], bytes: &mut Vec<u8>) -> bool {
        let read = self.read.load(Ordering::Relaxed);
        if read == self.written.load(Ordering::Acquire) {
            return false;
        }
        let mut at = read;
        let mut get = || {
            at += 1;
            self.word(at - 1).load(Ordering::Relaxed)
        };
        let end = read + 1 + get();
        header.iter_mut().for_each(|word| *word = get());
        bytes.clear();
        let mut left = end - read - 1 - header.len() as u64;
        while left > 0 {
            let len = get() as usize;
            let words = len.div_ceil(8);
            let before = bytes.len();
            (0..words).for_each(|_| bytes.extend_from_slice(&get().to_le_bytes()));
            bytes.truncate(before + len);
            left = left.saturating_sub(1 + words as u64);
        }
        self.read.store(end, Ordering::Release);
        true
    }

    /// How many records found no room so far. Any thread.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn push(ring: &RecordRing, header: [u64; 2], parts: &[Vec<u8>]) -> bool {
        ring.push(&header, parts.iter().map(Vec::as_slice))
    }

    fn pop(ring: &RecordRing) -> Option<([u64; 2], Vec<u8>)> {
        let (mut header, mut bytes) = ([0; 2], vec![0xee; 5]);
        ring.pop(&mut header, &mut bytes).then_some((header, bytes))
    }

    #[test]
    fn what_finds_no_room_is_counted_exactly() {
        // Room for 16 words: records of 1 + 2 + 1 + 1 words.
        let ring = RecordRing::new(128);
        let pushed: Vec<bool> = (0..10).map(|i| push(&ring, [i, 0], &[vec![i as u8; 8]])).collect();
        assert_eq!(pushed, [true, true, true, false, false, false, false, false, false, false]);
        assert_eq!(ring.refused(), 7);
        assert_eq!(pop(&ring), Some(([0, 0], vec![0; 8])));
        assert!(push(&ring, [10, 0], &[vec![10; 3]]));
        assert!(!push(&ring, [11, 0], &[]));
        for i in [1, 2] {
            assert_eq!(pop(&ring), Some(([i, 0], vec![i as u8; 8])));
        }
        assert_eq!(pop(&ring), Some(([10, 0], vec![10; 3])));
        assert_eq!((pop(&ring), ring.refused()), (None, 8));
        // One that fills it to the last word, and one that never fits.
        assert!(push(&ring, [12, 0], &[vec![1; 96]]));
        assert_eq!(pop(&ring).unwrap().1, [1; 96]);
        assert!(!push(&ring, [13, 0], &[vec![1; 97]]));
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_queue(steps in prop::collection::vec(
            prop_oneof![
                3 => prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..4).prop_map(Some),
                2 => Just(None),
            ],
            0..200,
        )) {
            let ring = RecordRing::new(256);
            let (mut queue, mut used, mut refused) = (VecDeque::new(), 0, 0);
            let words = |parts: &[Vec<u8>]| 3 + parts.iter().map(|p| 1 + p.len().div_ceil(8)).sum::<usize>();
            for (number, step) in steps.into_iter().enumerate() {
                let header = [number as u64, u64::MAX - number as u64];
                match step {
                    Some(parts) if used + words(&parts) <= 32 => {
                        prop_assert!(push(&ring, header, &parts));
                        used += words(&parts);
                        queue.push_back((header, parts));
                    }
                    Some(parts) => {
                        prop_assert!(!push(&ring, header, &parts));
                        refused += 1;
                    }
                    None => {
                        let expected = queue.pop_front();
                        used -= expected.as_ref().map_or(0, |(_, parts)| words(parts));
                        prop_assert_eq!(pop(&ring), expected.map(|(header, parts)| (header, parts.concat())));
                    }
                }
                prop_assert_eq!(ring.refused(), refused);
            }
        }
    }

    #[test]
    fn two_threads_lose_nothing_but_what_is_counted() {
        const RECORDS: u64 = 100_000;
        let ring = RecordRing::new(4096);
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut received, mut before) = (0u64, None);
                loop {
                    let Some((header, bytes)) = pop(&ring) else {
                        std::thread::yield_now();
                        continue;
                    };
                    if header[0] == RECORDS {
                        return received;
                    }
                    assert!(before.is_none_or(|before| header[0] > before), "{header:?} after {before:?}");
                    assert_eq!(header[1], header[0].wrapping_mul(31));
                    let len = (header[0] % 100) as usize;
                    assert_eq!(bytes, vec![header[0] as u8; len]);
                    before = Some(header[0]);
                    received += 1;
                }
            });
            for number in 0..RECORDS {
                let bytes = vec![number as u8; (number % 100) as usize];
                push(&ring, [number, number.wrapping_mul(31)], &[bytes]);
            }
            let refused = ring.refused();
            while !push(&ring, [RECORDS, 0], &[]) {
                std::thread::yield_now();
            }
            reader.join().unwrap() + refused
        });
        assert_eq!(received, RECORDS);
    }
}
