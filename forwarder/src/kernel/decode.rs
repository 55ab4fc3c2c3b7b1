//! Bodies of rtnetlink messages to [`snapshot`](super::snapshot) types (`include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour}.h`).
//!
//! Every function returns none for what the mirror has no use for as well as for what is truncated or contradicts itself: the
//! kernel is trusted, but nothing here panics on bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::message::{attributes, padded, u16_at, u32_at};
use super::snapshot::{Address, Hop, KernelRoute, Link, Neighbor, RouteKind, Table};
use crate::addr::Addr;

/// AF_INET.
pub const INET: u8 = 2;
/// AF_INET6.
pub const INET6: u8 = 10;

/// `struct ifinfomsg` and IFLA_*.
pub fn link(body: &[u8]) -> Option<Link> {
    const UP: u32 = 1;
    const LOWER_UP: u32 = 1 << 16;
    // The bridge reports its ports under AF_BRIDGE as well.
    if *body.first()? != 0 {
        return None;
    }
    let flags = u32_at(body, 8)?;
    let mut link =
        Link { index: u32_at(body, 4)?, up: flags & (UP | LOWER_UP) == UP | LOWER_UP, ..Link::default() };
    for (number, payload) in attributes(body.get(16..)?) {
        match number {
            1 => link.mac = payload.try_into().ok(),
            3 => link.name = text(payload),
            4 => link.mtu = u32_at(payload, 0)?,
            _ => {}
        }
    }
    Some(link)
}

/// `struct ifaddrmsg` and IFA_*.
pub fn address(body: &[u8]) -> Option<Address> {
    const SECONDARY_OR_TEMPORARY: u32 = 0x01;
    const DAD_FAILED: u32 = 0x08;
    const DEPRECATED: u32 = 0x20;
    const TENTATIVE: u32 = 0x40;
    const OPTIMISTIC: u32 = 0x04;
    let (family, prefix_len, scope) = (*body.first()?, *body.get(1)?, *body.get(3)?);
    let (mut of_prefix, mut local) = (None, None);
    let mut flags = *body.get(2)? as u32;
    for (number, payload) in attributes(body.get(8..)?) {
        match number {
            1 => of_prefix = ip(family, payload),
            2 => local = ip(family, payload),
            8 => flags = u32_at(payload, 0)?,
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL the address; IPv6 leaves IFA_LOCAL out elsewhere.
    let addr = local.or(of_prefix)?;
    // `ip address add` gives 169.254.1.1, by which pods know their gateway, the global scope if it is not told otherwise. No answer to
    // such a source comes back (RFC 3927 section 2.7).
    let is_link_local = matches!(addr, IpAddr::V4(v4) if v4.is_link_local());
    Some(Address {
        link: u32_at(body, 4)?,
        addr,
        prefix_len,
        global: scope == 0 && !is_link_local,
        usable: flags & DAD_FAILED == 0 && (flags & TENTATIVE == 0 || flags & OPTIMISTIC != 0),
        secondary: flags & (SECONDARY_OR_TEMPORARY | DEPRECATED) != 0,
    })
}

/// `struct rtmsg` and RTA_*. Routes of other tables, by type of service or by source, and clones of the route cache are none.
pub fn route(body: &[u8]) -> Option<KernelRoute> {
    const CLONED: u32 = 0x200;
    let header = body.first_chunk::<12>()?;
    let [family, dst_len, src_len, tos, table, protocol, _scope, kind, ..] = *header;
    let flags = u32_at(body, 8)?;
    if flags & CLONED != 0 || tos != 0 || src_len != 0 {
        return None;
    }
    let mut table = table as u32;
    let mut dst = unspecified(family)?;
    let mut metric = 0;
    let mut mtu = None;
    let mut hop = hop(0, flags, &[], family);
    let mut multipath = Vec::new();
    for (number, payload) in attributes(body.get(12..)?) {
        match number {
            1 => dst = ip(family, payload)?,
            4 => hop.link = u32_at(payload, 0)?,
            5 => hop.gateway = Some(ip(family, payload)?),
            6 => metric = u32_at(payload, 0)?,
            8 => {
                mtu =
                    attributes(payload).find(|a| a.0 == 2).and_then(|a| u32_at(a.1, 0)).filter(|mtu| *mtu > 0)
            }
            9 => multipath = hops(payload, family)?,
            15 => table = u32_at(payload, 0)?,
            18 => hop.gateway = Some(via(payload)?),
            19 | 21 | 22 => hop.encapsulated = true,
            _ => {}
        }
    }
    Some(KernelRoute {
        table: match table {
            255 => Table::Local,
            254 => Table::Main,
            253 => Table::Default,
            _ => return None,
        },
        net: IpNet::new(dst, dst_len).ok()?.trunc(),
        kind: match kind {
            1 => RouteKind::Unicast,
            2..=5 => RouteKind::Local,
            6..=8 => RouteKind::Blackhole,
            _ => RouteKind::Other,
        },
        metric,
        hops: if multipath.is_empty() { vec![hop] } else { multipath },
        mtu,
        protocol,
    })
}

/// RTA_MULTIPATH: `struct rtnexthop`, each followed by attributes of its own.
fn hops(mut bytes: &[u8], family: u8) -> Option<Vec<Hop>> {
    let mut found = Vec::new();
    while bytes.len() >= 8 {
        let len = u16_at(bytes, 0)? as usize;
        let rest = bytes.get(8..len)?;
        found.push(hop(u32_at(bytes, 4)?, bytes[2] as u32, rest, family));
        bytes = bytes.get(padded(len)..).unwrap_or_default();
    }
    Some(found)
}

fn hop(link: u32, flags: u32, attrs: &[u8], family: u8) -> Hop {
    const DEAD: u32 = 1;
    const LINK_DOWN: u32 = 16;
    let mut hop = Hop {
        link,
        gateway: None,
        dead: flags & DEAD != 0,
        link_down: flags & LINK_DOWN != 0,
        encapsulated: false,
    };
    for (number, payload) in attributes(attrs) {
        match number {
            5 => hop.gateway = ip(family, payload),
            18 => hop.gateway = via(payload),
            19 | 21 | 22 => hop.encapsulated = true,
            _ => {}
        }
    }
    hop
}

/// `struct rtvia`: a gateway of another family than the route's.
fn via(payload: &[u8]) -> Option<IpAddr> {
    ip(u16_at(payload, 0)? as u8, payload.get(2..)?)
}

/// `struct ndmsg` and NDA_*: interface index, address, entry. Proxies and the forwarding database of bridges are none.
pub fn neighbor(body: &[u8]) -> Option<((u32, Addr), Neighbor)> {
    const PROXY: u8 = 0x08;
    let header = body.first_chunk::<12>()?;
    if header[10] & PROXY != 0 {
        return None;
    }
    let mut addr = None;
    let mut entry = Neighbor { mac: None, state: u16_at(body, 8)?, managed: false, protocol: 0 };
    for (number, payload) in attributes(body.get(12..)?) {
        match number {
            1 => addr = ip(header[0], payload),
            2 => entry.mac = payload.try_into().ok(),
            12 => entry.protocol = *payload.first()?,
            15 => entry.managed = u32_at(payload, 0)? & 1 != 0,
            _ => {}
        }
    }
    Some(((u32_at(body, 4)?, addr?.into()), entry))
}

/// `struct fib_rule_hdr`, FRA_*: the table that a policy rule chooses; 0 for a rule of another action (goto, blackhole, VRF).
pub fn rule_table(body: &[u8]) -> Option<u32> {
    const TO_TABLE: u8 = 1;
    let header = body.first_chunk::<12>()?;
    let named = attributes(body.get(12..)?).find(|a| a.0 == 15).and_then(|a| u32_at(a.1, 0));
    Some(if header[7] == TO_TABLE { named.unwrap_or(header[4] as u32) } else { 0 })
}

fn ip(family: u8, payload: &[u8]) -> Option<IpAddr> {
    match family {
        INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(payload).ok()?).into()),
        INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(payload).ok()?).into()),
        _ => None,
    }
}

fn unspecified(family: u8) -> Option<IpAddr> {
    match family {
        INET => Some(Ipv4Addr::UNSPECIFIED.into()),
        INET6 => Some(Ipv6Addr::UNSPECIFIED.into()),
        _ => None,
    }
}

/// A string that ends with its first zero byte.
fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|b| *b == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Bodies as Linux 6.18 sent them, little-endian.
    const LINK: &str = "00000100030000004310010000000000070003006730000008000d00e80300000500100006000000\
        08000400dc0500000a000100020000000001000008003d0000000000";
    const ADDRESS_V4: &str = "021880000300000008000100c000020108000200c000020107000300673000000800080080000000\
        14000600ffffffffffffffff6609070066090700";
    const ADDRESS_V6: &str = "0a4082000300000014000100fd00000000000000000000000000000114000600ffffffffffffffff\
        68090700680907000800080082000000";
    const MULTIPATH: &str = "02180000fe0300010000000008000f00fe00000008000100cb00710008000600070000000c000800\
        080002000005000024000900100000000300000008000500c0000202100000000300000008000500c0000203";
    const VIA_INET6: &str = "020f0000fe0300010000000008000f00fe00000008000100c6120000160012000a00fd0000000000\
        0000000000000000000900000800040003000000";
    const BLACKHOLE: &str = "02180000fe0300060000000008000f00fe00000008000100c6336400";
    const GATEWAY_V6: &str = "0a200000fe0300010000000008000f00fe0000001400010020010db8000000000000000000000000\
        080006000004000014000500fd000000000000000000000000000002080004000300000024000c000000000000000000\
        0000000000000000000000000000000000000000000000000500140000000000";
    const MANAGED: &str = "02000000030000000100000108000100c0000208080004000400000014000300ce1700005e0000005e00\
        00000100000008000f0001000000";
    const PERMANENT: &str = "02000000030000008000000108000100c00002090a000200020000000009000008000400000000001400\
        03005f0000005f0000005f00000000000000";
    const RULE_MAIN: &str =
        "02000000fe0000010000000008000f00fe00000008000e00ffffffff050015000200000008000600fe7f0000";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    #[test]
    fn a_link() {
        let expected =
            Link { index: 3, name: "g0".into(), mac: Some([2, 0, 0, 0, 0, 1]), mtu: 1500, up: true };
        assert_eq!(link(&bytes(LINK)), Some(expected));
        let mut bridge_port = bytes(LINK);
        bridge_port[0] = 7;
        assert_eq!(link(&bridge_port), None);
        let mut no_carrier = bytes(LINK);
        no_carrier[10] &= !1;
        assert!(!link(&no_carrier).unwrap().up);
    }

    #[test]
    fn addresses_of_both_families() {
        let found = address(&bytes(ADDRESS_V4)).unwrap();
        assert_eq!((found.link, found.addr.to_string().as_str(), found.prefix_len), (3, "192.0.2.1", 24));
        assert!(found.global && found.usable && !found.secondary);
        let link_local = address(&bytes(&ADDRESS_V4.replace("c0000201", "a9fe0101"))).unwrap();
        assert_eq!((link_local.addr.to_string().as_str(), link_local.global), ("169.254.1.1", false));
        let mut tentative = bytes(ADDRESS_V6);
        assert_eq!(address(&tentative).unwrap().addr.to_string(), "fd00::1");
        let flags = tentative.len() - 4;
        tentative[flags] |= 0x40;
        assert!(!address(&tentative).unwrap().usable);
    }

    #[test]
    fn routes_of_every_form() {
        let found = route(&bytes(MULTIPATH)).unwrap();
        assert_eq!(
            (found.net.to_string().as_str(), found.metric, found.mtu),
            ("203.0.113.0/24", 7, Some(1280))
        );
        let gateways: Vec<_> =
            found.hops.iter().map(|hop| (hop.link, hop.gateway.unwrap().to_string())).collect();
        assert_eq!(gateways, [(3, "192.0.2.2".into()), (3, "192.0.2.3".into())]);

        let found = route(&bytes(VIA_INET6)).unwrap();
        assert_eq!(found.net.to_string(), "198.18.0.0/15");
        assert_eq!(found.hops[0].gateway.unwrap().to_string(), "fd00::9");

        let found = route(&bytes(BLACKHOLE)).unwrap();
        assert_eq!((found.kind, found.table), (RouteKind::Blackhole, Table::Main));

        let found = route(&bytes(GATEWAY_V6)).unwrap();
        assert_eq!((found.net.to_string().as_str(), found.metric), ("2001:db8::/32", 1024));
        assert_eq!(found.hops.len(), 1);
    }

    #[test]
    fn routes_that_are_not_looked_up_here_are_none() {
        for (offset, value) in [(3, 0x10), (2, 24), (9, 2), (0, 128)] {
            let mut other = bytes(BLACKHOLE);
            other[offset] = value;
            assert_eq!(route(&other), None, "byte {offset}");
        }
        let mut other_table = bytes(BLACKHOLE);
        other_table[16] = 100; // RTA_TABLE
        assert_eq!(route(&other_table), None);
    }

    #[test]
    fn neighbors_with_their_flags() {
        let (key, found) = neighbor(&bytes(MANAGED)).unwrap();
        assert_eq!(key, (3, "192.0.2.8".parse::<IpAddr>().unwrap().into()));
        assert!(found.managed && found.valid_mac().is_none());
        let (_, found) = neighbor(&bytes(PERMANENT)).unwrap();
        assert!(!found.managed && found.is_fixed());
        assert_eq!(found.valid_mac(), Some([2, 0, 0, 0, 0, 9]));
        let mut proxy = bytes(PERMANENT);
        proxy[10] = 8;
        assert_eq!(neighbor(&proxy), None);
    }

    #[test]
    fn the_table_of_a_rule() {
        assert_eq!(rule_table(&bytes(RULE_MAIN)), Some(254));
        let mut goto = bytes(RULE_MAIN);
        goto[7] = 2;
        assert_eq!(rule_table(&goto), Some(0));
    }

    #[test]
    fn no_truncation_and_no_flipped_byte_panics() {
        let bodies = [
            LINK, ADDRESS_V4, ADDRESS_V6, MULTIPATH, VIA_INET6, BLACKHOLE, GATEWAY_V6, MANAGED, PERMANENT,
            RULE_MAIN,
        ];
        let all = |bytes: &[u8]| {
            let _ = (link(bytes), address(bytes), route(bytes), neighbor(bytes), rule_table(bytes));
        };
        for body in bodies.map(bytes) {
            (0..body.len()).for_each(|len| all(&body[..len]));
            for (at, value) in
                (0..body.len()).flat_map(|at| [0, 1, 3, 5, 0x7f, 0xff].map(|value| (at, value)))
            {
                let mut flipped = body.clone();
                flipped[at] = value;
                all(&flipped);
            }
        }
    }
}
