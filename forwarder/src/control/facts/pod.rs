//! What a Pod says.

use std::net::IpAddr;

use config::fault::Fault;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::annotation::{self, Annotations};
use super::{read_addr, read_any_ip, read_port, read_protocol};
use crate::addr::Addr;

/// What Towpath reads from a Pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodFacts {
    /// `status.podIPs`, each with the path of its field; none of a pod that has ended, since its addresses are given
    /// to others while the object is still there.
    pub addresses: Vec<(Addr, String)>,
    /// `spec.nodeName`, may be empty.
    pub node: String,
    /// `spec.hostNetwork`: the addresses are those of its node.
    pub host_network: bool,
    /// Ports of its containers that its node serves too; none of a pod that has ended, or that has no ports but its node's.
    pub host_ports: Vec<HostPort>,
    /// Annotation `towpath.dev/weight`.
    pub weight: Option<u16>,
}

/// `spec.containers[].ports[]` with a `hostPort`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// `name`, may be empty.
    pub name: String,
    /// `hostIP`; `None`: every address of the node. `0.0.0.0` and `::` are every address of their family.
    pub host_ip: Option<IpAddr>,
    /// `hostPort`.
    pub host_port: u16,
    /// `containerPort`.
    pub container_port: u16,
    /// `protocol`, as the IP protocol number.
    pub protocol: u8,
    /// Path of the field `hostPort`.
    pub field: String,
}

impl HostPort {
    /// True if it is served at an address of its node (the CNI plugin portmap, fillDnatRules).
    pub fn is_at(&self, addr: Addr) -> bool {
        self.host_ip.is_none_or(|ip| {
            if ip.is_unspecified() { ip.is_ipv4() == addr.is_v4() } else { Addr::from(ip) == addr }
        })
    }

    /// True if both want the same port of the same address.
    pub fn overlaps(&self, other: &HostPort) -> bool {
        let is_one_address = match (self.host_ip, other.host_ip) {
            (Some(one), Some(two)) => {
                one == two || one.is_ipv4() == two.is_ipv4() && (one.is_unspecified() || two.is_unspecified())
            }
            _ => true,
        };
        (self.host_port, self.protocol) == (other.host_port, other.protocol) && is_one_address
    }

    fn read(container: &Container, path: &str, faults: &mut Vec<Fault>) -> Vec<HostPort> {
        let mut host_ports = Vec::new();
        for (index, port) in container.ports.iter().flatten().enumerate() {
            let path = format!("{path}.ports[{index}]");
            // The API server takes 0 for none.
            let Some(number) = port.host_port.filter(|number| *number != 0) else { continue };
            let field = format!("{path}.hostPort");
            let host_port = read_port(&field, number, faults);
            let container_port = read_port(&format!("{path}.containerPort"), port.container_port, faults);
            let protocol = read_protocol(&format!("{path}.protocol"), port.protocol.as_deref(), faults);
            let host_ip = match port.host_ip.as_deref().filter(|text| !text.is_empty()) {
                Some(text) => match read_any_ip(&format!("{path}.hostIP"), text, faults) {
                    Some(ip) => Some(ip),
                    None => continue,
                },
                None => None,
            };
            let (Some(host_port), Some(container_port), Some(protocol)) =
                (host_port, container_port, protocol)
            else {
                continue;
            };
            let name = port.name.clone().unwrap_or_default();
            host_ports.push(HostPort { name, host_ip, host_port, container_port, protocol, field });
        }
        host_ports
    }
}

impl PodFacts {
    /// True if it runs on the node of this name; an empty name is nobody's.
    pub fn is_on(&self, node: &str) -> bool {
        !node.is_empty() && self.node == node
    }

    pub(super) fn read(pod: &Pod, faults: &mut Vec<Fault>, warnings: &mut Vec<Fault>) -> PodFacts {
        let mut annotations = Annotations::of(&pod.metadata, warnings);
        let weight = annotation::weight(&mut annotations);
        annotations.finish("Pod");
        let mut facts = PodFacts { weight, ..PodFacts::default() };
        if let Some(spec) = &pod.spec {
            facts.node = spec.node_name.clone().unwrap_or_default();
            facts.host_network = spec.host_network.unwrap_or(false);
        }
        let Some(status) = &pod.status else { return facts };
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return facts;
        }
        let listed = status.pod_ips.iter().flatten().enumerate();
        let mut texts: Vec<_> =
            listed.map(|(index, pod_ip)| (format!("status.podIPs[{index}].ip"), &pod_ip.ip)).collect();
        if let (true, Some(text)) = (texts.is_empty(), &status.pod_ip) {
            texts.push(("status.podIP".into(), text));
        }
        for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            if let Some(addr) = read_addr(&field, text, faults) {
                facts.addresses.push((addr, field));
            }
        }
        if let Some(spec) = pod.spec.as_ref().filter(|_| !facts.host_network) {
            // Sidecars are containers among the init containers that are started again.
            let is_sidecar = |container: &Container| container.restart_policy.as_deref() == Some("Always");
            let init = spec.init_containers.iter().flatten().enumerate();
            let init = init.filter(|(_, container)| is_sidecar(container));
            let init = init.map(|(index, container)| (format!("spec.initContainers[{index}]"), container));
            let own = spec.containers.iter().enumerate();
            let own = own.map(|(index, container)| (format!("spec.containers[{index}]"), container));
            for (path, container) in own.chain(init) {
                facts.host_ports.extend(HostPort::read(container, &path, faults));
            }
        }
        facts
    }
}
