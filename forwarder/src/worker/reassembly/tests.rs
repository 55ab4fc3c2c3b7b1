//! The reassembly against a slow model: every byte in a map, every datagram in a list by age.

use std::collections::BTreeMap;

use af_xdp::{FramePool, Umem};
use proptest::prelude::*;

use super::*;
use crate::addr::Tuple;

const FRAMES: usize = 512;
const GENEROUS: Limits =
    Limits { frames: 300, datagrams: 16, ipv4_ns: 30 * SECOND_NS, ipv6_ns: 60 * SECOND_NS };

/// A fragment as it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    /// Which datagram; those with odd numbers are IPv6.
    datagram: u8,
    offset: u16,
    more: bool,
    data: Vec<u8>,
    /// Bytes of data in the first frame; the rest is in further ones of 8 bytes.
    head: usize,
}

impl Sent {
    fn new(datagram: u8, offset: u16, more: bool, data: &[u8]) -> Sent {
        Sent { datagram, offset, more, data: data.to_vec(), head: data.len() }
    }

    fn is_v4(&self) -> bool {
        self.datagram.is_multiple_of(2)
    }

    /// Bytes of Ethernet and IP headers.
    fn headers(&self) -> usize {
        14 + if self.is_v4() { 20 } else { 48 }
    }

    fn end(&self) -> usize {
        usize::from(self.offset) + self.data.len()
    }

    fn frames(&self) -> usize {
        1 + self.data.len().saturating_sub(self.head).div_ceil(8)
    }

    fn is_malformed(&self) -> bool {
        let most = if self.is_v4() { 65_535 - 20 } else { 65_535 };
        self.data.is_empty() || self.more && !self.data.len().is_multiple_of(8) || self.end() > most
    }

    /// As the parse stage leaves it.
    fn packet(&self, pool: &mut FramePool) -> (Packet, Vec<Frame>) {
        let (head, rest) = self.data.split_at(self.head.min(self.data.len()));
        let frame = pool.frame_from(&[&vec![0; self.headers()][..], head].concat()).unwrap();
        let tails: Vec<_> = rest.chunks(8).map(|part| pool.frame_from(part).unwrap()).collect();
        let mut packet = Packet::new(frame, rest.len() as u32, 3);
        let number = u32::from(self.datagram);
        let src = if self.is_v4() { Addr::v4(number) } else { Addr::v6(u128::from(number) << 64) };
        packet.tuple = Tuple { src, protocol: 17, ..Tuple::default() };
        (packet.l3, packet.l4) = (14, self.headers() as u16);
        packet.ip_len = (self.headers() - 14 + self.data.len()) as u16;
        let data = packet.l4;
        packet.part = Part::Fragment(Fragment { id: 7, offset: self.offset, more: self.more, data });
        (packet, tails)
    }
}

/// What became of fragments.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// Data of each fragment of a datagram that is complete.
    Complete(Vec<Vec<u8>>),
    /// Data of a fragment that was given up.
    Dropped(Reason, Vec<u8>),
}

/// The reassembly under test.
struct Rig {
    pool: FramePool,
    reassembly: Reassembly,
}

impl Rig {
    fn new(limits: Limits) -> Rig {
        let pool = Umem::anonymous(FRAMES as u32, 2048).take_frames().unwrap();
        Rig { pool, reassembly: Reassembly::new(limits) }
    }

    /// Expires what is due, then takes a fragment.
    fn feed(&mut self, sent: &Sent, now_ns: u64) -> Vec<Event> {
        let (packet, tails) = sent.packet(&mut self.pool);
        let mut gone = Vec::new();
        let mut give_up =
            |reason, packet: Packet, tails: Vec<Frame>| gone.push((reason, packet.frame, tails));
        self.reassembly.expire(now_ns, &mut give_up);
        self.reassembly.add(packet, tails.into_iter(), now_ns, &mut give_up);
        let mut events = Vec::new();
        for (reason, frame, tails) in gone {
            // Headers are zero, data never is.
            let bytes = std::iter::once(&frame).chain(&tails).flat_map(|frame| frame.data()).copied();
            events.push(Event::Dropped(reason, bytes.filter(|byte| *byte != 0).collect()));
            self.pool.push(frame);
            tails.into_iter().for_each(|tail| self.pool.push(tail));
        }
        let mut batch = Batch::default();
        while self.reassembly.take_complete(&mut batch) > 0 {
            events.extend(self.completed(&mut batch));
        }
        events
    }

    /// Takes the datagrams out of a batch, and checks what their first fragments say.
    fn completed(&mut self, batch: &mut Batch) -> Vec<Event> {
        let mut datagrams: Vec<Vec<Vec<u8>>> = Vec::new();
        let mut facts = Vec::new();
        let mut tails = batch.tails.drain(..);
        for (packet, count) in batch.packets.drain(..).zip(batch.tail_counts.drain(..)) {
            let mut data: Vec<u8> = packet.frame.data().iter().copied().filter(|byte| *byte != 0).collect();
            let mut tail_len = 0;
            for tail in tails.by_ref().take(usize::from(count)) {
                data.extend_from_slice(tail.data());
                tail_len += tail.len();
                self.pool.push(tail);
            }
            assert_eq!((packet.port, packet.tail_len as usize), (3, tail_len));
            if let Part::First(datagram) = packet.part {
                facts.push(datagram);
                datagrams.push(Vec::new());
            } else {
                assert_eq!(packet.part, Part::Later);
            }
            datagrams.last_mut().expect("a first fragment comes first").push(data);
            self.pool.push(packet.frame);
        }
        for (datagram, facts) in datagrams.iter().zip(facts) {
            let later_len: usize = datagram[1..].iter().map(Vec::len).sum();
            assert_eq!((facts.fragments as usize, facts.later_len as usize), (datagram.len(), later_len));
        }
        datagrams.into_iter().map(Event::Complete).collect()
    }
}

/// The slow twin.
struct Model {
    limits: Limits,
    /// Oldest first.
    waiting: Vec<(u64, Vec<Sent>)>,
}

impl Model {
    fn feed(&mut self, sent: &Sent, now_ns: u64) -> Vec<Event> {
        let mut events = Vec::new();
        // The families have their own order of expiry: IPv4 first.
        for (v4, patience_ns) in [(true, self.limits.ipv4_ns), (false, self.limits.ipv6_ns)] {
            let due =
                |(since, pieces): &(u64, Vec<Sent>)| pieces[0].is_v4() == v4 && since + patience_ns <= now_ns;
            while let Some(at) = self.waiting.iter().position(due) {
                self.discard(at, Reason::FragmentTimeout, &mut events);
            }
        }
        let known = self.waiting.iter().position(|(_, pieces)| pieces[0].datagram == sent.datagram);
        if let Some(reason) = self.refuses(known, sent) {
            if let Some(at) = known.filter(|_| reason != Reason::FragmentDuplicate) {
                self.discard(at, reason, &mut events);
            }
            events.push(Event::Dropped(reason, sent.data.clone()));
            return events;
        }
        let frames = |waiting: &[(u64, Vec<Sent>)]| -> usize {
            waiting.iter().flat_map(|(_, pieces)| pieces).map(Sent::frames).sum()
        };
        while frames(&self.waiting) + sent.frames() > self.limits.frames {
            if self.waiting.is_empty() {
                events.push(Event::Dropped(Reason::FragmentLimit, sent.data.clone()));
                return events;
            }
            self.discard(0, Reason::FragmentLimit, &mut events);
        }
        let known = self.waiting.iter().position(|(_, pieces)| pieces[0].datagram == sent.datagram);
        let at = known.unwrap_or_else(|| {
            if self.waiting.len() == self.limits.datagrams {
                self.discard(0, Reason::FragmentLimit, &mut events);
            }
            self.waiting.push((now_ns, Vec::new()));
            self.waiting.len() - 1
        });
        self.waiting[at].1.push(sent.clone());
        let bytes = Model::bytes(&self.waiting[at].1);
        let end = self.waiting[at].1.iter().find(|piece| !piece.more).map(Sent::end);
        if end == Some(bytes.len()) {
            let (_, mut pieces) = self.waiting.remove(at);
            pieces.sort_by_key(|piece| piece.offset);
            events.push(Event::Complete(pieces.into_iter().map(|piece| piece.data).collect()));
        }
        events
    }

    /// Every byte of a datagram that is here.
    fn bytes(pieces: &[Sent]) -> BTreeMap<usize, u8> {
        let place = |piece: &Sent| (usize::from(piece.offset)..).zip(piece.data.clone()).collect::<Vec<_>>();
        pieces.iter().flat_map(place).collect()
    }

    fn refuses(&self, known: Option<usize>, sent: &Sent) -> Option<Reason> {
        if sent.is_malformed() {
            return Some(Reason::FragmentMalformed);
        }
        let pieces = &self.waiting[known?].1;
        let bytes = Model::bytes(pieces);
        let beyond = match pieces.iter().find(|piece| !piece.more).map(Sent::end) {
            Some(end) => sent.end() > end || !sent.more && sent.end() != end,
            None => !sent.more && bytes.keys().any(|at| *at >= sent.end()),
        };
        let there: Vec<Option<&u8>> =
            (usize::from(sent.offset)..sent.end()).map(|at| bytes.get(&at)).collect();
        match there {
            _ if beyond => Some(Reason::FragmentOverlap),
            _ if pieces.len() == BURST => Some(Reason::FragmentLimit),
            there if there.iter().all(Option::is_none) => None,
            there if there.iter().copied().eq(sent.data.iter().map(Some)) => Some(Reason::FragmentDuplicate),
            _ => Some(Reason::FragmentOverlap),
        }
    }

    fn discard(&mut self, at: usize, reason: Reason, events: &mut Vec<Event>) {
        let (_, mut pieces) = self.waiting.remove(at);
        pieces.sort_by_key(|piece| piece.offset);
        events.extend(pieces.into_iter().map(|piece| Event::Dropped(reason, piece.data)));
    }
}

/// The bytes that a well-behaved sender has at this place of a datagram; never zero.
fn data(from: usize, to: usize) -> Vec<u8> {
    (from..to).map(|at| (at % 251 + 1) as u8).collect()
}

/// Mostly pieces of datagrams that fit together, sometimes other bytes, lengths and ends.
fn any_fragment() -> impl Strategy<Value = Sent> {
    let datagram = 0..5u8;
    let length = prop_oneof![8 => Just(8usize), 3 => Just(16), 1 => Just(24), 1 => 0..20usize];
    let offset = prop_oneof![20 => 0..6u16, 1 => Just(8189)];
    let last = prop_oneof![6 => Just(None), 1 => any::<bool>().prop_map(Some)];
    let change = prop_oneof![12 => Just(0u8), 1 => Just(100)];
    (datagram, offset, length, last, change, 0..20usize).prop_map(
        |(datagram, offset, length, last, change, head)| {
            let offset = offset * 8;
            let mut bytes = data(offset.into(), usize::from(offset) + length);
            bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(change).max(1));
            // A datagram has 48 bytes, unless `last` lies.
            let more = !last.unwrap_or(usize::from(offset) + length == 48);
            Sent { datagram, offset, more, data: bytes, head }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_model(
        sent in prop::collection::vec((any_fragment(), prop_oneof![20 => Just(1u64), 1 => 0..40 * SECOND_NS]), 1..80),
        frames in 1..24usize,
        datagrams in 1..5usize,
    ) {
        let limits = Limits { frames, datagrams, ..GENEROUS };
        let mut rig = Rig::new(limits);
        let mut model = Model { limits, waiting: Vec::new() };
        let mut now_ns = 0;
        for (number, (sent, pause_ns)) in sent.iter().enumerate() {
            now_ns += pause_ns;
            let expected = model.feed(sent, now_ns);
            prop_assert_eq!(rig.feed(sent, now_ns), expected, "fragment {}: {:?}", number, sent);
            let waiting: usize = model.waiting.iter().map(|(_, pieces)| pieces.len()).sum();
            prop_assert_eq!(rig.reassembly.len(), waiting);
            prop_assert_eq!(rig.pool.len() + rig.reassembly.frames(), FRAMES);
        }
    }
}

/// Four fragments of 16 bytes.
fn four(datagram: u8) -> Vec<Sent> {
    (0..4)
        .map(|n| Sent::new(datagram, n * 16, n < 3, &data(usize::from(n) * 16, usize::from(n) * 16 + 16)))
        .collect()
}

#[test]
fn any_order_of_four_fragments_comes_out_in_order() {
    let mut orders = 0;
    for number in 0..256 {
        let order: Vec<usize> = (0..4).map(|digit| number >> (2 * digit) & 3).collect();
        if (0..4).any(|n| !order.contains(&n)) {
            continue;
        }
        orders += 1;
        for datagram in [0, 1] {
            let (mut rig, sent) = (Rig::new(GENEROUS), four(datagram));
            for n in &order[..3] {
                assert_eq!(rig.feed(&sent[*n], 0), []);
            }
            let expected = Event::Complete(sent.iter().map(|sent| sent.data.clone()).collect());
            assert_eq!(rig.feed(&sent[order[3]], 0), [expected]);
            assert_eq!((rig.reassembly.len(), rig.pool.len()), (0, FRAMES));
        }
    }
    assert_eq!(orders, 24);
}

#[test]
fn as_many_fragments_as_a_burst_holds_and_no_more() {
    for (count, complete) in [(BURST as u16, true), (BURST as u16 + 1, false)] {
        let mut rig = Rig::new(GENEROUS);
        let mut events = Vec::new();
        for n in 0..count {
            let at = usize::from(n) * 8;
            events.extend(rig.feed(&Sent::new(0, n * 8, n + 1 < count, &data(at, at + 8)), 0));
        }
        let was_complete = matches!(&events[..], [Event::Complete(pieces)] if pieces.len() == BURST);
        assert_eq!(was_complete, complete, "{count} fragments: {events:?}");
        if !complete {
            let limit = |event: &Event| matches!(event, Event::Dropped(Reason::FragmentLimit, _));
            assert!(events.len() == usize::from(count) && events.iter().all(limit));
        }
    }
}

#[test]
fn a_burst_of_complete_datagrams_needs_no_room_of_others() {
    let mut rig = Rig::new(Limits { frames: 2, datagrams: 1, ..GENEROUS });
    let mut batch = Batch::default();
    let mut give_up = |reason, _, _| panic!("{reason:?}");
    for _ in 0..BURST / 2 {
        for sent in [Sent::new(0, 0, true, &data(0, 8)), Sent::new(0, 8, false, &data(8, 16))] {
            let (packet, tails) = sent.packet(&mut rig.pool);
            rig.reassembly.add(packet, tails.into_iter(), 0, &mut give_up);
        }
    }
    assert_eq!((rig.reassembly.len(), rig.reassembly.take_complete(&mut batch)), (0, BURST / 2));
    assert_eq!((rig.completed(&mut batch).len(), rig.pool.len()), (BURST / 2, FRAMES));
}

#[test]
fn a_flood_of_first_fragments_leaves_the_memory_where_it_is() {
    let limits = Limits { frames: 300, datagrams: 16, ..GENEROUS };
    let mut rig = Rig::new(limits);
    let before = (rig.reassembly.by_key.capacity(), rig.reassembly.slots.capacity());
    for number in 0..100_000u32 {
        let (mut packet, tails) = Sent::new(0, 0, true, &data(0, 8)).packet(&mut rig.pool);
        packet.tuple.dst = Addr::v4(number);
        let pool = &mut rig.pool;
        let mut give_up = |reason, packet: Packet, _| {
            assert_eq!(reason, Reason::FragmentLimit);
            pool.push(packet.frame);
        };
        rig.reassembly.add(packet, tails.into_iter(), u64::from(number), &mut give_up);
        assert!(rig.reassembly.len() <= 16);
    }
    assert_eq!((rig.reassembly.by_key.capacity(), rig.reassembly.slots.capacity()), before);
    let pool = &mut rig.pool;
    rig.reassembly.expire(u64::MAX, &mut |_, packet, _| pool.push(packet.frame));
    assert_eq!((rig.reassembly.len(), rig.pool.len()), (0, FRAMES));
}
