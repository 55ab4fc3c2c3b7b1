//! The health server: one thread and one poll loop for every port that it listens on and all clients, none of which holds up another.
//!
//! A client has [`Limits::request`] for its request and for reading the answer, however many pieces it sends or takes; whoever is
//! slower is cut off. When all places are taken, the client that came first makes room, so that a crowd of slow ones keeps nobody out.
//! Sockets that listen are opened by the keeper, since this thread may open none.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use config::control::ObjectRef;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketFlags, accept_with, send};

use super::http::{Parsed, Response, parse};
use super::wall_clock;

/// Bytes of a request at most; probes send about 100.
const REQUEST_BYTES: usize = 4096;

/// Clients accepted on one port in one round: a storm on one does not hold up the others.
const ACCEPTS: usize = 16;

/// What a port is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `[health] listen`: the gateway itself.
    Gateway,
    /// The `healthCheckNodePort` of a Service.
    Service(Arc<ObjectRef>),
}

/// What is served. Called on the server's thread; nothing in it may wait for a client.
pub trait Backend {
    /// Every address to listen at, and for what.
    fn targets(&self) -> BTreeMap<SocketAddr, Target>;

    /// Readable when [`Backend::targets`] may have changed.
    fn changed(&self) -> BorrowedFd<'_>;

    /// Makes [`Backend::changed`] unreadable until the next change.
    fn clear_changed(&self);

    /// A socket that listens at `addr` and does not block.
    ///
    /// # Errors
    /// In words for the operator.
    fn listen(&self, addr: SocketAddr) -> Result<TcpListener, String>;

    /// Takes note of the addresses that cannot be listened at, and why.
    fn note_failures(&self, failures: &[(SocketAddr, String)]);

    /// Answers the request for `path` that came in for `target`, listened for at `at`.
    fn respond(&self, target: &Target, at: SocketAddr, path: &str) -> Response;
}

/// What clients may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Clients at a time.
    pub clients: usize,
    /// How long a request may take from the connection to the last byte of its answer.
    pub request: Duration,
    /// How long a client that was answered may take to close.
    pub linger: Duration,
    /// How long to wait before an address that could not be had is tried again.
    pub retry: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        let s = Duration::from_secs;
        Limits { clients: 128, request: s(5), linger: s(1), retry: s(1) }
    }
}

/// Serves until `stop` is set and [`Backend::changed`] is readable.
///
/// # Errors
/// The kernel refuses to poll.
pub fn serve(backend: &dyn Backend, limits: Limits, stop: &AtomicBool) -> io::Result<()> {
    let mut server =
        Server { backend, limits, ports: Ports::default(), clients: Vec::new(), accept_again: None };
    server.ports.follow(backend, Instant::now() + limits.retry);
    while !stop.load(Ordering::Acquire) {
        let ready = server.wait()?;
        server.turn(&ready, Instant::now());
    }
    Ok(())
}

struct Server<'b> {
    backend: &'b dyn Backend,
    limits: Limits,
    ports: Ports,
    /// In the order in which they came.
    clients: Vec<Client>,
    /// No descriptor was free: accept again at this time.
    accept_again: Option<Instant>,
}

/// What poll reported.
struct Ready {
    changed: bool,
    /// By port.
    ports: Vec<bool>,
    /// By client.
    clients: Vec<bool>,
}

impl Server<'_> {
    /// Waits until there is something to do.
    fn wait(&self) -> io::Result<Ready> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.backend.changed(), PollFlags::IN)];
        let accepting = if self.accept_again.is_none() { PollFlags::IN } else { PollFlags::empty() };
        fds.extend(self.ports.open.iter().map(|port| PollFd::new(&port.listener, accepting)));
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, client.interest())));
        let due = self.clients.iter().map(|client| client.gone_at);
        let due = due.chain(self.accept_again).chain(self.ports.retry_at).min();
        let timeout = due.map(|due| {
            // Rounded up: a millisecond late is better than a round of nothing.
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut happened = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            changed: happened.next().unwrap_or_default(),
            ports: happened.by_ref().take(self.ports.open.len()).collect(),
            clients: happened.collect(),
        })
    }

    /// Does everything that can be done without waiting.
    fn turn(&mut self, ready: &Ready, now: Instant) {
        for (client, ready) in self.clients.iter_mut().zip(&ready.clients) {
            if *ready {
                client.work(self.backend, self.limits, now);
            }
        }
        self.clients.retain(|client| !client.over && now < client.gone_at);
        self.accept_again = self.accept_again.filter(|again| now < *again);
        for index in (0..ready.ports.len()).filter(|index| ready.ports[*index]) {
            if self.accept_again.is_none() {
                self.accept(index, now);
            }
        }
        // Last, since the numbers of ports change.
        if ready.changed || self.ports.retry_at.is_some_and(|at| now >= at) {
            self.backend.clear_changed();
            self.ports.follow(self.backend, now + self.limits.retry);
        }
    }

    fn accept(&mut self, index: usize, now: Instant) {
        for _ in 0..ACCEPTS {
            let port = &self.ports.open[index];
            match accept_with(&port.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(stream) => {
                    if self.clients.len() >= self.limits.clients {
                        self.clients.remove(0);
                    }
                    let mut client = Client::new(stream.into(), port, now + self.limits.request);
                    // The request is mostly there already.
                    client.work(self.backend, self.limits, now);
                    if !client.over {
                        self.clients.push(client);
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.accept_again = Some(now + Duration::from_millis(100));
                    return;
                }
                // This client is gone already; the next one may be there.
                Err(_) => {}
            }
        }
    }
}

/// A port that is listened on.
struct Port {
    addr: SocketAddr,
    target: Target,
    listener: TcpListener,
}

/// Every port, and when to try again those that could not be had.
#[derive(Default)]
struct Ports {
    open: Vec<Port>,
    retry_at: Option<Instant>,
    /// What was noted last, so that it is noted once.
    failures: Vec<(SocketAddr, String)>,
}

impl Ports {
    /// Opens what is to be served and closes what is not any more.
    fn follow(&mut self, backend: &dyn Backend, retry_at: Instant) {
        let mut wanted = backend.targets();
        self.open.retain_mut(|port| match wanted.remove(&port.addr) {
            Some(target) => {
                port.target = target;
                true
            }
            None => false,
        });
        let mut failures = Vec::new();
        for (addr, target) in wanted {
            match backend.listen(addr) {
                Ok(listener) => self.open.push(Port { addr, target, listener }),
                Err(message) => failures.push((addr, message)),
            }
        }
        self.retry_at = (!failures.is_empty()).then_some(retry_at);
        if failures != self.failures {
            backend.note_failures(&failures);
            self.failures = failures;
        }
    }
}

/// One client.
struct Client {
    stream: TcpStream,
    /// Where it was listened for.
    at: SocketAddr,
    target: Target,
    request: Vec<u8>,
    /// The answer, once there is one.
    answer: Option<Vec<u8>>,
    sent: usize,
    /// Cut off at this time.
    gone_at: Instant,
    over: bool,
}

impl Client {
    fn new(stream: TcpStream, port: &Port, gone_at: Instant) -> Client {
        let (at, target) = (port.addr, port.target.clone());
        Client { stream, at, target, request: Vec::new(), answer: None, sent: 0, gone_at, over: false }
    }

    fn interest(&self) -> PollFlags {
        match &self.answer {
            Some(answer) if self.sent < answer.len() => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Reads, answers and writes as far as the client lets us.
    fn work(&mut self, backend: &dyn Backend, limits: Limits, now: Instant) {
        if self.answer.is_none() {
            self.read_request(backend);
        }
        let Some(answer) = &self.answer else { return };
        if self.sent == answer.len() {
            return self.drain();
        }
        while self.sent < answer.len() {
            match send(&self.stream, &answer[self.sent..], SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.over = true;
                    return;
                }
            }
        }
        // Closing with unread input would be a reset that takes the answer with it: wait a little for the client to close.
        self.over = self.stream.shutdown(Shutdown::Write).is_err();
        self.gone_at = self.gone_at.min(now + limits.linger);
        self.drain();
    }

    fn read_request(&mut self, backend: &dyn Backend) {
        let mut chunk = [0; REQUEST_BYTES];
        let room = REQUEST_BYTES - self.request.len();
        match rustix::io::read(&self.stream, &mut chunk[..room]) {
            Ok(0) => self.over = true,
            Ok(count) => {
                self.request.extend_from_slice(&chunk[..count]);
                let (response, head) = match parse(&self.request, REQUEST_BYTES) {
                    Parsed::Incomplete => return,
                    Parsed::Refused(response) => (response, false),
                    Parsed::Request { head, path } => (backend.respond(&self.target, self.at, &path), head),
                };
                self.answer = Some(response.to_bytes(head, wall_clock()));
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.over = true,
        }
    }

    /// Throws away what still comes, until the client closes.
    fn drain(&mut self) {
        let mut chunk = [0; REQUEST_BYTES];
        match rustix::io::read(&self.stream, &mut chunk) {
            Ok(1..) | Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(0) | Err(_) => self.over = true,
        }
    }
}

#[cfg(test)]
mod tests;
