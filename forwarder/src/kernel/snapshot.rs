//! What the kernel says: links, addresses, routes and neighbors of one network namespace at one moment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::addr::Addr;

/// Links, addresses, routes and neighbors. Cheap to clone but for the neighbors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// By interface index.
    pub links: Arc<BTreeMap<u32, Link>>,
    /// In the kernel's order, so the first of a link is its primary address.
    pub addresses: Arc<Vec<Address>>,
    /// The tables local, main and default of both families, in the kernel's order.
    pub routes: Arc<Vec<KernelRoute>>,
    /// By interface index and address.
    pub neighbors: BTreeMap<(u32, Addr), Neighbor>,
    /// Policy rules that choose another table than local, main and (IPv4) default. The forwarder does not follow them.
    pub foreign_rules: usize,
    /// IPv4 has other policy rules than the three that are always there.
    pub ipv4_has_policy: bool,
}

impl Snapshot {
    /// The link called `name`.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Link {
    /// Interface index. A deleted and created interface of the same name has another.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Link-layer address, if it is an Ethernet address.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Administratively up and with a carrier (IFF_UP and IFF_LOWER_UP).
    pub up: bool,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Interface index.
    pub link: u32,
    /// The address itself, not that of the peer.
    pub addr: IpAddr,
    /// Length of the prefix that it stands for.
    pub prefix_len: u8,
    /// Scope global: packets to the outside may have it as their source.
    pub global: bool,
    /// Duplicate address detection is over and found nothing (RFC 4862 section 5.4).
    pub usable: bool,
    /// Secondary (IPv4), temporary or deprecated (IPv6): not the first choice as a source.
    pub secondary: bool,
}

/// The three tables that are asked when no other policy rules are set, in the order in which they are asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Table {
    /// Table 255: the gateway's own addresses, broadcast addresses.
    Local,
    /// Table 254.
    Main,
    /// Table 253.
    Default,
}

/// `rtm_type`, as far as the forwarder tells them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RouteKind {
    /// A way by one of the hops.
    Unicast,
    /// To the gateway itself: local, broadcast, multicast, anycast.
    Local,
    /// Blackhole, unreachable or prohibit.
    Blackhole,
    /// Any other (throw, nat): the kernel decides.
    Other,
}

/// A route of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// The table that it stands in.
    pub table: Table,
    /// Destination.
    pub net: IpNet,
    /// What it does.
    pub kind: RouteKind,
    /// Priority; of two routes to one destination the lower wins.
    pub metric: u32,
    /// One or, of a multipath route, several.
    pub hops: Vec<Hop>,
    /// RTAX_MTU, bytes.
    pub mtu: Option<u32>,
    /// Who installed it (`rtm_protocol`): 2 the kernel, 3 boot, 4 static, 12 BIRD, 186 BGP, ...
    pub protocol: u8,
}

/// One way of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface index; 0 if the kernel names none.
    pub link: u32,
    /// None: the destination is on the link. It may be of another family than the route (RFC 8950).
    pub gateway: Option<IpAddr>,
    /// RTNH_F_DEAD: the interface is down.
    pub dead: bool,
    /// RTNH_F_LINKDOWN: no carrier.
    pub link_down: bool,
    /// Encapsulated by the kernel (RTA_ENCAP, MPLS labels): nothing that the forwarder can do.
    pub encapsulated: bool,
}

/// An entry of the kernel's neighbor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// Link-layer address; set and valid only in a valid state.
    pub mac: Option<[u8; 6]>,
    /// NUD_* bits of `include/uapi/linux/neighbour.h`.
    pub state: u16,
    /// NTF_EXT_MANAGED: the kernel keeps it resolved by itself.
    pub managed: bool,
    /// NDA_PROTOCOL: who installed it; 0 for the kernel.
    pub protocol: u8,
}

impl Neighbor {
    /// NUD_PERMANENT: set by an administrator, never probed.
    pub const PERMANENT: u16 = 0x80;
    /// NUD_NOARP: valid without ever being probed.
    pub const NOARP: u16 = 0x40;
    /// NUD_FAILED: does not answer.
    pub const FAILED: u16 = 0x20;
    /// NUD_PERMANENT, NOARP, REACHABLE, PROBE, STALE and DELAY, as in the kernel's `include/net/neighbour.h`.
    pub const VALID: u16 = 0x80 | 0x40 | 0x02 | 0x10 | 0x04 | 0x08;

    /// Its link-layer address, if packets may be sent there.
    pub fn valid_mac(&self) -> Option<[u8; 6]> {
        self.mac.filter(|_| self.state & Neighbor::VALID != 0)
    }

    /// The kernel never probes it.
    pub fn is_fixed(&self) -> bool {
        self.state & (Neighbor::PERMANENT | Neighbor::NOARP) != 0
    }
}
