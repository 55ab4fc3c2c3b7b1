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
    Some(Address {
        link: u32_at(body, 4)?,
        // On a point-to-point link IFA_ADDRESS is the peer and IFA_LOCAL the address; IPv6 leaves IFA_LOCAL out elsewhere.
        addr: local.or(of_prefix)?,
        prefix_len,
        global: scope == 0,
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
