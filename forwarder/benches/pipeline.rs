//! The pipeline alone, over frames in memory: `scripts/perf-pipeline` drives it and compares it with DPDK.
//!
//! One process is one world: so many connections, Services and routes. It builds them, prints what they take, and then answers
//! commands. A command is a line `KIND STAGE BURSTS`, its answer the median of ns per packet.
//!
//! KIND: established (a client's packets of random connections), reply (their endpoints'), new (the first packets of connections that
//! are removed after each burst), routed (packets for no Service). STAGE: all, or one by its name.
//!
//! Under `valgrind --tool=callgrind --instr-atstart=no --collect-atstart=no` exactly what is timed is counted, and
//! each command has a file of its own.

use std::io::{BufRead, BufWriter, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use af_xdp::Umem;
use clap::Parser;
use config::gateway::Algorithm;
use forwarder::addr::{Addr, Tuple, protocol};
use forwarder::packet::{BURST, Packet};
use forwarder::pipeline::{self, AnswerBudget, Context, Rng};
use forwarder::stage::{flow, icmp_error, nat, parse, route, service};
use forwarder::stats::Counters;
use forwarder::table::flow_map::{FlowMap, FlowMapConfig, FlowWorker};
use forwarder::table::lpm::Lpm;
use forwarder::table::spread::Spread;
use forwarder::tables::*;
use forwarder::verdict::Verdict;
use forwarder::wire::checksum;
use ipnet::IpNet;

const OUTSIDE: u8 = 0;
const INSIDE: u8 = 1;
const ENDPOINTS: u32 = 10;
/// Packets that come in turn: enough that those which come again are in no cache.
const SAMPLES: u32 = 1 << 20;
const PAYLOAD: usize = 18;
const ETHERNET: usize = 14;
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, OUTSIDE], [2, 0, 0, 0, 1, INSIDE]];

/// One world of connections, Services and routes.
#[derive(Parser)]
struct World {
    /// Connections
    #[arg(long, default_value_t = 1_000_000)]
    flows: u32,
    /// Services with ten endpoints each
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Routes to clients
    #[arg(long, default_value_t = 1_000)]
    routes: u32,
    /// IPv6 instead of IPv4
    #[arg(long)]
    v6: bool,
    /// TCP instead of UDP
    #[arg(long)]
    tcp: bool,
    /// Connections are masqueraded
    #[arg(long)]
    masquerade: bool,
    /// Ports may leave checksums unfinished, as veth does
    #[arg(long)]
    veth: bool,
    /// Write keys, order and routes for perf/dpdk/lookup to this file
    #[arg(long)]
    keys: Option<std::path::PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// SplitMix64: a different number for each `i`.
fn scatter(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl World {
    fn addr(&self, v4: u32, prefix: u16) -> Addr {
        if self.v6 { Addr::v6(u128::from(prefix) << 112 | u128::from(v4)) } else { Addr::v4(v4) }
    }

    fn protocol(&self) -> u8 {
        if self.tcp { protocol::TCP } else { protocol::UDP }
    }

    fn vip(&self, service: u32) -> Addr {
        self.addr(0x6440_0000 + service, 0x2002)
    }

    fn cluster_ip(&self, service: u32) -> Addr {
        self.addr(0x0a60_0000 + service, 0xfd96)
    }

    fn endpoint(&self, number: u32) -> Addr {
        self.addr(0x0a80_0000 + number, 0xfd44)
    }

    /// Anywhere on the Internet: 16.0.0.0 to 79.255.255.255.
    fn client(&self, i: u32) -> Addr {
        let random = scatter(u64::from(i) / 4);
        if self.v6 {
            Addr::v6(0x2003 << 112 | u128::from(random) << 48 | u128::from(i / 4))
        } else {
            Addr::v4((random as u32 & 0x3fff_ffff) + 0x1000_0000)
        }
    }

    /// What the client of connection `i` sends.
    fn original(&self, i: u32) -> Tuple {
        let service = (scatter(!u64::from(i)) % u64::from(self.services)) as u32;
        // Four connections of each client, told apart by their ports.
        let src_port = 1024 + (i % 4) as u16 * 15_000 + (i / 4 % 15_000) as u16;
        Tuple {
            src: self.client(i),
            dst: self.vip(service),
            src_port,
            dst_port: 80,
            protocol: self.protocol(),
        }
    }

    /// A packet for no Service.
    fn routed(&self, i: u32) -> Tuple {
        let pod = (scatter(!u64::from(i)) % u64::from(self.services * ENDPOINTS)) as u32;
        Tuple { dst: self.endpoint(pod), dst_port: 9, ..self.original(i) }
    }

    /// Lengths about as in the Internet's tables: most /24 and /48, some shorter, a few hosts.
    fn route_prefixes(&self) -> Vec<IpNet> {
        let lens: [u8; 8] =
            if self.v6 { [48, 48, 48, 32, 44, 40, 64, 128] } else { [24, 24, 24, 23, 22, 20, 16, 32] };
        let net = |i: u32| {
            let addr = IpAddr::from(self.client(i.wrapping_mul(977)));
            IpNet::new(addr, lens[i as usize % 8]).expect("a length").trunc()
        };
        (0..self.routes).map(net).collect()
    }

    fn fib(&self) -> Fib {
        let own = [self.addr(0xc633_6401, 0x2004), self.addr(0x0a00_0001, 0xfd01)];
        let gateway = [self.addr(0xc633_64fe, 0x2004), self.addr(0x0a00_0002, 0xfd01)];
        let link = |port: u8| {
            let own = own[usize::from(port)];
            PortLink { mac: MACS[usize::from(port)], mtu: 1500, up: true, v4: Some(own), v6: Some(own) }
        };
        let hop = |port: u8| NextHop {
            port,
            gateway: gateway[usize::from(port)],
            mac: Some([2, 0, 0, 0, 2, port]),
            mtu: 1500,
            tunnel: None,
        };
        let nets = if self.v6 { ["::/0", "fd44::/16"] } else { ["0.0.0.0/0", "10.128.0.0/9"] };
        let ends =
            nets.into_iter().zip(0..).map(|(net, hop)| (net.parse().expect("a prefix"), Route::NextHop(hop)));
        let clients = self.route_prefixes().into_iter().map(|net| (net, Route::NextHop(0)));
        Fib {
            epoch: 1,
            routes: Arc::new(Lpm::build(clients.chain(ends))),
            next_hops: vec![hop(OUTSIDE), hop(INSIDE)],
            ports: vec![link(OUTSIDE), link(INSIDE)],
            overlay: None,
        }
    }

    /// As the compiler leaves them: a ClusterIP and a load balancer's address share one list of endpoints.
    fn tables(&self) -> Tables {
        let mut tables = Tables { generation: 1, ..Tables::default() };
        for service in 0..self.services {
            let endpoints: Vec<Endpoint> = (0..ENDPOINTS).map(|i| self.backend(service, i)).collect();
            let hashes: Vec<(u64, u32)> = endpoints.iter().map(|e| (e.addr.0 as u64, 1)).collect();
            let backends =
                Arc::new(Backends { spread: Spread::build(Algorithm::Maglev, 7, &hashes), endpoints });
            let port = Arc::new(ServicePort {
                id: service + 1,
                stable_id: scatter(u64::from(service)),
                namespace: "default".into(),
                name: format!("web-{service}"),
                port_name: "http".into(),
                resource_version: String::new(),
                affinity_timeout_s: None,
            });
            for (addr, kind) in [
                (self.vip(service), FrontendKind::LoadBalancer),
                (self.cluster_ip(service), FrontendKind::ClusterIp),
            ] {
                let action =
                    |masquerade| Action::Dnat { backends: backends.clone(), masquerade, list: List::Cluster };
                let frontend = Frontend {
                    service: port.clone(),
                    kind,
                    from_outside: action(self.masquerade),
                    from_pod: action(false),
                    from_node: action(false),
                    source_ranges: Arc::new([]),
                };
                let key = FrontendKey { addr, port: 80, protocol: self.protocol() };
                tables.frontends.insert(key, Arc::new(frontend));
                tables.vips.insert(addr, Vip { frontends: 1, cluster_ip: kind == FrontendKind::ClusterIp });
            }
            for endpoint in &backends.endpoints {
                let key = EndpointKey { addr: endpoint.addr, port: endpoint.port, protocol: self.protocol() };
                tables.sole_vips.insert(key, (self.vip(service), 80));
            }
        }
        let nets = if self.v6 { ["fd44::/16", "fd96::/16"] } else { ["10.128.0.0/9", "10.96.0.0/12"] };
        let who = [Identity::Pod, Identity::ServiceRange];
        tables.identities = Arc::new(Lpm::build(
            nets.into_iter().zip(who).map(|(net, who)| (net.parse().expect("a prefix"), who)),
        ));
        let side = PortSettings { partial_checksums: self.veth, ..PortSettings::default() };
        tables.settings = Arc::new(Settings {
            ports: vec![PortSettings { outside: true, ..side }, PortSettings { inside: true, ..side }],
            snat_port_first: 1024,
            snat_port_last: 65535,
            ..Settings::default()
        });
        tables
    }

    fn backend(&self, service: u32, number: u32) -> Endpoint {
        let number = service * ENDPOINTS + number;
        Endpoint {
            addr: self.endpoint(number),
            port: 8080,
            name: format!("default/web-{service}-{number}").into(),
            node: format!("node-{}", number % 100).into(),
            weight: 1,
            tally: number + 1,
        }
    }

    /// What DPDK is to look up: numbers, keys, routes, then the order of connections with the address that the packet leaves for.
    fn write_keys(&self, path: &Path, order: &[u32], leaves_for: &[Addr]) -> std::io::Result<()> {
        let mut file = BufWriter::new(std::fs::File::create(path)?);
        for count in [self.flows, order.len() as u32, self.routes] {
            file.write_all(&count.to_le_bytes())?;
        }
        for i in 0..self.flows {
            let tuple = self.original(i);
            file.write_all(&tuple.src.v4_bits().to_be_bytes())?;
            file.write_all(&tuple.dst.v4_bits().to_be_bytes())?;
            file.write_all(&tuple.src_port.to_be_bytes())?;
            file.write_all(&tuple.dst_port.to_be_bytes())?;
            file.write_all(&[tuple.protocol, 0, 0, 0])?;
        }
        for net in self.route_prefixes() {
            file.write_all(&Addr::from(net.network()).v4_bits().to_le_bytes())?;
            file.write_all(&u32::from(net.prefix_len()).to_le_bytes())?;
        }
        for (i, addr) in order.iter().zip(leaves_for) {
            file.write_all(&i.to_le_bytes())?;
            file.write_all(&addr.v4_bits().to_le_bytes())?;
        }
        file.flush()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Established,
    Reply,
    New,
    Routed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    All,
    Parse,
    Flow,
    IcmpError,
    Service,
    Route,
    Nat,
    Rewrite,
}

const KINDS: [(&str, Kind); 4] = [
    ("established", Kind::Established),
    ("reply", Kind::Reply),
    ("new", Kind::New),
    ("routed", Kind::Routed),
];
const STAGES: [(&str, Stage); 8] = [
    ("all", Stage::All),
    ("parse", Stage::Parse),
    ("flow", Stage::Flow),
    ("icmp_error", Stage::IcmpError),
    ("service", Stage::Service),
    ("route", Stage::Route),
    ("nat", Stage::Nat),
    ("rewrite", Stage::Rewrite),
];

struct Bench {
    world: World,
    tables: Tables,
    fib: Fib,
    flows: FlowMap,
    flow_worker: FlowWorker,
    affinity: FlowMap,
    affinity_worker: FlowWorker,
    rng: Rng,
    answers: AnswerBudget,
    counters: Counters,
    burst: Vec<Packet>,
    next_burst: Vec<Packet>,
    /// Tuples of each kind but new ones, in their order.
    samples: [Vec<Tuple>; 4],
    /// How many packets of each kind have come.
    cursors: [u32; 4],
}

impl Bench {
    fn build(world: World) -> Bench {
        let mut sizes = vec![resident_bytes()];
        let tables = world.tables();
        sizes.push(resident_bytes());
        let fib = world.fib();
        sizes.push(resident_bytes());
        let config = FlowMapConfig {
            capacity: world.flows.max(64) + BURST as u32 * 2,
            tallies: (world.services * ENDPOINTS + 1).min(1 << 20),
            ..FlowMapConfig::default()
        };
        let flows = FlowMap::anonymous(FlowMapConfig { embryonic_share: 100, ..config });
        let affinity = FlowMap::anonymous(FlowMapConfig { capacity: 1024, ..config });
        let (flow_worker, affinity_worker) = (flows.worker(0), affinity.worker(0));
        let len = ETHERNET + if world.v6 { 40 } else { 20 } + if world.tcp { 20 } else { 8 } + PAYLOAD;
        let mut pool = Umem::anonymous(128, 2048).take_frames().expect("the only owner");
        let mut frame = || pool.frame_from(&vec![0; len]).expect("a free frame");
        let burst = (0..BURST).map(|_| Packet::new(frame(), 0, OUTSIDE)).collect();
        let mut bench = Bench {
            world,
            tables,
            fib,
            flows,
            flow_worker,
            affinity,
            affinity_worker,
            rng: Rng::new(1),
            answers: AnswerBudget::new(0),
            counters: Counters::default(),
            burst,
            next_burst: Vec::with_capacity(BURST),
            samples: Default::default(),
            cursors: [0; 4],
        };
        let start = Instant::now();
        bench.fill();
        let fill_s = start.elapsed().as_secs_f64();
        sizes.push(resident_bytes());
        bench.draw();
        let grown: Vec<u64> = sizes.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
        println!(
            "{{\"services_bytes\": {}, \"routes_bytes\": {}, \"flows_bytes\": {}, \"fill_s\": {fill_s:.3}}}",
            grown[0], grown[1], grown[2]
        );
        bench
    }

    /// Makes the connections, as their first packets would.
    fn fill(&mut self) {
        self.cursors[Kind::New as usize] = 0;
        while self.cursors[Kind::New as usize] < self.world.flows {
            self.prepare(Kind::New);
            self.pass(Stage::All);
        }
        // The last burst may have made more.
        let extra = self.cursors[Kind::New as usize] - self.world.flows;
        self.remove_last(extra as usize);
        assert_eq!(self.flows.len(), self.world.flows as usize, "every connection is there");
    }

    fn draw(&mut self) {
        let world = &self.world;
        let samples = SAMPLES.min(world.flows.max(1024) * 4);
        let order: Vec<u32> = (0..samples)
            .map(|i| (scatter(u64::from(i) + (1 << 40)) % u64::from(world.flows)) as u32)
            .collect();
        self.samples[Kind::Established as usize] = order.iter().map(|i| world.original(*i)).collect();
        self.samples[Kind::Routed as usize] = order.iter().map(|i| world.routed(*i)).collect();
        let reply = |tuple: &Tuple| {
            let hit = self.flows.lookup(tuple, self.flows.hash(tuple)).expect("established");
            hit.translated().expect("a reply").reversed()
        };
        let replies: Vec<Tuple> = self.samples[Kind::Established as usize].iter().map(reply).collect();
        if let Some(path) = &world.keys {
            let leaves_for: Vec<Addr> = replies.iter().map(|reply| reply.src).collect();
            world
                .write_keys(path, &order, &leaves_for)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        self.samples[Kind::Reply as usize] = replies;
    }

    /// Writes the next packets of a kind into the frames.
    fn prepare(&mut self, kind: Kind) {
        let port = if kind == Kind::Reply { INSIDE } else { OUTSIDE };
        self.next_burst.extend(self.burst.drain(..).map(|packet| Packet::new(packet.frame, 0, port)));
        std::mem::swap(&mut self.burst, &mut self.next_burst);
        let samples = &self.samples[kind as usize];
        for packet in &mut self.burst {
            let cursor = &mut self.cursors[kind as usize];
            let tuple = match kind {
                Kind::New => self.world.original(*cursor),
                _ => samples[*cursor as usize % samples.len()],
            };
            *cursor = cursor.wrapping_add(1);
            write_packet(packet.frame.data_mut(), &tuple, port);
        }
    }

    /// Judges and rewrites the burst; returns the nanoseconds that `stage` took.
    fn pass(&mut self, stage: Stage) -> u64 {
        let mut cx = Context {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: 1000,
            rng: &mut self.rng,
            answers: &mut self.answers,
            counters: &self.counters,
            read_only: false,
        };
        let burst = &mut self.burst[..];
        let mut spent = 0;
        if stage == Stage::All {
            spent = timed(|| {
                pipeline::run(burst, &mut cx, &mut ());
                rewrite(burst, cx.fib);
            });
        } else {
            let mut step = |this, work: fn(&mut [Packet], &mut Context<'_>)| {
                if this == stage {
                    spent = timed(|| work(burst, &mut cx));
                } else {
                    work(burst, &mut cx);
                }
            };
            step(Stage::Parse, |burst, cx| parse::run(burst, cx, &mut ()));
            step(Stage::Flow, |burst, cx| flow::run(burst, cx, &mut ()));
            step(Stage::IcmpError, |burst, cx| icmp_error::run(burst, cx, &mut ()));
            step(Stage::Service, |burst, cx| service::run(burst, cx, &mut ()));
            step(Stage::Route, |burst, cx| route::run(burst, cx, &mut ()));
            step(Stage::Nat, |burst, cx| nat::run(burst, cx, &mut ()));
            step(Stage::Rewrite, |burst, cx| rewrite(burst, cx.fib));
        }
        self.flows.quiescent(&mut self.flow_worker);
        spent
    }

    /// Removes the connections of the last `count` packets of the burst.
    fn remove_last(&mut self, count: usize) {
        for packet in self.burst.iter().rev().take(count) {
            let (id, _) = packet.flow.expect("a connection was made");
            self.flows.remove(&mut self.flow_worker, id);
        }
        self.flows.quiescent(&mut self.flow_worker);
    }

    /// The median of ns per packet over `bursts` bursts.
    fn measure(&mut self, kind: Kind, stage: Stage, bursts: usize) -> f64 {
        let mut spent = Vec::with_capacity(bursts);
        callgrind(START_INSTRUMENTATION);
        for _ in 0..bursts {
            self.prepare(kind);
            spent.push(self.pass(stage));
            for packet in &self.burst {
                assert!(matches!(packet.verdict, Verdict::Forward { .. }), "{:?}", packet.verdict);
                assert_eq!(packet.flow.is_some(), kind != Kind::Routed, "{:?}", packet.tuple);
            }
            if kind == Kind::New {
                self.remove_last(BURST);
            }
        }
        callgrind(DUMP_STATS);
        callgrind(STOP_INSTRUMENTATION);
        spent.sort_unstable();
        spent[bursts / 2] as f64 / BURST as f64
    }
}

#[inline(always)]
fn rewrite(burst: &mut [Packet], fib: &Fib) {
    for packet in burst {
        if matches!(packet.verdict, Verdict::Forward { .. }) {
            pipeline::rewrite(packet, &[], fib);
        }
    }
}

#[inline(never)]
fn timed(work: impl FnOnce()) -> u64 {
    let start = Instant::now();
    callgrind(TOGGLE_COLLECT);
    work();
    callgrind(TOGGLE_COLLECT);
    start.elapsed().as_nanos() as u64
}

/// Writes headers with right checksums; the payload stays.
fn write_packet(frame: &mut [u8], tuple: &Tuple, port: u8) {
    let number = tuple.protocol;
    let l4 = ETHERNET + if tuple.src.is_v4() { 20 } else { 40 };
    let l4_len = frame.len() - l4;
    frame[..6].copy_from_slice(&MACS[usize::from(port)]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 2, port]);
    if tuple.src.is_v4() {
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..24].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, number]);
        frame[16..18].copy_from_slice(&(20 + l4_len as u16).to_be_bytes());
        frame[24..26].fill(0);
        frame[26..30].copy_from_slice(&tuple.src.v4_bits().to_be_bytes());
        frame[30..34].copy_from_slice(&tuple.dst.v4_bits().to_be_bytes());
        let sum = checksum::checksum(&frame[ETHERNET..l4]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, l4_len as u8, number, 64]);
        frame[22..38].copy_from_slice(&tuple.src.0.to_be_bytes());
        frame[38..54].copy_from_slice(&tuple.dst.0.to_be_bytes());
    }
    let segment = &mut frame[l4..];
    segment[..2].copy_from_slice(&tuple.src_port.to_be_bytes());
    segment[2..4].copy_from_slice(&tuple.dst_port.to_be_bytes());
    let at = if number == protocol::TCP {
        // A data offset of five words, ACK.
        segment[4..20].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        16
    } else {
        segment[4..6].copy_from_slice(&(l4_len as u16).to_be_bytes());
        segment[6..8].fill(0);
        6
    };
    let pseudo = checksum::pseudo_sum(tuple.src, tuple.dst, number, l4_len);
    // A zero would say that there is none (RFC 768).
    let sum = match !checksum::fold(checksum::sum(segment) + pseudo) {
        0 if number == protocol::UDP => 0xffff,
        sum => sum,
    };
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

const CALLGRIND: u64 = (b'C' as u64) << 24 | (b'T' as u64) << 16;
const DUMP_STATS: u64 = CALLGRIND;
const TOGGLE_COLLECT: u64 = CALLGRIND + 2;
const START_INSTRUMENTATION: u64 = CALLGRIND + 4;
const STOP_INSTRUMENTATION: u64 = CALLGRIND + 5;

/// Asks callgrind for something; outside of it a few instructions that change nothing (valgrind.h, amd64).
#[inline(always)]
#[allow(unsafe_code)]
fn callgrind(request: u64) {
    let arguments = [request, 0, 0, 0, 0, 0];
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the rotations add up to 128 bits, so that no register changes but rdx, which is declared; valgrind reads the arguments only.
    unsafe {
        std::arch::asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") arguments.as_ptr(),
            inout("rdx") 0u64 => _,
            inout("rdi") 0u64 => _,
            options(nostack),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = arguments;
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

fn main() {
    let world = World::parse();
    let mut bench = Bench::build(world);
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line of text");
        let words: Vec<&str> = line.split(' ').collect();
        let command = match words[..] {
            [kind, stage, bursts] => KINDS
                .iter()
                .find(|named| named.0 == kind)
                .zip(STAGES.iter().find(|named| named.0 == stage))
                .zip(bursts.parse::<usize>().ok()),
            _ => None,
        };
        let Some(((kind, stage), bursts)) = command else { panic!("not KIND STAGE BURSTS: {line:?}") };
        println!("{:.3}", bench.measure(kind.1, stage.1, bursts.max(1)));
    }
}
