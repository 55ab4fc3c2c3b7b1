//! One measurement.

use std::fs;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::clock::{busy_s, now_ns};
use crate::flow::Flows;
use crate::generator::{Load, Sent, send};
use crate::place::{Place, parse_mac};
use crate::range::{AddrRange, Target};
use crate::report::Report;
use crate::sink::{Received, receive};

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
    /// Service: ADDRESS:PORT, FIRST-LAST:PORT or [IPV6]:PORT
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

/// Sends and receives at once; both threads are in their namespaces.
pub fn measure(setup: &Setup, rate: f64) -> anyhow::Result<Report> {
    let frame_len = setup.check(rate)?;
    let dst_mac = parse_mac(&setup.via)?;
    let (sent, received, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let total = (rate * setup.time) as u64;
    thread::scope(|scope| {
        let (ready, is_ready) = crossbeam::channel::bounded::<()>(1);
        let sink = scope.spawn(|| -> anyhow::Result<Received> {
            let ready = ready;
            pin(setup.rx_cpu)?;
            setup.rx_if.enter()?;
            let (socket, pool) = setup.rx_if.open()?;
            let _program = setup.rx_if.redirect(&socket)?;
            ready.send(())?;
            Ok(receive(socket, pool, setup.expected.clone(), &received, &stop, 300_000_000))
        });
        if is_ready.recv().is_err() {
            return Err(sink
                .join()
                .expect("the sink does not panic")
                .expect_err("it ended before it was ready"));
        }
        let generator = scope.spawn(|| -> anyhow::Result<(Sent, f64)> {
            pin(setup.tx_cpu)?;
            setup.tx_if.enter()?;
            let flows =
                Flows { src_mac: setup.tx_if.mac()?, dst_mac, src: setup.src, dst: setup.dst, frame_len };
            let (socket, pool) = setup.tx_if.open()?;
            let load = Load {
                flows,
                rate,
                concurrent: setup.flows,
                new_flows: setup.new_flows,
                warm_up_s: setup.warm_up,
                time_s: setup.time,
            };
            let (busy, begin) = (busy_s(), now_ns());
            let result = send(socket, pool, &load, &sent, &stop);
            // The share of the measurement; the warm-up runs at the same rate.
            let share = (result.to_ns - result.from_ns) as f64 / (now_ns() - begin) as f64;
            Ok((result, (busy_s() - busy) * share))
        });
        let bar = progress_bar(total, &setup.name);
        while !generator.is_finished() {
            bar.set_position(sent.load(Ordering::Relaxed));
            bar.set_message(format!("{} received", received.load(Ordering::Relaxed)));
            thread::sleep(Duration::from_millis(100));
        }
        bar.finish_and_clear();
        let sent = generator.join().expect("the generator does not panic");
        stop.store(true, Ordering::Relaxed);
        let received = sink.join().expect("the sink does not panic")?;
        let (sent, busy) = sent?;
        Ok(Report::new(&setup.name, rate, frame_len, &sent, &received, busy))
    })
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
