//! Captures as workers and control share them: what is wanted, what is known of a packet, and the way of a record.
//!
//! `control/capture` publishes the running [`Captures`]; the tap of each worker (`worker/capture`) writes a record of what they
//! want into a ring of its own for each of them; control reads the rings. A worker waits for nobody: a record that finds
//! no room is counted and forgotten.

use std::sync::Arc;

use config::capture::Point;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::addr::{Addr, Tuple};
use crate::table::flow_map::Direction;
use crate::table::record_ring::RecordRing;
use crate::verdict::{Reason, Verdict};

use predicate::Predicate;

pub mod predicate;

/// The captures that run: immutable once published, like tables.
#[derive(Debug, Default)]
pub struct Captures(pub Vec<Arc<Capture>>);

/// One capture.
#[derive(Debug)]
pub struct Capture {
    /// Which packets.
    pub predicate: Predicate,
    /// Where they are looked at.
    pub at: Vec<Point>,
    /// At which port; `None`: at all of them.
    pub port: Option<u8>,
    /// Bytes of a packet to keep.
    pub snaplen: usize,
    /// Where records go, by worker.
    pub rings: Arc<[RecordRing]>,
}

impl Capture {
    /// True if it wants a packet that is at `point` of `port`.
    #[inline]
    pub fn wants(&self, point: Point, port: u8, note: &Note) -> bool {
        self.at.contains(&point)
            && self.port.is_none_or(|wanted| wanted == port)
            && self.predicate.matches(note)
    }
}

/// What is known of a packet once it is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Note {
    /// Its number.
    pub id: u64,
    /// Addresses and ports as it came.
    pub before: Tuple,
    /// Addresses and ports as it leaves, or would have left.
    pub after: Tuple,
    /// Stable id of the service port, 0 if it belongs to none.
    pub service: u64,
    /// The endpoint, if it belongs to a service and one was chosen.
    pub endpoint: Option<(Addr, u16)>,
    /// Its direction in its flow, and the generation that the flow was created under.
    pub flow: Option<(Direction, u32)>,
    /// What becomes of it.
    pub verdict: Verdict,
}

/// A packet at a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// What is known of it.
    pub note: Note,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub time_ns: u64,
    /// Generation of the tables that it was judged by.
    pub generation: u64,
    /// Where it was looked at.
    pub point: Point,
    /// Index of the port there.
    pub port: u8,
    /// Its length, bytes.
    pub len: u32,
}

/// Words that a [`Record`] is in a ring.
pub const RECORD_WORDS: usize = size_of::<Encoded>() / 8;

/// A record as words.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Encoded {
    addresses: [u128; 5],
    id: u64,
    time_ns: u64,
    generation: u64,
    service: u64,
    flow_generation: u32,
    len: u32,
    /// Of `before`, `after` and the endpoint.
    ports: [u16; 5],
    protocols: [u8; 2],
    /// 0: no endpoint.
    has_endpoint: u8,
    /// 0: no flow, 1: original, 2: reply.
    direction: u8,
    point: u8,
    port: u8,
    /// See [`encode_verdict`].
    verdict: [u8; 3],
    spare: [u8; 5],
}

impl Record {
    /// The record as words for a ring.
    pub fn encode(&self) -> [u64; RECORD_WORDS] {
        let Note { id, before, after, service, endpoint, flow, verdict } = self.note;
        let (endpoint_addr, endpoint_port) = endpoint.unwrap_or_default();
        zerocopy::transmute!(Encoded {
            addresses: [before.src.0, before.dst.0, after.src.0, after.dst.0, endpoint_addr.0],
            id,
            time_ns: self.time_ns,
            generation: self.generation,
            service,
            flow_generation: flow.map_or(0, |(_, generation)| generation),
            len: self.len,
            ports: [before.src_port, before.dst_port, after.src_port, after.dst_port, endpoint_port],
            protocols: [before.protocol, after.protocol],
            has_endpoint: u8::from(endpoint.is_some()),
            direction: match flow {
                None => 0,
                Some((Direction::Original, _)) => 1,
                Some((Direction::Reply, _)) => 2,
            },
            point: self.point as u8,
            port: self.port,
            verdict: encode_verdict(verdict),
            spare: [0; 5],
        })
    }

    /// Reads what [`encode`](Record::encode) made.
    pub fn decode(words: [u64; RECORD_WORDS]) -> Record {
        let encoded: Encoded = zerocopy::transmute!(words);
        let [src, dst, out_src, out_dst, endpoint_addr] = encoded.addresses.map(Addr);
        let [src_port, dst_port, out_src_port, out_dst_port, endpoint_port] = encoded.ports;
        let [protocol, out_protocol] = encoded.protocols;
        let direction = match encoded.direction {
            0 => None,
            1 => Some(Direction::Original),
            _ => Some(Direction::Reply),
        };
        Record {
            note: Note {
                id: encoded.id,
                before: Tuple { src, dst, src_port, dst_port, protocol },
                after: Tuple {
                    src: out_src,
                    dst: out_dst,
                    src_port: out_src_port,
                    dst_port: out_dst_port,
                    protocol: out_protocol,
                },
                service: encoded.service,
                endpoint: (encoded.has_endpoint != 0).then_some((endpoint_addr, endpoint_port)),
                flow: direction.map(|direction| (direction, encoded.flow_generation)),
                verdict: decode_verdict(encoded.verdict),
            },
            time_ns: encoded.time_ns,
            generation: encoded.generation,
            point: Point::ALL[usize::from(encoded.point) % Point::ALL.len()],
            port: encoded.port,
            len: encoded.len,
        }
    }
}

/// Kind, port, reason.
fn encode_verdict(verdict: Verdict) -> [u8; 3] {
    match verdict {
        Verdict::Undecided => [0, 0, 0],
        Verdict::Forward { port } => [1, port, 0],
        Verdict::Answer { port, reason } => [2, port, reason as u8],
        Verdict::Punt => [3, 0, 0],
        Verdict::Hold { port } => [4, port, 0],
        Verdict::Drop(reason) => [5, 0, reason as u8],
        Verdict::Gather => [6, 0, 0],
    }
}

fn decode_verdict([kind, port, reason]: [u8; 3]) -> Verdict {
    let reason = Reason::ALL.get(usize::from(reason)).copied().unwrap_or(Reason::InternalError);
    match kind {
        1 => Verdict::Forward { port },
        2 => Verdict::Answer { port, reason },
        3 => Verdict::Punt,
        4 => Verdict::Hold { port },
        5 => Verdict::Drop(reason),
        6 => Verdict::Gather,
        _ => Verdict::Undecided,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_round_trip() {
        let tuple = |n: u32| Tuple {
            src: Addr::v4(n),
            dst: Addr::v6(u128::MAX - u128::from(n)),
            src_port: n as u16,
            dst_port: n as u16 + 1,
            protocol: n as u8,
        };
        let verdicts = [
            Verdict::Undecided,
            Verdict::Forward { port: 3 },
            Verdict::Answer { port: 1, reason: Reason::UnknownPort },
            Verdict::Punt,
            Verdict::Hold { port: 2 },
            Verdict::Drop(Reason::InternalError),
            Verdict::Drop(Reason::Truncated),
            Verdict::Gather,
        ];
        for (number, verdict) in verdicts.into_iter().enumerate() {
            let number = number as u32;
            let note = Note {
                id: u64::from(number) << 40,
                before: tuple(number),
                after: tuple(number + 100),
                service: u64::MAX - 7,
                endpoint: number.is_multiple_of(2).then_some((Addr::v4(number), 8080)),
                flow: [None, Some((Direction::Original, 7)), Some((Direction::Reply, u32::MAX))]
                    [number as usize % 3],
                verdict,
            };
            let record = Record {
                note,
                time_ns: 1 << 60,
                generation: 9,
                point: Point::ALL[number as usize % 3],
                port: number as u8,
                len: 65_557,
            };
            assert_eq!(Record::decode(record.encode()), record);
        }
    }
}
