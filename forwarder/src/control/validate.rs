//! What an object may not do to others: claim what somebody else has, or capture what is not a Service's.
//!
//! What is wrong with an object by itself is found when its [facts](super::facts) are read. Here every object of a change
//! is judged against all accepted ones, after the whole change is applied; each conflict names both objects.

use std::net::IpAddr;

use config::control::{Kind, ObjectRef};
use config::fault::{Code, Fault};
use config::gateway::{Gateway, OverlayKind};
use ipnet::IpNet;

use super::address::host_net;
use super::facts::{
    AddressKind, Facts, HostPort, NodeFacts, PodFacts, PodRouteFacts, PortFacts, ServiceAddress,
    ServiceFacts, Skip, SliceFacts, protocol_name,
};
use super::state::{Claim, Entry, State};
use crate::addr::{Addr, protocol};

/// What the gateway allows.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The gateway file.
    pub gateway: &'a Gateway,
    /// Addresses of the gateway's ports.
    pub own: &'a [Addr],
}

impl Rules<'_> {
    /// True if `addr` is an address of the gateway itself.
    pub fn is_own(&self, addr: Addr) -> bool {
        let given = self.gateway.masquerade_addresses().chain(self.gateway.overlay.addresses.iter().copied());
        self.own.contains(&addr) || given.into_iter().any(|own| Addr::from(own) == addr)
    }
}

/// What is wrong with an object of a change; the faults do not name the object yet.
#[derive(Debug, Default)]
pub struct Judgement {
    /// The object must not be accepted.
    pub faults: Vec<Fault>,
    /// Addresses of a Service that may not be served here. They would do no harm, since they are never served, but
    /// whoever applies them must be told.
    pub barred: Vec<Fault>,
    /// Accepted, but worth a look.
    pub warnings: Vec<Fault>,
}

/// Judges one object of a change.
pub fn judge(state: &State, rules: &Rules<'_>, entry: &Entry) -> Judgement {
    let mut judge = Judge { state, rules, me: &entry.reference, found: Judgement::default() };
    match &entry.facts {
        Facts::Namespace => {}
        Facts::Node(node) => judge.node(node),
        Facts::Pod(pod) => judge.pod(pod),
        Facts::Service(service) => judge.service(service),
        Facts::Slice(slice) => judge.slice(slice),
        Facts::PodRoute(route) => judge.pod_route(route),
    }
    judge.found
}

/// Why an address of a Service may not be served on this gateway; `None` if it may. (CVE-2020-8554: whoever may write a
/// Service must not capture what belongs to others.)
pub fn forbidden(state: &State, rules: &Rules<'_>, address: &ServiceAddress) -> Option<Fault> {
    let fault = |code, message: String, remedy: &str| {
        Some(Fault::new(code, message).field(&address.field).value(address.addr).remedy(remedy))
    };
    let section = &rules.gateway.gateway;
    let ip = IpAddr::from(address.addr);
    let within = |nets: &[IpNet]| nets.iter().find(|net| net.contains(&ip)).copied();
    if rules.is_own(address.addr) {
        return fault(
            Code::Conflict,
            "is an address of this gateway".into(),
            "give the Service an address of its own",
        );
    }
    if let Some(node) = state.claims().of(Claim::NodeAddress(address.addr)).next() {
        return fault(
            Code::Conflict,
            format!("is an address of {node}"),
            "give the Service an address of its own",
        );
    }
    if let Some(pod) = state.claims().of(Claim::PodAddress(address.addr)).next() {
        return fault(
            Code::Conflict,
            format!("is the address of {pod}"),
            "give the Service an address of its own",
        );
    }
    if let Some((net, node)) = state.claims().pod_cidrs_overlapping(host_net(ip)).next() {
        let message = format!("lies in the podCIDR {net} of {node}");
        return fault(Code::Conflict, message, "give the Service an address that is not a pod's");
    }
    if let Some(net) = within(&section.cluster_cidrs) {
        let message = format!("lies in cluster_cidrs ({net}) of the gateway file");
        return fault(Code::Conflict, message, "give the Service an address that is not a pod's");
    }
    let in_service_range = within(&section.service_cidrs);
    match address.kind {
        AddressKind::Cluster => None,
        _ if in_service_range.is_some() => {
            let message = "lies in service_cidrs of the gateway file, where only ClusterIPs are";
            fault(Code::Conflict, message.into(), "give the load balancer a range of its own")
        }
        AddressKind::LoadBalancer
            if !section.load_balancer_cidrs.is_empty() && within(&section.load_balancer_cidrs).is_none() =>
        {
            let remedy = "use an address inside, or add its range to [gateway] load_balancer_cidrs";
            fault(Code::Invalid, "lies outside load_balancer_cidrs of the gateway file".into(), remedy)
        }
        AddressKind::External if within(&section.external_ip_cidrs).is_none() => {
            let remedy =
                "add its range to [gateway] external_ip_cidrs if its users are trusted (CVE-2020-8554)";
            fault(Code::Ignored, "not in external_ip_cidrs of the gateway file: not served".into(), remedy)
        }
        _ => None,
    }
}

struct Judge<'a> {
    state: &'a State,
    rules: &'a Rules<'a>,
    me: &'a ObjectRef,
    found: Judgement,
}

impl Judge<'_> {
    fn conflict(&mut self, field: &str, value: impl std::fmt::Display, message: String, remedy: &str) {
        self.found.faults.push(Fault::new(Code::Conflict, message).field(field).value(value).remedy(remedy));
    }

    fn service(&mut self, service: &ServiceFacts) {
        match service.skip {
            Some(Skip::NoClusterIp) => {
                let fault = Fault::new(Code::Ignored, "empty: the Service is kept but not served");
                let remedy = "apply the Service as `kubectl get -o yaml` prints it, or give it a clusterIP";
                self.found.warnings.push(fault.field("spec.clusterIP").remedy(remedy));
                return;
            }
            Some(_) => return,
            None => {}
        }
        for address in &service.addresses {
            match forbidden(self.state, self.rules, address) {
                Some(fault) if fault.code == Code::Ignored => self.found.warnings.push(fault),
                Some(fault) => self.found.barred.push(fault),
                None => {}
            }
            let section = &self.rules.gateway.gateway;
            let ip = IpAddr::from(address.addr);
            let of_family = |net: &&IpNet| net.addr().is_ipv4() == ip.is_ipv4();
            let mut ranges = section.service_cidrs.iter().filter(of_family).peekable();
            if address.kind == AddressKind::Cluster
                && ranges.peek().is_some()
                && !ranges.any(|net| net.contains(&ip))
            {
                let message = "lies outside service_cidrs of the gateway file; served, but its neighbors are not protected";
                let fault = Fault::new(Code::Invalid, message).field(&address.field).value(address.addr);
                self.found
                    .warnings
                    .push(fault.remedy("add the cluster's Service range to [gateway] service_cidrs"));
            }
            if let Some(slice) = self.state.claims().of(Claim::EndpointAddress(address.addr)).next() {
                let message = format!("is the address of an endpoint in {slice}");
                self.conflict(&address.field, address.addr, message, "a Service cannot be its own endpoint");
            }
            self.shared_address(address, service);
        }
        for (index, port) in service.ports.iter().enumerate() {
            if let Some(node_port) = port.node_port {
                self.node_port(&format!("spec.ports[{index}].nodePort"), node_port, port.protocol);
            }
        }
        if let Some(port) = service.health_check_node_port {
            self.health_check_node_port(port, service);
        }
    }

    fn node_port(&mut self, field: &str, port: u16, number: u8) {
        for other in self.state.claims().of(Claim::HostPort(port, number)) {
            if self.state.pod(other).is_some_and(|pod| pod.is_on(&self.rules.gateway.gateway.name)) {
                let value = format!("{port}/{}", protocol_name(number));
                let message = format!("is a host port of {other} on this node");
                return self.conflict(field, value, message, "give one of the two another port");
            }
        }
        self.local_port(field, port, number);
    }

    /// A hostPort of a Pod on our own node, which no other Pod there may have at the same address, and no Service at any.
    fn host_port(&mut self, port: &HostPort) {
        let node = &self.rules.gateway.gateway.name;
        let value = format!("{}/{}", port.host_port, protocol_name(port.protocol));
        for other in self.state.claims().of(Claim::HostPort(port.host_port, port.protocol)) {
            let overlaps =
                |pod: &PodFacts| pod.is_on(node) && pod.host_ports.iter().any(|own| own.overlaps(port));
            if **other != *self.me && self.state.pod(other).is_some_and(overlaps) {
                let message = format!("is taken by {other} on this node");
                let remedy = "give one of the two another port or hostIP, or run it on another node";
                return self.conflict(&port.field, value, message, remedy);
            }
        }
        self.local_port(&port.field, port.host_port, port.protocol);
    }

    /// A port of the gateway's own addresses.
    fn local_port(&mut self, field: &str, port: u16, number: u8) {
        if let Some(other) = self.state.claims().other(Claim::NodePort(port, number), self.me) {
            let value = format!("{port}/{}", protocol_name(number));
            let message = format!("is taken by {other}");
            self.conflict(field, value, message, "give one of the two another port");
        }
        let range = self.rules.gateway.snat.ports;
        if range.contains(port) {
            let message = format!("lies in the gateway's masquerade ports {range}");
            self.conflict(field, port, message, "choose another port, or move [snat] ports");
        }
        let own = self.rules.gateway.health.listen.0.map(|listen| listen.port());
        if number == protocol::TCP && own == Some(port) {
            let message = "is the port of the gateway's own health server".into();
            self.conflict(field, port, message, "choose another port, or move [health] listen");
        }
    }

    /// The gateway itself listens there, which it cannot where a NodePort is served.
    fn health_check_node_port(&mut self, port: u16, service: &ServiceFacts) {
        let field = "spec.healthCheckNodePort";
        self.node_port(field, port, protocol::TCP);
        let is_node_port = |own: &PortFacts| own.node_port == Some(port) && own.protocol == protocol::TCP;
        if service.ports.iter().any(is_node_port) {
            self.conflict(field, port, "is a nodePort of the Service".into(), "choose another port");
        }
    }

    fn slice(&mut self, slice: &SliceFacts) {
        if let Some(service) = &slice.service
            && self.state.service(&self.me.namespace, service).is_none()
        {
            let message = "no such Service yet: the slice is kept and waits for it";
            let field = "metadata.labels.kubernetes.io/service-name";
            let fault = Fault::new(Code::Ignored, message).field(field).value(service);
            self.found.warnings.push(fault.remedy("apply the Service too"));
        }
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            let field = format!("endpoints[{index}].addresses[0]");
            if let Some(service) = self.state.claims().of(Claim::Vip(endpoint.addr)).next() {
                let message = format!("is an address of {service}: packets would come back forever");
                self.conflict(&field, endpoint.addr, message, "give the address of a pod");
            } else if self.rules.is_own(endpoint.addr) {
                // Like a DaemonSet with hostNetwork: it is right in the cluster, and the others of its slice are served.
                let message = "is an address of this gateway: connections to it are not passed to it";
                let fault = Fault::new(Code::Ignored, message).field(&field).value(endpoint.addr);
                self.found.warnings.push(fault.remedy("run its pod on another node as well"));
            }
        }
    }

    fn node(&mut self, node: &NodeFacts) {
        let overlay = &self.rules.gateway.overlay;
        if node.overlay.unwrap_or(overlay.default) == OverlayKind::Vxlan
            && node.vxlan_mac.or(overlay.mac).is_none()
            && !node.pod_cidrs.is_empty()
            && self.me.name != self.rules.gateway.gateway.name
        {
            let message =
                "missing, and without it the node's VXLAN device takes no packet: its pods are not reached";
            let fault =
                Fault::new(Code::Ignored, message).field("metadata.annotations.towpath.dev/vxlan-mac");
            let remedy = "annotate the Node with the address that `ip link` shows of the device, or set overlay.mac in the gateway file";
            self.found.warnings.push(fault.remedy(remedy));
        }
        for (index, (net, field)) in node.pod_cidrs.iter().enumerate() {
            // A PodRoute may say otherwise of some pods of a Node.
            let other = self
                .state
                .claims()
                .pod_cidrs_overlapping(*net)
                .find(|(_, owner)| owner.kind == Kind::Node && ***owner != *self.me);
            if let Some((range, other)) = other {
                let message = format!("overlaps the podCIDR {range} of {other}");
                self.conflict(field, net, message, "give each Node podCIDRs of its own");
            }
            if let Some((range, _)) = node.pod_cidrs[..index].iter().find(|(range, _)| overlap(range, net)) {
                self.conflict(field, net, format!("overlaps {range} of the same Node"), "remove one of them");
            }
            self.pod_range(field, *net);
        }
        for addr in node.addresses() {
            if let Some(other) = self.state.claims().other(Claim::NodeAddress(addr), self.me) {
                let message = format!("is an address of {other} too");
                self.conflict("status.addresses", addr, message, "give each Node addresses of its own");
            }
            self.not_a_service("status.addresses", addr, "give the Node or the Service another address");
        }
    }

    fn pod_route(&mut self, route: &PodRouteFacts) {
        let Some((net, via)) = route.route else { return };
        let others = self.state.claims().of(Claim::PodCidr(net));
        let mut others = others.filter(|owner| owner.kind == Kind::PodRoute && ***owner != *self.me);
        if let Some(other) = others.next() {
            let message = format!("is the prefix of {other} too");
            self.conflict("spec.prefix", net, message, "delete one of the two");
        }
        self.pod_range("spec.prefix", net);
        if net.contains(&IpAddr::from(via)) {
            let remedy = "give the InternalIP of the node, or the address of a router";
            self.conflict("spec.via", via, format!("lies in {net} itself"), remedy);
        }
        self.not_a_service("spec.via", via, "give the InternalIP of the node, or the address of a router");
    }

    /// A range of pods, which no Service may be in.
    fn pod_range(&mut self, field: &str, net: IpNet) {
        if let Some((addr, service)) = self.state.claims().vips_within(net).next() {
            let message = format!("holds {addr}, an address of {service}");
            self.conflict(field, net, message, "give the Service or the pods other addresses");
        }
        let section = &self.rules.gateway.gateway;
        for (name, ranges) in
            [("service_cidrs", &section.service_cidrs), ("load_balancer_cidrs", &section.load_balancer_cidrs)]
        {
            if let Some(range) = ranges.iter().find(|range| overlap(range, &net)) {
                let message = format!("overlaps {name} ({range}) of the gateway file");
                let remedy = "ranges of pods, Services and load balancers must be disjoint";
                self.conflict(field, net, message, remedy);
            }
        }
    }

    fn pod(&mut self, pod: &PodFacts) {
        if pod.host_network {
            return;
        }
        for (addr, field) in &pod.addresses {
            if let Some(other) = self.state.claims().other(Claim::PodAddress(*addr), self.me) {
                let message = format!("is the address of {other} too");
                self.conflict(
                    field,
                    addr,
                    message,
                    "delete the one that is gone; hostNetwork pods must say hostNetwork",
                );
            }
            self.not_a_service(field, *addr, "give the Pod or the Service another address");
        }
        if pod.is_on(&self.rules.gateway.gateway.name) {
            pod.host_ports.iter().for_each(|port| self.host_port(port));
        }
    }

    /// A ClusterIP belongs to one Service. Addresses of load balancers and externalIPs may be shared, port by port.
    fn shared_address(&mut self, address: &ServiceAddress, service: &ServiceFacts) {
        let claims = self.state.claims();
        let ServiceAddress { addr, kind, field } = address;
        if let Some(other) = claims.other(Claim::ClusterIp(*addr), self.me) {
            let message = format!("is the ClusterIP of {other}");
            return self.conflict(field, addr, message, "give each Service a ClusterIP of its own");
        }
        if *kind == AddressKind::Cluster
            && let Some(other) = claims.other(Claim::Vip(*addr), self.me)
        {
            let message = format!("is an address of {other}");
            return self.conflict(field, addr, message, "give each Service a ClusterIP of its own");
        }
        for port in &service.ports {
            if let Some(other) = claims.other(Claim::Frontend(*addr, port.port, port.protocol), self.me) {
                let value = format!("{addr} port {}/{}", port.port, protocol_name(port.protocol));
                let message = format!("is taken by {other}");
                self.conflict(field, value, message, "give one of the two another address or port");
            }
        }
    }

    fn not_a_service(&mut self, field: &str, addr: Addr, remedy: &str) {
        if let Some(service) = self.state.claims().of(Claim::Vip(addr)).next() {
            self.conflict(field, addr, format!("is an address of {service}"), remedy);
        }
    }
}

/// True if the prefixes have an address in common.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests;
