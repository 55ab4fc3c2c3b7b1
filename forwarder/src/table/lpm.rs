//! Longest-prefix match, one table for both families.
//!
//! IPv4: strides of 16, 8 and 8 bits. The first two are plain arrays (one load each); the third, which only prefixes longer than
//! /24 need, is compressed, or a million scattered host routes would take a gigabyte. IPv6: a trie of 8-bit strides in which stretches without
//! branches are skipped, so that a lookup visits a node where prefixes differ, not every byte.
//!
//! A compressed node is one cache line: a bit for each of 256 slots says whether the slot differs from the one before it, and only
//! the differing ones are stored (as in poptrie, Asai and Ohara, SIGCOMM 2015).

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::addr::Addr;

/// Prefixes to values. Immutable once published.
#[derive(Clone, Debug)]
pub struct Lpm<T> {
    /// Sorted by family, address and length, without duplicates.
    prefixes: Vec<IpNet>,
    /// Of the prefix at the same index.
    values: Vec<T>,
    v4: V4,
    v6: V6,
}

/// What a slot leads to: nothing, the prefix with an index, or a further node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Leaf(u32);

impl Leaf {
    const NONE: Leaf = Leaf(0);
    const NODE: u32 = 1 << 31;

    fn prefix(index: usize) -> Leaf {
        assert!(index < Self::NODE as usize - 1, "more than 2^31 prefixes");
        Leaf(index as u32 + 1)
    }

    fn node(index: usize) -> Leaf {
        Leaf(index as u32 | Self::NODE)
    }

    #[inline]
    fn as_node(self) -> Option<usize> {
        (self.0 & Self::NODE != 0).then_some((self.0 & !Self::NODE) as usize)
    }

    #[inline]
    fn as_prefix(self) -> Option<usize> {
        (self.0 as usize).checked_sub(1)
    }
}

impl<T> Default for Lpm<T> {
    fn default() -> Self {
        Lpm { prefixes: Vec::new(), values: Vec::new(), v4: V4::default(), v6: V6::default() }
    }
}

impl<T: Copy> Lpm<T> {
    /// Builds the table; of two equal prefixes the later wins. Bits of an address beyond its prefix do not count.
    pub fn build(entries: impl IntoIterator<Item = (IpNet, T)>) -> Self {
        let mut entries: Vec<(IpNet, T)> =
            entries.into_iter().map(|(net, value)| (net.trunc(), value)).collect();
        // Stable, so that the later of two equal ones comes last; `dedup_by` hands it over first.
        entries.sort_by_key(|(net, _)| order(net));
        entries.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                earlier.1 = later.1;
            }
            is_same
        });
        let (prefixes, values): (Vec<IpNet>, Vec<T>) = entries.into_iter().unzip();
        let first_v6 = prefixes.partition_point(|net| matches!(net, IpNet::V4(_)));
        let v4 = prefixes[..first_v6].iter().enumerate().filter_map(|(i, net)| match net {
            IpNet::V4(net) => Some((*net, Leaf::prefix(i))),
            IpNet::V6(_) => None,
        });
        let v6 = prefixes[first_v6..].iter().enumerate().filter_map(|(i, net)| match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some((*net, Leaf::prefix(first_v6 + i))),
        });
        let (v4, v6) = (V4::build(&v4.collect::<Vec<_>>()), V6::build(&v6.collect::<Vec<_>>()));
        Lpm { prefixes, values, v4, v6 }
    }

    /// The value of the longest prefix that contains `addr`.
    ///
    /// IPv4: two to five dependent loads; IPv6: two loads for each node.
    #[inline(always)]
    pub fn lookup(&self, addr: Addr) -> Option<T> {
        // No prefix is 0, which lies before the first value.
        self.values.get((self.leaf(addr).0 as usize).wrapping_sub(1)).copied()
    }

    /// As [`Self::lookup`], with the prefix.
    pub fn lookup_entry(&self, addr: Addr) -> Option<(IpNet, T)> {
        self.leaf(addr).as_prefix().map(|index| (self.prefixes[index], self.values[index]))
    }

    /// How many prefixes there are.
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// All prefixes, IPv4 first, by address, then by length.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, T)> {
        self.prefixes.iter().copied().zip(self.values.iter().copied())
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.prefixes) + size_of_val(&*self.values) + self.v4.bytes() + self.v6.bytes()
    }

    #[inline(always)]
    fn leaf(&self, addr: Addr) -> Leaf {
        if addr.is_v4() { self.v4.find(addr.v4_bits()) } else { self.v6.find(addr.0) }
    }
}

/// Covering prefixes come before those they cover.
fn order(net: &IpNet) -> (bool, u128, u8) {
    match net {
        IpNet::V4(net) => (false, u128::from(net.network().to_bits()), net.prefix_len()),
        IpNet::V6(net) => (true, net.network().to_bits(), net.prefix_len()),
    }
}

/// 256 slots, compressed.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Node {
    /// IPv6: the bits that all addresses below share, the first `depth` bytes of which count.
    key: u128,
    /// A bit for each slot that differs from the one before; slot 0 counts as differing.
    differs: [u64; 4],
    /// How many bits of `differs` are set before each word.
    before: [u8; 4],
    /// Where the leaves start.
    leaves: u32,
    /// IPv6: what holds for addresses that do not share `key`.
    otherwise: Leaf,
    /// IPv6: which byte the slots stand for.
    depth: u8,
}

impl Node {
    /// Compresses 256 slots, whose leaves go to the end of `leaves`.
    fn compress(slots: &[Leaf; 256], leaves: &mut Vec<Leaf>) -> Node {
        let mut node = Node {
            key: 0,
            differs: [0; 4],
            before: [0; 4],
            leaves: u32::try_from(leaves.len()).expect("fewer than 2^32 leaves"),
            otherwise: Leaf::NONE,
            depth: 0,
        };
        let mut count = 0u32;
        for (i, slot) in slots.iter().enumerate() {
            if i % 64 == 0 {
                // At most 192 before the last word.
                node.before[i / 64] = count as u8;
            }
            if i == 0 || *slot != slots[i - 1] {
                node.differs[i / 64] |= 1 << (i % 64);
                leaves.push(*slot);
                count += 1;
            }
        }
        node
    }

    #[inline]
    fn slot(&self, byte: u8, leaves: &[Leaf]) -> Leaf {
        let (word, bit) = (usize::from(byte / 64), u32::from(byte % 64));
        // Bits up to and including this one; at least one is set, in this word or before.
        let rank =
            (self.differs[word] & (u64::MAX >> (63 - bit))).count_ones() + u32::from(self.before[word]);
        leaves[(self.leaves + rank - 1) as usize]
    }
}

/// The IPv4 side.
#[derive(Clone, Debug, Default)]
struct V4 {
    /// By the first 16 bits; empty if there are no prefixes.
    first: Vec<Leaf>,
    /// By the third byte, 256 for each node of `first`.
    second: Vec<Leaf>,
    /// By the fourth byte.
    third: Vec<Node>,
    leaves: Vec<Leaf>,
}

impl V4 {
    /// `entries`: sorted, covering prefixes first.
    fn build(entries: &[(Ipv4Net, Leaf)]) -> V4 {
        let mut table = V4::default();
        if entries.is_empty() {
            return table;
        }
        table.first = vec![Leaf::NONE; 1 << 16];
        let by_high_half = |(net, _): &(Ipv4Net, Leaf)| net.network().to_bits() >> 16;
        for group in entries.chunk_by(|a, b| by_high_half(a) == by_high_half(b)) {
            for (net, leaf) in group.iter().filter(|(net, _)| net.prefix_len() <= 16) {
                let start = (net.network().to_bits() >> 16) as usize;
                table.first[start..start + (1 << (16 - net.prefix_len()))].fill(*leaf);
            }
            if group.iter().any(|(net, _)| net.prefix_len() > 16) {
                table.push_second(group);
            }
        }
        table
    }

    /// A node for the prefixes longer than /16 of one `group` with the same high half.
    fn push_second(&mut self, group: &[(Ipv4Net, Leaf)]) {
        let high = (group[0].0.network().to_bits() >> 16) as usize;
        let node = self.second.len() / 256;
        let inherited = std::mem::replace(&mut self.first[high], Leaf::node(node));
        self.second.resize(self.second.len() + 256, inherited);
        let by_third_byte = |(net, _): &(Ipv4Net, Leaf)| net.network().to_bits() >> 8;
        for group in group.chunk_by(|a, b| by_third_byte(a) == by_third_byte(b)) {
            let start = node * 256 + (by_third_byte(&group[0]) & 0xff) as usize;
            for (net, leaf) in group.iter().filter(|(net, _)| (17..=24).contains(&net.prefix_len())) {
                self.second[start..start + (1 << (24 - net.prefix_len()))].fill(*leaf);
            }
            if group.iter().any(|(net, _)| net.prefix_len() > 24) {
                let inherited = std::mem::replace(&mut self.second[start], Leaf::node(self.third.len()));
                let mut slots = [inherited; 256];
                for (net, leaf) in group.iter().filter(|(net, _)| net.prefix_len() > 24) {
                    let start = (net.network().to_bits() & 0xff) as usize;
                    slots[start..start + (1 << (32 - net.prefix_len()))].fill(*leaf);
                }
                self.third.push(Node::compress(&slots, &mut self.leaves));
            }
        }
    }

    #[inline(always)]
    fn find(&self, addr: u32) -> Leaf {
        let Some(leaf) = self.first.get((addr >> 16) as usize) else { return Leaf::NONE };
        let Some(node) = leaf.as_node() else { return *leaf };
        let leaf = self.second[node * 256 + (addr >> 8 & 0xff) as usize];
        let Some(node) = leaf.as_node() else { return leaf };
        self.third[node].slot(addr as u8, &self.leaves)
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.first)
            + size_of_val(&*self.second)
            + size_of_val(&*self.third)
            + size_of_val(&*self.leaves)
    }
}

/// The IPv6 side.
#[derive(Clone, Debug, Default)]
struct V6 {
    root: Leaf,
    nodes: Vec<Node>,
    leaves: Vec<Leaf>,
}

impl V6 {
    /// `entries`: sorted, covering prefixes first.
    fn build(entries: &[(Ipv6Net, Leaf)]) -> V6 {
        let mut table = V6::default();
        // The empty prefix ends before the first byte.
        let (root, rest) = match entries.split_first() {
            Some(((net, leaf), rest)) if net.prefix_len() == 0 => (*leaf, rest),
            _ => (Leaf::NONE, entries),
        };
        table.root = table.subtree(rest, root);
        table
    }

    /// What a slot leads to below which `entries` lie, none of which ends there. Recursion: at most 16 deep.
    fn subtree(&mut self, entries: &[(Ipv6Net, Leaf)], inherited: Leaf) -> Leaf {
        let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else { return inherited };
        // The first byte in which they differ or one of them ends: the bytes before need no node.
        let key = first.network().to_bits();
        let common = (key ^ last.network().to_bits()).leading_zeros();
        let shortest = entries.iter().map(|(net, _)| u32::from(net.prefix_len())).min().unwrap_or(1);
        let depth = (common / 8).min((shortest - 1) / 8);
        let end = depth * 8 + 8;
        let byte = |net: &Ipv6Net| (net.network().to_bits() >> (128 - end)) as u8;

        let mut slots = [inherited; 256];
        for (net, leaf) in entries.iter().filter(|(net, _)| u32::from(net.prefix_len()) <= end) {
            let start = usize::from(byte(net));
            slots[start..start + (1 << (end - u32::from(net.prefix_len())))].fill(*leaf);
        }
        for group in entries.chunk_by(|(a, _), (b, _)| byte(a) == byte(b)) {
            let longer: Vec<_> =
                group.iter().filter(|(net, _)| u32::from(net.prefix_len()) > end).copied().collect();
            let slot = usize::from(byte(&group[0].0));
            slots[slot] = self.subtree(&longer, slots[slot]);
        }
        let node = Node::compress(&slots, &mut self.leaves);
        self.nodes.push(Node { key, depth: depth as u8, otherwise: inherited, ..node });
        Leaf::node(self.nodes.len() - 1)
    }

    #[inline]
    fn find(&self, addr: u128) -> Leaf {
        let mut leaf = self.root;
        while let Some(index) = leaf.as_node() {
            let node = &self.nodes[index];
            let depth = u32::from(node.depth) * 8;
            // Shifted by one first, since a shift by 128 is none.
            if (addr ^ node.key) >> 1 >> (127 - depth) != 0 {
                return node.otherwise;
            }
            leaf = node.slot((addr >> (120 - depth)) as u8, &self.leaves);
        }
        leaf
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.nodes) + size_of_val(&*self.leaves)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use prefix_trie::PrefixMap;
    use proptest::prelude::*;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_node_is_a_line() {
        assert_eq!(size_of::<Node>(), 64);
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table = Lpm::build([
            (net("10.0.0.0/8"), 1),
            (net("10.1.0.0/16"), 2),
            (net("10.1.2.0/24"), 3),
            (net("10.1.2.128/25"), 4),
            (net("10.1.2.200/32"), 5),
            (net("fd00::/8"), 6),
            (net("fd00:244::/48"), 7),
            (net("fd00:244::5/128"), 8),
            (net("fd00:244:0:4000::/50"), 9),
        ]);
        for (text, value) in [
            ("10.9.9.9", Some(1)),
            ("10.1.9.9", Some(2)),
            ("10.1.2.9", Some(3)),
            ("10.1.2.129", Some(4)),
            ("10.1.2.200", Some(5)),
            ("10.1.2.201", Some(4)),
            ("11.0.0.0", None),
            ("0.0.0.0", None),
            ("255.255.255.255", None),
            ("fd12::1", Some(6)),
            ("fd00:244::1", Some(7)),
            ("fd00:244::5", Some(8)),
            ("fd00:244:0:7fff::5", Some(9)),
            ("fd00:244:0:8000::5", Some(7)),
            ("fc00::1", None),
            ("::", None),
        ] {
            assert_eq!(table.lookup(addr(text)), value, "{text}");
            assert_eq!(table.lookup_entry(addr(text)).map(|e| e.1), value, "{text}");
        }
        assert_eq!(table.lookup_entry(addr("10.1.2.129")), Some((net("10.1.2.128/25"), 4)));
    }

    #[test]
    fn default_routes_do_not_leak_into_the_other_family() {
        let v4 = Lpm::build([(net("0.0.0.0/0"), 4)]);
        assert_eq!((v4.lookup(addr("255.1.2.3")), v4.lookup(addr("::1"))), (Some(4), None));
        let v6 = Lpm::build([(net("::/0"), 6)]);
        assert_eq!((v6.lookup(addr("255.1.2.3")), v6.lookup(addr("::1"))), (None, Some(6)));
        assert_eq!(v6.lookup(addr("ffff::")), Some(6));
        let none = Lpm::<u8>::default();
        assert_eq!((none.lookup(addr("1.2.3.4")), none.lookup(addr("::"))), (None, None));
        assert!(none.is_empty() && Lpm::<u8>::build([]).is_empty());
    }

    #[test]
    fn the_later_of_equal_prefixes_wins() {
        let table = Lpm::build([(net("10.0.0.0/8"), 1), (net("10.2.3.4/8"), 2), (net("10.0.0.0/8"), 3)]);
        assert_eq!(table.iter().collect::<Vec<_>>(), [(net("10.0.0.0/8"), 3)]);
        assert_eq!((table.lookup(addr("10.0.0.1")), table.len()), (Some(3), 1));
    }

    /// Prefixes that cover, touch and repeat each other: few distinct bytes, all lengths.
    fn v4_net() -> impl Strategy<Value = IpNet> {
        let byte = || prop_oneof![Just(0u8), Just(1), Just(128), Just(255), any::<u8>()];
        ([byte(), byte(), byte(), byte()], 0..=32u8)
            .prop_map(|(bytes, len)| IpNet::V4(Ipv4Net::new(Ipv4Addr::from(bytes), len).unwrap()))
    }

    fn v6_net() -> impl Strategy<Value = IpNet> {
        let byte = || prop_oneof![8 => Just(0u8), 2 => Just(0x80), 2 => Just(255), 1 => any::<u8>()];
        (prop::array::uniform16(byte()), 0..=128u8)
            .prop_map(|(bytes, len)| IpNet::V6(Ipv6Net::new(Ipv6Addr::from(bytes), len).unwrap()))
    }

    /// Edges of a prefix: where lookups go wrong, if they do.
    fn edges(net: &IpNet) -> [u128; 4] {
        let (first, last) = match net {
            IpNet::V4(net) => (Addr::from(net.network()).0, Addr::from(net.broadcast()).0),
            IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
        };
        [first, last, first.wrapping_sub(1), last.wrapping_add(1)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        #[test]
        fn it_agrees_with_a_plain_trie(
            nets in prop::collection::vec((prop_oneof![v4_net(), v6_net()], any::<u16>()), 0..200),
            random in prop::collection::vec(any::<u32>(), 50),
        ) {
            let table = Lpm::build(nets.iter().copied());
            let (mut v4, mut v6) = (PrefixMap::<Ipv4Net, u16>::new(), PrefixMap::<Ipv6Net, u16>::new());
            let mut listed = BTreeMap::new();
            for (net, value) in &nets {
                listed.insert(order(&net.trunc()), (net.trunc(), *value));
                match net {
                    IpNet::V4(net) => v4.insert(net.trunc(), *value),
                    IpNet::V6(net) => v6.insert(net.trunc(), *value),
                };
            }
            prop_assert_eq!(table.iter().collect::<Vec<_>>(), listed.into_values().collect::<Vec<_>>());
            let random = random.iter().flat_map(|bits| [Addr::v4(*bits), Addr::v6(u128::from(*bits) << 96)]);
            for addr in nets.iter().flat_map(|(net, _)| edges(net)).map(Addr).chain(random) {
                let expected = match IpAddr::from(addr) {
                    IpAddr::V4(ip) => {
                        v4.get_lpm(&Ipv4Net::from(ip)).map(|(net, value)| (IpNet::V4(net), *value))
                    }
                    IpAddr::V6(ip) => {
                        v6.get_lpm(&Ipv6Net::from(ip)).map(|(net, value)| (IpNet::V6(net), *value))
                    }
                };
                prop_assert_eq!(table.lookup_entry(addr), expected, "{}", addr);
                prop_assert_eq!(table.lookup(addr), expected.map(|e| e.1));
            }
        }
    }

    #[test]
    fn scattered_host_routes_stay_compact() {
        let hosts = (0..100_000u32).map(|i| {
            let ip = Ipv4Addr::from_bits(i.wrapping_mul(0x9e37_79b1));
            (IpNet::from(IpAddr::V4(ip)), i)
        });
        let table = Lpm::build(hosts.clone());
        for (net, value) in hosts {
            assert_eq!(table.lookup(net.addr().into()), Some(value));
        }
        // Of it 65,536 KiB for second strides, since nearly every /16 has one; 88 bytes for each /24 with a host.
        assert!(table.bytes() < 90 << 20, "{} bytes", table.bytes());
    }
}
