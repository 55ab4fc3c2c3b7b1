//! `towpathd replay`: a capture through the code of the workers, on a gateway that is not there. No root, no interface.
//!
//! The tables are compiled from manifests, the routes are those that `towpathctl explain` assumes, and the clock is that of the
//! packets: connections age between them as they would have. With one seed the outcome is the same to the byte.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use af_xdp::Umem;
use anyhow::{Context, Result, bail};
use config::gateway::{Gateway, Poll};
use config::object::{Manifest, folder, parse};

use crate::addr::Addr;
use crate::assume::{self, Assumed, Compiled};
use crate::control::publish::Publisher;
use crate::explain::assumed_fib;
use crate::keeper::{all_faults, region};
use crate::port::memory::MemoryPort;
use crate::port::pcap::{Reader, Record, Writer};
use crate::port::xsk::steer::Heartbeats;
use crate::stats::{Counter, Counters};
use crate::table::flow_map::FlowMap;
use crate::tables::{Fib, Identity, Tables};
use crate::verdict::Reason;
use crate::wire::ethernet::{self, Mac, ethertype};
use crate::worker::exchange::Exchange;
use crate::worker::hold::Resolve;
use crate::worker::punt::Punt;
use crate::worker::reassembly::Limits;
use crate::worker::{Running, Worker};

/// Frames of the worker; one packet is under way at a time.
const FRAMES: u32 = 64;
/// How far the clock goes at once while no packet comes, so that connections age in their time.
const STEP_NS: u64 = 10_000_000;

/// What to replay.
#[derive(clap::Args)]
pub struct Args {
    /// What came in, as `tcpdump -Q in -w IN.pcap` on the ports writes it
    #[arg(value_name = "IN.pcap")]
    input: PathBuf,
    /// What leaves is written here
    #[arg(value_name = "OUT.pcap")]
    output: PathBuf,
    /// Manifests: a file, or a folder with the folders within it; may be given several times
    #[arg(long, value_name = "FILE|DIR", required = true)]
    objects: Vec<PathBuf>,
    /// The gateway file; without one, a gateway that fits the objects
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Number that random choices follow from
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

/// Replays a capture and prints what became of its packets.
///
/// # Errors
/// A file that cannot be read or written, or objects at fault.
pub fn run(args: &Args) -> Result<()> {
    let manifests = objects(&args.objects)?;
    let assumed = match &args.config {
        Some(file) => Assumed::with(Gateway::load(file).map_err(all_faults)?),
        None => assume::from_objects(&manifests, None),
    };
    let compiled = assumed.compile(manifests);
    for note in &compiled.notes {
        eprintln!("towpathd: note: {note}");
    }
    let open = || -> Result<_> {
        let file = File::open(&args.input).with_context(|| args.input.display().to_string())?;
        Reader::new(BufReader::new(file)).with_context(|| args.input.display().to_string())
    };
    let macs = macs(open()?, compiled.compiler.tables())?;
    let output = File::create(&args.output).with_context(|| args.output.display().to_string())?;
    let mut replay = Replay::new(&assumed.gateway, &compiled, &macs, args.seed)?;
    replay.run(open()?, Writer::new(BufWriter::new(output))?)?;
    print!("{}", replay.report());
    println!("\nAssumed");
    assumed.because.iter().for_each(|sentence| println!("  {sentence}"));
    Ok(())
}

/// Reads the manifests of files and folders.
fn objects(paths: &[PathBuf]) -> Result<Vec<Manifest>> {
    let mut manifests = Vec::new();
    let mut faults = Vec::new();
    for path in paths {
        let files = if path.is_dir() { folder(path, true)? } else { vec![path.clone()] };
        for file in files {
            let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let found = parse(&text, &file.to_string_lossy());
            manifests.extend(found.manifests);
            faults.extend(found.faults);
        }
    }
    if !faults.is_empty() {
        return Err(all_faults(faults));
    }
    if manifests.is_empty() {
        bail!("no objects: name files or folders of manifests with --objects");
    }
    Ok(manifests)
}

/// The port that a packet came in by: the first inside port if a pod or a node sent it, else the first outside port.
fn port_of(bytes: &[u8], tables: &Tables) -> usize {
    let ports = &tables.settings.ports;
    let sender = source(bytes).and_then(|addr| tables.identities.lookup(addr));
    let found = match sender {
        Some(Identity::Pod | Identity::Node) => ports.iter().position(|port| port.inside),
        _ => ports.iter().position(|port| port.outside),
    };
    found.unwrap_or(0)
}

/// Source address of an IP packet.
fn source(bytes: &[u8]) -> Option<Addr> {
    match ethernet::payload(bytes)? {
        (ethertype::IPV4, at) => {
            let octets: [u8; 4] = bytes.get(at + 12..at + 16)?.try_into().ok()?;
            Some(Addr::v4(u32::from_be_bytes(octets)))
        }
        (ethertype::IPV6, at) => {
            let octets: [u8; 16] = bytes.get(at + 8..at + 24)?.try_into().ok()?;
            Some(Addr::v6(u128::from_be_bytes(octets)))
        }
        _ => None,
    }
}

/// The link-layer address of each port: where the first unicast IP packet that came in by it was sent to.
fn macs(mut capture: Reader<impl Read>, tables: &Tables) -> Result<Vec<Option<Mac>>> {
    let mut macs = vec![None; tables.settings.ports.len()];
    while let Some(Record { bytes, .. }) = capture.next_record()? {
        let is_unicast = bytes.first().is_some_and(|first| first & 1 == 0);
        if is_unicast && source(&bytes).is_some() {
            let mac = &mut macs[port_of(&bytes, tables)];
            *mac = mac.or(Some(ethernet::destination(&bytes)));
        }
    }
    Ok(macs)
}

/// A worker without a gateway around it.
struct Replay {
    publisher: Arc<Publisher>,
    tables: Arc<Tables>,
    flows: Arc<FlowMap>,
    affinity: Arc<FlowMap>,
    worker: Running<MemoryPort>,
    now_ns: u64,
}

impl Replay {
    fn new(gateway: &Gateway, compiled: &Compiled, macs: &[Option<Mac>], seed: u64) -> Result<Replay> {
        let tables = Arc::new(compiled.compiler.tables().clone());
        let mut fib: Fib = assumed_fib(&tables, &compiled.inside, compiled.compiler.own_addresses());
        for (port, mac) in fib.ports.iter_mut().zip(macs) {
            port.mac = mac.unwrap_or(port.mac);
        }
        let publisher = Publisher::new(1)?;
        publisher.publish_fib(Arc::new(fib));
        publisher.publish_tables(tables.clone());
        let flows = Arc::new(FlowMap::anonymous(region::flows(gateway)));
        let affinity = Arc::new(FlowMap::anonymous(region::affinity(gateway)));
        let nowhere = File::options().write(true).open("/dev/null")?;
        let punt = || Ok(Punt::new(nowhere.try_clone()?.into()));
        // Every next hop is known.
        let resolve: Resolve = Box::new(|_, _| {});
        let ports = gateway.ports.len();
        let worker = Worker {
            index: 0,
            ports: (0..ports).map(|_| MemoryPort::new()).collect(),
            pool: Umem::anonymous(FRAMES + gateway.fragments.frames, 4096)
                .take_frames()
                .context("frames of a new UMEM")?,
            punts: (0..ports).map(|_| punt()).collect::<Result<_>>()?,
            reader: publisher.reader(0),
            flows: flows.clone(),
            affinity: affinity.clone(),
            heartbeats: Arc::new(Heartbeats::anonymous()?),
            resolve,
            fragments: Limits::from(&gateway.fragments),
            exchange: Exchange::new(publisher.workers()),
            poll: Poll::Busy,
        };
        Ok(Replay { publisher, tables, flows, affinity, worker: Running::new(worker, seed), now_ns: 0 })
    }

    /// Runs every packet of `capture`, and writes what leaves with the time at which it does.
    fn run(&mut self, mut capture: Reader<impl Read>, mut output: Writer<impl Write>) -> Result<()> {
        while let Some(Record { time_ns, bytes }) = capture.next_record()? {
            self.wait_until(time_ns);
            let port = port_of(&bytes, &self.tables);
            self.worker.ports_mut()[port].deliver(bytes);
            self.worker.round(self.now_ns);
            for port in self.worker.ports_mut() {
                while let Some(packet) = port.sent() {
                    output.write_record(self.now_ns, &packet)?;
                }
            }
        }
        Ok(output.flush()?)
    }

    /// Lets the clock go on. A packet that was captured out of order comes at the time of the one before.
    fn wait_until(&mut self, time_ns: u64) {
        while self.now_ns + STEP_NS < time_ns && !(self.flows.is_empty() && self.affinity.is_empty()) {
            self.now_ns += STEP_NS;
            self.worker.round(self.now_ns);
        }
        self.now_ns = self.now_ns.max(time_ns);
    }

    fn counters(&self) -> &Counters {
        self.publisher.workers()[0].counters()
    }

    /// Counters as `towpathctl stats` and `drops` name them, those of reasons only if they are not 0.
    fn report(&self) -> String {
        let counters = self.counters();
        let mut text = String::new();
        for counter in [
            Counter::rx_packets,
            Counter::forwarded,
            Counter::answered,
            Counter::punted,
            Counter::flows_created,
            Counter::flows_expired,
        ] {
            let _ = writeln!(text, "{:<24}{}", counter.name(), counters.get(counter));
        }
        let happened: Vec<_> = Reason::ALL.iter().filter(|reason| counters.reason(**reason) > 0).collect();
        if !happened.is_empty() {
            let _ = writeln!(text, "\nDropped or answered");
        }
        for reason in happened {
            let (name, count, help) = (reason.name(), counters.reason(*reason), reason.help());
            let _ = writeln!(text, "{name:<24}{count:<10}{help}");
        }
        text
    }
}
