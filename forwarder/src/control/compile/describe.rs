//! Everything about one Service: what is served and by which rule, which endpoints are used, and why the others are not.

use std::net::IpAddr;

use config::control::{
    ActionDescription, EndpointDescription, EndpointRow, FrontendDescription, ServiceDescription,
};
use config::fault::{Code, Fault};
use config::gateway::LocalPolicy;

use super::Compiler;
use super::endpoints::EndpointInfo;
use super::frontends::{Outcome, Policy, Ruling, rule};
use super::lifetime::Removal;
use super::rows::endpoint_rows;
use super::service::{Claimed, FamilyPort};
use super::topology::{Chosen, Place, TopologyMode, is_near};
use crate::control::facts::{Distribution, ServiceFacts, protocol_name, protocol_number};
use crate::control::state::State;
use crate::table::flow_map::FlowMap;
use crate::tables::{EndpointKey, FrontendKind, List, Origin};
use crate::verdict::Reason;

/// The word for a list in output.
pub fn list_name(list: List) -> &'static str {
    match list {
        List::Cluster => "cluster",
        List::ClusterTerminating => "cluster-terminating",
        List::Local => "local",
        List::LocalTerminating => "local-terminating",
    }
}

/// The word for a kind of frontend in output.
pub fn kind_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::HostPort => "HostPort",
    }
}

impl Compiler {
    /// Describes a Service; `None` if there is none of that name.
    pub fn describe_service(&self, state: &State, namespace: &str, name: &str) -> Option<ServiceDescription> {
        let (entry, facts) = state.service(namespace, name)?;
        let distribution = match facts.distribution {
            Distribution::Everywhere => "",
            Distribution::PreferSameZone => "PreferSameZone",
            Distribution::PreferSameNode => "PreferSameNode",
        };
        let mut description = ServiceDescription {
            service: self.service_row(state, entry, facts),
            resource_version: entry.resource_version().to_owned(),
            internal_traffic_policy: policy_name(facts.internal_local).to_owned(),
            external_traffic_policy: if facts.is_external() { policy_name(facts.external_local) } else { "" }
                .to_owned(),
            session_affinity: match facts.affinity_timeout_s {
                Some(seconds) => format!("ClientIP ({seconds} s)"),
                None => "None".to_owned(),
            },
            traffic_distribution: distribution.to_owned(),
            lb_algorithm: self.algorithm(facts).name().to_owned(),
            on_endpoint_removed: Removal::of(facts, &self.gateway).describe(),
            skipped: facts.skip.map(|skip| skip.reason().to_owned()),
            ..ServiceDescription::default()
        };
        let families = self.family_ports(state, &entry.reference, facts);
        if facts.skip.is_none() {
            let policy = Policy::of(&self.gateway);
            for claimed in self.claimed(state, facts) {
                let is_v4 = claimed.key.addr.is_v4();
                let family =
                    families.iter().find(|family| family.is_v4 == is_v4 && family.port == claimed.port);
                description
                    .frontends
                    .extend(family.map(|family| self.frontend(facts, claimed, family, policy)));
            }
            self.warn(state, facts, &mut description);
        }
        for (slice, slice_facts) in state.slices_of(namespace, name) {
            for row in endpoint_rows(state, slice, slice_facts) {
                description.endpoints.push(self.endpoint(facts, &families, row));
            }
        }
        Some(description)
    }

    fn frontend(
        &self,
        facts: &ServiceFacts,
        claimed: Claimed<'_>,
        family: &FamilyPort<'_>,
        policy: Policy,
    ) -> FrontendDescription {
        let action = |origin| describe_action(rule(claimed.kind, origin, facts, &family.lists, policy));
        let ranges = self.source_ranges(facts, claimed.kind, claimed.key.addr);
        FrontendDescription {
            address: claimed.key.addr.to_string(),
            port: claimed.key.port,
            protocol: protocol_name(claimed.key.protocol).to_owned(),
            port_name: claimed.port.name.clone(),
            kind: kind_name(claimed.kind).to_owned(),
            source_ranges: ranges.iter().map(ToString::to_string).collect(),
            from_outside: if self.is_internal(claimed.kind) { internal() } else { action(Origin::Outside) },
            from_pod: action(Origin::Pod),
            from_node: action(Origin::Node),
        }
    }

    /// True for a ClusterIP if no port that clients come in by serves it; `stage/service` judges it by the port.
    fn is_internal(&self, kind: FrontendKind) -> bool {
        let exposed = self.gateway.outside_ports().any(|index| self.gateway.ports[index].expose_cluster_ips);
        kind == FrontendKind::ClusterIp && !exposed
    }

    /// Addresses that are not served, NodePorts without an address to be on, frontends that are off.
    fn warn(&self, state: &State, facts: &ServiceFacts, description: &mut ServiceDescription) {
        for address in &facts.addresses {
            if let Some(why) = self.why_not_served(state, facts, address) {
                let fault = Fault::new(Code::Ignored, format!("not served: {why}"));
                description.warnings.push(fault.field(&address.field).value(address.addr));
            }
        }
        let has_node_port = facts.ports.iter().any(|port| port.node_port.is_some());
        if has_node_port && self.surroundings.node_port_addresses.is_empty() {
            let fault =
                Fault::new(Code::Ignored, "NodePorts are not served: the gateway has no address for them");
            let remedy = "apply the gateway's own Node, or set [gateway] nodeport_addresses";
            description.warnings.push(fault.field("spec.ports[].nodePort").remedy(remedy));
        }
        let off = description
            .frontends
            .iter()
            .find(|frontend| frontend.from_outside.reason.as_deref() == Some(Reason::FrontendOff.name()));
        if let Some(off) = off {
            let fault = Fault::new(Code::Ignored, off.from_outside.rule.clone());
            description.warnings.push(fault.field("spec.externalTrafficPolicy").value("Local"));
        }
    }

    fn endpoint(
        &self,
        facts: &ServiceFacts,
        families: &[FamilyPort<'_>],
        row: EndpointRow,
    ) -> EndpointDescription {
        let describe = |lists: Vec<String>, unused: Option<String>| EndpointDescription {
            endpoint: row.clone(),
            lists,
            weight: 1,
            unused,
            ..EndpointDescription::default()
        };
        if let Some(skip) = facts.skip {
            return describe(vec![], Some(skip.reason().to_owned()));
        }
        let is_v4 = !row.address.contains(':');
        let of_family = |family: &&FamilyPort<'_>| family.is_v4 == is_v4;
        if !families.iter().any(|family| of_family(&family)) {
            let why =
                format!("the Service has no ClusterIP of family {}", if is_v4 { "IPv4" } else { "IPv6" });
            return describe(vec![], Some(why));
        }
        let own = families.iter().filter(of_family).find(|family| {
            family.port.name == row.port_name && protocol_name(family.port.protocol) == row.protocol
        });
        let Some(family) = own else {
            let why = format!("the Service has no {} port named {:?}", row.protocol, row.port_name);
            return describe(vec![], Some(why));
        };
        let is_it = |info: &EndpointInfo| {
            info.endpoint.port == row.port && info.endpoint.addr.to_string() == row.address
        };
        let Some(index) = family.endpoints.iter().position(is_it) else {
            let is_own = self.surroundings.own.iter().any(|own| own.to_string() == row.address);
            let why = if is_own {
                "an address of this gateway: never used"
            } else {
                "the port of the slice is absent"
            };
            return describe(vec![], Some(why.to_owned()));
        };
        let weight = |index: usize| family.endpoints[index].endpoint.weight;
        let (mut lists, mut shares_bp) = (Vec::new(), Vec::new());
        let mut note = |chosen: &Chosen, place: &str| {
            if chosen.indexes.contains(&index) {
                lists.push(format!("{}{place}", list_name(chosen.list)));
                let all: u32 = chosen.indexes.iter().map(|index| u32::from(weight(*index))).sum();
                shares_bp.push((u64::from(weight(index)) * 10_000 / u64::from(all)) as u32);
            }
        };
        if facts.uses_cluster_endpoints() {
            note(&family.lists.cluster, "");
        }
        let literal = self.gateway.gateway.external_traffic_policy == LocalPolicy::Literal;
        let external_local = facts.external_local && facts.is_external();
        if facts.internal_local || external_local && literal {
            note(&family.lists.local, " (own node)");
        }
        if external_local && !literal {
            note(&family.lists.every_node, " (every node)");
        }
        let unused = lists.is_empty().then(|| self.why_unused(family, index, facts));
        EndpointDescription { shares_bp, weight: weight(index), ..describe(lists, unused) }
    }

    /// Adds to a description how many connections each endpoint has now.
    pub fn count_connections(&self, description: &mut ServiceDescription, flows: &FlowMap) {
        for described in &mut description.endpoints {
            let row = &described.endpoint;
            let protocol = protocol_number(&row.protocol);
            let Ok(addr) = row.address.parse::<IpAddr>() else { continue };
            let tally = self.tallies.get(&EndpointKey { addr: addr.into(), port: row.port, protocol });
            described.connections = Some(flows.tally(tally));
        }
    }

    /// Why an endpoint is in no list that the Service uses.
    fn why_unused(&self, family: &FamilyPort<'_>, index: usize, facts: &ServiceFacts) -> String {
        let info = &family.endpoints[index];
        let node = self.gateway.gateway.name.as_str();
        let place = Place { node, zone: &self.surroundings.zone };
        let topology = family.lists.topology;
        let lists = &family.lists;
        let is_drained = [&lists.cluster, &lists.local, &lists.every_node]
            .iter()
            .any(|list| list.drained.contains(&index));
        if is_drained {
            "weight 0: it keeps its connections and gets no new ones".to_owned()
        } else if info.terminating && !info.serving && !info.ready {
            "terminating and no longer serving: never used".to_owned()
        } else if info.terminating && !info.ready {
            "terminating: used only while no endpoint is ready".to_owned()
        } else if !info.ready {
            "not ready".to_owned()
        } else if facts.uses_cluster_endpoints() && !is_near(info, topology, place) {
            match topology {
                TopologyMode::SameNode => format!(
                    "ready, but hinted for node {}, and another endpoint is hinted for this node, {node}",
                    info.node_hints.join(", ")
                ),
                _ => format!(
                    "ready, but hinted for zone {}, and another endpoint is hinted for this gateway's zone, {}",
                    info.zone_hints.join(", "),
                    place.zone
                ),
            }
        } else if info.endpoint.node.is_empty() {
            "ready, but without nodeName, so it is local to no node".to_owned()
        } else {
            format!("ready, but on node {}, not on the gateway's own node {node}", info.endpoint.node)
        }
    }
}

/// What clients outside meet at a ClusterIP.
fn internal() -> ActionDescription {
    ActionDescription {
        action: "drop".to_owned(),
        reason: Some(Reason::ClusterInternal.name().to_owned()),
        rule: "a ClusterIP is for the inside; expose_cluster_ips = true on a port serves it there too"
            .to_owned(),
        ..ActionDescription::default()
    }
}

fn policy_name(is_local: bool) -> &'static str {
    if is_local { "Local" } else { "Cluster" }
}

fn describe_action(ruling: Ruling<'_>) -> ActionDescription {
    let rule = ruling.rule.to_owned();
    match ruling.outcome {
        Outcome::Dnat { chosen, masquerade } => ActionDescription {
            action: "dnat".to_owned(),
            list: Some(list_name(chosen.list).to_owned()),
            endpoints: chosen.indexes.len() as u32,
            masquerade,
            reason: None,
            rule,
        },
        Outcome::Reject(reason) => ActionDescription {
            action: "reject".to_owned(),
            reason: Some(reason.name().to_owned()),
            rule,
            ..ActionDescription::default()
        },
        Outcome::Drop(reason) => ActionDescription {
            action: "drop".to_owned(),
            reason: Some(reason.name().to_owned()),
            rule,
            ..ActionDescription::default()
        },
    }
}
