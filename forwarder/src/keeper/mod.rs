//! The keeper: the small privileged process that opens, binds, attaches and holds everything, and keeps an unprivileged
//! data plane running with it.
//!
//! ```text
//!            keeper (NET_ADMIN, NET_RAW, BPF, IPC_LOCK)          data plane (nothing)
//!            UMEMs, AF_XDP sockets, TAPs, flow region ---------> workers, control threads
//!            steering program: link and maps <--- socket pair --- "add these entries", "make that a port"
//!            heartbeats --------------- shared map ------------- "alive at ..."
//! ```
//!
//! The sockets of a port are never closed while the keeper lives, unless the port is removed ([`attach`]), so that a data plane that
//! dies costs no packet: the receive rings hold what comes until the next one has mapped them again and found its frames (see
//! [`af_xdp::ledger`]). What happens when a process dies:
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
use std::time::{Duration, Instant};

use config::fault::Fault;
use config::gateway::Gateway;
use tracing::{info, warn};

use crate::kernel::privileged::{Direct, Privileged};

pub mod account;
pub mod attach;
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

use attach::Attached;
use manifest::{Inherited, Manifest};
use ports::Ports;
use requests::{Answer, Reply, Request};
use supervise::Duties;

/// Reads the gateway file, sets everything up, and runs the data plane until SIGTERM or SIGINT.
///
/// # Errors
/// Everything that is wrong, in words for the operator, one a line. Nothing is left behind.
pub fn run(file: &Path) -> anyhow::Result<()> {
    let mut attached = Attached::new(Gateway::load(file).map_err(all_faults)?)?;
    let gateway = attached.gateway();
    preflight::check(gateway).map_err(all_faults)?;
    let stop = stop_signals()?;

    let mut lock = lock::RegionLock::take(&gateway.flows.region)?;
    lock.resize(gateway)?;
    let account = account::data_plane_account(gateway.control.user.as_deref())?;
    let group = gateway.control.group.as_deref().map(account::control_group).transpose()?;
    listen::make_state_dir(&gateway.control.state_dir, &account)?;
    let control = listen::ControlSocket::listen(&gateway.control.socket, group)?;
    let mut ports = Ports::open(gateway)?;
    attached.follow(&mut ports);
    attached.take_change();

    let heartbeats = ports.heartbeats()?;
    let neighbors = Direct::new(interfaces(attached.gateway()))?;
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
        gateway: attached.gateway().clone(),
    };
    let supervisor = supervise::Supervisor { manifest, heartbeats: &heartbeats, stop };
    let mut holdings =
        Holdings { ports, attached, neighbors, looked: Instant::now(), watchdog: Watchdog::new() };
    supervisor.run(&mut holdings)?;

    info!("stopping: flows stay in the region, objects in the state directory");
    notify(sd_notify::NotifyState::Stopping);
    if let Err(cause) = holdings.neighbors.release_all() {
        warn!("next hops that the kernel kept for us could not all be released: {cause}");
    }
    Ok(())
}

/// Names of the interfaces of all ports.
fn interfaces(gateway: &Gateway) -> Vec<String> {
    gateway.ports.iter().map(|port| port.interface.clone()).collect()
}

/// What the keeper holds, and does with it.
struct Holdings {
    ports: Ports,
    attached: Attached,
    neighbors: Direct,
    /// When the MAC addresses of the ports were looked at.
    looked: Instant,
    watchdog: Watchdog,
}

impl Duties for Holdings {
    fn act(&mut self, request: Request) -> Option<Answer> {
        let outcome = match request {
            Request::Ready => Ok(Reply::Done),
            Request::SteerContents => {
                let nothing = crate::port::xsk::steer::Contents::default();
                Ok(Reply::Contents(nothing.difference(self.ports.steering().contents()).0))
            }
            Request::Steer(change) => self
                .ports
                .steering_mut()
                .apply(&change)
                .map(|()| Reply::Done)
                .map_err(|cause| cause.to_string()),
            Request::SteerCounters => self
                .ports
                .steering()
                .counters()
                .map(|counters| Reply::Counters(counters.to_vec()))
                .map_err(|cause| cause.to_string()),
            Request::Neighbor { link, addr, care } => match self.neighbors.neighbor(link, addr, care) {
                Ok(()) => Ok(Reply::Done),
                Err(cause) => Ok(Reply::Refused(cause.raw_os_error().unwrap_or(libc::EIO))),
            },
            Request::Listen { addr } => match listen::tcp(addr, self.attached.gateway().health) {
                Ok(fd) => return Some(Answer { reply: Reply::Listening, fd: Some(fd) }),
                Err(message) => Err(message),
            },
            Request::Port(change) => match self.attached.change(change, &mut self.ports) {
                Ok(()) => return None,
                Err(fault) => Ok(Reply::Fault(fault)),
            },
        };
        Some(outcome.unwrap_or_else(Reply::Failed).into())
    }

    fn on_ready(&mut self) {
        notify(sd_notify::NotifyState::Ready);
    }

    fn on_healthy(&mut self) {
        self.watchdog.feed();
        self.follow_macs();
    }

    fn change(&mut self, manifest: &mut Manifest, forwards: bool) -> bool {
        // The frames of ports that are gone are free once a data plane has begun.
        if forwards {
            self.attached.follow(&mut self.ports);
        }
        if !self.attached.take_change() {
            return false;
        }
        manifest.gateway = self.attached.gateway().clone();
        manifest.ports = self.ports.manifest();
        if let Err(cause) = self.neighbors.set_interfaces(interfaces(&manifest.gateway)) {
            warn!("next hops that the kernel kept for us on a removed port could not be released: {cause}");
        }
        true
    }

    fn between(&mut self) {
        self.ports.close_removed();
    }
}

impl Holdings {
    /// Gives each TAP the MAC address that its interface has now, once a second.
    fn follow_macs(&mut self) {
        const EVERY: Duration = Duration::from_secs(1);
        if self.looked.elapsed() < EVERY {
            return;
        }
        self.looked = Instant::now();
        for (tap, port) in self.ports.taps().zip(&self.attached.gateway().ports) {
            let interface = &port.interface;
            // One that is gone is reported by the data plane, which follows the links.
            if let Ok(true) = tap::follow(tap, interface) {
                info!(tap, interface, "the MAC address of the port changed");
            }
        }
    }
}

/// Tells systemd, if it listens.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(cause) = sd_notify::notify(&[state]) {
        warn!("systemd cannot be told: {cause}");
    }
}

/// Tells systemd's watchdog that all is well, twice in its interval, if it wants to know.
struct Watchdog {
    interval: Option<Duration>,
    fed: Instant,
}

impl Watchdog {
    fn new() -> Watchdog {
        let interval = sd_notify::watchdog_enabled().map(|interval| interval / 2);
        Watchdog { interval, fed: Instant::now() }
    }

    fn feed(&mut self) {
        if self.interval.is_some_and(|interval| self.fed.elapsed() >= interval) {
            self.fed = Instant::now();
            notify(sd_notify::NotifyState::Watchdog);
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
