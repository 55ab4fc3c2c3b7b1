//! The data plane: what the keeper starts, without any privilege. Read [`run`] top to bottom for the order.
//!
//! Tables and routes come first, workers last: the packets that came meanwhile wait in the receive rings, and none is
//! judged by empty tables.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use af_xdp::{FramePool, Statistics, Umem};
use anyhow::{Context, Result};
use config::gateway::Gateway;
use rustix::process::Pid;
use rustix::thread::{sched_getaffinity, sched_setaffinity};
use tracing::{info, warn};

use super::manifest::{Manifest, ManifestPort};
use super::ports::socket_config;
use super::region;
use super::requests::Keeper;
use super::sandbox;
use super::supervise::monotonic_ns;
use crate::control::health::server;
use crate::control::publish::Publisher;
use crate::control::{Control, ControlParts, PortInfo};
use crate::kernel::mirror::{Mirror, MirrorConfig};
use crate::kernel::privileged::{Care, Privileged};
use crate::port::Port;
use crate::port::xsk::queue::{XskPort, take_over};
use crate::port::xsk::steer::Heartbeats;
use crate::table::flow_map::{FlowMap, FlowMapConfig};
use crate::worker::Worker;
use crate::worker::exchange::Exchange;
use crate::worker::hold::Resolve;
use crate::worker::punt::Punt;
use crate::worker::reassembly;

/// Neighbors that the kernel is asked to keep resolved at most; its own limit is `gc_thresh3`, 1,024 by default.
const NEIGHBORS: usize = 16_384;
/// Panics that are reported with their place; more of them would only fill the log.
const PANICS_REPORTED: u32 = 20;

/// Becomes the data plane. Does not return unless something is wrong.
///
/// # Errors
/// What kept it from forwarding.
pub fn run(manifest_fd: RawFd) -> Result<()> {
    rustix::thread::set_name(c"towpath-control").context("naming the thread")?;
    report_few_panics();
    let manifest =
        Manifest::read(manifest_fd).context("reading the manifest; only the keeper starts this")?;
    let gateway = &manifest.gateway;
    let workers = gateway.workers.cpus.len();
    leave_to_workers(&gateway.workers.cpus).context("moving off the workers' CPUs")?;
    if let Err(error) = be_prompt() {
        warn!("the scheduler lets changes wait behind other programs: {error}");
    }

    let keeper = Arc::new(Keeper::new(UnixStream::from(manifest.keeper.take()?)));
    let listener = UnixListener::from(manifest.control.take()?);
    let heartbeats = {
        let fd = manifest.heartbeats.take()?;
        Arc::new(Heartbeats::map(std::os::fd::AsFd::as_fd(&fd)).context("mapping the heartbeats")?)
    };
    let flows = Arc::new(open_region(manifest.flows.take()?, region::flows(gateway), "flows")?);
    let remembered = manifest.affinity.take()?;
    let affinity = Arc::new(open_region(remembered, region::affinity(gateway), "session affinity")?);
    let (queues, sockets) = inherit_queues(&manifest)?;
    let punts = inherit_punts(&manifest)?;

    let keeper_pid = Pid::from_raw(manifest.keeper_pid as i32).context("the keeper's process id")?;
    sandbox::drop_privileges(&manifest.account, keeper_pid)?;
    if !sandbox::restrict_files(&gateway.control.state_dir)? {
        warn!("this kernel has no landlock: files are protected by user and mode only");
    }
    sandbox::restrict_control()?;

    let publisher = Publisher::new(workers).context("making the workers' eventfds")?;
    let mirror = start_mirror(gateway, &publisher, keeper.clone())?;
    let wanted = mirror.clone();
    let control = Control::start(ControlParts {
        gateway: Arc::new(gateway.clone()),
        listener,
        group: manifest.control_group,
        publisher: publisher.clone(),
        flow_worker: flows.worker(workers),
        flows: flows.clone(),
        affinity_worker: affinity.worker(workers),
        affinity: affinity.clone(),
        steer: keeper.clone(),
        routes: Box::new(move |routes, wait| {
            if !wanted.want(routes, wait) {
                warn!("routes to pods are not in force yet; they follow");
            }
        }),
        change_port: {
            let keeper = keeper.clone();
            Box::new(move |change| keeper.change_port(change))
        },
        ports: port_infos(&manifest, &queues),
        socket_counters: Box::new(move |port| sum_of_statistics(&sockets[port])),
        restarts: manifest.restarts,
    })?;

    let exchange = Exchange::new(publisher.workers());
    let started_ns = monotonic_ns();
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for (index, ((ports, pool), punts)) in queues.into_iter().zip(punts).enumerate() {
        let worker = Worker {
            index,
            ports,
            pool,
            punts,
            reader: publisher.reader(index),
            flows: flows.clone(),
            affinity: affinity.clone(),
            heartbeats: heartbeats.clone(),
            resolve: resolve(&mirror),
            fragments: reassembly::Limits::from(&gateway.fragments),
            exchange: exchange.clone(),
            poll: gateway.workers.poll,
        };
        threads.push(start_worker(worker, gateway.workers.cpus[index], stop.clone())?);
    }
    // Until its first heartbeat the steering program takes a worker for dead.
    let begun = |worker| heartbeats.last_ns(worker) >= started_ns;
    while !(0..workers).all(begun) && !threads.iter().any(thread::JoinHandle::is_finished) {
        thread::sleep(Duration::from_micros(100));
    }
    keeper.ready()?;
    start_health(&control, keeper)?;
    for thread in threads {
        // They end only if something is wrong; the keeper starts everything again then.
        thread.join().map_err(|_| anyhow::anyhow!("a worker panicked outside of a burst"))??;
    }
    anyhow::bail!("a worker ended")
}

/// Moves this thread, and so those that it starts, off the CPUs of workers, if there are others: a worker that polls would let them wait,
/// and they would take its CPU when packets come.
fn leave_to_workers(cpus: &[u32]) -> io::Result<()> {
    let mut allowed = sched_getaffinity(None)?;
    cpus.iter().for_each(|cpu| allowed.unset(*cpu as usize));
    if allowed.count() > 0 {
        sched_setaffinity(None, &allowed)?;
    }
    Ok(())
}

/// How long this thread and those that it starts run at a stretch, nanoseconds, where other programs run too.
const SLICE_NS: u64 = 100_000;

/// Asks the scheduler for short turns, and so for early ones: a thread that wakes up with a shorter slice than the one that runs goes first
/// (sched_setattr(2); Linux 6.12, kernel/sched/fair.c PREEMPT_SHORT; earlier kernels ignore the wish).
#[allow(unsafe_code)] // sched_setattr(2) has no safe wrapper.
fn be_prompt() -> io::Result<()> {
    // SAFETY: a struct of integers. All zero is the usual policy, SCHED_OTHER.
    let mut wish: libc::sched_attr = unsafe { std::mem::zeroed() };
    wish.size = size_of_val(&wish) as u32;
    wish.sched_nice = rustix::process::getpriority_process(None)?;
    wish.sched_runtime = SLICE_NS;
    // SAFETY: 0 is this thread; the kernel reads `size` bytes of `wish`, which outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const wish, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Follows the kernel's tables. When it returns, the first forwarding table is published.
fn start_mirror(gateway: &Gateway, publisher: &Arc<Publisher>, keeper: Arc<Keeper>) -> Result<Arc<Mirror>> {
    let ports = gateway.ports.iter().map(|port| port.interface.clone()).collect();
    let config = MirrorConfig { ports, neighbor_limit: NEIGHBORS };
    let publisher = publisher.clone();
    let publish = move |fib| publisher.publish_fib(Arc::new(fib));
    Ok(Arc::new(Mirror::start(config, ByKeeper(keeper), publish).context("reading the kernel's tables")?))
}

/// Neighbors are asked for by the keeper, which has the privilege.
struct ByKeeper(Arc<Keeper>);

impl Privileged for ByKeeper {
    fn neighbor(&mut self, link: u32, addr: IpAddr, care: Care) -> io::Result<()> {
        self.0.neighbor(link, addr, care)
    }
}

/// A worker's way to have a next hop resolved.
fn resolve(mirror: &Mirror) -> Resolve {
    let asks = mirror.asks();
    Box::new(move |port, addr| {
        // If the queue is full, the next packet asks again.
        asks.ask(port, addr);
    })
}

/// What `towpathctl get ports` shows of the ports.
fn port_infos(manifest: &Manifest, queues: &[(Vec<XskPort>, FramePool)]) -> Vec<PortInfo> {
    let info = |(index, port): (usize, &ManifestPort)| PortInfo {
        mode: queues.first().map_or_else(String::new, |(ports, _)| ports[index].mode().to_string()),
        queues: port.sockets.len() as u32,
        partial_checksums: port.partial_checksums,
    };
    manifest.ports.iter().enumerate().map(info).collect()
}

/// Starts a worker on its CPU. It narrows its system calls once it is there.
fn start_worker(
    worker: Worker<XskPort>,
    cpu: u32,
    stop: Arc<AtomicBool>,
) -> Result<thread::JoinHandle<Result<()>>> {
    let index = worker.index;
    let run = move || {
        if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu as usize }) {
            anyhow::bail!("worker {index} cannot be pinned to CPU {cpu}: workers.cpus[{index}]");
        }
        sandbox::restrict_worker()?;
        worker.run(&stop);
        Ok(())
    };
    let name = format!("towpath-work{index}");
    thread::Builder::new().name(name).spawn(run).context("starting a worker")
}

/// Starts the health server, now that there is something to be told. It ends with the process.
fn start_health(control: &Control, keeper: Arc<Keeper>) -> Result<()> {
    let open = move |addr| keeper.listen(addr).map_err(|error| error.to_string());
    let probes = control.probes(Box::new(open));
    let run = move || {
        let served = sandbox::restrict_health()
            .and_then(|()| Ok(server::serve(&probes, server::Limits::default(), &AtomicBool::new(false))?));
        if let Err(error) = served {
            tracing::error!("health is not served any more: {error:#}");
        }
    };
    thread::Builder::new()
        .name("towpath-health".to_owned())
        .spawn(run)
        .context("starting the health server")?;
    Ok(())
}

/// A region with what the process before left in it.
fn open_region(file: OwnedFd, config: FlowMapConfig, what: &str) -> Result<FlowMap> {
    let opened = FlowMap::open(&File::from(file), config);
    let (map, recovery) = opened.with_context(|| format!("the region of {what}"))?;
    match recovery.empty {
        Some(reason) => info!(capacity = config.capacity, "{what}: begun empty ({reason})"),
        None => info!(kept = recovery.kept, scrubbed = recovery.scrubbed, "{what}: found again"),
    }
    Ok(map)
}

/// Queues of the ports and free frames, by worker.
type Queues = Vec<(Vec<XskPort>, FramePool)>;

/// Maps packet memories and rings again, and finds the frames of the process before. By worker. With it a second descriptor
/// of each socket, by port, to read its counters by.
fn inherit_queues(manifest: &Manifest) -> Result<(Queues, Vec<Vec<OwnedFd>>)> {
    let config = socket_config(&manifest.gateway);
    let mut queues = Vec::new();
    let mut seconds: Vec<Vec<OwnedFd>> = manifest.ports.iter().map(|_| Vec::new()).collect();
    for (worker, umem) in manifest.umems.iter().enumerate() {
        let umem = Umem::inherit(umem.take()?)?;
        let mut sockets = Vec::new();
        for (port, seconds) in manifest.ports.iter().zip(&mut seconds) {
            let socket = port.sockets[worker].take()?;
            seconds.push(socket.try_clone()?);
            sockets.push((socket, port.slot, port.attached));
        }
        let (ports, pool, recovered) = take_over(umem, sockets, &config)?;
        info!(
            worker,
            again = recovered.again,
            restored = recovered.restored,
            submitted = recovered.submitted,
            interrupted = recovered.interrupted,
            held = recovered.held,
            free = pool.len(),
            "frames found"
        );
        queues.push((ports, pool));
    }
    Ok((queues, seconds))
}

/// What the kernel counted for all queues of a port.
fn sum_of_statistics(sockets: &[OwnedFd]) -> Statistics {
    let each = sockets.iter().map(|socket| Statistics::of(socket).unwrap_or_default());
    each.fold(Statistics::default(), |sum, one| sum + one)
}

/// The ways back to the kernel, by worker and port. Workers share a TAP; each has a descriptor of its own.
fn inherit_punts(manifest: &Manifest) -> Result<Vec<Vec<Punt>>> {
    let taps: Vec<_> = manifest.ports.iter().map(|port| port.tap.take()).collect::<Result<_, _>>()?;
    let punts = |_| taps.iter().map(|tap| Ok(Punt::new(tap.try_clone()?))).collect::<Result<Vec<_>>>();
    (0..manifest.umems.len()).map(punts).collect()
}

/// A panic over a packet is caught by its worker, but the standard hook would still write a report for each.
fn report_few_panics() {
    static REPORTED: AtomicU32 = AtomicU32::new(0);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if REPORTED.fetch_add(1, Ordering::Relaxed) < PANICS_REPORTED {
            report(panic);
        }
    }));
}
