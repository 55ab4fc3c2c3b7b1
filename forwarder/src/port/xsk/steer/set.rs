//! What is ours, as the steering program is to know it: the desired set, its form in the maps, and differences of it.
//!
//! Pure; no kernel here. Control builds a [`SteerSet`] from the tables, [`SteerSet::contents`] turns it into map
//! entries, and [`Contents::difference`] into two changes: one that only adds and widens, to be applied before the
//! tables are published, and one that takes away, for after every worker has them in force. So no packet is ever
//! redirected for tables that do not know it yet for longer than its way through the ring, and none that the tables
//! serve is passed on untranslated.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Which packets are to be redirected to the workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SteerSet {
    /// Addresses of Services: every packet to them is ours. An address that is also `local` counts as local.
    pub vips: BTreeSet<IpAddr>,
    /// The gateway's own addresses.
    pub local: BTreeMap<IpAddr, LocalAddress>,
    /// NodePorts and host ports of local addresses.
    pub local_ports: BTreeSet<LocalPort>,
    /// podCIDRs, Service ranges and endpoint addresses.
    pub prefixes: BTreeMap<IpNet, PrefixUse>,
}

/// An address of the gateway itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalAddress {
    /// Source ports that packets masqueraded to this address use, first and last.
    pub masquerade_ports: Option<(u16, u16)>,
}

/// A port of a local address that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LocalPort {
    /// The local address.
    pub addr: IpAddr,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
    /// Destination port.
    pub port: u16,
}

/// What a prefix is to us. The uses of a prefix hold for every longer prefix in it too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixUse {
    /// Packets to it are routed by us (podCIDRs).
    pub destination: bool,
    /// Packets from it may need translation (podCIDRs, endpoint addresses outside of them).
    pub source: bool,
    /// Packets to it are Service packets even if no Service has the address (Service ranges).
    pub service: bool,
}

/// Flags of [`AddressEntry`]; steer.bpf.c has the same numbers.
pub mod address_flag {
    /// Belongs to a Service.
    pub const VIP: u16 = 1;
    /// The gateway's own.
    pub const LOCAL: u16 = 2;
    /// Local, and fragments and ICMP errors to it may be ours.
    pub const SERVES: u16 = 4;
}

/// Flags of an entry of the map `prefixes`; steer.bpf.c has the same numbers.
pub mod prefix_flag {
    /// [`PrefixUse::destination`](super::PrefixUse::destination).
    pub const DESTINATION: u32 = 1;
    /// [`PrefixUse::source`](super::PrefixUse::source).
    pub const SOURCE: u32 = 2;
    /// [`PrefixUse::service`](super::PrefixUse::service).
    pub const SERVICE: u32 = 4;
}

/// An entry of the map `addresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressEntry {
    /// See [`address_flag`].
    pub flags: u16,
    /// First port of the masquerade range; the range is empty if it is above `snat_last`.
    pub snat_first: u16,
    /// Last port of the masquerade range.
    pub snat_last: u16,
}

impl AddressEntry {
    /// An entry for which everything is ours that is ours for either.
    fn union(self, other: AddressEntry) -> AddressEntry {
        let (mut snat_first, mut snat_last) = (self.snat_first, self.snat_last);
        if self.snat_first > self.snat_last {
            (snat_first, snat_last) = (other.snat_first, other.snat_last);
        } else if other.snat_first <= other.snat_last {
            (snat_first, snat_last) = (snat_first.min(other.snat_first), snat_last.max(other.snat_last));
        }
        AddressEntry { flags: self.flags | other.flags, snat_first, snat_last }
    }
}

/// What the maps of the steering program hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The map `addresses`.
    pub addresses: BTreeMap<IpAddr, AddressEntry>,
    /// The map `local_ports`.
    pub local_ports: BTreeSet<LocalPort>,
    /// The map `prefixes`, with the flags of shorter prefixes spread to longer ones: the longest match decides alone.
    pub prefixes: BTreeMap<IpNet, u32>,
}

/// A change of the maps, entry by entry. `None` removes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteerChange {
    /// For the map `addresses`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<(IpAddr, Option<AddressEntry>)>,
    /// For the map `local_ports`; `false` removes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub local_ports: Vec<(LocalPort, bool)>,
    /// For the map `prefixes`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<(IpNet, Option<u32>)>,
}

impl SteerChange {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many entries change.
    pub fn len(&self) -> usize {
        self.addresses.len() + self.local_ports.len() + self.prefixes.len()
    }

    /// Cuts the change into changes of at most `entries` entries, in the same order.
    pub fn split(mut self, entries: usize) -> Vec<SteerChange> {
        let mut parts = Vec::new();
        while self.len() > entries {
            let addresses: Vec<_> = self.addresses.drain(..self.addresses.len().min(entries)).collect();
            let room = entries - addresses.len();
            let local_ports: Vec<_> = self.local_ports.drain(..self.local_ports.len().min(room)).collect();
            let room = room - local_ports.len();
            let prefixes = self.prefixes.drain(..self.prefixes.len().min(room)).collect();
            let part = SteerChange { addresses, local_ports, prefixes };
            parts.push(part);
        }
        if !self.is_empty() {
            parts.push(self);
        }
        parts
    }
}

impl SteerSet {
    /// The map entries that say the same.
    pub fn contents(&self) -> Contents {
        let mut addresses: BTreeMap<IpAddr, AddressEntry> = self
            .vips
            .iter()
            .map(|vip| (*vip, AddressEntry { flags: address_flag::VIP, snat_first: 1, snat_last: 0 }))
            .collect();
        for (addr, local) in &self.local {
            let (snat_first, snat_last) = local.masquerade_ports.unwrap_or((1, 0));
            let flags = address_flag::LOCAL | if snat_first <= snat_last { address_flag::SERVES } else { 0 };
            addresses.insert(*addr, AddressEntry { flags, snat_first, snat_last });
        }
        for port in &self.local_ports {
            if let Some(entry) = addresses.get_mut(&port.addr)
                && entry.flags & address_flag::LOCAL != 0
            {
                entry.flags |= address_flag::SERVES;
            }
        }
        Contents { addresses, local_ports: self.local_ports.clone(), prefixes: self.spread_prefixes() }
    }

    /// Prefixes with the flags of all prefixes that contain them.
    fn spread_prefixes(&self) -> BTreeMap<IpNet, u32> {
        // In the order of IpNet a prefix stands before all longer ones in it, so those that contain the current one
        // are always on the stack.
        let mut containing: Vec<(IpNet, u32)> = Vec::new();
        let mut sorted: Vec<(IpNet, PrefixUse)> =
            self.prefixes.iter().map(|(net, usage)| (net.trunc(), *usage)).collect();
        sorted.sort_by_key(|(net, _)| (net.addr().is_ipv6(), net.network(), net.prefix_len()));
        let mut spread = BTreeMap::new();
        for (net, usage) in sorted {
            while containing.last().is_some_and(|(outer, _)| !outer.contains(&net)) {
                containing.pop();
            }
            let inherited = containing.last().map_or(0, |(_, flags)| *flags);
            let flags = inherited
                | if usage.destination { prefix_flag::DESTINATION } else { 0 }
                | if usage.source { prefix_flag::SOURCE } else { 0 }
                | if usage.service { prefix_flag::SERVICE } else { 0 };
            containing.push((net, flags));
            spread.insert(net, flags);
        }
        spread
    }
}

impl SteerSet {
    /// Adds everything that `other` redirects.
    pub fn extend(&mut self, other: &SteerSet) {
        self.vips.extend(&other.vips);
        self.local_ports.extend(&other.local_ports);
        for (addr, local) in &other.local {
            let own = self.local.entry(*addr).or_default();
            own.masquerade_ports = own.masquerade_ports.or(local.masquerade_ports);
        }
        for (net, usage) in &other.prefixes {
            let own = self.prefixes.entry(*net).or_default();
            own.destination |= usage.destination;
            own.source |= usage.source;
            own.service |= usage.service;
        }
    }

    /// True if nothing is redirected.
    pub fn is_empty(&self) -> bool {
        *self == SteerSet::default()
    }
}

impl Contents {
    /// The way from these contents to `next`: first what adds and widens, then what takes away.
    ///
    /// After the first change everything is redirected that either set redirects.
    pub fn difference(&self, next: &Contents) -> (SteerChange, SteerChange) {
        let (mut grow, mut shrink) = (SteerChange::default(), SteerChange::default());
        for (addr, entry) in &next.addresses {
            let widened = self.addresses.get(addr).map_or(*entry, |old| old.union(*entry));
            if self.addresses.get(addr) != Some(&widened) {
                grow.addresses.push((*addr, Some(widened)));
            }
            if widened != *entry {
                shrink.addresses.push((*addr, Some(*entry)));
            }
        }
        shrink.addresses.extend(
            self.addresses.keys().filter(|addr| !next.addresses.contains_key(addr)).map(|addr| (*addr, None)),
        );
        grow.local_ports.extend(next.local_ports.difference(&self.local_ports).map(|port| (*port, true)));
        shrink.local_ports.extend(self.local_ports.difference(&next.local_ports).map(|port| (*port, false)));

        // A new prefix inside an old one would hide the flags that the old one gives until the shrink, and an old
        // one inside a new one the new flags; so the middle state is spread over all prefixes of both.
        let middle = union_of_prefixes(&self.prefixes, &next.prefixes);
        for (net, flags) in &middle {
            if self.prefixes.get(net) != Some(flags) {
                grow.prefixes.push((*net, Some(*flags)));
            }
            if next.prefixes.get(net) != Some(flags) {
                shrink.prefixes.push((*net, next.prefixes.get(net).copied()));
            }
        }
        (grow, shrink)
    }

    /// What the maps hold after `change`.
    pub fn apply(&mut self, change: &SteerChange) {
        for (addr, entry) in &change.addresses {
            match entry {
                Some(entry) => self.addresses.insert(*addr, *entry),
                None => self.addresses.remove(addr),
            };
        }
        for (port, present) in &change.local_ports {
            match present {
                true => self.local_ports.insert(*port),
                false => self.local_ports.remove(port),
            };
        }
        for (net, flags) in &change.prefixes {
            match flags {
                Some(flags) => self.prefixes.insert(*net, *flags),
                None => self.prefixes.remove(net),
            };
        }
    }
}

/// All prefixes of both tables, each with the flags that either table gives to it or to a prefix that contains it.
fn union_of_prefixes(old: &BTreeMap<IpNet, u32>, new: &BTreeMap<IpNet, u32>) -> BTreeMap<IpNet, u32> {
    if old == new {
        return old.clone();
    }
    let as_use = |flags: u32| PrefixUse {
        destination: flags & prefix_flag::DESTINATION != 0,
        source: flags & prefix_flag::SOURCE != 0,
        service: flags & prefix_flag::SERVICE != 0,
    };
    let mut flags = old.clone();
    for (net, new_flags) in new {
        *flags.entry(*net).or_default() |= new_flags;
    }
    let prefixes = flags.into_iter().map(|(net, flags)| (net, as_use(flags))).collect();
    SteerSet { prefixes, ..SteerSet::default() }.spread_prefixes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    const POD: PrefixUse = PrefixUse { destination: true, source: true, service: false };
    const ENDPOINT: PrefixUse = PrefixUse { destination: false, source: true, service: false };

    #[test]
    fn a_longer_prefix_keeps_what_the_shorter_one_says() {
        let mut set = SteerSet::default();
        set.prefixes.insert(net("10.244.0.0/16"), POD);
        set.prefixes.insert(net("10.244.1.7/32"), ENDPOINT);
        set.prefixes.insert(net("10.245.0.1/32"), ENDPOINT);
        let prefixes = set.contents().prefixes;
        assert_eq!(prefixes[&net("10.244.1.7/32")], prefix_flag::DESTINATION | prefix_flag::SOURCE);
        assert_eq!(prefixes[&net("10.245.0.1/32")], prefix_flag::SOURCE);
    }

    #[test]
    fn a_local_address_stays_local_when_it_is_a_vip_too() {
        let addr: IpAddr = "192.0.2.1".parse().unwrap();
        let mut set = SteerSet::default();
        set.vips.insert(addr);
        set.local.insert(addr, LocalAddress::default());
        assert_eq!(set.contents().addresses[&addr].flags, address_flag::LOCAL);
        set.local_ports.insert(LocalPort { addr, protocol: 6, port: 30080 });
        assert_eq!(set.contents().addresses[&addr].flags, address_flag::LOCAL | address_flag::SERVES);
    }

    #[test]
    fn equal_sets_need_no_change() {
        let mut set = SteerSet::default();
        set.prefixes.insert(net("10.244.0.0/16"), POD);
        set.vips.insert("203.0.113.10".parse().unwrap());
        let (grow, shrink) = set.contents().difference(&set.contents());
        assert!(grow.is_empty() && shrink.is_empty());
    }

    fn any_addr() -> impl Strategy<Value = IpAddr> {
        (0u8..6).prop_map(|low| IpAddr::from([10, 0, 0, low]))
    }

    fn any_set() -> impl Strategy<Value = SteerSet> {
        let range = proptest::option::of((100u16..104, 100u16..104).prop_map(|(a, b)| (a.min(b), a.max(b))));
        let local = (any_addr(), range)
            .prop_map(|(addr, masquerade_ports)| (addr, LocalAddress { masquerade_ports }));
        let port = (any_addr(), 1u16..3).prop_map(|(addr, port)| LocalPort { addr, protocol: 6, port });
        let prefix = (any_addr(), 28u8..=32, any::<[bool; 3]>()).prop_map(|(addr, len, bits)| {
            let usage = PrefixUse { destination: bits[0], source: bits[1], service: bits[2] };
            (IpNet::new(addr, len).unwrap().trunc(), usage)
        });
        (
            proptest::collection::btree_set(any_addr(), 0..4),
            proptest::collection::btree_map(any_addr(), local.prop_map(|l| l.1), 0..3),
            proptest::collection::btree_set(port, 0..4),
            proptest::collection::btree_map(any_addr(), prefix, 0..5),
        )
            .prop_map(|(vips, local, local_ports, prefixes)| SteerSet {
                vips,
                local,
                local_ports,
                prefixes: prefixes.into_values().collect(),
            })
    }

    fn flags_of(contents: &Contents, addr: IpAddr) -> u32 {
        let longest = contents.prefixes.iter().filter(|(net, _)| net.contains(&addr));
        longest.max_by_key(|(net, _)| net.prefix_len()).map_or(0, |(_, flags)| *flags)
    }

    proptest! {
        #[test]
        fn the_way_leads_over_the_union_to_the_next_set(old in any_set(), new in any_set(), cut in 1usize..4) {
            let (old, new) = (old.contents(), new.contents());
            let (grow, shrink) = old.difference(&new);
            let mut now = old.clone();
            for part in grow.split(cut) {
                prop_assert!(part.len() <= cut && !part.is_empty());
                now.apply(&part);
            }
            for low in 0..16 {
                let addr = IpAddr::from([10, 0, 0, low]);
                prop_assert_eq!(flags_of(&now, addr), flags_of(&old, addr) | flags_of(&new, addr));
                for entry in [old.addresses.get(&addr), new.addresses.get(&addr)].into_iter().flatten() {
                    prop_assert_eq!(now.addresses[&addr].flags & entry.flags, entry.flags);
                    if entry.snat_first <= entry.snat_last {
                        prop_assert!(now.addresses[&addr].snat_first <= entry.snat_first);
                        prop_assert!(now.addresses[&addr].snat_last >= entry.snat_last);
                    }
                }
            }
            prop_assert!(now.local_ports.is_superset(&old.local_ports));
            prop_assert!(now.local_ports.is_superset(&new.local_ports));
            shrink.split(cut).iter().for_each(|part| now.apply(part));
            prop_assert_eq!(now, new);
        }
    }
}
