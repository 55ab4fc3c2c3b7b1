//! Pods: `get pods`.

use config::control::{Item, PodRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint, age_of};

impl Row for PodRow {
    const SINGULAR: &'static str = "pod";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Pod(row) => Some(row),
            _ => None,
        }
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.namespace)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["NAME", "STATUS", "AGE", "IP", "NODE"];
        if view.wide {
            header.extend(["HOST-NETWORK", "HOST-PORTS"]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let tint = match self.phase.as_str() {
            "Running" | "Succeeded" => Tint::Good,
            "Failed" => Tint::Bad,
            _ => Tint::Warn,
        };
        let mut cells = vec![
            self.name.as_str().into(),
            Cell::new(tint, self.phase.as_str()),
            age_of(self.created.as_deref(), view.now_s).into(),
            self.ips.join(",").into(),
            self.node.as_str().into(),
        ];
        if view.wide {
            cells.push(if self.host_network { "yes" } else { "no" }.into());
            cells.push(match self.host_ports.as_slice() {
                [] => "<none>".into(),
                host_ports => host_ports.join(",").into(),
            });
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn pods_show_every_address() {
        let rows = [PodRow {
            namespace: "default".into(),
            name: "my-nginx-646554d7fd-gqsfh".into(),
            ips: vec!["10.244.1.7".into(), "fd00:244:0:1::7".into()],
            node: "node-1".into(),
            phase: "Running".into(),
            host_ports: vec!["8080->80/TCP".into()],
            created: Some("2026-11-21T23:58:30Z".into()),
            ..Default::default()
        }];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME                        STATUS    AGE   IP                           NODE
        my-nginx-646554d7fd-gqsfh   Running   90s   10.244.1.7,fd00:244:0:1::7   node-1
        ");
        insta::assert_snapshot!(print_rows(&rows, View::WIDE), @"
        NAMESPACE   NAME                        STATUS    AGE   IP                           NODE     HOST-NETWORK   HOST-PORTS
        default     my-nginx-646554d7fd-gqsfh   Running   90s   10.244.1.7,fd00:244:0:1::7   node-1   no             8080->80/TCP
        ");
    }
}
