//! Kernel threads of a data plane's workers, and one that hangs.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// The workers of the data plane `pid`, in the order of their indexes: thread id and folder in /proc.
pub fn threads(pid: u32) -> Result<Vec<(i32, PathBuf)>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).context("no such data plane")?;
    let mut found: Vec<(String, i32, PathBuf)> = tasks
        .flatten()
        .filter_map(|entry| {
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            let id = entry.file_name().to_str()?.parse().ok()?;
            name.starts_with("towpath-work").then_some((name, id, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found.into_iter().map(|(_, id, path)| (id, path)).collect())
}

/// A thread that is stopped alone, as a debugger stops it; it goes on when this is dropped.
#[derive(Debug)]
pub struct Hung {
    thread: libc::pid_t,
}

#[allow(unsafe_code)] // ptrace has no safe wrapper.
impl Hung {
    /// Stops `thread`, which this process may trace.
    pub fn new(thread: libc::pid_t) -> Result<Hung> {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: neither request reads or writes memory of this process.
        let stopped = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) == 0
                && libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) == 0
        };
        ensure!(stopped, "ptrace: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let waited = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
        ensure!(waited == thread, "waitpid: {}", std::io::Error::last_os_error());
        Ok(Hung { thread })
    }
}

impl Drop for Hung {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: as above. It fails if the thread has ended meanwhile.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.thread, none, none) };
    }
}
