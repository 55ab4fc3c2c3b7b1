//! Pods that are not ready, and pods that terminate.

use anyhow::{Result, ensure};

use crate::rig::cluster::Protocol::Tcp;
use crate::rig::network::GATEWAY;
use crate::rig::service::{Service, Type};
use crate::scenario::{Scenario, run};
use crate::test::{Test, at, node_port, pod};

pub const SCENARIOS: &[Scenario] = &[
    run!("should create endpoints for unready pods", unready),
    run!(
        "should be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is true",
        published(true)
    ),
    run!(
        "should not be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is false",
        published(false)
    ),
    run!(
        "should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster",
        internal_cluster
    ),
    run!(
        "should fallback to local terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Local",
        internal_local
    ),
    run!(
        "should fallback to terminating endpoints when there are no ready endpoints with externallTrafficPolicy=Cluster",
        external_cluster
    ),
    run!(
        "should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local",
        external_local,
        Literal
    ),
];

fn unready(test: &mut Test) -> Result<()> {
    let mut service = Service::new("tolerate-unready").port(Tcp, 80, 80);
    service.publish_not_ready = true;
    let service = test.create(service)?;
    let addresses = at(&service.cluster_ips, 80);
    let client = test.start(pod("execpod", "node-1"))?;
    test.start(pod("slow-terminating", "node-2").of("tolerate-unready").listen(Tcp, 80).unready())?;
    test.reaches_all(&client, Tcp, &addresses, &["slow-terminating"])?;
    test.terminate("slow-terminating")?;
    test.update("tolerate-unready", |service| service.publish_not_ready = false)?;
    for to in &addresses {
        test.rejected(&client, Tcp, *to, "no_endpoints")?;
    }
    test.update("tolerate-unready", |service| service.publish_not_ready = true)?;
    test.reaches_all(&client, Tcp, &addresses, &["slow-terminating"])?;
    test.delete("slow-terminating")
}

/// A ready pod, one that is not, one that terminates, and one that does both. Rule 3.5.
fn published(test: &mut Test, publish: bool) -> Result<()> {
    let mut service = Service::new("webserver").of_type(Type::NodePort).port(Tcp, 80, 80);
    service.publish_not_ready = publish;
    let service = test.create(service)?;
    let client = test.start(pod("client", "node-1"))?;
    let web = |name: &str, node: &str| pod(name, node).of("webserver").listen(Tcp, 80);
    test.start(web("unready", "node-1").unready())?;
    test.start(web("unready-terminating", "node-2").unready())?;
    test.terminate("unready-terminating")?;
    let addresses = [at(&service.cluster_ips, 80), node_port(&service, 0)?].concat();
    if publish {
        test.reaches_all(&client, Tcp, &addresses, &["unready", "unready-terminating"])?;
        test.start(web("ready-terminating", "node-1"))?;
        test.terminate("ready-terminating")?;
        let all = ["unready", "unready-terminating", "ready-terminating"];
        test.reaches_all(&client, Tcp, &addresses, &all)?;
        return Ok(());
    }
    for to in &addresses {
        test.rejected(&client, Tcp, *to, "no_endpoints")?;
    }
    test.start(web("ready", "node-2"))?;
    test.start(web("ready-terminating", "node-1"))?;
    test.terminate("ready-terminating")?;
    test.reaches_all(&client, Tcp, &addresses, &["ready"])?;
    // The last resort: one that terminates and still serves, never one that does not.
    test.delete("ready")?;
    test.reaches_all(&client, Tcp, &addresses, &["ready-terminating"])?;
    Ok(())
}

/// Rules 3.1, 9.1.
fn internal_cluster(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("webserver").port(Tcp, 80, 80))?;
    let addresses = at(&service.cluster_ips, 80);
    let clients = [test.start(pod("pause-0", "node-1"))?, test.start(pod("pause-1", "node-2"))?];
    test.start(pod("webserver", "node-1").of("webserver").listen(Tcp, 80))?;
    let mut connection = clients[1].connect(addresses[0])?;
    test.terminate("webserver")?;
    for client in &clients {
        test.reaches_all(client, Tcp, &addresses, &["webserver"])?;
    }
    ensure!(connection.ask()?.pod == "webserver");
    // Until there is a ready one again; connections stay where they are.
    test.start(pod("replacement", "node-2").of("webserver").listen(Tcp, 80))?;
    for client in &clients {
        test.reaches_all(client, Tcp, &addresses, &["replacement"])?;
    }
    ensure!(connection.ask()?.pod == "webserver");
    Ok(())
}

/// Rules 3.2, 3.3.
fn internal_local(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("webserver").port(Tcp, 80, 80).with(|service| {
        service.internal_local = true;
    }))?;
    let addresses = at(&service.cluster_ips, 80);
    let client = test.start(pod("pause-0", GATEWAY))?;
    let web = |name: &str, node: &str| pod(name, node).of("webserver").listen(Tcp, 80);
    test.start(web("local", GATEWAY))?;
    test.terminate("local")?;
    // A ready one elsewhere changes nothing: the fallback is the local list's own.
    test.start(web("elsewhere", "node-1"))?;
    test.reaches_all(&client, Tcp, &addresses, &["local"])?;
    test.delete("local")?;
    for to in &addresses {
        test.dropped(&client, Tcp, *to, "no_local_endpoints")?;
    }
    test.terminate("elsewhere")?;
    test.dropped(&client, Tcp, addresses[0], "no_local_endpoints")
}

fn external_cluster(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("webserver").of_type(Type::NodePort).port(Tcp, 80, 80))?;
    let addresses = node_port(&service, 0)?;
    test.start(pod("webserver", "node-1").of("webserver").listen(Tcp, 80))?;
    test.terminate("webserver")?;
    let inside = test.start(pod("pause-0", "node-2"))?;
    for client in [test.client(), inside, test.node("node-3")] {
        test.reaches_all(&client, Tcp, &addresses, &["webserver"])?;
    }
    Ok(())
}

fn external_local(test: &mut Test) -> Result<()> {
    let service =
        test.create(Service::new("webserver").of_type(Type::NodePort).port(Tcp, 80, 80).with(|service| {
            service.external_local = true;
        }))?;
    let addresses = node_port(&service, 0)?;
    let client = test.client();
    let web = |name: &str, node: &str| pod(name, node).of("webserver").listen(Tcp, 80);
    test.start(web("local", GATEWAY))?;
    test.terminate("local")?;
    test.start(web("elsewhere", "node-1"))?;
    for answer in test.reaches_all(&client, Tcp, &addresses, &["local"])? {
        ensure!(client.addresses().contains(&answer.client.ip()), "the client's address is kept: {answer:?}");
    }
    test.delete("local")?;
    test.terminate("elsewhere")?;
    for to in &addresses {
        test.dropped(&client, Tcp, *to, "no_local_endpoints")?;
    }
    Ok(())
}
