//! One clock for generator and sink, and the busy time of the machine.

use std::fs;

use rustix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC in nanoseconds; about 20 ns a call.
#[inline]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Seconds that the CPUs of this machine were busy since boot, interrupts and softirqs included; stolen time is not.
/// From /proc/stat, whose unit is 1/100 s.
pub fn busy_s() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = text.lines().next() else { return 0.0 };
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|&i| ticks.get(i)).sum::<u64>();
    busy as f64 / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_forward_and_work_is_busy_time() {
        let (before, busy) = (now_ns(), busy_s());
        let mut sum = 0u64;
        while now_ns() - before < 150_000_000 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(sum > 0 && busy_s() > busy);
    }
}
