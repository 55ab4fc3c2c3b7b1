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

/// True for segments by which Linux takes up a connection: a SYN, and a lone ACK for one that it missed the start of
/// (nf_conntrack_tcp_loose), but neither the end of one nor the answer to a SYN that it never saw. `flags`: valid ones.
#[inline]
pub fn may_be_first(flags: u8) -> bool {
    flags & (RST | FIN) == 0 && flags & (SYN | ACK) != SYN | ACK
}

/// The value of the next maximum segment size option (RFC 9293 section 3.2) as an offset from the beginning of `header`. The search
/// begins with the option at `from`: [`HEADER_LEN`], or two behind the value that was found before. Options behind one that is
/// malformed are not seen.
pub fn next_mss(header: &[u8], from: usize) -> Option<usize> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const MSS: u8 = 2;
    let mut at = from;
    loop {
        match *header.get(at..)? {
            [NO_OPERATION, ..] => at += 1,
            [END, ..] => return None,
            [MSS, 4, _, _, ..] => return Some(at + 2),
            [_, len, ..] if len >= 2 => at += usize::from(len),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn finds(options: &[u8], values_at: &[usize]) {
        let header: Vec<u8> = [0; HEADER_LEN].into_iter().chain(options.iter().copied()).collect();
        let values = std::iter::successors(next_mss(&header, HEADER_LEN), |at| next_mss(&header, at + 2));
        assert_eq!(values.map(|at| at - HEADER_LEN).collect::<Vec<_>>(), values_at);
    }

    #[test]
    fn maximum_segment_sizes_are_found_wherever_they_stand() {
        finds(&[], &[]);
        finds(&[2, 4, 5, 180], &[2]);
        finds(&[1, 2, 4, 5, 180, 0, 0, 0], &[3]);
        finds(&[4, 2, 3, 3, 7, 2, 4, 5, 180, 1, 1, 1], &[7]);
        // A receiver may take either.
        finds(&[2, 4, 5, 180, 2, 4, 5, 181], &[2, 6]);
    }

    #[test]
    fn malformed_options_end_the_search() {
        // Behind the end of the list, longer than the header, without a length that an option can have.
        finds(&[0, 2, 4, 5, 180], &[]);
        finds(&[2, 4, 5], &[]);
        finds(&[2], &[]);
        finds(&[8, 0, 2, 4, 5, 180], &[]);
        finds(&[8, 1, 2, 4, 5, 180], &[]);
        // Not the length of this option: skipped.
        finds(&[2, 3, 5, 2, 4, 5, 180], &[5]);
    }

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
