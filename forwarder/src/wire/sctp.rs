//! SCTP's checksum: CRC32c over the packet with a zero checksum field (RFC 9260 section 6.8 and appendix A).

/// Bytes of the common header.
pub const HEADER_LEN: usize = 12;
/// Where the checksum stands in the common header.
pub const CHECKSUM_OFFSET: usize = 8;

/// Chunk type of the first packet of an association (RFC 9260 section 3.2).
pub const INIT: u8 = 1;
/// Chunk type of the end of an association that failed.
pub const ABORT: u8 = 6;
/// Chunk type of the last packet of an association.
pub const SHUTDOWN_COMPLETE: u8 = 14;

/// The polynomial of CRC32c, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// CRC32c of every byte value.
const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// CRC32c of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !further(u32::MAX, bytes)
}

fn further(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// The checksum of a packet of `len` bytes that lies in several parts, whose checksum field is zero.
pub fn checksum_of<'p>(parts: impl Iterator<Item = &'p [u8]>, len: usize) -> u32 {
    let (mut crc, mut left) = (u32::MAX, len);
    for part in parts {
        let part = &part[..part.len().min(left)];
        crc = further(crc, part);
        left -= part.len();
    }
    !crc
}

/// Computes the checksum of a whole SCTP packet and writes it; a packet shorter than the common header stays.
pub fn set_checksum(packet: &mut [u8]) {
    if packet.len() < HEADER_LEN {
        return;
    }
    packet[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].fill(0);
    let crc = crc32c(packet);
    packet[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
}

/// The checksum after four bytes of the packet changed from `old` to `new`, with `behind` bytes of the packet behind them. For packets
/// that are not in one piece; a wrong checksum stays wrong.
///
/// A CRC is linear: what changes is the CRC of the difference, moved along by `behind` zero bytes, which multiplies it by
/// x^(8 behind) modulo the polynomial.
pub fn update_checksum(checksum: u32, old: [u8; 4], new: [u8; 4], behind: usize) -> u32 {
    let difference = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
    // Four bytes themselves are moved along by four.
    let (mut moved, mut power, mut left) = (difference, BYTE, behind + 4);
    while left > 0 {
        if left & 1 == 1 {
            moved = multiply(moved, power);
        }
        power = multiply(power, power);
        left >>= 1;
    }
    checksum ^ moved
}

/// x^8, reflected: x^0 is the highest bit.
const BYTE: u32 = 1 << 23;

/// Product of two polynomials modulo that of the CRC, all reflected.
fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    while a != 0 {
        if a & 1 << 31 != 0 {
            product ^= b;
        }
        a <<= 1;
        b = if b & 1 == 1 { b >> 1 ^ POLYNOMIAL } else { b >> 1 };
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_equals_a_recompute() {
        for len in [12usize, 13, 100, 1480, 65_000] {
            let mut packet: Vec<u8> = (0..len).map(|i| (i * 7 + 3) as u8).collect();
            set_checksum(&mut packet);
            let word = |packet: &[u8], at: usize| -> [u8; 4] { packet[at..at + 4].try_into().unwrap() };
            let (old, new) = (word(&packet, 0), [0x1f, 0x90, 0xee, 0x01]);
            let before = u32::from_le_bytes(word(&packet, CHECKSUM_OFFSET));
            packet[..4].copy_from_slice(&new);
            set_checksum(&mut packet);
            let after = u32::from_le_bytes(word(&packet, CHECKSUM_OFFSET));
            assert_eq!(update_checksum(before, old, new, len - 4), after, "{len} bytes");
            assert_ne!(update_checksum(before ^ 4, old, new, len - 4), after, "{len} bytes");
        }
    }

    /// RFC 3720 appendix B.4.
    #[test]
    fn known_values() {
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
