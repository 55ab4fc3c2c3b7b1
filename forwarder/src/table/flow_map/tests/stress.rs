//! Threads that insert, find, remove, age and dump at once.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize};

use super::*;

/// A cheap generator of test choices (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) * u64::from(sides)) >> 32) as u32
    }
}

#[test]
fn threads_never_mix_flows() {
    const WORKERS: usize = 4;
    const ROUNDS: u32 = 40_000;
    let map = FlowMap::anonymous(FlowMapConfig { workers: WORKERS, timeouts_s: [3; 16], ..config(512) });
    let (running, clock) = (AtomicUsize::new(WORKERS), AtomicU32::new(1_000));
    // Few clients and fewer replies, so that threads meet on tuples all the time.
    let new = |client_index: u32, reply_index: u32, v6: bool, generation: u32| {
        let flow = if v6 { flow_v6 } else { flow };
        signed(flow(client_index).original, flow(reply_index).reply, generation)
    };
    std::thread::scope(|scope| {
        for index in 0..WORKERS {
            let (map, running, clock) = (&map, &running, &clock);
            scope.spawn(move || {
                let mut worker = map.worker(index);
                let mut dice = Dice(0x9e37_79b9_7f4a_7c15 + index as u64);
                for round in 0..ROUNDS {
                    let now_s = clock.load(Ordering::Relaxed);
                    let (v6, client) = (dice.roll(3) == 0, dice.roll(60));
                    let wanted = new(client, dice.roll(60), v6, round);
                    match dice.roll(8) {
                        0..3 => {
                            if let Ok(inserted) = map.insert(&mut worker, &wanted, now_s) {
                                let flow = inserted.flow;
                                let expected =
                                    signature(&flow.original(), flow.reply().as_ref(), flow.generation());
                                assert_eq!(flow.service(), expected);
                                assert_eq!(flow.original(), wanted.original);
                            }
                        }
                        3..6 => {
                            let tuple =
                                if dice.roll(2) == 0 { wanted.original } else { wanted.reply.unwrap() };
                            if let Some(hit) = find(map, &tuple) {
                                // Held over some time, as in a burst.
                                let flow = hit.flow;
                                flow.touch(now_s);
                                let expected =
                                    signature(&flow.original(), flow.reply().as_ref(), flow.generation());
                                assert_eq!(flow.service(), expected);
                                let own = if hit.direction == Direction::Original {
                                    Some(flow.original())
                                } else {
                                    flow.reply()
                                };
                                assert_eq!(own, Some(tuple));
                            }
                        }
                        6 => {
                            if let Some(hit) = find(map, &wanted.original) {
                                map.remove(&mut worker, hit.flow.id());
                            }
                        }
                        _ => {
                            map.age(&mut worker, now_s, 32);
                        }
                    }
                    if dice.roll(4) == 0 {
                        map.quiescent(&mut worker);
                    }
                    if dice.roll(500) == 0 {
                        map.offline(&mut worker);
                        std::thread::yield_now();
                        map.online(&mut worker);
                    }
                    if index == 0 && round % 400 == 0 {
                        clock.fetch_add(1, Ordering::Relaxed);
                    }
                }
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        // A control thread that dumps and now and then flushes.
        let mut dice = Dice(77);
        while running.load(Ordering::Relaxed) != 0 {
            for flow in (0..map.capacity() as u32).filter_map(|i| map.snapshot(i)) {
                assert_whole(&flow);
                if dice.roll(64) == 0 {
                    map.remove_from_control(flow.id);
                }
            }
            std::thread::yield_now();
        }
    });
    let now_s = clock.load(Ordering::Relaxed);
    let mut workers: Vec<_> = (0..WORKERS).map(|index| map.worker(index)).collect();
    for worker in &mut workers {
        map.age(worker, now_s, 512);
    }
    assert_consistent(&map);
    for worker in &mut workers {
        map.age(worker, now_s + 100, 512);
    }
    for _ in 0..2 {
        workers.iter_mut().for_each(|worker| map.quiescent(worker));
    }
    assert!(map.is_empty());
    // Not one record was lost on the way. (Other workers keep a few that they took and did not use.)
    drop(workers);
    let mut free: u32 = 0;
    for index in 0..WORKERS {
        let mut worker = map.worker(index);
        while worker.keeping().allocate(&map.free).is_some() {
            free += 1;
        }
    }
    assert_eq!(free, 512);
}

#[test]
fn of_equal_inserts_one_wins() {
    const WORKERS: usize = 3;
    const ROUNDS: u32 = 3_000;
    let map = FlowMap::anonymous(FlowMapConfig { workers: WORKERS, ..config(8_192) });
    let (barrier, winners) = (Barrier::new(WORKERS), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for index in 0..WORKERS {
            let (map, barrier, winners) = (&map, &barrier, &winners);
            scope.spawn(move || {
                let mut worker = map.worker(index);
                for i in 0..ROUNDS {
                    barrier.wait();
                    // Even rounds: the same endpoint; odd rounds: each worker chose another.
                    let choice = if i % 2 == 0 { 0 } else { index as u32 };
                    let reply = Tuple { src_port: 8000 + choice as u16, ..flow(i).reply.unwrap() };
                    let new = signed(client(i), Some(reply), i);
                    let inserted = map.insert(&mut worker, &new, 1).unwrap();
                    assert_eq!(inserted.flow.original(), client(i));
                    winners.fetch_add(u32::from(inserted.is_new), Ordering::Relaxed);
                    let first = inserted.flow.id();
                    barrier.wait();
                    assert_eq!(find(map, &client(i)).unwrap().flow.id(), first);
                    map.quiescent(&mut worker);
                }
            });
        }
    });
    assert_eq!(winners.into_inner(), ROUNDS);
    assert_eq!(map.len(), ROUNDS as usize);
    assert_consistent(&map);
}

#[test]
fn of_flows_with_one_reply_one_wins() {
    const WORKERS: usize = 3;
    const ROUNDS: u32 = 3_000;
    let map = FlowMap::anonymous(FlowMapConfig { workers: WORKERS, ..config(8_192) });
    let (barrier, winners) = (Barrier::new(WORKERS), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for index in 0..WORKERS {
            let (map, barrier, winners) = (&map, &barrier, &winners);
            scope.spawn(move || {
                let mut worker = map.worker(index);
                for i in 0..ROUNDS {
                    barrier.wait();
                    let new = signed(client(i + (index as u32 + 1) * 1_000_000), flow(i).reply, i);
                    let result = map.insert(&mut worker, &new, 1);
                    assert!(matches!(
                        result,
                        Ok(Inserted { is_new: true, .. }) | Err(InsertError::ReplyTaken)
                    ));
                    winners.fetch_add(u32::from(result.is_ok()), Ordering::Relaxed);
                    map.quiescent(&mut worker);
                }
            });
        }
    });
    assert_eq!(winners.into_inner(), ROUNDS);
    assert_consistent(&map);
}

#[test]
fn the_embryonic_share_is_exact_under_contention() {
    const WORKERS: usize = 4;
    let map = FlowMap::anonymous(FlowMapConfig { workers: WORKERS, ..config(4_096) });
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for index in 0..WORKERS as u32 {
            let (map, over) = (&map, &over);
            scope.spawn(move || {
                let mut worker = map.worker(index as usize);
                for i in 0..2_000 {
                    let _ = map.insert(&mut worker, &NewFlow { phase: 0, ..flow(i * 4 + index) }, 1);
                    let live = (0..64).filter_map(|r| map.snapshot(r)).count();
                    over.fetch_or(live > 64, Ordering::Relaxed);
                    map.quiescent(&mut worker);
                }
            });
        }
    });
    assert!(!over.into_inner());
    assert_eq!((map.embryonic_len(), map.len()), (1_024, 1_024));
    assert_consistent(&map);
}
