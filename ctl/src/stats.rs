//! `towpathctl stats`: packet counters, once as sums or, with `--watch`, as rates, a line a second as vmstat prints them.

use std::time::Duration;

use anyhow::Result;
use config::control::{Count, Reply, Request, Stats};
use serde_json::json;

use crate::connection::{Connection, unexpected};
use crate::print::{self, Cell, Output, Paint, Table, Tint, out, out_value, thousands};
use crate::{Ending, Global, drops};

/// Arguments of `stats`.
#[derive(clap::Args)]
pub struct Args {
    /// Rates, a line each interval, until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Seconds between lines
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = crate::seconds, requires = "watch")]
    interval: Duration,
    /// Stop after so many lines
    #[arg(short, long, value_name = "LINES", requires = "watch")]
    count: Option<u64>,
    /// How to print; wide adds a column for each worker
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `stats`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let connection = &mut global.connect()?;
    let stats = ask(connection)?;
    if args.watch {
        watch(connection, args, stats, global.paint())?;
    } else if matches!(args.output, Output::Json | Output::Yaml) {
        out_value(args.output, &stats)?;
    } else {
        out(&sums(&stats, args.output == Output::Wide, global.paint()))?;
    }
    Ok(Ending::Done)
}

fn ask(connection: &mut Connection) -> Result<Stats> {
    match connection.ask(&Request::Stats)? {
        Reply::Stats(stats) => Ok(stats),
        other => Err(unexpected(&other)),
    }
}

fn watch(connection: &mut Connection, args: &Args, mut before: Stats, paint: Paint) -> Result<()> {
    const LINES_A_HEADER: u64 = 20;
    let mut lines = 0;
    while args.count.is_none_or(|count| lines < count) {
        std::thread::sleep(args.interval);
        let now = ask(connection)?;
        let rates = Rates::between(&before, &now);
        match args.output {
            Output::Json => out(&format!("{}\n", rates.json()))?,
            Output::Yaml => out(&format!("---\n{}", serde_saphyr::to_string(&rates.json())?))?,
            _ => out(&rates.line(lines % LINES_A_HEADER == 0, paint))?,
        }
        before = now;
        lines += 1;
    }
    Ok(())
}

/// What happened between two answers, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rates {
    rx_packets: f64,
    rx_bits: f64,
    tx_packets: f64,
    tx_bits: f64,
    forwarded: f64,
    answered: f64,
    punted: f64,
    dropped: f64,
    /// In the receive rings, before the pipeline.
    lost: f64,
    flows_created: f64,
    flows: u64,
}

impl Rates {
    /// A data plane that was started again counts from 0, so that its counters are the difference themselves.
    fn between(before: &Stats, now: &Stats) -> Rates {
        let restarted = now.uptime_ms < before.uptime_ms;
        let elapsed_ms = if restarted { now.uptime_ms } else { now.uptime_ms - before.uptime_ms };
        let value =
            |stats: &Stats, name: &str| stats.totals.iter().find(|c| c.name == name).map_or(0, |c| c.value);
        let dropped = |stats: &Stats| stats.drops.iter().map(|c| c.value).sum::<u64>();
        let a_second = |before: u64, now: u64| {
            let before = if restarted { 0 } else { before };
            now.saturating_sub(before) as f64 * 1000.0 / elapsed_ms.max(1) as f64
        };
        let rate = |name: &str| a_second(value(before, name), value(now, name));
        // Answered packets have a reason too, but they were not dropped.
        let dropped_only = |stats: &Stats| dropped(stats).saturating_sub(value(stats, "answered"));
        // An empty fill ring is counted among the dropped as well.
        let lost = |stats: &Stats| {
            let is_loss = |count: &&Count| matches!(count.name.as_str(), "rx_ring_full" | "rx_dropped");
            stats.rings.iter().filter(is_loss).map(|count| count.value).sum::<u64>()
        };
        Rates {
            rx_packets: rate("rx_packets"),
            rx_bits: rate("rx_bytes") * 8.0,
            tx_packets: rate("tx_packets"),
            tx_bits: rate("tx_bytes") * 8.0,
            forwarded: rate("forwarded"),
            answered: rate("answered"),
            punted: rate("punted"),
            dropped: a_second(dropped_only(before), dropped_only(now)),
            // The sockets outlive a data plane, and their counters with them.
            lost: lost(now).saturating_sub(lost(before)) as f64 * 1000.0 / elapsed_ms.max(1) as f64,
            flows_created: rate("flows_created"),
            flows: now.flows,
        }
    }

    fn line(&self, header: bool, paint: Paint) -> String {
        let mut text = String::new();
        if header {
            let names = [
                "rx/s", "rx bit/s", "tx/s", "tx bit/s", "fwd/s", "answer/s", "punt/s", "drop/s", "lost/s",
                "new/s", "flows",
            ];
            let names: String = names.iter().map(|name| format!("{name:>9} ")).collect();
            text = paint.paint(Tint::Bold, names.trim_end()) + "\n";
        }
        let numbers = [
            self.rx_packets,
            self.rx_bits,
            self.tx_packets,
            self.tx_bits,
            self.forwarded,
            self.answered,
            self.punted,
            self.dropped,
            self.lost,
            self.flows_created,
            self.flows as f64,
        ];
        let numbers: String = numbers.iter().map(|n| format!("{:>9} ", short(*n))).collect();
        text + numbers.trim_end() + "\n"
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "rx_packets_s": self.rx_packets,
            "rx_bits_s": self.rx_bits,
            "tx_packets_s": self.tx_packets,
            "tx_bits_s": self.tx_bits,
            "forwarded_s": self.forwarded,
            "answered_s": self.answered,
            "punted_s": self.punted,
            "dropped_s": self.dropped,
            "lost_s": self.lost,
            "flows_created_s": self.flows_created,
            "flows": self.flows,
        })
    }
}

/// At most three digits and a unit: `987`, `1.23k`, `45.6M`.
fn short(n: f64) -> String {
    let mut n = n;
    for unit in ["", "k", "M", "G"] {
        if n < 999.5 {
            let decimals = match n {
                _ if unit.is_empty() => 0,
                n if n < 9.995 => 2,
                n if n < 99.95 => 1,
                _ => 0,
            };
            return format!("{n:.decimals$}{unit}");
        }
        n /= 1000.0;
    }
    format!("{n:.0}T")
}

fn sums(stats: &Stats, wide: bool, paint: Paint) -> String {
    // Headers are static words; the names of workers are few and live as long as the program.
    let mut header = vec!["COUNTER", "TOTAL"];
    let workers: &[_] = if wide { &stats.workers } else { &[] };
    header.extend(workers.iter().map(|w| &*Box::leak(format!("WORKER-{}", w.index).into_boxed_str())));
    header.push("MEANING");
    let mut table = Table::new(header);
    for count in &stats.totals {
        let mut cells = vec![Cell::from(count.name.as_str()), thousands(count.value).into()];
        cells.extend(
            workers.iter().map(|w| thousands(w.counters.get(&count.name).copied().unwrap_or(0)).into()),
        );
        cells.push(Cell::new(Tint::Dim, count.help.as_str()));
        table.row(cells);
    }
    let mut text = table.take(paint, 0);
    text += &format!("\n{} flows in the table\n", thousands(stats.flows));
    let drops = drops::text(&stats.drops, &stats.rings, false, paint);
    if !drops.is_empty() {
        text += "\n";
        text += &drops;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::control::WorkerRow;

    fn stats(uptime_ms: u64, rx: u64, dropped: u64) -> Stats {
        let count = |name: &str, value| Count { name: name.into(), value, help: "Help.".into() };
        Stats {
            uptime_ms,
            totals: vec![count("rx_packets", rx), count("rx_bytes", rx * 100), count("answered", 1)],
            drops: vec![count("no_route", dropped), count("unknown_port", 1), count("land", 0)],
            rings: vec![count("rx_ring_full", rx / 1000), count("rx_fill_ring_empty_descs", 7)],
            workers: vec![WorkerRow {
                index: 0,
                counters: [("rx_packets".to_owned(), rx)].into(),
                ..Default::default()
            }],
            flows: 12,
        }
    }

    #[test]
    fn sums_of_all_and_of_each_worker() {
        insta::assert_snapshot!(sums(&stats(1000, 1_234_567, 3), true, Paint::PLAIN), @"
        COUNTER      TOTAL         WORKER-0    MEANING
        rx_packets   1,234,567     1,234,567   Help.
        rx_bytes     123,456,700   0           Help.
        answered     1             0           Help.

        12 flows in the table

        REASON         PACKETS   MEANING
        no_route       3         Help.
        unknown_port   1         Help.

        Lost in the rings, and not among the packets received:
        RING LOSS                  PACKETS   MEANING
        rx_ring_full               1,234     Help.
        rx_fill_ring_empty_descs   7         Help.
        ");
    }

    #[test]
    fn rates_are_differences_a_second() {
        let rates = Rates::between(&stats(1000, 1000, 0), &stats(3000, 5000, 8));
        assert_eq!((rates.rx_packets, rates.rx_bits, rates.dropped), (2000.0, 1_600_000.0, 4.0));
        insta::assert_snapshot!(rates.line(true, Paint::PLAIN), @"
         rx/s  rx bit/s      tx/s  tx bit/s     fwd/s  answer/s    punt/s    drop/s    lost/s     new/s     flows
        2.00k     1.60M         0         0         0         0         0         4         2         0        12
        ");
    }

    #[test]
    fn a_restart_does_not_turn_rates_around() {
        let rates = Rates::between(&stats(90_000, 1_000_000, 7), &stats(500, 100, 0));
        assert_eq!(rates.rx_packets, 200.0);
        assert_eq!(rates.dropped, 0.0);
        let (before, now) = (stats(90_000, 8_000, 7), stats(500, 9_000, 0));
        assert_eq!(Rates::between(&before, &now).lost, 2.0, "the sockets and their counters live on");
    }

    #[test]
    fn numbers_are_short() {
        for (n, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (1234.0, "1.23k"),
            (45_600_000.0, "45.6M"),
            (999_600.0, "1.00M"),
            (123_000.0, "123k"),
            (2e12, "2T"),
        ] {
            assert_eq!(short(n), text);
        }
    }
}
