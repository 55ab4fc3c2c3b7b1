//! One gateway at a time: an exclusive lock on the flow region.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::fault::{Code, Fault};
use config::gateway::Gateway;
use rustix::fs::{FlockOperation, flock};

use super::region::{self, beside, cannot_open, is_at, open};

/// How long to wait for a lock whose holder was just killed.
const PATIENCE: Duration = Duration::from_millis(500);

/// The locked flow region. The lock ends with the process, however that ends.
#[derive(Debug)]
pub struct RegionLock {
    path: PathBuf,
    /// A description of its own: the data plane inherits that of `region`, and the lock must not outlive the keeper in it.
    locked: File,
    region: File,
    affinity: File,
}

impl RegionLock {
    /// Opens, creating it if needed, and locks the flow region at `path`. Does not touch its contents.
    ///
    /// # Errors
    /// Another towpathd has it, or the path cannot be used; the fault names the field and what to do.
    pub fn take(path: &Path) -> Result<RegionLock, Fault> {
        let fault = |cause: io::Error| cannot_open(path, &cause);
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
        {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(fault)?;
        }
        let start = Instant::now();
        let locked = loop {
            let file = open(path).map_err(fault)?;
            let refused = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // The holder may have put another file in the place of the one that we waited for.
                Ok(()) if is_at(&file, path) => break file,
                Ok(()) => continue,
                Err(cause) => cause,
            };
            if start.elapsed() > PATIENCE {
                return Err(Fault::new(Code::Conflict, format!("is locked by another towpathd ({refused})"))
                    .field("flows.region")
                    .value(path.display())
                    .remedy(
                        "stop it first, or give this gateway a region, socket and state_dir of its own",
                    ));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let region = open(path).map_err(fault)?;
        let affinity = open(&beside(path, ".affinity")).map_err(fault)?;
        Ok(RegionLock { path: path.to_owned(), locked, region, affinity })
    }

    /// Moves flows and remembered clients into regions of the capacities of `gateway`, where they are of others.
    ///
    /// They are copied into a file beside the region, which then takes its name: a death at any moment leaves the old region or the
    /// new one, whole.
    ///
    /// # Errors
    /// There is no room for both. The old regions are as they were.
    pub fn resize(&mut self, gateway: &Gateway) -> Result<(), Fault> {
        if let Some(moved) = region::resize(&self.path, &self.region, region::flows(gateway), "flows")? {
            (self.locked, self.region) = (moved.locked, moved.region);
        }
        let path = beside(&self.path, ".affinity");
        let config = region::affinity(gateway);
        if let Some(moved) = region::resize(&path, &self.affinity, config, "session affinity")? {
            self.affinity = moved.region;
        }
        Ok(())
    }

    /// The region, to be handed to the data plane.
    pub fn region(&self) -> &File {
        &self.region
    }

    /// The region of session affinity, which lies beside it.
    pub fn affinity(&self) -> &File {
        &self.affinity
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/flows");
        let first = RegionLock::take(&path).unwrap();
        let refused = RegionLock::take(&path).unwrap_err().to_string();
        assert!(refused.contains("flows.region") && refused.contains("another towpathd"), "{refused}");
        let inherited = first.region().try_clone().unwrap();
        drop(first);
        RegionLock::take(&path).unwrap();
        drop(inherited);
    }

    #[test]
    fn a_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(RegionLock::take(&path).unwrap_err().to_string().contains("cannot be opened"));
        assert!(!dir.path().join("elsewhere").exists());
    }
}
