//! Endpoints: `get endpoints`, one row for each endpoint and port of each EndpointSlice.

use config::control::{EndpointRow, Item};

use crate::get::{Row, View};
use crate::print::{Cell, Tint};

/// What the printers ask of an endpoint.
pub trait EndpointText {
    /// `address:port`, with brackets around an IPv6 address.
    fn socket(&self) -> String;
    /// Its conditions as one word.
    fn state(&self) -> Cell;
}

impl EndpointText for EndpointRow {
    fn socket(&self) -> String {
        if self.address.contains(':') {
            format!("[{}]:{}", self.address, self.port)
        } else {
            format!("{}:{}", self.address, self.port)
        }
    }

    fn state(&self) -> Cell {
        match (self.ready, self.serving, self.terminating) {
            (true, ..) => Cell::new(Tint::Good, "ready"),
            (false, true, true) => Cell::new(Tint::Warn, "terminating"),
            (false, false, true) => Cell::new(Tint::Bad, "terminating, not serving"),
            (false, true, false) => Cell::new(Tint::Warn, "serving, not ready"),
            (false, false, false) => Cell::new(Tint::Bad, "not ready"),
        }
    }
}

impl Row for EndpointRow {
    const SINGULAR: &'static str = "endpointslice.discovery.k8s.io";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Endpoint(row) => Some(row),
            _ => None,
        }
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.namespace)
    }

    fn name(&self) -> String {
        self.slice.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["SERVICE", "ENDPOINT", "PORT", "STATE", "NODE", "TARGET"];
        if view.wide {
            header.extend(["ZONE", "PROTOCOL", "SLICE"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let service = if self.waits {
            Cell::new(Tint::Warn, format!("{} (unknown yet)", self.service))
        } else {
            self.service.as_str().into()
        };
        let mut cells = vec![
            service,
            self.socket().into(),
            self.port_name.as_str().into(),
            self.state(),
            self.node.as_str().into(),
            self.target.as_str().into(),
        ];
        if view.wide {
            cells.extend([
                self.zone.as_str().into(),
                self.protocol.as_str().into(),
                self.slice.as_str().into(),
            ]);
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn every_condition_has_a_word() {
        let row = |address: &str, ready, serving, terminating, waits| EndpointRow {
            namespace: "default".into(),
            service: "web".into(),
            slice: "web-abc".into(),
            address: address.into(),
            port: 80,
            port_name: "http".into(),
            protocol: "TCP".into(),
            ready,
            serving,
            terminating,
            node: "node-1".into(),
            zone: String::new(),
            target: "Pod/web-1".into(),
            waits,
        };
        let rows = [
            row("10.244.1.7", true, true, false, false),
            row("fd00:244::7", false, true, true, false),
            row("10.244.1.9", false, false, true, false),
            row("10.244.1.10", false, true, false, false),
            row("10.244.1.11", false, false, false, true),
        ];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        SERVICE             ENDPOINT           PORT   STATE                      NODE     TARGET
        web                 10.244.1.7:80      http   ready                      node-1   Pod/web-1
        web                 [fd00:244::7]:80   http   terminating                node-1   Pod/web-1
        web                 10.244.1.9:80      http   terminating, not serving   node-1   Pod/web-1
        web                 10.244.1.10:80     http   serving, not ready         node-1   Pod/web-1
        web (unknown yet)   10.244.1.11:80     http   not ready                  node-1   Pod/web-1
        ");
        insta::assert_snapshot!(print_rows(&rows[..1], View::WIDE), @"
        NAMESPACE   SERVICE   ENDPOINT        PORT   STATE   NODE     TARGET      ZONE     PROTOCOL   SLICE
        default     web       10.244.1.7:80   http   ready   node-1   Pod/web-1   <none>   TCP        web-abc
        ");
    }
}
