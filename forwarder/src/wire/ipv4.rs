//! IPv4 headers, RFC 791.

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// "Don't fragment" in the flags word.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// "More fragments" in the flags word.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// Fragment offset in the flags word, units of 8 bytes.
pub const OFFSET_MASK: u16 = 0x1fff;

/// The fixed part of the header.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Header {
    /// Version and header length in words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length of header and payload, bytes.
    pub total_len: U16,
    /// Identification.
    pub id: U16,
    /// Flags and fragment offset.
    pub fragment: U16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Checksum over the header.
    pub checksum: U16,
    /// Source address.
    pub src: U32,
    /// Destination address.
    pub dst: U32,
}

impl Header {
    /// Bytes of the header with its options, as it claims.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.version_ihl & 0x0f) * 4
    }

    /// True if the packet is a fragment, first ones included.
    #[inline]
    pub fn is_fragment(&self) -> bool {
        self.fragment.get() & (MORE_FRAGMENTS | OFFSET_MASK) != 0
    }
}

/// True if `options` hold a loose or strict source route (RFC 791 section 3.1), or are malformed.
pub fn has_source_route(options: &[u8]) -> bool {
    let mut rest = options;
    while let [kind, tail @ ..] = rest {
        match kind {
            0 => return false,
            1 => rest = tail,
            131 | 137 => return true,
            _ => match tail {
                [len, ..] if usize::from(*len) >= 2 && usize::from(*len) <= rest.len() => {
                    rest = &rest[usize::from(*len)..]
                }
                _ => return true,
            },
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_routes_and_malformed_options_are_seen() {
        assert!(!has_source_route(&[1, 1, 1, 0]));
        assert!(!has_source_route(&[7, 7, 4, 0, 0, 0, 0, 0]));
        assert!(has_source_route(&[1, 131, 3, 4]));
        assert!(has_source_route(&[137, 3, 4, 0]));
        assert!(has_source_route(&[7, 1, 0, 0]), "option length below 2");
        assert!(has_source_route(&[7, 9, 0, 0]), "option longer than the header");
        assert!(!has_source_route(&[]));
    }
}
