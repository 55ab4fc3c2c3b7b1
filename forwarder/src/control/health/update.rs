//! Changes on their way into force: how long they take, and whether one takes too long (kubernetes
//! pkg/proxy/healthcheck/proxy_health.go `QueuedUpdate`, `Updated`).
//!
//! A change is queued when its client has sent all of it, and done when its generation is in force on every worker. Families are told
//! apart as kube-proxy does, where each has a proxier of its own; here one generation may hold changes of both.

use std::collections::VecDeque;

use k8s_openapi::jiff::Timestamp;

use crate::addr::Family;
use crate::control::facts::Facts;
use crate::control::state::Touch;

/// A change that is not in force after this time is late. Workers take milliseconds, and a worker that is stuck is replaced after two
/// seconds, so that this is not about load.
pub const LATE_AFTER_NS: u64 = 10_000_000_000;

/// Generations followed one by one. If more are on their way, no worker has taken any for long, and the newest are one for us.
const FOLLOWED: usize = 64;

/// A generation on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Its number.
    pub generation: u64,
    /// When the first change in it was queued, nanoseconds of CLOCK_MONOTONIC.
    pub since_ns: u64,
    /// Families that it changes, by number.
    pub families: [bool; 2],
    /// When what its slices tell of happened in the cluster.
    pub triggered: Vec<(Family, Timestamp)>,
}

impl Update {
    /// A generation that changes all there is.
    pub fn of_everything(generation: u64, since_ns: u64) -> Update {
        Update { generation, since_ns, families: [true; 2], triggered: Vec::new() }
    }

    /// A generation that changes what was touched. Times before `started` are left out: nobody could have followed them.
    pub fn of(generation: u64, since_ns: u64, touched: &[Touch], started: Timestamp) -> Update {
        let mut update = Update { generation, since_ns, families: [false; 2], triggered: Vec::new() };
        for touch in touched {
            let mut families = [false; 2];
            for entry in touch.old.iter().chain(&touch.new) {
                let of_addresses: Vec<Family> = match &entry.facts {
                    Facts::Service(service) => service.addresses.iter().map(|a| a.addr.family()).collect(),
                    Facts::Slice(slice) => slice.endpoints.iter().map(|e| e.addr.family()).collect(),
                    Facts::Namespace | Facts::Node(_) | Facts::Pod(_) | Facts::PodRoute(_) => {
                        Family::ALL.to_vec()
                    }
                };
                of_addresses.into_iter().for_each(|family| families[family as usize] = true);
            }
            if families == [false; 2] {
                families = [true; 2];
            }
            if let Some(time) = triggered(touch).filter(|time| *time > started) {
                let of_slice = Family::ALL.into_iter().filter(|family| families[*family as usize]);
                update.triggered.extend(of_slice.take(1).map(|family| (family, time)));
            }
            Family::ALL.into_iter().for_each(|f| update.families[f as usize] |= families[f as usize]);
        }
        update
    }
}

/// When the change of a slice happened in the cluster. What is deleted tells of its last change, which is not this one, and an
/// unchanged list of endpoints of none (kubernetes pkg/proxy/endpointschangetracker.go `EndpointSliceUpdate`).
fn triggered(touch: &Touch) -> Option<Timestamp> {
    let Facts::Slice(new) = &touch.new.as_ref()?.facts else { return None };
    if let Some(Facts::Slice(old)) = touch.old.as_ref().map(|old| &old.facts)
        && old.endpoints == new.endpoints
        && old.ports == new.ports
    {
        return None;
    }
    new.triggered
}

/// All generations that are on their way.
#[derive(Debug, Default)]
pub struct Updates {
    /// By generation.
    pending: VecDeque<Update>,
    /// By family: when a change of it was last in force everywhere.
    last: [Option<Timestamp>; 2],
}

impl Updates {
    /// A generation was published.
    pub fn published(&mut self, update: Update) {
        let is_full = self.pending.len() >= FOLLOWED;
        match self.pending.back_mut() {
            Some(back) if is_full => {
                back.generation = update.generation;
                for (family, changed) in back.families.iter_mut().zip(update.families) {
                    *family |= changed;
                }
            }
            _ => self.pending.push_back(update),
        }
    }

    /// `generation` is in force on every worker. Returns the generations that have become so.
    pub fn in_force(&mut self, generation: u64, now: Timestamp) -> Vec<Update> {
        let done = self.pending.iter().take_while(|update| update.generation <= generation).count();
        let done: Vec<Update> = self.pending.drain(..done).collect();
        for family in Family::ALL {
            if done.iter().any(|update| update.families[family as usize]) {
                self.last[family as usize] = Some(now);
            }
        }
        done
    }

    /// True if none is on its way.
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// For how long the oldest change of a family has been on its way, nanoseconds, if that is too long.
    pub fn late_ns(&self, family: Family, now_ns: u64) -> Option<u64> {
        let oldest = self.pending.iter().find(|update| update.families[family as usize])?;
        let waited = now_ns.saturating_sub(oldest.since_ns);
        (waited >= LATE_AFTER_NS).then_some(waited)
    }

    /// When a change of the family was last in force everywhere.
    pub fn last(&self, family: Family) -> Option<Timestamp> {
        self.last[family as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::compile::fixture::Cluster;
    use Family::{V4, V6};

    const S: u64 = 1_000_000_000;

    fn update(generation: u64, since_ns: u64, families: &[Family]) -> Update {
        let mut update = Update { families: [false; 2], ..Update::of_everything(generation, since_ns) };
        families.iter().for_each(|family| update.families[*family as usize] = true);
        update
    }

    fn late(updates: &Updates, now_ns: u64) -> Vec<Family> {
        Family::ALL.into_iter().filter(|family| updates.late_ns(*family, now_ns).is_some()).collect()
    }

    /// The cases of kubernetes pkg/proxy/healthcheck/healthcheck_test.go `testProxyHealthUpdater`.
    #[test]
    fn a_family_is_late_until_its_own_changes_are_in_force() {
        let mut updates = Updates::default();
        let wall = |second| Timestamp::from_second(second).unwrap();
        assert!(
            late(&updates, 0).is_empty() && updates.last(V4).is_none(),
            "healthy before the first change"
        );
        updates.published(update(1, 0, &[V4, V6]));
        assert_eq!(updates.in_force(1, wall(1)).len(), 1);
        assert!(late(&updates, 25 * S).is_empty(), "nothing is on its way, however long that is");

        updates.published(update(2, 25 * S, &[V4]));
        assert!(late(&updates, 34 * S).is_empty(), "on its way, but not late");
        assert_eq!(late(&updates, 50 * S), [V4]);
        assert_eq!(updates.late_ns(V4, 50 * S), Some(25 * S));
        updates.in_force(2, wall(50));
        assert!(late(&updates, 55 * S).is_empty());
        assert_eq!((updates.last(V4), updates.last(V6)), (Some(wall(50)), Some(wall(1))));

        updates.published(update(3, 55 * S, &[V6]));
        assert_eq!(late(&updates, 80 * S), [V6]);
        updates.in_force(3, wall(80));

        updates.published(update(4, 85 * S, &[V4, V6]));
        assert_eq!(late(&updates, 110 * S), [V4, V6]);
        updates.in_force(4, wall(110));

        // A change of one family in force says nothing of the other.
        updates.published(update(5, 115 * S, &[V4]));
        updates.published(update(6, 115 * S, &[V6]));
        assert_eq!(late(&updates, 140 * S), [V4, V6]);
        updates.in_force(5, wall(140));
        assert_eq!(late(&updates, 140 * S), [V6]);
        updates.in_force(6, wall(141));
        assert!(late(&updates, 141 * S).is_empty() && updates.is_settled());
    }

    #[test]
    fn a_newer_change_does_not_make_an_older_one_young() {
        let mut updates = Updates::default();
        for generation in 1..=5_000 {
            updates.published(update(generation, generation * S, &[V4]));
        }
        assert!(updates.pending.len() <= FOLLOWED);
        assert_eq!(updates.late_ns(V4, 5_000 * S), Some(4_999 * S));
        updates.in_force(4_999, Timestamp::UNIX_EPOCH);
        assert!(!updates.is_settled());
        updates.in_force(5_000, Timestamp::UNIX_EPOCH);
        assert!(updates.is_settled());
    }

    fn slice(family: &str, address: &str, second: i64) -> String {
        let time = Timestamp::from_second(second).unwrap();
        format!(
            "kind: EndpointSlice\nmetadata: {{name: s, labels: {{kubernetes.io/service-name: web}}, \
             annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{time}'}}}}\n\
             addressType: {family}\nports: [{{name: a, port: 1}}]\nendpoints: [{{addresses: ['{address}']}}]\n"
        )
    }

    #[test]
    fn families_and_times_come_from_what_was_touched() {
        let mut cluster = Cluster::new("[gateway]\nname = 'gw'", "");
        let started = Timestamp::from_second(1_000).unwrap();
        let mut change = |yaml: &str| {
            let touched = match yaml {
                "" => cluster.delete(config::control::Kind::EndpointSlice, "default", "s").touched,
                yaml => cluster.apply(yaml).touched,
            };
            let update = Update::of(1, 0, &touched, started);
            let triggered = update.triggered.iter().map(|(family, time)| (*family, time.as_second()));
            (update.families, triggered.collect::<Vec<_>>())
        };
        let (v4, v6, both) = ([true, false], [false, true], [true, true]);
        assert_eq!(change(&slice("IPv4", "10.0.0.1", 999)), (v4, vec![]), "from before our time");
        assert_eq!(change(&slice("IPv4", "10.0.0.2", 1_001)), (v4, vec![(V4, 1_001)]));
        assert_eq!(change(&slice("IPv4", "10.0.0.2", 1_002)), (v4, vec![]), "the endpoints are the same");
        assert_eq!(change(""), (v4, vec![]), "what is deleted tells of its last change");
        assert_eq!(change(&slice("IPv6", "fd00::1", 1_003)), (v6, vec![(V6, 1_003)]));
        let web = "kind: Service\nmetadata: {name: web}\nspec: {clusterIPs: [IPS], ports: [{port: 80}]}\n";
        assert_eq!(change(&web.replace("IPS", "10.96.0.1")), (v4, vec![]));
        assert_eq!(change(&web.replace("IPS", "10.96.0.1, 'fd00:96::1'")), (both, vec![]));
        assert_eq!(change("kind: Node\nmetadata: {name: n1}\n"), (both, vec![]));
    }
}
