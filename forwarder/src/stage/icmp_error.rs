//! Finds the flow that an ICMP error is about, by the packet that it quotes (RFC 5508 section 7.2, RFC 6146 section 3.4).

use zerocopy::FromBytes;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Layer4, Packet, Part, Rewrite};
use crate::pipeline::Context;
use crate::stage::overflow;
use crate::trace::{Step, Trace};
use crate::verdict::Reason;
use crate::wire::{checksum, icmp, ipv4, ipv6};

/// Gives ICMP errors about packets of flows the translation of their flow.
///
/// An error about a packet of no flow is left as it is: the gateway keeps no state of what it merely routes, and who sent a
/// routed packet must learn what became of it, not least for path MTU discovery (RFC 1191). It is judged like any other packet
/// by the next stages; to a Service's address it goes nowhere.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    for (index, packet) in burst.iter_mut().enumerate() {
        if packet.undecided()
            && packet.layer4 == Layer4::IcmpError
            && let Err(reason) = translation(packet, index, cx, trace)
        {
            packet.drop(reason);
        }
    }
}

/// Finds the translation of one error, if it has one.
fn translation(
    packet: &mut Packet,
    index: usize,
    cx: &mut Context<'_>,
    trace: &mut impl Trace,
) -> Result<(), Reason> {
    // What cannot be read might be about anything, a translated packet among them.
    let quote = quote(packet).ok_or(Reason::NoFlow)?;
    // An error goes to who sent the packet (RFC 1122 section 3.2.2). Any other is made up, or went through a translator that
    // does not know of quotes; Linux calls it invalid (nf_conntrack_inet_error).
    if quote.src != packet.tuple.dst {
        return Err(Reason::NoFlow);
    }
    let Some(quoted) = quoted_tuple(packet, &quote)? else { return Ok(()) };
    // The quoted packet went out as the answer to what we look for.
    let received = quoted.reversed();
    let hit = cx.flows.lookup(&received, cx.flows.hash(&received));
    let out = match &hit {
        Some(hit) => Some(hit.translated().unwrap_or(received)),
        None => overflow::answer(&received, cx).or_else(|| overflow::request(&received, cx)),
    };
    let Some(out) = out else {
        trace.step(index, || Step::FlowMiss);
        return Ok(());
    };
    if is_redirect(packet) {
        return Err(Reason::IcmpNotForUs);
    }
    if !checksum_is_right(packet) {
        return Err(Reason::BadL4Checksum);
    }
    packet.flow = hit.map(|hit| (hit.flow.id(), hit.direction));
    packet.is_stateless = packet.flow.is_none();
    // The outer addresses change where the flow changes them, whoever sent the error: so does Linux
    // (nf_nat_icmp_reply_translation), and so the receiver learns of no address that it does not know.
    packet.out = Tuple {
        src: if out.src == received.src { packet.tuple.src } else { out.src },
        dst: if out.dst == received.dst { packet.tuple.dst } else { out.dst },
        ..packet.tuple
    };
    packet.rewrite = Rewrite::IcmpError { quoted_from: quoted, quoted_to: out.reversed() };
    trace.step(index, || Step::QuotedFlow(quoted));
    Ok(())
}

/// The quoted packet: whose it was, where it stands in the frame, and where its layer 4 begins.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Offset of the quoted IP header.
    pub l3: usize,
    /// Offset of the quoted layer-4 header.
    pub l4: usize,
    /// Protocol of the quoted layer 4.
    pub protocol: u8,
    src: Addr,
    dst: Addr,
}

/// Finds the quoted packet in a frame. `None`: it is too short, malformed, or a later fragment, of which no error may be sent
/// (RFC 1122 section 3.2.2).
pub fn quote(packet: &Packet) -> Option<Quote> {
    let l3 = usize::from(packet.l4) + icmp::HEADER_LEN;
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let data = packet.frame.data();
    let bytes = data.get(l3..end.min(data.len()))?;
    if packet.tuple.src.is_v4() {
        let (header, _) = ipv4::Header::ref_from_prefix(bytes).ok()?;
        let header_len = header.header_len();
        if header.version_ihl >> 4 != 4
            || header_len < ipv4::HEADER_LEN
            || header_len > bytes.len()
            || header.fragment.get() & ipv4::OFFSET_MASK != 0
        {
            return None;
        }
        let (src, dst) = (Addr::v4(header.src.get()), Addr::v4(header.dst.get()));
        Some(Quote { l3, l4: l3 + header_len, protocol: header.protocol, src, dst })
    } else {
        let (header, rest) = ipv6::Header::ref_from_prefix(bytes).ok()?;
        let chain = ipv6::walk(header.next_header, rest).ok()?;
        if header.version_class_label.get() >> 28 != 6 || chain.is_later_fragment() {
            return None;
        }
        let (src, dst) = (Addr::v6(header.src.get()), Addr::v6(header.dst.get()));
        Some(Quote { l3, l4: l3 + ipv6::HEADER_LEN + chain.len, protocol: chain.protocol, src, dst })
    }
}

/// The tuple of the quoted packet; none if its protocol has no ports.
///
/// # Errors
/// [`Reason::Truncated`]: the quote has less than the 8 bytes of layer 4 that it must have (RFC 792). Without ports nothing can be
/// translated, and untranslated it would show a pod's address to a client.
fn quoted_tuple(packet: &Packet, quote: &Quote) -> Result<Option<Tuple>, Reason> {
    let has_ports = matches!(quote.protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
    if !has_ports && !matches!(quote.protocol, protocol::ICMP | protocol::ICMPV6) {
        return Ok(None);
    }
    let data = packet.frame.data();
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let Some(l4) = data.get(quote.l4..end.min(data.len())).filter(|l4| l4.len() >= 8) else {
        return if has_ports { Err(Reason::Truncated) } else { Ok(None) };
    };
    let word = |at: usize| u16::from_be_bytes([l4[at], l4[at + 1]]);
    let (src_port, dst_port) = match (quote.protocol, l4[0]) {
        _ if has_ports => (word(0), word(2)),
        // An echo's identifier stands for both ports.
        (protocol::ICMP, icmp::v4::ECHO_REQUEST | icmp::v4::ECHO_REPLY)
        | (protocol::ICMPV6, icmp::v6::ECHO_REQUEST | icmp::v6::ECHO_REPLY) => (word(4), word(4)),
        _ => return Ok(None),
    };
    Ok(Some(Tuple { src: quote.src, dst: quote.dst, src_port, dst_port, protocol: quote.protocol }))
}

/// A redirect tells of a better way to a destination on the link. About a translated packet it would be wrong for its receiver;
/// Linux drops it (nf_nat_icmp_reply_translation). ICMPv6 has it among neighbor discovery, which is not forwarded.
fn is_redirect(packet: &Packet) -> bool {
    packet.tuple.src.is_v4() && packet.frame.data().get(usize::from(packet.l4)) == Some(&icmp::v4::REDIRECT)
}

/// An error that is to be translated must be sound, since its checksum is computed anew. One in fragments is not: errors fit the
/// smallest MTU (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 c).
fn checksum_is_right(packet: &Packet) -> bool {
    if packet.part != Part::Whole {
        return false;
    }
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let Some(bytes) = packet.frame.data().get(usize::from(packet.l4)..end) else { return false };
    let pseudo = if packet.tuple.src.is_v4() {
        0
    } else {
        checksum::pseudo_sum(packet.tuple.src, packet.tuple.dst, protocol::ICMPV6, bytes.len())
    };
    checksum::fold(checksum::sum(bytes) + pseudo) == 0xffff
}
