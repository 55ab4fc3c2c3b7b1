//! One gateway at a time: an exclusive lock on the flow region.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use config::fault::{Code, Fault};
use rustix::fs::{FlockOperation, flock};

/// How long to wait for a lock whose holder was just killed.
const PATIENCE: Duration = Duration::from_millis(500);

/// The locked flow region. The lock ends with the process, however that ends.
#[derive(Debug)]
pub struct RegionLock {
    _locked: File,
    region: File,
    affinity: File,
}

impl RegionLock {
    /// Opens, creating it if needed, and locks the flow region at `path`. Does not touch its contents.
    ///
    /// # Errors
    /// Another towpathd has it, or the path cannot be used; the fault names the field and what to do.
    pub fn take(path: &Path) -> Result<RegionLock, Fault> {
        let fault = |cause: &io::Error| {
            Fault::new(Code::Invalid, format!("cannot be opened: {cause}"))
                .field("flows.region")
                .value(path.display())
                .remedy("name a file on a tmpfs such as /run/towpath/flows, in a directory that root may write to")
        };
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
        {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(|cause| fault(&cause))?;
        }
        let open = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
        };
        let locked = open(path).map_err(|cause| fault(&cause))?;
        let start = Instant::now();
        while let Err(cause) = flock(&locked, FlockOperation::NonBlockingLockExclusive) {
            if start.elapsed() > PATIENCE {
                return Err(Fault::new(Code::Conflict, format!("is locked by another towpathd ({cause})"))
                    .field("flows.region")
                    .value(path.display())
                    .remedy(
                        "stop it first, or give this gateway a region, socket and state_dir of its own",
                    ));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // A description of its own: the data plane inherits this one, and the lock must not outlive the keeper in it.
        let region = open(path).map_err(|cause| fault(&cause))?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(".affinity");
        let affinity = open(Path::new(&beside)).map_err(|cause| fault(&cause))?;
        Ok(RegionLock { _locked: locked, region, affinity })
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
