//! What becomes of a packet. A reason is also its counter, its name in `towpathctl drops` and its word in a trace.

/// Declares [`Reason`] with, for each reason, its name in metrics and a sentence for operators.
macro_rules! reasons {
    ($($variant:ident = $name:literal, $help:literal;)*) => {
        /// Why a packet was dropped or answered instead of forwarded.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason { $(#[doc = $help] $variant),* }

        impl Reason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),*];

            /// Name of the counter, snake case.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name),* }
            }

            /// One sentence for operators.
            pub const fn help(self) -> &'static str {
                match self { $(Reason::$variant => $help),* }
            }
        }
    };
}

reasons! {
    // Malformed packets, RFC 1812 section 5.2.2.
    Truncated = "truncated", "The frame ends before the headers that it announces.";
    BadIpHeader = "bad_ip_header", "IP version, header length or total length contradict the frame.";
    BadIpChecksum = "bad_ip_checksum", "The IPv4 header checksum is wrong.";
    BadL4Header = "bad_l4_header", "The TCP, UDP, SCTP or ICMP header contradicts its length fields.";
    BadL4Checksum = "bad_l4_checksum", "The checksum of an ICMP message that needs translation is wrong.";
    BadTcpFlags = "bad_tcp_flags", "TCP flags that no implementation sends (none, SYN+FIN, SYN+RST).";
    SourceRoute = "source_route", "An IPv4 source route or an IPv6 routing header type 0 (RFC 5095).";
    MartianSource = "martian_source", "A source address that may not appear on a wire.";
    MartianDestination = "martian_destination", "A destination address that may not appear on a wire.";
    Land = "land", "Source and destination address are the same.";
    NotOurMac = "not_our_mac", "A unicast packet in a link-layer broadcast, multicast or foreign frame.";
    PodFromOutside = "pod_from_outside", "A source that is inside, such as a pod's, came in from the outside.";
    ClientFromInside = "client_from_inside", "A source that is outside, such as a client's, came in from the inside.";
    ForeignSource = "foreign_source", "A pod at the gateway sent from an address that is not routed to it.";
    OwnSource = "own_source", "The source is ours: an address of a Service, or of the gateway.";
    // Service rules, kubernetes pkg/proxy.
    NoEndpoints = "no_endpoints", "The Service has no endpoints at all: rejected.";
    ZeroWeight = "zero_weight", "Every endpoint in the list has weight 0: rejected.";
    NoLocalEndpoints = "no_local_endpoints", "The traffic policy is Local and its list is empty: dropped.";
    UnknownPort = "unknown_port", "The address belongs to a Service, but not this port: rejected.";
    UnknownService = "unknown_service", "An address inside a service range without a Service.";
    ClusterInternal = "cluster_internal", "A ClusterIP is not served to the outside on this port.";
    SourceRange = "source_range", "The source is not in loadBalancerSourceRanges.";
    FrontendOff = "frontend_off", "The frontend is switched off; `towpathctl describe service` says why.";
    // Flows.
    NoFlow = "no_flow", "A reply or an ICMP error that belongs to no flow.";
    FlowTableFull = "flow_table_full", "The flow table is full and the packet cannot go on without an entry.";
    EndpointRemoved = "endpoint_removed", "The endpoint is gone and the Service resets its connections: a RST instead.";
    SnatPortsExhausted = "snat_ports_exhausted", "No source port is free towards this destination.";
    EgressProtocol = "egress_protocol", "A pod's packet to the outside that is to be masqueraded, of a protocol without ports.";
    // Fragments, RFC 791 section 3.2, RFC 8200 section 4.5.
    FragmentTiny = "fragment_tiny", "A first fragment that does not hold the whole layer-4 header (RFC 1858): its datagram is dropped.";
    FragmentMalformed = "fragment_malformed", "A fragment that is empty, no multiple of 8 bytes, or beyond 65,535 bytes: its datagram is dropped.";
    FragmentOverlap = "fragment_overlap", "Fragments that overlap or contradict each other (RFC 5722): their datagram is dropped.";
    FragmentDuplicate = "fragment_duplicate", "A fragment whose bytes are there already.";
    FragmentTimeout = "fragment_timeout", "Fragments whose datagram did not become complete in time.";
    FragmentLimit = "fragment_limit", "Too many fragments wait, or too many of one datagram: the oldest datagram is dropped.";
    // Tunnels to nodes, RFC 7348, RFC 6040.
    OverlaySource = "overlay_source", "A VXLAN packet whose sender is no node with an overlay, or that came in from the outside.";
    OverlayInnerSource = "overlay_inner_source", "A packet in VXLAN whose inner source is no pod of the node that sent it.";
    OverlayNetwork = "overlay_network", "A VXLAN packet with no network identifier, or with another one than ours.";
    OverlayPayload = "overlay_payload", "A VXLAN packet with something else inside than an IP packet for one host, such as ARP.";
    OverlayFragment = "overlay_fragment", "A VXLAN packet in fragments: the MTU of the node's VXLAN device is too large.";
    OverlayEcn = "overlay_ecn", "A packet in VXLAN that met congestion on the way and cannot tell its ends so (RFC 6040).";
    // Routing.
    NoRoute = "no_route", "No route to the destination.";
    TtlExceeded = "ttl_exceeded", "TTL or hop limit used up on the way: answered with ICMP time exceeded.";
    PacketTooBig = "packet_too_big", "Larger than the MTU of the way out: answered with the MTU.";
    NeighborUnresolved = "neighbor_unresolved", "The next hop does not answer, or too many packets wait for it.";
    Blackhole = "blackhole", "The route says blackhole, unreachable or prohibit.";
    // Answers to pings.
    EchoAnswered = "echo_answered", "A ping of an address that we own, answered.";
    IcmpNotForUs = "icmp_not_for_us", "An ICMP message to an owned address or about a flow that is neither a ping nor an error to pass on.";
    AnswerLimit = "answer_limit", "A RST, ICMP error or echo reply was due, but too many were sent this second.";
    // Rings.
    TxRingFull = "tx_ring_full", "The transmit ring stayed full.";
    TxTooLong = "tx_too_long", "The frame does not fit the port it should leave by.";
    PuntFailed = "punt_failed", "The kernel did not take a packet that is not ours.";
    PortDown = "port_down", "The port to leave by is down.";
    Interrupted = "interrupted", "The data plane died while it rewrote this packet.";
    InternalError = "internal_error", "A bug: the worker panicked over this packet; please report the log line.";
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Verdict {
    /// Not decided yet: the next stage goes on.
    #[default]
    Undecided,
    /// Leaves by `port` as it stands in the frame.
    Forward {
        /// Index of the port to leave by.
        port: u8,
    },
    /// The frame was turned into our answer (RST, ICMP error, echo reply) and leaves by `port`.
    Answer {
        /// Index of the port to leave by.
        port: u8,
        /// Why the packet itself went no further.
        reason: Reason,
    },
    /// Not ours: to the kernel, untouched, through the TAP of the port that it came in by.
    Punt,
    /// Waits for its next hop to be resolved.
    Hold {
        /// Index of the port behind which the next hop is; the packet's metadata has its address.
        port: u8,
    },
    /// A fragment: waits for the others of its datagram.
    Gather,
    /// Dropped.
    Drop(Reason),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_in_counter_order() {
        let mut names: Vec<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
