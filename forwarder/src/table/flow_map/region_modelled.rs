//! The region while loom checks a model: a few records on the heap, nothing mapped.

use super::layout::{Bucket, Extension, Record};

/// How many of everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sizes {
    pub records: u32,
    pub buckets: u32,
}

impl Sizes {
    pub fn for_capacity(capacity: u32) -> Sizes {
        Sizes { records: capacity, buckets: 2 }
    }

    pub fn len(self) -> usize {
        0
    }
}

/// As the mapped one.
pub(super) struct Region {
    buckets: Box<[Bucket]>,
    records: Box<[Record]>,
    extensions: Box<[Extension]>,
}

impl Region {
    pub fn modelled(sizes: Sizes) -> Region {
        Region {
            buckets: (0..sizes.buckets).map(|_| Bucket::default()).collect(),
            records: (0..sizes.records).map(|_| Record::default()).collect(),
            extensions: (0..sizes.records).map(|_| Extension::default()).collect(),
        }
    }

    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    pub fn extensions(&self) -> &[Extension] {
        &self.extensions
    }

    pub fn populate_extension(&self, _record: u32) -> bool {
        true
    }
}

/// Nothing to prefetch.
pub(super) fn prefetch<T>(_item: &T) {}
