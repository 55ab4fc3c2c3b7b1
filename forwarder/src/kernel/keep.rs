//! Which neighbors the kernel is asked to keep resolved.
//!
//! The kernel sees none of the traffic that workers forward, so to it every next hop looks unused. NTF_MANAGED has it probe them all
//! the same. What is to be kept follows from the forwarding table alone (gateways, endpoints, and every other neighbor that
//! packets can be sent to), and what is kept is read from the kernel's own table, so nothing has to be remembered over a restart:
//! a neighbor that no longer answers drops out of the table and is released.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use tracing::warn;

use super::fib::Forwarding;
use super::privileged::{Care, PROTOCOL, Privileged};
use super::snapshot::Neighbor;
use crate::addr::Addr;

/// Requests of one pass: bounds how long the mirror does not look at events.
const REQUESTS_PER_PASS: usize = 256;
/// A neighbor that was asked for is not asked for again so soon.
const REPEAT_AFTER: Duration = Duration::from_secs(5);
/// Workers ask again for each packet that has to wait; the kernel needs one request a second at most.
const RESOLVE_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Addresses resolved on demand in one second: a scan of a large subnet must not fill the kernel's neighbor table.
const RESOLVES_PER_SECOND: usize = 1_024;
/// Between two complaints about refused requests.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Asks for neighbors, boundedly.
pub struct Keep<P> {
    privileged: P,
    limit: usize,
    attempts: HashMap<(u32, Addr), Instant>,
    resolves: HashMap<(u32, Addr), Instant>,
    complained: Option<Instant>,
}

impl<P: Privileged> Keep<P> {
    /// `limit`: the most neighbors to keep; gateways and endpoints come first.
    pub fn new(privileged: P, limit: usize) -> Keep<P> {
        Keep { privileged, limit, attempts: HashMap::new(), resolves: HashMap::new(), complained: None }
    }

    /// Asks for what is wanted and not kept, and releases what is kept and not wanted. Returns how many are wanted but not kept yet.
    pub fn reconcile(
        &mut self,
        forwarding: &Forwarding,
        neighbors: &BTreeMap<(u32, Addr), Neighbor>,
        now: Instant,
    ) -> usize {
        self.attempts.retain(|_, at| now.duration_since(*at) < REPEAT_AFTER);
        let wanted: BTreeSet<_> =
            forwarding.needed.iter().chain(&forwarding.learned).copied().take(self.limit).collect();
        let mut budget = REQUESTS_PER_PASS;
        let mut missing = 0;
        for &key in &wanted {
            // Asking for an entry of an administrator would make it an ordinary one.
            if neighbors.get(&key).is_some_and(|n| n.managed || n.is_fixed()) {
                continue;
            }
            missing += 1;
            if budget > 0 && !self.attempts.contains_key(&key) {
                budget -= 1;
                self.attempts.insert(key, now);
                self.ask(key, Care::Keep, now);
            }
        }
        let ours = neighbors.iter().filter(|(_, n)| n.managed && n.protocol == PROTOCOL);
        for (&key, _) in ours.filter(|(key, _)| !wanted.contains(key)).take(budget) {
            self.ask(key, Care::Release, now);
        }
        missing
    }

    /// Resolves a neighbor that a packet waits for. False if that was asked lately or too much is being asked.
    pub fn resolve(&mut self, link: u32, addr: Addr, now: Instant) -> bool {
        self.resolves.retain(|_, at| now.duration_since(*at) < RESOLVE_AGAIN_AFTER);
        if self.resolves.len() >= RESOLVES_PER_SECOND || self.resolves.contains_key(&(link, addr)) {
            return false;
        }
        self.resolves.insert((link, addr), now);
        self.ask((link, addr), Care::Resolve, now);
        true
    }

    fn ask(&mut self, (link, addr): (u32, Addr), care: Care, now: Instant) {
        let Err(error) = self.privileged.neighbor(link, addr.into(), care) else { return };
        // It was gone before it could be released.
        let gone = error.raw_os_error() == Some(libc::ENOENT) && care == Care::Release;
        let lately = self.complained.is_some_and(|at| now.duration_since(at) < COMPLAIN_EVERY);
        if gone || lately {
            return;
        }
        self.complained = Some(now);
        let remedy = match error.raw_os_error() {
            Some(libc::ENOBUFS) => {
                let family = if addr.is_v4() { "ipv4" } else { "ipv6" };
                format!(": the kernel's neighbor table is full, raise net.{family}.neigh.default.gc_thresh3")
            }
            _ => String::new(),
        };
        warn!("neighbor {addr} on interface {link} cannot be asked for ({care:?}): {error}{remedy}");
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::IpAddr;
    use std::sync::{Arc, Mutex};

    use super::*;

    const REACHABLE: u16 = 0x02;

    /// Notes what is asked, and refuses it if told to.
    #[derive(Clone, Default)]
    struct Notes {
        asked: Arc<Mutex<Vec<(u32, IpAddr, Care)>>>,
        errno: Option<i32>,
    }

    impl Privileged for Notes {
        fn neighbor(&mut self, link: u32, addr: IpAddr, care: Care) -> io::Result<()> {
            self.asked.lock().unwrap().push((link, addr, care));
            self.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
        }
    }

    fn key(last: u32) -> (u32, Addr) {
        (3, Addr::v4(0x0a00_0000 + last))
    }

    fn entry(state: u16, managed: bool, protocol: u8) -> Neighbor {
        Neighbor { mac: Some([2; 6]), state, managed, protocol }
    }

    fn asked(notes: &Notes) -> Vec<(u32, Care)> {
        let drained = std::mem::take(&mut *notes.asked.lock().unwrap());
        drained.into_iter().map(|(_, addr, care)| (Addr::from(addr).v4_bits() & 0xff_ffff, care)).collect()
    }

    #[test]
    fn what_is_wanted_is_kept_and_what_is_ours_and_not_wanted_is_released() {
        let notes = Notes::default();
        let mut keep = Keep::new(notes.clone(), 100);
        let forwarding = Forwarding {
            needed: [key(1), key(2)].into(),
            learned: [key(3), key(4)].into(),
            ..Forwarding::default()
        };
        let neighbors = BTreeMap::from([
            (key(2), entry(REACHABLE, true, PROTOCOL)), // kept already
            (key(3), entry(REACHABLE, false, 0)),
            (key(4), entry(Neighbor::PERMANENT, false, 0)), // an administrator's
            (key(5), entry(Neighbor::FAILED, true, PROTOCOL)), // ours, no longer wanted
            (key(6), entry(REACHABLE, true, 0)),            // kept by somebody else
        ]);
        let now = Instant::now();
        assert_eq!(keep.reconcile(&forwarding, &neighbors, now), 2);
        assert_eq!(asked(&notes), [(1, Care::Keep), (3, Care::Keep), (5, Care::Release)]);
        // Not again at once, but later.
        keep.reconcile(&forwarding, &neighbors, now + REPEAT_AFTER / 2);
        assert_eq!(asked(&notes), [(5, Care::Release)]);
        keep.reconcile(&forwarding, &neighbors, now + REPEAT_AFTER);
        assert_eq!(asked(&notes).len(), 3);
    }

    #[test]
    fn the_limit_prefers_what_is_needed_and_a_pass_is_bounded() {
        let notes = Notes { errno: Some(libc::ENOBUFS), ..Notes::default() };
        let learned: BTreeSet<_> = (100..1_000).map(key).collect();
        let forwarding =
            Forwarding { needed: [key(2_000)].into(), learned: learned.clone(), ..Forwarding::default() };
        let mut keep = Keep::new(notes.clone(), 3);
        keep.reconcile(&forwarding, &BTreeMap::new(), Instant::now());
        assert_eq!(asked(&notes), [(100, Care::Keep), (101, Care::Keep), (2_000, Care::Keep)]);
        let mut keep = Keep::new(notes.clone(), 10_000);
        assert_eq!(keep.reconcile(&forwarding, &BTreeMap::new(), Instant::now()), 901);
        assert_eq!(asked(&notes).len(), REQUESTS_PER_PASS);
    }

    #[test]
    fn resolving_is_asked_once_a_second_and_bounded() {
        let notes = Notes::default();
        let mut keep = Keep::new(notes.clone(), 100);
        let now = Instant::now();
        assert!(keep.resolve(3, key(1).1, now));
        assert!(!keep.resolve(3, key(1).1, now));
        assert!(keep.resolve(3, key(1).1, now + RESOLVE_AGAIN_AFTER));
        let taken = (10..5_000).filter(|n| keep.resolve(3, key(*n).1, now + RESOLVE_AGAIN_AFTER)).count();
        assert_eq!(taken, RESOLVES_PER_SECOND - 1);
    }
}
