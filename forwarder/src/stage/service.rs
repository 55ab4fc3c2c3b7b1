//! Decides what the first packet of a connection is: whose it is, which Service it asks for, which endpoint serves it.
//!
//! The rules were decided when the tables were compiled (`control/compile`); here a packet only selects one of them.

use config::gateway::Algorithm;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Answer, BURST, Choice, Layer4, Packet, Rewrite};
use crate::pipeline::{Context, Rng};
use crate::stage::flow::{check_source, refuse_unless_off};
use crate::stage::{egress, overflow};
use crate::table::flow_map::FlowRef;
use crate::table::prefetch;
use crate::tables::{
    Action, Backends, Frontend, FrontendKey, FrontendKind, Identity, Origin, ServicePort, Vip,
};
use crate::trace::{ChosenBy, Step, Trace};
use crate::verdict::Reason;
use crate::wire::tcp;

/// Judges the packets that belong to no flow.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    if burst.iter().any(is_first) {
        prefetch_tables(burst, cx);
    }
    for (index, packet) in burst.iter_mut().enumerate() {
        if is_first(packet) {
            first_packet(packet, index, cx, trace);
        }
    }
}

/// True for packets that no flow was found for.
#[inline]
fn is_first(packet: &Packet) -> bool {
    packet.undecided() && packet.flow.is_none() && !packet.is_stateless
}

/// Asks for what the first packets of connections are about to read, step by step for all of them: each step leads to the next, and a
/// gateway has more Services than its cache has room for.
fn prefetch_tables(burst: &[Packet], cx: &Context<'_>) {
    let tables = cx.tables;
    let mut frontends: [Option<&Frontend>; BURST] = [None; BURST];
    let firsts =
        || burst.iter().enumerate().filter(|(_, packet)| is_first(packet) && has_ports(packet.layer4));
    for (_, packet) in firsts() {
        tables.frontends.prefetch(&frontend_key(packet));
        tables.vips.prefetch(&packet.tuple.src);
    }
    for (index, packet) in firsts() {
        let frontend = tables.frontends.get(&frontend_key(packet)).map(|frontend| &**frontend);
        frontend.into_iter().for_each(prefetch);
        frontends[index] = frontend;
    }
    // The lists for the three origins are mostly one.
    let backends = frontends.map(|frontend| match &frontend?.from_outside {
        Action::Dnat { backends, .. } => Some(&**backends),
        _ => None,
    });
    for (backends, frontend) in backends.iter().zip(frontends) {
        backends.iter().for_each(|backends| prefetch(*backends));
        frontend.iter().for_each(|frontend| prefetch(&*frontend.service));
    }
    let hash = |packet: &Packet| packet.tuple.stable_hash(tables.settings.lb_key);
    for (index, packet) in firsts() {
        backends[index].iter().for_each(|backends| backends.spread.prefetch(hash(packet)));
    }
    for (index, packet) in firsts() {
        let Some(backends) = backends[index] else { continue };
        backends.endpoints.get(backends.spread.by_hash(hash(packet))).into_iter().for_each(prefetch);
    }
}

fn frontend_key(packet: &Packet) -> FrontendKey {
    let Tuple { dst: addr, dst_port: port, protocol, .. } = packet.tuple;
    FrontendKey { addr, port, protocol }
}

fn first_packet(packet: &mut Packet, index: usize, cx: &mut Context<'_>, trace: &mut impl Trace) {
    let source = packet.tuple.src;
    let mut checked = check_source(source, packet.port, cx.tables, cx.fib);
    if checked.is_ok() && cx.tables.vips.get(&source).is_some() {
        checked = refuse_unless_off(Reason::OwnSource, &cx.tables.settings);
    }
    if let Err(reason) = checked {
        return packet.drop(reason);
    }
    let origin = origin(source, cx);
    trace.step(index, || Step::Origin(origin));
    if has_ports(packet.layer4)
        && let Some(frontend) = cx.tables.frontends.get(&frontend_key(packet))
    {
        trace.step(index, || Step::Frontend { service: frontend.service.clone(), kind: frontend.kind });
        return serve(packet, index, frontend, origin, cx, trace);
    }
    if let Some(vip) = cx.tables.vips.get(&packet.tuple.dst) {
        return owned_address(packet, index, *vip, origin, cx, trace);
    }
    let identity = cx.tables.identities.lookup(packet.tuple.dst);
    if identity == Some(Identity::ServiceRange) {
        trace.step(index, || Step::UnknownService);
        return packet.drop(Reason::UnknownService);
    }
    if has_ports(packet.layer4)
        && let Some(out) = overflow::answer(&packet.tuple, cx)
    {
        return overflow::forward(packet, index, out, cx, trace);
    }
    if egress::judge(packet, index, (origin, identity), cx, trace) {
        return;
    }
    trace.step(index, || Step::NotAService(identity));
    if may_begin(packet.layer4) && !cx.flows.is_free(&packet.tuple.reversed()) {
        // Its answers would be taken for those of a connection through a Service, from the same port to the same endpoint: it gets
        // another source port, and a flow.
        packet.out = packet.tuple;
        packet.rewrite = Rewrite::Translate;
        packet.choice = Some(Choice::default());
    }
}

/// True for packets by which a connection may begin that is merely routed.
fn may_begin(layer4: Layer4) -> bool {
    match layer4 {
        Layer4::Tcp { flags } => flags & (tcp::SYN | tcp::ACK) == tcp::SYN,
        Layer4::Udp | Layer4::Sctp => true,
        _ => false,
    }
}

/// Who the source is, by podCIDRs, cluster CIDRs and Node addresses.
fn origin(source: Addr, cx: &Context<'_>) -> Origin {
    match cx.tables.identities.lookup(source) {
        Some(Identity::Pod) => Origin::Pod,
        Some(Identity::Node) => Origin::Node,
        Some(Identity::ServiceRange) | None => Origin::Outside,
    }
}

fn has_ports(layer4: Layer4) -> bool {
    matches!(layer4, Layer4::Tcp { .. } | Layer4::Udp | Layer4::Sctp)
}

/// A ClusterIP is for the inside, unless the port says otherwise.
fn is_cluster_internal(packet: &Packet, cluster_ip: bool, origin: Origin, cx: &Context<'_>) -> bool {
    let port = cx.tables.settings.ports.get(usize::from(packet.port)).copied().unwrap_or_default();
    cluster_ip && origin == Origin::Outside && port.outside && !port.expose_cluster_ips
}

/// A packet to a frontend.
fn serve(
    packet: &mut Packet,
    index: usize,
    frontend: &Frontend,
    origin: Origin,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) {
    if is_cluster_internal(packet, frontend.kind == FrontendKind::ClusterIp, origin, cx) {
        return packet.drop(Reason::ClusterInternal);
    }
    if !frontend.source_ranges.is_empty() {
        let source: std::net::IpAddr = packet.tuple.src.into();
        match frontend.source_ranges.iter().find(|range| range.contains(&source)) {
            Some(range) => trace.step(index, || Step::SourceRange(*range)),
            None => return packet.drop(Reason::SourceRange),
        }
    }
    if let Layer4::Tcp { flags } = packet.layer4 {
        if !tcp::valid_flags(flags) {
            return packet.drop(Reason::BadTcpFlags);
        }
        let is_end = flags & (tcp::RST | tcp::FIN) != 0;
        if is_end && let Some(out) = overflow::request(&packet.tuple, cx) {
            return overflow::forward(packet, index, out, cx, trace);
        }
        if !tcp::may_be_first(flags) {
            return packet.drop(Reason::NoFlow);
        }
    }
    match frontend.action(origin) {
        Action::Drop(reason) => packet.drop(*reason),
        Action::Reject(reason) => reject(packet, *reason),
        Action::Dnat { backends, masquerade, list } => {
            trace.step(index, || Step::List { list: *list, endpoints: backends.endpoints.len() });
            let (chosen, by) = choose(packet, frontend, backends, cx);
            let endpoint = &backends.endpoints[chosen];
            trace.step(index, || Step::Chosen {
                addr: endpoint.addr.into(),
                port: endpoint.port,
                name: endpoint.name.clone(),
                node: endpoint.node.clone(),
                by,
                remembered: frontend.service.affinity_timeout_s.is_some(),
            });
            packet.out = Tuple { dst: endpoint.addr, dst_port: endpoint.port, ..packet.tuple };
            packet.rewrite = Rewrite::Translate;
            packet.error_source = Some(packet.tuple.dst);
            packet.choice = Some(Choice {
                service: frontend.service.stable_id,
                tally: endpoint.tally,
                masquerade: *masquerade,
                egress: None,
                by_hash: by == ChosenBy::Maglev,
                affinity_timeout_s: frontend.service.affinity_timeout_s.unwrap_or(0),
            });
        }
    }
}

/// Index of the endpoint for a new connection. Session affinity goes by client address and service port, whatever the VIP and the
/// source port (kubernetes pkg/proxy/iptables/proxier.go); a remembered endpoint counts only while it is in the list in use.
fn choose(
    packet: &Packet,
    frontend: &Frontend,
    backends: &Backends,
    cx: &mut Context<'_>,
) -> (usize, ChosenBy) {
    let has_affinity = frontend.service.affinity_timeout_s.is_some();
    if has_affinity
        && let Some((addr, port)) = remembered(cx, packet.tuple.src, &frontend.service)
        && let Some(index) = backends.endpoints.iter().position(|e| e.addr == addr && e.port == port)
    {
        return (index, ChosenBy::Affinity);
    }
    let spread = &backends.spread;
    let by_hash = || spread.by_hash(packet.tuple.stable_hash(cx.tables.settings.lb_key));
    if !has_affinity
        && (spread.algorithm() == Algorithm::Maglev
            || overflow::must_go_by_hash(packet, &backends.endpoints[by_hash()], cx))
    {
        return (by_hash(), ChosenBy::Maglev);
    }
    let mut rng = Rng::new(moment(packet, frontend, cx));
    let mut random = || rng.next();
    match spread.algorithm() {
        Algorithm::LeastConnections => {
            let load = |index: usize| {
                let endpoint = &backends.endpoints[index];
                endpoint.load(cx.flows.tally(endpoint.tally))
            };
            (spread.by_load(random, load), ChosenBy::LeastConnections)
        }
        // A client that session affinity forgot gets another endpoint: its hash would give it the same one.
        Algorithm::Maglev | Algorithm::Random => (spread.at_random(&mut random), ChosenBy::Random),
    }
}

/// A seed that is the same for all packets of one second, on every worker, that must meet one endpoint: a connection's, or with session
/// affinity a client's. They may be judged before the choice for the first of them is known. It is another one each second.
fn moment(packet: &Packet, frontend: &Frontend, cx: &Context<'_>) -> u64 {
    let hash = match frontend.service.affinity_timeout_s {
        Some(_) => cx.affinity.hash(&affinity_tuple(packet.tuple.src, frontend.service.stable_id)),
        None => packet.hash,
    };
    // Odd constants of splitmix64: neighboring seconds are not neighboring seeds.
    let mixed = hash ^ u64::from(cx.now_s).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// What session affinity is kept under: the client and the service port, as a tuple of no real protocol.
pub fn affinity_tuple(client: Addr, service: u64) -> Tuple {
    Tuple {
        src: client,
        dst: Addr::v6(u128::from(service)),
        src_port: 0,
        dst_port: 0,
        protocol: AFFINITY_PROTOCOL,
    }
}

/// Reserved by IANA, so that it is no tuple of a packet.
const AFFINITY_PROTOCOL: u8 = 255;

fn remembered(cx: &Context<'_>, client: Addr, service: &ServicePort) -> Option<(Addr, u16)> {
    let tuple = affinity_tuple(client, service.stable_id);
    let hit = cx.affinity.lookup(&tuple, cx.affinity.hash(&tuple))?;
    (!is_forgotten(&hit.flow, service.affinity_timeout_s?, cx.now_s)).then(|| hit.flow.endpoint())
}

/// True if a remembered client is over the time that its Service gives it now: ageing is incremental, and by the time that the Service gave
/// when the entry was made.
pub fn is_forgotten(entry: &FlowRef<'_>, timeout_s: u32, now_s: u32) -> bool {
    now_s.wrapping_sub(entry.last_seen_s()) > timeout_s
}

/// A packet to an address of Services that is no frontend.
fn owned_address(
    packet: &mut Packet,
    index: usize,
    vip: Vip,
    origin: Origin,
    cx: &Context<'_>,
    trace: &mut impl Trace,
) {
    if is_cluster_internal(packet, vip.cluster_ip, origin, cx) {
        trace.step(index, || Step::InternalAddress);
        return packet.drop(Reason::ClusterInternal);
    }
    trace.step(index, || Step::OwnedAddress(packet.layer4));
    match packet.layer4 {
        Layer4::Echo { request: true } => packet.answer(Answer::EchoReply, Reason::EchoAnswered),
        Layer4::Echo { request: false } | Layer4::IcmpOther => packet.drop(Reason::IcmpNotForUs),
        Layer4::IcmpError => packet.drop(Reason::NoFlow),
        // No fragment comes here but as part of its datagram.
        Layer4::Malformed | Layer4::Fragment => packet.drop(Reason::BadL4Header),
        Layer4::Tcp { flags } if !tcp::valid_flags(flags) => packet.drop(Reason::BadTcpFlags),
        Layer4::Tcp { .. } | Layer4::Udp | Layer4::Sctp | Layer4::Other => {
            reject(packet, Reason::UnknownPort)
        }
    }
}

/// TCP gets a RST, since an ICMP error would leave the client waiting; everything else ICMP port unreachable.
fn reject(packet: &mut Packet, reason: Reason) {
    match packet.layer4 {
        // RFC 9293 section 3.10.7.1: a RST is never answered.
        Layer4::Tcp { flags } if flags & tcp::RST != 0 => packet.drop(reason),
        Layer4::Tcp { .. } if packet.tuple.protocol == protocol::TCP => packet.answer(Answer::Reset, reason),
        _ => packet.answer(Answer::PortUnreachable, reason),
    }
}
