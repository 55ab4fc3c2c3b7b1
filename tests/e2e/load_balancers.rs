//! LoadBalancers: the gateway is the load balancer, clients are outside.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail, ensure};

use crate::conntrack::{cycle, udp_service};
use crate::rig::ask::PATIENCE;
use crate::rig::cluster::Protocol::{self, Tcp, Udp};
use crate::rig::place::Place;
use crate::rig::service::{Service, Type};
use crate::scenario::{Group, Scenario, not_applicable, run};
use crate::services::{spreads, sticks};
use crate::test::{Test, at, node_port, pod};

pub const GROUPS: &[Group] = &[
    Group { name: "LoadBalancers", scenarios: LOAD_BALANCERS },
    Group { name: "LoadBalancers ExternalTrafficPolicy: Local", scenarios: EXTERNAL_LOCAL },
];

const LOAD_BALANCERS: &[Scenario] = &[
    run!("should be able to change the type and ports of a TCP service", type_and_ports(Tcp)),
    run!("should be able to change the type and ports of a UDP service", type_and_ports(Udp)),
    run!("should only allow access from service loadbalancer source ranges", source_ranges),
    run!(
        "should have session affinity work for LoadBalancer service with Local traffic policy",
        affinity(true)
    ),
    run!(
        "should have session affinity work for LoadBalancer service with Cluster traffic policy",
        affinity(false)
    ),
    run!(
        "should be able to switch session affinity for LoadBalancer service with Local traffic policy",
        affinity_switches(true)
    ),
    run!(
        "should be able to switch session affinity for LoadBalancer service with Cluster traffic policy",
        affinity_switches(false)
    ),
    not_applicable(
        "should handle load balancer cleanup finalizer for service",
        "finalizers: the API server and the load balancer's controller",
    ),
    run!("should be able to create LoadBalancer Service without NodePort and change it", without_node_port),
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on different nodes",
        udp_cycle("node-2")
    ),
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on the same nodes",
        udp_cycle("node-1")
    ),
    run!(
        "should not have connectivity disruption during rolling update with externalTrafficPolicy=Cluster",
        rolling_update(false)
    ),
    run!(
        "should not have connectivity disruption during rolling update with externalTrafficPolicy=Local",
        rolling_update(true)
    ),
];

const EXTERNAL_LOCAL: &[Scenario] = &[
    run!("should work for type=LoadBalancer", client_is_kept),
    run!("should only target nodes with endpoints", only_nodes_with_endpoints),
    run!("should target all nodes with endpoints", all_nodes_with_endpoints),
    run!("should work from pods", from_pods),
];

/// A Service of type LoadBalancer with one port.
fn balanced(name: &str, protocol: Protocol, local: bool) -> Service {
    let service = Service::new(name).of_type(Type::LoadBalancer).port(protocol, 80, 80);
    service.with(|service| service.external_local = local)
}

fn type_and_ports(test: &mut Test, protocol: Protocol) -> Result<()> {
    let name = "mutability-test";
    let client = test.client();
    test.create(Service::new(name).port(protocol, 80, 80))?;
    let mut pods = test.replicas(name, 1, &[protocol])?;
    let service = test.update(name, |service| service.type_ = Type::NodePort)?;
    let outer = node_port(&service, 0)?;
    test.reaches_all(&client, protocol, &outer, &pods)?;
    let service = test.update(name, |service| service.type_ = Type::LoadBalancer)?;
    ensure!(node_port(&service, 0)? == outer, "the NodePort stays: {service:?}");
    let vips = service.load_balancer_ips.clone();
    test.reaches_all(&client, protocol, &outer, &pods)?;
    test.reaches_all(&client, protocol, &at(&vips, 80), &pods)?;
    // Another NodePort.
    let service = test.update(name, |service| service.ports[0].node_port = None)?;
    let (old, outer) = (outer, node_port(&service, 0)?);
    ensure!(outer != old && service.load_balancer_ips == vips);
    test.reaches_all(&client, protocol, &outer, &pods)?;
    test.closed(&client, protocol, old[0])?;
    test.reaches_all(&client, protocol, &at(&vips, 80), &pods)?;
    // Another port.
    test.update(name, |service| service.ports[0].port = 81)?;
    test.reaches_all(&client, protocol, &outer, &pods)?;
    test.reaches_all(&client, protocol, &at(&vips, 81), &pods)?;
    test.rejected(&client, protocol, at(&vips, 80)[0], "unknown_port")?;
    // No pods, and pods again.
    test.delete(&pods.remove(0))?;
    for to in [&outer[..], &at(&vips, 81)].concat() {
        test.rejected(&client, protocol, to, "no_endpoints")?;
    }
    let pods = test.replicas(name, 1, &[protocol])?;
    test.reaches_all(&client, protocol, &outer, &pods)?;
    test.reaches_all(&client, protocol, &at(&vips, 81), &pods)?;
    test.update(name, |service| service.type_ = Type::ClusterIp)?;
    // Steering shrinks after the tables: what comes in between belongs to nobody.
    test.allow("no_route");
    test.closed(&client, protocol, outer[0])?;
    test.closed(&client, protocol, at(&vips, 81)[0])
}

/// Rules 6.2, 6.3.
fn source_ranges(test: &mut Test) -> Result<()> {
    let name = "lb-sourcerange";
    let pods = test.replicas(name, 2, &[Tcp])?;
    let accepted = [test.start(pod("execpod-accept", "node-1"))?, test.client_number(0)];
    let dropped = [test.start(pod("execpod-drop", "node-2"))?, test.client_number(1)];
    let ranges = |places: &[Place]| -> Vec<String> {
        places.iter().flat_map(|place| [format!("{}/32", place.v4), format!("{}/128", place.v6)]).collect()
    };
    let service = balanced(name, Tcp, false).with(|service| service.source_ranges = ranges(&accepted));
    let service = test.create(service)?;
    let vips = at(&service.load_balancer_ips, 80);
    let check = |test: &mut Test, allowed: &[Place], refused: &[Place]| -> Result<()> {
        for place in allowed {
            test.reaches_all(place, Tcp, &vips, &pods)?;
        }
        for place in refused {
            for to in &vips {
                test.dropped(place, Tcp, *to, "source_range")?;
            }
            // Only the load balancer's addresses have the ranges (kubernetes pkg/proxy/nftables: "for better or for worse").
            test.reaches_all(place, Tcp, &node_port(&service, 0)?, &pods)?;
        }
        Ok(())
    };
    check(test, &accepted, &dropped)?;
    test.update(name, |service| service.source_ranges = ranges(&dropped))?;
    check(test, &dropped, &accepted)?;
    test.update(name, |service| service.source_ranges.clear())?;
    check(test, &[accepted, dropped].concat(), &[])
}

/// Three pods behind a load balancer: its addresses.
fn affine(test: &mut Test, local: bool, affinity_s: Option<u32>) -> Result<Vec<SocketAddr>> {
    test.replicas("affinity-lb", 3, &[Tcp])?;
    let service = balanced("affinity-lb", Tcp, local).with(|service| service.affinity_s = affinity_s);
    Ok(at(&test.create(service)?.load_balancer_ips, 80))
}

fn affinity(test: &mut Test, local: bool) -> Result<()> {
    let addresses = affine(test, local, Some(10_800))?;
    for number in 0..4 {
        for to in &addresses {
            sticks(test, &test.client_number(number), Tcp, *to)?;
        }
    }
    Ok(())
}

fn affinity_switches(test: &mut Test, local: bool) -> Result<()> {
    let addresses = affine(test, local, None)?;
    let client = test.client();
    for affinity_s in [None, Some(10_800), None] {
        test.update("affinity-lb", |service| service.affinity_s = affinity_s)?;
        for to in &addresses {
            match affinity_s {
                None => spreads(test, &client, Tcp, *to)?,
                Some(_) => drop(sticks(test, &client, Tcp, *to)?),
            }
        }
    }
    Ok(())
}

/// Rule 6.5.
fn without_node_port(test: &mut Test) -> Result<()> {
    let name = "reallocate-nodeport-test";
    let client = test.client();
    let pods = test.replicas(name, 1, &[Tcp])?;
    let service = balanced(name, Tcp, false).with(|service| service.node_ports = false);
    let service = test.create(service)?;
    ensure!(service.ports[0].node_port.is_none(), "{service:?}");
    let vips = at(&service.load_balancer_ips, 80);
    test.reaches_all(&client, Tcp, &vips, &pods)?;
    let service = test.update(name, |service| service.node_ports = true)?;
    test.reaches_all(&client, Tcp, &vips, &pods)?;
    test.reaches_all(&client, Tcp, &node_port(&service, 0)?, &pods)?;
    Ok(())
}

/// Both pods on node-1, or the second one on another node.
fn udp_cycle(test: &mut Test, second: &str) -> Result<()> {
    let service = test.create(udp_service(Type::LoadBalancer))?;
    let clients = [test.client_number(0), test.client_number(1)];
    cycle(test, &clients, &at(&service.load_balancer_ips, 80), ["node-1", second])
}

/// Pods are replaced one by one, each by the life of a pod: the new one becomes ready, the old one terminates and serves on
/// for its grace period. Not one request may fail.
fn rolling_update(test: &mut Test, local: bool) -> Result<()> {
    let service = test.create(balanced("agnhost", Tcp, local))?;
    let web = |generation: u32, node: u32| {
        pod(&format!("agnhost-{generation}-{node}"), &format!("node-{node}")).of("agnhost").listen(Tcp, 80)
    };
    for node in 1..=3 {
        test.start(web(0, node))?;
    }
    let stop = AtomicBool::new(false);
    let client = test.client();
    std::thread::scope(|scope| {
        let (from, stopped) = (&client, &stop);
        let load = |to| (to, scope.spawn(move || requests(from, to, stopped)));
        let loads: Vec<_> = at(&service.load_balancer_ips, 80).into_iter().map(load).collect();
        let update = (|| {
            for generation in 1..=3 {
                for node in 1..=3 {
                    test.start(web(generation, node))?;
                    let old = format!("agnhost-{}-{node}", generation - 1);
                    test.terminate(&old)?;
                    // The grace period, during which the requests that it has are done.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    test.delete(&old)?;
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        for (to, load) in loads {
            let Ok(answers) = load.join() else { bail!("{to}: panicked") };
            let answers = answers?;
            ensure!(answers.len() > 50, "only {} requests were made to {to}", answers.len());
            let kept =
                answers.iter().filter(|answer| client.addresses().contains(&answer.client.ip())).count();
            let expected = if local { answers.len() } else { 0 };
            ensure!(kept == expected, "{kept} of {} requests kept the client's address", answers.len());
        }
        update
    })
}

/// Requests one after the other, each a connection, until `stop`; all must be answered.
fn requests(client: &Place, to: SocketAddr, stop: &AtomicBool) -> Result<Vec<crate::rig::ask::Answer>> {
    let mut answers = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match client.ask(Tcp, to, PATIENCE)? {
            Ok(answer) => answers.push(answer),
            Err(why) => bail!("request {} to {to}: {why:?}", answers.len() + 1),
        }
    }
    Ok(answers)
}

/// The answers, each of which must show the client as it is.
fn kept(test: &Test, from: &Place, protocol: Protocol, to: &[SocketAddr], pods: &[&str]) -> Result<()> {
    for answer in test.reaches_all(from, protocol, to, pods)? {
        ensure!(from.addresses().contains(&answer.client.ip()), "{} asked, {answer:?}", from.name);
    }
    Ok(())
}

fn client_is_kept(test: &mut Test) -> Result<()> {
    let name = "external-local-lb";
    test.start(pod("web", "node-1").of(name).listen(Tcp, 80).listen(Udp, 80))?;
    let service = test.create(balanced(name, Tcp, true).port(Udp, 80, 80))?;
    let vips = at(&service.load_balancer_ips, 80);
    for number in [0, 1] {
        let client = test.client_number(number);
        kept(test, &client, Tcp, &vips, &["web"])?;
        kept(test, &client, Udp, &vips, &["web"])?;
    }
    Ok(())
}

/// One pod, on one node after the other. Rule 14.1.
fn only_nodes_with_endpoints(test: &mut Test) -> Result<()> {
    let name = "external-local-nodes";
    let service = test.create(balanced(name, Tcp, true))?;
    let vips = at(&service.load_balancer_ips, 80);
    let client = test.client();
    for node in ["node-1", "node-2", "node-3"] {
        let web = format!("web-{node}");
        test.start(pod(&web, node).of(name).listen(Tcp, 80))?;
        kept(test, &client, Tcp, &vips, &[&web])?;
        test.delete(&web)?;
        test.rejected(&client, Tcp, vips[0], "no_endpoints")?;
    }
    Ok(())
}

fn all_nodes_with_endpoints(test: &mut Test) -> Result<()> {
    let name = "external-local-update";
    let service = test.create(balanced(name, Tcp, true))?;
    let vips = at(&service.load_balancer_ips, 80);
    let client = test.client();
    let mut pods = Vec::new();
    for node in ["node-1", "node-2", "node-3"] {
        test.start(pod(node, node).of(name).listen(Tcp, 80))?;
        pods.push(node);
        kept(test, &client, Tcp, &vips, &pods)?;
    }
    // Those that terminate are used only when there is no other.
    test.terminate("node-1")?;
    kept(test, &client, Tcp, &vips, &["node-2", "node-3"])?;
    test.terminate("node-2")?;
    test.terminate("node-3")?;
    kept(test, &client, Tcp, &vips, &pods)
}

/// From a node without an endpoint, too; the pod's address is kept. Rule 4.3.
fn from_pods(test: &mut Test) -> Result<()> {
    let name = "external-local-pods";
    let service = test.create(balanced(name, Tcp, true))?;
    let vips = at(&service.load_balancer_ips, 80);
    test.start(pod("web", "node-1").of(name).listen(Tcp, 80))?;
    for node in ["node-1", "node-2"] {
        let client = test.start(pod(&format!("pause-{node}"), node))?;
        kept(test, &client, Tcp, &vips, &["web"])?;
    }
    test.reaches_all(&test.node("node-3"), Tcp, &vips, &["web"])?;
    Ok(())
}
