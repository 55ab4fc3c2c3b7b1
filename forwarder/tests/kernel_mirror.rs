//! The mirror against a real kernel: what it forwards by is what `ip route get` says, and it follows every change.

mod netns;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use forwarder::kernel::fib::Wanted;
use forwarder::kernel::mirror::{Mirror, MirrorConfig};
use forwarder::kernel::privileged::{Care, Direct, Privileged};
use forwarder::tables::{Fib, NextHop, Route};
use netns::{Namespace, eventually, is_root};
use proptest::test_runner::{RngAlgorithm, TestRng};

/// A gateway with ports g0 (192.0.2.1/24, 2001:db8::1/64) and g1 (10.0.0.1/24, fd00::1/64), another interface x9
/// (172.16.0.1/24), and a neighbor behind g1.
struct Gateway {
    ns: Namespace,
    peer: Namespace,
    mirror: Mirror,
    fib: Arc<Mutex<Fib>>,
    /// The mirror's thread is busy handing a table over.
    is_publishing: Arc<AtomicBool>,
}

/// Refuses everything, as a data plane without a keeper would.
struct Nobody;

impl Privileged for Nobody {
    fn neighbor(&mut self, _: u32, _: IpAddr, _: Care) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

impl Gateway {
    fn new(privileged: fn() -> Box<dyn Privileged>) -> Gateway {
        let (ns, peer) = (Namespace::new("gw"), Namespace::new("peer"));
        // No address that comes up by itself: the routes are what a test says.
        for key in ["default", "all"] {
            ns.sysctl(&format!("net.ipv6.conf.{key}.accept_dad"), "0");
            ns.sysctl(&format!("net.ipv6.conf.{key}.forwarding"), "0");
        }
        ns.sysctl("net.ipv4.conf.all.forwarding", "1");
        ns.ip_batch(
            "link add g0 type veth peer name c0\n link add g1 type veth peer name c1\n link add x9 type veth peer name y9\n\
             link set g0 up\n link set c0 up\n link set g1 up\n link set x9 up\n link set y9 up\n\
             addr add 192.0.2.1/24 dev g0\n addr add 2001:db8::1/64 dev g0\n\
             addr add 10.0.0.1/24 dev g1\n addr add fd00::1/64 dev g1\n addr add 172.16.0.1/24 dev x9\n",
        );
        ns.ip(&format!("link set c1 netns {}", peer.name));
        peer.ip_batch("link set c1 up\n addr add 10.0.0.2/24 dev c1\n addr add 10.0.0.3/24 dev c1\n");
        let fib = Arc::new(Mutex::new(Fib::default()));
        let slot = fib.clone();
        let is_publishing = Arc::new(AtomicBool::new(false));
        let publishing = is_publishing.clone();
        let mirror = std::thread::scope(|scope| {
            let start = || {
                ns.enter();
                let config = MirrorConfig { ports: vec!["g0".into(), "g1".into()], neighbor_limit: 4_096 };
                let publish = move |fib: Fib| {
                    publishing.store(true, Ordering::Release);
                    let mut slot = slot.lock().unwrap();
                    assert!(fib.epoch > slot.epoch, "epochs count up");
                    *slot = fib;
                    publishing.store(false, Ordering::Release);
                };
                Mirror::start(config, privileged(), publish).unwrap()
            };
            scope.spawn(start).join().unwrap()
        });
        Gateway { ns, peer, mirror, fib, is_publishing }
    }

    fn lookup(&self, addr: IpAddr) -> Found {
        let fib = self.fib.lock().unwrap();
        match fib.routes.lookup(addr.into()) {
            Some(Route::NextHop(n)) => Found::Via(fib.next_hops[n as usize]),
            Some(other) => Found::Route(other),
            None => Found::Nothing,
        }
    }

    /// Waits until `addr` leads where `is_right` says.
    #[track_caller]
    fn follows(&self, addr: &str, is_right: impl Fn(Found) -> bool) {
        let ip = addr.parse().unwrap();
        eventually(&format!("{addr} right, now {:?}", self.lookup(ip)), || is_right(self.lookup(ip)));
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Found {
    Via(NextHop),
    Route(Route),
    Nothing,
}

impl Found {
    fn gateway(self) -> Option<IpAddr> {
        if let Found::Via(hop) = self { Some(hop.gateway.into()) } else { None }
    }

    fn mac(self) -> Option<[u8; 6]> {
        if let Found::Via(hop) = self { hop.mac } else { None }
    }
}

fn nobody() -> Box<dyn Privileged> {
    Box::new(Nobody)
}

/// The keeper's side, in the namespace of the calling thread.
fn direct() -> Box<dyn Privileged> {
    Box::new(Direct::new(vec!["g0".into(), "g1".into()]).unwrap())
}

/// What `ip route get` says, in words that can be compared.
fn oracle(ns: &Namespace, addr: IpAddr) -> String {
    let output = ns.try_ip(&format!("route get {addr}"));
    if !output.status.success() {
        return "refused".into();
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    let after = |key: &str| words.iter().position(|w| *w == key).map(|i| words[i + 1]);
    match (words[0], after("via"), after("dev")) {
        ("local" | "broadcast" | "anycast" | "multicast", ..) => "local".into(),
        ("blackhole" | "unreachable" | "prohibit", ..) => "refused".into(),
        (_, _, Some("x9" | "lo")) => "kernel".into(),
        (_, Some(gateway), Some(dev)) => format!("{gateway} by {dev}"),
        (_, None, Some(dev)) => format!("on {dev}"),
        _ => panic!("{text}"),
    }
}

fn in_words(found: Found) -> String {
    match found {
        Found::Via(hop) => format!("{} by g{}", hop.gateway, hop.port),
        Found::Route(Route::OnLink { port }) => format!("on g{port}"),
        Found::Route(Route::Local) => "local".into(),
        Found::Route(Route::Kernel) => "kernel".into(),
        Found::Route(Route::Blackhole) | Found::Nothing => "refused".into(),
        Found::Route(Route::NextHop(_)) => unreachable!("looked up"),
    }
}

#[test]
fn agrees_with_the_kernel_on_random_routes_and_destinations() {
    if !is_root() {
        return;
    }
    let gateway = Gateway::new(nobody);
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[42; 32]);
    use proptest::prelude::Rng;
    let mut pick = |n: u32| rng.next_u32() % n;
    // Nested prefixes inside two small ranges, so that most lookups meet several of them.
    let v4 = |bits: u32| Ipv4Addr::from_bits(198 << 24 | 18 << 16 | bits & 0xffff);
    let v6 = |bits: u32| Ipv6Addr::from_bits(0x2001_0db8_00aa_u128 << 80 | u128::from(bits) << 48);
    let mut lines = String::new();
    for _ in 0..150 {
        let len = 16 + pick(17);
        let bits = pick(1 << 16) & (u32::MAX << (32 - len));
        let bits6 = pick(1 << 16) & (u32::MAX << (32 - len));
        let how = match pick(6) {
            0 => ("blackhole", String::new(), String::new()),
            1 => ("", "dev g1".into(), "dev g1".into()),
            2 => ("", "via 172.16.0.9 dev x9".into(), "dev x9".into()),
            3 => (
                "",
                format!("via 192.0.2.{}", 2 + pick(200)),
                format!("via 2001:db8::{} dev g0", 2 + pick(200)),
            ),
            _ => ("", format!("via 10.0.0.{}", 2 + pick(200)), format!("via fd00::{} dev g1", 2 + pick(200))),
        };
        let metric = 1 + pick(3);
        lines += &format!("route replace {} {}/{len} {} metric {metric}\n", how.0, v4(bits), how.1);
        lines += &format!("route replace {} {}/{} {} metric {metric}\n", how.0, v6(bits6), len + 48, how.2);
    }
    lines += "route add default via 192.0.2.254\n route add local 198.18.64.0/20 dev lo\n";
    lines += "route add unreachable 203.0.113.0/24\n route add prohibit 203.0.114.0/24\n";
    lines +=
        "route add blackhole default table default metric 5\n route add 198.18.0.0/18 dev x9 table default\n";
    gateway.ns.ip_batch(&lines);
    gateway.ns.ip("-6 route flush table local root ff00::/8"); // `ip route get` of multicast asks for a device
    gateway.follows("203.0.114.1", |found| found == Found::Route(Route::Blackhole));
    std::thread::sleep(std::time::Duration::from_millis(100));

    let mut destinations: Vec<IpAddr> = [
        "10.0.0.1",
        "10.0.0.255",
        "10.0.0.9",
        "127.0.0.1",
        "192.0.2.9",
        "172.16.0.5",
        "8.8.8.8",
        "203.0.113.9",
    ]
    .into_iter()
    .chain(["fd00::1", "fd00::9", "2001:db8::1", "2001:db9::1", "::1"])
    .map(|text| text.parse().unwrap())
    .collect();
    for _ in 0..250 {
        destinations.push(v4(pick(1 << 16)).into());
        destinations.push(v6(pick(1 << 16)).into());
    }
    let mut kinds = std::collections::BTreeMap::new();
    for addr in destinations {
        let expected = oracle(&gateway.ns, addr);
        assert_eq!(in_words(gateway.lookup(addr)), expected, "{addr}");
        *kinds.entry(expected.split(' ').next_back().unwrap().to_owned()).or_insert(0) += 1;
    }
    // The comparison met every kind of answer.
    assert_eq!(kinds.len(), 5, "{kinds:?}");
}

#[test]
fn follows_links_addresses_routes_and_neighbors() {
    if !is_root() {
        return;
    }
    let gateway = Gateway::new(nobody);
    let ns = &gateway.ns;
    let on_link = Found::Route(Route::OnLink { port: 1 });
    let mac = [2, 0, 0, 0, 0, 9];

    ns.ip("neigh replace 10.0.0.9 lladdr 02:00:00:00:00:09 dev g1 nud reachable");
    gateway.follows("10.0.0.9", |found| found.mac() == Some(mac));
    ns.ip("neigh replace 10.0.0.9 lladdr 02:00:00:00:00:0a dev g1 nud stale");
    gateway.follows("10.0.0.9", |found| found.mac() == Some([2, 0, 0, 0, 0, 10]));
    ns.ip("neigh del 10.0.0.9 dev g1");
    gateway.follows("10.0.0.9", |found| found == on_link);
    ns.ip("neigh replace fd00::9 lladdr 02:00:00:00:00:09 dev g1 nud permanent");
    gateway.follows("fd00::9", |found| found.mac() == Some(mac));

    ns.ip("route add 203.0.113.0/24 via 10.0.0.9");
    gateway.follows("203.0.113.1", |found| {
        found.gateway() == Some("10.0.0.9".parse().unwrap()) && found.mac().is_none()
    });
    ns.ip("neigh replace 10.0.0.9 lladdr 02:00:00:00:00:09 dev g1 nud permanent");
    gateway.follows("203.0.113.1", |found| found.mac() == Some(mac));
    ns.ip("route replace 203.0.113.0/24 via 10.0.0.8");
    gateway.follows("203.0.113.1", |found| found.gateway() == Some("10.0.0.8".parse().unwrap()));
    ns.ip("route append 203.0.113.0/24 via 10.0.0.7");
    ns.ip("route del 203.0.113.0/24 via 10.0.0.8");
    gateway.follows("203.0.113.1", |found| found.gateway() == Some("10.0.0.7".parse().unwrap()));
    ns.ip("route replace 203.0.113.0/24 via inet6 fd00::9 dev g1");
    gateway.follows("203.0.113.1", |found| {
        found.gateway() == Some("fd00::9".parse().unwrap()) && found.mac() == Some(mac)
    });
    ns.ip("route replace 203.0.113.0/24 nexthop via 10.0.0.5 dev g1 nexthop via 10.0.0.6 dev g1");
    gateway.follows("203.0.113.1", |found| found.gateway() == Some("10.0.0.5".parse().unwrap()));
    ns.ip("-6 route add 2001:db8:ff::/48 nexthop via fd00::5 nexthop via fd00::6");
    gateway.follows("2001:db8:ff::1", |found| found.gateway() == Some("fd00::5".parse().unwrap()));
    ns.ip("nexthop add id 7 via 10.0.0.77 dev g1");
    ns.ip("route add 198.51.100.0/24 nhid 7");
    gateway.follows("198.51.100.1", |found| found.gateway() == Some("10.0.0.77".parse().unwrap()));
    ns.ip("nexthop replace id 7 via 10.0.0.78 dev g1");
    gateway.follows("198.51.100.1", |found| found.gateway() == Some("10.0.0.78".parse().unwrap()));

    ns.ip("addr add 10.0.0.200/32 dev g1");
    gateway.follows("10.0.0.200", |found| found == Found::Route(Route::Local));
    ns.ip("addr del 10.0.0.200/32 dev g1");
    gateway.follows("10.0.0.200", |found| found == on_link);

    let port = |n: usize| gateway.fib.lock().unwrap().ports[n].clone();
    assert_eq!(port(0).v4, Some("192.0.2.1".parse::<IpAddr>().unwrap().into()));
    assert_eq!(port(0).v6, Some("2001:db8::1".parse::<IpAddr>().unwrap().into()));
    ns.ip("link set g0 mtu 1400");
    eventually("the MTU", || port(0).mtu == 1400);
    ns.ip("link set g0 address 02:00:00:00:aa:01");
    eventually("the MAC address", || port(0).mac == [2, 0, 0, 0, 0xaa, 1]);
    // Without its carrier the port is down and the routes stay; taken down, the kernel drops them without a word.
    gateway.peer.ip("link set c1 down");
    eventually("no carrier", || !port(1).up);
    assert_ne!(gateway.lookup("203.0.113.1".parse().unwrap()), Found::Nothing);
    ns.ip("link set g1 down");
    gateway.follows("203.0.113.1", |found| found == Found::Nothing);
    ns.ip("link del g0");
    eventually("no interface", || port(0) == Default::default());
    ns.ip_batch("link add g0 type veth peer name c0\n link set g0 up\n link set c0 up\n addr add 192.0.2.1/24 dev g0\n");
    eventually("the interface again", || port(0).up && port(0).v4.is_some());
    gateway.follows("192.0.2.7", |found| found == Found::Route(Route::OnLink { port: 0 }));
}

/// Rules 12.5, 12.6.
#[test]
fn pod_routes_come_and_go() {
    if !is_root() {
        return;
    }
    let gateway = Gateway::new(nobody);
    gateway.ns.ip("neigh replace 10.0.0.9 lladdr 02:00:00:00:00:09 dev g1 nud permanent");
    let pod_routes = vec![("10.244.1.0/24".parse().unwrap(), "10.0.0.9".parse::<IpAddr>().unwrap().into())];
    gateway.mirror.want(Wanted { pod_routes, ..Wanted::default() }, true);
    gateway.follows("10.244.1.7", |found| found.mac() == Some([2, 0, 0, 0, 0, 9]));
    gateway.ns.ip("route add 10.244.1.0/24 via 10.0.0.8");
    gateway.follows("10.244.1.7", |found| found.gateway() == Some("10.0.0.8".parse().unwrap()));
    gateway.ns.ip("route del 10.244.1.0/24");
    gateway.follows("10.244.1.7", |found| found.mac() == Some([2, 0, 0, 0, 0, 9]));
    gateway.mirror.want(Wanted::default(), true);
    gateway.follows("10.244.1.7", |found| found == Found::Nothing);
}

#[test]
fn bursts_are_coalesced_and_lost_notifications_are_made_good() {
    if !is_root() {
        return;
    }
    let gateway = Gateway::new(nobody);
    let neighbor = |n: usize, verb: &str, rest: &str| {
        format!("neigh {verb} 10.0.{}.{} {rest}dev g1\n", n / 250, 2 + n % 250)
    };
    gateway.ns.ip("addr add 10.0.0.1/16 dev g1");
    let lladdr = "lladdr 02:00:00:00:00:09 nud permanent ";
    let burst: String = (0..2_000).map(|n| neighbor(n, "replace", lladdr)).collect();
    let before = gateway.mirror.stats().published;
    gateway.ns.ip_batch(&burst);
    gateway.follows("10.0.7.251", |found| found.mac().is_some());
    let published = gateway.mirror.stats().published - before;
    assert!(published < 1_000, "2,000 changes made {published} tables");

    // While the lock is held the mirror cannot hand its next table over, so the socket's buffer overflows.
    let held = gateway.fib.lock().unwrap();
    gateway.ns.ip("neigh del 10.0.0.2 dev g1");
    eventually("the mirror waits", || gateway.is_publishing.load(Ordering::Acquire));
    for _ in 0..3 {
        let deletes: String = (1..2_000).map(|n| neighbor(n, "del", "")).collect();
        gateway.ns.ip_batch(&deletes);
        gateway.ns.ip_batch(&burst);
    }
    gateway.ns.ip_batch(&(0..1_999).map(|n| neighbor(n, "del", "")).collect::<String>());
    drop(held);
    eventually("notifications were lost", || gateway.mirror.stats().overruns > 0);
    let resolved = || gateway.fib.lock().unwrap().next_hops.iter().filter(|hop| hop.mac.is_some()).count();
    let last = || gateway.lookup("10.0.7.251".parse().unwrap()).mac().is_some();
    eventually("what remains is the last neighbor", || resolved() == 1 && last());
    // And nothing that was said before the loss comes back.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(resolved() == 1 && last());
}

#[test]
fn the_kernel_keeps_next_hops_resolved_and_releases_them() {
    if !is_root() {
        return;
    }
    let gateway = Gateway::new(direct);
    let ns = &gateway.ns;
    for (key, value) in [
        ("base_reachable_time_ms", "1000"),
        ("delay_first_probe_time", "1"),
        ("retrans_time_ms", "100"),
        ("interval_probe_time_ms", "500"),
    ] {
        ns.sysctl(&format!("net.ipv4.neigh.g1.{key}"), value);
    }
    let peer = gateway.peer.ip("-br link show c1");
    let mac = peer.split_whitespace().nth(2).unwrap().to_owned();
    let resolved =
        |found: Found| found.mac().is_some_and(|m| m.map(|byte| format!("{byte:02x}")).join(":") == mac);
    let shown = |addr: &str| ns.ip(&format!("neigh show {addr} dev g1"));
    let kept = |addr: &str| {
        let line = shown(addr);
        line.contains("managed") && line.contains("proto 84")
    };

    // An endpoint is resolved before any packet asks for it, and kept.
    let endpoint = |text: &str| text.parse::<IpAddr>().unwrap().into();
    gateway.mirror.want(Wanted { endpoints: vec![endpoint("10.0.0.2")], ..Wanted::default() }, true);
    gateway.follows("10.0.0.2", resolved);
    eventually("10.0.0.2 is kept", || kept("10.0.0.2"));

    // What a packet waits for is resolved when asked, then kept as well.
    gateway.follows("10.0.0.3", |found| found == Found::Route(Route::OnLink { port: 1 }));
    let asks = gateway.mirror.asks();
    assert!(asks.ask(1, endpoint("10.0.0.3")));
    gateway.follows("10.0.0.3", resolved);
    eventually("10.0.0.3 is kept", || kept("10.0.0.3"));

    // Nobody answers there; and that is no neighbor at all.
    assert!(asks.ask(1, endpoint("10.0.0.99")));
    assert!(asks.ask(0, endpoint("10.0.0.98")));
    eventually("both were judged", || gateway.mirror.stats().unresolved == 1);
    assert_eq!(gateway.mirror.stats().resolved, 2);
    assert_eq!(shown("10.0.0.98"), "");

    // An administrator's entry stays an administrator's.
    ns.ip("neigh replace 10.0.0.50 lladdr 02:00:00:00:00:50 dev g1 nud permanent");
    gateway.mirror.want(
        Wanted { endpoints: vec![endpoint("10.0.0.2"), endpoint("10.0.0.50")], ..Wanted::default() },
        true,
    );
    gateway.follows("10.0.0.50", |found| found.mac() == Some([2, 0, 0, 0, 0, 0x50]));

    // Managed entries are probed without any traffic: one that no longer answers is noticed, and released.
    gateway.peer.ip("addr del 10.0.0.3/24 dev c1");
    gateway.follows("10.0.0.3", |found| found == Found::Route(Route::OnLink { port: 1 }));
    eventually("10.0.0.3 is released", || !kept("10.0.0.3"));
    assert!(kept("10.0.0.2"));
    assert!(shown("10.0.0.50").contains("PERMANENT"), "{}", shown("10.0.0.50"));

    // A clean stop leaves nothing managed behind.
    let Gateway { ns, peer: _peer, mirror, .. } = gateway;
    drop(mirror);
    let release = || {
        ns.enter();
        Direct::new(vec!["g0".into(), "g1".into()]).unwrap().release_all().unwrap()
    };
    let released = std::thread::scope(|scope| scope.spawn(release).join().unwrap());
    assert_eq!(released, 1);
    assert!(!ns.ip("neigh show").contains("managed"));
}

#[test]
fn the_keeper_touches_no_interface_but_its_ports() {
    if !is_root() {
        return;
    }
    let ns = Namespace::new("gw");
    ns.ip_batch("link add g0 type veth peer name c0\n link set g0 up\n link set c0 up\n");
    let index = |name: &str| {
        ns.ip(&format!("-o link show {name}")).split(':').next().unwrap().parse::<u32>().unwrap()
    };
    let (g0, c0) = (index("g0"), index("c0"));
    let ask = || {
        ns.enter();
        let mut direct = Direct::new(vec!["g0".into()]).unwrap();
        let addr = "192.0.2.7".parse().unwrap();
        direct.neighbor(g0, addr, Care::Resolve).unwrap();
        let refused =
            [c0, 1, 0, u32::MAX].map(|link| direct.neighbor(link, addr, Care::Keep).unwrap_err().kind());
        assert_eq!(refused, [io::ErrorKind::PermissionDenied; 4]);
    };
    std::thread::scope(|scope| scope.spawn(ask).join().unwrap());
    assert!(ns.ip("neigh show dev g0").starts_with("192.0.2.7"));
    assert_eq!(ns.ip("neigh show dev c0"), "");
}
