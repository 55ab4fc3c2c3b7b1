//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624 section 3, equation 3).

use crate::addr::Addr;

/// Ones' complement sum of `bytes` as big-endian 16-bit words; an odd last byte counts as the high byte of a word.
#[inline]
pub fn sum(bytes: &[u8]) -> u64 {
    let mut total = 0u64;
    let mut chunks = bytes.chunks_exact(4);
    for chunk in &mut chunks {
        total += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let rest = chunks.remainder();
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_be_bytes(last))
}

/// Folds a sum into 16 bits with end-around carries.
#[inline]
pub const fn fold(mut total: u64) -> u16 {
    total = (total >> 32) + (total & 0xffff_ffff);
    total = (total >> 32) + (total & 0xffff_ffff);
    total = (total >> 16) + (total & 0xffff);
    total = (total >> 16) + (total & 0xffff);
    total = (total >> 16) + (total & 0xffff);
    total as u16
}

/// The checksum of `bytes`, as it stands in a header whose checksum field was zero.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// Sum over the addresses of a pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline]
pub const fn addr_sum(addr: Addr) -> u64 {
    if addr.is_v4() {
        addr.v4_bits() as u64
    } else {
        let bits = addr.0;
        (bits >> 96) as u64
            + ((bits >> 64) & 0xffff_ffff) as u64
            + ((bits >> 32) & 0xffff_ffff) as u64
            + (bits & 0xffff_ffff) as u64
    }
}

/// Sum over a whole pseudo-header. `len`: bytes of the layer-4 header and its payload.
#[inline]
pub const fn pseudo_sum(src: Addr, dst: Addr, protocol: u8, len: usize) -> u64 {
    addr_sum(src) + addr_sum(dst) + protocol as u64 + len as u64
}

/// What a rewrite changes a checksum by: the ones' complement difference of all words that changed.
///
/// The same delta serves every packet of a flow, because it depends on the old and new words alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed.
    pub const ZERO: Delta = Delta(0);

    /// Adds the change of a 16-bit word.
    #[inline]
    pub const fn word(self, old: u16, new: u16) -> Delta {
        Delta(self.0 + !old as u64 + new as u64)
    }

    /// Adds the change of an address.
    #[inline]
    pub const fn addr(self, old: Addr, new: Addr) -> Delta {
        Delta(self.0 + (!fold(addr_sum(old))) as u64 + addr_sum(new))
    }

    /// The checksum after the change.
    #[inline]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(!checksum as u64 + self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 section 3.
    #[test]
    fn example_of_rfc_1071() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[0x01])), 0x0100);
    }

    /// RFC 1624 section 4: the example where RFC 1141 gives 0xffff.
    #[test]
    fn example_of_rfc_1624() {
        assert_eq!(Delta::ZERO.word(0x5555, 0x3285).apply(0xdd2f), 0x0000);
    }

    /// Every change of a word, against a full recompute, for three packets whose other words sum to different corners.
    #[test]
    fn every_word_change_equals_a_recompute() {
        for rest in [0x0000u16, 0x1234, 0xfffe] {
            let old = 0x8001u16;
            let before = !fold(u64::from(old) + u64::from(rest) + 1);
            for new in 0..=u16::MAX {
                let full = !fold(u64::from(new) + u64::from(rest) + 1);
                assert_eq!(
                    Delta::ZERO.word(old, new).apply(before),
                    full,
                    "{old:04x} -> {new:04x} beside {rest:04x}"
                );
            }
        }
    }

    #[test]
    fn a_bad_checksum_stays_bad() {
        let delta = Delta::ZERO.addr(Addr::v4(0x0a60_0001), Addr::v4(0x0a02_0002)).word(80, 8080);
        let packet_sum = |dst: u32, port: u16| fold(u64::from(dst) + u64::from(port) + 0x4321);
        let good = !packet_sum(0x0a60_0001, 80);
        let after = !packet_sum(0x0a02_0002, 8080);
        for error in 1..=u16::MAX - 1 {
            let bad = fold(u64::from(good) + u64::from(error));
            if bad == good || (bad ^ good) == 0xffff && (bad == 0 || good == 0) {
                continue;
            }
            assert_ne!(fold(u64::from(delta.apply(bad))), fold(u64::from(after)), "error {error:04x}");
        }
        assert_eq!(delta.apply(good), after);
    }

    #[test]
    fn addresses_of_both_families() {
        let v6 = |text: &str| Addr::from(text.parse::<std::net::IpAddr>().unwrap());
        let bytes = |addr: Addr| addr.0.to_be_bytes();
        for (old, new) in
            [("fd00::1", "2001:db8:ffff:1::2"), ("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")]
        {
            let (old, new) = (v6(old), v6(new));
            let before = !fold(sum(&bytes(old)) + 0x77);
            let after = !fold(sum(&bytes(new)) + 0x77);
            assert_eq!(Delta::ZERO.addr(old, new).apply(before), after);
        }
    }
}
