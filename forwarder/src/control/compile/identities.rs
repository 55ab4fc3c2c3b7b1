//! Who an address is, and how pods are reached: from Nodes, Pods and the ranges of the gateway file.

use std::collections::BTreeMap;
use std::net::IpAddr;

use config::control::Kind;
use config::gateway::{Gateway, OverlayKind};
use ipnet::IpNet;

use crate::addr::Addr;
use crate::control::facts::{Facts, NodeFacts, PodFacts};
use crate::control::state::{Claim, State, Touch};
use crate::table::lpm::Lpm;
use crate::tables::Identity;

/// Who addresses are. `own`: the gateway's addresses, which count as a node's.
pub fn identities(state: &State, gateway: &Gateway, own: &[Addr]) -> Lpm<Identity> {
    let section = &gateway.gateway;
    let mut entries: Vec<(IpNet, Identity)> = Vec::new();
    entries.extend(section.service_cidrs.iter().map(|net| (*net, Identity::ServiceRange)));
    entries.extend(pod_ranges(state, gateway).into_iter().map(|net| (net, Identity::Pod)));
    let host = |addr: Addr| IpNet::from(IpAddr::from(addr));
    for (_, pod) in state.pods() {
        for (addr, _) in &pod.addresses {
            if pod.host_network {
                entries.push((host(*addr), Identity::Node));
            } else if !is_pod_address(state, gateway, *addr) {
                entries.push((host(*addr), Identity::Pod));
            }
        }
    }
    // Of equal prefixes the last holds: a node's address is a node's, whatever else is said of it.
    let nodes = state.nodes().flat_map(|(_, node)| node.addresses());
    entries.extend(nodes.chain(own.iter().copied()).map(|addr| (host(addr), Identity::Node)));
    Lpm::build(entries)
}

/// Ranges of pod addresses: cluster_cidrs, the podCIDRs of all Nodes, and PodRoutes.
pub fn pod_ranges(state: &State, gateway: &Gateway) -> Vec<IpNet> {
    let of_nodes = state.nodes().flat_map(|(_, node)| node.pod_cidrs.iter().map(|(net, _)| *net));
    let of_routes = state.pod_routes().map(|(net, _)| net);
    gateway.gateway.cluster_cidrs.iter().copied().chain(of_nodes).chain(of_routes).collect()
}

/// True if `addr` lies in a range of pod addresses.
pub fn is_pod_address(state: &State, gateway: &Gateway, addr: Addr) -> bool {
    let ip = IpAddr::from(addr);
    gateway.gateway.cluster_cidrs.iter().any(|net| net.contains(&ip)) || state.claims().in_pod_cidr(ip)
}

/// Routes to pods: each podCIDR by the InternalIP of its Node, of the same family, or by whichever there is a tunnel to. Not to our
/// own pods, which the kernel routes, and not to a Node without such an InternalIP. Then what PodRoutes say, which holds for prefixes
/// that both have.
pub fn pod_routes(state: &State, gateway: &Gateway) -> Vec<(IpNet, Addr)> {
    let routes = others(state, gateway).flat_map(|node| {
        node.pod_cidrs.iter().filter_map(|(net, _)| {
            let of_family = |addr: &&Addr| addr.is_v4() == net.addr().is_ipv4();
            let native = || node.internal_ips.iter().find(of_family).copied();
            Some((*net, tunnel_end(node, gateway).or_else(native)?))
        })
    });
    let by_tunnel = |via: Addr| {
        let node = others(state, gateway).find(|node| node.internal_ips.contains(&via));
        node.and_then(|node| tunnel_end(node, gateway)).unwrap_or(via)
    };
    routes.chain(state.pod_routes().map(|(net, via)| (net, by_tunnel(via)))).collect()
}

/// Nodes that are reached by a tunnel: where it ends, and the link-layer address of the node's VXLAN device, if it is known.
pub fn tunnels(state: &State, gateway: &Gateway) -> BTreeMap<Addr, Option<[u8; 6]>> {
    let mac = |node: &NodeFacts| node.vxlan_mac.or(gateway.overlay.mac).map(|mac| mac.0);
    others(state, gateway).filter_map(|node| Some((tunnel_end(node, gateway)?, mac(node)))).collect()
}

/// Where a tunnel to a node ends, if it is reached by one: its first InternalIP of a family that we have an address of.
pub fn tunnel_end(node: &NodeFacts, gateway: &Gateway) -> Option<Addr> {
    let overlay = &gateway.overlay;
    let is_vxlan = node.overlay.unwrap_or(overlay.default) == OverlayKind::Vxlan;
    let is_ours = |addr: &&Addr| {
        overlay.addresses.is_empty() || overlay.addresses.iter().any(|own| own.is_ipv4() == addr.is_v4())
    };
    node.internal_ips.iter().find(is_ours).filter(|_| is_vxlan).copied()
}

/// Every Node but our own.
fn others<'s>(state: &'s State, gateway: &'s Gateway) -> impl Iterator<Item = &'s NodeFacts> {
    let others = state.nodes().filter(|(entry, _)| entry.reference.name != gateway.gateway.name);
    others.map(|(_, node)| node)
}

/// True if a change touches what is read from Nodes and PodRoutes.
pub(super) fn nodes_differ(touched: &[Touch]) -> bool {
    touched.iter().filter(|touch| matches!(touch.reference.kind, Kind::Node | Kind::PodRoute)).any(|touch| {
        let facts = |entry: &Option<std::sync::Arc<crate::control::state::Entry>>| {
            entry.as_ref().map(|e| e.facts.clone())
        };
        facts(&touch.old) != facts(&touch.new)
    })
}

/// True if a change touches a Pod whose address is not known as a pod's anyway.
pub(super) fn pods_matter(state: &State, gateway: &Gateway, touched: &[Touch]) -> bool {
    let matters = |pod: &PodFacts| {
        pod.addresses.iter().any(|(addr, _)| {
            if pod.host_network {
                state.claims().of(Claim::NodeAddress(*addr)).next().is_none()
            } else {
                !is_pod_address(state, gateway, *addr)
            }
        })
    };
    touched.iter().flat_map(|touch| touch.old.iter().chain(&touch.new)).any(|entry| match &entry.facts {
        Facts::Pod(pod) => matters(pod),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::compile::fixture::Cluster;

    #[test]
    fn who_is_who() {
        let cluster = Cluster::new(
            "[gateway]\nname = 'gw'\ncluster_cidrs = ['10.244.0.0/16']\nservice_cidrs = ['10.96.0.0/16']",
            "
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64']}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: ExternalIP, address: 10.244.9.9}, {type: Hostname, address: n1}]}
---
kind: Pod
metadata: {name: far}
status: {podIPs: [{ip: 172.16.0.5}]}
---
kind: Pod
metadata: {name: agent}
spec: {hostNetwork: true}
status: {podIP: 192.168.0.2}
---
kind: Pod
metadata: {name: done}
status: {phase: Succeeded, podIP: 172.16.0.6}
",
        );
        let table = &cluster.compiler(&["10.0.0.1"]).tables;
        for (address, expected) in [
            ("10.244.1.7", Some(Identity::Pod)),
            ("10.244.77.7", Some(Identity::Pod)),
            ("fd00:244:1::7", Some(Identity::Pod)),
            ("fd00:244:2::7", None),
            ("172.16.0.5", Some(Identity::Pod)),
            ("172.16.0.6", None),
            ("192.168.0.1", Some(Identity::Node)),
            ("192.168.0.2", Some(Identity::Node)),
            ("10.244.9.9", Some(Identity::Node)),
            ("10.0.0.1", Some(Identity::Node)),
            ("10.96.4.4", Some(Identity::ServiceRange)),
            ("198.51.100.1", None),
        ] {
            assert_eq!(
                table.identities.lookup(address.parse::<IpAddr>().unwrap().into()),
                expected,
                "{address}"
            );
        }
    }

    /// Rules 12.3, 12.5.
    #[test]
    fn pods_are_reached_by_their_nodes() {
        let cluster = Cluster::new(
            "[gateway]\nname = 'gw'",
            "
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64']}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: InternalIP, address: 'fd00::1'}]}
---
kind: Node
metadata: {name: n2}
spec: {podCIDRs: [10.244.2.0/24, 'fd00:244:2::/64']}
status: {addresses: [{type: ExternalIP, address: 192.0.2.9}, {type: InternalIP, address: 'fd00::2'}]}
---
kind: Node
metadata: {name: gw}
spec: {podCIDR: 10.244.3.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.0.3}]}
---
kind: Node
metadata: {name: n4, annotations: {towpath.dev/overlay: vxlan}}
status: {addresses: [{type: InternalIP, address: 'fd00::4'}, {type: InternalIP, address: 192.168.0.4}]}
---
kind: PodRoute
metadata: {name: more}
spec: {prefix: 10.250.0.0/24, via: 192.168.0.9}
---
kind: PodRoute
metadata: {name: tunneled}
spec: {prefix: 10.251.0.0/24, via: 192.168.0.4}
",
        );
        let routes = pod_routes(&cluster.state, &cluster.gateway);
        let shown: Vec<_> = routes.iter().map(|(net, via)| format!("{net} via {via}")).collect();
        assert_eq!(
            shown,
            [
                "10.244.1.0/24 via 192.168.0.1",
                "fd00:244:1::/64 via fd00::1",
                "fd00:244:2::/64 via fd00::2",
                // PodRoutes last: of one prefix the last holds.
                "10.250.0.0/24 via 192.168.0.9",
                "10.251.0.0/24 via fd00::4",
            ]
        );
        let who = identities(&cluster.state, &cluster.gateway, &[]);
        assert_eq!(who.lookup("10.250.0.7".parse::<IpAddr>().unwrap().into()), Some(Identity::Pod));
    }

    #[test]
    fn tunnels_by_annotation_or_by_the_file() {
        let node = |name: &str, annotations: &str, ips: &str| {
            let ips: Vec<_> =
                ips.split(' ').map(|ip| format!("{{type: InternalIP, address: '{ip}'}}")).collect();
            let last = name.trim_start_matches('n');
            format!(
                "kind: Node\nmetadata: {{name: {name}, annotations: {{{annotations}}}}}\n\
                 spec: {{podCIDRs: [10.244.{last}.0/24, 'fd00:244:{last}::/64']}}\nstatus: {{addresses: [{}]}}\n",
                ips.join(", ")
            )
        };
        let nodes = [
            node("n1", "towpath.dev/overlay: native", "10.0.0.1 fd00::1"),
            node(
                "n2",
                "towpath.dev/overlay: vxlan, towpath.dev/vxlan-mac: '02:00:00:00:00:02'",
                "fd00::2 10.0.0.2",
            ),
            node("n3", "", "10.0.0.3"),
        ]
        .join("---\n");
        let name = "[gateway]\nname = 'gw'\n";
        let with = |overlay: &str| {
            let cluster = Cluster::new(&format!("{name}{overlay}"), &nodes);
            let tunnels: Vec<_> = tunnels(&cluster.state, &cluster.gateway)
                .into_iter()
                .map(|(node, mac)| (node.to_string(), mac.map(|mac| mac[5])))
                .collect();
            let routes = pod_routes(&cluster.state, &cluster.gateway);
            let routes: Vec<_> = routes.iter().map(|(net, node)| format!("{net} {node}")).collect();
            (tunnels, routes)
        };
        let (tunnels, routes) = with("");
        assert_eq!(tunnels, [("fd00::2".to_owned(), Some(2))]);
        assert_eq!(
            routes,
            [
                "10.244.1.0/24 10.0.0.1",
                "fd00:244:1::/64 fd00::1",
                "10.244.2.0/24 fd00::2",
                "fd00:244:2::/64 fd00::2",
                "10.244.3.0/24 10.0.0.3",
            ]
        );
        let (tunnels, routes) = with("[overlay]\ndefault = 'vxlan'\naddresses = ['10.0.0.9']\n");
        assert_eq!(tunnels, [("10.0.0.2".to_owned(), Some(2)), ("10.0.0.3".to_owned(), None)]);
        assert_eq!(
            routes[2..],
            [
                "10.244.2.0/24 10.0.0.2",
                "fd00:244:2::/64 10.0.0.2",
                "10.244.3.0/24 10.0.0.3",
                "fd00:244:3::/64 10.0.0.3"
            ]
        );
        let (tunnels, _) = with("[overlay]\ndefault = 'vxlan'\nmac = '02:00:00:00:00:77'\n");
        assert_eq!(tunnels, [("10.0.0.3".to_owned(), Some(0x77)), ("fd00::2".to_owned(), Some(2))]);
    }
}
