//! TCP connections that are to end because their endpoint is gone: flows in phase [`Phase::TcpReset`], into which
//! the commit thread puts them (`control/cleanup`).
//!
//! Both ends are told by a RST that they accept (RFC 9293 section 3.10.7.4, RFC 5961 section 3.2), without any sequence number being
//! tracked: what their own next packets say is enough, and each packet that comes in becomes one packet that leaves.
//!
//! - A packet that its sender will **send again**, since it carries data or a FIN, becomes a RST to the *other* end, with its own sequence
//!   number: what the other end waits for next. Its sender is told when it sends the packet again.
//! - Any **other** packet, or one that comes when the other end has been told, is answered: a RST to its *sender*, with the sequence
//!   number that it acknowledges.
//! - A RST goes on to the other end as it is.
//!
//! If there is no way to the other end, as to a node that is dead, the sender is told at once.
//!
//! So both ends of a connection are told within a retransmission if anybody sends, and one that is silent is told when it speaks. The
//! flow stays, so that no late packet slips through untranslated, until it has been idle for the time of a closing connection.

use zerocopy::FromBytes;

use crate::packet::{Answer, Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::stage::flow::Phase;
use crate::table::flow_map::{Direction, Hit};
use crate::trace::{Step, Trace};
use crate::verdict::{Reason, Verdict};
use crate::wire::tcp;

/// Flag of a flow: the client was sent a RST.
pub const TOLD_CLIENT: u16 = 1 << 3;
/// Flag of a flow: the endpoint was sent a RST.
pub const TOLD_ENDPOINT: u16 = 1 << 4;

/// Judges a packet of a connection that is to end.
pub fn judge(packet: &mut Packet, index: usize, hit: &Hit<'_>, trace: &mut impl Trace) {
    let Layer4::Tcp { flags } = packet.layer4 else { return };
    trace.step(index, || Step::Resetting);
    if flags & tcp::RST != 0 {
        return;
    }
    if hit.flow.flags() & other_end(hit.direction) == 0 && is_sent_again(packet, flags) {
        packet.rewrite = Rewrite::Reset;
    } else {
        packet.answer(Answer::Reset, Reason::EndpointRemoved);
    }
}

/// Once the way of a packet is known that is to become a RST to the other end: if there is none, as to a node that is dead, its sender
/// is told instead.
pub fn decide(packet: &mut Packet) {
    match packet.verdict {
        Verdict::Forward { port } => {
            packet.verdict = Verdict::Answer { port, reason: Reason::EndpointRemoved };
            // The RST is short, however long the packet was.
            packet.cut_to = 0;
        }
        _ => packet.answer(Answer::Reset, Reason::EndpointRemoved),
    }
}

/// Notes who is told by a packet that is about to leave.
pub fn note(packet: &Packet, cx: &Context<'_>) {
    if !cx.read_only
        && let Some((id, direction)) = packet.flow
        && let Some(hit) = cx.flows.lookup(&packet.tuple, packet.hash)
        && hit.flow.id() == id
    {
        let goes_on = packet.rewrite == Rewrite::Reset;
        hit.flow.set_flags(if goes_on { other_end(direction) } else { own_end(direction) });
    }
}

fn own_end(direction: Direction) -> u16 {
    match direction {
        Direction::Original => TOLD_CLIENT,
        Direction::Reply => TOLD_ENDPOINT,
    }
}

fn other_end(direction: Direction) -> u16 {
    (TOLD_CLIENT | TOLD_ENDPOINT) & !own_end(direction)
}

/// True for a packet that takes up sequence numbers: its sender waits for an acknowledgment.
fn is_sent_again(packet: &Packet, flags: u8) -> bool {
    let l4 = packet.frame.data().get(usize::from(packet.l4)..);
    let header = l4.and_then(|bytes| tcp::Header::ref_from_prefix(bytes).ok());
    let header_len = header.map_or(tcp::HEADER_LEN, |(header, _)| header.header_len());
    let has_data = usize::from(packet.ip_len) > usize::from(packet.l4 - packet.l3) + header_len;
    has_data || flags & (tcp::SYN | tcp::FIN) != 0
}

/// True for the phase of connections that are to end.
#[inline]
pub fn is_resetting(phase: u8) -> bool {
    phase == Phase::TcpReset as u8
}
