//! The slow twin: a `HashMap` from tuples to flows, driven by the same random steps.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert { client: u32, endpoint: u32, v6: bool, phase: u8, one_way: bool },
    Remove { client: u32, v6: bool },
    Condemn { client: u32, v6: bool },
    Touch { client: u32, v6: bool },
    SetPhase { client: u32, v6: bool, phase: u8 },
    Wait { seconds: u32 },
    Quiescent,
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..24u32;
    let v6 = any::<bool>;
    prop_oneof![
        8 => (client.clone(), 0..3u32, v6(), 0..4u8, prop::bool::weighted(0.2))
            .prop_map(|(client, endpoint, v6, phase, one_way)| Step::Insert { client, endpoint, v6, phase, one_way }),
        2 => (client.clone(), v6()).prop_map(|(client, v6)| Step::Remove { client, v6 }),
        1 => (client.clone(), v6()).prop_map(|(client, v6)| Step::Condemn { client, v6 }),
        2 => (client.clone(), v6()).prop_map(|(client, v6)| Step::Touch { client, v6 }),
        2 => (client, v6(), 0..4u8).prop_map(|(client, v6, phase)| Step::SetPhase { client, v6, phase }),
        2 => (1..20u32).prop_map(|seconds| Step::Wait { seconds }),
        3 => Just(Step::Quiescent),
    ]
}

fn original(client: u32, v6: bool) -> Tuple {
    let addr =
        |last: u32| if v6 { Addr::v6(0xfd << 120 | u128::from(last)) } else { Addr::v4(0x0a00_0000 | last) };
    Tuple { src: addr(client), dst: addr(200), src_port: 9, dst_port: 80, protocol: 17 }
}

/// Clients share reply tuples in threes, so that some inserts are refused for them.
fn reply(client: u32, endpoint: u32, v6: bool) -> Tuple {
    let base = original(client / 3, v6);
    Tuple { src: original(100 + endpoint, v6).src, src_port: 8080, ..base.reversed() }
}

#[derive(Clone, Copy)]
struct Twin {
    flow: NewFlow,
    phase: u8,
    seen_s: u32,
}

#[derive(Default)]
struct Twins {
    flows: HashMap<Tuple, Twin>,
    replies: HashMap<Tuple, Tuple>,
}

impl Twins {
    fn insert(&mut self, config: &FlowMapConfig, flow: NewFlow, now_s: u32) -> Result<bool, InsertError> {
        if self.flows.contains_key(&flow.original) {
            return Ok(false);
        }
        if flow.reply.is_some_and(|reply| self.replies.contains_key(&reply)) {
            return Err(InsertError::ReplyTaken);
        }
        let limit = config.capacity * config.embryonic_share / 100;
        if flow.phase == 0 && self.embryonic() >= limit as usize {
            return Err(InsertError::EmbryonicFull);
        }
        if let Some(reply) = flow.reply {
            self.replies.insert(reply, flow.original);
        }
        self.flows.insert(flow.original, Twin { flow, phase: flow.phase, seen_s: now_s });
        Ok(true)
    }

    fn remove(&mut self, original: &Tuple) {
        if let Some(reply) = self.flows.remove(original).and_then(|twin| twin.flow.reply) {
            self.replies.remove(&reply);
        }
    }

    fn embryonic(&self) -> usize {
        self.flows.values().filter(|twin| twin.phase == 0).count()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_map_agrees_with_its_slow_twin(steps in prop::collection::vec(step(), 1..200)) {
        // More room than flows: how long a removed record stays out of use is not the twin's business.
        let config = FlowMapConfig { timeouts_s: std::array::from_fn(|i| 5 * (i as u32 + 1)), embryonic_share: 1, ..config(512) };
        let map = FlowMap::anonymous(config);
        let mut worker = map.worker(0);
        let mut twins = Twins::default();
        let mut now_s = 1_000;
        for step in steps {
            match step {
                Step::Insert { client, endpoint, v6, phase, one_way } => {
                    let reply = (!one_way).then(|| reply(client, endpoint, v6));
                    let flow = NewFlow { phase, ..signed(original(client, v6), reply, client) };
                    let flow = NewFlow { endpoint_addr: original(endpoint, v6).dst, ..flow };
                    let expected = twins.insert(&config, flow, now_s);
                    let inserted = map.insert(&mut worker, &flow, now_s);
                    prop_assert_eq!(inserted.map(|i| i.is_new), expected);
                }
                Step::Remove { client, v6 } => {
                    let hit = find(&map, &original(client, v6));
                    if let Some(hit) = hit {
                        map.remove(&mut worker, hit.flow.id());
                    }
                    twins.remove(&original(client, v6));
                }
                Step::Condemn { client, v6 } => {
                    if let Some(hit) = find(&map, &original(client, v6)) {
                        prop_assert!(map.remove_from_control(hit.flow.id()));
                    }
                    twins.remove(&original(client, v6));
                }
                Step::Touch { client, v6 } => {
                    if let Some(hit) = find(&map, &original(client, v6)) {
                        hit.flow.touch(now_s);
                    }
                    if let Some(twin) = twins.flows.get_mut(&original(client, v6)) {
                        twin.seen_s = now_s;
                    }
                }
                Step::SetPhase { client, v6, phase } => {
                    if let Some(hit) = find(&map, &original(client, v6)) {
                        hit.flow.set_phase(phase);
                    }
                    if let Some(twin) = twins.flows.get_mut(&original(client, v6)) {
                        twin.phase = phase;
                    }
                }
                Step::Wait { seconds } => {
                    now_s += seconds;
                    map.age(&mut worker, now_s, 512);
                    let over = |twin: &Twin| now_s - twin.seen_s > config.timeouts_s[usize::from(twin.phase)];
                    let gone: Vec<_> = twins.flows.iter().filter(|(_, twin)| over(twin)).map(|(t, _)| *t).collect();
                    gone.iter().for_each(|tuple| twins.remove(tuple));
                }
                Step::Quiescent => map.quiescent(&mut worker),
            }
            prop_assert_eq!((map.len(), map.embryonic_len()), (twins.flows.len(), twins.embryonic()));
        }
        for (client, v6) in (0..24).flat_map(|client| [(client, false), (client, true)]) {
            let tuple = original(client, v6);
            let (hit, twin) = (find(&map, &tuple), twins.flows.get(&tuple));
            prop_assert_eq!(hit.is_some(), twin.is_some(), "{}", tuple);
            prop_assert_eq!(map.is_free(&tuple), twin.is_none());
            if let (Some(hit), Some(twin)) = (hit, twin) {
                prop_assert_eq!((hit.flow.reply(), hit.flow.service()), (twin.flow.reply, twin.flow.service));
                prop_assert_eq!((hit.flow.phase(), hit.flow.last_seen_s()), (twin.phase, twin.seen_s));
            }
            for endpoint in 0..3 {
                let reply = reply(client, endpoint, v6);
                let hit = find(&map, &reply).map(|hit| (hit.direction, hit.flow.original()));
                prop_assert_eq!(hit, twins.replies.get(&reply).map(|original| (Direction::Reply, *original)));
            }
        }
        assert_consistent_after_ageing_at(&map, &mut worker, now_s);
    }
}

fn assert_consistent_after_ageing_at(map: &FlowMap, worker: &mut FlowWorker, now_s: u32) {
    map.age(worker, now_s, map.capacity());
    assert_consistent(map);
}
