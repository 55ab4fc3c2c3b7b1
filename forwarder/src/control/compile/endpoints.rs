//! The endpoints of one port of a Service, merged from its slices (kubernetes pkg/proxy/endpointslicecache.go).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::Addr;
use crate::control::facts::{EndpointFacts, SliceFacts};
use crate::tables::Endpoint;

/// One endpoint with what the rules look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointInfo {
    /// As it stands in the tables.
    pub endpoint: Endpoint,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// It runs on the gateway's own node.
    pub is_local: bool,
    /// `hints.forZones`.
    pub zone_hints: Vec<String>,
    /// `hints.forNodes`.
    pub node_hints: Vec<String>,
}

/// What a port of a slice is found by: its name (not its number) and protocol.
#[derive(Clone, Copy, Debug)]
pub struct PortKey<'a> {
    /// `ports[].name`.
    pub name: &'a str,
    /// IP protocol number.
    pub protocol: u8,
}

/// The endpoints of a port for one family, by address, then port.
///
/// `slices`: all slices of the Service, by name; an endpoint that moves from one to another is in at least one of them
/// within a change, so it never blinks out. One that is in several is taken once, as local if any of them says so.
/// `node`: name of the gateway's own Node. `pod_weight`: weight of a Pod by `namespace/name`, if it has one of its own.
pub fn merge<'s>(
    slices: impl Iterator<Item = &'s SliceFacts>,
    port: PortKey<'_>,
    is_v4: bool,
    node: &str,
    pod_weight: impl Fn(&str) -> Option<u16>,
) -> Vec<EndpointInfo> {
    let mut merged: BTreeMap<(Addr, u16), EndpointInfo> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter().filter(|own| own.name == port.name && own.protocol == port.protocol);
        for number in ports.map(|own| own.port) {
            for facts in slice.endpoints.iter().filter(|facts| facts.addr.is_v4() == is_v4) {
                let is_local = !node.is_empty() && *facts.node == *node;
                let key = (facts.addr, number);
                if is_local || !merged.contains_key(&key) {
                    let weight = facts.pod().and_then(&pod_weight).or(slice.weight).unwrap_or(1);
                    merged.insert(key, info(facts, number, weight, is_local));
                }
            }
        }
    }
    merged.into_values().collect()
}

fn info(facts: &EndpointFacts, port: u16, weight: u16, is_local: bool) -> EndpointInfo {
    EndpointInfo {
        endpoint: Endpoint {
            addr: facts.addr,
            port,
            name: Arc::clone(&facts.name),
            node: Arc::clone(&facts.node),
            weight,
            tally: 0,
        },
        ready: facts.ready,
        serving: facts.serving,
        terminating: facts.terminating,
        is_local,
        zone_hints: facts.zone_hints.clone(),
        node_hints: facts.node_hints.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::protocol::{TCP, UDP};
    use crate::control::compile::fixture::slice;
    use crate::control::facts::Facts;

    fn facts(text: &str) -> SliceFacts {
        match slice(text).facts {
            Facts::Slice(facts) => facts,
            other => panic!("{other:?}"),
        }
    }

    fn shown(slices: &[SliceFacts], name: &str, protocol: u8, is_v4: bool) -> Vec<String> {
        let merged = merge(slices.iter(), PortKey { name, protocol }, is_v4, "gw", |_| None);
        merged
            .iter()
            .map(|info| {
                let local = if info.is_local { " local" } else { "" };
                format!("{}:{}{local}", info.endpoint.addr, info.endpoint.port)
            })
            .collect()
    }

    /// Rules 2.2, 2.5.
    #[test]
    fn slices_are_merged_sorted_and_deduplicated() {
        let a = facts(
            "ports: [{name: http, port: 8080}]\nendpoints: [{addresses: [10.0.0.2]}, {addresses: [10.0.0.1, 10.0.0.9]}]",
        );
        let b = facts(
            "ports: [{name: http, port: 8080}]\nendpoints: [{addresses: [10.0.0.2], nodeName: gw}, {addresses: [10.0.0.3]}]",
        );
        let expected = ["10.0.0.1:8080", "10.0.0.2:8080 local", "10.0.0.3:8080"];
        assert_eq!(shown(&[a.clone(), b.clone()], "http", TCP, true), expected);
        assert_eq!(shown(&[b, a], "http", TCP, true), expected);
    }

    /// Rule 2.3.
    #[test]
    fn a_port_is_found_by_name_and_protocol_and_may_differ_per_slice() {
        let a = facts(
            "ports: [{name: dns, port: 53, protocol: UDP}, {name: dns, port: 5353}]\nendpoints: [{addresses: [10.0.0.1]}]",
        );
        let b = facts(
            "ports: [{name: dns, port: 1053, protocol: UDP}, {name: web, port: 80}]\nendpoints: [{addresses: [10.0.0.2]}]",
        );
        let slices = [a, b];
        assert_eq!(shown(&slices, "dns", UDP, true), ["10.0.0.1:53", "10.0.0.2:1053"]);
        assert_eq!(shown(&slices, "dns", TCP, true), ["10.0.0.1:5353"]);
        assert_eq!(shown(&slices, "web", TCP, true), ["10.0.0.2:80"]);
        assert_eq!(shown(&slices, "", TCP, true), [""; 0]);
    }

    /// Rules 2.2, 2.3.
    #[test]
    fn the_other_family_and_absent_ports_are_left_out() {
        let v6 = facts("addressType: IPv6\nports: [{port: 80}]\nendpoints: [{addresses: ['fd00::1']}]");
        let none = facts("ports: [{name: ''}, {name: '', port: 0}]\nendpoints: [{addresses: [10.0.0.1]}]");
        assert_eq!(shown(&[v6.clone(), none.clone()], "", TCP, true), [""; 0]);
        assert_eq!(shown(&[v6, none], "", TCP, false), ["fd00::1:80"]);
    }

    #[test]
    fn the_weight_of_a_pod_wins_over_that_of_its_slice() {
        let mut facts = facts(
            "ports: [{port: 80}]\nendpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: a}}, \
             {addresses: [10.0.0.2], targetRef: {kind: Pod, name: b}}, {addresses: [10.0.0.3], targetRef: {kind: VM, name: a}}]",
        );
        let pods = |name: &str| (name == "default/a").then_some(0);
        let weights = |facts: &SliceFacts| -> Vec<u16> {
            let merged = merge(std::iter::once(facts), PortKey { name: "", protocol: TCP }, true, "", pods);
            merged.iter().map(|info| info.endpoint.weight).collect()
        };
        assert_eq!(weights(&facts), [0, 1, 1]);
        facts.weight = Some(7);
        assert_eq!(weights(&facts), [0, 7, 7]);
    }

    /// Rule 2.1.
    #[test]
    fn absent_conditions_mean_ready_serving_and_not_terminating() {
        let facts = facts(
            "ports: [{port: 80}]\nendpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.2], conditions: {ready: false, terminating: true}}]",
        );
        let merged = merge(std::iter::once(&facts), PortKey { name: "", protocol: TCP }, true, "", |_| None);
        let conditions: Vec<_> =
            merged.iter().map(|info| (info.ready, info.serving, info.terminating)).collect();
        assert_eq!(conditions, [(true, true, false), (false, true, true)]);
    }
}
