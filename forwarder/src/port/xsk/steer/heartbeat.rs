//! The heartbeats of the workers, in the map that the steering program reads.
//!
//! The map is mapped into the data plane, whose workers write to it, and into the keeper, which watches. A worker needs
//! neither a system call nor a privilege for it.

#![allow(unsafe_code)] // A mapping that the kernel and other processes share.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::QUEUES_PER_PORT;

/// `struct heartbeat` of steer.bpf.c: one cache line a worker.
const ENTRY_BYTES: usize = 64;

/// The mapped heartbeats.
#[derive(Debug)]
pub struct Heartbeats {
    map: MmapRaw,
}

impl Heartbeats {
    /// Maps the map of [`Steering::heartbeats`](super::Steering::heartbeats).
    ///
    /// # Errors
    /// The descriptor is no such map, or the process may not map more memory.
    pub fn map(fd: BorrowedFd<'_>) -> io::Result<Heartbeats> {
        let len = QUEUES_PER_PORT as usize * ENTRY_BYTES;
        Ok(Heartbeats { map: MmapOptions::new().len(len).map_raw(fd.as_raw_fd())? })
    }

    /// Heartbeats that nobody else sees, for tests and replay.
    ///
    /// # Errors
    /// The process may not map more memory.
    pub fn anonymous() -> io::Result<Heartbeats> {
        let map = MmapOptions::new().len(QUEUES_PER_PORT as usize * ENTRY_BYTES).map_anon()?;
        Ok(Heartbeats { map: map.into() })
    }

    /// Worker `worker` is alive at `monotonic_ns` (CLOCK_MONOTONIC, nanoseconds). One store; any thread, though only the
    /// worker itself has reason to.
    #[inline]
    pub fn beat(&self, worker: usize, monotonic_ns: u64) {
        self.cell(worker).store(monotonic_ns, Ordering::Relaxed);
    }

    /// When the worker last said that it is alive; 0 if it never did.
    #[inline]
    pub fn last_ns(&self, worker: usize) -> u64 {
        self.cell(worker).load(Ordering::Relaxed)
    }

    #[inline]
    fn cell(&self, worker: usize) -> &AtomicU64 {
        assert!(worker < QUEUES_PER_PORT as usize, "worker {worker} has no heartbeat");
        // SAFETY: the mapping is `QUEUES_PER_PORT * ENTRY_BYTES` bytes, page-aligned, writable and lives as long as
        // `self`; the assertion above keeps the offset inside, and it is a multiple of 64, so aligned. The other users
        // of the memory (the steering program, other processes) access the word whole: 8 aligned bytes.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(worker * ENTRY_BYTES).cast()) }
    }
}
