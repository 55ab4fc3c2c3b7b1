//! Captures for clients: at most [`MOST`] at a time, each a stream of packets that ends with its client.
//!
//! A session owns the rings of its capture and publishes the list of all captures anew when it begins and ends. Between
//! these it does nothing but empty its rings while its client reads: a client that is slow loses records, which workers
//! count, and holds up nobody.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use config::capture::filter::{Filter, FilterError, Step, Term};
use config::capture::{CapturedPacket, MAX_SNAPLEN};
use config::control::{Item, Reply};
use config::fault::{Code, Fault};
use rustix::time::{ClockId, clock_gettime};

use super::Shared;
use super::flow::{ServiceName, ServiceNames, address_port, service_names};
use super::health::monotonic_ns;
use super::publish::Publisher;
use super::socket::{Event, Stream};
use crate::addr::Addr;
use crate::capture::predicate::Predicate;
use crate::capture::{Capture, Captures, RECORD_WORDS, Record};
use crate::table::flow_map::Direction;
use crate::table::record_ring::RecordRing;
use crate::verdict::Verdict;

/// Captures at a time.
pub const MOST: usize = 8;

/// Bytes of the rings of one capture, shared by the workers.
const RING_BYTES: usize = 8 << 20;
/// Bytes of the ring of one worker at least: room for a few of the longest packets.
const WORKER_RING_BYTES: usize = 512 << 10;

/// How long a session waits until every worker has begun or ended a capture, for one may be stuck; and how long an end may take
/// that has much to send.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a session looks at most whether Services have gained ports or names.
const NAMES_EVERY: Duration = Duration::from_millis(100);

/// The captures that run, with the numbers of their sessions.
pub struct Running {
    publisher: Arc<Publisher>,
    captures: Mutex<Vec<(u64, Arc<Capture>)>>,
    next: AtomicU64,
}

impl Running {
    /// None yet.
    pub fn new(publisher: Arc<Publisher>) -> Running {
        Running { publisher, captures: Mutex::default(), next: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, Arc<Capture>)>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, captures: &[(u64, Arc<Capture>)]) {
        let captures = captures.iter().map(|(_, capture)| capture.clone()).collect();
        self.publisher.publish_captures(Captures(captures));
    }

    fn begin(&self, capture: Arc<Capture>) -> Result<u64, Fault> {
        let mut captures = self.lock();
        if captures.len() >= MOST {
            let fault = Fault::new(Code::Limit, format!("{MOST} captures run already"));
            return Err(fault.remedy("end one of them, or wait for one to end"));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        captures.push((number, capture));
        self.publish(&captures);
        Ok(number)
    }

    fn replace(&self, number: u64, capture: Arc<Capture>) {
        let mut captures = self.lock();
        if let Some((_, old)) = captures.iter_mut().find(|(of, _)| *of == number) {
            *old = capture;
            self.publish(&captures);
        }
    }

    /// Nothing happens if it has ended already.
    fn end(&self, number: u64) {
        let mut captures = self.lock();
        let before = captures.len();
        captures.retain(|(of, _)| *of != number);
        if captures.len() < before {
            self.publish(&captures);
        }
    }
}

/// How far a session has come.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Until every worker captures.
    Beginning(Instant),
    /// Packets come.
    Running,
    /// Until no worker captures any more and the rings are empty.
    Ending(Instant),
    /// Nothing more comes.
    Over,
}

/// One capture and its client.
pub struct Session {
    shared: Arc<Shared>,
    running: Arc<Running>,
    number: u64,
    capture: Arc<Capture>,
    filter: Filter,
    names: Names,
    stage: Stage,
    /// Of each ring, the oldest record that was taken and not sent.
    taken: Vec<Option<Taken>>,
    /// See [`epoch_offset_ns`]; one for all packets, so that their order stays.
    epoch_offset_ns: u64,
    sent: u64,
    /// Records that were left when the end could not wait for them.
    unsent: u64,
    count: Option<u64>,
}

/// A record that was taken from a ring.
struct Taken {
    worker: usize,
    record: Record,
    bytes: Vec<u8>,
}

impl Session {
    /// Begins a capture.
    ///
    /// # Errors
    /// A word of the filter, a port, a Service or a length that makes no sense; or too many captures run.
    pub fn begin(
        shared: &Arc<Shared>,
        running: &Arc<Running>,
        wanted: config::capture::Capture,
    ) -> Result<Session, Fault> {
        let filter: Filter = wanted.filter.parse()?;
        let names = Names::of(&shared.publisher);
        let predicate = names.compile(&filter)?;
        let ports = &shared.gateway.ports;
        let port = match &wanted.port {
            None => None,
            Some(name) => Some(ports.iter().position(|port| port.name == *name).ok_or_else(|| {
                let known: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
                let fault = Fault::new(Code::NotFound, "no port has this name").field("port").value(name);
                fault.remedy(format!("the ports are {}", known.join(", ")))
            })?),
        };
        if !(1..=MAX_SNAPLEN).contains(&wanted.snaplen) {
            let fault = Fault::new(Code::Invalid, "not a number of bytes to keep").field("snaplen");
            return Err(fault.value(wanted.snaplen).remedy(format!("use 1 to {MAX_SNAPLEN}")));
        }
        if wanted.at.is_empty() {
            let fault = Fault::new(Code::Invalid, "no point to look at packets").field("at");
            return Err(fault.remedy("name rx, post-nat or drop"));
        }
        let workers = shared.publisher.workers().len();
        let ring_bytes = (RING_BYTES / workers).max(WORKER_RING_BYTES);
        let capture = Arc::new(Capture {
            predicate,
            at: wanted.at,
            port: port.map(|index| index as u8),
            snaplen: wanted.snaplen as usize,
            rings: (0..workers).map(|_| RecordRing::new(ring_bytes)).collect(),
        });
        let number = running.begin(capture.clone())?;
        Ok(Session {
            shared: shared.clone(),
            running: running.clone(),
            number,
            capture,
            filter,
            names,
            stage: Stage::Beginning(Instant::now()),
            taken: (0..workers).map(|_| None).collect(),
            epoch_offset_ns: epoch_offset_ns(),
            sent: 0,
            unsent: 0,
            count: wanted.count,
        })
    }

    /// Ends the session, with its last words.
    fn over(&mut self) -> Event {
        self.running.end(self.number);
        self.stage = Stage::Over;
        Event::reply(Reply::Captured { count: self.sent, missed: self.missed() })
    }

    fn missed(&self) -> u64 {
        self.capture.rings.iter().map(RecordRing::refused).sum::<u64>() + self.unsent
    }

    /// True once every worker looks at the list of captures as it is now; after a while in any case.
    fn is_settled(&self, since: Instant) -> bool {
        self.shared.publisher.captures_are_settled() || since.elapsed() >= PATIENCE
    }

    /// The oldest record of all rings.
    fn take(&mut self) -> Option<Taken> {
        for (worker, (ring, taken)) in self.capture.rings.iter().zip(&mut self.taken).enumerate() {
            if taken.is_none() {
                let (mut words, mut bytes) = ([0; RECORD_WORDS], Vec::new());
                *taken = ring.pop(&mut words, &mut bytes).then(|| Taken {
                    worker,
                    record: Record::decode(words),
                    bytes,
                });
            }
        }
        let times = self.taken.iter().enumerate();
        let times = times.filter_map(|(index, taken)| Some((taken.as_ref()?.record.time_ns, index)));
        let (_, oldest) = times.min()?;
        self.taken[oldest].take()
    }

    /// Services may have gained ports, or names that a packet asks for.
    fn follow_services(&mut self, unknown: bool) {
        let asks = unknown || self.capture.predicate.names_services();
        if !asks || !self.names.follow(&self.shared.publisher) {
            return;
        }
        // The reasons in it were found at the beginning.
        let Ok(predicate) = self.names.compile_again(&self.filter) else { return };
        if predicate != self.capture.predicate {
            let Capture { at, port, snaplen, rings, .. } = &*self.capture;
            let (at, rings) = (at.clone(), rings.clone());
            self.capture = Arc::new(Capture { predicate, at, port: *port, snaplen: *snaplen, rings });
            self.running.replace(self.number, self.capture.clone());
        }
    }

    fn packet(&mut self, taken: Taken) -> CapturedPacket {
        let Taken { worker, record, bytes } = taken;
        let note = record.note;
        if note.service != 0 && !self.names.names.contains_key(&note.service) {
            self.follow_services(true);
        }
        let (verdict, reason) = match note.verdict {
            Verdict::Forward { .. } => ("forward", None),
            Verdict::Answer { reason, .. } => ("answer", Some(reason)),
            Verdict::Punt => ("punt", None),
            Verdict::Hold { .. } => ("hold", None),
            Verdict::Gather => ("gather", None),
            Verdict::Drop(reason) => ("drop", Some(reason)),
            Verdict::Undecided => ("undecided", None),
        };
        let is_sound = note.before.src != Addr::UNSPECIFIED;
        CapturedPacket {
            id: note.id,
            time_ns: record.time_ns.wrapping_add(self.epoch_offset_ns),
            point: record.point,
            port: self.shared.port_name(record.port),
            worker: worker as u32,
            len: record.len,
            data: bytes,
            before: is_sound.then(|| note.before.to_string()),
            after: is_sound.then(|| note.after.to_string()),
            service: self.names.names.get(&note.service).map(|name| name.port.clone()),
            endpoint: note.endpoint.map(address_port),
            generation: record.generation,
            flow_generation: note.flow.map(|(_, generation)| generation.into()),
            direction: note.flow.map(|(direction, _)| match direction {
                Direction::Original => "original".to_owned(),
                Direction::Reply => "reply".to_owned(),
            }),
            verdict: verdict.to_owned(),
            reason: reason.map(|reason| reason.name().to_owned()),
            missed: self.missed(),
        }
    }
}

impl Stream for Session {
    fn next(&mut self) -> Event {
        match self.stage {
            Stage::Beginning(since) => {
                if !self.is_settled(since) {
                    return Event::Nothing;
                }
                self.stage = Stage::Running;
                let ports = match self.capture.port {
                    Some(port) => vec![self.shared.port_name(port)],
                    None => self.shared.gateway.ports.iter().map(|port| port.name.clone()).collect(),
                };
                return Event::reply(Reply::Capturing { ports });
            }
            Stage::Running | Stage::Ending(_) => {}
            Stage::Over => return Event::Over,
        }
        self.follow_services(false);
        if self.count.is_some_and(|count| self.sent >= count) {
            return self.over();
        }
        // Asked before the rings are looked at: what was captured until then is in them.
        let is_settled = match self.stage {
            Stage::Ending(since) => self.is_settled(since),
            _ => false,
        };
        if matches!(self.stage, Stage::Ending(since) if since.elapsed() >= PATIENCE) {
            while self.take().is_some() {
                self.unsent += 1;
            }
        }
        match self.take() {
            Some(taken) => {
                self.sent += 1;
                Event::reply(Reply::Item(Item::Packet(self.packet(taken))))
            }
            None if is_settled => self.over(),
            None => Event::Nothing,
        }
    }

    fn stop(&mut self) {
        match self.stage {
            Stage::Beginning(_) | Stage::Running => {
                self.running.end(self.number);
                self.stage = Stage::Ending(Instant::now());
            }
            Stage::Ending(_) | Stage::Over => {}
        }
    }
}

impl Drop for Session {
    /// The client may be gone in the middle.
    fn drop(&mut self) {
        self.running.end(self.number);
    }
}

/// Names of service ports as they were when they were last looked at.
struct Names {
    names: ServiceNames,
    generation: u64,
    looked: Instant,
}

impl Names {
    fn of(publisher: &Publisher) -> Names {
        let tables = publisher.tables();
        Names { names: service_names(&tables), generation: tables.generation, looked: Instant::now() }
    }

    /// Looks again if there is a newer generation, but not too often. True: it did.
    fn follow(&mut self, publisher: &Publisher) -> bool {
        if self.looked.elapsed() < NAMES_EVERY {
            return false;
        }
        self.looked = Instant::now();
        let tables = publisher.tables();
        let is_newer = tables.generation != self.generation;
        if is_newer {
            (self.names, self.generation) = (service_names(&tables), tables.generation);
        }
        is_newer
    }

    /// Stable ids of the ports of a Service, or of the one of this name.
    fn ids(&self, namespace: &str, name: &str, port: Option<&str>) -> Vec<u64> {
        let service = format!("{namespace}/{name}");
        let full = port.map(|port| format!("{service}:{port}"));
        let is_it = |known: &ServiceName| {
            known.service == service && full.as_ref().is_none_or(|full| *full == known.port)
        };
        self.names.iter().filter(|(_, known)| is_it(known)).map(|(id, _)| *id).collect()
    }

    /// Compiles a filter whose Services must exist.
    fn compile(&self, filter: &Filter) -> Result<Predicate, Fault> {
        for step in filter.steps() {
            if let Step::Term(Term::Service { namespace, name, port }, word) = step
                && self.ids(namespace, name, port.as_deref()).is_empty()
            {
                let message = "no Service of this name is served";
                return Err(filter.error(word, message, "see `towpathctl get services -A`").into());
            }
        }
        Ok(self.compile_again(filter)?)
    }

    /// Compiles a filter; Services that are gone meanwhile match nothing.
    fn compile_again(&self, filter: &Filter) -> Result<Predicate, FilterError> {
        Predicate::compile(filter, |namespace, name, port| self.ids(namespace, name, port))
    }
}

/// What is to be added to CLOCK_MONOTONIC for nanoseconds since 1970, as the clock stands now.
fn epoch_offset_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    (now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64).wrapping_sub(monotonic_ns())
}
