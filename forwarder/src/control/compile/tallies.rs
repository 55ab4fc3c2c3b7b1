//! Numbers under which the flow table counts the connections of endpoints.

use std::collections::{BTreeSet, HashMap};

use crate::table::flow_map::TALLIES_MAX;
use crate::tables::EndpointKey;

/// Which endpoint has which number. An endpoint keeps its number, and so its count, while it is gone and comes back.
///
/// A number is given to another endpoint only when all have been given, to about a million endpoints; old connections that are
/// still there then count for the new one.
#[derive(Clone, Debug)]
pub(super) struct Tallies {
    numbers: HashMap<EndpointKey, u32>,
    /// The first number that was never given.
    next: u32,
    /// Numbers that were given back.
    free: Vec<u32>,
    /// Numbers are below this one.
    limit: u32,
}

impl Default for Tallies {
    fn default() -> Tallies {
        Tallies { numbers: HashMap::new(), next: 1, free: Vec::new(), limit: TALLIES_MAX }
    }
}

impl Tallies {
    /// The number of an endpoint, a new one if need be; 0, which is not counted, if there is none. `in_use`: endpoints that must keep
    /// their numbers when there is none left.
    pub fn assign(&mut self, key: EndpointKey, in_use: impl FnOnce() -> BTreeSet<EndpointKey>) -> u32 {
        if let Some(number) = self.numbers.get(&key) {
            return *number;
        }
        if self.free.is_empty() && self.next == self.limit {
            self.give_back(&in_use());
        }
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.next < self.limit => {
                self.next += 1;
                self.next - 1
            }
            None => return 0,
        };
        self.numbers.insert(key, number);
        number
    }

    /// The number of an endpoint, if it has one; else 0.
    pub fn get(&self, key: &EndpointKey) -> u32 {
        self.numbers.get(key).copied().unwrap_or(0)
    }

    fn give_back(&mut self, in_use: &BTreeSet<EndpointKey>) {
        let free = &mut self.free;
        self.numbers.retain(|key, number| {
            let stays = in_use.contains(key);
            if !stays {
                free.push(*number);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Addr, protocol};

    fn key(i: u32) -> EndpointKey {
        EndpointKey { addr: Addr::v4(i), port: 80, protocol: protocol::TCP }
    }

    #[test]
    fn numbers_stay_and_are_given_again_only_when_all_are_given() {
        let mut tallies = Tallies { limit: 4, ..Tallies::default() };
        let unasked = || panic!("there are numbers left");
        let given: Vec<u32> = (1..4).map(|i| tallies.assign(key(i), unasked)).collect();
        assert_eq!(given, [1, 2, 3]);
        assert_eq!((tallies.assign(key(2), unasked), tallies.get(&key(3)), tallies.get(&key(9))), (2, 3, 0));
        // Endpoint 2 is gone and gives its number to endpoint 5; then nobody has one to give.
        let in_use = || BTreeSet::from([key(1), key(3)]);
        assert_eq!(tallies.assign(key(5), in_use), 2);
        assert_eq!(tallies.get(&key(2)), 0);
        assert_eq!(tallies.assign(key(6), || BTreeSet::from([key(1), key(3), key(5)])), 0);
    }
}
