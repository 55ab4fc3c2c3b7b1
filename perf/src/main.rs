//! towpath-perf: sends numbered, time-stamped UDP packets at a constant rate into a gateway, receives what comes out, and
//! tells loss, duplicates, reordering, wrong endpoints and latency apart.
//!
//! Open loop: a packet is stamped with the time at which it *should* leave, and packets that could not leave in time are
//! sent late, not left out. So a gateway that stalls for a moment shows in the latency of every packet due meanwhile.
#![deny(unsafe_code)]

mod bypass;
mod clock;
mod connect;
mod flow;
mod generator;
mod place;
mod range;
mod report;
mod run;
mod search;
mod sink;
mod updates;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures a gateway with UDP packets over AF_XDP.
#[derive(Parser)]
#[command(name = "towpath-perf", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sends at one rate, and reports. Exit code 2 if packets came damaged, twice or from a wrong endpoint.
    Run(run::RunArguments),
    /// Forwards between two interfaces by Towpath's rings and nothing else: what the least possible forwarder would carry.
    Bypass(bypass::BypassArguments),
    /// Forwards between two interfaces by XDP in the kernel: the ceiling.
    Redirect(bypass::RedirectArguments),
    /// Opens and closes TCP connections, and reports. Exit code 2 if some failed.
    Connect(connect::ConnectArguments),
    /// Finds the highest rate without loss (NDR) and with at most 0.5 % loss (PDR) by bisection.
    Search(search::SearchArguments),
    /// Changes a Service under load, and tells how soon each change is in force. Exit code 2 if packets were lost.
    Updates(updates::UpdatesArguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Bypass(arguments) => bypass::bypass(&arguments),
        Command::Redirect(arguments) => bypass::redirect(&arguments),
        Command::Connect(arguments) => connect::connect(&arguments),
        Command::Search(arguments) => search::search(&arguments),
        Command::Updates(arguments) => updates::updates(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("towpath-perf: {error:#}");
        ExitCode::FAILURE
    })
}
