//! Netlink messages: bytes to headers and attributes and back (RFC 3549 section 2.3; `include/uapi/linux/netlink.h`).
//!
//! Everything is in native byte order and padded to 4 bytes. Reading never panics: a length that contradicts the buffer ends the
//! iteration, so that a truncated message yields the part that is whole.

/// Length of `struct nlmsghdr`, bytes.
const HEADER_LEN: usize = 16;
/// Bits of an attribute's type that are its number; the upper two are NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const ATTRIBUTE_TYPE_MASK: u16 = 0x3fff;

/// Message types and flags of `include/uapi/linux/netlink.h` and `rtnetlink.h` that the mirror knows.
pub mod kind {
    #![allow(missing_docs)]
    pub const ERROR: u16 = 2;
    pub const DONE: u16 = 3;
    pub const NEW_LINK: u16 = 16;
    pub const DEL_LINK: u16 = 17;
    pub const GET_LINK: u16 = 18;
    pub const NEW_ADDR: u16 = 20;
    pub const DEL_ADDR: u16 = 21;
    pub const GET_ADDR: u16 = 22;
    pub const NEW_ROUTE: u16 = 24;
    pub const DEL_ROUTE: u16 = 25;
    pub const GET_ROUTE: u16 = 26;
    pub const NEW_NEIGH: u16 = 28;
    pub const DEL_NEIGH: u16 = 29;
    pub const GET_NEIGH: u16 = 30;
    pub const NEW_RULE: u16 = 32;
    pub const DEL_RULE: u16 = 33;
    pub const GET_RULE: u16 = 34;
    pub const NEW_QDISC: u16 = 36;
    pub const NEW_FILTER: u16 = 44;

    pub const F_REQUEST: u16 = 0x1;
    pub const F_ACK: u16 = 0x4;
    pub const F_DUMP_INTERRUPTED: u16 = 0x10;
    pub const F_REPLACE: u16 = 0x100;
    pub const F_EXCLUSIVE: u16 = 0x200;
    pub const F_CREATE: u16 = 0x400;
    pub const F_DUMP: u16 = 0x300;
}

/// One message of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`, see [`kind`].
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: that of the request for an answer, 0 for a notification by the kernel itself.
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

/// The messages of one datagram, in order.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(datagram, 0)? as usize;
        let body = datagram.get(HEADER_LEN..len)?;
        let message = Message {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            body,
        };
        datagram = datagram.get(padded(len)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes (`struct nlattr`) of `bytes`: number and payload, in order.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u16_at(bytes, 0)? as usize;
        let payload = bytes.get(4..len)?;
        let number = u16_at(bytes, 2)? & ATTRIBUTE_TYPE_MASK;
        bytes = bytes.get(padded(len)..).unwrap_or_default();
        Some((number, payload))
    })
}

/// The 16 bits at `offset`, or none if `bytes` ends before.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The 32 bits at `offset`, or none if `bytes` ends before.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// `len` rounded up to a multiple of 4 (NLMSG_ALIGN, NLA_ALIGN).
pub fn padded(len: usize) -> usize {
    len.saturating_add(3) & !3
}

/// A message in the making. Lengths are filled in by [`Request::finish`] and by the end of a nest.
#[derive(Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Starts a message of type `kind`; F_REQUEST is added to `flags`. `header` is the fixed part that the type demands
    /// (`ifinfomsg`, `ndmsg`, ...).
    pub fn new(kind: u16, flags: u16, header: &[u8]) -> Request {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | kind::F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(header);
        let mut request = Request { bytes };
        request.pad();
        request
    }

    /// Adds an attribute. `payload`: at most 65,531 bytes.
    pub fn attribute(mut self, number: u16, payload: &[u8]) -> Request {
        self.bytes.extend_from_slice(&(payload.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend_from_slice(&number.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.pad();
        self
    }

    /// Adds an attribute that contains what `fill` adds.
    pub fn nest(mut self, number: u16, fill: impl FnOnce(Request) -> Request) -> Request {
        const NESTED: u16 = 0x8000;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(number | NESTED).to_ne_bytes());
        let mut filled = fill(self);
        let len = (filled.bytes.len() - start) as u16;
        filled.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        filled
    }

    /// The bytes to send.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(padded(self.bytes.len()), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_again() {
        let bytes = Request::new(kind::NEW_NEIGH, kind::F_CREATE, &[9; 12])
            .attribute(1, &[10, 0, 0, 1])
            .nest(5, |r| r.attribute(2, b"abc").attribute(3, &[]))
            .finish(77);
        let two = [bytes.clone(), bytes].concat();
        let found: Vec<_> = messages(&two).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], found[1]);
        assert_eq!((found[0].kind, found[0].sequence), (kind::NEW_NEIGH, 77));
        assert_eq!(found[0].flags, kind::F_CREATE | kind::F_REQUEST);
        let outer: Vec<_> = attributes(&found[0].body[12..]).collect();
        assert_eq!(outer[0], (1, &[10, 0, 0, 1][..]));
        assert_eq!(outer[1].0, 5);
        let inner: Vec<_> = attributes(outer[1].1).collect();
        assert_eq!(inner, [(2, &b"abc"[..]), (3, &b""[..])]);
    }

    #[test]
    fn every_truncation_ends_the_iteration() {
        let bytes = Request::new(kind::NEW_LINK, 0, &[0; 16]).attribute(3, b"g0\0").finish(1);
        for len in 0..bytes.len() {
            assert_eq!(messages(&bytes[..len]).count(), 0, "{len} bytes");
            assert!(attributes(&bytes[..len][len.min(32)..]).count() <= 1);
        }
        assert_eq!(messages(&bytes).count(), 1);
    }

    #[test]
    fn a_length_below_its_own_header_ends_the_iteration() {
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[2, 0, 1, 0, 8, 0, 1, 0]).count(), 0);
    }
}
