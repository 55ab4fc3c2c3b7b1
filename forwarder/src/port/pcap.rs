//! Capture files, for `towpathd replay`: the classic pcap format (draft-ietf-opsawg-pcap), Ethernet.

use std::io::{self, Read, Write};

const MAGIC_US: u32 = 0xa1b2_c3d4;
const MAGIC_NS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
const SNAP_LEN: u32 = 262_144;

/// A packet of a capture file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// When it was captured, in nanoseconds since 1970.
    pub time_ns: u64,
    /// The packet, from its Ethernet header on.
    pub bytes: Vec<u8>,
}

/// Why a capture file cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum PcapError {
    /// Not a classic pcap file.
    #[error(
        "not a pcap file (magic {0:#010x}); write one with `tcpdump -w`, or convert with `editcap -F pcap`"
    )]
    Magic(u32),
    /// Not Ethernet.
    #[error("link type {0} is not Ethernet (1); capture on an Ethernet interface, not on `any`")]
    LinkType(u32),
    /// A record is longer than any packet, or was cut short when it was captured.
    #[error("packet {number}: {captured} of {original} bytes captured; capture with `tcpdump -s 0`")]
    Cut {
        /// Counted from 1.
        number: u64,
        /// Bytes in the file.
        captured: u32,
        /// Bytes on the wire.
        original: u32,
    },
    /// The file ends inside a record or cannot be read.
    #[error("packet {number}: {source}")]
    Io {
        /// Counted from 1; 0 is the file's header.
        number: u64,
        /// What went wrong.
        source: io::Error,
    },
}

/// Reads a capture file, of either byte order and either resolution.
pub struct Reader<R> {
    file: R,
    big_endian: bool,
    ns_per_unit: u64,
    number: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the header of the file.
    ///
    /// # Errors
    /// It is no pcap file, or not of Ethernet.
    pub fn new(mut file: R) -> Result<Reader<R>, PcapError> {
        let mut header = [0; 24];
        file.read_exact(&mut header).map_err(|source| PcapError::Io { number: 0, source })?;
        let little = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let (big_endian, ns_per_unit) = match (little, little.swap_bytes()) {
            (MAGIC_US, _) => (false, 1000),
            (MAGIC_NS, _) => (false, 1),
            (_, MAGIC_US) => (true, 1000),
            (_, MAGIC_NS) => (true, 1),
            _ => return Err(PcapError::Magic(little)),
        };
        let reader = Reader { file, big_endian, ns_per_unit, number: 0 };
        match reader.u32_at(&header, 20) & 0x0fff_ffff {
            ETHERNET => Ok(reader),
            other => Err(PcapError::LinkType(other)),
        }
    }

    fn u32_at(&self, bytes: &[u8], at: usize) -> u32 {
        let field = bytes[at..at + 4].try_into().expect("4 bytes");
        if self.big_endian { u32::from_be_bytes(field) } else { u32::from_le_bytes(field) }
    }

    /// The next packet; `None` at the end of the file.
    ///
    /// # Errors
    /// The file ends inside a packet, or the packet was cut short when it was captured.
    pub fn next_record(&mut self) -> Result<Option<Record>, PcapError> {
        let mut header = [0; 16];
        let number = self.number + 1;
        let failed = |source| PcapError::Io { number, source };
        match self.file.read(&mut header[..1]).map_err(failed)? {
            0 => return Ok(None),
            _ => self.file.read_exact(&mut header[1..]).map_err(failed)?,
        }
        self.number = number;
        let (captured, original) = (self.u32_at(&header, 8), self.u32_at(&header, 12));
        if captured < original || captured > SNAP_LEN {
            return Err(PcapError::Cut { number, captured, original });
        }
        let mut bytes = vec![0; captured as usize];
        self.file.read_exact(&mut bytes).map_err(failed)?;
        let (seconds, fraction) = (self.u32_at(&header, 0), self.u32_at(&header, 4));
        let time_ns = u64::from(seconds) * 1_000_000_000 + u64::from(fraction) * self.ns_per_unit;
        Ok(Some(Record { time_ns, bytes }))
    }
}

/// Writes a capture file with nanoseconds.
pub struct Writer<W> {
    file: W,
}

impl<W: Write> Writer<W> {
    /// Writes the header of the file.
    ///
    /// # Errors
    /// As `file` says.
    pub fn new(mut file: W) -> io::Result<Writer<W>> {
        for field in [MAGIC_NS, 4 << 16 | 2, 0, 0, SNAP_LEN, ETHERNET] {
            file.write_all(&field.to_le_bytes())?;
        }
        Ok(Writer { file })
    }

    /// Appends a packet.
    ///
    /// # Errors
    /// As the file says.
    pub fn write_record(&mut self, time_ns: u64, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u32;
        let (seconds, fraction) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
        for field in [seconds as u32, fraction as u32, len, len] {
            self.file.write_all(&field.to_le_bytes())?;
        }
        self.file.write_all(bytes)
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// As the file says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(records: &[(u64, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new(vec![]).unwrap();
        records.iter().for_each(|(time_ns, bytes)| writer.write_record(*time_ns, bytes).unwrap());
        writer.file
    }

    #[test]
    fn what_is_written_is_read_with_its_time() {
        let records = [(1_700_000_000_000_000_001, &b"first"[..]), (1_700_000_001_999_999_999, b"second")];
        let input = file(&records);
        let mut reader = Reader::new(&input[..]).unwrap();
        for (time_ns, bytes) in records {
            assert_eq!(reader.next_record().unwrap(), Some(Record { time_ns, bytes: bytes.to_vec() }));
        }
        assert_eq!(reader.next_record().unwrap(), None);
    }

    #[test]
    fn both_byte_orders_and_resolutions_are_read() {
        for (magic, fraction, time_ns) in [(MAGIC_US, 7u32, 5_000_007_000u64), (MAGIC_NS, 7, 5_000_000_007)] {
            for big in [false, true] {
                let bytes = |v: u32| if big { v.to_be_bytes() } else { v.to_le_bytes() };
                let fields = [magic, 0, 0, 0, 65535, ETHERNET, 5, fraction, 2, 2];
                let mut input: Vec<u8> = fields.into_iter().flat_map(bytes).collect();
                input.extend_from_slice(b"ab");
                let mut reader = Reader::new(&input[..]).unwrap();
                let record = reader.next_record().unwrap().unwrap();
                assert_eq!(record, Record { time_ns, bytes: b"ab".to_vec() });
                assert_eq!(reader.next_record().unwrap(), None);
            }
        }
    }

    #[test]
    fn damaged_files_are_told_apart() {
        let good = file(&[(1, b"packet")]);
        for cut in 24..good.len() {
            let mut reader = Reader::new(&good[..cut]).unwrap();
            let result = reader.next_record();
            if cut == 24 {
                assert_eq!(result.unwrap(), None);
            } else {
                assert!(matches!(result, Err(PcapError::Io { number: 1, .. })), "cut at {cut}");
            }
        }
        let mut wrong = good.clone();
        wrong[20] = 113;
        assert!(matches!(Reader::new(&wrong[..]), Err(PcapError::LinkType(113))));
        wrong[0] = 0;
        assert!(matches!(Reader::new(&wrong[..]), Err(PcapError::Magic(_))));
        let mut short = good;
        short[36] = 200; // original length
        let result = Reader::new(&short[..]).unwrap().next_record();
        assert!(matches!(result, Err(PcapError::Cut { number: 1, captured: 6, original: 200 })));
    }
}
