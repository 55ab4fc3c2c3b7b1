//! What captures see of a worker's packets, and that packets do not see them.

use config::capture::Point;
use config::capture::filter::Filter;
use config::gateway::Algorithm;

use super::fragments::{datagram, fragments};
use super::*;
use crate::addr::{Tuple, protocol};
use crate::capture::predicate::Predicate;
use crate::capture::{Capture, Captures, RECORD_WORDS, Record};
use crate::table::flow_map::Direction;
use crate::table::record_ring::RecordRing;
use crate::table::spread::Spread;
use crate::tables::{
    Action, Backends, Endpoint, Frontend, FrontendKey, FrontendKind, List, ServicePort, Vip,
};

const VIP: &str = "203.0.113.10";
const SERVICE: u64 = 0xfeed;

impl Rig {
    /// Serves UDP port 53 of [`VIP`] by 10.2.0.77:5353.
    fn serve(&mut self, generation: u64) {
        let vip: Addr = VIP.parse::<IpAddr>().unwrap().into();
        let endpoint = Endpoint {
            addr: "10.2.0.77".parse::<IpAddr>().unwrap().into(),
            port: 5353,
            name: "default/dns-1".into(),
            node: "node-1".into(),
            weight: 1,
            tally: 0,
        };
        let backends = Arc::new(Backends {
            spread: Spread::build(Algorithm::Maglev, 7, &[(1, 1)]),
            endpoints: vec![endpoint],
        });
        let action = Action::Dnat { backends, masquerade: false, list: List::Cluster };
        let service = ServicePort {
            id: 1,
            stable_id: SERVICE,
            namespace: "default".into(),
            name: "dns".into(),
            port_name: String::new(),
            resource_version: String::new(),
            affinity_timeout_s: None,
        };
        let frontend = Frontend {
            service: Arc::new(service),
            kind: FrontendKind::LoadBalancer,
            from_outside: action.clone(),
            from_pod: action.clone(),
            from_node: action,
            source_ranges: Arc::new([]),
        };
        let mut tables = Tables { generation, ..(*self.publisher.tables()).clone() };
        let key = FrontendKey { addr: vip, port: 53, protocol: protocol::UDP };
        tables.frontends.insert(key, Arc::new(frontend));
        tables.vips.insert(vip, Vip { frontends: 1, cluster_ip: false });
        self.publisher.publish_tables(Arc::new(tables));
    }

    /// A datagram from the client with `payload`.
    fn deliver_datagram(&mut self, to: &str, port: u16, ttl: u8, payload: &[u8]) {
        let dst: std::net::Ipv4Addr = to.parse().unwrap();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], mac(0))
            .ipv4([198, 51, 100, 7], dst.octets(), ttl)
            .udp(4242, port);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, payload).unwrap();
        self.running.rings.ports[0].deliver(bytes);
    }

    fn capture(&mut self, captures: &[&Arc<Capture>]) {
        self.publisher.publish_captures(Captures(captures.iter().map(|c| (*c).clone()).collect()));
    }

    /// Frames that left by each port, and those that went to the kernel.
    fn output(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for port in &mut self.running.rings.ports {
            frames.extend(std::iter::from_fn(|| port.sent()));
        }
        let mut buffer = [0; 4096];
        while let Ok(len) = rustix::io::read(&self.taps[0], &mut buffer) {
            frames.push(buffer[..len].to_vec());
        }
        frames
    }

    fn counts(&self) -> Vec<u64> {
        let counters = Counter::ALL.iter().filter(|c| **c != Counter::bursts).map(|c| self.count(*c));
        counters.chain(Reason::ALL.iter().map(|reason| self.reason(*reason))).collect()
    }
}

fn capture(filter: &str, at: &[Point]) -> Arc<Capture> {
    sized(filter, at, 2048, 1 << 20)
}

fn sized(filter: &str, at: &[Point], snaplen: usize, ring_bytes: usize) -> Arc<Capture> {
    let filter: Filter = filter.parse().unwrap();
    let predicate = Predicate::compile(&filter, |_, _, _| vec![SERVICE]).unwrap();
    let rings = (0..2).map(|_| RecordRing::new(ring_bytes)).collect();
    Arc::new(Capture { predicate, at: at.to_vec(), port: None, snaplen, rings })
}

fn records(capture: &Capture) -> Vec<(Record, Vec<u8>)> {
    records_of(capture, 0)
}

fn records_of(capture: &Capture, worker: usize) -> Vec<(Record, Vec<u8>)> {
    let (mut words, mut bytes) = ([0; RECORD_WORDS], Vec::new());
    std::iter::from_fn(|| {
        capture.rings[worker].pop(&mut words, &mut bytes).then(|| (Record::decode(words), bytes.clone()))
    })
    .collect()
}

/// One of each fate: a service's, a routed one, one that is answered, one punted, and some dropped.
fn deliver_all(rig: &mut Rig) {
    rig.deliver_datagram(VIP, 53, 64, b"question");
    rig.deliver_datagram("10.2.0.77", 53, 64, &[7; 1400]);
    rig.deliver_datagram("10.2.0.77", 53, 64, &[8; 5000]);
    rig.deliver_datagram("10.2.0.77", 53, 1, b"too old");
    rig.deliver_datagram(VIP, 80, 64, b"no such port");
    rig.deliver_datagram("192.0.2.1", 53, 64, b"for the kernel");
    rig.deliver_datagram("10.9.0.1", 53, 64, b"nowhere");
    rig.deliver_datagram("127.0.0.1", 53, 64, b"martian");
    rig.running.rings.ports[0].deliver(*b"runt");
}

#[test]
fn packets_are_the_same_with_captures_and_without() {
    let (mut plain, mut watched) = (Rig::new(), Rig::new());
    let captures: Vec<_> =
        ["", "drop", "service default/dns", "not (udp or host 10.2.0.77)", "reason blackhole", "port 53"]
            .map(|filter| capture(filter, &Point::ALL))
            .into();
    for rig in [&mut plain, &mut watched] {
        rig.serve(2);
    }
    watched.capture(&captures.iter().collect::<Vec<_>>());
    for _ in 0..20 {
        for rig in [&mut plain, &mut watched] {
            deliver_all(rig);
            while rig.round() > 0 {}
        }
        assert_eq!(plain.output(), watched.output());
    }
    assert_eq!(plain.counts(), watched.counts());
    plain.check_conservation();
    watched.check_conservation();
    assert!(records(&captures[0]).len() > 20 * 9, "it was watched indeed");
}

#[test]
fn a_packet_has_one_number_as_it_came_and_as_it_leaves() {
    let mut rig = Rig::new();
    rig.serve(2);
    let everything = capture("", &Point::ALL);
    rig.capture(&[&everything]);
    rig.deliver_datagram(VIP, 53, 64, b"question");
    rig.round();
    let sent = rig.sent();
    let seen = records(&everything);
    let [(came, came_bytes), (left, left_bytes)] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!((came.point, came.port, left.point, left.port), (Point::Rx, 0, Point::PostNat, 1));
    assert_eq!((came.note.id, came.generation, left.generation), (left.note.id, 2, 2));
    assert_eq!((came.time_ns, came.len as usize), (rig.now_ns, came_bytes.len()));
    assert_eq!(left_bytes, &sent[0], "the very bytes that were sent");
    assert_eq!((&came_bytes[30..34], &left_bytes[30..34]), (&[203, 0, 113, 10][..], &[10, 2, 0, 77][..]));
    assert_eq!(came.note.before.to_string(), "udp 198.51.100.7:4242 > 203.0.113.10:53");
    assert_eq!(came.note.after.to_string(), "udp 198.51.100.7:4242 > 10.2.0.77:5353");
    assert_eq!((came.note.service, came.note.flow), (SERVICE, Some((Direction::Original, 2))));
    let endpoint = came.note.endpoint.map(|(addr, port)| (addr.to_string(), port));
    assert_eq!(endpoint, Some(("10.2.0.77".to_owned(), 5353)));
    assert_eq!((came.note, came.note.verdict), (left.note, Verdict::Forward { port: 1 }));

    // The reply, by the other port.
    let builder = PacketBuilder::ethernet2(NEXT_HOP_MAC, mac(1))
        .ipv4([10, 2, 0, 77], [198, 51, 100, 7], 64)
        .udp(5353, 4242);
    let mut reply = Vec::new();
    builder.write(&mut reply, b"answer").unwrap();
    rig.running.rings.ports[1].deliver(reply);
    rig.round();
    let seen = records(&everything);
    let (came, _) = &seen[0];
    assert_eq!((came.point, came.port), (Point::Rx, 1));
    assert_eq!(came.note.flow, Some((Direction::Reply, 2)));
    assert_eq!(came.note.after.to_string(), "udp 203.0.113.10:53 > 198.51.100.7:4242");
    assert_eq!(came.note.service, SERVICE);
}

#[test]
fn every_fate_has_its_records() {
    let mut rig = Rig::new();
    rig.serve(2);
    let everything = capture("", &Point::ALL);
    rig.capture(&[&everything]);
    deliver_all(&mut rig);
    rig.round();
    let seen = records(&everything);
    let at = |point: Point| seen.iter().filter(move |(record, _)| record.point == point);
    let mut ids: Vec<u64> = at(Point::Rx).map(|(record, _)| record.note.id).collect();
    ids.dedup();
    assert_eq!(ids.len(), 9, "each has a number of its own");
    let reasons: Vec<_> = at(Point::Drop).map(|(record, _)| record.note.verdict).collect();
    assert_eq!(
        reasons,
        [Reason::Blackhole, Reason::MartianDestination, Reason::Truncated].map(Verdict::Drop),
        "a packet that is answered, punted or sent is not dropped"
    );
    let answers: Vec<_> =
        at(Point::PostNat).filter(|(r, _)| matches!(r.note.verdict, Verdict::Answer { .. })).collect();
    // Too big, too old, no such port.
    assert_eq!(answers.len(), 3);
    for (answer, bytes) in answers {
        assert_eq!((answer.port, answer.note.after.protocol, bytes[23]), (0, protocol::ICMP, 1));
        assert_eq!(answer.len as usize, bytes.len());
    }
    // The runt, whose headers are none.
    let (runt, bytes) = at(Point::Drop).next_back().unwrap();
    assert_eq!((runt.note.before, &bytes[..]), (Tuple::default(), &b"runt"[..]));
    // A packet of several frames, cut where the capture says.
    let jumbo = at(Point::Rx).find(|(record, _)| record.len > 5000).unwrap();
    assert_eq!((jumbo.0.len, jumbo.1.len()), (5042, 2048));
    assert_eq!(jumbo.1[42..], [8; 2006]);
}

#[test]
fn the_segments_of_a_long_packet_are_put_together() {
    let mut rig = Rig::new();
    rig.publish_fib(2, Some(NEXT_HOP_MAC));
    let whole = sized("", &[Point::Rx], 65_557, 1 << 20);
    rig.capture(&[&whole]);
    let payload: Vec<u8> = (0..5001u32).map(|i| i as u8).collect();
    rig.deliver_datagram("10.2.0.77", 53, 64, &payload);
    rig.round();
    let seen = records(&whole);
    assert_eq!(seen[0].1.len(), 5043);
    assert_eq!(seen[0].1[42..], payload);
}

#[test]
fn filters_points_and_ports_choose() {
    let mut rig = Rig::new();
    rig.serve(2);
    let service = capture("service default/dns", &[Point::PostNat]);
    let refused = capture("reason unknown_port", &[Point::Rx]);
    let dropped = capture("drop", &[Point::Drop]);
    let outside =
        Capture { port: Some(0), ..Arc::into_inner(capture("", &[Point::Rx, Point::PostNat])).unwrap() };
    let outside = Arc::new(outside);
    rig.capture(&[&service, &refused, &dropped, &outside]);
    deliver_all(&mut rig);
    rig.round();
    assert_eq!(records(&service).len(), 1);
    let refused = records(&refused);
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].0.note.service, 0, "no Service has this port");
    assert_eq!(records(&dropped).len(), 3);
    // Nine came, three were answered there.
    assert_eq!(records(&outside).len(), 12);

    rig.capture(&[]);
    deliver_all(&mut rig);
    rig.round();
    assert!(records(&outside).is_empty());
}

#[test]
fn late_drops_have_their_reason() {
    let mut rig = Rig::new();
    let everything = capture("", &Point::ALL);
    rig.capture(&[&everything]);
    let drops = |reason| {
        let seen = records(&everything);
        let dropped = seen.iter().filter(|(r, _)| r.point == Point::Drop);
        let ids: Vec<u64> = dropped
            .inspect(|(record, _)| assert_eq!(record.note.verdict, Verdict::Drop(reason)))
            .map(|(record, _)| record.note.id)
            .collect();
        let came: Vec<u64> =
            seen.iter().filter(|(r, _)| r.point == Point::Rx).map(|(r, _)| r.note.id).collect();
        (came, ids)
    };
    // The ring takes ten, in two attempts five each.
    rig.running.rings.ports[1].limit_tx(Some(10));
    (0..40).for_each(|_| rig.deliver("10.2.0.77"));
    rig.round();
    let (came, dropped) = drops(Reason::TxRingFull);
    assert_eq!(dropped.len() as u64, rig.reason(Reason::TxRingFull));
    assert!(!dropped.is_empty());
    assert_eq!(dropped, came[came.len() - dropped.len()..], "the last ones");
    rig.running.rings.ports[1].limit_tx(None);

    // More than may wait; then those that wait give up.
    rig.publish_fib(2, None);
    (0..20).for_each(|_| rig.deliver("10.2.0.77"));
    rig.round();
    let (came, refused) = drops(Reason::NeighborUnresolved);
    assert_eq!((came.len(), refused.len()), (20, 4));
    rig.now_ns += 2 * SECOND_NS;
    rig.round();
    let (_, expired) = drops(Reason::NeighborUnresolved);
    assert_eq!(expired, came[..16]);

    // The kernel takes nothing more.
    rig.taps.clear();
    rig.deliver("192.0.2.1");
    rig.round();
    let (came, dropped) = drops(Reason::PuntFailed);
    assert_eq!((came.len(), &came), (1, &dropped));
    rig.check_conservation();
}

#[test]
fn a_packet_that_waits_keeps_its_number() {
    let mut rig = Rig::new();
    let everything = capture("", &Point::ALL);
    rig.publish_fib(2, None);
    rig.deliver("10.2.0.77");
    rig.round();
    rig.capture(&[&everything]);
    rig.deliver("10.2.0.77");
    rig.round();
    let came = records(&everything);
    assert_eq!((came.len(), came[0].0.note.verdict), (1, Verdict::Hold { port: 1 }));
    rig.publish_fib(3, None);
    rig.round();
    assert!(records(&everything).is_empty(), "it did not come again");
    rig.publish_fib(4, Some(NEXT_HOP_MAC));
    rig.round();
    let left = records(&everything);
    assert_eq!(left.iter().map(|(record, _)| record.point).collect::<Vec<_>>(), [Point::PostNat; 2]);
    // The first came before the capture began, and got its number while it waited.
    assert!(left[0].0.note.id > came[0].0.note.id);
    assert_eq!(left[1].0.note.id, came[0].0.note.id);
}

#[test]
fn what_a_slow_reader_misses_is_counted_exactly() {
    let mut rig = Rig::new();
    let all = capture("", &Point::ALL);
    let slow = sized("", &Point::ALL, 2048, 4096);
    let picky = sized("drop", &Point::ALL, 2048, 4096);
    rig.capture(&[&all, &slow, &picky]);
    for _ in 0..30 {
        rig.deliver("10.2.0.77");
        rig.deliver("10.9.0.1");
        rig.round();
    }
    let (all_seen, slow_seen) = (records(&all), records(&slow));
    assert_eq!((all_seen.len(), all.rings[0].refused()), (120, 0));
    assert!(!slow_seen.is_empty() && slow_seen.len() < 30);
    assert_eq!(slow_seen, all_seen[..slow_seen.len()], "what was kept is what came first");
    assert_eq!(slow_seen.len() as u64 + slow.rings[0].refused(), 120);
    assert_eq!(records(&picky).len() as u64 + picky.rings[0].refused(), 60, "of those that it wants");
    assert_eq!((rig.count(Counter::forwarded), rig.reason(Reason::Blackhole)), (30, 30));
}

#[test]
fn copying_is_bounded_in_each_round() {
    let mut rig = Rig::new();
    let captures: Vec<_> = (0..8).map(|_| sized("", &Point::ALL, 2048, 8 << 20)).collect();
    rig.capture(&captures.iter().collect::<Vec<_>>());
    (0..BURST).for_each(|_| rig.deliver_datagram("10.2.0.77", 53, 64, &[1; 1400]));
    rig.round();
    assert_eq!(rig.count(Counter::forwarded), BURST as u64);
    let kept: usize = captures.iter().map(|capture| records(capture).len()).sum();
    let missed: u64 = captures.iter().map(|capture| capture.rings[0].refused()).sum();
    assert_eq!(kept as u64 + missed, 8 * 2 * BURST as u64);
    // 256 KiB of records that cost 512 bytes and their 1442.
    assert_eq!(kept, 134);
    // The next round has as much again.
    rig.deliver("10.2.0.77");
    rig.round();
    assert_eq!(captures.iter().map(|capture| records(capture).len()).sum::<usize>(), 16);
}

fn ids(records: &[(Record, Vec<u8>)], point: Point) -> Vec<u64> {
    records.iter().filter(|(record, _)| record.point == point).map(|(record, _)| record.note.id).collect()
}

#[test]
fn fragments_are_seen_as_they_come_and_as_they_leave() {
    let mut rig = Rig::new();
    let everything = capture("", &Point::ALL);
    rig.capture(&[&everything]);
    let pieces = fragments(&datagram("10.2.0.77", 4000), 7, 1480);
    for piece in &pieces {
        rig.running.rings.ports[0].deliver(piece.clone());
        rig.round();
    }
    let seen = records(&everything);
    assert_eq!(seen.len(), 6);
    assert!(seen.iter().take(2).all(|(record, _)| record.note.verdict == Verdict::Gather));
    assert_eq!(ids(&seen, Point::Rx), ids(&seen, Point::PostNat));
    let sent = rig.sent();
    assert!(seen[3..].iter().map(|(_, bytes)| bytes).eq(&sent));

    // Too long for its way: the pieces leave by the number of the datagram.
    rig.publish_mtu(2, Some(NEXT_HOP_MAC), 1000);
    rig.running.rings.ports[0].deliver(datagram("10.2.0.77", 1400));
    rig.round();
    let (seen, sent) = (records(&everything), rig.sent());
    assert_eq!((seen.len(), sent.len()), (3, 2));
    assert_eq!(ids(&seen, Point::PostNat), [ids(&seen, Point::Rx)[0]; 2]);
    assert!(seen[1..].iter().map(|(_, bytes)| bytes).eq(&sent));

    // Given up, with the addresses that a filter asks for.
    let filtered = capture("src host 198.51.100.7 and drop", &[Point::Drop]);
    rig.capture(&[&everything, &filtered]);
    rig.running.rings.ports[0].deliver(pieces[0].clone());
    rig.round();
    rig.now_ns += 31 * SECOND_NS;
    rig.round();
    let seen = records(&everything);
    assert_eq!((seen.len(), ids(&seen, Point::Rx)), (2, ids(&seen, Point::Drop)));
    let given_up = records(&filtered);
    assert_eq!(given_up.len(), 1);
    assert_eq!(given_up[0].0.note.verdict, Verdict::Drop(Reason::FragmentTimeout));
    assert_eq!(given_up[0].1, pieces[0]);
    rig.check_conservation();
}

#[test]
fn fragments_keep_their_number_at_another_worker() {
    let publisher = Publisher::new(2).unwrap();
    let exchange = Exchange::new(publisher.workers());
    let mut rigs = [0, 1].map(|index| Rig::of(publisher.clone(), exchange.clone(), index));
    let everything = capture("", &Point::ALL);
    rigs[0].capture(&[&everything]);
    let whole = datagram("10.2.0.77", 3000);
    for id in 0..20 {
        let pieces = fragments(&whole, id, 1480);
        rigs[0].running.rings.ports[0].deliver(pieces[0].clone());
        rigs[1].running.rings.ports[0].deliver(pieces[1].clone());
        rigs[1].running.rings.ports[0].deliver(pieces[2].clone());
        for _ in 0..2 {
            rigs.iter_mut().for_each(|rig| _ = rig.round());
        }
        let seen = [records_of(&everything, 0), records_of(&everything, 1)].concat();
        let (mut came, mut left) = (ids(&seen, Point::Rx), ids(&seen, Point::PostNat));
        came.sort();
        left.sort();
        assert_eq!((came.len(), &came), (3, &left), "each is seen once as it came");
        came.dedup();
        assert_eq!(came.len(), 3);
    }
}
