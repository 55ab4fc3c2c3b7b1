//! Network namespaces with names of their own, gone when the test is gone.
//!
//! A name holds the pid of the test, `tpt-PID-NAME`: whatever a killed run left behind is known by its dead pid and removed
//! by the next run.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PREFIX: &str = "tpt";

/// A network namespace; it is deleted when this value is dropped, with every interface in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace `tpt-PID-{name}` with its loopback up. `name`: unique within the process, at most 20 letters.
    ///
    /// Fails without CAP_SYS_ADMIN; the message says so.
    pub fn new(name: &str) -> Result<Namespace> {
        if !rustix::process::geteuid().is_root() {
            bail!("namespace tests need root: run them by `sudo scripts/test namespace`");
        }
        remove_stale();
        let namespace = Namespace { name: format!("{PREFIX}-{}-{name}", std::process::id()) };
        run("ip", &["netns", "add", &namespace.name])?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The full name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that `setns` takes.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip ARGS` inside. `args` are separated by blanks.
    pub fn ip(&self, args: &str) -> Result<String> {
        let mut words = vec!["-n", &self.name];
        words.extend(args.split_whitespace());
        run("ip", &words)
    }

    /// Runs a program inside and returns what it printed; an exit code other than 0 is an error with its last words.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut words = vec!["netns", "exec", &self.name, program];
        words.extend_from_slice(args);
        run("ip", &words)
    }

    /// Runs a program inside and returns how it ended, whatever that was.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).args(args);
        command.output().with_context(|| format!("{program} does not start; is its package installed?"))
    }

    /// Runs a shell script inside, with `set -e`.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run("sh", &["-ec", script])
    }

    /// Sets sysctls, `name=value` each.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        for setting in settings {
            self.run("sysctl", &["-qw", setting])?;
        }
        Ok(())
    }

    /// Calls `work` on a thread that is inside. Sockets that it opens stay inside wherever they are moved.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("namespace {}", self.name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "del", &self.name]) {
            eprintln!("namespace {} is left behind: {error:#}", self.name);
        }
    }
}

/// A veth pair between two namespaces: `(namespace, interface, link-layer address)` for each end, both up.
pub fn veth(a: (&Namespace, &str, &str), b: (&Namespace, &str, &str), queues: u32) -> Result<()> {
    let ends = |(namespace, interface, mac): (&Namespace, &str, &str)| {
        format!(
            "name {interface} address {mac} numtxqueues {queues} numrxqueues {queues} netns {}",
            namespace.name
        )
    };
    run(
        "ip",
        &format!("link add {} type veth peer {}", ends(a), ends(b)).split_whitespace().collect::<Vec<_>>(),
    )?;
    for (namespace, interface, _) in [a, b] {
        namespace.ip(&format!("link set {interface} up"))?;
    }
    Ok(())
}

/// Runs a program to its end and returns what it printed.
///
/// A program that is missing or exits with other than 0 is an error with the command line and the end of its stderr.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("{program} does not start; is its package installed? (scripts/setup)"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}: {}{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Removes the namespaces of test processes that are no more.
fn remove_stale() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|r| r.split('-').next());
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            // Another test may be removing the same one: that it is gone is all that counts.
            let _ = run("ip", &["netns", "del", &name]);
        }
    }
}
