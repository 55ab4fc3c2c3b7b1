//! SCTP's checksum: CRC32c over the packet with a zero checksum field (RFC 9260 section 6.8 and appendix A).

/// Where the checksum stands in the common header.
pub const CHECKSUM_OFFSET: usize = 8;

/// CRC32c of every byte value, reflected polynomial 0x82f63b78.
const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// CRC32c of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// Computes the checksum of a whole SCTP packet and writes it; a packet shorter than the common header stays.
pub fn set_checksum(packet: &mut [u8]) {
    if packet.len() < CHECKSUM_OFFSET + 4 {
        return;
    }
    packet[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].fill(0);
    let crc = crc32c(packet);
    packet[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720 appendix B.4.
    #[test]
    fn known_values() {
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
