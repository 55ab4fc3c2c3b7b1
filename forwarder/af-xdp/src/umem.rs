//! The memory that packets lie in, its ledger and its journal, in one sealed memfd.
//!
//! ```text
//! | chunk 0 | chunk 1 | ... | ledger: one u64 a chunk | journal: 1,024 slots of 128 bytes | ... | trailer, 64 bytes |
//! ```
//!
//! The kernel sees the chunks only. Size and form are in the trailer, at the very end, so that a process that inherits
//! the descriptor needs nothing else. The file is sealed against resizing, so no access can fault later.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, compiler_fence};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use crate::frame::{FramePool, HEAD_LEN};
use crate::ledger::{Owner, Word};

const TRAILER_LEN: usize = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"towpumem");
const LAYOUT: u32 = 1;
const JOURNAL_SLOTS: usize = 1024;
const CHUNKS_MAX: u32 = 1 << 22;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What a UMEM shall look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UmemConfig {
    /// How many chunks, at most 4,194,304. Every port wants as many as its fill and TX ring hold.
    pub chunks: u32,
    /// Bytes a chunk: 2048 (frames up to 1,792 bytes) or 4096 (up to 3,840 bytes).
    pub chunk_len: u32,
    /// Back the memory with 2 MiB pages, which must have been reserved (`vm.nr_hugepages`).
    pub hugepages: bool,
}

impl UmemConfig {
    /// How many 2 MiB pages the UMEM takes; 0: none, it is on ordinary ones.
    pub fn hugepage_count(&self) -> u64 {
        let total = Layout::of(self.chunks, self.chunk_len, self.hugepages).total;
        if self.hugepages { (total / HUGEPAGE_LEN) as u64 } else { 0 }
    }
}

/// Why there is no UMEM.
#[derive(Debug, thiserror::Error)]
pub enum UmemError {
    /// The kernel takes chunks of 2048 or 4096 bytes.
    #[error("chunk length is {0}: use 2048 or 4096")]
    ChunkLen(u32),
    /// Too few or too many chunks.
    #[error("number of chunks is {0}: use 1 to {CHUNKS_MAX}")]
    Chunks(u32),
    /// No memory of this kind.
    #[error("{len_bytes} bytes of packet memory{}: {source}", if *.hugepages { " on 2 MiB pages" } else { "" })]
    Memory {
        /// Bytes asked for.
        len_bytes: usize,
        /// On hugepages.
        hugepages: bool,
        /// What the kernel said.
        source: io::Error,
    },
    /// The inherited descriptor is something else.
    #[error("the inherited packet memory is not what it should be: {0}")]
    Inherited(&'static str),
}

const HUGEPAGE_LEN: usize = 2 << 20;
const PAGE_LEN: usize = 4096;

/// Self-description at the end of the file.
#[repr(C)]
#[derive(Clone, Copy)]
struct Trailer {
    magic: u64,
    layout: u32,
    chunks: u32,
    chunk_len: u32,
}

/// First bytes of a received packet as they came.
#[repr(C, align(128))]
struct JournalSlot {
    chunk: u32,
    len: u32,
    bytes: [u8; HEAD_LEN],
}

/// Where the parts lie, in bytes from the start of the mapping.
#[derive(Clone, Copy)]
struct Layout {
    ledger: usize,
    journal: usize,
    total: usize,
}

impl Layout {
    fn of(chunks: u32, chunk_len: u32, hugepages: bool) -> Layout {
        let ledger = chunks as usize * chunk_len as usize;
        let journal =
            (ledger + chunks as usize * size_of::<u64>()).next_multiple_of(align_of::<JournalSlot>());
        let end = journal + JOURNAL_SLOTS * size_of::<JournalSlot>() + TRAILER_LEN;
        let total = end.next_multiple_of(if hugepages { HUGEPAGE_LEN } else { PAGE_LEN });
        Layout { ledger, journal, total }
    }
}

/// A mapped UMEM. It lives until the process ends, so that frames can refer to it for ever.
pub(crate) struct Region {
    base: NonNull<u8>,
    chunks: u32,
    chunk_shift: u32,
    ledger: NonNull<AtomicU64>,
    journal: NonNull<JournalSlot>,
    journal_next: AtomicU32,
    taken: AtomicBool,
    _mapping: MmapRaw,
}

// SAFETY: the pointers refer to a mapping that is never unmapped. The ledger is atomic; a chunk's bytes are touched only
// through its one `Frame` (see `ledger`), a journal slot only by the one thread that owns the frames (`FramePool` is
// handed out once).
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(mapping: MmapRaw, chunks: u32, chunk_len: u32, hugepages: bool) -> &'static Region {
        let layout = Layout::of(chunks, chunk_len, hugepages);
        assert!(layout.total <= mapping.len());
        let base = NonNull::new(mapping.as_mut_ptr()).expect("a mapping is never at address 0");
        // SAFETY: `layout.total` bytes are mapped, and both offsets lie inside, aligned for their types since the
        // mapping itself is page-aligned.
        let (ledger, journal) = unsafe { (base.add(layout.ledger).cast(), base.add(layout.journal).cast()) };
        Box::leak(Box::new(Region {
            base,
            chunks,
            chunk_shift: chunk_len.trailing_zeros(),
            ledger,
            journal,
            journal_next: AtomicU32::new(0),
            taken: AtomicBool::new(false),
            _mapping: mapping,
        }))
    }

    /// Pointer to the first byte of a chunk.
    #[inline]
    pub(crate) fn chunk_ptr(&self, chunk: u32) -> NonNull<u8> {
        debug_assert!(chunk < self.chunks);
        // SAFETY: every `Frame` and every checked descriptor has `chunk < self.chunks`; the offset stays inside the mapping.
        unsafe { self.base.add((chunk as usize) << self.chunk_shift) }
    }

    #[inline]
    pub(crate) fn chunk_len(&self) -> u32 {
        1 << self.chunk_shift
    }

    #[inline]
    pub(crate) fn chunks(&self) -> u32 {
        self.chunks
    }

    #[inline]
    pub(crate) fn chunk_shift(&self) -> u32 {
        self.chunk_shift
    }

    #[inline]
    fn cell(&self, chunk: u32) -> &AtomicU64 {
        assert!(chunk < self.chunks);
        // SAFETY: the ledger has `chunks` words, all atomics, in a mapping that lives for ever.
        unsafe { self.ledger.add(chunk as usize).as_ref() }
    }

    /// The word of a chunk.
    #[inline]
    pub(crate) fn word(&self, chunk: u32) -> Word {
        Word(self.cell(chunk).load(Ordering::Relaxed))
    }

    /// Stores the word of a chunk. Stores before it stay before it and stores after it after it, which is all that a
    /// process needs that is about to be killed (see [`crate::ledger`]).
    #[inline]
    pub(crate) fn set(&self, chunk: u32, owner: Owner) {
        #[cfg(all(test, not(loom)))]
        crate::crash::point();
        compiler_fence(Ordering::SeqCst);
        self.cell(chunk).store(Word::new(owner).0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// Keeps the first bytes of a received frame, which has `len` bytes from `offset` of its chunk on, in the journal, and marks it
    /// as being rewritten.
    #[inline]
    pub(crate) fn journal(&self, chunk: u32, offset: u16, len: usize) {
        let next = self.journal_next.load(Ordering::Relaxed);
        self.journal_next.store(next.wrapping_add(1), Ordering::Relaxed);
        let slot = next as usize % JOURNAL_SLOTS;
        let len = len.min(HEAD_LEN);
        let room = self.chunk_len() as usize - usize::from(offset);
        // SAFETY: `slot` is inside the journal; the thread that owns the frames of this UMEM is alone in writing it. No more is copied
        // than the chunk has from `offset` on; what lies behind the packet is of no use, but a fixed length needs no call.
        unsafe {
            let head = self.chunk_ptr(chunk).add(usize::from(offset)).as_ptr();
            let entry = self.journal.add(slot).as_ptr();
            // Invalid while it is written: a frame that still refers to this slot must not get these bytes.
            (&raw mut (*entry).chunk).write_volatile(u32::MAX);
            compiler_fence(Ordering::SeqCst);
            #[cfg(all(test, not(loom)))]
            crate::crash::point();
            (*entry).len = len as u32;
            let bytes = (&raw mut (*entry).bytes).cast::<u8>();
            match len {
                0..=64 if room >= 64 => bytes.copy_from_nonoverlapping(head, 64),
                _ if room >= HEAD_LEN => bytes.copy_from_nonoverlapping(head, HEAD_LEN),
                _ => bytes.copy_from_nonoverlapping(head, len),
            }
            compiler_fence(Ordering::SeqCst);
            (&raw mut (*entry).chunk).write_volatile(chunk);
        }
        self.set(chunk, Owner::Rewriting { slot: Some(slot as u16) });
    }

    /// Starts the journal over, so that its first slots stay in the cache. Call it when no received frame is left that would
    /// come again.
    #[inline]
    pub(crate) fn restart_journal(&self) {
        self.journal_next.store(0, Ordering::Relaxed);
    }

    /// Puts the first bytes of a chunk back as they were received. False if the journal has lost them.
    pub(crate) fn undo(&self, chunk: u32, offset: u32, slot: u16) -> bool {
        let slot = slot as usize;
        if slot >= JOURNAL_SLOTS {
            return false;
        }
        // SAFETY: `slot` is inside the journal; recovery runs before any frame exists.
        let entry = unsafe { self.journal.add(slot).as_ref() };
        let len = entry.len as usize;
        if entry.chunk != chunk || len > HEAD_LEN || offset as usize + len > self.chunk_len() as usize {
            return false;
        }
        // SAFETY: the destination lies inside the chunk, which no frame and no kernel owns while its word says `Rewriting`.
        unsafe {
            self.chunk_ptr(chunk)
                .add(offset as usize)
                .as_ptr()
                .copy_from_nonoverlapping(entry.bytes.as_ptr(), len)
        };
        true
    }
}

/// The memory that packets lie in. A small handle; the mapping lives until the process ends.
#[derive(Clone, Copy)]
pub struct Umem(pub(crate) &'static Region);

impl Umem {
    /// Creates packet memory in a sealed memfd. Give the descriptor to whoever goes on after this process.
    ///
    /// # Errors
    /// A chunk length or number that the kernel does not take, or no memory.
    pub fn create(config: UmemConfig) -> Result<(Umem, OwnedFd), UmemError> {
        check(config.chunks, config.chunk_len)?;
        let total = Layout::of(config.chunks, config.chunk_len, config.hugepages).total;
        let failed =
            |source: io::Error| UmemError::Memory { len_bytes: total, hugepages: config.hugepages, source };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if config.hugepages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = memfd_create("af-xdp-umem", flags).map_err(|e| failed(e.into()))?;
        ftruncate(&fd, total as u64).map_err(|e| failed(e.into()))?;
        fcntl_add_seals(&fd, SEALS).map_err(|e| failed(e.into()))?;
        let mapping = MmapOptions::new().len(total).populate().map_raw(&fd).map_err(failed)?;
        let trailer =
            Trailer { magic: MAGIC, layout: LAYOUT, chunks: config.chunks, chunk_len: config.chunk_len };
        // SAFETY: the last `TRAILER_LEN` bytes are mapped, unused by the rest of the layout, and aligned to 64.
        unsafe { mapping.as_mut_ptr().add(total - TRAILER_LEN).cast::<Trailer>().write(trailer) };
        Ok((Umem(Region::map(mapping, config.chunks, config.chunk_len, config.hugepages)), fd))
    }

    /// Maps packet memory again from a descriptor made by [`Umem::create`] in another process.
    ///
    /// # Errors
    /// The descriptor is no such memory, or can be resized by others, or cannot be mapped.
    pub fn inherit(fd: impl AsFd) -> Result<Umem, UmemError> {
        let fd = fd.as_fd();
        if !fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALS)) {
            return Err(UmemError::Inherited("it is not sealed against resizing"));
        }
        let stat = fstat(fd).map_err(|_| UmemError::Inherited("its size cannot be read"))?;
        let total = usize::try_from(stat.st_size).unwrap_or(0);
        if total < TRAILER_LEN || !total.is_multiple_of(PAGE_LEN) {
            return Err(UmemError::Inherited("it is too short"));
        }
        let mapping = MmapOptions::new()
            .len(total)
            .populate()
            .map_raw(&fd)
            .map_err(|source| UmemError::Memory { len_bytes: total, hugepages: false, source })?;
        // SAFETY: as in `create`; any bytes make a valid `Trailer`.
        let trailer = unsafe { mapping.as_ptr().add(total - TRAILER_LEN).cast::<Trailer>().read() };
        if trailer.magic != MAGIC || trailer.layout != LAYOUT {
            return Err(UmemError::Inherited("it has another layout"));
        }
        check(trailer.chunks, trailer.chunk_len)
            .map_err(|_| UmemError::Inherited("its chunks make no sense"))?;
        let hugepages = stat.st_blksize as usize == HUGEPAGE_LEN;
        if Layout::of(trailer.chunks, trailer.chunk_len, hugepages).total != total {
            return Err(UmemError::Inherited("its size contradicts its chunks"));
        }
        Ok(Umem(Region::map(mapping, trailer.chunks, trailer.chunk_len, hugepages)))
    }

    /// Packet memory without a descriptor, for tests, replay and benches.
    ///
    /// # Panics
    /// If `chunk_len` is neither 2048 nor 4096, `chunks` is 0, or there is no memory.
    pub fn anonymous(chunks: u32, chunk_len: u32) -> Umem {
        check(chunks, chunk_len).expect("a valid UMEM");
        let total = Layout::of(chunks, chunk_len, false).total;
        let mapping = MmapOptions::new().len(total).map_anon().expect("memory for packets");
        Umem(Region::map(mapping.into(), chunks, chunk_len, false))
    }

    /// All chunks as free frames; `None` if they were taken before in this process. For memory that was just created;
    /// after a restart the frames come from recovery instead.
    pub fn take_frames(self) -> Option<FramePool> {
        if !self.claim() {
            return None;
        }
        for chunk in 0..self.0.chunks {
            self.0.set(chunk, Owner::Free);
        }
        Some(FramePool::new(self, (0..self.0.chunks).rev().collect()))
    }

    /// A pool without frames: for a socket that is opened while another process has them. That one must take the socket over
    /// before it has frames to receive into.
    pub fn no_frames(self) -> FramePool {
        FramePool::new(self, Vec::new())
    }

    /// True for the first caller in this process, who makes the pool.
    pub(crate) fn claim(self) -> bool {
        !self.0.taken.swap(true, Ordering::Relaxed)
    }

    /// Who has a chunk, by the ledger. For statistics and tests.
    ///
    /// # Panics
    /// If there is no such chunk.
    pub fn owner(self, chunk: u32) -> Owner {
        self.0.word(chunk).owner()
    }

    /// How many chunks there are.
    pub fn chunks(self) -> u32 {
        self.0.chunks
    }

    /// Bytes a chunk.
    pub fn chunk_len(self) -> u32 {
        self.0.chunk_len()
    }

    /// Bytes that the kernel locks for each socket that registers this memory.
    pub fn len_bytes(self) -> usize {
        self.0.chunks as usize * self.0.chunk_len() as usize
    }
}

impl PartialEq for Umem {
    fn eq(&self, other: &Umem) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Umem {}

impl fmt::Debug for Umem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Umem({} chunks of {} bytes)", self.chunks(), self.chunk_len())
    }
}

fn check(chunks: u32, chunk_len: u32) -> Result<(), UmemError> {
    if !matches!(chunk_len, 2048 | 4096) {
        return Err(UmemError::ChunkLen(chunk_len));
    }
    if chunks == 0 || chunks > CHUNKS_MAX {
        return Err(UmemError::Chunks(chunks));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: UmemConfig = UmemConfig { chunks: 16, chunk_len: 2048, hugepages: false };

    #[test]
    fn an_inherited_descriptor_shows_the_same_bytes_and_owners() {
        let (umem, fd) = Umem::create(SMALL).unwrap();
        let mut pool = umem.take_frames().unwrap();
        let frame = pool.frame_from(b"over the wall").unwrap();
        let chunk = frame.chunk();
        umem.0.set(chunk, Owner::Tx { port: 1, index: 77 });

        let again = Umem::inherit(&fd).unwrap();
        assert_ne!(umem, again);
        assert_eq!((again.chunks(), again.chunk_len()), (16, 2048));
        assert_eq!(again.owner(chunk), Owner::Tx { port: 1, index: 77 });
        // SAFETY: the test alone uses both mappings, and nothing writes.
        let bytes = unsafe { std::slice::from_raw_parts(again.0.chunk_ptr(chunk).as_ptr().add(256), 13) };
        assert_eq!(bytes, b"over the wall");
    }

    #[test]
    fn frames_are_handed_out_once() {
        let umem = Umem::anonymous(4, 4096);
        assert_eq!(umem.take_frames().unwrap().len(), 4);
        assert!(umem.take_frames().is_none());
    }

    #[test]
    fn sizes_that_the_kernel_refuses_are_refused_with_the_remedy() {
        let error = Umem::create(UmemConfig { chunk_len: 2049, ..SMALL }).unwrap_err();
        assert_eq!(error.to_string(), "chunk length is 2049: use 2048 or 4096");
        assert!(matches!(Umem::create(UmemConfig { chunks: 0, ..SMALL }), Err(UmemError::Chunks(0))));
    }

    #[test]
    fn foreign_descriptors_are_refused() {
        let unsealed = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 1 << 16).unwrap();
        assert!(matches!(
            Umem::inherit(&unsealed),
            Err(UmemError::Inherited("it is not sealed against resizing"))
        ));
        fcntl_add_seals(&unsealed, SEALS).unwrap();
        assert!(matches!(Umem::inherit(&unsealed), Err(UmemError::Inherited("it has another layout"))));
    }
}
