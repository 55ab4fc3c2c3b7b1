//! Numbered datagrams at a constant rate through a gateway: what is lost, doubled or late is known one by one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;

use crate::namespace::Namespace;
use crate::wire::Wire;

/// Where the number stands in the payload of the frame.
const NUMBER_AT: usize = 42;

/// A datagram from the client of the [twin](crate::twin) to a Service of the golden cases, without a checksum, so that its
/// payload can be numbered.
pub fn datagram() -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1])
        .ipv4([10, 1, 0, 2], [203, 0, 113, 10], 64)
        .udp(20_000, 53)
        .write(&mut frame, &[0; 18])
        .expect("a vector takes every byte");
    frame[40..42].copy_from_slice(&[0, 0]);
    frame
}

/// What became of the datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sent.
    pub sent: u64,
    /// Arrived at least once.
    pub arrived: u64,
    /// Arrived more than once.
    pub doubled: u64,
    /// Longest time without an arrival, microseconds.
    pub longest_gap_us: u64,
}

/// Sends an Ethernet frame of an IPv4 UDP datagram from `from` at `rate` a second until `stop`, each with its number in the
/// payload and one of 64 source ports, and watches `to` for them.
///
/// `frame`: complete but for the number and the source port; its UDP checksum must be 0. Open loop: late frames are sent at
/// once, none is left out. Returns when nothing has come for a second after the end.
pub fn run(
    from: (&Namespace, &str),
    to: (&Namespace, &str),
    frame: &[u8],
    rate: u64,
    stop: &AtomicBool,
) -> Result<Report> {
    ensure!(frame.len() >= NUMBER_AT + 8, "the frame has no room for a number");
    let (sender, receiver) = (Wire::open(from.0, from.1)?, Wire::open(to.0, to.1)?);
    receiver.enlarge(64 << 20)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&receiver, &done));
        let start = Instant::now();
        let mut frame = frame.to_vec();
        let mut number = 0u64;
        while !stop.load(Ordering::Relaxed) {
            let due = (start.elapsed().as_nanos() as u64).saturating_mul(rate) / 1_000_000_000;
            while number < due {
                frame[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&number.to_be_bytes());
                frame[34..36].copy_from_slice(&(20_000 + (number % 64) as u16).to_be_bytes());
                sender.send(&frame).context("the generator")?;
                number += 1;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        done.store(true, Ordering::Relaxed);
        let mut report = watching.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        report.sent = number;
        Ok(report)
    })
}

fn watch(wire: &Wire, done: &AtomicBool) -> Result<Report> {
    let mut seen: Vec<u64> = Vec::new();
    let mut report = Report::default();
    let mut last: Option<Instant> = None;
    let mut buffer = vec![0; 2048];
    loop {
        let Some(len) = wire.receive_into(&mut buffer, Duration::from_secs(1))? else {
            if done.load(Ordering::Relaxed) {
                return Ok(report);
            }
            continue;
        };
        // UDP over IPv4 with room for a number; anything else is not ours.
        if len < NUMBER_AT + 8 || buffer[12..14] != [8, 0] || buffer[23] != 17 {
            continue;
        }
        let number = u64::from_be_bytes(buffer[NUMBER_AT..NUMBER_AT + 8].try_into().expect("eight bytes"));
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        ensure!(word < 1 << 24, "number {number} was never sent");
        if seen.len() <= word {
            seen.resize(word + 1, 0);
        }
        if seen[word] & bit == 0 {
            report.arrived += 1;
        } else {
            report.doubled += 1;
        }
        seen[word] |= bit;
        let now = Instant::now();
        if let Some(last) = last {
            report.longest_gap_us = report.longest_gap_us.max((now - last).as_micros() as u64);
        }
        last = Some(now);
    }
}
