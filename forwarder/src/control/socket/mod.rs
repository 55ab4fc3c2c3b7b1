//! The control socket: one thread, one poll loop, any number of slow clients, none of which holds up another.
//!
//! `line` cuts bytes into lines, `client` is one conversation without descriptors or clocks, `peer` says who may come
//! in, and [`serve`] here moves bytes between them and the kernel. Every request either is answered at once by the
//! [`Backend`], or is a dump that is pulled while the client reads, or a stream that is looked at every few milliseconds,
//! or a commit whose answer comes later from the commit thread through a [`Ticket`].
//!
//! Limits, and what happens at them ([`Limits`]): a line that stays unfinished or a reply that stays unread is cut off
//! after 5 s, an open change after 30 s without a further line; over all clients, unfinished lines and staged changes
//! share one budget; when all places are taken, the client that has been silent for longest makes room: one that has not
//! even said hello after 50 ms, one with nothing open or that does not read its replies after 1 s.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use config::control::{Apply, Begin, Reply, Request};
use config::fault::{Code, Fault};
use config::object::Object;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

pub mod client;
pub mod line;
pub mod peer;

use client::Client;
use line::{Budget, Charge};
use peer::{Admission, Peer};

use super::state::{Operation, Refusal};

/// Replies of a dump, one at a time, made while the client reads. `None` within the sequence: some work was done
/// (so that others may have their turn), but there is no reply yet.
pub type Dump = Box<dyn Iterator<Item = Option<Reply>> + Send>;

/// Replies that come when something happens, until they end by themselves or the client wants no more of them.
pub trait Stream: Send {
    /// What has happened. Must not block; called again at once after a reply, else after [`STREAM_EVERY`].
    fn next(&mut self) -> Event;

    /// The client has sent something or closed its side: after what has happened already, the end must come.
    fn stop(&mut self);
}

/// The next thing in a [`Stream`].
#[derive(Debug)]
pub enum Event {
    /// A reply.
    Reply(Box<Reply>),
    /// Nothing has happened yet.
    Nothing,
    /// There will be no more.
    Over,
}

impl Event {
    /// A reply.
    pub fn reply(reply: Reply) -> Event {
        Event::Reply(Box::new(reply))
    }
}

/// What is answered to a question.
pub enum Answer {
    /// One reply.
    Reply(Box<Reply>),
    /// Many replies, or one that takes long.
    Dump(Dump),
    /// Replies that are not there yet.
    Stream(Box<dyn Stream>),
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Answer {
        Answer::Reply(Box::new(reply))
    }
}

/// What requests are about. Called on the socket's thread.
pub trait Backend: Send + Sync {
    /// To `hello`.
    fn hello(&self) -> Reply;

    /// To everything that is not part of a change. Must not block.
    fn answer(&self, question: Request) -> Answer;

    /// Takes a complete change over. Must not block; the answer comes by the ticket, from any thread.
    fn commit(&self, transaction: Transaction, ticket: Ticket);
}

/// Most warnings about the objects of one change.
const MAX_WARNINGS: usize = 200;

/// A complete change. Its objects are read as they come, so that little is left to do when the last one is there.
#[derive(Debug)]
pub struct Transaction {
    /// How it began.
    pub begin: Begin,
    /// What it does, in order.
    pub operations: Vec<Operation>,
    /// What is wrong with objects that could not be read, and what else was noticed. With a fault the change is refused.
    pub found: Refusal,
    /// Its part of the staging budget, held until the change is done.
    pub charge: Charge,
}

impl Transaction {
    /// A change that does nothing yet.
    pub fn new(begin: Begin, charge: Charge) -> Transaction {
        Transaction { begin, operations: Vec::new(), found: Refusal::default(), charge }
    }

    /// Adds a [`Request::Apply`] or [`Request::Delete`]. Objects of kinds that Towpath does not use are left out with a warning.
    pub fn add(&mut self, request: Request) {
        match request {
            Request::Apply(Apply { object, source }) => {
                let at = |fault: Fault| {
                    if source.file.is_empty() || fault.source.is_some() {
                        fault
                    } else {
                        fault.source(&source)
                    }
                };
                match Object::from_value(object) {
                    Ok((object, warnings)) => {
                        let room = MAX_WARNINGS.saturating_sub(self.found.warnings.len());
                        self.found.warnings.extend(warnings.into_iter().take(room).map(at));
                        self.operations.push(Operation::Apply { object, source });
                    }
                    Err(fault) if fault.code == Code::SkippedKind => {
                        if self.found.warnings.len() < MAX_WARNINGS {
                            self.found.warnings.push(at(fault));
                        }
                    }
                    Err(fault) => self.found.fault(at(fault)),
                }
            }
            Request::Delete(delete) => self.operations.push(Operation::Delete {
                object: delete.object,
                source: delete.source,
                ignore_not_found: delete.ignore_not_found,
            }),
            _ => {}
        }
    }
}

/// The right and duty to answer a commit, once.
#[derive(Debug)]
pub struct Ticket {
    client: u64,
    outbox: Option<Arc<Outbox>>,
}

impl Ticket {
    /// For client number `client`.
    pub fn new(client: u64, outbox: &Arc<Outbox>) -> Ticket {
        Ticket { client, outbox: Some(outbox.clone()) }
    }

    /// Answers.
    pub fn answer(mut self, reply: Reply) {
        if let Some(outbox) = self.outbox.take() {
            outbox.put(self.client, reply);
        }
    }
}

impl Drop for Ticket {
    /// A commit is answered whatever happens.
    fn drop(&mut self) {
        if let Some(outbox) = self.outbox.take() {
            let fault =
                Fault::new(Code::Request, "the daemon stops; whether the change took effect is not known");
            outbox.put(
                self.client,
                Reply::Fault(fault.remedy("look at it with `towpathctl get` after its restart")),
            );
        }
    }
}

/// Answers to commits on their way to the socket's thread.
#[derive(Debug)]
pub struct Outbox {
    replies: Mutex<Vec<(u64, Reply)>>,
    wake: OwnedFd,
    stop: AtomicBool,
}

impl Outbox {
    /// An empty one.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> io::Result<Outbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Outbox { replies: Mutex::default(), wake, stop: AtomicBool::new(false) })
    }

    fn put(&self, client: u64, reply: Reply) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).push((client, reply));
        self.wake();
    }

    /// Takes all answers that have come.
    pub fn take(&self) -> Vec<(u64, Reply)> {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        std::mem::take(&mut self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends [`serve`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // The only error is a full counter, and then the thread has been woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// What clients may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Clients at a time.
    pub clients: usize,
    /// Bytes of unfinished lines and staged changes, over all clients.
    pub staging_bytes: usize,
    /// How long a line may stay unfinished, a reply unread, a new client silent.
    pub idle: Duration,
    /// How long an open change may stay without a further line.
    pub idle_change: Duration,
    /// How long a client may be silent before it makes room for another, when all places are taken.
    pub spare: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            clients: 640,
            staging_bytes: 256 << 20,
            idle: Duration::from_secs(5),
            idle_change: Duration::from_secs(30),
            spare: Duration::from_secs(1),
        }
    }
}

/// How long one client may keep the thread busy before the others have their turn.
const TURN: Duration = Duration::from_millis(1);

/// How long a new client may take to say hello before it makes room for another: programs say it at once.
const GREETING: Duration = Duration::from_millis(50);

/// How often streams are looked at in which nothing has happened: workers wake nobody for a packet.
pub const STREAM_EVERY: Duration = Duration::from_millis(5);

/// How long a client that is cut off may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// A client, its socket and the times that decide when it is cut off.
struct Connection {
    id: u64,
    stream: UnixStream,
    client: Client,
    /// Nothing more will come.
    eof: bool,
    broken: bool,
    /// The last time that anything was received or sent.
    active: Instant,
    /// Since when a line has been unfinished.
    unfinished: Option<Instant>,
    /// Since when no byte of the waiting output could be sent.
    unread: Option<Instant>,
    /// Cut off: gone at this time at the latest.
    gone_at: Option<Instant>,
}

impl Connection {
    fn new(id: u64, stream: UnixStream, budget: &Budget, now: Instant) -> Connection {
        Connection {
            id,
            stream,
            client: Client::new(id, budget),
            eof: false,
            broken: false,
            active: now,
            unfinished: None,
            unread: None,
            gone_at: None,
        }
    }

    fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if !self.eof && (self.client.wants_input() || self.client.is_finished()) {
            flags |= PollFlags::IN;
        }
        if self.client.unread() > 0 {
            flags |= PollFlags::OUT;
        }
        flags
    }

    /// Receives once. A read takes no control message, so descriptors sent along are closed by the kernel (unix(7)).
    fn receive(&mut self, buffer: &mut [u8], now: Instant) {
        match rustix::io::read(&self.stream, &mut *buffer) {
            Ok(0) => {
                self.eof = true;
                self.client.closed();
            }
            Ok(n) => {
                self.active = now;
                // After a fault the rest is read and thrown away, so that the fault is not lost in a reset.
                self.client.receive(&buffer[..n]);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.broken = true,
        }
    }

    fn send(&mut self, now: Instant) {
        while self.client.unread() > 0 {
            let sent =
                rustix::net::send(&self.stream, self.client.output(), rustix::net::SendFlags::NOSIGNAL);
            match sent {
                Ok(n) => {
                    self.client.sent(n);
                    self.active = now;
                    self.unread = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.unread.get_or_insert(now);
                    return;
                }
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
    }

    /// Works until there is nothing to do or the turn is over. Returns true if there is more to do.
    fn work(&mut self, backend: &dyn Backend, outbox: &Arc<Outbox>, now: Instant) -> bool {
        let start = Instant::now();
        let mut busy = true;
        while busy && start.elapsed() < TURN {
            busy = self.client.step(backend, |id| Ticket::new(id, outbox));
            if !busy && self.client.unread() > 0 {
                self.send(now);
                busy = self.client.unread() == 0 && self.client.is_working() && !self.broken;
                if !busy {
                    break;
                }
            }
        }
        self.send(now);
        if !self.client.is_unfinished() || busy {
            self.unfinished = None;
        } else {
            self.unfinished.get_or_insert(now);
        }
        busy
    }

    /// Cuts the client off if it has been idle for too long.
    fn check_times(&mut self, limits: &Limits, now: Instant) {
        let exceeded = |since: Option<Instant>, limit| since.is_some_and(|t| now.duration_since(t) >= limit);
        if self.client.is_finished() {
            if self.gone_at.is_none() && self.client.unread() == 0 {
                // It sees the end at once; what it still sends is thrown away for a while, since closing with unread
                // input would be a reset that takes the reason with it.
                let _ = self.stream.shutdown(std::net::Shutdown::Write);
                self.gone_at = Some(now + LINGER);
            }
            self.broken |= exceeded(self.unread, LINGER) || self.gone_at.is_some_and(|t| now >= t);
        } else if exceeded(self.unread, limits.idle) {
            // There is no use in sending a reason to somebody who does not read.
            tracing::info!(client = self.id, "cut off: does not read its replies");
            self.broken = true;
        } else if exceeded(self.unfinished, limits.idle) {
            self.client.cut_off("a line stayed unfinished for too long", "send whole lines");
        } else if self.client.is_stranger() && exceeded(Some(self.active), limits.idle) {
            self.client.cut_off("no hello came", "send hello as the first line");
        } else if self.client.is_staging() && exceeded(Some(self.active), limits.idle_change) {
            self.client
                .cut_off("the change stayed open for too long; nothing of it took effect", "send it at once");
        }
    }

    fn is_over(&self) -> bool {
        let said_all = self.client.unread() == 0 && !self.client.is_working();
        self.broken || (said_all && self.eof)
    }

    /// Could make room for another client.
    fn is_evictable(&self, limits: &Limits, now: Instant) -> bool {
        let silent = now.duration_since(self.active);
        if self.client.is_stranger() {
            return silent >= GREETING;
        }
        let is_open = self.client.is_staging() || self.client.is_working();
        silent >= limits.spare && (!is_open || self.unread.is_some())
    }

    /// Makes room for another client, and is told so if that can be done at once.
    fn evict(self) {
        if self.client.unread() == 0 {
            let fault =
                Fault::new(Code::Limit, "made room for another client, silent for longer than the others");
            let line = Reply::Fault(fault.remedy("connect again")).to_line();
            let _ = rustix::net::send(&self.stream, line.as_bytes(), rustix::net::SendFlags::NOSIGNAL);
        }
    }
}

/// Serves the control socket until [`Outbox::stop`]. One thread.
pub fn serve(
    listener: &UnixListener,
    admission: Admission,
    limits: &Limits,
    backend: &dyn Backend,
    outbox: &Arc<Outbox>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let budget = Budget::new(limits.staging_bytes);
    let mut connections: Vec<Connection> = Vec::new();
    let mut next_id = 1;
    let mut buffer = vec![0u8; 64 << 10];
    let mut more_to_do = false;
    let mut accept_again = Instant::now();
    while !outbox.stop.load(Ordering::Acquire) {
        let now = Instant::now();
        let accepting = now >= accept_again;
        let ready = wait(listener, outbox, &connections, more_to_do, accepting)?;
        let now = Instant::now();

        for (client, reply) in outbox.take() {
            if let Some(connection) = connections.iter_mut().find(|c| c.id == client) {
                connection.client.committed(reply);
                connection.active = now;
            }
        }
        more_to_do = false;
        for (connection, flags) in connections.iter_mut().zip(&ready.clients) {
            if flags.contains(PollFlags::IN) || flags.contains(PollFlags::ERR) {
                connection.receive(&mut buffer, now);
            }
            more_to_do |= connection.work(backend, outbox, now);
            connection.send(now);
            connection.check_times(limits, now);
        }
        connections.retain(|connection| !connection.is_over());
        if ready.listener {
            // One a turn: a storm of connections does not hold up those who are in.
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Some(stream) = admit(stream, admission, &mut connections, limits, now) {
                        connections.push(Connection::new(next_id, stream, &budget, now));
                        next_id += 1;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(
                        "cannot accept a control client: {error}; raise LimitNOFILE if this goes on"
                    );
                    accept_again = now + Duration::from_millis(100);
                }
            }
        }
    }
    Ok(())
}

/// What poll reported.
struct Ready {
    listener: bool,
    clients: Vec<PollFlags>,
}

fn wait(
    listener: &UnixListener,
    outbox: &Outbox,
    connections: &[Connection],
    more_to_do: bool,
    accepting: bool,
) -> io::Result<Ready> {
    let mut fds = Vec::with_capacity(connections.len() + 2);
    fds.push(PollFd::new(&outbox.wake, PollFlags::IN));
    fds.push(PollFd::new(listener, if accepting { PollFlags::IN } else { PollFlags::empty() }));
    // A connection that wants nothing is left out: its hang-up would be reported without end.
    let interests: Vec<PollFlags> = connections.iter().map(Connection::interest).collect();
    for (connection, interest) in connections.iter().zip(&interests) {
        if !interest.is_empty() {
            fds.push(PollFd::from_borrowed_fd(connection.stream.as_fd(), *interest));
        }
    }
    let timeout = match (more_to_do, connections.is_empty() && accepting) {
        (true, _) => Some(Duration::ZERO),
        (false, false) if connections.iter().any(|c| c.client.is_streaming()) => Some(STREAM_EVERY),
        (false, false) => Some(Duration::from_millis(100)),
        (false, true) => None,
    };
    let timeout = timeout.map(|timeout| Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() });
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut polled = fds[2..].iter();
    let clients = interests
        .iter()
        .map(|interest| match interest.is_empty() {
            true => PollFlags::empty(),
            // A hang-up is seen by reading: what was sent before it is still there.
            false => match polled.next().map_or(PollFlags::empty(), PollFd::revents) {
                flags if flags.intersects(PollFlags::HUP) && interest.contains(PollFlags::IN) => {
                    flags | PollFlags::IN
                }
                flags => flags,
            },
        })
        .collect();
    Ok(Ready { listener: fds[1].revents().contains(PollFlags::IN), clients })
}

/// Lets a new client in, or tells it why not and closes.
fn admit(
    stream: UnixStream,
    admission: Admission,
    connections: &mut Vec<Connection>,
    limits: &Limits,
    now: Instant,
) -> Option<UnixStream> {
    let refuse = |fault: Fault| {
        // The buffer of a new connection takes one line; if not, closing is answer enough.
        let line = Reply::Fault(fault).to_line();
        let _ = rustix::net::send(&stream, line.as_bytes(), rustix::net::SendFlags::NOSIGNAL);
    };
    stream.set_nonblocking(true).ok()?;
    match Peer::of(&stream) {
        Ok(peer) if admission.admits(&peer) => {}
        Ok(peer) => {
            tracing::warn!(pid = peer.pid, uid = peer.uid, "control client refused");
            let fault = Fault::new(Code::Forbidden, "this user may not use the control socket");
            refuse(fault.value(format!("uid {}", peer.uid)).remedy(match admission.group {
                Some(group) => format!("run it as root, or join group {group}"),
                None => "run it as root, or set [control] group in the gateway file".to_owned(),
            }));
            return None;
        }
        Err(error) => {
            tracing::warn!("control client refused: its credentials cannot be read: {error}");
            return None;
        }
    }
    if connections.len() >= limits.clients {
        let idlest = (0..connections.len())
            .filter(|i| connections[*i].is_evictable(limits, now))
            .min_by_key(|i| connections[*i].active);
        match idlest {
            Some(index) => connections.swap_remove(index).evict(),
            None => {
                let fault = Fault::new(Code::Limit, "too many clients of the control socket at a time");
                refuse(
                    fault
                        .field("[control] max_clients")
                        .value(limits.clients)
                        .remedy("try again in a moment"),
                );
                return None;
            }
        }
    }
    Some(stream)
}

#[cfg(test)]
mod tests;
