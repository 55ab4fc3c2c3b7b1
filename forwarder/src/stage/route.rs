//! Finds the way out: longest prefix, next hop, hop count and size.

use crate::packet::{Answer, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::tables::{Fib, NextHop, Route};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};
use crate::wire::ipv6;

/// Routes every packet that no stage has decided about.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    for (index, packet) in burst.iter_mut().enumerate() {
        if packet.undecided() {
            route(packet, index, cx.fib, trace);
        }
    }
}

fn route(packet: &mut Packet, index: usize, fib: &Fib, trace: &mut impl Trace) {
    let destination = packet.out.dst;
    match fib.routes.lookup(destination) {
        Some(Route::NextHop(hop)) => match fib.next_hops.get(hop as usize) {
            Some(next_hop) => {
                trace_route(packet, index, next_hop.port, next_hop.gateway, fib, trace);
                forward(packet, next_hop, fib);
            }
            None => packet.drop(Reason::NoRoute),
        },
        Some(Route::OnLink { port }) => {
            trace_route(packet, index, port, destination, fib, trace);
            let mtu = fib.ports.get(usize::from(port)).map_or(u16::MAX, |link| link.mtu);
            forward(packet, &NextHop { port, gateway: destination, mac: None, mtu }, fib);
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

/// Sends the packet to `next_hop`, unless its hop count or its size forbids (RFC 1812 sections 5.3.1 and 4.2.3.3, RFC 8201).
fn forward(packet: &mut Packet, next_hop: &NextHop, fib: &Fib) {
    let Some(link) = fib.ports.get(usize::from(next_hop.port)).filter(|link| link.up) else {
        return packet.drop(Reason::PortDown);
    };
    if packet.ttl <= 1 {
        return refuse(packet, Answer::TimeExceeded, Reason::TtlExceeded);
    }
    if packet.ip_len > next_hop.mtu {
        let mtu =
            if packet.tuple.src.is_v4() { next_hop.mtu } else { next_hop.mtu.max(ipv6::MIN_MTU as u16) };
        return refuse(packet, Answer::TooBig { mtu }, Reason::PacketTooBig);
    }
    packet.gateway = next_hop.gateway;
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
