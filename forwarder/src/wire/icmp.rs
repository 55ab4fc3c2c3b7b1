//! ICMP (RFC 792, RFC 1191) and ICMPv6 (RFC 4443).

/// Bytes of the common header with the four bytes that each type uses its own way.
pub const HEADER_LEN: usize = 8;

/// ICMP types for IPv4.
pub mod v4 {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Source quench, deprecated by RFC 6633.
    pub const QUENCH: u8 = 4;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER: u8 = 12;
    /// Code of [`UNREACHABLE`]: no route.
    pub const CODE_NET: u8 = 0;
    /// Code of [`UNREACHABLE`]: port.
    pub const CODE_PORT: u8 = 3;
    /// Code of [`UNREACHABLE`]: fragmentation needed.
    pub const CODE_TOO_BIG: u8 = 4;

    /// True for messages that quote the packet they are about.
    #[inline]
    pub const fn is_error(kind: u8) -> bool {
        matches!(kind, UNREACHABLE | QUENCH | REDIRECT | TIME_EXCEEDED | PARAMETER)
    }
}

/// ICMPv6 types.
pub mod v6 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER: u8 = 4;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Code of [`UNREACHABLE`]: no route.
    pub const CODE_NO_ROUTE: u8 = 0;
    /// Code of [`UNREACHABLE`]: port.
    pub const CODE_PORT: u8 = 4;

    /// True for messages that quote the packet they are about (RFC 4443 section 2.1: the high bit is clear).
    #[inline]
    pub const fn is_error(kind: u8) -> bool {
        kind < 128
    }
}
