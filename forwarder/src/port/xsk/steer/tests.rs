//! Packets judged by the steering program in the kernel (BPF_PROG_TEST_RUN) and by the reference, which must agree.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};

use aya::TestRun;
use aya::programs::TestRunOptions;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::reference::{Taker, XDP_DROP, XDP_PASS, XDP_REDIRECT, judge};
use super::*;
use crate::addr::protocol;

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

/// Of no entry of [`example_set`].
const STRANGER_V4: [u8; 4] = [198, 51, 100, 4];
const STRANGER_V6: &str = "2001:db8:9::4";

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

/// An IP header as ICMP errors quote it, and 8 bytes more.
fn quoted(random: &mut Random, is_v6: bool) -> Vec<u8> {
    let mut quoted = vec![0u8; if is_v6 { 8 } else { 12 }];
    for _ in 0..2 {
        if is_v6 {
            quoted.extend(random.one_of(&V6).parse::<Ipv6Addr>().unwrap().octets());
        } else {
            quoted.extend(random.one_of(&V4));
        }
    }
    quoted.extend([0; 8]);
    quoted
}

/// An ICMP error, of a kind that there is or of another.
fn icmp_error(random: &mut Random, is_v6: bool) -> (u8, Vec<u8>) {
    let kinds: &[u8] = if is_v6 { &[1, 1, 2, 3, 4, 100, 127, 128] } else { &[3, 3, 4, 5, 11, 12, 8, 13] };
    let mut message = vec![random.one_of(kinds), 0, 0, 0, 0, 0, 0, 0];
    message.extend(quoted(random, is_v6));
    (if is_v6 { protocol::ICMPV6 } else { protocol::ICMP }, message)
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
        payload.truncate(8);
        payload.extend(quoted(random, is_v6));
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
    } else {
        let is_v6 = random.chance(50);
        // Errors among strangers, which are ours or not by what they quote, would be rare otherwise.
        let among_strangers = random.chance(20);
        let upper = if among_strangers { icmp_error(random, is_v6) } else { layer_four(random, is_v6) };
        if is_v6 {
            frame.extend(packet_v6(random, upper, among_strangers));
        } else {
            frame.extend(packet_v4(random, upper, among_strangers));
        }
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

/// From the EtherType on.
fn packet_v4(random: &mut Random, (next, payload): (u8, Vec<u8>), among_strangers: bool) -> Vec<u8> {
    let options = random.one_of(&[0u8, 0, 0, 1, 10]);
    let mut packet = vec![0x08, 0x00, 0x45 + options, 0, 0, 60, 0, 1];
    packet.extend(random.one_of(&[[0x40, 0], [0x40, 0], [0, 0], [0x20, 0], [0x20, 5], [0, 5], [0x80, 0]]));
    packet.extend([64, next, 0, 0]);
    for _ in 0..2 {
        packet.extend(if among_strangers { STRANGER_V4 } else { random.one_of(&V4) });
    }
    packet.extend(vec![0; usize::from(options) * 4]);
    packet.extend(payload);
    packet
}

/// From the EtherType on.
fn packet_v6(random: &mut Random, (last, payload): (u8, Vec<u8>), among_strangers: bool) -> Vec<u8> {
    let mut chain: Vec<u8> = Vec::new();
    for _ in 0..random.one_of(&[0, 0, 0, 0, 1, 2, 3, 9]) {
        chain.push(random.one_of(&[0u8, 43, 44, 60, 60, 51]));
    }
    chain.push(last);
    let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, 60, chain[0], random.one_of(&[64, 255])];
    for _ in 0..2 {
        let addr = if among_strangers { STRANGER_V6 } else { random.one_of(&V6) };
        packet.extend(addr.parse::<Ipv6Addr>().unwrap().octets());
    }
    for pair in chain.windows(2) {
        let is_fragment = pair[0] == 44;
        let units = if is_fragment { 0 } else { random.one_of(&[0u8, 0, 1, 2]) };
        let offset =
            if is_fragment { random.one_of(&[[0, 0], [0, 1], [0, 8], [1, 0], [0, 6]]) } else { [1, 4] };
        packet.extend([pair[1], units, offset[0], offset[1], 0, 0, 0, 0]);
        packet.extend(vec![0; usize::from(units) * 8]);
    }
    packet.extend(payload);
    packet
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

/// Gives queue 0 of the loopback device the taker.
fn set_taker(steering: &mut Steering, taker: Taker, socket: &OwnedFd) {
    // "Dead" is so long ago that a slow run stays in it, "alive" lies ahead of any.
    let heartbeats = Heartbeats::map(steering.heartbeats()).unwrap();
    heartbeats.beat(0, if taker == Taker::Dead { 1 } else { now_ns() + 3_600_000_000_000 });
    if taker != Taker::NoSocket {
        steering.set_socket(0, 0, socket.as_fd()).unwrap();
    }
}

/// Bound to nothing: enough to be in the map, and a test run delivers nothing.
fn unbound_socket() -> OwnedFd {
    socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap()
}

#[test]
fn agrees_with_the_reference_on_generated_packets() {
    let set = example_set();
    let Some(mut steering) = loaded(&set) else { return };
    let socket = unbound_socket();
    let mut random = Random(0x7077_6174_6874);
    let mut seen = [0u64; COUNTERS];
    for taker in [Taker::NoSocket, Taker::Alive, Taker::Dead] {
        set_taker(&mut steering, taker, &socket);
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

/// An ICMP error from one stranger to another about a packet from the second to `about`, under `tags` VLAN tags, behind 8 bytes
/// of IPv4 options or an IPv6 extension header if `extended`; the quoted packet has them too then.
fn error_about(about: &str, tags: usize, extended: bool) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    (0..tags).for_each(|_| frame.extend([0x81, 0x00, 0x00, 0x05]));
    let header = |src: IpAddr, dst: IpAddr, protocol: u8| -> Vec<u8> {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header =
                    vec![if extended { 0x47 } else { 0x45 }, 0, 0, 60, 0, 1, 0x40, 0, 64, protocol, 0, 0];
                header.extend([src.octets(), dst.octets()].concat());
                header.extend(vec![1; if extended { 8 } else { 0 }]);
                header
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let next = if extended { 60 } else { protocol };
                let mut header = vec![0x60, 0, 0, 0, 0, 60, next, 64];
                header.extend([src.octets(), dst.octets()].concat());
                header.extend(if extended { vec![protocol, 0, 1, 4, 0, 0, 0, 0] } else { Vec::new() });
                header
            }
            _ => unreachable!("both of one family"),
        }
    };
    let about: IpAddr = about.parse().unwrap();
    let (client, router, ethertype, icmp, kind): (IpAddr, IpAddr, _, _, _) = if about.is_ipv4() {
        (STRANGER_V4.into(), [198, 51, 100, 5].into(), [0x08, 0x00], protocol::ICMP, 11)
    } else {
        (STRANGER_V6.parse().unwrap(), "2001:db8:9::5".parse().unwrap(), [0x86, 0xdd], protocol::ICMPV6, 3)
    };
    frame.extend(ethertype);
    frame.extend(header(router, client, icmp));
    frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend(header(client, about, protocol::UDP));
    frame.extend([0; 8]);
    frame
}

#[test]
fn an_error_about_a_packet_to_an_endpoint_is_ours_whoever_sends_it() {
    let Some(mut steering) = loaded(&example_set()) else { return };
    let socket = unbound_socket();
    let mut run_as = |taker, frame: &[u8]| {
        set_taker(&mut steering, taker, &socket);
        let before = steering.counters().unwrap();
        let action = run(&steering, frame);
        let after = steering.counters().unwrap();
        let raised: Vec<_> = SteerCounter::ALL
            .iter()
            .filter(|counter| after[**counter as usize] != before[**counter as usize])
            .collect();
        (action, *raised[0])
    };
    let pods = ["10.244.1.7", "198.51.100.77", "fd00:244::7", "2001:db8:9::77"];
    let strangers = ["198.51.100.99", "10.245.0.1", "2001:db8:9::99"];
    for (tags, extended) in [(0, false), (1, false), (2, true), (0, true)] {
        for pod in pods {
            let frame = error_about(pod, tags, extended);
            assert_eq!(
                run_as(Taker::Alive, &frame),
                (XDP_REDIRECT, SteerCounter::RedirectError),
                "{pod} {tags} {extended}"
            );
            // Passed on, it would show a pod's address to a client.
            assert_eq!(
                run_as(Taker::Dead, &frame),
                (XDP_DROP, SteerCounter::DropWorkerDead),
                "{pod} {tags} {extended}"
            );
            let cut = &frame[..frame.len() - 9 - if extended { 8 } else { 0 }];
            assert_eq!(
                run_as(Taker::Alive, cut),
                (XDP_PASS, SteerCounter::PassOther),
                "the address is cut off"
            );
        }
        for stranger in strangers {
            let frame = error_about(stranger, tags, extended);
            assert_eq!(
                run_as(Taker::Alive, &frame),
                (XDP_PASS, SteerCounter::PassOther),
                "{stranger} {tags} {extended}"
            );
        }
    }
}

#[test]
fn a_full_map_names_the_entry_and_its_room() {
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
    assert!(error.contains("room for 2") && error.contains("prefix (10.244.0.3/32)"), "{error}");
    // A preallocated hash table has a few spare entries for each CPU, so this takes more.
    set = SteerSet::default();
    set.vips.extend((0..=255).map(|low| IpAddr::from([203, 0, 113, low])));
    let (grow, _) = Contents::default().difference(&set.contents());
    let error = steering.apply(&grow).unwrap_err().to_string();
    assert!(error.contains("room for 2") && error.contains("203.0.113."), "{error}");
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
