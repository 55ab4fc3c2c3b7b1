//! A gateway with two ports, a Service with two pods in each family or Services of manifests, and packets for it.

use std::net::IpAddr;
use std::sync::Arc;

use af_xdp::{FramePool, Umem};
use config::gateway::{Algorithm, MssClamp};
use config::object;
use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use forwarder::addr::{Addr, protocol};
use forwarder::control::compile::Compiler;
use forwarder::control::state::{Operation, State};
use forwarder::packet::Packet;
use forwarder::pipeline::{self, AnswerBudget, Context, Rng};
use forwarder::stage::flow::Phase;
use forwarder::stats::{Counter, Counters};
use forwarder::table::flow_map::{FlowMap, FlowMapConfig, FlowWorker};
use forwarder::table::lpm::Lpm;
use forwarder::table::spread::Spread;
use forwarder::tables::*;
use forwarder::verdict::{Reason, Verdict};

pub const OUTSIDE: u8 = 0;
pub const INSIDE: u8 = 1;
pub const CLIENT: Addr = Addr::v4(0xc633_6407);
pub const VIP: Addr = Addr::v4(0xcb00_710a);
pub const CLUSTER_IP: Addr = Addr::v4(0x0a60_000a);
pub const POD_1: Addr = Addr::v4(0x0af4_0105);
pub const POD_2: Addr = Addr::v4(0x0af4_0206);
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
/// Of the VXLAN device of any node.
pub const VTEP_MAC: [u8; 6] = [2, 0, 0, 0, 9, 9];

pub fn port_mac(port: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, port]
}

pub fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

pub struct Gateway {
    pub tables: Tables,
    fib: Fib,
    flows: FlowMap,
    flow_worker: FlowWorker,
    affinity: FlowMap,
    affinity_worker: FlowWorker,
    rng: Rng,
    answers: AnswerBudget,
    counters: Counters,
    pool: FramePool,
    pub now_s: u32,
    /// What tables are made of, if they are made of manifests.
    state: State,
    compiler: Option<Compiler>,
}

/// Before the ports in the gateway file of [`Gateway::of_objects`].
pub const HEAD: &str = "[gateway]\nname = 'gw'\ncluster_cidrs = ['10.244.0.0/16', 'fd00:244::/48']\n\
    service_cidrs = ['10.96.0.0/16', 'fd00:96::/112']\nreturn = 'routed'\n";

impl Gateway {
    pub fn new() -> Gateway {
        Gateway::with_capacity(1024)
    }

    /// A gateway for at most `flows` connections.
    pub fn with_capacity(flows: u32) -> Gateway {
        Gateway::with_share(flows, 100)
    }

    /// A gateway with the file `head`, for at most `flows` connections, a quarter of them embryonic, that serves `objects`: manifests
    /// without `apiVersion`. Clients are all of the Internet, pods are in 10.244.0.0/16 and fd00:244::/48.
    pub fn of_objects(head: &str, flows: u32, objects: &str) -> Gateway {
        let file = format!(
            "{head}\n[[port]]\nname='up'\ninterface='g0'\nrole='outside'\n[[port]]\nname='in'\ninterface='g1'\nrole='inside'\n"
        );
        let file = config::gateway::Gateway::parse(&file, "gateway.toml").unwrap();
        let mut compiler = Compiler::new(Arc::new(file));
        compiler
            .set_own_addresses(["198.51.100.1", "10.0.0.1", "2001:db8:1::1", "fd00:1::1"].map(addr).to_vec());
        compiler.set_partial_checksums(&[true, true]);
        compiler.compile_all(&State::default(), 1);
        let mut gateway = Gateway { compiler: Some(compiler), ..Gateway::with_share(flows, 25) };
        gateway.apply(objects);
        gateway
    }

    /// Applies manifests.
    pub fn apply(&mut self, objects: &str) {
        let text: Vec<String> = objects
            .split("---\n")
            .map(|document| {
                let is_slice = document.contains("kind: EndpointSlice");
                format!("apiVersion: {}\n{document}", if is_slice { "discovery.k8s.io/v1" } else { "v1" })
            })
            .collect();
        let found = object::parse(&text.join("---\n"), "objects.yaml");
        assert!(found.faults.is_empty(), "{:?}", found.faults);
        let operations = found
            .manifests
            .into_iter()
            .map(|manifest| Operation::Apply { object: manifest.object, source: manifest.source })
            .collect();
        let compiler = self.compiler.as_mut().unwrap();
        let staged = self.state.stage(&compiler.rules(), operations, false);
        let accepted = staged.unwrap_or_else(|refusal| panic!("{refusal:?}")).commit();
        let compilation = compiler.compile(&self.state, &accepted.touched, self.tables.generation + 1);
        self.tables = (*compilation.tables).clone();
    }

    fn with_share(flows: u32, embryonic_share: u32) -> Gateway {
        let mut timeouts_s = [60; 16];
        timeouts_s[..11].copy_from_slice(&[240, 7440, 240, 30, 300, 60, 7440, 10_800, 240, 240, 240]);
        let config = FlowMapConfig {
            capacity: flows,
            embryonic_share,
            timeouts_s,
            embryonic_phases: Phase::EMBRYONIC,
            workers: 1,
            tallies: 64,
        };
        let flows = FlowMap::anonymous(config);
        let affinity = FlowMap::anonymous(config);
        let (flow_worker, affinity_worker) = (flows.worker(0), affinity.worker(0));
        let mut gateway = Gateway {
            tables: Tables { generation: 1, ..Tables::default() },
            fib: fib(),
            flows,
            flow_worker,
            affinity,
            affinity_worker,
            rng: Rng::new(1),
            answers: AnswerBudget::new(1_000_000),
            counters: Counters::default(),
            pool: Umem::anonymous(128, 4096).take_frames().unwrap(),
            now_s: 1000,
            state: State::default(),
            compiler: None,
        };
        gateway.tables.identities = Arc::new(Lpm::build(
            [
                ("10.244.0.0/16", Identity::Pod),
                ("fd00:244::/48", Identity::Pod),
                ("10.96.0.0/16", Identity::ServiceRange),
                ("fd00:96::/112", Identity::ServiceRange),
                ("10.0.0.2/32", Identity::Node),
            ]
            .map(|(net, who)| (net.parse().unwrap(), who)),
        ));
        gateway.tables.settings = Arc::new(Settings {
            ports: vec![
                PortSettings { outside: true, partial_checksums: true, ..PortSettings::default() },
                PortSettings { inside: true, partial_checksums: true, ..PortSettings::default() },
            ],
            snat_port_first: 61000,
            snat_port_last: 61999,
            ..Settings::default()
        });
        gateway.serve(false, None, 2);
        gateway
    }

    fn serve(&mut self, masquerade: bool, affinity_timeout_s: Option<u32>, pods: usize) {
        let frontends = [
            (VIP, FrontendKind::LoadBalancer),
            (CLUSTER_IP, FrontendKind::ClusterIp),
            (addr("2001:db8::10"), FrontendKind::LoadBalancer),
        ];
        for (vip, kind) in frontends {
            let owned = Vip { frontends: 2, cluster_ip: kind == FrontendKind::ClusterIp };
            self.tables.vips.insert(vip, owned);
            for (port, target, number) in [(80, 8080, protocol::TCP), (53, 5353, protocol::UDP)] {
                let endpoints: Vec<Endpoint> =
                    if vip.is_v4() { vec![POD_1, POD_2] } else { vec![addr("fd00:244:0:1::5")] }
                        .into_iter()
                        .take(pods)
                        .map(|addr| Endpoint {
                            addr,
                            port: target,
                            name: "default/web".into(),
                            node: "node-1".into(),
                            weight: 1,
                            tally: 0,
                        })
                        .collect();
                let hashes: Vec<(u64, u32)> = endpoints.iter().map(|e| (e.addr.0 as u64, 1)).collect();
                let spread = Spread::build(Algorithm::Maglev, 7, &hashes);
                let backends = Arc::new(Backends { spread, endpoints });
                let action =
                    |masquerade| Action::Dnat { backends: backends.clone(), masquerade, list: List::Cluster };
                let service = ServicePort {
                    id: 1,
                    stable_id: u64::from(port),
                    namespace: "default".into(),
                    name: "web".into(),
                    port_name: String::new(),
                    resource_version: String::new(),
                    affinity_timeout_s,
                };
                let frontend = Frontend {
                    service: Arc::new(service),
                    kind,
                    from_outside: action(masquerade),
                    from_pod: action(false),
                    from_node: action(false),
                    source_ranges: Arc::new([]),
                };
                self.tables
                    .frontends
                    .insert(FrontendKey { addr: vip, port, protocol: number }, Arc::new(frontend));
            }
        }
    }

    pub fn masquerade(&mut self, masquerade: bool) {
        self.serve(masquerade, None, 2);
    }

    pub fn affinity(&mut self, timeout_s: u32) {
        self.serve(false, Some(timeout_s), 2);
    }

    pub fn one_endpoint(&mut self) {
        self.serve(false, None, 1);
    }

    pub fn expose_cluster_ips(&mut self) {
        let mut settings = (*self.tables.settings).clone();
        settings.ports[usize::from(OUTSIDE)].expose_cluster_ips = true;
        self.tables.settings = Arc::new(settings);
    }

    /// Changes the MTU of port `port` and of its next hop, bytes.
    pub fn set_mtu(&mut self, port: u8, link: u16, next_hop: u16) {
        self.fib.ports[usize::from(port)].mtu = link;
        self.fib.next_hops[usize::from(port)].mtu = next_hop;
    }

    pub fn clamp_mss(&mut self, clamp: MssClamp) {
        let mut settings = (*self.tables.settings).clone();
        settings.mss_clamp = clamp;
        self.tables.settings = Arc::new(settings);
    }

    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    pub fn embryonic_flows(&self) -> usize {
        self.flows.embryonic_len()
    }

    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.get(counter)
    }

    pub fn reason(&self, reason: Reason) -> u64 {
        self.counters.reason(reason)
    }

    /// What the commit thread does to flows whose endpoint is gone.
    pub fn reset_flows(&mut self) {
        for flow in (0..self.flows.capacity() as u32).filter_map(|index| self.flows.snapshot(index)) {
            assert!(self.flows.set_phase_from_control(flow.id, Phase::TcpReset as u8));
        }
    }

    /// The next hop of a port does not answer.
    pub fn lose_next_hop(&mut self, port: u8) {
        self.fib.next_hops.iter_mut().filter(|hop| hop.port == port).for_each(|hop| hop.mac = None);
    }

    /// Answers that may be sent in each second.
    pub fn limit_answers(&mut self, per_second: u32) {
        self.answers = AnswerBudget::new(per_second);
    }

    /// What would become of a packet, step by step; nothing is changed by it.
    pub fn trace(&mut self, port: u8, bytes: &[u8]) -> Vec<String> {
        let mut burst = self.burst(port, &[bytes.to_vec()]);
        let mut steps = Vec::new();
        let mut cx = Context {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: self.now_s,
            rng: &mut Rng::new(1),
            answers: &mut AnswerBudget::new(1),
            counters: &Counters::default(),
            read_only: true,
        };
        pipeline::run(&mut burst, &mut cx, &mut steps);
        burst.into_iter().for_each(|packet| self.pool.push(packet.frame));
        steps.iter().map(ToString::to_string).collect()
    }

    /// From now on the pods of `nets` are behind a tunnel to `node`, of network 7 at port 4789, with our address `local`.
    pub fn tunnel(&mut self, node: Addr, local: Addr, nets: &[&str]) {
        let mut overlay = self.fib.overlay.take().map(|overlay| (*overlay).clone()).unwrap_or_default();
        (overlay.vni, overlay.port) = (7, 4789);
        overlay.addresses.push(local);
        overlay.tunnels.push(Tunnel { node, local, mac: VTEP_MAC });
        let tunnel = Some(overlay.tunnels.len() as u16 - 1);
        let mtu = 1500 - forwarder::stage::overlay::overhead(node);
        let hop = NextHop { port: INSIDE, gateway: addr("10.0.0.2"), mac: Some(NODE_MAC), mtu, tunnel };
        let index = self.fib.next_hops.len() as u32;
        self.fib.next_hops.push(hop);
        let more = nets.iter().map(|net| (net.parse().unwrap(), Route::NextHop(index)));
        let to_node = [(IpAddr::from(node).into(), Route::NextHop(1))];
        self.fib.routes = Arc::new(Lpm::build(self.fib.routes.iter().chain(to_node).chain(more)));
        self.fib.overlay = Some(Arc::new(overlay));
    }

    /// Lets `seconds` go by without a packet: what is over its time goes.
    pub fn rest(&mut self, seconds: u32) {
        self.now_s += seconds;
        for _ in 0..2 {
            self.flows.age(&mut self.flow_worker, self.now_s, self.flows.capacity());
            self.flows.quiescent(&mut self.flow_worker);
        }
    }

    /// Connections that the flow table counts for the endpoints of a frontend, in their order.
    pub fn connections(&self, vip: Addr, port: u16) -> Vec<u32> {
        let key = FrontendKey { addr: vip, port, protocol: protocol::TCP };
        let Action::Dnat { backends, .. } = &self.tables.frontends.get(&key).unwrap().from_outside else {
            panic!("no endpoints")
        };
        backends.endpoints.iter().map(|endpoint| self.flows.tally(endpoint.tally)).collect()
    }

    /// Judges and rewrites one packet; returns the frame as it leaves, or as it came.
    pub fn judge(&mut self, port: u8, bytes: &[u8]) -> (Verdict, Vec<u8>) {
        let mut bytes = bytes.to_vec();
        if bytes.len() >= 6 && bytes[..6] == ROUTER_MAC {
            bytes[..6].copy_from_slice(&port_mac(port));
        }
        let frame = self.pool.frame_from(&bytes).unwrap();
        let mut burst = [Packet::new(frame, 0, port)];
        let mut cx = Context {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: self.now_s,
            rng: &mut self.rng,
            answers: &mut self.answers,
            counters: &self.counters,
            read_only: false,
        };
        pipeline::run(&mut burst, &mut cx, &mut ());
        pipeline::count(&burst, &self.counters);
        let [mut packet] = burst;
        assert_eq!(packet.frame.data(), bytes, "judging changes no frame");
        assert!(
            packet.cut_to == 0 || !matches!(packet.verdict, Verdict::Answer { .. }),
            "an answer is not cut"
        );
        if matches!(packet.verdict, Verdict::Forward { .. } | Verdict::Answer { .. }) {
            assert!(pipeline::rewrite(&mut packet, &[], &self.fib));
        }
        let out = packet.frame.data().to_vec();
        self.pool.push(packet.frame);
        self.flows.quiescent(&mut self.flow_worker);
        self.affinity.quiescent(&mut self.affinity_worker);
        (packet.verdict, out)
    }

    /// A burst of packets that come in by `port`.
    pub fn burst(&mut self, port: u8, packets: &[Vec<u8>]) -> Vec<Packet> {
        let mut burst = Vec::with_capacity(packets.len());
        for bytes in packets {
            let mut frame = self.pool.frame_from(bytes).unwrap();
            frame.data_mut()[..6].copy_from_slice(&port_mac(port));
            burst.push(Packet::new(frame, 0, port));
        }
        burst
    }

    /// Judges and rewrites a burst; every packet must be forwarded.
    pub fn run(&mut self, burst: Vec<Packet>) {
        for packet in self.run_burst(burst) {
            self.pool.push(packet.frame);
        }
    }

    /// The same with packets that come in together; returns the frames as they leave.
    pub fn forwarded_together(&mut self, port: u8, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let burst = self.burst(port, packets);
        let mut frames = Vec::new();
        for packet in self.run_burst(burst) {
            frames.push(packet.frame.data().to_vec());
            self.pool.push(packet.frame);
        }
        frames
    }

    fn run_burst(&mut self, mut burst: Vec<Packet>) -> Vec<Packet> {
        let mut cx = Context {
            tables: &self.tables,
            fib: &self.fib,
            flows: &self.flows,
            flow_worker: &mut self.flow_worker,
            affinity: &self.affinity,
            affinity_worker: &mut self.affinity_worker,
            now_s: self.now_s,
            rng: &mut self.rng,
            answers: &mut self.answers,
            counters: &self.counters,
            read_only: false,
        };
        pipeline::run(&mut burst, &mut cx, &mut ());
        pipeline::count(&burst, &self.counters);
        for packet in &mut burst {
            assert!(matches!(packet.verdict, Verdict::Forward { .. }));
            pipeline::rewrite(packet, &[], &self.fib);
        }
        self.flows.quiescent(&mut self.flow_worker);
        self.affinity.quiescent(&mut self.affinity_worker);
        burst
    }

    pub fn forwarded(&mut self, port: u8, to: u8, bytes: &[u8]) -> Vec<u8> {
        let (verdict, out) = self.judge(port, bytes);
        assert_eq!(verdict, Verdict::Forward { port: to }, "{}", describe(bytes));
        out
    }

    pub fn answered(&mut self, port: u8, reason: Reason, bytes: &[u8]) -> Vec<u8> {
        let (verdict, out) = self.judge(port, bytes);
        assert_eq!(verdict, Verdict::Answer { port, reason }, "{}", describe(bytes));
        assert_eq!(&out[..6], &bytes[6..12], "back to the sender");
        out
    }
}

fn fib() -> Fib {
    let hop = |port, gateway: &str, mac| NextHop {
        port,
        gateway: addr(gateway),
        mac: Some(mac),
        mtu: 1500,
        tunnel: None,
    };
    let link = |port, v4: &str, v6: &str| PortLink {
        mac: port_mac(port),
        mtu: 1500,
        up: true,
        v4: Some(addr(v4)),
        v6: Some(addr(v6)),
    };
    let routes = [
        ("0.0.0.0/0", Route::NextHop(0)),
        ("::/0", Route::NextHop(0)),
        ("10.244.0.0/16", Route::NextHop(1)),
        ("fd00:244::/48", Route::NextHop(1)),
        ("172.31.0.0/16", Route::Kernel),
        ("198.51.100.1/32", Route::Local),
        ("10.0.0.1/32", Route::Local),
    ];
    Fib {
        epoch: 1,
        routes: Arc::new(Lpm::build(routes.map(|(net, route)| (net.parse().unwrap(), route)))),
        next_hops: vec![hop(OUTSIDE, "198.51.100.254", CLIENT_MAC), hop(INSIDE, "10.0.0.2", NODE_MAC)],
        ports: vec![link(OUTSIDE, "198.51.100.1", "2001:db8:1::1"), link(INSIDE, "10.0.0.1", "fd00:1::1")],
        overlay: None,
    }
}

/// Stands for the link-layer address of whatever port a packet comes in by.
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 0xff];

/// A whole frame around `l4`, which has its checksum already.
fn frame(src: Addr, dst: Addr, protocol: u8, l4: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let ethernet = PacketBuilder::ethernet2(CLIENT_MAC, ROUTER_MAC);
    let builder = match (IpAddr::from(src), IpAddr::from(dst)) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        _ => panic!("two families in one packet"),
    };
    builder.write(&mut bytes, protocol.into(), l4).unwrap();
    bytes
}

fn with_checksum(src: Addr, dst: Addr, mut transport: TransportHeader, payload: &[u8]) -> Vec<u8> {
    match (IpAddr::from(src), IpAddr::from(dst)) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let ip =
                etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber(0), s.octets(), d.octets()).unwrap();
            transport.update_checksum_ipv4(&ip, payload).unwrap();
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let ip =
                etherparse::Ipv6Header { source: s.octets(), destination: d.octets(), ..Default::default() };
            transport.update_checksum_ipv6(&ip, payload).unwrap();
        }
        _ => panic!("two families in one packet"),
    }
    let mut bytes = Vec::new();
    transport.write(&mut bytes).unwrap();
    bytes.extend(payload);
    bytes
}

pub fn tcp(src: Addr, src_port: u16, dst: Addr, dst_port: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    tcp_at(src, src_port, dst, dst_port, (1000, 0), flags, payload)
}

/// The same with a sequence number and an acknowledgment number.
pub fn tcp_at(
    src: Addr,
    src_port: u16,
    dst: Addr,
    dst_port: u16,
    (seq, ack): (u32, u32),
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut header = etherparse::TcpHeader::new(src_port, dst_port, seq, 64240);
    header.acknowledgment_number = ack;
    header.fin = flags & 0x01 != 0;
    header.syn = flags & 0x02 != 0;
    header.rst = flags & 0x04 != 0;
    header.ack = flags & 0x10 != 0;
    frame(src, dst, protocol::TCP, &with_checksum(src, dst, TransportHeader::Tcp(header), payload))
}

/// A SYN (`flags` may add ACK) with TCP options.
pub fn syn(src: Addr, src_port: u16, dst: Addr, dst_port: u16, flags: u8, options: &[u8]) -> Vec<u8> {
    let mut header = etherparse::TcpHeader::new(src_port, dst_port, 1000, 64240);
    (header.syn, header.ack) = (true, flags & 0x10 != 0);
    header.set_options_raw(options).unwrap();
    frame(src, dst, protocol::TCP, &with_checksum(src, dst, TransportHeader::Tcp(header), b""))
}

/// The TCP options of a packet.
pub fn options(packet: &[u8]) -> Vec<u8> {
    match PacketHeaders::from_ethernet_slice(packet).unwrap().transport {
        Some(TransportHeader::Tcp(tcp)) => tcp.options.as_slice().to_vec(),
        _ => panic!("no TCP"),
    }
}

pub fn udp(src: Addr, src_port: u16, dst: Addr, dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let header =
        etherparse::UdpHeader { source_port: src_port, destination_port: dst_port, length, checksum: 0 };
    frame(src, dst, protocol::UDP, &with_checksum(src, dst, TransportHeader::Udp(header), payload))
}

/// An SCTP packet of one chunk of a type, with its checksum.
pub fn sctp(src: Addr, src_port: u16, dst: Addr, dst_port: u16, chunk: u8) -> Vec<u8> {
    let mut l4 = Vec::new();
    l4.extend(src_port.to_be_bytes());
    l4.extend(dst_port.to_be_bytes());
    l4.extend([0, 0, 0, 7, 0, 0, 0, 0, chunk, 0, 0, 8, 1, 2, 3, 4]);
    forwarder::wire::sctp::set_checksum(&mut l4);
    frame(src, dst, protocol::SCTP, &l4)
}

pub fn echo(src: Addr, dst: Addr, id: u16, payload: &[u8]) -> Vec<u8> {
    let echo = etherparse::IcmpEchoHeader { id, seq: 1 };
    icmp(
        src,
        dst,
        etherparse::Icmpv4Type::EchoRequest(echo),
        etherparse::Icmpv6Type::EchoRequest(echo),
        payload,
    )
}

pub fn echo_reply(src: Addr, dst: Addr, id: u16, payload: &[u8]) -> Vec<u8> {
    let echo = etherparse::IcmpEchoHeader { id, seq: 1 };
    icmp(src, dst, etherparse::Icmpv4Type::EchoReply(echo), etherparse::Icmpv6Type::EchoReply(echo), payload)
}

/// ICMP port unreachable from `src` to `dst` about the IP packet `quoted`.
pub fn unreachable(src: Addr, dst: Addr, quoted: &[u8]) -> Vec<u8> {
    let v4 = etherparse::Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::Port);
    let v6 = etherparse::Icmpv6Type::DestinationUnreachable(etherparse::icmpv6::DestUnreachableCode::Port);
    icmp(src, dst, v4, v6, quoted)
}

/// An ICMP message, or the ICMPv6 one in its place.
fn icmp(
    src: Addr,
    dst: Addr,
    v4: etherparse::Icmpv4Type,
    v6: etherparse::Icmpv6Type,
    payload: &[u8],
) -> Vec<u8> {
    let (protocol, mut l4) = match (IpAddr::from(src), IpAddr::from(dst)) {
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let header =
                etherparse::Icmpv6Header::with_checksum(v6, s.octets(), d.octets(), payload).unwrap();
            (protocol::ICMPV6, header.to_bytes().to_vec())
        }
        _ => (protocol::ICMP, etherparse::Icmpv4Header::with_checksum(v4, payload).to_bytes().to_vec()),
    };
    l4.extend(payload);
    frame(src, dst, protocol, &l4)
}

/// A packet of a protocol without ports.
pub fn other(src: Addr, dst: Addr, protocol: u8) -> Vec<u8> {
    frame(src, dst, protocol, &[0; 20])
}

/// Puts the pseudo-header sum alone into the checksum field, as Linux does before the hardware.
pub fn leave_checksum_unfinished(mut packet: Vec<u8>) -> Vec<u8> {
    let (src, dst) = (source(&packet), destination(&packet));
    let l4 = l4_offset(&packet);
    let number = if src.is_v4() { packet[23] } else { packet[20] };
    let at = l4 + if number == protocol::TCP { 16 } else { 6 };
    let words = |addr: Addr| -> u32 {
        let bytes =
            if addr.is_v4() { addr.v4_bits().to_be_bytes().to_vec() } else { addr.0.to_be_bytes().to_vec() };
        bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum()
    };
    let mut sum = words(src) + words(dst) + u32::from(number) + (packet.len() - l4) as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    packet
}

pub fn set_ttl(packet: &mut [u8], ttl: u8) {
    packet[22] = ttl;
    packet[24..26].fill(0);
    let mut sum: u32 = packet[14..34].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[24..26].copy_from_slice(&(!sum as u16).to_be_bytes());
}

fn l4_offset(packet: &[u8]) -> usize {
    if packet[12..14] == [0x08, 0] { 34 } else { 54 }
}

pub fn source(packet: &[u8]) -> Addr {
    match PacketHeaders::from_ethernet_slice(packet).unwrap().net {
        Some(NetHeaders::Ipv4(ip, _)) => IpAddr::from(ip.source).into(),
        Some(NetHeaders::Ipv6(ip, _)) => IpAddr::from(ip.source).into(),
        _ => panic!("no IP"),
    }
}

pub fn destination(packet: &[u8]) -> Addr {
    match PacketHeaders::from_ethernet_slice(packet).unwrap().net {
        Some(NetHeaders::Ipv4(ip, _)) => IpAddr::from(ip.destination).into(),
        Some(NetHeaders::Ipv6(ip, _)) => IpAddr::from(ip.destination).into(),
        _ => panic!("no IP"),
    }
}

pub fn ports(packet: &[u8]) -> (u16, u16) {
    match PacketHeaders::from_ethernet_slice(packet).unwrap().transport {
        Some(TransportHeader::Udp(udp)) => (udp.source_port, udp.destination_port),
        Some(TransportHeader::Tcp(tcp)) => (tcp.source_port, tcp.destination_port),
        _ => panic!("no ports"),
    }
}

/// Sequence number, acknowledgment number and payload length of a TCP packet.
pub fn sequence(packet: &[u8]) -> (u32, u32, usize) {
    let headers = PacketHeaders::from_ethernet_slice(packet).unwrap();
    let payload = headers.payload.slice().len();
    match headers.transport {
        Some(TransportHeader::Tcp(tcp)) => (tcp.sequence_number, tcp.acknowledgment_number, payload),
        _ => panic!("no TCP"),
    }
}

/// One line about a packet: protocol, addresses, ports, flags; for ICMP its type and code.
pub fn describe(packet: &[u8]) -> String {
    let (src, dst) = (source(packet), destination(packet));
    match PacketHeaders::from_ethernet_slice(packet).unwrap().transport {
        Some(TransportHeader::Tcp(tcp)) => {
            let flags = [(tcp.syn, 'S'), (tcp.fin, 'F'), (tcp.rst, 'R'), (tcp.ack, 'A')];
            let flags: String = flags.iter().filter(|f| f.0).map(|f| f.1).collect();
            format!("tcp {src}:{} > {dst}:{} {flags}", tcp.source_port, tcp.destination_port)
        }
        Some(TransportHeader::Udp(udp)) => {
            format!("udp {src}:{} > {dst}:{}", udp.source_port, udp.destination_port)
        }
        Some(TransportHeader::Icmpv4(_)) => {
            let l4 = l4_offset(packet);
            let mtu = match packet[l4..l4 + 2] {
                [3, 4] => format!(" mtu {}", u16::from_be_bytes([packet[l4 + 6], packet[l4 + 7]])),
                _ => String::new(),
            };
            format!("icmp {src} > {dst} {}/{}{mtu}", packet[l4], packet[l4 + 1])
        }
        other => format!("{src} > {dst} {other:?}"),
    }
}

/// True if the checksums of the IP header and of layer 4 are right, computed anew by another library.
pub fn checksums_right(packet: &[u8]) -> bool {
    let headers = PacketHeaders::from_ethernet_slice(packet).unwrap();
    let payload = headers.payload.slice();
    let net = headers.net.unwrap();
    if let NetHeaders::Ipv4(ip, _) = &net
        && ip.calc_header_checksum() != ip.header_checksum
    {
        return false;
    }
    let mut transport = headers.transport.unwrap();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    transport.write(&mut before).unwrap();
    match &net {
        NetHeaders::Ipv4(ip, _) => transport.update_checksum_ipv4(ip, payload).unwrap(),
        NetHeaders::Ipv6(ip, _) => transport.update_checksum_ipv6(ip, payload).unwrap(),
        _ => panic!("no IP"),
    }
    transport.write(&mut after).unwrap();
    before == after
}
