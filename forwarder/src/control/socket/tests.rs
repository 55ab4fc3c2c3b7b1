use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::thread::{self, JoinHandle};

use config::control::VERSION;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

/// Counts commits and sums their operations; `get` dumps without end.
#[derive(Default)]
struct Fake {
    commits: AtomicUsize,
    operations: AtomicUsize,
    /// Compare-and-set is done on this generation.
    generation: Mutex<u64>,
    /// Tickets kept here are not answered.
    hold: Mutex<Option<Vec<Ticket>>>,
    /// What streams have to tell; without it they tell without end.
    news: Option<Arc<Mutex<Vec<Reply>>>>,
    /// Streams that there are.
    streams: Arc<AtomicUsize>,
}

struct News {
    news: Option<Arc<Mutex<Vec<Reply>>>>,
    stopped: bool,
    streams: Arc<AtomicUsize>,
}

impl Stream for News {
    fn next(&mut self) -> Event {
        let news = match &self.news {
            Some(news) => news.lock().unwrap().pop(),
            None => Some(Reply::End { count: 1 }),
        };
        match news {
            Some(reply) => Event::reply(reply),
            None if self.stopped => Event::Over,
            None => Event::Nothing,
        }
    }

    fn stop(&mut self) {
        self.stopped = true;
    }
}

impl Drop for News {
    fn drop(&mut self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Backend for Fake {
    fn hello(&self) -> Reply {
        Reply::Hello { version: VERSION, server: "s".into(), gateway: "g".into(), generation: 0 }
    }

    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Get(_) => {
                Answer::Dump(Box::new(std::iter::repeat_with(|| Some(Reply::End { count: 1 }))))
            }
            Request::Capture(_) => {
                let (news, streams) = (self.news.clone(), self.streams.clone());
                streams.fetch_add(1, Ordering::Relaxed);
                Answer::Stream(Box::new(News { news, stopped: false, streams }))
            }
            _ => Reply::Done.into(),
        }
    }

    fn commit(&self, transaction: Transaction, ticket: Ticket) {
        if let Some(held) = &mut *self.hold.lock().unwrap() {
            return held.push(ticket);
        }
        let mut generation = self.generation.lock().unwrap();
        if transaction.begin.expect_generation.is_some_and(|expected| expected != *generation) {
            return ticket.answer(Reply::End { count: *generation });
        }
        *generation += 1;
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.operations.fetch_add(transaction.operations.len(), Ordering::Relaxed);
        ticket.answer(Reply::Done);
    }
}

struct Server {
    dir: tempfile::TempDir,
    backend: Arc<Fake>,
    outbox: Arc<Outbox>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Server {
    fn start(limits: Limits, admission: Admission) -> Server {
        Server::with(Fake::default(), limits, admission)
    }

    fn with(backend: Fake, limits: Limits, admission: Admission) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let backend = Arc::new(backend);
        let outbox = Arc::new(Outbox::new().unwrap());
        let (b, o) = (backend.clone(), outbox.clone());
        let thread = thread::spawn(move || serve(&listener, admission, &limits, &*b, &o));
        Server { dir, backend, outbox, thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// A client that has said hello.
    fn client(&self) -> Talk {
        let mut talk = Talk(BufReader::new(self.connect()));
        talk.send(HELLO);
        assert!(matches!(talk.reply(), Some(Reply::Hello { .. })));
        talk
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.outbox.stop();
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

struct Talk(BufReader<UnixStream>);

impl Talk {
    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn reply(&mut self) -> Option<Reply> {
        let mut line = String::new();
        (self.0.read_line(&mut line).unwrap() > 0).then(|| Reply::from_line(line.as_bytes()).unwrap())
    }

    fn ask(&mut self, text: &str) -> Reply {
        self.send(text);
        self.reply().expect("an answer")
    }
}

const HELLO: &str = "{\"hello\":{\"version\":1,\"client\":\"test\"}}\n";
const APPLY: &str =
    "{\"apply\":{\"object\":{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"a\"}}}}\n";
const STATUS: &str = "\"status\"\n";

fn quick() -> Limits {
    let soon = Duration::from_millis(300);
    Limits { idle: soon, spare: soon, ..Limits::default() }
}

fn root_too() -> Admission {
    Admission::own(None)
}

/// Reads until the daemon closes; returns what came.
fn until_closed(mut stream: UnixStream) -> String {
    let mut text = Vec::new();
    // A reset is an end as well.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn clients_that_never_read_or_never_finish_hold_up_nobody_and_are_cut() {
    let server = Server::start(quick(), root_too());
    let mut lazy = Vec::new();
    for i in 0..100 {
        let mut stream = server.connect();
        let text = match i % 2 {
            0 => format!("{HELLO}{{\"get\":{{\"what\":\"services\"}}}}\n"),
            _ => format!("{HELLO}{{\"apply\":"),
        };
        stream.write_all(text.as_bytes()).unwrap();
        lazy.push(stream);
    }
    let mut honest = server.client();
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let start = Instant::now();
        assert_eq!(honest.ask(STATUS), Reply::Done);
        slowest = slowest.max(start.elapsed());
    }
    assert!(slowest < Duration::from_secs(2), "an honest client waited {slowest:?}");
    for (i, stream) in lazy.into_iter().enumerate() {
        if i % 2 == 1 {
            assert!(until_closed(stream).contains("unfinished"), "client {i}");
        } else {
            // Not reading until it has been cut; then what the kernel held comes, and the end.
            thread::sleep(Duration::from_millis(if i == 0 { 700 } else { 0 }));
            let text = until_closed(stream);
            assert!(text.len() < 2 << 20, "client {i} was sent {} bytes", text.len());
        }
    }
}

const CAPTURE: &str = "{\"capture\":{}}\n";

#[test]
fn a_stream_waits_for_news_as_long_as_it_takes_and_ends_with_its_client() {
    let news = Arc::new(Mutex::new(vec![]));
    let fake = Fake { news: Some(news.clone()), ..Fake::default() };
    let server = Server::with(fake, quick(), root_too());
    let mut talk = server.client();
    talk.send(CAPTURE);
    // Longer than a client may be idle otherwise.
    thread::sleep(Duration::from_millis(700));
    for count in 0..3 {
        news.lock().unwrap().push(Reply::End { count });
        assert_eq!(talk.reply(), Some(Reply::End { count }));
    }
    news.lock().unwrap().push(Reply::Done);
    talk.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!((talk.reply(), talk.reply()), (Some(Reply::Done), None), "what is left, then the end");

    let mut talk = server.client();
    talk.send(CAPTURE);
    assert_eq!(talk.ask(STATUS), Reply::Done, "a further request ends it");
    talk.send(CAPTURE);
    let streams = || server.backend.streams.load(Ordering::Relaxed);
    let start = Instant::now();
    while streams() != 1 && start.elapsed() < Duration::from_secs(20) {
        thread::yield_now();
    }
    assert_eq!(streams(), 1);
    drop(talk);
    while streams() != 0 && start.elapsed() < Duration::from_secs(20) {
        thread::yield_now();
    }
    assert_eq!(streams(), 0, "a client that is gone has no stream");
}

#[test]
fn streams_that_nobody_reads_are_ended_and_hold_up_nobody() {
    let server = Server::start(quick(), root_too());
    let mut lazy = Vec::new();
    for _ in 0..20 {
        let mut stream = server.connect();
        stream.write_all(format!("{HELLO}{CAPTURE}").as_bytes()).unwrap();
        lazy.push(stream);
    }
    let mut honest = server.client();
    let start = Instant::now();
    let mut slowest = Duration::ZERO;
    let streams = || server.backend.streams.load(Ordering::Relaxed);
    while start.elapsed() < Duration::from_millis(200) || streams() > 0 {
        let asked = Instant::now();
        assert_eq!(honest.ask(STATUS), Reply::Done);
        slowest = slowest.max(asked.elapsed());
        assert!(start.elapsed() < Duration::from_secs(20), "{} streams are left", streams());
    }
    assert!(slowest < Duration::from_secs(2), "an honest client waited {slowest:?}");
    for stream in lazy {
        assert!(until_closed(stream).len() < 2 << 20);
    }
}

#[test]
fn a_silent_stranger_is_cut() {
    let server = Server::start(quick(), root_too());
    assert!(until_closed(server.connect()).contains("no hello came"));
}

#[test]
fn killed_in_the_middle_of_a_request_leaves_nothing_1000_times() {
    let server = Server::start(Limits::default(), root_too());
    let whole = format!("{HELLO}{{\"begin\":{{}}}}\n{APPLY}{APPLY}{APPLY}\"commit\"\n");
    let mut complete = 0;
    for round in 0..1000 {
        let mut stream = server.connect();
        let cut = (round * 31) % (whole.len() + 1);
        stream.write_all(&whole.as_bytes()[..cut]).unwrap();
        if cut == whole.len() {
            complete += 1;
        }
        // Half of them die abruptly with unread input, half in good order.
        if round % 2 == 0 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            until_closed(stream);
        }
    }
    // Whoever comes after all of them is served after all of them... unless they are still being read.
    let start = Instant::now();
    while server.backend.commits.load(Ordering::Relaxed) < complete
        && start.elapsed() < Duration::from_secs(20)
    {
        assert_eq!(server.client().ask(STATUS), Reply::Done);
    }
    assert_eq!(server.backend.commits.load(Ordering::Relaxed), complete);
    assert_eq!(server.backend.operations.load(Ordering::Relaxed), 3 * complete);
    assert!(complete > 0);
}

#[test]
fn garbage_is_answered_and_closed_while_others_go_on() {
    let server = Server::start(Limits::default(), root_too());
    let mut honest = server.client();
    let deep = "[".repeat(100_000) + "\n";
    let long = "x".repeat(10 << 20);
    for bad in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\xff\xfe\0\n", b"\0\n", deep.as_bytes(), long.as_bytes()] {
        let mut stream = server.connect();
        let mut sender = stream.try_clone().unwrap();
        let bad = bad.to_vec();
        // The daemon may close before all of it is sent.
        let sending = thread::spawn(move || drop(sender.write_all(&bad)));
        let mut reader = BufReader::new(&mut stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(matches!(Reply::from_line(line.as_bytes()), Ok(Reply::Fault(_))), "{line}");
        line.clear();
        assert_eq!(reader.read_line(&mut line).unwrap_or(0), 0, "closed: {line}");
        drop(stream);
        sending.join().unwrap();
        assert_eq!(honest.ask(STATUS), Reply::Done);
    }
}

#[test]
fn ten_thousand_pipelined_requests_are_answered_in_order() {
    let server = Server::start(Limits::default(), root_too());
    let mut talk = server.client();
    let mut sender = talk.0.get_ref().try_clone().unwrap();
    let sending = thread::spawn(move || {
        for _ in 0..5_000 {
            sender.write_all(b"\"status\"\n\"commit\"\n").unwrap();
        }
    });
    for _ in 0..5_000 {
        assert_eq!(talk.reply(), Some(Reply::Done));
        assert!(matches!(talk.reply(), Some(Reply::Fault(_))));
    }
    sending.join().unwrap();
}

#[test]
fn descriptors_that_are_sent_along_are_closed() {
    let server = Server::start(Limits::default(), root_too());
    let mut talk = server.client();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let rights: Vec<_> = (0..100).map(|_| writer.as_fd()).collect();
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
    let line = [io::IoSlice::new(STATUS.as_bytes())];
    sendmsg(talk.0.get_ref(), &line, &mut control, SendFlags::empty()).unwrap();
    drop(writer);
    assert_eq!(talk.reply(), Some(Reply::Done));
    // With every copy of the writing end closed, the pipe is at its end.
    let mut fds = [PollFd::new(&reader, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
    assert!(fds[0].revents().contains(PollFlags::HUP), "a copy is still open");
}

#[test]
fn when_all_places_are_taken_the_most_silent_client_makes_room() {
    let server = Server::start(Limits { clients: 3, ..quick() }, root_too());
    let mut first = server.client();
    let mut others = [server.client(), server.client()];
    let mut late = Talk(BufReader::new(server.connect()));
    match late.reply() {
        Some(Reply::Fault(fault)) => assert!(fault.to_string().contains("max_clients"), "{fault}"),
        other => panic!("{other:?}"),
    }
    thread::sleep(Duration::from_millis(400));
    for other in &mut others {
        assert_eq!(other.ask(STATUS), Reply::Done);
    }
    let mut late = server.client();
    assert_eq!(late.ask(STATUS), Reply::Done);
    match first.reply() {
        Some(Reply::Fault(fault)) => assert!(fault.message.contains("made room"), "{fault}"),
        other => panic!("the first one was silent for longest: {other:?}"),
    }
    assert_eq!(first.reply(), None);
    for other in &mut others {
        assert_eq!(other.ask(STATUS), Reply::Done);
    }
}

#[test]
fn a_storm_of_connections_shuts_nobody_out() {
    let server = Server::start(Limits { clients: 3, ..Limits::default() }, root_too());
    let mut served = server.client();
    let silent: Vec<UnixStream> = (0..50).map(|_| server.connect()).collect();
    // As towpathctl does: again until the silent ones have had their time.
    let start = Instant::now();
    let mut late = loop {
        let mut late = Talk(BufReader::new(server.connect()));
        // It may have been answered and closed before this comes: the answer is there to be read all the same.
        let _ = late.0.get_mut().write_all(HELLO.as_bytes());
        match late.reply() {
            Some(Reply::Fault(_)) => thread::sleep(Duration::from_millis(10)),
            Some(_) => break late,
            None => panic!("closed without a word"),
        }
        assert!(start.elapsed() < Duration::from_secs(5), "never let in");
    };
    assert_eq!(late.ask(STATUS), Reply::Done);
    assert_eq!(served.ask(STATUS), Reply::Done, "who has said hello stays");
    drop(silent);
}

#[test]
fn who_does_not_read_makes_room() {
    let limits = Limits { clients: 1, spare: Duration::from_millis(100), ..Limits::default() };
    let server = Server::start(limits, root_too());
    let mut lazy = server.client();
    lazy.send("{\"get\":{\"what\":\"services\"}}\n");
    thread::sleep(Duration::from_millis(300));
    let mut late = server.client();
    assert_eq!(late.ask(STATUS), Reply::Done);
    drop(lazy);
}

#[test]
fn an_open_change_without_further_lines_is_cut() {
    let limits = Limits { idle_change: Duration::from_millis(200), ..Limits::default() };
    let server = Server::start(limits, root_too());
    let mut talk = server.client();
    talk.send(&format!("{{\"begin\":{{}}}}\n{APPLY}"));
    match talk.reply() {
        Some(Reply::Fault(fault)) => assert!(fault.message.contains("nothing of it took effect"), "{fault}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(server.backend.commits.load(Ordering::Relaxed), 0);
}

#[test]
fn a_slow_commit_holds_up_its_own_client_only() {
    let server = Server::start(quick(), root_too());
    *server.backend.hold.lock().unwrap() = Some(Vec::new());
    let mut slow = server.client();
    slow.send("{\"begin\":{}}\n\"commit\"\n\"status\"\n");
    let mut honest = server.client();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(600) {
        assert_eq!(honest.ask(STATUS), Reply::Done);
    }
    let tickets = server.backend.hold.lock().unwrap().take().unwrap();
    assert_eq!(tickets.len(), 1);
    // A daemon that stops drops its tickets, and each client hears of it.
    drop(tickets);
    assert!(matches!(slow.reply(), Some(Reply::Fault(_))));
    assert_eq!(slow.reply(), Some(Reply::Done), "the request behind the commit");
}

#[test]
fn two_writers_with_compare_and_set_never_both_win() {
    let server = Server::start(Limits::default(), root_too());
    let wins: usize = thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut talk = server.client();
                    let mut wins = 0;
                    for expected in 0..500 {
                        let begin = format!("{{\"begin\":{{\"expect_generation\":{expected}}}}}\n");
                        wins += usize::from(talk.ask(&(begin + APPLY + "\"commit\"\n")) == Reply::Done);
                        while *server.backend.generation.lock().unwrap() <= expected {
                            thread::yield_now();
                        }
                    }
                    wins
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    assert_eq!(wins, 500, "one winner a generation");
}

#[test]
fn other_users_get_a_refusal_and_not_a_byte_of_state() {
    use std::os::unix::fs::PermissionsExt;
    let nobody = 65534;
    let server = Server::start(Limits::default(), Admission { own_uid: 4242, group: None });
    let open = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    open(server.dir.path());
    open(&server.path());
    let path = server.path();
    // Credentials belong to a thread in Linux: this one becomes another user. Without root it is another user already.
    let text = thread::spawn(move || {
        if rustix::process::geteuid().is_root() {
            let uid = rustix::process::Uid::from_raw(nobody);
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        }
        let mut stream = UnixStream::connect(path).unwrap();
        // Writing may fail: the daemon closes without reading.
        let _ = stream.write_all(HELLO.as_bytes());
        until_closed(stream)
    })
    .join()
    .unwrap();
    match Reply::from_line(text.as_bytes()) {
        Ok(Reply::Fault(fault)) => assert_eq!(fault.code, Code::Forbidden),
        other => panic!("{other:?} from {text:?}"),
    }
}
