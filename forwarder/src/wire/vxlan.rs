//! VXLAN, RFC 7348 section 5.

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;

/// The flag that says that the network identifier is valid.
const IDENTIFIED: u8 = 0x08;

/// The network identifier of a header; none if it says that it has none. Everything else in it is ignored, as a receiver must.
#[inline]
pub fn network(header: &[u8; HEADER_LEN]) -> Option<u32> {
    let [flags, _, _, _, v0, v1, v2, _] = *header;
    (flags & IDENTIFIED != 0).then_some(u32::from_be_bytes([0, v0, v1, v2]))
}

/// The header of network `vni`, of 24 bits.
#[inline]
pub fn header(vni: u32) -> [u8; HEADER_LEN] {
    let [_, v0, v1, v2] = vni.to_be_bytes();
    [IDENTIFIED, 0, 0, 0, v0, v1, v2, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(header(0x12_34_56), [8, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
        for vni in [0, 1, 4096, 0xff_ff_ff] {
            assert_eq!(network(&header(vni)), Some(vni));
        }
        assert_eq!(network(&[0xff, 1, 2, 3, 0, 0, 7, 0xff]), Some(7));
        assert_eq!(network(&[0xf7, 0, 0, 0, 0, 0, 7, 0]), None);
    }
}
