//! One measurement.

use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use af_xdp::redirect::UdpRedirect;
use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::clock::{busy_s, now_ns};
use crate::flow::Flows;
use crate::generator::{Generator, Load, Sent};
use crate::place::{Place, Port, parse_mac};
use crate::range::{AddrRange, Target};
use crate::report::Report;
use crate::sink::{Received, Side, Sink};

/// What a measurement needs to know, but for its rate.
#[derive(Args, Clone)]
pub struct Setup {
    /// Where to send: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    pub tx_if: Place,
    /// Where to receive: INTERFACE, or NAMESPACE/INTERFACE
    #[arg(long)]
    pub rx_if: Place,
    /// Ethernet address of the gateway on the sending side
    #[arg(long)]
    pub via: String,
    /// Service: ADDRESS:PORT or FIRST-LAST:PORT; IPv6 addresses in brackets
    #[arg(long)]
    pub dst: Target,
    /// Clients: ADDRESS or FIRST-LAST
    #[arg(long)]
    pub src: AddrRange,
    /// Endpoints that packets may arrive at, in the form of --dst; any, if none is given
    #[arg(long = "expect")]
    pub expected: Vec<Target>,
    /// Flows at one time
    #[arg(long, default_value_t = 1000)]
    pub flows: u32,
    /// New flows a second; as many as packets makes each packet a new flow
    #[arg(long, default_value_t = 0.0)]
    pub new_flows: f64,
    /// Bytes a frame, from the Ethernet header on, without the check sequence [default: the least, 60 or 80]
    #[arg(long)]
    pub size: Option<usize>,
    /// Seconds of measurement
    #[arg(long, default_value_t = 10.0)]
    pub time: f64,
    /// Seconds of the same load before it, which are not counted
    #[arg(long, default_value_t = 1.0)]
    pub warm_up: f64,
    /// Queues of both interfaces; flows take turns over them
    #[arg(long, default_value_t = 1)]
    pub queues: u32,
    /// Send every packet back, and count those that come back from the Service. One CPU does it all
    #[arg(long)]
    pub replies: bool,
    /// CPU of the generator
    #[arg(long)]
    pub tx_cpu: Option<usize>,
    /// CPU of the sink
    #[arg(long)]
    pub rx_cpu: Option<usize>,
    /// Name in reports
    #[arg(long, default_value = "run")]
    pub name: String,
}

/// Arguments of `run`.
#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    setup: Setup,
    /// Packets a second
    #[arg(long)]
    rate: f64,
    /// Write the report there, `-` for standard output
    #[arg(long)]
    json: Option<PathBuf>,
    /// Print one line instead of a page
    #[arg(long)]
    line: bool,
}

/// The command `run`.
pub fn run(arguments: &RunArguments) -> anyhow::Result<ExitCode> {
    let report = measure(&arguments.setup, arguments.rate)?;
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        if path.as_os_str() == "-" {
            println!("{text}");
        } else {
            fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
        }
    }
    match &arguments.json {
        Some(path) if path.as_os_str() == "-" => {}
        _ if arguments.line => println!("{}", report.line()),
        _ => println!("{report}"),
    }
    Ok(if report.is_correct() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// Keeps this thread on a CPU.
pub fn pin(cpu: Option<usize>) -> anyhow::Result<()> {
    match cpu {
        Some(id) if !core_affinity::set_for_current(core_affinity::CoreId { id }) => {
            bail!("CPU {id} does not exist or may not be used")
        }
        _ => Ok(()),
    }
}

impl Setup {
    fn check(&self, rate: f64) -> anyhow::Result<usize> {
        ensure!(rate >= 1.0 && rate.is_finite(), "--rate is {rate}: use at least 1 packet a second");
        ensure!(self.flows > 0, "--flows is 0: use at least 1");
        ensure!(
            self.new_flows >= 0.0 && self.new_flows <= rate,
            "--new-flows is {}: use 0 to --rate",
            self.new_flows
        );
        ensure!(
            self.time > 0.0 && self.warm_up >= 0.0,
            "--time and --warm-up are seconds, --time more than 0"
        );
        ensure!(
            !self.replies || (self.tx_cpu.is_some() && self.tx_cpu == self.rx_cpu),
            "--replies needs --tx-cpu and --rx-cpu to be the same"
        );
        ensure!((1..=64).contains(&self.queues), "--queues is {}: use 1 to 64", self.queues);
        ensure!(
            self.src.is_v4 == self.dst.addrs.is_v4,
            "--src and --dst {} are of different families",
            self.dst
        );
        let least = Flows::frame_len_min(self.src.is_v4);
        let size = self.size.unwrap_or(least);
        ensure!((least..=1792).contains(&size), "--size is {size}: use {least} to 1792 bytes");
        Ok(size)
    }
}

/// How long the sink waits for packets that are still on their way.
const PATIENCE_NS: u64 = 300_000_000;

/// Sends and receives at once: on two threads, or on one that does both in turn if they share a CPU.
pub fn measure(setup: &Setup, rate: f64) -> anyhow::Result<Report> {
    let frame_len = setup.check(rate)?;
    let progress = Progress::default();
    let (sent, busy, received) = thread::scope(|scope| {
        // Threads, since each moves into a namespace of its own.
        let far = scope.spawn(|| open_far(setup)).join().expect("opening does not panic")?;
        let near =
            scope.spawn(|| open_near(setup, rate, frame_len)).join().expect("opening does not panic")?;
        let ((far, _far_program), (near, load, _near_program)) = (far, near);
        let sink = if setup.replies {
            Sink::new(Side::Client(load.flows.clone()), vec![setup.dst])
        } else {
            Sink::new(Side::Endpoint, setup.expected.clone())
        };
        // Its schedule begins when it is made.
        let generator = Generator::new(near.len(), load);
        let busy = busy_s();
        let begin_ns = now_ns();
        let progress = &progress;
        let threads = if setup.replies {
            vec![scope.spawn(move || there_and_back(setup, generator, sink, near, far, progress))]
        } else if setup.tx_cpu.is_some() && setup.tx_cpu == setup.rx_cpu {
            vec![scope.spawn(move || both(setup, generator, sink, near, far, progress))]
        } else {
            vec![
                scope.spawn(move || generate(setup, generator, near, progress)),
                scope.spawn(move || sink_until_silent(setup, sink, far, progress)),
            ]
        };
        progress.show((rate * setup.time) as u64, &setup.name);
        let elapsed_ns = now_ns() - begin_ns;
        let busy = busy_s() - busy;
        let (mut sent, mut received) = (None, None);
        for thread in threads {
            let (s, r) = thread.join().expect("measuring does not panic")?;
            sent = s.or(sent);
            received = r.or(received);
        }
        let sent = sent.context("nothing was sent")?;
        // The share of the measurement; the warm-up runs at the same rate.
        let share = (sent.to_ns - sent.from_ns) as f64 / elapsed_ns.max(1) as f64;
        anyhow::Ok((sent, busy * share.min(1.0), received.context("nothing was received")?))
    })?;
    Ok(Report::new(&setup.name, rate, frame_len, &sent, &received, busy))
}

/// What one thread has to tell.
type Part = (Option<Sent>, Option<Received>);

/// The side where packets arrive.
fn open_far(setup: &Setup) -> anyhow::Result<(Vec<Port>, UdpRedirect)> {
    setup.rx_if.enter()?;
    let ports = setup.rx_if.open(setup.queues)?;
    let program = setup.rx_if.redirect(ports.iter().map(|port| &port.socket))?;
    Ok((ports, program))
}

/// The side where they start, and what to send there. It receives only what comes back.
fn open_near(
    setup: &Setup,
    rate: f64,
    frame_len: usize,
) -> anyhow::Result<(Vec<Port>, Load, Option<UdpRedirect>)> {
    setup.tx_if.enter()?;
    let (src_mac, dst_mac) = (setup.tx_if.mac()?, parse_mac(&setup.via)?);
    let ports = setup.tx_if.open(setup.queues)?;
    let sockets = ports.iter().map(|port| &port.socket);
    let program = if setup.replies { Some(setup.tx_if.redirect(sockets)?) } else { None };
    let load = Load {
        flows: Flows { src_mac, dst_mac, src: setup.src, dst: setup.dst, frame_len },
        rate,
        concurrent: setup.flows,
        new_flows: setup.new_flows,
        warm_up_s: setup.warm_up,
        time_s: setup.time,
    };
    Ok((ports, load, program))
}

fn generate(
    setup: &Setup,
    mut generator: Generator,
    mut near: Vec<Port>,
    progress: &Progress,
) -> anyhow::Result<Part> {
    let _end = progress.ends_sending();
    pin(setup.tx_cpu)?;
    while generator.step(&mut near) {
        progress.sent.store(generator.progress(), Ordering::Relaxed);
    }
    Ok((Some(generator.finish()), None))
}

fn sink_until_silent(
    setup: &Setup,
    mut sink: Sink,
    mut far: Vec<Port>,
    progress: &Progress,
) -> anyhow::Result<Part> {
    pin(setup.rx_cpu)?;
    loop {
        if sink.step(&mut far) {
            progress.received.store(sink.progress(), Ordering::Relaxed);
        } else if progress.all_sent.load(Ordering::Relaxed) && sink.is_silent(PATIENCE_NS) {
            return Ok((None, Some(sink.finish(&far))));
        } else {
            thread::yield_now();
        }
    }
}

fn both(
    setup: &Setup,
    mut generator: Generator,
    mut sink: Sink,
    mut near: Vec<Port>,
    mut far: Vec<Port>,
    progress: &Progress,
) -> anyhow::Result<Part> {
    let _end = progress.ends_sending();
    pin(setup.tx_cpu)?;
    while generator.step(&mut near) {
        sink.step(&mut far);
        progress.sent.store(generator.progress(), Ordering::Relaxed);
        progress.received.store(sink.progress(), Ordering::Relaxed);
    }
    while sink.step(&mut far) || !sink.is_silent(PATIENCE_NS) {}
    Ok((Some(generator.finish()), Some(sink.finish(&far))))
}

/// Requests are judged where they arrive and turned back there; their answers are judged and counted where they started.
fn there_and_back(
    setup: &Setup,
    mut generator: Generator,
    mut sink: Sink,
    mut near: Vec<Port>,
    mut far: Vec<Port>,
    progress: &Progress,
) -> anyhow::Result<Part> {
    let _end = progress.ends_sending();
    pin(setup.tx_cpu)?;
    let mut mirror = Sink::new(Side::Endpoint, setup.expected.clone());
    while generator.step(&mut near) {
        mirror.echo(&mut far);
        sink.step(&mut near);
        progress.sent.store(generator.progress(), Ordering::Relaxed);
        progress.received.store(sink.progress(), Ordering::Relaxed);
    }
    while mirror.echo(&mut far) || sink.step(&mut near) || !sink.is_silent(PATIENCE_NS) {}
    let mut received = sink.finish(&near);
    received.add_mistakes(&mirror.finish(&far));
    Ok((Some(generator.finish()), Some(received)))
}

/// How far the threads are.
#[derive(Default)]
struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
    all_sent: AtomicBool,
}

/// Says so when the sending thread ends, however it does.
struct EndsSending<'a>(&'a Progress);

impl Drop for EndsSending<'_> {
    fn drop(&mut self) {
        self.0.all_sent.store(true, Ordering::Relaxed);
    }
}

impl Progress {
    fn ends_sending(&self) -> EndsSending<'_> {
        EndsSending(self)
    }

    /// Draws a bar until everything is sent.
    fn show(&self, total: u64, name: &str) {
        let bar = progress_bar(total, name);
        while !self.all_sent.load(Ordering::Relaxed) {
            bar.set_position(self.sent.load(Ordering::Relaxed));
            bar.set_message(format!("{} received", self.received.load(Ordering::Relaxed)));
            thread::sleep(Duration::from_millis(100));
        }
        bar.finish_and_clear();
    }
}

fn progress_bar(total: u64, name: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template("{prefix} [{bar:40}] {percent} %  {per_sec}  {msg}  {eta} left")
        .expect("a valid template");
    ProgressBar::with_draw_target(Some(total), target).with_style(style).with_prefix(name.to_owned())
}
