//! `towpathctl drops`: why packets were dropped or answered instead of forwarded, and what the rings lost before.

use anyhow::Result;
use config::control::{Count, Reply, Request};

use crate::connection::unexpected;
use crate::print::{self, Cell, Output, Paint, Table, Tint, notice, out, out_value, thousands};
use crate::{Ending, Global};

/// Arguments of `drops`.
#[derive(clap::Args)]
pub struct Args {
    /// Reasons that never happened too
    #[arg(short, long)]
    all: bool,
    /// How to print
    #[arg(short, long, value_name = "FORM", value_parser = print::forms(), default_value = "table", hide_default_value = true)]
    output: Output,
}

/// Runs `drops`.
pub fn run(global: &Global, args: &Args) -> Result<Ending> {
    let drops = match global.connect()?.ask(&Request::Drops)? {
        Reply::Drops(drops) => drops,
        other => return Err(unexpected(&other)),
    };
    if matches!(args.output, Output::Json | Output::Yaml) {
        out_value(args.output, &drops)?;
        return Ok(Ending::Done);
    }
    match text(&drops.reasons, &drops.rings, args.all, global.paint()) {
        text if text.is_empty() => notice("No packet was dropped."),
        text => out(&text)?,
    }
    Ok(Ending::Done)
}

/// Reasons of the pipeline, then losses of the rings, each with the most frequent first; `all`: those that never happened
/// too. Empty if there is nothing to show.
pub fn text(reasons: &[Count], rings: &[Count], all: bool, paint: Paint) -> String {
    let shown = |counts: &[Count]| -> Vec<Count> {
        counts.iter().filter(|count| all || count.value > 0).cloned().collect()
    };
    let mut parts = Vec::new();
    match shown(reasons) {
        reasons if reasons.is_empty() => {}
        reasons => parts.push(table("REASON", reasons, paint)),
    }
    match shown(rings) {
        rings if rings.is_empty() => {}
        rings => parts.push(format!(
            "Lost in the rings, and not among the packets received:\n{}",
            table("RING LOSS", rings, paint)
        )),
    }
    parts.join("\n")
}

/// The most frequent first.
fn table(what: &'static str, mut counts: Vec<Count>, paint: Paint) -> String {
    counts.sort_by_key(|count| std::cmp::Reverse(count.value));
    let mut table = Table::new([what, "PACKETS", "MEANING"]);
    for reason in &counts {
        let tint = if reason.value > 0 { Tint::Warn } else { Tint::Dim };
        table.row([
            Cell::new(tint, reason.name.as_str()),
            thousands(reason.value).into(),
            reason.help.as_str().into(),
        ]);
    }
    table.take(paint, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(name: &str, value: u64) -> Count {
        Count { name: name.into(), value, help: format!("About {name}.") }
    }

    #[test]
    fn the_most_frequent_comes_first() {
        let reasons =
            [count("no_route", 2), count("unknown_port", 1234), count("land", 2), count("fragment", 0)];
        insta::assert_snapshot!(text(&reasons, &[], false, Paint::PLAIN), @"
        REASON         PACKETS   MEANING
        unknown_port   1,234     About unknown_port.
        no_route       2         About no_route.
        land           2         About land.
        ");
    }

    #[test]
    fn what_the_rings_lost_is_told_apart() {
        let (reasons, rings) = ([count("no_route", 0)], [count("rx_ring_full", 7), count("rx_dropped", 0)]);
        insta::assert_snapshot!(text(&reasons, &rings, true, Paint::PLAIN), @"
        REASON     PACKETS   MEANING
        no_route   0         About no_route.

        Lost in the rings, and not among the packets received:
        RING LOSS      PACKETS   MEANING
        rx_ring_full   7         About rx_ring_full.
        rx_dropped     0         About rx_dropped.
        ");
        insta::assert_snapshot!(text(&reasons, &rings, false, Paint::PLAIN), @"
        Lost in the rings, and not among the packets received:
        RING LOSS      PACKETS   MEANING
        rx_ring_full   7         About rx_ring_full.
        ");
        assert_eq!(text(&reasons, &[], false, Paint::PLAIN), "");
    }
}
