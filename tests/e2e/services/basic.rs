//! Pods behind a Service: they come and go, and so do its ports and the Service itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::rig::cluster::Protocol::{Sctp, Tcp, Udp};
use crate::rig::service::{Service, ServicePort, Target, Type};
use crate::scenario::{Scenario, run};
use crate::test::{Test, at, node_port, pod};

pub const SCENARIOS: &[Scenario] = &[
    run!("should serve a basic endpoint from pods", basic_endpoint),
    run!("should serve multiport endpoints from pods", multiport),
    run!("should serve endpoints on same port and different protocols", same_port),
    run!(
        "should serve endpoints on same port and different protocol for internal traffic on Type LoadBalancer",
        same_port_of_load_balancer
    ),
    run!("should be updated after adding or deleting ports", ports_come_and_go),
    run!("should preserve source pod IP for traffic thru service cluster IP", source_is_kept),
    run!("should allow pods to hairpin back to themselves through services", hairpin),
    run!("should be able to up and down services", up_and_down),
    run!("should work after the service has been recreated", recreated),
    run!("should work after restarting kube-proxy", proxy_restarts),
    run!("should implement service.kubernetes.io/service-proxy-name", other_proxy),
    run!("should implement service.kubernetes.io/headless", headless_label),
    run!("should be rejected when no endpoints exist", no_endpoints),
    run!("should be rejected for evicted pods (no endpoints exist)", evicted),
    run!("should allow creating a basic SCTP service with pod and endpoints", sctp),
];

pub const LATENCY: &[Scenario] = &[run!("should not be very high", latency)];

pub const SERVICE_CIDRS: &[Scenario] =
    &[run!("should create Services and serve on different Service CIDRs", service_cidrs)];

fn basic_endpoint(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("endpoint-test2").port(Tcp, 80, 80))?;
    let client = test.start(pod("execpod", "node-2"))?;
    let addresses = at(&service.cluster_ips, 80);
    for to in &addresses {
        test.rejected(&client, Tcp, *to, "no_endpoints")?;
    }
    test.start(pod("pod1", "node-1").of("endpoint-test2").listen(Tcp, 80))?;
    test.reaches_all(&client, Tcp, &addresses, &["pod1"])?;
    test.start(pod("pod2", "node-2").of("endpoint-test2").listen(Tcp, 80))?;
    test.reaches_all(&client, Tcp, &addresses, &["pod1", "pod2"])?;
    test.delete("pod1")?;
    test.reaches_all(&client, Tcp, &addresses, &["pod2"])?;
    test.delete("pod2")?;
    for to in &addresses {
        test.rejected(&client, Tcp, *to, "no_endpoints")?;
    }
    Ok(())
}

/// Each pod has one of the two ports, so each port of the Service has one of the pods.
fn multiport(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("multi-endpoint-test").with(|service| {
        for (name, port, target) in [("portname1", 80, "svc1"), ("portname2", 81, "svc2")] {
            let (name, target) = (name.to_owned(), Target::Name(target));
            service.ports.push(ServicePort { name, protocol: Tcp, port, target, node_port: None });
        }
    }))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.start(pod("pod1", "node-1").of("multi-endpoint-test").listen_as("svc1", Tcp, 100))?;
    let [first, second] = [80, 81].map(|port| at(&service.cluster_ips, port));
    test.reaches_all(&client, Tcp, &first, &["pod1"])?;
    test.rejected(&client, Tcp, second[0], "no_endpoints")?;
    test.start(pod("pod2", "node-2").of("multi-endpoint-test").listen_as("svc2", Tcp, 101))?;
    test.reaches_all(&client, Tcp, &first, &["pod1"])?;
    test.reaches_all(&client, Tcp, &second, &["pod2"])?;
    test.delete("pod1")?;
    test.reaches_all(&client, Tcp, &second, &["pod2"])?;
    test.rejected(&client, Tcp, first[0], "no_endpoints")?;
    test.delete("pod2")?;
    test.rejected(&client, Tcp, second[1], "no_endpoints")
}

fn same_port(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("multiprotocol-test").port(Tcp, 80, 80))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.start(pod("pod1", "node-2").of("multiprotocol-test").listen(Tcp, 80).listen(Udp, 80))?;
    let addresses = at(&service.cluster_ips, 80);
    test.reaches_all(&client, Tcp, &addresses, &["pod1"])?;
    test.rejected(&client, Udp, addresses[0], "unknown_port")?;
    test.update("multiprotocol-test", |service| *service = service.clone().port(Udp, 80, 80))?;
    test.reaches_all(&client, Tcp, &addresses, &["pod1"])?;
    test.reaches_all(&client, Udp, &addresses, &["pod1"])?;
    test.update("multiprotocol-test", |service| service.ports.retain(|port| port.protocol == Udp))?;
    test.reaches_all(&client, Udp, &addresses, &["pod1"])?;
    test.rejected(&client, Tcp, addresses[0], "unknown_port")
}

fn same_port_of_load_balancer(test: &mut Test) -> Result<()> {
    let service = Service::new("multiprotocol-lb-test").of_type(Type::LoadBalancer);
    let service = test.create(service.port(Tcp, 80, 80).port(Udp, 80, 80))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.start(pod("pod1", "node-2").of("multiprotocol-lb-test").listen(Tcp, 80).listen(Udp, 80))?;
    for ips in [&service.cluster_ips, &service.load_balancer_ips] {
        test.reaches_all(&client, Tcp, &at(ips, 80), &["pod1"])?;
        test.reaches_all(&client, Udp, &at(ips, 80), &["pod1"])?;
    }
    Ok(())
}

/// Rule 4.5.
fn ports_come_and_go(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("edit-port-test").port(Tcp, 80, 80))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.start(pod("pod1", "node-1").of("edit-port-test").listen(Tcp, 80).listen(Udp, 80))?;
    let [first, second] = [80, 81].map(|port| at(&service.cluster_ips, port));
    test.reaches_all(&client, Tcp, &first, &["pod1"])?;
    test.rejected(&client, Tcp, second[0], "unknown_port")?;
    test.update("edit-port-test", |service| *service = service.clone().port(Tcp, 81, 80).port(Udp, 80, 80))?;
    test.reaches_all(&client, Tcp, &first, &["pod1"])?;
    test.reaches_all(&client, Tcp, &second, &["pod1"])?;
    test.reaches_all(&client, Udp, &first, &["pod1"])?;
    test.update("edit-port-test", |service| service.ports.retain(|port| port.port == 81))?;
    test.reaches_all(&client, Tcp, &second, &["pod1"])?;
    test.rejected(&client, Tcp, first[0], "unknown_port")?;
    test.rejected(&client, Udp, first[0], "unknown_port")
}

/// Rule 5.5.
fn source_is_kept(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("sourceip-test").port(Tcp, 8080, 8080))?;
    test.start(pod("echo-sourceip", "node-1").of("sourceip-test").listen(Tcp, 8080))?;
    for node in ["node-1", "node-2", "node-3"] {
        let client = test.start(pod(&format!("pause-{node}"), node))?;
        for to in at(&service.cluster_ips, 8080) {
            for answer in test.reaches(&client, Tcp, to, &["echo-sourceip"])? {
                let own = client.address_towards(to.ip());
                ensure!(answer.client.ip() == own, "{own} asked, and the pod saw {}", answer.client);
            }
        }
    }
    Ok(())
}

/// Rule 5.6.
fn hairpin(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("hairpin-test").port(Tcp, 8080, 80).port(Udp, 8080, 80))?;
    let this = test.start(pod("hairpin", "node-1").of("hairpin-test").listen(Tcp, 80).listen(Udp, 80))?;
    for protocol in [Tcp, Udp] {
        for to in at(&service.cluster_ips, 8080) {
            for answer in test.reaches(&this, protocol, to, &["hairpin"])? {
                ensure!(!this.addresses().contains(&answer.client.ip()), "the pod saw itself: {answer:?}");
            }
        }
    }
    Ok(())
}

fn up_and_down(test: &mut Test) -> Result<()> {
    let client = test.start(pod("verify-service-up", "node-2"))?;
    let up = |test: &mut Test, name: &str| -> Result<_> {
        let pods = test.replicas(name, 3, &[Tcp])?;
        let service = test.create(Service::new(name).port(Tcp, 80, 80))?;
        Ok((pods, at(&service.cluster_ips, 80)))
    };
    let (first_pods, first) = up(test, "up-down-1")?;
    let (second_pods, second) = up(test, "up-down-2")?;
    test.reaches_all(&client, Tcp, &first, &first_pods)?;
    test.reaches_all(&client, Tcp, &second, &second_pods)?;
    test.remove("up-down-1")?;
    for pod in first_pods {
        test.delete(&pod)?;
    }
    test.dropped(&client, Tcp, first[0], "unknown_service")?;
    test.dropped(&client, Tcp, first[1], "unknown_service")?;
    test.reaches_all(&client, Tcp, &second, &second_pods)?;
    let (third_pods, third) = up(test, "up-down-3")?;
    test.reaches_all(&client, Tcp, &second, &second_pods)?;
    test.reaches_all(&client, Tcp, &third, &third_pods)?;
    Ok(())
}

fn recreated(test: &mut Test) -> Result<()> {
    let pods = test.replicas("service-deletion", 2, &[Tcp])?;
    let client = test.start(pod("execpod", "node-1"))?;
    let outside = test.client();
    let service = Service::new("service-deletion").of_type(Type::NodePort).port(Tcp, 80, 80);
    let service = test.create(service)?;
    let (inner, outer) = (at(&service.cluster_ips, 80), node_port(&service, 0)?);
    test.reaches_all(&client, Tcp, &inner, &pods)?;
    test.reaches_all(&outside, Tcp, &outer, &pods)?;
    test.remove("service-deletion")?;
    test.dropped(&client, Tcp, inner[0], "unknown_service")?;
    test.closed(&outside, Tcp, outer[0])?;
    // With the addresses and the NodePort that it had.
    test.create(service)?;
    test.reaches_all(&client, Tcp, &inner, &pods)?;
    test.reaches_all(&outside, Tcp, &outer, &pods)?;
    Ok(())
}

fn proxy_restarts(test: &mut Test) -> Result<()> {
    let client = test.start(pod("verify-service-up", "node-2"))?;
    let mut pods = test.replicas("restart-proxy-1", 3, &[Tcp])?;
    let service = test.create(Service::new("restart-proxy-1").port(Tcp, 80, 80))?;
    let addresses = at(&service.cluster_ips, 80);
    test.reaches_all(&client, Tcp, &addresses, &pods)?;
    let mut connection = client.connect(addresses[0])?;
    let before = connection.ask()?;
    test.kill_and_restart_gateway()?;
    // What it knew is in force at once, and connections go on.
    ensure!(connection.ask()? == before, "the connection was to {before:?}");
    drop(connection);
    test.reaches_all(&client, Tcp, &addresses, &pods)?;
    test.delete(&pods.remove(0))?;
    test.reaches_all(&client, Tcp, &addresses, &pods)?;
    let pods = test.replicas("restart-proxy-2", 2, &[Tcp])?;
    let service = test.create(Service::new("restart-proxy-2").port(Tcp, 80, 80))?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
    Ok(())
}

/// Rule 1.4.
fn other_proxy(test: &mut Test) -> Result<()> {
    labelled(test, "service.kubernetes.io/service-proxy-name", "foo-bar")
}

/// Rule 1.4.
fn headless_label(test: &mut Test) -> Result<()> {
    labelled(test, "service.kubernetes.io/headless", "")
}

/// A Service with such a label is not ours, from the beginning on or later, and can become ours.
fn labelled(test: &mut Test, label: &str, value: &str) -> Result<()> {
    let with_label = |service: &mut Service| {
        service.labels.insert(label.to_owned(), value.to_owned());
    };
    let client = test.start(pod("verify-service", "node-2"))?;
    let pods = test.replicas("service-disabled", 2, &[Tcp])?;
    let disabled = test.create(Service::new("service-disabled").port(Tcp, 80, 80).with(with_label))?;
    let toggled_pods = test.replicas("service-toggled", 2, &[Tcp])?;
    let toggled = test.create(Service::new("service-toggled").port(Tcp, 80, 80))?;
    let (disabled, toggled) = (at(&disabled.cluster_ips, 80), at(&toggled.cluster_ips, 80));
    test.reaches_all(&client, Tcp, &toggled, &toggled_pods)?;
    test.dropped(&client, Tcp, disabled[0], "unknown_service")?;
    test.update("service-toggled", with_label)?;
    test.dropped(&client, Tcp, toggled[0], "unknown_service")?;
    test.dropped(&client, Tcp, toggled[1], "unknown_service")?;
    test.update("service-toggled", |service| service.labels.clear())?;
    test.reaches_all(&client, Tcp, &toggled, &toggled_pods)?;
    test.dropped(&client, Tcp, disabled[1], "unknown_service")?;
    test.update("service-disabled", |service| service.labels.clear())?;
    test.reaches_all(&client, Tcp, &disabled, &pods)?;
    Ok(())
}

/// Rules 4.1, 4.2, 4.4.
fn no_endpoints(test: &mut Test) -> Result<()> {
    let service = Service::new("no-pods").of_type(Type::NodePort).port(Tcp, 80, 80).port(Udp, 80, 80);
    let service = test.create(service)?;
    let client = test.start(pod("execpod-noendpoints", "node-1"))?;
    let (node, outside) = (test.node("node-2"), test.client());
    for protocol in [Tcp, Udp] {
        for to in at(&service.cluster_ips, 80) {
            test.rejected(&client, protocol, to, "no_endpoints")?;
            test.rejected(&node, protocol, to, "no_endpoints")?;
        }
        for to in node_port(&service, 0)? {
            test.rejected(&outside, protocol, to, "no_endpoints")?;
            test.rejected(&client, protocol, to, "no_endpoints")?;
        }
    }
    Ok(())
}

fn evicted(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("evicted-pods").port(Tcp, 80, 80))?;
    let client = test.start(pod("execpod-evictedpods", "node-1"))?;
    test.start(pod("evicted-pods", "node-2").of("evicted-pods").listen(Tcp, 80))?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &["evicted-pods"])?;
    test.evict("evicted-pods")?;
    for to in at(&service.cluster_ips, 80) {
        test.rejected(&client, Tcp, to, "no_endpoints")?;
    }
    Ok(())
}

/// No SCTP of the kernel: associations are made by raw packets. Rule 11.2.
fn sctp(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("sctp-endpoint-test").port(Sctp, 5060, 5060))?;
    let client = test.start(pod("client", "node-2"))?;
    test.start(pod("pod1", "node-1").of("sctp-endpoint-test").listen(Sctp, 5060))?;
    test.reaches_all(&client, Sctp, &at(&service.cluster_ips, 5060), &["pod1"])?;
    test.delete("pod1")?;
    test.allow("no_endpoints");
    test.closed(&client, Sctp, service_address(&service))?;
    test.remove("sctp-endpoint-test")?;
    test.dropped(&client, Sctp, service_address(&service), "unknown_service")
}

fn service_address(service: &Service) -> std::net::SocketAddr {
    at(&service.cluster_ips, 5060)[0]
}

/// From the change to the first answer, for one new Service after the other. Upstream's limits: 20 s for half of them, 50 s
/// for 99 of 100.
fn latency(test: &mut Test) -> Result<()> {
    let client = test.start(pod("client", "node-2"))?;
    test.start(pod("svc-latency-rc", "node-1").of("svc-latency-rc").listen(Tcp, 80))?;
    let mut took = Vec::new();
    for number in 0..20 {
        let start = Instant::now();
        let mut service = Service::new(&format!("latency-svc-{number}")).port(Tcp, 80, 80);
        service.app = "svc-latency-rc".to_owned();
        let service = test.create(service)?;
        test.reaches(&client, Tcp, at(&service.cluster_ips, 80)[0], &["svc-latency-rc"])?;
        took.push(start.elapsed());
    }
    took.sort();
    println!(
        "    a new Service answers after {:?} (median), {:?} (worst)",
        took[took.len() / 2],
        took[took.len() - 1]
    );
    ensure!(took[took.len() / 2] < Duration::from_secs(20), "half of them took longer than 20 s: {took:?}");
    ensure!(took[took.len() - 1] < Duration::from_secs(50), "one took longer than 50 s: {took:?}");
    Ok(())
}

/// A ClusterIP may be of a range that the gateway file does not know.
fn service_cidrs(test: &mut Test) -> Result<()> {
    let client = test.start(pod("execpod", "node-1"))?;
    let outside = test.client();
    let pods = test.replicas("cidr", 2, &[Tcp])?;
    let mut seen = BTreeSet::new();
    for (name, ips) in [("cidr1", ["10.97.0.5", "fd00:97::5"]), ("cidr2", ["172.20.0.5", "fd00:98::5"])] {
        let mut service = Service::new(name).of_type(Type::NodePort).port(Tcp, 80, 80);
        service.app = "cidr".to_owned();
        service.cluster_ips = ips.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?;
        let service = test.create(service)?;
        seen.extend(service.cluster_ips.iter().copied());
        test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
        test.reaches_all(&outside, Tcp, &node_port(&service, 0)?, &pods)?;
    }
    ensure!(seen.len() == 4, "{seen:?}");
    Ok(())
}
