//! The commit thread: one change after the other from request to force.
//!
//! A change is staged on the state and judged whole; compiled; made room for in the steering maps; written to the journal;
//! published; synced to disk. Up to the publish anything that fails takes it back and refuses it, with the running state
//! untouched. Then its client waits until every worker has the generation in force, at most a second, while the thread
//! goes on with other changes. Changes that come within a millisecond share one generation.
//!
//! When the newest generation is in force everywhere, what only older ones needed goes: steering entries, and flows whose endpoint
//! is gone ([`cleanup`](super::cleanup)).

use std::sync::Arc;
use std::time::{Duration, Instant};

use config::control::{Change, Committed, Outcome, Reply};
use config::fault::{Code, Fault};
use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::cleanup::Cleanup;
use super::compile::{Compilation, identities};
use super::health::update::Update;
use super::health::{Event, Watch, monotonic_ns, monotonic_s, wall_clock};
use super::persist::{PersistError, SnapshotJob, StateDir};
use super::publish::look_again_after;
use super::restore;
use super::socket::{Ticket, Transaction};
use super::state::{Accepted, Refusal, Touch};
use super::steering::Steering;
use super::{Shared, Steer, WantRoutes, World};
use crate::addr::Addr;
use crate::kernel::fib::{Wanted, WantedOverlay};
use crate::tables::{Fib, Route};

/// Changes that come within this time share a generation: at most 1,000 generations a second.
const PACE: Duration = Duration::from_millis(1);

/// How long a client waits for its generation to be in force everywhere.
const IN_FORCE_WITHIN: Duration = Duration::from_secs(1);

/// How long to rest between two steps of a walk over the flow table: a thread that never sleeps would let the one wait that brings the
/// next change.
const BREATH: Duration = Duration::from_micros(50);

/// How often workers, addresses and old snapshots are looked at when nothing else happens.
const TICK: Duration = Duration::from_millis(25);

/// Most bytes of names in an answer to a commit, so that the answer fits a line of the protocol.
const CHANGES_BYTES: usize = 1 << 20;

/// A complete change and the duty to answer it.
pub struct Job {
    /// When it was handed in, nanoseconds of CLOCK_MONOTONIC.
    pub since_ns: u64,
    /// The change as it was sent.
    pub transaction: Transaction,
    /// Who waits.
    pub ticket: Ticket,
}

/// A change that is in the state but not published yet.
struct Member {
    since_ns: u64,
    ticket: Ticket,
    accepted: Accepted,
}

/// A client whose generation is on its way into force.
struct Waiter {
    generation: u64,
    since: Instant,
    ticket: Ticket,
    committed: Committed,
}

/// The gateway's own addresses, as the forwarding table has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    /// First addresses of the ports.
    pub ports: Vec<Addr>,
    /// All addresses of the gateway.
    pub all: Vec<Addr>,
}

impl OwnAddresses {
    /// Reads them from the forwarding table.
    pub fn of(fib: &Fib) -> OwnAddresses {
        let ports = fib.ports.iter().flat_map(|port| port.v4.into_iter().chain(port.v6)).collect();
        let is_host = |net: &ipnet::IpNet| net.prefix_len() == net.max_prefix_len();
        let local = fib.routes.iter().filter(|(net, route)| *route == Route::Local && is_host(net));
        OwnAddresses { ports, all: local.map(|(net, _)| net.addr().into()).collect() }
    }
}

/// What the commit thread owns.
pub struct Committer {
    shared: Arc<Shared>,
    dir: StateDir,
    steering: Steering,
    /// The tables have asked for more than the steering maps have room for.
    steering_owed: bool,
    routes: WantRoutes,
    own: OwnAddresses,
    epoch: u32,
    generation: u64,
    published: Instant,
    waiters: Vec<Waiter>,
    /// Steering entries and flows of older generations are still to be removed.
    is_settled: bool,
    cleanup: Cleanup,
    snapshot: Option<std::thread::JoinHandle<Result<u64, PersistError>>>,
    watch: Watch,
    looked: Instant,
}

impl Committer {
    /// Puts the restored state in force: compiles it, opens the steering maps for it, publishes it.
    ///
    /// # Errors
    /// The steering maps have no room for it.
    pub(super) fn start(
        shared: Arc<Shared>,
        dir: StateDir,
        steer: Arc<dyn Steer>,
        routes: WantRoutes,
        generation: u64,
    ) -> Result<Committer, Fault> {
        let range = shared.gateway.snat.ports;
        let steering = Steering::new(steer, (range.first, range.last)).map_err(steering_fault)?;
        let mut committer = Committer {
            dir,
            steering,
            steering_owed: false,
            routes,
            own: OwnAddresses::of(&shared.publisher.fib()),
            epoch: shared.publisher.fib().epoch,
            generation: generation.max(1) - 1,
            published: Instant::now(),
            waiters: Vec::new(),
            is_settled: true,
            cleanup: Cleanup::default(),
            snapshot: None,
            watch: Watch::default(),
            looked: Instant::now(),
            shared: shared.clone(),
        };
        let mut world = shared.write_world();
        world.compiler.set_own_addresses(committer.own.ports.clone());
        let touch = |entry: &Arc<super::state::Entry>| Touch {
            reference: entry.reference.clone(),
            old: None,
            new: Some(entry.clone()),
        };
        let touched: Vec<Touch> = world.state.entries().map(touch).collect();
        let mut compilation = committer.compile(&mut world, &touched);
        compilation.steering_changed = true;
        compilation.routes_changed = true;
        committer.grow(&world, &compilation)?;
        // Flows that were open before may need what the objects do not ask for any more.
        let result = committer.steering.grow_for_flows(&shared.flows);
        committer.note_steering(result);
        world.compiler.count_flows(&shared.flows);
        let update = Update::of_everything(committer.generation + 1, monotonic_ns());
        committer.publish(&world, compilation, update);
        drop(world);
        if committer.dir.needs_rotation() {
            committer.rotate();
        }
        Ok(committer)
    }

    /// Runs until `jobs` is closed.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            match jobs.recv_timeout(self.patience()) {
                Ok(first) => {
                    // The pace gives others the chance to be in this generation.
                    std::thread::sleep(PACE.saturating_sub(self.published.elapsed()));
                    let jobs: Vec<Job> = std::iter::once(first).chain(jobs.try_iter()).collect();
                    self.commit(jobs);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.shared.health.beat_commit();
            self.follow_updates();
            self.answer_waiters();
            self.settle();
            self.shrink();
            self.clean_up();
            if self.looked.elapsed() >= TICK {
                self.look_around();
            }
        }
        if let Some(snapshot) = self.snapshot.take() {
            let _ = snapshot.join();
        }
    }

    /// How long the thread may sleep if no change comes.
    fn patience(&self) -> Duration {
        if self.cleanup.is_walking() || self.is_settled && self.steering.is_walking() {
            return BREATH;
        }
        match self.waiters.first() {
            Some(waiter) => look_again_after(waiter.since.elapsed()),
            None if !self.is_settled => look_again_after(self.published.elapsed()),
            None => TICK,
        }
    }

    /// Puts changes into one generation, each of them whole or not at all.
    fn commit(&mut self, jobs: Vec<Job>) {
        let shared = self.shared.clone();
        if self.dir.needs_rotation() {
            // Before the change, since the snapshot that belongs before the new journal must not have it.
            self.rotate();
        }
        let journal_bytes = self.dir.journal_bytes();
        let mut world = shared.write_world();
        let mut members = Vec::new();
        // What holds staging memory is dropped at the end of each round.
        for Job { since_ns, transaction, ticket } in jobs {
            match self.stage(&mut world, transaction, !members.is_empty()) {
                Ok(Verdict::Keep(accepted)) => members.push(Member { since_ns, ticket, accepted }),
                Ok(Verdict::Answer(committed)) => ticket.answer(Reply::Committed(*committed)),
                Err(refusal) => ticket.answer(refused(refusal)),
            }
        }
        if members.is_empty() {
            return;
        }
        let touched: Vec<Touch> = members.iter().flat_map(|m| m.accepted.touched.iter().cloned()).collect();
        let compilation = self.compile(&mut world, &touched);
        if let Err(fault) = self.grow(&world, &compilation) {
            self.take_back(&mut world, &touched, journal_bytes);
            for member in members {
                let warnings = member.accepted.warnings;
                let refusal = Refusal { faults: vec![fault.clone()], more: 0, warnings };
                member.ticket.answer(refused(refusal));
            }
            return;
        }
        let since_ns = members.iter().map(|member| member.since_ns).min().unwrap_or_else(monotonic_ns);
        let update = Update::of(self.generation + 1, since_ns, &touched, shared.health.started);
        self.publish(&world, compilation, update);
        drop(world);
        let unsynced = self.dir.sync().err().map(|error| self.storage_fault(&error));
        for Member { ticket, accepted, .. } in members {
            let mut committed = Committed {
                generation: self.generation,
                changes: accepted.changes,
                warnings: accepted.warnings,
                ..Committed::default()
            };
            committed.warnings.extend(unsynced.clone());
            shorten(&mut committed);
            let (generation, since) = (self.generation, Instant::now());
            self.waiters.push(Waiter { generation, since, ticket, committed });
        }
        if self.dir.wants_rotation() {
            self.rotate();
        }
    }

    /// Applies a change to the state and writes it to the journal. `follows`: the generation has changes already.
    fn stage(
        &mut self,
        world: &mut World,
        transaction: Transaction,
        follows: bool,
    ) -> Result<Verdict, Refusal> {
        let begin = transaction.begin;
        let current = self.generation + u64::from(follows);
        if let Some(expected) = begin.expect_generation.filter(|expected| *expected != current) {
            let fault = Fault::new(Code::Generation, format!("the generation is {current}"));
            let fault = fault.field("expect_generation").value(expected);
            return Err(fault.remedy("look at what changed and try again").into());
        }
        let Transaction { operations, found: Refusal { faults, more, mut warnings }, .. } = transaction;
        if !faults.is_empty() {
            return Err(Refusal { faults, more, warnings });
        }
        let is_empty = operations.is_empty() && !begin.prune;
        let World { state, compiler } = world;
        let staged = state.stage(&compiler.rules(), operations, begin.prune).map_err(|mut refusal| {
            refusal.warnings.splice(0..0, warnings.clone());
            refusal
        })?;
        if begin.dry_run || is_empty || staged.accepted().touched.is_empty() && !follows {
            let accepted = staged.accepted();
            warnings.extend(accepted.warnings.iter().cloned());
            let mut committed = Committed {
                generation: self.generation,
                dry_run: begin.dry_run,
                changes: accepted.changes.clone(),
                warnings,
                ..Committed::default()
            };
            shorten(&mut committed);
            self.fill_in_force(&mut committed);
            return Ok(Verdict::Answer(Box::new(committed)));
        }
        let lines = restore::lines(&staged.accepted().touched);
        if let Err(error) = self.dir.append(self.generation + 1, &lines) {
            // Dropping what is staged takes it back. Without a journal, the reason for that says more.
            drop(staged);
            let known = self.shared.problem_of("storage").filter(|_| self.dir.needs_rotation());
            return Err(known.unwrap_or_else(|| self.storage_fault(&error)).into());
        }
        let mut accepted = staged.commit();
        warnings.append(&mut accepted.warnings);
        accepted.warnings = warnings;
        Ok(Verdict::Keep(accepted))
    }

    fn compile(&mut self, world: &mut World, touched: &[Touch]) -> Compilation {
        let World { state, compiler } = world;
        compiler.compile(state, touched, self.generation + 1)
    }

    /// Makes the steering maps catch what the new tables serve, besides what the old ones do.
    fn grow(&mut self, world: &World, compilation: &Compilation) -> Result<(), Fault> {
        if !compilation.steering_changed && !self.steering_owed {
            return Ok(());
        }
        let wanted = world.compiler.steer_set(&world.state, &self.own.all);
        self.steering.grow(wanted).map_err(steering_fault)?;
        self.steering_owed = false;
        Ok(())
    }

    /// Notes how it went to bring the steering maps to what they should hold.
    fn note_steering(&self, result: Result<(), String>) {
        match result {
            Ok(()) => self.shared.solved("steering"),
            Err(error) => self.shared.problem("steering", steering_fault(error)),
        }
    }

    /// Makes a compilation the newest generation. `update`: what is followed of it.
    fn publish(&mut self, world: &World, compilation: Compilation, update: Update) {
        self.generation += 1;
        debug_assert_eq!(compilation.tables.generation, self.generation);
        // Routes first: a Service must not be served before its endpoints can be reached. What is on a link waits for its address anyway.
        if compilation.routes_changed || compilation.endpoints_changed {
            let pod_routes = identities::pod_routes(&world.state, &self.shared.gateway);
            let endpoints =
                world.state.slices().flat_map(|(_, slice)| slice.endpoints.iter().map(|e| e.addr));
            let section = &self.shared.gateway.overlay;
            let overlay = WantedOverlay {
                vni: section.vni,
                port: section.port,
                mtu: section.mtu,
                addresses: section.addresses.iter().map(|addr| Addr::from(*addr)).collect(),
                nodes: identities::tunnels(&world.state, &self.shared.gateway),
            };
            let wanted = Wanted { pod_routes, endpoints: endpoints.collect(), overlay };
            (self.routes)(wanted, compilation.routes_changed);
        }
        self.shared.publisher.publish_tables(compilation.tables);
        self.shared.health.updates().published(update);
        self.shared.health.set_tables(world.compiler.health());
        self.published = Instant::now();
        self.is_settled = false;
        self.cleanup.merge(compilation.udp_cleanup, compilation.lifetimes, monotonic_s());
        self.shared.publisher.reap();
    }

    /// Takes changes back that are in the state and in the journal, but in no published table.
    fn take_back(&mut self, world: &mut World, touched: &[Touch], journal_bytes: u64) {
        self.dir.undo(journal_bytes);
        let World { state, compiler } = world;
        let undone =
            state.stage(&compiler.rules(), restore::inverse(touched), false).map(|s| s.commit().touched);
        match undone {
            Ok(undone) => drop(compiler.compile(state, &undone, self.generation)),
            Err(refusal) => {
                // It was valid before. If this is ever seen, restarting gives the state of the journal.
                let fault =
                    refusal.faults.into_iter().next().unwrap_or_else(|| {
                        Fault::new(Code::Other, "a refused change could not be taken back")
                    });
                self.shared.problem("state", fault.remedy("restart towpathd"));
            }
        }
    }

    fn fill_in_force(&self, committed: &mut Committed) {
        let in_force = self.shared.publisher.in_force(committed.generation);
        committed.workers_in_force = in_force.workers as u32;
        committed.workers = in_force.of as u32;
    }

    /// Measures the generations that have come into force everywhere.
    fn follow_updates(&mut self) {
        let health = &self.shared.health;
        if health.updates().is_settled() {
            return;
        }
        let workers = self.shared.publisher.workers();
        let in_force = workers.iter().map(|worker| worker.in_force()).min().unwrap_or_default();
        let now = wall_clock();
        for update in health.updates().in_force(in_force, now) {
            self.shared.metrics.observe(&update, monotonic_ns(), now);
        }
    }

    /// Answers those whose generation is in force everywhere, and those who have waited long enough.
    fn answer_waiters(&mut self) {
        let publisher = &self.shared.publisher;
        let waiters = std::mem::take(&mut self.waiters);
        let (done, waiting): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|waiter| {
            waiter.since.elapsed() >= IN_FORCE_WITHIN || publisher.in_force(waiter.generation).everywhere()
        });
        self.waiters = waiting;
        if !done.is_empty() {
            // Before they are answered: who knows that a change is in force finds it measured.
            self.follow_updates();
        }
        for Waiter { ticket, mut committed, .. } in done {
            self.fill_in_force(&mut committed);
            if committed.workers_in_force < committed.workers {
                tracing::warn!(
                    generation = committed.generation,
                    "in force on {} of {} workers only",
                    committed.workers_in_force,
                    committed.workers
                );
            }
            ticket.answer(Reply::Committed(committed));
        }
    }

    /// Takes away what only older generations needed, once the newest is in force everywhere.
    fn settle(&mut self) {
        if self.is_settled || !self.shared.publisher.in_force(self.generation).everywhere() {
            return;
        }
        self.is_settled = true;
        self.steering.begin_shrink();
        self.shared.publisher.reap();
    }

    /// Takes out of the steering maps what neither the newest generation nor a flow needs.
    fn shrink(&mut self) {
        if self.is_settled
            && let Some(result) = self.steering.step(&self.shared.flows, Instant::now())
        {
            self.note_steering(result);
        }
    }

    /// Looks at the next flows and ends those whose endpoint is gone, as far as that is due.
    fn clean_up(&mut self) {
        let now_s = monotonic_s();
        if self.is_settled && !self.cleanup.is_walking() {
            self.cleanup.begin(now_s);
        }
        self.cleanup.step(&self.shared.flows, now_s);
    }

    /// What is done every [`TICK`].
    fn look_around(&mut self) {
        self.looked = Instant::now();
        for event in self.watch.look(self.shared.publisher.workers(), monotonic_ns()) {
            match event {
                Event::Stuck { worker, age_ms } => {
                    tracing::warn!(worker, "worker makes no progress for {age_ms} ms");
                }
                Event::Recovered { worker, after_ms } => {
                    tracing::warn!(worker, "worker goes on after {after_ms} ms without progress");
                }
            }
        }
        self.follow_addresses();
        if self.dir.needs_rotation() {
            self.rotate();
        }
        if self.snapshot.as_ref().is_some_and(|thread| thread.is_finished())
            && let Some(Ok(written)) = self.snapshot.take().map(|thread| thread.join())
        {
            match written {
                Ok(bytes) => {
                    self.dir.snapshot_written(bytes);
                    self.shared.solved("storage");
                }
                Err(error) => {
                    self.storage_fault(&error);
                }
            }
        }
        self.shared.publisher.reap();
    }

    /// Recompiles if the gateway's own addresses have changed: NodePorts and masquerading depend on them.
    fn follow_addresses(&mut self) {
        let fib = self.shared.publisher.fib();
        if fib.epoch == self.epoch {
            return;
        }
        self.epoch = fib.epoch;
        let own = OwnAddresses::of(&fib);
        if own == self.own {
            return;
        }
        self.own = own;
        let shared = self.shared.clone();
        let mut world = shared.write_world();
        world.compiler.set_own_addresses(self.own.ports.clone());
        let mut compilation = self.compile(&mut world, &[]);
        compilation.steering_changed = true;
        let update = Update::of_everything(self.generation + 1, monotonic_ns());
        match self.grow(&world, &compilation) {
            Ok(()) => {
                // No object changes; but generations must not go backwards over a restart.
                if let Err(error) = self.dir.append::<&str>(self.generation + 1, &[]) {
                    self.storage_fault(&error);
                }
                self.publish(&world, compilation, update);
            }
            Err(fault) => {
                // What was compiled is in the next generation too.
                self.steering_owed = true;
                self.shared.problem("steering", fault);
            }
        }
    }

    /// Begins a new journal and has the snapshot before it written by a thread of its own.
    fn rotate(&mut self) {
        if self.snapshot.is_some() {
            return;
        }
        match self.dir.rotate() {
            Ok(job) => {
                let entries: Vec<_> = self.shared.read_world().state.entries().cloned().collect();
                self.snapshot = self.start_snapshot(job, entries);
            }
            Err(error) => {
                self.storage_fault(&error);
            }
        }
    }

    fn start_snapshot(
        &self,
        job: SnapshotJob,
        entries: Vec<Arc<super::state::Entry>>,
    ) -> Option<std::thread::JoinHandle<Result<u64, PersistError>>> {
        let generation = self.generation;
        let write = move || job.write(generation, entries.iter().map(|entry| restore::put(entry)));
        match std::thread::Builder::new().name("snapshot".into()).spawn(write) {
            Ok(thread) => Some(thread),
            Err(error) => {
                // The journals say everything; the next rotation tries again.
                tracing::warn!("no thread for a snapshot of the objects: {error}");
                None
            }
        }
    }

    /// Notes that state cannot be kept; returns the fault for clients.
    fn storage_fault(&self, error: &PersistError) -> Fault {
        tracing::error!("{error}");
        let fault = Fault::new(Code::Storage, error.to_string());
        self.shared.problem("storage", fault.clone());
        fault
    }
}

enum Verdict {
    /// In the state and in the journal: to be published.
    Keep(Accepted),
    /// Nothing to publish.
    Answer(Box<Committed>),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Refusal {
        Refusal { faults: vec![fault], more: 0, warnings: Vec::new() }
    }
}

fn refused(Refusal { faults, more, warnings }: Refusal) -> Reply {
    Reply::Refused { faults, more, warnings }
}

fn steering_fault(error: String) -> Fault {
    Fault::new(Code::Limit, format!("the steering program cannot be told: {error}"))
}

/// Leaves changes out of an answer that would be too long, those first that are none.
fn shorten(committed: &mut Committed) {
    let size = |change: &Change| change.object.name.len() + change.object.namespace.len() + 100;
    let total = |changes: &[Change]| changes.iter().map(size).sum::<usize>();
    let before = committed.changes.len();
    if total(&committed.changes) > CHANGES_BYTES {
        committed.changes.retain(|change| change.outcome != Outcome::Unchanged);
        let mut bytes = 0;
        committed.changes.retain(|change| {
            bytes += size(change);
            bytes <= CHANGES_BYTES
        });
        let left_out = before - committed.changes.len();
        let fault = Fault::new(Code::Limit, format!("{left_out} of {before} objects are not listed here"));
        committed.warnings.push(fault.remedy("see `towpathctl get`"));
    }
    committed.warnings.truncate(200);
}

#[cfg(test)]
mod tests;
