//! `towpathctl metrics`: everything that is measured, as Prometheus reads it from `/metrics`.

use anyhow::Result;
use config::control::{Reply, Request};

use crate::connection::unexpected;
use crate::print::out;
use crate::{Ending, Global};

/// Runs `metrics`.
pub fn run(global: &Global) -> Result<Ending> {
    match global.connect()?.ask(&Request::Metrics)? {
        Reply::Metrics { text } => out(&text)?,
        other => return Err(unexpected(&other)),
    }
    Ok(Ending::Done)
}
