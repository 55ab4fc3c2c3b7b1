//! One end of a veth pair, as bytes: frames in, frames out.

use std::io::ErrorKind;
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

    /// Puts one frame on the wire, from the Ethernet header on. Waits while the other end has no room (ENOBUFS), for a second at most.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match rustix::io::write(&self.socket, frame) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(error) => return Err(error).context("frame not sent"),
            }
        }
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
            match next_frame(&self.socket, buffer) {
                Ok(length) if is_chatter(&buffer[..length]) => continue,
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("frame not received"),
            }
            if !Wire::wait(&[self], deadline)? {
                return Ok(None);
            }
        }
    }

    /// Waits until one of the wires has something, chatter or not; false if none has by `deadline`.
    pub fn wait(wires: &[&Wire], deadline: Instant) -> Result<bool> {
        let mut fds: Vec<_> = wires.iter().map(|wire| PollFd::new(&wire.socket, PollFlags::IN)).collect();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout =
                rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("poll on packet sockets"),
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

/// Receives one frame as it was on the wire: the kernel takes the outer VLAN tag off and tells it beside the frame
/// (PACKET_AUXDATA, packet(7)).
#[allow(unsafe_code)] // rustix has no ancillary data of packet sockets.
fn next_frame(socket: &OwnedFd, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Room for one `tpacket_auxdata` behind its header, aligned for both.
    let mut ancillary = [0u64; 8];
    // SAFETY: an all-zero msghdr is a valid value of it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (ancillary.as_mut_ptr().cast(), size_of_val(&ancillary));
    // SAFETY: `message` refers to `part` and `ancillary`, which outlive the call, with their sizes.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(received).map_err(|_| std::io::Error::last_os_error())?;
    // SAFETY: the kernel has filled in `message`; a header that is not null lies in `ancillary` with all of its data.
    let told = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let is_told = !header.is_null()
            && (*header).cmsg_level == libc::SOL_PACKET
            && (*header).cmsg_type == libc::PACKET_AUXDATA;
        is_told.then(|| libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned())
    };
    match told {
        Some(told) if told.tp_status & libc::TP_STATUS_VLAN_VALID != 0 && length + 4 <= buffer.len() => {
            buffer.copy_within(12..length, 16);
            buffer[12..14].copy_from_slice(&told.tp_vlan_tpid.to_be_bytes());
            buffer[14..16].copy_from_slice(&told.tp_vlan_tci.to_be_bytes());
            Ok(length + 4)
        }
        _ => Ok(length),
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

    for (option, name) in
        [(libc::PACKET_IGNORE_OUTGOING, "PACKET_IGNORE_OUTGOING"), (libc::PACKET_AUXDATA, "PACKET_AUXDATA")]
    {
        let yes: libc::c_int = 1;
        // SAFETY: `yes` outlives the call and its size is given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const yes).cast(),
                size_of_val(&yes) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(std::io::Error::last_os_error()).context(name);
        }
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
