//! What a worker does when there is nothing to do: it spins for a moment, then sleeps until a packet comes.

use config::gateway::Poll;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::publish::WorkerLink;
use crate::port::Port;
use crate::port::xsk::steer::MAX_PORTS;

/// How long a worker spins after its last packet. Falling asleep and being woken costs about as much as twenty packets,
/// so gaps within a busy time are spun through.
const SPIN_NS: u64 = 50_000;
/// How long it sleeps at most: its heartbeat must not become too old, and flows must age.
const SLEEP: Timespec = Timespec { tv_sec: 0, tv_nsec: 40_000_000 };

/// When to sleep.
pub struct Idle {
    poll: Poll,
    last_packet_ns: u64,
}

impl Idle {
    /// `poll`: `[workers] poll` of the gateway file.
    pub fn new(poll: Poll) -> Idle {
        Idle { poll, last_packet_ns: 0 }
    }

    /// A packet came.
    #[inline]
    pub fn busy(&mut self, now_ns: u64) {
        self.last_packet_ns = now_ns;
    }

    /// True if nothing has come for long enough.
    #[inline]
    pub fn may_sleep(&self, now_ns: u64) -> bool {
        self.poll == Poll::Adaptive && now_ns.saturating_sub(self.last_packet_ns) > SPIN_NS
    }
}

/// Sleeps until a packet is on a receive ring, somebody wakes the worker, or it is time for a heartbeat.
pub fn sleep<P: Port>(ports: &[P], link: &WorkerLink) {
    // An array, since a worker does not allocate; unused places repeat the wake-up.
    let mut fds: [PollFd<'_>; MAX_PORTS as usize + 1] = std::array::from_fn(|index| {
        let fd = ports.get(index).and_then(P::poll_fd).unwrap_or(link.wake_fd());
        PollFd::from_borrowed_fd(fd, PollFlags::IN)
    });
    // An error (EINTR) is a short sleep.
    let _ = poll(&mut fds[..=ports.len()], Some(&SLEEP));
    link.clear_wake();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_after_a_pause_only_and_never_when_busy_polling() {
        let mut idle = Idle::new(Poll::Adaptive);
        idle.busy(1_000_000);
        assert!(!idle.may_sleep(1_000_000 + SPIN_NS));
        assert!(idle.may_sleep(1_000_001 + SPIN_NS));
        let idle = Idle::new(Poll::Busy);
        assert!(!idle.may_sleep(u64::MAX));
    }
}
