//! Conntrack and KubeProxy: what becomes of flows when their pods go, and of connections that are half over or attacked.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use config::control::FlowRow;
use etherparse::TcpHeader;
use rustix::net::{AddressFamily, RawProtocol, SendFlags, SocketFlags, SocketType, sendto, socket_with};

use crate::rig::ask::{Datagrams, NoAnswer, Outcome, PATIENCE};
use crate::rig::cluster::Protocol::{Tcp, Udp};
use crate::rig::network::GATEWAY;
use crate::rig::place::Place;
use crate::rig::service::{Service, Type};
use crate::scenario::{Group, Scenario, not_applicable, run};
use crate::test::{Test, at, node_port, pod};

pub const GROUPS: &[Group] =
    &[Group { name: "Conntrack", scenarios: CONNTRACK }, Group { name: "KubeProxy", scenarios: KUBE_PROXY }];

const CONNTRACK: &[Scenario] = &[
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a NodePort service",
        node_port_cycle
    ),
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service",
        cluster_ip_cycle
    ),
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service and client is hostNetwork",
        host_network_cycle
    ),
    run!(
        "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service with InternalTrafficPolicy set to Local",
        internal_local_cycle
    ),
    run!("should be able to preserve UDP traffic when initial unready endpoints get ready", unready_at_first),
    run!("proxy implementation should not be vulnerable to the invalid conntrack state bug", invalid_packets),
];

const KUBE_PROXY: &[Scenario] = &[
    run!("should set TCP CLOSE_WAIT timeout", close_wait),
    not_applicable(
        "should update metric for tracking accepted packets destined for localhost nodeports",
        "iptables rules of kube-proxy",
    ),
];

/// Source port of the client, as upstream's.
const SOURCE_PORT: u16 = 12_345;

/// A Service of UDP port 80.
pub fn udp_service(type_: Type) -> Service {
    Service::new("svc-udp").of_type(type_).port(Udp, 80, 80)
}

fn node_port_cycle(test: &mut Test) -> Result<()> {
    let service = test.create(udp_service(Type::NodePort))?;
    let client = test.start(pod("pod-client", "node-1"))?;
    let to = node_port(&service, 0)?;
    cycle(test, &[client, test.client()], &to, ["node-2", "node-2"])
}

fn cluster_ip_cycle(test: &mut Test) -> Result<()> {
    let service = test.create(udp_service(Type::ClusterIp))?;
    let client = test.start(pod("pod-client", "node-1"))?;
    cycle(test, &[client], &at(&service.cluster_ips, 80), ["node-2", "node-2"])
}

fn host_network_cycle(test: &mut Test) -> Result<()> {
    let service = test.create(udp_service(Type::ClusterIp))?;
    let client = test.node("node-1");
    cycle(test, &[client], &at(&service.cluster_ips, 80), ["node-2", "node-2"])
}

fn internal_local_cycle(test: &mut Test) -> Result<()> {
    let service = udp_service(Type::ClusterIp).with(|service| service.internal_local = true);
    let service = test.create(service)?;
    let client = test.start(pod("pod-client", GATEWAY))?;
    cycle(test, &[client], &at(&service.cluster_ips, 80), [GATEWAY, GATEWAY])
}

/// Each client sends to each address from one port all the time, while the only pod of `svc-udp` is replaced by another, on
/// these nodes. Rule 9.2.
pub fn cycle(test: &mut Test, clients: &[Place], to: &[SocketAddr], nodes: [&str; 2]) -> Result<()> {
    // Before there are endpoints; and replies of a pod whose flow has just been given to the next one.
    test.allow("no_endpoints");
    test.allow("no_flow");
    let backend = |name: &str, node: &str| pod(name, node).of("svc-udp").listen(Udp, 80);
    let mut sockets = Vec::new();
    for client in clients {
        for to in to {
            sockets.push((format!("{} to {to}", client.name), client.datagrams(SOURCE_PORT, *to)?));
        }
    }
    let stop = AtomicBool::new(false);
    let made: Vec<AtomicU32> = sockets.iter().map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        let stop = &stop;
        let spawn = |((name, socket), made)| (name, scope.spawn(move || stream(&socket, made, stop)));
        let streams: Vec<_> = sockets.into_iter().zip(&made).map(spawn).collect();
        let changes = (|| {
            let begin = Instant::now();
            let refused = some_more(&made)?;
            test.start(backend("pod-server-1", nodes[0]))?;
            let first = Instant::now();
            some_more(&made)?;
            test.start(backend("pod-server-2", nodes[1]))?;
            let first_end = some_more(&made)?;
            test.delete("pod-server-1")?;
            let second = Instant::now();
            let end = some_more(&made)?;
            Ok([
                Phase { from: begin, to: refused, pod: None, grace: Duration::ZERO },
                Phase { from: first, to: first_end, pod: Some("pod-server-1"), grace: Duration::ZERO },
                Phase { from: second, to: end, pod: Some("pod-server-2"), grace: FORGOTTEN_WITHIN },
            ])
        })();
        stop.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for (name, stream) in streams {
            let made = stream.join().unwrap_or_else(|_| Err(anyhow!("panicked")));
            requests.push((made.with_context(|| name.clone())?, name));
        }
        let changes = changes.map_err(|error: anyhow::Error| error)?;
        for (requests, name) in requests {
            for phase in &changes {
                judge(&requests, phase).with_context(|| name.clone())?;
            }
        }
        Ok(())
    })
}

/// Waits until every stream has made some requests that were sent from now on. Returns the moment.
fn some_more(made: &[AtomicU32]) -> Result<Instant> {
    let enough: Vec<u32> = made.iter().map(|made| made.load(Ordering::Relaxed) + 10).collect();
    let start = Instant::now();
    while made.iter().zip(&enough).any(|(made, enough)| made.load(Ordering::Relaxed) < *enough) {
        ensure!(start.elapsed() < PATIENCE, "no answer comes any more");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Instant::now())
}

/// How long flows of a pod that is gone may last. They are forgotten a moment after the change is in force, as by kube-proxy.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(2);

/// A time in which all answers must be alike.
struct Phase {
    from: Instant,
    to: Instant,
    /// Who must answer; `None`: requests must be refused.
    pod: Option<&'static str>,
    /// What is sent so early may be lost.
    grace: Duration,
}

/// A request: when it was sent, and what became of it.
type Request = (Instant, Outcome);

fn stream(socket: &Datagrams, made: &AtomicU32, stop: &AtomicBool) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let sent = Instant::now();
        // Short, since a request may be lost while its pod is replaced, and the next one shall come soon.
        requests.push((sent, socket.ask(Duration::from_millis(500))?));
        made.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(requests)
}

fn judge(requests: &[Request], Phase { from, to, pod, grace }: &Phase) -> Result<()> {
    let during = requests.iter().filter(|(sent, _)| sent >= from && sent < to);
    let lost = |(sent, outcome): &&Request| *outcome == Err(NoAnswer::Silence) && *sent < *from + *grace;
    let mut during = during.skip_while(lost).peekable();
    ensure!(during.peek().is_some(), "nothing was sent while {pod:?} should have answered");
    for (number, (_, outcome)) in during.enumerate() {
        let right = match (pod, outcome) {
            (Some(pod), Ok(answer)) => answer.pod == *pod,
            (None, Err(why)) => *why == NoAnswer::Refused,
            _ => false,
        };
        ensure!(right, "request {} while {pod:?} should have answered: {outcome:?}", number + 1);
    }
    Ok(())
}

/// A client that began before the pod was ready is served once it is; nothing remembers that it was refused. Rule 4.7.
fn unready_at_first(test: &mut Test) -> Result<()> {
    test.allow("no_endpoints");
    let service = test.create(udp_service(Type::ClusterIp))?;
    let client = test.start(pod("pod-client", "node-1"))?;
    for to in at(&service.cluster_ips, 80) {
        let socket = client.datagrams(SOURCE_PORT, to)?;
        let refused = |what: &str| -> Result<()> {
            let outcome = socket.ask(PATIENCE)?;
            ensure!(outcome == Err(NoAnswer::Refused), "{what}: {outcome:?}");
            Ok(())
        };
        refused("without a pod")?;
        test.start(pod("pod-server-1", "node-2").of("svc-udp").listen(Udp, 80).unready())?;
        refused("with an unready pod")?;
        test.set_ready("pod-server-1", true)?;
        let answer = socket.ask(PATIENCE)?;
        ensure!(answer.as_ref().is_ok_and(|answer| answer.pod == "pod-server-1"), "ready: {answer:?}");
        test.delete("pod-server-1")?;
    }
    Ok(())
}

/// The server sends a packet that is no part of the connection: it must arrive as from the Service's address, where the
/// client's kernel knows what to think of it. As from the pod, it would be answered with a reset that ends the connection.
/// Rule 9.5.
fn invalid_packets(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("boom-server").port(Tcp, 9000, 9000))?;
    let client = test.start(pod("startup-script", "node-1"))?;
    let server = test.start(pod("boom-server", "node-2").of("boom-server").listen(Tcp, 9000))?;
    let resets = || -> Result<u64> {
        let text = client.namespace.sh("nstat -asz TcpOutRsts | awk '$1 == \"TcpOutRsts\" { print $2 }'")?;
        text.trim().parse().with_context(|| format!("nstat says {text:?}"))
    };
    for to in at(&service.cluster_ips, 9000) {
        let mut connection = client.connect(to)?;
        let before = connection.ask()?;
        let from = SocketAddr::new(server.address_towards(to.ip()), 9000);
        let resets_before = resets()?;
        for (what, make) in [
            ("data", (|header| header.ack = true) as fn(&mut TcpHeader)),
            ("a reset", |header| header.rst = true),
            ("the end", |header| (header.fin, header.ack) = (true, true)),
        ] {
            inject(&server, from, before.client, make).with_context(|| what.to_owned())?;
            std::thread::sleep(Duration::from_millis(50));
            ensure!(connection.ask()? == before, "after {what} out of the window");
        }
        ensure!(resets()? == resets_before, "the client reset a connection");
        let flow = flow(test, to)?;
        ensure!(flow.state == "established", "{flow:?}");
    }
    Ok(())
}

/// Sends a TCP segment whose sequence number is nowhere near any connection's, as the pod.
fn inject(server: &Place, from: SocketAddr, to: SocketAddr, make: fn(&mut TcpHeader)) -> Result<()> {
    let mut header = TcpHeader::new(from.port(), to.port(), 0x1234_5678, 1024);
    header.acknowledgment_number = 0x8765_4321;
    make(&mut header);
    let payload = if header.rst { &[][..] } else { b"boom" };
    let family = match (from.ip(), to.ip()) {
        (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) => {
            header.checksum = header.calc_checksum_ipv4_raw(from.octets(), to.octets(), payload)?;
            AddressFamily::INET
        }
        (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) => {
            header.checksum = header.calc_checksum_ipv6_raw(from.octets(), to.octets(), payload)?;
            AddressFamily::INET6
        }
        _ => bail!("{from} and {to} are of different families"),
    };
    let mut segment = header.to_bytes().to_vec();
    segment.extend(payload);
    server.namespace.inside(|| {
        let protocol = RawProtocol::new(6).map(rustix::net::Protocol::from_raw);
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        sendto(&socket, &segment, SendFlags::empty(), &SocketAddr::new(to.ip(), 0))?;
        Ok(())
    })
}

/// A connection whose server has said its last word while the client goes on: kube-proxy keeps it for an hour
/// (`tcpCloseWaitTimeout`), where Linux would forget it after a minute.
fn close_wait(test: &mut Test) -> Result<()> {
    let service = test.create(Service::new("kube-proxy-test").port(Tcp, 11302, 80))?;
    let client = test.start(pod("e2e-net-client", "node-1"))?;
    test.start(pod("e2e-net-server", "node-2").of("kube-proxy-test").listen(Tcp, 80))?;
    for to in at(&service.cluster_ips, 11302) {
        let mut connection = client.connect(to)?;
        connection.ask()?;
        connection.say("shut")?;
        connection.read_end()?;
        let flow = flow(test, to)?;
        ensure!(flow.state == "established" && flow.timeout_s >= 3600, "{flow:?}");
        // The other direction is open.
        connection.say("hostname")?;
        let start = Instant::now();
        loop {
            let sockets = client.namespace.run("ss", &["-Htn", "state", "close-wait"])?;
            let unsent = sockets.split_whitespace().nth(1).map(str::to_owned);
            if unsent.as_deref() == Some("0") {
                break;
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "the server does not take what the client still says: {sockets}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

/// The flow of the only connection to a frontend.
fn flow(test: &mut Test, frontend: SocketAddr) -> Result<FlowRow> {
    let frontend = frontend.to_string();
    let text = test.daemon().ctl(&["flows", "list", "--frontend", &frontend, "-o", "json"])?;
    let list: serde_json::Value = serde_json::from_str(&text)?;
    let mut flows: Vec<FlowRow> = serde_json::from_value(list["items"].clone())?;
    ensure!(flows.len() == 1, "flows to {frontend}: {flows:?}");
    flows.pop().context("a flow")
}
