//! Connections of pods to the outside of the cluster that leave with an address of the gateway.
//!
//! Which ones, `[[egress]]` of the gateway file says; the first rule that fits counts. Pods, nodes and Services see pods' own addresses
//! whatever it says (the Kubernetes network model). So does a client outside that asked a pod by its own address: where a rule would
//! be about the answers, such a connection gets a flow too, which translates nothing. (Protocols without ports get none: a pod's
//! answers in them are dropped where a rule is about them.)

use crate::addr::{Addr, Tuple};
use crate::packet::{Choice, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::stage::overflow;
use crate::tables::{EgressRule, Identity, Origin, Route};
use crate::trace::{Step, Trace};
use crate::verdict::Reason;
use crate::wire::tcp;

/// Judges a packet of no flow between a pod and the outside. False: no rule is about it.
pub fn judge(
    packet: &mut Packet,
    index: usize,
    (from, to): (Origin, Option<Identity>),
    cx: &Context<'_>,
    trace: &mut impl Trace,
) -> bool {
    let Tuple { src, dst, .. } = packet.tuple;
    match (from, to) {
        // What leaves by no port of ours is the kernel's business.
        (Origin::Pod, None) if !matches!(cx.fib.routes.lookup(dst), Some(Route::Local | Route::Kernel)) => {
            let Some(rule) = rule(src, dst, cx) else { return false };
            trace.step(index, || Step::Egress { rule });
            leave(packet, rule, cx);
            true
        }
        (Origin::Outside, Some(Identity::Pod)) if begins(packet.layer4) && rule(dst, src, cx).is_some() => {
            packet.out = packet.tuple;
            packet.rewrite = Rewrite::Translate;
            packet.choice = Some(Choice::default());
            trace.step(index, || Step::NotAService(to));
            true
        }
        _ => false,
    }
}

/// Index of the rule for packets of a pod to a destination outside.
fn rule(pod: Addr, destination: Addr, cx: &Context<'_>) -> Option<usize> {
    let (pod, destination): (std::net::IpAddr, std::net::IpAddr) = (pod.into(), destination.into());
    let fits = |rule: &EgressRule| {
        (rule.pods.is_empty() || rule.pods.iter().any(|net| net.contains(&pod)))
            && (rule.destinations.is_empty()
                || rule.destinations.iter().any(|net| net.contains(&destination)))
            && !rule.except.iter().any(|net| net.contains(&destination))
    };
    cx.tables.settings.egress.iter().position(fits)
}

/// True for packets by which a connection begins.
fn begins(layer4: Layer4) -> bool {
    match layer4 {
        Layer4::Tcp { flags } => tcp::valid_flags(flags) && tcp::may_be_first(flags),
        Layer4::Udp | Layer4::Sctp | Layer4::Echo { request: true } => true,
        _ => false,
    }
}

/// True for what an endpoint may send without having been asked in this packet: all but a SYN.
fn is_answer(layer4: Layer4) -> bool {
    match layer4 {
        Layer4::Tcp { flags } => flags & tcp::SYN == 0,
        layer4 => matches!(layer4, Layer4::Udp | Layer4::Sctp),
    }
}

fn leave(packet: &mut Packet, rule: usize, cx: &Context<'_>) {
    match packet.layer4 {
        // The answer of an endpoint whose flow was forgotten: its client asks again, and would not know another address.
        layer4 if is_answer(layer4) && overflow::is_endpoint(&packet.tuple, cx) => {
            packet.drop(Reason::NoFlow)
        }
        layer4 if begins(layer4) => {
            packet.out = packet.tuple;
            packet.rewrite = Rewrite::Translate;
            packet.choice =
                Some(Choice { masquerade: true, egress: u16::try_from(rule).ok(), ..Choice::default() });
        }
        Layer4::Tcp { .. } | Layer4::IcmpError | Layer4::Echo { .. } => packet.drop(Reason::NoFlow),
        // Without ports two pods could not be told apart.
        _ => packet.drop(Reason::EgressProtocol),
    }
}
