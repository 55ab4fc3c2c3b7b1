//! `towpathd` as an operator meets it: it forwards, it survives what kills it, it leaves nothing behind, and it says what
//! is wrong.

mod netns;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use netns::{Namespace, eventually, is_root};
use serde_json::json;

const VIP: &str = "10.96.0.10";

/// Clients behind g0, pods behind g1, towpathd between them.
struct Rig {
    clients: Namespace,
    gateway: Namespace,
    pods: Namespace,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let (clients, gateway, pods) = (Namespace::new("cli"), Namespace::new("gw"), Namespace::new("pods"));
        gateway.ip(&format!("link add g0 type veth peer name v0 netns {}", clients.name));
        gateway.ip(&format!("link add g1 type veth peer name v1 netns {}", pods.name));
        gateway.ip_batch(
            "addr add 10.1.0.1/24 dev g0\naddr add 10.2.0.1/24 dev g1\nlink set g0 up\nlink set g1 up\n",
        );
        clients.ip_batch("addr add 10.1.0.2/24 dev v0\nlink set v0 up\nroute add default via 10.1.0.1\n");
        pods.ip_batch("addr add 10.2.0.2/24 dev v1\nlink set v1 up\nroute add default via 10.2.0.1\n");
        Rig { clients, gateway, pods, dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A gateway file; `change` edits its text.
    fn file(&self, change: impl FnOnce(String) -> String) -> PathBuf {
        let dir = self.dir.path().display();
        let text = format!(
            r#"
[gateway]
name = "gw-1"
cluster_cidrs = ["10.2.0.0/24"]
service_cidrs = ["10.96.0.0/16"]
[control]
socket = "{dir}/control.sock"
state_dir = "{dir}/state"
[workers]
cpus = [0]
[flows]
capacity = 4096
region = "{dir}/flows"
[umem]
frames = 16384
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
expose_cluster_ips = true
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"#
        );
        let path = self.path("gateway.toml");
        std::fs::write(&path, change(text)).unwrap();
        path
    }

    fn start(&self) -> Daemon {
        let daemon = Daemon::spawn(&self.gateway, &self.file(|text| text));
        eventually("the data plane forwards", || daemon.log_count("data plane forwards") == 1);
        daemon
    }

    /// Applies a Service with one pod.
    fn apply_service(&self) {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "echo", "namespace": "default"},
            "spec": {"clusterIP": VIP, "clusterIPs": [VIP], "ports": [
                {"name": "udp", "port": 7, "targetPort": 7007, "protocol": "UDP"},
                {"name": "tcp", "port": 7, "targetPort": 7007, "protocol": "TCP"}]},
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "echo-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "echo"}},
            "ports": [{"name": "udp", "port": 7007, "protocol": "UDP"}, {"name": "tcp", "port": 7007, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.2.0.2"], "conditions": {"ready": true}}],
        });
        let mut socket = UnixStream::connect(self.path("control.sock")).unwrap();
        for line in [
            json!({"hello": {"version": 1, "client": "test"}}),
            json!({"begin": {}}),
            json!({"apply": {"object": service}}),
            json!({"apply": {"object": slice}}),
            json!("commit"),
        ] {
            writeln!(socket, "{line}").unwrap();
        }
        let mut replies = BufReader::new(socket).lines();
        assert!(replies.next().unwrap().unwrap().contains("hello"));
        let committed = replies.next().unwrap().unwrap();
        assert!(committed.contains("committed"), "{committed}");
    }

    /// Echoes UDP and one TCP connection in the pods' namespace until the process ends.
    fn start_echo(&self) {
        thread::scope(|scope| {
            scope.spawn(|| {
                self.pods.enter();
                let udp = UdpSocket::bind("10.2.0.2:7007").unwrap();
                let tcp = TcpListener::bind("10.2.0.2:7007").unwrap();
                thread::spawn(move || {
                    let mut packet = [0; 2048];
                    while let Ok((len, from)) = udp.recv_from(&mut packet) {
                        let _ = udp.send_to(&packet[..len], from);
                    }
                });
                thread::spawn(move || {
                    let (mut stream, _) = tcp.accept().unwrap();
                    let mut line = [0; 64];
                    while let Ok(len @ 1..) = stream.read(&mut line) {
                        stream.write_all(&line[..len]).unwrap();
                    }
                });
            });
        });
    }

    /// Runs `act` on a thread in the clients' namespace.
    fn as_client<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let client = scope.spawn(|| {
                self.clients.enter();
                act()
            });
            client.join().unwrap()
        })
    }

    /// Network interfaces and links of BPF programs that a gateway makes.
    fn leftovers(&self) -> String {
        let links = self.gateway.ip("-br link");
        let ours = links.lines().filter(|line| line.contains("towpath"));
        let details = self.gateway.ip("-d link");
        ours.chain(details.lines().filter(|line| line.contains("xdp"))).collect()
    }
}

/// A running `towpathd`, killed when dropped.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    fn spawn(gateway: &Namespace, file: &Path) -> Daemon {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let log = file.with_file_name(format!("log-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let child = Command::new("ip")
            .args(["netns", "exec", &gateway.name, env!("CARGO_BIN_EXE_towpathd"), "--config"])
            .arg(file)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Daemon { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn log_count(&self, words: &str) -> usize {
        self.log().matches(words).count()
    }

    fn signal(&self, pid: u32, signal: &str) {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }

    /// Process id of the data plane that was started last.
    fn data_plane(&self) -> u32 {
        let log = self.log();
        let started = log.lines().rfind(|line| line.contains("data plane started")).unwrap();
        started.rsplit_once("pid=").unwrap().1.trim().parse().unwrap()
    }

    /// Kills the data plane, and waits until its successor forwards.
    fn kill_data_plane(&self) {
        let forwarded = self.log_count("data plane forwards");
        self.signal(self.data_plane(), "-9");
        eventually("the next data plane forwards", || self.log_count("data plane forwards") > forwarded);
    }

    /// Waits for its end; exit code and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.log());
            }
            assert!(start.elapsed() < Duration::from_secs(20), "it does not end: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

#[test]
fn ten_kills_of_the_data_plane_lose_no_packet_and_no_connection() {
    if !is_root() {
        return;
    }
    let rig = Rig::new();
    let daemon = rig.start();
    rig.apply_service();
    rig.start_echo();
    let stop = AtomicBool::new(false);
    const GAP: Duration = Duration::from_micros(500);
    let (sent, answered) = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            rig.as_client(|| {
                let mut stream = TcpStream::connect((VIP, 7)).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let socket = UdpSocket::bind("10.1.0.2:4242").unwrap();
                socket.connect((VIP, 7)).unwrap();
                let receiving = socket.try_clone().unwrap();
                receiving.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let receiver = thread::spawn(move || {
                    let (mut numbers, mut packet) = (Vec::new(), [0; 8]);
                    while receiving.recv(&mut packet).is_ok() {
                        numbers.push(u64::from_ne_bytes(packet));
                    }
                    numbers
                });
                let (mut sent, start) = (0u64, Instant::now());
                while !stop.load(Ordering::Relaxed) {
                    socket.send(&sent.to_ne_bytes()).unwrap();
                    sent += 1;
                    if sent % 64 == 0 {
                        stream.write_all(b"still here").unwrap();
                        let mut echo = [0; 10];
                        stream.read_exact(&mut echo).unwrap();
                        assert_eq!(&echo, b"still here");
                    }
                    let due = start + GAP * sent as u32;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                let mut numbers = receiver.join().unwrap();
                let received = numbers.len();
                numbers.sort_unstable();
                numbers.dedup();
                assert_eq!(numbers.len(), received, "a packet came twice");
                (sent, received as u64)
            })
        });
        thread::sleep(Duration::from_millis(200));
        for _ in 0..10 {
            daemon.kill_data_plane();
            thread::sleep(Duration::from_millis(250));
        }
        stop.store(true, Ordering::Relaxed);
        traffic.join().unwrap()
    });
    assert!(sent > 2_000, "{sent}");
    assert_eq!(answered, sent, "{}", daemon.log());
}

#[test]
fn a_stop_leaves_nothing_behind_and_the_next_start_finds_everything() {
    if !is_root() {
        return;
    }
    let rig = Rig::new();
    let daemon = rig.start();
    rig.apply_service();
    rig.start_echo();
    let ask = || {
        rig.as_client(|| {
            let socket = UdpSocket::bind("10.1.0.2:4242").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket.send_to(b"ping", (VIP, 7)).unwrap();
            socket.recv(&mut [0; 8]).is_ok()
        })
    };
    assert!(ask());
    assert!(rig.leftovers().contains("towpath") && rig.leftovers().contains("xdp"));
    daemon.signal(daemon.child.id(), "-TERM");
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(rig.leftovers(), "");
    assert!(!rig.path("control.sock").exists());

    let daemon = rig.start();
    assert!(ask(), "objects are restored: {}", daemon.log());
    assert!(daemon.log().contains("flows: found again kept=1"), "{}", daemon.log());

    // Both processes killed at once: nothing blocks the next start.
    daemon.signal(daemon.data_plane(), "-9");
    daemon.signal(daemon.child.id(), "-9");
    let (code, _) = daemon.end();
    assert_eq!(code, None);
    assert!(rig.path("control.sock").exists(), "a stale socket");
    let daemon = rig.start();
    assert!(ask(), "{}", daemon.log());

    // The keeper killed: the data plane ends with it, and the kernel has the packets.
    let data_plane = daemon.data_plane();
    daemon.signal(daemon.child.id(), "-9");
    daemon.end();
    eventually("the data plane is gone", || !Path::new(&format!("/proc/{data_plane}")).exists());
    eventually("nothing is left", || rig.leftovers().is_empty());
}

#[test]
fn the_data_plane_has_no_privilege() {
    if !is_root() {
        return;
    }
    let rig = Rig::new();
    let daemon = rig.start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.data_plane())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        line.split_once(':').unwrap().1.split_whitespace().next().unwrap_or_default().to_owned()
    };
    assert_ne!(field("Uid"), "0");
    assert_ne!(field("Gid"), "0");
    assert_eq!(field("Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
}

#[test]
fn only_workers_run_on_the_cpus_of_workers() {
    if !is_root() || std::thread::available_parallelism().unwrap().get() < 2 {
        return;
    }
    let rig = Rig::new();
    let daemon = rig.start();
    let tasks = format!("/proc/{}/task", daemon.data_plane());
    let threads = std::fs::read_dir(tasks).unwrap().filter_map(|entry| {
        let path = entry.unwrap().path();
        // A thread may have ended by now.
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        Some((field("Name:"), field("Cpus_allowed_list:")))
    });
    let threads: Vec<(String, String)> = threads.collect();
    assert!(threads.len() > 3, "{threads:?}");
    for (name, cpus) in &threads {
        let is_worker = name.starts_with("towpath-work");
        assert_eq!(is_worker, cpus == "0", "{name} may run on {cpus}");
        assert_eq!(is_worker, cpus.starts_with('0'), "{name} may run on {cpus}");
    }
    assert!(threads.iter().any(|(name, _)| name == "towpath-work0"), "{threads:?}");
}

#[test]
fn what_is_wrong_is_said_before_anything_is_touched() {
    if !is_root() {
        return;
    }
    let rig = Rig::new();
    let refused = |change: &dyn Fn(String) -> String| {
        let daemon = Daemon::spawn(&rig.gateway, &rig.file(change));
        let (code, log) = daemon.end();
        assert_eq!(code, Some(1), "{log}");
        assert_eq!(rig.leftovers(), "", "{log}");
        log
    };
    let with = |from: &'static str, to: &'static str| refused(&move |text| text.replace(from, to));
    let says = |log: String, words: &[&str]| {
        for word in words {
            assert!(log.contains(word), "{word}: {log}");
        }
    };
    says(with("\"g1\"", "\"g9\""), &["port[1].interface: g9", "no such interface", "ip link"]);
    says(with("cpus = [0]", "cpus = [999]"), &["workers.cpus[0]: 999", "no such CPU"]);
    says(with("cpus = [0]", "cpus = [0, 1]"), &["port[0].interface: g0", "1 receive queue", "2 worker"]);
    says(with("\"outside\"", "\"wrong\""), &["gateway.toml:", "role", "wrong"]);
    says(with("[flows]", "[flows]\nspeed = 9"), &["gateway.toml:", "speed"]);
    let kernel_ports = |range: &str| {
        let setting = format!("net.ipv4.ip_local_port_range={range}");
        let sysctl = ["netns", "exec", &rig.gateway.name, "sysctl", "-qw", &setting];
        assert!(Command::new("ip").args(sysctl).status().unwrap().success());
    };
    kernel_ports("32768 62000");
    says(with("x", "x"), &["snat.ports: 61000-65535", "32768-62000", "sysctl -w"]);
    kernel_ports("32768 60999");
    std::fs::write(rig.path("control.sock"), "precious").unwrap();
    says(with("x", "x"), &["control.socket", "not a socket"]);
    std::fs::remove_file(rig.path("control.sock")).unwrap();

    let first = rig.start();
    let log = |change: &dyn Fn(String) -> String| {
        let start = Instant::now();
        let (code, log) = Daemon::spawn(&rig.gateway, &rig.file(change)).end();
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(code, Some(1), "{log}");
        log
    };
    says(log(&|text| text), &["flows.region", "another towpathd"]);
    // Files of its own, but the same interfaces.
    let own = rig.path("own");
    let elsewhere =
        |text: String| text.replace(&rig.dir.path().display().to_string(), &own.display().to_string());
    says(log(&elsewhere), &["port[0].interface: g0", "another XDP program"]);
    assert_eq!(first.log_count("data plane died"), 0);
}
