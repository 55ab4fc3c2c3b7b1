//! Keeps the steering maps at what the newest tables and the open flows need.
//!
//! A Service, a NodePort or an endpoint that is deleted leaves its connections alone, as it does with kube-proxy, where the kernel's
//! connection tracking goes on translating them. Here their packets must still come to a worker. So before anything is taken out
//! of the maps, the commit thread walks over the flow table, in steps; what a flow needs stays, and is asked for again
//! ten seconds later.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::Steer;
use crate::addr::protocol;
use crate::port::xsk::steer::{Contents, LocalAddress, LocalPort, PrefixUse, SteerSet, set::prefix_flag};
use crate::table::flow_map::{FlowMap, FlowSnapshot};

/// Flow records looked at between two looks for changes.
const STEP: u32 = 512;

/// How long what only flows need stays at least.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

/// The steering maps and what they should hold.
pub struct Steering {
    maps: Arc<dyn Steer>,
    in_maps: Contents,
    masquerade_ports: (u16, u16),
    /// For the newest generation, as a set and as the maps have it.
    wanted: SteerSet,
    wanted_in_maps: Contents,
    /// What flows needed besides, when they were last asked.
    held: SteerSet,
    /// When they are to be asked again.
    again: Option<Instant>,
    walk: Option<Walk>,
    /// The maps may hold more than is wanted.
    may_shrink: bool,
}

impl Steering {
    /// Takes over the maps as they are.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn new(maps: Arc<dyn Steer>, masquerade_ports: (u16, u16)) -> Result<Steering, String> {
        let in_maps = maps.contents()?;
        Ok(Steering {
            maps,
            in_maps,
            masquerade_ports,
            wanted: SteerSet::default(),
            wanted_in_maps: Contents::default(),
            held: SteerSet::default(),
            again: None,
            walk: None,
            may_shrink: true,
        })
    }

    /// Makes the maps catch what the next generation serves, besides what they catch already.
    ///
    /// # Errors
    /// There is no room: everything is as it was.
    pub fn grow(&mut self, wanted: SteerSet) -> Result<(), String> {
        let before = self.in_maps.clone();
        let wanted_in_maps = wanted.contents();
        if let Err(error) = self.grow_to(&wanted_in_maps) {
            // Some of it may be in the maps.
            let _ = self.bring_to(&before);
            return Err(error);
        }
        (self.wanted, self.wanted_in_maps) = (wanted, wanted_in_maps);
        self.may_shrink = true;
        // What flows were found to need so far goes by the generation before.
        self.walk = None;
        Ok(())
    }

    /// Makes the maps catch what open flows need, besides what they catch already.
    ///
    /// # Errors
    /// There is no room for all of it.
    pub fn grow_for_flows(&mut self, flows: &FlowMap) -> Result<(), String> {
        let mut walk = Walk::begin(&self.wanted_in_maps);
        while walk.step(flows, &self.wanted, &self.wanted_in_maps, self.masquerade_ports) {}
        self.held = walk.needed;
        let target = self.target();
        self.grow_to(&target)
    }

    /// To be called when the newest generation is in force everywhere: what only older ones needed may go.
    pub fn begin_shrink(&mut self) {
        // A walk that is under way goes on: what is wanted is the same, or it would have been given up.
        if self.walk.is_none() && self.may_shrink {
            self.may_shrink = self.in_maps != self.wanted_in_maps;
            self.walk = self.may_shrink.then(|| Walk::begin(&self.wanted_in_maps));
        }
    }

    /// True while the flow table is walked over.
    pub fn is_walking(&self) -> bool {
        self.walk.is_some()
    }

    /// Looks at the next flows, if a walk is under way or due. At the end of one, takes away what nobody needs; returns how that went.
    pub fn step(&mut self, flows: &FlowMap, now: Instant) -> Option<Result<(), String>> {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            self.may_shrink = true;
            self.begin_shrink();
        }
        let walk = self.walk.as_mut()?;
        if walk.step(flows, &self.wanted, &self.wanted_in_maps, self.masquerade_ports) {
            return None;
        }
        self.held = self.walk.take().map(|walk| walk.needed).unwrap_or_default();
        self.again = (!self.held.is_empty()).then_some(now + AGAIN_AFTER);
        let target = self.target();
        Some(self.bring_to(&target))
    }

    /// What the maps should hold.
    fn target(&self) -> Contents {
        if self.held.is_empty() {
            return self.wanted_in_maps.clone();
        }
        let mut set = self.wanted.clone();
        set.extend(&self.held);
        set.contents()
    }

    fn grow_to(&mut self, target: &Contents) -> Result<(), String> {
        let (grow, _) = self.in_maps.difference(target);
        if grow.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.maps.apply(grow.clone()) {
            self.look();
            return Err(error);
        }
        self.in_maps.apply(&grow);
        Ok(())
    }

    /// Brings the maps to exactly `target`.
    fn bring_to(&mut self, target: &Contents) -> Result<(), String> {
        let (grow, shrink) = self.in_maps.difference(target);
        let mut result = Ok(());
        for change in [grow, shrink].into_iter().filter(|change| !change.is_empty()) {
            match self.maps.apply(change.clone()) {
                Ok(()) => self.in_maps.apply(&change),
                Err(error) => {
                    result = Err(error);
                    self.look();
                }
            }
        }
        result
    }

    /// Reads the maps after a change of which some may have been made.
    fn look(&mut self) {
        if let Ok(contents) = self.maps.contents() {
            self.in_maps = contents;
            self.may_shrink = true;
        }
    }
}

/// A walk over the flow table in search of what flows need.
struct Walk {
    next: u32,
    /// Lengths of all prefixes in the maps, longest first.
    lengths: Vec<u8>,
    needed: SteerSet,
}

impl Walk {
    fn begin(wanted: &Contents) -> Walk {
        let lengths: BTreeSet<u8> = wanted.prefixes.keys().map(IpNet::prefix_len).collect();
        Walk { next: 0, lengths: lengths.into_iter().rev().collect(), needed: SteerSet::default() }
    }

    /// Looks at the next flows; false if there are no more.
    fn step(&mut self, flows: &FlowMap, set: &SteerSet, wanted: &Contents, ports: (u16, u16)) -> bool {
        let capacity = flows.capacity() as u32;
        let end = self.next.saturating_add(STEP).min(capacity);
        for flow in (self.next..end).filter_map(|index| flows.snapshot(index)) {
            self.note(&flow, set, wanted, ports);
        }
        self.next = end;
        end < capacity
    }

    /// Notes what brings the packets of both directions of a flow to a worker, as far as it is not wanted anyway.
    fn note(&mut self, flow: &FlowSnapshot, set: &SteerSet, wanted: &Contents, ports: (u16, u16)) {
        let Some(reply) = flow.reply else { return };
        let original = &flow.original;
        // An echo's identifier stands in both ports, and is another one where the source is masqueraded.
        let is_echo = matches!(original.protocol, protocol::ICMP | protocol::ICMPV6);
        let is_redirected = reply.src != original.dst || reply.src_port != original.dst_port && !is_echo;
        let is_masqueraded = reply.dst != original.src;
        if is_redirected {
            let addr = IpAddr::from(original.dst);
            if set.local.contains_key(&addr) {
                let port = LocalPort { addr, protocol: original.protocol, port: original.dst_port };
                if !set.local_ports.contains(&port) {
                    self.needed.local_ports.insert(port);
                }
            } else if !set.vips.contains(&addr) && self.flags(wanted, addr) & !prefix_flag::SOURCE == 0 {
                self.needed.vips.insert(addr);
            }
            self.note_source(reply.src.into(), wanted);
        } else if is_masqueraded {
            // A pod on its way out.
            self.note_source(original.src.into(), wanted);
        }
        if is_masqueraded {
            let addr = IpAddr::from(reply.dst);
            let masquerades = |local: &LocalAddress| local.masquerade_ports.is_some();
            if !set.local.get(&addr).is_some_and(masquerades) {
                self.needed.local.insert(addr, LocalAddress { masquerade_ports: Some(ports) });
            }
            // A port of a range that was another one before a restart.
            if !(ports.0..=ports.1).contains(&reply.dst_port) && !is_echo {
                let port = LocalPort { addr, protocol: original.protocol, port: reply.dst_port };
                self.needed.local_ports.insert(port);
            }
        }
    }

    /// Packets of this source must come to a worker.
    fn note_source(&mut self, source: IpAddr, wanted: &Contents) {
        if self.flags(wanted, source) & prefix_flag::SOURCE == 0 {
            let usage = PrefixUse { source: true, ..PrefixUse::default() };
            self.needed.prefixes.insert(source.into(), usage);
        }
    }

    /// What the longest prefix around an address says; [`prefix_flag`].
    fn flags(&self, wanted: &Contents, addr: IpAddr) -> u32 {
        let nets = self.lengths.iter().filter_map(|length| IpNet::new(addr, *length).ok());
        nets.filter_map(|net| wanted.prefixes.get(&net.trunc())).next().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use config::control::Count;

    use super::*;
    use crate::addr::{Addr, Tuple};
    use crate::port::xsk::steer::SteerChange;
    use crate::stage::flow::Phase;
    use crate::table::flow_map::{FlowId, FlowMapConfig, NewFlow};

    const PORTS: (u16, u16) = (61_000, 65_535);

    #[derive(Clone, Default)]
    struct Maps(Arc<Mutex<Contents>>);

    impl Steer for Maps {
        fn contents(&self) -> Result<Contents, String> {
            Ok(self.0.lock().unwrap().clone())
        }

        fn apply(&self, change: SteerChange) -> Result<(), String> {
            self.0.lock().unwrap().apply(&change);
            Ok(())
        }

        fn counters(&self) -> Vec<Count> {
            Vec::new()
        }
    }

    impl Maps {
        /// True if everything in `set` is redirected.
        fn catch(&self, set: &SteerSet) -> bool {
            self.0.lock().unwrap().difference(&set.contents()).0.is_empty()
        }
    }

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    /// What a LoadBalancer address, a NodePort and an endpoint on a node need; `ranges` are there in any case.
    fn everything() -> SteerSet {
        let mut set = ranges();
        set.vips.insert("203.0.113.10".parse().unwrap());
        let addr = "192.0.2.1".parse().unwrap();
        set.local_ports.insert(LocalPort { addr, protocol: protocol::TCP, port: 30_080 });
        set.local.insert(addr, LocalAddress { masquerade_ports: Some(PORTS) });
        let source = PrefixUse { source: true, ..PrefixUse::default() };
        set.prefixes.insert("10.2.0.11/32".parse().unwrap(), source);
        set
    }

    fn ranges() -> SteerSet {
        let mut set = SteerSet::default();
        set.local.insert("192.0.2.1".parse().unwrap(), LocalAddress::default());
        let pods = PrefixUse { source: true, destination: true, service: false };
        set.prefixes.insert("10.244.0.0/16".parse().unwrap(), pods);
        let services = PrefixUse { service: true, ..PrefixUse::default() };
        set.prefixes.insert("10.96.0.0/16".parse().unwrap(), services);
        set
    }

    #[test]
    fn flows_masqueraded_to_ports_of_another_range_are_caught() {
        let mut set = ranges();
        set.local
            .insert("192.0.2.1".parse().unwrap(), LocalAddress { masquerade_ports: Some((50_000, 60_000)) });
        for (ports, needs_port) in [((50_000, 60_000), true), (PORTS, false)] {
            let (flows, _) = flows(&[("10.96.0.1", 80, "10.244.1.7", Some("192.0.2.1"))]);
            let maps = Maps::default();
            let mut steering = Steering::new(Arc::new(maps.clone()), ports).unwrap();
            steering.grow(set.clone()).unwrap();
            steering.grow_for_flows(&flows).unwrap();
            let mut expected = set.clone();
            if needs_port {
                let addr = "192.0.2.1".parse().unwrap();
                expected.local_ports.insert(LocalPort { addr, protocol: protocol::TCP, port: MASQUERADED });
            }
            assert_eq!(*maps.0.lock().unwrap(), expected.contents(), "{ports:?}");
        }
    }

    #[test]
    fn pods_on_their_way_out_are_sources_and_whom_they_ping_is_no_vip() {
        let map = FlowMap::anonymous(FlowMapConfig { capacity: 10_000, workers: 1, ..Default::default() });
        let mut worker = map.worker(0);
        // The pods are in no range any more.
        for (protocol, src_port, dst_port, mapped) in
            [(protocol::TCP, 4242, 443, (61_000, 443)), (protocol::ICMP, 7, 7, (61_001, 61_001))]
        {
            let (src, dst) = (addr("10.7.0.5"), addr("198.51.100.2"));
            let original = Tuple { src, dst, src_port, dst_port, protocol };
            let sent = Tuple { src: addr("192.0.2.1"), src_port: mapped.0, dst_port: mapped.1, ..original };
            let new = NewFlow { original, reply: Some(sent.reversed()), phase: 5, ..NewFlow::default() };
            map.insert(&mut worker, &new, 1).unwrap();
        }
        let maps = Maps::default();
        let mut steering = Steering::new(Arc::new(maps.clone()), PORTS).unwrap();
        steering.grow(ranges()).unwrap();
        steering.grow_for_flows(&map).unwrap();
        let mut expected = ranges();
        expected
            .prefixes
            .insert("10.7.0.5/32".parse().unwrap(), PrefixUse { source: true, ..PrefixUse::default() });
        let local = LocalAddress { masquerade_ports: Some(PORTS) };
        expected.local.insert("192.0.2.1".parse().unwrap(), local);
        assert_eq!(*maps.0.lock().unwrap(), expected.contents());
    }

    /// Source port of every masqueraded flow here.
    const MASQUERADED: u16 = 61_234;

    /// Flows of one client: to `destination`, translated to `endpoint`, masqueraded or not.
    fn flows(wanted: &[(&str, u16, &str, Option<&str>)]) -> (FlowMap, Vec<FlowId>) {
        let map = FlowMap::anonymous(FlowMapConfig { capacity: 10_000, workers: 1, ..Default::default() });
        let mut worker = map.worker(0);
        for (i, (destination, port, endpoint, snat)) in wanted.iter().enumerate() {
            let original = Tuple {
                src: addr("198.51.100.2"),
                dst: addr(destination),
                src_port: 40_000 + i as u16,
                dst_port: *port,
                protocol: protocol::TCP,
            };
            let mut reply = original.reversed();
            reply.src = addr(endpoint);
            if let Some(snat) = snat {
                (reply.dst, reply.dst_port) = (addr(snat), MASQUERADED);
            }
            let phase = Phase::TcpEstablished as u8;
            map.insert(
                &mut worker,
                &NewFlow { original, reply: Some(reply), phase, ..NewFlow::default() },
                1,
            )
            .unwrap();
        }
        let ids = (0..10_000).filter_map(|index| map.snapshot(index)).map(|flow| flow.id).collect();
        (map, ids)
    }

    /// Walks until there is no more to do.
    fn walk(steering: &mut Steering, flows: &FlowMap, now: Instant) {
        steering.step(flows, now);
        while steering.is_walking() {
            assert!(steering.step(flows, now).is_none_or(|result| result.is_ok()));
        }
    }

    #[test]
    fn what_open_flows_need_stays_until_they_are_gone() {
        for (flow, needed) in [
            (("203.0.113.10", 80, "10.244.1.7", None), "vip"),
            (("192.0.2.1", 30_080, "10.244.1.7", None), "port"),
            (("10.96.0.1", 80, "10.2.0.11", None), "source"),
            (("10.96.0.1", 80, "10.244.1.7", Some("192.0.2.1")), "masquerade"),
            (("10.96.0.1", 80, "10.244.1.7", None), "nothing"),
        ] {
            let mut rest = ranges();
            let all = everything();
            match needed {
                "vip" => rest.vips = all.vips,
                "port" => rest.local_ports = all.local_ports,
                "source" => rest.prefixes = all.prefixes,
                "masquerade" => rest.local = all.local,
                _ => {}
            }
            let (flows, ids) = flows(&[flow]);
            let maps = Maps::default();
            let mut steering = Steering::new(Arc::new(maps.clone()), PORTS).unwrap();
            let mut now = Instant::now();
            steering.grow(everything()).unwrap();
            steering.begin_shrink();
            walk(&mut steering, &flows, now);
            assert_eq!(*maps.0.lock().unwrap(), everything().contents());

            steering.grow(ranges()).unwrap();
            assert!(maps.catch(&everything()), "not in force everywhere yet");
            steering.begin_shrink();
            walk(&mut steering, &flows, now);
            assert_eq!(*maps.0.lock().unwrap(), rest.contents(), "{needed}");
            now += AGAIN_AFTER;
            walk(&mut steering, &flows, now);
            assert_eq!(*maps.0.lock().unwrap(), rest.contents(), "{needed}: it is still open");

            assert!(flows.remove_from_control(ids[0]));
            walk(&mut steering, &flows, now + AGAIN_AFTER / 2);
            assert_eq!(*maps.0.lock().unwrap(), rest.contents(), "{needed}: not asked yet");
            walk(&mut steering, &flows, now + AGAIN_AFTER);
            assert_eq!(*maps.0.lock().unwrap(), ranges().contents(), "{needed}: nobody needs it");
        }
    }

    #[test]
    fn a_change_in_the_middle_of_a_walk_begins_it_anew() {
        let (flows, _) = flows(&[("203.0.113.10", 80, "10.2.0.11", None)]);
        let maps = Maps::default();
        let mut steering = Steering::new(Arc::new(maps.clone()), PORTS).unwrap();
        let now = Instant::now();
        steering.grow(everything()).unwrap();
        steering.grow(ranges()).unwrap();
        steering.begin_shrink();
        assert!(steering.step(&flows, now).is_none() && steering.is_walking());
        steering.grow(everything()).unwrap();
        assert!(!steering.is_walking());
        steering.begin_shrink();
        walk(&mut steering, &flows, now);
        assert_eq!(*maps.0.lock().unwrap(), everything().contents());
    }

    #[test]
    fn flows_of_before_a_restart_are_caught_from_the_start() {
        let (flows, _) = flows(&[("203.0.113.10", 80, "10.2.0.11", Some("192.0.2.1"))]);
        let maps = Maps::default();
        let mut steering = Steering::new(Arc::new(maps.clone()), PORTS).unwrap();
        steering.grow(ranges()).unwrap();
        steering.grow_for_flows(&flows).unwrap();
        let mut needed = everything();
        needed.local_ports.clear();
        assert_eq!(*maps.0.lock().unwrap(), needed.contents());
        steering.begin_shrink();
        walk(&mut steering, &flows, Instant::now());
        assert_eq!(*maps.0.lock().unwrap(), needed.contents());
    }

    #[test]
    fn a_change_that_has_no_room_takes_nothing_away_from_flows() {
        struct Full(Maps);
        impl Steer for Full {
            fn contents(&self) -> Result<Contents, String> {
                self.0.contents()
            }
            fn apply(&self, change: SteerChange) -> Result<(), String> {
                let is_too_much = change.addresses.iter().any(|(addr, _)| addr.to_string() == "203.0.113.99");
                self.0.apply(change)?;
                if is_too_much { Err("full".into()) } else { Ok(()) }
            }
            fn counters(&self) -> Vec<Count> {
                Vec::new()
            }
        }
        let (flows, _) = flows(&[("203.0.113.10", 80, "10.2.0.11", None)]);
        let maps = Maps::default();
        let mut steering = Steering::new(Arc::new(Full(maps.clone())), PORTS).unwrap();
        steering.grow(everything()).unwrap();
        steering.grow(ranges()).unwrap();
        steering.begin_shrink();
        // Before the walk has come to the flow.
        let mut too_much = ranges();
        too_much.vips.insert("203.0.113.99".parse().unwrap());
        assert_eq!(steering.grow(too_much), Err("full".into()));
        assert_eq!(*maps.0.lock().unwrap(), everything().contents());
        walk(&mut steering, &flows, Instant::now());
        assert!(maps.0.lock().unwrap().addresses.contains_key(&"203.0.113.10".parse::<IpAddr>().unwrap()));
    }
}
