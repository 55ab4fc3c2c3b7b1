//! Which driver an interface has, as `ethtool -i` shows it.

#![allow(unsafe_code)] // ioctl(2) has no safe wrapper for this request.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// Name of the driver of `interface`, such as `veth`.
///
/// # Errors
/// No such interface, or one that has no driver, such as loopback.
pub fn name(interface: &str) -> io::Result<String> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut info = DriverInfo { cmd: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
    // SAFETY: `ifreq` is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::NotFound.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: the request names a terminated string and memory for the whole answer (196 bytes), both alive during the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.driver.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_has_no_driver() {
        assert_eq!(mem::size_of::<DriverInfo>(), 196);
        assert!(name("towpath-none").is_err());
        assert!(name("a-name-that-is-too-long-for-linux").is_err());
    }
}
