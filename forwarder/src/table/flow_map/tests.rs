use super::*;

fn tuple(i: u32) -> Tuple {
    Tuple { src: Addr::v4(i), dst: Addr::v4(0x0a60_0001), src_port: 4242, dst_port: 80, protocol: 6 }
}

fn flow(i: u32) -> NewFlow {
    let reply =
        Tuple { src: Addr::v4(0x0af4_0001), dst: Addr::v4(i), src_port: 8080, dst_port: 4242, protocol: 6 };
    NewFlow {
        original: tuple(i),
        reply: Some(reply),
        phase: 1,
        service: 7,
        generation: 3,
        ..NewFlow::default()
    }
}

fn small(capacity: u32) -> FlowMapConfig {
    FlowMapConfig { capacity, ..FlowMapConfig::default() }
}

#[test]
fn a_flow_is_found_in_both_directions() {
    let map = FlowMap::anonymous(small(64));
    let mut worker = map.worker(0);
    let inserted = map.insert(&mut worker, &flow(1), 100).unwrap();
    assert!(inserted.is_new);
    let hit = map.lookup(&tuple(1), map.hash(&tuple(1))).unwrap();
    assert_eq!(hit.direction, Direction::Original);
    assert_eq!(hit.translated(), flow(1).reply.map(|r| r.reversed()));
    let reply = flow(1).reply.unwrap();
    let hit = map.lookup(&reply, map.hash(&reply)).unwrap();
    assert_eq!(hit.direction, Direction::Reply);
    assert_eq!(hit.translated(), Some(tuple(1).reversed()));
    assert_eq!((hit.flow.service(), hit.flow.generation(), hit.flow.created_s()), (7, 3, 100));
    assert!(!map.is_free(&reply));
    map.remove(&mut worker, hit.flow.id());
    assert!(map.is_free(&reply));
    assert_eq!(map.len(), 0);
}
