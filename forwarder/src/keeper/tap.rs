//! The way back to the kernel for packets that turned out not to be ours: one TAP for each port, from which they go on as
//! if the port had just received them (see [`crate::port::tap`]).

#![allow(unsafe_code)] // ioctl(2) has no safe wrapper for these requests.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A TAP that exists as long as its descriptor does.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    ifindex: u32,
}

impl Tap {
    /// Creates a TAP named `towpathN` with the MAC address of `port`, and sets it up. Packets are written to it behind a
    /// virtio header (see [`crate::worker::punt`]).
    ///
    /// # Errors
    /// `/dev/net/tun` is missing or CAP_NET_ADMIN is.
    pub fn create(port: &str) -> io::Result<Tap> {
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let mut request = request_for("towpath%d")?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        ioctl(file.as_fd(), libc::TUNSETIFF, &mut request)?;
        let name: String = request
            .ifr_name
            .iter()
            .map(|byte| *byte as u8)
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect();

        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        follow(&name, port)?;
        // No IPv6 of its own: no address, no routes, no neighbor discovery. Not there without IPv6, which is as good.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        let mut flags = request_for(&name)?;
        flags.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as i16;
        ioctl(socket.as_fd(), libc::SIOCSIFFLAGS, &mut flags)?;
        let ifindex = rustix::net::netdevice::name_to_index(&socket, &name)?;
        Ok(Tap { file, name, ifindex })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Index of the interface.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Gives the TAP called `tap` the MAC address of the interface `port`, if it has another: a port's address may change while it
/// runs, and the kernel would take what is given back for packets to another host. Returns whether it was changed.
///
/// # Errors
/// One of them is gone.
pub fn follow(tap: &str, port: &str) -> io::Result<bool> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let read = |name| {
        let mut address = request_for(name)?;
        ioctl(socket.as_fd(), libc::SIOCGIFHWADDR, &mut address)?;
        io::Result::Ok(address)
    };
    let (now, mut wanted) = (read(tap)?, read(port)?);
    // SAFETY: SIOCGIFHWADDR has filled in this member of the union in both.
    let same = unsafe { now.ifr_ifru.ifru_hwaddr.sa_data == wanted.ifr_ifru.ifru_hwaddr.sa_data };
    if !same {
        wanted.ifr_name = now.ifr_name;
        ioctl(socket.as_fd(), libc::SIOCSIFHWADDR, &mut wanted)?;
    }
    Ok(!same)
}

/// True if `interface` has Ethernet frames, which loopback and tunnels have not.
///
/// # Errors
/// No such interface.
pub fn is_ethernet(interface: &str) -> io::Result<bool> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut address = request_for(interface)?;
    ioctl(socket.as_fd(), libc::SIOCGIFHWADDR, &mut address)?;
    // SAFETY: SIOCGIFHWADDR has filled in this member of the union.
    Ok(unsafe { address.ifr_ifru.ifru_hwaddr.sa_family } == libc::ARPHRD_ETHER)
}

fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is integers, bytes and pointers that may be null: all zeroes is a value of it.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an interface name of more than 15 bytes"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every request used here reads and writes one `ifreq` at the pointer, which is exclusive and live.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
