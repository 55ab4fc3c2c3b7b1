//! `towpathctl explain`: what would happen to a packet, from Kubernetes objects alone.

use anyhow::{Result, bail};

use crate::{Ending, Global};

/// Shown below the help.
pub const EXAMPLES: &str = "";

/// Arguments of `explain`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `explain`.
pub fn run(_: &Global, _: &Args) -> Result<Ending> {
    bail!("to come")
}
