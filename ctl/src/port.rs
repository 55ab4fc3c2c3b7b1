//! Ports of the gateway: `get ports`, and their part of `status`.

use config::control::{Item, PortRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint, thousands};

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
