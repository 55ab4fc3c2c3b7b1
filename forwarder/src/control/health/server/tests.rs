use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, mpsc};

use config::control::Kind;
use rustix::event::{EventfdFlags, eventfd};

use super::super::http::{JSON, Status};
use super::*;
use crate::keeper::sandbox::restrict_health;

/// Serves "TARGET PATH", with a long body for `/long`.
struct Fake {
    targets: Mutex<BTreeMap<SocketAddr, Target>>,
    failures: Mutex<Vec<(SocketAddr, String)>>,
    changed: OwnedFd,
    opener: Mutex<mpsc::Sender<Wish>>,
}

/// An address to be listened at, and where the socket goes.
type Wish = (SocketAddr, mpsc::Sender<Result<TcpListener, String>>);

/// Opens sockets, as the keeper does, for a server that may open none.
fn opener() -> mpsc::Sender<Wish> {
    let (sender, wishes) = mpsc::channel::<Wish>();
    std::thread::spawn(move || {
        for (addr, answer) in wishes {
            let listener = TcpListener::bind(addr).map_err(|error| error.kind().to_string());
            if let Ok(listener) = &listener {
                listener.set_nonblocking(true).unwrap();
            }
            answer.send(listener).unwrap();
        }
    });
    sender
}

impl Backend for Fake {
    fn targets(&self) -> BTreeMap<SocketAddr, Target> {
        self.targets.lock().unwrap().clone()
    }

    fn changed(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    fn clear_changed(&self) {
        let _ = rustix::io::read(&self.changed, &mut [0; 8]);
    }

    fn listen(&self, addr: SocketAddr) -> Result<TcpListener, String> {
        let (sender, answer) = mpsc::channel();
        self.opener.lock().unwrap().send((addr, sender)).unwrap();
        answer.recv().unwrap()
    }

    fn note_failures(&self, failures: &[(SocketAddr, String)]) {
        *self.failures.lock().unwrap() = failures.to_vec();
    }

    fn respond(&self, target: &Target, at: SocketAddr, path: &str) -> Response {
        let name = match target {
            Target::Gateway => "gateway",
            Target::Service(service) => &service.name,
        };
        let body = match path {
            "/long" => "x".repeat(8 << 20),
            _ => format!("{name} {path} at {}", at.port()),
        };
        Response::new(Status::OK, JSON, body)
    }
}

/// A server on a thread of its own.
struct Rig {
    fake: Arc<Fake>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Rig {
    fn new(limits: Limits) -> (Rig, SocketAddr) {
        let addr = free();
        let fake = Arc::new(Fake {
            targets: Mutex::new([(addr, Target::Gateway)].into()),
            failures: Mutex::default(),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            opener: Mutex::new(opener()),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let (serving, stopping) = (fake.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            // With no more system calls than in the data plane.
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict_health().unwrap();
            serve(&*serving, limits, &stopping).unwrap();
        });
        let rig = Rig { fake, stop, thread: Some(thread) };
        rig.eventually("it listens", || TcpStream::connect(addr).is_ok());
        (rig, addr)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<SocketAddr, Target>)) {
        change(&mut self.fake.targets.lock().unwrap());
        rustix::io::write(&self.fake.changed, &1u64.to_ne_bytes()).unwrap();
    }

    #[track_caller]
    fn eventually(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.change(|_| {});
        self.thread.take().unwrap().join().unwrap();
    }
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn service(name: &str) -> Target {
    let (kind, namespace, name) = (Kind::Service, "shop".into(), name.into());
    Target::Service(Arc::new(ObjectRef { kind, namespace, name }))
}

fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// The body of the answer to a GET.
fn get(addr: SocketAddr, path: &str) -> String {
    let mut stream = connect(addr);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}")).1.to_owned()
}

#[test]
fn ports_come_and_go_and_change_their_meaning() {
    let (rig, first) = Rig::new(Limits::default());
    assert_eq!(get(first, "/healthz"), format!("gateway /healthz at {}", first.port()));
    let second = free();
    rig.change(|targets| drop(targets.insert(second, service("web"))));
    rig.eventually("the second port is served", || TcpStream::connect(second).is_ok());
    assert_eq!(get(second, "/x?y"), format!("web /x at {}", second.port()));
    let kept = connect(first);
    rig.change(|targets| {
        targets.insert(first, service("api"));
        targets.remove(&second);
    });
    rig.eventually("the second port is closed", || TcpStream::connect(second).is_err());
    assert_eq!(get(first, "/"), format!("api / at {}", first.port()));
    drop(kept);
}

#[test]
fn a_port_that_is_taken_is_noted_and_had_as_soon_as_it_is_free() {
    let limits = Limits { retry: Duration::from_millis(20), ..Limits::default() };
    let (rig, first) = Rig::new(limits);
    let squatter = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = squatter.local_addr().unwrap();
    rig.change(|targets| drop(targets.insert(taken, service("web"))));
    rig.eventually("the failure is noted", || rig.fake.failures.lock().unwrap().len() == 1);
    assert_eq!(rig.fake.failures.lock().unwrap()[0].0, taken);
    assert!(get(first, "/").starts_with("gateway"), "the others are served meanwhile");
    drop(squatter);
    rig.eventually("the failure is mended", || rig.fake.failures.lock().unwrap().is_empty());
    assert!(get(taken, "/").starts_with("web"));
}

#[test]
fn slow_clients_are_cut_off_and_hold_up_nobody() {
    let limits = Limits { request: Duration::from_millis(600), ..Limits::default() };
    let (_rig, addr) = Rig::new(limits);
    let start = Instant::now();
    // One that sends nothing, one that drips, and one that does not read.
    let silent = connect(addr);
    let mut dripping = connect(addr);
    let mut deaf = connect(addr);
    write!(deaf, "GET /long HTTP/1.1\r\n\r\n").unwrap();
    let mut cut = false;
    while start.elapsed() < Duration::from_secs(20) && !cut {
        let asked = Instant::now();
        assert!(get(addr, "/healthz").starts_with("gateway"));
        assert!(asked.elapsed() < Duration::from_secs(10), "held up for {:?}", asked.elapsed());
        cut = write!(dripping, "G").is_err();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(cut, "one byte at a time is not enough to stay");
    for mut stream in [silent, deaf] {
        let mut rest = Vec::new();
        // An end or a reset, but no time-out: `connect` waits 20 s.
        let end = stream.read_to_end(&mut rest);
        assert!(end.is_ok() || end.unwrap_err().kind() == io::ErrorKind::ConnectionReset);
        assert!(rest.len() < 8 << 20, "not all of what it did not read in time");
    }
}

#[test]
fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let limits = Limits { clients: 8, request: Duration::from_secs(60), ..Limits::default() };
    let (_rig, addr) = Rig::new(limits);
    let crowd: Vec<TcpStream> = (0..40).map(|_| connect(addr)).collect();
    assert!(get(addr, "/healthz").starts_with("gateway"));
    // Those who came first made room.
    let mut first = &crowd[0];
    assert!(matches!(first.read(&mut [0; 8]), Ok(0) | Err(_)));
    drop(crowd);
}

#[test]
fn answers_arrive_whole_whatever_else_was_sent() {
    let (_rig, addr) = Rig::new(Limits::default());
    let mut stream = connect(addr);
    // More than is read of a request: closing at once would reset the connection before the answer is read.
    stream.write_all(&[b"POST / HTTP/1.1\r\n\r\n".to_vec(), vec![b'x'; 3_000]].concat()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.ends_with("use GET or HEAD\n"), "{answer}");
    assert_eq!(get(addr, "/long").len(), 8 << 20);
    let mut stream = connect(addr);
    stream.write_all(b"HEAD /long HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("Content-Length: 8388608\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
}
