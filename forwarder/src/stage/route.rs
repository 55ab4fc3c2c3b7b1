//! Finds the way out: longest prefix, next hop, hop count and size.

use config::gateway::MssClamp;

use crate::addr::Addr;
use crate::packet::{Answer, BURST, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::tables::{Fib, NextHop, Route};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};
use crate::wire::{ipv4, ipv6, tcp};

/// Routes every packet that no stage has decided about.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    // With nothing else between them, the processor looks up several at once.
    let mut routes = [None; BURST];
    for (packet, route) in burst.iter().zip(&mut routes) {
        if packet.undecided() {
            *route = cx.fib.routes.lookup(packet.out.dst);
        }
    }
    for (index, (packet, found)) in burst.iter_mut().zip(routes).enumerate() {
        if !packet.undecided() {
            continue;
        }
        route(packet, index, found, cx.fib, trace);
        if let Layer4::Tcp { flags } = packet.layer4
            && flags & tcp::SYN != 0
        {
            clamp_mss(packet, index, cx, trace);
        }
    }
}

fn route(packet: &mut Packet, index: usize, found: Option<Route>, fib: &Fib, trace: &mut impl Trace) {
    let destination = packet.out.dst;
    match found {
        Some(Route::NextHop(hop)) => match fib.next_hops.get(hop as usize) {
            Some(next_hop) => {
                trace_route(packet, index, next_hop.port, next_hop.gateway, fib, trace);
                if let (Some(tunnel), Some(overlay)) = (next_hop.tunnel, &fib.overlay) {
                    trace.step(index, || Step::Encapsulate(overlay.tunnels[usize::from(tunnel)]));
                }
                forward(packet, next_hop, fib);
            }
            None => packet.drop(Reason::NoRoute),
        },
        Some(Route::OnLink { port }) => {
            trace_route(packet, index, port, destination, fib, trace);
            let mtu = fib.ports.get(usize::from(port)).map_or(u16::MAX, |link| link.mtu);
            forward(packet, &NextHop { port, gateway: destination, mac: None, mtu, tunnel: None }, fib);
        }
        // A translated packet to the gateway itself cannot be handed to the kernel, which knows nothing of the translation.
        Some(Route::Local | Route::Kernel) if packet.rewrite == Rewrite::Route => {
            packet.verdict = Verdict::Punt
        }
        Some(Route::Blackhole) => packet.drop(Reason::Blackhole),
        Some(Route::Local | Route::Kernel) | None => refuse(packet, Answer::NoRoute, Reason::NoRoute),
    }
}

fn trace_route(
    packet: &Packet,
    index: usize,
    port: u8,
    gateway: crate::addr::Addr,
    fib: &Fib,
    trace: &mut impl Trace,
) {
    trace.step(index, || {
        let host = ipnet::IpNet::from(std::net::IpAddr::from(packet.out.dst));
        let prefix = fib.routes.lookup_entry(packet.out.dst).map_or(host, |(prefix, _)| prefix);
        Step::Route { prefix, gateway: gateway.into(), port }
    });
}

/// Sends the packet to `next_hop`, unless its hop count or its size forbids (RFC 1812 sections 5.3.1 and 4.2.3.3, RFC 8201). What is
/// too long and may be fragmented will be (RFC 1812 section 5.2.6).
fn forward(packet: &mut Packet, next_hop: &NextHop, fib: &Fib) {
    let Some(link) = fib.ports.get(usize::from(next_hop.port)).filter(|link| link.up) else {
        return packet.drop(Reason::PortDown);
    };
    if packet.ttl <= 1 {
        return refuse(packet, Answer::TimeExceeded, Reason::TtlExceeded);
    }
    if packet.longest > next_hop.mtu {
        if packet.dont_fragment {
            let mtu =
                if packet.tuple.src.is_v4() { next_hop.mtu } else { next_hop.mtu.max(ipv6::MIN_MTU as u16) };
            return refuse(packet, Answer::TooBig { mtu }, Reason::PacketTooBig);
        }
        packet.cut_to = next_hop.mtu;
    }
    packet.gateway = next_hop.gateway;
    packet.to_tunnel = next_hop.tunnel;
    packet.verdict = match next_hop.mac {
        Some(mac) => {
            packet.macs = (mac, link.mac);
            Verdict::Forward { port: next_hop.port }
        }
        None => Verdict::Hold { port: next_hop.port },
    };
}

/// Answers with an ICMP error, except about another ICMP error (RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 e).
fn refuse(packet: &mut Packet, answer: Answer, reason: Reason) {
    match packet.layer4 {
        Layer4::IcmpError => packet.drop(reason),
        _ => packet.answer(answer, reason),
    }
}

/// Decides how large segments may be that the receiver of this SYN sends (RFC 9293 section 3.7.1): they take the way back, and the
/// answer to this SYN is judged alike, so that the smaller MTU of both ways holds for both directions.
fn clamp_mss(packet: &mut Packet, index: usize, cx: &Context<'_>, trace: &mut impl Trace) {
    let (Verdict::Forward { port } | Verdict::Hold { port }) = packet.verdict else { return };
    let most = match cx.tables.settings.mss_clamp {
        MssClamp::Off => return,
        MssClamp::Auto => u16::MAX,
        MssClamp::AtMost(bytes) => bytes,
    };
    let there = way_mtu(packet.out.dst, port, cx.fib);
    let back = way_mtu(packet.tuple.src, packet.port, cx.fib);
    let ip_header_len = if packet.tuple.src.is_v4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
    let limit = most.min(there.min(back).saturating_sub((ip_header_len + tcp::HEADER_LEN) as u16));
    let header = packet.tcp_header();
    let values =
        std::iter::successors(tcp::next_mss(header, tcp::HEADER_LEN), |at| tcp::next_mss(header, at + 2));
    let largest = values.map(|at| u16::from_be_bytes([header[at], header[at + 1]])).max();
    if let Some(named) = largest.filter(|named| *named > limit) {
        packet.mss_limit = limit;
        trace.step(index, || Step::Mss { from: named, to: limit });
    }
}

/// MTU of the route to `destination` and of port `port`, whichever is smaller.
fn way_mtu(destination: Addr, port: u8, fib: &Fib) -> u16 {
    let link = fib.ports.get(usize::from(port)).map_or(u16::MAX, |link| link.mtu);
    match fib.routes.lookup(destination) {
        Some(Route::NextHop(hop)) => fib.next_hops.get(hop as usize).map_or(link, |hop| hop.mtu.min(link)),
        _ => link,
    }
}
