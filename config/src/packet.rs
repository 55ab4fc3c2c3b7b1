//! The grammar of packets on the command line of `explain` and `trace`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A packet as a person writes it: `tcp 198.51.100.7:4242 > 203.0.113.10:80 syn from outside`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSpec {
    /// The protocol.
    pub protocol: Protocol,
    /// Source address.
    pub src: IpAddr,
    /// Source port; for ICMP the identifier of the echo.
    pub src_port: u16,
    /// Destination address, of the family of the source.
    pub dst: IpAddr,
    /// Destination port; 0 for ICMP.
    pub dst_port: u16,
    /// Flags of a TCP packet, as in its header (RFC 9293 section 3.1): FIN 1, SYN 2, RST 4, PSH 8, ACK 16.
    pub tcp_flags: u8,
    /// Where the packet comes in.
    pub from: From,
}

/// The protocol of a [`PacketSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// An ICMP or ICMPv6 echo request, by the family of the addresses.
    Icmp,
}

/// Where a packet comes in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// Not said: inside if the source is a pod or a node, else outside.
    #[default]
    Guess,
    /// By the first outside port.
    Outside,
    /// By the first inside port.
    Inside,
    /// By the port of this name.
    Port(String),
}
