//! Namespaces: `get namespaces`.

use config::control::{Item, NamespaceRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint, age_of};

impl Row for NamespaceRow {
    const SINGULAR: &'static str = "namespace";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Namespace(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["NAME", "STATUS", "AGE"];
        if view.wide {
            header.push("LABELS");
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let tint = if self.phase == "Active" { Tint::Good } else { Tint::Warn };
        let mut cells = vec![
            self.name.as_str().into(),
            Cell::new(tint, self.phase.as_str()),
            age_of(self.created.as_deref(), view.now_s).into(),
        ];
        if view.wide {
            let labels: Vec<String> = self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            cells.push(labels.join(",").into());
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn labels_are_wide() {
        let rows = [NamespaceRow {
            name: "shop".into(),
            phase: "Active".into(),
            labels: [("team".to_owned(), "a".to_owned()), ("env".to_owned(), "prod".to_owned())].into(),
            created: Some("2026-11-21T20:30:00Z".into()),
        }];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        NAME   STATUS   AGE
        shop   Active   3h30m
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        NAME   STATUS   AGE     LABELS
        shop   Active   3h30m   env=prod,team=a
        ");
    }
}
