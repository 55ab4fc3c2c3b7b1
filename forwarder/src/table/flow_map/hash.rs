//! The keyed hash of tuples.
//!
//! Written here rather than taken from a library because its values lie in the mapped region: a library that changes its function
//! in a minor release would lose every flow at an upgrade. It folds 64x64 to 128 bit products, as wyhash and foldhash do.

use crate::addr::Tuple;

/// A tuple as the map compares it: few words, no padding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Packed {
    /// Source and destination; of IPv4 addresses the 32 bits.
    pub src: u128,
    pub dst: u128,
    /// Source port, then destination port.
    pub ports: u32,
    pub protocol: u8,
    /// Both addresses are IPv4.
    pub v4: bool,
}

impl Packed {
    #[inline]
    pub fn new(tuple: &Tuple) -> Packed {
        Packed {
            src: tuple.src.0,
            dst: tuple.dst.0,
            ports: u32::from(tuple.src_port) << 16 | u32::from(tuple.dst_port),
            protocol: tuple.protocol,
            v4: tuple.src.is_v4() && tuple.dst.is_v4(),
        }
    }

    /// Both IPv4 addresses in one word, source first.
    #[inline]
    pub fn v4_addrs(&self) -> u64 {
        self.src as u32 as u64 * (1 << 32) + self.dst as u32 as u64
    }
}

/// The secret of a region: 128 random bits and what is derived from them.
#[derive(Clone, Copy)]
pub(super) struct HashKey {
    secrets: [u64; 4],
}

/// The two halves of a 128-bit product, folded.
#[inline]
const fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

impl HashKey {
    /// `key`: 128 bits that no sender may know, or it could fill one bucket at will.
    pub fn new(key: [u64; 2]) -> HashKey {
        // Digits of pi, so that a poor key cannot make a secret zero.
        let third = fold(key[0] ^ 0x2437_8dc5_1f1d_3a77, key[1] ^ 0x1319_8a2e_0370_7344);
        let fourth = fold(key[1] ^ 0xa409_3822_299f_31d0, key[0] ^ 0x082e_fa98_ec4e_6c89);
        HashKey { secrets: [key[0], key[1], third, fourth | 1] }
    }

    /// 64 bits; equal tuples have equal hashes under one key, over restarts too.
    #[inline]
    pub fn hash(&self, tuple: &Packed) -> u64 {
        let [s0, s1, s2, s3] = self.secrets;
        let ends = u64::from(tuple.ports) << 8 | u64::from(tuple.protocol);
        let mixed = if tuple.v4 {
            fold(tuple.v4_addrs() ^ s0, ends ^ s1)
        } else {
            let src = fold(tuple.src as u64 ^ s0, (tuple.src >> 64) as u64 ^ s1);
            let dst = fold(tuple.dst as u64 ^ s1, (tuple.dst >> 64) as u64 ^ s2);
            fold(src ^ s3, dst.rotate_left(29) ^ ends ^ s0)
        };
        fold(mixed ^ s2, s3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr;

    fn tuple(i: u32, port: u16) -> Packed {
        Packed::new(&Tuple { src: Addr::v4(i), dst: Addr::v4(7), src_port: port, dst_port: 80, protocol: 6 })
    }

    #[test]
    fn one_changed_input_bit_changes_half_of_the_hash() {
        let key = HashKey::new([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
        let (mut flipped, mut pairs) = (0u32, 0u32);
        for i in 0..2_000u32 {
            for bit in 0..32 {
                flipped += (key.hash(&tuple(i, 9)) ^ key.hash(&tuple(i ^ 1 << bit, 9))).count_ones();
                pairs += 1;
            }
            for bit in 0..16 {
                flipped += (key.hash(&tuple(i, 9)) ^ key.hash(&tuple(i, 9 ^ 1 << bit))).count_ones();
                pairs += 1;
            }
        }
        let mean = f64::from(flipped) / f64::from(pairs);
        assert!((31.5..32.5).contains(&mean), "{mean} of 64 bits flip on average");
    }

    #[test]
    fn consecutive_ports_and_addresses_spread_evenly() {
        let key = HashKey::new([1, 2]);
        let mut counts = [0u32; 256];
        for i in 0..65_536u32 {
            counts[(key.hash(&tuple(0x0a00_0000 + i / 256, i as u16 % 256)) >> 56) as usize] += 1;
        }
        // Binomial: mean 256, standard deviation 16; six of them either way.
        assert!(counts.iter().all(|c| (160..352).contains(c)), "{counts:?}");
    }

    #[test]
    fn v6_uses_every_word_and_the_key() {
        let base = Tuple { src: Addr::v6(1), dst: Addr::v6(2), src_port: 3, dst_port: 4, protocol: 6 };
        let mut seen = std::collections::HashSet::new();
        let key = HashKey::new([5, 6]);
        seen.insert(key.hash(&Packed::new(&base)));
        for bit in 0..128 {
            let src = Tuple { src: Addr::v6(1 ^ 1 << bit), ..base };
            let dst = Tuple { dst: Addr::v6(2 ^ 1 << bit), ..base };
            assert!(seen.insert(key.hash(&Packed::new(&src))));
            assert!(seen.insert(key.hash(&Packed::new(&dst))));
        }
        assert!(seen.insert(key.hash(&Packed::new(&base.reversed()))));
        assert!(seen.insert(HashKey::new([5, 7]).hash(&Packed::new(&base))));
    }
}
