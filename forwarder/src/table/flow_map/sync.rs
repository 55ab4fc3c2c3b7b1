//! The atomics that the map stands on: the standard library's, or loom's while a model is checked.

#[cfg(loom)]
pub(super) use ::loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
