//! The data plane: what the keeper starts, without any privilege. Read [`run`] top to bottom for the order.
//!
//! Tables and routes come first, workers last: the packets that came meanwhile wait in the receive rings, and none is
//! judged by empty tables.

use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use af_xdp::{FramePool, Umem};
use anyhow::{Context, Result};
use rustix::process::Pid;
use tracing::{info, warn};

use super::manifest::Manifest;
use super::ports::socket_config;
use super::requests::Keeper;
use super::sandbox;
use crate::control::publish::Publisher;
use crate::port::xsk::queue::{XskPort, take_over};
use crate::port::xsk::steer::Heartbeats;
use crate::stage::flow::{self, Phase};
use crate::table::flow_map::{FlowMap, FlowMapConfig};
use crate::worker::Worker;
use crate::worker::hold::Resolve;
use crate::worker::punt::Punt;

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

    let keeper = Arc::new(Keeper::new(UnixStream::from(manifest.keeper.take()?)));
    let listener = UnixListener::from(manifest.control.take()?);
    let heartbeats = {
        let fd = manifest.heartbeats.take()?;
        Arc::new(Heartbeats::map(std::os::fd::AsFd::as_fd(&fd)).context("mapping the heartbeats")?)
    };
    let flows = Arc::new(open_flows(&manifest)?);
    let affinity = Arc::new(open_affinity(&manifest)?);
    let queues = inherit_queues(&manifest)?;
    let punts = inherit_punts(&manifest)?;

    let keeper_pid = Pid::from_raw(manifest.keeper_pid as i32).context("the keeper's process id")?;
    sandbox::drop_privileges(&manifest.account, keeper_pid)?;
    if !sandbox::restrict_files(&gateway.control.state_dir)? {
        warn!("this kernel has no landlock: files are protected by user and mode only");
    }
    sandbox::restrict_control()?;

    let publisher = Publisher::new(workers).context("making the workers' eventfds")?;
    drop(listener);

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
            resolve: resolve(),
            poll: gateway.workers.poll,
        };
        threads.push(start_worker(worker, gateway.workers.cpus[index], stop.clone())?);
    }
    keeper.ready()?;
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a worker panicked outside of a burst"))??;
    }
    anyhow::bail!("a worker ended")
}

fn resolve() -> Resolve {
    Box::new(|_, _| {})
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

/// The flow table, with the connections of the process before.
fn open_flows(manifest: &Manifest) -> Result<FlowMap> {
    let gateway = &manifest.gateway;
    let config = FlowMapConfig {
        capacity: gateway.flows.capacity,
        timeouts_s: flow::timeouts_s(&gateway.flows),
        embryonic_phases: Phase::EMBRYONIC,
        workers: gateway.workers.cpus.len(),
        ..FlowMapConfig::default()
    };
    open_region(File::from(manifest.flows.take()?), config, "flows")
}

/// What session affinity remembers.
fn open_affinity(manifest: &Manifest) -> Result<FlowMap> {
    let gateway = &manifest.gateway;
    let config = FlowMapConfig {
        capacity: gateway.flows.affinity_entries(),
        timeouts_s: flow::timeouts_s(&gateway.flows),
        embryonic_phases: 0,
        workers: gateway.workers.cpus.len(),
        ..FlowMapConfig::default()
    };
    open_region(File::from(manifest.affinity.take()?), config, "session affinity")
}

fn open_region(file: File, config: FlowMapConfig, what: &str) -> Result<FlowMap> {
    let (map, recovery) = FlowMap::open(&file, config).with_context(|| format!("the region of {what}"))?;
    match recovery.empty {
        Some(reason) => info!(capacity = config.capacity, "{what}: begun empty ({reason})"),
        None => info!(kept = recovery.kept, scrubbed = recovery.scrubbed, "{what}: found again"),
    }
    Ok(map)
}

/// Maps packet memories and rings again, and finds the frames of the process before. By worker.
fn inherit_queues(manifest: &Manifest) -> Result<Vec<(Vec<XskPort>, FramePool)>> {
    let config = socket_config(&manifest.gateway);
    let mut queues = Vec::new();
    for (worker, umem) in manifest.umems.iter().enumerate() {
        let umem = Umem::inherit(umem.take()?)?;
        let sockets = manifest.ports.iter().map(|port| Ok((port.sockets[worker].take()?, port.attached)));
        let (ports, pool, recovered) = take_over(umem, sockets.collect::<Result<_>>()?, &config)?;
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
    Ok(queues)
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
