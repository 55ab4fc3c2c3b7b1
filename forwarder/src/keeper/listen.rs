//! Sockets that listen: the control socket, and those of the health server ([`tcp`]).
//!
//! The control socket's file is private while it is made, then moved into place. Between bind(2) and chmod(2) a socket has whatever mode the umask left it, and a path that somebody else can write to
//! may be a symlink by the time it is used. So the socket is bound in a directory that only we can enter, given its
//! mode and group there, and renamed over the old one, which is atomic and follows nothing.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::fault::{Code, Fault};
use config::gateway::HealthSection;
use rustix::fs::Gid;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::account::Account;

/// How long a daemon may take to go after its keeper was killed.
const LAST_BREATH: Duration = Duration::from_millis(700);

/// The listening control socket. Dropping it removes its file.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at `path`, mode 0660, for members of `group` if there is one.
    ///
    /// The file of a daemon that is gone is replaced.
    ///
    /// # Errors
    /// Somebody listens there, or the path is something else than a socket: the fault says what.
    pub fn listen(path: &Path, group: Option<Gid>) -> Result<ControlSocket, Fault> {
        if let Some(fault) = obstacle(path) {
            return Err(fault);
        }
        if somebody_listens(path) {
            return Err(fault(path, "another daemon listens there", "stop it first, or name another path"));
        }
        match bind_privately(path, group) {
            Ok(listener) => Ok(ControlSocket { listener, path: path.into() }),
            Err(cause) => {
                Err(fault(path, format!("cannot be made: {cause}"), "name a path that root may write to"))
            }
        }
    }

    /// The socket, to be handed to the data plane.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and the next start replaces a stale file.
        let _ = fs::remove_file(&self.path);
    }
}

/// What stands where the socket is to be, if it is something else than a socket.
pub fn obstacle(path: &Path) -> Option<Fault> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => None,
        Ok(_) => {
            let complaint = "is taken by something that is not a socket";
            Some(fault(path, complaint, "remove it, or name another path"))
        }
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => None,
        Err(cause) => {
            Some(fault(path, format!("cannot be used: {cause}"), "name a path that root may write to"))
        }
    }
}

fn fault(path: &Path, complaint: impl Into<String>, remedy: &str) -> Fault {
    Fault::new(Code::Conflict, complaint).field("control.socket").value(path.display()).remedy(remedy)
}

/// True if somebody listens, and still does after a moment: a data plane whose keeper was killed is on its way out.
fn somebody_listens(path: &Path) -> bool {
    let end = Instant::now() + LAST_BREATH;
    while UnixStream::connect(path).is_ok() {
        if Instant::now() > end {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn bind_privately(path: &Path, group: Option<Gid>) -> io::Result<UnixListener> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    let private = parent.join(format!(".control.{}", std::process::id()));
    let _ = fs::remove_dir_all(&private);
    DirBuilder::new().mode(0o700).create(&private)?;
    let made = private.join("socket");
    let result = (|| {
        let listener = UnixListener::bind(&made)?;
        fs::set_permissions(&made, Permissions::from_mode(0o660))?;
        if let Some(group) = group {
            chown(&made, None, Some(group.as_raw()))?;
        }
        listener.set_nonblocking(false)?;
        fs::rename(&made, path)?;
        Ok(listener)
    })();
    let _ = fs::remove_dir_all(&private);
    result
}

/// Makes the directory of accepted objects, if needed, and gives it and its files to the data plane's account.
///
/// # Errors
/// It cannot be made, or is no directory.
pub fn make_state_dir(path: &Path, account: &Account) -> Result<(), Fault> {
    let own = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o750).create(path)?;
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        // The account may have changed since the last start. Links are not followed: the directory belongs to an account
        // without privileges, which must not get a file of ours this way.
        std::os::unix::fs::lchown(path, Some(account.uid), Some(account.gid))?;
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::os::unix::fs::lchown(entry.path(), Some(account.uid), Some(account.gid))?;
            }
        }
        Ok(())
    };
    own().map_err(|cause| {
        Fault::new(Code::Storage, format!("cannot be used: {cause}"))
            .field("control.state_dir")
            .value(path.display())
            .remedy("name a directory that root may write to, such as /var/lib/towpath")
    })
}

/// Clients of the health server that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A TCP socket that listens at `addr` and does not block, for the health server of the data plane, which may open none itself.
///
/// # Errors
/// The gateway file has no such server, or the kernel refused: in words for the operator.
pub fn tcp(addr: SocketAddr, health: HealthSection) -> Result<OwnedFd, String> {
    // healthCheckNodePorts are what objects say, and whoever writes those must not get a port of the system.
    let is_node_port = health.node_ports && addr.port() >= 1024;
    if health.listen.0 != Some(addr) && !is_node_port {
        return Err(format!(
            "{addr} is no port of the health server: use a healthCheckNodePort of 1024 or more"
        ));
    }
    let attempt = match addr.ip() {
        // Every address of both families, as in kube-proxy. Without IPv6 those of IPv4 are all there are.
        ip if ip.is_unspecified() => {
            let all = |ip: IpAddr| open(SocketAddr::new(ip, addr.port()), false);
            match all(Ipv6Addr::UNSPECIFIED.into()) {
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => all(Ipv4Addr::UNSPECIFIED.into()),
                outcome => outcome,
            }
        }
        _ => open(addr, true),
    };
    attempt.map_err(|cause| match cause {
        Errno::ADDRINUSE => "another program listens there".to_owned(),
        Errno::ADDRNOTAVAIL => "this machine has no such address".to_owned(),
        cause => io::Error::from(cause).to_string(),
    })
}

fn open(addr: SocketAddr, own_family_only: bool) -> rustix::io::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Connections of the data plane before may still linger.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, own_family_only)?;
    }
    bind(&socket, &addr)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that nobody listens on, at least a moment ago.
    fn free_port() -> u16 {
        std::net::TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn an_unspecified_address_serves_both_families() {
        let port = free_port();
        let addr = SocketAddr::from(([0, 0, 0, 0], port));
        let health =
            HealthSection { listen: config::gateway::Listen(Some(addr)), ..HealthSection::default() };
        let listener = tcp(addr, health).unwrap();
        for to in [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
            std::net::TcpStream::connect(to).unwrap();
        }
        assert_eq!(tcp(addr, health).unwrap_err(), "another program listens there");
        drop(listener);
        tcp(addr, health).unwrap();
    }

    #[test]
    fn only_what_the_gateway_file_lets_be_served_is_opened() {
        let health = HealthSection::default();
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        tcp(at(free_port()), health).unwrap();
        assert!(tcp(at(80), health).unwrap_err().contains("1024"));
        let no_node_ports = HealthSection { node_ports: false, ..health };
        assert!(tcp(at(free_port()), no_node_ports).unwrap_err().contains("no port of the health server"));
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], free_port()));
        assert_eq!(tcp(elsewhere, health).unwrap_err(), "this machine has no such address");
    }

    #[test]
    fn mode_is_0660_and_the_file_goes_with_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let socket = ControlSocket::listen(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "the private directory is gone");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_file_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        let live = ControlSocket::listen(&path, None).unwrap();
        let refused = ControlSocket::listen(&path, None).unwrap_err().to_string();
        assert!(refused.contains("control.socket") && refused.contains("another daemon"), "{refused}");
        drop(live);
    }

    #[test]
    fn files_and_symlinks_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        fs::write(&target, "data").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for path in [&target, &link] {
            assert!(ControlSocket::listen(path, None).unwrap_err().to_string().contains("not a socket"));
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "data");
    }
}
