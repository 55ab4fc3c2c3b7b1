//! `towpathd`: reads its command line and hands over to the keeper, or, started by the keeper, becomes the data plane.
#![deny(unsafe_code)]

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use config::gateway::Gateway;
use forwarder::{keeper, replay};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// Forwards packets of Kubernetes Services on a gateway node.
#[derive(Parser)]
#[command(name = "towpathd", version, arg_required_else_help = true, subcommand_negates_reqs = true)]
#[command(
    after_help = "Environment:\n  TOWPATH_LOG  what is logged: error, warn, info (default), debug or trace, \
                        or by module as in info,forwarder::kernel=debug"
)]
struct Arguments {
    /// Gateway file; runs in the foreground, logs to stderr, stops on SIGTERM and SIGINT.
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Checks a gateway file against itself and this machine; exit code 1 if something is wrong.
    Check {
        /// The gateway file.
        file: PathBuf,
    },
    /// Runs a capture through the pipeline, on a gateway that is not there; needs no root.
    Replay(replay::Args),
    /// Forwards; started by the keeper only.
    #[command(hide = true)]
    DataPlane {
        /// Descriptor of the manifest.
        #[arg(long)]
        manifest_fd: i32,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Err(complaint) = begin_log() {
        eprintln!("towpathd: {complaint}");
        return ExitCode::FAILURE;
    }
    let outcome = match (arguments.command, arguments.config) {
        (Some(Command::Check { file }), _) => check(&file),
        (Some(Command::Replay(args)), _) => replay::run(&args),
        (Some(Command::DataPlane { manifest_fd }), _) => keeper::data_plane::run(manifest_fd),
        (None, Some(file)) => keeper::run(&file),
        (None, None) => unreachable!("clap requires one of them"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in format!("{error:#}").lines() {
                eprintln!("towpathd: {line}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Logs to standard error what TOWPATH_LOG asks for.
fn begin_log() -> Result<(), String> {
    let wanted = std::env::var("TOWPATH_LOG").unwrap_or_default();
    let wanted = if wanted.is_empty() { "info".to_owned() } else { wanted };
    // A word that is no level would be the name of a module, and switch everything else off.
    let is_known = |part: &str| part.contains('=') || part.parse::<LevelFilter>().is_ok();
    let targets = wanted.parse::<Targets>().ok().filter(|_| wanted.split(',').all(is_known));
    let remedy = "use a level such as info or debug, or levels by module as in info,forwarder::kernel=debug";
    let targets = targets.ok_or_else(|| format!("TOWPATH_LOG: {wanted}: not understood; {remedy}"))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    tracing_subscriber::registry().with(lines).with(targets).init();
    Ok(())
}

/// What is wrong in the file itself is an error; what this machine lacks for it is one too, since the file is meant for it.
fn check(file: &std::path::Path) -> anyhow::Result<()> {
    let gateway = Gateway::load(file).map_err(keeper::all_faults)?;
    let faults = keeper::preflight::check_file(&gateway);
    if !faults.is_empty() {
        return Err(keeper::all_faults(faults));
    }
    println!("{}: fine", file.display());
    Ok(())
}
