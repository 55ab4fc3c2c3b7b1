//! Finds the flow of each packet and follows its state.
//!
//! Four passes, so that the memory of a whole burst is on its way before the first flow is looked at: buckets, records, the ways back to
//! the sources, answers.

use config::gateway::FlowsSection;

use crate::addr::{Addr, protocol};
use crate::packet::{BURST, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::stage::reset;
use crate::table::flow_map::{Direction, FlowRef, Hit};
use crate::tables::{Fib, Route, Settings, Tables};
use crate::trace::{Step, Trace};
use crate::verdict::Reason;
use crate::wire::{sctp, tcp};

/// Phases of a flow. Their idle times are set by `[flows]` in the gateway file; the defaults are those of the RFCs named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Phase {
    /// TCP before the client answered the server's SYN (RFC 5382 REQ-5: transitory, at least 4 minutes).
    TcpOpening = 0,
    /// TCP established (RFC 5382 REQ-5: at least 2 hours 4 minutes).
    TcpEstablished = 1,
    /// TCP after both FINs or a RST (RFC 5382 REQ-5: transitory).
    TcpClosing = 2,
    /// UDP that nobody answered yet.
    UdpOneWay = 3,
    /// UDP (RFC 4787 REQ-5: 5 minutes recommended).
    Udp = 4,
    /// ICMP query (RFC 5508 REQ-1: at least 60 seconds).
    Icmp = 5,
    /// SCTP: an association.
    Sctp = 6,
    /// A client remembered by session affinity; its time is its own.
    Affinity = 7,
    /// TCP that is to end because its endpoint is gone: see [`reset`]. Idle time as closing.
    TcpReset = 8,
    /// SCTP before the client answered the server's INIT ACK. Idle time as opening TCP.
    SctpOpening = 9,
    /// SCTP after ABORT or SHUTDOWN COMPLETE. Idle time as closing TCP.
    SctpClosing = 10,
}

impl Phase {
    /// All phases, in the order of their numbers.
    pub const ALL: [Phase; 11] = [
        Phase::TcpOpening,
        Phase::TcpEstablished,
        Phase::TcpClosing,
        Phase::UdpOneWay,
        Phase::Udp,
        Phase::Icmp,
        Phase::Sctp,
        Phase::Affinity,
        Phase::TcpReset,
        Phase::SctpOpening,
        Phase::SctpClosing,
    ];

    /// Phases that count as embryonic: a flood of them must not take the room of established flows.
    pub const EMBRYONIC: u16 = 1 << Phase::TcpOpening as u16 | 1 << Phase::SctpOpening as u16;

    /// Phases of connections that are over.
    pub const OVER: [u8; 3] = [Phase::TcpClosing as u8, Phase::TcpReset as u8, Phase::SctpClosing as u8];

    /// Phases of flows that nobody may have answered yet.
    pub const UNANSWERED: [u8; 3] =
        [Phase::TcpOpening as u8, Phase::UdpOneWay as u8, Phase::SctpOpening as u8];

    /// The phase that the flow of a packet begins with.
    pub fn first(packet: &Packet) -> Phase {
        let flags = if let Layer4::Tcp { flags } = packet.layer4 { flags } else { 0 };
        let protocol = packet.tuple.protocol;
        match protocol {
            // A connection that is picked up in its middle (after a flush, or from another gateway) is established.
            protocol::TCP if flags & tcp::SYN == 0 => Phase::TcpEstablished,
            protocol::TCP => Phase::TcpOpening,
            protocol::UDP => Phase::UdpOneWay,
            protocol::SCTP if first_chunk(packet) == Some(sctp::INIT) => Phase::SctpOpening,
            protocol::SCTP => Phase::Sctp,
            _ => Phase::Icmp,
        }
    }

    /// Name for `towpathctl flows`.
    pub fn name(phase: u8) -> &'static str {
        match phase {
            0 => "opening",
            1 => "established",
            2 => "closing",
            3 => "one-way",
            4 => "two-way",
            5 => "query",
            6 => "established",
            7 => "affinity",
            8 => "reset",
            9 => "opening",
            10 => "closing",
            _ => "?",
        }
    }
}

/// Flag of a flow: the endpoint answered.
pub const REPLIED: u16 = 1 << 0;
/// Flag of a flow: FIN in the original direction.
pub const FIN_ORIGINAL: u16 = 1 << 1;
/// Flag of a flow: FIN in the reply direction.
pub const FIN_REPLY: u16 = 1 << 2;

/// Finds flows. A packet of one gets its tuple to leave with; all others are left to the next stages.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    for packet in burst.iter_mut().filter(|p| p.undecided() && has_flow(p.layer4)) {
        packet.hash = cx.flows.hash(&packet.tuple);
        cx.flows.prefetch(packet.hash);
    }
    for packet in burst.iter_mut().filter(|p| p.undecided() && has_flow(p.layer4)) {
        packet.candidate = cx.flows.prefetch_record(packet.hash);
    }
    // With nothing else between them, the processor looks up several at once.
    let mut sources = [Ok(()); BURST];
    for (packet, checked) in burst.iter().zip(&mut sources) {
        if packet.undecided() && has_flow(packet.layer4) {
            *checked = check_source(packet.tuple.src, packet.port, cx.tables, cx.fib);
        }
    }
    for (index, packet) in burst.iter_mut().enumerate() {
        if !packet.undecided() || !has_flow(packet.layer4) {
            continue;
        }
        let Some(hit) = cx.flows.lookup_from(packet.candidate, &packet.tuple, packet.hash) else {
            trace.step(index, || Step::FlowMiss);
            continue;
        };
        let (direction, flow) = (hit.direction, hit.flow);
        if let Err(reason) = sources[index] {
            packet.drop(reason);
            continue;
        }
        let is_steady = is_steady(packet.layer4, direction, &flow);
        if is_steady {
            if !cx.read_only {
                flow.touch(cx.now_s);
            }
        } else if !advance(packet, index, direction, &flow, cx, trace) {
            continue;
        }
        belongs_to(packet, &hit);
        trace.step(index, || Step::FlowHit {
            direction,
            out: packet.out,
            generation: flow.generation(),
            service: flow.service(),
        });
        if !is_steady && reset::is_resetting(flow.phase()) {
            reset::judge(packet, index, &hit, trace);
        }
    }
}

/// True for packets of open connections that change nothing about them but when they were last seen: nearly all there are.
#[inline]
fn is_steady(layer4: Layer4, direction: Direction, flow: &FlowRef<'_>) -> bool {
    let phase = flow.phase();
    match layer4 {
        Layer4::Udp => {
            phase == Phase::Udp as u8 || phase == Phase::UdpOneWay as u8 && direction == Direction::Original
        }
        Layer4::Tcp { flags } => {
            let fins = flow.flags() & (FIN_ORIGINAL | FIN_REPLY);
            flags & (tcp::SYN | tcp::FIN | tcp::RST) == 0
                && phase == Phase::TcpEstablished as u8
                && fins != FIN_ORIGINAL | FIN_REPLY
        }
        _ => false,
    }
}

/// Follows what a packet does to its flow. False: the packet is not one of the flow, and dropped or left to the next stages.
#[inline(never)]
fn advance(
    packet: &mut Packet,
    index: usize,
    direction: Direction,
    flow: &FlowRef<'_>,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) -> bool {
    if let Layer4::Echo { request } = packet.layer4
        && request != (direction == Direction::Original)
    {
        // Two hosts ping each other with one identifier: the second one's tuple is that of the first one's answers.
        packet.drop(Reason::NoFlow);
        return false;
    }
    if cx.read_only {
        return true;
    }
    if is_new_connection(packet, direction, flow) {
        cx.flows.remove(cx.flow_worker, flow.id());
        trace.step(index, || Step::FlowMiss);
        return false;
    }
    let asks_again = is_first(packet, direction) && !is_opening(flow.phase());
    if !reset::is_resetting(flow.phase()) {
        follow(packet, direction, flow);
    }
    // Who asks for a connection that stands already keeps no dead one alive, as with Linux.
    if !asks_again {
        flow.touch(cx.now_s);
    }
    true
}

/// True for packets that can belong to a flow by their own tuple.
#[inline]
fn has_flow(layer4: Layer4) -> bool {
    matches!(layer4, Layer4::Tcp { .. } | Layer4::Udp | Layer4::Sctp | Layer4::Echo { .. })
}

/// Writes the translation of a flow into the packet's metadata.
#[inline]
pub fn belongs_to(packet: &mut Packet, hit: &Hit<'_>) {
    packet.flow = Some((hit.flow.id(), hit.direction));
    packet.rewrite = Rewrite::Translate;
    packet.out = hit.translated().unwrap_or(packet.tuple);
    // Whoever asked a Service knows its address only.
    let asked_a_vip = hit.direction == Direction::Original && packet.out.dst != packet.tuple.dst;
    packet.error_source = asked_a_vip.then_some(packet.tuple.dst);
}

/// Refuses a source to which the route back leaves by a port of the other side (outside against inside) than `port`, and one of our own.
///
/// This is reverse-path filtering (RFC 3704 section 2.3, feasible path) at the grain of the two sides, so that several
/// uplinks do no harm. The port of a pod is held to the strict form: the route back must leave by that very port (section 2.2). The
/// switches of `[source_checks]` are looked at only for what would be refused.
#[inline]
pub fn check_source(source: Addr, port: u8, tables: &Tables, fib: &Fib) -> Result<(), Reason> {
    let settings = |port: u8| tables.settings.ports.get(usize::from(port)).copied().unwrap_or_default();
    let back = match fib.routes.lookup(source) {
        Some(Route::NextHop(index)) => fib.next_hops.get(index as usize).map(|next_hop| next_hop.port),
        Some(Route::OnLink { port }) => Some(port),
        // An address of our own never comes from the wire.
        Some(Route::Local) => return refuse_unless_off(Reason::OwnSource, &tables.settings),
        // No way back by a port of ours: the kernel's business, or nobody's.
        Some(Route::Kernel | Route::Blackhole) | None if !settings(port).pod => return Ok(()),
        Some(Route::Kernel | Route::Blackhole) | None => None,
    };
    if back == Some(port) {
        return Ok(());
    }
    let (came, leaves) = (settings(port), back.map(settings).unwrap_or_default());
    if !came.pod && (came.outside && leaves.outside || came.inside && leaves.inside) {
        return Ok(());
    }
    let reason = match (came.pod, came.outside) {
        (true, _) => Reason::ForeignSource,
        (false, true) => Reason::PodFromOutside,
        (false, false) => Reason::ClientFromInside,
    };
    refuse_unless_off(reason, &tables.settings)
}

/// Refuses for `reason`, one of the source checks, if the gateway file leaves that one on.
#[cold]
pub fn refuse_unless_off(reason: Reason, settings: &Settings) -> Result<(), Reason> {
    let checks = settings.source_checks;
    let is_on = match reason {
        Reason::PodFromOutside => checks.pod_from_outside,
        Reason::ClientFromInside => checks.client_from_inside,
        Reason::ForeignSource => checks.foreign_source,
        Reason::OwnSource => checks.own_source,
        _ => true,
    };
    if is_on { Err(reason) } else { Ok(()) }
}

/// True for the first packet of the client on a connection that is over: port reuse (RFC 6191), a connection of its own.
#[inline]
fn is_new_connection(packet: &Packet, direction: Direction, flow: &FlowRef<'_>) -> bool {
    is_first(packet, direction) && Phase::OVER.contains(&flow.phase())
}

/// True for a packet of the client by which it asks for a connection: a SYN, or an INIT.
#[inline]
fn is_first(packet: &Packet, direction: Direction) -> bool {
    direction == Direction::Original
        && match packet.layer4 {
            Layer4::Tcp { flags } => flags & (tcp::SYN | tcp::ACK) == tcp::SYN,
            Layer4::Sctp => first_chunk(packet) == Some(sctp::INIT),
            _ => false,
        }
}

fn is_opening(phase: u8) -> bool {
    Phase::EMBRYONIC >> phase & 1 != 0
}

/// The type of the first chunk of an SCTP packet. Those that begin and end an association are alone or first in theirs (RFC 9260 sections
/// 3.3.2 and 6.10); an ABORT behind others is not seen.
fn first_chunk(packet: &Packet) -> Option<u8> {
    packet.frame.data().get(usize::from(packet.l4) + sctp::HEADER_LEN).copied()
}

/// Follows the state of a flow. No sequence numbers are tracked: a forged RST or FIN only shortens the idle time, and the next
/// packet of the real connection restores it (RFC 5961 in spirit).
#[inline]
fn follow(packet: &Packet, direction: Direction, flow: &FlowRef<'_>) {
    match packet.layer4 {
        Layer4::Tcp { flags } => follow_tcp(flags, direction, flow),
        Layer4::Sctp => follow_sctp(first_chunk(packet), direction, flow),
        Layer4::Udp if direction == Direction::Reply && flow.phase() == Phase::UdpOneWay as u8 => {
            flow.change_phase(Phase::UdpOneWay as u8, Phase::Udp as u8);
        }
        _ => {}
    }
}

fn follow_tcp(flags: u8, direction: Direction, flow: &FlowRef<'_>) {
    let phase = flow.phase();
    if flags & tcp::RST != 0 {
        if phase != Phase::TcpClosing as u8 {
            flow.change_phase(phase, Phase::TcpClosing as u8);
        }
        return;
    }
    if flags & tcp::FIN != 0 {
        flow.set_flags(match direction {
            Direction::Original => FIN_ORIGINAL,
            Direction::Reply => FIN_REPLY,
        });
    }
    let fins = flow.flags() & (FIN_ORIGINAL | FIN_REPLY);
    let next = if fins == FIN_ORIGINAL | FIN_REPLY {
        Phase::TcpClosing
    } else if phase == Phase::TcpOpening as u8 {
        if direction == Direction::Reply {
            flow.set_flags(REPLIED);
        }
        if direction == Direction::Original && flags & tcp::SYN == 0 && flow.flags() & REPLIED != 0 {
            Phase::TcpEstablished
        } else {
            Phase::TcpOpening
        }
    } else if flags & tcp::SYN != 0 {
        return;
    } else {
        Phase::TcpEstablished
    };
    if next as u8 != phase {
        flow.change_phase(phase, next as u8);
    }
}

/// RFC 9260 section 4, as far as a middlebox sees it; verification tags are not tracked, as sequence numbers of TCP are not.
fn follow_sctp(chunk: Option<u8>, direction: Direction, flow: &FlowRef<'_>) {
    let phase = flow.phase();
    let next = if matches!(chunk, Some(sctp::ABORT | sctp::SHUTDOWN_COMPLETE)) {
        Phase::SctpClosing
    } else if phase == Phase::SctpOpening as u8 {
        match direction {
            Direction::Reply => flow.set_flags(REPLIED),
            Direction::Original if chunk != Some(sctp::INIT) && flow.flags() & REPLIED != 0 => {
                return flow.change_phase(phase, Phase::Sctp as u8);
            }
            Direction::Original => {}
        }
        return;
    } else {
        Phase::Sctp
    };
    if next as u8 != phase {
        flow.change_phase(phase, next as u8);
    }
}

/// Idle times by phase, seconds, from the `[flows]` section of the gateway file.
pub fn timeouts_s(flows: &FlowsSection) -> [u32; 16] {
    let mut timeouts_s = [flows.icmp_s; 16];
    for (phase, timeout_s) in [
        (Phase::TcpOpening, flows.tcp_transitory_s),
        (Phase::TcpEstablished, flows.tcp_established_s),
        (Phase::TcpClosing, flows.tcp_transitory_s),
        (Phase::UdpOneWay, flows.udp_one_way_s),
        (Phase::Udp, flows.udp_s),
        (Phase::Icmp, flows.icmp_s),
        (Phase::Sctp, flows.tcp_established_s),
        (Phase::TcpReset, flows.tcp_transitory_s),
        (Phase::SctpOpening, flows.tcp_transitory_s),
        (Phase::SctpClosing, flows.tcp_transitory_s),
    ] {
        timeouts_s[phase as usize] = timeout_s;
    }
    timeouts_s
}
