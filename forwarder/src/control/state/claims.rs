//! What objects claim, so that a conflict is found by one look-up instead of a walk over all objects.

use std::collections::btree_map::Entry as Place;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use config::control::{Kind, ObjectRef};
use ipnet::IpNet;

use super::Entry;
use crate::addr::{Addr, protocol};
use crate::control::facts::{AddressKind, Facts};

/// Something that an object claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// A Service: (address, port, protocol).
    Frontend(Addr, u16, u8),
    /// A Service: (NodePort, protocol); its healthCheckNodePort is one, of TCP.
    NodePort(u16, u8),
    /// A Service: an address of any kind.
    Vip(Addr),
    /// A Service: its ClusterIP, which is nobody else's, whatever the ports (kubernetes pkg/registry/core/service/ipallocator).
    ClusterIp(Addr),
    /// A Pod: (hostPort, protocol) of some address of its node.
    HostPort(u16, u8),
    /// A Pod: its address, unless that is its node's.
    PodAddress(Addr),
    /// A Node: any of its addresses.
    NodeAddress(Addr),
    /// A slice: the address of an endpoint.
    EndpointAddress(Addr),
    /// A Node: one of its podCIDRs. A PodRoute: its prefix.
    PodCidr(IpNet),
}

/// Claims with those who claim.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    all: BTreeSet<(Claim, Arc<ObjectRef>)>,
    /// How many podCIDRs there are of each length, of IPv4 and IPv6: a handful of lengths is in use anywhere.
    lengths: [BTreeMap<u8, u32>; 2],
}

/// Sorts before every other reference.
static FIRST: LazyLock<Arc<ObjectRef>> = LazyLock::new(|| {
    Arc::new(ObjectRef { kind: Kind::Namespace, namespace: String::new(), name: String::new() })
});

impl Claims {
    /// Those who claim `claim`, in the order of their references.
    pub fn of(&self, claim: Claim) -> impl Iterator<Item = &Arc<ObjectRef>> {
        self.all
            .range((claim, FIRST.clone())..)
            .take_while(move |(other, _)| *other == claim)
            .map(|(_, owner)| owner)
    }

    /// The first who claims `claim` and is not `me`.
    pub fn other(&self, claim: Claim, me: &ObjectRef) -> Option<&Arc<ObjectRef>> {
        self.of(claim).find(|owner| ***owner != *me)
    }

    /// podCIDRs that have an address in common with `net`, with their Nodes; and prefixes of PodRoutes.
    pub fn pod_cidrs_overlapping(&self, net: IpNet) -> impl Iterator<Item = (IpNet, &Arc<ObjectRef>)> {
        // Prefixes nest or are disjoint: an overlapping one begins inside `net`, or is one of the few that hold it.
        let inside_first = Claim::PodCidr(with_length(net.network(), 0));
        let inside = self.all.range((inside_first, FIRST.clone())..);
        let inside = inside.map_while(move |(claim, owner)| match claim {
            Claim::PodCidr(other) if other.network() <= net.broadcast() => Some((*other, owner)),
            _ => None,
        });
        let inside = inside.filter(move |(other, _)| net.contains(other));
        let lengths = self.lengths[usize::from(net.addr().is_ipv6())].range(..net.prefix_len());
        let outside = lengths.flat_map(move |(length, _)| {
            let wider = with_length(net.network(), *length).trunc();
            self.of(Claim::PodCidr(wider)).map(move |owner| (wider, owner))
        });
        inside.chain(outside)
    }

    /// Addresses of Services that lie in `net`, with their Services.
    pub fn vips_within(&self, net: IpNet) -> impl Iterator<Item = (Addr, &Arc<ObjectRef>)> {
        let first = (Claim::Vip(net.network().into()), FIRST.clone());
        let last = Addr::from(net.broadcast());
        self.all.range(first..).map_while(move |(claim, owner)| match claim {
            Claim::Vip(addr) if *addr <= last => Some((*addr, owner)),
            _ => None,
        })
    }

    /// True if `ip` lies in a podCIDR of a Node, or in a PodRoute.
    pub fn in_pod_cidr(&self, ip: IpAddr) -> bool {
        self.pod_cidrs_overlapping(IpNet::from(ip)).next().is_some()
    }

    pub(super) fn add(&mut self, entry: &Entry) {
        for claim in claims(entry) {
            self.insert(claim, &entry.reference);
        }
    }

    fn insert(&mut self, claim: Claim, owner: &Arc<ObjectRef>) {
        if self.all.insert((claim, owner.clone()))
            && let Claim::PodCidr(net) = claim
        {
            *self.lengths_of(net).entry(net.prefix_len()).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        for claim in claims(entry) {
            if self.all.remove(&(claim, entry.reference.clone()))
                && let Claim::PodCidr(net) = claim
                && let Place::Occupied(mut count) = self.lengths_of(net).entry(net.prefix_len())
            {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }

    fn lengths_of(&mut self, net: IpNet) -> &mut BTreeMap<u8, u32> {
        &mut self.lengths[usize::from(net.addr().is_ipv6())]
    }
}

fn with_length(address: IpAddr, length: u8) -> IpNet {
    IpNet::new(address, length).expect("no longer than the prefix that the address is from")
}

/// Everything that an object claims.
fn claims(entry: &Entry) -> Vec<Claim> {
    let mut claims = Vec::new();
    match &entry.facts {
        Facts::Namespace => {}
        Facts::Node(node) => {
            claims.extend(node.addresses().map(Claim::NodeAddress));
            claims.extend(node.pod_cidrs.iter().map(|(net, _)| Claim::PodCidr(*net)));
        }
        Facts::Pod(pod) if pod.host_network => {}
        Facts::Pod(pod) => {
            claims.extend(pod.addresses.iter().map(|(addr, _)| Claim::PodAddress(*addr)));
            claims.extend(pod.host_ports.iter().map(|port| Claim::HostPort(port.host_port, port.protocol)));
        }
        Facts::Service(service) if service.skip.is_some() => {}
        Facts::Service(service) => {
            for address in &service.addresses {
                claims.push(Claim::Vip(address.addr));
                if address.kind == AddressKind::Cluster {
                    claims.push(Claim::ClusterIp(address.addr));
                }
                claims.extend(
                    service.ports.iter().map(|port| Claim::Frontend(address.addr, port.port, port.protocol)),
                );
            }
            let node_ports = service.ports.iter().filter_map(|port| Some((port.node_port?, port.protocol)));
            let health_check = service.health_check_node_port.map(|port| (port, protocol::TCP));
            let node_ports = node_ports.chain(health_check);
            claims.extend(node_ports.map(|(port, protocol)| Claim::NodePort(port, protocol)));
        }
        Facts::Slice(slice) => {
            claims.extend(slice.endpoints.iter().map(|endpoint| Claim::EndpointAddress(endpoint.addr)));
        }
        Facts::PodRoute(route) => claims.extend(route.route.map(|(net, _)| Claim::PodCidr(net))),
    }
    claims
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_prefixes_are_found_in_both_directions() {
        let owner = |name: &str| {
            Arc::new(ObjectRef { kind: Kind::Node, namespace: String::new(), name: name.into() })
        };
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let mut claims = Claims::default();
        for (cidr, name) in
            [("10.1.0.0/16", "a"), ("10.2.3.0/24", "b"), ("10.2.4.0/24", "c"), ("fd00:1::/64", "d")]
        {
            claims.insert(Claim::PodCidr(net(cidr)), &owner(name));
        }
        for (cidr, expected) in [
            ("10.1.2.0/24", vec!["a"]),
            ("10.1.0.0/16", vec!["a"]),
            ("10.0.0.0/8", vec!["a", "b", "c"]),
            ("10.2.0.0/16", vec!["b", "c"]),
            ("10.2.3.128/25", vec!["b"]),
            ("10.2.5.0/24", vec![]),
            ("10.0.0.0/16", vec![]),
            ("0.0.0.0/0", vec!["a", "b", "c"]),
            ("fd00::/16", vec!["d"]),
            ("fd00:1::5/128", vec!["d"]),
            ("::/0", vec!["d"]),
        ] {
            let found: Vec<_> =
                claims.pod_cidrs_overlapping(net(cidr)).map(|(_, owner)| owner.name.as_str()).collect();
            assert_eq!(found, expected, "{cidr}");
        }
        assert!(claims.in_pod_cidr("10.1.255.255".parse().unwrap()));
        assert!(!claims.in_pod_cidr("10.3.0.0".parse().unwrap()));
    }
}
