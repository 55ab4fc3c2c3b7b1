//! The mapped region: header page, buckets, records, extensions.
//!
//! ```text
//! offset 0      header page: magic, layout version, sizes, hash key, checksum
//!        4096   buckets      64 B each, half a bucket a connection: 32 B a connection
//!        ...    records      64 B a connection
//!        ...    marks        16 B a connection
//!        ...    extensions   64 B a connection, touched by flows that are not IPv4 only
//! ```
//!
//! Buckets, records and marks are allocated when the region is opened, so that no worker ever waits for a page of them or dies of SIGBUS on
//! a full tmpfs. Extensions are allocated a page (64 records) at a time, when the first IPv6 flow gets there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::layout::{Bucket, Extension, Record};
use super::sync::{AtomicU16, AtomicU64, Ordering};
use super::{EmptyReason, FlowMapError};

/// Counts changes of the layout, of the hash and of the meaning of any bit in the region.
pub(super) const LAYOUT_VERSION: u64 = 2;

const MAGIC: u64 = u64::from_le_bytes(*b"towpathF");
const PAGE: usize = 4096;
/// With as many marked connections as there are flows, one in nine of those that are not marked looks so; with four times as many, two
/// in five.
const MARKS_PER_RECORD: usize = 8;
const HEADER_WORDS: usize = 8;

/// The first words of the region, in this order, then a checksum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub sizes: Sizes,
    pub key: [u64; 2],
}

impl Header {
    fn words(&self) -> [u64; HEADER_WORDS] {
        let mut words = [
            MAGIC,
            LAYOUT_VERSION,
            u64::from(self.sizes.records),
            u64::from(self.sizes.buckets),
            self.key[0],
            self.key[1],
            0,
            0,
        ];
        words[HEADER_WORDS - 1] = checksum(&words[..HEADER_WORDS - 1]);
        words
    }

    /// Reads the header of `file`.
    pub fn read(file: &File) -> Result<Header, EmptyReason> {
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        if len == 0 {
            return Err(EmptyReason::New);
        }
        let mut bytes = [0u8; 8 * HEADER_WORDS];
        if len < PAGE as u64 || file.read_exact_at(&mut bytes, 0).is_err() {
            return Err(EmptyReason::Length { found: len, expected: PAGE as u64 });
        }
        let mut words = [0u64; HEADER_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        if words[0] != MAGIC {
            return Err(EmptyReason::Foreign);
        }
        if words[1] != LAYOUT_VERSION {
            return Err(EmptyReason::LayoutVersion { found: words[1], expected: LAYOUT_VERSION });
        }
        if words[HEADER_WORDS - 1] != checksum(&words[..HEADER_WORDS - 1]) {
            return Err(EmptyReason::Checksum);
        }
        let header = Header { sizes: Sizes::for_capacity(words[2] as u32), key: [words[4], words[5]] };
        let expected = header.sizes.len() as u64;
        if len != expected {
            return Err(EmptyReason::Length { found: len, expected });
        }
        Ok(header)
    }
}

/// FNV-1a over words: it finds damage, not malice.
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3))
}

/// How many of everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sizes {
    pub records: u32,
    pub buckets: u32,
}

impl Sizes {
    /// Two slots a connection at half load. With two candidate buckets of eight slots, no insert failed for want of a slot among six
    /// million after filling half a million buckets to this load; at 0.7 one in 500 did.
    pub fn for_capacity(capacity: u32) -> Sizes {
        Sizes { records: capacity, buckets: capacity.div_ceil(2).max(2) }
    }

    fn records_at(self) -> usize {
        PAGE + self.buckets as usize * size_of::<Bucket>()
    }

    fn marks_at(self) -> usize {
        self.records_at() + self.records as usize * size_of::<Record>()
    }

    fn marks(self) -> usize {
        self.records as usize * MARKS_PER_RECORD
    }

    /// Rounded to a page, so that 64 records have their extensions in one page.
    fn extensions_at(self) -> usize {
        (self.marks_at() + self.marks() * size_of::<AtomicU16>()).next_multiple_of(PAGE)
    }

    pub fn len(self) -> usize {
        self.extensions_at() + (self.records as usize * size_of::<Extension>()).next_multiple_of(PAGE)
    }
}

/// The mapping. Lives as long as the map; nothing in it ever moves.
pub(super) struct Region {
    map: MmapRaw,
    sizes: Sizes,
    buckets: NonNull<Bucket>,
    records: NonNull<Record>,
    marks: NonNull<AtomicU16>,
    extensions: NonNull<Extension>,
    /// A bit a page of extensions: allocated, safe to touch.
    populated: Box<[AtomicU64]>,
}

// SAFETY: all access goes through atomics inside the mapping, which is unmapped only when the region is dropped.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `file` as it is if its header says so, which must ask for `sizes`; else empties it and gives it a new header, with `key` or
    /// a random one.
    pub fn open(
        file: &File,
        sizes: Sizes,
        found: Result<Header, EmptyReason>,
        key: Option<[u64; 2]>,
    ) -> Result<(Region, [u64; 2], Option<EmptyReason>), FlowMapError> {
        let (header, empty) = match found {
            Ok(header) => (header, None),
            Err(reason) => {
                file.set_len(0).map_err(FlowMapError::file("empty"))?;
                file.set_len(sizes.len() as u64).map_err(FlowMapError::file("extend"))?;
                let key = key.map_or_else(random_key, Ok)?;
                (Header { sizes, key }, Some(reason))
            }
        };
        assert!(header.sizes == sizes, "the caller compares the capacities");
        let needed = sizes.extensions_at() as u64;
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, needed).map_err(|error| {
            FlowMapError::NoRoom { needed, full: sizes.len() as u64, error: error.into() }
        })?;
        let map = MmapOptions::new().len(sizes.len()).map_raw(file).map_err(FlowMapError::file("map"))?;
        let region = Region::over(map, sizes);
        region.prefault();
        if empty.is_some() {
            // Last, so that a process killed before this line leaves a file that is started anew.
            region.write_header(&header);
        }
        Ok((region, header.key, empty))
    }

    /// Memory of this process only.
    pub fn anonymous(sizes: Sizes) -> Result<(Region, [u64; 2]), FlowMapError> {
        let map = MmapOptions::new().len(sizes.len()).map_anon().map_err(FlowMapError::file("map"))?;
        Ok((Region::over(map.into(), sizes), random_key()?))
    }

    fn over(map: MmapRaw, sizes: Sizes) -> Region {
        assert!(map.len() >= sizes.len(), "the mapping is shorter than its layout");
        // Fewer TLB misses where the file system can do it; where it cannot, nothing is lost.
        let _ = map.advise(Advice::HugePage);
        let base = map.as_mut_ptr();
        let part = |offset: usize| {
            // SAFETY: every offset of `Sizes` lies inside the mapping, whose length was compared above.
            let start = unsafe { base.add(offset) };
            NonNull::new(start).expect("a mapping never starts at address zero")
        };
        let pages = (sizes.records as usize).div_ceil(PAGE / size_of::<Extension>());
        Region {
            buckets: part(PAGE).cast(),
            records: part(sizes.records_at()).cast(),
            marks: part(sizes.marks_at()).cast(),
            extensions: part(sizes.extensions_at()).cast(),
            populated: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            map,
            sizes,
        }
    }

    fn prefault(&self) {
        // Kernels before 5.14 refuse this; the pages then come at the first touch, which fallocate made safe.
        let _ = self.map.advise_range(Advice::PopulateWrite, 0, self.sizes.extensions_at());
    }

    fn write_header(&self, header: &Header) {
        // SAFETY: the header page is the start of the mapping, which is page-aligned and at least a page long.
        let cells =
            unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), HEADER_WORDS) };
        let words = header.words();
        for (cell, word) in cells.iter().zip(words).skip(1) {
            cell.store(word.to_le(), Ordering::Relaxed);
        }
        cells[0].store(words[0].to_le(), Ordering::Release);
    }

    #[inline]
    pub fn buckets(&self) -> &[Bucket] {
        // SAFETY: `Sizes` reserves this many buckets at this 64-byte aligned offset; atomics allow shared access, and every bit
        // pattern, zero included, is a valid bucket.
        unsafe { std::slice::from_raw_parts(self.buckets.as_ptr(), self.sizes.buckets as usize) }
    }

    #[inline]
    pub fn records(&self) -> &[Record] {
        // SAFETY: as for the buckets.
        unsafe { std::slice::from_raw_parts(self.records.as_ptr(), self.sizes.records as usize) }
    }

    #[inline]
    pub fn marks(&self) -> &[AtomicU16] {
        // SAFETY: as for the buckets; records end at a multiple of 64 bytes, which is aligned enough.
        unsafe { std::slice::from_raw_parts(self.marks.as_ptr(), self.sizes.marks()) }
    }

    #[inline]
    pub fn extensions(&self) -> &[Extension] {
        // SAFETY: as for the buckets; a page that is not allocated yet is allocated by the kernel when it is touched.
        unsafe { std::slice::from_raw_parts(self.extensions.as_ptr(), self.sizes.records as usize) }
    }

    /// Makes the extension of `record` safe to write. One system call for every 64 records in the life of a process.
    ///
    /// Returns false if the file system has no room for the page.
    pub fn populate_extension(&self, record: u32) -> bool {
        let page = record as usize / (PAGE / size_of::<Extension>());
        let (word, bit) = (&self.populated[page / 64], 1u64 << (page % 64));
        if word.load(Ordering::Relaxed) & bit != 0 {
            return true;
        }
        let offset = self.sizes.extensions_at() + page * PAGE;
        let done = match self.map.advise_range(Advice::PopulateWrite, offset, PAGE) {
            Ok(()) => true,
            // EINVAL: a kernel before 5.14, where the touch itself has to do.
            Err(error) => error.raw_os_error() == Some(libc::EINVAL),
        };
        if done {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        done
    }
}

fn random_key() -> Result<[u64; 2], FlowMapError> {
    let mut bytes = [0u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| FlowMapError::Random { error: error.into() })?;
    assert_eq!(got, bytes.len(), "getrandom(2) never returns fewer than 256 bytes short of an error");
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| half.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    Ok([word(low), word(high)])
}
