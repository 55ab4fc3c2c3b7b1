//! Rows of `towpathctl get` for Kubernetes objects, with kubectl's columns.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use config::control::{EndpointRow, Item, NamespaceRow, NodeRow, PodRow, ServiceRow};
use config::object::Object;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Compiler;
use super::service::is_vip;
use crate::addr::Addr;
use crate::control::facts::{
    AddressKind, Facts, HostPort, ServiceFacts, ServiceType, Skip, SliceFacts, protocol_name,
};
use crate::control::state::{Entry, State};
use crate::tables::Action;
use crate::verdict::Reason;

/// `metadata.creationTimestamp`, RFC 3339.
fn created(metadata: &ObjectMeta) -> Option<String> {
    metadata.creation_timestamp.as_ref().map(|time| time.0.to_string())
}

fn texts<'a>(addresses: impl Iterator<Item = &'a Addr>) -> Vec<String> {
    addresses.map(Addr::to_string).collect()
}

impl Compiler {
    /// A Service as a row. Frontends are those of the tables that were compiled last.
    pub fn service_row(&self, state: &State, entry: &Entry, facts: &ServiceFacts) -> ServiceRow {
        let of_kind = |kind: AddressKind| facts.addresses.iter().filter(move |address| address.kind == kind);
        let cluster_ips = match facts.skip {
            Some(Skip::Headless) => vec!["None".to_owned()],
            _ => texts(of_kind(AddressKind::Cluster).map(|address| &address.addr)),
        };
        let external = of_kind(AddressKind::LoadBalancer).chain(of_kind(AddressKind::External));
        let mut external_ips = texts(external.map(|address| &address.addr));
        let spec = match &entry.object {
            Object::Service(service) => service.spec.as_ref(),
            _ => None,
        };
        if facts.type_ == ServiceType::ExternalName {
            external_ips.extend(spec.and_then(|spec| spec.external_name.clone()));
        }
        let ports = facts.ports.iter().map(|port| {
            let node_port = port.node_port.map(|node_port| format!(":{node_port}")).unwrap_or_default();
            format!("{}{node_port}/{}", port.port, protocol_name(port.protocol))
        });
        let selector = spec.and_then(|spec| spec.selector.as_ref()).into_iter().flatten();
        let selector: Vec<_> = selector.map(|(key, value)| format!("{key}={value}")).collect();
        let compiled = self.services.get(&entry.reference);
        let frontends = compiled.map(|compiled| compiled.frontends.as_slice()).unwrap_or_default();
        let is_off = |action: &Action| matches!(action, Action::Drop(Reason::FrontendOff));
        let off = frontends.iter().filter(|(_, frontend)| is_off(&frontend.from_outside)).count();
        let slices = state.slices_of(&entry.reference.namespace, &entry.reference.name);
        let endpoints: Vec<_> = slices.flat_map(|(_, slice)| &slice.endpoints).collect();
        let ready: BTreeSet<_> =
            endpoints.iter().filter(|facts| facts.ready).map(|facts| facts.addr).collect();
        let all: BTreeSet<_> = endpoints.iter().map(|facts| facts.addr).collect();
        ServiceRow {
            namespace: entry.reference.namespace.clone(),
            name: entry.reference.name.clone(),
            type_: facts.type_.name().to_owned(),
            cluster_ips,
            external_ips,
            ports: ports.collect(),
            created: created(entry.object.metadata()),
            selector: selector.join(","),
            frontends: (frontends.len() - off) as u32,
            frontends_off: off as u32,
            endpoints_ready: ready.len() as u32,
            endpoints: all.len() as u32,
        }
    }

    /// An object as rows: a slice as one for each endpoint and port, everything else as one.
    pub fn rows(&self, state: &State, entry: &Entry) -> Vec<Item> {
        match &entry.facts {
            Facts::Service(facts) => vec![Item::Service(self.service_row(state, entry, facts))],
            Facts::Slice(facts) => {
                endpoint_rows(state, entry, facts).into_iter().map(Item::Endpoint).collect()
            }
            Facts::Node(facts) => vec![Item::Node(self.node_row(entry, facts))],
            Facts::Pod(_) => vec![Item::Pod(pod_row(entry))],
            Facts::Namespace => vec![Item::Namespace(namespace_row(entry))],
            // What came of it is among the routes.
            Facts::PodRoute(_) => Vec::new(),
        }
    }

    fn node_row(&self, entry: &Entry, facts: &crate::control::facts::NodeFacts) -> NodeRow {
        let status = match &entry.object {
            Object::Node(node) => node.status.as_ref(),
            _ => None,
        };
        let mut conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        let ready = conditions.find(|condition| condition.type_ == "Ready");
        NodeRow {
            name: entry.reference.name.clone(),
            internal_ips: texts(facts.internal_ips.iter()),
            external_ips: texts(facts.external_ips.iter()),
            pod_cidrs: facts.pod_cidrs.iter().map(|(net, _)| net.to_string()).collect(),
            zone: facts.zone.clone(),
            ready: ready.map(|condition| condition.status.clone()).unwrap_or_default(),
            this_gateway: entry.reference.name == self.gateway.gateway.name,
            overlay: facts.overlay.unwrap_or(self.gateway.overlay.default).name().to_owned(),
            created: created(entry.object.metadata()),
        }
    }

    /// How many frontends are served, and how many are switched off.
    pub fn frontend_counts(&self) -> (u64, u64) {
        let frontends = || self.services.values().flat_map(|compiled| &compiled.frontends);
        let off = frontends()
            .filter(|(_, frontend)| matches!(frontend.from_outside, Action::Drop(Reason::FrontendOff)))
            .count();
        ((frontends().count() - off) as u64, off as u64)
    }

    /// How many addresses belong to Services.
    pub fn vip_count(&self) -> usize {
        let frontends = self.services.values().flat_map(|compiled| &compiled.frontends);
        frontends
            .filter(|(_, frontend)| is_vip(frontend))
            .map(|(key, _)| key.addr)
            .collect::<BTreeSet<_>>()
            .len()
    }
}

/// Slices whose Service is unknown.
pub fn slices_waiting(state: &State) -> usize {
    state.slices().filter(|(entry, facts)| waits(state, entry, facts)).count()
}

fn waits(state: &State, entry: &Entry, facts: &SliceFacts) -> bool {
    let service = facts.service.as_deref();
    service.is_some_and(|service| state.service(&entry.reference.namespace, service).is_none())
}

/// The endpoints of a slice, one row for each of its ports; one with port 0 if it has no ports.
pub fn endpoint_rows(state: &State, entry: &Entry, facts: &SliceFacts) -> Vec<EndpointRow> {
    let waits = waits(state, entry, facts);
    let mut rows = Vec::new();
    for endpoint in &facts.endpoints {
        let row = EndpointRow {
            namespace: entry.reference.namespace.clone(),
            service: facts.service.clone().unwrap_or_default(),
            slice: entry.reference.name.clone(),
            address: endpoint.addr.to_string(),
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
            node: endpoint.node.to_string(),
            zone: endpoint.zone.to_string(),
            target: endpoint.target.clone(),
            waits,
            ..EndpointRow::default()
        };
        for port in &facts.ports {
            rows.push(EndpointRow {
                port: port.port,
                port_name: port.name.clone(),
                protocol: protocol_name(port.protocol).to_owned(),
                ..row.clone()
            });
        }
        if facts.ports.is_empty() {
            rows.push(row);
        }
    }
    rows
}

fn pod_row(entry: &Entry) -> PodRow {
    let Object::Pod(pod) = &entry.object else { return PodRow::default() };
    let status = pod.status.as_ref();
    let mut ips: Vec<String> = status
        .and_then(|status| status.pod_ips.as_ref())
        .map(|ips| ips.iter().map(|pod_ip| pod_ip.ip.clone()).collect())
        .unwrap_or_default();
    if ips.is_empty() {
        ips.extend(status.and_then(|status| status.pod_ip.clone()));
    }
    PodRow {
        namespace: entry.reference.namespace.clone(),
        name: entry.reference.name.clone(),
        ips,
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        host_network: pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false),
        host_ports: host_ports(entry),
        phase: status.and_then(|status| status.phase.clone()).unwrap_or_default(),
        created: created(&pod.metadata),
    }
}

/// Host ports of a Pod, as `docker ps` and `podman ps` write them.
fn host_ports(entry: &Entry) -> Vec<String> {
    let Facts::Pod(pod) = &entry.facts else { return Vec::new() };
    let text = |port: &HostPort| {
        let HostPort { host_port, container_port, .. } = port;
        let target = format!("{container_port}/{}", protocol_name(port.protocol));
        match port.host_ip {
            Some(ip) => format!("{}->{target}", SocketAddr::new(ip, *host_port)),
            None => format!("{host_port}->{target}"),
        }
    };
    pod.host_ports.iter().map(text).collect()
}

fn namespace_row(entry: &Entry) -> NamespaceRow {
    let Object::Namespace(namespace) = &entry.object else { return NamespaceRow::default() };
    let phase = namespace.status.as_ref().and_then(|status| status.phase.clone());
    NamespaceRow {
        name: entry.reference.name.clone(),
        phase: phase.unwrap_or_else(|| "Active".to_owned()),
        labels: namespace.metadata.labels.clone().unwrap_or_default(),
        created: created(&namespace.metadata),
    }
}
