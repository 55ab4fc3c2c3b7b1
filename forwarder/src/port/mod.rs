//! Ports: where packets come from and go to, behind one trait.
//!
//! A worker owns one queue of every port, and one [`FramePool`] for all of them, so that a frame goes from one port's RX
//! ring to another's TX ring without being copied. Its loop, for each port in turn:
//!
//! ```text
//! rx_burst      at most 64 packets; their RX entries stay in the ring
//! pipeline      judges and rewrites; frames move into one Burst per port to leave by, or back onto the pool
//! tx_burst      on each of those ports; what stays in the Burst did not fit: drop it with a reason, or try again
//! kick          on each port that got something: the kernel sends
//! release_rx    the burst is done with: what the worker still keeps (packets on hold) is its own from here on
//! complete      on each port: frames that were sent are free again
//! refill        on each port: free frames wait for packets
//! ```
//!
//! Until `release_rx` the packets of the burst belong to the ring: if the process is killed, those that were not put on
//! a TX ring come again, as they were received if only [`Frame::head_mut`](af_xdp::Frame::head_mut) has changed them.
//! So release after transmitting, and refill after every port is released (a refill in between does nothing). Bursts of
//! several ports may be open at once.
//!
//! Packets longer than a frame come as several: see [`Burst::tails`].

use std::os::fd::BorrowedFd;

pub use af_xdp::{Burst, Frame, FramePool, Kick, QueueFrames, Refused, Tail};

pub mod memory;
pub mod pcap;
pub mod tap;
pub mod xsk;

/// One worker's queue of a port. Worker thread only; no method blocks, logs or allocates on the way of a packet of one
/// frame.
pub trait Port {
    /// Appends at most `max` received packets to `burst`. Returns how many.
    fn rx_burst(&mut self, pool: &mut FramePool, burst: &mut Burst, max: usize) -> usize;

    /// Takes packets from the front of `burst` to send them. Returns how many; what did not fit stays in `burst`.
    fn tx_burst(&mut self, pool: &mut FramePool, burst: &mut Burst) -> usize;

    /// Sends what was taken. At most one system call where the port makes any, unless the kernel wants more.
    fn kick(&mut self) -> Kick;

    /// Ends all received bursts of this port.
    fn release_rx(&mut self, pool: &mut FramePool);

    /// Puts sent frames back onto the pool. Returns how many.
    fn complete(&mut self, pool: &mut FramePool) -> usize;

    /// Gives free frames to the port for what it will receive. Returns how many.
    fn refill(&mut self, pool: &mut FramePool) -> usize;

    /// A mark behind everything that was taken by [`Port::tx_burst`] so far.
    fn tx_mark(&self) -> u32;

    /// True once everything before `mark` has left the port, so that no packet made from older tables is left in it.
    fn is_sent(&mut self, mark: u32) -> bool;

    /// How packets are exchanged with the driver.
    fn mode(&self) -> Mode;

    /// What to poll(2) for `POLLIN` while there is nothing to do; `None`: the port never has to be waited for.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Where the frames of the queue are and what it refused. No system call. Between bursts, every few milliseconds.
    fn account(&mut self) -> QueueAccount;
}

/// Copies `packet` into as many frames as it needs. False, with nothing taken, if there are too few.
pub(crate) fn copy_in(packet: &[u8], pool: &mut FramePool, burst: &mut Burst) -> bool {
    let Some(first) = pool.pop() else { return false };
    let room = first.capacity();
    pool.push(first);
    if pool.len() < packet.len().div_ceil(room).max(1) {
        return false;
    }
    let mut segments = packet.chunks(room);
    burst.push(pool.frame_from(segments.next().unwrap_or_default()).expect("counted above"));
    for segment in segments {
        burst.push_tail(pool.frame_from(segment).expect("counted above"));
    }
    true
}

/// How packets are exchanged with the driver, best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mode {
    /// The driver reads and writes the frames itself.
    ZeroCopy,
    /// The driver's XDP hook runs the steering program, the kernel copies each packet.
    NativeCopy,
    /// The steering program runs behind the driver, on packets that the kernel has built already, and they are copied.
    Generic,
    /// No driver: memory or a file.
    Software,
}

impl Mode {
    /// Its name in statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::ZeroCopy => "zero-copy",
            Mode::NativeCopy => "native-copy",
            Mode::Generic => "generic",
            Mode::Software => "software",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a queue of a port knows of itself beside the packets that the worker saw. What the kernel counted for its socket
/// is read by the control thread instead: [`af_xdp::Statistics`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QueueAccount {
    /// Frames that are neither free nor the worker's.
    pub frames: QueueFrames,
    /// Descriptors that made no sense.
    pub refused: Refused,
    /// Packets that the device dropped on their way out, at least.
    pub lost_sends: u64,
}
