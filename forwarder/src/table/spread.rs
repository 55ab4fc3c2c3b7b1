//! How new connections are spread over backends: three algorithms over one Maglev table, whose slots are shared out by weight.

use config::gateway::Algorithm;

use super::maglev::Maglev;

/// How often a second backend is drawn until it is another one than the first.
const DRAWS: usize = 4;

/// What a backend bears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    /// Connections that it has.
    pub connections: u32,
    /// Its weight, not 0.
    pub weight: u16,
}

impl Load {
    /// True if one connection more would leave this backend with more for its weight than `other` with one more.
    fn exceeds(self, other: Load) -> bool {
        let after = |load: Load, weight: u16| (u64::from(load.connections) + 1) * u64::from(weight);
        after(self, other.weight) > after(other, self.weight)
    }
}

/// An algorithm and what it needs to know of the backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    algorithm: Algorithm,
    maglev: Maglev,
}

impl Spread {
    /// `key` and `backends`: see [`Maglev::build`].
    pub fn build(algorithm: Algorithm, key: u64, backends: &[(u64, u32)]) -> Spread {
        Spread { algorithm, maglev: Maglev::build(key, backends) }
    }

    /// The algorithm for new connections.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Index of the backend of a connection by consistent hash: the same on every gateway, and the same later while the backends are.
    #[inline]
    pub fn by_hash(&self, hash: u64) -> usize {
        self.maglev.pick(hash)
    }

    /// Asks for what [`Self::by_hash`] will read, ahead of its use.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        self.maglev.prefetch(hash);
    }

    /// Index of a backend at random, by weight. `random`: gives 64 random bits.
    #[inline]
    pub fn at_random(&self, mut random: impl FnMut() -> u64) -> usize {
        self.maglev.pick(random())
    }

    /// Index of the one of two random backends that has fewer connections for its weight (Mitzenmacher 2001, "The power of two
    /// choices"): close to the least of all, and workers that all know the same counts do not all run to one backend.
    #[inline]
    pub fn by_load(&self, mut random: impl FnMut() -> u64, load: impl Fn(usize) -> Load) -> usize {
        let first = self.at_random(&mut random);
        let others = (0..DRAWS).map(|_| self.at_random(&mut random));
        match { others }.find(|other| *other != first) {
            Some(second) if load(first).exceeds(load(second)) => second,
            _ => first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    fn random(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    fn spread(algorithm: Algorithm, weights: &[u32]) -> Spread {
        let backends: Vec<_> =
            weights.iter().enumerate().map(|(i, weight)| (i as u64 * 77, *weight)).collect();
        Spread::build(algorithm, 5, &backends)
    }

    /// Connections of each backend after `count` of them, none of which ends.
    fn fill(weights: &[u32], count: u32, mut pick: impl FnMut(&Spread, &[u32]) -> usize) -> Vec<u32> {
        let spread = spread(Algorithm::Random, weights);
        let mut connections = vec![0; weights.len()];
        for _ in 0..count {
            let index = pick(&spread, &connections);
            connections[index] += 1;
        }
        connections
    }

    #[test]
    fn random_follows_weights() {
        let mut random = random(1);
        let connections = fill(&[1, 2, 5, 100], 108_000, |spread, _| spread.at_random(&mut random));
        for (got, weight) in connections.iter().zip([1u32, 2, 5, 100]) {
            let expected = f64::from(weight * 1_000);
            // A slot of 509 more or less, and chance.
            assert!((f64::from(*got) - expected).abs() < 300.0 + expected / 20.0, "{connections:?}");
        }
    }

    #[test]
    fn two_choices_keep_connections_even() {
        let weights = [1u32; 50];
        let mut one = random(2);
        let at_random = fill(&weights, 10_000, |spread, _| spread.at_random(&mut one));
        let mut two = random(3);
        let by_load = fill(&weights, 10_000, |spread, connections| {
            spread.by_load(&mut two, |i| Load { connections: connections[i], weight: 1 })
        });
        let width = |all: &[u32]| all.iter().max().unwrap() - all.iter().min().unwrap();
        println!(
            "200 connections each: random differ by {}, two choices by {}",
            width(&at_random),
            width(&by_load)
        );
        assert!(width(&by_load) <= 12, "{by_load:?}");
        assert!(width(&at_random) > 30, "{at_random:?}");
    }

    #[test]
    fn two_choices_follow_weights() {
        let weights = [1u32, 3, 6];
        let mut random = random(4);
        let connections = fill(&weights, 10_000, |spread, connections| {
            spread.by_load(&mut random, |i| Load { connections: connections[i], weight: weights[i] as u16 })
        });
        for (got, weight) in connections.iter().zip(weights) {
            let expected = f64::from(weight * 1_000);
            assert!((f64::from(*got) - expected).abs() < expected / 50.0, "{connections:?}");
        }
    }

    #[test]
    fn a_backend_that_is_behind_catches_up() {
        let mut random = random(5);
        let mut connections = [1_000u32, 0];
        let spread = spread(Algorithm::LeastConnections, &[1, 1]);
        for _ in 0..1_000 {
            connections[spread.by_load(&mut random, |i| Load { connections: connections[i], weight: 1 })] +=
                1;
        }
        // One draw of sixteen has no second backend to choose.
        assert!(connections[1] > 900, "{connections:?}");
    }

    #[test]
    fn one_backend_is_always_chosen() {
        let spread = spread(Algorithm::LeastConnections, &[7]);
        let load = |_| Load { connections: u32::MAX, weight: 1_000 };
        assert_eq!((spread.by_hash(9), spread.at_random(|| 9), spread.by_load(|| 9, load)), (0, 0, 0));
        assert!(!load(0).exceeds(load(0)), "no overflow");
    }
}
