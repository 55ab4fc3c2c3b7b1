//! Loads the steering program (steer.bpf.c), attaches it to ports and keeps its maps.
//!
//! Used by the keeper only: all of it needs CAP_BPF and CAP_NET_ADMIN. The program is held by links, never pinned, so
//! that nothing stays behind when the keeper ends, however it ends.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::addr::Addr;

pub use set::{AddressEntry, Contents, LocalAddress, LocalPort, PrefixUse, SteerChange, SteerSet};

pub use heartbeat::Heartbeats;

pub mod heartbeat;
#[cfg(test)]
mod reference;
pub mod set;
#[cfg(test)]
mod tests;

/// The program; rebuilt from steer.bpf.c by `scripts/steer`.
static OBJECT: &[u8] = include_bytes_aligned!("steer.bpf.o");

/// Sockets of one port in the map `sockets`; steer.bpf.c knows the same number.
pub const QUEUES_PER_PORT: u32 = 64;
/// Most ports of a gateway; steer.bpf.c knows the same number.
pub const MAX_PORTS: u32 = 16;

/// How many entries the maps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SteerSizes {
    /// Service addresses and own addresses.
    pub addresses: u32,
    /// NodePorts and host ports, once for each own address.
    pub local_ports: u32,
    /// podCIDRs, Service ranges, and endpoints outside of podCIDRs.
    pub prefixes: u32,
}

impl Default for SteerSizes {
    fn default() -> SteerSizes {
        SteerSizes { addresses: 65_536, local_ports: 65_536, prefixes: 262_144 }
    }
}

/// What went wrong with the steering program.
#[derive(Debug, Error)]
pub enum SteerError {
    /// The kernel refused the program or a map.
    #[error("steering program: {what}: {cause}; needs CAP_BPF, CAP_NET_ADMIN and Linux 5.18 or newer")]
    Load {
        /// What was being done.
        what: &'static str,
        /// The kernel's answer, with the verifier's last words if it has any.
        cause: String,
    },
    /// Another XDP program is on the interface.
    #[error("another XDP program is attached to {interface}")]
    Occupied {
        /// Name of the interface.
        interface: String,
    },
    /// The interface takes no XDP program in any of the modes that were wanted.
    #[error("{interface} takes no XDP program ({refusals})")]
    NoXdp {
        /// Name of the interface.
        interface: String,
        /// Each mode and why it was refused.
        refusals: String,
    },
    /// A map has no room for another entry.
    #[error("the steering program has room for {capacity} of them, and none for another {entry}")]
    Full {
        /// Entries that the map takes.
        capacity: u32,
        /// The entry, in words.
        entry: String,
    },
    /// Any other refusal to change a map.
    #[error("steering map {map}: {cause}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// The kernel's answer.
        cause: String,
    },
}

/// Where a port's steering program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachMode {
    /// In the driver, before the kernel has allocated anything.
    Native,
    /// In the generic path, after the kernel has; every packet is copied once more.
    Generic,
}

impl AttachMode {
    fn xdp_mode(self) -> XdpMode {
        match self {
            AttachMode::Native => XdpMode::Driver,
            AttachMode::Generic => XdpMode::Skb,
        }
    }
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AttachMode::Native => "native",
            AttachMode::Generic => "generic",
        })
    }
}

macro_rules! steer_counters {
    ($($variant:ident = $name:literal, $help:literal;)*) => {
        /// What became of a packet at the steering program. In the order of `enum counter` in steer.bpf.c, which
        /// describes each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // The comments stand in steer.bpf.c.
        pub enum SteerCounter { $($variant),* }

        impl SteerCounter {
            /// Every counter, in order.
            pub const ALL: &'static [SteerCounter] = &[$(SteerCounter::$variant),*];

            /// Its name in statistics.
            pub const fn name(self) -> &'static str {
                match self { $(SteerCounter::$variant => $name),* }
            }

            /// What it counts, as a sentence.
            pub const fn help(self) -> &'static str {
                match self { $(SteerCounter::$variant => $help),* }
            }
        }
    };
}

steer_counters! {
    PassNotIp = "pass_not_ip", "To the kernel: neither IPv4 nor IPv6, such as ARP.";
    PassShort = "pass_short", "To the kernel: too short for an IP header.";
    PassGroup = "pass_group", "To the kernel: broadcast, multicast, link-local.";
    PassNeighbor = "pass_neighbor", "To the kernel: neighbor and router discovery.";
    PassLocal = "pass_local", "To the kernel: for the gateway itself.";
    PassOther = "pass_other", "To the kernel: neither to nor from anything of ours.";
    PassPlain = "pass_plain", "To the kernel, to be routed to pods for want of a live worker.";
    RedirectVip = "redirect_vip", "To a worker: for an address of a Service.";
    RedirectLocal = "redirect_local", "To a worker: for a NodePort, a host port or a masquerade port of an own address.";
    RedirectRouted = "redirect_routed", "To a worker: for one of our prefixes.";
    RedirectSource = "redirect_source", "To a worker: from one of our prefixes.";
    RedirectError = "redirect_error", "To a worker: an ICMP error about a packet to an endpoint.";
    DropWorkerDead = "worker_dead", "Dropped: ours, but its worker has not been heard of for too long.";
    DropNoSocket = "no_socket", "Dropped: ours, but no worker serves its queue.";
}

const COUNTERS: usize = SteerCounter::ALL.len();

/// The steering program, loaded. Dropping it detaches it everywhere.
pub struct Steering {
    /// Holds the program; the maps have been taken out of it.
    programs: Ebpf,
    sizes: SteerSizes,
    sockets: XskMap<MapData>,
    ports: HashMap<MapData, u32, u32>,
    addresses: HashMap<MapData, [u8; 16], [u16; 4]>,
    local_ports: HashMap<MapData, [u8; 20], u32>,
    prefixes: LpmTrie<MapData, [u8; 16], u32>,
    heartbeats: OwnedFd,
    counters: PerCpuArray<MapData, u64>,
    /// By interface index.
    links: BTreeMap<u32, FdLink>,
    contents: Contents,
}

impl Steering {
    /// Loads the program and its maps, with everything empty: attached now, it would pass every packet.
    ///
    /// # Errors
    /// [`SteerError::Load`] if a capability is missing or the kernel is too old.
    pub fn load(sizes: SteerSizes) -> Result<Steering, SteerError> {
        let mut programs = EbpfLoader::new()
            .map_max_entries("sockets", MAX_PORTS * QUEUES_PER_PORT)
            .map_max_entries("ports", MAX_PORTS)
            .map_max_entries("addresses", sizes.addresses)
            .map_max_entries("local_ports", sizes.local_ports)
            .map_max_entries("prefixes", sizes.prefixes)
            .load(OBJECT)
            .map_err(|cause| load_error("loading", &cause))?;
        steer_program(&mut programs)?.load().map_err(|cause| load_error("verifying", &cause))?;
        let Map::Array(heartbeats) = take(&mut programs, "heartbeats")? else {
            return Err(SteerError::Load { what: "map heartbeats", cause: "is no array".into() });
        };
        let heartbeats = heartbeats
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|cause| load_error("keeping the map heartbeats", &cause))?;
        Ok(Steering {
            sockets: take(&mut programs, "sockets")?.try_into().map_err(map_kind)?,
            ports: take(&mut programs, "ports")?.try_into().map_err(map_kind)?,
            addresses: take(&mut programs, "addresses")?.try_into().map_err(map_kind)?,
            local_ports: take(&mut programs, "local_ports")?.try_into().map_err(map_kind)?,
            prefixes: take(&mut programs, "prefixes")?.try_into().map_err(map_kind)?,
            counters: take(&mut programs, "counters")?.try_into().map_err(map_kind)?,
            heartbeats,
            programs,
            sizes,
            links: BTreeMap::new(),
            contents: Contents::default(),
        })
    }

    /// Attaches the program to an interface as the port with slot `port`, by the first of `modes` that the interface takes. Returns that mode,
    /// and why those before it were refused.
    ///
    /// # Errors
    /// [`SteerError::Occupied`] if another program is there, [`SteerError::NoXdp`] if no mode is taken.
    pub fn attach(
        &mut self,
        port: u8,
        interface: &str,
        ifindex: u32,
        modes: &[AttachMode],
    ) -> Result<(AttachMode, String), SteerError> {
        self.ports.insert(ifindex, u32::from(port), 0).map_err(|cause| map_error("ports", &cause))?;
        let mut refusals = Vec::new();
        for mode in modes {
            match self.attach_as(ifindex, mode.xdp_mode()) {
                Ok(()) => return Ok((*mode, refusals.join("; "))),
                // EBUSY: a link of another process. EEXIST: a program in the other path.
                Err(cause) if is_errno(&cause, libc::EBUSY) || is_errno(&cause, libc::EEXIST) => {
                    return Err(SteerError::Occupied { interface: interface.into() });
                }
                Err(cause) => refusals.push(format!("{mode}: {}", refusal(&cause))),
            }
        }
        Err(SteerError::NoXdp { interface: interface.into(), refusals: refusals.join("; ") })
    }

    /// Takes the program off an interface: from now on the kernel gets its packets. Nothing happens if it is not there.
    pub fn detach(&mut self, ifindex: u32) {
        self.links.remove(&ifindex);
        // The only error is that there is no such entry.
        let _ = self.ports.remove(&ifindex);
    }

    fn attach_as(&mut self, ifindex: u32, mode: XdpMode) -> Result<(), ProgramError> {
        let program: &mut Xdp = steer_program(&mut self.programs).map_err(|_| ProgramError::NotLoaded)?;
        let id = program.attach_to_if_index(ifindex, mode)?;
        let link = program.take_link(id)?;
        // A kernel without links for XDP gets the older kind of attachment, which outlives its process. Not here:
        // dropping it detaches it again.
        let link = FdLink::try_from(link).map_err(|_| {
            ProgramError::IOError(io::Error::new(io::ErrorKind::Unsupported, "no XDP link; needs Linux 5.9"))
        })?;
        self.links.insert(ifindex, link);
        Ok(())
    }

    /// Gives the packets of a queue of the port with slot `port` to a socket.
    ///
    /// # Errors
    /// [`SteerError::Map`] if the descriptor is no AF_XDP socket or the queue is out of range.
    pub fn set_socket(&mut self, port: u8, queue: u32, socket: BorrowedFd<'_>) -> Result<(), SteerError> {
        let index = u32::from(port) * QUEUES_PER_PORT + queue;
        self.sockets.set(index, socket.as_raw_fd(), 0).map_err(|cause| map_error("sockets", &cause))
    }

    /// The map of heartbeats, to be mapped by workers and keeper (see [`Heartbeats`]).
    pub fn heartbeats(&self) -> BorrowedFd<'_> {
        self.heartbeats.as_fd()
    }

    /// What the maps hold now.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Applies a change of the maps, entry by entry. What was applied before an error stays applied.
    ///
    /// # Errors
    /// [`SteerError::Full`] if a map has no room.
    pub fn apply(&mut self, change: &SteerChange) -> Result<(), SteerError> {
        let sizes = self.sizes;
        for (addr, entry) in &change.addresses {
            let key = address_key((*addr).into());
            let result = match entry {
                Some(entry) => {
                    self.addresses.insert(key, [entry.flags, entry.snat_first, entry.snat_last, 0], 0)
                }
                None => self.addresses.remove(&key),
            };
            settled(result, "addresses", sizes.addresses, || format!("address ({addr})"))?;
        }
        for (port, present) in &change.local_ports {
            let key = local_port_key(port);
            let result =
                if *present { self.local_ports.insert(key, 1, 0) } else { self.local_ports.remove(&key) };
            settled(result, "local_ports", sizes.local_ports, || {
                format!("local port ({} port {}, protocol {})", port.addr, port.port, port.protocol)
            })?;
        }
        for (net, flags) in &change.prefixes {
            let key = prefix_key(net);
            let result = match flags {
                Some(flags) => self.prefixes.insert(&key, flags, 0),
                None => self.prefixes.remove(&key),
            };
            settled(result, "prefixes", sizes.prefixes, || format!("prefix ({net})"))?;
        }
        self.contents.apply(change);
        Ok(())
    }

    /// The counters, summed over all CPUs, indexed by [`SteerCounter`].
    ///
    /// # Errors
    /// The kernel refused the read.
    pub fn counters(&self) -> Result<[u64; COUNTERS], SteerError> {
        let mut sums = [0; COUNTERS];
        for (index, sum) in sums.iter_mut().enumerate() {
            let values =
                self.counters.get(&(index as u32), 0).map_err(|cause| map_error("counters", &cause))?;
            *sum = values.iter().sum();
        }
        Ok(sums)
    }
}

fn steer_program(programs: &mut Ebpf) -> Result<&mut Xdp, SteerError> {
    let program = programs.program_mut("towpath_steer").and_then(|program| program.try_into().ok());
    program.ok_or(SteerError::Load { what: "program towpath_steer", cause: "is not in the object".into() })
}

fn take(programs: &mut Ebpf, map: &'static str) -> Result<Map, SteerError> {
    programs
        .take_map(map)
        .ok_or(SteerError::Map { map, cause: "is not in the object; rebuild it with scripts/steer".into() })
}

fn map_kind(cause: MapError) -> SteerError {
    load_error("a map of the object does not match steer.rs", &cause)
}

/// An error with all that it was caused by, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Why a driver took no program, in words where the kernel's number alone does not say it.
fn refusal(cause: &ProgramError) -> String {
    match errno(cause) {
        Some(libc::EOPNOTSUPP) => "its driver has no XDP".into(),
        // veth_xdp_set() of drivers/net/veth.c.
        Some(libc::ENOSPC) => {
            "the other end of the veth has more transmit queues than this end has receive queues".into()
        }
        Some(libc::ERANGE) => {
            "the MTU of the interface, or of the other end of the veth, is too large for XDP".into()
        }
        _ => chain(cause),
    }
}

fn load_error(what: &'static str, cause: &dyn std::error::Error) -> SteerError {
    SteerError::Load { what, cause: chain(cause) }
}

fn map_error(map: &'static str, cause: &MapError) -> SteerError {
    SteerError::Map { map, cause: chain(cause) }
}

/// The number of the system error that `error` was caused by.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = error.source();
    }
    None
}

fn is_errno(error: &(dyn std::error::Error + 'static), number: i32) -> bool {
    errno(error) == Some(number)
}

/// Judges the result of one map operation. Removing what is not there is no error: a change may be applied twice.
fn settled(
    result: Result<(), MapError>,
    map: &'static str,
    capacity: u32,
    entry: impl FnOnce() -> String,
) -> Result<(), SteerError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(cause) => match errno(&cause) {
            Some(libc::ENOENT) => Ok(()),
            // Hash tables answer E2BIG, tries ENOSPC.
            Some(libc::E2BIG | libc::ENOSPC) => Err(SteerError::Full { capacity, entry: entry() }),
            _ => Err(map_error(map, &cause)),
        },
    }
}

/// 16 bytes in network order, IPv4 mapped.
fn address_key(addr: Addr) -> [u8; 16] {
    addr.0.to_be_bytes()
}

/// `struct local_port` of steer.bpf.c.
fn local_port_key(port: &LocalPort) -> [u8; 20] {
    let mut key = [0; 20];
    key[..16].copy_from_slice(&address_key(port.addr.into()));
    key[16..18].copy_from_slice(&port.port.to_be_bytes());
    key[18] = port.protocol;
    key
}

/// `struct prefix` of steer.bpf.c: the length counts the bits of the mapped form.
fn prefix_key(net: &IpNet) -> Key<[u8; 16]> {
    let mapped_bits = if net.addr().is_ipv4() { 96 } else { 0 };
    Key::new(mapped_bits + u32::from(net.prefix_len()), address_key(net.network().into()))
}
