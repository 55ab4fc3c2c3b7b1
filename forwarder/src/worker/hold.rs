//! Packets that wait for the link-layer address of their next hop: few, and not for long.

use std::collections::VecDeque;

use super::batch::Batch;
use crate::addr::Addr;
use crate::packet::{Packet, Part};
use crate::port::Frame;

/// Packets that wait in one worker at most.
pub(super) const MOST: usize = 256;
/// Datagrams that wait for one next hop at most, as many as Linux keeps (`unres_qlen_bytes` is about 100 of them): enough
/// for the first packets of a few connections.
const MOST_PER_NEXT_HOP: usize = 16;
/// How long a packet waits at most, as long as Linux tries (`mcast_solicit` times `retrans_time_ms` is 3 s; a client
/// repeats a SYN after one).
const PATIENCE_NS: u64 = 1_000_000_000;

/// A packet that waits.
struct Held {
    packet: Packet,
    /// Its further segments; does not allocate without any.
    tails: Vec<Frame>,
    port: u8,
    gateway: Addr,
    deadline_ns: u64,
}

impl Held {
    /// How many packets must be judged together with this one, itself included.
    fn together(&self) -> usize {
        packets_of(&self.packet.part)
    }
}

/// How many packets begin with this one: those of its datagram.
fn packets_of(part: &Part) -> usize {
    match part {
        Part::First(datagram) => usize::from(datagram.fragments),
        _ => 1,
    }
}

/// Has the kernel find out the link-layer address of a next hop: port index and address. Must not wait. The answer is
/// a newer epoch of the forwarding table.
pub type Resolve = Box<dyn FnMut(u8, Addr) + Send>;

/// The waiting packets of one worker, in the order of their coming.
pub struct Holding {
    waiting: VecDeque<Held>,
    /// Epoch of the forwarding table that they were judged by.
    epoch: u32,
    /// The last datagram was refused, and so are its later fragments.
    refusing: bool,
    resolve: Resolve,
}

impl Holding {
    /// `resolve` is called for the first packet that waits for a next hop.
    pub fn new(resolve: Resolve) -> Holding {
        Holding { waiting: VecDeque::with_capacity(MOST), epoch: 0, refusing: false, resolve }
    }

    /// How many packets wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Frames that they lie in.
    pub fn frames(&self) -> usize {
        self.waiting.iter().map(|held| 1 + held.tails.len()).sum()
    }

    /// True if none does.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Keeps a packet that leaves by `port` until its next hop is known. `deadline_ns`: 0 for a packet that has not
    /// waited yet. Gives the packet back if too many wait already. Later fragments come right after the first, and share
    /// its fate.
    pub fn hold(
        &mut self,
        port: u8,
        packet: Packet,
        tails: impl Iterator<Item = Frame>,
        deadline_ns: u64,
        now_ns: u64,
    ) -> Option<Packet> {
        let gateway = packet.gateway;
        if packet.part != Part::Later {
            let same = |held: &&Held| {
                (held.port, held.gateway) == (port, gateway) && held.packet.part != Part::Later
            };
            let same = self.waiting.iter().filter(same).count();
            self.refusing = self.waiting.len() + packets_of(&packet.part) > MOST || same >= MOST_PER_NEXT_HOP;
            if same == 0 && !self.refusing {
                (self.resolve)(port, gateway);
            }
        }
        if self.refusing {
            return Some(packet);
        }
        let deadline_ns = if deadline_ns == 0 { now_ns + PATIENCE_NS } else { deadline_ns };
        self.waiting.push_back(Held { packet, tails: tails.collect(), port, gateway, deadline_ns });
        None
    }

    /// Has every waiting packet judged again if the forwarding table has changed since. Those that must wait on come
    /// back by [`Holding::hold`].
    pub(super) fn again(
        &mut self,
        batch: &mut Batch,
        epoch: u32,
        mut judge: impl FnMut(&mut Batch, &mut Holding),
    ) {
        if self.epoch == epoch {
            return;
        }
        self.epoch = epoch;
        let mut left = self.waiting.len();
        while left > 0 {
            // Packets of one batch share their deadline.
            let deadline_ns = self.waiting[0].deadline_ns;
            while left > 0
                && let Some(held) = self
                    .waiting
                    .pop_front_if(|held| held.deadline_ns == deadline_ns && held.together() <= batch.room())
            {
                let Packet { frame, tail_len, port, part, id, .. } = held.packet;
                let packet = Packet { part, id, ..Packet::new(frame, tail_len, port) };
                batch.push(packet, held.tails);
                left -= 1;
            }
            batch.deadline_ns = deadline_ns;
            judge(batch, self);
            // Those that come next have not waited.
            batch.deadline_ns = 0;
        }
    }

    /// Gives up those that have waited for too long.
    pub fn expire(&mut self, now_ns: u64, mut give_up: impl FnMut(Packet, Vec<Frame>)) {
        while self.waiting.front().is_some_and(|held| held.deadline_ns <= now_ns) {
            if let Some(held) = self.waiting.pop_front() {
                give_up(held.packet, held.tails);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use af_xdp::{FramePool, Umem};

    use super::*;

    fn rig() -> (FramePool, Holding, Receiver<(u8, Addr)>) {
        let (ask, asked) = channel();
        let resolve = Box::new(move |port, addr| ask.send((port, addr)).unwrap());
        (Umem::anonymous(1024, 2048).take_frames().unwrap(), Holding::new(resolve), asked)
    }

    fn packet(pool: &mut FramePool, gateway: u32) -> Packet {
        let mut packet = Packet::new(pool.frame_from(b"packet").unwrap(), 0, 0);
        packet.gateway = Addr::v4(gateway);
        packet
    }

    #[test]
    fn asks_once_for_a_next_hop_and_bounds_what_waits_for_it() {
        let (mut pool, mut holding, asked) = rig();
        for _ in 0..MOST_PER_NEXT_HOP {
            assert!(holding.hold(1, packet(&mut pool, 7), std::iter::empty(), 0, 5).is_none());
        }
        let refused = holding.hold(1, packet(&mut pool, 7), std::iter::empty(), 0, 5).unwrap();
        pool.push(refused.frame);
        assert!(holding.hold(1, packet(&mut pool, 8), std::iter::empty(), 0, 5).is_none());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [(1, Addr::v4(7)), (1, Addr::v4(8))]);
        let mut given_up = 0;
        holding.expire(4 + PATIENCE_NS, |_, _| given_up += 1);
        assert_eq!(given_up, 0);
        holding.expire(5 + PATIENCE_NS, |packet, _| {
            given_up += 1;
            pool.push(packet.frame);
        });
        assert_eq!((given_up, pool.len()), (MOST_PER_NEXT_HOP + 1, 1024));
    }

    #[test]
    fn everything_is_judged_again_once_for_each_epoch_and_keeps_its_deadline() {
        let (mut pool, mut holding, _asked) = rig();
        for number in 0..100u32 {
            let tails = pool.frame_from(b"tail").into_iter();
            let held = holding.hold(0, packet(&mut pool, number), tails, 0, u64::from(number / 10));
            assert!(held.is_none());
        }
        let mut batch = Batch::default();
        let mut judged = 0;
        let mut judge = |batch: &mut Batch, holding: &mut Holding| {
            assert_eq!(batch.tails.len(), batch.packets.len());
            let mut tails = batch.tails.drain(..);
            for (packet, count) in batch.packets.drain(..).zip(batch.tail_counts.drain(..)) {
                judged += 1;
                let tails = tails.by_ref().take(usize::from(count));
                let deadline_ns = batch.deadline_ns;
                if let Some(packet) = holding.hold(judged as u8, packet, tails, deadline_ns, 999) {
                    pool.push(packet.frame);
                }
            }
        };
        holding.again(&mut batch, 1, &mut judge);
        holding.again(&mut batch, 1, &mut judge);
        assert_eq!((judged, holding.len()), (100, 100));
        let mut given_up = 0;
        holding.expire(4 + PATIENCE_NS, |_, _| given_up += 1);
        assert_eq!(given_up, 50, "deadlines are those of their coming");
    }
}
