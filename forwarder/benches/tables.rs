//! The tables alone: `cargo bench -p forwarder --bench tables [FILTER]`. About a minute.
//!
//! Figures are for one thread on a machine that does nothing else. Lookups go by bursts of 64, as the pipeline's do.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;

use forwarder::addr::{Addr, Tuple};
use forwarder::table::flow_map::{FlowMap, FlowMapConfig, NewFlow};
use forwarder::table::lpm::Lpm;
use forwarder::table::maglev::Maglev;
use forwarder::table::paged::PagedMap;
use forwarder::table::record_ring::RecordRing;

const BURST: usize = 64;

/// SplitMix64: a different number for each `i`.
fn scatter(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn original(i: u32, v6: bool) -> Tuple {
    let addr = |bits: u32| if v6 { Addr::v6(0x2001 << 112 | u128::from(bits)) } else { Addr::v4(bits) };
    let src_port = 1_024 + (i % 50_000) as u16;
    Tuple { src: addr(0x0a00_0000 + i / 50), dst: addr(0xcb00_7101), src_port, dst_port: 80, protocol: 6 }
}

fn flow(i: u32, v6: bool) -> NewFlow {
    let original = original(i, v6);
    let endpoint =
        if v6 { Addr::v6(0xfd44 << 112 | u128::from(i % 1_000)) } else { Addr::v4(0x0af4_0000 + i % 1_000) };
    let reply = Tuple { src: endpoint, src_port: 8_080, ..original.reversed() };
    NewFlow { original, reply: Some(reply), phase: 1, ..NewFlow::default() }
}

fn config(capacity: u32) -> FlowMapConfig {
    FlowMapConfig { capacity, ..FlowMapConfig::default() }
}

fn filled(flows: u32, v6: bool) -> FlowMap {
    let map = FlowMap::anonymous(config(flows.max(1_024)));
    let mut worker = map.worker(0);
    for i in 0..flows {
        map.insert(&mut worker, &flow(i, v6), 1).expect("room");
    }
    drop(worker);
    map
}

/// Both directions of random flows.
fn order(flows: u32, v6: bool) -> Vec<Tuple> {
    let tuple = |i: u64| {
        let flow = flow((scatter(i) % u64::from(flows)) as u32, v6);
        if i.is_multiple_of(2) { flow.original } else { flow.reply.unwrap_or_default() }
    };
    (0..1 << 20).map(tuple).collect()
}

fn look_up_burst(map: &FlowMap, burst: &[Tuple]) -> usize {
    let mut hashes = [0; BURST];
    for (hash, tuple) in hashes.iter_mut().zip(burst) {
        *hash = map.hash(tuple);
        map.prefetch(*hash);
    }
    hashes.iter().for_each(|hash| {
        let _ = map.prefetch_record(*hash);
    });
    burst.iter().zip(hashes).filter_map(|(tuple, hash)| map.lookup(tuple, hash)?.translated()).count()
}

fn flow_lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow_map/lookup");
    group.throughput(Throughput::Elements(BURST as u64));
    for (name, flows, v6) in [
        ("1k", 1_000, false),
        ("100k", 100_000, false),
        ("1M", 1_000_000, false),
        ("1M-ipv6", 1_000_000, true),
    ] {
        let (map, order) = (filled(flows, v6), order(flows, v6));
        let mut bursts = order.as_chunks::<BURST>().0.iter().cycle();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let found = look_up_burst(&map, bursts.next().expect("endless"));
                assert_eq!(found, BURST);
            });
        });
        if flows == 1_000_000 && !v6 {
            let absent: Vec<Tuple> =
                order.iter().map(|tuple| Tuple { dst_port: 9, src_port: 9, ..*tuple }).collect();
            let mut bursts = absent.as_chunks::<BURST>().0.iter().cycle();
            group.bench_function("1M-miss", |bencher| {
                bencher.iter(|| assert_eq!(look_up_burst(&map, bursts.next().expect("endless")), 0));
            });
        }
    }
    group.finish();
    let map = FlowMap::anonymous(config(1_024));
    criterion.bench_function("flow_map/hash", |bencher| {
        let mut tuple = original(7, false);
        bencher.iter(|| {
            // Each hash waits for the one before it.
            tuple.src_port = map.hash(black_box(&tuple)) as u16;
        });
    });
}

fn flow_changes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow_map");
    group.throughput(Throughput::Elements(BURST as u64));
    for (name, resident) in [("insert-remove/empty", 0), ("insert-remove/500k", 500_000)] {
        let map = FlowMap::anonymous(config(1 << 20));
        let mut worker = map.worker(0);
        for i in 0..resident {
            map.insert(&mut worker, &flow(i, false), 1).expect("room");
        }
        let mut next = resident;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut ids = [None; BURST];
                for id in &mut ids {
                    next = resident + (next + 1 - resident) % 10_000_000;
                    *id = Some(map.insert(&mut worker, &flow(next, false), 1).expect("room").flow.id());
                }
                ids.into_iter().flatten().for_each(|id| map.remove(&mut worker, id));
                map.quiescent(&mut worker);
            });
        });
    }
    group.finish();
}

/// A million flows that expire in one second: the longest of all calls, and what one costs on average.
fn ageing(criterion: &mut Criterion) {
    let map = filled(1_000_000, false);
    let mut worker = map.worker(0);
    let (mut calls, mut longest, start) = (0u32, Duration::ZERO, Instant::now());
    while !map.is_empty() {
        let before = Instant::now();
        map.age(&mut worker, 10_000, BURST);
        map.quiescent(&mut worker);
        longest = longest.max(before.elapsed());
        calls += 1;
    }
    println!(
        "flow_map/age: 1M flows expire at once: {calls} calls of {BURST} records, mean {:?}, longest {longest:?}",
        start.elapsed() / calls
    );
    let idle = filled(1_000_000, false);
    let mut worker = idle.worker(0);
    criterion
        .bench_function("flow_map/age/64-live", |bencher| bencher.iter(|| idle.age(&mut worker, 2, BURST)));
}

fn restart(criterion: &mut Criterion) {
    let file = tempfile::tempfile().expect("a temporary file");
    let config = config(1_000_000);
    let (map, _) = FlowMap::open(&file, config).expect("a region");
    let mut worker = map.worker(0);
    for i in 0..1_000_000 {
        map.insert(&mut worker, &flow(i, false), 1).expect("room");
    }
    drop((worker, map));
    let mut group = criterion.benchmark_group("flow_map/recover");
    group.sample_size(10);
    group.bench_function("1M", |bencher| {
        bencher.iter(|| assert_eq!(FlowMap::open(&file, config).expect("a region").1.kept, 1_000_000));
    });
    group.finish();
}

fn v4_net(i: u64, len: u8) -> IpNet {
    IpNet::new(IpAddr::V4(Ipv4Addr::from_bits(scatter(i) as u32)), len).expect("a length").trunc()
}

fn v6_net(i: u64, len: u8) -> IpNet {
    let bits = 0x2 << 124 | u128::from(scatter(i)) << 60 | u128::from(scatter(!i) >> 4);
    IpNet::new(IpAddr::V6(Ipv6Addr::from_bits(bits)), len).expect("a length").trunc()
}

/// Lengths about as in the Internet's tables: most /24 and /48, some shorter, a few hosts.
fn routes(count: u64, v6: bool) -> Vec<(IpNet, u64)> {
    let (lens, net): ([u8; 8], fn(u64, u8) -> IpNet) = if v6 {
        ([48, 48, 48, 32, 44, 40, 64, 128], v6_net)
    } else {
        ([24, 24, 24, 23, 22, 20, 16, 32], v4_net)
    };
    (0..count).map(|i| (net(i, lens[(i % 8) as usize]), i)).collect()
}

fn lpm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lpm/lookup");
    for (name, count, v6) in [
        ("1", 1, false),
        ("1k", 1_000, false),
        ("1M", 1_000_000, false),
        ("1k-ipv6", 1_000, true),
        ("1M-ipv6", 1_000_000, true),
    ] {
        let routes = routes(count, v6);
        let table = Lpm::build(routes.iter().copied());
        println!("lpm/{name}: {} bytes", table.bytes());
        // Destinations behind a thousand of the prefixes, in turn.
        let inside = |i: u64| Addr::from(routes[(scatter(i) % count) as usize].0.addr());
        let destinations: Vec<Addr> = (0..1_024).map(inside).collect();
        let mut next = 0usize;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                next = (next + 1) % 1_024;
                table.lookup(black_box(destinations[next]))
            });
        });
    }
    group.finish();
    let routes = routes(100_000, false);
    criterion.bench_function("lpm/build/100k", |bencher| {
        bencher.iter_batched(|| routes.clone(), Lpm::build, BatchSize::LargeInput);
    });
}

fn maglev(criterion: &mut Criterion) {
    let backends = |count: u64| (0..count).map(|i| (scatter(i), 1)).collect::<Vec<_>>();
    for count in [3, 10, 100, 655] {
        let backends = backends(count);
        criterion.bench_function(&format!("maglev/build/{count}"), |bencher| {
            bencher.iter(|| Maglev::build(black_box(7), &backends));
        });
    }
    let table = Maglev::build(7, &backends(10));
    let mut i = 0u64;
    criterion.bench_function("maglev/pick", |bencher| {
        bencher.iter(|| {
            i = i.wrapping_add(0x9e37_79b9_7f4a_7c15);
            table.pick(i)
        });
    });
}

fn paged(criterion: &mut Criterion) {
    let mut map = PagedMap::default();
    for i in 0..100_000u64 {
        map.insert((Addr::v4(i as u32), 80u16), Arc::new(i));
    }
    criterion.bench_function("paged/clone/100k", |bencher| bencher.iter(|| map.clone()));
    let mut i = 0;
    criterion.bench_function("paged/get/100k", |bencher| {
        bencher.iter(|| {
            i += 1;
            map.get(&(Addr::v4((scatter(i) % 100_000) as u32), 80)).is_some()
        });
    });
    criterion.bench_function("paged/change-one/100k", |bencher| {
        bencher.iter(|| {
            i += 1;
            let mut next = map.clone();
            next.insert((Addr::v4((scatter(i) % 100_000) as u32), 80), Arc::new(i));
            next
        });
    });
}

fn record_ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("record ring");
    let ring = RecordRing::new(1 << 20);
    let header = [7; 22];
    for len in [64, 1_500] {
        let packet = vec![1u8; len];
        let (mut words, mut bytes) = ([0; 22], Vec::new());
        group.bench_function(format!("push {len} bytes"), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds.div_ceil(BURST as u64) {
                    let start = Instant::now();
                    for _ in 0..BURST {
                        assert!(ring.push(&header, std::iter::once(black_box(&packet[..]))));
                    }
                    spent += start.elapsed();
                    while ring.pop(&mut words, &mut bytes) {}
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = tables;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1_000));
    targets = flow_lookups, flow_changes, ageing, restart, lpm, maglev, paged, record_ring
}
criterion_main!(tables);
