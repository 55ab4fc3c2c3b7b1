//! What a scenario has in its hands: a cluster to change, pods that run, clients, and what must be true of their answers.
//!
//! Every change is applied through towpathctl and is in force when the call returns, so the very next packet must see it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use tests::gateway::Towpathd;

use crate::rig::Rig;
use crate::rig::ask::{Answer, NoAnswer, PATIENCE, QUIET};
use crate::rig::cluster::{Cluster, Pod, Port, Protocol, listen};
use crate::rig::network::{GATEWAY_V4, GATEWAY_V6, SlotId};
use crate::rig::place::Place;
use crate::rig::server::Server;
use crate::rig::service::Service;

/// A scenario that runs.
pub struct Test<'r> {
    rig: &'r mut Rig,
    cluster: Cluster,
    running: BTreeMap<String, Running>,
    /// Drop reasons that the scenario has given.
    allowed: RefCell<BTreeSet<String>>,
}

/// A pod's process and place. Dropped in this order.
struct Running {
    _server: Server,
    place: Place,
    slot: Option<SlotId>,
}

/// A pod to start.
pub struct PodSpec {
    name: String,
    node: String,
    app: String,
    ports: Vec<Port>,
    host_network: bool,
    ready: bool,
}

/// A pod on a node: ready, listening nowhere, with no label.
pub fn pod(name: &str, node: &str) -> PodSpec {
    let (name, node) = (name.to_owned(), node.to_owned());
    PodSpec { name, node, app: String::new(), ports: Vec::new(), host_network: false, ready: true }
}

impl PodSpec {
    /// Labelled so that the Service of this name selects it.
    pub fn of(mut self, app: &str) -> PodSpec {
        self.app = app.to_owned();
        self
    }

    /// With a server on one more port.
    pub fn listen(mut self, protocol: Protocol, number: u16) -> PodSpec {
        self.ports.push(listen(protocol, number));
        self
    }

    /// The same, and the port has a name.
    pub fn listen_as(mut self, name: &str, protocol: Protocol, number: u16) -> PodSpec {
        self.ports.push(Port { name: name.to_owned(), protocol, number, host: None });
        self
    }

    /// With a server on one more port, that its node serves as `host_port` at `host_ip`.
    pub fn listen_on_host(
        mut self,
        protocol: Protocol,
        number: u16,
        host_ip: IpAddr,
        host_port: u16,
    ) -> PodSpec {
        self.ports.push(Port { host: Some((host_ip, host_port)), ..listen(protocol, number) });
        self
    }

    /// In the network of its node.
    pub fn host_network(mut self) -> PodSpec {
        self.host_network = true;
        self
    }

    /// Whose readiness probe fails.
    pub fn unready(mut self) -> PodSpec {
        self.ready = false;
        self
    }
}

impl<'r> Test<'r> {
    /// A scenario in this cluster.
    pub fn new(rig: &'r mut Rig, cluster: Cluster) -> Test<'r> {
        Test { rig, cluster, running: BTreeMap::new(), allowed: RefCell::default() }
    }

    /// Stops every pod, and checks what must hold after every scenario.
    pub fn finish(mut self) -> Result<()> {
        let names: Vec<String> = self.running.keys().cloned().collect();
        for name in names {
            self.vanish(&name)?;
        }
        let allowed = self.allowed.borrow();
        self.rig.check(&allowed.iter().map(String::as_str).collect::<Vec<_>>())
    }

    // --- the cluster changes -----------------------------------------------------------------------------------------

    /// Starts a pod; when this returns it listens, and the cluster knows.
    pub fn start(&mut self, spec: PodSpec) -> Result<Place> {
        let (slot, mut place) = if spec.host_network {
            (None, self.rig.network.node(&spec.node))
        } else {
            let (slot, place) = self.rig.network.take_slot(&spec.node)?;
            (Some(slot), place)
        };
        place.name.clone_from(&spec.name);
        let server = Server::start(&place, &spec.name, &spec.ports)?;
        self.running.insert(spec.name.clone(), Running { _server: server, place: place.clone(), slot });
        self.cluster.pods.push(Pod {
            name: spec.name,
            node: spec.node,
            app: spec.app,
            v4: place.v4,
            v6: place.v6,
            ports: spec.ports,
            host_network: spec.host_network,
            ready: spec.ready,
            terminating: false,
            evicted: false,
        });
        self.apply()?;
        Ok(place)
    }

    /// Starts pods of the Service `app`, `APP-1` and so on, one node after the other, each on port 80 of these protocols. Returns
    /// their names.
    pub fn replicas(&mut self, app: &str, count: usize, protocols: &[Protocol]) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for number in 1..=count {
            let name = format!("{app}-{number}");
            let mut spec = pod(&name, &format!("node-{}", 1 + (number - 1) % 3)).of(app);
            spec.ports.extend(protocols.iter().map(|protocol| listen(*protocol, 80)));
            self.start(spec)?;
            names.push(name);
        }
        Ok(names)
    }

    /// Its readiness probe begins to succeed or to fail.
    pub fn set_ready(&mut self, name: &str, ready: bool) -> Result<()> {
        self.cluster.pod(name).ready = ready;
        self.apply()
    }

    /// It is being deleted, and runs on for its grace period.
    pub fn terminate(&mut self, name: &str) -> Result<()> {
        self.cluster.pod(name).terminating = true;
        self.apply()
    }

    /// It is evicted: it runs no more, and its object stays.
    pub fn evict(&mut self, name: &str) -> Result<()> {
        let pod = self.cluster.pod(name);
        (pod.evicted, pod.ready) = (true, false);
        self.apply()?;
        self.vanish(name)
    }

    /// It goes as pods go: terminating, then gone from the slices, then from its node.
    pub fn delete(&mut self, name: &str) -> Result<()> {
        self.terminate(name)?;
        self.cluster.pods.retain(|pod| pod.name != name);
        self.apply()?;
        self.vanish(name)
    }

    /// Its process is killed and its network is gone; whatever the cluster knows of it.
    fn vanish(&mut self, name: &str) -> Result<()> {
        let Some(Running { _server, slot, .. }) = self.running.remove(name) else { return Ok(()) };
        drop(_server);
        slot.map_or(Ok(()), |slot| self.rig.network.free_slot(slot))
    }

    /// Creates a Service; returns it as the API server completed it.
    pub fn create(&mut self, mut service: Service) -> Result<Service> {
        service.complete(&mut self.rig.numbers);
        self.cluster.services.push(service.clone());
        self.apply()?;
        Ok(service)
    }

    /// Updates a Service; returns it as the API server completed it.
    pub fn update(&mut self, name: &str, change: impl FnOnce(&mut Service)) -> Result<Service> {
        let service = self.cluster.services.iter_mut().find(|service| service.name == name);
        let service = service.with_context(|| format!("no Service {name}"))?;
        change(service);
        service.complete(&mut self.rig.numbers);
        let service = service.clone();
        self.apply()?;
        Ok(service)
    }

    /// Deletes a Service with its slices.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.cluster.services.retain(|service| service.name != name);
        self.apply()
    }

    /// Labels a node with its zone.
    pub fn set_zone(&mut self, node: &str, zone: &str) -> Result<()> {
        let node = self.cluster.nodes.iter_mut().find(|known| known.name == node);
        node.context("no such node")?.zone = Some(zone.to_owned());
        self.apply()
    }

    fn apply(&mut self) -> Result<()> {
        let manifests = self.cluster.manifests();
        self.rig.daemon().replace(&manifests).map(drop)
    }

    /// Kills both processes of the daemon and starts it again on what they left.
    pub fn kill_and_restart_gateway(&mut self) -> Result<()> {
        self.rig.kill_and_restart()
    }

    // --- who is there ------------------------------------------------------------------------------------------------

    /// The namespace of its objects.
    pub fn namespace(&self) -> &str {
        &self.cluster.namespace
    }

    /// The daemon.
    pub fn daemon(&mut self) -> &mut Towpathd {
        self.rig.daemon()
    }

    /// The client outside, by its first address.
    pub fn client(&self) -> Place {
        self.rig.network.client(0)
    }

    /// The client outside, by its address `number`, 0 to 7.
    pub fn client_number(&self, number: u8) -> Place {
        self.rig.network.client(number)
    }

    /// A node's own network.
    pub fn node(&self, name: &str) -> Place {
        self.rig.network.node(name)
    }

    /// A running pod.
    pub fn pod(&self, name: &str) -> Place {
        self.running[name].place.clone()
    }

    // --- what must be true -------------------------------------------------------------------------------------------

    /// Asks again and again: each of `pods` answers at some time, nobody else ever does, and every request is answered.
    /// Returns the answers.
    pub fn reaches(
        &self,
        from: &Place,
        protocol: Protocol,
        to: SocketAddr,
        pods: &[impl AsRef<str>],
    ) -> Result<Vec<Answer>> {
        let pods: Vec<&str> = pods.iter().map(AsRef::as_ref).collect();
        let mut answers: Vec<Answer> = Vec::new();
        let mut missing: BTreeSet<&str> = pods.iter().copied().collect();
        while !missing.is_empty() || answers.len() < 3 * pods.len() {
            ensure!(answers.len() < 100 * pods.len(), "{missing:?} never answered {} at {to}", from.name);
            let answer = match from.ask(protocol, to, PATIENCE)? {
                Ok(answer) => answer,
                Err(why) => {
                    bail!("{} asks {to} by {protocol:?}, request {}: {why:?}", from.name, answers.len() + 1)
                }
            };
            ensure!(
                pods.contains(&&*answer.pod),
                "{} asked {to} by {protocol:?}, and {} answered, which is not of {pods:?}",
                from.name,
                answer.pod
            );
            missing.remove(&*answer.pod);
            answers.push(answer);
        }
        Ok(answers)
    }

    /// The same for several addresses.
    pub fn reaches_all(
        &self,
        from: &Place,
        protocol: Protocol,
        to: &[SocketAddr],
        pods: &[impl AsRef<str>],
    ) -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        for to in to {
            answers.extend(self.reaches(from, protocol, *to, pods)?);
        }
        Ok(answers)
    }

    /// Asks `count` times and returns who answered.
    pub fn answers(
        &self,
        from: &Place,
        protocol: Protocol,
        to: SocketAddr,
        count: usize,
    ) -> Result<Vec<String>> {
        let mut pods = Vec::new();
        for number in 1..=count {
            match from.ask(protocol, to, PATIENCE)? {
                Ok(answer) => pods.push(answer.pod),
                Err(why) => bail!("{} asks {to} by {protocol:?}, request {number}: {why:?}", from.name),
            }
        }
        Ok(pods)
    }

    /// One request is rejected by the gateway for `reason`: the client learns it at once (ECONNREFUSED).
    pub fn rejected(&mut self, from: &Place, protocol: Protocol, to: SocketAddr, reason: &str) -> Result<()> {
        self.refused_for(from, protocol, to, reason, NoAnswer::Refused, PATIENCE)
    }

    /// One request is dropped by the gateway for `reason`: the client hears nothing.
    pub fn dropped(&mut self, from: &Place, protocol: Protocol, to: SocketAddr, reason: &str) -> Result<()> {
        self.refused_for(from, protocol, to, reason, NoAnswer::Silence, QUIET)
    }

    fn refused_for(
        &mut self,
        from: &Place,
        protocol: Protocol,
        to: SocketAddr,
        reason: &str,
        how: NoAnswer,
        patience: std::time::Duration,
    ) -> Result<()> {
        self.allow(reason);
        let count = |drops: BTreeMap<String, u64>| drops.get(reason).copied().unwrap_or(0);
        let before = count(self.daemon().drops()?);
        let outcome = from.ask(protocol, to, patience)?;
        ensure!(outcome == Err(how), "{} asks {to} by {protocol:?}: {outcome:?}, not {how:?}", from.name);
        let counted = count(self.daemon().drops()?) - before;
        ensure!(counted > 0, "{} asked {to} by {protocol:?}: {how:?}, but not for {reason}", from.name);
        Ok(())
    }

    /// Nobody serves `to`, and it is none of the gateway's business: the kernel says so, or nobody does.
    pub fn closed(&self, from: &Place, protocol: Protocol, to: SocketAddr) -> Result<()> {
        let outcome = from.ask(protocol, to, QUIET)?;
        ensure!(outcome.is_err(), "{} asked {to} by {protocol:?}, and was answered: {outcome:?}", from.name);
        Ok(())
    }

    /// The scenario makes the gateway drop or answer packets for `reason`.
    pub fn allow(&self, reason: &str) {
        self.allowed.borrow_mut().insert(reason.to_owned());
    }
}

/// Addresses with a port.
pub fn at(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
}

/// A NodePort on the gateway, in the families of its Service.
pub fn node_port(service: &Service, port: usize) -> Result<Vec<SocketAddr>> {
    let number = service.ports[port].node_port.context("the Service has no NodePort")?;
    let addresses = [IpAddr::from(GATEWAY_V4), GATEWAY_V6.into()];
    let of_family = |address: &IpAddr| service.families.iter().any(|family| family.holds(address));
    Ok(addresses.into_iter().filter(of_family).map(|address| SocketAddr::new(address, number)).collect())
}
