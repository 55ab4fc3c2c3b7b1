//! Packets on their way between rings: mostly one frame each, sometimes several.

use crate::frame::{Frame, FramePool};

/// A further segment of a packet that is longer than a frame.
#[derive(Debug)]
pub struct Tail {
    /// Which packet of the burst it belongs to: index into [`Burst::heads`].
    pub of: u16,
    /// The segment.
    pub frame: Frame,
}

/// Packets in order. `heads[i]` is the first frame of packet `i`; its further segments, if it has any, are those of
/// `tails` with `of == i`, in order. `tails` is sorted by `of`, and empty unless there are jumbo frames.
#[derive(Debug, Default)]
pub struct Burst {
    /// The first frame of each packet.
    pub heads: Vec<Frame>,
    /// Further segments.
    pub tails: Vec<Tail>,
}

impl Burst {
    /// An empty burst with room for `packets`, so that a worker need not allocate.
    pub fn with_capacity(packets: usize) -> Burst {
        Burst { heads: Vec::with_capacity(packets), tails: Vec::with_capacity(packets) }
    }

    /// How many packets there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// True if there is no packet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Appends a packet of one frame.
    #[inline]
    pub fn push(&mut self, frame: Frame) {
        self.heads.push(frame);
    }

    /// Appends a further segment to the last packet.
    ///
    /// # Panics
    /// If there is no packet.
    #[inline]
    pub fn push_tail(&mut self, frame: Frame) {
        assert!(!self.heads.is_empty(), "a further segment follows a first one");
        self.tails.push(Tail { of: (self.heads.len() - 1) as u16, frame });
    }

    /// Length of a packet in bytes, over all its segments.
    #[inline]
    pub fn packet_len(&self, packet: usize) -> usize {
        let head = self.heads[packet].len();
        if self.tails.is_empty() {
            return head;
        }
        head + self.tails.iter().filter(|t| usize::from(t.of) == packet).map(|t| t.frame.len()).sum::<usize>()
    }

    /// Puts every frame back onto the pool.
    pub fn recycle(&mut self, pool: &mut FramePool) {
        self.heads.drain(..).for_each(|frame| pool.push(frame));
        self.tails.drain(..).for_each(|tail| pool.push(tail.frame));
    }

    /// Takes the first `packets` packets off; their frames go to `gone`, those of heads first.
    pub fn remove_front(&mut self, packets: usize, mut gone: impl FnMut(Frame)) {
        self.heads.drain(..packets).for_each(&mut gone);
        if !self.tails.is_empty() {
            let tails = self.tails.iter().take_while(|t| usize::from(t.of) < packets).count();
            self.tails.drain(..tails).for_each(|tail| gone(tail.frame));
            self.tails.iter_mut().for_each(|tail| tail.of -= packets as u16);
        }
    }
}
