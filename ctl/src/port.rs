//! Ports of the gateway: `get ports`, their part of `status`, and `port`, which adds and removes them.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use config::control::{Item, PortChange, PortRow, Reply, Request};
use config::fault::Fault;
use config::gateway::{self, PortSection};

use crate::connection::unexpected;
use crate::get::{Row, View};
use crate::print::{Cell, Tint, out, thousands};
use crate::{Ending, Global};

/// How often the daemon is looked at while it starts anew.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// `port`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an interface a port
    Add {
        /// Name of the port in output
        name: String,
        /// Name of the network interface, if it is another
        #[arg(long, value_name = "INTERFACE")]
        interface: Option<String>,
        /// Who is behind it
        #[arg(long, alias = "kind", value_enum)]
        role: Role,
        /// How packets are exchanged with the driver
        #[arg(long, value_enum, default_value = "auto")]
        mode: Mode,
        /// Serve ClusterIPs to clients outside the cluster that come in here
        #[arg(long)]
        expose_cluster_ips: bool,
    },
    /// Take a port away: its interface is the kernel's alone again
    Remove {
        /// Name of the port
        name: String,
    },
}

/// [`gateway::Role`] on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Role {
    /// Clients
    Outside,
    /// Nodes and pods
    Inside,
    /// Both
    Both,
    /// One pod, at the other end of a veth pair
    Pod,
}

/// [`gateway::Mode`] on the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// The best that the driver has
    Auto,
    /// Zero copy
    ZeroCopy,
    /// XDP in the driver, packets copied
    Copy,
    /// XDP in the network stack
    Generic,
}

/// Runs `port`.
pub fn run(global: &Global, args: Args) -> Result<Ending> {
    match args.command {
        Command::Add { name, interface, role, mode, expose_cluster_ips } => {
            let port = PortSection {
                interface: interface.unwrap_or_else(|| name.clone()),
                role: match role {
                    Role::Outside => gateway::Role::Outside,
                    Role::Inside => gateway::Role::Inside,
                    Role::Both => gateway::Role::Both,
                    Role::Pod => gateway::Role::Pod,
                },
                mode: match mode {
                    Mode::Auto => gateway::Mode::Auto,
                    Mode::ZeroCopy => gateway::Mode::ZeroCopy,
                    Mode::Copy => gateway::Mode::Copy,
                    Mode::Generic => gateway::Mode::Generic,
                },
                name: name.clone(),
                expose_cluster_ips,
            };
            change(global, PortChange::Add(port), &name, true)
        }
        Command::Remove { name } => change(global, PortChange::Remove { name: name.clone() }, &name, false),
    }
}

/// Asks for the change. When it is done the daemon's data plane starts anew and the connection ends, so the next data plane is asked what
/// there is; returns when its workers forward.
fn change(global: &Global, change: PortChange, name: &str, added: bool) -> Result<Ending> {
    let ended = match global.connect()?.ask(&Request::Port(change)) {
        Ok(other) => return Err(unexpected(&other)),
        Err(error) if error.is::<Fault>() => return Err(error),
        Err(error) => error,
    };
    let start = Instant::now();
    loop {
        let status = match global.connect()?.ask(&Request::Status)? {
            Reply::Status(status) => status,
            other => return Err(unexpected(&other)),
        };
        if status.ports.iter().any(|port| port.name == name) != added {
            return Err(ended);
        }
        let in_force = status.workers_in_force == status.workers;
        if in_force || start.elapsed() > global.request_timeout {
            out(&format!("port/{name} {}\n", if added { "added" } else { "removed" }))?;
            return Ok(if in_force { Ending::Done } else { Ending::NotInForce });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Columns of what went wrong in the rings, with the counters that each sums up. None of these packets was received or sent.
const RING_COLUMNS: [(&str, &[&str]); 5] = [
    ("RX-FULL", &["rx_ring_full"]),
    ("RX-DROPPED", &["rx_dropped"]),
    ("FILL-EMPTY", &["rx_fill_ring_empty_descs"]),
    ("INVALID", &["rx_invalid_descs", "tx_invalid_descs", "rx_refused", "completions_refused", "tx_empty"]),
    ("TX-LOST", &["lost_sends"]),
];

impl Row for PortRow {
    const SINGULAR: &'static str = "port";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Port(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["NAME", "INTERFACE", "ROLE", "LINK", "MODE", "QUEUES", "ADDRESSES"];
        if view.wide {
            header.extend(["MAC", "MTU"]);
            header.extend(RING_COLUMNS.iter().map(|(name, _)| name));
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let mut cells = vec![
            self.name.as_str().into(),
            self.interface.as_str().into(),
            self.role.as_str().into(),
            if self.up { Cell::new(Tint::Good, "up") } else { Cell::new(Tint::Bad, "down") },
            self.mode.as_str().into(),
            self.queues.to_string().into(),
            self.addresses.join(",").into(),
        ];
        if view.wide {
            cells.extend([self.mac.as_str().into(), self.mtu.to_string().into()]);
            cells.extend(RING_COLUMNS.iter().map(|(_, counters)| {
                let value = |name: &&str| self.counters.get(*name).copied().unwrap_or(0);
                let sum = counters.iter().map(value).sum();
                Cell::new(if sum > 0 { Tint::Warn } else { Tint::Plain }, thousands(sum))
            }));
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn losses_of_the_rings_are_wide() {
        let rows = [PortRow {
            index: 0,
            name: "uplink".into(),
            interface: "g0".into(),
            role: "outside".into(),
            mode: "copy".into(),
            queues: 2,
            mac: "02:00:00:00:00:01".into(),
            mtu: 1500,
            up: true,
            addresses: vec!["192.0.2.1".into()],
            counters: [
                ("rx_invalid_descs".to_owned(), 1),
                ("tx_invalid_descs".to_owned(), 1),
                ("rx_ring_full".to_owned(), 3),
            ]
            .into(),
        }];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES
        uplink   g0          outside   up     copy   2        192.0.2.1
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES   MAC                 MTU    RX-FULL   RX-DROPPED   FILL-EMPTY   INVALID   TX-LOST
        uplink   g0          outside   up     copy   2        192.0.2.1   02:00:00:00:00:01   1500   3         0            0            2         0
        ");
    }
}
