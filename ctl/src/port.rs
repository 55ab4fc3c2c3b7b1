//! Ports of the gateway: `get ports`, and their part of `status`.

use config::control::{Item, PortRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint};

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
            header.extend(["MAC", "MTU", "COUNTERS"]);
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
            let counters: Vec<String> =
                self.counters.iter().filter(|c| *c.1 > 0).map(|(k, v)| format!("{k}={v}")).collect();
            cells.extend([self.mac.as_str().into(), self.mtu.to_string().into(), counters.join(",").into()]);
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn counters_that_are_zero_stay_out() {
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
            counters: [("rx_dropped".to_owned(), 0), ("rx_ring_full".to_owned(), 3)].into(),
        }];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES
        uplink   g0          outside   up     copy   2        192.0.2.1
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        NAME     INTERFACE   ROLE      LINK   MODE   QUEUES   ADDRESSES   MAC                 MTU    COUNTERS
        uplink   g0          outside   up     copy   2        192.0.2.1   02:00:00:00:00:01   1500   rx_ring_full=3
        ");
    }
}
