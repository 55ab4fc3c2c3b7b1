//! What the health server tells of Services (kubernetes pkg/proxy/healthcheck/service_health.go).
//!
//! Who asks a `healthCheckNodePort` is a load balancer in front of the gateway, and wants to know whether it should send clients of
//! the Service here. So its local endpoints are those that such clients would reach right now by the policy Local, ready ones only:
//! as `frontend`, those on every node that load balancers may send to; taken `literal`ly, those on the gateway's own node;
//! and none while the frontends of the Service are switched off (`return = "snat"`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config::control::ObjectRef;

use super::Compiler;
use super::frontends::{Outcome, Policy, rule};
use super::service::FamilyPort;
use crate::addr::{Addr, Family};
use crate::control::facts::ServiceFacts;
use crate::tables::{FrontendKind, List, Origin};
use crate::verdict::Reason;

/// What the health server needs of one generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthTables {
    /// Services that have a `healthCheckNodePort`.
    pub checks: BTreeMap<Arc<ObjectRef>, Arc<HealthCheck>>,
    /// Over all Services.
    pub no_local: NoLocalEndpoints,
    /// Our Node object says that we are about to go.
    pub node_is_leaving: bool,
}

/// What is served on the `healthCheckNodePort` of one Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Own addresses that it is served on, of the families of the Service.
    pub addresses: Vec<Addr>,
    /// Addresses of local endpoints that are ready, by family: a family is a Service of its own here, as in kube-proxy.
    pub local_endpoints: [usize; 2],
}

/// Ports of Services whose packets are dropped because the policy is Local and its list is empty, by family (kubernetes
/// pkg/proxy/metrics `SyncProxyRulesNoLocalEndpointsTotal`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// `internalTrafficPolicy`.
    pub internal: [u64; 2],
    /// `externalTrafficPolicy`.
    pub external: [u64; 2],
}

impl NoLocalEndpoints {
    fn counts_mut(&mut self) -> impl Iterator<Item = &mut u64> {
        self.internal.iter_mut().chain(&mut self.external)
    }
}

/// The part of one Service in [`HealthTables`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceHealth {
    check: Option<Arc<HealthCheck>>,
    no_local: NoLocalEndpoints,
}

impl Compiler {
    /// What the health server needs for the tables that were compiled last.
    pub fn health(&self) -> &Arc<HealthTables> {
        &self.health
    }

    /// What is told of a Service. `families`: its ports with their lists of endpoints.
    pub(super) fn service_health(&self, facts: &ServiceFacts, families: &[FamilyPort<'_>]) -> ServiceHealth {
        let policy = Policy::of(&self.gateway);
        let mut health = ServiceHealth::default();
        let mut local: [BTreeSet<Addr>; 2] = Default::default();
        let starved = Outcome::Drop(Reason::NoLocalEndpoints);
        for port in families {
            let family = if port.is_v4 { Family::V4 } else { Family::V6 } as usize;
            let ruling = |kind, origin| rule(kind, origin, facts, &port.lists, policy).outcome;
            if ruling(FrontendKind::ClusterIp, Origin::Pod) == starved {
                health.no_local.internal[family] += 1;
            }
            if !facts.is_external() {
                continue;
            }
            match ruling(FrontendKind::LoadBalancer, Origin::Outside) {
                outcome if outcome == starved => health.no_local.external[family] += 1,
                Outcome::Dnat { chosen, .. } if chosen.list == List::Local => {
                    local[family].extend(chosen.indexes.iter().map(|i| port.endpoints[*i].endpoint.addr));
                }
                _ => {}
            }
        }
        let has = |family| families.iter().any(|port| port.is_v4 == (family == Family::V4));
        health.check = facts.health_check_node_port.map(|port| {
            let own = self.surroundings.node_port_addresses.iter().copied();
            Arc::new(HealthCheck {
                port,
                addresses: own.filter(|addr| has(addr.family())).collect(),
                local_endpoints: local.map(|addresses| addresses.len()),
            })
        });
        health
    }

    /// Puts what is told of a Service in the place of what was. Costs nothing if that is the same.
    pub(super) fn replace_health(
        &mut self,
        reference: &Arc<ObjectRef>,
        old: &ServiceHealth,
        new: &ServiceHealth,
    ) {
        if old == new {
            return;
        }
        let health = Arc::make_mut(&mut self.health);
        match &new.check {
            Some(check) => drop(health.checks.insert(reference.clone(), check.clone())),
            None => drop(health.checks.remove(reference)),
        }
        let (mut gone, mut come) = (old.no_local, new.no_local);
        for ((count, gone), come) in
            health.no_local.counts_mut().zip(gone.counts_mut()).zip(come.counts_mut())
        {
            *count = *count + *come - *gone;
        }
    }

    /// Notes whether our Node object is about to go.
    pub(super) fn set_node_is_leaving(&mut self, is_leaving: bool) {
        if self.health.node_is_leaving != is_leaving {
            Arc::make_mut(&mut self.health).node_is_leaving = is_leaving;
        }
    }
}

#[cfg(test)]
mod tests {
    use config::control::Kind;

    use super::super::fixture::Cluster;
    use super::*;

    const FRONTEND: &str =
        "[gateway]\nname = 'gw'\nservice_cidrs = ['10.96.0.0/16', 'fd00:96::/112']\nreturn = 'routed'";

    fn service(rest: &str) -> String {
        format!(
            "kind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  clusterIPs: [10.96.0.1, 'fd00:96::1']\n  \
             ports: [{{name: http, port: 80}}, {{name: dns, port: 53, protocol: UDP}}]\n  {rest}\n\
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}]}}}}\n"
        )
    }

    const CHECKED: &str = "type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 32000";

    /// Endpoints as `state@node`: `ready`, `unready`, or `draining` (serving and terminating).
    fn slice(endpoints: &[&str]) -> String {
        let mut text = "kind: EndpointSlice\nmetadata: {name: web-4, namespace: shop, labels: {kubernetes.io/service-name: web}}\n\
             addressType: IPv4\nports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]\nendpoints:\n"
            .to_owned();
        for (index, endpoint) in endpoints.iter().enumerate() {
            let (state, node) = endpoint.split_once('@').unwrap();
            let conditions = match state {
                "ready" => "ready: true",
                "unready" => "ready: false, serving: false",
                _ => "ready: false, serving: true, terminating: true",
            };
            text += &format!(
                "- {{addresses: [10.244.1.{index}], nodeName: {node}, conditions: {{{conditions}}}}}\n"
            );
        }
        if endpoints.is_empty() { text.replace("endpoints:\n", "endpoints: []\n") } else { text }
    }

    fn tables(head: &str, objects: &[String]) -> HealthTables {
        let compiler = Cluster::new(head, &objects.join("---\n")).compiler(&["192.0.2.1", "2001:db8::1"]);
        HealthTables::clone(compiler.health())
    }

    #[track_caller]
    fn local_endpoints(head: &str, endpoints: &[&str], expected: usize) {
        let tables = tables(head, &[service(CHECKED), slice(endpoints)]);
        let check = tables.checks.values().next().expect("a check");
        assert_eq!(check.local_endpoints, [expected, 0], "{endpoints:?}");
    }

    #[test]
    fn as_the_frontend_every_node_is_local() {
        let excluded = "---\nkind: Node\nmetadata: {name: n9, labels: {node.kubernetes.io/exclude-from-external-load-balancers: ''}}\n";
        local_endpoints(FRONTEND, &[], 0);
        // Two ports of one pod are one endpoint.
        local_endpoints(FRONTEND, &["ready@n1"], 1);
        local_endpoints(FRONTEND, &["ready@n1", "ready@n2", "unready@n2", "draining@n1"], 2);
        // kubernetes e2e "should fail health check node port if there are only terminating endpoints".
        local_endpoints(FRONTEND, &["draining@n1", "draining@gw"], 0);
        let objects = [service(CHECKED), slice(&["ready@n1", "ready@n9"]) + excluded];
        assert_eq!(tables(FRONTEND, &objects).checks.values().next().unwrap().local_endpoints, [1, 0]);
    }

    #[test]
    fn taken_literally_only_the_own_node_is_local() {
        let literal = format!("{FRONTEND}\nexternal_traffic_policy = 'literal'");
        local_endpoints(&literal, &["ready@n1", "ready@n2"], 0);
        local_endpoints(&literal, &["ready@n1", "ready@gw", "draining@gw"], 1);
        local_endpoints(&literal, &["ready@n1", "draining@gw"], 0);
    }

    #[test]
    fn a_frontend_that_is_off_has_nothing_to_offer() {
        local_endpoints(&FRONTEND.replace("routed", "snat"), &["ready@n1"], 0);
    }

    #[test]
    fn a_check_is_served_where_node_ports_are() {
        let checks = |head: &str, service: String| {
            let tables = tables(head, &[service]);
            let text = |check: &Arc<HealthCheck>| {
                let addresses: Vec<_> = check.addresses.iter().map(ToString::to_string).collect();
                format!("{} on {}", check.port, addresses.join(" "))
            };
            tables.checks.values().map(text).collect::<Vec<_>>()
        };
        assert_eq!(checks(FRONTEND, service(CHECKED)), ["32000 on 192.0.2.1 2001:db8::1"]);
        let some = format!("{FRONTEND}\nnodeport_addresses = ['2001:db8::/64']");
        assert_eq!(checks(&some, service(CHECKED)), ["32000 on 2001:db8::1"]);
        let single = service(CHECKED).replace("10.96.0.1, ", "");
        assert_eq!(checks(FRONTEND, single), ["32000 on 2001:db8::1"]);
        for without in ["externalTrafficPolicy: Cluster", "healthCheckNodePort: 0", "type: NodePort"] {
            let (key, _) = without.split_once(':').unwrap();
            let line = CHECKED.lines().find(|line| line.contains(key)).unwrap();
            assert!(
                checks(FRONTEND, service(&CHECKED.replace(line.trim(), without))).is_empty(),
                "{without}"
            );
        }
    }

    /// Rule 2.4.
    #[test]
    fn changes_reach_the_tables_one_service_at_a_time() {
        let mut cluster = Cluster::new(FRONTEND, &[service(CHECKED), slice(&["ready@n1"])].join("---\n"));
        let mut compiler = cluster.compiler(&["192.0.2.1"]);
        let counts = |compiler: &Compiler| {
            compiler.health().checks.values().map(|check| check.local_endpoints[0]).collect::<Vec<_>>()
        };
        assert_eq!(counts(&compiler), [1]);
        let before = compiler.health().clone();
        let touched = cluster.apply(&slice(&["ready@n1", "ready@n2"])).touched;
        compiler.compile(&cluster.state, &touched, 2);
        assert_eq!((counts(&compiler), before.checks.len()), (vec![2], 1));
        let touched = cluster.apply("kind: Namespace\nmetadata: {name: other}\n").touched;
        let unchanged = compiler.health().clone();
        compiler.compile(&cluster.state, &touched, 3);
        assert!(Arc::ptr_eq(&unchanged, compiler.health()), "nothing to tell, nothing made anew");
        let touched = cluster.delete(Kind::Service, "shop", "web").touched;
        compiler.compile(&cluster.state, &touched, 4);
        assert_eq!(compiler.health().checks.len(), 0);
        assert_eq!(compiler.health().no_local, NoLocalEndpoints::default());
    }

    #[test]
    fn ports_without_local_endpoints_are_counted_by_policy() {
        let literal = format!("{FRONTEND}\nexternal_traffic_policy = 'literal'");
        let no_local =
            |endpoints: &[&str], rest: &str| tables(&literal, &[service(rest), slice(endpoints)]).no_local;
        let both = format!("{CHECKED}\n  internalTrafficPolicy: Local");
        let expected =
            |internal, external| NoLocalEndpoints { internal: [internal, 0], external: [external, 0] };
        // Two ports; without any endpoint they are rejected, which is another matter.
        assert_eq!(no_local(&["ready@n1"], &both), expected(2, 2));
        assert_eq!(no_local(&["ready@n1"], CHECKED), expected(0, 2));
        assert_eq!(no_local(&["ready@n1", "ready@gw"], &both), expected(0, 0));
        assert_eq!(no_local(&["draining@gw"], &both), expected(0, 0));
        assert_eq!(no_local(&[], &both), expected(0, 0));
    }

    #[test]
    fn our_node_may_be_leaving() {
        let node =
            |name: &str, rest: &str| format!("kind: Node\nmetadata: {{name: {name}}}\nspec: {{{rest}}}\n");
        let taint = "taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]";
        for (objects, expected) in [
            (node("gw", ""), false),
            (node("gw", taint), true),
            (node("n1", taint), false),
            (String::new(), false),
        ] {
            assert_eq!(
                tables(FRONTEND, std::slice::from_ref(&objects)).node_is_leaving,
                expected,
                "{objects}"
            );
        }
    }
}
