//! The region while loom checks a model: a few records on the heap, nothing mapped.

use super::layout::{Bucket, Extension, Record};
use super::sync::AtomicU16;
use super::{EmptyReason, FlowMapError};

/// How many of everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sizes {
    pub records: u32,
    pub buckets: u32,
}

impl Sizes {
    pub fn for_capacity(capacity: u32) -> Sizes {
        Sizes { records: capacity, buckets: 4 }
    }

    pub fn len(self) -> usize {
        0
    }
}

/// Nothing is ever found.
pub(super) struct Header {
    pub sizes: Sizes,
    pub key: [u64; 2],
}

impl Header {
    pub fn read(_file: &std::fs::File) -> Result<Header, EmptyReason> {
        Err(EmptyReason::New)
    }
}

/// As the mapped one.
pub(super) struct Region {
    buckets: Box<[Bucket]>,
    records: Box<[Record]>,
    extensions: Box<[Extension]>,
    marks: Box<[AtomicU16]>,
}

impl Region {
    /// Nothing outlives a model.
    pub fn open(
        _file: &std::fs::File,
        sizes: Sizes,
        _found: Result<Header, EmptyReason>,
        _key: Option<[u64; 2]>,
    ) -> Result<(Region, [u64; 2], Option<EmptyReason>), FlowMapError> {
        Region::anonymous(sizes).map(|(region, key)| (region, key, Some(EmptyReason::New)))
    }

    /// The key is the same in every run of a model, which must be repeatable.
    pub fn anonymous(sizes: Sizes) -> Result<(Region, [u64; 2]), FlowMapError> {
        let region = Region {
            buckets: (0..sizes.buckets).map(|_| Bucket::default()).collect(),
            records: (0..sizes.records).map(|_| Record::default()).collect(),
            extensions: (0..sizes.records).map(|_| Extension::default()).collect(),
            marks: Box::default(),
        };
        Ok((region, [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9]))
    }

    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Models mark nothing.
    pub fn marks(&self) -> &[AtomicU16] {
        &self.marks
    }

    pub fn extensions(&self) -> &[Extension] {
        &self.extensions
    }

    pub fn populate_extension(&self, _record: u32) -> bool {
        true
    }
}
