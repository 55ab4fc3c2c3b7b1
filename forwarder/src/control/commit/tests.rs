//! The whole of control over a real socket: objects in, tables, steering and files out.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use config::control::{Count, Item, Request};
use config::gateway::Gateway;

use super::super::publish::Publisher;
use super::super::{Control, ControlParts};
use super::*;
use crate::addr::{Tuple, protocol};
use crate::control::PortInfo;
use crate::port::xsk::steer::{Contents, SteerChange};
use crate::stage::flow::Phase;
use crate::table::flow_map::{FlowMap, FlowMapConfig, NewFlow};
use crate::tables::{Action, FrontendKey};

mod health;

/// Steering maps in memory with room for so many addresses.
#[derive(Default)]
struct Maps {
    contents: Contents,
    room: Option<usize>,
    /// What was applied, in order.
    changes: Vec<SteerChange>,
}

#[derive(Clone, Default)]
struct FakeSteer(Arc<Mutex<Maps>>);

impl Steer for FakeSteer {
    fn contents(&self) -> Result<Contents, String> {
        Ok(self.0.lock().unwrap().contents.clone())
    }

    fn apply(&self, change: SteerChange) -> Result<(), String> {
        let mut maps = self.0.lock().unwrap();
        // One by one, as the kernel does it: a map that is full stays half changed.
        for entry in change.clone().split(1) {
            maps.contents.apply(&entry);
            if maps.room.is_some_and(|room| maps.contents.addresses.len() > room) {
                return Err("map addresses is full; raise [steering] addresses".to_owned());
            }
        }
        maps.changes.push(change);
        Ok(())
    }

    fn counters(&self) -> Vec<Count> {
        Vec::new()
    }
}

impl FakeSteer {
    fn has(&self, addr: &str) -> bool {
        self.0.lock().unwrap().contents.addresses.contains_key(&addr.parse::<IpAddr>().unwrap())
    }
}

/// A control with one worker that follows at once, unless it is told to stand still.
struct Rig {
    path: std::path::PathBuf,
    publisher: Arc<Publisher>,
    flows: Arc<FlowMap>,
    steer: FakeSteer,
    stand_still: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    worker: Option<std::thread::JoinHandle<()>>,
    control: Option<Control>,
}

impl Rig {
    fn start(dir: &Path) -> Rig {
        Rig::with(dir, FakeSteer::default())
    }

    fn with(dir: &Path, steer: FakeSteer) -> Rig {
        let text = format!(
            "[gateway]
             name = 'gw'
             cluster_cidrs = ['10.244.0.0/16']
             service_cidrs = ['10.96.0.0/16']
             return = 'routed'
             [control]
             state_dir = '{}'
             [[port]]
             name = 'uplink'
             interface = 'g0'
             role = 'outside'
             [[port]]
             name = 'fabric'
             interface = 'g1'
             role = 'inside'",
            dir.join("state").display()
        );
        let gateway = Arc::new(Gateway::parse(&text, "test.toml").expect("a good gateway file"));
        std::fs::create_dir_all(dir.join("state")).unwrap();
        let path = dir.join("control.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let publisher = Publisher::new(1).unwrap();
        let map = || {
            Arc::new(FlowMap::anonymous(FlowMapConfig { capacity: 8192, workers: 2, ..Default::default() }))
        };
        let (flows, affinity) = (map(), map());
        let control = Control::start(ControlParts {
            gateway,
            listener,
            group: None,
            publisher: publisher.clone(),
            flow_worker: flows.worker(1),
            affinity_worker: affinity.worker(1),
            flows: flows.clone(),
            affinity,
            steer: Arc::new(steer.clone()),
            routes: Box::new(|_, _| {}),
            ports: vec![PortInfo { mode: "copy".into(), queues: 1, partial_checksums: true }; 2],
            socket_counters: Box::new(|_| Default::default()),
            change_port: Box::new(|_| unreachable!("no port is changed here")),
            restarts: 0,
        })
        .unwrap();
        let (stand_still, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut reader = publisher.reader(0);
        let (still, stopping) = (stand_still.clone(), stop.clone());
        let worker = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                if !still.load(Ordering::Relaxed) {
                    let generation = reader.load().0.generation;
                    reader.link().set_in_force(generation);
                    reader.link().beat(monotonic_ns());
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let (worker, control) = (Some(worker), Some(control));
        Rig { path, publisher, flows, steer, stand_still, stop, worker, control }
    }

    fn connect(&self) -> Talk {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut talk = Talk(BufReader::new(stream));
        assert!(matches!(talk.ask("{\"hello\":{\"version\":1,\"client\":\"t\"}}"), Reply::Hello { .. }));
        talk
    }

    /// True once `condition` holds; gives up after 20 s.
    fn eventually(&self, condition: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        while !condition() && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        condition()
    }

    fn endpoint(&self, vip: &str, port: u16, protocol: u8) -> Option<String> {
        let key = FrontendKey { addr: vip.parse::<IpAddr>().unwrap().into(), port, protocol };
        match &self.publisher.tables().frontends.get(&key)?.from_pod {
            Action::Dnat { backends, .. } => Some(backends.endpoints[0].addr.to_string()),
            other => Some(format!("{other:?}")),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.control.take());
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.worker.take().unwrap().join();
    }
}

struct Talk(BufReader<UnixStream>);

impl Talk {
    fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
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

    fn change(&mut self, begin: &str, operations: &[String]) -> Reply {
        self.send(&format!("{{\"begin\":{begin}}}"));
        for operation in operations {
            self.send(operation);
        }
        self.ask("\"commit\"")
    }

    fn apply(&mut self, operations: &[String]) -> Committed {
        match self.change("{}", operations) {
            Reply::Committed(committed) => committed,
            other => panic!("{other:?}"),
        }
    }

    fn list(&mut self, line: &str) -> Vec<Item> {
        self.send(line);
        let mut items = Vec::new();
        loop {
            match self.reply() {
                Reply::Item(item) => items.push(item),
                Reply::End { count } => {
                    assert_eq!(count, items.len() as u64);
                    return items;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn apply(object: &str) -> String {
    format!("{{\"apply\":{{\"source\":{{\"file\":\"t.yaml\",\"document\":1}},\"object\":{object}}}}}")
}

fn service(name: &str, ip: &str) -> String {
    apply(&format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"{name}\",\"namespace\":\"default\"}},\
         \"spec\":{{\"clusterIP\":\"{ip}\",\"clusterIPs\":[\"{ip}\"],\"ports\":[\
         {{\"name\":\"t\",\"port\":80,\"protocol\":\"TCP\"}},{{\"name\":\"u\",\"port\":53,\"protocol\":\"UDP\"}}]}}}}"
    ))
}

fn slice(service: &str, address: &str) -> String {
    apply(&format!(
        "{{\"apiVersion\":\"discovery.k8s.io/v1\",\"kind\":\"EndpointSlice\",\"addressType\":\"IPv4\",\
         \"metadata\":{{\"name\":\"{service}-1\",\"namespace\":\"default\",\
         \"labels\":{{\"kubernetes.io/service-name\":\"{service}\"}}}},\
         \"endpoints\":[{{\"addresses\":[\"{address}\"],\"conditions\":{{\"ready\":true}}}}],\
         \"ports\":[{{\"name\":\"t\",\"port\":8080,\"protocol\":\"TCP\"}},{{\"name\":\"u\",\"port\":5353,\"protocol\":\"UDP\"}}]}}"
    ))
}

fn delete(kind: &str, name: &str) -> String {
    format!(
        "{{\"delete\":{{\"object\":{{\"kind\":\"{kind}\",\"namespace\":\"default\",\"name\":\"{name}\"}}}}}}"
    )
}

#[test]
fn a_change_is_in_force_when_it_is_answered_and_survives_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let generation;
    {
        let rig = Rig::start(dir.path());
        let mut talk = rig.connect();
        let committed = talk.apply(&[service("web", "10.96.0.1"), slice("web", "10.244.1.7")]);
        assert_eq!((committed.workers_in_force, committed.workers), (1, 1));
        assert_eq!(committed.changes.len(), 2);
        assert!(committed.changes.iter().all(|change| change.outcome == Outcome::Created));
        assert_eq!(rig.endpoint("10.96.0.1", 80, protocol::TCP).as_deref(), Some("10.244.1.7"));
        assert!(rig.steer.has("10.96.0.1"));
        let again = talk.apply(&[service("web", "10.96.0.1")]);
        assert_eq!(again.generation, committed.generation, "nothing changed");
        assert_eq!(again.changes[0].outcome, Outcome::Unchanged);
        talk.apply(&[slice("web", "10.244.1.8")]);
        generation = rig.publisher.tables().generation;
        assert_eq!(generation, committed.generation + 1);
    }
    for _ in 0..3 {
        let rig = Rig::start(dir.path());
        assert_eq!(rig.publisher.tables().generation, generation);
        assert_eq!(rig.endpoint("10.96.0.1", 80, protocol::TCP).as_deref(), Some("10.244.1.8"));
        assert!(rig.steer.has("10.96.0.1"));
    }
    // The last change is cut short on disk, as by a crash of the machine: the one before it is in force.
    let journal = std::fs::read_dir(dir.path().join("state"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "journal"))
        .max()
        .unwrap();
    let bytes = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, &bytes[..bytes.len() - 5]).unwrap();
    let rig = Rig::start(dir.path());
    assert_eq!(rig.endpoint("10.96.0.1", 80, protocol::TCP).as_deref(), Some("10.244.1.7"));
    match rig.connect().ask("\"status\"") {
        Reply::Status(status) => assert!(status.problems.iter().any(|p| p.message.contains("cut short"))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_bad_object_refuses_the_whole_change_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    let before = talk.apply(&[service("web", "10.96.0.1")]).generation;
    let bad = apply(
        "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"bad\"},\"spec\":{\"ports\":[{\"port\":70000}]}}",
    );
    let untyped = apply(
        "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"odd\"},\"spec\":{\"ports\":7}}",
    );
    let rival = service("rival", "10.96.0.1");
    for (culprit, name) in [(bad, "bad"), (untyped, "odd"), (rival, "rival")] {
        match talk.change("{}", &[service("good", "10.96.0.9"), culprit]) {
            Reply::Refused { faults, .. } => {
                let text = faults[0].to_string();
                assert!(text.contains(name) && text.contains("t.yaml"), "{text}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(rig.publisher.tables().generation, before);
        assert!(rig.endpoint("10.96.0.9", 80, protocol::TCP).is_none());
        assert!(!rig.steer.has("10.96.0.9"));
    }
    assert_eq!(talk.list("{\"get\":{\"what\":\"all\"}}").len(), 1);
}

#[test]
fn dry_runs_prunes_deletes_and_unknown_kinds() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    let deployment =
        apply("{\"apiVersion\":\"apps/v1\",\"kind\":\"Deployment\",\"metadata\":{\"name\":\"d\"}}");
    let committed = talk.apply(&[service("a", "10.96.0.1"), deployment, service("b", "10.96.0.2")]);
    assert!(committed.warnings.iter().any(|w| w.code == Code::SkippedKind), "{:?}", committed.warnings);
    let generation = committed.generation;

    match talk.change("{\"dry_run\":true,\"prune\":true}", &[service("a", "10.96.0.1")]) {
        Reply::Committed(dry) => {
            assert!(dry.dry_run && dry.generation == generation);
            assert!(dry.changes.iter().any(|c| c.outcome == Outcome::Pruned && c.object.name == "b"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(rig.publisher.tables().generation, generation);
    match talk.change("{\"prune\":true}", &[]) {
        Reply::Refused { .. } => {}
        other => panic!("pruning everything: {other:?}"),
    }
    assert!(matches!(talk.change("{\"prune\":true}", &[service("a", "10.96.0.1")]), Reply::Committed(_)));
    assert!(rig.endpoint("10.96.0.2", 80, protocol::TCP).is_none());
    assert!(rig.eventually(|| !rig.steer.has("10.96.0.2")), "the steering maps shrink after the publish");
    talk.apply(&[delete("Service", "a")]);
    assert_eq!(rig.publisher.tables().frontends.len(), 0);
    match talk.change("{}", &[delete("Service", "a")]) {
        Reply::Refused { faults, .. } => assert_eq!(faults[0].code, Code::NotFound),
        other => panic!("{other:?}"),
    }
}

#[test]
fn steering_grows_before_a_publish_and_shrinks_when_every_worker_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    talk.apply(&[service("web", "10.96.0.1")]);
    rig.stand_still.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(5));
    let committed = talk.apply(&[delete("Service", "web"), service("new", "10.96.0.2")]);
    assert_eq!(
        (committed.workers_in_force, committed.workers),
        (0, 1),
        "answered all the same, after a second"
    );
    assert!(rig.steer.has("10.96.0.1"), "the worker still has the old tables");
    assert!(rig.steer.has("10.96.0.2"));
    rig.stand_still.store(false, Ordering::Relaxed);
    assert!(rig.eventually(|| !rig.steer.has("10.96.0.1")));
    assert!(rig.steer.has("10.96.0.2"));
}

#[test]
fn full_steering_maps_refuse_the_change_and_keep_what_was() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    let generation = talk.apply(&[service("a", "10.96.0.1")]).generation;
    rig.steer.0.lock().unwrap().room = Some(2);
    match talk.change("{}", &[service("b", "10.96.0.2"), service("c", "10.96.0.3")]) {
        Reply::Refused { faults, .. } => assert!(faults[0].message.contains("raise"), "{}", faults[0]),
        other => panic!("{other:?}"),
    }
    assert_eq!(rig.publisher.tables().generation, generation);
    assert!(rig.steer.has("10.96.0.1") && !rig.steer.has("10.96.0.2") && !rig.steer.has("10.96.0.3"));
    assert_eq!(talk.list("{\"get\":{\"what\":\"all\"}}").len(), 1);
    let committed = talk.apply(&[service("b", "10.96.0.2")]);
    assert_eq!(committed.generation, generation + 1);
    assert_eq!(rig.publisher.tables().frontends.len(), 4);
    drop(talk);
    drop(rig);
    let rig = Rig::start(dir.path());
    assert_eq!(rig.publisher.tables().frontends.len(), 4, "the refused change is not in the journal");
}

#[test]
fn a_directory_that_cannot_be_written_refuses_changes_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    // Not even root can create a file there.
    std::os::unix::fs::symlink("/proc/self/ns", &state).unwrap();
    let rig = Rig::start(dir.path());
    let generation = rig.publisher.tables().generation;
    let mut talk = rig.connect();
    for _ in 0..2 {
        match talk.change("{}", &[service("a", "10.96.0.1")]) {
            Reply::Refused { faults, .. } => {
                assert_eq!(faults[0].code, Code::Storage);
                assert!(faults[0].message.contains("objects-0000000001.journal"), "{}", faults[0]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(rig.publisher.tables().generation, generation);
        assert!(!rig.steer.has("10.96.0.1"));
    }
    let Reply::Status(status) = talk.ask("\"status\"") else { panic!("no status") };
    // On a busy machine a worker may be late as well.
    let of_storage = status.problems.iter().filter(|problem| problem.code == Code::Storage);
    assert_eq!(of_storage.count(), 1, "{:?}", status.problems);
    std::fs::remove_file(&state).unwrap();
    std::fs::create_dir(&state).unwrap();
    talk.apply(&[service("a", "10.96.0.1")]);
    drop(talk);
    drop(rig);
    let rig = Rig::start(dir.path());
    assert!(rig.steer.has("10.96.0.1"));
}

#[test]
fn a_damaged_journal_is_set_aside_and_what_came_before_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    for name in ["a", "b", "c"] {
        talk.apply(&[service(name, &format!("10.96.0.{}", name.as_bytes()[0]))]);
    }
    drop(talk);
    drop(rig);
    let journal = dir.path().join("state/objects-0000000001.journal");
    let text = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, text.replacen("10.96.0.98", "10.96.0.99", 1)).unwrap();
    let rig = Rig::start(dir.path());
    assert!(rig.steer.has("10.96.0.97") && !rig.steer.has("10.96.0.98") && !rig.steer.has("10.96.0.99"));
    match rig.connect().ask("\"status\"") {
        Reply::Status(status) => {
            let text = status.problems[0].to_string();
            assert!(text.contains("checksum") && text.contains(".bad"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn changes_that_come_together_share_a_generation_and_compare_and_set_sees_it() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let start = rig.publisher.tables().generation;
    const ROUNDS: usize = 100;
    let (mut won, mut lost) = (0, 0);
    let results: Vec<(usize, usize)> = std::thread::scope(|scope| {
        let writer = |w: usize| {
            let rig = &rig;
            scope.spawn(move || {
                let mut talk = rig.connect();
                let (mut won, mut lost) = (0, 0);
                for round in 0..ROUNDS {
                    let expected = rig.publisher.tables().generation;
                    let address = format!("10.244.{w}.{}", round + 1);
                    let begin = format!("{{\"expect_generation\":{expected}}}");
                    match talk.change(&begin, &[slice("web", &address)]) {
                        Reply::Committed(committed) => {
                            assert_eq!(committed.generation, expected + 1, "nobody was in between");
                            won += 1;
                        }
                        Reply::Refused { faults, .. } => {
                            assert_eq!(faults[0].code, Code::Generation);
                            lost += 1;
                        }
                        other => panic!("{other:?}"),
                    }
                }
                (won, lost)
            })
        };
        [writer(1), writer(2)].map(|writer| writer.join().unwrap()).to_vec()
    });
    for (w, l) in results {
        won += w;
        lost += l;
    }
    assert_eq!(won + lost, 2 * ROUNDS);
    assert_eq!(rig.publisher.tables().generation, start + won as u64, "each winner has its generation");
}

/// Rules 9.2, 9.4.
#[test]
fn udp_flows_to_an_endpoint_that_is_gone_are_forgotten_and_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    talk.apply(&[service("web", "10.96.0.1"), slice("web", "10.244.1.7")]);
    let mut worker = rig.flows.worker(0);
    let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
    for (protocol, port) in [(protocol::UDP, 53), (protocol::TCP, 80)] {
        let original = Tuple {
            src: addr("198.51.100.1"),
            dst: addr("10.96.0.1"),
            src_port: 4000,
            dst_port: port,
            protocol,
        };
        let reply = Tuple { src: addr("10.244.1.7"), src_port: 5353, ..original.reversed() };
        let flow = NewFlow {
            original,
            reply: Some(reply),
            phase: Phase::Udp as u8,
            timeout_s: 0,
            service: 1,
            endpoint_addr: reply.src,
            endpoint_port: reply.src_port,
            generation: 1,
            flags: 0,
            tally: 0,
        };
        rig.flows.insert(&mut worker, &flow, 1).unwrap();
    }
    assert_eq!(rig.flows.len(), 2);
    talk.apply(&[slice("web", "10.244.1.8")]);
    assert!(rig.eventually(|| rig.flows.len() == 1), "{} flows", rig.flows.len());
    let rows = talk.list("{\"flows\":{}}");
    assert!(matches!(&rows[..], [Item::Flow(row)] if row.protocol == "tcp"), "{rows:?}");
    assert_eq!(talk.ask("{\"flush_flows\":{}}"), Reply::FlowCount { count: 1 });
    assert_eq!(talk.ask("{\"count_flows\":{}}"), Reply::FlowCount { count: 0 });
}

/// Rule 9.7.
#[test]
fn flows_of_an_endpoint_that_is_gone_are_reset_where_the_service_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    let annotated = |name: &str, ip: &str, annotation: &str| {
        let named = format!("\"name\":\"{name}\",\"namespace\"");
        let with =
            format!("\"name\":\"{name}\",\"annotations\":{{\"towpath.dev/{annotation}}},\"namespace\"");
        service(name, ip).replacen(&named, &with, 1)
    };
    let services = [
        annotated("reset", "10.96.0.1", "on-endpoint-removed\":\"reset\""),
        annotated("drain", "10.96.0.2", "drain-seconds\":\"1\""),
        service("leave", "10.96.0.3"),
    ];
    let slices = |address| ["reset", "drain", "leave"].map(|name| slice(name, address));
    talk.apply(&[&services[..], &slices("10.244.1.7")].concat());
    let mut worker = rig.flows.worker(0);
    let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
    for (index, vip) in ["10.96.0.1", "10.96.0.2", "10.96.0.3"].into_iter().enumerate() {
        let key = FrontendKey { addr: addr(vip), port: 80, protocol: protocol::TCP };
        let service = rig.publisher.tables().frontends.get(&key).unwrap().service.stable_id;
        let (src, src_port) = (addr("198.51.100.1"), 4000 + index as u16);
        let original = Tuple { src, dst: key.addr, src_port, dst_port: 80, protocol: protocol::TCP };
        let reply = Tuple { src: addr("10.244.1.7"), src_port: 8080, ..original.reversed() };
        let phase = Phase::TcpEstablished as u8;
        let flow = NewFlow { original, reply: Some(reply), phase, service, ..NewFlow::default() };
        rig.flows.insert(&mut worker, &flow, monotonic_s()).unwrap();
    }
    let state_of = |vip: &str| {
        let mut flows = (0..rig.flows.capacity() as u32).filter_map(|index| rig.flows.snapshot(index));
        Phase::name(flows.find(|flow| flow.original.dst == addr(vip)).unwrap().phase)
    };
    // What does not touch the endpoint resets nothing.
    talk.apply(&[slice("other", "10.244.1.9")]);
    talk.apply(&slices("10.244.1.8"));
    let start = Instant::now();
    assert!(rig.eventually(|| state_of("10.96.0.1") == "reset"));
    assert!(rig.eventually(|| state_of("10.96.0.2") == "reset"));
    println!("a drain of 1 s ended after {:?}", start.elapsed());
    assert_eq!(state_of("10.96.0.3"), "established");
}

#[test]
fn questions_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let mut talk = rig.connect();
    talk.apply(&[service("web", "10.96.0.1"), slice("web", "10.244.1.7"), slice("gone", "10.244.1.9")]);
    match talk.ask("\"status\"") {
        Reply::Status(status) => {
            assert_eq!((status.workers, status.workers_in_force), (1, 1));
            assert_eq!((status.frontends, status.slices_waiting), (2, 1));
            assert_eq!(status.objects["EndpointSlice"], 2);
            assert_eq!(status.ports.len(), 2);
            assert!(status.problems.is_empty(), "{:?}", status.problems);
        }
        other => panic!("{other:?}"),
    }
    match talk.ask("\"stats\"") {
        Reply::Stats(stats) => {
            assert!(stats.totals.iter().any(|count| count.name == "forwarded"));
            assert_eq!(stats.workers[0].state, "running");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(talk.ask("\"drops\""), Reply::Drops(drops) if drops.reasons.len() > 30));
    assert_eq!(talk.list("{\"get\":{\"what\":\"ports\"}}").len(), 2);
    assert_eq!(talk.list("{\"get\":{\"what\":\"workers\"}}").len(), 1);
    assert!(talk.list("{\"get\":{\"what\":\"routes\"}}").is_empty());
    let objects = talk.list("{\"get\":{\"what\":\"services\",\"objects\":true,\"name\":\"web\"}}");
    assert!(matches!(&objects[..], [Item::Object(value)] if value["spec"]["clusterIP"] == "10.96.0.1"));
    assert!(
        talk.list("{\"get\":{\"what\":\"services\",\"objects\":true,\"namespace\":\"other\"}}").is_empty()
    );
    assert!(!talk.list("{\"get\":{\"what\":\"dns\"}}").is_empty());
    let services = talk.list("{\"get\":{\"what\":\"services\"}}");
    assert!(matches!(&services[..], [Item::Service(row)] if row.name == "web" && row.endpoints_ready == 1));
    let endpoints = talk.list("{\"get\":{\"what\":\"endpoints\",\"name\":\"gone\"}}");
    assert!(matches!(&endpoints[..], [Item::Endpoint(row), _] if row.waits), "{endpoints:?}");
    match talk.ask("{\"describe_service\":{\"namespace\":\"default\",\"name\":\"web\"}}") {
        Reply::Service(description) => assert_eq!(description.frontends.len(), 2),
        other => panic!("{other:?}"),
    }
    let missing = talk.ask("{\"describe_service\":{\"namespace\":\"default\",\"name\":\"none\"}}");
    assert!(matches!(missing, Reply::Fault(fault) if fault.code == Code::NotFound));
    let packet = "tcp 10.244.9.9:4242 > 10.96.0.1:80".parse::<config::packet::PacketSpec>().unwrap();
    match talk.ask(Request::Trace { packet }.to_line().trim_end()) {
        Reply::Trace(trace) => {
            assert_eq!(trace.endpoint.as_deref(), Some("10.244.1.7:8080"), "{trace:?}");
            assert_eq!(rig.flows.len(), 0, "a trace changes nothing");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_thousand_clients_that_die_in_the_middle_of_a_change_leave_no_half_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let start = rig.publisher.tables().generation;
    let pair = |n: usize| {
        [
            service(&format!("s{n}"), &format!("10.96.{}.{}", n / 250, n % 250 + 1)),
            slice(&format!("s{n}"), "10.244.0.1"),
        ]
    };
    for n in 0..1000 {
        let mut talk = rig.connect();
        let [first, second] = pair(n);
        let text = format!("{{\"begin\":{{}}}}\n{first}\n{second}\n\"commit\"\n");
        let cut = (n * 7919) % (text.len() + 40);
        talk.0.get_mut().write_all(&text.as_bytes()[..cut.min(text.len())]).unwrap();
    }
    // Whatever was complete is wholly there, whatever was not is wholly absent.
    let mut talk = rig.connect();
    talk.apply(&[service("last", "10.96.200.1")]);
    let items = talk.list("{\"get\":{\"what\":\"all\"}}");
    let count =
        |kind: &str| items.iter().filter(|i| matches!(i, Item::Object(v) if v["kind"] == kind)).count();
    assert_eq!(count("Service"), count("EndpointSlice") + 1);
    assert!(rig.publisher.tables().generation > start);
}
