//! One end of a veth pair, as bytes: frames in, frames out.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

use crate::namespace::Namespace;

/// A packet socket bound to one interface. It sees what the interface receives, not what is sent by it.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// Opens the interface inside `namespace`. Needs CAP_NET_RAW.
    pub fn open(namespace: &Namespace, interface: &str) -> Result<Wire> {
        let socket = namespace
            .inside(|| packet_socket(interface).with_context(|| format!("packet socket on {interface}")))?;
        Ok(Wire { socket })
    }

    /// Puts one frame on the wire, from the Ethernet header on.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        rustix::io::write(&self.socket, frame).map(drop).context("frame not sent")
    }

    /// Lets `bytes` wait in the kernel until they are received.
    pub fn enlarge(&self, bytes: usize) -> Result<()> {
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&self.socket, bytes).context("SO_RCVBUFFORCE")
    }

    /// The next frame, or none within `patience`. Link-layer chatter of kernels (ARP, neighbor discovery, multicast
    /// listener reports) is passed over.
    pub fn receive(&self, patience: Duration) -> Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 65_536];
        let length = self.receive_into(&mut buffer, patience)?;
        Ok(length.map(|length| buffer[..length].to_vec()))
    }

    /// The same into a buffer that is there already; returns the frame's length.
    pub fn receive_into(&self, buffer: &mut [u8], patience: Duration) -> Result<Option<usize>> {
        let deadline = Instant::now() + patience;
        loop {
            match rustix::io::read(&self.socket, &mut *buffer) {
                Ok(length) if is_chatter(&buffer[..length]) => continue,
                Ok(length) => return Ok(Some(length)),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error).context("frame not received"),
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return Ok(None);
            };
            let timeout =
                rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("poll on a packet socket"),
            }
        }
    }
}

/// True for what kernels send by themselves: ARP, neighbor discovery, multicast listener reports.
pub fn is_chatter(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => true,
        // ICMPv6 130 to 137 and 143, behind a hop-by-hop header too.
        Some([0x86, 0xdd]) => match frame.get(20) {
            Some(58) => frame.get(54).is_some_and(|kind| matches!(kind, 130..=137 | 143)),
            Some(0) => frame.get(54) == Some(&58),
            _ => false,
        },
        _ => false,
    }
}

/// Opens a non-blocking AF_PACKET socket for every protocol on `interface`, in the namespace of this thread.
#[allow(unsafe_code)] // rustix has no sockaddr_ll.
fn packet_socket(interface: &str) -> Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: plain system call; the descriptor that it returns is owned by nobody else.
    let socket = unsafe {
        let raw = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0);
        if raw < 0 {
            return Err(std::io::Error::last_os_error()).context("AF_PACKET (needs CAP_NET_RAW)");
        }
        OwnedFd::from_raw_fd(raw)
    };
    let index = rustix::net::netdevice::name_to_index(socket.as_fd(), interface)
        .with_context(|| format!("no interface {interface}"))?;

    let yes: libc::c_int = 1;
    // SAFETY: `yes` outlives the call and its size is given.
    let ignored = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const yes).cast(),
            size_of_val(&yes) as libc::socklen_t,
        )
    };
    if ignored != 0 {
        return Err(std::io::Error::last_os_error()).context("PACKET_IGNORE_OUTGOING");
    }
    // SAFETY: an all-zero sockaddr_ll is a valid value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    // SAFETY: `address` outlives the call and its size is given.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    if bound != 0 {
        return Err(std::io::Error::last_os_error()).context("bind");
    }
    Ok(socket)
}
