//! The cluster's own part: the objects that there are, and the EndpointSlices that the controller makes of Services and pods.
//!
//! No I/O: [`Cluster::manifests`] is what is applied.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::service::{Hints, Service, ServicePort, Target, Type};

/// A protocol that Services have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    /// True if `address` is of the family.
    pub fn holds(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Family::V4)
    }
}

/// A port that a container listens on.
#[derive(Clone, Debug)]
pub struct Port {
    pub name: String,
    pub protocol: Protocol,
    pub number: u16,
    /// `hostIP` and `hostPort`.
    pub host: Option<(IpAddr, u16)>,
}

/// A port of a container, named after itself.
pub fn listen(protocol: Protocol, number: u16) -> Port {
    Port { name: format!("{}-{number}", protocol.name().to_lowercase()), protocol, number, host: None }
}

/// A pod, as far as slices need it.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    /// Name of its node.
    pub node: String,
    /// Label `app`.
    pub app: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub ports: Vec<Port>,
    /// `hostNetwork`: its addresses are those of the node.
    pub host_network: bool,
    /// Condition Ready.
    pub ready: bool,
    /// It has a deletionTimestamp.
    pub terminating: bool,
    /// It was evicted: phase Failed.
    pub evicted: bool,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// `podCIDRs`.
    pub pod_cidrs: [String; 2],
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
}

/// Everything that there is in the API.
#[derive(Debug)]
pub struct Cluster {
    pub namespace: String,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    pub services: Vec<Service>,
}

impl Cluster {
    /// The pod of this name.
    ///
    /// # Panics
    /// If there is none: the scenario is wrong.
    pub fn pod(&mut self, name: &str) -> &mut Pod {
        self.pods.iter_mut().find(|pod| pod.name == name).expect("a pod of the scenario")
    }

    /// Every object, as JSON, which is YAML.
    pub fn manifests(&self) -> String {
        let mut items =
            vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})];
        items.extend(self.nodes.iter().map(Node::manifest));
        items.extend(self.pods.iter().map(|pod| pod.manifest(&self.namespace)));
        for service in &self.services {
            items.push(service.manifest(&self.namespace));
            items.extend(self.slices(service));
        }
        json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
    }

    /// The EndpointSlice controller: for each family one slice for each set of ports that its pods have
    /// (k8s.io/endpointslice reconciler.go).
    fn slices(&self, service: &Service) -> Vec<Value> {
        let mut slices = Vec::new();
        if service.type_ == Type::ExternalName {
            return slices;
        }
        for family in &service.families {
            let mut sets: BTreeMap<BTreeSet<(String, Protocol, u16)>, Vec<Value>> = BTreeMap::new();
            for pod in self.pods.iter().filter(|pod| service.selects(pod)) {
                sets.entry(ports_of(service, pod)).or_default().push(self.endpoint(service, pod, *family));
            }
            for (number, (ports, endpoints)) in sets.into_iter().enumerate() {
                let ports: Vec<Value> = ports
                    .into_iter()
                    .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol.name(), "port": port}))
                    .collect();
                slices.push(json!({
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "namespace": self.namespace,
                        "name": format!("{}-{}-{number}", service.name, family.name().to_lowercase()),
                        "labels": {"kubernetes.io/service-name": service.name},
                    },
                    "addressType": family.name(),
                    "ports": ports,
                    "endpoints": endpoints,
                }));
            }
        }
        slices
    }

    /// `podToEndpoint` and the hints of k8s.io/endpointslice.
    fn endpoint(&self, service: &Service, pod: &Pod, family: Family) -> Value {
        let serving = pod.ready;
        let ready = service.publish_not_ready || serving && !pod.terminating;
        let zone = self.nodes.iter().find(|node| node.name == pod.node).and_then(|node| node.zone.clone());
        let address: IpAddr = if family == Family::V4 { pod.v4.into() } else { pod.v6.into() };
        let mut endpoint = json!({
            "addresses": [address],
            "nodeName": pod.node,
            "conditions": {"ready": ready, "serving": serving, "terminating": pod.terminating},
            "targetRef": {"kind": "Pod", "namespace": self.namespace, "name": pod.name},
        });
        if let Some(zone) = zone {
            endpoint["zone"] = json!(zone);
            if ready && service.hints.is_some() {
                endpoint["hints"]["forZones"] = json!([{"name": zone}]);
            }
        }
        if ready && service.hints == Some(Hints::PreferSameNode) {
            endpoint["hints"]["forNodes"] = json!([{"name": pod.node}]);
        }
        endpoint
    }
}

/// The Service's ports as far as a pod has them.
fn ports_of(service: &Service, pod: &Pod) -> BTreeSet<(String, Protocol, u16)> {
    let resolve = |port: &ServicePort| match &port.target {
        Target::Number(number) => Some(*number),
        Target::Name(name) => {
            let named = |own: &&Port| own.name == *name && own.protocol == port.protocol;
            pod.ports.iter().find(named).map(|own| own.number)
        }
    };
    let ports = service.ports.iter();
    ports.filter_map(|port| Some((port.name.clone(), port.protocol, resolve(port)?))).collect()
}

impl Node {
    fn manifest(&self) -> Value {
        let labels =
            self.zone.as_ref().map_or(json!({}), |zone| json!({"topology.kubernetes.io/zone": zone}));
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"podCIDR": self.pod_cidrs[0], "podCIDRs": self.pod_cidrs},
            "status": {"addresses": [
                {"type": "InternalIP", "address": self.v4},
                {"type": "InternalIP", "address": self.v6},
            ]},
        })
    }
}

impl Pod {
    fn manifest(&self, namespace: &str) -> Value {
        let phase = if self.evicted { "Failed" } else { "Running" };
        let port = |port: &Port| {
            let mut json =
                json!({"name": port.name, "protocol": port.protocol.name(), "containerPort": port.number});
            if let Some((host_ip, host_port)) = port.host {
                (json["hostIP"], json["hostPort"]) = (json!(host_ip), json!(host_port));
            }
            json
        };
        let ports: Vec<Value> = self.ports.iter().map(port).collect();
        let mut metadata = json!({"namespace": namespace, "name": self.name, "labels": {"app": self.app}});
        if self.terminating {
            metadata["deletionTimestamp"] = json!("2025-01-01T00:00:00Z");
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": self.node, "hostNetwork": self.host_network, "containers": [{"name": "agnhost", "ports": ports}]},
            "status": {
                "phase": phase,
                "podIP": self.v4,
                "podIPs": [{"ip": self.v4}, {"ip": self.v6}],
                "conditions": [{"type": "Ready", "status": if self.ready { "True" } else { "False" }}],
            },
        })
    }
}
