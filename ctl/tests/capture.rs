//! `towpathctl capture` against the daemon's own control threads, with a worker that captures what the test tells it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use config::capture::{CapturedPacket, Point};
use config::control::{Count, Item, Reply};
use config::gateway::Gateway;
use forwarder::addr::{Addr, Tuple, protocol};
use forwarder::capture::{Note, Record};
use forwarder::control::health::monotonic_ns;
use forwarder::control::publish::Publisher;
use forwarder::control::{Control, ControlParts, PortInfo, Steer};
use forwarder::explain::assumed_fib;
use forwarder::port::xsk::steer::{Contents, SteerChange};
use forwarder::table::flow_map::{Direction, FlowMap, FlowMapConfig};
use forwarder::verdict::{Reason, Verdict};

const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/cluster.yaml");
const HELLO: &str = "{\"hello\":{\"version\":1,\"client\":\"test\"}}\n";

/// Steering maps of no interface.
struct NoMaps;

impl Steer for NoMaps {
    fn contents(&self) -> Result<Contents, String> {
        Ok(Contents::default())
    }

    fn apply(&self, _: SteerChange) -> Result<(), String> {
        Ok(())
    }

    fn counters(&self) -> Vec<Count> {
        Vec::new()
    }
}

/// Packets that the worker has still to see: it does so once a capture runs.
type Traffic = Arc<Mutex<Vec<(Record, Vec<u8>)>>>;

struct Daemon {
    dir: tempfile::TempDir,
    publisher: Arc<Publisher>,
    control: Option<Control>,
    traffic: Traffic,
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Daemon {
    /// With the cluster of the manifests.
    fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let text = format!(
            "[gateway]\nname = 'gw-1'\nservice_cidrs = ['10.96.0.0/16', 'fd00:96::/112']\nreturn = 'routed'\n\
             [control]\nstate_dir = '{}'\n\
             [[port]]\nname = 'uplink'\ninterface = 'g0'\nrole = 'outside'\n\
             [[port]]\nname = 'fabric'\ninterface = 'g1'\nrole = 'inside'\n",
            state.display()
        );
        let gateway = Arc::new(Gateway::parse(&text, "gateway.toml").expect("a good gateway file"));
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let publisher = Publisher::new(1).unwrap();
        let empty = forwarder::tables::Tables {
            settings: Arc::new(forwarder::control::compile::settings(&gateway)),
            ..Default::default()
        };
        publisher.publish_fib(Arc::new(assumed_fib(&empty, &[], &[])));
        let map = || {
            Arc::new(FlowMap::anonymous(FlowMapConfig { capacity: 1024, workers: 2, ..Default::default() }))
        };
        let (flows, affinity) = (map(), map());
        let control = Control::start(ControlParts {
            gateway,
            listener,
            group: None,
            publisher: publisher.clone(),
            flow_worker: flows.worker(1),
            affinity_worker: affinity.worker(1),
            flows,
            affinity,
            steer: Arc::new(NoMaps),
            routes: Box::new(|_, _| {}),
            ports: vec![PortInfo::default(); 2],
            socket_counters: Box::new(|_| Default::default()),
            change_port: Box::new(|_| unreachable!("no port is changed here")),
            restarts: 0,
        })
        .unwrap();
        let (traffic, stop) = (Traffic::default(), Arc::new(AtomicBool::new(false)));
        let worker = start_worker(&publisher, traffic.clone(), stop.clone());
        let (control, worker) = (Some(control), Some(worker));
        let daemon = Daemon { dir, publisher, control, traffic, stop, worker };
        daemon.run(&["apply", "-f", CLUSTER]).assert().code(0);
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    fn run(&self, args: &[&str]) -> Command {
        let mut command = Command::cargo_bin("towpathctl").unwrap();
        command
            .env("TOWPATH_SOCKET", self.socket())
            .env("NO_COLOR", "1")
            .timeout(Duration::from_secs(60))
            .args(args);
        command
    }

    /// A capture that runs beside the test, once it says that it does.
    fn spawn(&self, args: &[&str]) -> Running {
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("towpathctl"))
            .env("TOWPATH_SOCKET", self.socket())
            .env("NO_COLOR", "1")
            .arg("capture")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        assert!(line.starts_with("capturing "), "{line}");
        Running { child, errors }
    }

    /// A conversation past its hello.
    fn connect(&self) -> Talk {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut talk = Talk(BufReader::new(stream));
        assert!(matches!(talk.ask(HELLO), Reply::Hello { .. }));
        talk
    }

    /// The worker sees this packet at `point`.
    fn pass(&self, point: Point, note: Note, bytes: &[u8]) {
        let port = u8::from(point == Point::PostNat);
        let len = bytes.len() as u32;
        let record = Record { note, time_ns: monotonic_ns(), generation: 1, point, port, len };
        self.traffic.lock().unwrap().push((record, bytes.to_vec()));
    }

    /// Stable id of the port `http` of `default/my-nginx`.
    fn my_nginx(&self) -> u64 {
        let tables = self.publisher.tables();
        let mut ports = tables.frontends.iter().map(|(_, frontend)| frontend.service.clone());
        ports.find(|port| port.name == "my-nginx" && port.port_name == "http").unwrap().stable_id
    }

    /// A request that is translated, and one that is dropped.
    fn pass_both(&self) {
        let note = Note {
            id: 7,
            before: tuple(protocol::TCP, "198.51.100.7", 4242, "203.0.113.10", 8080),
            after: tuple(protocol::TCP, "198.51.100.7", 4242, "10.244.1.7", 80),
            service: self.my_nginx(),
            endpoint: Some((addr("10.244.1.7"), 80)),
            flow: Some((Direction::Original, 1)),
            verdict: Verdict::Forward { port: 1 },
        };
        self.pass(Point::Rx, note, &frame([203, 0, 113, 10]));
        self.pass(Point::PostNat, note, &frame([10, 244, 1, 7]));
        let dropped = Note {
            id: 8,
            before: tuple(protocol::UDP, "198.51.100.7", 4242, "10.96.0.99", 53),
            verdict: Verdict::Drop(Reason::UnknownService),
            ..Note::default()
        };
        self.pass(Point::Drop, dropped, b"not even a frame");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.control.take());
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.worker.take().unwrap().join();
    }
}

fn start_worker(publisher: &Publisher, traffic: Traffic, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    let mut reader = publisher.reader(0);
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let (tables, _, captures) = reader.load();
            let generation = tables.generation;
            if !captures.0.is_empty() {
                for (record, bytes) in traffic.lock().unwrap().drain(..) {
                    for capture in
                        captures.0.iter().filter(|c| c.wants(record.point, record.port, &record.note))
                    {
                        let kept = &bytes[..bytes.len().min(capture.snaplen)];
                        capture.rings[0].push(&record.encode(), std::iter::once(kept));
                    }
                }
            }
            reader.link().set_in_force(generation);
            reader.link().beat(monotonic_ns());
            std::thread::sleep(Duration::from_millis(1));
        }
    })
}

/// A `towpathctl capture` that runs.
struct Running {
    child: Child,
    errors: BufReader<std::process::ChildStderr>,
}

impl Running {
    /// The next line that it prints.
    fn line(&mut self) -> String {
        // One byte at a time, so that nothing is read ahead.
        let mut line = Vec::new();
        let mut byte = [0];
        let stdout = self.child.stdout.as_mut().unwrap();
        while line.last() != Some(&b'\n') && stdout.read(&mut byte).unwrap() == 1 {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    fn interrupt(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }

    /// How it ends, and its last words.
    fn wait(mut self) -> (ExitStatus, String) {
        let mut words = String::new();
        self.errors.read_to_string(&mut words).unwrap();
        (self.child.wait().unwrap(), words)
    }
}

struct Talk(BufReader<UnixStream>);

impl Talk {
    fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }

    fn reply(&mut self) -> Reply {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        Reply::from_line(line.as_bytes()).unwrap_or_else(|fault| panic!("{fault}: {line:?}"))
    }

    fn ask(&mut self, line: &str) -> Reply {
        self.send(line);
        self.reply()
    }
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn tuple(protocol: u8, src: &str, src_port: u16, dst: &str, dst_port: u16) -> Tuple {
    Tuple { src: addr(src), dst: addr(dst), src_port, dst_port, protocol }
}

/// A SYN from 198.51.100.7:4242 to port 80.
fn frame(dst: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 198, 51, 100, 7]);
    frame.extend(dst);
    frame.extend([0x10, 0x92, 0, 80, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 2, 0xfa, 0xf0, 0, 0, 0, 0]);
    frame
}

/// Lines without their time.
fn timeless(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.split_once(' ').unwrap().1)).collect()
}

#[test]
fn lines_name_service_endpoint_generation_and_reason() {
    let daemon = Daemon::start();
    daemon.pass_both();
    let output = daemon.run(&["capture", "-c", "3"]).assert().code(0).get_output().clone();
    insta::assert_snapshot!(timeless(&String::from_utf8(output.stdout).unwrap()), @"
    uplink:rx    #7 tcp 198.51.100.7:4242 > 203.0.113.10:80 [S] seq 9 win 64240 length 0, default/my-nginx:http, endpoint 10.244.1.7:80, original, generation 1, forwarded
    fabric:tx    #7 tcp 198.51.100.7:4242 > 10.244.1.7:80 [S] seq 9 win 64240 length 0, default/my-nginx:http, endpoint 10.244.1.7:80, original, generation 1, forwarded
    uplink:drop  #8 ethertype 0x7261 length 16, generation 1, dropped: unknown_service
    ");
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "capturing rx, post-nat, drop of uplink, fabric, Ctrl-C ends it\n\
         3 captured, 0 not captured because the reader was slow\n"
    );
}

#[test]
fn filters_points_and_ports_are_the_daemon_s_to_apply() {
    let daemon = Daemon::start();
    for (args, lines) in [
        (&["service", "default/my-nginx"][..], 2),
        (&["service default/my-nginx:http and host 10.244.1.7"], 2),
        (&["--at", "post-nat,drop"], 2),
        (&["--at", "tx", "tcp port 80"], 1),
        (&["--port", "fabric"], 1),
        (&["reason", "unknown_service"], 1),
        (&["not", "drop", "and", "not", "host", "10.244.1.7"], 0),
    ] {
        let mut running = daemon.spawn(args);
        daemon.pass_both();
        let told: Vec<String> = (0..lines).map(|_| running.line()).collect();
        running.interrupt();
        assert_eq!(running.line(), "", "{args:?} after {told:?}");
        let (status, words) = running.wait();
        assert!(status.success(), "{args:?}: {words}");
        assert_eq!(
            words,
            format!("{lines} captured, 0 not captured because the reader was slow\n"),
            "{args:?}"
        );
    }
}

#[test]
fn json_is_an_object_a_line() {
    let daemon = Daemon::start();
    daemon.pass_both();
    let output = daemon
        .run(&["capture", "-c", "2", "-o", "json", "--snaplen", "20"])
        .assert()
        .code(0)
        .get_output()
        .clone();
    let text = String::from_utf8(output.stdout).unwrap();
    let packets: Vec<CapturedPacket> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [came, left] = &packets[..] else { panic!("{packets:?}") };
    assert_eq!((came.id, came.point, &*came.port), (7, Point::Rx, "uplink"));
    assert_eq!((left.id, left.point, &*left.port), (7, Point::PostNat, "fabric"));
    assert_eq!((came.len, &came.data[..]), (54, &frame([203, 0, 113, 10])[..20]));
    assert_eq!(came.before.as_deref(), Some("tcp 198.51.100.7:4242 > 203.0.113.10:8080"));
    assert_eq!(came.after.as_deref(), Some("tcp 198.51.100.7:4242 > 10.244.1.7:80"));
    assert_eq!(came.service.as_deref(), Some("default/my-nginx:http"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now.abs_diff(Duration::from_nanos(came.time_ns)) < Duration::from_secs(60));
}

#[test]
fn a_capture_file_grows_as_packets_come_and_is_whole_after_an_interruption() {
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("out.pcapng");
    let running = daemon.spawn(&["-w", file.to_str().unwrap(), "tcp or drop"]);
    daemon.pass_both();
    let start = Instant::now();
    let size = || std::fs::metadata(&file).map_or(0, |metadata| metadata.len());
    let header = size();
    while size() < header + 3 * 100 && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    running.interrupt();
    let (status, words) = running.wait();
    assert!(status.success(), "{words}");
    assert!(words.starts_with("3 captured, 0 not captured"), "{words}");
    let bytes = std::fs::read(&file).unwrap();
    let has = |text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    for text in [
        "uplink:rx",
        "fabric:tx",
        "uplink:drop",
        "\0tcp or drop",
        "packet=7 service=default/my-nginx:http endpoint=10.244.1.7:80 generation=1 flow=original",
        "packet=8 generation=1 verdict=drop reason=unknown_service",
    ] {
        assert!(has(text), "{text} is missing");
    }
    assert!(bytes.windows(54).any(|part| part == frame([10, 244, 1, 7])));
    // The same into a pipe.
    daemon.pass_both();
    let output = daemon.run(&["capture", "-w", "-", "-c", "1"]).assert().code(0).get_output().clone();
    assert_eq!(output.stdout[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
    daemon.run(&["capture", "-w", "/nowhere/file"]).assert().code(1);
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let daemon = Daemon::start();
    for (args, code, words) in [
        (&["tcp port http"][..], 2, "  tcp port http\n           ^^^^\n"),
        (&["reason", "because"], 2, "'because' is not the name of a reason"),
        (&["--at", "lunch"], 2, "not one of rx, post-nat (or tx), drop"),
        (&["--snaplen", "0"], 2, "65557"),
        (&["--count", "0"], 2, "0 is not in 1.."),
        (&["-w", "x", "-o", "json"], 2, "cannot be used with"),
        (
            &["service default/none"],
            1,
            "no Service of this name is served\n  value: default/none\n  remedy: see",
        ),
        (&["service default/my-nginx:gopher"], 1, "value: default/my-nginx:gopher"),
        (&["--port", "wifi"], 1, "value: wifi\n  remedy: the ports are uplink, fabric"),
    ] {
        let output = daemon.run(&[&["capture"], args].concat()).assert().code(code).get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(words) && output.stdout.is_empty(), "{args:?}: {said}");
    }
}

#[test]
fn there_are_eight_at_most_and_each_ends_with_its_client() {
    let daemon = Daemon::start();
    for _ in 0..3 {
        let mut talks: Vec<Talk> = (0..8).map(|_| daemon.connect()).collect();
        for talk in &mut talks {
            assert!(matches!(talk.ask("{\"capture\":{}}\n"), Reply::Capturing { .. }));
        }
        let output = daemon.run(&["capture"]).assert().code(1).get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("8 captures run already\n  remedy: end one"), "{said}");
        // Some end in order, the others are just gone.
        for talk in &mut talks[..4] {
            assert_eq!(talk.ask("\"status\"\n"), Reply::Captured { count: 0, missed: 0 });
        }
        drop(talks);
        let start = Instant::now();
        loop {
            let mut talk = daemon.connect();
            if matches!(talk.ask("{\"capture\":{\"count\":1}}\n"), Reply::Capturing { .. }) {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "places stay taken");
        }
    }
}

#[test]
fn what_a_slow_reader_misses_is_counted_to_the_packet() {
    const PACKETS: u64 = 500;
    let daemon = Daemon::start();
    let mut talk = daemon.connect();
    assert!(matches!(talk.ask("{\"capture\":{\"snaplen\":65557}}\n"), Reply::Capturing { .. }));
    let jumbo = vec![7; 60_000];
    for id in 1..=PACKETS {
        daemon.pass(Point::Rx, Note { id, ..Note::default() }, &jumbo);
    }
    let start = Instant::now();
    while !daemon.traffic.lock().unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
    talk.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    let (mut last, mut received) = (0, 0);
    let (count, missed) = loop {
        match talk.reply() {
            Reply::Item(Item::Packet(packet)) => {
                assert!(packet.id > last && packet.data == jumbo, "in order and whole");
                last = packet.id;
                received += 1;
            }
            Reply::Captured { count, missed } => break (count, missed),
            other => panic!("{other:?}"),
        }
    };
    println!("{count} captured, {missed} missed");
    assert_eq!((received, count + missed), (count, PACKETS));
    assert!(missed > 0, "30 MB do not fit the ring and the socket");
}

#[test]
fn a_service_may_gain_a_port_while_it_is_captured() {
    let daemon = Daemon::start();
    let mut talk = daemon.connect();
    let capture = "{\"capture\":{\"filter\":\"service default/late\"}}\n";
    assert!(matches!(talk.ask(capture), Reply::Fault(_)), "it is not there yet");
    let service = |ports: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: late}}\n\
             spec: {{clusterIP: 10.96.1.1, clusterIPs: [10.96.1.1], ports: [{ports}]}}\n"
        )
    };
    let apply = |ports: &str| {
        daemon.run(&["apply", "-f", "-"]).write_stdin(service(ports)).assert().code(0);
    };
    apply("{name: a, port: 80}");
    assert!(matches!(talk.ask(capture), Reply::Capturing { .. }));
    apply("{name: a, port: 80}, {name: b, port: 81}");
    let tables = daemon.publisher.tables();
    let late = tables.frontends.iter().find(|(_, frontend)| frontend.service.port_name == "b").unwrap().1;
    let start = Instant::now();
    let note = Note { id: 1, service: late.service.stable_id, ..Note::default() };
    talk.0.get_ref().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut line = String::new();
    while talk.0.read_line(&mut line).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "packets of the new port are not captured");
        daemon.pass(Point::Rx, note, b"packet");
    }
    match Reply::from_line(line.as_bytes()) {
        Ok(Reply::Item(Item::Packet(packet))) => {
            assert_eq!(packet.service.as_deref(), Some("default/late:b"))
        }
        other => panic!("{other:?}"),
    }
}
