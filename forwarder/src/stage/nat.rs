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
use crate::table::flow_map::{Hit, InsertError, NewFlow};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};

/// Creates the flows of the burst.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
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

/// Chooses the source and publishes the flow.
fn connect(
    packet: &mut Packet,
    index: usize,
    choice: Choice,
    leaves_by: u8,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) -> Result<(), Reason> {
    let client = packet.tuple.src;
    let endpoint = (packet.out.dst, packet.out.dst_port);
    if choice.masquerade || client == endpoint.0 {
        let addr = masquerade_address(client, leaves_by, cx).ok_or(Reason::SnatPortsExhausted)?;
        let ports = cx.tables.settings.snat_port_first..=cx.tables.settings.snat_port_last;
        let port = free_port(packet, addr, ports, cx).ok_or(Reason::SnatPortsExhausted)?;
        (packet.out.src, packet.out.src_port) = (addr, port);
        let because =
            if choice.masquerade { "the rule says masquerade" } else { "client and endpoint are one pod" };
        trace.step(index, || Step::Masquerade { addr: addr.into(), port, because });
    } else if !is_usable(&packet.out.reversed(), packet, cx) && !same_connection(packet, cx) {
        // Another connection of this client, through another VIP, has the same reply tuple: take another source port.
        let port = free_port(packet, client, 1024..=65535, cx).ok_or(Reason::SnatPortsExhausted)?;
        packet.out.src_port = port;
        trace.step(index, || Step::Masquerade {
            addr: client.into(),
            port,
            because: "the same port of this client is in use towards this endpoint by another VIP",
        });
    }
    let flags = if let Layer4::Tcp { flags } = packet.layer4 { flags } else { 0 };
    let phase = Phase::first(packet.tuple.protocol, flags) as u8;
    if cx.read_only {
        let goes_on = cx.flows.has_room(phase) || overflow::go_on(packet, index, &choice, cx, trace);
        return if goes_on { Ok(()) } else { Err(Reason::FlowTableFull) };
    }
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
    match cx.flows.insert(cx.flow_worker, &new, cx.now_s) {
        // The other one may have come first, by another queue or earlier in this burst.
        Ok(inserted) => {
            cx.counters.add(Counter::flows_created, u64::from(inserted.is_new));
            belongs_to(packet, &Hit { direction: inserted.direction, flow: inserted.flow });
        }
        Err(InsertError::ReplyTaken) => return Err(Reason::SnatPortsExhausted),
        Err(InsertError::Full | InsertError::EmbryonicFull) => {
            let goes_on = overflow::go_on(packet, index, &choice, cx, trace);
            return if goes_on { Ok(()) } else { Err(Reason::FlowTableFull) };
        }
    }
    if choice.affinity_timeout_s > 0 {
        remember(client, choice, endpoint, cx);
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

/// The address to masquerade to: the first of `[snat] addresses` of the family, else that of the port that the packet leaves by.
fn masquerade_address(client: Addr, leaves_by: u8, cx: &Context<'_>) -> Option<Addr> {
    let v4 = client.is_v4();
    let listed = cx.tables.settings.snat_addresses.iter().copied().find(|addr| addr.is_v4() == v4);
    listed.or_else(|| {
        let link = cx.fib.ports.get(usize::from(leaves_by))?;
        if v4 { link.v4 } else { link.v6 }
    })
}

/// A source port that no other flow uses towards this endpoint: the client's own if it lies in `ports`, else the next free one from
/// a random place on (RFC 6056 section 3.3.1). Endpoint-dependent, so that each endpoint has the whole range.
fn free_port(
    packet: &Packet,
    addr: Addr,
    ports: std::ops::RangeInclusive<u16>,
    cx: &mut Context<'_>,
) -> Option<u16> {
    let reply = |port| Tuple { src: addr, src_port: port, ..packet.out }.reversed();
    let wanted = packet.tuple.src_port;
    if ports.contains(&wanted) && is_usable(&reply(wanted), packet, cx) {
        return Some(wanted);
    }
    let (first, count) = (u32::from(*ports.start()), ports.len() as u32);
    if count == 0 {
        return None;
    }
    let start = (cx.rng.next() % u64::from(count)) as u32;
    let mut ports = (0..count).map(|i| (first + (start + i) % count) as u16);
    ports.find(|port| is_usable(&reply(*port), packet, cx))
}

/// Remembers the endpoint of a client; each new connection refreshes it.
fn remember(client: Addr, choice: Choice, endpoint: (Addr, u16), cx: &mut Context<'_>) {
    let tuple = affinity_tuple(client, choice.service);
    if let Some(hit) = cx.affinity.lookup(&tuple, cx.affinity.hash(&tuple)) {
        if hit.flow.endpoint() == endpoint && !is_forgotten(&hit.flow, cx.now_s) {
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
