//! The worker over ports in memory, with a clock that the test sets.

use std::net::IpAddr;
use std::sync::Mutex;

use af_xdp::Umem;
use etherparse::PacketBuilder;
use ipnet::IpNet;

use super::*;
use crate::addr::Addr;
use crate::control::publish::Publisher;
use crate::port::memory::MemoryPort;
use crate::table::flow_map::FlowMapConfig;
use crate::table::lpm::Lpm;
use crate::tables::{NextHop, PortLink, PortSettings, Route, Settings};

mod capture;
mod fragments;
mod overlay;

const FRAMES: usize = 512;
const NEXT_HOP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn mac(port: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, port]
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// A worker with two ports: clients behind port 0, 10.2.0.0/16 behind port 1.
struct Rig {
    publisher: Arc<Publisher>,
    running: Running<MemoryPort>,
    asked: Arc<Mutex<Vec<(u8, Addr)>>>,
    now_ns: u64,
    /// The kernel's ends of the TAPs.
    taps: Vec<std::os::fd::OwnedFd>,
}

impl Rig {
    fn new() -> Rig {
        let publisher = Publisher::new(1).unwrap();
        let exchange = Exchange::new(publisher.workers());
        Rig::of(publisher, exchange, 0)
    }

    /// One of several workers.
    fn of(publisher: Arc<Publisher>, exchange: Arc<Exchange>, index: usize) -> Rig {
        let config = FlowMapConfig { capacity: 1024, workers: 2, ..FlowMapConfig::default() };
        let asked = Arc::new(Mutex::new(Vec::new()));
        let ask = asked.clone();
        let tap = || {
            use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap()
        };
        let (punts, taps) = (0..2).map(|_| tap()).map(|(ours, kernels)| (Punt::new(ours), kernels)).unzip();
        let worker = Worker {
            index,
            ports: vec![MemoryPort::new(), MemoryPort::new()],
            pool: Umem::anonymous(FRAMES as u32, 2048).take_frames().unwrap(),
            punts,
            reader: publisher.reader(index),
            flows: Arc::new(FlowMap::anonymous(config)),
            affinity: Arc::new(FlowMap::anonymous(config)),
            heartbeats: Arc::new(Heartbeats::anonymous().unwrap()),
            resolve: Box::new(move |port, addr| ask.lock().unwrap().push((port, addr))),
            fragments: Limits {
                frames: 256,
                datagrams: 32,
                ipv4_ns: 30 * SECOND_NS,
                ipv6_ns: 60 * SECOND_NS,
            },
            exchange,
            poll: Poll::Busy,
        };
        let mut rig = Rig { publisher, running: Running::new(worker, 1), asked, now_ns: SECOND_NS, taps };
        rig.publish_tables(1);
        rig.publish_fib(1, Some(NEXT_HOP_MAC));
        rig
    }

    fn publish_tables(&mut self, generation: u64) {
        let ports = vec![
            PortSettings { outside: true, ..PortSettings::default() },
            PortSettings { inside: true, ..PortSettings::default() },
        ];
        let settings = Arc::new(Settings { ports, ..Settings::default() });
        self.publisher.publish_tables(Arc::new(Tables { generation, settings, ..Tables::default() }));
    }

    fn publish_fib(&mut self, epoch: u32, mac_of_next_hop: Option<[u8; 6]>) {
        self.publish_mtu(epoch, mac_of_next_hop, 1500);
    }

    /// `mtu`: of the way to 10.2.0.0/16.
    fn publish_mtu(&mut self, epoch: u32, mac_of_next_hop: Option<[u8; 6]>, mtu: u16) {
        let gateway = Addr::from("10.2.0.9".parse::<IpAddr>().unwrap());
        let router = Addr::from("198.51.100.1".parse::<IpAddr>().unwrap());
        let link = |port| PortLink { mac: mac(port), mtu: 1500, up: true, ..PortLink::default() };
        self.publisher.publish_fib(Arc::new(Fib {
            epoch,
            routes: Arc::new(Lpm::build([
                (net("10.2.0.0/16"), Route::NextHop(0)),
                (net("fd00:2::/64"), Route::NextHop(0)),
                (net("198.51.100.0/24"), Route::NextHop(1)),
                (net("192.0.2.1/32"), Route::Local),
                (net("10.9.0.0/16"), Route::Blackhole),
            ])),
            next_hops: vec![
                NextHop { port: 1, gateway, mac: mac_of_next_hop, mtu, tunnel: None },
                NextHop { port: 0, gateway: router, mac: Some([2, 0, 0, 0, 0, 1]), mtu: 1500, tunnel: None },
            ],
            ports: vec![link(0), link(1)],
            overlay: None,
        }));
    }

    fn deliver(&mut self, to: &str) {
        let dst: std::net::Ipv4Addr = to.parse().unwrap();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], mac(0))
            .ipv4([198, 51, 100, 7], dst.octets(), 64)
            .udp(4242, 53);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"question").unwrap();
        self.running.rings.ports[0].deliver(bytes);
    }

    fn round(&mut self) -> usize {
        self.now_ns += 1_000;
        self.running.round(self.now_ns)
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.running.rings.ports[1].sent()).collect()
    }

    fn count(&self, counter: Counter) -> u64 {
        self.running.link.counters().get(counter)
    }

    fn reason(&self, reason: Reason) -> u64 {
        self.running.link.counters().reason(reason)
    }

    /// Packets in are packets out, dropped or waiting; and no frame is lost.
    fn check_conservation(&mut self) {
        self.round();
        let ends = [Counter::forwarded, Counter::answered, Counter::punted];
        let ended: u64 = ends.into_iter().map(|counter| self.count(counter)).sum();
        let answers = self.count(Counter::answered);
        let reasons: u64 = Reason::ALL.iter().map(|reason| self.reason(*reason)).sum();
        let waiting = self.running.holding.len() + self.running.gathering.len();
        let came = self.count(Counter::rx_packets) + self.count(Counter::fragments_taken_over);
        let handed_over = self.count(Counter::fragments_handed_over);
        assert_eq!(came, ended + reasons - answers + waiting as u64 + handed_over);
        let gathered = self.count(Counter::fragments_gathered) - self.count(Counter::fragments_released);
        assert_eq!(gathered as usize, self.running.gathering.len());
        let held = self.running.holding.frames() + self.running.gathering.frames();
        assert_eq!(self.running.rings.pool.len() + held, FRAMES);
        self.running.account();
        let frames = self.running.link.frames();
        assert_eq!((frames.total(), frames.held(), frames.missing()), (FRAMES as u64, held as u64, 0));
    }
}

#[test]
fn a_frame_that_is_lost_is_missed() {
    let mut rig = Rig::new();
    rig.round();
    assert_eq!(rig.running.link.frames().missing(), 0);
    let _lost = rig.running.rings.pool.pop();
    rig.now_ns += 5_000_000;
    rig.round();
    assert_eq!(rig.running.link.frames().missing(), 0, "it is told every few milliseconds, not every round");
    rig.now_ns += 5_000_000;
    rig.round();
    assert_eq!(rig.running.link.frames().missing(), 1);
}

#[test]
fn every_packet_ends_once_and_every_frame_comes_back() {
    let mut rig = Rig::new();
    for _ in 0..100 {
        rig.deliver("10.2.0.77");
        rig.deliver("192.0.2.1");
        rig.deliver("10.9.0.1");
    }
    while rig.round() > 0 {}
    let sent = rig.sent();
    assert_eq!((sent.len(), rig.count(Counter::forwarded)), (100, 100));
    assert_eq!((&sent[0][..6], &sent[0][6..12], sent[0][22]), (&NEXT_HOP_MAC[..], &mac(1)[..], 63));
    assert_eq!((rig.count(Counter::punted), rig.reason(Reason::PuntFailed)), (100, 0));
    let mut frame = [0; 128];
    let len = rustix::io::read(&rig.taps[0], &mut frame).unwrap();
    assert_eq!((len, frame[10 + 22]), (10 + 50, 64), "a punted packet is untouched");
    assert_eq!(rig.reason(Reason::Blackhole), 100);
    rig.check_conservation();
}

#[test]
fn what_the_transmit_ring_does_not_take_is_dropped_and_counted() {
    let mut rig = Rig::new();
    rig.running.rings.ports[1].limit_tx(Some(10));
    (0..40).for_each(|_| rig.deliver("10.2.0.77"));
    rig.round();
    let (forwarded, full) = (rig.count(Counter::forwarded), rig.reason(Reason::TxRingFull));
    assert!(forwarded >= 10 && full > 0, "{forwarded} {full}");
    assert_eq!(forwarded + full, 40);
    assert_eq!(rig.sent().len() as u64, forwarded);
    rig.running.rings.ports[1].limit_tx(None);
    rig.check_conservation();
}

#[test]
fn packets_wait_for_their_next_hop_and_leave_when_it_is_known() {
    let mut rig = Rig::new();
    rig.publish_fib(2, None);
    (0..20).for_each(|_| rig.deliver("10.2.0.77"));
    rig.round();
    let waiting = rig.running.holding.len();
    assert!(waiting > 0 && waiting < 20);
    assert_eq!(rig.reason(Reason::NeighborUnresolved) as usize, 20 - waiting, "too many wait");
    assert_eq!(rig.asked.lock().unwrap().len(), 1);
    assert_eq!(rig.count(Counter::held) as usize, waiting);
    rig.check_conservation();
    // A table that still does not know changes nothing, and they are counted as held once.
    rig.publish_fib(3, None);
    rig.round();
    assert_eq!((rig.running.holding.len(), rig.count(Counter::held) as usize), (waiting, waiting));
    rig.publish_fib(4, Some(NEXT_HOP_MAC));
    rig.round();
    assert_eq!((rig.sent().len(), rig.running.holding.len()), (waiting, 0));
    rig.check_conservation();

    rig.publish_fib(5, None);
    rig.deliver("10.2.0.77");
    rig.round();
    let given_up = rig.reason(Reason::NeighborUnresolved);
    rig.now_ns += 2 * SECOND_NS;
    rig.round();
    assert_eq!(rig.reason(Reason::NeighborUnresolved), given_up + 1);
    rig.check_conservation();
}

#[test]
fn a_packet_waits_its_own_time_whatever_has_waited_before() {
    let mut rig = Rig::new();
    rig.publish_fib(2, None);
    rig.deliver("10.2.0.77");
    rig.round();
    rig.publish_fib(3, Some(NEXT_HOP_MAC));
    rig.round();
    assert_eq!((rig.sent().len(), rig.count(Counter::held)), (1, 1));
    // Long after the time of the first one.
    rig.now_ns += 5 * SECOND_NS;
    rig.publish_fib(4, None);
    rig.deliver("10.2.0.77");
    rig.round();
    rig.round();
    assert_eq!((rig.running.holding.len(), rig.count(Counter::held)), (1, 2));
    rig.publish_fib(5, Some(NEXT_HOP_MAC));
    rig.round();
    assert_eq!((rig.sent().len(), rig.reason(Reason::NeighborUnresolved)), (1, 0));
    rig.check_conservation();
}

#[test]
fn a_generation_is_in_force_when_older_frames_have_left() {
    let mut rig = Rig::new();
    rig.round();
    assert_eq!(rig.running.link.in_force(), 1);
    assert_eq!(rig.running.heartbeats.last_ns(0), rig.now_ns);
    for generation in 2..100 {
        rig.publish_tables(generation);
        rig.deliver("10.2.0.77");
        rig.round();
        rig.round();
        assert_eq!(rig.running.link.in_force(), generation);
    }
}

#[test]
fn the_whole_flow_table_is_looked_at_in_the_time_it_should_take() {
    for capacity in [1_000, 262_144, 10_000_000] {
        let mut ageing = Ageing::default();
        let mut looked_at = 0;
        // A round of the loop each 100 us.
        for round in 1..=40_000u64 {
            looked_at += ageing.due(round * 100_000, capacity, usize::MAX);
        }
        let share = looked_at as f64 / capacity as f64;
        assert!((0.9..=1.6).contains(&share), "{capacity}: {share}");
    }
}

#[test]
fn ageing_never_takes_more_than_it_may() {
    let mut ageing = Ageing::default();
    assert_eq!(ageing.due(10 * SECOND_NS, 262_144, 64), 64);
    // What was not granted is still due, but not more than a second of it.
    let mut rest = 0;
    while let count @ 1.. = ageing.due(10 * SECOND_NS, 262_144, 64) {
        assert!(count <= 64);
        rest += count;
    }
    assert!((60_000..70_000).contains(&rest), "{rest}");
}
