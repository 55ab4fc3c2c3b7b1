//! `towpathctl`: the command line of Towpath.
//!
//! Each noun has one file, named as in the daemon and in `config`. The habits are kubectl's where Kubernetes has one:
//! verbs, flags, columns, `service/my-nginx created` lines; data goes to standard output, notices to standard error.
#![deny(unsafe_code)]

mod connection;
mod frame;
mod pcapng;
mod print;
mod source;

// Verbs.
mod capture;
mod change;
mod describe;
mod diff;
mod drops;
mod explain;
mod get;
mod metrics;
mod stats;
mod status;
mod trace;

// Nouns.
mod dns;
mod endpoint;
mod flow;
mod namespace;
mod neighbor;
mod node;
mod pod;
mod port;
mod route;
mod service;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use config::control::DEFAULT_SOCKET;
use config::fault::Fault;

use crate::connection::Connection;
use crate::print::{Color, Paint, StdoutClosed, Tint, notice};

const EXIT_CODES: &str = "\
Exit codes:
  0   done; diff: no difference
  1   failed, nothing was changed unless the message says so; diff: there are differences
  2   the command line is wrong; diff: failed
  3   accepted, but not yet in force on every worker
  130 interrupted

Objects are Kubernetes manifests: Service, EndpointSlice, Node, Pod, Namespace, and Lists of them.
Colours follow the terminal and NO_COLOR.";

/// The command line of Towpath: explains packets, applies Kubernetes objects, shows what is in force.
#[derive(Parser)]
#[command(name = "towpathctl", version, after_help = EXIT_CODES, max_term_width = 100, infer_subcommands = false)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(clap::Args)]
pub struct Global {
    /// The daemon's control socket
    #[arg(long, global = true, value_name = "PATH", env = "TOWPATH_SOCKET", default_value = DEFAULT_SOCKET, help_heading = "Global options")]
    socket: PathBuf,
    /// Seconds to wait for an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value = "5", value_parser = seconds, help_heading = "Global options")]
    request_timeout: Duration,
    /// When to colour
    #[arg(long, global = true, value_enum, default_value = "auto", help_heading = "Global options")]
    color: Color,
}

impl Global {
    /// Connects to the daemon.
    fn connect(&self) -> Result<Connection> {
        Connection::open(&self.socket, self.request_timeout)
    }

    /// Colours, or none.
    fn paint(&self) -> Paint {
        Paint::new(self.color)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.trim_end_matches('s').parse().map_err(|_| "not a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() && seconds <= 3600.0 => Ok(duration),
        _ => Err("use more than 0 and at most 3600 seconds".to_owned()),
    }
}

#[derive(Subcommand)]
enum Command {
    /// Explain what would happen to a packet, from Kubernetes objects alone: no daemon, no root
    #[command(after_help = explain::EXAMPLES)]
    Explain(explain::Args),
    /// Create or replace objects: one change, all or nothing
    Apply(change::ApplyArgs),
    /// Remove objects: one change, all or nothing
    Delete(change::DeleteArgs),
    /// Show what `apply` would change
    Diff(diff::Args),
    /// List objects and what they became
    Get(get::Args),
    /// Show everything about one Service, each endpoint's use included
    Describe(describe::Args),
    /// Show the daemon's health
    Status(status::Args),
    /// Show packet counters, once or as rates
    Stats(stats::Args),
    /// Show why packets were dropped or answered
    Drops(drops::Args),
    /// Show everything that is measured, for Prometheus: what the health server serves as /metrics
    Metrics,
    /// List, count or remove flows
    Flows(flow::Args),
    /// Add or remove a route to pods
    Route(route::Args),
    /// Add or remove a port
    Port(port::Args),
    /// Explain what would happen to a packet on the running daemon, changing nothing
    Trace(trace::Args),
    /// Show packets as they pass: before translation, after it, and as they are dropped
    #[command(after_help = capture::FILTERS)]
    Capture(capture::Args),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How a command ends when nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All is done.
    Done,
    /// `diff` found differences.
    Different,
    /// Accepted, but not in force on every worker yet.
    NotInForce,
}

/// The command line cannot be meant. With an empty text it is the context of a fault that says more.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Set once a commit is on its way: from then on an interruption cannot take it back.
pub static COMMIT_SENT: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    watch_interrupts();
    let Cli { global, command } = Cli::parse();
    let is_diff = matches!(command, Command::Diff(_));
    match run(&global, command) {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::Different) => ExitCode::from(1),
        Ok(Ending::NotInForce) => ExitCode::from(3),
        // The reader has seen enough (`| head -1`): not a failure.
        Err(error) if error.is::<StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            report(&global, &error);
            ExitCode::from(if is_diff || error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(global: &Global, command: Command) -> Result<Ending> {
    match command {
        Command::Explain(args) => explain::run(global, &args),
        Command::Apply(args) => change::apply(global, &args),
        Command::Delete(args) => change::delete(global, &args),
        Command::Diff(args) => diff::run(global, &args),
        Command::Get(args) => get::run(global, &args),
        Command::Describe(args) => describe::run(global, &args),
        Command::Status(args) => status::run(global, &args),
        Command::Stats(args) => stats::run(global, &args),
        Command::Drops(args) => drops::run(global, &args),
        Command::Metrics => metrics::run(global),
        Command::Flows(args) => flow::run(global, &args),
        Command::Route(args) => route::run(global, &args),
        Command::Port(args) => port::run(global, args),
        Command::Trace(args) => trace::run(global, &args),
        Command::Capture(args) => capture::run(global, &args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "towpathctl", &mut script);
            print::out(&String::from_utf8(script)?)?;
            Ok(Ending::Done)
        }
    }
}

/// Prints an error, a remedy on a line of its own.
fn report(global: &Global, error: &anyhow::Error) {
    let paint = Paint::for_stderr(global.color);
    let label = paint.paint(Tint::Bad, "error:");
    match error.downcast_ref::<Fault>() {
        Some(fault) => notice(&print::fault(paint, Tint::Bad, "error:", fault)),
        None => notice(&format!("{label} {error:#}")),
    }
}

/// An interruption ends a capture in order; the next one, or one of anything else, says what became of a change, then ends the
/// process with the code that shells use for it.
fn watch_interrupts() {
    use signal_hook::consts::{SIGINT, SIGTERM};
    // Without the thread the default action holds, which ends the process too: only the sentence is lost.
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if capture::end() {
                continue;
            }
            notice(if COMMIT_SENT.load(Ordering::SeqCst) {
                "interrupted after the change was sent: it may be in force, see `towpathctl status`"
            } else {
                "interrupted, nothing was changed"
            });
            std::process::exit(128 + signal);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn timeouts_are_bounded() {
        assert_eq!(seconds("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for bad in ["0", "-1", "nan", "inf", "1e9", "soon", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
