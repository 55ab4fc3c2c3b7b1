//! Routes of the forwarding table: `get routes`, in the words of iproute2.

use config::control::{Item, RouteRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint};

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
