//! AF_XDP sockets: UMEM, the four rings, one socket a queue, and frames that cannot be used twice.
//!
//! Read first: the kernel's `Documentation/networking/af_xdp.rst`. The words are libxdp's: a ring is written by
//! *reserve* and *submit*, read by *peek* and *release*.
//!
//! - [`Umem`] is the memory that packets lie in: a sealed memfd, mapped by whoever inherits its descriptor.
//! - [`Frame`] owns one chunk of it; [`FramePool`] holds the free ones, last in, first out.
//! - [`ledger`] tells the owner of every chunk in shared memory, so that the next process can go on after a `kill -9`.

#![cfg_attr(loom, allow(dead_code, unused_imports))]

pub mod ledger;

mod burst;
#[cfg(all(test, not(loom)))]
mod crash;
mod error;
mod frame;
mod interface;
#[cfg(not(loom))]
mod option;
mod queue;
mod recover;
pub mod redirect;
mod ring;
#[cfg(not(loom))]
mod socket;
mod umem;

pub use burst::{Burst, Tail};
pub use error::OpenError;
pub use interface::Channels;
#[cfg(not(loom))]
pub use socket::{BusyPoll, Kick, Socket, SocketConfig, Statistics, recover_frames};

pub use frame::{Frame, FramePool, HEAD_LEN, NoRoom, RX_HEADROOM};
pub use queue::{QueueFrames, Refused};
pub use recover::Recovered;
pub use umem::{Umem, UmemConfig, UmemError};

/// Lets one or two microseconds pass before rings that were empty are looked at again. Each look takes the line of the producer's
/// index away from the CPU that fills the ring, and that one is the busier of the two.
#[inline]
pub fn pause() {
    for _ in 0..32 {
        std::hint::spin_loop();
    }
}
