//! Ends flows whose endpoint is gone: UDP flows are forgotten as kube-proxy forgets them, and flows of Services that ask for it are
//! reset, at once or after a time.
//!
//! The commit thread walks over the flow table in steps, once for each change that may have left something to end, and once for each
//! deadline. A flow that is to be reset is put into a phase of its own; the next packets of its two sides then learn of it
//! (`stage/reset`). After a restart deadlines begin anew: nothing remembers when an endpoint left.

use std::collections::{BTreeSet, HashMap};

use super::compile::cleanup::UdpCleanup;
use super::compile::lifetime::Lifetime;
use crate::addr::{Addr, protocol};
use crate::stage::flow::Phase;
use crate::table::flow_map::{FlowMap, FlowSnapshot};

/// Flow records looked at between two looks for changes.
const STEP: u32 = 512;

/// What is to become of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement {
    Stay,
    Forget,
    Reset,
}

/// Which endpoints of a port of a Service keep their connections, and since when the others have been going.
#[derive(Debug)]
struct Watched {
    lifetime: Lifetime,
    /// When the endpoints began to go that were staying before, seconds.
    since_s: HashMap<(Addr, u16), u32>,
    /// The same for all others: when the Service came under watch.
    watched_since_s: u32,
    /// The Service has no such port any more.
    is_over: bool,
}

impl Watched {
    /// When connections to an endpoint are to be reset; `None`: it stays.
    fn due_s(&self, endpoint: (Addr, u16)) -> Option<u32> {
        let after_s = self.lifetime.removal.after_s()?;
        if self.lifetime.staying.contains(&endpoint) {
            return None;
        }
        let since_s = self.since_s.get(&endpoint).copied().unwrap_or(self.watched_since_s);
        Some(since_s.saturating_add(after_s))
    }

    /// After this there is nothing more to do, unless the endpoints change.
    fn last_due_s(&self) -> u32 {
        let last_s = self.since_s.values().copied().max().unwrap_or(0).max(self.watched_since_s);
        last_s.saturating_add(self.lifetime.removal.after_s().unwrap_or(0))
    }
}

/// What the commit thread keeps of flows that are to end. All times are seconds of CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub struct Cleanup {
    udp: UdpCleanup,
    /// By stable id of the service port; Services that leave connections alone are not in it.
    watched: HashMap<u64, Watched>,
    /// When walks are due.
    due_s: BTreeSet<u32>,
    /// The next flow record to look at.
    cursor: Option<u32>,
    /// Something came since the walk began, which is for the next one.
    is_renewed: bool,
}

impl Cleanup {
    /// Takes over what a new generation brings.
    pub fn merge(&mut self, udp: UdpCleanup, lifetimes: Vec<(u64, Option<Lifetime>)>, now_s: u32) {
        self.is_renewed = true;
        if !udp.is_empty() {
            self.due_s.insert(now_s);
        }
        self.udp.merge(udp);
        for (service, lifetime) in lifetimes {
            self.watch(service, lifetime, now_s);
        }
    }

    /// `lifetime`: `None` if the Service has no such port any more.
    fn watch(&mut self, service: u64, lifetime: Option<Lifetime>, now_s: u32) {
        let old = self.watched.remove(&service);
        let is_over = lifetime.is_none();
        let lifetime = lifetime.unwrap_or_else(|| Lifetime {
            removal: old.as_ref().map(|old| old.lifetime.removal).unwrap_or_default(),
            ..Lifetime::default()
        });
        let Some(after_s) = lifetime.removal.after_s() else { return };
        let mut watched = match old {
            Some(old) if old.lifetime == lifetime => {
                self.watched.insert(service, Watched { is_over, ..old });
                return;
            }
            Some(old) => {
                let went = old.lifetime.staying.difference(&lifetime.staying);
                let mut since_s = old.since_s;
                for endpoint in went {
                    since_s.entry(*endpoint).or_insert(now_s);
                }
                Watched { lifetime, since_s, watched_since_s: old.watched_since_s, is_over }
            }
            None => Watched { lifetime, since_s: HashMap::new(), watched_since_s: now_s, is_over },
        };
        watched.since_s.retain(|endpoint, _| !watched.lifetime.staying.contains(endpoint));
        self.watched.insert(service, watched);
        self.due_s.insert(now_s.saturating_add(after_s));
    }

    /// Begins a walk if one is due. To be called when the newest generation is in force everywhere, so that no flow to an endpoint
    /// that is gone is made behind the walk.
    pub fn begin(&mut self, now_s: u32) {
        if self.due_s.first().is_some_and(|due_s| *due_s <= now_s) {
            self.due_s = self.due_s.split_off(&(now_s + 1));
            self.cursor = Some(0);
            self.is_renewed = false;
        }
    }

    /// True while a walk is under way.
    pub fn is_walking(&self) -> bool {
        self.cursor.is_some()
    }

    /// Looks at the next flows.
    pub fn step(&mut self, flows: &FlowMap, now_s: u32) {
        let Some(cursor) = self.cursor else { return };
        let capacity = flows.capacity() as u32;
        let end = cursor.saturating_add(STEP).min(capacity);
        for flow in (cursor..end).filter_map(|index| flows.snapshot(index)) {
            match self.judge(&flow, now_s) {
                Judgement::Stay => {}
                Judgement::Forget => drop(flows.remove_from_control(flow.id)),
                Judgement::Reset => drop(flows.set_phase_from_control(flow.id, Phase::TcpReset as u8)),
            }
        }
        self.cursor = (end < capacity).then_some(end);
        if self.cursor.is_none() && !self.is_renewed {
            self.udp = UdpCleanup::default();
            self.watched.retain(|_, watched| !watched.is_over || watched.last_due_s() > now_s);
        }
    }

    fn judge(&self, flow: &FlowSnapshot, now_s: u32) -> Judgement {
        let endpoint = (flow.endpoint_addr, flow.endpoint_port);
        let due_s = self.watched.get(&flow.service).and_then(|watched| watched.due_s(endpoint));
        let is_due = due_s.is_some_and(|due_s| due_s <= now_s);
        let is_over = [Phase::TcpClosing as u8, Phase::TcpReset as u8].contains(&flow.phase);
        match flow.original.protocol {
            protocol::TCP if is_due && !is_over => Judgement::Reset,
            protocol::TCP => Judgement::Stay,
            _ if is_due || self.udp.is_stale(flow) => Judgement::Forget,
            _ => Judgement::Stay,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::Tuple;
    use crate::control::compile::lifetime::Removal;
    use crate::table::flow_map::{FlowMapConfig, NewFlow};

    const WEB: u64 = 7;

    fn pod(i: u32) -> (Addr, u16) {
        (Addr::v4(0x0af4_0100 + i), 8080)
    }

    /// A TCP and a UDP flow to each of pods 1 to 3, of Service `WEB` and of another one.
    fn flows() -> FlowMap {
        let map = FlowMap::anonymous(FlowMapConfig { capacity: 6_000, workers: 2, ..Default::default() });
        let mut worker = map.worker(0);
        for service in [WEB, 8] {
            for (protocol, phase) in [(6, Phase::TcpEstablished), (17, Phase::Udp)] {
                for i in 1..=3 {
                    let dst = Addr::v4(100 + service as u32);
                    let original = Tuple { src: Addr::v4(i), dst, src_port: 9, dst_port: 80, protocol };
                    let (src, src_port) = pod(i);
                    // Another source port for each Service: the pods are the same.
                    let reply =
                        Tuple { src, src_port, dst_port: dst.v4_bits() as u16, ..original.reversed() };
                    let phase = phase as u8;
                    let new = NewFlow { original, reply: Some(reply), service, phase, ..NewFlow::default() };
                    map.insert(&mut worker, &new, 1).unwrap();
                }
            }
        }
        map
    }

    /// Pods of `WEB` whose TCP flow is to be reset, and those whose UDP flow is forgotten.
    fn ended(flows: &FlowMap) -> (Vec<u32>, Vec<u32>) {
        let all: Vec<_> = (0..6_000).filter_map(|index| flows.snapshot(index)).collect();
        assert_eq!(
            all.iter().filter(|flow| flow.service == 8 && flow.phase != Phase::TcpReset as u8).count(),
            6
        );
        let of = |i: &u32, protocol| {
            all.iter().find(|flow| {
                flow.service == WEB && flow.original.protocol == protocol && flow.endpoint_addr == pod(*i).0
            })
        };
        let reset = (1..=3).filter(|i| of(i, 6).is_some_and(|flow| flow.phase == Phase::TcpReset as u8));
        (reset.collect(), (1..=3).filter(|i| of(i, 17).is_none()).collect())
    }

    fn lifetime(removal: Removal, staying: &[u32]) -> Vec<(u64, Option<Lifetime>)> {
        let staying = Arc::new(staying.iter().map(|i| pod(*i)).collect());
        vec![(WEB, Some(Lifetime { removal, staying }))]
    }

    /// Walks as long as a walk is due.
    fn walk(cleanup: &mut Cleanup, flows: &FlowMap, now_s: u32) {
        cleanup.begin(now_s);
        while cleanup.is_walking() {
            cleanup.step(flows, now_s);
        }
    }

    /// See [`check`].
    type Step<'s> = (u32, Option<(Removal, &'s [u32])>, &'s [u32]);

    /// What is ended after each of the steps: seconds, and what changes then, if anything does.
    #[track_caller]
    fn check(steps: &[Step<'_>]) {
        let (flows, mut cleanup) = (flows(), Cleanup::default());
        for (now_s, change, expected) in steps {
            if let Some((removal, staying)) = change {
                cleanup.merge(UdpCleanup::default(), lifetime(*removal, staying), *now_s);
            }
            walk(&mut cleanup, &flows, *now_s);
            assert_eq!(ended(&flows), (expected.to_vec(), expected.to_vec()), "at {now_s} s");
        }
    }

    #[test]
    fn flows_are_left_alone_unless_the_service_says_otherwise() {
        check(&[
            (100, Some((Removal::Leave, &[1, 2, 3])), &[]),
            (110, Some((Removal::Leave, &[1])), &[]),
            // From now on: those that are gone already are reset too.
            (120, Some((Removal::WhenGone, &[1])), &[2, 3]),
        ]);
    }

    /// Rule 9.7.
    #[test]
    fn flows_of_an_endpoint_that_is_gone_are_reset_at_once_or_after_their_time() {
        check(&[
            (100, Some((Removal::WhenGone, &[1, 2, 3])), &[]),
            (110, Some((Removal::WhenGone, &[1, 3])), &[2]),
        ]);
        check(&[
            (100, Some((Removal::After(30), &[1, 2, 3])), &[]),
            (110, Some((Removal::After(30), &[1, 3])), &[]),
            (120, Some((Removal::After(30), &[1])), &[]),
            (139, None, &[]),
            (140, None, &[2]),
            (149, None, &[2]),
            (150, None, &[2, 3]),
        ]);
    }

    #[test]
    fn an_endpoint_that_comes_back_in_time_keeps_its_flows() {
        check(&[
            (100, Some((Removal::After(30), &[1, 2, 3])), &[]),
            (110, Some((Removal::After(30), &[1, 3])), &[]),
            (130, Some((Removal::After(30), &[1, 2, 3])), &[]),
            (200, None, &[]),
            // And goes again: its time begins anew.
            (210, Some((Removal::After(30), &[1, 3])), &[]),
            (239, None, &[]),
            (240, None, &[2]),
        ]);
    }

    /// Nothing is remembered of the time before: those that are not there have their whole time from now on.
    #[test]
    fn after_a_restart_the_time_begins_anew() {
        check(&[(100, Some((Removal::After(30), &[1])), &[]), (129, None, &[]), (130, None, &[2, 3])]);
    }

    #[test]
    fn another_deadline_holds_from_the_time_at_which_the_endpoint_left() {
        check(&[
            (100, Some((Removal::After(1_000), &[1, 2, 3])), &[]),
            (110, Some((Removal::After(1_000), &[1, 3])), &[]),
            (120, Some((Removal::After(20), &[1, 3])), &[]),
            (140, None, &[2]),
        ]);
    }

    #[test]
    fn a_service_that_is_deleted_takes_its_policy_along() {
        for (removal, at_once, later) in [
            (Removal::WhenGone, &[1, 2, 3][..], &[1, 2, 3][..]),
            (Removal::After(10), &[], &[1, 2, 3]),
            (Removal::Leave, &[], &[]),
        ] {
            let (flows, mut cleanup) = (flows(), Cleanup::default());
            cleanup.merge(UdpCleanup::default(), lifetime(removal, &[1, 2, 3]), 100);
            walk(&mut cleanup, &flows, 100);
            cleanup.merge(UdpCleanup::default(), vec![(WEB, None)], 110);
            walk(&mut cleanup, &flows, 110);
            assert_eq!(ended(&flows).0, at_once, "{removal:?}");
            walk(&mut cleanup, &flows, 120);
            assert_eq!(ended(&flows), (later.to_vec(), later.to_vec()), "{removal:?}");
            assert!(cleanup.watched.is_empty(), "nothing is kept of it");
        }
    }

    /// A change that comes in the middle of a walk is for the next walk: this one has passed some flows already.
    #[test]
    fn a_change_in_the_middle_of_a_walk_is_not_lost() {
        let (flows, mut cleanup) = (flows(), Cleanup::default());
        cleanup.merge(UdpCleanup::default(), lifetime(Removal::WhenGone, &[1, 2, 3]), 100);
        cleanup.begin(100);
        cleanup.step(&flows, 100);
        assert!(cleanup.is_walking(), "6,000 records are more than one step");
        cleanup.merge(UdpCleanup::default(), vec![(WEB, None)], 100);
        (0..6_000 / STEP).for_each(|_| cleanup.step(&flows, 100));
        assert!(!cleanup.is_walking());
        walk(&mut cleanup, &flows, 100);
        assert_eq!(ended(&flows).0, [1, 2, 3]);
    }

    #[test]
    fn a_walk_goes_in_steps_and_waits_for_its_time() {
        let (flows, mut cleanup) = (flows(), Cleanup::default());
        cleanup.merge(UdpCleanup::default(), lifetime(Removal::WhenGone, &[1]), 100);
        cleanup.begin(99);
        assert!(!cleanup.is_walking());
        cleanup.begin(100);
        cleanup.step(&flows, 100);
        assert!(cleanup.is_walking(), "6,000 records are more than one step");
        (0..6_000 / STEP).for_each(|_| cleanup.step(&flows, 100));
        assert!(!cleanup.is_walking());
        cleanup.begin(10_000);
        assert!(!cleanup.is_walking(), "nothing more is due");
    }
}
