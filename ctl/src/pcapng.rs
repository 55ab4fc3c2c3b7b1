//! Capture files in the pcapng format (draft-ietf-opsawg-pcapng), as wireshark, tshark and tcpdump read them.
//!
//! One section, little-endian, Ethernet, nanoseconds: a section header, an interface description for each place where
//! packets are looked at, then an enhanced packet block for each packet, with a comment.

use std::io::{self, Write};

/// Block types, section 11.1.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;

/// Options, sections 3.5, 4.1, 4.2 and 4.3.
const OPT_COMMENT: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const IF_FILTER: u16 = 11;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
const EPB_PACKETID: u16 = 5;

const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const ETHERNET: u16 = 1;
/// `if_tsresol`: units of 10^-9 s.
const NANOSECONDS: u8 = 9;
/// The kind of `if_filter`: a string.
const FILTER_STRING: u8 = 0;

/// Writes a capture file.
pub struct Writer<W> {
    file: W,
    interfaces: u32,
}

/// A packet to be written.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'p> {
    /// Number of the interface, as [`Writer::interface`] gave it.
    pub interface: u32,
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// What was kept of it.
    pub data: &'p [u8],
    /// Its length on the wire, bytes.
    pub len: u32,
    /// It came in by the interface; otherwise it leaves by it.
    pub inbound: bool,
    /// The same for a packet that is seen at two interfaces.
    pub id: u64,
    /// Packets that were lost to the capture since the one before.
    pub lost: u64,
    /// For people.
    pub comment: &'p str,
}

impl<W: Write> Writer<W> {
    /// Begins the file. `program`: who writes it.
    ///
    /// # Errors
    /// As the file says.
    pub fn new(file: W, program: &str) -> io::Result<Writer<W>> {
        let mut writer = Writer { file, interfaces: 0 };
        let mut body = Vec::new();
        body.extend(BYTE_ORDER_MAGIC.to_le_bytes());
        // Version 1.0; the length of the section is not known.
        body.extend([1u16, 0].map(u16::to_le_bytes).concat());
        body.extend((-1i64).to_le_bytes());
        option(&mut body, SHB_USERAPPL, program.as_bytes());
        writer.block(SECTION_HEADER, body)?;
        Ok(writer)
    }

    /// Describes an interface; returns its number.
    ///
    /// # Errors
    /// As the file says.
    pub fn interface(&mut self, name: &str, filter: &str, snaplen: u32) -> io::Result<u32> {
        let mut body = Vec::new();
        body.extend([ETHERNET, 0].map(u16::to_le_bytes).concat());
        body.extend(snaplen.to_le_bytes());
        option(&mut body, IF_NAME, name.as_bytes());
        option(&mut body, IF_TSRESOL, &[NANOSECONDS]);
        if !filter.is_empty() {
            option(&mut body, IF_FILTER, &[&[FILTER_STRING], filter.as_bytes()].concat());
        }
        self.block(INTERFACE_DESCRIPTION, body)?;
        self.interfaces += 1;
        Ok(self.interfaces - 1)
    }

    /// Appends a packet.
    ///
    /// # Errors
    /// As the file says.
    pub fn packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        let mut body = Vec::with_capacity(packet.data.len() + packet.comment.len() + 96);
        let (high, low) = ((packet.time_ns >> 32) as u32, packet.time_ns as u32);
        for field in [packet.interface, high, low, packet.data.len() as u32, packet.len] {
            body.extend(field.to_le_bytes());
        }
        body.extend(packet.data);
        pad(&mut body);
        let direction: u32 = if packet.inbound { 1 } else { 2 };
        option(&mut body, OPT_COMMENT, packet.comment.as_bytes());
        option(&mut body, EPB_FLAGS, &direction.to_le_bytes());
        if packet.lost > 0 {
            option(&mut body, EPB_DROPCOUNT, &packet.lost.to_le_bytes());
        }
        option(&mut body, EPB_PACKETID, &packet.id.to_le_bytes());
        self.block(ENHANCED_PACKET, body)
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// As the file says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    /// Writes a block whose options are the end of `body`.
    fn block(&mut self, kind: u32, mut body: Vec<u8>) -> io::Result<()> {
        // The end of options.
        body.extend([0; 4]);
        let len = (body.len() as u32 + 12).to_le_bytes();
        self.file.write_all(&kind.to_le_bytes())?;
        self.file.write_all(&len)?;
        self.file.write_all(&body)?;
        self.file.write_all(&len)
    }
}

/// Fills up to a multiple of four bytes.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Appends an option. A value that is too long for one is cut.
fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(usize::from(u16::MAX))];
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    pad(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let mut writer = Writer::new(Vec::new(), "me").unwrap();
        assert_eq!(writer.interface("g:rx", "tcp", 96).unwrap(), 0);
        assert_eq!(writer.interface("g:tx", "", 96).unwrap(), 1);
        let packet = Packet {
            interface: 1,
            time_ns: 0x0102_0304_0506_0708,
            data: b"abcde",
            len: 60,
            inbound: false,
            id: 7,
            lost: 0,
            comment: "hi",
        };
        writer.packet(&packet).unwrap();
        writer
            .packet(&Packet { interface: 0, data: b"", inbound: true, lost: 3, comment: "", ..packet })
            .unwrap();
        #[rustfmt::skip]
        let expected: &[u8] = &[
            // Section header, 40 bytes: magic, version 1.0, length unknown, shb_userappl.
            0x0a, 0x0d, 0x0d, 0x0a, 40, 0, 0, 0, 0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0,
            255, 255, 255, 255, 255, 255, 255, 255, 4, 0, 2, 0, b'm', b'e', 0, 0, 0, 0, 0, 0, 40, 0, 0, 0,
            // Interface 0, 48 bytes: Ethernet, snaplen, if_name, if_tsresol, if_filter.
            1, 0, 0, 0, 48, 0, 0, 0, 1, 0, 0, 0, 96, 0, 0, 0, 2, 0, 4, 0, b'g', b':', b'r', b'x',
            9, 0, 1, 0, 9, 0, 0, 0, 11, 0, 4, 0, 0, b't', b'c', b'p', 0, 0, 0, 0, 48, 0, 0, 0,
            // Interface 1, 40 bytes, without a filter.
            1, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 96, 0, 0, 0, 2, 0, 4, 0, b'g', b':', b't', b'x',
            9, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0,
            // A packet, 72 bytes: interface, time, captured, length, data; comment, outbound, its number.
            6, 0, 0, 0, 72, 0, 0, 0, 1, 0, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 5, 0, 0, 0, 60, 0, 0, 0,
            b'a', b'b', b'c', b'd', b'e', 0, 0, 0, 1, 0, 2, 0, b'h', b'i', 0, 0, 2, 0, 4, 0, 2, 0, 0, 0,
            5, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 72, 0, 0, 0,
            // One without bytes, with losses before it.
            6, 0, 0, 0, 72, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 0, 0, 0, 0, 60, 0, 0, 0,
            1, 0, 0, 0, 2, 0, 4, 0, 1, 0, 0, 0, 4, 0, 8, 0, 3, 0, 0, 0, 0, 0, 0, 0,
            5, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 72, 0, 0, 0,
        ];
        assert_eq!(writer.file.len(), expected.len());
        assert_eq!(writer.file, expected);
    }

    #[test]
    fn blocks_can_be_walked_from_both_ends() {
        let mut writer = Writer::new(Vec::new(), "towpathctl").unwrap();
        writer.interface("uplink:rx", "host 10.0.0.1", 2048).unwrap();
        for len in 0..70usize {
            let data = vec![len as u8; len];
            let comment = "c".repeat(len);
            let packet = Packet {
                interface: 0,
                time_ns: 1,
                data: &data,
                len: len as u32,
                inbound: true,
                id: 1,
                lost: len as u64 % 2,
                comment: &comment,
            };
            writer.packet(&packet).unwrap();
        }
        let (mut rest, mut blocks) = (&writer.file[..], 0);
        while !rest.is_empty() {
            let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            assert_eq!((len % 4, &rest[len - 4..len]), (0, &rest[4..8]));
            rest = &rest[len..];
            blocks += 1;
        }
        assert_eq!(blocks, 72);
    }
}
