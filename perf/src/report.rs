//! The result as one line, as a page, and as JSON.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::generator::Sent;
use crate::sink::Received;

/// Percentiles of the latency, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// Least.
    pub min_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90 of 100 are faster.
    pub p90_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1,000.
    pub p999_us: f64,
    /// 9,999 of 10,000.
    pub p9999_us: f64,
    /// Most.
    pub max_us: f64,
}

impl Latency {
    /// The percentiles of nanoseconds.
    pub fn of(latency_ns: &Histogram<u64>) -> Latency {
        let percentile = |q: f64| latency_ns.value_at_quantile(q) as f64 / 1e3;
        Latency {
            min_us: latency_ns.min() as f64 / 1e3,
            p50_us: percentile(0.5),
            p90_us: percentile(0.9),
            p99_us: percentile(0.99),
            p999_us: percentile(0.999),
            p9999_us: percentile(0.9999),
            max_us: latency_ns.max() as f64 / 1e3,
        }
    }
}

/// What one run has shown.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the scenario, free text.
    pub scenario: String,
    /// Packets a second that were to be sent.
    pub rate_asked: f64,
    /// Packets a second that were sent.
    pub rate_sent: f64,
    /// Packets a second that arrived.
    pub rate_received: f64,
    /// Bytes a frame, from the Ethernet header on.
    pub frame_len_bytes: usize,
    /// Flows begun.
    pub flows: u64,
    /// Seconds of sending.
    pub time_s: f64,
    /// Packets sent.
    pub sent: u64,
    /// Different packets received.
    pub received: u64,
    /// Packets that did not arrive.
    pub lost: u64,
    /// Of these, packets that the kernel dropped since this sink was too slow (at most `lost`).
    pub lost_at_sink: u64,
    /// See [`Received`].
    pub duplicates: u64,
    /// See [`Received`].
    pub reordered: u64,
    /// See [`Received`].
    pub wrong_endpoint: u64,
    /// See [`Received`].
    pub damaged: u64,
    /// See [`Received`].
    pub foreign: u64,
    /// The longest time by which the generator was behind its schedule.
    pub late_max_us: f64,
    /// Busy time of all CPUs of this machine during the run, generator and sink included.
    pub busy_cpu_s: f64,
    /// Latency; all 0 if nothing arrived.
    pub latency: Latency,
    /// CPU, and how many there are.
    pub machine: String,
    /// Kernel release.
    pub kernel: String,
    /// Commit of what was measured, from the environment variable `TOWPATH_COMMIT`.
    pub commit: String,
}

/// How many CPUs, and which.
pub fn machine() -> String {
    format!("{} x {}", std::thread::available_parallelism().map_or(1, usize::from), crate::place::cpu_model())
}

/// The kernel's release.
pub fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The commit of what is measured.
pub fn commit() -> String {
    std::env::var("TOWPATH_COMMIT").unwrap_or_else(|_| "unknown".into())
}

impl Report {
    /// Puts generator's and sink's counts together.
    pub fn new(
        scenario: &str,
        rate: f64,
        frame_len: usize,
        sent: &Sent,
        received: &Received,
        busy_cpu_s: f64,
    ) -> Report {
        let time_s = (sent.to_ns.saturating_sub(sent.from_ns) as f64 / 1e9).max(1e-9);
        let lost = sent.packets.saturating_sub(received.packets);
        Report {
            scenario: scenario.into(),
            rate_asked: rate,
            rate_sent: sent.packets as f64 / time_s,
            rate_received: received.packets as f64 / time_s,
            frame_len_bytes: frame_len,
            flows: sent.flows,
            time_s,
            sent: sent.packets,
            received: received.packets,
            lost,
            lost_at_sink: received.sink_dropped.min(lost),
            duplicates: received.duplicates,
            reordered: received.reordered,
            wrong_endpoint: received.wrong_endpoint,
            damaged: received.damaged,
            foreign: received.foreign,
            late_max_us: sent.late_max_ns as f64 / 1e3,
            busy_cpu_s,
            latency: Latency::of(&received.latency_ns),
            machine: machine(),
            kernel: kernel(),
            commit: commit(),
        }
    }

    /// Share of packets that did not arrive, 0 to 1.
    pub fn loss(&self) -> f64 {
        self.lost as f64 / self.sent.max(1) as f64
    }

    /// True if no packet came damaged, twice or at a wrong endpoint. Loss is not a mistake.
    pub fn is_correct(&self) -> bool {
        self.duplicates == 0 && self.wrong_endpoint == 0 && self.damaged == 0
    }

    /// The scenario in one line; mistakes are in it if there are any.
    pub fn line(&self) -> String {
        let mut mistakes = String::new();
        for (count, what) in [
            (self.duplicates, "duplicates"),
            (self.wrong_endpoint, "at a wrong endpoint"),
            (self.damaged, "damaged"),
        ] {
            if count > 0 {
                mistakes += &format!(", {count} {what}");
            }
        }
        format!(
            "{}: {:.3} Mpps of {:.3}, loss {:.4} %{mistakes}, latency p50 {:.1} us, p99 {:.1} us, {:.0} packets per busy CPU-second, {} lost at the sink, {}, Linux {}, commit {}",
            self.scenario,
            self.rate_received / 1e6,
            self.rate_asked / 1e6,
            self.loss() * 100.0,
            self.latency.p50_us,
            self.latency.p99_us,
            self.received as f64 / self.busy_cpu_s.max(1e-9),
            self.lost_at_sink,
            self.machine,
            self.kernel,
            self.commit,
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.line())?;
        writeln!(
            f,
            "  sent            {:>12}   {:.0} packets/s, at most {:.0} us late",
            self.sent, self.rate_sent, self.late_max_us
        )?;
        writeln!(
            f,
            "  received        {:>12}   {:.0} packets/s, {} flows",
            self.received, self.rate_received, self.flows
        )?;
        writeln!(f, "  lost            {:>12}   {} of them at this sink", self.lost, self.lost_at_sink)?;
        for (name, count) in [
            ("duplicates", self.duplicates),
            ("reordered", self.reordered),
            ("wrong endpoint", self.wrong_endpoint),
            ("damaged", self.damaged),
            ("foreign", self.foreign),
        ] {
            writeln!(f, "  {name:<15} {count:>12}")?;
        }
        let l = &self.latency;
        write!(
            f,
            "  latency us      min {:.1}  p50 {:.1}  p90 {:.1}  p99 {:.1}  p99.9 {:.1}  p99.99 {:.1}  max {:.1}",
            l.min_us, l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.p9999_us, l.max_us
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::{Judge, Side};

    fn sent(packets: u64) -> Sent {
        Sent { packets, flows: 7, late_max_ns: 1500, from_ns: 1_000_000_000, to_ns: 3_000_000_000 }
    }

    fn report(received: &Received) -> Report {
        Report::new("test", 500.0, 60, &sent(1000), received, 0.5)
    }

    #[test]
    fn what_did_not_arrive_is_lost_and_no_mistake() {
        let mut received = Judge::new(Side::Endpoint, vec![], 0).finish();
        received.packets = 990;
        received.sink_dropped = 4;
        let made = report(&received);
        assert_eq!((made.sent, made.received, made.lost, made.lost_at_sink), (1000, 990, 10, 4));
        assert_eq!((made.rate_sent, made.rate_received, made.loss()), (500.0, 495.0, 0.01));
        assert!(made.is_correct());
        // What the sink dropped may be packets of others, and never is more than what is missing.
        received.sink_dropped = 99;
        assert_eq!(report(&received).lost_at_sink, 10);
    }

    #[test]
    fn mistakes_are_told_apart_in_text_and_json() {
        for (name, of) in [
            ("duplicates", (|r| &mut r.duplicates) as fn(&mut Received) -> &mut u64),
            ("wrong_endpoint", |r| &mut r.wrong_endpoint),
            ("damaged", |r| &mut r.damaged),
            ("reordered", |r| &mut r.reordered),
            ("foreign", |r| &mut r.foreign),
        ] {
            let mut received = Judge::new(Side::Endpoint, vec![], 0).finish();
            *of(&mut received) = 3;
            let made = report(&received);
            // Order is not promised by anybody, and what is not ours is none of ours.
            assert_eq!(made.is_correct(), ["reordered", "foreign"].contains(&name), "{name}");
            assert_eq!(made.line().contains(", 3 "), !made.is_correct(), "{}", made.line());
            let json = serde_json::to_value(&made).unwrap();
            for other in ["duplicates", "wrong_endpoint", "damaged", "reordered", "foreign"] {
                assert_eq!(json[other], if other == name { 3 } else { 0 }, "{other} in {json}");
            }
            let text = made.to_string();
            let line = text.lines().find(|line| line.trim_start().starts_with(&name.replace('_', " ")));
            assert!(line.is_some_and(|line| line.trim_end().ends_with(" 3")), "{text}");
        }
    }
}
