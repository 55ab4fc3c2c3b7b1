//! Datagrams in fragments: through one worker, and through two that take fragments of the same datagram.

use super::*;
use crate::wire::checksum;

/// Where the IP header begins, and where the payload of IP does.
const L3: usize = 14;
const L4: usize = 34;

/// A datagram of `len` bytes behind the UDP header, not fragmented.
pub(super) fn datagram(to: &str, len: usize) -> Vec<u8> {
    let dst: std::net::Ipv4Addr = to.parse().unwrap();
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], mac(0))
        .ipv4([198, 51, 100, 7], dst.octets(), 64)
        .udp(4242, 53);
    let mut bytes = Vec::new();
    let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    builder.write(&mut bytes, &payload).unwrap();
    with_word(bytes, 6, 0)
}

/// The frame with a word of its IP header changed.
fn with_word(mut frame: Vec<u8>, at: usize, word: u16) -> Vec<u8> {
    frame[L3 + at..L3 + at + 2].copy_from_slice(&word.to_be_bytes());
    frame[L3 + 10..L3 + 12].fill(0);
    let sum = checksum::checksum(&frame[L3..L4]);
    frame[L3 + 10..L3 + 12].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The datagram in fragments of `size` bytes of data, identified by `id`.
pub(super) fn fragments(datagram: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let data = &datagram[L4..];
    let piece = |(number, part): (usize, &[u8])| {
        let more = (number + 1) * size < data.len();
        let word = (number * size / 8) as u16 | if more { 0x2000 } else { 0 };
        let frame = [&datagram[..L4], part].concat();
        with_word(with_word(with_word(frame, 2, (20 + part.len()) as u16), 6, word), 4, id)
    };
    data.chunks(size).enumerate().map(piece).collect()
}

/// What the data of fragments adds up to, if they come in order and leave no gap.
pub(super) fn joined(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut data = Vec::new();
    for (number, frame) in frames.iter().enumerate() {
        let word = u16::from_be_bytes([frame[L3 + 6], frame[L3 + 7]]);
        assert_eq!(usize::from(word & 0x1fff) * 8, data.len(), "fragment {number} is out of place");
        assert_eq!(word & 0x2000 != 0, number + 1 < frames.len());
        assert_eq!(checksum::checksum(&frame[L3..L4]), 0);
        data.extend_from_slice(
            &frame[L4..L3 + usize::from(u16::from_be_bytes([frame[L3 + 2], frame[L3 + 3]]))],
        );
    }
    data
}

impl Rig {
    fn deliver_all(&mut self, frames: &[Vec<u8>]) {
        frames.iter().for_each(|frame| self.running.rings.ports[0].deliver(frame.clone()));
    }

    /// The bytes of a packet that was punted.
    fn punted(&self) -> Vec<u8> {
        let mut frame = vec![0; 4096];
        let len = rustix::io::read(&self.taps[0], &mut frame).unwrap();
        frame[10..len].to_vec()
    }
}

#[test]
fn a_datagram_leaves_when_its_last_fragment_is_there() {
    let mut rig = Rig::new();
    let whole = datagram("10.2.0.77", 3000);
    let pieces = fragments(&whole, 7, 1480);
    for piece in pieces[1..].iter().rev() {
        rig.deliver_all(&[piece.clone(), piece.clone()]);
        rig.round();
    }
    assert_eq!((rig.sent().len(), rig.running.gathering.len()), (0, 2));
    rig.check_conservation();
    rig.deliver_all(&pieces[..1]);
    rig.round();
    let sent = rig.sent();
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 82]);
    assert_eq!(joined(&sent), whole[L4..]);
    assert!(sent.iter().all(|frame| frame[..6] == NEXT_HOP_MAC && frame[L3 + 8] == 63));
    assert_eq!((rig.count(Counter::forwarded), rig.reason(Reason::FragmentDuplicate)), (3, 2));
    assert_eq!(rig.count(Counter::datagrams_complete), 1);
    rig.check_conservation();
}

#[test]
fn a_burst_that_completes_many_datagrams_sends_them_all() {
    let mut rig = Rig::new();
    let whole = datagram("10.2.0.77", 1000);
    let all: Vec<_> = (0..30).map(|id| fragments(&whole, id, 200)).collect();
    for number in 0..6 {
        all.iter().for_each(|pieces| rig.deliver_all(&pieces[number..=number]));
    }
    while rig.round() > 0 {}
    let sent = rig.sent();
    assert_eq!(sent.len(), 180);
    for datagram in sent.chunks(6) {
        assert_eq!(joined(datagram), whole[L4..]);
    }
    rig.check_conservation();
}

#[test]
fn jumbo_fragments_in_several_frames_go_on_as_they_came() {
    let mut rig = Rig::new();
    rig.publish_mtu(2, Some(NEXT_HOP_MAC), 9000);
    let whole = datagram("10.2.0.77", 9000);
    let pieces = fragments(&whole, 7, 4000);
    rig.deliver_all(&[pieces[1].clone(), pieces[2].clone(), pieces[1].clone(), pieces[0].clone()]);
    rig.round();
    let sent = rig.sent();
    assert_eq!((joined(&sent), rig.reason(Reason::FragmentDuplicate)), (whole[L4..].to_vec(), 1));
    rig.check_conservation();
}

#[test]
fn datagrams_wait_for_their_next_hop_as_a_whole() {
    let mut rig = Rig::new();
    rig.publish_fib(2, None);
    let whole = datagram("10.2.0.77", 3000);
    for id in 0..20 {
        rig.deliver_all(&fragments(&whole, id, 1480));
    }
    while rig.round() > 0 {}
    // 16 datagrams for one next hop, however many fragments they are in.
    assert_eq!((rig.running.holding.len(), rig.reason(Reason::NeighborUnresolved)), (48, 12));
    rig.check_conservation();
    rig.publish_fib(3, None);
    rig.round();
    assert_eq!(rig.running.holding.len(), 48);
    rig.publish_fib(4, Some(NEXT_HOP_MAC));
    rig.round();
    let sent = rig.sent();
    assert_eq!((sent.len(), rig.running.holding.len(), rig.count(Counter::held)), (48, 0, 48));
    for datagram in sent.chunks(3) {
        assert_eq!(joined(datagram), whole[L4..]);
    }
    rig.check_conservation();

    rig.publish_fib(5, None);
    rig.deliver_all(&fragments(&whole, 7, 1480));
    rig.round();
    rig.now_ns += 2 * SECOND_NS;
    rig.round();
    assert_eq!(rig.reason(Reason::NeighborUnresolved), 15);
    rig.check_conservation();
}

#[test]
fn what_is_too_long_is_cut_and_counted_once() {
    let mut rig = Rig::new();
    rig.publish_mtu(2, Some(NEXT_HOP_MAC), 1000);
    let whole = datagram("10.2.0.77", 1400);
    rig.deliver_all(std::slice::from_ref(&whole));
    rig.round();
    let sent = rig.sent();
    assert_eq!(sent.iter().map(Vec::len).collect::<Vec<_>>(), [14 + 996, 14 + 452]);
    assert_eq!(joined(&sent), whole[L4..]);
    assert_eq!((rig.count(Counter::forwarded), rig.count(Counter::tx_packets)), (1, 2));
    rig.check_conservation();

    let whole = datagram("10.2.0.77", 4000);
    rig.deliver_all(&fragments(&whole, 9, 1480));
    rig.round();
    let sent = rig.sent();
    assert_eq!((sent.len(), joined(&sent)), (5, whole[L4..].to_vec()));
    assert_eq!((rig.count(Counter::forwarded), rig.count(Counter::tx_packets)), (4, 7));
    assert_eq!(rig.count(Counter::datagrams_cut), 2);
    rig.check_conservation();

    // A piece that finds no room: the datagram counts as lost, all of it.
    rig.running.rings.ports[1].limit_tx(Some(4));
    rig.deliver_all(&fragments(&whole, 9, 1480));
    rig.round();
    assert_eq!((rig.count(Counter::forwarded), rig.reason(Reason::TxRingFull)), (4, 3));
    rig.running.rings.ports[1].limit_tx(None);
    rig.check_conservation();
}

#[test]
fn a_cut_without_free_frames_drops_the_datagram() {
    let mut rig = Rig::new();
    rig.publish_mtu(2, Some(NEXT_HOP_MAC), 1000);
    let kept: Vec<_> = (0..FRAMES - 2).map(|_| rig.running.rings.pool.pop().unwrap()).collect();
    rig.deliver_all(&[datagram("10.2.0.77", 1400)]);
    rig.round();
    assert_eq!((rig.sent().len(), rig.reason(Reason::FragmentLimit)), (0, 1));
    kept.into_iter().for_each(|frame| rig.running.rings.pool.push(frame));
    rig.check_conservation();
}

#[test]
fn an_answer_goes_out_once_and_every_fragment_ends() {
    let mut rig = Rig::new();
    let expired: Vec<_> = fragments(&datagram("10.2.0.77", 3000), 7, 1480)
        .into_iter()
        .map(|frame| with_word(frame, 8, 0x0111))
        .collect();
    rig.deliver_all(&expired);
    rig.round();
    assert!(rig.sent().is_empty());
    let answers: Vec<_> = std::iter::from_fn(|| rig.running.rings.ports[0].sent()).collect();
    assert_eq!((answers.len(), answers[0][L4]), (1, 11), "time exceeded");
    assert_eq!((rig.count(Counter::answered), rig.reason(Reason::TtlExceeded)), (1, 3));
    rig.check_conservation();
}

#[test]
fn fragments_for_the_kernel_are_handed_to_it_untouched() {
    let mut rig = Rig::new();
    let pieces = fragments(&datagram("192.0.2.1", 3000), 7, 1480);
    rig.deliver_all(&[pieces[2].clone(), pieces[0].clone(), pieces[1].clone()]);
    rig.round();
    for piece in &pieces {
        assert_eq!(rig.punted(), *piece);
    }
    assert_eq!(rig.count(Counter::punted), 3);
    rig.check_conservation();
}

#[test]
fn what_stays_incomplete_is_given_up_and_its_frames_come_back() {
    let mut rig = Rig::new();
    let pieces = fragments(&datagram("10.2.0.77", 3000), 7, 1480);
    rig.deliver_all(&pieces[1..]);
    rig.round();
    rig.now_ns += 29 * SECOND_NS;
    rig.round();
    assert_eq!(rig.running.gathering.len(), 2);
    rig.now_ns += SECOND_NS;
    rig.round();
    assert_eq!((rig.running.gathering.len(), rig.reason(Reason::FragmentTimeout)), (0, 2));
    rig.check_conservation();
    // As many datagrams as may wait, and more.
    for id in 0..100 {
        rig.deliver_all(&fragments(&datagram("10.2.0.77", 3000), id, 1480)[..1]);
    }
    while rig.round() > 0 {}
    assert_eq!((rig.running.gathering.len(), rig.reason(Reason::FragmentLimit)), (32, 68));
    assert_eq!(rig.running.rings.pool.len(), FRAMES - 32);
    rig.check_conservation();
}

/// RFC 6946: an atomic fragment is a packet of its own, whatever waits under its identification.
#[test]
fn an_atomic_fragment_does_not_mix_with_others() {
    let mut rig = Rig::new();
    let ipv6 = |word: u16, data: &[u8]| {
        let mut frame = Vec::new();
        let fragment = [&[17, 0][..], &word.to_be_bytes(), &[0, 0, 0, 9], data].concat();
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], mac(0))
            .ipv6(
                [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
                [0xfd, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x77],
                64,
            )
            .write(&mut frame, etherparse::IpNumber(44), &fragment)
            .unwrap();
        frame
    };
    let header = [0x10, 0x92, 0, 53, 0, 24, 0x12, 0x34];
    rig.deliver_all(&[
        ipv6(1, &[header, [1; 8]].concat()),
        ipv6(0, &[header, [2; 8]].concat()),
        ipv6(16, &[1; 8]),
    ]);
    rig.round();
    let sent = rig.sent();
    let offsets: Vec<_> = sent.iter().map(|frame| frame[57]).collect();
    assert_eq!(offsets, [0, 1, 16], "the atomic one at once, then the others");
    assert_eq!(sent[0][70], 2);
    rig.check_conservation();
}

#[test]
fn two_workers_bring_the_fragments_of_a_datagram_together() {
    let publisher = Publisher::new(2).unwrap();
    let exchange = Exchange::new(publisher.workers());
    let mut rigs = [0, 1].map(|index| Rig::of(publisher.clone(), exchange.clone(), index));
    let whole = datagram("10.2.0.77", 3000);
    for id in 0..100 {
        // The first fragment comes in by one queue, the others by the other one.
        let pieces = fragments(&whole, id, 1480);
        rigs[usize::from(id % 2)].deliver_all(&pieces[..1]);
        rigs[usize::from(1 - id % 2)].deliver_all(&pieces[1..]);
        for _ in 0..2 {
            rigs.iter_mut().for_each(|rig| _ = rig.round());
        }
        let sent: Vec<_> = rigs.iter_mut().flat_map(Rig::sent).collect();
        assert_eq!(joined(&sent), whole[L4..], "datagram {id}");
    }
    let complete = rigs.each_ref().map(|rig| rig.count(Counter::datagrams_complete));
    assert_eq!(complete[0] + complete[1], 100);
    assert!(complete.iter().all(|count| *count > 10), "{complete:?}: both gather");
    rigs.iter_mut().for_each(Rig::check_conservation);
    let total = |counter| rigs.iter().map(|rig| rig.count(counter)).sum::<u64>();
    assert_eq!(total(Counter::fragments_handed_over), total(Counter::fragments_taken_over));
    assert!(total(Counter::fragments_handed_over) > 100);
}

#[test]
fn a_worker_that_does_not_take_its_fragments_harms_no_other() {
    let publisher = Publisher::new(2).unwrap();
    let exchange = Exchange::new(publisher.workers());
    let mut rigs = [0, 1].map(|index| Rig::of(publisher.clone(), exchange.clone(), index));
    let whole = datagram("10.2.0.77", 3000);
    for id in 0..1000 {
        rigs[0].deliver_all(&fragments(&whole, id, 1480)[..1]);
        rigs[0].deliver("10.2.0.77");
        rigs[0].round();
    }
    assert_eq!(rigs[0].sent().len(), 1000);
    assert!(rigs[0].reason(Reason::FragmentLimit) > 100, "the inbox is full");
    rigs[0].check_conservation();
    while rigs[1].round() > 0 {}
    rigs[1].check_conservation();
    assert_eq!(rigs[1].count(Counter::fragments_taken_over), rigs[0].count(Counter::fragments_handed_over));
}
