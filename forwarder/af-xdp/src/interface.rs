//! What must be known of an interface before a socket is bound to it.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const ETHTOOL_GCHANNELS: u32 = 0x3c;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct EthtoolChannels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// How many queues an interface has, as `ethtool -l` shows them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Channels {
    /// Receive queues of their own.
    pub rx: u32,
    /// Transmit queues of their own.
    pub tx: u32,
    /// Queues for both directions.
    pub combined: u32,
    /// How many can be had for both directions without making the interface anew.
    pub max: u32,
}

impl Channels {
    /// Reads them (`ETHTOOL_GCHANNELS`). An interface that knows no channels has one queue. `socket`: any in the
    /// interface's network namespace but one of AF_XDP, which takes no ioctl.
    ///
    /// # Errors
    /// There is no such interface, or its name is longer than the kernel takes.
    pub fn of(socket: impl AsFd, interface: &str) -> io::Result<Channels> {
        let one = Channels { rx: 0, tx: 0, combined: 1, max: 1 };
        let mut channels = EthtoolChannels { cmd: ETHTOOL_GCHANNELS, ..Default::default() };
        // SAFETY: `ifreq` is plain data, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if interface.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::NotFound.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        // SAFETY: the request names a terminated string and memory for the answer, both alive during the call.
        if unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCETHTOOL, &raw mut request) } == 0 {
            let max = channels.max_combined + channels.max_rx.min(channels.max_tx);
            return Ok(Channels { rx: channels.rx, tx: channels.tx, combined: channels.combined, max });
        }
        match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(one),
            e => Err(e),
        }
    }

    /// Queues that serve both directions.
    pub fn pairs(&self) -> u32 {
        self.combined + self.rx.min(self.tx)
    }

    /// The command that gives `interface` at least `wanted` queues.
    pub fn remedy(&self, interface: &str, wanted: u32) -> String {
        if wanted > self.max {
            return format!(
                "it can have {} at most: use fewer workers, or make it anew with more (for veth: \
                 `ip link add {interface} numrxqueues {wanted} numtxqueues {wanted} type veth ...`)",
                self.max
            );
        }
        let form =
            if self.combined > 0 { format!("combined {wanted}") } else { format!("rx {wanted} tx {wanted}") };
        format!("mend it with: ethtool -L {interface} {form}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_a_queue_and_nonsense_is_not_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(Channels::of(&socket, "lo").unwrap().pairs(), 1);
        assert!(Channels::of(&socket, "towpath-none").is_err());
        assert!(Channels::of(&socket, "a-name-that-is-too-long-for-linux").is_err());
    }

    #[test]
    fn the_remedy_fits_the_kind_of_queues() {
        let veth = Channels { rx: 1, tx: 1, combined: 0, max: 4 };
        assert_eq!(veth.remedy("g0", 2), "mend it with: ethtool -L g0 rx 2 tx 2");
        let nic = Channels { rx: 0, tx: 0, combined: 1, max: 8 };
        assert_eq!(nic.remedy("eth1", 4), "mend it with: ethtool -L eth1 combined 4");
        assert!(nic.remedy("eth1", 9).contains("8 at most"));
    }
}
