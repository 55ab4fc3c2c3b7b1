//! Gives packets back to the kernel that are not ours, by the TAP of the port that they came in by.

use std::io::IoSlice;
use std::os::fd::OwnedFd;

use crate::packet::{Layer4, Packet};
use crate::port::{Frame, FramePool};

/// Segments of one packet at most, the first included; the kernel sends no more (MAX_SKB_FRAGS + 1).
const SEGMENTS: usize = 18;

/// `struct virtio_net_hdr` (virtio 1.2 section 5.1.6), legacy form: what TAP calls IFF_VNET_HDR.
const HEADER_LEN: usize = 10;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum holds the pseudo-header sum only.
const NEEDS_CHECKSUM: u8 = 1;

/// A TAP with IFF_VNET_HDR.
#[derive(Debug)]
pub struct Punt {
    tap: OwnedFd,
}

impl Punt {
    /// `tap`: not blocking, without packet information, with a virtio header.
    pub fn new(tap: OwnedFd) -> Punt {
        Punt { tap }
    }

    /// Writes the packet as it came. Its further segments go back to `pool`, sent or not. False: the kernel did not
    /// take it. A system call, on a path that few packets take.
    pub fn send(&self, packet: &Packet, tails: impl Iterator<Item = Frame>, pool: &mut FramePool) -> bool {
        let header = header(packet);
        let mut tails = tails.peekable();
        if tails.peek().is_none() {
            let parts = [IoSlice::new(&header), IoSlice::new(packet.frame.data())];
            return rustix::io::writev(&self.tap, &parts).is_ok();
        }
        let tails: Vec<Frame> = tails.collect();
        let mut parts = vec![IoSlice::new(&header), IoSlice::new(packet.frame.data())];
        parts.extend(tails.iter().map(|tail| IoSlice::new(tail.data())));
        let taken = tails.len() < SEGMENTS && rustix::io::writev(&self.tap, &parts).is_ok();
        drop(parts);
        tails.into_iter().for_each(|tail| pool.push(tail));
        taken
    }
}

/// Tells the kernel of a checksum that was left to the hardware, as it was told to us by nobody: the pipeline saw it.
fn header(packet: &Packet) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let checksum_at: u16 = match packet.layer4 {
        Layer4::Tcp { .. } => 16,
        Layer4::Udp => 6,
        _ => return header,
    };
    if packet.partial_checksum {
        header[0] = NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&packet.l4.to_ne_bytes());
        header[8..10].copy_from_slice(&checksum_at.to_ne_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use af_xdp::Umem;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn writes_header_and_all_segments_as_one_packet() {
        let mut pool = Umem::anonymous(8, 2048).take_frames().unwrap();
        let kind = SocketType::SEQPACKET;
        let (tap, kernel) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap();
        let punt = Punt::new(tap);
        let mut packet = Packet::new(pool.frame_from(b"head").unwrap(), 0, 0);
        let mut seen = [0; 64];
        assert!(punt.send(&packet, std::iter::empty(), &mut pool));
        assert_eq!(rustix::io::read(&kernel, &mut seen).unwrap(), HEADER_LEN + 4);
        assert_eq!(&seen[..HEADER_LEN + 4], b"\0\0\0\0\0\0\0\0\0\0head");

        packet.partial_checksum = true;
        packet.layer4 = Layer4::Udp;
        packet.l4 = 34;
        let tails: Vec<_> =
            [&b"tail"[..], b"end"].iter().map(|part| pool.frame_from(part).unwrap()).collect();
        assert!(punt.send(&packet, tails.into_iter(), &mut pool));
        let len = rustix::io::read(&kernel, &mut seen).unwrap();
        assert_eq!(&seen[HEADER_LEN..len], b"headtailend");
        assert_eq!((seen[0], seen[6], seen[8]), (NEEDS_CHECKSUM, 34, 6));
        assert_eq!(pool.len(), 7, "further segments are free again");
        drop(kernel);
        assert!(!punt.send(&packet, std::iter::empty(), &mut pool));
    }
}
