//! Host ports of the pods on the gateway's own node: one Pod to its frontends, by the rules of the CNI plugin portmap.
//!
//! A host port leads to its pod from every address of the node, or from `hostIP` alone, whoever asks. The client's address is kept;
//! only a pod that asks for itself is masqueraded, as every hairpin is. No pod sees whether another one has a host port.

use std::net::IpAddr;
use std::sync::Arc;

use config::control::ObjectRef;
use config::gateway::Algorithm;

use super::Compiler;
use super::endpoints::EndpointInfo;
use super::frontends::Outcome;
use super::lifetime::{Lifetime, Removal};
use super::service::{Builder, Compiled, FamilyPort, stable_hash};
use super::topology::{Categories, Chosen, TopologyMode};
use crate::addr::{Addr, protocol};
use crate::control::facts::{HostPort, PodFacts, PortFacts, ServiceFacts};
use crate::control::state::State;
use crate::tables::{Endpoint, Frontend, FrontendKey, FrontendKind, List, ServicePort};

impl Compiler {
    /// True if the host ports of a pod are ours to serve.
    pub(super) fn serves_host_ports(&self, pod: &PodFacts) -> bool {
        !pod.host_ports.is_empty() && pod.is_on(&self.gateway.gateway.name)
    }

    /// Compiles the host ports of one Pod; `None` if it does not exist or has none here.
    pub(super) fn compile_host_ports(&mut self, state: &State, reference: &ObjectRef) -> Option<Compiled> {
        let pod = state.pod(reference)?;
        if !self.serves_host_ports(pod) {
            return None;
        }
        let old = self.services.get(reference).cloned().unwrap_or_default();
        let mut compiled = Compiled::default();
        let removal = Removal::of(&ServiceFacts::default(), &self.gateway);
        let own = self.surroundings.own.clone();
        for host_port in &pod.host_ports {
            let stable_id = stable_id(reference, host_port);
            let id = self.id_of_port(&old, stable_id);
            compiled.ids.push((stable_id, id));
            let service = Arc::new(ServicePort {
                id,
                stable_id,
                namespace: reference.namespace.clone(),
                name: reference.name.clone(),
                port_name: host_port.name.clone(),
                resource_version: String::new(),
                affinity_timeout_s: None,
            });
            let port = PortFacts {
                name: host_port.name.clone(),
                protocol: host_port.protocol,
                port: host_port.host_port,
                node_port: None,
            };
            let mut families: Vec<FamilyPort<'_>> = pod
                .addresses
                .iter()
                .map(|(addr, _)| family_port(&port, *addr, host_port, reference, pod))
                .collect();
            compiled.endpoints.extend(self.assign_tallies(&mut families));
            let endpoints = families.iter().flat_map(|family| &family.endpoints);
            compiled.lifetimes.push((stable_id, Lifetime::new(removal, endpoints)));
            for family in &families {
                let mut builder = Builder {
                    key: self.key,
                    algorithm: Algorithm::Maglev,
                    old: &old.backends,
                    backends: &mut compiled.backends,
                };
                let outcome = Outcome::Dnat { chosen: &family.lists.local, masquerade: false };
                let action = builder.action(stable_id, outcome, &family.endpoints);
                let served =
                    own.iter().filter(|addr| addr.is_v4() == family.is_v4 && host_port.is_at(**addr));
                for addr in served {
                    let key = FrontendKey { addr: *addr, port: port.port, protocol: port.protocol };
                    let frontend = Frontend {
                        service: service.clone(),
                        kind: FrontendKind::HostPort,
                        from_outside: action.clone(),
                        from_pod: action.clone(),
                        from_node: action.clone(),
                        source_ranges: Arc::new([]),
                    };
                    compiled.frontends.push((key, Arc::new(frontend)));
                    if port.protocol == protocol::UDP {
                        compiled.udp_serving.push((key, Arc::new(family.serving())));
                    }
                }
            }
        }
        Some(compiled)
    }
}

/// A pod as the one endpoint of its host port, in the family of `addr`.
fn family_port<'a>(
    port: &'a PortFacts,
    addr: Addr,
    host_port: &HostPort,
    reference: &ObjectRef,
    pod: &PodFacts,
) -> FamilyPort<'a> {
    let endpoint = Endpoint {
        addr,
        port: host_port.container_port,
        name: format!("{}/{}", reference.namespace, reference.name).into(),
        node: pod.node.as_str().into(),
        weight: 1,
        tally: 0,
    };
    let info = EndpointInfo {
        endpoint,
        ready: true,
        serving: true,
        terminating: false,
        is_local: true,
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    };
    let chosen = |list| Chosen { list, indexes: vec![0], drained: Vec::new() };
    let lists = Categories {
        cluster: chosen(List::Cluster),
        local: chosen(List::Local),
        every_node: chosen(List::Local),
        has_any: true,
        topology: TopologyMode::Everywhere,
    };
    FamilyPort { port, is_v4: addr.is_v4(), endpoints: vec![info], lists }
}

/// The same for a host port of a Pod over restarts: what flows remember. No Service has a protocol behind a 0.
fn stable_id(pod: &ObjectRef, port: &HostPort) -> u64 {
    let host_ip = port.host_ip.map(|ip: IpAddr| ip.to_string()).unwrap_or_default();
    stable_hash(&[
        pod.namespace.as_bytes(),
        pod.name.as_bytes(),
        &port.host_port.to_be_bytes(),
        host_ip.as_bytes(),
        &[0, port.protocol],
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::compile::fixture::Cluster;
    use crate::tables::{Action, Origin};
    use config::control::Kind;

    const HEAD: &str = "[gateway]\nname = 'gw'\ncluster_cidrs = ['10.244.0.0/16', 'fd00:244::/48']\nservice_cidrs = ['10.96.0.0/16']\nreturn = 'routed'";
    const OWN: [&str; 3] = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];

    fn pod(name: &str, node: &str, last: u8, ports: &str) -> String {
        format!(
            "kind: Pod\nmetadata: {{name: {name}, namespace: default}}\nspec: {{nodeName: {node}, containers: [{{name: c, ports: [{ports}]}}]}}\n\
             status: {{podIPs: [{{ip: 10.244.1.{last}}}, {{ip: 'fd00:244::{last}'}}]}}\n"
        )
    }

    /// Every frontend as `192.0.2.1:80/TCP 10.244.1.1:8080`, in order.
    fn served(compiler: &Compiler) -> Vec<String> {
        let mut lines: Vec<String> = compiler
            .tables()
            .frontends
            .iter()
            .map(|(key, frontend)| {
                assert_eq!(frontend.kind, FrontendKind::HostPort);
                let mut endpoints = Vec::new();
                for origin in [Origin::Outside, Origin::Pod, Origin::Node] {
                    match frontend.action(origin) {
                        Action::Dnat { backends, masquerade: false, .. } => {
                            let [endpoint] = &*backends.endpoints else { panic!("{backends:?}") };
                            endpoints.push(format!("{}:{}", endpoint.addr, endpoint.port));
                        }
                        other => panic!("{other:?}"),
                    }
                }
                endpoints.dedup();
                let name = if key.protocol == 6 { "TCP" } else { "UDP" };
                format!("{}:{}/{name} {}", key.addr, key.port, endpoints.join(" "))
            })
            .collect();
        lines.sort();
        lines
    }

    /// Rule 7.3.
    #[test]
    fn a_host_port_is_on_every_address_of_its_node_or_on_one() {
        for (ports, expected) in [
            (
                "{containerPort: 80, hostPort: 8080}",
                &[
                    "192.0.2.1:8080/TCP 10.244.1.1:80",
                    "192.0.2.2:8080/TCP 10.244.1.1:80",
                    "2001:db8::1:8080/TCP fd00:244::1:80",
                ][..],
            ),
            (
                "{containerPort: 53, hostPort: 53, hostIP: 0.0.0.0, protocol: UDP}",
                &["192.0.2.1:53/UDP 10.244.1.1:53", "192.0.2.2:53/UDP 10.244.1.1:53"],
            ),
            ("{containerPort: 80, hostPort: 80, hostIP: '::'}", &["2001:db8::1:80/TCP fd00:244::1:80"]),
            ("{containerPort: 80, hostPort: 80, hostIP: 192.0.2.2}", &["192.0.2.2:80/TCP 10.244.1.1:80"]),
            ("{containerPort: 80, hostPort: 80, hostIP: 127.0.0.1}", &[]),
            ("{containerPort: 80}", &[]),
        ] {
            let cluster = Cluster::new(HEAD, &pod("a", "gw", 1, ports));
            assert_eq!(served(&cluster.compiler(&OWN)), expected, "{ports}");
            let set = cluster.compiler(&OWN).steer_set(&cluster.state, &[]);
            assert_eq!(set.local_ports.len(), expected.len(), "{ports}");
            assert!(set.vips.is_empty());
            let elsewhere = Cluster::new(HEAD, &pod("a", "node-1", 1, ports));
            assert!(served(&elsewhere.compiler(&OWN)).is_empty(), "it is on another node");
        }
    }

    /// Rule 7.3.
    #[test]
    fn one_number_is_many_host_ports_by_address_and_protocol() {
        let text = [
            pod("a", "gw", 1, "{containerPort: 80, hostPort: 80, hostIP: 192.0.2.1}"),
            pod("b", "gw", 2, "{containerPort: 80, hostPort: 80, hostIP: 192.0.2.2}"),
            pod("c", "gw", 3, "{containerPort: 80, hostPort: 80, hostIP: 192.0.2.1, protocol: UDP}"),
        ];
        let mut cluster = Cluster::new(HEAD, &text.join("---\n"));
        let all = [
            "192.0.2.1:80/TCP 10.244.1.1:80",
            "192.0.2.1:80/UDP 10.244.1.3:80",
            "192.0.2.2:80/TCP 10.244.1.2:80",
        ];
        assert_eq!(served(&cluster.compiler(&OWN)), all);
        // Another pod that wants one of them is refused, with both named, unless it is on another node.
        for (ports, conflict) in [
            ("{containerPort: 81, hostPort: 80}", "is taken by"),
            ("{containerPort: 81, hostPort: 80, hostIP: 0.0.0.0}", "is taken by"),
            ("{containerPort: 81, hostPort: 80, hostIP: 192.0.2.2}", "Pod default/b"),
            ("{containerPort: 81, hostPort: 61000, hostIP: 192.0.2.2}", "masquerade"),
            ("{containerPort: 81, hostPort: 70000}", "not a port"),
            ("{containerPort: 81, hostPort: 82, hostIP: here}", "hostIP"),
        ] {
            let faults = cluster.try_apply(&pod("d", "gw", 4, ports)).expect_err(ports);
            assert!(faults[0].to_string().contains(conflict), "{ports}: {}", faults[0]);
        }
        cluster.apply(&pod("d", "node-1", 4, "{containerPort: 81, hostPort: 80}"));
        cluster.apply(&pod("e", "gw", 5, "{containerPort: 81, hostPort: 80, hostIP: '::'}"));
        assert_eq!(served(&cluster.compiler(&OWN)).len(), 4);
    }

    #[test]
    fn a_node_port_and_a_host_port_exclude_each_other() {
        let service = "kind: Service\nmetadata: {name: s, namespace: default}\n\
                       spec: {type: NodePort, clusterIP: 10.96.0.1, ports: [{port: 80, nodePort: 30080}]}\n";
        let host_port = pod("a", "gw", 1, "{containerPort: 80, hostPort: 30080}");
        let mut cluster = Cluster::new(HEAD, service);
        let faults = cluster.try_apply(&host_port).expect_err("taken");
        assert!(faults[0].to_string().contains("Service default/s"), "{}", faults[0]);
        let mut cluster = Cluster::new(HEAD, &host_port);
        let faults = cluster.try_apply(service).expect_err("taken");
        assert!(faults[0].to_string().contains("Pod default/a"), "{}", faults[0]);
        cluster.delete(Kind::Pod, "default", "a");
        cluster.apply(service);
    }

    /// Rule 7.3.
    #[test]
    fn host_ports_come_and_go_with_their_pods() {
        let mut cluster = Cluster::new(HEAD, "");
        let mut compiler = cluster.compiler(&OWN);
        let ports = "{containerPort: 53, hostPort: 53, hostIP: 192.0.2.1, protocol: UDP}";
        let accepted = cluster.apply(&pod("a", "gw", 1, ports));
        let compilation = compiler.compile(&cluster.state, &accepted.touched, 2);
        assert!(compilation.steering_changed);
        assert_eq!(served(&compiler), ["192.0.2.1:53/UDP 10.244.1.1:53"]);
        let first = compiler.tables().frontends.iter().next().unwrap().1.service.stable_id;
        // Again, on another address.
        let accepted = cluster.apply(&pod("a", "gw", 2, ports));
        let compilation = compiler.compile(&cluster.state, &accepted.touched, 3);
        assert_eq!(served(&compiler), ["192.0.2.1:53/UDP 10.244.1.2:53"]);
        assert!(!compilation.udp_cleanup.is_empty(), "flows to the address before are to be forgotten");
        assert_eq!(compiler.tables().frontends.iter().next().unwrap().1.service.stable_id, first);
        // A pod that has ended serves nothing, while its object is still there.
        let ended = pod("a", "gw", 2, ports).replace("status: {", "status: {phase: Failed, ");
        let accepted = cluster.apply(&ended);
        compiler.compile(&cluster.state, &accepted.touched, 4);
        assert!(served(&compiler).is_empty());
        // Own addresses that come later.
        cluster.apply(&pod("b", "gw", 3, "{containerPort: 80, hostPort: 80, hostIP: 192.0.2.9}"));
        let mut compiler = cluster.compiler(&OWN);
        assert!(served(&compiler).is_empty());
        compiler.set_own_addresses(vec!["192.0.2.9".parse::<IpAddr>().unwrap().into()]);
        compiler.compile(&cluster.state, &[], 5);
        assert_eq!(served(&compiler), ["192.0.2.9:80/TCP 10.244.1.3:80"]);
    }
}
