//! Types of Services, and changes from one to another.

use anyhow::{Result, ensure};

use crate::rig::cluster::Protocol::{Tcp, Udp};
use crate::rig::service::{Service, Type};
use crate::scenario::{Scenario, run};
use crate::test::{Test, at, node_port, pod};

pub const SCENARIOS: &[Scenario] = &[
    run!("should be able to create a functioning NodePort service", functioning_node_port),
    run!(
        "should be possible to connect to a service via ExternalIP when the external IP is not assigned to a node",
        external_ip
    ),
    run!(
        "should be able to update service type to NodePort listening on same port number but different protocols",
        node_port_of_two_protocols
    ),
    run!(
        "should be able to change the type from ExternalName to ClusterIP",
        from_external_name(Type::ClusterIp)
    ),
    run!(
        "should be able to change the type from ExternalName to NodePort",
        from_external_name(Type::NodePort)
    ),
    run!(
        "should be able to change the type from ClusterIP to ExternalName",
        to_external_name(Type::ClusterIp)
    ),
    run!("should be able to change the type from NodePort to ExternalName", to_external_name(Type::NodePort)),
];

fn functioning_node_port(test: &mut Test) -> Result<()> {
    let pods = test.replicas("nodeport-test", 2, &[Tcp])?;
    let service = Service::new("nodeport-test").of_type(Type::NodePort).port(Tcp, 80, 80);
    let service = test.create(service)?;
    let client = test.start(pod("execpod", "node-3"))?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
    let addresses = node_port(&service, 0)?;
    for from in [client, test.node("node-1"), test.client()] {
        test.reaches_all(&from, Tcp, &addresses, &pods)?;
    }
    Ok(())
}

fn external_ip(test: &mut Test) -> Result<()> {
    let pods = test.replicas("externalip-test", 2, &[Tcp])?;
    let service = test.create(Service::new("externalip-test").port(Tcp, 80, 80).with(|service| {
        service.external_ips = vec![[192, 0, 2, 10].into(), [0x2001, 0xdb8, 0xe, 0, 0, 0, 0, 10].into()];
    }))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
    let addresses = at(&service.external_ips, 80);
    test.reaches_all(&client, Tcp, &addresses, &pods)?;
    test.reaches_all(&test.client(), Tcp, &addresses, &pods)?;
    Ok(())
}

fn node_port_of_two_protocols(test: &mut Test) -> Result<()> {
    let pods = test.replicas("nodeport-update-service", 2, &[Tcp, Udp])?;
    let service = test.create(Service::new("nodeport-update-service").port(Tcp, 80, 80))?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
    let service = test.update("nodeport-update-service", |service| {
        service.type_ = Type::NodePort;
        *service = service.clone().port(Udp, 80, 80);
    })?;
    let addresses = node_port(&service, 0)?;
    ensure!(addresses == node_port(&service, 1)?, "one number for both protocols: {:?}", service.ports);
    for from in [client, test.client()] {
        for protocol in [Tcp, Udp] {
            test.reaches_all(&from, protocol, &addresses, &pods)?;
        }
    }
    let addresses = at(&service.cluster_ips, 80);
    test.reaches_all(&test.pod("execpod"), Udp, &addresses, &pods)?;
    Ok(())
}

fn from_external_name(test: &mut Test, to: Type) -> Result<()> {
    let pods = test.replicas("externalname-service", 2, &[Tcp])?;
    let client = test.start(pod("execpod", "node-1"))?;
    test.create(Service::new("externalname-service").of_type(Type::ExternalName).port(Tcp, 80, 80))?;
    let service = test.update("externalname-service", |service| service.type_ = to)?;
    test.reaches_all(&client, Tcp, &at(&service.cluster_ips, 80), &pods)?;
    if to == Type::NodePort {
        test.reaches_all(&test.client(), Tcp, &node_port(&service, 0)?, &pods)?;
    }
    Ok(())
}

fn to_external_name(test: &mut Test, from: Type) -> Result<()> {
    let pods = test.replicas("changing-service", 2, &[Tcp])?;
    let client = test.start(pod("execpod", "node-1"))?;
    let service = test.create(Service::new("changing-service").of_type(from).port(Tcp, 80, 80))?;
    let addresses = at(&service.cluster_ips, 80);
    test.reaches_all(&client, Tcp, &addresses, &pods)?;
    if from == Type::NodePort {
        test.reaches_all(&test.client(), Tcp, &node_port(&service, 0)?, &pods)?;
    }
    test.update("changing-service", |service| service.type_ = Type::ExternalName)?;
    for to in addresses {
        test.dropped(&client, Tcp, to, "unknown_service")?;
    }
    if from == Type::NodePort {
        test.closed(&test.client(), Tcp, node_port(&service, 0)?[0])?;
    }
    Ok(())
}
