//! Services as scenarios write them, and what the API server and a load balancer's controller make of them.
//!
//! A scenario says what upstream's test says in `spec`; addresses, NodePorts and load balancer addresses are given here, as
//! they are in a cluster.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::cluster::{Family, Pod, Protocol};

/// `spec.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// `targetPort`.
#[derive(Clone, Debug)]
pub enum Target {
    Number(u16),
    /// A port of the pods by name.
    Name(&'static str),
}

/// One of `spec.ports`.
#[derive(Clone, Debug)]
pub struct ServicePort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub target: Target,
    /// Given by the API server where it is needed.
    pub node_port: Option<u16>,
}

/// What hints the controller gives for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hints {
    /// Annotation `service.kubernetes.io/topology-mode: Auto`; as many endpoints in each zone.
    Auto,
    /// `trafficDistribution: PreferClose`.
    PreferClose,
    /// `trafficDistribution: PreferSameZone`.
    PreferSameZone,
    /// `trafficDistribution: PreferSameNode`.
    PreferSameNode,
}

/// A Service.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub type_: Type,
    /// `spec.selector`: the label `app`.
    pub app: String,
    pub families: Vec<Family>,
    pub ports: Vec<ServicePort>,
    /// Seconds of `sessionAffinity: ClientIP`.
    pub affinity_s: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    pub publish_not_ready: bool,
    pub node_ports: bool,
    pub external_ips: Vec<IpAddr>,
    pub source_ranges: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub hints: Option<Hints>,
    /// Given by the API server, of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// Given by the load balancer's controller, of each family.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Given by the API server to a LoadBalancer with external policy Local.
    pub health_check_node_port: Option<u16>,
}

impl Service {
    /// A dual-stack Service of type ClusterIP in front of the pods labelled `app`: the name is that of both.
    pub fn new(name: &str) -> Service {
        Service {
            name: name.to_owned(),
            type_: Type::ClusterIp,
            app: name.to_owned(),
            families: vec![Family::V4, Family::V6],
            ports: Vec::new(),
            affinity_s: None,
            internal_local: false,
            external_local: false,
            publish_not_ready: false,
            node_ports: true,
            external_ips: Vec::new(),
            source_ranges: Vec::new(),
            labels: BTreeMap::new(),
            hints: None,
            cluster_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            health_check_node_port: None,
        }
    }

    /// With this type.
    pub fn of_type(mut self, type_: Type) -> Service {
        self.type_ = type_;
        self
    }

    /// With one more port.
    pub fn port(mut self, protocol: Protocol, port: u16, target: u16) -> Service {
        self.ports.push(ServicePort {
            name: format!("{}-{port}", protocol.name().to_lowercase()),
            protocol,
            port,
            target: Target::Number(target),
            node_port: None,
        });
        self
    }

    /// With whatever `change` makes of it.
    pub fn with(mut self, change: impl FnOnce(&mut Service)) -> Service {
        change(&mut self);
        self
    }

    /// True if the selector takes the pod.
    pub fn selects(&self, pod: &Pod) -> bool {
        pod.app == self.app && !pod.evicted
    }
}

/// Numbers that the API server and the load balancer give away, each once in a run.
#[derive(Debug, Default)]
pub struct Numbers {
    cluster_ip: u16,
    load_balancer_ip: u8,
    node_port: u16,
}

impl Numbers {
    fn cluster_ip(&mut self, family: Family) -> IpAddr {
        self.cluster_ip += 1;
        match family {
            Family::V4 => {
                let [high, low] = (0x0100 + self.cluster_ip).to_be_bytes();
                Ipv4Addr::new(10, 96, high, low).into()
            }
            Family::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, self.cluster_ip).into(),
        }
    }

    fn load_balancer_ip(&mut self, family: Family) -> IpAddr {
        // 203.0.113.0/24 has room for one round; by then the first ones have long gone.
        self.load_balancer_ip = if self.load_balancer_ip >= 240 { 1 } else { self.load_balancer_ip + 1 };
        match family {
            Family::V4 => Ipv4Addr::new(203, 0, 113, self.load_balancer_ip).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, self.load_balancer_ip.into()).into(),
        }
    }

    fn node_port(&mut self) -> u16 {
        self.node_port += 1;
        30_000 + self.node_port
    }
}

impl Service {
    /// What the API server makes of a Service that is created or updated: gives what is missing, takes back what its type
    /// has not (kubernetes pkg/registry/core/service/storage), and the load balancer's controller gives its address.
    pub fn complete(&mut self, numbers: &mut Numbers) {
        let has_cluster_ip = self.type_ != Type::ExternalName;
        let families = self.families.clone();
        let balanced = self.type_ == Type::LoadBalancer;
        self.cluster_ips.retain(|ip| has_cluster_ip && families.iter().any(|family| family.holds(ip)));
        self.load_balancer_ips.retain(|ip| balanced && families.iter().any(|family| family.holds(ip)));
        for family in families {
            if has_cluster_ip && !self.cluster_ips.iter().any(|ip| family.holds(ip)) {
                self.cluster_ips.push(numbers.cluster_ip(family));
            }
            if balanced && !self.load_balancer_ips.iter().any(|ip| family.holds(ip)) {
                self.load_balancer_ips.push(numbers.load_balancer_ip(family));
            }
        }
        let needs_node_ports = self.type_ == Type::NodePort || balanced && self.node_ports;
        let may_have = self.type_ == Type::NodePort || balanced;
        for index in 0..self.ports.len() {
            let own = &self.ports[index];
            // One number serves both protocols of a port.
            let other = |other: &ServicePort| other.port == own.port && other.protocol != own.protocol;
            let shared = self.ports.iter().filter(|port| other(port)).find_map(|port| port.node_port);
            let given = own.node_port.filter(|_| may_have);
            let missing = || needs_node_ports.then(|| shared.unwrap_or_else(|| numbers.node_port()));
            self.ports[index].node_port = given.or_else(missing);
        }
        let checked = balanced && self.external_local;
        self.health_check_node_port =
            checked.then(|| self.health_check_node_port.unwrap_or_else(|| numbers.node_port()));
    }

    /// The object.
    pub fn manifest(&self, namespace: &str) -> Value {
        let type_ = match self.type_ {
            Type::ClusterIp => "ClusterIP",
            Type::NodePort => "NodePort",
            Type::LoadBalancer => "LoadBalancer",
            Type::ExternalName => "ExternalName",
        };
        let mut metadata = json!({"namespace": namespace, "name": self.name, "labels": self.labels});
        if self.type_ == Type::ExternalName {
            let spec = json!({"type": type_, "externalName": "foo.example.com", "sessionAffinity": "None"});
            return json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
        }
        let policy = |local: bool| if local { "Local" } else { "Cluster" };
        let families: Vec<&str> = self.families.iter().map(|family| family.name()).collect();
        let mut spec = json!({
            "type": type_,
            "selector": {"app": self.app},
            "clusterIP": self.cluster_ips[0],
            "clusterIPs": self.cluster_ips,
            "ipFamilies": families,
            "ipFamilyPolicy": if families.len() == 2 { "RequireDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": policy(self.internal_local),
            "publishNotReadyAddresses": self.publish_not_ready,
            "sessionAffinity": if self.affinity_s.is_some() { "ClientIP" } else { "None" },
            "externalIPs": self.external_ips,
            "ports": self.ports.iter().map(ServicePort::manifest).collect::<Vec<_>>(),
        });
        if let Some(seconds) = self.affinity_s {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        if self.type_ != Type::ClusterIp || !self.external_ips.is_empty() {
            spec["externalTrafficPolicy"] = json!(policy(self.external_local));
        }
        if self.type_ == Type::LoadBalancer {
            spec["allocateLoadBalancerNodePorts"] = json!(self.node_ports);
            spec["loadBalancerSourceRanges"] = json!(self.source_ranges);
        }
        if let Some(port) = self.health_check_node_port {
            spec["healthCheckNodePort"] = json!(port);
        }
        match self.hints {
            Some(Hints::Auto) => {
                metadata["annotations"] = json!({"service.kubernetes.io/topology-mode": "Auto"})
            }
            Some(Hints::PreferClose) => spec["trafficDistribution"] = json!("PreferClose"),
            Some(Hints::PreferSameZone) => spec["trafficDistribution"] = json!("PreferSameZone"),
            Some(Hints::PreferSameNode) => spec["trafficDistribution"] = json!("PreferSameNode"),
            None => {}
        }
        let ingress: Vec<Value> = self.load_balancer_ips.iter().map(|ip| json!({"ip": ip})).collect();
        let status = json!({"loadBalancer": {"ingress": ingress}});
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status})
    }
}

impl ServicePort {
    fn manifest(&self) -> Value {
        let target = match &self.target {
            Target::Number(number) => json!(number),
            Target::Name(name) => json!(name),
        };
        let mut port = json!({"name": self.name, "protocol": self.protocol.name(), "port": self.port, "targetPort": target});
        if let Some(node_port) = self.node_port {
            port["nodePort"] = json!(node_port);
        }
        port
    }
}
