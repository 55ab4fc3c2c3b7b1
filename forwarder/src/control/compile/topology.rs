//! Which endpoints a Service uses: a port of `CategorizeEndpoints` (kubernetes pkg/proxy/topology.go), written anew.

use super::endpoints::EndpointInfo;
use crate::tables::List;

/// Where the gateway is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Name of the gateway's own Node.
    pub node: &'a str,
    /// Its zone; empty: unknown, and zone hints are not followed.
    pub zone: &'a str,
}

/// How far endpoints may be, by the hints of all ready ones: all or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TopologyMode {
    /// Anywhere.
    #[default]
    Everywhere,
    /// Only those with a hint for our zone.
    SameZone,
    /// Only those with a hint for our node.
    SameNode,
}

/// A list of endpoints in use. The indexes are of the merged endpoints, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which list it is.
    pub list: List,
    /// Its endpoints that get new connections; may be empty.
    pub indexes: Vec<usize>,
    /// Its endpoints of weight 0, which get none.
    pub drained: Vec<usize>,
}

/// The lists of one port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Categories {
    /// Ready endpoints that the topology allows, else serving and terminating ones.
    pub cluster: Chosen,
    /// The same on the gateway's own node; the topology does not matter there.
    pub local: Chosen,
    /// The same on every node: what a load balancer in front of all nodes reaches under the policy Local.
    pub every_node: Chosen,
    /// There are usable endpoints somewhere, ready or serving and terminating: decides reject against drop.
    pub has_any: bool,
    /// How far endpoints of `cluster` may be.
    pub topology: TopologyMode,
}

/// Sorts endpoints into the lists.
///
/// `is_excluded`: true for a node that load balancers do not send to (label
/// `node.kubernetes.io/exclude-from-external-load-balancers`).
pub fn categorize(
    endpoints: &[EndpointInfo],
    place: Place<'_>,
    is_excluded: impl Fn(&str) -> bool,
) -> Categories {
    let topology = topology_mode(endpoints, place);
    let choose = |ready: List, terminating: List, allows: &dyn Fn(&EndpointInfo) -> bool, near: bool| {
        let pick = |usable: &dyn Fn(&EndpointInfo) -> bool| -> Vec<usize> {
            endpoints
                .iter()
                .enumerate()
                .filter(|(_, info)| allows(info) && usable(info))
                .map(|(i, _)| i)
                .collect()
        };
        let chosen = |list, indexes: Vec<usize>| {
            let is_open = |i: &usize| endpoints[*i].endpoint.weight > 0;
            let (indexes, drained) = indexes.into_iter().partition(is_open);
            Chosen { list, indexes, drained }
        };
        let indexes = pick(&|info| info.ready && (!near || is_near(info, topology, place)));
        if !indexes.is_empty() {
            return chosen(ready, indexes);
        }
        // The topology does not matter for the last resort.
        let indexes = pick(&|info| info.serving && info.terminating);
        chosen(if indexes.is_empty() { ready } else { terminating }, indexes)
    };
    Categories {
        cluster: choose(List::Cluster, List::ClusterTerminating, &|_| true, true),
        local: choose(List::Local, List::LocalTerminating, &|info| info.is_local, false),
        every_node: choose(
            List::Local,
            List::LocalTerminating,
            &|info| !info.endpoint.node.is_empty() && !is_excluded(&info.endpoint.node),
            false,
        ),
        has_any: endpoints.iter().any(|info| info.ready || info.serving && info.terminating),
        topology,
    }
}

/// What the hints of the ready endpoints allow. One without a hint switches that mode off.
fn topology_mode(endpoints: &[EndpointInfo], place: Place<'_>) -> TopologyMode {
    let ready = || endpoints.iter().filter(|info| info.ready);
    let hinted = |hints: fn(&EndpointInfo) -> &[String], here: &str| {
        !here.is_empty()
            && ready().all(|info| !hints(info).is_empty())
            && ready().any(|info| hints(info).iter().any(|hint| hint == here))
    };
    if hinted(|info| &info.node_hints, place.node) {
        TopologyMode::SameNode
    } else if hinted(|info| &info.zone_hints, place.zone) {
        TopologyMode::SameZone
    } else {
        TopologyMode::Everywhere
    }
}

/// True if the topology allows the endpoint.
pub fn is_near(info: &EndpointInfo, topology: TopologyMode, place: Place<'_>) -> bool {
    match topology {
        TopologyMode::Everywhere => true,
        TopologyMode::SameZone => info.zone_hints.iter().any(|hint| hint == place.zone),
        TopologyMode::SameNode => info.node_hints.iter().any(|hint| hint == place.node),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::Endpoint;

    /// `ready@node zone=a,b node=n1`: state `ready`, `notready`, `draining` (serving and terminating) or `dying`
    /// (terminating only), node after the `@`, then hints.
    fn endpoints(rows: &[&str]) -> Vec<EndpointInfo> {
        let list = |text: &str| text.split(',').map(str::to_owned).collect();
        rows.iter()
            .enumerate()
            .map(|(index, row)| {
                let mut words = row.split(' ');
                let (state, node) = words.next().unwrap().split_once('@').unwrap();
                let (ready, serving, terminating) = match state {
                    "ready" => (true, true, false),
                    "notready" => (false, false, false),
                    "unready" => (false, true, false),
                    "draining" => (false, true, true),
                    "dying" => (false, false, true),
                    other => panic!("{other}"),
                };
                let mut info = EndpointInfo {
                    endpoint: Endpoint {
                        addr: crate::addr::Addr::v4(0x0a00_0001 + index as u32),
                        port: 80,
                        name: "".into(),
                        node: node.into(),
                        weight: 1,
                        tally: 0,
                    },
                    ready,
                    serving,
                    terminating,
                    is_local: node == "here",
                    zone_hints: vec![],
                    node_hints: vec![],
                };
                for word in words {
                    match word.split_once('=').unwrap() {
                        ("zone", zones) => info.zone_hints = list(zones),
                        ("node", nodes) => info.node_hints = list(nodes),
                        other => panic!("{other:?}"),
                    }
                }
                info
            })
            .collect()
    }

    #[track_caller]
    fn check(
        rows: &[&str],
        cluster: (List, &[usize]),
        local: (List, &[usize]),
        every: (List, &[usize]),
        has_any: bool,
    ) {
        let place = Place { node: "here", zone: "z1" };
        let got = categorize(&endpoints(rows), place, |node| node == "excluded");
        assert_eq!((got.cluster.list, &*got.cluster.indexes), cluster, "cluster");
        assert_eq!((got.local.list, &*got.local.indexes), local, "local");
        assert_eq!((got.every_node.list, &*got.every_node.indexes), every, "every node");
        assert_eq!(got.has_any, has_any);
    }

    use List::{Cluster, ClusterTerminating, Local, LocalTerminating};

    /// Rules 3.1, 3.2, 3.4, 3.5.
    #[test]
    fn readiness_and_termination() {
        check(&[], (Cluster, &[]), (Local, &[]), (Local, &[]), false);
        check(&["ready@n1", "ready@here"], (Cluster, &[0, 1]), (Local, &[1]), (Local, &[0, 1]), true);
        check(&["ready@n1", "notready@here"], (Cluster, &[0]), (Local, &[]), (Local, &[0]), true);
        check(&["notready@n1", "unready@here"], (Cluster, &[]), (Local, &[]), (Local, &[]), false);
        // Draining ones are the last resort, and never beside a ready one.
        check(
            &["draining@n1", "draining@here"],
            (ClusterTerminating, &[0, 1]),
            (LocalTerminating, &[1]),
            (LocalTerminating, &[0, 1]),
            true,
        );
        // What terminates and does not serve is never used, even alone.
        check(&["dying@here"], (Cluster, &[]), (Local, &[]), (Local, &[]), false);
    }

    /// Weight 0 is no reason to fall back to what is worse.
    #[test]
    fn endpoints_of_weight_0_stay_in_their_list_and_get_nothing() {
        let mut all = endpoints(&["ready@here", "ready@n1", "draining@n2"]);
        all[0].endpoint.weight = 0;
        let categorize = |all: &[EndpointInfo]| categorize(all, Place { node: "here", zone: "" }, |_| false);
        let got = categorize(&all);
        let expected = |list, indexes: &[usize], drained: &[usize]| Chosen {
            list,
            indexes: indexes.into(),
            drained: drained.into(),
        };
        assert_eq!(got.cluster, expected(Cluster, &[1], &[0]));
        assert_eq!(got.local, expected(Local, &[], &[0]));
        all[1].endpoint.weight = 0;
        let got = categorize(&all);
        assert_eq!(got.cluster, expected(Cluster, &[], &[0, 1]));
        assert!(got.has_any);
    }

    /// Rule 3.3.
    #[test]
    fn the_fallbacks_are_independent() {
        check(&["ready@n1", "draining@here"], (Cluster, &[0]), (LocalTerminating, &[1]), (Local, &[0]), true);
        check(&["draining@n1", "ready@here"], (Cluster, &[1]), (Local, &[1]), (Local, &[1]), true);
    }

    /// Rules 6.8, 14.1.
    #[test]
    fn every_node_means_endpoints_with_a_node_that_is_not_excluded() {
        check(
            &["ready@", "ready@n1", "ready@excluded"],
            (Cluster, &[0, 1, 2]),
            (Local, &[]),
            (Local, &[1]),
            true,
        );
        check(
            &["ready@", "draining@n1", "ready@excluded"],
            (Cluster, &[0, 2]),
            (Local, &[]),
            (LocalTerminating, &[1]),
            true,
        );
    }

    /// Rule 3.6.
    #[test]
    fn zone_hints_are_all_or_nothing() {
        let all: &[usize] = &[0, 1];
        check(&["ready@a zone=z1", "ready@b zone=z2"], (Cluster, &[0]), (Local, &[]), (Local, all), true);
        check(&["ready@a zone=z1,z2", "ready@b zone=z2"], (Cluster, &[0]), (Local, &[]), (Local, all), true);
        check(&["ready@a zone=z1", "ready@b"], (Cluster, all), (Local, &[]), (Local, all), true);
        check(&["ready@a zone=z2", "ready@b zone=z2"], (Cluster, all), (Local, &[]), (Local, all), true);
        // Only ready ones are asked for hints; draining ones are used without regard to theirs.
        check(&["ready@a zone=z1", "draining@b"], (Cluster, &[0]), (Local, &[]), (Local, &[0]), true);
        check(
            &["draining@a zone=z2", "draining@b"],
            (ClusterTerminating, all),
            (Local, &[]),
            (LocalTerminating, all),
            true,
        );
        // The hints do not touch the local lists.
        check(&["ready@here zone=z2", "ready@b zone=z1"], (Cluster, &[1]), (Local, &[0]), (Local, all), true);
    }

    /// Rules 3.7, 14.7.
    #[test]
    fn node_hints_come_first_and_fall_to_the_zone() {
        let all: &[usize] = &[0, 1];
        check(
            &["ready@here node=here zone=z1", "ready@b node=b zone=z1"],
            (Cluster, &[0]),
            (Local, &[0]),
            (Local, all),
            true,
        );
        check(
            &["ready@a node=a zone=z1", "ready@b node=b zone=z2"],
            (Cluster, &[0]),
            (Local, &[]),
            (Local, all),
            true,
        );
        check(&["ready@a node=here", "ready@b"], (Cluster, all), (Local, &[]), (Local, all), true);
    }

    /// Rule 3.8.
    #[test]
    fn an_unknown_zone_or_node_switches_the_hints_off() {
        let endpoints = endpoints(&["ready@a zone=z1 node=x", "ready@b zone=z2 node=y"]);
        for place in
            [Place { node: "", zone: "" }, Place { node: "gw", zone: "" }, Place { node: "gw", zone: "z9" }]
        {
            let got = categorize(&endpoints, place, |_| false);
            assert_eq!((got.topology, got.cluster.indexes.len()), (TopologyMode::Everywhere, 2));
        }
    }
}
