//! The gateway that `towpathctl explain` and `towpathd replay` assume when nobody says which: what follows from the objects, and
//! the rest in words.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use config::fault::Fault;
use config::gateway::{Gateway, GatewaySection, Mode, PortSection, ReturnPath, Role};
use config::object::{Manifest, Object};
use config::packet::{PacketSpec, Protocol};
use ipnet::IpNet;
use k8s_openapi::api::discovery::v1::Endpoint;

use crate::addr::Addr;
use crate::control::compile::{self, Compiler};
use crate::control::state::State;
use crate::control::validate::Rules;
use crate::explain::assumed_fib;
use crate::tables::Tables;

/// A gateway and what was assumed to make it.
pub struct Assumed {
    /// The gateway file, or what stands for it.
    pub gateway: Gateway,
    /// A sentence for each assumption.
    pub because: Vec<String>,
}

/// Objects as a gateway that is not there has them.
pub struct Compiled {
    /// Those that were taken.
    pub state: State,
    /// What was found wrong with any of them.
    pub notes: Vec<Fault>,
    /// Made the tables.
    pub compiler: Compiler,
    /// Prefixes behind the first inside port.
    pub inside: Vec<IpNet>,
}

impl Assumed {
    /// Compiles what can be compiled; objects at fault are left out.
    pub fn compile(&self, manifests: Vec<Manifest>) -> Compiled {
        let inside = inside(&manifests);
        let gateway = Arc::new(self.gateway.clone());
        let empty = Tables { settings: Arc::new(compile::settings(&gateway)), ..Tables::default() };
        let links = assumed_fib(&empty, &[], &[]).ports;
        let own: Vec<Addr> = links.iter().flat_map(|link| [link.v4, link.v6]).flatten().collect();
        let (state, notes) = State::load(&Rules { gateway: &gateway, own: &own }, manifests);
        let compiler = compile::compile(&state, &gateway, &own);
        Compiled { state, notes, compiler, inside }
    }

    /// What is assumed with a gateway file that somebody gave.
    pub fn with(gateway: Gateway) -> Assumed {
        let because =
            "nodes and pods are behind the first inside port, everybody else behind the first outside port";
        Assumed { gateway, because: vec![because.to_owned()] }
    }
}

/// The gateway that fits the objects. `node`: it is this Node.
pub fn from_objects(manifests: &[Manifest], node: Option<String>) -> Assumed {
    let service_cidrs = service_cidrs(manifests);
    let port = |name: &str, role| PortSection {
        name: name.to_owned(),
        interface: name.to_owned(),
        role,
        expose_cluster_ips: false,
        mode: Mode::Auto,
    };
    let mut because = vec![
        "one port outside, one inside; nodes and pods are inside".to_owned(),
        "return = \"routed\": the cluster routes replies to clients through the gateway".to_owned(),
    ];
    because.push(match service_cidrs.as_slice() {
        [] => "no service range, since no Service has a ClusterIP".to_owned(),
        cidrs => {
            let cidrs: Vec<String> = cidrs.iter().map(IpNet::to_string).collect();
            format!("service ranges {}, from the ClusterIPs", cidrs.join(", "))
        }
    });
    let pods = pods_outside_pod_cidrs(manifests);
    match pods.len() {
        0 => {}
        1 => because.push("1 address outside the podCIDRs is a pod's, from the endpoints".to_owned()),
        n => because.push(format!("{n} addresses outside the podCIDRs are pods', from the endpoints")),
    }
    because.push(match &node {
        Some(node) => format!("the gateway is Node {node}, so that it serves the NodePorts of its addresses"),
        None => "the gateway's own addresses are of the documentation ranges 192.0.2.128/25 and 2001:db8:ffff::/48"
            .to_owned(),
    });
    let gateway = Gateway {
        gateway: GatewaySection {
            name: node.unwrap_or_else(|| "gateway".to_owned()),
            // Each address of a Service is looked for in all of them.
            cluster_cidrs: IpNet::aggregate(&pods),
            service_cidrs,
            return_path: ReturnPath::Routed,
            lb_key: "towpath".to_owned(),
            ..GatewaySection::default()
        },
        snat: Default::default(),
        source_checks: Default::default(),
        egress: Vec::new(),
        overlay: Default::default(),
        control: Default::default(),
        health: Default::default(),
        workers: Default::default(),
        flows: Default::default(),
        fragments: Default::default(),
        rings: Default::default(),
        umem: Default::default(),
        ports: vec![port("outside", Role::Outside), port("inside", Role::Inside)],
        attach: Vec::new(),
    };
    Assumed { gateway, because }
}

/// The Node whose NodePort the packet asks for, if it does.
pub fn node_of_node_port(manifests: &[Manifest], packet: &PacketSpec) -> Option<String> {
    let protocol = match packet.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
        Protocol::Icmp => return None,
    };
    let is_node_port = manifests.iter().any(|manifest| match &manifest.object {
        Object::Service(service) => {
            let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
            ports.into_iter().any(|port| {
                port.node_port == Some(i32::from(packet.dst_port))
                    && port.protocol.as_deref().unwrap_or("TCP") == protocol
            })
        }
        _ => false,
    });
    let mut nodes = manifests.iter().filter_map(|manifest| match &manifest.object {
        Object::Node(node) => Some((node.metadata.name.clone()?, node_addresses(node))),
        _ => None,
    });
    is_node_port.then(|| nodes.find(|(_, addresses)| addresses.contains(&packet.dst)))?.map(|(name, _)| name)
}

fn node_addresses(node: &k8s_openapi::api::core::v1::Node) -> Vec<IpAddr> {
    let status = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    status.filter_map(|address| address.address.parse().ok()).collect()
}

/// What is behind the first inside port: podCIDRs, and addresses of Nodes, Pods and endpoints.
fn inside(manifests: &[Manifest]) -> Vec<IpNet> {
    let mut nets = Vec::new();
    let mut host = |text: &str| nets.extend(text.parse().map(|addr: IpAddr| IpNet::from(addr)));
    for manifest in manifests {
        match &manifest.object {
            Object::Node(node) => {
                node_addresses(node).iter().for_each(|addr| host(&addr.to_string()));
            }
            Object::Pod(pod) => {
                let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
                ips.for_each(|ip| host(&ip.ip));
            }
            Object::EndpointSlice(slice) => {
                slice
                    .endpoints
                    .iter()
                    .flat_map(|endpoint| endpoint.addresses.first())
                    .for_each(|addr| host(addr));
            }
            Object::Service(_) | Object::Namespace(_) | Object::PodRoute(_) => {}
        }
    }
    nets.extend(pod_cidrs(manifests));
    nets
}

fn pod_cidrs(manifests: &[Manifest]) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for manifest in manifests {
        match &manifest.object {
            Object::Node(node) => {
                let spec = node.spec.iter();
                let cidrs = spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
                nets.extend(cidrs.filter_map(|cidr| cidr.parse::<IpNet>().ok()));
            }
            Object::PodRoute(route) => nets.extend(route.spec.prefix.parse::<IpNet>()),
            _ => {}
        }
    }
    nets
}

/// Addresses of pods that no podCIDR holds: with some network plugins Nodes have none. Pods with the address of a Node are the Node's.
fn pods_outside_pod_cidrs(manifests: &[Manifest]) -> Vec<IpNet> {
    let pod_cidrs = pod_cidrs(manifests);
    let mut pods = BTreeSet::new();
    let mut nodes = BTreeSet::new();
    for manifest in manifests {
        match &manifest.object {
            Object::EndpointSlice(slice) => {
                let is_pod = |endpoint: &&Endpoint| {
                    endpoint.target_ref.as_ref().is_some_and(|target| target.kind.as_deref() == Some("Pod"))
                };
                let of_pods = slice.endpoints.iter().filter(is_pod);
                pods.extend(
                    of_pods.filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok()),
                );
            }
            Object::Node(node) => nodes.extend(node_addresses(node)),
            _ => {}
        }
    }
    let is_unknown = |ip: &&IpAddr| !pod_cidrs.iter().any(|net| net.contains(*ip));
    pods.difference(&nodes).filter(is_unknown).map(|ip| IpNet::from(*ip)).collect()
}

/// One range for each family that holds every ClusterIP: a /16 or a /112 if they fit into one and it touches no pod and no
/// node, else as much of their common prefix as does, else each ClusterIP by itself.
fn service_cidrs(manifests: &[Manifest]) -> Vec<IpNet> {
    let mut taken: Vec<IpNet> = inside(manifests);
    let mut cluster_ips: Vec<IpAddr> = Vec::new();
    for manifest in manifests {
        let Object::Service(service) = &manifest.object else { continue };
        let addresses =
            |list: &[String]| list.iter().filter_map(|text| text.parse().ok()).collect::<Vec<IpAddr>>();
        if let Some(spec) = &service.spec {
            cluster_ips.extend(addresses(spec.cluster_ips.as_deref().unwrap_or(spec.cluster_ip.as_slice())));
            taken.extend(
                addresses(spec.external_ips.as_deref().unwrap_or_default()).into_iter().map(IpNet::from),
            );
        }
        let ingress = service.status.iter().filter_map(|s| s.load_balancer.as_ref());
        let ingress = ingress.flat_map(|balancer| balancer.ingress.iter().flatten());
        taken.extend(ingress.filter_map(|i| i.ip.as_ref()?.parse::<IpAddr>().ok()).map(IpNet::from));
    }
    let mut ranges = Vec::new();
    for (is_v4, usual_len) in [(true, 16), (false, 112)] {
        let of_family: Vec<IpAddr> = cluster_ips.iter().copied().filter(|ip| ip.is_ipv4() == is_v4).collect();
        let Some(&first) = of_family.first() else { continue };
        let common = of_family.iter().map(|&ip| common_len(first, ip)).min().unwrap_or(0);
        let range = |len: u8| IpNet::new(first, len).ok().map(|net| net.trunc());
        let is_free = |net: &IpNet| !taken.iter().any(|other| net.contains(other) || other.contains(net));
        let found = [usual_len.min(common), common].into_iter().filter_map(range).find(is_free);
        match found {
            Some(net) => ranges.push(net),
            None => ranges.extend(of_family.into_iter().map(IpNet::from)),
        }
    }
    ranges.sort();
    ranges.dedup();
    ranges
}

/// How many leading bits two addresses of one family share.
fn common_len(a: IpAddr, b: IpAddr) -> u8 {
    let bits = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    };
    bits as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::object::parse;

    fn manifests(text: &str) -> Vec<Manifest> {
        let found = parse(text, "-");
        assert!(found.faults.is_empty(), "{:?}", found.faults);
        found.manifests
    }

    fn services(cluster_ips: &[&str]) -> String {
        let service = |(i, ip): (usize, &&str)| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}}}\nspec: {{clusterIP: \"{ip}\", clusterIPs: [\"{ip}\"], ports: [{{port: 80, nodePort: 30080}}]}}\n---\n"
            )
        };
        cluster_ips.iter().enumerate().map(service).collect()
    }

    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\nspec: {podCIDRs: [10.96.1.0/24]}\nstatus: {addresses: [{type: InternalIP, address: 192.168.50.11}]}\n---\n";

    #[test]
    fn ranges_hold_every_cluster_ip_and_nothing_else() {
        for (ips, with_node, expected) in [
            (&["10.96.0.1"][..], false, &["10.96.0.0/16"][..]),
            (&["10.96.0.1", "10.97.200.4"], false, &["10.96.0.0/15"]),
            (&["10.96.0.1", "fd00:96::8e11"], false, &["10.96.0.0/16", "fd00:96::/112"]),
            // The podCIDR lies in the /16, not in the common prefix of the two.
            (&["10.96.0.1", "10.96.0.10"], true, &["10.96.0.0/28"]),
            // No range without the podCIDR.
            (&["10.96.0.1", "10.96.2.1"], true, &["10.96.0.1/32", "10.96.2.1/32"]),
            (&["None"], false, &[]),
        ] {
            let text = services(ips) + if with_node { NODE } else { "" };
            let ranges: Vec<String> = service_cidrs(&manifests(&text)).iter().map(IpNet::to_string).collect();
            assert_eq!(ranges, expected, "{ips:?}");
        }
    }

    #[test]
    fn a_packet_to_a_node_port_makes_the_gateway_that_node() {
        let objects = manifests(&(services(&["10.96.0.1"]) + NODE));
        let node = |packet: &str| node_of_node_port(&objects, &packet.parse().unwrap());
        assert_eq!(node("tcp 198.51.100.7:1 > 192.168.50.11:30080").as_deref(), Some("node-1"));
        assert_eq!(node("tcp 198.51.100.7:1 > 192.168.50.11:22"), None);
        assert_eq!(node("udp 198.51.100.7:1 > 192.168.50.11:30080"), None);
        assert_eq!(node("tcp 198.51.100.7:1 > 192.168.50.12:30080"), None);
    }

    #[test]
    fn endpoints_tell_of_pods_where_nodes_have_no_pod_cidr() {
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\naddressType: IPv4\nendpoints:\n\
                     - {addresses: [172.16.4.9], targetRef: {kind: Pod, name: a}}\n\
                     - {addresses: [10.96.1.4], targetRef: {kind: Pod, name: b}}\n\
                     - {addresses: [192.168.50.11], targetRef: {kind: Pod, name: on-the-host}}\n\
                     - {addresses: [198.51.100.9]}\n---\n";
        let pods = pods_outside_pod_cidrs(&manifests(&(slice.to_owned() + NODE)));
        assert_eq!(pods.iter().map(IpNet::to_string).collect::<Vec<_>>(), ["172.16.4.9/32"]);
    }

    #[test]
    fn pods_and_nodes_are_inside() {
        let nets: Vec<String> = inside(&manifests(NODE)).iter().map(IpNet::to_string).collect();
        assert_eq!(nets, ["192.168.50.11/32", "10.96.1.0/24"]);
    }
}
