//! The walk of a command: socket -> validate -> state -> compile -> publish.
//!
//! Two threads do it. `control` runs the socket's poll loop ([`socket`]) and answers questions ([`request`]); `commit`
//! makes changes, one generation after the other ([`commit`]). They share [`Shared`]. Workers meet neither: they read what
//! [`publish`] holds, and their heartbeats are read by [`health`], whose server is a third thread, started by the data plane.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use config::control::{Count, PortChange};
use config::fault::{Code, Fault};
use config::gateway::Gateway;

use crate::keeper::requests::Keeper;
use crate::kernel::fib::Wanted;
use crate::port::xsk::steer::{Contents, SteerChange, SteerCounter};
use crate::table::flow_map::{FlowMap, FlowWorker};

pub mod socket;

pub mod request;

pub mod address;
pub mod facts;
pub mod state;
pub mod validate;

pub mod compile;

pub mod cleanup;
pub mod commit;
pub mod persist;
pub mod publish;
pub mod restore;
pub mod steering;

pub mod capture;
pub mod flow;
pub mod forwarding;
pub mod health;
pub mod metrics;
pub mod rings;

use commit::{Committer, Job};
use compile::Compiler;
use health::Health;
use metrics::Metrics;
use persist::StateDir;
use publish::Publisher;
use request::Desk;
use socket::peer::Admission;
use socket::{Limits, Outbox};
use state::State;

/// The maps of the steering program, as far as control changes them.
pub trait Steer: Send + Sync {
    /// What they hold.
    ///
    /// # Errors
    /// In words for the operator.
    fn contents(&self) -> Result<Contents, String>;

    /// Changes them; returns when it is done.
    ///
    /// # Errors
    /// A map is full: the words name the setting to raise. Some of the change may have been made.
    fn apply(&self, change: SteerChange) -> Result<(), String>;

    /// The counters of the steering program.
    fn counters(&self) -> Vec<Count>;
}

impl Steer for Keeper {
    fn contents(&self) -> Result<Contents, String> {
        self.steer_contents().map_err(|error| error.to_string())
    }

    fn apply(&self, change: SteerChange) -> Result<(), String> {
        self.steer(change).map_err(|error| error.to_string())
    }

    fn counters(&self) -> Vec<Count> {
        let values = self.steer_counters().unwrap_or_default();
        let count = |(counter, value): (&SteerCounter, u64)| Count {
            name: format!("steer_{}", counter.name()),
            value,
            help: counter.help().to_owned(),
        };
        SteerCounter::ALL.iter().zip(values).map(count).collect()
    }
}

/// What the kernel granted to one port.
#[derive(Clone, Debug, Default)]
pub struct PortInfo {
    /// `zero-copy`, `copy` or `generic`.
    pub mode: String,
    /// Queues that are served.
    pub queues: u32,
    /// Checksums of packets that come in may be unfinished.
    pub partial_checksums: bool,
}

/// What the kernel counted for the sockets of a port, by port index. They live in the keeper, so that nothing of it is lost
/// with a data plane.
pub type SocketCounters = Box<dyn Fn(usize) -> af_xdp::Statistics + Send + Sync>;

/// Takes what objects ask of the forwarding table; if the second argument is true, returns when it is in force.
pub type WantRoutes = Box<dyn FnMut(Wanted, bool) + Send>;

/// Adds or removes a port. Returns only what is wrong: if it is done, this process is ended.
pub type ChangePort = Box<dyn Fn(PortChange) -> Fault + Send + Sync>;

/// Everything that control is started with.
pub struct ControlParts {
    /// The checked gateway file, with the ports that there are now.
    pub gateway: Arc<Gateway>,
    /// The listening control socket.
    pub listener: UnixListener,
    /// Number of the group of `[control] group`.
    pub group: Option<u32>,
    /// Where tables go.
    pub publisher: Arc<Publisher>,
    /// Connections.
    pub flows: Arc<FlowMap>,
    /// A part in `flows` for traces.
    pub flow_worker: FlowWorker,
    /// Session affinity.
    pub affinity: Arc<FlowMap>,
    /// A part in `affinity` for traces.
    pub affinity_worker: FlowWorker,
    /// The steering maps.
    pub steer: Arc<dyn Steer>,
    /// Takes what objects ask of the forwarding table. Called on the commit thread.
    pub routes: WantRoutes,
    /// Adds or removes a port.
    pub change_port: ChangePort,
    /// What the kernel granted, by port.
    pub ports: Vec<PortInfo>,
    /// What the kernel counted for the sockets of a port.
    pub socket_counters: SocketCounters,
    /// How often the keeper had to start the data plane again.
    pub restarts: u32,
}

/// The accepted objects and what they were compiled to.
pub struct World {
    /// The accepted objects.
    pub state: State,
    /// Makes tables of them.
    pub compiler: Compiler,
}

/// What the threads of control share.
pub struct Shared {
    /// The checked gateway file, with the ports that there are now.
    pub gateway: Arc<Gateway>,
    /// Where tables go.
    pub publisher: Arc<Publisher>,
    /// Connections.
    pub flows: Arc<FlowMap>,
    /// Session affinity.
    pub affinity: Arc<FlowMap>,
    /// Adds or removes a port.
    pub change_port: ChangePort,
    /// What the kernel granted, by port.
    pub ports: Vec<PortInfo>,
    /// What the kernel counted for the sockets of a port.
    pub socket_counters: SocketCounters,
    /// How often the keeper had to start the data plane again.
    pub restarts: u32,
    /// What the health server tells.
    pub health: Health,
    /// What is measured for Prometheus.
    pub metrics: Metrics,
    started: Instant,
    /// Written by the commit thread only.
    world: RwLock<World>,
    problems: Mutex<BTreeMap<&'static str, Fault>>,
    /// What was found when the kept objects were read.
    restore_notes: Vec<Fault>,
    steer: Arc<dyn Steer>,
}

impl Shared {
    fn read_world(&self) -> RwLockReadGuard<'_, World> {
        self.world.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For threads that must not wait for a change that is being made.
    fn try_read_world(&self) -> Option<RwLockReadGuard<'_, World>> {
        match self.world.try_read() {
            Ok(world) => Some(world),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    fn write_world(&self) -> RwLockWriteGuard<'_, World> {
        self.world.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a problem of the part `what`, for `status`, until it is [solved](Shared::solved).
    fn problem(&self, what: &'static str, fault: Fault) {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).insert(what, fault);
    }

    fn solved(&self, what: &'static str) {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).remove(what);
    }

    /// The problem of the part `what`, if it has one.
    fn problem_of(&self, what: &'static str) -> Option<Fault> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).get(what).cloned()
    }

    /// What needs attention.
    fn problems(&self) -> Vec<Fault> {
        let mut problems = self.restore_notes.clone();
        problems.extend(self.problems.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        problems.extend(health::problems(self.publisher.workers(), health::monotonic_ns()));
        problems
    }
}

/// The running threads of control. Dropping it stops them.
pub struct Control {
    outbox: Arc<Outbox>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Why control could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The kept objects could not be read at all.
    #[error(transparent)]
    State(#[from] persist::PersistError),
    /// The restored tables could not be put in force.
    #[error("{0}")]
    Restore(Fault),
    /// A descriptor or a thread is missing.
    #[error("cannot start the control threads: {0}")]
    Start(#[from] io::Error),
}

impl Control {
    /// Restores the kept objects, publishes their tables, and begins to listen. When it returns, the first generation is
    /// published: workers may start.
    ///
    /// # Errors
    /// The state directory cannot be listed, the steering maps cannot hold the restored state, or a thread is missing.
    /// Damaged files are no error: what can be restored is, and the rest is told by the log and `status`.
    pub fn start(parts: ControlParts) -> Result<Control, ControlError> {
        let gateway = parts.gateway;
        let (dir, restored) = StateDir::open(&gateway.control.state_dir)?;
        let mut compiler = Compiler::new(gateway.clone());
        let own = commit::OwnAddresses::of(&parts.publisher.fib());
        compiler.set_own_addresses(own.ports);
        compiler.set_partial_checksums(
            &parts.ports.iter().map(|port| port.partial_checksums).collect::<Vec<_>>(),
        );
        let note = |text: String| Fault::new(Code::Storage, text);
        let mut notes: Vec<Fault> = restored.notes.into_iter().map(note).collect();
        let (manifests, faults) = restore::objects(&restored.lines);
        notes.extend(faults);
        let kept = manifests.len();
        let (state, faults) = State::load(&compiler.rules(), manifests);
        let left_out = kept - state.len();
        if left_out > 0 {
            let text = format!("{left_out} of {kept} kept objects are no longer acceptable and are left out");
            notes.push(note(text).remedy("mend the gateway file or the objects, and apply them again"));
            notes.extend(faults.into_iter().take(20));
        }
        for note in &notes {
            tracing::warn!("{note}");
        }
        tracing::info!(objects = state.len(), generation = restored.generation, "objects restored");

        let shared = Arc::new(Shared {
            gateway: gateway.clone(),
            publisher: parts.publisher,
            flows: parts.flows,
            affinity: parts.affinity,
            change_port: parts.change_port,
            ports: parts.ports,
            socket_counters: parts.socket_counters,
            restarts: parts.restarts,
            health: Health::new()?,
            metrics: Metrics::default(),
            started: Instant::now(),
            world: RwLock::new(World { state, compiler }),
            problems: Mutex::default(),
            restore_notes: notes,
            steer: parts.steer.clone(),
        });
        let committer = Committer::start(shared.clone(), dir, parts.steer, parts.routes, restored.generation)
            .map_err(ControlError::Restore)?;
        let (jobs, waiting) = crossbeam::channel::unbounded::<Job>();
        let outbox = Arc::new(Outbox::new()?);
        let desk = Desk::new(shared.clone(), jobs, parts.flow_worker, parts.affinity_worker);
        let limits = Limits {
            clients: gateway.control.max_clients as usize,
            staging_bytes: gateway.control.staging_bytes as usize,
            ..Limits::default()
        };
        let admission = Admission::own(parts.group);
        let (listener, out) = (parts.listener, outbox.clone());
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(body)
        };
        let commit = spawn("commit", Box::new(move || committer.run(&waiting)))?;
        let control = spawn(
            "control",
            Box::new(move || {
                if let Err(error) = socket::serve(&listener, admission, &limits, &desk, &out) {
                    tracing::error!("the control socket is not served any more: {error}");
                }
            }),
        )?;
        Ok(Control { outbox, shared, threads: vec![control, commit] })
    }

    /// What the health server serves. `open`: opens a socket that listens.
    pub fn probes(&self, open: health::Open) -> health::Probes {
        health::Probes::new(self.shared.clone(), open)
    }
}

impl Drop for Control {
    /// Ends the socket's thread, which closes the way to the commit thread, which then ends too.
    fn drop(&mut self) {
        self.outbox.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
