//! What happens to packets of a frontend: verdicts, lists and masquerading (kubernetes pkg/proxy/nftables/proxier.go),
//! and what a gateway decides besides.
//!
//! | Frontend | endpoints somewhere | endpoints, but the policy's list is empty | none anywhere |
//! | --- | --- | --- | --- |
//! | ClusterIP | translate | drop | reject |
//! | LoadBalancer, externalIP, NodePort: clients outside | translate | drop | reject |
//! | the same: pods and nodes | the Cluster list, always | the Cluster list | reject |

use config::gateway::{Gateway, LocalPolicy, ReturnPath};

use super::topology::{Categories, Chosen};
use crate::control::facts::ServiceFacts;
use crate::tables::{FrontendKind, Origin};
use crate::verdict::Reason;

/// What the gateway file says about verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How replies come back when the client's address is kept.
    pub return_path: ReturnPath,
    /// What `externalTrafficPolicy: Local` means.
    pub local: LocalPolicy,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
}

impl Policy {
    /// The policy of a gateway file.
    pub fn of(gateway: &Gateway) -> Policy {
        let section = &gateway.gateway;
        Policy {
            return_path: section.return_path,
            local: section.external_traffic_policy,
            masquerade_all: section.masquerade_all,
        }
    }
}

/// What happens to the first packet of a connection, and by which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ruling<'c> {
    /// What happens.
    pub outcome: Outcome<'c>,
    /// The rule, in a sentence.
    pub rule: &'static str,
}

/// What happens to the first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'c> {
    /// Translate to one of the list, which is not empty.
    Dnat {
        /// The list.
        chosen: &'c Chosen,
        /// Translate the source too.
        masquerade: bool,
    },
    /// Answer with RST or ICMP port unreachable.
    Reject(Reason),
    /// Drop.
    Drop(Reason),
}

/// True if clients outside keep their address on the way to an endpoint, so that the VIP is all that its answers need.
pub fn keeps_client(kind: FrontendKind, service: &ServiceFacts, policy: Policy) -> bool {
    let comes_back = policy.local == LocalPolicy::Literal || policy.return_path == ReturnPath::Routed;
    matches!(kind, FrontendKind::LoadBalancer | FrontendKind::ExternalIp)
        && service.external_local
        && comes_back
}

/// Decides for one frontend of a Service and one origin of packets.
///
/// For a ClusterIP and clients outside this is what happens where a port exposes ClusterIPs; elsewhere the pipeline
/// drops them before it looks at the ruling.
pub fn rule<'c>(
    kind: FrontendKind,
    origin: Origin,
    service: &ServiceFacts,
    lists: &'c Categories,
    policy: Policy,
) -> Ruling<'c> {
    if !lists.has_any {
        return Ruling {
            outcome: Outcome::Reject(Reason::NoEndpoints),
            rule: "the Service has no usable endpoint anywhere",
        };
    }
    match kind {
        FrontendKind::ClusterIp => cluster_ip(origin, service, lists, policy),
        _ if origin != Origin::Outside => from_inside(origin, service, lists, policy),
        _ if service.external_local => external_local(lists, policy),
        _ => dnat(
            &lists.cluster,
            true,
            "externalTrafficPolicy Cluster: any endpoint, and replies must come back through us",
        ),
    }
}

fn cluster_ip<'c>(
    origin: Origin,
    service: &ServiceFacts,
    lists: &'c Categories,
    policy: Policy,
) -> Ruling<'c> {
    let (masquerade, why) = match (origin, policy) {
        (_, Policy { masquerade_all: true, .. }) => (true, "masquerade_all is set"),
        (Origin::Outside, _) => {
            (true, "the client is outside the cluster, so replies must come back through us")
        }
        (Origin::Node, _) => (true, "the client is a node, not a pod, so replies must come back through us"),
        (Origin::Pod, Policy { return_path: ReturnPath::Snat, .. }) => {
            (true, "return = \"snat\": replies to pods pass us only if we masquerade")
        }
        (Origin::Pod, _) => (false, "a pod's address is kept on its way through a ClusterIP"),
    };
    if service.internal_local {
        let rule = "internalTrafficPolicy Local: endpoints on the gateway's own node only";
        return dnat(&lists.local, masquerade, rule);
    }
    dnat(&lists.cluster, masquerade, why)
}

/// Pods and nodes go to the Cluster list whatever the policy, as if they had gone out and come in again on the node of
/// an endpoint.
fn from_inside<'c>(
    origin: Origin,
    service: &ServiceFacts,
    lists: &'c Categories,
    policy: Policy,
) -> Ruling<'c> {
    if !service.external_local {
        let rule = "externalTrafficPolicy Cluster: any endpoint, and replies must come back through us";
        return dnat(&lists.cluster, true, rule);
    }
    match (origin, policy.return_path) {
        (Origin::Pod, ReturnPath::Routed) => {
            let rule = "externalTrafficPolicy Local, but the client is a pod: any endpoint, its address kept";
            dnat(&lists.cluster, false, rule)
        }
        (Origin::Pod, ReturnPath::Snat) => {
            let rule = "externalTrafficPolicy Local, but the client is a pod: any endpoint; return = \"snat\" masquerades";
            dnat(&lists.cluster, true, rule)
        }
        _ => {
            let rule = "externalTrafficPolicy Local, but the client is a node: any endpoint, masqueraded";
            dnat(&lists.cluster, true, rule)
        }
    }
}

fn external_local(lists: &Categories, policy: Policy) -> Ruling<'_> {
    match (policy.local, policy.return_path) {
        (LocalPolicy::Literal, _) => {
            let rule = "externalTrafficPolicy Local, taken literally: endpoints on the gateway's own node, the client's address kept";
            dnat(&lists.local, false, rule)
        }
        (LocalPolicy::Frontend, ReturnPath::Routed) => {
            let rule =
                "externalTrafficPolicy Local: straight to a node with an endpoint, the client's address kept";
            dnat(&lists.every_node, false, rule)
        }
        (LocalPolicy::Frontend, ReturnPath::Snat) => Ruling {
            outcome: Outcome::Drop(Reason::FrontendOff),
            rule: "switched off: externalTrafficPolicy Local keeps the client's address, so replies must pass this gateway; \
                   route them here and set [gateway] return = \"routed\"",
        },
    }
}

fn dnat<'c>(chosen: &'c Chosen, masquerade: bool, rule: &'static str) -> Ruling<'c> {
    if chosen.indexes.is_empty() && !chosen.drained.is_empty() {
        let rule = "every endpoint in the list has weight 0 (towpath.dev/weight)";
        return Ruling { outcome: Outcome::Reject(Reason::ZeroWeight), rule };
    }
    if chosen.indexes.is_empty() {
        return Ruling { outcome: Outcome::Drop(Reason::NoLocalEndpoints), rule };
    }
    Ruling { outcome: Outcome::Dnat { chosen, masquerade }, rule }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::compile::topology::TopologyMode;
    use crate::tables::List;

    const KINDS: [FrontendKind; 4] = [
        FrontendKind::ClusterIp,
        FrontendKind::LoadBalancer,
        FrontendKind::ExternalIp,
        FrontendKind::NodePort,
    ];
    const ORIGINS: [Origin; 3] = [Origin::Outside, Origin::Pod, Origin::Node];

    fn lists(cluster: &[usize], local: &[usize], every_node: &[usize]) -> Categories {
        let chosen = |list, indexes: &[usize]| Chosen { list, indexes: indexes.to_vec(), drained: vec![] };
        Categories {
            cluster: chosen(List::Cluster, cluster),
            local: chosen(List::Local, local),
            every_node: chosen(List::Local, every_node),
            has_any: !cluster.is_empty(),
            topology: TopologyMode::Everywhere,
        }
    }

    fn policy(return_path: ReturnPath, local: LocalPolicy) -> Policy {
        Policy { return_path, local, masquerade_all: false }
    }

    fn service(internal_local: bool, external_local: bool) -> ServiceFacts {
        ServiceFacts { internal_local, external_local, ..ServiceFacts::default() }
    }

    const ROUTED: (ReturnPath, LocalPolicy) = (ReturnPath::Routed, LocalPolicy::Frontend);
    const SNAT: (ReturnPath, LocalPolicy) = (ReturnPath::Snat, LocalPolicy::Frontend);
    const LITERAL: (ReturnPath, LocalPolicy) = (ReturnPath::Snat, LocalPolicy::Literal);

    /// Rules 3.4, 4.1, 4.2.
    #[test]
    fn none_anywhere_is_a_reject_for_everyone() {
        for kind in KINDS {
            for origin in ORIGINS {
                for (internal, external) in [(false, false), (true, true)] {
                    let none = lists(&[], &[], &[]);
                    let got =
                        rule(kind, origin, &service(internal, external), &none, policy(ROUTED.0, ROUTED.1));
                    assert_eq!(got.outcome, Outcome::Reject(Reason::NoEndpoints));
                }
            }
        }
    }

    /// (kind, origin, internal Local, external Local, gateway, expected), where lists are written as cluster 0 to 3,
    /// local 1, every node 2 and 3: `[cluster] masq`.
    /// Rules 3.10, 4.3, 5.1, 5.2, 5.3, 5.4, 5.5, 14.2, 14.3.
    #[test]
    fn verdicts_lists_and_masquerading() {
        use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
        use Origin::{Node, Outside, Pod};
        let all = lists(&[0, 1, 2, 3], &[1], &[2, 3]);
        let (cluster, local, every): (&[usize], &[usize], &[usize]) = (&[0, 1, 2, 3], &[1], &[2, 3]);
        for (kind, origin, internal, external, gateway, expected) in [
            // ClusterIP: the internal policy decides, the external one does not matter.
            (ClusterIp, Pod, false, false, ROUTED, Some((cluster, false))),
            (ClusterIp, Pod, false, true, ROUTED, Some((cluster, false))),
            (ClusterIp, Pod, false, false, SNAT, Some((cluster, true))),
            (ClusterIp, Node, false, false, ROUTED, Some((cluster, true))),
            (ClusterIp, Outside, false, false, ROUTED, Some((cluster, true))),
            (ClusterIp, Pod, true, false, ROUTED, Some((local, false))),
            (ClusterIp, Node, true, true, ROUTED, Some((local, true))),
            // Cluster policy: any endpoint, always masqueraded.
            (LoadBalancer, Outside, false, false, ROUTED, Some((cluster, true))),
            (LoadBalancer, Pod, false, false, ROUTED, Some((cluster, true))),
            (NodePort, Node, true, false, ROUTED, Some((cluster, true))),
            (ExternalIp, Outside, true, false, SNAT, Some((cluster, true))),
            // Local policy: the client's address is kept; insiders are short-circuited to the Cluster list.
            (LoadBalancer, Outside, false, true, ROUTED, Some((every, false))),
            (NodePort, Outside, false, true, ROUTED, Some((every, false))),
            (ExternalIp, Outside, false, true, LITERAL, Some((local, false))),
            (LoadBalancer, Pod, false, true, ROUTED, Some((cluster, false))),
            (LoadBalancer, Pod, false, true, SNAT, Some((cluster, true))),
            (LoadBalancer, Node, false, true, ROUTED, Some((cluster, true))),
            // Without a return path a Local frontend is off for the outside, and for nobody else.
            (LoadBalancer, Outside, false, true, SNAT, None),
            (NodePort, Node, false, true, SNAT, Some((cluster, true))),
        ] {
            let got = rule(kind, origin, &service(internal, external), &all, policy(gateway.0, gateway.1));
            match (got.outcome, expected) {
                (Outcome::Dnat { chosen, masquerade }, Some(expected)) => {
                    assert_eq!((&*chosen.indexes, masquerade), expected, "{kind:?} {origin:?}: {}", got.rule);
                    let keeps =
                        keeps_client(kind, &service(internal, external), policy(gateway.0, gateway.1));
                    if matches!(kind, LoadBalancer | ExternalIp) && origin == Outside {
                        assert_eq!(keeps, !masquerade);
                    } else if matches!(kind, ClusterIp | NodePort) {
                        assert!(!keeps, "these need an entry for every connection");
                    }
                }
                (Outcome::Drop(Reason::FrontendOff), None) => {
                    assert!(got.rule.contains("return = \"routed\""))
                }
                other => panic!("{kind:?} {origin:?}: {other:?}"),
            }
        }
    }

    /// Rules 4.1, 4.2.
    #[test]
    fn an_empty_local_list_drops_outsiders_only() {
        let far = lists(&[0], &[], &[]);
        for (kind, origin, internal, external, expect_drop) in [
            (FrontendKind::ClusterIp, Origin::Pod, true, false, true),
            (FrontendKind::ClusterIp, Origin::Node, true, false, true),
            (FrontendKind::ClusterIp, Origin::Pod, false, true, false),
            (FrontendKind::LoadBalancer, Origin::Outside, false, true, true),
            (FrontendKind::NodePort, Origin::Outside, false, true, true),
            (FrontendKind::LoadBalancer, Origin::Pod, true, true, false),
            (FrontendKind::NodePort, Origin::Node, true, true, false),
        ] {
            let got = rule(kind, origin, &service(internal, external), &far, policy(ROUTED.0, ROUTED.1));
            let is_drop = got.outcome == Outcome::Drop(Reason::NoLocalEndpoints);
            assert_eq!(is_drop, expect_drop, "{kind:?} {origin:?}");
        }
    }

    #[test]
    fn a_list_of_weight_0_is_rejected_whoever_asks() {
        let mut drained = lists(&[], &[], &[]);
        drained.has_any = true;
        for chosen in [&mut drained.cluster, &mut drained.local, &mut drained.every_node] {
            chosen.drained = vec![0];
        }
        for kind in KINDS {
            for origin in ORIGINS {
                let got = rule(kind, origin, &service(false, true), &drained, policy(ROUTED.0, ROUTED.1));
                assert_eq!(got.outcome, Outcome::Reject(Reason::ZeroWeight), "{kind:?} {origin:?}");
            }
        }
    }

    /// Rule 5.7.
    #[test]
    fn masquerade_all_is_for_cluster_ips() {
        let all = lists(&[0], &[], &[0]);
        let policy = Policy { masquerade_all: true, ..policy(ROUTED.0, ROUTED.1) };
        let masquerade = |kind, origin| match rule(kind, origin, &service(false, true), &all, policy).outcome
        {
            Outcome::Dnat { masquerade, .. } => masquerade,
            other => panic!("{other:?}"),
        };
        assert!(masquerade(FrontendKind::ClusterIp, Origin::Pod));
        assert!(!masquerade(FrontendKind::LoadBalancer, Origin::Outside));
        assert!(!masquerade(FrontendKind::LoadBalancer, Origin::Pod));
    }
}
