//! The data plane: what the keeper starts, without any privilege.

use std::os::fd::RawFd;

/// Becomes the data plane.
///
/// # Errors
/// What kept it from forwarding.
pub fn run(_manifest_fd: RawFd) -> anyhow::Result<()> {
    anyhow::bail!("to come")
}
