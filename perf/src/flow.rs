//! Flows, and the packets of a flow: UDP with 18 bytes of our own at the start of the payload, so that the shortest
//! Ethernet frame (60 bytes without its check sequence) has room for them.
//!
//! ```text
//! 0      2         6         10                  18
//! | kind | flow id | sequence | intended send time | zeroes ...
//! ```

use std::net::IpAddr;

use crate::range::{AddrRange, Target};

/// Bytes that the sink needs.
pub const STAMP_LEN: usize = 18;
const ETHERNET_LEN: usize = 14;
const UDP_LEN: usize = 8;

/// Which part of a measurement a packet belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Kind {
    /// Sent so that flows and neighbors exist; not counted.
    WarmUp = 0x7057,
    /// Counted.
    Measured = 0x706d,
}

/// Where flows come from and go to.
#[derive(Clone, Debug)]
pub struct Flows {
    /// Link-layer source.
    pub src_mac: [u8; 6],
    /// Link-layer destination, the gateway's.
    pub dst_mac: [u8; 6],
    /// Client addresses.
    pub src: AddrRange,
    /// Services.
    pub dst: Target,
    /// Bytes from the Ethernet header on.
    pub frame_len: usize,
}

/// Adds 16-bit words in network order (RFC 1071); odd bytes are padded with zero.
fn sum(bytes: &[u8], start: u64) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let total = (&mut words).fold(start, |sum, w| sum + u64::from(u16::from_be_bytes([w[0], w[1]])));
    total + words.remainder().first().map_or(0, |&b| u64::from(b) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Flows {
    /// The shortest frame of this family.
    pub fn frame_len_min(is_v4: bool) -> usize {
        ETHERNET_LEN + if is_v4 { 20 } else { 40 } + UDP_LEN + STAMP_LEN
    }

    /// Where flow `id` comes from. Ports go through 1024 to 65535 once all source addresses were used.
    pub fn client(&self, id: u32) -> (IpAddr, u16) {
        let id = u64::from(id);
        (self.src.get(id), 1024 + ((id / self.src.len()) % 64512) as u16)
    }

    /// A packet of flow `id`, without a stamp.
    pub fn template(&self, id: u32) -> Vec<u8> {
        let (src, src_port) = self.client(id);
        let dst = self.dst.addrs.get(id.into());
        let mut packet = Vec::with_capacity(self.frame_len);
        packet.extend_from_slice(&self.dst_mac);
        packet.extend_from_slice(&self.src_mac);
        let len = (self.frame_len - ETHERNET_LEN) as u16;
        let udp_len;
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                udp_len = len - 20;
                packet.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
                packet.extend_from_slice(&len.to_be_bytes());
                packet.extend_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0]); // no fragments, TTL 64
                packet.extend_from_slice(&src.octets());
                packet.extend_from_slice(&dst.octets());
                let checksum = !fold(sum(&packet[14..34], 0));
                packet[24..26].copy_from_slice(&checksum.to_be_bytes());
            }
            (src, dst) => {
                udp_len = len - 40;
                packet.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
                packet.extend_from_slice(&udp_len.to_be_bytes());
                packet.extend_from_slice(&[17, 64]);
                for addr in [src, dst] {
                    let IpAddr::V6(addr) = addr else {
                        unreachable!("ranges of one family, checked at the start")
                    };
                    packet.extend_from_slice(&addr.octets());
                }
            }
        }
        for field in [src_port, self.dst.port, udp_len, 0] {
            packet.extend_from_slice(&field.to_be_bytes());
        }
        packet.resize(self.frame_len, 0);
        packet
    }
}

/// A flow that is being sent.
#[derive(Debug)]
pub struct Flow {
    id: u32,
    sequence: u32,
    /// The packet without stamp.
    template: Vec<u8>,
    payload: usize,
    /// Sum over pseudo-header, UDP header and flow id; only what changes is added for each packet.
    sum: u64,
}

impl Flow {
    /// Flow `id`, at its start.
    pub fn new(flows: &Flows, id: u32) -> Flow {
        let template = flows.template(id);
        let (addrs, udp) = layers(&template).expect("a template is a whole packet");
        let payload = udp + UDP_LEN;
        let pseudo = sum(&template[addrs..udp], 17 + (template.len() - udp) as u64);
        let sum = sum(&id.to_be_bytes(), sum(&template[udp..payload], pseudo));
        Flow { id, sequence: 0, template, payload, sum }
    }

    /// Length of a packet in bytes.
    pub fn frame_len(&self) -> usize {
        self.template.len()
    }

    /// Starts counting again.
    pub fn restart(&mut self) {
        self.sequence = 0;
    }

    /// Writes the next packet into `packet`, which has [`Flow::frame_len`] bytes.
    pub fn next(&mut self, kind: Kind, intended_ns: u64, packet: &mut [u8]) {
        packet.copy_from_slice(&self.template);
        let stamp = &mut packet[self.payload..self.payload + STAMP_LEN];
        stamp[..2].copy_from_slice(&(kind as u16).to_be_bytes());
        stamp[2..6].copy_from_slice(&self.id.to_be_bytes());
        stamp[6..10].copy_from_slice(&self.sequence.to_be_bytes());
        stamp[10..18].copy_from_slice(&intended_ns.to_be_bytes());
        let changed = sum(&stamp[6..18], self.sum + u64::from(kind as u16));
        let checksum = match !fold(changed) {
            0 => 0xffff, // RFC 768: zero means that there is none
            checksum => checksum,
        };
        packet[self.payload - 2..self.payload].copy_from_slice(&checksum.to_be_bytes());
        self.sequence = self.sequence.wrapping_add(1);
    }
}

/// Where the addresses and the UDP header of an Ethernet frame start; `None` if it is no whole UDP packet.
fn layers(packet: &[u8]) -> Option<(usize, usize)> {
    let (addrs, udp) = match packet.get(12..14)? {
        [0x08, 0x00] => (26, ETHERNET_LEN + usize::from(packet.get(14)? & 15) * 4),
        [0x86, 0xdd] => (22, 54),
        _ => return None,
    };
    let protocol = if addrs == 26 { packet.get(23)? } else { packet.get(20)? };
    (*protocol == 17 && packet.len() >= udp + UDP_LEN + STAMP_LEN).then_some((addrs, udp))
}

/// What the sink reads from a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Which part of the measurement.
    pub kind: Kind,
    /// Number of the flow.
    pub flow: u32,
    /// Number of the packet inside the flow.
    pub sequence: u32,
    /// When it should have been sent.
    pub intended_ns: u64,
    /// Where it says it comes from.
    pub from: (IpAddr, u16),
    /// Where it arrived.
    pub to: (IpAddr, u16),
    /// All checksums are right.
    pub intact: bool,
}

impl Seen {
    /// Reads a packet; `None` if it is not one of ours.
    pub fn read(packet: &[u8]) -> Option<Seen> {
        let (addrs, udp) = layers(packet)?;
        let udp_len = usize::from(u16::from_be_bytes([packet[udp + 4], packet[udp + 5]]));
        let datagram = packet.get(udp..udp + udp_len)?;
        let stamp = datagram.get(UDP_LEN..UDP_LEN + STAMP_LEN)?;
        let u32_at = |at: usize| u32::from_be_bytes(stamp[at..at + 4].try_into().expect("4 bytes"));
        let kind = match u16::from_be_bytes([stamp[0], stamp[1]]) {
            kind if kind == Kind::WarmUp as u16 => Kind::WarmUp,
            kind if kind == Kind::Measured as u16 => Kind::Measured,
            _ => return None,
        };
        let is_v4 = addrs == 26;
        let addr_at = |at: usize| -> IpAddr {
            if is_v4 {
                <[u8; 4]>::try_from(&packet[at..at + 4]).expect("4 bytes").into()
            } else {
                <[u8; 16]>::try_from(&packet[at..at + 16]).expect("16 bytes").into()
            }
        };
        let port_at = |at: usize| u16::from_be_bytes([datagram[at], datagram[at + 1]]);
        let pseudo = sum(&packet[addrs..addrs + if is_v4 { 8 } else { 32 }], 17 + udp_len as u64);
        let intact =
            fold(sum(datagram, pseudo)) == 0xffff && (!is_v4 || fold(sum(&packet[14..udp], 0)) == 0xffff);
        Some(Seen {
            kind,
            flow: u32_at(2),
            sequence: u32_at(6),
            intended_ns: u64::from(u32_at(10)) << 32 | u64::from(u32_at(14)),
            from: (addr_at(addrs), port_at(0)),
            to: (addr_at(addrs + if is_v4 { 4 } else { 16 }), port_at(2)),
            intact,
        })
    }
}

/// Makes a packet its own answer: source and destination change places on every layer, which no checksum notices.
pub fn turn_back(packet: &mut [u8]) {
    let Some((addrs, udp)) = layers(packet) else { return };
    let addr_len = if addrs == 26 { 4 } else { 16 };
    for (at, len) in [(0, 6), (addrs, addr_len), (udp, 2)] {
        let (first, second) = packet[at..at + 2 * len].split_at_mut(len);
        first.swap_with_slice(second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flows(src: &str, dst: &str, frame_len: usize) -> Flows {
        Flows {
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: [2, 0, 0, 0, 0, 2],
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            frame_len,
        }
    }

    #[test]
    fn packets_are_read_back_and_are_valid_udp_of_both_families() {
        for (src, dst, len) in [
            ("198.51.100.1-198.51.100.9", "203.0.113.10:80", 60),
            ("198.51.100.1", "203.0.113.10:80", 61),
            ("2001:db8::1-2001:db8::9", "[fd00::10]:80", 80),
            ("2001:db8::1", "[fd00::10]:80", 1514),
        ] {
            let flows = flows(src, dst, len);
            assert!(len >= Flows::frame_len_min(flows.src.is_v4));
            let mut packet = vec![0; len];
            for id in [0, 1, 8, 9, 70_000, u32::MAX] {
                let mut flow = Flow::new(&flows, id);
                for sequence in 0..3 {
                    flow.next(Kind::Measured, 0x0123_4567_89ab_cdef + u64::from(id), &mut packet);
                    let seen = Seen::read(&packet).unwrap();
                    assert_eq!((seen.flow, seen.sequence, seen.intact), (id, sequence, true));
                    assert_eq!(seen.intended_ns, 0x0123_4567_89ab_cdef + u64::from(id));
                    assert_eq!((seen.from, seen.to), (flows.client(id), (flows.dst.addrs.get(0), 80)));
                    turn_back(&mut packet);
                    let back = Seen { from: seen.to, to: seen.from, ..seen };
                    assert_eq!(Seen::read(&packet), Some(back));
                    turn_back(&mut packet);
                }
                let parsed = etherparse::SlicedPacket::from_ethernet(&packet).unwrap();
                let Some(etherparse::TransportSlice::Udp(udp)) = parsed.transport else { panic!("UDP") };
                assert_eq!(usize::from(udp.length()), len - 14 - if flows.src.is_v4 { 20 } else { 40 });
            }
        }
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let flows = flows("198.51.100.1", "203.0.113.10:80", 100);
        let mut packet = vec![0; 100];
        Flow::new(&flows, 5).next(Kind::WarmUp, 77, &mut packet);
        for at in 14..100 {
            packet[at] ^= 0x10;
            assert!(Seen::read(&packet).is_none_or(|seen| !seen.intact), "byte {at}");
            packet[at] ^= 0x10;
        }
        assert!(Seen::read(&packet).unwrap().intact);
        for cut in 0..100 {
            Seen::read(&packet[..cut]); // no panic
        }
    }

    #[test]
    fn flows_differ_in_their_tuples() {
        let flows = flows("198.51.100.1-198.51.100.3", "203.0.113.10:80", 60);
        let tuples: std::collections::HashSet<Vec<u8>> =
            (0..300).map(|id| flows.template(id)[26..38].to_vec()).collect();
        assert_eq!(tuples.len(), 300);
    }
}
