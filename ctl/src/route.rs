//! Routes of the forwarding table: `get routes`, in the words of iproute2; and `route`, which adds and removes PodRoutes.

use std::net::IpAddr;

use anyhow::Result;
use clap::Subcommand;
use config::control::{Apply, Delete, Item, Kind, ObjectRef, Request, RouteRow};
use config::fault::Source;
use config::object::{Object, PodRoute, PodRouteSpec};
use ipnet::IpNet;

use crate::change::{self, ChangeArgs};
use crate::get::{Row, View};
use crate::print::{Cell, Tint};
use crate::{Ending, Global};

/// `route`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send packets to a range of pods by a node or a router; replaces the route that was added for this range
    Add {
        /// The pods' range, such as 10.244.7.0/24
        prefix: IpNet,
        /// The word
        #[arg(value_parser = ["via"], hide_possible_values = true)]
        via: String,
        /// InternalIP of the node, or address of a router
        #[arg(value_name = "ADDRESS")]
        next_hop: IpAddr,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Take back what `route add` added
    Remove {
        /// The pods' range
        prefix: IpNet,
        #[command(flatten)]
        change: ChangeArgs,
    },
}

/// Runs `route`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let connection = &mut global.connect()?;
    let (request, change) = match &args.command {
        Command::Add { prefix, next_hop, change, .. } => {
            let spec = PodRouteSpec { prefix: prefix.to_string(), via: next_hop.to_string() };
            let route = Object::PodRoute(Box::new(PodRoute::new(name_of(prefix), spec)));
            (Request::Apply(Apply { source: Source::default(), object: route.to_value() }), change)
        }
        Command::Remove { prefix, change } => {
            let object = ObjectRef { kind: Kind::PodRoute, namespace: String::new(), name: name_of(prefix) };
            let source = Source::default();
            (Request::Delete(Delete { source, object, ignore_not_found: false }), change)
        }
    };
    connection.send(&change.begin(false))?;
    connection.send(&request)?;
    change::commit(global, connection, change)
}

/// The name of the PodRoute for a range, one that objects may have: `10.244.7.0-24`, `fd00-244-7-0-0-0-0-0-64`.
fn name_of(prefix: &IpNet) -> String {
    let address = match prefix.network() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:x}")).join("-"),
    };
    format!("{address}-{}", prefix.prefix_len())
}

impl Row for RouteRow {
    const SINGULAR: &'static str = "route";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Route(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.prefix.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["PREFIX", "KIND", "VIA", "PORT"];
        if view.wide {
            header.extend(["MAC", "MTU", "OVERLAY"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let tint = match (self.kind.as_str(), &self.mac) {
            ("next-hop", Some(_)) => Tint::Good,
            ("next-hop", None) => Tint::Warn,
            ("blackhole", _) => Tint::Bad,
            _ => Tint::Plain,
        };
        let mut cells = vec![
            self.prefix.as_str().into(),
            Cell::new(tint, self.kind.as_str()),
            self.via.clone().unwrap_or_default().into(),
            self.port.clone().unwrap_or_default().into(),
        ];
        if view.wide {
            cells.push(self.mac.clone().unwrap_or_default().into());
            cells.push(self.mtu.map(|mtu| mtu.to_string()).unwrap_or_default().into());
            cells.push(self.overlay.clone().unwrap_or_default().into());
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn names_of_ranges_are_names_of_objects() {
        let name = |prefix: &str| name_of(&prefix.parse().unwrap());
        assert_eq!(name("10.244.7.9/24"), "10.244.7.0-24");
        assert_eq!(name("fd00:244:7::/64"), "fd00-244-7-0-0-0-0-0-64");
        assert_eq!(name("::/1"), "0-0-0-0-0-0-0-0-1");
    }

    #[test]
    fn absent_fields_are_none() {
        let rows = [
            RouteRow {
                prefix: "10.244.1.0/24".into(),
                kind: "next-hop".into(),
                via: Some("192.168.50.11".into()),
                port: Some("fabric".into()),
                mac: Some("02:00:00:00:00:11".into()),
                mtu: Some(1450),
                overlay: Some("vxlan:192.168.50.11".into()),
            },
            RouteRow { prefix: "203.0.113.0/24".into(), kind: "blackhole".into(), ..Default::default() },
        ];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        PREFIX           KIND        VIA             PORT
        10.244.1.0/24    next-hop    192.168.50.11   fabric
        203.0.113.0/24   blackhole   <none>          <none>
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        PREFIX           KIND        VIA             PORT     MAC                 MTU      OVERLAY
        10.244.1.0/24    next-hop    192.168.50.11   fabric   02:00:00:00:00:11   1450     vxlan:192.168.50.11
        203.0.113.0/24   blackhole   <none>          <none>   <none>              <none>   <none>
        ");
    }
}
