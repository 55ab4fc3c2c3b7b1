//! Models, checked by loom: every order of atomic operations that the memory model allows, up to a bound on preemptions.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p models --lib --release` builds this file and the map without the daemon.
//!
//! The map is the real one but for its sizes: four buckets of two slots and a few records.

use std::sync::Arc;

use ::loom::thread;

use super::*;

fn check_model(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = ::loom::model::Builder::new();
    // LOOM_MAX_PREEMPTIONS, if it is set.
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 20_000;
    builder.check(model);
}

fn map(records: u32, workers: usize) -> Arc<FlowMap> {
    let config =
        FlowMapConfig { capacity: records, embryonic_share: 100, workers, ..FlowMapConfig::default() };
    Arc::new(FlowMap::anonymous(config))
}

fn tuple(src: u32, dst: u32) -> Tuple {
    Tuple { src: Addr::v4(src), dst: Addr::v4(dst), src_port: 1, dst_port: 2, protocol: 17 }
}

/// A flow that carries its clients' number wherever it can.
fn flow(client: u32, reply: u32) -> NewFlow {
    NewFlow {
        original: tuple(client, 100),
        reply: Some(tuple(200, reply)),
        service: u64::from(client),
        generation: reply,
        ..NewFlow::default()
    }
}

fn one_way(client: u32) -> NewFlow {
    NewFlow {
        original: tuple(client, 100),
        service: u64::from(client),
        endpoint_addr: Addr::v4(client + 1),
        ..NewFlow::default()
    }
}

fn find<'m>(map: &'m FlowMap, tuple: &Tuple) -> Option<Hit<'m>> {
    map.lookup(tuple, map.hash(tuple))
}

#[test]
fn of_equal_originals_one_wins() {
    check_model(3, || {
        let map = map(12, 2);
        let insert = |index: usize| {
            let map = Arc::clone(&map);
            move || {
                let mut worker = map.worker(index);
                let inserted = map.insert(&mut worker, &one_way(7), 1).unwrap();
                assert_eq!(inserted.flow.service(), 7);
                let result = (inserted.is_new, inserted.flow.id());
                map.offline(&mut worker);
                result
            }
        };
        let other = thread::spawn(insert(1));
        let (here_new, here) = insert(0)();
        let (there_new, there) = other.join().unwrap();
        assert!(here_new ^ there_new);
        assert_eq!(here, there);
        assert_eq!(find(&map, &tuple(7, 100)).unwrap().flow.id(), here);
        assert_eq!((map.len(), map.embryonic_len()), (1, 1));
    });
}

#[test]
fn of_equal_replies_one_wins() {
    check_model(3, || {
        let map = map(12, 2);
        let insert = |index: usize| {
            let map = Arc::clone(&map);
            move || {
                let mut worker = map.worker(index);
                map.insert(&mut worker, &flow(index as u32, 9), 1).map(|inserted| inserted.is_new)
            }
        };
        let other = thread::spawn(insert(1));
        let here = insert(0)();
        let there = other.join().unwrap();
        let winner = match (here, there) {
            (Ok(true), Err(InsertError::ReplyTaken)) => 0,
            (Err(InsertError::ReplyTaken), Ok(true)) => 1,
            both => panic!("{both:?}"),
        };
        assert_eq!(find(&map, &tuple(200, 9)).unwrap().flow.service(), winner);
        assert!(find(&map, &tuple(1 - winner as u32, 100)).is_none());
        assert_eq!(map.len(), 1);
    });
}

#[test]
fn a_lookup_beside_an_insert_sees_all_or_nothing() {
    check_model(3, || {
        let map = map(1, 2);
        let inserter = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let mut worker = map.worker(0);
                assert!(map.insert(&mut worker, &flow(3, 4), 1).unwrap().is_new);
            })
        };
        let _worker = map.worker(1);
        if let Some(hit) = find(&map, &tuple(200, 4)) {
            assert_eq!(hit.translated(), Some(tuple(100, 3).with_ports_exchanged()));
            assert_eq!((hit.flow.service(), hit.flow.generation()), (3, 4));
            // What was seen by one tuple is seen by the other.
            assert!(find(&map, &tuple(3, 100)).is_some());
        }
        inserter.join().unwrap();
        assert!(find(&map, &tuple(3, 100)).is_some());
    });
}

trait Ports {
    fn with_ports_exchanged(self) -> Tuple;
}

impl Ports for Tuple {
    fn with_ports_exchanged(self) -> Tuple {
        Tuple { src_port: self.dst_port, dst_port: self.src_port, ..self }
    }
}

#[test]
fn a_record_is_not_used_again_while_it_is_held() {
    check_model(3, || {
        let map = map(1, 2);
        let mut worker = map.worker(0);
        let id = map.insert(&mut worker, &one_way(5), 1).unwrap().flow.id();
        let reader = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let mut worker = map.worker(1);
                for _ in 0..2 {
                    if let Some(hit) = find(&map, &tuple(5, 100)) {
                        assert_eq!(hit.flow.original(), tuple(5, 100));
                        assert_eq!(hit.flow.endpoint().0, Addr::v4(6));
                        assert_eq!(hit.flow.service(), 5);
                    }
                    map.offline(&mut worker);
                    map.online(&mut worker);
                }
            })
        };
        map.remove(&mut worker, id);
        map.quiescent(&mut worker);
        // Only one record: this succeeds when the reader has let go of it.
        if let Ok(inserted) = map.insert(&mut worker, &one_way(8), 2) {
            assert_eq!(inserted.flow.service(), 8);
        }
        reader.join().unwrap();
        assert!(find(&map, &tuple(5, 100)).is_none());
    });
}

#[test]
fn a_dump_beside_reuse_copies_one_flow() {
    check_model(2, || {
        let map = map(1, 1);
        let mut worker = map.worker(0);
        let id = map.insert(&mut worker, &one_way(5), 1).unwrap().flow.id();
        let dumper = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                if let Some(flow) = map.snapshot(0) {
                    assert_eq!(u64::from(flow.original.src.v4_bits()), flow.service);
                    assert_eq!(u64::from(flow.endpoint_addr.v4_bits()), flow.service + 1);
                }
            })
        };
        map.remove(&mut worker, id);
        map.quiescent(&mut worker);
        assert!(map.insert(&mut worker, &one_way(8), 2).unwrap().is_new);
        dumper.join().unwrap();
    });
}

#[test]
fn a_flow_ends_once_and_counts_stay_exact() {
    check_model(3, || {
        let map = map(1, 2);
        let mut worker = map.worker(0);
        let id = map.insert(&mut worker, &one_way(5), 1).unwrap().flow.id();
        let control = {
            let map = Arc::clone(&map);
            thread::spawn(move || map.remove_from_control(id))
        };
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let _worker = map.worker(1);
                if let Some(hit) = find(&map, &tuple(5, 100)) {
                    hit.flow.set_phase(1);
                }
            })
        };
        map.remove(&mut worker, id);
        control.join().unwrap();
        other.join().unwrap();
        assert_eq!((map.len(), map.embryonic_len()), (0, 0));
        assert!(find(&map, &tuple(5, 100)).is_none());
    });
}
