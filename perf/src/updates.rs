//! How soon a change is in force, told by packets: from the moment at which it is written to the first packet that leaves by it.
//!
//! Each packet of the load begins a flow and carries the time at which it was sent. The change gives the Service another endpoint;
//! the first packet there was sent after the change was in force. So what is measured is exact to the distance of two packets,
//! and the time that packets are under way does not count.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use af_xdp::{Burst, FramePool, Socket};
use anyhow::{Context, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::clock::now_ns;
use crate::flow::{Flow, Flows, Kind, Seen};
use crate::place::{Place, Port, parse_mac};
use crate::range::{AddrRange, Target};
use crate::run::pin;

/// Arguments of `updates`.
#[derive(Args)]
pub struct UpdatesArguments {
    /// Where to send: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    tx_if: Place,
    /// Where to receive: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    rx_if: Place,
    /// Ethernet address of the gateway on the sending side
    #[arg(long)]
    via: String,
    /// The Service that changes: ADDRESS:PORT
    #[arg(long)]
    dst: Target,
    /// Clients: ADDRESS or FIRST-LAST
    #[arg(long)]
    src: AddrRange,
    /// Packets a second, each a new flow
    #[arg(long, default_value_t = 50_000.0)]
    rate: f64,
    /// CPU of the load and of what makes the changes
    #[arg(long)]
    cpu: Option<usize>,
    /// Changes that take turns: a JSON list of {"text": what is written, "endpoint": where packets arrive then}. Several files:
    /// from as many connections at once, and only the answers are timed
    #[arg(long, required = true)]
    changes: Vec<PathBuf>,
    /// How many changes a file
    #[arg(long, default_value_t = 500)]
    count: usize,
    /// Milliseconds between two of them
    #[arg(long, default_value_t = 3)]
    pause_ms: u64,
    #[command(flatten)]
    to: To,
    /// Name in the report
    #[arg(long, default_value = "updates")]
    name: String,
}

/// Who takes the changes.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct To {
    /// towpathd, by its control socket
    #[arg(long)]
    socket: Option<PathBuf>,
    /// A command that takes them on standard input as long as it runs
    #[arg(long)]
    pipe: Option<String>,
    /// A command that is started for each and takes it on standard input
    #[arg(long)]
    spawn: Option<String>,
}

#[derive(Deserialize)]
struct Change {
    text: String,
    endpoint: IpAddr,
}

/// What was measured, times in microseconds.
#[derive(Serialize)]
struct Report {
    name: String,
    changes: u64,
    seconds: f64,
    sent: u64,
    received: u64,
    /// From the begin of writing to the first packet by it; not if there are several files.
    in_force_us: Option<Percentiles>,
    /// The same from the end of writing; 0 for what was in force before.
    in_force_after_last_byte_us: Option<Percentiles>,
    /// From the end of writing to the answer.
    answer_us: Percentiles,
}

#[derive(Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    fn of(ns: &Histogram<u64>) -> Percentiles {
        let us = |ns: u64| ns as f64 / 1e3;
        Percentiles {
            p50: us(ns.value_at_quantile(0.5)),
            p99: us(ns.value_at_quantile(0.99)),
            max: us(ns.max()),
        }
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("valid bounds")
}

/// The command `updates`. Exit code 2 if packets were lost.
pub fn updates(arguments: &UpdatesArguments) -> anyhow::Result<ExitCode> {
    let files: Vec<Vec<Change>> =
        arguments.changes.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    ensure!(files.len() == 1 || arguments.to.socket.is_some(), "several --changes need --socket");
    let probe = Probe {
        endpoints: files[0].iter().map(|change| change.endpoint).collect(),
        first_ns: files[0].iter().map(|_| AtomicU64::new(u64::MAX)).collect(),
        since_ns: AtomicU64::new(u64::MAX),
        is_over: AtomicBool::new(false),
    };
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let result = carry(arguments, &probe);
            probe.is_over.store(true, Ordering::Relaxed);
            result
        });
        pin(arguments.cpu)?;
        thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        let made = if let [changes] = &files[..] {
            one_by_one(arguments, changes, &probe)
        } else {
            at_once(arguments, &files)
        };
        let seconds = start.elapsed().as_secs_f64();
        probe.is_over.store(true, Ordering::Relaxed);
        let (sent, received) = load.join().expect("the load does not panic")?;
        let Made { in_force, after_last_byte, answers } = made?;
        anyhow::Ok(Report {
            name: arguments.name.clone(),
            changes: answers.len(),
            seconds,
            sent,
            received,
            in_force_us: in_force.as_ref().map(Percentiles::of),
            in_force_after_last_byte_us: after_last_byte.as_ref().map(Percentiles::of),
            answer_us: Percentiles::of(&answers),
        })
    })?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(if report.received < report.sent { ExitCode::from(2) } else { ExitCode::SUCCESS })
}

fn read(path: &Path) -> anyhow::Result<Vec<Change>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let changes: Vec<Change> =
        serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    ensure!(!changes.is_empty(), "{}: no change", path.display());
    Ok(changes)
}

/// What the load tells the one who makes the changes.
struct Probe {
    endpoints: Vec<IpAddr>,
    /// For each endpoint: when the first packet was sent that arrived there, of those sent since `since_ns`.
    first_ns: Vec<AtomicU64>,
    since_ns: AtomicU64,
    is_over: AtomicBool,
}

impl Probe {
    fn see(&self, seen: &Seen) {
        if seen.intended_ns >= self.since_ns.load(Ordering::Relaxed)
            && let Some(at) = self.endpoints.iter().position(|endpoint| *endpoint == seen.to.0)
        {
            self.first_ns[at].fetch_min(seen.intended_ns, Ordering::Relaxed);
        }
    }

    /// Waits for the first packet at endpoint `at`; returns when it was sent.
    fn wait(&self, at: usize) -> anyhow::Result<u64> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            let first_ns = self.first_ns[at].load(Ordering::Relaxed);
            if first_ns != u64::MAX {
                return Ok(first_ns);
            }
            ensure!(!self.is_over.load(Ordering::Relaxed), "the load has ended");
            thread::sleep(Duration::from_micros(100));
        }
        bail!("no packet came to {} within 120 s after the change", self.endpoints[at])
    }
}

struct Made {
    in_force: Option<Histogram<u64>>,
    after_last_byte: Option<Histogram<u64>>,
    answers: Histogram<u64>,
}

fn one_by_one(arguments: &UpdatesArguments, changes: &[Change], probe: &Probe) -> anyhow::Result<Made> {
    let mut target = Taker::of(&arguments.to)?;
    let (mut in_force, mut after_last_byte, mut answers) = (histogram(), histogram(), histogram());
    if arguments.count > 1 {
        // What was there before may have the endpoint of the first one.
        target.write(&changes[changes.len() - 1].text)?;
        target.answer()?;
        thread::sleep(Duration::from_millis(300));
    }
    for number in 0..arguments.count {
        let at = number % changes.len();
        probe.first_ns[at].store(u64::MAX, Ordering::Relaxed);
        let begin_ns = now_ns();
        probe.since_ns.store(begin_ns, Ordering::Relaxed);
        target.write(&changes[at].text)?;
        let end_ns = now_ns();
        target.answer()?;
        answers.saturating_record(now_ns() - end_ns);
        let first_ns = probe.wait(at)?;
        in_force.saturating_record(first_ns - begin_ns);
        after_last_byte.saturating_record(first_ns.saturating_sub(end_ns));
        thread::sleep(Duration::from_millis(arguments.pause_ms));
    }
    Ok(Made { in_force: Some(in_force), after_last_byte: Some(after_last_byte), answers })
}

fn at_once(arguments: &UpdatesArguments, files: &[Vec<Change>]) -> anyhow::Result<Made> {
    let mut answers = histogram();
    thread::scope(|scope| {
        let one = |changes: &[Change]| {
            let mut target = Taker::of(&arguments.to)?;
            let mut answers = histogram();
            for number in 0..arguments.count {
                target.write(&changes[number % changes.len()].text)?;
                let end_ns = now_ns();
                target.answer()?;
                answers.saturating_record(now_ns() - end_ns);
            }
            anyhow::Ok(answers)
        };
        let threads: Vec<_> = files.iter().map(|changes| scope.spawn(move || one(changes))).collect();
        for thread in threads {
            answers.add(thread.join().expect("making changes does not panic")?)?;
        }
        anyhow::Ok(())
    })?;
    Ok(Made { in_force: None, after_last_byte: None, answers })
}

/// Who takes the changes, ready for the next one.
enum Taker {
    Socket(BufReader<UnixStream>),
    Pipe(Child, ChildStdin),
    Spawn(String, Option<Child>),
}

impl Taker {
    fn of(to: &To) -> anyhow::Result<Taker> {
        if let Some(path) = &to.socket {
            let stream =
                UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
            let mut taker = Taker::Socket(BufReader::new(stream));
            taker.write("{\"hello\":{\"version\":1,\"client\":\"towpath-perf\"}}\n")?;
            taker.answer()?;
            return Ok(taker);
        }
        if let Some(command) = &to.pipe {
            let mut child = shell(command)?;
            let stdin = child.stdin.take().expect("piped");
            return Ok(Taker::Pipe(child, stdin));
        }
        Ok(Taker::Spawn(to.spawn.clone().context("one of --socket, --pipe, --spawn is needed")?, None))
    }

    /// Hands a change over.
    fn write(&mut self, text: &str) -> anyhow::Result<()> {
        match self {
            Taker::Socket(stream) => stream.get_mut().write_all(text.as_bytes())?,
            Taker::Pipe(_, stdin) => stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush())?,
            Taker::Spawn(command, child) => {
                let mut started = shell(command)?;
                started.stdin.take().expect("piped").write_all(text.as_bytes())?;
                *child = Some(started);
            }
        }
        Ok(())
    }

    /// Waits until it says that the change was taken, if it says anything.
    fn answer(&mut self) -> anyhow::Result<()> {
        match self {
            Taker::Socket(stream) => {
                let mut line = String::new();
                stream.read_line(&mut line)?;
                let is_good = line.starts_with("{\"committed\"") || line.starts_with("{\"hello\"");
                ensure!(is_good, "towpathd: {}", line.chars().take(500).collect::<String>());
            }
            Taker::Pipe(child, _) => {
                ensure!(child.try_wait()?.is_none(), "the command has ended");
            }
            Taker::Spawn(command, child) => {
                let status = child.take().context("nothing was started")?.wait()?;
                ensure!(status.success(), "{command}: {status}");
            }
        }
        Ok(())
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        if let Taker::Pipe(child, _) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn shell(command: &str) -> anyhow::Result<Child> {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::null());
    shell.spawn().with_context(|| format!("start {command}"))
}

/// Sends and receives until the changes are made. Returns how many packets were sent and received.
fn carry(arguments: &UpdatesArguments, probe: &Probe) -> anyhow::Result<(u64, u64)> {
    // A namespace each, so threads of their own.
    let (receiver, sender) = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            arguments.rx_if.enter()?;
            let port = arguments.rx_if.open(1)?.pop().context("one queue was asked for")?;
            let program = arguments.rx_if.redirect([&port.socket])?;
            anyhow::Ok((port, program))
        });
        let sender = scope.spawn(|| {
            arguments.tx_if.enter()?;
            let port = arguments.tx_if.open(1)?.pop().context("one queue was asked for")?;
            anyhow::Ok((port, arguments.tx_if.mac()?))
        });
        (receiver.join().expect("opening does not panic"), sender.join().expect("opening does not panic"))
    });
    let (Port { socket: mut receiver, pool: mut received_pool }, _program) = receiver?;
    let (Port { socket: sender, pool }, src_mac) = sender?;
    pin(arguments.cpu)?;
    rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
    let dst_mac = parse_mac(&arguments.via)?;
    let frame_len = Flows::frame_len_min(arguments.src.is_v4);
    let flows = Flows { src_mac, dst_mac, src: arguments.src, dst: arguments.dst, frame_len };
    let mut load = Load { socket: sender, pool, flows, burst: Burst::with_capacity(64), sent: 0 };
    let mut received = 0;
    let mut burst = Burst::with_capacity(64);
    let start_ns = now_ns();
    let mut silent_since = Instant::now();
    loop {
        let is_over = probe.is_over.load(Ordering::Relaxed);
        if !is_over {
            load.send(((now_ns() - start_ns) as f64 * arguments.rate / 1e9) as u64)?;
        }
        while receiver.receive(&mut received_pool, &mut burst, 64) > 0 {
            for seen in burst.heads.iter().filter_map(|frame| Seen::read(frame.data())) {
                ensure!(seen.intact, "a packet came damaged");
                probe.see(&seen);
                received += 1;
            }
            burst.recycle(&mut received_pool);
            receiver.release(&mut received_pool);
            receiver.refill(&mut received_pool);
            silent_since = Instant::now();
        }
        if is_over && silent_since.elapsed() > Duration::from_millis(300) {
            return Ok((load.sent, received));
        }
        thread::sleep(Duration::from_micros(20));
    }
}

struct Load {
    socket: Socket,
    pool: FramePool,
    flows: Flows,
    burst: Burst,
    sent: u64,
}

impl Load {
    /// Sends until `due` packets have been sent, at most a burst; what was missed while others had the CPU is left out.
    fn send(&mut self, due: u64) -> anyhow::Result<()> {
        let count = due.saturating_sub(self.sent).min(64);
        for id in self.sent..self.sent + count {
            let mut frame = self.pool.pop().context("no frame is free: the gateway takes none")?;
            frame.set_len(self.flows.frame_len).expect("the shortest frame");
            Flow::new(&self.flows, id as u32).next(Kind::Measured, now_ns(), frame.data_mut());
            self.burst.push(frame);
        }
        self.sent += self.socket.transmit(&mut self.pool, &mut self.burst) as u64;
        self.burst.recycle(&mut self.pool);
        self.socket.kick();
        self.socket.complete(&mut self.pool);
        Ok(())
    }
}
