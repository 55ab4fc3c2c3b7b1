//! The pipeline alone, over memory: established flows, judged and rewritten, a burst at a time.
//!
//! Prints ns per burst of 64; criterion's throughput line gives packets per second.

#[path = "../tests/rig/mod.rs"]
#[allow(dead_code)]
mod rig;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use forwarder::addr::Addr;
use forwarder::packet::BURST;
use rig::{Gateway, OUTSIDE, VIP};

fn established(c: &mut Criterion) {
    let mut group = c.benchmark_group("pipeline, established IPv4 UDP");
    group.throughput(Throughput::Elements(BURST as u64));
    for flows in [1_000u32, 100_000, 1_000_000] {
        let mut gateway = Gateway::with_capacity(flows);
        let packet = |flow: u32| {
            let client = Addr::v4(0xc633_0000 | (flow / 60_000));
            rig::udp(client, 1024 + (flow % 60_000) as u16, VIP, 53, b"0123456789abcdef")
        };
        for flow in 0..flows {
            gateway.judge(OUTSIDE, &packet(flow));
        }
        let mut next = 0u32;
        group.bench_function(format!("{flows} flows"), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let mut random = || {
                        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        packet(next % flows)
                    };
                    let packets: Vec<Vec<u8>> = (0..BURST).map(|_| random()).collect();
                    let burst = gateway.burst(OUTSIDE, &packets);
                    let start = Instant::now();
                    gateway.run(burst);
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(benches, established);
criterion_main!(benches);
