//! The rig that scenarios run on: one network and one gateway for the whole run, reset between scenarios.
//!
//! Read in this order: [`network`] has the wires, [`server`] what runs in pods and [`ask`] what clients do, [`cluster`] and
//! [`service`] the objects; [`Rig`] puts a daemon into it.

pub mod network;

pub mod ask;
pub mod place;
pub mod sctp;
pub mod server;

pub mod cluster;
pub mod service;

use anyhow::{Context, Result};
use tests::gateway::Towpathd;

use cluster::Cluster;
use network::Network;
use service::Numbers;

/// How a gateway is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gateway {
    /// As gateways are: the load balancer in front of the nodes.
    Frontend,
    /// As kube-proxy on a node with pods: `external_traffic_policy = "literal"`.
    Literal,
}

impl Gateway {
    /// The gateway file; `[control]` and the region are added by [`Towpathd::start`].
    fn file(self) -> String {
        let policy = match self {
            Gateway::Frontend => "frontend",
            Gateway::Literal => "literal",
        };
        format!(
            r#"
[gateway]
name = "gw-1"
cluster_cidrs = ["10.244.0.0/16", "fd00:244::/32"]
service_cidrs = ["10.96.0.0/16", "fd00:96::/112"]
load_balancer_cidrs = ["203.0.113.0/24", "2001:db8::/64"]
external_ip_cidrs = ["192.0.2.0/25", "2001:db8:e::/64"]
return = "routed"
external_traffic_policy = "{policy}"
[workers]
cpus = [1]
[flows]
capacity = 65536
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"#
        )
    }
}

/// Network and daemon.
#[derive(Debug)]
pub struct Rig {
    /// The running daemon, and how it was set up.
    daemon: Option<(Gateway, Towpathd)>,
    /// The wires.
    pub network: Network,
    /// What the API server has given away so far.
    pub numbers: Numbers,
    scenarios: u32,
}

impl Rig {
    /// Builds the network.
    pub fn new() -> Result<Rig> {
        let network = Network::new().context("the network")?;
        Ok(Rig { daemon: None, network, numbers: Numbers::default(), scenarios: 0 })
    }

    /// The daemon.
    ///
    /// # Panics
    /// Outside of a scenario.
    pub fn daemon(&mut self) -> &mut Towpathd {
        &mut self.daemon.as_mut().expect("begin starts it").1
    }

    /// Makes everything ready for a scenario on such a gateway: a daemon that knows nothing but the nodes, and a namespace
    /// of its own.
    pub fn begin(&mut self, gateway: Gateway) -> Result<Cluster> {
        if self.daemon.as_ref().is_none_or(|(running, _)| *running != gateway) {
            self.stop();
            let daemon = Towpathd::start(&self.network.gateway, &gateway.file())?;
            self.daemon = Some((gateway, daemon));
        }
        self.scenarios += 1;
        let namespace = format!("e2e-{}", self.scenarios);
        let nodes = self.network.node_objects();
        let cluster = Cluster { namespace, nodes, pods: Vec::new(), services: Vec::new() };
        self.daemon().replace(&cluster.manifests())?;
        self.daemon().ctl(&["flows", "flush", "--all"])?;
        Ok(cluster)
    }

    /// The checks that every scenario ends with; see [`Towpathd::check`].
    pub fn check(&mut self, allowed: &[&str]) -> Result<()> {
        self.daemon().check(allowed)
    }

    /// Kills both processes of the daemon and starts it again on what they left.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        let namespace = self.network.gateway.clone();
        self.daemon().kill_all_and_restart(&namespace)
    }

    /// What the daemon has to say about a failure: what of its log is not routine, and what it counted since it started.
    pub fn evidence(&mut self) -> String {
        let Some((_, daemon)) = &self.daemon else { return String::new() };
        let counters = daemon.stats().map(|stats| {
            let counts = stats.totals.into_iter().chain(stats.drops).filter(|count| count.value > 0);
            counts.map(|count| format!("    {} {}\n", count.name, count.value)).collect::<String>()
        });
        let log = daemon.log();
        let log: String =
            log.lines().filter(|line| !line.contains(" INFO ")).map(|line| format!("    {line}\n")).collect();
        log + &counters.unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Forgets the daemon, after a failure.
    pub fn stop(&mut self) {
        self.daemon = None;
    }

    /// Stops the daemon, which must end as it should.
    pub fn finish(mut self) -> Result<()> {
        match self.daemon.take() {
            Some((_, daemon)) => daemon.finish(&[]),
            None => Ok(()),
        }
    }
}
