//! One worker's queue of an AF_XDP port.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use af_xdp::{Burst, FramePool, Kick, OpenError, Recovered, Socket, SocketConfig, Umem, recover_frames};

use super::steer::AttachMode;
use crate::port::{Mode, Port, QueueAccount};

/// One worker's queue of an AF_XDP port.
pub struct XskPort {
    socket: Socket,
    mode: Mode,
}

/// What a worker has after its start: the queue of every port, the frames that are free, and what the last data plane
/// left behind.
pub type WorkerPorts = (Vec<XskPort>, FramePool, Recovered);

/// Takes over the sockets of one worker, which share `umem`: maps their rings, finds the frames.
///
/// `sockets`: one for each port, in the order of the ports, as the keeper opened them with `config`; with each, its number in `umem`
/// and where its steering program runs.
///
/// # Errors
/// A descriptor is no socket with rings of these sizes.
///
/// # Panics
/// If the frames of `umem` were taken before in this process.
pub fn take_over(
    umem: Umem,
    sockets: Vec<(OwnedFd, u8, AttachMode)>,
    config: &SocketConfig,
) -> Result<WorkerPorts, OpenError> {
    let mut inherited = Vec::with_capacity(sockets.len());
    let mut attached = Vec::with_capacity(sockets.len());
    for (fd, number, mode) in sockets {
        inherited.push(Socket::inherit(fd, umem, usize::from(number), config)?);
        attached.push(mode);
    }
    let (pool, recovered) = recover_frames(umem, &mut inherited).expect("frames are found once in a process");
    let ports = inherited.into_iter().zip(attached).map(|(socket, at)| XskPort::new(socket, at)).collect();
    Ok((ports, pool, recovered))
}

impl XskPort {
    /// A port over `socket`, whose steering program runs at `attached`.
    pub fn new(socket: Socket, attached: AttachMode) -> XskPort {
        let mode = mode_of(&socket, attached);
        XskPort { socket, mode }
    }
}

/// How a socket and the steering program of its interface exchange packets with the driver.
pub fn mode_of(socket: &Socket, attached: AttachMode) -> Mode {
    match attached {
        _ if socket.is_zero_copy() => Mode::ZeroCopy,
        AttachMode::Native => Mode::NativeCopy,
        AttachMode::Generic => Mode::Generic,
    }
}

impl Port for XskPort {
    #[inline]
    fn rx_burst(&mut self, pool: &mut FramePool, burst: &mut Burst, max: usize) -> usize {
        if self.socket.is_busy_polled() {
            self.socket.poll_driver();
        }
        self.socket.receive(pool, burst, max)
    }

    #[inline]
    fn tx_burst(&mut self, pool: &mut FramePool, burst: &mut Burst) -> usize {
        self.socket.transmit(pool, burst)
    }

    #[inline]
    fn kick(&mut self) -> Kick {
        self.socket.kick()
    }

    #[inline]
    fn release_rx(&mut self, pool: &mut FramePool) {
        self.socket.release(pool);
    }

    #[inline]
    fn complete(&mut self, pool: &mut FramePool) -> usize {
        self.socket.complete(pool)
    }

    #[inline]
    fn refill(&mut self, pool: &mut FramePool) -> usize {
        self.socket.refill(pool)
    }

    fn tx_mark(&self) -> u32 {
        self.socket.tx_mark()
    }

    fn is_sent(&mut self, mark: u32) -> bool {
        self.socket.is_sent(mark)
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn account(&mut self) -> QueueAccount {
        QueueAccount {
            frames: self.socket.frames(),
            refused: self.socket.refused(),
            lost_sends: self.socket.lost_sends(),
        }
    }
}
