//! What becomes of a packet, step by step: `towpathctl explain` on objects from a file, `towpathctl trace` on the live tables.
//!
//! Both build the packet in a frame of their own and run it through [`crate::pipeline`], the code of the workers, with somebody
//! listening. Nothing is changed by it: no flow is created, no counter of a worker moves.

use std::sync::Arc;

use af_xdp::{FramePool, Umem};
use config::control::{Trace as Report, TraceStep};
use config::gateway::FlowsSection;
use config::packet::{From, PacketSpec, Protocol};
use etherparse::{IpNumber, PacketBuilder, TcpHeader};
use ipnet::IpNet;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::Packet;
use crate::pipeline::{self, AnswerBudget, Context, Rng};
use crate::stage::flow::timeouts_s;
use crate::stats::Counters;
use crate::table::flow_map::{FlowMap, FlowMapConfig, FlowWorker};
use crate::table::lpm::Lpm;
use crate::tables::{
    Fib, Frontend, FrontendKind, Identity, NextHop, Origin, PortLink, PortSettings, Route, Tables,
};
use crate::trace::Step;
use crate::verdict::Verdict;

/// Judges packets that nobody sent.
pub struct Explainer {
    pool: FramePool,
    counters: Counters,
}

/// What a packet is judged by.
pub struct View<'a> {
    /// Services.
    pub tables: &'a Tables,
    /// Routes.
    pub fib: &'a Fib,
    /// Connections.
    pub flows: &'a FlowMap,
    /// A part in `flows` that is online while the packet is judged.
    pub flow_worker: &'a mut FlowWorker,
    /// Session affinity.
    pub affinity: &'a FlowMap,
    /// A part in `affinity` that is online while the packet is judged.
    pub affinity_worker: &'a mut FlowWorker,
    /// Seconds of the monotonic clock.
    pub now_s: u32,
    /// Names of the ports, by index.
    pub port_names: &'a [String],
}

impl Default for Explainer {
    fn default() -> Self {
        Explainer::new()
    }
}

impl Explainer {
    /// Takes a little memory for frames, which lives until the process ends: make one and keep it.
    pub fn new() -> Explainer {
        let pool = Umem::anonymous(2, 4096).take_frames().expect("a new UMEM has its frames");
        Explainer { pool, counters: Counters::default() }
    }

    /// Runs `spec` through the pipeline.
    ///
    /// # Errors
    /// A sentence about the packet: its families differ, or it names a port that does not exist.
    pub fn explain(&mut self, spec: &PacketSpec, view: View<'_>) -> Result<Report, String> {
        let port = port_of(spec, view.tables, view.port_names)?;
        let mac = view.fib.ports.get(usize::from(port)).map_or([0; 6], |link| link.mac);
        let bytes = build(spec, mac)?;
        let frame = self.pool.frame_from(&bytes).ok_or("no frame is free")?;
        let mut burst = [Packet::new(frame, 0, port)];
        let mut steps = Vec::new();
        let mut cx = Context {
            tables: view.tables,
            fib: view.fib,
            flows: view.flows,
            flow_worker: view.flow_worker,
            affinity: view.affinity,
            affinity_worker: view.affinity_worker,
            now_s: view.now_s,
            rng: &mut Rng::new(u64::from(view.now_s)),
            answers: &mut AnswerBudget::new(1),
            counters: &self.counters,
            read_only: true,
        };
        pipeline::run(&mut burst, &mut cx, &mut steps);
        let [packet] = burst;
        let report = report(&packet, &steps, view.tables, view.port_names);
        self.pool.push(packet.frame);
        Ok(report)
    }
}

/// A gateway that is not there: tables compiled from objects, no connections, and routes that follow from the objects. For
/// `towpathctl explain` and `towpathd replay`.
pub struct Scene {
    /// Services.
    pub tables: Tables,
    /// Routes as [`assumed_fib`] makes them.
    pub fib: Fib,
    flows: FlowMap,
    flow_worker: FlowWorker,
    affinity: FlowMap,
    affinity_worker: FlowWorker,
    port_names: Vec<String>,
    explainer: Explainer,
}

impl Scene {
    /// `port_names`: by index, as in the settings of `tables`; `inside`: prefixes of pods and addresses of nodes; `own`: addresses of the
    /// gateway.
    pub fn new(tables: Tables, port_names: Vec<String>, inside: &[IpNet], own: &[Addr]) -> Scene {
        let config = FlowMapConfig {
            capacity: 1024,
            timeouts_s: timeouts_s(&FlowsSection::default()),
            ..Default::default()
        };
        let (flows, affinity) = (FlowMap::anonymous(config), FlowMap::anonymous(config));
        let (flow_worker, affinity_worker) = (flows.worker(0), affinity.worker(0));
        let fib = assumed_fib(&tables, inside, own);
        let explainer = Explainer::new();
        Scene { tables, fib, flows, flow_worker, affinity, affinity_worker, port_names, explainer }
    }

    /// Runs `spec` through the pipeline, on a gateway that knows no connection.
    ///
    /// # Errors
    /// As [`Explainer::explain`].
    pub fn explain(&mut self, spec: &PacketSpec) -> Result<Report, String> {
        let view = View {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: 0,
            port_names: &self.port_names,
        };
        self.explainer.explain(spec, view)
    }
}

/// Routes for a gateway that is not there: pods and nodes are behind the first inside port, everything else behind the first outside
/// port, its `own` addresses are the kernel's, every next hop is known, and the ports have addresses of the documentation ranges (RFC 5737, RFC 3849).
pub fn assumed_fib(tables: &Tables, inside: &[IpNet], own: &[Addr]) -> Fib {
    let ports = &tables.settings.ports;
    let first = |wanted: fn(&PortSettings) -> bool| ports.iter().position(wanted).unwrap_or(0) as u8;
    let (outside_port, inside_port) = (first(|port| port.outside), first(|port| port.inside));
    let hop = |port: u8| NextHop {
        port,
        gateway: Addr::v4(0xc000_0200 | u32::from(port)),
        mac: Some([2, 0, 0, 0, 1, port]),
        mtu: 1500,
        tunnel: None,
    };
    let link = |port: usize| PortLink {
        mac: [2, 0, 0, 0, 0, port as u8],
        mtu: 1500,
        up: true,
        v4: Some(Addr::v4(0xc000_0280 | port as u32)),
        v6: Some(Addr::v6(0x2001_0db8_ffff_0000_0000_0000_0000_0000 | port as u128)),
    };
    let default = |net: &str| (net.parse::<IpNet>().expect("a prefix"), Route::NextHop(0));
    let routes = [default("0.0.0.0/0"), default("::/0")].into_iter();
    let own: Vec<IpNet> = own.iter().map(|addr| std::net::IpAddr::from(*addr).into()).collect();
    let others = inside.iter().filter(|net| !own.contains(net));
    let routes = routes.chain(others.map(|net| (*net, Route::NextHop(1))));
    let routes = routes.chain(own.iter().map(|net| (*net, Route::Local)));
    Fib {
        epoch: 1,
        routes: Arc::new(Lpm::build(routes)),
        next_hops: vec![hop(outside_port), hop(inside_port)],
        ports: (0..ports.len().max(1)).map(link).collect(),
        overlay: None,
    }
}

/// The port that the packet comes in by.
fn port_of(spec: &PacketSpec, tables: &Tables, names: &[String]) -> Result<u8, String> {
    let ports = &tables.settings.ports;
    let inside = match &spec.from {
        From::Port(name) => {
            return match names.iter().position(|n| n == name) {
                Some(index) => Ok(index as u8),
                None => Err(format!("no port is called {name:?}; the ports are {}", names.join(", "))),
            };
        }
        From::Inside => true,
        From::Outside => false,
        From::Guess => {
            matches!(tables.identities.lookup(spec.src.into()), Some(Identity::Pod | Identity::Node))
        }
    };
    let found = ports.iter().position(|port| if inside { port.inside } else { port.outside });
    Ok(found.unwrap_or(0) as u8)
}

/// The packet as bytes, checksums included.
fn build(spec: &PacketSpec, mac: [u8; 6]) -> Result<Vec<u8>, String> {
    use std::net::IpAddr::{V4, V6};
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], mac);
    let ip = match (spec.src, spec.dst) {
        (V4(src), V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (V6(src), V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        (src, dst) => return Err(format!("{src} and {dst} are not of one address family")),
    };
    let mut bytes = Vec::new();
    let written = match spec.protocol {
        Protocol::Tcp => {
            let mut header = TcpHeader::new(spec.src_port, spec.dst_port, 1, 64_240);
            (header.fin, header.syn) = (spec.tcp_flags & 1 != 0, spec.tcp_flags & 2 != 0);
            (header.rst, header.psh) = (spec.tcp_flags & 4 != 0, spec.tcp_flags & 8 != 0);
            header.ack = spec.tcp_flags & 16 != 0;
            ip.tcp_header(header).write(&mut bytes, &[])
        }
        Protocol::Udp => ip.udp(spec.src_port, spec.dst_port).write(&mut bytes, &[]),
        Protocol::Icmp if spec.src.is_ipv4() => {
            ip.icmpv4_echo_request(spec.src_port, 1).write(&mut bytes, &[])
        }
        Protocol::Icmp => ip.icmpv6_echo_request(spec.src_port, 1).write(&mut bytes, &[]),
        Protocol::Sctp => {
            let mut header = [0u8; 12];
            header[0..2].copy_from_slice(&spec.src_port.to_be_bytes());
            header[2..4].copy_from_slice(&spec.dst_port.to_be_bytes());
            crate::wire::sctp::set_checksum(&mut header);
            ip.write(&mut bytes, IpNumber(protocol::SCTP), &header)
        }
    };
    written.map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Ports of an address that are named in a trace at most.
const PORTS_NAMED: usize = 8;

/// The ports that an address is served on, with their Services: `default/web 80/TCP, 443/TCP; shop/billing 444/TCP`.
fn served_on(tables: &Tables, addr: Addr) -> String {
    let of_address = tables.frontends.iter().filter(|(key, _)| key.addr == addr);
    let mut ports: Vec<_> = of_address
        .map(|(key, frontend)| {
            let service = format!("{}/{}", frontend.service.namespace, frontend.service.name);
            (service, key.port, port_name(key.port, key.protocol))
        })
        .collect();
    ports.sort();
    let more = ports.len().saturating_sub(PORTS_NAMED);
    ports.truncate(PORTS_NAMED);
    let by_service: Vec<String> = ports
        .chunk_by(|one, other| one.0 == other.0)
        .map(|of_one| {
            let names: Vec<&str> = of_one.iter().map(|(_, _, name)| name.as_str()).collect();
            format!("{} {}", of_one[0].0, names.join(", "))
        })
        .collect();
    match (by_service.is_empty(), more) {
        (true, _) => "no Service has a port there".to_owned(),
        (_, 0) => format!("served there: {}", by_service.join("; ")),
        (_, more) => format!("served there: {}; and {more} more", by_service.join("; ")),
    }
}

/// The Service of a flow, by the id that the flow keeps.
fn service_of_flow(tables: &Tables, id: u64) -> String {
    if id == 0 {
        return "of no Service: it has another source port than another one through a Service".to_owned();
    }
    let found = tables.frontends.iter().find(|(_, frontend)| frontend.service.stable_id == id);
    let owner = |frontend: &Frontend| match frontend.kind {
        FrontendKind::HostPort => "Pod",
        _ => "Service",
    };
    match found.map(|(_, frontend)| (owner(frontend), &frontend.service)) {
        Some((owner, port)) if port.port_name.is_empty() => {
            format!("of {owner} {}/{}", port.namespace, port.name)
        }
        Some((owner, port)) => format!("of {owner} {}/{} port {}", port.namespace, port.name, port.port_name),
        None => "of a Service that is gone".to_owned(),
    }
}

/// Words for what the pipeline found.
fn report(packet: &Packet, steps: &[Step], tables: &Tables, port_names: &[String]) -> Report {
    let name =
        |port: u8| port_names.get(usize::from(port)).cloned().unwrap_or_else(|| format!("port {port}"));
    let mut report = Report { packet: packet.tuple.to_string(), ..Report::default() };
    for step in steps {
        let text = match step {
            Step::Route { prefix, gateway, port } => {
                format!("{prefix} by port {}, next hop {gateway}", name(*port))
            }
            Step::Verdict(Verdict::Forward { port }) => format!("forwarded by port {}", name(*port)),
            step => step.to_string(),
        };
        let mut say = |text| report.steps.push(TraceStep { stage: step.stage().to_owned(), text });
        say(text);
        match step {
            Step::FlowHit { service, .. } => say(service_of_flow(tables, *service)),
            Step::OwnedAddress(_) | Step::InternalAddress => say(served_on(tables, packet.tuple.dst)),
            Step::Origin(origin) => report.origin = Some(origin_name(*origin).to_owned()),
            Step::Frontend { .. } => report.frontend = Some(destination(&packet.tuple)),
            Step::Chosen { addr, port, .. } => {
                report.endpoint = Some(std::net::SocketAddr::new(*addr, *port).to_string());
            }
            _ => {}
        }
    }
    let (verdict, reason, leaves_by) = match packet.verdict {
        Verdict::Undecided => ("undecided", None, None),
        Verdict::Forward { port } => ("forward", None, Some(port)),
        Verdict::Answer { port, reason } => ("answer", Some(reason), Some(port)),
        Verdict::Punt => ("punt", None, None),
        Verdict::Hold { port } => ("hold", None, Some(port)),
        Verdict::Gather => ("gather", None, None),
        Verdict::Drop(reason) => ("drop", Some(reason), None),
    };
    report.verdict = verdict.to_owned();
    report.reason = reason.map(|reason| reason.name().to_owned());
    report.help = reason.map(|reason| reason.help().to_owned());
    report.port = leaves_by.map(name);
    if matches!(packet.verdict, Verdict::Forward { .. } | Verdict::Hold { .. }) {
        report.output = Some(packet.out.to_string());
    }
    report
}

/// Where a client is, in the word of the control protocol.
fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Outside => "outside",
        Origin::Pod => "pod",
        Origin::Node => "node",
    }
}

/// `address:port/protocol` of what a packet asks for.
fn destination(tuple: &Tuple) -> String {
    let addr: std::net::IpAddr = Addr::into(tuple.dst);
    let name = port_name(tuple.dst_port, tuple.protocol);
    match addr {
        std::net::IpAddr::V4(addr) => format!("{addr}:{name}"),
        std::net::IpAddr::V6(addr) => format!("[{addr}]:{name}"),
    }
}

/// `port/protocol`.
fn port_name(port: u16, protocol: u8) -> String {
    let protocol = match protocol {
        protocol::TCP => "TCP",
        protocol::UDP => "UDP",
        _ => "SCTP",
    };
    format!("{port}/{protocol}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::{Action, FrontendKey, ServicePort, Settings};
    use crate::verdict::Reason;

    fn scene() -> Scene {
        let settings = Settings {
            ports: vec![
                PortSettings { outside: true, ..PortSettings::default() },
                PortSettings { inside: true, ..PortSettings::default() },
            ],
            ..Settings::default()
        };
        let pods: IpNet = "10.244.0.0/16".parse().unwrap();
        let tables = Tables {
            identities: Arc::new(Lpm::build([(pods, Identity::Pod)])),
            settings: Arc::new(settings),
            ..Tables::default()
        };
        Scene::new(tables, vec!["uplink".into(), "fabric".into()], &[pods], &[])
    }

    fn spec(src: &str, dst: &str, from: From) -> PacketSpec {
        PacketSpec {
            protocol: Protocol::Udp,
            src: src.parse().unwrap(),
            src_port: 1,
            dst: dst.parse().unwrap(),
            dst_port: 2,
            tcp_flags: 0,
            from,
        }
    }

    #[test]
    fn a_packet_to_a_pod_is_routed_as_it_is() {
        let report = scene().explain(&spec("198.51.100.7", "10.244.1.2", From::Guess)).unwrap();
        assert_eq!((report.verdict.as_str(), report.port.as_deref()), ("forward", Some("fabric")));
        assert_eq!(report.output.as_deref(), Some("udp 198.51.100.7:1 > 10.244.1.2:2"));
        assert_eq!(report.origin.as_deref(), Some("outside"));
    }

    #[test]
    fn a_pod_on_its_way_out_comes_from_the_inside() {
        let report = scene().explain(&spec("10.244.1.2", "192.0.2.99", From::Guess)).unwrap();
        assert_eq!((report.verdict.as_str(), report.port.as_deref()), ("forward", Some("uplink")));
        let spoofed = scene().explain(&spec("10.244.1.2", "192.0.2.99", From::Outside)).unwrap();
        assert_eq!(spoofed.reason.as_deref(), Some("pod_from_outside"));
    }

    #[test]
    fn services_are_named_by_address_and_by_flow() {
        let mut tables = Tables::default();
        let addr = Addr::v4(0xcb00_710a);
        let mut serve = |name: &str, port_name: &str, port: u16, protocol: u8| {
            let service = Arc::new(ServicePort {
                id: 0,
                stable_id: u64::from(port),
                namespace: "default".into(),
                name: name.into(),
                port_name: port_name.into(),
                resource_version: String::new(),
                affinity_timeout_s: None,
            });
            let nothing = || Action::Drop(Reason::FrontendOff);
            let frontend = Frontend {
                service,
                kind: FrontendKind::LoadBalancer,
                from_outside: nothing(),
                from_pod: nothing(),
                from_node: nothing(),
                source_ranges: Arc::default(),
            };
            tables.frontends.insert(FrontendKey { addr, port, protocol }, Arc::new(frontend));
        };
        serve("web", "", 80, protocol::TCP);
        serve("web", "https", 443, protocol::TCP);
        serve("dns", "dns", 53, protocol::UDP);
        assert_eq!(served_on(&tables, addr), "served there: default/dns 53/UDP; default/web 80/TCP, 443/TCP");
        assert_eq!(served_on(&tables, Addr::v4(7)), "no Service has a port there");
        assert_eq!(service_of_flow(&tables, 443), "of Service default/web port https");
        assert_eq!(service_of_flow(&tables, 80), "of Service default/web");
        assert_eq!(service_of_flow(&tables, 7), "of a Service that is gone");
    }

    #[test]
    fn what_cannot_be_built_is_said_in_words() {
        let unknown = scene().explain(&spec("10.244.1.2", "192.0.2.99", From::Port("eth9".into())));
        assert_eq!(unknown.unwrap_err(), "no port is called \"eth9\"; the ports are uplink, fabric");
        let mixed = scene().explain(&spec("10.244.1.2", "2001:db8::1", From::Guess));
        assert!(mixed.unwrap_err().contains("one address family"));
    }
}
