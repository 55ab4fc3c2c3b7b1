//! Topology: near endpoints before far ones. The gateway stands for one node's proxy after the other: what changes is its zone.

use anyhow::Result;

use crate::rig::cluster::Protocol::Tcp;
use crate::rig::network::GATEWAY;
use crate::rig::service::{Hints, Service};
use crate::scenario::{Group, Scenario, run};
use crate::test::{Test, at, pod};

pub const GROUPS: &[Group] = &[
    Group { name: "Topology Hints", scenarios: TOPOLOGY_HINTS },
    Group { name: "Traffic Distribution", scenarios: TRAFFIC_DISTRIBUTION },
];

const TOPOLOGY_HINTS: &[Scenario] = &[run!("should distribute endpoints evenly", same_zone(Hints::Auto))];

const TRAFFIC_DISTRIBUTION: &[Scenario] = &[
    run!(
        "should route traffic to an endpoint in the same zone when using PreferClose",
        same_zone(Hints::PreferClose)
    ),
    run!(
        "should route traffic correctly between pods on multiple nodes when using PreferClose",
        several_nodes(Hints::PreferClose)
    ),
    run!(
        "should route traffic to an endpoint in the same zone when using PreferSameZone",
        same_zone(Hints::PreferSameZone)
    ),
    run!(
        "should route traffic correctly between pods on multiple nodes when using PreferSameZone",
        several_nodes(Hints::PreferSameZone)
    ),
    run!(
        "should route traffic to an endpoint on the same node or fall back to same zone when using PreferSameNode",
        same_node
    ),
    run!(
        "should route traffic to an endpoint on the same node when using PreferSameNode and fall back when the endpoint becomes unavailable",
        same_node_goes
    ),
];

/// A Service with such hints.
fn hinted(hints: Hints) -> Service {
    Service::new("traffic-dist-test-service").port(Tcp, 80, 9376).with(|service| service.hints = Some(hints))
}

fn start_server(test: &mut Test, node: &str) -> Result<()> {
    let spec = pod(&format!("server-{node}"), node).of("traffic-dist-test-service").listen(Tcp, 9376);
    test.start(spec).map(drop)
}

/// With the gateway in `zone`, a pod of its own and one elsewhere reach exactly these servers, in both families.
fn reaches_in_zone(test: &mut Test, service: &Service, zone: &str, servers: &[&str]) -> Result<()> {
    test.set_zone(GATEWAY, zone)?;
    for client in ["client-0", "client-1"] {
        test.reaches_all(&test.pod(client), Tcp, &at(&service.cluster_ips, 80), servers)?;
    }
    Ok(())
}

fn start_clients(test: &mut Test) -> Result<()> {
    test.start(pod("client-0", GATEWAY))?;
    test.start(pod("client-1", "node-3")).map(drop)
}

fn set_zones(test: &mut Test, zones: [&str; 3]) -> Result<()> {
    for (number, zone) in zones.into_iter().enumerate() {
        test.set_zone(&format!("node-{}", number + 1), zone)?;
    }
    Ok(())
}

/// Servers in two of three zones: whoever has one in its zone asks that one, the others ask all. Rules 3.6, 3.9.
fn same_zone(test: &mut Test, hints: Hints) -> Result<()> {
    set_zones(test, ["zone-a", "zone-b", "zone-c"])?;
    start_clients(test)?;
    let service = test.create(hinted(hints))?;
    start_server(test, "node-1")?;
    start_server(test, "node-2")?;
    reaches_in_zone(test, &service, "zone-a", &["server-node-1"])?;
    reaches_in_zone(test, &service, "zone-b", &["server-node-2"])?;
    reaches_in_zone(test, &service, "zone-c", &["server-node-1", "server-node-2"])?;
    // An endpoint of the zone that is not ready any more counts for nothing.
    test.set_ready("server-node-1", false)?;
    reaches_in_zone(test, &service, "zone-a", &["server-node-2"])?;
    test.set_ready("server-node-1", true)?;
    reaches_in_zone(test, &service, "zone-a", &["server-node-1"])?;
    // Without the wish, anywhere.
    test.update(&service.name, |service| service.hints = None)?;
    reaches_in_zone(test, &service, "zone-a", &["server-node-1", "server-node-2"])
}

/// Two servers on two nodes of one zone, one server in another, none in the third.
fn several_nodes(test: &mut Test, hints: Hints) -> Result<()> {
    set_zones(test, ["zone-a", "zone-a", "zone-b"])?;
    start_clients(test)?;
    let service = test.create(hinted(hints))?;
    let servers = ["server-node-1", "server-node-2", "server-node-3"];
    for node in ["node-1", "node-2", "node-3"] {
        start_server(test, node)?;
    }
    reaches_in_zone(test, &service, "zone-a", &servers[..2])?;
    reaches_in_zone(test, &service, "zone-b", &servers[2..])?;
    reaches_in_zone(test, &service, "zone-c", &servers)
}

/// A server on the gateway's own node; then only others in its zone; then none there. Rule 3.7.
fn same_node(test: &mut Test) -> Result<()> {
    set_zones(test, ["zone-a", "zone-b", "zone-b"])?;
    start_clients(test)?;
    let service = test.create(hinted(Hints::PreferSameNode))?;
    for node in [GATEWAY, "node-1", "node-2"] {
        start_server(test, node)?;
    }
    let own = format!("server-{GATEWAY}");
    reaches_in_zone(test, &service, "zone-a", &[&own])?;
    reaches_in_zone(test, &service, "zone-b", &[&own])?;
    test.delete(&own)?;
    reaches_in_zone(test, &service, "zone-a", &["server-node-1"])?;
    reaches_in_zone(test, &service, "zone-b", &["server-node-2"])?;
    reaches_in_zone(test, &service, "zone-c", &["server-node-1", "server-node-2"])
}

fn same_node_goes(test: &mut Test) -> Result<()> {
    start_clients(test)?;
    let service = test.create(hinted(Hints::PreferSameNode))?;
    start_server(test, GATEWAY)?;
    start_server(test, "node-1")?;
    let own = format!("server-{GATEWAY}");
    let addresses = at(&service.cluster_ips, 80);
    let check = |test: &Test, server: &str| -> Result<()> {
        test.reaches_all(&test.pod("client-0"), Tcp, &addresses, &[server]).map(drop)
    };
    check(test, &own)?;
    test.delete(&own)?;
    check(test, "server-node-1")?;
    start_server(test, GATEWAY)?;
    check(test, &own)
}
