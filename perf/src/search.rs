//! The highest rate that a gateway carries.

use std::process::ExitCode;

use anyhow::ensure;
use clap::Args;

use crate::report::Report;
use crate::run::{Setup, measure};

/// Arguments of `search`.
#[derive(Args)]
pub struct SearchArguments {
    #[command(flatten)]
    setup: Setup,
    /// A rate that is carried for sure, in packets a second
    #[arg(long, default_value_t = 10_000.0)]
    low: f64,
    /// A rate that is not
    #[arg(long, default_value_t = 2_000_000.0)]
    high: f64,
    /// Runs that must all pass for a rate to count
    #[arg(long, default_value_t = 3)]
    trials: u32,
    /// Stop when the answer is known to this share
    #[arg(long, default_value_t = 0.03)]
    precision: f64,
    /// Write the answer as JSON to standard output
    #[arg(long)]
    json: bool,
}

/// The command `search`.
pub fn search(arguments: &SearchArguments) -> anyhow::Result<ExitCode> {
    ensure!(arguments.low < arguments.high, "--low {} is not below --high {}", arguments.low, arguments.high);
    ensure!(
        arguments.precision > 0.0 && arguments.trials > 0,
        "--precision and --trials must be more than 0"
    );
    let above = |low: f64, loss: f64| {
        find(low, arguments.high, arguments.precision, |rate| carries(arguments, rate, loss))
    };
    let highest = |loss: f64| {
        if carries(arguments, arguments.low, loss)? { above(arguments.low, loss) } else { Ok(0.0) }
    };
    let ndr = highest(0.0)?;
    // What is carried without loss is carried with some.
    let pdr = if ndr > 0.0 { above(ndr, 0.005)? } else { highest(0.005)? };
    if arguments.json {
        println!(
            "{}",
            serde_json::json!({ "scenario": arguments.setup.name, "ndr_pps": ndr, "pdr_pps": pdr })
        );
    } else {
        println!("{}: NDR {:.3} Mpps, PDR (0.5 %) {:.3} Mpps", arguments.setup.name, ndr / 1e6, pdr / 1e6);
    }
    Ok(ExitCode::SUCCESS)
}

/// True if every trial at this rate has at most `loss`.
fn carries(arguments: &SearchArguments, rate: f64, loss: f64) -> anyhow::Result<bool> {
    for _ in 0..arguments.trials {
        let report = measure(&arguments.setup, rate)?;
        eprintln!("  {}", report.line());
        if !is_carried(&report, loss) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bisects in the logarithm, since rates differ by orders of magnitude. `low` is carried.
fn find(
    mut low: f64,
    mut high: f64,
    precision: f64,
    mut carried: impl FnMut(f64) -> anyhow::Result<bool>,
) -> anyhow::Result<f64> {
    while high / low > 1.0 + precision {
        let middle = (low * high).sqrt();
        if carried(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

/// A generator that cannot keep up says nothing about the gateway, so its rate does not count as carried.
fn is_carried(report: &Report, loss: f64) -> bool {
    report.loss() <= loss && report.is_correct() && report.rate_sent >= report.rate_asked * 0.99
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bisection_finds_the_edge() {
        for edge in [10_500.0, 123_456.0, 1_900_000.0] {
            let mut runs = 0;
            let found = find(10_000.0, 2_000_000.0, 0.01, |rate| {
                runs += 1;
                Ok(rate <= edge)
            })
            .unwrap();
            assert!(found <= edge && found * 1.011 >= edge, "{found} for {edge}");
            assert!(runs < 15);
        }
    }
}
