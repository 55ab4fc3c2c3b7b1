//! How evenly connections are spread, and how many go elsewhere when endpoints come and go: `cargo bench -p forwarder --bench
//! balance`. Counts, not times: they are the same in every run. Ten seconds.
//!
//! Beside ours stand the algorithm of the Maglev paper (Eisenbud et al., NSDI 2016, section 3.4) as its pseudocode has it, and
//! rendezvous hashing, both run here with the paper's 1,000 backends and table sizes; and the figures that the text of its section 5.3
//! gives, marked as such.

use std::time::Instant;

use config::gateway::Algorithm;
use forwarder::addr::{Addr, Tuple};
use forwarder::table::maglev::Maglev;
use forwarder::table::spread::{Load, Spread};

const KEY: u64 = 7;
/// Hashes at even distances, by which tables of different sizes are compared.
const POINTS: u64 = 1 << 21;

/// SplitMix64: a different number for each `i`.
fn scatter(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Backends: a hash of what each is called, and its weight.
fn backends(count: usize, weight: impl Fn(usize) -> u32) -> Vec<(u64, u32)> {
    (0..count).map(|i| (scatter(i as u64 + 1), weight(i))).collect()
}

/// 8391 as 8,391.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let starts = digits.len() % 3;
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && i % 3 == starts {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The least and the most that a backend has over what it should have by weight.
fn spread(counts: &[u64], weights: impl Fn(usize) -> u32) -> (f64, f64) {
    let total: u64 = counts.iter().sum();
    let weight: u64 = (0..counts.len()).map(|i| u64::from(weights(i))).sum();
    let share =
        |(i, count): (usize, &u64)| *count as f64 * weight as f64 / (total as f64 * f64::from(weights(i)));
    let shares = counts.iter().enumerate().map(share);
    shares.fold((f64::INFINITY, 0.0), |(least, most), share| (share.min(least), share.max(most)))
}

fn count(picks: impl Iterator<Item = usize>, backends: usize) -> Vec<u64> {
    let mut counts = vec![0; backends];
    picks.for_each(|index| counts[index] += 1);
    counts
}

// --- slots -----------------------------------------------------------------------------------------------------------

/// The paper's pseudocode 1. Offset and skip of each backend are two independent hashes.
fn pseudocode(names: &[u64], size: usize) -> Vec<usize> {
    let permutation = |name: &u64| {
        let (offset, skip) = (scatter(name ^ 0xa5a5), scatter(!name));
        (offset as usize % size, skip as usize % (size - 1) + 1)
    };
    let mut turns: Vec<_> = names.iter().map(permutation).collect();
    let mut slots = vec![usize::MAX; size];
    let mut left = size;
    loop {
        for (index, (next, skip)) in turns.iter_mut().enumerate() {
            while slots[*next] != usize::MAX {
                *next = (*next + *skip) % size;
            }
            slots[*next] = index;
            left -= 1;
            if left == 0 {
                return slots;
            }
        }
    }
}

/// Highest random weight: each slot goes to the backend whose hash with it is the highest.
fn rendezvous(names: &[u64], size: usize) -> Vec<usize> {
    let best = |slot: u64| {
        let slot = scatter(slot + 1);
        let weighed = (0..).zip(names).map(|(index, name)| (scatter(slot ^ name), index));
        weighed.max().map_or(0, |(_, index): (u64, usize)| index)
    };
    (0..size as u64).map(best).collect()
}

fn slots_line(what: &str, counts: &[u64], weights: impl Fn(usize) -> u32, note: &str) {
    let slots: u64 = counts.iter().sum();
    let (least, most) = spread(counts, weights);
    println!(
        "{what:<34} {:>9} {:>9} {:>9.4} {:>9.4} {:>8.2} %  {note}",
        grouped(counts.len()),
        grouped(slots as usize),
        least,
        most,
        (most - 1.0) * 100.0
    );
}

fn slots_of(slots: &[usize], backends: usize) -> Vec<u64> {
    count(slots.iter().copied(), backends)
}

fn slots() {
    println!("Slots of a backend over the mean of all, or over its share by weight");
    println!("{:<34} {:>9} {:>9} {:>9} {:>9} {:>10}", "", "backends", "slots", "least", "most", "imbalance");
    for backends in [10, 100, 1_000, 10_000].map(|count| backends(count, |_| 1)) {
        let start = Instant::now();
        let table = Maglev::build(KEY, &backends);
        let built = format!("built in {:.1?}", start.elapsed());
        slots_line("ours", &slots_of(&table.to_indexes(), backends.len()), |_| 1, &built);
    }
    let backends = backends(100, weight);
    let table = Maglev::build(KEY, &backends);
    slots_line("ours, weights 1, 2, 5, 10", &slots_of(&table.to_indexes(), 100), weight, "");
    let names: Vec<u64> = (0..1_000).map(|i| scatter(i + 1)).collect();
    for size in [65_537, 655_373] {
        let note = match size {
            65_537 => "paper: \"almost perfect\", whatever the size; built in 1.8 ms",
            _ => "paper: the same; built in 22.9 ms",
        };
        slots_line("the paper's pseudocode", &slots_of(&pseudocode(&names, size), 1_000), |_| 1, note);
    }
    for size in [65_537, 655_373] {
        let note = match size {
            65_537 => "paper: 49.5 % to be provisioned; Karger 29.7 %",
            _ => "paper: 12.3 %; Karger 10.3 %",
        };
        slots_line("rendezvous", &slots_of(&rendezvous(&names, size), 1_000), |_| 1, note);
    }
    println!();
}

const fn weight(index: usize) -> u32 {
    [1, 2, 5, 10][index % 4]
}

// --- connections -----------------------------------------------------------------------------------------------------

/// Connections of clients to one VIP.
fn connection(i: u64) -> Tuple {
    let client = scatter(i);
    Tuple {
        src: Addr::v4(0x0a00_0000 | (client >> 40) as u32),
        dst: Addr::v4(0xcb00_710a),
        src_port: 1_024 + (client % 64_512) as u16,
        dst_port: 80,
        protocol: 6,
    }
}

fn connections_line(count: usize, each: usize, weights: fn(usize) -> u32, note: &str) {
    let backends = backends(count, weights);
    let total = (count * each) as u64;
    let table = Spread::build(Algorithm::Maglev, KEY, &backends);
    let by_hash = self::count((0..total).map(|i| table.by_hash(connection(i).stable_hash(KEY))), count);
    let mut state = 0;
    let mut random = || {
        state += 1;
        scatter(state)
    };
    let at_random = self::count((0..total).map(|_| table.at_random(&mut random)), count);
    let mut by_load = vec![0u64; count];
    for _ in 0..total {
        let load = |i: usize| Load { connections: by_load[i] as u32, weight: weights(i) as u16 };
        let index = table.by_load(&mut random, load);
        by_load[index] += 1;
    }
    let [hash, random, load] = [by_hash, at_random, by_load].map(|counts| {
        let (least, most) = spread(&counts, weights);
        format!("{least:.3} to {most:.3}")
    });
    println!(
        "{:>9} {:>12} {hash:>18} {random:>18} {load:>18}  {note}",
        grouped(count),
        grouped(total as usize)
    );
}

fn connections() {
    println!("Connections of an endpoint over the mean, or over its share by weight, when none of them ends");
    println!(
        "{:>9} {:>12} {:>18} {:>18} {:>18}",
        "endpoints", "connections", "maglev", "random", "least-connections"
    );
    for (count, each) in
        [(10, 100), (10, 10_000), (100, 100), (100, 10_000), (1_000, 100), (1_000, 1_000), (10_000, 100)]
    {
        connections_line(count, each, |_| 1, "");
    }
    connections_line(100, 1_000, weight, "weights 1, 2, 5, 10");
    println!();
}

// --- disruption ------------------------------------------------------------------------------------------------------

/// What moved between two tables, over all connections there could be.
#[derive(Clone, Copy, Default)]
struct Moved {
    /// Its endpoint is gone, or it went to the one that came.
    had_to: f64,
    needlessly: f64,
}

fn moved(before: &[(u64, u32)], after: &[(u64, u32)], pick: [&dyn Fn(u64) -> usize; 2]) -> Moved {
    let names = |list: &[(u64, u32)]| list.iter().map(|one| one.0).collect::<std::collections::HashSet<_>>();
    let (old, new) = (names(before), names(after));
    let kept: Vec<bool> = before.iter().map(|one| new.contains(&one.0)).collect();
    let came: Vec<bool> = after.iter().map(|one| !old.contains(&one.0)).collect();
    let (mut had_to, mut needlessly) = (0u64, 0u64);
    for point in 0..POINTS {
        let hash = (point * 2 + 1) << (63 - POINTS.trailing_zeros());
        let (from, to) = (pick[0](hash), pick[1](hash));
        if !kept[from] || came[to] {
            had_to += 1;
        } else if before[from].0 != after[to].0 {
            needlessly += 1;
        }
    }
    Moved { had_to: had_to as f64 / POINTS as f64, needlessly: needlessly as f64 / POINTS as f64 }
}

/// The mean over `trials` changes: in each, other ones of `all` leave, or another one comes.
fn mean(trials: u64, mut change: impl FnMut(u64) -> Moved) -> Moved {
    let all: Vec<_> = (0..trials).map(&mut change).collect();
    let mean = |of: fn(&Moved) -> f64| all.iter().map(of).sum::<f64>() / trials as f64;
    Moved { had_to: mean(|one| one.had_to), needlessly: mean(|one| one.needlessly) }
}

/// `all` without `leave` of them, chosen by `trial`.
fn without(all: &[(u64, u32)], leave: usize, trial: u64) -> Vec<(u64, u32)> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by_key(|i| scatter(scatter(trial + 1) ^ *i as u64));
    let leaving: std::collections::HashSet<usize> = order.into_iter().take(leave).collect();
    let stay = |(i, one): (usize, &(u64, u32))| (!leaving.contains(&i)).then_some(*one);
    all.iter().enumerate().filter_map(stay).collect()
}

fn disruption_line(what: &str, count: usize, change: &str, sizes: (usize, usize), moved: Moved) {
    let slots = if sizes.0 == sizes.1 {
        grouped(sizes.0)
    } else {
        format!("{} to {}", grouped(sizes.0), grouped(sizes.1))
    };
    println!(
        "{what:<24} {:>9} {change:<14} {slots:>20} {:>9.3} % {:>9.3} %",
        grouped(count),
        moved.had_to * 100.0,
        moved.needlessly * 100.0
    );
}

fn disruption() {
    println!(
        "Connections without an entry that go to another endpoint when the list changes, of all there could be"
    );
    println!(
        "{:<24} {:>9} {:<14} {:>20} {:>11} {:>11}",
        "", "endpoints", "change", "slots", "had to", "needlessly"
    );
    let ours = |what: &str, count: usize, change: &str, trials: u64, weights: fn(usize) -> u32| {
        let mut sizes = (0, 0);
        let result = mean(trials, |trial| {
            let before = backends(count, weights);
            let after = match change {
                "1 removed" => without(&before, 1, trial),
                "1 % removed" => without(&before, count / 100, trial),
                _ => {
                    let one = (scatter(1 << 32 | trial), weights(trial as usize));
                    before.iter().copied().chain([one]).collect()
                }
            };
            let (old, new) = (Maglev::build(KEY, &before), Maglev::build(KEY, &after));
            sizes = (old.to_indexes().len(), new.to_indexes().len());
            moved(&before, &after, [&|hash| old.pick(hash), &|hash| new.pick(hash)])
        });
        disruption_line(what, count, change, sizes, result);
    };
    for (count, trials) in [(10, 10), (15, 10), (100, 10), (1_000, 10), (10_000, 3)] {
        ours("ours", count, "1 removed", trials, |_| 1);
        ours("ours", count, "1 added", trials, |_| 1);
        if count >= 1_000 {
            ours("ours", count, "1 % removed", trials, |_| 1);
        }
    }
    ours("ours, 1, 2, 5, 10", 100, "1 removed", 10, weight);
    ours("ours, 1, 2, 5, 10", 100, "1 added", 10, weight);
    let all = backends(1_000, |_| 1);
    for size in [65_537, 655_373] {
        for (change, leave) in [("1 removed", 1), ("1 % removed", 10)] {
            let result = mean(5, |trial| {
                let rest = without(&all, leave, trial);
                let table =
                    |list: &[(u64, u32)]| pseudocode(&list.iter().map(|one| one.0).collect::<Vec<_>>(), size);
                let (old, new) = (table(&all), table(&rest));
                let at =
                    |slots: &[usize], hash: u64| slots[((u128::from(hash) * size as u128) >> 64) as usize];
                moved(&all, &rest, [&|hash| at(&old, hash), &|hash| at(&new, hash)])
            });
            disruption_line("the paper's pseudocode", 1_000, change, (size, size), result);
        }
    }
    println!("paper: figure 12 plots this for both sizes; the larger the table, the less of it moves");
    println!(
        "Connections with an entry go on to their endpoint in any case. A list that outgrows its table gets one twice as large."
    );
}

fn main() {
    let start = Instant::now();
    slots();
    connections();
    disruption();
    println!("took {:.1?}", start.elapsed());
}
