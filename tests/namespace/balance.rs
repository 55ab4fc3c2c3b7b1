//! Where the flow table and the ports end: a full table, one client port towards several Services, a few masquerade ports. Every
//! conversation sends bytes of its own and must get exactly them back, with all others open.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::{Timeout, set_socket_reuseaddr, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

use tests::cluster::{Cluster, GATEWAY, SNAT_VIP, SNAT_VIP6, VIP, VIP6, slices, slices_of};
use tests::process::Process;

const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:c::2"];
/// Where the echo listens, over TCP and UDP.
const PORT: u16 = 5201;
/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must come from who is refused: its SYN is sent twice.
const REFUSED: Duration = Duration::from_millis(1_500);
/// Packets of connections that both ends have closed come too late for their flow.
const LATE: &str = "no_flow";

/// Echoes TCP and UDP at every pod. A conversation begins with a line, a datagram's answer too: the client's address and port, as the
/// pod sees them, and the pod's address.
const ECHO: &str = r#"
import resource, selectors, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
select = selectors.DefaultSelector()
def line(peer, own):
    return f"{peer[0]} {peer[1]} {own[0]}\n".encode()
def datagram(s):
    data, peer = s.recvfrom(65536)
    s.sendto(line(peer, s.getsockname()) + data, peer)
def accept(s):
    c, peer = s.accept()
    c.sendall(line(peer, c.getsockname()))
    select.register(c, selectors.EVENT_READ, stream)
def stream(s):
    try:
        data = s.recv(1 << 16)
        s.sendall(data)
    except OSError:
        data = b""
    if not data:
        select.unregister(s)
        s.close()
for i in range(11, 21):
    for family, address in ((socket.AF_INET, f"10.244.1.{i}"), (socket.AF_INET6, f"fd00:244:1::{i}")):
        for kind, work in ((socket.SOCK_STREAM, accept), (socket.SOCK_DGRAM, datagram)):
            s = socket.socket(family, kind)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((address, 5201))
            if kind == socket.SOCK_STREAM:
                s.listen(4096)
            select.register(s, selectors.EVENT_READ, work)
print("listening", flush=True)
while True:
    for key, _ in select.select():
        key.data(key.fileobj)
"#;

fn start_echo(cluster: &Cluster) -> Process {
    let log = cluster.folder.path().join("echo-lines.log");
    let mut echo = Process::start(&cluster.node, "/usr/bin/python3", &["-c", ECHO], &log).unwrap();
    echo.wait_until(PATIENCE, || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")))
        .unwrap();
    echo
}

/// A Service with these pods that has no port but that of the echo, at 203.0.113.`number` and 2001:db8::`number`.
fn service(name: &str, policy: &str, number: u8, pods: &[u8]) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: {name}}}\nspec:\n  type: LoadBalancer\n  \
         externalTrafficPolicy: {policy}\n  allocateLoadBalancerNodePorts: false\n  clusterIP: 10.96.0.{number}\n  \
         clusterIPs: [10.96.0.{number}, 'fd00:96::{number}']\n  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  \
         ports: [{{name: tcp, protocol: TCP, port: {PORT}}}, {{name: udp, protocol: UDP, port: {PORT}}}]\n\
         status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.{number}}}, {{ip: '2001:db8::{number}'}}]}}}}\n"
    );
    text += &slices_of(name, &[("tcp", "TCP", PORT), ("udp", "UDP", PORT)], pods.iter().copied());
    text
}

/// What a pod says of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    client: SocketAddr,
    pod: IpAddr,
}

impl Seen {
    fn parse(line: &str) -> Result<Seen> {
        let words: Vec<_> = line.split(' ').collect();
        let [addr, port, pod] = words[..] else { anyhow::bail!("not a line of the echo: {line:?}") };
        Ok(Seen { client: SocketAddr::new(addr.parse()?, port.parse()?), pod: pod.parse()? })
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// A client's conversation with the echo. `seed`: its bytes are like no other's.
#[derive(Debug)]
struct Conversation {
    socket: Socket,
    seed: u64,
    sent: u64,
    received: u64,
    own: SocketAddr,
    to: SocketAddr,
    seen: Seen,
}

/// Where a conversation goes, and from which port; 0: the kernel chooses.
#[derive(Clone, Copy, Debug)]
struct Place {
    kind: SocketType,
    port: u16,
    to: SocketAddr,
}

fn tcp(port: u16, vip: &str) -> Place {
    Place { kind: SocketType::STREAM, port, to: SocketAddr::new(vip.parse().unwrap(), PORT) }
}

fn udp(port: u16, vip: &str) -> Place {
    Place { kind: SocketType::DGRAM, ..tcp(port, vip) }
}

/// The bytes from `from` on of a conversation.
fn pattern(seed: u64, from: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| {
        let z = (seed << 40 ^ at).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ z >> 31).to_le_bytes()
    };
    (from..from + len as u64).map(|at| word(at / 8)[(at % 8) as usize]).collect()
}

impl Conversation {
    /// Begins, in the namespace of the calling thread. An error after `patience` without an answer.
    fn begin(place: Place, seed: u64, patience: Duration) -> Result<Conversation> {
        let Place { kind, port, to } = place;
        let (family, own) = match to {
            SocketAddr::V4(_) => (AddressFamily::INET, CLIENT[0]),
            SocketAddr::V6(_) => (AddressFamily::INET6, CLIENT[1]),
        };
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
        set_socket_reuseaddr(&socket, true)?;
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(patience))?;
        }
        bind(&socket, &SocketAddr::new(own.parse()?, port))?;
        connect(&socket, &to).with_context(|| format!("{place:?}"))?;
        let nobody = Seen { client: to, pod: to.ip() };
        let (socket, own) = if kind == SocketType::STREAM {
            let stream = TcpStream::from(socket);
            stream.set_nodelay(true)?;
            let own = stream.local_addr()?;
            (Socket::Tcp(stream), own)
        } else {
            let socket = UdpSocket::from(socket);
            let own = socket.local_addr()?;
            (Socket::Udp(socket), own)
        };
        let mut begun = Conversation { socket, seed, sent: 0, received: 0, own, to, seen: nobody };
        if let Socket::Tcp(stream) = &mut begun.socket {
            let mut line = Vec::new();
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte).with_context(|| format!("{place:?}: the first line"))?;
                line.push(byte[0]);
            }
            begun.seen = Seen::parse(std::str::from_utf8(&line)?.trim_end())?;
        }
        begun.send(100)?;
        begun.receive()?;
        begun.socket_timeout(PATIENCE)?;
        Ok(begun)
    }

    fn socket_timeout(&self, patience: Duration) -> Result<()> {
        match &self.socket {
            Socket::Tcp(stream) => stream.set_read_timeout(Some(patience))?,
            Socket::Udp(socket) => socket.set_read_timeout(Some(patience))?,
        }
        Ok(())
    }

    fn send(&mut self, len: usize) -> Result<()> {
        let bytes = pattern(self.seed, self.sent, len);
        match &mut self.socket {
            Socket::Tcp(stream) => stream.write_all(&bytes)?,
            Socket::Udp(socket) => ensure!(socket.send(&bytes)? == len, "a datagram was cut"),
        }
        self.sent += len as u64;
        Ok(())
    }

    /// Takes what was sent and not yet received; over UDP it must have been one datagram.
    fn receive(&mut self) -> Result<()> {
        let mut bytes = vec![0; (self.sent - self.received) as usize];
        match &mut self.socket {
            Socket::Tcp(stream) => stream.read_exact(&mut bytes)?,
            Socket::Udp(socket) => {
                let mut buffer = vec![0; 2_048];
                let len = socket.recv(&mut buffer)?;
                let end = buffer[..len].iter().position(|byte| *byte == b'\n').context("no line")?;
                let seen = Seen::parse(std::str::from_utf8(&buffer[..end])?)?;
                ensure!(self.received == 0 || seen == self.seen, "seen as {:?}, then as {seen:?}", self.seen);
                self.seen = seen;
                bytes = buffer[end + 1..len].to_vec();
            }
        }
        let expected = pattern(self.seed, self.received, (self.sent - self.received) as usize);
        ensure!(bytes == expected, "{:?} got other bytes than it sent: {:?}", self.own, self.to);
        self.received = self.sent;
        Ok(())
    }

    /// Uploads `len` bytes and downloads them at the same time, over TCP.
    fn exchange(&mut self, len: usize) -> Result<()> {
        let Socket::Tcp(stream) = &mut self.socket else { anyhow::bail!("not over TCP") };
        let bytes = pattern(self.seed, self.sent, len);
        let mut writer = stream.try_clone()?;
        let mut back = vec![0; len];
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| writer.write_all(&bytes));
            let read = stream.read_exact(&mut back);
            writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("upload")?;
            read.context("download")
        })?;
        ensure!(back == bytes, "other bytes came back");
        self.sent += len as u64;
        self.received = self.sent;
        Ok(())
    }
}

/// Begins conversations, one after the other, all of which must succeed. `seeds`: where their seeds go on.
fn begin_all(cluster: &Cluster, places: &[Place], seeds: &mut u64) -> Vec<Conversation> {
    let begun = cluster.client.inside(|| {
        let begin = |(index, place): (usize, &Place)| {
            Conversation::begin(*place, *seeds + index as u64, PATIENCE).with_context(|| format!("{place:?}"))
        };
        places.iter().enumerate().map(begin).collect::<Result<Vec<_>>>()
    });
    *seeds += places.len() as u64;
    begun.unwrap()
}

/// Nobody answers here.
fn all_refused(cluster: &Cluster, places: &[Place]) {
    let begun = cluster.client.inside(|| {
        let begin = |place: &Place| {
            let place = *place;
            move || Conversation::begin(place, 1 << 20, REFUSED)
        };
        // At the same time: each takes as long as it is waited for.
        let answers: Vec<_> = std::thread::scope(|scope| {
            let waiting: Vec<_> = places.iter().map(|place| scope.spawn(begin(place))).collect();
            waiting.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        Ok(answers)
    });
    for (place, answer) in places.iter().zip(begun.unwrap()) {
        assert!(answer.is_err(), "{place:?} is served: {answer:?}");
    }
}

/// Conversations at a time: what they send fits the rings of a gateway whose machine is busy with others.
const AT_A_TIME: usize = 120;

/// Of [`AT_A_TIME`] conversations each sends before the first of them receives.
fn talk<'c>(conversations: impl IntoIterator<Item = &'c mut Conversation>, len: usize) {
    let mut all: Vec<_> = conversations.into_iter().collect();
    for some in all.chunks_mut(AT_A_TIME) {
        for one in &mut *some {
            one.send(len).unwrap_or_else(|error| panic!("{:?} to {:?}: {error:#}", one.own, one.to));
        }
        for one in some {
            one.receive().unwrap_or_else(|error| panic!("{:?} to {:?}: {error:#}", one.own, one.to));
        }
    }
}

fn counter(cluster: &Cluster, name: &str) -> u64 {
    let totals = cluster.daemon().stats().unwrap().totals;
    totals.into_iter().find(|count| count.name == name).map_or(0, |count| count.value)
}

fn drops(cluster: &Cluster, reason: &str) -> u64 {
    cluster.daemon().drops().unwrap().get(reason).copied().unwrap_or(0)
}

#[test]
fn a_full_flow_table_refuses_only_who_cannot_do_without() {
    const CAPACITY: usize = 1_024;
    let config = GATEWAY.replace("capacity = 262144", "capacity = 1024\ntcp_transitory_s = 2");
    let cluster = Cluster::with("full", 3, 1, &config).unwrap();
    let _echo = start_echo(&cluster);
    let mut seeds = 0;
    let both = |count: usize, v4: &'static str, v6: &'static str, place: fn(u16, &str) -> Place| {
        (0..count).map(|i| place(0, [v4, v6][i % 2])).collect::<Vec<_>>()
    };
    let mut masqueraded = begin_all(&cluster, &both(24, SNAT_VIP, SNAT_VIP6, tcp), &mut seeds);
    let mut kept = begin_all(&cluster, &both(CAPACITY - 24, VIP, VIP6, tcp), &mut seeds);
    let status = cluster.daemon().status().unwrap();
    assert_eq!((status.flows, status.flows_capacity), (CAPACITY as u64, CAPACITY as u64));
    assert_eq!(counter(&cluster, "stateless_forwarded"), 0);

    // Beyond: all are served, over TCP and UDP, with their own address and port.
    let start = Instant::now();
    let mut beyond = begin_all(&cluster, &both(400, VIP, VIP6, tcp), &mut seeds);
    beyond.extend(begin_all(&cluster, &both(100, VIP, VIP6, udp), &mut seeds));
    println!(
        "{} connections fit, {} more go on by consistent hash (begun in {:?}), {} packets without an entry",
        status.flows,
        beyond.len(),
        start.elapsed(),
        counter(&cluster, "stateless_forwarded")
    );
    assert!(counter(&cluster, "stateless_forwarded") > 500 * 2);
    assert_eq!(cluster.daemon().status().unwrap().flows, CAPACITY as u64);
    assert!(beyond.iter().all(|one| one.seen.client == one.own));
    let mut pods = BTreeMap::new();
    beyond.iter().for_each(|one| *pods.entry(one.seen.pod).or_insert(0) += 1);
    println!("of those each pod has {pods:?}");
    assert_eq!(pods.len(), 6, "both addresses of three pods");
    assert_eq!(drops(&cluster, "flow_table_full"), 0);

    // Masqueraded ones have no way without an entry.
    let mut refused = both(4, SNAT_VIP, SNAT_VIP6, tcp);
    refused.extend(both(4, SNAT_VIP, SNAT_VIP6, udp));
    all_refused(&cluster, &refused);
    let full = drops(&cluster, "flow_table_full");
    println!("{} masqueraded ones are refused, {full} packets dropped", refused.len());
    // Four datagrams, and each SYN once or more.
    assert!((8..=20).contains(&full), "{full}");

    // One without an entry is as good as any: up and down at once, and 20 MB of a new one, byte for byte.
    for one in &mut beyond[..2] {
        one.exchange(4 << 20).unwrap();
    }
    cluster.download(VIP).unwrap();
    cluster.download(&format!("[{VIP6}]")).unwrap();
    talk(masqueraded.iter_mut().chain(&mut kept).chain(&mut beyond), 1_000);
    assert_eq!(drops(&cluster, "flow_table_full"), full);

    // Room again: the next packet of those without makes an entry, and masqueraded ones are served.
    drop(kept);
    let start = Instant::now();
    while cluster.daemon().status().unwrap().flows > 24 {
        assert!(start.elapsed() < Duration::from_secs(20), "the flows of closed connections stay");
        std::thread::sleep(Duration::from_millis(100));
    }
    talk(&mut beyond, 1_000);
    // Nothing goes without an entry any more.
    let stateless = counter(&cluster, "stateless_forwarded");
    talk(&mut beyond, 1_000);
    assert_eq!(counter(&cluster, "stateless_forwarded"), stateless);
    assert_eq!(cluster.daemon().status().unwrap().flows, 24 + 500);
    let mut late = begin_all(&cluster, &refused, &mut seeds);
    talk(masqueraded.iter_mut().chain(&mut beyond).chain(&mut late), 1_000);
    assert_eq!(drops(&cluster, "flow_table_full"), full);
    cluster.finish(&["flow_table_full", LATE]).unwrap();
}

#[test]
fn one_client_port_towards_several_vips_of_one_endpoint_mixes_nothing() {
    const MIRROR: [&str; 2] = ["203.0.113.30", "2001:db8::30"];
    let cluster = Cluster::new("same-port", 1).unwrap();
    let _echo = start_echo(&cluster);
    cluster.daemon().apply(&service("mirror", "Local", 30, &[1])).unwrap();
    let mut places = Vec::new();
    let (a, b, masqueraded) = ([VIP, VIP6], MIRROR, [SNAT_VIP, SNAT_VIP6]);
    for port in 40_000..40_020 {
        for family in 0..2 {
            // Who comes first differs.
            let mut vips = [a[family], b[family], masqueraded[family]];
            vips.rotate_left(usize::from(port) % 3);
            for vip in vips {
                places.extend([tcp(port, vip), udp(port, vip)]);
            }
        }
    }
    let mut seeds = 0;
    let mut all = begin_all(&cluster, &places, &mut seeds);
    for len in [1, 700, 1_200, 64, 1_000] {
        talk(&mut all, len);
    }
    let mut seen = BTreeSet::new();
    let mut changed = 0;
    for (one, place) in all.iter().zip(&places) {
        assert_eq!(one.own.port(), place.port);
        assert!(seen.insert((place.kind == SocketType::STREAM, one.seen)), "two of them are one: {one:?}");
        let is_masqueraded = masqueraded.iter().any(|vip| one.to.ip() == vip.parse::<IpAddr>().unwrap());
        assert_eq!(one.seen.client.ip() != one.own.ip(), is_masqueraded, "{one:?}");
        changed += u32::from(!is_masqueraded && one.seen.client.port() != one.own.port());
    }
    println!("{} conversations from 20 ports, {changed} of them got another source port", all.len());
    // For each port, family and protocol the second of both.
    assert_eq!(changed, 20 * 2 * 2);
    cluster.finish(&[LATE]).unwrap();
}

#[test]
fn colliding_masquerade_ports_are_replaced_until_none_is_free() {
    const STALL: [&str; 2] = ["203.0.113.40", "2001:db8::40"];
    let config = GATEWAY
        .replace("[workers]", "[snat]\nports = \"61000-61003\"\n[workers]")
        .replace("[flows]", "[flows]\ntcp_transitory_s = 2");
    let cluster = Cluster::with("collide", 1, 1, &config).unwrap();
    let _echo = start_echo(&cluster);
    cluster.daemon().apply(&service("stall", "Cluster", 40, &[1])).unwrap();
    let mut seeds = 0;
    let shop = [SNAT_VIP, SNAT_VIP6];
    // Two ports of the client, both in the range, towards both Services: four connections for four ports.
    let mut places = Vec::new();
    for family in 0..2 {
        for port in [61_000, 61_001] {
            for vip in [shop[family], STALL[family]] {
                places.extend([tcp(port, vip), udp(port, vip)]);
            }
        }
    }
    let mut all = begin_all(&cluster, &places, &mut seeds);
    talk(&mut all, 1_000);
    let mut ports: BTreeMap<(bool, bool), BTreeSet<u16>> = BTreeMap::new();
    for (one, place) in all.iter().zip(&places) {
        let space = (place.kind == SocketType::STREAM, place.to.is_ipv4());
        assert!(
            ports.entry(space).or_default().insert(one.seen.client.port()),
            "two of them are one: {one:?}"
        );
    }
    // The first keeps its port; whoever comes second has another one.
    assert!(all[..2].iter().all(|one| one.seen.client.port() == 61_000), "{all:?}");
    assert!(all[2..4].iter().all(|one| one.seen.client.port() != 61_000), "{all:?}");
    assert!(ports.values().all(|ports| ports.iter().copied().eq(61_000..=61_003)), "{ports:?}");
    println!("{} conversations, ports by protocol and family: {ports:?}", all.len());

    // A fifth finds none, and disturbs nobody.
    let fifth = [tcp(61_002, shop[0]), tcp(61_002, shop[1]), udp(50_000, STALL[0]), udp(50_000, STALL[1])];
    all_refused(&cluster, &fifth);
    let exhausted = drops(&cluster, "snat_ports_exhausted");
    println!("{} more are refused, {exhausted} packets dropped", fifth.len());
    assert!((4..=12).contains(&exhausted), "{exhausted}");
    talk(&mut all, 1_000);

    // Each endpoint has all ports: towards another one they are free. (Datagrams go to another endpoint when theirs is gone.)
    let is_tcp = |one: &Conversation| matches!(one.socket, Socket::Tcp(_));
    all.retain(is_tcp);
    let moved = format!("{}{}", slices(2..=2), service("stall", "Cluster", 40, &[2]));
    cluster.daemon().apply(&moved).unwrap();
    let mut other = begin_all(&cluster, &fifth, &mut seeds);
    assert!(other.iter().all(|one| one.seen.pod.to_string().ends_with("12")), "{other:?}");
    talk(all.iter_mut().chain(&mut other), 1_000);
    drop(other);

    // A port whose connection is over is given to another one.
    cluster.daemon().apply(&format!("{}{}", slices(1..=1), service("stall", "Cluster", 40, &[1]))).unwrap();
    let gone = all.remove(0);
    let free = gone.seen.client.port();
    drop(gone);
    let start = Instant::now();
    let (next, waited) = loop {
        let place = tcp(50_001, shop[0]);
        match cluster.client.inside(|| Conversation::begin(place, 1 << 21, REFUSED)) {
            Ok(next) => break (next, start.elapsed()),
            Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "{error:#}"),
        }
    };
    println!("port {free} was given to another connection {waited:?} after its first one was closed");
    assert_eq!(next.seen.client.port(), free);
    talk(&mut all, 1_000);
    cluster.finish(&["snat_ports_exhausted", LATE]).unwrap();
}
