//! Names of Services and pods: `get dns`, and `get dns -o hosts` for dnsmasq's `addn-hosts` or `/etc/hosts`.

use std::fmt::Write as _;

use config::control::{DnsRow, Item};

use crate::get::{Row, View};
use crate::print::Cell;

impl Row for DnsRow {
    const SINGULAR: &'static str = "name";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Dns(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(_: View) -> Vec<&'static str> {
        vec!["NAME", "RECORD", "ADDRESS"]
    }

    fn cells(&self, _: View) -> Vec<Cell> {
        let record = if self.address.contains(':') { "AAAA" } else { "A" };
        vec![self.name.as_str().into(), record.into(), self.address.as_str().into()]
    }
}

/// The lines of a hosts file (hosts(5)): address, then name, in the order given.
pub fn hosts(rows: &[DnsRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let _ = writeln!(text, "{} {}", row.address, row.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn both_families_in_both_forms() {
        let row = |address: &str| DnsRow {
            name: "my-nginx.default.svc.cluster.local".into(),
            address: address.into(),
        };
        let rows = [row("10.96.142.17"), row("fd00:96::8e11")];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME                                 RECORD   ADDRESS
        my-nginx.default.svc.cluster.local   A        10.96.142.17
        my-nginx.default.svc.cluster.local   AAAA     fd00:96::8e11
        ");
        assert_eq!(
            hosts(&rows),
            "10.96.142.17 my-nginx.default.svc.cluster.local\n\
             fd00:96::8e11 my-nginx.default.svc.cluster.local\n"
        );
    }
}
