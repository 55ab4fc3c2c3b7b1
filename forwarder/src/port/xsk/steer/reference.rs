//! The steering program once more, in Rust and without cleverness, and thousands of packets judged by both.

use std::net::IpAddr;
use std::os::fd::AsFd;

use aya::TestRun;
use aya::programs::TestRunOptions;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::*;
use crate::addr::protocol;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

/// Who could take a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
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
fn judge(frame: &[u8], set: &SteerSet, taker: Taker) -> (u32, SteerCounter) {
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
        if is(dst, |usage| usage.service) {
            (SteerCounter::RedirectRouted, false)
        } else if is(dst, |usage| usage.destination) {
            (SteerCounter::RedirectRouted, !source)
        } else if source {
            (SteerCounter::RedirectSource, false)
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

/// `None`: cut off before it can be told.
fn local_is_ours(
    frame: &[u8],
    mut at: usize,
    dst: IpAddr,
    local: &LocalAddress,
    set: &SteerSet,
) -> Option<bool> {
    let in_range =
        |port: u16| local.masquerade_ports.is_some_and(|(first, last)| (first..=last).contains(&port));
    let serves = local.masquerade_ports.is_some() || set.local_ports.iter().any(|port| port.addr == dst);
    let mut next;
    if dst.is_ipv4() {
        if port_at(frame, at + 6)? & 0x3fff != 0 {
            return Some(serves);
        }
        next = frame[at + 9];
        at += usize::from(frame[at] & 15) * 4;
    } else {
        next = frame[at + 6];
        at += 40;
        for _ in 0..8 {
            match next {
                0 | 43 | 60 => {
                    let header: [u8; 8] = bytes(frame, at)?;
                    at += 8 + 8 * usize::from(header[1]);
                    next = header[0];
                }
                44 => {
                    let header: [u8; 8] = bytes(frame, at)?;
                    if u16::from_be_bytes([header[2], header[3]]) & 0xfff9 != 0 {
                        return Some(serves);
                    }
                    at += 8;
                    next = header[0];
                }
                _ => break,
            }
        }
    }
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

/// A small random generator (xorshift64*): the packets are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

const V4: [[u8; 4]; 14] = [
    [203, 0, 113, 10],    // VIP
    [192, 0, 2, 1],       // local, masquerade range and NodePort
    [192, 0, 2, 2],       // local, nothing ours
    [192, 0, 2, 3],       // local, host port only
    [10, 244, 1, 7],      // pod
    [10, 244, 9, 9],      // endpoint inside the pod range, with a prefix of its own
    [10, 96, 0, 1],       // service range
    [198, 51, 100, 77],   // endpoint outside
    [198, 51, 100, 4],    // client
    [224, 0, 0, 5],       // multicast
    [255, 255, 255, 255], // broadcast
    [169, 254, 1, 1],     // link-local
    [10, 244, 255, 255],  // pod
    [127, 0, 0, 1],       // loopback
];
const V6: [&str; 11] = [
    "2001:db8::10",
    "2001:db8:1::1",
    "2001:db8:1::2",
    "2001:db8:1::3",
    "fd00:244::7",
    "fd00:244::9",
    "fd00:96::1",
    "2001:db8:9::77",
    "2001:db8:9::4",
    "ff02::1:ff00:1",
    "fe80::1",
];

fn example_set() -> SteerSet {
    let mut set = SteerSet::default();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    for vip in ["203.0.113.10", "2001:db8::10"] {
        set.vips.insert(ip(vip));
    }
    for (addr, masquerade_ports) in [
        ("192.0.2.1", Some((61000, 65535))),
        ("192.0.2.2", None),
        ("192.0.2.3", None),
        ("2001:db8:1::1", Some((61000, 65535))),
        ("2001:db8:1::2", None),
        ("2001:db8:1::3", None),
    ] {
        set.local.insert(ip(addr), LocalAddress { masquerade_ports });
    }
    for (addr, protocol, port) in [
        ("192.0.2.1", protocol::TCP, 30080),
        ("192.0.2.3", protocol::UDP, 53),
        ("2001:db8:1::1", protocol::TCP, 30080),
        ("2001:db8:1::3", protocol::SCTP, 30080),
    ] {
        set.local_ports.insert(LocalPort { addr: ip(addr), protocol, port });
    }
    let pod = PrefixUse { destination: true, source: true, service: false };
    let endpoint = PrefixUse { destination: false, source: true, service: false };
    let service = PrefixUse { destination: false, source: false, service: true };
    for (net, usage) in [
        ("10.244.0.0/16", pod),
        ("10.244.9.9/32", endpoint),
        ("10.96.0.0/16", service),
        ("198.51.100.77/32", endpoint),
        ("fd00:244::/48", pod),
        ("fd00:244::9/128", endpoint),
        ("fd00:96::/112", service),
        ("2001:db8:9::77/128", endpoint),
        ("10.245.0.0/16", PrefixUse { destination: true, source: false, service: false }),
    ] {
        set.prefixes.insert(net.parse().unwrap(), usage);
    }
    set
}

fn layer_four(random: &mut Random, is_v6: bool) -> (u8, Vec<u8>) {
    let next = random.one_of(&[
        protocol::TCP,
        protocol::UDP,
        protocol::SCTP,
        protocol::ICMP,
        protocol::ICMPV6,
        if is_v6 { protocol::ICMPV6 } else { protocol::ICMP },
        47,
    ]);
    let mut payload = vec![0u8; 20];
    let port = random.one_of(&[22u16, 53, 179, 30080, 30081, 60999, 61000, 65535]);
    if next == protocol::ICMP || next == protocol::ICMPV6 {
        payload[0] = random.one_of(&[0u8, 1, 2, 3, 4, 5, 8, 11, 12, 128, 129, 133, 135, 136, 137, 138]);
        payload[4..6].copy_from_slice(&port.to_be_bytes());
    } else {
        payload[2..4].copy_from_slice(&port.to_be_bytes());
    }
    (next, payload)
}

fn packet(random: &mut Random) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if random.chance(5) {
        frame[0] = 0xff;
    }
    for _ in 0..random.one_of(&[0, 0, 0, 0, 1, 1, 2, 3]) {
        frame.extend(random.one_of(&[[0x81, 0x00, 0x00, 0x05], [0x88, 0xa8, 0x20, 0x07]]));
    }
    if random.chance(4) {
        frame.extend(random.one_of(&[[0x08, 0x06], [0x88, 0xcc], [0x00, 0x26]]));
        frame.extend([0; 46]);
    } else if random.chance(50) {
        let (next, payload) = layer_four(random, false);
        let options = random.one_of(&[0u8, 0, 0, 1, 10]);
        frame.extend([0x08, 0x00, 0x45 + options, 0, 0, 60, 0, 1]);
        frame.extend(random.one_of(&[[0x40, 0], [0x40, 0], [0, 0], [0x20, 0], [0x20, 5], [0, 5], [0x80, 0]]));
        frame.extend([64, next, 0, 0]);
        frame.extend(random.one_of(&V4));
        frame.extend(random.one_of(&V4));
        frame.extend(vec![0; usize::from(options) * 4]);
        frame.extend(payload);
    } else {
        let (last, payload) = layer_four(random, true);
        let mut chain: Vec<u8> = Vec::new();
        for _ in 0..random.one_of(&[0, 0, 0, 0, 1, 2, 3, 9]) {
            chain.push(random.one_of(&[0u8, 43, 44, 60, 60, 51]));
        }
        chain.push(last);
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 60, chain[0], random.one_of(&[64, 255])]);
        for _ in 0..2 {
            let addr: std::net::Ipv6Addr = random.one_of(&V6).parse().unwrap();
            frame.extend(addr.octets());
        }
        for pair in chain.windows(2) {
            let is_fragment = pair[0] == 44;
            let units = if is_fragment { 0 } else { random.one_of(&[0u8, 0, 1, 2]) };
            let offset =
                if is_fragment { random.one_of(&[[0, 0], [0, 1], [0, 8], [1, 0], [0, 6]]) } else { [1, 4] };
            frame.extend([pair[1], units, offset[0], offset[1], 0, 0, 0, 0]);
            frame.extend(vec![0; usize::from(units) * 8]);
        }
        frame.extend(payload);
    }
    if random.chance(15) {
        // The kernel takes no test packet that is shorter than an Ethernet header.
        frame.truncate(14 + random.below(frame.len() as u64 - 14) as usize);
    }
    if random.chance(15) {
        let at = random.below(frame.len() as u64) as usize;
        frame[at] = random.next() as u8;
    }
    frame
}

/// Loads the program as the keeper does, with the loopback device, where test packets come in, as port 0.
fn loaded(set: &SteerSet) -> Option<Steering> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root to load the steering program");
        return None;
    }
    let mut steering = Steering::load(SteerSizes::default()).unwrap();
    steering.ports.insert(1, 0, 0).unwrap();
    let (grow, shrink) = Contents::default().difference(&set.contents());
    assert!(shrink.is_empty());
    steering.apply(&grow).unwrap();
    Some(steering)
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn run(steering: &Steering, frame: &[u8]) -> u32 {
    let program: &Xdp = steering.programs.program("towpath_steer").unwrap().try_into().unwrap();
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    program.test_run(options).unwrap().return_value
}

#[test]
fn agrees_with_the_reference_on_generated_packets() {
    let set = example_set();
    let Some(mut steering) = loaded(&set) else { return };
    // Bound to nothing: enough to be in the map, and a test run delivers nothing.
    let socket = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap();
    let heartbeats = Heartbeats::map(steering.heartbeats()).unwrap();
    let mut random = Random(0x7077_6174_6874);
    let mut seen = [0u64; COUNTERS];
    for taker in [Taker::NoSocket, Taker::Alive, Taker::Dead] {
        // "Dead" is so long ago that a slow run stays in it, "alive" lies ahead of any.
        heartbeats.beat(0, if taker == Taker::Dead { 1 } else { now_ns() + 3_600_000_000_000 });
        if taker == Taker::Alive {
            steering.set_socket(0, 0, socket.as_fd()).unwrap();
        }
        let before = steering.counters().unwrap();
        let mut expected = [0u64; COUNTERS];
        for number in 0..8_000 {
            let frame = packet(&mut random);
            let (action, counter) = judge(&frame, &set, taker);
            expected[counter as usize] += 1;
            let got = run(&steering, &frame);
            assert_eq!(got, action, "packet {number}, {taker:?}: {counter:?} expected: {frame:02x?}");
        }
        let after = steering.counters().unwrap();
        for counter in SteerCounter::ALL {
            let index = *counter as usize;
            assert_eq!(after[index] - before[index], expected[index], "{}, {taker:?}", counter.name());
            seen[index] += expected[index];
        }
    }
    for counter in SteerCounter::ALL {
        assert!(seen[*counter as usize] > 20, "{} is hardly tried", counter.name());
    }
}

#[test]
fn a_full_map_names_the_setting_to_raise() {
    if loaded(&SteerSet::default()).is_none() {
        return;
    }
    let mut steering = Steering::load(SteerSizes { addresses: 2, local_ports: 2, prefixes: 2 }).unwrap();
    let mut set = SteerSet::default();
    let pod = PrefixUse { destination: true, source: true, service: false };
    for low in 1..=3 {
        set.prefixes.insert(IpNet::new(IpAddr::from([10, 244, 0, low]), 32).unwrap(), pod);
    }
    let (grow, _) = Contents::default().difference(&set.contents());
    let error = steering.apply(&grow).unwrap_err().to_string();
    assert!(error.contains("steering.prefixes = 2") && error.contains("10.244.0.3/32"), "{error}");
    // A preallocated hash table has a few spare entries for each CPU, so this takes more.
    set = SteerSet::default();
    set.vips.extend((0..=255).map(|low| IpAddr::from([203, 0, 113, low])));
    let (grow, _) = Contents::default().difference(&set.contents());
    let error = steering.apply(&grow).unwrap_err().to_string();
    assert!(error.contains("steering.addresses = 2"), "{error}");
}

#[test]
fn entries_go_as_they_came() {
    let set = example_set();
    let Some(mut steering) = loaded(&set) else { return };
    let (_, shrink) = steering.contents().difference(&Contents::default());
    steering.apply(&shrink).unwrap();
    // Removing once more is no error: a change may be applied again after a restart of the data plane.
    steering.apply(&shrink).unwrap();
    assert_eq!(*steering.contents(), Contents::default());
    assert_eq!(steering.addresses.iter().count(), 0);
    assert_eq!(steering.local_ports.iter().count(), 0);
    assert_eq!(steering.prefixes.iter().count(), 0);
}
