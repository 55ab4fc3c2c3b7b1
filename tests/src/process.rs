//! Programs that run beside a test and end with it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::namespace::Namespace;

/// A running program. It is killed when this value is dropped, and by the kernel when the thread that started it ends in
/// any other way (`setpriv --pdeathsig`).
#[derive(Debug)]
pub struct Process {
    child: Child,
    what: String,
    log: PathBuf,
}

impl Process {
    /// Starts `program` inside `namespace`, with stdout and stderr in the file `log`.
    pub fn start(namespace: &Namespace, program: &str, args: &[&str], log: &Path) -> Result<Process> {
        let what = format!("{program} {}", args.join(" "));
        let out = File::create(log).with_context(|| format!("log {}", log.display()))?;
        // `ip netns exec` and `setpriv` both exec in place: the child's pid is the program's.
        let child = Command::new("ip")
            .args(["netns", "exec", namespace.name(), "setpriv", "--pdeathsig", "KILL", program])
            .args(args)
            .stdin(Stdio::null())
            .stderr(out.try_clone()?)
            .stdout(out)
            .spawn()
            .with_context(|| format!("{what} does not start"))?;
        Ok(Process { child, what, log: log.to_owned() })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid() as i32).context("pid 0")?;
        kill_process(pid, signal).with_context(|| format!("signal to {}", self.what))
    }

    /// Waits until it has ended, at most `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > patience {
                bail!("{} still runs after {patience:?}; it printed:\n{}", self.what, self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `ready` says yes, at most `patience`; an early end of the program is an error with its last words.
    pub fn wait_until(&mut self, patience: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{}: {status}; it printed:\n{}", self.what, self.log());
            }
            if start.elapsed() > patience {
                bail!("{} is not ready after {patience:?}; it printed:\n{}", self.what, self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
