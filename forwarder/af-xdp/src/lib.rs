//! AF_XDP sockets: UMEM, the four rings, one socket a queue, and frames that cannot be used twice.
//!
//! Read first: the kernel's `Documentation/networking/af_xdp.rst`. The words are libxdp's: a ring is written by
//! *reserve* and *submit*, read by *peek* and *release*.
//!
//! - [`Umem`] is the memory that packets lie in: a sealed memfd, mapped by whoever inherits its descriptor.
//! - [`Frame`] owns one chunk of it; [`FramePool`] holds the free ones, last in, first out.
//! - [`ledger`] tells the owner of every chunk in shared memory, so that the next process can go on after a `kill -9`.

#![allow(dead_code)]

pub mod ledger;

mod frame;
mod umem;

pub use frame::{Frame, FramePool, HEAD_LEN, NoRoom, RX_HEADROOM};
pub use umem::{Umem, UmemConfig, UmemError};
