//! Session affinity: a client stays with its pod, until it has been away for too long.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::rig::cluster::Protocol::{self, Tcp};
use crate::rig::place::Place;
use crate::rig::service::{Service, Type};
use crate::scenario::{Scenario, run};
use crate::test::{Test, at, node_port, pod};

pub const SCENARIOS: &[Scenario] = &[
    run!("should have session affinity work for service with type clusterIP", works(Type::ClusterIp)),
    run!("should have session affinity work for NodePort service", works(Type::NodePort)),
    run!(
        "should have session affinity timeout work for service with type clusterIP",
        expires(Type::ClusterIp)
    ),
    run!("should have session affinity timeout work for NodePort service", expires(Type::NodePort)),
    run!(
        "should be able to switch session affinity for service with type clusterIP",
        switches(Type::ClusterIp)
    ),
    run!("should be able to switch session affinity for NodePort service", switches(Type::NodePort)),
];

/// Upstream's AffinityConfirmCount.
const CONFIRM: usize = 15;

/// Every request is answered by the same pod, which is returned.
pub fn sticks(test: &Test, from: &Place, protocol: Protocol, to: SocketAddr) -> Result<String> {
    let answers = test.answers(from, protocol, to, CONFIRM)?;
    let different: BTreeSet<&String> = answers.iter().collect();
    ensure!(different.len() == 1, "{} was answered at {to} by one after the other: {answers:?}", from.name);
    answers.into_iter().next().context("answers")
}

/// Requests are answered by different pods.
pub fn spreads(test: &Test, from: &Place, protocol: Protocol, to: SocketAddr) -> Result<()> {
    for _ in 0..10 {
        let answers = test.answers(from, protocol, to, CONFIRM)?;
        if answers.iter().collect::<BTreeSet<_>>().len() > 1 {
            return Ok(());
        }
    }
    bail!("{} was answered at {to} by one pod alone", from.name)
}

/// A Service of three pods, a client of it, and its addresses for that client.
fn begin(test: &mut Test, type_: Type, affinity_s: Option<u32>) -> Result<(Place, Vec<SocketAddr>)> {
    test.replicas("affinity", 3, &[Tcp])?;
    let mut service = Service::new("affinity").of_type(type_).port(Tcp, 80, 80);
    service.affinity_s = affinity_s;
    let service = test.create(service)?;
    let client = test.start(pod("execpod-affinity", "node-1"))?;
    let addresses = match type_ {
        Type::NodePort => node_port(&service, 0)?,
        _ => at(&service.cluster_ips, 80),
    };
    Ok((client, addresses))
}

/// Rules 8.1, 8.2.
fn works(test: &mut Test, type_: Type) -> Result<()> {
    let (client, addresses) = begin(test, type_, Some(10_800))?;
    for to in &addresses {
        sticks(test, &client, Tcp, *to)?;
    }
    // A client of its own for each address outside, too, where that has a way in.
    if type_ == Type::NodePort {
        for number in 0..4 {
            sticks(test, &test.client_number(number), Tcp, addresses[0])?;
        }
    }
    Ok(())
}

/// Each new connection refreshes it; a client that stays away for longer finds another pod in the end. Rules 8.3, 8.4.
fn expires(test: &mut Test, type_: Type) -> Result<()> {
    let timeout_s = 2;
    let (client, addresses) = begin(test, type_, Some(timeout_s))?;
    let first = sticks(test, &client, Tcp, addresses[0])?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(500));
        let answers = test.answers(&client, Tcp, addresses[0], 1)?;
        ensure!(answers[0] == first, "refreshed, and moved from {first} to {} all the same", answers[0]);
    }
    // Another pod is chosen at random, and may be the same one.
    for _ in 0..10 {
        // The clock of flows ticks in seconds.
        std::thread::sleep(Duration::from_millis(u64::from(timeout_s) * 1000 + 1100));
        if sticks(test, &client, Tcp, addresses[0])? != first {
            return Ok(());
        }
    }
    bail!("ten times away for more than {timeout_s} s, and always back to {first}")
}

/// Rule 8.6.
fn switches(test: &mut Test, type_: Type) -> Result<()> {
    let (client, addresses) = begin(test, type_, None)?;
    for to in &addresses {
        spreads(test, &client, Tcp, *to)?;
    }
    test.update("affinity", |service| service.affinity_s = Some(10_800))?;
    for to in &addresses {
        sticks(test, &client, Tcp, *to)?;
    }
    test.update("affinity", |service| service.affinity_s = None)?;
    for to in &addresses {
        spreads(test, &client, Tcp, *to)?;
    }
    Ok(())
}
