//! The thread that keeps the forwarding table equal to what the kernel says.
//!
//! Links, addresses, routes and rules are read anew whenever a notification says that one of them changed: the kernel drops routes
//! without a word when an interface goes down, replaces others under one notification, and reports multipath routes of IPv6 hop by
//! hop, so notifications tell *that* something changed and only a dump tells *what is*. Neighbors change far more often and are
//! reported completely, one entry a notification, so those are taken from the notifications. Lost notifications (ENOBUFS) and the
//! clock (once a minute) lead to a dump of everything.
//!
//! Bursts are coalesced: at most 1,000 tables a second, and fewer when building one takes long, so that at most a quarter
//! of the thread's time goes into building. A table equal to the one in force is not published.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam::queue::ArrayQueue;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use tracing::{debug, info, warn};

use super::changes;
use super::decode::{self, INET, INET6};
use super::fib::{self, Forwarding, Wanted};
use super::keep::Keep;
use super::message::{Message, kind};
use super::privileged::{self, Privileged};
use super::snapshot::{Neighbor, Snapshot};
use super::socket::Socket;
use crate::addr::Addr;
use crate::table::lpm::Lpm;
use crate::tables::{Fib, Route};

/// RTNLGRP_LINK 1, NEIGH 3, IPV4_IFADDR 5, IPV4_ROUTE 7, IPV4_RULE 8, IPV6_IFADDR 9, IPV6_ROUTE 11, IPV6_RULE 19, NEXTHOP 32.
const GROUPS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 18 | 1 << 31;
/// How long [`Mirror::want`] waits at most.
const WANT_PATIENCE: Duration = Duration::from_secs(1);
/// Shortest time between two tables.
const BUILD_EVERY: Duration = Duration::from_millis(1);
/// Longest time between two tables while something changes, however long building takes.
const BUILD_PAUSE: Duration = Duration::from_secs(1);
/// A build may take one part in this many of the thread's time.
const BUILD_SHARE: u32 = 4;
/// How often neighbors are looked after when nothing happens.
const KEEP_EVERY: Duration = Duration::from_secs(1);
/// How often everything is read anew when nothing happens.
const RESYNC_EVERY: Duration = Duration::from_secs(60);
/// After a dump failed.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Notifications taken between two looks at the clock.
const DATAGRAMS_PER_ROUND: usize = 1_024;
/// Unresolved destinations that workers can have asked for and the mirror has not seen yet.
const ASKS: usize = 1_024;

/// What the mirror is told once.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// Interface name of each port, by port index.
    pub ports: Vec<String>,
    /// The most neighbors that the kernel is asked to keep resolved.
    pub neighbor_limit: usize,
}

/// The running mirror. Dropping it ends its thread; what the kernel was asked to keep stays kept.
#[derive(Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the mirror did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MirrorStats {
    /// Forwarding tables published.
    pub published: u64,
    /// Times that notifications were lost and everything was read anew.
    pub overruns: u64,
    /// Destinations resolved because a packet waited for them.
    pub resolved: u64,
    /// Destinations not resolved: asked for too often, too many at once, or not on a link of ours.
    pub unresolved: u64,
    /// Neighbors that ought to be kept resolved and are not yet.
    pub neighbors_missing: u64,
}

/// What control wants, and how far the mirror has come with it.
#[derive(Debug, Default)]
struct Wants {
    next: Option<Wanted>,
    /// Counts calls of [`Mirror::want`].
    asked: u64,
    /// The last of them whose wishes are in a published table.
    done: u64,
}

#[derive(Debug)]
struct Shared {
    wants: Mutex<Wants>,
    wants_done: Condvar,
    asks: ArrayQueue<(u8, Addr)>,
    /// Set by the first ask after the queue was emptied: only that one pays for a system call.
    asked: AtomicBool,
    stop: AtomicBool,
    wake: OwnedFd,
    snapshot: ArcSwap<Snapshot>,
    published: AtomicU64,
    overruns: AtomicU64,
    resolved: AtomicU64,
    unresolved: AtomicU64,
    neighbors_missing: AtomicU64,
}

impl Shared {
    fn wake(&self) {
        // Fails only when the counter is about to overflow, and then the mirror is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// A worker's way to have a destination resolved.
#[derive(Clone, Debug)]
pub struct Asks(Arc<Shared>);

impl Asks {
    /// Asks for the next hop `addr` on port `port` ([`Route::OnLink`]: the destination itself). Worker thread; never waits. The
    /// answer is a newer epoch of the forwarding table. False: the queue is full, ask again.
    pub fn ask(&self, port: u8, addr: Addr) -> bool {
        let taken = self.0.asks.push((port, addr)).is_ok();
        if !self.0.asked.swap(true, Ordering::AcqRel) {
            self.0.wake();
        }
        taken
    }
}

impl Mirror {
    /// Reads the kernel's tables of the calling thread's network namespace, publishes the first forwarding table, and starts the
    /// thread that follows changes. `publish` is called on that thread, but for the first time on the caller's; epochs count from 1.
    ///
    /// # Errors
    /// The kernel refuses a socket or a dump.
    pub fn start<P, F>(config: MirrorConfig, privileged: P, publish: F) -> io::Result<Mirror>
    where
        P: Privileged + 'static,
        F: FnMut(Fib) + Send + 'static,
    {
        let shared = Arc::new(Shared {
            wants: Mutex::default(),
            wants_done: Condvar::new(),
            asks: ArrayQueue::new(ASKS),
            asked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            snapshot: ArcSwap::default(),
            published: AtomicU64::new(0),
            overruns: AtomicU64::new(0),
            resolved: AtomicU64::new(0),
            unresolved: AtomicU64::new(0),
            neighbors_missing: AtomicU64::new(0),
        });
        let mut follower = Follower {
            // Subscribed before the first dump, so that no change falls between the two.
            events: Socket::subscribe(GROUPS)?,
            requests: Socket::open()?,
            keep: Keep::new(privileged, config.neighbor_limit),
            ports: config.ports,
            shared: shared.clone(),
            publish,
            state: Snapshot::default(),
            wanted: Wanted::default(),
            taken: 0,
            forwarding: Forwarding::default(),
            routes: Arc::default(),
            epoch: 0,
            stale: Stale::EVERYTHING,
            lost: false,
        };
        follower.refresh()?;
        if let Some(fib) = follower.build() {
            (follower.publish)(fib);
        }
        let thread = std::thread::Builder::new().name("mirror".into()).spawn(move || follower.run())?;
        Ok(Mirror { shared, thread: Some(thread) })
    }

    /// Replaces what Kubernetes objects ask of the forwarding table; if `wait`, returns when it is published: some milliseconds, so that no
    /// Service is served before there are routes to its endpoints. False: not within a second; it will take effect later.
    pub fn want(&self, wanted: Wanted, wait: bool) -> bool {
        let mut wants = self.shared.wants.lock().unwrap_or_else(PoisonError::into_inner);
        wants.next = Some(wanted);
        wants.asked += 1;
        let mine = wants.asked;
        self.shared.wake();
        if !wait {
            return true;
        }
        let done = self.shared.wants_done.wait_timeout_while(wants, WANT_PATIENCE, |wants| wants.done < mine);
        !done.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// What a worker asks through.
    pub fn asks(&self) -> Asks {
        Asks(self.shared.clone())
    }

    /// What the kernel said, at most a second ago.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// What the mirror did so far.
    pub fn stats(&self) -> MirrorStats {
        let shared = &self.shared;
        MirrorStats {
            published: shared.published.load(Ordering::Relaxed),
            overruns: shared.overruns.load(Ordering::Relaxed),
            resolved: shared.resolved.load(Ordering::Relaxed),
            unresolved: shared.unresolved.load(Ordering::Relaxed),
            neighbors_missing: shared.neighbors_missing.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What has to be read from the kernel again, or built again.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Stale {
    links: bool,
    addresses: bool,
    routes: bool,
    rules: bool,
    neighbors: bool,
    table: bool,
    /// Something that only a display shows.
    shown: bool,
}

impl Stale {
    const EVERYTHING: Stale = Stale {
        links: true,
        addresses: true,
        routes: true,
        rules: true,
        neighbors: true,
        table: true,
        shown: true,
    };

    fn is_table(self) -> bool {
        self.links || self.addresses || self.routes || self.rules || self.neighbors || self.table
    }
}

/// The state of the mirror's thread.
struct Follower<P, F> {
    events: Socket,
    requests: Socket,
    keep: Keep<P>,
    ports: Vec<String>,
    shared: Arc<Shared>,
    publish: F,
    state: Snapshot,
    wanted: Wanted,
    /// Wishes taken from [`Wants::next`] so far.
    taken: u64,
    forwarding: Forwarding,
    routes: Arc<Lpm<Route>>,
    epoch: u32,
    stale: Stale,
    /// Notifications were lost, and the queue has not been emptied since.
    lost: bool,
}

impl<P: Privileged, F: FnMut(Fib)> Follower<P, F> {
    fn run(mut self) {
        let mut build_at = Instant::now();
        let mut keep_at = build_at;
        let mut resync_at = build_at + RESYNC_EVERY;
        while !self.shared.stop.load(Ordering::Acquire) {
            let next = keep_at.min(resync_at);
            self.sleep(match () {
                _ if self.lost => Instant::now(),
                _ if self.stale.is_table() => build_at.min(next),
                _ => next,
            });
            self.take_inputs();
            self.take_events();
            let now = Instant::now();
            if now >= resync_at {
                self.stale = Stale::EVERYTHING;
                resync_at = now + RESYNC_EVERY;
            }
            if self.stale.is_table() && now >= build_at {
                let outcome = self.refresh();
                if let Err(error) = outcome {
                    warn!("the kernel's tables cannot be read, trying again: {error}");
                    build_at = Instant::now() + RETRY_AFTER;
                } else {
                    let fib = self.build();
                    // Whoever takes the table may take its time: that is no reason for the next one to be late.
                    let pause = (now.elapsed() * (BUILD_SHARE - 1)).clamp(BUILD_EVERY, BUILD_PAUSE);
                    if let Some(fib) = fib {
                        (self.publish)(fib);
                    }
                    build_at = Instant::now() + pause;
                    keep_at = now;
                }
            }
            if !self.stale.is_table() {
                self.report_done();
            }
            if now >= keep_at {
                keep_at = now + KEEP_EVERY;
                let missing = self.keep.reconcile(&self.forwarding, &self.state.neighbors, now);
                self.shared.neighbors_missing.store(missing as u64, Ordering::Relaxed);
                if std::mem::take(&mut self.stale.shown) {
                    self.shared.snapshot.store(Arc::new(self.state.clone()));
                }
            }
        }
    }

    /// Everything that was wanted when inputs were last taken is published.
    fn report_done(&self) {
        let mut wants = self.shared.wants.lock().unwrap_or_else(PoisonError::into_inner);
        if wants.done < self.taken {
            wants.done = self.taken;
            self.shared.wants_done.notify_all();
        }
    }

    /// Waits for a notification, a wake-up or `until`.
    fn sleep(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos() as _ };
        let mut fds = [
            PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN),
        ];
        // Interrupted or not: everything is looked at.
        let _ = rustix::event::poll(&mut fds, Some(&left));
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut counter);
    }

    /// Takes what control wants and what workers ask.
    fn take_inputs(&mut self) {
        let wanted = {
            let mut wants = self.shared.wants.lock().unwrap_or_else(PoisonError::into_inner);
            self.taken = wants.asked;
            wants.next.take()
        };
        if let Some(wanted) = wanted.filter(|wanted| *wanted != self.wanted) {
            self.wanted = wanted;
            self.stale.table = true;
        }
        // Cleared first: an ask that comes now wakes again.
        self.shared.asked.store(false, Ordering::Release);
        let now = Instant::now();
        for _ in 0..ASKS {
            let Some((port, addr)) = self.shared.asks.pop() else { break };
            let resolved = self.on_link(port, addr).is_some_and(|link| self.keep.resolve(link, addr, now));
            let counter = if resolved { &self.shared.resolved } else { &self.shared.unresolved };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The interface of `port`, if `addr` can be a neighbor there.
    fn on_link(&self, port: u8, addr: Addr) -> Option<u32> {
        let link = self.state.link(self.ports.get(port as usize)?)?.index;
        let reached = match self.routes.lookup(addr)? {
            Route::OnLink { port: of_route } => of_route == port,
            Route::NextHop(n) => {
                let hop = self.forwarding.next_hops.get(n as usize)?;
                hop.gateway == addr && hop.port == port
            }
            _ => false,
        };
        (reached || self.forwarding.needed.contains(&(link, addr))).then_some(link)
    }

    /// Takes in notifications. When some were lost, the others of that burst are older than the dump that follows, and nothing
    /// would correct them any more: they are thrown away, down to the empty queue that ends the loss
    /// (`netlink_overrun` in net/netlink/af_netlink.c).
    fn take_events(&mut self) {
        for _ in 0..DATAGRAMS_PER_ROUND {
            let (state, stale, lost) = (&mut self.state, &mut self.stale, self.lost);
            let received = self.events.receive(|message| {
                if !lost {
                    notice(state, stale, message);
                }
            });
            match received {
                Ok(true) => {}
                Ok(false) => {
                    if std::mem::take(&mut self.lost) {
                        self.stale = Stale::EVERYTHING;
                    }
                    return;
                }
                Err(error) => {
                    debug!("notifications were lost, reading everything anew: {error}");
                    self.shared.overruns.fetch_add(1, Ordering::Relaxed);
                    self.lost = true;
                }
            }
        }
    }

    /// Reads from the kernel what is stale.
    fn refresh(&mut self) -> io::Result<()> {
        let requests = &mut self.requests;
        if self.stale.links {
            let links = requests.dump(kind::GET_LINK, &[0; 16], decode::link)?;
            let links = links.into_iter().map(|link| (link.index, link)).collect();
            for change in changes::of_ports(&self.ports, &self.state.links, &links) {
                info!("{change}");
            }
            self.state.links = Arc::new(links);
            self.stale.links = false;
        }
        if self.stale.addresses {
            self.state.addresses = Arc::new(requests.dump(kind::GET_ADDR, &[0; 8], decode::address)?);
            self.stale.addresses = false;
        }
        if self.stale.routes {
            let mut routes = requests.dump(kind::GET_ROUTE, &of_family(INET), decode::route)?;
            routes.extend(requests.dump(kind::GET_ROUTE, &of_family(INET6), decode::route)?);
            self.state.routes = Arc::new(routes);
            self.stale.routes = false;
        }
        if self.stale.rules {
            let v4 = requests.dump(kind::GET_RULE, &of_family(INET), decode::rule_table)?;
            let v6 = requests.dump(kind::GET_RULE, &of_family(INET6), decode::rule_table)?;
            let foreign = v4.iter().filter(|table| !(253..=255).contains(*table)).count()
                + v6.iter().filter(|table| !(254..=255).contains(*table)).count();
            self.state.ipv4_has_policy = v4.len() > 3;
            if foreign > self.state.foreign_rules {
                warn!(
                    "{foreign} policy rules are not followed, only the tables local, main and default are: see ip rule show"
                );
            }
            self.state.foreign_rules = foreign;
            self.stale.rules = false;
        }
        if self.stale.neighbors {
            self.state.neighbors = privileged::neighbors(requests)?.into_iter().collect();
            self.stale.neighbors = false;
        }
        Ok(())
    }

    /// Builds the table. None if it does not differ from the one in force.
    fn build(&mut self) -> Option<Fib> {
        self.stale.table = false;
        self.stale.shown = false;
        self.shared.snapshot.store(Arc::new(self.state.clone()));
        let forwarding = fib::build(&self.state, &self.wanted, &self.ports);
        if self.epoch != 0 && forwarding == self.forwarding {
            return None;
        }
        for net in
            forwarding.unreachable_pods.iter().filter(|net| !self.forwarding.unreachable_pods.contains(net))
        {
            warn!("pods {net} are left out: no route leads to their node");
        }
        self.epoch = self.epoch.checked_add(1).unwrap_or(1);
        let fib = forwarding.to_fib(self.epoch);
        self.routes = fib.routes.clone();
        self.forwarding = forwarding;
        self.shared.published.fetch_add(1, Ordering::Relaxed);
        Some(fib)
    }
}

/// Takes in one notification.
fn notice(state: &mut Snapshot, stale: &mut Stale, message: Message<'_>) {
    match message.kind {
        kind::NEW_LINK | kind::DEL_LINK => {
            // Routes and addresses go and come with a link, not always with a notification of their own.
            (stale.links, stale.addresses, stale.routes) = (true, true, true);
        }
        kind::NEW_ADDR | kind::DEL_ADDR => (stale.addresses, stale.routes) = (true, true),
        kind::NEW_ROUTE | kind::DEL_ROUTE => stale.routes = true,
        kind::NEW_RULE | kind::DEL_RULE => stale.rules = true,
        kind::NEW_NEIGH => {
            let Some((key, entry)) = decode::neighbor(message.body) else { return };
            let matters = |n: &Neighbor| (n.valid_mac(), n.state & Neighbor::FAILED, n.managed);
            let before = state.neighbors.insert(key, entry.clone());
            stale.shown |= before.as_ref() != Some(&entry);
            stale.table |= before.as_ref().map(matters) != Some(matters(&entry));
        }
        kind::DEL_NEIGH => {
            let removed = decode::neighbor(message.body).and_then(|(key, _)| state.neighbors.remove(&key));
            stale.table |= removed.is_some();
        }
        // Next hop objects (RTM_NEWNEXTHOP and the like): routes may use them.
        104..=106 => stale.routes = true,
        _ => {}
    }
}

/// `struct rtmsg` and `struct fib_rule_hdr` for a dump of one family.
fn of_family(family: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family;
    header
}
