//! The one thing of the mirror that takes CAP_NET_ADMIN: having the kernel resolve next hops and keep them resolved.
//!
//! The data plane has no privilege and asks the keeper, which executes by [`Direct`]. Entries of ours carry [`PROTOCOL`], so that
//! they are known again after a restart of either process, and no entry of somebody else is ever released.

use std::io;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::decode;
use super::message::{Request, kind};
use super::snapshot::Neighbor;
use super::socket::Socket;
use crate::addr::Addr;

/// NDA_PROTOCOL of entries that Towpath has the kernel keep; `ip neigh` shows `proto 84`. Numbers up to 254 that
/// `include/uapi/linux/rtnetlink.h` does not name are free to use.
pub const PROTOCOL: u8 = b'T';

/// NTF_USE: resolve now, as if a packet had asked.
const USE: u8 = 0x01;
/// NTF_EXT_MANAGED in NDA_FLAGS_EXT: the kernel probes it again by itself (Linux 5.16).
const MANAGED: u32 = 0x01;
/// NUD_NONE: nothing is claimed about it.
const NONE: u16 = 0;

/// What is asked for a neighbor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Care {
    /// Resolve it once, now.
    Resolve,
    /// Resolve it now and keep it resolved.
    Keep,
    /// No longer keep it; it ages like any other entry.
    Release,
}

/// Has the kernel look after neighbors. Called by the mirror's thread; may wait for the keeper, at most milliseconds.
pub trait Privileged: Send {
    /// `link`: interface index.
    ///
    /// # Errors
    /// The privilege is missing, the interface is gone, or the kernel's neighbor table is full (ENOBUFS).
    fn neighbor(&mut self, link: u32, addr: IpAddr, care: Care) -> io::Result<()>;
}

/// Does it at once, with CAP_NET_ADMIN: the keeper's side.
#[derive(Debug)]
pub struct Direct {
    socket: Socket,
    interfaces: Vec<String>,
}

impl Direct {
    /// `interfaces`: names of the ports; neighbors of no other interface are touched.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(interfaces: Vec<String>) -> io::Result<Direct> {
        Ok(Direct { socket: Socket::open()?, interfaces })
    }

    /// Touches neighbors of these interfaces from now on, and of no others: those that it had the kernel keep there are released.
    ///
    /// # Errors
    /// The kernel refuses to release; the new interfaces hold all the same.
    pub fn set_interfaces(&mut self, interfaces: Vec<String>) -> io::Result<()> {
        self.interfaces.retain(|name| !interfaces.contains(name));
        let outcome = if self.interfaces.is_empty() { Ok(0) } else { self.release_all() };
        self.interfaces = interfaces;
        outcome.map(drop)
    }

    /// Releases every entry that Towpath has the kernel keep on its ports, for a clean stop. Returns how many.
    ///
    /// # Errors
    /// The kernel refuses; the others are released all the same.
    pub fn release_all(&mut self) -> io::Result<usize> {
        let ours: Vec<_> = neighbors(&mut self.socket)?
            .into_iter()
            .filter(|((link, _), entry)| entry.managed && entry.protocol == PROTOCOL && self.is_port(*link))
            .collect();
        let mut outcome = Ok(ours.len());
        for ((link, addr), _) in ours {
            if let Err(error) = self.neighbor(link, addr.into(), Care::Release) {
                outcome = Err(error);
            }
        }
        outcome
    }

    fn is_port(&self, link: u32) -> bool {
        rustix::net::netdevice::index_to_name(&self.socket, link)
            .is_ok_and(|name| self.interfaces.contains(&name))
    }
}

/// Whoever the keeper is.
impl Privileged for Box<dyn Privileged> {
    fn neighbor(&mut self, link: u32, addr: IpAddr, care: Care) -> io::Result<()> {
        (**self).neighbor(link, addr, care)
    }
}

impl Privileged for Direct {
    fn neighbor(&mut self, link: u32, addr: IpAddr, care: Care) -> io::Result<()> {
        if !self.is_port(link) {
            let message = format!("interface {link} is no port of the gateway file");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        self.socket.request(request(link, addr, care))
    }
}

/// Every neighbor of both families.
///
/// # Errors
/// The kernel refuses the dump.
pub fn neighbors(socket: &mut Socket) -> io::Result<Vec<((u32, Addr), Neighbor)>> {
    socket.dump(kind::GET_NEIGH, &[0; 12], decode::neighbor)
}

/// RTM_NEWNEIGH as `neigh_add` in net/core/neighbour.c reads it: with NTF_USE or NTF_MANAGED the state of an entry that exists is
/// left as it is (but for "permanent", so those are never asked for), and the managed flag becomes what the message says.
fn request(link: u32, addr: IpAddr, care: Care) -> Request {
    let (family, bytes) = match addr {
        IpAddr::V4(v4) => (decode::INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (decode::INET6, v6.octets().to_vec()),
    };
    let flags = if care == Care::Keep { 0 } else { USE };
    let mut header = [0; 12];
    header[0] = family;
    header[4..8].copy_from_slice(&link.to_ne_bytes());
    header[8..10].copy_from_slice(&NONE.to_ne_bytes());
    header[10] = flags;
    // Releasing must not bring an entry back that is gone.
    let create = if care == Care::Release { 0 } else { kind::F_CREATE };
    let request = Request::new(kind::NEW_NEIGH, kind::F_ACK | create, &header).attribute(1, &bytes);
    match care {
        Care::Keep => request.attribute(15, &MANAGED.to_ne_bytes()).attribute(12, &[PROTOCOL]),
        Care::Resolve | Care::Release => request,
    }
}
