//! IPv6 headers and their extension chain, RFC 8200.

use zerocopy::byteorder::network_endian::{U16, U32, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::verdict::Reason;

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;
/// Bytes of a fragment header.
pub const FRAGMENT_HEADER_LEN: usize = 8;
/// Smallest MTU of a link, RFC 8200 section 5.
pub const MIN_MTU: usize = 1280;

/// The fixed header.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct Header {
    /// Version, traffic class, flow label.
    pub version_class_label: U32,
    /// Bytes after this header.
    pub payload_len: U16,
    /// Protocol of the payload or first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub src: U128,
    /// Destination address.
    pub dst: U128,
}

/// Where an extension chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Protocol of the upper layer.
    pub protocol: u8,
    /// Bytes of extension headers.
    pub len: usize,
    /// The fragment header in the chain, if it is no atomic one (RFC 6946).
    pub fragment: Option<FragmentHeader>,
}

impl Chain {
    /// True if this is not the first fragment: the upper layer is not here.
    pub fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|fragment| fragment.offset > 0)
    }
}

/// A fragment header, RFC 8200 section 4.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentHeader {
    /// Where it ends, and so where the fragment's data begins: bytes behind the fixed header.
    pub end: usize,
    /// Where the data belongs in the payload of the datagram, bytes.
    pub offset: u16,
    /// It is not the last fragment.
    pub more: bool,
    /// Identification of the datagram.
    pub id: u32,
}

/// More extension headers than this are refused, as RFC 8504 section 5.3 allows.
const MAX_EXTENSIONS: usize = 8;

/// Walks the extension headers at the start of `payload`.
///
/// Errors: [`Reason::BadIpHeader`] for a chain that does not fit, is too long or is fragmented twice, [`Reason::SourceRoute`] for a
/// routing header of type 0.
pub fn walk(next_header: u8, payload: &[u8]) -> Result<Chain, Reason> {
    let mut chain = Chain { protocol: next_header, len: 0, fragment: None };
    for _ in 0..=MAX_EXTENSIONS {
        let rest = &payload[chain.len..];
        match chain.protocol {
            // Hop-by-hop, routing, destination options, mobility, HIP, shim6.
            0 | 43 | 60 | 135 | 139 | 140 => {
                let header = rest.get(..8).ok_or(Reason::BadIpHeader)?;
                if chain.protocol == 43 && header[2] == 0 {
                    return Err(Reason::SourceRoute);
                }
                chain.protocol = header[0];
                chain.len += 8 + usize::from(header[1]) * 8;
            }
            44 => {
                let header = rest.get(..8).ok_or(Reason::BadIpHeader)?;
                let word = u16::from_be_bytes([header[2], header[3]]);
                let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                chain.protocol = header[0];
                chain.len += 8;
                if word & 0xfff9 == 0 {
                    continue;
                }
                if chain.fragment.is_some() {
                    return Err(Reason::BadIpHeader);
                }
                let (offset, more) = (word & 0xfff8, word & 1 != 0);
                chain.fragment = Some(FragmentHeader { end: chain.len, offset, more, id });
                if offset > 0 {
                    return Ok(chain);
                }
            }
            _ => return Ok(chain),
        }
        if chain.len > payload.len() {
            return Err(Reason::BadIpHeader);
        }
    }
    Err(Reason::BadIpHeader)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_to_the_upper_layer() {
        assert_eq!(walk(6, &[]), Ok(Chain { protocol: 6, len: 0, fragment: None }));
        let hop_by_hop = [17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(walk(0, &hop_by_hop), Ok(Chain { protocol: 17, len: 8, fragment: None }));
    }

    #[test]
    fn knows_fragments_from_atomic_ones() {
        let atomic = [17, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(walk(44, &atomic).unwrap().fragment, None);
        // Destination options behind the fragment header belong to the data of the first fragment.
        let first = [60, 0, 0, 1, 0, 0, 0, 7, 17, 0, 1, 4, 0, 0, 0, 0];
        let chain = walk(44, &first).unwrap();
        assert_eq!(chain.fragment, Some(FragmentHeader { end: 8, offset: 0, more: true, id: 7 }));
        assert_eq!((chain.protocol, chain.len, chain.is_later_fragment()), (17, 16, false));
        let later = [17, 0, 0, 8, 0, 0, 0, 1];
        let chain = walk(44, &later).unwrap();
        assert_eq!(chain.fragment, Some(FragmentHeader { end: 8, offset: 8, more: false, id: 1 }));
        assert!(chain.is_later_fragment());
        let twice = [44, 0, 0, 1, 0, 0, 0, 1, 17, 0, 0, 1, 0, 0, 0, 2];
        assert_eq!(walk(44, &twice), Err(Reason::BadIpHeader));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert_eq!(walk(0, &[6, 1, 0, 0, 0, 0, 0, 0]), Err(Reason::BadIpHeader));
        assert_eq!(walk(60, &[6, 0, 0]), Err(Reason::BadIpHeader));
        assert_eq!(walk(43, &[6, 0, 0, 1, 0, 0, 0, 0]), Err(Reason::SourceRoute));
        let endless = [60u8, 0, 0, 0, 0, 0, 0, 0].repeat(64);
        assert_eq!(walk(60, &endless), Err(Reason::BadIpHeader));
    }
}
