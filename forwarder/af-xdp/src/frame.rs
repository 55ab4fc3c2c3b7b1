//! A packet in memory, as a value that has one owner.

#![allow(unsafe_code)]

use std::fmt;
use std::ptr::NonNull;
use std::slice;

use crate::ledger::Owner;
use crate::umem::{Region, Umem};

/// Bytes before a received packet: `XDP_PACKET_HEADROOM`. Frames of the process's own start there as well.
pub const RX_HEADROOM: u16 = 256;

/// How many bytes [`Frame::head_mut`] covers: Ethernet, two VLAN tags, IPv6, ICMPv6, inner IPv6 and inner ports are 118.
pub const HEAD_LEN: usize = 120;

/// There is no room in the chunk for what was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no room in the frame")]
pub struct NoRoom;

/// One chunk of a UMEM with a packet (or a segment of one) in it: 16 bytes, neither `Clone` nor `Copy`.
///
/// At most one `Frame` exists of a chunk, and none while the kernel has it, so its bytes are plain slices. A frame goes
/// back by [`FramePool::push`] or onto a ring. One that is merely dropped is lost until the next recovery.
#[must_use = "a frame that is dropped is lost until the next restart; push it onto its pool"]
pub struct Frame {
    region: &'static Region,
    chunk: u32,
    offset: u16,
    len: u16,
}

impl Frame {
    /// Makes the one frame of a chunk that the ledger has just given to this process.
    ///
    /// # Safety
    /// No other frame of `chunk` exists and the kernel does not have it; `chunk` is inside the UMEM and
    /// `offset + len` inside the chunk.
    #[inline]
    pub(crate) unsafe fn new(region: &'static Region, chunk: u32, offset: u16, len: u16) -> Frame {
        debug_assert!(chunk < region.chunks() && u32::from(offset) + u32::from(len) <= region.chunk_len());
        Frame { region, chunk, offset, len }
    }

    #[inline]
    fn ptr(&self) -> NonNull<u8> {
        // SAFETY: `offset` lies inside the chunk (kept by every method), so inside the mapping.
        unsafe { self.region.chunk_ptr(self.chunk).add(self.offset as usize) }
    }

    /// The packet.
    #[inline]
    pub fn data(&self) -> &[u8] {
        // SAFETY: `offset + len` lies inside the chunk, which lives for ever; this frame is its only owner.
        unsafe { slice::from_raw_parts(self.ptr().as_ptr(), self.len as usize) }
    }

    #[inline]
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `data`, and `self` is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.ptr().as_ptr(), self.len as usize) }
    }

    /// The first [`HEAD_LEN`] bytes of the packet (all of it, if it is shorter), to be changed.
    ///
    /// If the process dies before the frame is on a TX ring, the packet comes again from the RX ring as it was
    /// received: these bytes are kept in a journal first. Prefer this to [`Frame::data_mut`].
    #[inline]
    pub fn head_mut(&mut self) -> &mut [u8] {
        if self.region.word(self.chunk).is_peeked() {
            self.region.journal(self.chunk, self.offset, self.len());
        }
        let head = self.bytes_mut();
        let len = head.len().min(HEAD_LEN);
        &mut head[..len]
    }

    /// The whole packet, to be changed. If the process dies before the frame is on a TX ring, the packet is lost and
    /// counted as interrupted; see [`Frame::head_mut`].
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.give_up_journal();
        self.bytes_mut()
    }

    /// From here on the packet as received cannot be had back.
    #[inline]
    fn give_up_journal(&mut self) {
        let word = self.region.word(self.chunk);
        if word.is_peeked() || word.is_rewriting() {
            self.region.set(self.chunk, Owner::Rewriting { slot: None });
        }
    }

    /// Length of the packet in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True for a frame without bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in front of the packet that [`Frame::prepend`] can take.
    #[inline]
    pub fn headroom(&self) -> usize {
        self.offset as usize
    }

    /// The longest packet that the frame can hold from where it starts now.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.region.chunk_len() as usize - self.offset as usize
    }

    /// Puts `n` zero bytes before the packet and returns them.
    ///
    /// # Errors
    /// Fewer than `n` bytes of [`Frame::headroom`].
    #[inline]
    pub fn prepend(&mut self, n: usize) -> Result<&mut [u8], NoRoom> {
        if n > self.headroom() {
            return Err(NoRoom);
        }
        self.give_up_journal();
        self.offset -= n as u16;
        self.len += n as u16;
        let front = &mut self.bytes_mut()[..n];
        front.fill(0);
        Ok(front)
    }

    /// Puts `header` before the packet.
    ///
    /// If the process dies before the frame is on a TX ring, the packet comes again as it was received, as after
    /// [`Frame::head_mut`]: nothing of it is overwritten but what that has in its journal.
    ///
    /// # Errors
    /// Fewer bytes of [`Frame::headroom`].
    #[inline]
    pub fn push_header(&mut self, header: &[u8]) -> Result<(), NoRoom> {
        if header.len() > self.headroom() {
            return Err(NoRoom);
        }
        // Before the offset changes, since the journal is of the packet from where it was received.
        self.head_mut();
        self.offset -= header.len() as u16;
        self.len += header.len() as u16;
        self.bytes_mut()[..header.len()].copy_from_slice(header);
        Ok(())
    }

    /// Takes `n` bytes off the front of the packet. Those of a received packet that is to be changed by [`Frame::head_mut`] are
    /// taken off after the first such change.
    ///
    /// # Errors
    /// The packet is shorter.
    #[inline]
    pub fn trim_front(&mut self, n: usize) -> Result<(), NoRoom> {
        if n > self.len() {
            return Err(NoRoom);
        }
        self.offset += n as u16;
        self.len -= n as u16;
        Ok(())
    }

    /// Sets the length of the packet. Bytes that appear at the end are zero, never those of an earlier packet.
    ///
    /// # Errors
    /// `n` is more than [`Frame::capacity`].
    #[inline]
    pub fn set_len(&mut self, n: usize) -> Result<(), NoRoom> {
        if n > self.capacity() {
            return Err(NoRoom);
        }
        let old = self.len();
        self.len = n as u16;
        if n > old {
            self.give_up_journal();
            self.bytes_mut()[old..].fill(0);
        }
        Ok(())
    }

    /// Asks the CPU to load the first bytes of the packet, ahead of their use.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: a prefetch never faults, and the address is that of the packet.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(self.ptr().as_ptr().cast());
        }
    }

    /// Index of the chunk inside its UMEM.
    #[inline]
    pub fn chunk(&self) -> u32 {
        self.chunk
    }

    /// The memory that the frame lies in.
    #[inline]
    pub fn umem(&self) -> Umem {
        Umem(self.region)
    }

    /// Where the packet starts, in bytes from the start of the UMEM: the address of a descriptor.
    #[inline]
    pub(crate) fn addr(&self) -> u64 {
        (u64::from(self.chunk) << self.region.chunk_shift()) + u64::from(self.offset)
    }

    /// Back to how it was made by [`FramePool::pop`].
    #[inline]
    pub(crate) fn reset(&mut self) {
        self.offset = RX_HEADROOM;
        self.len = 0;
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame(chunk {}, offset {}, {} bytes)", self.chunk, self.offset, self.len)
    }
}

/// The free frames of a UMEM, last in, first out, so that few of them stay in the cache.
#[derive(Debug)]
pub struct FramePool {
    umem: Umem,
    free: Vec<Frame>,
    /// Received frames whose RX entries are not released yet, over all sockets. While there are any, no free frame may
    /// go to a fill ring: its old RX entry would look like a new packet to the next process.
    pub(crate) unreleased: u32,
}

impl FramePool {
    /// A pool of these free chunks.
    pub(crate) fn new(umem: Umem, chunks: Vec<u32>) -> FramePool {
        let mut free = Vec::with_capacity(umem.chunks() as usize);
        // SAFETY: the caller names each chunk once, and the ledger says that they are free; `RX_HEADROOM` is inside a chunk.
        free.extend(chunks.into_iter().map(|chunk| unsafe { Frame::new(umem.0, chunk, RX_HEADROOM, 0) }));
        FramePool { umem, free, unreleased: 0 }
    }

    /// Takes chunks back that were filled for a socket that did not come about.
    pub(crate) fn adopt(&mut self, chunks: Vec<u32>) {
        for chunk in chunks {
            // SAFETY: the ledger said that the kernel had the chunk, so that there is no frame of it; the socket that
            // would have handed it over is closed.
            self.push(unsafe { Frame::new(self.umem.0, chunk, RX_HEADROOM, 0) });
        }
    }

    /// An empty frame with [`RX_HEADROOM`] bytes of headroom, or `None` when all are in use.
    #[inline]
    pub fn pop(&mut self) -> Option<Frame> {
        self.free.pop()
    }

    /// Takes a frame back. Its packet is gone.
    ///
    /// # Panics
    /// If the frame is of another UMEM.
    #[inline]
    pub fn push(&mut self, mut frame: Frame) {
        assert!(std::ptr::eq(frame.region, self.umem.0), "a frame goes back to its own UMEM");
        self.umem.0.set(frame.chunk, Owner::Free);
        frame.reset();
        self.free.push(frame);
    }

    /// A frame with a copy of `packet`; `None` when no frame is free or the packet is too long for one.
    pub fn frame_from(&mut self, packet: &[u8]) -> Option<Frame> {
        let mut frame = self.free.pop()?;
        if packet.len() > frame.capacity() {
            self.free.push(frame);
            return None;
        }
        frame.len = packet.len() as u16;
        frame.bytes_mut().copy_from_slice(packet);
        Some(frame)
    }

    /// How many frames are free.
    #[inline]
    pub fn len(&self) -> usize {
        self.free.len()
    }

    /// True if no frame is free.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.free.is_empty()
    }

    /// The memory that the frames lie in.
    #[inline]
    pub fn umem(&self) -> Umem {
        self.umem
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_16_bytes_and_so_is_an_option_of_one() {
        assert_eq!(size_of::<Frame>(), 16);
        assert_eq!(size_of::<Option<Frame>>(), 16);
    }

    #[test]
    fn front_and_length_move_inside_the_chunk_only() {
        let mut pool = Umem::anonymous(2, 2048).take_frames().unwrap();
        let mut frame = pool.frame_from(b"payload").unwrap();
        assert_eq!((frame.headroom(), frame.capacity(), frame.len()), (256, 1792, 7));
        frame.prepend(4).unwrap().copy_from_slice(b"head");
        assert_eq!(frame.data(), b"headpayload");
        frame.trim_front(6).unwrap();
        assert_eq!(frame.data(), b"yload");
        assert_eq!(frame.trim_front(6), Err(NoRoom));
        assert_eq!(frame.prepend(frame.headroom() + 1).unwrap_err(), NoRoom);
        assert_eq!(frame.set_len(frame.capacity() + 1), Err(NoRoom));
        frame.set_len(frame.capacity()).unwrap();
        assert_eq!(frame.data().len(), 2048 - 258);
        pool.push(frame);
    }

    #[test]
    fn a_longer_frame_shows_no_byte_of_an_earlier_packet() {
        let mut pool = Umem::anonymous(1, 2048).take_frames().unwrap();
        let frame = pool.frame_from(&[0xaa; 1792]).unwrap();
        pool.push(frame);
        let mut frame = pool.frame_from(&[0xbb; 10]).unwrap();
        frame.set_len(1792).unwrap();
        frame.prepend(8).unwrap();
        assert!(frame.data().iter().all(|&b| b != 0xaa));
        pool.push(frame);
    }

    #[test]
    fn the_pool_is_last_in_first_out_and_counts() {
        let mut pool = Umem::anonymous(3, 2048).take_frames().unwrap();
        let first = pool.pop().unwrap();
        let second = pool.pop().unwrap();
        assert_eq!(pool.len(), 1);
        let chunk = first.chunk();
        pool.push(second);
        pool.push(first);
        assert_eq!(pool.pop().unwrap().chunk(), chunk);
        assert!(pool.frame_from(&[0; 1793]).is_none());
        assert_eq!(pool.len(), 2);
    }

    #[test]
    fn changed_heads_can_be_had_back_and_whole_changes_cannot() {
        let umem = Umem::anonymous(2, 2048);
        let mut pool = umem.take_frames().unwrap();
        let mut frame = pool.frame_from(b"as it came").unwrap();
        umem.0.set(frame.chunk(), Owner::Peeked { port: 0 });
        frame.head_mut()[..2].copy_from_slice(b"AS");
        let Owner::Rewriting { slot: Some(slot) } = umem.owner(frame.chunk()) else { panic!("journaled") };
        assert_eq!(frame.data(), b"AS it came");
        assert!(umem.0.undo(frame.chunk(), 256, slot));
        assert_eq!(frame.data(), b"as it came");
        assert!(!umem.0.undo(frame.chunk() ^ 1, 256, slot), "another chunk's bytes");
        frame.data_mut()[0] = b'x';
        assert_eq!(umem.owner(frame.chunk()), Owner::Rewriting { slot: None });
        pool.push(frame);
        assert_eq!(umem.owner(0), Owner::Free);
    }

    #[test]
    fn headers_come_and_go_and_the_packet_can_be_had_back() {
        let umem = Umem::anonymous(2, 2048);
        let mut pool = umem.take_frames().unwrap();
        for taken_off in [0, 3] {
            let mut frame = pool.frame_from(b"as it came").unwrap();
            umem.0.set(frame.chunk(), Owner::Peeked { port: 0 });
            if taken_off > 0 {
                frame.head_mut()[taken_off] = b'I';
                frame.trim_front(taken_off).unwrap();
            }
            frame.push_header(b"with a header ").unwrap();
            frame.head_mut()[0] = b'W';
            assert!(frame.data().starts_with(b"With a header "), "{frame:?}");
            assert_eq!(frame.len(), 14 + 10 - taken_off);
            let Owner::Rewriting { slot: Some(slot) } = umem.owner(frame.chunk()) else {
                panic!("journaled")
            };
            assert!(umem.0.undo(frame.chunk(), 256, slot));
            frame.trim_front(14).unwrap();
            assert_eq!(frame.data(), &b"as it came"[taken_off..]);
            assert_eq!(frame.push_header(&[0; 2048]), Err(NoRoom));
            pool.push(frame);
        }
    }
}
