//! The steering program once more, in Rust and without cleverness; tests.rs has packets judged by both.

use std::net::IpAddr;

use super::*;
use crate::addr::protocol;

pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_REDIRECT: u32 = 4;

/// Who could take a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taker {
    Alive,
    Dead,
    NoSocket,
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn port_at(data: &[u8], at: usize) -> Option<u16> {
    bytes(data, at).map(u16::from_be_bytes)
}

/// What the program must do with `frame`: its action and the one counter that it raises.
pub fn judge(frame: &[u8], set: &SteerSet, taker: Taker) -> (u32, SteerCounter) {
    let pass = |counter| (XDP_PASS, counter);
    let Some(mut ethertype) = port_at(frame, 12) else { return pass(SteerCounter::PassShort) };
    let mut at = 14;
    for _ in 0..2 {
        if ethertype != 0x8100 && ethertype != 0x88a8 {
            break;
        }
        match port_at(frame, at + 2) {
            Some(inner) => ethertype = inner,
            None => return pass(SteerCounter::PassShort),
        }
        at += 4;
    }
    let (src, dst): (IpAddr, IpAddr) = match ethertype {
        0x0800 => {
            if frame.len() < at + 20 {
                return pass(SteerCounter::PassShort);
            }
            let address = |at| IpAddr::from(bytes::<4>(frame, at).unwrap());
            (address(at + 12), address(at + 16))
        }
        0x86dd => {
            if frame.len() < at + 40 {
                return pass(SteerCounter::PassShort);
            }
            let address = |at| IpAddr::from(bytes::<16>(frame, at).unwrap());
            (address(at + 8), address(at + 24))
        }
        _ => return pass(SteerCounter::PassNotIp),
    };
    let group = match dst {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unicast_link_local(),
    };
    if group {
        return pass(SteerCounter::PassGroup);
    }
    let is_discovery = dst.is_ipv6()
        && frame[at + 6] == protocol::ICMPV6
        && frame[at + 7] == 255
        && frame.get(at + 40).is_some_and(|kind| (133..=137).contains(kind));
    if is_discovery {
        return pass(SteerCounter::PassNeighbor);
    }
    if frame[0] & 1 == 1 {
        return pass(SteerCounter::PassGroup);
    }

    let (counter, plain) = if let Some(local) = set.local.get(&dst) {
        match local_is_ours(frame, at, dst, local, set) {
            Some(true) => (SteerCounter::RedirectLocal, false),
            _ => return pass(SteerCounter::PassLocal),
        }
    } else if set.vips.contains(&dst) {
        (SteerCounter::RedirectVip, false)
    } else {
        // Every prefix that contains the address has its say, the longest or not.
        let is = |addr: IpAddr, what: fn(&PrefixUse) -> bool| {
            set.prefixes.iter().any(|(net, usage)| net.contains(&addr) && what(usage))
        };
        let source = is(src, |usage| usage.source);
        let about_endpoint = quoted_destination(frame, at, dst.is_ipv6())
            .is_some_and(|quoted| is(quoted, |usage| usage.source));
        if is(dst, |usage| usage.service) {
            (SteerCounter::RedirectRouted, false)
        } else if is(dst, |usage| usage.destination) {
            (SteerCounter::RedirectRouted, !source && !about_endpoint)
        } else if source {
            (SteerCounter::RedirectSource, false)
        } else if about_endpoint {
            (SteerCounter::RedirectError, false)
        } else {
            return pass(SteerCounter::PassOther);
        }
    };
    match taker {
        Taker::Alive => (XDP_REDIRECT, counter),
        Taker::Dead | Taker::NoSocket if plain => pass(SteerCounter::PassPlain),
        Taker::Dead => (XDP_DROP, SteerCounter::DropWorkerDead),
        Taker::NoSocket => (XDP_DROP, SteerCounter::DropNoSocket),
    }
}

/// What stands behind an IP header and its extensions.
enum Upper {
    Fragment,
    Header { protocol: u8, at: usize },
}

/// `None`: cut off before it can be told. `at`: of the IP header.
fn upper(frame: &[u8], at: usize, is_v6: bool) -> Option<Upper> {
    if !is_v6 {
        if port_at(frame, at + 6)? & 0x3fff != 0 {
            return Some(Upper::Fragment);
        }
        let at_upper = at + usize::from(frame[at] & 15) * 4;
        return Some(Upper::Header { protocol: frame[at + 9], at: at_upper });
    }
    let (mut protocol, mut at) = (frame[at + 6], at + 40);
    for _ in 0..8 {
        match protocol {
            0 | 43 | 60 => {
                let header: [u8; 8] = bytes(frame, at)?;
                at += 8 + 8 * usize::from(header[1]);
                protocol = header[0];
            }
            44 => {
                let header: [u8; 8] = bytes(frame, at)?;
                if u16::from_be_bytes([header[2], header[3]]) & 0xfff9 != 0 {
                    return Some(Upper::Fragment);
                }
                at += 8;
                protocol = header[0];
            }
            _ => break,
        }
    }
    Some(Upper::Header { protocol, at })
}

/// `None`: cut off before it can be told.
fn local_is_ours(frame: &[u8], at: usize, dst: IpAddr, local: &LocalAddress, set: &SteerSet) -> Option<bool> {
    let in_range =
        |port: u16| local.masquerade_ports.is_some_and(|(first, last)| (first..=last).contains(&port));
    let serves = local.masquerade_ports.is_some() || set.local_ports.iter().any(|port| port.addr == dst);
    let (next, at) = match upper(frame, at, dst.is_ipv6())? {
        Upper::Fragment => return Some(serves),
        Upper::Header { protocol, at } => (protocol, at),
    };
    Some(match next {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            let port = port_at(frame, at + 2)?;
            in_range(port) || set.local_ports.contains(&LocalPort { addr: dst, protocol: next, port })
        }
        protocol::ICMP if dst.is_ipv4() => {
            let header: [u8; 8] = bytes(frame, at)?;
            match header[0] {
                0 => in_range(u16::from_be_bytes([header[4], header[5]])),
                3 | 11 | 12 => serves,
                _ => false,
            }
        }
        protocol::ICMPV6 if dst.is_ipv6() => {
            let header: [u8; 8] = bytes(frame, at)?;
            match header[0] {
                129 => in_range(u16::from_be_bytes([header[4], header[5]])),
                1..=4 => serves,
                _ => false,
            }
        }
        _ => false,
    })
}

/// Where the packet went that an ICMP error is about; `None`: it is no error, or cut off before it can be told.
fn quoted_destination(frame: &[u8], at: usize, is_v6: bool) -> Option<IpAddr> {
    let Upper::Header { protocol, at } = upper(frame, at, is_v6)? else { return None };
    let kind = *frame.get(at)?;
    match protocol {
        protocol::ICMP if !is_v6 && [3, 4, 5, 11, 12].contains(&kind) => {
            bytes::<4>(frame, at + 8 + 16).map(IpAddr::from)
        }
        protocol::ICMPV6 if is_v6 && kind < 128 => bytes::<16>(frame, at + 8 + 24).map(IpAddr::from),
        _ => None,
    }
}
