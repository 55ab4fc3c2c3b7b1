//! Who may speak to the daemon: root, the daemon's own user, and members of the configured group.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The daemon's own user.
    pub own_uid: u32,
    /// `[control] group`, if there is one.
    pub group: Option<u32>,
}

impl Admission {
    /// Root, this process's user, and members of `group`.
    pub fn own(group: Option<u32>) -> Admission {
        Admission { own_uid: rustix::process::geteuid().as_raw(), group }
    }

    /// True if a peer with these credentials may connect.
    pub fn admits(&self, peer: &Peer) -> bool {
        peer.uid == 0
            || peer.uid == self.own_uid
            || self.group.is_some_and(|group| peer.groups.contains(&group))
    }
}

/// The credentials of a peer as they were when it connected (unix(7), SO_PEERCRED). They cannot be forged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process, for the log; another process may have the number by now. 0 if it is in a foreign PID namespace.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group and supplementary groups.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Asks the kernel who is at the other end of `socket`.
    ///
    /// # Errors
    /// `socket` is not a connected Unix socket.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        // struct ucred: pid, uid, gid. The pid is 0 if the peer is in a PID namespace that we cannot see.
        let mut credentials = [0u32; 3];
        socket_option(&socket, libc::SO_PEERCRED, &mut credentials)?;
        let [pid, uid, gid] = credentials;
        let mut groups = supplementary_groups(&socket)?;
        groups.push(gid);
        Ok(Peer { pid, uid, groups })
    }
}

/// SO_PEERGROUPS (Linux 4.13), which libc does not name.
const SO_PEERGROUPS: libc::c_int = 59;

/// NGROUPS_MAX of Linux.
const GROUPS_MAX: usize = 65536;

fn supplementary_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 64];
    loop {
        match socket_option(socket, SO_PEERGROUPS, &mut groups) {
            Ok(count) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // ERANGE: more groups than room (net/core/sock.c, sk_getsockopt).
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) && groups.len() < GROUPS_MAX => {
                groups.resize(GROUPS_MAX, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Reads an option of SOL_SOCKET that consists of 32-bit numbers. Returns how many there are.
#[allow(unsafe_code)] // rustix has no SO_PEERGROUPS, and its SO_PEERCRED cannot hold a pid of 0.
fn socket_option(socket: &impl AsFd, option: libc::c_int, numbers: &mut [u32]) -> io::Result<usize> {
    let mut bytes = size_of_val(numbers) as libc::socklen_t;
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel writes at most `bytes` bytes into `numbers`,
    // which is that large and for which every bit pattern is valid, and the length written into `bytes`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            numbers.as_mut_ptr().cast(),
            std::ptr::from_mut(&mut bytes),
        )
    };
    if result == 0 { Ok(bytes as usize / size_of::<u32>()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(peer.groups.contains(&rustix::process::getegid().as_raw()));
        for group in rustix::process::getgroups().unwrap() {
            assert!(peer.groups.contains(&group.as_raw()));
        }
    }

    #[test]
    fn only_root_the_own_user_and_the_group_come_in() {
        let peer = |uid, groups: &[u32]| Peer { pid: 1, uid, groups: groups.to_vec() };
        let with_group = Admission { own_uid: 500, group: Some(77) };
        assert!(with_group.admits(&peer(0, &[0])));
        assert!(with_group.admits(&peer(500, &[500])));
        assert!(with_group.admits(&peer(1000, &[1000, 77])));
        assert!(!with_group.admits(&peer(1000, &[1000, 78])));
        let without = Admission { own_uid: 500, group: None };
        assert!(!without.admits(&peer(1000, &[0])), "the group of root is not root");
        assert!(!without.admits(&peer(65534, &[65534])));
    }
}
