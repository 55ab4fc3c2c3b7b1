//! Answers to every request that changes no object: one match, the whole API on one screen.
//!
//! Nothing here waits. Whoever needs the objects while a change is being made gives its turn away and looks again; long
//! answers are made piece by piece while the client reads.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::control::{
    Count, Drops, Get, Item, Kind, Noun, ObjectRef, Reply, Request, Stats, Status, VERSION,
};
use config::fault::{Code, Fault};
use config::packet::{PacketSpec, Protocol};
use crossbeam::channel::Sender;

use super::capture::{Running, Session};
use super::commit::Job;
use super::compile::dns;
use super::compile::rows::slices_waiting;
use super::flow::{Filter, ServiceNames, Walk, service_names};
use super::health::{monotonic_ns, monotonic_s};
use super::socket::{Answer, Backend, Dump, Ticket, Transaction};
use super::state::{Entry, State};
use super::{Shared, World, metrics};
use crate::addr::protocol;
use crate::explain::{Explainer, View};
use crate::stats::{Counter, sum};
use crate::table::flow_map::FlowWorker;
use crate::verdict::Reason;

/// Objects turned into rows in one step of a dump.
const STEP: usize = 32;

/// How long the thread rests when it finds the objects being changed.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Name and version of the daemon.
const SERVER: &str = concat!("towpathd ", env!("CARGO_PKG_VERSION"));

/// Where requests are answered. Lives on the socket's thread.
pub struct Desk {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    tracer: Arc<Mutex<Tracer>>,
    names: Mutex<(u64, ServiceNames)>,
    captures: Arc<Running>,
}

/// What traces need; one at a time.
struct Tracer {
    explainer: Explainer,
    flow_worker: FlowWorker,
    affinity_worker: FlowWorker,
}

impl Desk {
    /// `jobs`: the way to the commit thread.
    pub fn new(
        shared: Arc<Shared>,
        jobs: Sender<Job>,
        mut flow_worker: FlowWorker,
        mut affinity_worker: FlowWorker,
    ) -> Desk {
        // Between traces they must not hold up the reuse of records.
        shared.flows.offline(&mut flow_worker);
        shared.affinity.offline(&mut affinity_worker);
        let tracer = Tracer { explainer: Explainer::new(), flow_worker, affinity_worker };
        let captures = Arc::new(Running::new(shared.publisher.clone()));
        Desk { shared, jobs, tracer: Arc::new(Mutex::new(tracer)), names: Mutex::default(), captures }
    }

    /// Names of service ports, made again for each generation that they are asked in.
    fn names(&self) -> ServiceNames {
        let tables = self.shared.publisher.tables();
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.0 != tables.generation {
            *names = (tables.generation, service_names(&tables));
        }
        names.1.clone()
    }

    fn walk(&self, filter: &config::control::FlowFilter) -> Result<Walk, Fault> {
        Ok(Walk::new(self.shared.flows.clone(), self.names(), Filter::parse(filter)?))
    }

    fn get(&self, get: Get) -> Answer {
        let shared = &self.shared;
        let of_kind = |kind| rows(shared, move |state| state.of_kind(kind).cloned().collect(), get.clone());
        match get.what {
            Noun::Services => of_kind(Kind::Service),
            Noun::Endpoints => of_kind(Kind::EndpointSlice),
            Noun::Nodes => of_kind(Kind::Node),
            Noun::Pods => of_kind(Kind::Pod),
            Noun::Namespaces => of_kind(Kind::Namespace),
            Noun::All => {
                rows(shared, |state| state.entries().cloned().collect(), Get { objects: true, ..get })
            }
            Noun::Routes => list(shared.route_rows().into_iter().map(Item::Route)),
            Noun::Neighbors => list(shared.neighbor_rows().into_iter().map(Item::Neighbor)),
            Noun::Ports => list(shared.port_rows().into_iter().map(Item::Port)),
            Noun::Workers => list(shared.worker_rows(monotonic_ns()).into_iter().map(Item::Worker)),
            Noun::Dns => look(shared, |world, _| {
                let rows = dns::names(&world.state, dns::CLUSTER_DOMAIN);
                list(rows.into_iter().map(Item::Dns))
            }),
        }
    }

    fn stats(&self) -> Stats {
        let shared = &self.shared;
        let total = sum(shared.publisher.workers().iter().map(|worker| worker.counters()));
        let count =
            |c: &Counter| Count { name: c.name().into(), value: total.get(*c), help: c.help().into() };
        let mut totals: Vec<Count> = Counter::ALL.iter().map(count).collect();
        totals.extend(shared.steer.counters());
        Stats {
            uptime_ms: shared.started.elapsed().as_millis() as u64,
            totals,
            drops: self.drops(),
            rings: shared.ring_losses(),
            workers: shared.worker_rows(monotonic_ns()),
            flows: shared.flows.len() as u64,
        }
    }

    fn drops(&self) -> Vec<Count> {
        let total = sum(self.shared.publisher.workers().iter().map(|worker| worker.counters()));
        let count =
            |r: &Reason| Count { name: r.name().into(), value: total.reason(*r), help: r.help().into() };
        Reason::ALL.iter().map(count).collect()
    }

    fn trace(&self, packet: PacketSpec) -> Answer {
        let tracer = self.tracer.clone();
        look(&self.shared, move |world, shared| {
            let mut tracer = tracer.lock().unwrap_or_else(PoisonError::into_inner);
            trace(&mut tracer, world, shared, &packet).into()
        })
    }
}

impl Backend for Desk {
    fn hello(&self) -> Reply {
        Reply::Hello {
            version: VERSION,
            server: SERVER.to_owned(),
            gateway: self.shared.gateway.gateway.name.clone(),
            generation: self.shared.publisher.tables().generation,
        }
    }

    fn answer(&self, question: Request) -> Answer {
        let walk = |walked: Result<Dump, Fault>| match walked {
            Ok(dump) => Answer::Dump(dump),
            Err(fault) => Reply::Fault(fault).into(),
        };
        match question {
            Request::Get(get) => self.get(get),
            Request::DescribeService { namespace, name } => {
                look(&self.shared, move |world, shared| describe(world, shared, namespace, name).into())
            }
            Request::Status => look(&self.shared, |world, shared| status(world, shared).into()),
            Request::Stats => Reply::Stats(self.stats()).into(),
            Request::Drops => {
                let drops = Drops { reasons: self.drops(), rings: self.shared.ring_losses() };
                Reply::Drops(drops).into()
            }
            Request::Metrics => Reply::Metrics { text: metrics::text(&self.shared) }.into(),
            Request::Flows { filter, limit } => walk(
                self.walk(&filter)
                    .map(|walk| Box::new(walk.rows(limit.unwrap_or(u64::MAX), monotonic_s())) as Dump),
            ),
            Request::CountFlows { filter } => {
                walk(self.walk(&filter).map(|walk| Box::new(walk.count()) as Dump))
            }
            Request::FlushFlows { filter } => {
                walk(self.walk(&filter).map(|walk| Box::new(walk.flush()) as Dump))
            }
            Request::Trace { packet } => self.trace(packet),
            Request::Capture(wanted) => match Session::begin(&self.shared, &self.captures, wanted) {
                Ok(session) => Answer::Stream(Box::new(session)),
                Err(fault) => Reply::Fault(fault).into(),
            },
            // Between two changes of objects, for the data plane ends with it.
            Request::Port(change) => {
                look(&self.shared, move |_, shared| Reply::Fault((shared.change_port)(change)).into())
            }
            // The conversation itself; `client` answers these.
            Request::Hello { .. }
            | Request::Begin(_)
            | Request::Apply(_)
            | Request::Delete(_)
            | Request::Commit
            | Request::Abort => Reply::Fault(Fault::new(Code::Request, "not a question")).into(),
        }
    }

    fn commit(&self, transaction: Transaction, ticket: Ticket) {
        // The commit thread lives as long as this sender; otherwise the ticket, dropped, answers.
        let _ = self.jobs.send(Job { since_ns: monotonic_ns(), transaction, ticket });
    }
}

/// A list that is complete already.
fn list(items: impl IntoIterator<Item = Item> + 'static) -> Answer {
    let items: Vec<Item> = items.into_iter().collect();
    let end = Reply::End { count: items.len() as u64 };
    Answer::Dump(Box::new(items.into_iter().map(|item| Some(Reply::Item(item))).chain([Some(end)])))
}

/// An answer that needs the objects: made as soon as no change is being made.
fn look(shared: &Arc<Shared>, ask: impl FnOnce(&World, &Shared) -> Answer + Send + 'static) -> Answer {
    let shared = shared.clone();
    let mut ask = Some(ask);
    let mut found: Option<Dump> = None;
    Answer::Dump(Box::new(std::iter::from_fn(move || {
        if let Some(dump) = &mut found {
            return dump.next();
        }
        let Some(world) = shared.try_read_world() else {
            std::thread::sleep(LOOK_AGAIN);
            return Some(None);
        };
        match ask.take()?(&world, &shared) {
            Answer::Reply(reply) => {
                found = Some(Box::new(std::iter::empty()));
                Some(Some(*reply))
            }
            Answer::Dump(mut dump) => {
                let first = dump.next();
                found = Some(dump);
                first
            }
            // No question about objects is answered so.
            Answer::Stream(_) => None,
        }
    })))
}

/// Rows of objects: all of one moment, made a few at a time.
fn rows(
    shared: &Arc<Shared>,
    entries: impl FnOnce(&State) -> Vec<Arc<Entry>> + Send + 'static,
    get: Get,
) -> Answer {
    let making = shared.clone();
    look(shared, move |world, _| {
        let wanted = |entry: &Arc<Entry>| {
            let reference = &entry.reference;
            let in_namespace =
                |namespace: &String| !reference.kind.is_namespaced() || *namespace == reference.namespace;
            get.namespace.as_ref().is_none_or(in_namespace)
                && get.name.as_ref().is_none_or(|name| names_it(name, entry))
        };
        let entries: Vec<_> = entries(&world.state).into_iter().filter(wanted).collect();
        let mut entries = entries.into_iter();
        let mut ready: VecDeque<Item> = VecDeque::new();
        let (mut count, mut ended) = (0, false);
        Answer::Dump(Box::new(std::iter::from_fn(move || {
            if let Some(item) = ready.pop_front() {
                count += 1;
                return Some(Some(Reply::Item(item)));
            }
            if entries.len() > 0 {
                let Some(world) = making.try_read_world() else {
                    std::thread::sleep(LOOK_AGAIN);
                    return Some(None);
                };
                for entry in entries.by_ref().take(STEP) {
                    match get.objects {
                        true => ready.push_back(Item::Object(entry.object.to_value())),
                        false => ready.extend(world.compiler.rows(&world.state, &entry)),
                    }
                }
                return Some(None);
            }
            (!std::mem::replace(&mut ended, true)).then_some(Some(Reply::End { count }))
        })))
    })
}

/// Slices are asked for by the name of their Service, as with `kubectl get endpoints`, or by their own.
fn names_it(name: &str, entry: &Entry) -> bool {
    let service = match &entry.facts {
        super::facts::Facts::Slice(slice) => slice.service.as_deref(),
        _ => None,
    };
    entry.reference.name == name || service == Some(name)
}

fn describe(world: &World, shared: &Shared, namespace: String, name: String) -> Reply {
    match world.compiler.describe_service(&world.state, &namespace, &name) {
        Some(mut description) => {
            world.compiler.count_connections(&mut description, &shared.flows);
            Reply::Service(Box::new(description))
        }
        None => {
            let reference = ObjectRef { kind: Kind::Service, namespace, name };
            let fault = Fault::new(Code::NotFound, "not found").object(reference);
            Reply::Fault(fault.remedy("see `towpathctl get services -A`"))
        }
    }
}

fn status(world: &World, shared: &Shared) -> Reply {
    let tables = shared.publisher.tables();
    let in_force = shared.publisher.in_force(tables.generation);
    let (frontends, frontends_off) = world.compiler.frontend_counts();
    let count = |kind: Kind| (kind.name().to_owned(), world.state.of_kind(kind).count() as u64);
    Reply::Status(Box::new(Status {
        server: SERVER.to_owned(),
        gateway: shared.gateway.gateway.name.clone(),
        uptime_ms: shared.started.elapsed().as_millis() as u64,
        restarts: shared.restarts,
        generation: tables.generation,
        epoch: shared.publisher.fib().epoch,
        workers: in_force.of as u32,
        workers_in_force: in_force.workers as u32,
        objects: Kind::ALL.into_iter().map(count).collect(),
        slices_waiting: slices_waiting(&world.state) as u64,
        frontends,
        frontends_off,
        flows: shared.flows.len() as u64,
        flows_embryonic: shared.flows.embryonic_len() as u64,
        flows_capacity: shared.flows.capacity() as u64,
        ports: shared.port_rows(),
        problems: shared.problems(),
    }))
}

fn protocol_number(packet: &PacketSpec) -> u8 {
    match packet.protocol {
        Protocol::Tcp => protocol::TCP,
        Protocol::Udp => protocol::UDP,
        Protocol::Sctp => protocol::SCTP,
        Protocol::Icmp if packet.dst.is_ipv4() => protocol::ICMP,
        Protocol::Icmp => protocol::ICMPV6,
    }
}

fn trace(tracer: &mut Tracer, world: &World, shared: &Shared, packet: &PacketSpec) -> Reply {
    let Tracer { explainer, flow_worker, affinity_worker } = tracer;
    let (tables, fib) = (shared.publisher.tables(), shared.publisher.fib());
    let port_names: Vec<String> = shared.gateway.ports.iter().map(|port| port.name.clone()).collect();
    shared.flows.online(flow_worker);
    shared.affinity.online(affinity_worker);
    let view = View {
        tables: &tables,
        fib: &fib,
        flows: &shared.flows,
        flow_worker: &mut *flow_worker,
        affinity: &shared.affinity,
        affinity_worker: &mut *affinity_worker,
        now_s: monotonic_s(),
        port_names: &port_names,
    };
    let explained = explainer.explain(packet, view);
    shared.flows.offline(flow_worker);
    shared.affinity.offline(affinity_worker);
    match explained {
        Ok(mut trace) => {
            let key = crate::tables::FrontendKey {
                addr: packet.dst.into(),
                port: packet.dst_port,
                protocol: protocol_number(packet),
            };
            trace.service = tables.frontends.get(&key).and_then(|frontend| {
                let service = &frontend.service;
                world.compiler.describe_service(&world.state, &service.namespace, &service.name)
            });
            Reply::Trace(Box::new(trace))
        }
        Err(message) => Reply::Fault(Fault::new(Code::Invalid, message).field("packet")),
    }
}
