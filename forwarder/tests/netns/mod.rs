//! Network namespaces for tests, with names of their own and gone afterwards, also when a test fails.

#![allow(dead_code)] // Each test program uses its part.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A named network namespace, deleted when dropped.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(what: &str) -> Namespace {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kernel-{}-{count}-{what}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Moves the calling thread in. Threads that it starts are inside, too.
    pub fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// `ip -n NAME WORDS`, which has to succeed.
    pub fn ip(&self, words: &str) -> String {
        let output = run(Command::new("ip").args(["-n", &self.name]).args(words.split_whitespace()));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `ip -n NAME WORDS`, whatever comes of it.
    pub fn try_ip(&self, words: &str) -> Output {
        Command::new("ip").args(["-n", &self.name]).args(words.split_whitespace()).output().unwrap()
    }

    /// One `ip` command a line, which all have to succeed.
    pub fn ip_batch(&self, lines: &str) {
        use std::io::Write;
        let mut child =
            Command::new("ip").args(["-n", &self.name, "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    /// Runs a program inside.
    pub fn exec(&self, words: &str) -> Output {
        run(Command::new("ip").args(["netns", "exec", &self.name]).args(words.split_whitespace()))
    }

    /// Sets a kernel setting inside; `key` with dots.
    pub fn sysctl(&self, key: &str, value: &str) {
        self.exec(&format!("sysctl -qw {key}={value}"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// False, and said so, without root.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root to make network namespaces");
    }
    root
}

/// Waits until `is_true`, at most 20 s.
#[track_caller]
pub fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_true() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
