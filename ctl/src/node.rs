//! Nodes: `get nodes`.

use config::control::{Item, NodeRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint, age_of};

impl Row for NodeRow {
    const SINGULAR: &'static str = "node";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Node(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["NAME", "STATUS", "ROLE", "AGE", "INTERNAL-IP", "POD-CIDRS"];
        if view.wide {
            header.extend(["EXTERNAL-IP", "ZONE", "OVERLAY"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let status = match self.ready.as_str() {
            "True" => Cell::new(Tint::Good, "Ready"),
            "False" => Cell::new(Tint::Bad, "NotReady"),
            _ => Cell::new(Tint::Warn, "Unknown"),
        };
        let mut cells = vec![
            self.name.as_str().into(),
            status,
            if self.this_gateway { "this gateway" } else { "" }.into(),
            age_of(self.created.as_deref(), view.now_s).into(),
            self.internal_ips.join(",").into(),
            self.pod_cidrs.join(",").into(),
        ];
        if view.wide {
            cells.extend([self.external_ips.join(",").into(), self.zone.as_str().into()]);
            cells.push(self.overlay.as_str().into());
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn nodes_show_addresses_and_pod_ranges() {
        let rows = [
            NodeRow {
                name: "node-1".into(),
                internal_ips: vec!["192.168.50.11".into(), "fd00:50::11".into()],
                pod_cidrs: vec!["10.244.1.0/24".into(), "fd00:244:0:1::/64".into()],
                zone: "eu-west-1a".into(),
                ready: "True".into(),
                overlay: "vxlan".into(),
                created: Some("2026-11-02T08:00:00Z".into()),
                ..Default::default()
            },
            NodeRow { name: "gw-1".into(), ready: "False".into(), this_gateway: true, ..Default::default() },
        ];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME     STATUS     ROLE           AGE         INTERNAL-IP                 POD-CIDRS
        node-1   Ready      <none>         19d         192.168.50.11,fd00:50::11   10.244.1.0/24,fd00:244:0:1::/64
        gw-1     NotReady   this gateway   <unknown>   <none>                      <none>
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        NAME     STATUS     ROLE           AGE         INTERNAL-IP                 POD-CIDRS                         EXTERNAL-IP   ZONE         OVERLAY
        node-1   Ready      <none>         19d         192.168.50.11,fd00:50::11   10.244.1.0/24,fd00:244:0:1::/64   <none>        eu-west-1a   vxlan
        gw-1     NotReady   this gateway   <unknown>   <none>                      <none>                            <none>        <none>       <none>
        ");
    }
}
