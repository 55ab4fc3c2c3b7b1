//! Connections that find no room in the flow table and go on without an entry.
//!
//! Each of their packets is translated from what it says itself:
//!
//! - a **request** (client to VIP) goes to the endpoint that the consistent hash gives it: the same one while the endpoints are;
//! - an **answer** (endpoint to client) gets the VIP as its source that alone leads to this endpoint
//!   ([`Tables::sole_vips`](crate::tables::Tables::sole_vips)).
//!
//! So a connection may go on without an entry only if all of this holds, and everything else is refused as `flow_table_full`:
//!
//! - nothing but the destination is translated: no masquerading, no hairpin, no other source port for a reply tuple that is in use;
//! - the client is outside the cluster: not a pod, a node, or an address of a Service range, and behind an outside port;
//! - the VIP is the only one that leads to the endpoint unmasqueraded. ClusterIPs and NodePorts do not count: their connections
//!   always need an entry. Session affinity goes by memory, not by hash: its Services do not count either.
//!
//! An endpoint also speaks to clients that reached it by its own address, and those packets must stay as they are; they have no entry
//! either. So every request that goes on without an entry is *marked* in the flow table by the tuple of its answers, and an answer
//! is translated only if a request of its very connection was marked within the idle timeout of its protocol. A mark is never
//! missed, and outlives a restart; that an unmarked connection looks marked is rare unless a multiple of the table's capacity
//! overflows ([`mark`](crate::table::flow_map)).
//!
//! Once there is room, the next packet of a client makes an entry, to the same endpoint.

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Choice, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::stage::flow::Phase;
use crate::tables::{Action, Endpoint, EndpointKey, FrontendKey, Route};
use crate::trace::{Step, Trace};
use crate::wire::tcp;

/// Lets a new connection go on without an entry, if it may: the packet keeps the translation that it has.
pub fn go_on(
    packet: &mut Packet,
    index: usize,
    choice: &Choice,
    cx: &Context<'_>,
    trace: &mut impl Trace,
) -> bool {
    let (from, to) = (&packet.tuple, &packet.out);
    let may = choice.by_hash
        && (from.src, from.src_port) == (to.src, to.src_port)
        && is_outside(from.src, cx)
        && sole_vip(to.dst, to.dst_port, to.protocol, cx) == Some((from.dst, from.dst_port));
    if may {
        mark(to, cx);
        packet.is_stateless = true;
        trace.step(index, || Step::NoRoom);
    }
    may
}

/// What an answer of a connection without an entry becomes; `None` if it is no such packet. `received`: as it came in, or as it would
/// have if an ICMP error quotes it.
pub fn answer(received: &Tuple, cx: &Context<'_>) -> Option<Tuple> {
    if !is_marked(received, cx) || !is_outside(received.dst, cx) {
        return None;
    }
    let (src, src_port) = sole_vip(received.src, received.src_port, received.protocol, cx)?;
    Some(Tuple { src, src_port, ..*received })
}

/// What a later packet of a client becomes whose connection goes on without an entry; `None` if it is no such packet. `received`: as
/// for [`answer`].
pub fn request(received: &Tuple, cx: &Context<'_>) -> Option<Tuple> {
    if !cx.flows.has_marks() {
        return None;
    }
    let Tuple { dst: addr, dst_port: port, protocol, .. } = *received;
    let frontend = cx.tables.frontends.get(&FrontendKey { addr, port, protocol })?;
    let Action::Dnat { backends, masquerade: false, .. } = &frontend.from_outside else { return None };
    let hash = received.stable_hash(cx.tables.settings.lb_key);
    let endpoint = &backends.endpoints[backends.spread.by_hash(hash)];
    let out = Tuple { dst: endpoint.addr, dst_port: endpoint.port, ..*received };
    let is_one = is_outside(received.src, cx)
        && is_marked(&out.reversed(), cx)
        && sole_vip(out.dst, out.dst_port, protocol, cx) == Some((addr, port));
    is_one.then_some(out)
}

/// Gives a packet the translation that [`answer`] or [`request`] found. A client's packet keeps the connection's mark fresh.
pub fn forward(packet: &mut Packet, index: usize, out: Tuple, cx: &Context<'_>, trace: &mut impl Trace) {
    if packet.tuple.dst != out.dst {
        mark(&out, cx);
        packet.error_source = Some(packet.tuple.dst);
    }
    packet.out = out;
    packet.rewrite = Rewrite::Translate;
    packet.is_stateless = true;
    trace.step(index, || Step::WithoutEntry(out));
}

/// True if the consistent hash, which gave `endpoint`, must choose for a first packet whatever the algorithm of its Service is: if
/// there is no room for an entry, if the connection went on without one before, or if it is in its middle, and may have.
pub fn must_go_by_hash(packet: &Packet, endpoint: &Endpoint, cx: &Context<'_>) -> bool {
    if matches!(packet.layer4, Layer4::Tcp { flags } if flags & tcp::SYN == 0) {
        return true;
    }
    let answer = Tuple { dst: endpoint.addr, dst_port: endpoint.port, ..packet.tuple }.reversed();
    !cx.flows.has_room(Phase::first(packet) as u8) || is_marked(&answer, cx)
}

/// True if an answer with this tuple could be that of a connection without an entry, to another VIP than `vip`: a new flow must not
/// have such answers.
pub fn may_clash(answer: &Tuple, vip: (Addr, u16), cx: &Context<'_>) -> bool {
    is_marked(answer, cx)
        && sole_vip(answer.src, answer.src_port, answer.protocol, cx).is_some_and(|sole| sole != vip)
}

fn mark(request: &Tuple, cx: &Context<'_>) {
    if !cx.read_only {
        cx.flows.mark(cx.flows.hash(&request.reversed()), cx.now_s);
    }
}

fn is_marked(answer: &Tuple, cx: &Context<'_>) -> bool {
    let phase = match answer.protocol {
        protocol::TCP => Phase::TcpEstablished,
        protocol::SCTP => Phase::Sctp,
        _ => Phase::Udp,
    };
    cx.flows.has_marks()
        && cx.flows.is_marked(cx.flows.hash(answer), cx.now_s, cx.flows.timeout_s(phase as u8))
}

/// Not of this cluster, and behind a port that clients come in by.
fn is_outside(client: Addr, cx: &Context<'_>) -> bool {
    let port = match cx.fib.routes.lookup(client) {
        Some(Route::NextHop(index)) => cx.fib.next_hops.get(index as usize).map(|hop| hop.port),
        Some(Route::OnLink { port }) => Some(port),
        Some(Route::Local | Route::Kernel | Route::Blackhole) | None => None,
    };
    let settings = port.and_then(|port| cx.tables.settings.ports.get(usize::from(port)));
    settings.is_some_and(|port| port.outside) && cx.tables.identities.lookup(client).is_none()
}

/// True if the source of this packet is an endpoint that clients outside reach by one Service address.
pub fn is_endpoint(received: &Tuple, cx: &Context<'_>) -> bool {
    sole_vip(received.src, received.src_port, received.protocol, cx).is_some()
}

fn sole_vip(addr: Addr, port: u16, protocol: u8, cx: &Context<'_>) -> Option<(Addr, u16)> {
    cx.tables.sole_vips.get(&EndpointKey { addr, port, protocol }).copied()
}
