//! Which endpoints a single VIP leads to: their answers can be translated back without a flow (`stage/overflow`).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use crate::addr::Addr;
use crate::table::paged::PagedMap;
use crate::tables::{EndpointKey, FrontendKey};

/// A frontend that keeps the addresses of clients outside, with every endpoint of its port.
pub(super) type Unmasqueraded = (FrontendKey, Arc<BTreeSet<EndpointKey>>);

/// The frontends that lead to each endpoint. Kept up to date pair by pair, so that a change costs what it touches.
#[derive(Clone, Debug, Default)]
pub(super) struct Leads {
    frontends: HashMap<EndpointKey, Vec<FrontendKey>>,
}

impl Leads {
    /// Takes the frontends of changed Services over: `old` ones go, `new` ones come. `table` then has every endpoint that one
    /// frontend alone leads to.
    pub fn change(
        &mut self,
        old: &[Unmasqueraded],
        new: &[Unmasqueraded],
        table: &mut PagedMap<EndpointKey, (Addr, u16)>,
    ) {
        let pairs = |all: &[Unmasqueraded]| -> HashSet<(EndpointKey, FrontendKey)> {
            all.iter().flat_map(|(key, endpoints)| endpoints.iter().map(|e| (*e, *key))).collect()
        };
        let (old, new) = (pairs(old), pairs(new));
        for (endpoint, key) in old.difference(&new) {
            if let Some(frontends) = self.frontends.get_mut(endpoint) {
                frontends.retain(|known| known != key);
            }
        }
        for (endpoint, key) in new.difference(&old) {
            self.frontends.entry(*endpoint).or_default().push(*key);
        }
        for (endpoint, _) in old.symmetric_difference(&new) {
            match self.frontends.get(endpoint).map(Vec::as_slice) {
                Some([sole]) => {
                    table.insert(*endpoint, (sole.addr, sole.port));
                }
                Some([]) => {
                    self.frontends.remove(endpoint);
                    table.remove(endpoint);
                }
                _ => {
                    table.remove(endpoint);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::protocol;

    fn endpoint(i: u32) -> EndpointKey {
        EndpointKey { addr: Addr::v4(i), port: 8080, protocol: protocol::TCP }
    }

    /// `vip` with endpoints.
    fn leads(vip: u32, endpoints: &[u32]) -> Unmasqueraded {
        let key = FrontendKey { addr: Addr::v4(vip), port: 80, protocol: protocol::TCP };
        (key, Arc::new(endpoints.iter().map(|i| endpoint(*i)).collect()))
    }

    #[test]
    fn only_what_one_vip_leads_to_is_in_the_table() {
        let (mut known, mut table) = (Leads::default(), PagedMap::default());
        let sole = |table: &PagedMap<_, (Addr, u16)>| -> Vec<Option<u32>> {
            (1..5).map(|i| table.get(&endpoint(i)).map(|(vip, _)| vip.v4_bits())).collect()
        };
        known.change(&[], &[leads(100, &[1, 2, 3])], &mut table);
        assert_eq!(sole(&table), [Some(100), Some(100), Some(100), None]);
        known.change(&[], &[leads(200, &[3, 4])], &mut table);
        assert_eq!(sole(&table), [Some(100), Some(100), None, Some(200)]);
        // One VIP moves to another endpoint, and leaves the other one its own.
        known.change(&[leads(200, &[3, 4])], &[leads(200, &[2, 4])], &mut table);
        assert_eq!(sole(&table), [Some(100), None, Some(100), Some(200)]);
        // A VIP goes over to another Service, in one change.
        known.change(&[leads(100, &[1, 2, 3])], &[leads(100, &[1])], &mut table);
        assert_eq!(sole(&table), [Some(100), Some(200), None, Some(200)]);
        known.change(&[leads(100, &[1]), leads(200, &[2, 4])], &[], &mut table);
        assert_eq!((sole(&table), known.frontends.len()), (vec![None; 4], 0));
    }
}
