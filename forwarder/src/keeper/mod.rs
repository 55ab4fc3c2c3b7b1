//! The keeper: the small privileged process that opens, binds, attaches and holds everything, and keeps an unprivileged
//! data plane running with it.
//!
//! ```text
//!            keeper (NET_ADMIN, NET_RAW, BPF, IPC_LOCK)          data plane (nothing)
//!            UMEMs, AF_XDP sockets, TAPs, flow region ---------> workers, control threads
//!            steering program: link and maps <--- socket pair --- "add these entries", "listen there for me"
//!            heartbeats --------------- shared map ------------- "alive at ..."
//! ```
//!
//! The sockets are never closed while the keeper lives, so that a data plane that dies costs no packet: the receive rings
//! hold what comes until the next one has mapped them again and found its frames (see [`af_xdp::ledger`]). What
//! happens when a process dies:
//!
//! | who | what happens |
//! | --- | --- |
//! | data plane dead or stuck | started again at once; after a second without a heartbeat the steering program drops Service packets (`worker_dead`) and leaves plain traffic to the kernel |
//! | keeper dead | the data plane ends with it (PDEATHSIG); links, maps, sockets and TAPs go with the last descriptor: everything reaches the kernel, which owns no VIP |
//! | both dead | the same; the next start replaces the stale socket file, takes the lock, and finds flows and objects again |
//!
//! Read [`run`] top to bottom for the order of the start.

use std::os::unix::net::UnixStream;
use std::path::Path;

use config::fault::Fault;
use config::gateway::{Gateway, HealthSection};
use tracing::{info, warn};

use crate::kernel::privileged::{Direct, Privileged};

pub mod account;
pub mod data_plane;
pub mod driver;
pub mod hugepages;
pub mod listen;
pub mod lock;
pub mod manifest;
pub mod ports;
pub mod preflight;
pub mod region;
pub mod requests;
pub mod sandbox;
pub mod supervise;
pub mod tap;

use manifest::{Inherited, Manifest};
use ports::Ports;
use requests::{Answer, Reply, Request};

/// Reads the gateway file, sets everything up, and runs the data plane until SIGTERM or SIGINT.
///
/// # Errors
/// Everything that is wrong, in words for the operator, one a line. Nothing is left behind.
pub fn run(file: &Path) -> anyhow::Result<()> {
    let gateway = Gateway::load(file).map_err(all_faults)?;
    preflight::check(&gateway).map_err(all_faults)?;
    let stop = stop_signals()?;

    let mut lock = lock::RegionLock::take(&gateway.flows.region)?;
    lock.resize(&gateway)?;
    let account = account::data_plane_account(gateway.control.user.as_deref())?;
    let group = gateway.control.group.as_deref().map(account::control_group).transpose()?;
    listen::make_state_dir(&gateway.control.state_dir, &account)?;
    let control = listen::ControlSocket::listen(&gateway.control.socket, group)?;
    let mut ports = Ports::open(&gateway)?;

    let heartbeats = ports.heartbeats()?;
    let mut neighbors = Direct::new(gateway.ports.iter().map(|port| port.interface.clone()).collect())?;
    let manifest = Manifest {
        keeper_pid: std::process::id(),
        ports: ports.manifest(),
        umems: ports.umems(),
        flows: Inherited::of(lock.region()),
        affinity: Inherited::of(lock.affinity()),
        heartbeats: Inherited::of(&ports.steering().heartbeats()),
        // Replaced at every start of the data plane.
        keeper: Inherited::of(&stop),
        control: Inherited::of(control.listener()),
        control_group: group.map(|group| group.as_raw()),
        restarts: 0,
        account,
        gateway,
    };
    let interfaces = manifest.gateway.ports.iter().map(|port| port.interface.clone());
    let mut follow_macs = follow_macs(ports.taps().map(str::to_owned).zip(interfaces).collect());
    let mut watchdog = watchdog();
    let health = manifest.gateway.health;
    let supervisor = supervise::Supervisor { manifest, heartbeats: &heartbeats, stop };
    supervisor.run(
        |request| act(&mut ports, &mut neighbors, health, request),
        || notify(sd_notify::NotifyState::Ready),
        || {
            watchdog();
            follow_macs();
        },
    )?;

    info!("stopping: flows stay in the region, objects in the state directory");
    notify(sd_notify::NotifyState::Stopping);
    if let Err(cause) = neighbors.release_all() {
        warn!("next hops that the kernel kept for us could not all be released: {cause}");
    }
    Ok(())
}

/// Does what the data plane asked for.
fn act(ports: &mut Ports, neighbors: &mut Direct, health: HealthSection, request: Request) -> Answer {
    let outcome = match request {
        Request::Ready => Ok(Reply::Done),
        Request::SteerContents => {
            let nothing = crate::port::xsk::steer::Contents::default();
            Ok(Reply::Contents(nothing.difference(ports.steering().contents()).0))
        }
        Request::Steer(change) => {
            ports.steering_mut().apply(&change).map(|()| Reply::Done).map_err(|cause| cause.to_string())
        }
        Request::SteerCounters => ports
            .steering()
            .counters()
            .map(|counters| Reply::Counters(counters.to_vec()))
            .map_err(|cause| cause.to_string()),
        Request::Neighbor { link, addr, care } => match neighbors.neighbor(link, addr, care) {
            Ok(()) => Ok(Reply::Done),
            Err(cause) => Ok(Reply::Refused(cause.raw_os_error().unwrap_or(libc::EIO))),
        },
        Request::Listen { addr } => match listen::tcp(addr, health) {
            Ok(fd) => return Answer { reply: Reply::Listening, fd: Some(fd) },
            Err(message) => Err(message),
        },
    };
    outcome.unwrap_or_else(Reply::Failed).into()
}

/// Tells systemd, if it listens.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(cause) = sd_notify::notify(&[state]) {
        warn!("systemd cannot be told: {cause}");
    }
}

/// Tells systemd's watchdog that all is well, twice in its interval, if it wants to know.
fn watchdog() -> impl FnMut() {
    let interval = sd_notify::watchdog_enabled().map(|interval| interval / 2);
    let mut last = std::time::Instant::now();
    move || {
        if interval.is_some_and(|interval| last.elapsed() >= interval) {
            last = std::time::Instant::now();
            notify(sd_notify::NotifyState::Watchdog);
        }
    }
}

/// Gives each TAP the MAC address that its interface has now, once a second. `taps`: TAP and interface of each port.
fn follow_macs(taps: Vec<(String, String)>) -> impl FnMut() {
    const EVERY: std::time::Duration = std::time::Duration::from_secs(1);
    let mut last = std::time::Instant::now();
    move || {
        if last.elapsed() < EVERY {
            return;
        }
        last = std::time::Instant::now();
        for (tap, interface) in &taps {
            // One that is gone is reported by the data plane, which follows the links.
            if let Ok(true) = tap::follow(tap, interface) {
                info!(tap, interface, "the MAC address of the port changed");
            }
        }
    }
}

/// Becomes readable at SIGTERM and SIGINT.
fn stop_signals() -> std::io::Result<UnixStream> {
    let (reading, writing) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, writing.try_clone()?)?;
    }
    Ok(reading)
}

/// Several faults as one error, a line each.
pub fn all_faults(faults: Vec<Fault>) -> anyhow::Error {
    let lines: Vec<_> = faults.iter().map(ToString::to_string).collect();
    anyhow::Error::msg(lines.join("\n"))
}
