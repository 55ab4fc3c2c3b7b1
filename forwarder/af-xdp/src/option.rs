//! Socket options that rustix does not know.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::socket::BusyPoll;

const SOL_XDP: i32 = 283;
const XDP_MAX_TX_SKB_BUDGET: i32 = 9;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;

fn set(fd: impl AsFd, level: i32, option: i32, value: u32) -> io::Result<()> {
    // SAFETY: the value lives during the call and is as long as it says.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// As large as permitted: `SO_SNDBUFFORCE` needs CAP_NET_ADMIN, `SO_SNDBUF` is cut to `net.core.wmem_max`.
pub(crate) fn set_send_buffer(fd: impl AsFd, bytes: u32) {
    let fd = fd.as_fd();
    if set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes).is_err() {
        let _ = set(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, bytes);
    }
}

/// Older kernels refuse the option and send 32 packets a call; nothing depends on it but speed.
pub(crate) fn set_tx_budget(fd: impl AsFd, packets: u32) {
    let _ = set(fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, packets);
}

pub(crate) fn set_busy_poll(fd: impl AsFd, busy_poll: BusyPoll) -> io::Result<()> {
    let fd = fd.as_fd();
    set(fd, libc::SOL_SOCKET, SO_PREFER_BUSY_POLL, 1)?;
    set(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL, busy_poll.time_us)?;
    set(fd, libc::SOL_SOCKET, SO_BUSY_POLL_BUDGET, busy_poll.budget)
}
