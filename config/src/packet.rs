//! The grammar of packets on the command line of `explain` and `trace`.
//!
//! ```text
//! tcp 198.51.100.7:4242 > 203.0.113.10:80
//! tcp 198.51.100.7:4242 > 203.0.113.10:80 syn|ack from inside
//! udp [2001:db8::1]:5353 > [fd00:96::a]:53 from uplink
//! icmp 10.244.1.5 > 10.96.0.10
//! ```
//!
//! Protocol, source, `>`, destination; then in any order TCP flags joined by `|` (`syn` if none are given) and `from`
//! with `outside`, `inside` or the name of a port. A source port may be left out: it is [`ANY_PORT`] then.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::fault::{Code, Fault};

/// The source port of a packet whose source port does not matter; for a ping its identifier.
pub const ANY_PORT: u16 = 40_000;

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

impl Protocol {
    /// Its word in the grammar.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
            Protocol::Icmp => "icmp",
        }
    }
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

/// The flags of a TCP header, in the order of their bits.
const TCP_FLAGS: [(&str, u8); 5] = [("fin", 1), ("syn", 2), ("rst", 4), ("psh", 8), ("ack", 16)];

const GRAMMAR: &str = "write PROTOCOL ADDRESS:PORT > ADDRESS:PORT, such as 'tcp 198.51.100.7:4242 > 203.0.113.10:80', \
                       IPv6 as [2001:db8::1]:4242; then flags such as syn|ack, and 'from outside', 'from inside' or 'from PORT'";

fn bad(field: &str, value: impl fmt::Display, message: impl Into<String>) -> Fault {
    Fault::new(Code::Syntax, message).field(field).value(value).remedy(GRAMMAR)
}

impl FromStr for PacketSpec {
    type Err = Fault;

    fn from_str(text: &str) -> Result<PacketSpec, Fault> {
        // The arrow needs no spaces around it; `->` is what people type who think of tcpdump's older sisters.
        let spaced = text.replace("->", " > ").replace('>', " > ");
        let mut words = spaced.split_whitespace();
        let mut next =
            |what: &str| words.next().ok_or_else(|| bad("packet", format!("{text:?}"), format!("no {what}")));
        let word = next("protocol")?;
        let protocol = match word.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            "icmp" | "icmpv6" | "icmp6" | "ping" => Protocol::Icmp,
            _ => return Err(bad("protocol", word, "not one of tcp, udp, sctp, icmp")),
        };
        let (src, src_port) = address("source", next("source address")?)?;
        let arrow = next("> after the source")?;
        if arrow != ">" {
            return Err(bad("packet", arrow, "expected > after the source"));
        }
        let word = next("destination address")?;
        let (dst, dst_port) = address("destination", word)?;
        if src.is_ipv4() != dst.is_ipv4() {
            return Err(bad(
                "packet",
                format!("{src} > {dst}"),
                "source and destination are of different families",
            ));
        }
        let dst_port = match (protocol, dst_port) {
            (Protocol::Icmp, None) => 0,
            (Protocol::Icmp, Some(_)) => {
                return Err(bad("destination", word, "a ping has no destination port"));
            }
            (_, Some(port)) => port,
            (_, None) => return Err(bad("destination", word, "no port")),
        };
        let mut packet = PacketSpec {
            protocol,
            src,
            src_port: src_port.unwrap_or(ANY_PORT),
            dst,
            dst_port,
            tcp_flags: 0,
            from: From::Guess,
        };
        while let Some(word) = words.next() {
            if word == "from" {
                packet.from = match words.next() {
                    Some("outside") => From::Outside,
                    Some("inside") => From::Inside,
                    Some(port) => From::Port(port.to_owned()),
                    None => return Err(bad("from", "from", "nothing after it")),
                };
            } else if protocol == Protocol::Tcp {
                packet.tcp_flags |= flags(word)?;
            } else {
                return Err(bad("packet", word, "not understood after the destination"));
            }
        }
        if protocol == Protocol::Tcp && packet.tcp_flags == 0 {
            packet.tcp_flags = 2;
        }
        Ok(packet)
    }
}

fn flags(word: &str) -> Result<u8, Fault> {
    word.split('|').try_fold(0, |flags, name| {
        let known = TCP_FLAGS.iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
        known
            .map(|(_, bit)| flags | bit)
            .ok_or_else(|| bad("flags", name, "not one of fin, syn, rst, psh, ack"))
    })
}

/// `1.2.3.4`, `1.2.3.4:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn address(field: &str, word: &str) -> Result<(IpAddr, Option<u16>), Fault> {
    let (host, port) = if let Some(rest) = word.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(|| bad(field, word, "no ] after the address"))?;
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':').ok_or_else(|| bad(field, word, "expected : after ]"))?),
        };
        let host: Ipv6Addr =
            host.parse().map_err(|_| bad(field, word, "not an IPv6 address in the brackets"))?;
        (IpAddr::V6(host), port)
    } else if let Ok(host) = word.parse::<Ipv6Addr>() {
        (IpAddr::V6(host), None)
    } else {
        let (host, port) = match word.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (word, None),
        };
        let host = host.parse().map_err(|_| bad(field, word, "not an IP address"))?;
        (IpAddr::V4(host), port)
    };
    let port = match port.map(str::parse::<u16>) {
        None => None,
        Some(Ok(port)) if port > 0 => Some(port),
        Some(_) => return Err(bad(field, word, "the port is not a number from 1 to 65535")),
    };
    Ok((host, port))
}

impl fmt::Display for PacketSpec {
    /// The packet in its own grammar.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.protocol.name();
        if self.protocol == Protocol::Icmp {
            write!(f, "{name} {} > {}", self.src, self.dst)?;
        } else {
            let src = std::net::SocketAddr::new(self.src, self.src_port);
            let dst = std::net::SocketAddr::new(self.dst, self.dst_port);
            write!(f, "{name} {src} > {dst}")?;
        }
        if self.protocol == Protocol::Tcp {
            let set = TCP_FLAGS.iter().filter(|(_, bit)| self.tcp_flags & bit != 0).map(|(name, _)| *name);
            write!(f, " {}", set.collect::<Vec<_>>().join("|"))?;
        }
        match &self.from {
            From::Guess => Ok(()),
            From::Outside => f.write_str(" from outside"),
            From::Inside => f.write_str(" from inside"),
            From::Port(name) => write!(f, " from {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, shown) in [
            ("tcp 198.51.100.7:4242 > 203.0.113.10:80", "tcp 198.51.100.7:4242 > 203.0.113.10:80 syn"),
            (
                "TCP 198.51.100.7:4242->203.0.113.10:80 ACK|psh",
                "tcp 198.51.100.7:4242 > 203.0.113.10:80 psh|ack",
            ),
            ("tcp 1.2.3.4 > 5.6.7.8:80 from inside rst", "tcp 1.2.3.4:40000 > 5.6.7.8:80 rst from inside"),
            (
                "udp [2001:db8::1]:53 > [2001:db8::2]:53 from uplink",
                "udp [2001:db8::1]:53 > [2001:db8::2]:53 from uplink",
            ),
            ("udp 2001:db8::1 > [::2]:53", "udp [2001:db8::1]:40000 > [::2]:53"),
            ("icmp 1.2.3.4 > 5.6.7.8 from outside", "icmp 1.2.3.4 > 5.6.7.8 from outside"),
            ("icmpv6 fd00::1 > fd00::2", "icmp fd00::1 > fd00::2"),
            ("sctp 1.2.3.4:5 > 5.6.7.8:9", "sctp 1.2.3.4:5 > 5.6.7.8:9"),
        ] {
            let packet: PacketSpec = text.parse().unwrap_or_else(|fault| panic!("{text}: {fault}"));
            assert_eq!(packet.to_string(), shown);
            assert_eq!(shown.parse::<PacketSpec>().unwrap(), packet);
        }
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, words) in [
            ("", "no protocol"),
            ("http 1.2.3.4:5 > 5.6.7.8:9", "not one of tcp, udp, sctp, icmp"),
            ("tcp", "no source address"),
            ("tcp 1.2.3.4:5", "no > after the source"),
            ("tcp 1.2.3.4:5 5.6.7.8:9", "expected >"),
            ("tcp 1.2.3.4:5 >", "no destination address"),
            ("tcp 1.2.3.4:5 > 5.6.7.8", "no port"),
            ("tcp 1.2.3.4:5 > 5.6.7.8:0", "1 to 65535"),
            ("tcp 1.2.3.4:5 > 5.6.7.8:65536", "1 to 65535"),
            ("tcp 1.2.3.4:5 > [::1]:80", "different families"),
            ("tcp 1.2.3.4:5 > [::1:80", "no ]"),
            ("tcp 1.2.3.4:5 > [::1]80", "expected :"),
            ("tcp 1.2.3.4:5 > web:80", "not an IP address"),
            ("tcp 1.2.3.4:5 > 5.6.7.8:9 fast", "not one of fin"),
            ("udp 1.2.3.4:5 > 5.6.7.8:9 syn", "not understood"),
            ("udp 1.2.3.4:5 > 5.6.7.8:9 from", "nothing after it"),
            ("icmp 1.2.3.4 > 5.6.7.8:9", "no destination port"),
        ] {
            let fault = text.parse::<PacketSpec>().expect_err(text);
            assert!(fault.to_string().contains(words), "{text}: {fault}");
        }
    }
}
