//! What the map promises, one thread at a time; `agreement` compares it with a slow twin, `stress` runs threads, `restart` kills processes.

mod agreement;
mod restart;
mod stress;

use super::layout::Slot;
use super::*;

fn client(i: u32) -> Tuple {
    Tuple { src: Addr::v4(i), dst: Addr::v4(0x0a60_0001), src_port: 4242, dst_port: 80, protocol: 6 }
}

/// A flow whose service id is a digest of all that must never be mixed.
fn signed(original: Tuple, reply: Option<Tuple>, generation: u32) -> NewFlow {
    let flow = NewFlow { original, reply, generation, phase: 1, ..NewFlow::default() };
    NewFlow { service: signature(&original, reply.as_ref(), generation), ..flow }
}

fn signature(original: &Tuple, reply: Option<&Tuple>, generation: u32) -> u64 {
    let key = HashKey::new([11, 13]);
    let reply = reply.map_or(0, |reply| key.hash(&Packed::new(reply)));
    key.hash(&Packed::new(original)).rotate_left(17) ^ reply ^ u64::from(generation) << 24
}

fn assert_whole(flow: &FlowSnapshot) {
    let expected = signature(&flow.original, flow.reply.as_ref(), flow.generation);
    assert_eq!(flow.service, expected, "parts of different flows: {flow:?}");
}

/// The flow of client `i`, whose replies come from an endpoint of its own choice.
fn flow(i: u32) -> NewFlow {
    signed(
        client(i),
        Some(Tuple { src: Addr::v4(0x0af4_0000 | (i % 5)), src_port: 8080, ..client(i).reversed() }),
        3,
    )
}

fn flow_v6(i: u32) -> NewFlow {
    let original =
        Tuple { src: Addr::v6(0x2001 << 112 | u128::from(i)), dst: Addr::v6(0xfd << 120), ..client(i) };
    signed(original, Some(Tuple { src: Addr::v6(0xfd44 << 112 | u128::from(i)), ..original.reversed() }), 4)
}

fn config(capacity: u32) -> FlowMapConfig {
    FlowMapConfig { capacity, ..FlowMapConfig::default() }
}

fn find<'m>(map: &'m FlowMap, tuple: &Tuple) -> Option<Hit<'m>> {
    map.lookup(tuple, map.hash(tuple))
}

/// Every flow is reachable by both tuples and nothing else is in the index.
fn assert_consistent(map: &FlowMap) {
    let (mut flows, mut embryonic, mut entries) = (0, 0, 0);
    for flow in (0..map.capacity() as u32).filter_map(|index| map.snapshot(index)) {
        assert_whole(&flow);
        for (tuple, direction) in [(Some(flow.original), Direction::Original), (flow.reply, Direction::Reply)]
        {
            let Some(tuple) = tuple else { continue };
            let hit = find(map, &tuple).unwrap_or_else(|| panic!("{tuple} of {flow:?} is not in the index"));
            assert_eq!((hit.flow.id(), hit.direction), (flow.id, direction), "{tuple} leads elsewhere");
            entries += 1;
        }
        flows += 1;
        embryonic += usize::from(map.is_embryonic(flow.phase));
    }
    let slots = map.region.buckets().iter().flat_map(|bucket| &bucket.slots);
    let used = slots.filter(|slot| slot.load(Ordering::Relaxed) != 0).count();
    assert_eq!(used, entries, "slots that lead to no flow");
    assert_eq!((map.len(), map.embryonic_len()), (flows, embryonic), "counts");
}

#[test]
fn a_flow_is_found_in_both_directions() {
    let map = FlowMap::anonymous(config(64));
    let mut worker = map.worker(0);
    for new in [flow(1), flow_v6(1)] {
        let inserted = map.insert(&mut worker, &new, 100).unwrap();
        assert!(inserted.is_new);
        inserted.flow.set_next_hop(Direction::Reply, 9);
        let reply = new.reply.unwrap();
        let hit = find(&map, &new.original).unwrap();
        assert_eq!((hit.direction, hit.translated()), (Direction::Original, Some(reply.reversed())));
        let hit = find(&map, &reply).unwrap();
        assert_eq!((hit.direction, hit.translated()), (Direction::Reply, Some(new.original.reversed())));
        let flow = hit.flow;
        assert_eq!((flow.original(), flow.reply()), (new.original, new.reply));
        assert_eq!((flow.service(), flow.generation(), flow.created_s()), (new.service, new.generation, 100));
        assert_eq!((flow.next_hop(Direction::Original), flow.next_hop(Direction::Reply)), (0, 9));
        assert_eq!(flow.endpoint(), (reply.src, reply.src_port));
        assert!(!map.is_free(&reply) && !map.is_free(&new.original));
        assert!(map.is_free(&reply.reversed()));
    }
    assert_eq!(map.len(), 2);
    assert_consistent(&map);
    for new in [flow(1), flow_v6(1)] {
        let id = find(&map, &new.original).unwrap().flow.id();
        map.remove(&mut worker, id);
        map.remove(&mut worker, id);
        assert!(map.is_free(&new.original) && map.is_free(&new.reply.unwrap()));
    }
    assert!(map.is_empty());
    assert_consistent(&map);
}

/// Whatever ends a flow, it is counted while it lives and no longer.
#[test]
fn tallies_count_live_flows() {
    let map = FlowMap::anonymous(FlowMapConfig { tallies: 8, ..config(64) });
    let mut worker = map.worker(0);
    let tallied = |i: u32, tally| NewFlow { tally, ..if i.is_multiple_of(2) { flow(i) } else { flow_v6(i) } };
    let counts = || [1, 2, 7].map(|tally| map.tally(tally));
    let ids: Vec<_> = (0..12)
        .map(|i| map.insert(&mut worker, &tallied(i, [1, 2, 7][i as usize % 3]), 100).unwrap().flow.id())
        .collect();
    assert_eq!(counts(), [4, 4, 4]);
    // The same flow again counts once; a flow that finds its reply taken does not count.
    assert!(!map.insert(&mut worker, &tallied(0, 1), 100).unwrap().is_new);
    let clash = NewFlow { original: client(99), ..tallied(0, 1) };
    assert_eq!(map.insert(&mut worker, &clash, 100).unwrap_err(), InsertError::ReplyTaken);
    assert_eq!(counts(), [4, 4, 4]);
    map.remove(&mut worker, ids[0]);
    map.remove(&mut worker, ids[0]);
    assert!(map.remove_from_control(ids[1]) && !map.remove_from_control(ids[1]));
    assert_eq!(counts(), [3, 3, 4]);
    map.age(&mut worker, 100, 64);
    map.quiescent(&mut worker);
    assert_eq!(counts(), [3, 3, 4], "one that control removed counts once");
    map.assign_tally(ids[2], 1);
    map.assign_tally(ids[0], 1);
    assert_eq!(counts(), [4, 3, 3]);
    while !map.is_empty() {
        map.age(&mut worker, 1_000, 64);
        map.quiescent(&mut worker);
    }
    assert_eq!(counts(), [0, 0, 0]);
    // A number beyond those that there are counts nowhere.
    map.insert(&mut worker, &tallied(1, 9), 100).unwrap();
    assert_eq!((map.tally(9), map.tally(0)), (0, 0));
}

#[test]
fn a_full_map_says_so() {
    let map = FlowMap::anonymous(FlowMapConfig { embryonic_share: 50, ..config(8) });
    let mut worker = map.worker(0);
    let embryonic = |i| NewFlow { phase: 0, ..flow(i) };
    for i in 0..4 {
        assert!(map.has_room(0));
        map.insert(&mut worker, &embryonic(i), 1).unwrap();
    }
    assert!(!map.has_room(0) && map.has_room(1));
    for i in 4..8 {
        map.insert(&mut worker, &flow(i), 1).unwrap();
    }
    assert!(!map.has_room(0) && !map.has_room(1));
    assert_eq!(map.insert(&mut worker, &flow(8), 1).unwrap_err(), InsertError::Full);
    assert_eq!(map.insert(&mut worker, &embryonic(8), 1).unwrap_err(), InsertError::Full);
    // What is there is found in a full map too.
    assert!(!map.insert(&mut worker, &flow(7), 1).unwrap().is_new);
    assert_eq!((map.len(), map.embryonic_len()), (8, 4));
}

#[test]
fn phases_change_from_elsewhere() {
    let map = FlowMap::anonymous(config(64));
    let mut worker = map.worker(0);
    let id = map.insert(&mut worker, &NewFlow { phase: 0, ..flow(1) }, 1).unwrap().flow.id();
    assert!(map.set_phase_from_control(id, 9));
    let flow = find(&map, &client(1)).unwrap().flow;
    // A worker that saw the flow in phase 0 does not undo it.
    flow.change_phase(0, 1);
    assert_eq!((flow.phase(), map.embryonic_len()), (9, 0));
    flow.change_phase(9, 1);
    assert_eq!(flow.phase(), 1);
    map.remove(&mut worker, id);
    assert!(!map.set_phase_from_control(id, 9));
    assert_eq!(map.embryonic_len(), 0);
}

#[test]
fn a_one_way_entry_holds_an_endpoint() {
    let map = FlowMap::anonymous(config(64));
    let mut worker = map.worker(0);
    for (client, endpoint) in [
        (Addr::v4(1), Addr::v4(2)),
        (Addr::v6(1), Addr::v6(2)),
        // A key of the caller's with an unspecified address of the other family.
        (Addr::v4(7), Addr::v6(9)),
    ] {
        let original = Tuple { src: client, dst: Addr::v4(5), src_port: 0, dst_port: 443, protocol: 6 };
        let new =
            NewFlow { endpoint_addr: endpoint, endpoint_port: 8443, timeout_s: 10_800, ..NewFlow::default() };
        let new = NewFlow { service: signature(&original, None, 0), original, ..new };
        map.insert(&mut worker, &new, 1).unwrap();
        let hit = find(&map, &original).unwrap();
        assert_eq!((hit.flow.endpoint(), hit.flow.reply(), hit.translated()), ((endpoint, 8443), None, None));
        assert_eq!(hit.flow.timeout_s(), 10_800);
    }
    assert_consistent(&map);
}

#[test]
fn an_original_tuple_that_is_there_is_returned() {
    let map = FlowMap::anonymous(config(64));
    let mut worker = map.worker(0);
    let first = map.insert(&mut worker, &flow(1), 1).unwrap().flow.id();
    let other = NewFlow { reply: flow(2).reply, ..flow(1) };
    let second = map.insert(&mut worker, &other, 2).unwrap();
    assert_eq!((second.flow.id(), second.is_new, second.direction), (first, false, Direction::Original));
    // The original tuple of a new flow may be the reply tuple of another one.
    let backwards = NewFlow { original: flow(1).reply.unwrap(), reply: flow(9).reply, ..flow(1) };
    let third = map.insert(&mut worker, &backwards, 2).unwrap();
    assert_eq!((third.flow.id(), third.is_new, third.direction), (first, false, Direction::Reply));
    assert_consistent(&map);
}

#[test]
fn a_reply_tuple_belongs_to_one_flow() {
    let map = FlowMap::anonymous(config(64));
    let mut worker = map.worker(0);
    map.insert(&mut worker, &flow(1), 1).unwrap();
    let clash = NewFlow { reply: flow(1).reply, ..flow(2) };
    assert_eq!(map.insert(&mut worker, &clash, 1).unwrap_err(), InsertError::ReplyTaken);
    let clash = NewFlow { reply: Some(client(1)), ..flow(2) };
    assert_eq!(map.insert(&mut worker, &clash, 1).unwrap_err(), InsertError::ReplyTaken);
    let palindrome = NewFlow { reply: Some(client(3)), ..flow(3) };
    assert_eq!(map.insert(&mut worker, &palindrome, 1).unwrap_err(), InsertError::ReplyTaken);
    assert_eq!(map.len(), 1);
    assert_consistent(&map);
}

#[test]
fn a_full_map_refuses_and_takes_again_what_was_freed() {
    let map = FlowMap::anonymous(config(1000));
    let mut worker = map.worker(0);
    for i in 0..1000 {
        map.insert(&mut worker, &flow(i), 1).unwrap();
    }
    assert_eq!(map.insert(&mut worker, &flow(1000), 1).unwrap_err(), InsertError::Full);
    assert_eq!(map.len(), 1000);
    assert_consistent(&map);
    let id = find(&map, &client(500)).unwrap().flow.id();
    map.remove(&mut worker, id);
    assert_eq!(map.insert(&mut worker, &flow(1000), 1).unwrap_err(), InsertError::Full, "not quiescent yet");
    map.quiescent(&mut worker);
    let again = map.insert(&mut worker, &flow(1000), 1).unwrap();
    assert_eq!(again.flow.id().index(), id.index());
    assert_ne!(again.flow.id(), id);
    map.remove(&mut worker, id);
    assert!(!map.remove_from_control(id), "an old name must not end a new flow");
    assert!(find(&map, &client(1000)).is_some());
    assert_consistent(&map);
}

#[test]
fn embryonic_flows_have_a_share_of_their_own() {
    let map = FlowMap::anonymous(FlowMapConfig { embryonic_phases: 0b101, ..config(100) });
    let mut worker = map.worker(0);
    let embryonic = |i| NewFlow { phase: if i % 2 == 0 { 0 } else { 2 }, ..flow(i) };
    for i in 0..25 {
        map.insert(&mut worker, &embryonic(i), 1).unwrap();
    }
    assert_eq!(map.insert(&mut worker, &embryonic(25), 1).unwrap_err(), InsertError::EmbryonicFull);
    map.insert(&mut worker, &flow(26), 1).unwrap();
    assert_eq!((map.len(), map.embryonic_len(), map.embryonic_capacity()), (26, 25, 25));
    let grown = find(&map, &client(7)).unwrap().flow;
    grown.set_phase(1);
    grown.set_phase(1);
    assert_eq!(map.embryonic_len(), 24);
    map.insert(&mut worker, &embryonic(25), 1).unwrap();
    assert!(map.remove_from_control(find(&map, &client(3)).unwrap().flow.id()));
    assert_eq!((map.len(), map.embryonic_len()), (26, 24));
    assert_consistent_after_ageing(&map, &mut worker);
    map.remove(&mut worker, grown.id());
    grown.set_phase(0);
    assert_eq!(map.embryonic_len(), 24, "a flow that is gone counts no more");
}

/// Control threads leave slots behind until a worker comes by.
fn assert_consistent_after_ageing(map: &FlowMap, worker: &mut FlowWorker) {
    for _ in 0..map.capacity().div_ceil(64) * 2 {
        map.age(worker, 1, 64);
        map.quiescent(worker);
    }
    assert_consistent(map);
}

#[test]
fn a_flow_lives_for_its_timeout_and_at_most_a_second_longer() {
    let mut timeouts_s = [100; 16];
    timeouts_s[2] = 10;
    let map = FlowMap::anonymous(FlowMapConfig { timeouts_s, ..config(64) });
    let mut worker = map.worker(0);
    for start in [1_000, u32::MAX - 5] {
        let at = |s: u32| start.wrapping_add(s);
        map.insert(&mut worker, &flow(1), at(0)).unwrap();
        map.insert(&mut worker, &NewFlow { phase: 2, ..flow(2) }, at(0)).unwrap();
        map.insert(&mut worker, &NewFlow { timeout_s: 30, ..flow(3) }, at(0)).unwrap();
        let mut gone_at = |s: u32| map.age(&mut worker, at(s), 64);
        assert_eq!(gone_at(10), 0);
        assert_eq!(gone_at(11), 1);
        assert!(find(&map, &client(2)).is_none());
        assert_eq!(gone_at(30), 0);
        find(&map, &client(3)).unwrap().flow.touch(at(30));
        assert_eq!(gone_at(60), 0);
        assert_eq!(gone_at(61), 1);
        find(&map, &client(1)).unwrap().flow.touch(at(50));
        assert_eq!(find(&map, &client(1)).unwrap().flow.last_seen_s(), at(50));
        find(&map, &client(1)).unwrap().flow.touch(at(40));
        assert_eq!(find(&map, &client(1)).unwrap().flow.last_seen_s(), at(50), "time does not go back");
        assert_eq!(gone_at(150), 0);
        assert_eq!(gone_at(151), 1);
        assert!(map.is_empty());
        map.quiescent(&mut worker);
    }
}

#[test]
fn a_flow_of_an_earlier_boot_gets_a_full_timeout() {
    let map = FlowMap::anonymous(FlowMapConfig { timeouts_s: [100; 16], ..config(64) });
    let mut worker = map.worker(0);
    map.insert(&mut worker, &flow(1), 1_000_000).unwrap();
    assert_eq!(map.age(&mut worker, 50, 64), 0);
    assert_eq!(map.age(&mut worker, 150, 64), 0);
    assert_eq!(map.age(&mut worker, 151, 64), 1);
}

#[test]
fn ageing_is_bounded_however_much_expires_at_once() {
    let map = FlowMap::anonymous(FlowMapConfig { workers: 2, ..config(20_000) });
    let mut workers = [map.worker(0), map.worker(1)];
    for i in 0..19_000 {
        map.insert(&mut workers[i as usize % 2], &flow(i), 1).unwrap();
    }
    let (mut removed, mut calls) = (0, 0);
    while !map.is_empty() {
        for worker in &mut workers {
            let now = map.age(worker, 1_000, 64);
            assert!(now <= 64);
            removed += now;
            map.quiescent(worker);
        }
        calls += 1;
        assert!(calls < 1_000, "{} flows never expire", map.len());
    }
    assert_eq!(removed, 19_000);
    assert_consistent(&map);
    // Empty stretches are skipped.
    let before = workers[0].keeping().cursor;
    map.age(&mut workers[0], 1_000, 10);
    assert!(workers[0].keeping().cursor.abs_diff(before) >= 512);
}

#[test]
fn nothing_is_lost_while_another_worker_holds_up_reuse() {
    let map = FlowMap::anonymous(FlowMapConfig { workers: 2, ..config(20_000) });
    let (mut worker, sleeper) = (map.worker(0), map.worker(1));
    let mut ids = Vec::new();
    for i in 0..9_000 {
        ids.push(map.insert(&mut worker, &flow(i), 1).unwrap().flow.id());
    }
    for id in ids {
        map.remove(&mut worker, id);
        map.quiescent(&mut worker);
    }
    assert!(map.is_empty());
    drop(sleeper);
    for _ in 0..20_000 / 64 * 4 {
        map.age(&mut worker, 1, 64);
        map.quiescent(&mut worker);
    }
    assert_consistent(&map);
    // All records are free again, but for those that worker 1 never took.
    for i in 0..20_000 {
        map.insert(&mut worker, &flow(i), 1).unwrap();
    }
}

/// Two flows crafted to share hash and tag are never mixed (a sender that knew the key could make them).
#[test]
fn colliding_flows_are_told_apart() {
    // With this key the address word of 198.51.100.7 > 203.0.113.10 makes every product zero, so all ports collide.
    let (src, dst) = (0xc633_6407u32, 0xcb00_710au32);
    let mut map = FlowMap::anonymous(config(1 << 12));
    map.key = HashKey::new([u64::from(src) << 32 | u64::from(dst), 5]);
    let original =
        |port| Tuple { src: Addr::v4(src), dst: Addr::v4(dst), src_port: port, dst_port: 80, protocol: 17 };
    let new = |port| {
        let reply = Tuple { src: Addr::v4(0x0af4_0001), src_port: 53, ..original(port).reversed() };
        signed(original(port), Some(reply), 1)
    };
    let mut worker = map.worker(0);
    assert_eq!(map.hash(&original(1)), map.hash(&original(2)));
    for pair in 0..1_000u16 {
        let (a, b) = (2 * pair + 1, 2 * pair + 2);
        let first = map.insert(&mut worker, &new(a), 1).unwrap().flow.id();
        assert!(find(&map, &original(b)).is_none());
        let second = map.insert(&mut worker, &new(b), 1).unwrap().flow.id();
        assert_ne!(first, second);
        assert_eq!(find(&map, &original(a)).unwrap().flow.id(), first);
        assert_eq!(find(&map, &original(b)).unwrap().flow.id(), second);
        if pair % 100 == 0 {
            assert_consistent(&map);
        }
        map.remove(&mut worker, first);
        assert!(find(&map, &original(a)).is_none());
        assert_eq!(find(&map, &original(b)).unwrap().flow.original(), original(b));
        map.remove(&mut worker, second);
        map.quiescent(&mut worker);
    }
    // Two buckets hold sixteen of them, then the table says that it is full for this hash.
    for port in 1..=16 {
        map.insert(&mut worker, &new(port), 1).unwrap();
    }
    assert_eq!(map.insert(&mut worker, &new(17), 1).unwrap_err(), InsertError::Full);
    assert_consistent(&map);
}

#[test]
fn keys_differ_and_are_never_shown() {
    let (one, two) = (FlowMap::anonymous(config(64)), FlowMap::anonymous(config(64)));
    assert_ne!(one.hash(&client(1)), two.hash(&client(1)));
    assert!(!format!("{one:?}").contains("key"));
}

#[test]
fn a_connection_costs_what_performance_promises() {
    let per_connection = |extended: usize| {
        let sizes = Sizes::for_capacity(1 << 20);
        let all = sizes.len() - if extended == 0 { size_of::<layout::Extension>() << 20 } else { 0 };
        all as f64 / f64::from(1 << 20)
    };
    assert!(per_connection(0) <= 128.0, "IPv4: {} bytes", per_connection(0));
    assert!(per_connection(1) <= 256.0, "IPv6: {} bytes", per_connection(1));
}

#[test]
fn wrong_configurations_name_the_field() {
    let name = |config: FlowMapConfig| match check(&config) {
        Err(FlowMapError::Config { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(name(config(0)), "capacity");
    assert_eq!(name(FlowMapConfig { embryonic_share: 101, ..config(9) }), "embryonic_share");
    assert_eq!(name(FlowMapConfig { tallies: (1 << 20) + 1, ..config(9) }), "tallies");
    assert_eq!(name(FlowMapConfig { workers: 0, ..config(9) }), "workers");
    assert_eq!(name(FlowMapConfig { timeouts_s: [0; 16], ..config(9) }), "timeouts_s");
}

#[test]
#[should_panic(expected = "worker 0 of the flow map is taken")]
fn a_worker_is_one_thread() {
    let map = FlowMap::anonymous(config(64));
    let _first = map.worker(0);
    let _second = map.worker(0);
}

#[test]
fn a_slot_says_where_it_leads() {
    let slot = Slot::new(0x1234_5678_9abc_def0, Direction::Reply, true, 77);
    assert_eq!((slot.record(), slot.direction(), slot.is_extended()), (77, Direction::Reply, true));
    assert_eq!(slot.0 & Slot::MATCH, Slot::wanted(0x1234_5678_9abc_def0));
}
