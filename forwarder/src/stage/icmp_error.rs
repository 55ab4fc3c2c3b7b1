//! Finds the flow that an ICMP error is about, by the packet that it quotes (RFC 5508 section 7.2, RFC 6146 section 3.4).

use zerocopy::FromBytes;

use crate::addr::{Addr, Tuple, protocol};
use crate::packet::{Layer4, Packet, Rewrite};
use crate::pipeline::Context;
use crate::trace::{Step, Trace};
use crate::verdict::Reason;
use crate::wire::{checksum, icmp, ipv4, ipv6};

/// Gives ICMP errors about packets of flows the translation of their flow; errors about anything else are left as they are.
pub fn run(burst: &mut [Packet], cx: &mut Context<'_>, trace: &mut impl Trace) {
    for (index, packet) in burst.iter_mut().enumerate() {
        if !packet.undecided() || packet.layer4 != Layer4::IcmpError {
            continue;
        }
        let Some(quoted) = quoted_tuple(packet) else {
            // Without the ports nothing can be translated, and untranslated it would show a pod's address to a client.
            let end = usize::from(packet.l3) + usize::from(packet.ip_len);
            if quote(packet).is_some_and(|quote| quote.l4 + 8 > end) {
                packet.drop(Reason::Truncated);
            }
            continue;
        };
        // The quoted packet went out as the answer to what we look for.
        let received = quoted.reversed();
        let Some(hit) = cx.flows.lookup(&received, cx.flows.hash(&received)) else { continue };
        if !checksum_is_right(packet) {
            packet.drop(Reason::BadL4Checksum);
            continue;
        }
        let out = hit.translated().unwrap_or(received);
        packet.flow = Some((hit.flow.id(), hit.direction));
        // The outer addresses change where the flow changes them, whoever sent the error: so does Linux
        // (nf_nat_icmp_reply_translation), and so the receiver learns of no address that it does not know.
        packet.out = Tuple {
            src: if out.src == received.src { packet.tuple.src } else { out.src },
            dst: if out.dst == received.dst { packet.tuple.dst } else { out.dst },
            ..packet.tuple
        };
        packet.rewrite = Rewrite::IcmpError { quoted_from: quoted, quoted_to: out.reversed() };
        trace.step(index, || Step::QuotedFlow(quoted));
    }
}

/// Where the quoted packet stands in the frame, and where its layer 4 begins.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Offset of the quoted IP header.
    pub l3: usize,
    /// Offset of the quoted layer-4 header.
    pub l4: usize,
    /// Protocol of the quoted layer 4.
    pub protocol: u8,
}

/// Finds the quoted packet in a frame. `None`: it is too short, malformed, or a later fragment.
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
        Some(Quote { l3, l4: l3 + header_len, protocol: header.protocol })
    } else {
        let (header, rest) = ipv6::Header::ref_from_prefix(bytes).ok()?;
        let chain = ipv6::walk(header.next_header, rest).ok()?;
        if header.version_class_label.get() >> 28 != 6 || chain.later_fragment {
            return None;
        }
        Some(Quote { l3, l4: l3 + ipv6::HEADER_LEN + chain.len, protocol: chain.protocol })
    }
}

/// The tuple of the quoted packet, if it has one.
fn quoted_tuple(packet: &Packet) -> Option<Tuple> {
    let quote = quote(packet)?;
    let data = packet.frame.data();
    let (src, dst) = if packet.tuple.src.is_v4() {
        let (header, _) = ipv4::Header::ref_from_prefix(data.get(quote.l3..)?).ok()?;
        (Addr::v4(header.src.get()), Addr::v4(header.dst.get()))
    } else {
        let (header, _) = ipv6::Header::ref_from_prefix(data.get(quote.l3..)?).ok()?;
        (Addr::v6(header.src.get()), Addr::v6(header.dst.get()))
    };
    let end = (usize::from(packet.l3) + usize::from(packet.ip_len)).min(data.len());
    let l4 = data.get(quote.l4..end)?;
    let (src_port, dst_port) = match quote.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP if l4.len() >= 8 => {
            (u16::from_be_bytes([l4[0], l4[1]]), u16::from_be_bytes([l4[2], l4[3]]))
        }
        _ => return None,
    };
    Some(Tuple { src, dst, src_port, dst_port, protocol: quote.protocol })
}

/// An error that is to be translated must be sound, since its checksum is computed anew.
fn checksum_is_right(packet: &Packet) -> bool {
    let end = usize::from(packet.l3) + usize::from(packet.ip_len);
    let Some(bytes) = packet.frame.data().get(usize::from(packet.l4)..end) else { return false };
    let pseudo = if packet.tuple.src.is_v4() {
        0
    } else {
        checksum::pseudo_sum(packet.tuple.src, packet.tuple.dst, protocol::ICMPV6, bytes.len())
    };
    checksum::fold(checksum::sum(bytes) + pseudo) == 0xffff
}
