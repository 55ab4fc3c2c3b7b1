//! A port in memory, for tests, fuzzing and replay: packets are byte vectors at both ends.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use super::{Burst, Frame, FramePool, Kick, Mode, Port, QueueAccount, QueueFrames, copy_in};

/// A port whose wire is two queues of byte vectors.
#[derive(Debug, Default)]
pub struct MemoryPort {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    sent: Vec<Frame>,
    tx_room: Option<usize>,
    taken: u32,
    rx_dropped: u64,
}

impl MemoryPort {
    /// A port that has received nothing, and takes whatever is sent.
    pub fn new() -> MemoryPort {
        MemoryPort::default()
    }

    /// A packet comes in.
    pub fn deliver(&mut self, packet: impl Into<Vec<u8>>) {
        self.incoming.push_back(packet.into());
    }

    /// The oldest packet that was sent and not looked at yet.
    pub fn sent(&mut self) -> Option<Vec<u8>> {
        self.outgoing.pop_front()
    }

    /// Packets that came in and found no free frame.
    pub fn dropped(&self) -> u64 {
        self.rx_dropped
    }

    /// Lets the port take `packets` more and then none, as a full ring does; `None`: no limit.
    pub fn limit_tx(&mut self, packets: Option<usize>) {
        self.tx_room = packets;
    }
}

/// Takes the first packet out of `burst`: its bytes, and its frames onto `frames`.
fn copy_out(burst: &mut Burst, frames: &mut Vec<Frame>) -> Option<Vec<u8>> {
    if burst.is_empty() {
        return None;
    }
    let mut packet = Vec::with_capacity(burst.packet_len(0));
    burst.remove_front(1, |frame| {
        packet.extend_from_slice(frame.data());
        frames.push(frame);
    });
    Some(packet)
}

impl Port for MemoryPort {
    fn rx_burst(&mut self, pool: &mut FramePool, burst: &mut Burst, max: usize) -> usize {
        let mut packets = 0;
        while packets < max {
            let Some(packet) = self.incoming.pop_front() else { break };
            if copy_in(&packet, pool, burst) {
                packets += 1;
            } else {
                self.rx_dropped += 1;
            }
        }
        packets
    }

    fn tx_burst(&mut self, _: &mut FramePool, burst: &mut Burst) -> usize {
        let mut packets = 0;
        while self.tx_room != Some(0) {
            let Some(packet) = copy_out(burst, &mut self.sent) else { break };
            self.outgoing.push_back(packet);
            self.tx_room = self.tx_room.map(|room| room - 1);
            packets += 1;
        }
        self.taken = self.taken.wrapping_add(packets as u32);
        packets
    }

    fn kick(&mut self) -> Kick {
        Kick::Done
    }

    fn release_rx(&mut self, _: &mut FramePool) {}

    fn complete(&mut self, pool: &mut FramePool) -> usize {
        let frames = self.sent.len();
        self.sent.drain(..).for_each(|frame| pool.push(frame));
        frames
    }

    fn refill(&mut self, _: &mut FramePool) -> usize {
        0
    }

    fn tx_mark(&self) -> u32 {
        self.taken
    }

    fn is_sent(&mut self, _: u32) -> bool {
        true
    }

    fn mode(&self) -> Mode {
        Mode::Software
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn account(&mut self) -> QueueAccount {
        let frames = QueueFrames { completion: self.sent.len() as u32, ..QueueFrames::default() };
        QueueAccount { frames, ..QueueAccount::default() }
    }
}

#[cfg(test)]
mod tests {
    use af_xdp::Umem;

    use super::*;

    #[test]
    fn packets_pass_and_frames_come_back() {
        let mut pool = Umem::anonymous(8, 2048).take_frames().unwrap();
        let (mut from, mut to) = (MemoryPort::new(), MemoryPort::new());
        let jumbo: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        from.deliver(*b"short");
        from.deliver(jumbo.clone());
        from.deliver(*b"late");
        let mut burst = Burst::default();
        assert_eq!(from.rx_burst(&mut pool, &mut burst, 64), 3);
        assert_eq!((burst.tails.len(), burst.packet_len(1)), (2, 5000));
        to.limit_tx(Some(2));
        assert_eq!(to.tx_burst(&mut pool, &mut burst), 2);
        assert_eq!(burst.len(), 1);
        assert_eq!((to.sent().unwrap(), to.sent().unwrap(), to.sent()), (b"short".to_vec(), jumbo, None));
        assert_eq!(to.complete(&mut pool), 4);
        burst.recycle(&mut pool);
        assert_eq!(pool.len(), 8);
    }

    #[test]
    fn what_finds_no_frame_is_counted() {
        let mut pool = Umem::anonymous(1, 2048).take_frames().unwrap();
        let mut port = MemoryPort::new();
        port.deliver(vec![0; 3000]);
        port.deliver(*b"fits");
        let mut burst = Burst::default();
        assert_eq!(port.rx_burst(&mut pool, &mut burst, 64), 1);
        assert_eq!(port.dropped(), 1);
        assert_eq!(burst.heads[0].data(), b"fits");
    }
}
