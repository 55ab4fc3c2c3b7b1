//! Addresses and tuples as the fast path holds them: host byte order, one size for both families.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 or IPv6 address in 128 bits, host byte order; IPv4 is held IPv4-mapped (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2).
///
/// A mapped address never appears on the wire as IPv6 (it is a martian there), so the two families cannot be mistaken for each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Addr(pub u128);

const V4_MAPPED: u128 = 0xffff_0000_0000;

impl Addr {
    /// The unspecified IPv6 address, `::`.
    pub const UNSPECIFIED: Addr = Addr(0);

    /// An IPv4 address from its 32 bits in host byte order.
    #[inline]
    pub const fn v4(bits: u32) -> Addr {
        Addr(V4_MAPPED | bits as u128)
    }

    /// An IPv6 address from its 128 bits in host byte order.
    #[inline]
    pub const fn v6(bits: u128) -> Addr {
        Addr(bits)
    }

    /// True for an IPv4 address.
    #[inline]
    pub const fn is_v4(self) -> bool {
        self.0 >> 32 == V4_MAPPED >> 32
    }

    /// Its family.
    pub const fn family(self) -> Family {
        if self.is_v4() { Family::V4 } else { Family::V6 }
    }

    /// The 32 bits of an IPv4 address; of an IPv6 address the lowest 32 bits.
    #[inline]
    pub const fn v4_bits(self) -> u32 {
        self.0 as u32
    }
}

/// A family of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order of their numbers.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// Its name in Kubernetes objects and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Addr {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Addr {
        Addr::v4(ip.to_bits())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Addr {
        Addr::v6(ip.to_bits())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> IpAddr {
        if addr.is_v4() {
            IpAddr::V4(Ipv4Addr::from_bits(addr.v4_bits()))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(addr.0))
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// IP protocol numbers (IANA) that the forwarder knows.
pub mod protocol {
    /// ICMP for IPv4, RFC 792.
    pub const ICMP: u8 = 1;
    /// TCP, RFC 9293.
    pub const TCP: u8 = 6;
    /// UDP, RFC 768.
    pub const UDP: u8 = 17;
    /// ICMPv6, RFC 4443.
    pub const ICMPV6: u8 = 58;
    /// SCTP, RFC 9260.
    pub const SCTP: u8 = 132;
}

/// One direction of a flow as it stands on the wire. Ports are in host byte order.
///
/// For an ICMP echo both ports hold the identifier (RFC 5508 section 3.1), so that request and reply are each other's reverse.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// IP protocol number, see [`protocol`].
    pub protocol: u8,
}

impl Tuple {
    /// The tuple of an answer: source and destination exchanged.
    #[inline]
    pub const fn reversed(&self) -> Tuple {
        Tuple {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
            protocol: self.protocol,
        }
    }
}

impl Tuple {
    /// A hash that is the same on every gateway with the same `key` and over restarts, for consistent hashing. Not for tables that
    /// a stranger could fill: those have a secret key of their own.
    #[inline]
    pub const fn stable_hash(&self, key: u64) -> u64 {
        let ports = (self.src_port as u64) << 32 | (self.dst_port as u64) << 16 | self.protocol as u64;
        let words = [
            (self.src.0 >> 64) as u64,
            self.src.0 as u64,
            (self.dst.0 >> 64) as u64,
            self.dst.0 as u64,
            ports,
        ];
        let mut hash = key;
        let mut i = 0;
        while i < words.len() {
            hash = mix(hash ^ words[i]);
            i += 1;
        }
        hash
    }
}

/// Finalizer of SplitMix64 (Steele et al. 2014).
const fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// `address:port`, with brackets around an IPv6 address.
struct Endpoint(Addr, u16);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_v4() { write!(f, "{}:{}", self.0, self.1) } else { write!(f, "[{}]:{}", self.0, self.1) }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.protocol {
            protocol::ICMP => "icmp",
            protocol::TCP => "tcp",
            protocol::UDP => "udp",
            protocol::ICMPV6 => "icmpv6",
            protocol::SCTP => "sctp",
            other => return write!(f, "proto-{other} {} > {}", self.src, self.dst),
        };
        write!(f, "{name} {} > {}", Endpoint(self.src, self.src_port), Endpoint(self.dst, self.dst_port))
    }
}

impl fmt::Debug for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["0.0.0.0", "10.1.2.3", "255.255.255.255", "::", "::1", "fd00::1", "::1.2.3.4"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)), ip);
            assert_eq!(Addr::from(ip).is_v4(), ip.is_ipv4());
        }
    }

    #[test]
    fn reversing_twice_gives_the_tuple_again() {
        let tuple =
            Tuple { src: Addr::v4(1), dst: Addr::v4(2), src_port: 3, dst_port: 4, protocol: protocol::TCP };
        assert_eq!(tuple.reversed().reversed(), tuple);
        assert_eq!(tuple.to_string(), "tcp 0.0.0.1:3 > 0.0.0.2:4");
    }
}
