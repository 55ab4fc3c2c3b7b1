//! TCP headers, RFC 9293 section 3.1.

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// Where the checksum stands.
pub const CHECKSUM_OFFSET: usize = 16;

/// No more data from the sender.
pub const FIN: u8 = 0x01;
/// Synchronize sequence numbers.
pub const SYN: u8 = 0x02;
/// Reset the connection.
pub const RST: u8 = 0x04;
/// Acknowledgment field is significant.
pub const ACK: u8 = 0x10;

/// The fixed part of the header.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Header {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Sequence number.
    pub seq: U32,
    /// Acknowledgment number.
    pub ack: U32,
    /// Header length in words, upper four bits.
    pub data_offset: u8,
    /// Control bits.
    pub flags: u8,
    /// Receive window.
    pub window: U16,
    /// Checksum over pseudo-header, header and payload.
    pub checksum: U16,
    /// Urgent pointer.
    pub urgent: U16,
}

impl Header {
    /// Bytes of the header with its options, as it claims.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.data_offset >> 4) * 4
    }
}

/// True for combinations of control bits that Linux tracks as valid (nf_conntrack_proto_tcp.c `tcp_valid_flags`):
/// at least one of SYN, FIN, RST, ACK, and none of SYN with FIN or RST, FIN without ACK, FIN with RST.
#[inline]
pub fn valid_flags(flags: u8) -> bool {
    match flags & (SYN | FIN | RST | ACK) {
        SYN | RST | ACK => true,
        f if f == SYN | ACK || f == RST | ACK || f == FIN | ACK => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_nobody_sends() {
        for bad in [0, FIN, SYN | FIN, SYN | RST, FIN | RST, SYN | FIN | RST | ACK, SYN | RST | ACK] {
            assert!(!valid_flags(bad), "{bad:#04x}");
        }
        for good in [SYN, SYN | ACK, ACK, ACK | 0x08, FIN | ACK, RST, RST | ACK, SYN | 0xc0] {
            assert!(valid_flags(good), "{good:#04x}");
        }
    }
}
