//! Workers: `get workers`.

use config::control::{FramesRow, Item, WorkerRow};

use crate::get::{Row, View};
use crate::print::{Cell, Tint, thousands};

impl Row for WorkerRow {
    const SINGULAR: &'static str = "worker";

    fn from_item(item: Item) -> Option<Self> {
        match item {
            Item::Worker(row) => Some(row),
            _ => None,
        }
    }

    fn name(&self) -> String {
        self.index.to_string()
    }

    fn header(view: View) -> Vec<&'static str> {
        let mut header = vec!["WORKER", "CPU", "POLL", "STATE", "HEARTBEAT", "GENERATION"];
        if view.wide {
            header.extend(["RX", "TX", "FORWARDED", "BURSTS", "SLEEPS"]);
            header.extend([
                "FRAMES",
                "FREE",
                "HELD",
                "ON-FILL",
                "ON-RX",
                "ON-TX",
                "COMPLETED",
                "KERNEL",
                "MISSING",
            ]);
        }
        header
    }

    fn cells(&self, view: View) -> Vec<Cell> {
        let tint = match self.state.as_str() {
            "running" => Tint::Good,
            "stuck" => Tint::Bad,
            _ => Tint::Plain,
        };
        let mut cells = vec![
            self.index.to_string().into(),
            self.cpu.to_string().into(),
            self.poll.as_str().into(),
            Cell::new(tint, self.state.as_str()),
            format!("{}ms", self.heartbeat_age_ms).into(),
            self.generation.to_string().into(),
        ];
        if view.wide {
            cells.extend(
                ["rx_packets", "tx_packets", "forwarded", "bursts", "sleeps"].map(|name| {
                    Cell::from(self.counters.get(name).map(|&n| thousands(n)).unwrap_or_default())
                }),
            );
            let FramesRow { total, free, held, fill, rx, tx, completion, kernel, missing } = self.frames;
            cells.extend(
                [total, free, held, fill, rx, tx, completion, kernel].map(|n| Cell::from(thousands(n))),
            );
            let tint = if missing == 0 { Tint::Plain } else { Tint::Bad };
            cells.push(Cell::new(tint, missing.to_string()));
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::get::print_rows;

    #[test]
    fn workers_show_their_pulse() {
        let rows = [
            WorkerRow {
                index: 0,
                cpu: 1,
                poll: "adaptive".into(),
                generation: 7,
                heartbeat_age_ms: 2,
                state: "running".into(),
                counters: [("rx_packets".to_owned(), 1_234_567), ("forwarded".to_owned(), 1_234_000)].into(),
                frames: FramesRow {
                    total: 16_384,
                    free: 8_190,
                    held: 1,
                    fill: 8_000,
                    rx: 192,
                    completion: 1,
                    ..FramesRow::default()
                },
            },
            WorkerRow {
                index: 1,
                cpu: 2,
                state: "stuck".into(),
                heartbeat_age_ms: 1200,
                ..Default::default()
            },
        ];
        insta::assert_snapshot!(print_rows(&rows, View::NARROW), @"
        WORKER   CPU   POLL       STATE     HEARTBEAT   GENERATION
        0        1     adaptive   running   2ms         7
        1        2     <none>     stuck     1200ms      0
        ");
        insta::assert_snapshot!(print_rows(&rows, View { namespaces: false, ..View::WIDE }), @"
        WORKER   CPU   POLL       STATE     HEARTBEAT   GENERATION   RX          TX       FORWARDED   BURSTS   SLEEPS   FRAMES   FREE    HELD   ON-FILL   ON-RX   ON-TX   COMPLETED   KERNEL   MISSING
        0        1     adaptive   running   2ms         7            1,234,567   <none>   1,234,000   <none>   <none>   16,384   8,190   1      8,000     192     0       1           0        0
        1        2     <none>     stuck     1200ms      0            <none>      <none>   <none>      <none>   <none>   0        0       0      0         0       0       0           0        0
        ");
    }
}
