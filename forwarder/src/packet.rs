//! A packet on its way through the pipeline: the frame and what the stages found out about it.

use af_xdp::Frame;
use zerocopy::FromBytes;

use crate::addr::{Addr, Tuple};
use crate::table::flow_map::{Candidate, Direction, FlowId};
use crate::verdict::{Reason, Verdict};
use crate::wire::tcp;

/// Packets that are judged together.
pub const BURST: usize = 64;

/// What the layer-4 header is, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Layer4 {
    /// Not looked at, or a protocol without ports.
    #[default]
    Other,
    /// TCP with these control bits.
    Tcp {
        /// See [`crate::wire::tcp`].
        flags: u8,
    },
    /// UDP.
    Udp,
    /// SCTP, RFC 9260.
    Sctp,
    /// ICMP echo request or reply.
    Echo {
        /// True for a request.
        request: bool,
    },
    /// An ICMP message that quotes a packet; [`Packet::tuple`] has the outer addresses, without ports.
    IcmpError,
    /// Any other ICMP message.
    IcmpOther,
    /// A header that contradicts its length fields: ports are unknown.
    Malformed,
    /// A fragment, unless it is the first one and the others are there.
    Fragment,
}

/// What a packet is of its datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// A fragment; where the others are is not known.
    Fragment(Fragment),
    /// The first fragment, with all others right behind it in the burst: it stands for the datagram.
    First(Datagram),
    /// One of these others. What becomes of the first becomes of it, see [`Packet::follow`].
    Later,
}

/// What the IP headers say of a fragment (RFC 791 section 3.2, RFC 8200 section 4.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// Identification of the datagram.
    pub id: u32,
    /// Where its data belongs in the payload of the datagram, bytes.
    pub offset: u16,
    /// It is not the last one.
    pub more: bool,
    /// Where its data begins in the frame.
    pub data: u16,
}

/// What a first fragment does not say about its datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// Fragments, the first included.
    pub fragments: u16,
    /// Bytes of data in all of them but the first.
    pub later_len: u16,
    /// Bytes of the longest IP packet among them.
    pub longest: u16,
    /// One of that length says "don't fragment".
    pub dont_fragment: bool,
}

/// What the rewrite stage will do to the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Rewrite {
    /// Addresses and ports stay; TTL and link layer change.
    #[default]
    Route,
    /// Addresses and ports become those of [`Packet::out`].
    Translate,
    /// The packet is an ICMP error about a translated packet: outer addresses become those of [`Packet::out`], and the quoted
    /// packet, which was `quoted_from` on our wire, becomes `quoted_to`.
    IcmpError {
        /// Tuple of the quoted packet as it came.
        quoted_from: Tuple,
        /// Tuple of the quoted packet as the receiver knows it.
        quoted_to: Tuple,
    },
    /// The packet becomes a TCP RST that goes on where the packet would have gone, as [`Packet::out`].
    Reset,
    /// The frame is replaced by an answer of ours.
    Answer(Answer),
}

/// Answers that the gateway gives itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// TCP RST from the address and port that was asked for.
    Reset,
    /// ICMP or ICMPv6 destination unreachable, port.
    PortUnreachable,
    /// ICMP or ICMPv6 destination unreachable, no route.
    NoRoute,
    /// ICMP or ICMPv6 time exceeded in transit.
    TimeExceeded,
    /// ICMP fragmentation needed or ICMPv6 packet too big.
    TooBig {
        /// MTU of the way out, bytes.
        mtu: u16,
    },
    /// Echo reply.
    EchoReply,
}

/// What the service stage chose for a new connection, beside the endpoint, which is in [`Packet::out`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Choice {
    /// Stable id of the service port; 0: none.
    pub service: u64,
    /// What connections of the endpoint are counted under.
    pub tally: u32,
    /// Translate the source too.
    pub masquerade: bool,
    /// The rule of `[[egress]]` by which the source is translated, by its index.
    pub egress: Option<u16>,
    /// The consistent hash chose the endpoint, so that it would do so again.
    pub by_hash: bool,
    /// Seconds for which session affinity remembers the endpoint; 0: not at all.
    pub affinity_timeout_s: u32,
}

/// One packet of a burst.
pub struct Packet {
    /// The first descriptor of the frame, from the Ethernet header on.
    pub frame: Frame,
    /// Bytes in the frame's further descriptors.
    pub tail_len: u32,
    /// Index of the port that it came in by.
    pub port: u8,
    /// The number that captures call it by; 0 while none has seen it.
    pub id: u64,
    /// What becomes of it.
    pub verdict: Verdict,
    /// What it is of its datagram.
    pub part: Part,

    /// Where the IP header begins.
    pub l3: u16,
    /// Where the layer-4 header begins.
    pub l4: u16,
    /// Bytes from the IP header to the end of the packet, link-layer padding excluded.
    pub ip_len: u16,
    /// Bytes of the longest IP packet of the datagram: `ip_len`, unless it is in fragments.
    pub longest: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 "don't fragment"; true for IPv6.
    pub dont_fragment: bool,
    /// The layer-4 checksum holds the pseudo-header sum only, as Linux leaves it for the hardware (CHECKSUM_PARTIAL).
    pub partial_checksum: bool,
    /// Kind of layer 4.
    pub layer4: Layer4,
    /// Addresses and ports as they came.
    pub tuple: Tuple,

    /// Keyed hash of `tuple`.
    pub hash: u64,
    /// Where its flow most likely is.
    pub candidate: Candidate,
    /// The flow that it belongs to.
    pub flow: Option<(FlowId, Direction)>,
    /// Addresses and ports as they leave.
    pub out: Tuple,
    /// Set between the service and the nat stage: a flow is to be created.
    pub choice: Option<Choice>,
    /// How the frame changes.
    pub rewrite: Rewrite,
    /// Maximum segment sizes above this are lowered to it; 0: none is.
    pub mss_limit: u16,
    /// Leaves in fragments of at most this many bytes, IP header included; 0: as it is.
    pub cut_to: u16,
    /// Its connection goes on without an entry in the flow table.
    pub is_stateless: bool,
    /// Source address for ICMP errors about this packet, where it is not the port's own: the VIP of a service packet.
    pub error_source: Option<Addr>,
    /// Link-layer addresses to write: destination, source.
    pub macs: ([u8; 6], [u8; 6]),
    /// The next hop's address, once routed.
    pub gateway: Addr,
    /// It came inside another packet, by this tunnel: `l3` is where the inner IP header begins, and what stands before it stays in
    /// the frame until the packet is rewritten.
    pub from_tunnel: Option<u16>,
    /// It leaves inside another packet, by this tunnel.
    pub to_tunnel: Option<u16>,
}

impl Packet {
    /// A packet that came in by `port`, not looked at yet.
    pub fn new(frame: Frame, tail_len: u32, port: u8) -> Packet {
        Packet {
            frame,
            tail_len,
            port,
            id: 0,
            verdict: Verdict::Undecided,
            part: Part::Whole,
            l3: 0,
            l4: 0,
            ip_len: 0,
            longest: 0,
            ttl: 0,
            dont_fragment: false,
            partial_checksum: false,
            layer4: Layer4::Other,
            tuple: Tuple::default(),
            hash: 0,
            candidate: Candidate::default(),
            flow: None,
            out: Tuple::default(),
            choice: None,
            rewrite: Rewrite::Route,
            mss_limit: 0,
            cut_to: 0,
            is_stateless: false,
            error_source: None,
            macs: ([0; 6], [0; 6]),
            gateway: Addr::UNSPECIFIED,
            from_tunnel: None,
            to_tunnel: None,
        }
    }

    /// Forgets what the stages found out, to be judged from the start. Only while the frame has not been rewritten.
    pub fn begin_again(&mut self) {
        self.verdict = Verdict::Undecided;
        self.layer4 = Layer4::Other;
        self.partial_checksum = false;
        self.flow = None;
        self.choice = None;
        self.rewrite = Rewrite::Route;
        self.mss_limit = 0;
        self.cut_to = 0;
        self.is_stateless = false;
        self.error_source = None;
        (self.from_tunnel, self.to_tunnel) = (None, None);
    }

    /// The TCP header of a [`Layer4::Tcp`] with its options, as far as the first descriptor holds it.
    pub fn tcp_header(&self) -> &[u8] {
        let bytes = self.frame.data().get(usize::from(self.l4)..).unwrap_or_default();
        let len = tcp::Header::ref_from_prefix(bytes).map_or(0, |(header, _)| header.header_len());
        &bytes[..len.min(bytes.len())]
    }

    /// Notes what the headers say of a fragment, unless more is known of it already.
    pub fn found_fragment(&mut self, fragment: Fragment) {
        self.layer4 = Layer4::Fragment;
        if matches!(self.part, Part::Whole | Part::Fragment(_)) {
            self.part = Part::Fragment(fragment);
        }
    }

    /// Bytes of layer 4, those in further fragments included.
    pub fn layer4_len(&self) -> usize {
        let own = usize::from(self.l3) + usize::from(self.ip_len) - usize::from(self.l4);
        match self.part {
            Part::First(datagram) => own + usize::from(datagram.later_len),
            _ => own,
        }
    }

    /// Takes over what was decided about `first`, the first fragment of the same datagram. All fragments leave with its TTL, since it
    /// was the one that was judged by.
    pub fn follow(&mut self, first: &Packet) {
        self.verdict = match first.verdict {
            // The answer goes out once; only an echo comes back as long as it was.
            Verdict::Answer { reason, .. } if first.rewrite != Rewrite::Answer(Answer::EchoReply) => {
                Verdict::Drop(reason)
            }
            verdict => verdict,
        };
        self.rewrite = match first.rewrite {
            Rewrite::IcmpError { .. } => Rewrite::Translate,
            rewrite => rewrite,
        };
        self.out = Tuple { src: first.out.src, dst: first.out.dst, ..self.tuple };
        (self.ttl, self.cut_to, self.is_stateless) = (first.ttl, first.cut_to, first.is_stateless);
        (self.macs, self.gateway) = (first.macs, first.gateway);
        (self.to_tunnel, self.hash) = (first.to_tunnel, first.hash);
    }

    /// True as long as no stage has decided what becomes of the packet.
    #[inline]
    pub fn undecided(&self) -> bool {
        self.verdict == Verdict::Undecided
    }

    /// Drops the packet.
    #[inline]
    pub fn drop(&mut self, reason: Reason) {
        self.verdict = Verdict::Drop(reason);
    }

    /// Answers the packet by the port that it came in by.
    #[inline]
    pub fn answer(&mut self, answer: Answer, reason: Reason) {
        self.rewrite = Rewrite::Answer(answer);
        self.verdict = Verdict::Answer { port: self.port, reason };
    }
}
