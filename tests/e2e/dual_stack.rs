//! Dual stack: nodes, pods and Services of one family or two.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::granular::{
    affinity, endpoint_to_service, endpoints_change, host_network_endpoints, large_requests, node_to_service,
    pod_to_service,
};
use crate::rig::cluster::Family::{self, V4, V6};
use crate::rig::cluster::Protocol::{Sctp, Tcp, Udp};
use crate::rig::service::Service;
use crate::scenario::{Group, Scenario, run};
use crate::test::{Test, at, pod};

pub const GROUPS: &[Group] = &[
    Group { name: "[Feature:IPv6DualStack]", scenarios: DUAL_STACK },
    Group {
        name: "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family",
        scenarios: SECONDARY,
    },
];

const DUAL_STACK: &[Scenario] = &[
    run!("should have ipv4 and ipv6 internal node ip", nodes_of_both),
    run!("should create pod, add ipv6 and ipv4 ip to pod ips", pod_of_both),
    run!("should create pod, add ipv6 and ipv4 ip to host ips", host_of_both),
    run!("should be able to reach pod on ipv4 and ipv6 ip", reach_pod),
    run!("should create a single stack service with cluster ip from primary service range", service(&[V4])),
    run!("should create service with ipv4 cluster ip", service(&[V4])),
    run!("should create service with ipv6 cluster ip", service(&[V6])),
    run!("should create service with ipv4,v6 cluster ip", service(&[V4, V6])),
    run!("should create service with ipv6,v4 cluster ip", service(&[V6, V4])),
];

const SECONDARY: &[Scenario] = &[
    run!("should function for pod-Service: http", pod_to_service(Tcp, V6)),
    run!("should function for pod-Service: udp", pod_to_service(Udp, V6)),
    run!("should function for pod-Service: sctp", pod_to_service(Sctp, V6)),
    run!("should function for node-Service: http", node_to_service(Tcp, V6)),
    run!("should function for node-Service: udp", node_to_service(Udp, V6)),
    run!("should function for endpoint-Service: http", endpoint_to_service(Tcp, V6)),
    run!("should function for endpoint-Service: udp", endpoint_to_service(Udp, V6)),
    run!("should function for service endpoints using hostNetwork", host_network_endpoints(V6)),
    run!("should update endpoints: http", endpoints_change(Tcp, V6)),
    run!("should update endpoints: udp", endpoints_change(Udp, V6)),
    run!("should function for client IP based session affinity: http", affinity(Tcp, V6)),
    run!("should function for client IP based session affinity: udp", affinity(Udp, V6)),
    run!("should be able to handle large requests: http", large_requests(Tcp, V6)),
    run!("should be able to handle large requests: udp", large_requests(Udp, V6)),
];

/// Every node is known by both addresses, and speaks by both.
fn nodes_of_both(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("who").port(Tcp, 80, 80))?;
    test.start(pod("who", "node-1").of("who").listen(Tcp, 80))?;
    let rows = test.daemon().ctl(&["get", "nodes", "-o", "json"])?;
    let nodes: serde_json::Value = serde_json::from_str(&rows)?;
    for node in nodes["items"].as_array().into_iter().flatten() {
        let addresses = node["status"]["addresses"].as_array().map_or(0, Vec::len);
        ensure!(addresses == 2, "{node}");
    }
    for node in ["node-1", "node-2", "node-3"] {
        // A node's address is masqueraded towards a ClusterIP; a pod's, and an unknown one, would not be.
        let from = test.node(node);
        for answer in test.reaches_all(&from, Tcp, &at(&service.cluster_ips, 80), &["who"])? {
            ensure!(
                !from.addresses().contains(&answer.client.ip()),
                "{node} is not known as a node: {answer:?}"
            );
        }
    }
    Ok(())
}

/// A pod is known by both addresses: both are kept on the way through a ClusterIP.
fn pod_of_both(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("who").port(Tcp, 80, 80))?;
    test.start(pod("who", "node-1").of("who").listen(Tcp, 80))?;
    let from = test.start(pod("pod-dualstack-ips", "node-2"))?;
    let mut seen = BTreeSet::new();
    for answer in test.reaches_all(&from, Tcp, &at(&service.cluster_ips, 80), &["who"])? {
        seen.insert(answer.client.ip());
    }
    ensure!(seen == from.addresses().into(), "{seen:?}");
    Ok(())
}

/// A pod in its node's network is reached by both addresses of the node.
fn host_of_both(test: &mut Test) -> Result<()> {
    let server = test.start(pod("pod-dualstack-hostips", "node-1").host_network().listen(Tcp, 8080))?;
    let from = test.start(pod("client", "node-2"))?;
    test.reaches_all(&from, Tcp, &at(&server.addresses(), 8080), &["pod-dualstack-hostips"])?;
    Ok(())
}

/// From each pod of a client Deployment to each pod of a server Deployment.
fn reach_pod(test: &mut Test) -> Result<()> {
    for node in ["node-1", "node-2"] {
        test.start(pod(&format!("dualstack-server-{node}"), node).listen(Tcp, 80))?;
        test.start(pod(&format!("dualstack-client-{node}"), node))?;
    }
    for client in ["dualstack-client-node-1", "dualstack-client-node-2"] {
        for server in ["dualstack-server-node-1", "dualstack-server-node-2"] {
            let to = at(&test.pod(server).addresses(), 80);
            test.reaches_all(&test.pod(client), Tcp, &to, &[server])?;
        }
    }
    Ok(())
}

/// A Service of these families in front of dual-stack pods: it is served in these families and no other, and the first one
/// is that of `clusterIP`. Rule 11.1.
fn service(test: &mut Test, families: &[Family]) -> Result<()> {
    let pods = test.replicas("dualstack-service", 2, &[Tcp, Udp])?;
    let service = Service::new("dualstack-service").port(Tcp, 80, 80).port(Udp, 80, 80);
    let service = test.create(service.with(|service| service.families = families.to_vec()))?;
    ensure!(service.cluster_ips.len() == families.len(), "{service:?}");
    let client = test.start(pod("execpod", "node-3"))?;
    for (address, family) in at(&service.cluster_ips, 80).into_iter().zip(families) {
        ensure!(family.holds(&address.ip()), "{service:?}");
        test.reaches(&client, Tcp, address, &pods)?;
        test.reaches(&client, Udp, address, &pods)?;
    }
    let name = format!("{}/{}", test.namespace(), service.name);
    let text = test.daemon().ctl(&["describe", "service", &name, "-o", "json"])?;
    let described: serde_json::Value = serde_json::from_str(&text)?;
    let frontends = described["frontends"].as_array().map_or(0, Vec::len);
    ensure!(frontends == 2 * families.len(), "two ports for each family: {text}");
    Ok(())
}
