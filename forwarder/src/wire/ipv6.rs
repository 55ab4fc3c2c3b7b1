//! IPv6 headers and their extension chain, RFC 8200.

use zerocopy::byteorder::network_endian::{U16, U32, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::verdict::Reason;

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;
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
    /// A fragment header other than an atomic one (RFC 6946) is in the chain.
    pub fragment: bool,
    /// This is not the first fragment: the upper layer is not here.
    pub later_fragment: bool,
}

/// More extension headers than this are refused, as RFC 8504 section 5.3 allows.
const MAX_EXTENSIONS: usize = 8;

/// Walks the extension headers at the start of `payload`.
///
/// Errors: [`Reason::BadIpHeader`] for a chain that does not fit or is too long, [`Reason::SourceRoute`] for a routing header of type 0.
pub fn walk(next_header: u8, payload: &[u8]) -> Result<Chain, Reason> {
    let mut chain = Chain { protocol: next_header, len: 0, fragment: false, later_fragment: false };
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
                let offset = u16::from_be_bytes([header[2], header[3]]);
                chain.protocol = header[0];
                chain.len += 8;
                chain.fragment |= offset & 0xfff9 != 0;
                if offset & 0xfff8 != 0 {
                    chain.later_fragment = true;
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
        assert_eq!(walk(6, &[]), Ok(Chain { protocol: 6, len: 0, fragment: false, later_fragment: false }));
        let hop_by_hop = [17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(
            walk(0, &hop_by_hop),
            Ok(Chain { protocol: 17, len: 8, fragment: false, later_fragment: false })
        );
    }

    #[test]
    fn knows_fragments_from_atomic_ones() {
        let atomic = [17, 0, 0, 0, 0, 0, 0, 1];
        assert!(!walk(44, &atomic).unwrap().fragment);
        let first = [17, 0, 0, 1, 0, 0, 0, 1];
        let chain = walk(44, &first).unwrap();
        assert!(chain.fragment && !chain.later_fragment);
        let later = [17, 0, 0, 8, 0, 0, 0, 1];
        assert!(walk(44, &later).unwrap().later_fragment);
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
