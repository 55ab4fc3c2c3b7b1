//! One Service to its frontends.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use config::control::ObjectRef;
use config::gateway::Algorithm;
use ipnet::IpNet;

use super::Compiler;
use super::cleanup::NodePort;
use super::endpoints::{EndpointInfo, PortKey, merge};
use super::frontends::{Outcome, Policy, Ruling, keeps_client, rule};
use super::health::ServiceHealth;
use super::lifetime::{Lifetime, Removal};
use super::overflow::Unmasqueraded;
use super::topology::{Categories, Place, categorize};
use crate::addr::{Addr, protocol};
use crate::control::facts::{AddressKind, PortFacts, ServiceAddress, ServiceFacts};
use crate::control::state::State;
use crate::control::validate::forbidden;
use crate::table::spread::Spread;
use crate::tables::{
    Action, Backends, Endpoint, EndpointKey, Frontend, FrontendKey, FrontendKind, Origin, ServicePort,
};

/// Endpoints by address and port.
pub type Destinations = BTreeSet<(Addr, u16)>;

/// What became of one Service, or of the host ports of one Pod.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Its frontends.
    pub frontends: Vec<(FrontendKey, Arc<Frontend>)>,
    /// Lists of endpoints in use, to be used again when they have not changed.
    pub(super) backends: Vec<(u64, Arc<Backends>)>,
    /// For each UDP frontend the (address, port) of every endpoint that serves, ready or not.
    pub udp_serving: Vec<(FrontendKey, Arc<Destinations>)>,
    /// What the health server tells of it.
    pub(super) health: ServiceHealth,
    /// The same for each UDP NodePort.
    pub(super) udp_node_ports: Vec<(NodePort, Arc<Destinations>)>,
    /// Which endpoints of each port keep their connections, by stable id of the port.
    pub(super) lifetimes: Vec<(u64, Lifetime)>,
    /// Ids of its ports, by stable id.
    pub(super) ids: Vec<(u64, u32)>,
    /// Every endpoint of its ports, used or not.
    pub endpoints: BTreeSet<EndpointKey>,
    /// Frontends whose connections may go on without a flow.
    pub unmasqueraded: Vec<Unmasqueraded>,
}

impl Compiled {
    /// A port that is gone or has another name leaves connections behind whose endpoint may still be one of the Service.
    fn keep_ports_that_are_gone(&mut self, old: &Compiled, removal: Removal) {
        if removal.after_s().is_none() {
            return;
        }
        let staying: Destinations =
            self.lifetimes.iter().flat_map(|(_, lifetime)| lifetime.staying.iter().copied()).collect();
        let staying = Arc::new(staying);
        for (id, _) in &old.lifetimes {
            if !self.lifetimes.iter().any(|(known, _)| known == id) {
                self.lifetimes.push((*id, Lifetime { removal, staying: staying.clone() }));
            }
        }
    }
}

/// One port of a Service for one family, with its endpoints sorted into lists.
#[derive(Debug)]
pub(super) struct FamilyPort<'a> {
    pub(super) port: &'a PortFacts,
    pub(super) is_v4: bool,
    pub(super) endpoints: Vec<EndpointInfo>,
    pub(super) lists: Categories,
}

impl FamilyPort<'_> {
    /// Its endpoints that serve, whatever else they are.
    pub(super) fn serving(&self) -> Destinations {
        let serving = self.endpoints.iter().filter(|info| info.serving);
        serving.map(|info| (info.endpoint.addr, info.endpoint.port)).collect()
    }

    /// What its endpoints are known by, in their order.
    pub(super) fn keys(&self) -> impl Iterator<Item = EndpointKey> {
        let protocol = self.port.protocol;
        let key = move |info: &EndpointInfo| EndpointKey {
            addr: info.endpoint.addr,
            port: info.endpoint.port,
            protocol,
        };
        self.endpoints.iter().map(key)
    }
}

/// One frontend before it has rulings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claimed<'a> {
    pub(super) key: FrontendKey,
    pub(super) kind: FrontendKind,
    pub(super) port: &'a PortFacts,
}

/// True if the address of a frontend belongs to the Service alone; that of a NodePort or a host port is the gateway's.
pub(super) fn is_vip(frontend: &Frontend) -> bool {
    !matches!(frontend.kind, FrontendKind::NodePort | FrontendKind::HostPort)
}

impl Compiler {
    /// Compiles one Service; `None` if it does not exist or is not served.
    pub(super) fn compile_service(&mut self, state: &State, reference: &ObjectRef) -> Option<Compiled> {
        let (entry, facts) = state.service(&reference.namespace, &reference.name)?;
        if facts.skip.is_some() {
            return None;
        }
        let old = self.services.get(reference).cloned().unwrap_or_default();
        let mut compiled = Compiled::default();
        let policy = Policy::of(&self.gateway);
        let mut ports = Vec::new();
        for port in &facts.ports {
            let stable_id = stable_id(reference, port);
            let id = self.id_of_port(&old, stable_id);
            compiled.ids.push((stable_id, id));
            ports.push(Arc::new(ServicePort {
                id,
                stable_id,
                namespace: reference.namespace.clone(),
                name: reference.name.clone(),
                port_name: port.name.clone(),
                resource_version: entry.resource_version().to_owned(),
                affinity_timeout_s: facts.affinity_timeout_s,
            }));
        }
        let mut families = self.family_ports(state, reference, facts);
        compiled.endpoints = self.assign_tallies(&mut families);
        compiled.health = self.service_health(facts, &families);
        let removal = Removal::of(facts, &self.gateway);
        for port in &facts.ports {
            let of_port = || families.iter().filter(|family| family.port == port);
            let service = stable_id(reference, port);
            let lifetime = Lifetime::new(removal, of_port().flat_map(|family| &family.endpoints));
            compiled.lifetimes.push((service, lifetime));
            let node_port = port.node_port.filter(|_| port.protocol == protocol::UDP);
            compiled.udp_node_ports.extend(of_port().filter_map(|family| {
                let key = NodePort { service, port: node_port?, is_v4: family.is_v4 };
                Some((key, Arc::new(family.serving())))
            }));
        }
        compiled.keep_ports_that_are_gone(&old, removal);
        let mut builder = Builder {
            key: self.key,
            algorithm: self.algorithm(facts),
            old: &old.backends,
            backends: &mut compiled.backends,
        };
        for claimed in self.claimed(state, facts) {
            let is_v4 = claimed.key.addr.is_v4();
            let Some(family) =
                families.iter().find(|family| family.is_v4 == is_v4 && family.port == claimed.port)
            else {
                continue;
            };
            let index = facts.ports.iter().position(|port| port == claimed.port).unwrap_or_default();
            let service = &ports[index];
            let mut action = |origin| {
                let Ruling { outcome, .. } = rule(claimed.kind, origin, facts, &family.lists, policy);
                builder.action(service.stable_id, outcome, &family.endpoints)
            };
            let frontend = Frontend {
                service: service.clone(),
                kind: claimed.kind,
                from_outside: action(Origin::Outside),
                from_pod: action(Origin::Pod),
                from_node: action(Origin::Node),
                source_ranges: self.source_ranges(facts, claimed.kind, claimed.key.addr),
            };
            compiled.frontends.push((claimed.key, Arc::new(frontend)));
            if keeps_client(claimed.kind, facts, policy) && facts.affinity_timeout_s.is_none() {
                compiled.unmasqueraded.push((claimed.key, Arc::new(family.keys().collect())));
            }
            if claimed.key.protocol == protocol::UDP {
                compiled.udp_serving.push((claimed.key, Arc::new(family.serving())));
            }
        }
        Some(compiled)
    }

    /// The id of a port: the one that it has had, or a new one.
    pub(super) fn id_of_port(&mut self, old: &Compiled, stable_id: u64) -> u32 {
        let known = old.ids.iter().find(|(known, _)| *known == stable_id).map(|(_, id)| *id);
        known.unwrap_or_else(|| {
            self.next_id += 1;
            self.next_id - 1
        })
    }

    /// How new connections of a Service are spread.
    pub(super) fn algorithm(&self, facts: &ServiceFacts) -> Algorithm {
        facts.algorithm.unwrap_or(self.gateway.gateway.lb_algorithm)
    }

    /// Gives each endpoint the number that its connections are counted under; returns them all.
    pub(super) fn assign_tallies(&mut self, families: &mut [FamilyPort<'_>]) -> BTreeSet<EndpointKey> {
        let all: BTreeSet<EndpointKey> = families.iter().flat_map(FamilyPort::keys).collect();
        let services = &self.services;
        for family in families {
            let keys: Vec<_> = family.keys().collect();
            for (info, key) in family.endpoints.iter_mut().zip(keys) {
                let in_use = || {
                    let others = services.values().flat_map(|compiled| &compiled.endpoints).copied();
                    others.chain(all.iter().copied()).collect()
                };
                info.endpoint.tally = self.tallies.assign(key, in_use);
            }
        }
        all
    }

    /// Sorts the endpoints of each port, but for those at the gateway's own addresses, for each family that the Service has a ClusterIP of: a Service does not exist
    /// in other families (kubernetes pkg/proxy/servicechangetracker.go).
    pub(super) fn family_ports<'a>(
        &self,
        state: &State,
        reference: &ObjectRef,
        facts: &'a ServiceFacts,
    ) -> Vec<FamilyPort<'a>> {
        let node = self.gateway.gateway.name.as_str();
        let place = Place { node, zone: &self.surroundings.zone };
        let mut families = Vec::new();
        for is_v4 in [true, false] {
            if !has_family(facts, is_v4) {
                continue;
            }
            for port in &facts.ports {
                let slices = state.slices_of(&reference.namespace, &reference.name).map(|(_, slice)| slice);
                let key = PortKey { name: &port.name, protocol: port.protocol };
                let pod_weight = |name: &str| self.pod_weights.get(name).copied();
                let mut endpoints = merge(slices, key, is_v4, node, pod_weight);
                endpoints.retain(|info| !self.surroundings.own.contains(&info.endpoint.addr));
                let lists = categorize(&endpoints, place, |node| self.surroundings.excluded.contains(node));
                families.push(FamilyPort { port, is_v4, endpoints, lists });
            }
        }
        families
    }

    /// Every (address, protocol, port) that the Service is served on here, each once.
    pub(super) fn claimed<'a>(&self, state: &State, facts: &'a ServiceFacts) -> Vec<Claimed<'a>> {
        let mut addresses: Vec<(Addr, FrontendKind)> = Vec::new();
        let mut served: Vec<&ServiceAddress> = facts
            .addresses
            .iter()
            .filter(|address| self.why_not_served(state, facts, address).is_none())
            .collect();
        // An address that is a load balancer's and an externalIP at once keeps the source ranges of the former.
        served.sort_by_key(|address| address.kind);
        for address in served {
            if !addresses.iter().any(|(addr, _)| *addr == address.addr) {
                addresses.push((address.addr, frontend_kind(address.kind)));
            }
        }
        let key = |addr, port, protocol| FrontendKey { addr, port, protocol };
        let mut claimed = Vec::new();
        for port in &facts.ports {
            for (addr, kind) in &addresses {
                claimed.push(Claimed { key: key(*addr, port.port, port.protocol), kind: *kind, port });
            }
            for addr in
                self.surroundings.node_port_addresses.iter().filter(|addr| has_family(facts, addr.is_v4()))
            {
                let Some(node_port) = port.node_port else { continue };
                let key = key(*addr, node_port, port.protocol);
                claimed.push(Claimed { key, kind: FrontendKind::NodePort, port });
            }
        }
        claimed
    }

    /// Why an address of a Service is not served here, in a sentence; `None` if it is.
    pub(super) fn why_not_served(
        &self,
        state: &State,
        facts: &ServiceFacts,
        address: &ServiceAddress,
    ) -> Option<String> {
        if !has_family(facts, address.addr.is_v4()) {
            let family = if address.addr.is_v4() { "IPv4" } else { "IPv6" };
            return Some(format!("the Service has no ClusterIP of family {family}"));
        }
        forbidden(state, &self.rules(), address).map(|fault| fault.message)
    }

    /// `spec.loadBalancerSourceRanges` of the family of `addr`: for load balancer addresses only. If one of the
    /// gateway's own addresses is inside, so is the load balancer address itself (kubernetes nftables proxier: packets
    /// of a node to the address may have it as their source).
    pub(super) fn source_ranges(&self, facts: &ServiceFacts, kind: FrontendKind, addr: Addr) -> Arc<[IpNet]> {
        if kind != FrontendKind::LoadBalancer {
            return Arc::new([]);
        }
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == addr.is_v4();
        let mut ranges: Vec<IpNet> = facts.source_ranges.iter().filter(of_family).copied().collect();
        let holds_own =
            |net: &IpNet| self.surroundings.own.iter().any(|own| net.contains(&IpAddr::from(*own)));
        if ranges.iter().any(holds_own) {
            ranges.push(IpNet::from(IpAddr::from(addr)));
        }
        ranges.into()
    }
}

fn has_family(facts: &ServiceFacts, is_v4: bool) -> bool {
    facts
        .addresses
        .iter()
        .any(|address| address.kind == AddressKind::Cluster && address.addr.is_v4() == is_v4)
}

pub(super) fn frontend_kind(kind: AddressKind) -> FrontendKind {
    match kind {
        AddressKind::Cluster => FrontendKind::ClusterIp,
        AddressKind::LoadBalancer => FrontendKind::LoadBalancer,
        AddressKind::External => FrontendKind::ExternalIp,
    }
}

/// Turns rulings into actions; equal lists of a port become one Maglev table.
pub(super) struct Builder<'b> {
    pub(super) key: u64,
    pub(super) algorithm: Algorithm,
    pub(super) old: &'b [(u64, Arc<Backends>)],
    pub(super) backends: &'b mut Vec<(u64, Arc<Backends>)>,
}

impl Builder<'_> {
    pub(super) fn action(
        &mut self,
        stable_id: u64,
        outcome: Outcome<'_>,
        endpoints: &[EndpointInfo],
    ) -> Action {
        match outcome {
            Outcome::Reject(reason) => Action::Reject(reason),
            Outcome::Drop(reason) => Action::Drop(reason),
            Outcome::Dnat { chosen, masquerade } => {
                // Slots of the Maglev table have 16 bits.
                let indexes = chosen.indexes.iter().take(usize::from(u16::MAX));
                let endpoints: Vec<Endpoint> =
                    indexes.map(|index| endpoints[*index].endpoint.clone()).collect();
                Action::Dnat { backends: self.backends(stable_id, endpoints), masquerade, list: chosen.list }
            }
        }
    }

    fn backends(&mut self, stable_id: u64, endpoints: Vec<Endpoint>) -> Arc<Backends> {
        let known = |(id, backends): &&(u64, Arc<Backends>)| {
            *id == stable_id
                && backends.endpoints == endpoints
                && backends.spread.algorithm() == self.algorithm
        };
        if let Some((_, backends)) = self.backends.iter().find(known) {
            return backends.clone();
        }
        let backends = match self.old.iter().find(known) {
            Some((_, backends)) => backends.clone(),
            None => {
                let weighed: Vec<(u64, u32)> = endpoints
                    .iter()
                    .map(|endpoint| (endpoint_hash(endpoint), endpoint.weight.into()))
                    .collect();
                let spread = Spread::build(self.algorithm, self.key ^ stable_id, &weighed);
                Arc::new(Backends { endpoints, spread })
            }
        };
        self.backends.push((stable_id, backends.clone()));
        backends
    }
}

/// The same for an endpoint on every gateway and over restarts.
fn endpoint_hash(endpoint: &Endpoint) -> u64 {
    stable_hash(&[&endpoint.addr.0.to_be_bytes(), &endpoint.port.to_be_bytes()])
}

/// The same for a port of a Service on every gateway and over restarts: what flows remember.
pub fn stable_id(service: &ObjectRef, port: &PortFacts) -> u64 {
    stable_hash(&[
        service.namespace.as_bytes(),
        service.name.as_bytes(),
        port.name.as_bytes(),
        &[port.protocol],
    ])
}

/// FNV-1a of the parts, each with its length, finished as MurmurHash3 is so that every bit depends on every byte.
/// Part of what gateways agree on: it may not change.
pub(super) fn stable_hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    for part in parts {
        (part.len() as u32).to_be_bytes().into_iter().for_each(&mut eat);
        part.iter().copied().for_each(&mut eat);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::Kind;

    #[test]
    fn stable_ids_differ_and_never_change() {
        let reference = |namespace: &str, name: &str| ObjectRef {
            kind: Kind::Service,
            namespace: namespace.into(),
            name: name.into(),
        };
        let port =
            |name: &str, protocol| PortFacts { name: name.into(), protocol, port: 80, node_port: None };
        let ids = [
            stable_id(&reference("default", "web"), &port("http", 6)),
            stable_id(&reference("default", "web"), &port("http", 17)),
            stable_id(&reference("default", "web"), &port("https", 6)),
            stable_id(&reference("defaultw", "eb"), &port("http", 6)),
        ];
        let different: BTreeSet<_> = ids.iter().collect();
        assert_eq!(different.len(), 4);
        // Other gateways and flows of the past remember this number.
        assert_eq!(ids[0], stable_hash(&[b"default", b"web", b"http", &[6]]));
        assert_eq!(stable_hash(&[]), 0xefd0_1f60_ba99_2926);
    }
}
