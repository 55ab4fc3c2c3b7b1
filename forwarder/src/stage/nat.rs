//! Writes down the flow of a new connection, with the source address and port that it leaves with.
//!
//! Runs after the route is known: a packet that was rejected or cannot leave never creates a flow.

use crate::addr::{Addr, Tuple};
use crate::packet::{Choice, Layer4, Packet};
use crate::pipeline::Context;
use crate::stage::flow::{Phase, belongs_to};
use crate::stage::overflow;
use crate::stage::service::{affinity_tuple, is_forgotten};
use crate::stats::Counter;
use crate::table::flow_map::{Direction, FlowId, Hit, InsertError, NewFlow};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};

/// How often another source is tried when other workers take the same ones at the same time.
const ATTEMPTS: u32 = 4;
/// Ports of an address that are looked at, at random, before one is taken over.
const PROBES: u32 = 128;

/// Creates the flows of the burst.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    let mut connections = 0;
    for packet in burst.iter().filter(|packet| packet.choice.is_some()) {
        // Of those that are masqueraded the answers are not known yet.
        cx.flows.prefetch_both(cx.flows.hash(&packet.out.reversed()));
        cx.flows.prefetch_both(packet.hash);
        connections += 1;
    }
    cx.flows.prefetch_free(cx.flow_worker, connections);
    for (index, packet) in burst.iter_mut().enumerate() {
        let leaves_by = match packet.verdict {
            Verdict::Forward { port } | Verdict::Hold { port } => port,
            _ => continue,
        };
        if let Some(choice) = packet.choice.take()
            && let Err(reason) = connect(packet, index, choice, leaves_by, cx, trace)
        {
            packet.drop(reason);
        }
    }
}

/// Chooses the source and publishes the flow; again if another worker took the same source at the same time.
fn connect(
    packet: &mut Packet,
    index: usize,
    choice: Choice,
    leaves_by: u8,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) -> Result<(), Reason> {
    for _ in 0..ATTEMPTS {
        (packet.out.src, packet.out.src_port) = (packet.tuple.src, packet.tuple.src_port);
        choose_source(packet, index, &choice, leaves_by, cx, trace)?;
        match publish(packet, &choice, cx) {
            Ok(()) => return Ok(()),
            Err(InsertError::ReplyTaken) => {}
            // Nothing is translated: it goes on as if it were merely routed.
            Err(InsertError::Full | InsertError::EmbryonicFull) if packet.out == packet.tuple => {
                return Ok(());
            }
            Err(InsertError::Full | InsertError::EmbryonicFull) => {
                let goes_on = overflow::go_on(packet, index, &choice, cx, trace);
                return if goes_on { Ok(()) } else { Err(Reason::FlowTableFull) };
            }
        }
    }
    Err(Reason::SnatPortsExhausted)
}

/// Chooses the source that the packet leaves with.
fn choose_source(
    packet: &mut Packet,
    index: usize,
    choice: &Choice,
    leaves_by: u8,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) -> Result<(), Reason> {
    let client = packet.tuple.src;
    let (source, because) = if choice.masquerade || client == packet.out.dst {
        let ports = cx.tables.settings.snat_port_first..=cx.tables.settings.snat_port_last;
        let addresses = masquerade_addresses(client, choice.egress, leaves_by, cx);
        let because = match choice {
            Choice { egress: Some(_), .. } => "a pod's connection to the outside, by [[egress]]",
            Choice { masquerade: true, .. } => "the rule says masquerade",
            _ => "client and endpoint are one pod",
        };
        (free_source(packet, addresses, ports, cx), because)
    } else if !is_usable(&packet.out.reversed(), packet, cx) && !same_connection(packet, cx) {
        // Another connection of this client, through another VIP, has the same reply tuple: take another source port.
        let source = free_source(packet, std::iter::once(client), 1024..=65535, cx);
        (source, "the same port of this client is in use towards this endpoint by another VIP")
    } else {
        return Ok(());
    };
    let (addr, port) = source.ok_or(Reason::SnatPortsExhausted)?;
    (packet.out.src, packet.out.src_port) = (addr, port);
    if let Layer4::Echo { .. } = packet.layer4 {
        // An identifier stands where both ports stand elsewhere (RFC 5508 section 3.1).
        packet.out.dst_port = port;
    }
    trace.step(index, || Step::Masquerade { addr: addr.into(), port, because });
    Ok(())
}

/// Makes the flow, and remembers the endpoint if the Service wants that.
fn publish(packet: &mut Packet, choice: &Choice, cx: &mut Context<'_>) -> Result<(), InsertError> {
    let phase = Phase::first(packet) as u8;
    if cx.read_only {
        return if cx.flows.has_room(phase) { Ok(()) } else { Err(InsertError::Full) };
    }
    let endpoint = (packet.out.dst, packet.out.dst_port);
    let new = NewFlow {
        original: packet.tuple,
        reply: Some(packet.out.reversed()),
        phase,
        timeout_s: 0,
        service: choice.service,
        endpoint_addr: endpoint.0,
        endpoint_port: endpoint.1,
        generation: cx.tables.generation as u32,
        flags: 0,
        tally: choice.tally,
    };
    let inserted = cx.flows.insert(cx.flow_worker, &new, cx.now_s)?;
    let is_new = inserted.is_new;
    cx.counters.add(Counter::flows_created, u64::from(is_new));
    // The other one may have come first, by another queue or earlier in this burst.
    belongs_to(packet, &Hit { direction: inserted.direction, flow: inserted.flow });
    if is_new && choice.affinity_timeout_s > 0 {
        remember(packet.tuple.src, choice, endpoint, cx);
    }
    Ok(())
}

/// True if no other connection has answers with this tuple.
fn is_usable(answer: &Tuple, packet: &Packet, cx: &Context<'_>) -> bool {
    let vip = (packet.tuple.dst, packet.tuple.dst_port);
    cx.flows.is_free(answer) && !overflow::may_clash(answer, vip, cx)
}

/// True if the flow of this very packet was created since the flow stage looked, so that the reply tuple is its own.
fn same_connection(packet: &Packet, cx: &Context<'_>) -> bool {
    cx.flows.lookup(&packet.tuple, packet.hash).is_some()
}

/// The addresses to masquerade to, those to be used first in front: those of the `[[egress]]` rule if it has any of the family, else
/// `[snat] addresses` of the family, else that of the port that the packet leaves by.
fn masquerade_addresses<'c>(
    client: Addr,
    egress: Option<u16>,
    leaves_by: u8,
    cx: &Context<'c>,
) -> impl Iterator<Item = Addr> + Clone + use<'c> {
    let v4 = client.is_v4();
    let settings = &cx.tables.settings;
    let of_rule =
        egress.and_then(|index| settings.egress.get(usize::from(index))).map(|rule| &rule.addresses);
    let addresses =
        of_rule.filter(|list| list.iter().any(|addr| addr.is_v4() == v4)).unwrap_or(&settings.snat_addresses);
    let listed = addresses.iter().copied().filter(move |addr| addr.is_v4() == v4);
    let own = match listed.clone().next() {
        Some(_) => None,
        None => cx.fib.own_address(leaves_by, v4),
    };
    listed.chain(own)
}

/// A source that no other flow uses towards this endpoint: the client's own port if it lies in `ports`, else one at random (RFC 6056 section
/// 3.3.1), else that of a flow which nobody will miss, else any. Endpoint-dependent, so that each endpoint has the whole range.
fn free_source(
    packet: &Packet,
    addresses: impl Iterator<Item = Addr> + Clone,
    ports: std::ops::RangeInclusive<u16>,
    cx: &mut Context<'_>,
) -> Option<(Addr, u16)> {
    let is_echo = matches!(packet.layer4, Layer4::Echo { .. });
    let answer = |addr, port| {
        let dst_port = if is_echo { port } else { packet.out.dst_port };
        Tuple { src: addr, src_port: port, dst_port, ..packet.out }.reversed()
    };
    let (first, count) = (u32::from(*ports.start()), ports.len() as u32);
    let wanted = Some(packet.tuple.src_port).filter(|port| ports.contains(port));
    let mut spare: Option<Spare> = None;
    for addr in addresses.clone() {
        if let Some(port) = wanted
            && is_usable(&answer(addr, port), packet, cx)
        {
            return Some((addr, port));
        }
        let start = cx.rng.next();
        for i in 0..PROBES.min(count) {
            // A short range is looked through.
            let random = if count <= PROBES { start.wrapping_add(i.into()) } else { cx.rng.next() };
            let port = (first + (random % u64::from(count)) as u32) as u16;
            let tuple = answer(addr, port);
            if is_usable(&tuple, packet, cx) {
                return Some((addr, port));
            }
            let other = Spare::of(&tuple, (addr, port), packet, cx);
            spare = spare.into_iter().chain(other).min_by_key(|spare| spare.rank);
        }
    }
    if let Some(spare) = spare {
        if !cx.read_only {
            cx.flows.remove(cx.flow_worker, spare.flow);
        }
        return Some(spare.source);
    }
    let mut all = addresses.flat_map(|addr| ports.clone().map(move |port| (addr, port)));
    all.find(|(addr, port)| is_usable(&answer(*addr, *port), packet, cx))
}

/// A source that is taken by a flow which is over, or which nobody has answered yet. Linux lets go of such first too (nf_conntrack early_drop).
struct Spare {
    source: (Addr, u16),
    flow: FlowId,
    /// Those that are over first, then those that have been silent for longest.
    rank: (bool, u32),
}

impl Spare {
    fn of(answer: &Tuple, source: (Addr, u16), packet: &Packet, cx: &Context<'_>) -> Option<Spare> {
        let hit = cx.flows.lookup(answer, cx.flows.hash(answer))?;
        let is_answered = match hit.flow.phase() {
            phase if Phase::OVER.contains(&phase) => true,
            phase if Phase::UNANSWERED.contains(&phase) => false,
            _ => return None,
        };
        let vip = (packet.tuple.dst, packet.tuple.dst_port);
        if hit.direction != Direction::Reply || overflow::may_clash(answer, vip, cx) {
            return None;
        }
        Some(Spare { source, flow: hit.flow.id(), rank: (!is_answered, hit.flow.last_seen_s()) })
    }
}

/// Remembers the endpoint of a client; each new connection refreshes it.
fn remember(client: Addr, choice: &Choice, endpoint: (Addr, u16), cx: &mut Context<'_>) {
    let tuple = affinity_tuple(client, choice.service);
    if let Some(hit) = cx.affinity.lookup(&tuple, cx.affinity.hash(&tuple)) {
        let is_current = hit.flow.endpoint() == endpoint && hit.flow.timeout_s() == choice.affinity_timeout_s;
        if is_current && !is_forgotten(&hit.flow, choice.affinity_timeout_s, cx.now_s) {
            hit.flow.touch(cx.now_s);
            return;
        }
        let id = hit.flow.id();
        cx.affinity.remove(cx.affinity_worker, id);
    }
    let new = NewFlow {
        original: tuple,
        reply: None,
        phase: Phase::Affinity as u8,
        timeout_s: choice.affinity_timeout_s,
        service: choice.service,
        endpoint_addr: endpoint.0,
        endpoint_port: endpoint.1,
        generation: cx.tables.generation as u32,
        flags: 0,
        tally: 0,
    };
    // A full affinity table loses only the memory of this client; the connection stands.
    let _ = cx.affinity.insert(cx.affinity_worker, &new, cx.now_s);
}
