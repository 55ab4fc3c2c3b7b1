//! What a packet is judged by: two immutable snapshots, the service tables and the forwarding table.
//!
//! `control/compile` builds [`Tables`] from Kubernetes objects, `kernel/` builds [`Fib`] from links, routes and
//! neighbors. They are published apart, so that a change of services never invalidates a cached next hop.

use std::sync::Arc;

use config::gateway::{MssClamp, SourceChecks};
use ipnet::IpNet;

use crate::addr::Addr;
use crate::table::lpm::Lpm;
use crate::table::paged::PagedMap;
use crate::table::spread::{Load, Spread};
use crate::verdict::Reason;

/// What a frontend is looked up by: the destination of a packet. A `port` of 0 stands for every other port of an owned address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrontendKey {
    /// Destination address.
    pub addr: Addr,
    /// Destination port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// What an endpoint is known by: the source of its answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EndpointKey {
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// The service tables of one generation. Immutable once published.
#[derive(Clone, Default)]
pub struct Tables {
    /// Counts publishes; never 0 once something is published.
    pub generation: u64,
    /// Every (address, protocol, port) that is served.
    pub frontends: PagedMap<FrontendKey, Arc<Frontend>>,
    /// Addresses owned by Services or announced as theirs, with how many frontends share them.
    /// A packet to one of them that matches no frontend is rejected with [`Reason::UnknownPort`].
    pub vips: PagedMap<Addr, Vip>,
    /// For endpoints that one LoadBalancer address or externalIP alone leads to without masquerading clients outside: that address
    /// and port. What lets their connections go on when the flow table is full.
    pub sole_vips: PagedMap<EndpointKey, (Addr, u16)>,
    /// Who an address is: pods by podCIDR and by address, nodes, service ranges. Longest prefix wins.
    pub identities: Arc<Lpm<Identity>>,
    /// Settings of the gateway file that packets depend on.
    pub settings: Arc<Settings>,
}

/// An address that belongs to Services.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Vip {
    /// How many frontends share the address.
    pub frontends: u32,
    /// True for a ClusterIP, which is not served to the outside unless a port says so.
    pub cluster_ip: bool,
}

/// Who an address is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identity {
    /// A pod of this cluster (inside a podCIDR, a cluster CIDR or the address of a Pod object).
    Pod,
    /// A node of this cluster (an InternalIP or ExternalIP of a Node object).
    Node,
    /// Inside a Service range.
    ServiceRange,
}

/// Settings of the gateway file that packets depend on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// Per port, by index: role and switches.
    pub ports: Vec<PortSettings>,
    /// Addresses that packets are masqueraded to, IPv4 first choice first. Empty: the address of the port that the packet leaves by.
    pub snat_addresses: Vec<Addr>,
    /// `[[egress]]` of the gateway file, in its order.
    pub egress: Vec<EgressRule>,
    /// First source port for masquerading.
    pub snat_port_first: u16,
    /// Last source port for masquerading, inclusive.
    pub snat_port_last: u16,
    /// From `[gateway] lb_key`: the same on every gateway, so that every gateway makes the same choice for a connection.
    pub lb_key: u64,
    /// `[gateway] mss_clamp`.
    pub mss_clamp: MssClamp,
    /// `[source_checks]`.
    pub source_checks: SourceChecks,
}

/// Connections of pods to the outside that are masqueraded.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EgressRule {
    /// Ranges of the pods; empty: all.
    pub pods: Vec<IpNet>,
    /// Ranges of destinations; empty: all.
    pub destinations: Vec<IpNet>,
    /// Destinations that are left out.
    pub except: Vec<IpNet>,
    /// Addresses to masquerade to, IPv4 first; of a family without any, those for Services.
    pub addresses: Vec<Addr>,
}

/// One port of the gateway as packets see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortSettings {
    /// Clients come in by this port.
    pub outside: bool,
    /// Nodes and pods are behind this port.
    pub inside: bool,
    /// One pod is behind this port, and sends only from addresses that are routed to it.
    pub pod: bool,
    /// ClusterIPs are served to the outside on this port.
    pub expose_cluster_ips: bool,
    /// Checksums of packets that come in may be unfinished (veth, tap): CHECKSUM_PARTIAL.
    pub partial_checksums: bool,
}

/// Where the client of a service packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Not of this cluster.
    Outside,
    /// A pod of this cluster.
    Pod,
    /// A node of this cluster, or the gateway itself.
    Node,
}

/// Which field of a Service a frontend comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `spec.ports[].nodePort` on a node address.
    NodePort,
    /// `spec.containers[].ports[].hostPort` of a Pod, on an address of its node.
    HostPort,
}

/// One (address, protocol, port) of a Service. The three actions are decided when the tables are compiled
/// (kubernetes pkg/proxy/topology.go `CategorizeEndpoints`, pkg/proxy/nftables `writeServiceRules`); a packet only selects one.
#[derive(Clone, Debug)]
pub struct Frontend {
    /// The service port that it belongs to.
    pub service: Arc<ServicePort>,
    /// Which field of the Service it comes from.
    pub kind: FrontendKind,
    /// For clients outside the cluster.
    pub from_outside: Action,
    /// For pods of this cluster.
    pub from_pod: Action,
    /// For nodes, and for the gateway itself.
    pub from_node: Action,
    /// `spec.loadBalancerSourceRanges` of this family; empty: everybody. Other sources are dropped before anything else.
    pub source_ranges: Arc<[IpNet]>,
}

impl Frontend {
    /// The action for a client at `origin`.
    #[inline]
    pub fn action(&self, origin: Origin) -> &Action {
        match origin {
            Origin::Outside => &self.from_outside,
            Origin::Pod => &self.from_pod,
            Origin::Node => &self.from_node,
        }
    }
}

/// What happens to the first packet of a connection to a frontend.
#[derive(Clone, Debug)]
pub enum Action {
    /// Translate the destination to one of the endpoints.
    Dnat {
        /// Never empty.
        backends: Arc<Backends>,
        /// Translate the source too (masquerade). A hairpin, where client and endpoint are one address, is always masqueraded.
        masquerade: bool,
        /// Which list of the Service this is, for a trace.
        list: List,
    },
    /// Answer with RST or ICMP port unreachable.
    Reject(Reason),
    /// Drop silently.
    Drop(Reason),
}

/// Which list of endpoints of a Service is in use (kubernetes pkg/proxy/topology.go).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum List {
    /// Ready endpoints anywhere, as far as the topology allows.
    Cluster,
    /// No endpoint is ready: serving and terminating ones.
    ClusterTerminating,
    /// Ready endpoints of the node, or of every node where the gateway is the frontend.
    Local,
    /// No local endpoint is ready: local serving and terminating ones.
    LocalTerminating,
}

/// One port of one Service: what flows, statistics and traces are attributed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Small number that a flow stores; stable while the process lives, never reused while a flow may hold it.
    pub id: u32,
    /// A hash of namespace, name, port name and protocol: the same on every gateway and over restarts.
    pub stable_id: u64,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.ports[].name`, may be empty.
    pub port_name: String,
    /// `metadata.resourceVersion`, may be empty.
    pub resource_version: String,
    /// `sessionAffinityConfig.clientIP.timeoutSeconds`, if the affinity is ClientIP.
    pub affinity_timeout_s: Option<u32>,
}

/// A list of endpoints and how new connections are spread over them.
#[derive(Clone, Debug)]
pub struct Backends {
    /// In a stable order (by address, then port). None has weight 0.
    pub endpoints: Vec<Endpoint>,
    /// Chooses indexes of `endpoints`.
    pub spread: Spread,
}

/// One endpoint of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address of the pod.
    pub addr: Addr,
    /// Port of the pod, host byte order.
    pub port: u16,
    /// `endpoints[].targetRef` as namespace/name, or the address if there is none.
    pub name: Arc<str>,
    /// `endpoints[].nodeName`, may be empty.
    pub node: Arc<str>,
    /// Its share of new connections is its weight over the sum of all: annotation `towpath.dev/weight`, 1 if absent.
    pub weight: u16,
    /// Where the flow table counts its connections, whichever Service they came by; 0: nowhere.
    pub tally: u32,
}

impl Endpoint {
    /// What it bears. `connections`: the flow table's count of its tally.
    #[inline]
    pub fn load(&self, connections: u32) -> Load {
        Load { connections, weight: self.weight }
    }
}

/// The forwarding table: routes, next hops and addresses of the ports. Immutable once published.
#[derive(Clone, Default)]
pub struct Fib {
    /// Counts publishes, never 0; a next hop cached in a flow is valid for one epoch.
    pub epoch: u32,
    /// Destination prefix to what happens there.
    pub routes: Arc<Lpm<Route>>,
    /// Indexed by `Route::NextHop`.
    pub next_hops: Vec<NextHop>,
    /// Per port, by index.
    pub ports: Vec<PortLink>,
    /// Tunnels to nodes; none where every node is reached natively.
    pub overlay: Option<Arc<Overlay>>,
}

impl Fib {
    /// Our address for packets that leave by `port`: its own, or, since the port of a pod mostly has none, that of the first port which
    /// has one, as Linux chooses (`inet_select_addr` in net/ipv4/devinet.c).
    pub fn own_address(&self, port: u8, v4: bool) -> Option<Addr> {
        let of = |link: &PortLink| if v4 { link.v4 } else { link.v6 };
        self.ports.get(usize::from(port)).and_then(of).or_else(|| self.ports.iter().find_map(of))
    }
}

/// Our end of the tunnels to nodes, and theirs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Overlay {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port that both ends listen at.
    pub port: u16,
    /// Our own addresses: what nodes send to.
    pub addresses: Vec<Addr>,
    /// Sorted by the address of the node; their indexes are what [`NextHop::tunnel`] names.
    pub tunnels: Vec<Tunnel>,
}

impl Overlay {
    /// The tunnel to `node`.
    #[inline]
    pub fn tunnel_of(&self, node: Addr) -> Option<u16> {
        self.tunnels.binary_search_by_key(&node, |tunnel| tunnel.node).ok().map(|index| index as u16)
    }
}

/// The way to the pods of one node, inside packets between the node's address and ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// Address of the node.
    pub node: Addr,
    /// Our address, of the same family.
    pub local: Addr,
    /// Link-layer address of the node's VXLAN device.
    pub mac: [u8; 6],
}

/// What happens to a packet on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// Index into [`Fib::next_hops`].
    NextHop(u32),
    /// On the link of the port: the next hop is the destination itself. Resolved neighbors are /32 and /128 routes to a
    /// [`Route::NextHop`], so this one says that the destination is not resolved yet.
    OnLink {
        /// Index of the port.
        port: u8,
    },
    /// An address of the gateway: to the kernel.
    Local,
    /// By an interface that is no port of ours: to the kernel.
    Kernel,
    /// `blackhole`, `unreachable`, `prohibit`.
    Blackhole,
}

/// Where a routed packet goes on the link layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NextHop {
    /// Index of the port to leave by.
    pub port: u8,
    /// Address of the next hop, which is the destination itself on a connected link.
    pub gateway: Addr,
    /// Its link-layer address, if it is known.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet, bytes: in a tunnel, of those inside.
    pub mtu: u16,
    /// Packets travel inside others, by this one of [`Overlay::tunnels`].
    pub tunnel: Option<u16>,
}

/// A port's own addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PortLink {
    /// Link-layer address.
    pub mac: [u8; 6],
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// Has a carrier and is administratively up.
    pub up: bool,
    /// First global IPv4 address.
    pub v4: Option<Addr>,
    /// First global IPv6 address.
    pub v6: Option<Addr>,
}
