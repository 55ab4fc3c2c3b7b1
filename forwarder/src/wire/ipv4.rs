//! IPv4 headers, RFC 791.

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// Bytes of a header with as many options as it can hold.
pub const MAX_HEADER_LEN: usize = 60;
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

    /// Where the fragment's data belongs in the payload of its datagram, bytes.
    #[inline]
    pub fn fragment_offset(&self) -> u16 {
        (self.fragment.get() & OFFSET_MASK) * 8
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

/// Makes the options of a first fragment those of a later one: what has no copied flag becomes "no operation", as Linux does it, so
/// that the length stays (RFC 791 section 3.1). Malformed options stay from there on.
pub fn keep_copied_options(options: &mut [u8]) {
    let mut at = 0;
    while let Some(kind) = options.get(at).copied() {
        at += match kind {
            0 => return,
            1 => 1,
            _ => {
                let len = usize::from(options.get(at + 1).copied().unwrap_or(0));
                match options.get_mut(at..at + len) {
                    Some(option) if len >= 2 && kind & 0x80 == 0 => option.fill(1),
                    Some(_) if len >= 2 => {}
                    _ => return,
                }
                len
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_fragments_keep_options_with_the_copied_flag() {
        let mut options = [7, 3, 4, 1, 148, 4, 0, 0, 30, 4, 9, 9, 0, 5];
        keep_copied_options(&mut options);
        assert_eq!(options, [1, 1, 1, 1, 148, 4, 0, 0, 1, 1, 1, 1, 0, 5]);
        for malformed in [[7u8, 1, 4, 4], [7, 9, 4, 4], [1, 1, 1, 7]] {
            let mut kept = malformed;
            keep_copied_options(&mut kept);
            assert_eq!(kept, malformed);
        }
    }

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
