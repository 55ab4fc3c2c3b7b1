//! Ethernet II frames with up to two VLAN tags (IEEE 802.3, 802.1Q).

/// Bytes of an untagged Ethernet header.
pub const HEADER_LEN: usize = 14;
/// Bytes that each VLAN tag adds.
pub const TAG_LEN: usize = 4;

/// EtherTypes (IANA).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// VLAN tag, 802.1Q.
    pub const VLAN: u16 = 0x8100;
    /// Outer VLAN tag, 802.1ad.
    pub const QINQ: u16 = 0x88a8;
}

/// A link-layer address.
pub type Mac = [u8; 6];

/// EtherType of the payload and where it begins: after the header and at most two VLAN tags. `None`: the frame is too short.
#[inline]
pub fn payload(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = HEADER_LEN;
    let mut ethertype = be16(frame, 12)?;
    for _ in 0..2 {
        if ethertype != ethertype::VLAN && ethertype != ethertype::QINQ {
            break;
        }
        ethertype = be16(frame, at + 2)?;
        at += TAG_LEN;
    }
    Some((ethertype, at))
}

/// Destination address of a frame of at least [`HEADER_LEN`] bytes.
#[inline]
pub fn destination(frame: &[u8]) -> Mac {
    let mut mac = [0; 6];
    mac.copy_from_slice(&frame[..6]);
    mac
}

/// Source address of a frame of at least [`HEADER_LEN`] bytes.
#[inline]
pub fn source(frame: &[u8]) -> Mac {
    let mut mac = [0; 6];
    mac.copy_from_slice(&frame[6..12]);
    mac
}

/// Writes both addresses into a frame of at least [`HEADER_LEN`] bytes; tags stay.
#[inline]
pub fn set_addresses(frame: &mut [u8], destination: Mac, source: Mac) {
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
}

#[inline]
fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_payload_behind_tags() {
        let mut frame = vec![0u8; 12];
        frame.extend([0x08, 0x00]);
        assert_eq!(payload(&frame), Some((ethertype::IPV4, 14)));
        let mut tagged = vec![0u8; 12];
        tagged.extend([0x88, 0xa8, 0, 1, 0x81, 0x00, 0, 2, 0x86, 0xdd]);
        assert_eq!(payload(&tagged), Some((ethertype::IPV6, 22)));
        for len in 0..tagged.len() {
            assert_eq!(payload(&tagged[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn a_third_tag_is_not_looked_into() {
        let mut frame = vec![0u8; 12];
        frame.extend([0x81, 0x00, 0, 1, 0x81, 0x00, 0, 2, 0x81, 0x00, 0, 3, 0x08, 0x00]);
        assert_eq!(payload(&frame), Some((ethertype::VLAN, 22)));
    }
}
