//! Traffic policies, read as kube-proxy reads them on a node with pods: the gateway's own node.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::rig::ask::PATIENCE;
use crate::rig::cluster::Protocol::{Tcp, Udp};
use crate::rig::network::{GATEWAY, GATEWAY_V4, GATEWAY_V6};
use crate::rig::place::Place;
use crate::rig::service::{Service, Type};
use crate::scenario::{Scenario, run};
use crate::test::{Test, at, node_port, pod};

pub const SCENARIOS: &[Scenario] = &[
    run!("should respect internalTrafficPolicy=Local Pod to Pod", internal_pod_to_pod),
    run!("should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod", internal_node_to_pod),
    run!(
        "should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)",
        internal_to_host_network
    ),
    run!("should support externalTrafficPolicy=Local for type=NodePort", external_node_port, Literal),
    run!(
        "should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes",
        policy_changes,
        Literal
    ),
    run!(
        "should fail health check node port if there are only terminating endpoints",
        health_of_terminating,
        Literal
    ),
];

/// The node that is asked has an endpoint, or has not.
fn internal_pod_to_pod(test: &mut Test) -> Result<()> {
    let client = test.start(pod("pause-pod-0", GATEWAY))?;
    internal_local(test, &client)
}

fn internal_node_to_pod(test: &mut Test) -> Result<()> {
    let client = test.node("node-1");
    internal_local(test, &client)
}

/// The endpoint has its node's address, which is in no pod range. Rule 4.1.
fn internal_to_host_network(test: &mut Test) -> Result<()> {
    let service = Service::new("svc-itp").port(Tcp, 80, 80).port(Udp, 80, 80);
    let service = test.create(service.with(|service| service.internal_local = true))?;
    let addresses = at(&service.cluster_ips, 80);
    let web =
        |name: &str, node: &str| pod(name, node).of("svc-itp").listen(Tcp, 80).listen(Udp, 80).host_network();
    let clients = [test.start(pod("pause-pod-0", GATEWAY))?, test.node("node-2")];
    test.start(web("echo-hostname-0", GATEWAY))?;
    test.start(web("echo-hostname-1", "node-1"))?;
    for client in &clients {
        for protocol in [Tcp, Udp] {
            test.reaches_all(client, protocol, &addresses, &["echo-hostname-0"])?;
        }
    }
    test.delete("echo-hostname-0")?;
    for client in &clients {
        for to in &addresses {
            test.dropped(client, Tcp, *to, "no_local_endpoints")?;
            test.dropped(client, Udp, *to, "no_local_endpoints")?;
        }
    }
    Ok(())
}

/// Rule 4.1.
fn internal_local(test: &mut Test, client: &Place) -> Result<()> {
    let service = Service::new("svc-itp").port(Tcp, 80, 80).port(Udp, 80, 80);
    let service = test.create(service.with(|service| service.internal_local = true))?;
    let addresses = at(&service.cluster_ips, 80);
    let web = |name: &str, node: &str| pod(name, node).of("svc-itp").listen(Tcp, 80).listen(Udp, 80);
    test.start(web("echo-hostname-0", GATEWAY))?;
    test.start(web("echo-hostname-1", "node-1"))?;
    for protocol in [Tcp, Udp] {
        test.reaches_all(client, protocol, &addresses, &["echo-hostname-0"])?;
    }
    test.delete("echo-hostname-0")?;
    for to in &addresses {
        test.dropped(client, Tcp, *to, "no_local_endpoints")?;
        test.dropped(client, Udp, *to, "no_local_endpoints")?;
    }
    test.update("svc-itp", |service| service.internal_local = false)?;
    test.reaches_all(client, Tcp, &addresses, &["echo-hostname-1"])?;
    Ok(())
}

/// Rules 4.2, 4.3, 5.2, 5.3, 14.2.
fn external_node_port(test: &mut Test) -> Result<()> {
    let service = Service::new("external-local-nodeport").of_type(Type::NodePort).port(Tcp, 80, 80);
    let service = test.create(service.with(|service| service.external_local = true))?;
    let addresses = node_port(&service, 0)?;
    let client = test.client();
    let web = |name: &str, node: &str| pod(name, node).of("external-local-nodeport").listen(Tcp, 80);
    test.start(web("local", GATEWAY))?;
    test.start(web("elsewhere", "node-1"))?;
    keeps_the_client(test, &client, &addresses, &["local"])?;
    // Pods and nodes are taken as if they had gone out and come in again where an endpoint is.
    let inside = test.start(pod("execpod", "node-2"))?;
    keeps_the_client(test, &inside, &addresses, &["local", "elsewhere"])?;
    test.reaches_all(&test.node("node-2"), Tcp, &addresses, &["local", "elsewhere"])?;
    test.delete("local")?;
    for to in &addresses {
        test.dropped(&client, Tcp, *to, "no_local_endpoints")?;
    }
    keeps_the_client(test, &inside, &addresses, &["elsewhere"])
}

fn keeps_the_client(test: &Test, from: &Place, to: &[SocketAddr], pods: &[&str]) -> Result<()> {
    for answer in test.reaches_all(from, Tcp, to, pods)? {
        ensure!(from.addresses().contains(&answer.client.ip()), "{} asked, {answer:?}", from.name);
    }
    Ok(())
}

/// Rules 5.1, 10.1, 10.3.
fn policy_changes(test: &mut Test) -> Result<()> {
    let service = Service::new("external-local-update").of_type(Type::LoadBalancer).port(Tcp, 80, 80);
    let service = test.create(service.with(|service| service.external_local = true))?;
    let client = test.client();
    let web = |name: &str, node: &str| pod(name, node).of("external-local-update").listen(Tcp, 80);
    test.start(web("local", GATEWAY))?;
    test.start(web("elsewhere", "node-1"))?;
    let addresses = node_port(&service, 0)?;
    let health = health_of(&service)?;
    keeps_the_client(test, &client, &addresses, &["local"])?;
    is_healthy(&client, &health, 1)?;
    let cluster = test.update("external-local-update", |service| service.external_local = false)?;
    ensure!(cluster.health_check_node_port.is_none());
    for answer in test.reaches_all(&client, Tcp, &addresses, &["local", "elsewhere"])? {
        ensure!(!client.addresses().contains(&answer.client.ip()), "masqueraded: {answer:?}");
    }
    is_closed(&client, &health)?;
    let service = test.update("external-local-update", |service| service.external_local = true)?;
    let health = health_of(&service)?;
    keeps_the_client(test, &client, &addresses, &["local"])?;
    is_healthy(&client, &health, 1)?;
    test.delete("local")?;
    test.dropped(&client, Tcp, addresses[0], "no_local_endpoints")?;
    is_unhealthy(&client, &health)
}

/// Rule 10.2.
fn health_of_terminating(test: &mut Test) -> Result<()> {
    let service = Service::new("svc-proxy-terminating").of_type(Type::LoadBalancer).port(Tcp, 80, 80);
    let service = test.create(service.with(|service| service.external_local = true))?;
    let client = test.client();
    test.start(pod("webserver", GATEWAY).of("svc-proxy-terminating").listen(Tcp, 80))?;
    let health = health_of(&service)?;
    is_healthy(&client, &health, 1)?;
    test.terminate("webserver")?;
    is_unhealthy(&client, &health)?;
    // It still serves whoever comes.
    keeps_the_client(test, &client, &node_port(&service, 0)?, &["webserver"])
}

/// Where load balancers ask whether this node has endpoints.
fn health_of(service: &Service) -> Result<Vec<SocketAddr>> {
    let port = service.health_check_node_port.context("the Service has no healthCheckNodePort")?;
    Ok(vec![SocketAddr::new(GATEWAY_V4.into(), port), SocketAddr::new(GATEWAY_V6.into(), port)])
}

/// 200, and so many local endpoints (kubernetes pkg/proxy/healthcheck/service_health.go).
fn is_healthy(from: &Place, health: &[SocketAddr], endpoints: u32) -> Result<()> {
    becomes(from, health, &format!("200 and {endpoints} endpoints"), |(code, body)| {
        let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
        code == "200" && body["localEndpoints"] == endpoints
    })
}

/// 503, and none.
fn is_unhealthy(from: &Place, health: &[SocketAddr]) -> Result<()> {
    becomes(from, health, "503 and no endpoints", |(code, body)| {
        let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
        code == "503" && body["localEndpoints"] == 0
    })
}

/// Nobody listens.
fn is_closed(from: &Place, health: &[SocketAddr]) -> Result<()> {
    becomes(from, health, "nobody", |(code, _)| code == "000")
}

/// Waits until all of them answer so: the servers follow the tables within a moment.
fn becomes(
    from: &Place,
    health: &[SocketAddr],
    what: &str,
    is_right: impl Fn((&str, &str)) -> bool,
) -> Result<()> {
    for to in health {
        let start = Instant::now();
        loop {
            let url = format!("http://{to}/healthz");
            let output =
                from.namespace.output("curl", &["-s", "--max-time", "5", "-w", "\n%{http_code}", &url])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let (body, code) = text.rsplit_once('\n').context("an answer of curl")?;
            if is_right((code, body)) {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "{to} says {code}, not {what}: {body}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}
