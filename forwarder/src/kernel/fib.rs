//! A kernel snapshot to the forwarding table. Pure: no socket, no clock.
//!
//! What the kernel does by asking several tables one after the other, one longest-prefix match does here: a prefix of a later
//! table that an earlier one covers is left out, for it is never reached. IPv6 asks local, then main
//! (`fib6_rule_lookup`). IPv4 asks local and main as one, then default (`fib_lookup`; the kernel
//! keeps the two merged), until the first policy rule is added: then one after the other. Policy rules themselves are not
//! followed.
//!
//! - **Multipath**: the first hop that is up and whose neighbor does not fail carries everything, so that the choice is stable.
//! - **Pod routes**, made of Node objects, rank below kernel routes of equal length: an explicit route of an operator or a routing
//!   daemon wins. Their gateway is looked up among kernel routes only, so one step of recursion always suffices.
//! - **Neighbors** become host routes where their address is on the link that they were seen on.
//! - **Link-local and multicast** destinations are the kernel's: they are never forwarded (RFC 4291 section 2.5.6).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::snapshot::{Hop, KernelRoute, Neighbor, RouteKind, Snapshot, Table};
use crate::addr::Addr;
use crate::stage::overlay::overhead;
use crate::table::lpm::Lpm;
use crate::tables::{Fib, NextHop, Overlay, PortLink, Route, Tunnel};

/// What Kubernetes objects ask of the forwarding table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// podCIDRs with the InternalIP of their Node, of the same family.
    pub pod_routes: Vec<(IpNet, Addr)>,
    /// Endpoints: those on a link of ours are kept resolved before the first packet wants them.
    pub endpoints: Vec<Addr>,
    /// Which of `pod_routes` lead through a tunnel.
    pub overlay: WantedOverlay,
}

/// Tunnels to nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedOverlay {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// MTU of the network between nodes, where it is less than that of routes and ports.
    pub mtu: Option<u16>,
    /// Our addresses, the first of each family being the sender's; empty: those of the ports.
    pub addresses: Vec<Addr>,
    /// Nodes with a tunnel, and the link-layer addresses of their VXLAN devices. Without one no packet can be sent.
    pub nodes: BTreeMap<Addr, Option<[u8; 6]>>,
}

/// A forwarding table before it is published; comparable, so that nothing is published twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// Sorted, each prefix once.
    pub routes: Vec<(IpNet, Route)>,
    /// Indexed by [`Route::NextHop`].
    pub next_hops: Vec<NextHop>,
    /// Per port, by index.
    pub ports: Vec<PortLink>,
    /// Gateways and endpoints to keep resolved in the kernel: interface index and address.
    pub needed: BTreeSet<(u32, Addr)>,
    /// Other neighbors that packets can be sent to, to be kept as fresh.
    pub learned: BTreeSet<(u32, Addr)>,
    /// podCIDRs that are left out since no route leads to their node.
    pub unreachable_pods: Vec<IpNet>,
    /// Tunnels that routes lead through.
    pub overlay: Option<Overlay>,
}

impl Forwarding {
    /// The table as workers read it. `epoch`: never 0.
    pub fn to_fib(&self, epoch: u32) -> Fib {
        Fib {
            epoch,
            routes: Arc::new(Lpm::build(self.routes.iter().copied())),
            next_hops: self.next_hops.clone(),
            ports: self.ports.clone(),
            overlay: self.overlay.clone().map(Arc::new),
        }
    }
}

/// Builds the forwarding table. `ports`: interface name of each port, by port index (at most 255); an interface that does not exist
/// gives a port that is down.
pub fn build(snapshot: &Snapshot, wanted: &Wanted, ports: &[String]) -> Forwarding {
    let mut builder = Builder { snapshot, ports: HashMap::new(), forwarding: Forwarding::default() };
    builder.ports(ports);
    let kernel = builder.kernel_routes();
    let mut targets = builder.pod_routes(kernel, wanted);
    builder.neighbors(&mut targets, &wanted.endpoints);
    builder.finish(targets)
}

/// Where a prefix leads, before next hops are numbered. MTU in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    /// `node`: where the tunnel ends that packets travel in.
    Gateway {
        port: u8,
        link: u32,
        gateway: Addr,
        mtu: u16,
        node: Option<Addr>,
    },
    OnLink {
        port: u8,
        link: u32,
        mtu: u16,
    },
    Local,
    Kernel,
    Blackhole,
}

struct Builder<'a> {
    snapshot: &'a Snapshot,
    /// Port and MTU of an interface, by its index.
    ports: HashMap<u32, (u8, u16)>,
    forwarding: Forwarding,
}

impl Builder<'_> {
    fn ports(&mut self, names: &[String]) {
        for (port, name) in names.iter().enumerate() {
            let Some(link) = self.snapshot.link(name) else {
                self.forwarding.ports.push(PortLink::default());
                continue;
            };
            let mtu = link.mtu.min(u16::MAX as u32) as u16;
            self.ports.insert(link.index, (port as u8, mtu));
            self.forwarding.ports.push(PortLink {
                mac: link.mac.unwrap_or_default(),
                mtu,
                up: link.up,
                v4: self.source(link.index, true),
                v6: self.source(link.index, false),
            });
        }
    }

    /// The first global address of a link, a primary one if there is one.
    fn source(&self, link: u32, v4: bool) -> Option<Addr> {
        let of_link = |secondary| {
            self.snapshot.addresses.iter().find(move |a| {
                a.link == link && a.addr.is_ipv4() == v4 && a.global && a.usable && a.secondary == secondary
            })
        };
        of_link(false).or_else(|| of_link(true)).map(|a| a.addr.into())
    }

    /// The best route to each prefix, without those that an earlier table hides.
    fn kernel_routes(&self) -> Prefixes {
        let mut tables: BTreeMap<Table, Prefixes> = BTreeMap::new();
        for address in self.snapshot.addresses.iter().filter(|a| a.usable) {
            tables.entry(Table::Local).or_default().insert(address.addr.into(), Target::Local);
        }
        let mut metrics: HashMap<(Table, IpNet), u32> = HashMap::new();
        let asked = |r: &KernelRoute| r.table != Table::Default || r.net.addr().is_ipv4();
        for route in self.snapshot.routes.iter().filter(|r| asked(r) && !is_v4_mapped(&r.net)) {
            let Some(target) = self.target(route) else { continue };
            let best = metrics.entry((route.table, route.net)).or_insert(u32::MAX);
            let table = tables.entry(route.table).or_default();
            // Of two routes with one metric the kernel takes the one that it lists first.
            if route.metric < *best || !table.contains(&route.net) {
                *best = route.metric;
                table.insert(route.net, target);
            }
        }
        let mut seen = Prefixes::default();
        for (number, table) in tables {
            let merged =
                |net: &IpNet| number == Table::Main && net.addr().is_ipv4() && !self.snapshot.ipv4_has_policy;
            let hidden = |net: &IpNet| if merged(net) { seen.contains(net) } else { seen.covers(net) };
            let reached: Vec<_> = table.entries.into_iter().filter(|(net, _)| !hidden(net)).collect();
            for (net, target) in reached {
                seen.insert(net, target);
            }
        }
        seen
    }

    /// Where a route leads; none if the kernel skips it, too.
    fn target(&self, route: &KernelRoute) -> Option<Target> {
        const PROTOCOL_KERNEL: u8 = 2;
        match route.kind {
            _ if is_link_scoped(&route.net) => Some(Target::Local),
            RouteKind::Local => Some(Target::Local),
            // IPv6 answers "no route" with a reject route of the last metric.
            RouteKind::Blackhole if route.metric == u32::MAX && route.protocol == PROTOCOL_KERNEL => None,
            RouteKind::Blackhole => Some(Target::Blackhole),
            RouteKind::Other => Some(Target::Kernel),
            RouteKind::Unicast => self.hop(&route.hops).map(|hop| self.by_hop(hop, route.mtu)),
        }
    }

    /// The first hop that works; failing that, the first that is not dead.
    fn hop<'r>(&self, hops: &'r [Hop]) -> Option<&'r Hop> {
        let fails = |hop: &Hop| {
            let neighbor =
                hop.gateway.and_then(|gateway| self.snapshot.neighbors.get(&(hop.link, gateway.into())));
            neighbor.is_some_and(|n| n.state & Neighbor::FAILED != 0)
        };
        let works = |hop: &&Hop| !hop.dead && !hop.link_down && !fails(hop);
        hops.iter().find(works).or_else(|| hops.iter().find(|hop| !hop.dead))
    }

    fn by_hop(&self, hop: &Hop, route_mtu: Option<u32>) -> Target {
        let Some(&(port, link_mtu)) = self.ports.get(&hop.link).filter(|_| !hop.encapsulated) else {
            return Target::Kernel;
        };
        let mtu = route_mtu.map_or(link_mtu, |mtu| mtu.min(link_mtu as u32) as u16);
        match hop.gateway {
            Some(gateway) => {
                Target::Gateway { port, link: hop.link, gateway: gateway.into(), mtu, node: None }
            }
            None => Target::OnLink { port, link: hop.link, mtu },
        }
    }

    /// Adds the podCIDRs, each by the way that its node is reached.
    fn pod_routes(&mut self, kernel: Prefixes, wanted: &Wanted) -> Prefixes {
        let mut added = Vec::new();
        let mut tunnels = BTreeMap::new();
        for &(net, node) in &wanted.pod_routes {
            let net = net.trunc();
            if kernel.contains(&net) || kernel.local_covers(&net) {
                continue;
            }
            let way = match kernel.lookup(node) {
                Some(Target::OnLink { port, link, mtu }) => {
                    Target::Gateway { port, link, gateway: node, mtu, node: None }
                }
                // Pods of the gateway's own node are the kernel's.
                Some(Target::Local) => Target::Kernel,
                Some(other) => other,
                None => {
                    self.forwarding.unreachable_pods.push(net);
                    continue;
                }
            };
            added.push((net, self.through_tunnel(way, node, &wanted.overlay, &mut tunnels)));
        }
        if !tunnels.is_empty() {
            let WantedOverlay { vni, port, .. } = wanted.overlay;
            let (addresses, tunnels) =
                (self.overlay_addresses(&wanted.overlay), tunnels.into_values().collect());
            self.forwarding.overlay = Some(Overlay { vni, port, addresses, tunnels });
        }
        let mut targets = kernel;
        for (net, target) in added {
            targets.insert(net, target);
        }
        targets
    }

    /// The way to the pods of `node`, which is `way` unless there is a tunnel; that one is noted. Where one should be and cannot, nothing
    /// is sent to them: what comes out of a node's tunnel must not go there beside it.
    fn through_tunnel(
        &self,
        way: Target,
        node: Addr,
        overlay: &WantedOverlay,
        tunnels: &mut BTreeMap<Addr, Tunnel>,
    ) -> Target {
        let (Some(mac), Target::Gateway { port, link, gateway, mtu, .. }) = (overlay.nodes.get(&node), way)
        else {
            return way;
        };
        let link_of = &self.forwarding.ports[usize::from(port)];
        let of_port = if node.is_v4() { link_of.v4 } else { link_of.v6 };
        let given = overlay.addresses.iter().find(|addr| addr.is_v4() == node.is_v4()).copied();
        let local = if overlay.addresses.is_empty() { of_port } else { given };
        let (Some(mac), Some(local)) = (*mac, local) else { return Target::Blackhole };
        tunnels.insert(node, Tunnel { node, local, mac });
        let mtu = mtu.min(overlay.mtu.unwrap_or(mtu)).saturating_sub(overhead(node));
        Target::Gateway { port, link, gateway, mtu, node: Some(node) }
    }

    /// The addresses at which packets of tunnels arrive.
    fn overlay_addresses(&self, overlay: &WantedOverlay) -> Vec<Addr> {
        let of_ports = self.forwarding.ports.iter().flat_map(|port| port.v4.into_iter().chain(port.v6));
        if overlay.addresses.is_empty() { of_ports.collect() } else { overlay.addresses.clone() }
    }

    /// Adds a host route for each resolved neighbor, and notes which ones to keep resolved.
    fn neighbors(&mut self, targets: &mut Prefixes, endpoints: &[Addr]) {
        let mut hosts = Vec::new();
        for (&(link, addr), neighbor) in &self.snapshot.neighbors {
            if neighbor.valid_mac().is_none() || is_link_scoped(&host(addr)) {
                continue;
            }
            if let Some(Target::OnLink { port, link: of_route, mtu }) = targets.lookup(addr)
                && of_route == link
            {
                hosts.push((host(addr), Target::Gateway { port, link, gateway: addr, mtu, node: None }));
                self.forwarding.learned.insert((link, addr));
            }
        }
        for &addr in endpoints {
            if let Some(Target::OnLink { link, .. }) = targets.lookup(addr) {
                self.forwarding.needed.insert((link, addr));
            }
        }
        for target in targets.entries.values() {
            if let Target::Gateway { link, gateway, .. } = *target {
                self.forwarding.needed.insert((link, gateway));
            }
        }
        let needed = &self.forwarding.needed;
        self.forwarding.learned.retain(|neighbor| !needed.contains(neighbor));
        for (net, target) in hosts {
            targets.insert(net, target);
        }
    }

    /// Sorts the routes and numbers the next hops in their order.
    fn finish(self, targets: Prefixes) -> Forwarding {
        let mut forwarding = self.forwarding;
        let mut numbers: HashMap<(u8, Addr, u16, Option<Addr>), u32> = HashMap::new();
        let sorted: BTreeMap<IpNet, Target> = targets.entries.into_iter().collect();
        for (net, target) in sorted {
            let route = match target {
                Target::OnLink { port, .. } => Route::OnLink { port },
                Target::Local => Route::Local,
                Target::Kernel => Route::Kernel,
                Target::Blackhole => Route::Blackhole,
                Target::Gateway { port, link, gateway, mtu, node } => {
                    Route::NextHop(*numbers.entry((port, gateway, mtu, node)).or_insert_with(|| {
                        let mac = self.snapshot.neighbors.get(&(link, gateway)).and_then(Neighbor::valid_mac);
                        let tunnel = node.and_then(|node| forwarding.overlay.as_ref()?.tunnel_of(node));
                        forwarding.next_hops.push(NextHop { port, gateway, mac, mtu, tunnel });
                        forwarding.next_hops.len() as u32 - 1
                    }))
                }
            };
            forwarding.routes.push((net, route));
        }
        forwarding
    }
}

/// Prefixes to targets with the two questions that building asks. A lookup costs one probe per prefix length in use.
#[derive(Default)]
struct Prefixes {
    entries: HashMap<IpNet, Target>,
    v4_lengths: BTreeSet<u8>,
    v6_lengths: BTreeSet<u8>,
}

impl Prefixes {
    fn insert(&mut self, net: IpNet, target: Target) {
        let lengths = if net.addr().is_ipv4() { &mut self.v4_lengths } else { &mut self.v6_lengths };
        lengths.insert(net.prefix_len());
        self.entries.insert(net, target);
    }

    fn contains(&self, net: &IpNet) -> bool {
        self.entries.contains_key(net)
    }

    /// The entries that contain `net`, the longest first.
    fn covering(&self, net: IpNet) -> impl Iterator<Item = Target> {
        let lengths = if net.addr().is_ipv4() { &self.v4_lengths } else { &self.v6_lengths };
        lengths.range(..=net.prefix_len()).rev().filter_map(move |len| {
            let wider = IpNet::new(net.addr(), *len).ok()?.trunc();
            self.entries.get(&wider).copied()
        })
    }

    fn covers(&self, net: &IpNet) -> bool {
        self.covering(*net).next().is_some()
    }

    /// True if `net` lies inside a local prefix, so that no route inside it is ever asked.
    fn local_covers(&self, net: &IpNet) -> bool {
        self.covering(*net).any(|target| target == Target::Local)
    }

    fn lookup(&self, addr: Addr) -> Option<Target> {
        self.covering(host(addr)).next()
    }
}

/// The prefix of one address.
fn host(addr: Addr) -> IpNet {
    IpAddr::from(addr).into()
}

/// True for link-local and multicast prefixes.
fn is_link_scoped(net: &IpNet) -> bool {
    match net {
        IpNet::V4(v4) => v4.addr().is_multicast() && v4.prefix_len() >= 4,
        IpNet::V6(v6) => {
            (v6.addr().is_multicast() && v6.prefix_len() >= 8)
                || (v6.addr().is_unicast_link_local() && v6.prefix_len() >= 10)
        }
    }
}

/// True for prefixes inside `::ffff:0:0/96`, which never appear on a wire and would be mistaken for IPv4 here.
fn is_v4_mapped(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(v6) if v6.prefix_len() >= 96 && v6.addr().to_ipv4_mapped().is_some())
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::{Address, Link};
    use super::*;

    const REACHABLE: u16 = 0x02;
    const INCOMPLETE: u16 = 0x01;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn via(link: u32, gateway: &str) -> Hop {
        let gateway = (!gateway.is_empty()).then(|| ip(gateway));
        Hop { link, gateway, dead: false, link_down: false, encapsulated: false }
    }

    fn route(table: Table, dst: &str, kind: RouteKind, hop: Hop) -> KernelRoute {
        KernelRoute { table, net: net(dst), kind, metric: 0, hops: vec![hop], mtu: None, protocol: 4 }
    }

    fn unicast(dst: &str, link: u32, gateway: &str) -> KernelRoute {
        route(Table::Main, dst, RouteKind::Unicast, via(link, gateway))
    }

    /// Ports g0 (index 2, 192.0.2.1/24) and g1 (index 3, 10.0.0.1/24, fd00::1/64); eth9 (index 9) is no port.
    struct World {
        links: Vec<Link>,
        addresses: Vec<Address>,
        routes: Vec<KernelRoute>,
        neighbors: BTreeMap<(u32, Addr), Neighbor>,
        wanted: Wanted,
        policy: bool,
    }

    impl World {
        fn new() -> World {
            let link = |index, name: &str, last| Link {
                index,
                name: name.into(),
                mac: Some([2, 0, 0, 0, 0, last]),
                mtu: 1500,
                up: true,
            };
            let address = |link, addr: &str, prefix_len| Address {
                link,
                addr: ip(addr),
                prefix_len,
                global: true,
                usable: true,
                secondary: false,
            };
            World {
                links: vec![link(2, "g0", 2), link(3, "g1", 3), link(9, "eth9", 9)],
                addresses: vec![
                    address(2, "192.0.2.1", 24),
                    address(3, "10.0.0.1", 24),
                    address(3, "fd00::1", 64),
                ],
                routes: vec![
                    unicast("192.0.2.0/24", 2, ""),
                    unicast("10.0.0.0/24", 3, ""),
                    unicast("fd00::/64", 3, ""),
                    unicast("0.0.0.0/0", 2, "192.0.2.254"),
                ],
                neighbors: BTreeMap::new(),
                wanted: Wanted::default(),
                policy: false,
            }
        }

        fn neighbor(&mut self, link: u32, addr: &str, state: u16, last: u8) {
            let mac = Some([2, 0, 0, 0, 1, last]);
            self.neighbors
                .insert((link, ip(addr).into()), Neighbor { mac, state, managed: false, protocol: 0 });
        }

        fn pod_route(&mut self, dst: &str, node: &str) {
            self.wanted.pod_routes.push((net(dst), ip(node).into()));
        }

        fn build(&self) -> Forwarding {
            let snapshot = Snapshot {
                links: Arc::new(self.links.iter().map(|l| (l.index, l.clone())).collect()),
                addresses: Arc::new(self.addresses.clone()),
                routes: Arc::new(self.routes.clone()),
                neighbors: self.neighbors.clone(),
                foreign_rules: 0,
                ipv4_has_policy: self.policy,
            };
            build(&snapshot, &self.wanted, &["g0".into(), "g1".into()])
        }
    }

    fn lookup(forwarding: &Forwarding, addr: &str) -> Option<Route> {
        forwarding.to_fib(1).routes.lookup(ip(addr).into())
    }

    fn next_hop(forwarding: &Forwarding, addr: &str) -> NextHop {
        match lookup(forwarding, addr) {
            Some(Route::NextHop(n)) => forwarding.next_hops[n as usize],
            other => panic!("{addr} leads to {other:?}"),
        }
    }

    #[test]
    fn connected_own_and_default_destinations() {
        let mut world = World::new();
        world.neighbor(2, "192.0.2.254", REACHABLE, 254);
        let forwarding = world.build();
        assert_eq!(lookup(&forwarding, "10.0.0.1"), Some(Route::Local));
        assert_eq!(lookup(&forwarding, "fd00::1"), Some(Route::Local));
        assert_eq!(lookup(&forwarding, "10.0.0.7"), Some(Route::OnLink { port: 1 }));
        assert_eq!(lookup(&forwarding, "fd00::7"), Some(Route::OnLink { port: 1 }));
        assert_eq!(lookup(&forwarding, "2001:db8::1"), None);
        let hop = next_hop(&forwarding, "198.51.100.1");
        assert_eq!((hop.port, hop.mac, hop.mtu), (0, Some([2, 0, 0, 0, 1, 254]), 1500));
        assert_eq!(hop.gateway, ip("192.0.2.254").into());
        assert_eq!(forwarding.ports[1].v6, Some(ip("fd00::1").into()));
        assert_eq!(forwarding.ports[0].v6, None);
    }

    #[test]
    fn a_neighbor_is_a_host_route_only_where_it_is_on_the_link_and_valid() {
        let mut world = World::new();
        world.neighbor(3, "10.0.0.7", REACHABLE, 7);
        world.neighbor(3, "10.0.0.8", INCOMPLETE, 8);
        world.neighbor(3, "10.0.0.9", Neighbor::FAILED, 9);
        world.neighbor(2, "10.0.0.10", REACHABLE, 10); // seen on the wrong link
        world.neighbor(9, "10.9.0.1", REACHABLE, 11); // no port of ours
        let forwarding = world.build();
        assert_eq!(next_hop(&forwarding, "10.0.0.7").mac, Some([2, 0, 0, 0, 1, 7]));
        for unresolved in ["10.0.0.8", "10.0.0.9", "10.0.0.10"] {
            assert_eq!(lookup(&forwarding, unresolved), Some(Route::OnLink { port: 1 }), "{unresolved}");
        }
        assert_eq!(forwarding.learned, BTreeSet::from([(3, ip("10.0.0.7").into())]));
    }

    #[test]
    fn the_lower_metric_wins_and_of_equals_the_first() {
        let mut world = World::new();
        let with_metric = |metric, gateway| KernelRoute { metric, ..unicast("203.0.113.0/24", 3, gateway) };
        world.routes.extend([
            with_metric(20, "10.0.0.20"),
            with_metric(10, "10.0.0.10"),
            with_metric(10, "10.0.0.11"),
        ]);
        assert_eq!(next_hop(&world.build(), "203.0.113.5").gateway, ip("10.0.0.10").into());
    }

    #[test]
    fn an_earlier_table_hides_longer_prefixes_of_a_later_one() {
        let mut world = World::new();
        world.routes.push(route(Table::Local, "100.64.0.0/10", RouteKind::Local, via(1, "")));
        world.routes.push(unicast("100.64.1.0/24", 3, "10.0.0.2"));
        world.routes.push(route(Table::Default, "10.0.0.128/25", RouteKind::Blackhole, via(0, "")));
        world.routes.push(route(Table::Local, "fd64::/16", RouteKind::Local, via(1, "")));
        world.routes.push(unicast("fd64:1::/32", 3, "fd00::2"));
        world.routes.push(route(Table::Default, "fd99::/16", RouteKind::Blackhole, via(0, "")));
        let forwarding = world.build();
        // IPv4 has local and main merged, as long as there are no policy rules.
        assert_eq!(next_hop(&forwarding, "100.64.1.1").gateway, ip("10.0.0.2").into());
        assert_eq!(lookup(&forwarding, "100.64.2.1"), Some(Route::Local));
        assert_eq!(lookup(&forwarding, "10.0.0.200"), Some(Route::OnLink { port: 1 }));
        assert_eq!(lookup(&forwarding, "fd64:1::1"), Some(Route::Local));
        assert_eq!(lookup(&forwarding, "fd99::1"), None); // IPv6 never asks that table
        world.policy = true;
        assert_eq!(lookup(&world.build(), "100.64.1.1"), Some(Route::Local));
    }

    #[test]
    fn kinds_that_are_not_ours_go_to_the_kernel_or_nowhere() {
        let mut world = World::new();
        world.routes.push(unicast("172.16.0.0/12", 9, "172.16.0.1"));
        world.routes.push(route(Table::Main, "198.18.0.0/15", RouteKind::Blackhole, via(0, "")));
        world.routes.push(route(Table::Main, "198.20.0.0/15", RouteKind::Other, via(0, "")));
        world.routes.push(unicast("fe80::/64", 2, ""));
        let mut tunnel = unicast("198.22.0.0/15", 3, "10.0.0.3");
        tunnel.hops[0].encapsulated = true;
        world.routes.push(tunnel);
        let forwarding = world.build();
        assert_eq!(lookup(&forwarding, "172.16.5.5"), Some(Route::Kernel));
        assert_eq!(lookup(&forwarding, "198.18.0.1"), Some(Route::Blackhole));
        assert_eq!(lookup(&forwarding, "198.20.0.1"), Some(Route::Kernel));
        assert_eq!(lookup(&forwarding, "198.22.0.1"), Some(Route::Kernel));
        assert_eq!(lookup(&forwarding, "fe80::5"), Some(Route::Local));
    }

    #[test]
    fn multipath_takes_the_first_hop_that_works() {
        let mut world = World::new();
        let mut multipath = unicast("203.0.113.0/24", 3, "10.0.0.2");
        multipath.hops = vec![via(3, "10.0.0.2"), via(3, "10.0.0.3"), via(3, "10.0.0.4")];
        multipath.hops[0].link_down = true;
        world.routes.push(multipath);
        assert_eq!(next_hop(&world.build(), "203.0.113.5").gateway, ip("10.0.0.3").into());
        world.neighbor(3, "10.0.0.3", Neighbor::FAILED, 3);
        assert_eq!(next_hop(&world.build(), "203.0.113.5").gateway, ip("10.0.0.4").into());
        world.neighbor(3, "10.0.0.4", Neighbor::FAILED, 4);
        assert_eq!(next_hop(&world.build(), "203.0.113.5").gateway, ip("10.0.0.2").into());
        for hop in &mut world.routes.last_mut().unwrap().hops {
            hop.dead = true;
        }
        // The whole route is skipped: the default route remains.
        assert_eq!(next_hop(&world.build(), "203.0.113.5").gateway, ip("192.0.2.254").into());
    }

    /// Rules 12.3, 12.5.
    #[test]
    fn pod_routes_follow_the_way_to_their_node() {
        let mut world = World::new();
        world.routes.push(unicast("10.50.0.0/16", 3, "10.0.0.50"));
        world.routes.push(unicast("10.244.9.0/24", 3, "10.0.0.99"));
        world.routes.push(unicast("172.16.0.0/12", 9, ""));
        world.neighbor(3, "10.0.0.11", REACHABLE, 11);
        world.pod_route("10.244.1.0/24", "10.0.0.11"); // on our link
        world.pod_route("10.244.2.0/24", "10.50.0.2"); // behind a router
        world.pod_route("10.244.3.0/24", "10.0.0.1"); // our own node
        world.pod_route("10.244.4.0/24", "172.16.0.4"); // by another interface
        world.pod_route("10.244.9.0/24", "10.0.0.11"); // the kernel's own route wins
        world.pod_route("fd00:244::/64", "fd99::1"); // no way to the node
        let forwarding = world.build();
        assert_eq!(next_hop(&forwarding, "10.244.1.5").mac, Some([2, 0, 0, 0, 1, 11]));
        assert_eq!(next_hop(&forwarding, "10.244.2.5").gateway, ip("10.0.0.50").into());
        assert_eq!(lookup(&forwarding, "10.244.3.5"), Some(Route::Kernel));
        assert_eq!(lookup(&forwarding, "10.244.4.5"), Some(Route::Kernel));
        assert_eq!(next_hop(&forwarding, "10.244.9.5").gateway, ip("10.0.0.99").into());
        assert_eq!(forwarding.unreachable_pods, [net("fd00:244::/64")]);
        assert!(forwarding.needed.contains(&(3, ip("10.0.0.11").into())));
        assert!(!forwarding.learned.contains(&(3, ip("10.0.0.11").into())));
    }

    #[test]
    fn pods_behind_a_tunnel_are_reached_by_the_way_to_their_node_with_less_room() {
        let mut world = World::new();
        world.routes.push(unicast("10.50.0.0/16", 3, "10.0.0.50"));
        world.neighbor(3, "10.0.0.50", REACHABLE, 50);
        world.pod_route("10.244.1.0/24", "10.0.0.11");
        world.pod_route("10.244.2.0/24", "10.50.0.2"); // behind a router
        world.pod_route("fd00:244:2::/64", "10.50.0.2"); // another family inside
        world.pod_route("10.244.3.0/24", "fd00::3");
        world.pod_route("10.244.4.0/24", "10.0.0.4"); // its device is not known
        world.pod_route("10.244.5.0/24", "10.0.0.5"); // without a tunnel
        let mac = |last| Some([2, 0, 0, 0, 9, last]);
        let nodes = [("fd00::3", mac(3)), ("10.50.0.2", mac(2)), ("10.0.0.11", mac(11)), ("10.0.0.4", None)];
        world.wanted.overlay.nodes = nodes.map(|(node, mac)| (ip(node).into(), mac)).into();
        (world.wanted.overlay.vni, world.wanted.overlay.port) = (7, 4789);
        let forwarding = world.build();
        let overlay = forwarding.overlay.clone().unwrap();
        assert_eq!((overlay.vni, overlay.port, overlay.tunnels.len()), (7, 4789, 3));
        assert_eq!(overlay.addresses, ["192.0.2.1", "10.0.0.1", "fd00::1"].map(|own| ip(own).into()));
        for (pod, node, local, last, mtu) in [
            ("10.244.1.9", "10.0.0.11", "10.0.0.1", 11, 1450),
            ("10.244.2.9", "10.50.0.2", "10.0.0.1", 2, 1450),
            ("fd00:244:2::9", "10.50.0.2", "10.0.0.1", 2, 1450),
            ("10.244.3.9", "fd00::3", "fd00::1", 3, 1430),
        ] {
            let hop = next_hop(&forwarding, pod);
            assert_eq!(hop.tunnel, overlay.tunnel_of(ip(node).into()), "{pod}");
            let tunnel = overlay.tunnels[usize::from(hop.tunnel.unwrap())];
            assert_eq!((tunnel.node, tunnel.local), (ip(node).into(), ip(local).into()), "{pod}");
            assert_eq!((tunnel.mac, hop.mtu), (mac(last).unwrap(), mtu), "{pod}");
        }
        assert_eq!(next_hop(&forwarding, "10.244.2.9").mac, Some([2, 0, 0, 0, 1, 50]));
        assert_eq!(lookup(&forwarding, "10.244.4.9"), Some(Route::Blackhole));
        assert_eq!(next_hop(&forwarding, "10.244.5.9").tunnel, None);

        world.wanted.overlay.mtu = Some(1400);
        world.wanted.overlay.addresses = vec![ip("192.0.2.7").into()];
        let forwarding = world.build();
        assert_eq!(next_hop(&forwarding, "10.244.1.9").mtu, 1350);
        let overlay = forwarding.overlay.clone().unwrap();
        assert!(overlay.tunnels.iter().all(|tunnel| tunnel.local == ip("192.0.2.7").into()));
        assert_eq!(overlay.addresses, [ip("192.0.2.7").into()]);
        let lookup = lookup(&forwarding, "10.244.3.9");
        assert_eq!(lookup, Some(Route::Blackhole), "no address of ours of that family");
    }

    #[test]
    fn endpoints_on_the_link_are_needed_before_they_are_resolved() {
        let mut world = World::new();
        world.wanted.endpoints = vec![ip("10.0.0.77").into(), ip("198.51.100.1").into()];
        let needed = world.build().needed;
        assert!(needed.contains(&(3, ip("10.0.0.77").into())));
        assert_eq!(needed.len(), 2); // and the default gateway
    }

    #[test]
    fn the_mtu_of_a_route_counts_up_to_that_of_the_link() {
        let mut world = World::new();
        world.routes.push(KernelRoute { mtu: Some(1280), ..unicast("203.0.113.0/25", 3, "10.0.0.2") });
        world.routes.push(KernelRoute { mtu: Some(9000), ..unicast("203.0.113.128/25", 3, "10.0.0.2") });
        let forwarding = world.build();
        assert_eq!(next_hop(&forwarding, "203.0.113.1").mtu, 1280);
        assert_eq!(next_hop(&forwarding, "203.0.113.129").mtu, 1500);
    }

    #[test]
    fn an_interface_that_is_gone_gives_a_port_that_is_down() {
        let mut world = World::new();
        world.links.remove(0);
        let forwarding = world.build();
        assert_eq!(forwarding.ports[0], PortLink::default());
        assert!(forwarding.ports[1].up);
        assert_eq!(lookup(&forwarding, "198.51.100.1"), Some(Route::Kernel));
    }

    #[test]
    fn ipv6_prefixes_that_look_like_ipv4_are_left_out() {
        let mut world = World::new();
        world.routes.push(route(Table::Main, "::ffff:0:0/96", RouteKind::Blackhole, via(0, "")));
        assert!(world.build().routes.iter().all(|(net, _)| !is_v4_mapped(net)));
    }
}
