//! `towpathctl drops`: why packets were dropped or answered instead of forwarded.

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
    let mut reasons = match global.connect()?.ask(&Request::Drops)? {
        Reply::Drops { reasons } => reasons,
        other => return Err(unexpected(&other)),
    };
    if matches!(args.output, Output::Json | Output::Yaml) {
        out_value(args.output, &reasons)?;
        return Ok(Ending::Done);
    }
    if !args.all {
        reasons.retain(|reason| reason.value > 0);
    }
    if reasons.is_empty() {
        notice("No packet was dropped.");
    } else {
        out(&table(reasons, global.paint()))?;
    }
    Ok(Ending::Done)
}

/// The most frequent reason first.
pub fn table(mut reasons: Vec<Count>, paint: Paint) -> String {
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.value));
    let mut table = Table::new(["REASON", "PACKETS", "MEANING"]);
    for reason in &reasons {
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

    #[test]
    fn the_most_frequent_comes_first() {
        let count = |name: &str, value| Count { name: name.into(), value, help: format!("About {name}.") };
        let text =
            table(vec![count("no_route", 2), count("unknown_port", 1234), count("land", 2)], Paint::PLAIN);
        insta::assert_snapshot!(text, @"
        REASON         PACKETS   MEANING
        unknown_port   1,234     About unknown_port.
        no_route       2         About no_route.
        land           2         About land.
        ");
    }
}
