//! The lock-free flow map of the forwarder, compiled from the forwarder's own files, so that loom can check it without building the
//! daemon and all that it depends on:
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p models --lib --release`
//!
//! Without `--cfg loom` this crate is empty.
#![cfg(loom)]
#![allow(dead_code, reason = "a model drives a part of what the forwarder calls")]

#[path = "../../src/addr.rs"]
pub mod addr;

/// As in the forwarder.
#[path = "../../src/table"]
pub mod table {
    pub mod flow_map;

    /// Nothing to prefetch.
    pub(crate) fn prefetch<T: ?Sized>(_item: &T) {}
}
