//! Neighbors: `get neighbors`.

use config::control::{Item, NeighborRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint};

impl Row for NeighborRow {
    const SINGULAR: &'static str = "neighbor";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Neighbor(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.address.clone()
    }

    fn header(_: View) -> Vec<&'static str> {
        vec!["ADDRESS", "PORT", "MAC", "STATE"]
    }

    fn cells(&self, _: View) -> Vec<Cell> {
        let tint = if self.mac.is_some() { Tint::Good } else { Tint::Warn };
        vec![
            self.address.as_str().into(),
            self.port.as_str().into(),
            self.mac.clone().unwrap_or_default().into(),
            Cell::new(tint, self.state.as_str()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn unresolved_neighbors_have_no_mac() {
        let rows = [
            NeighborRow {
                address: "192.168.50.11".into(),
                port: "fabric".into(),
                mac: Some("02:00:00:00:00:11".into()),
                state: "reachable".into(),
            },
            NeighborRow {
                address: "fd00:50::12".into(),
                port: "fabric".into(),
                mac: None,
                state: "unresolved".into(),
            },
        ];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        ADDRESS         PORT     MAC                 STATE
        192.168.50.11   fabric   02:00:00:00:00:11   reachable
        fd00:50::12     fabric   <none>              unresolved
        ");
    }
}
