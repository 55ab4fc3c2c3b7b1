//! What the rings lose before the pipeline sees it is counted by the kernel, told apart from drops, and outlives the data plane.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use config::control::{Count, Drops, Stats};
use rustix::process::{Pid, Signal, kill_process};
use tests::case::folder;
use tests::gateway::Towpathd;
use tests::probe;
use tests::twin::Twin;
use tests::wire::Wire;

/// Datagrams that are sent while the data plane stands still.
const SENT: u64 = 1000;

fn values(counts: &[Count]) -> BTreeMap<&str, u64> {
    counts.iter().map(|count| (count.name.as_str(), count.value)).collect()
}

/// True once every thread of a process has stopped; the signal only asks for it.
fn stands_still(pid: Pid) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap();
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    })
}

/// Sends [`SENT`] datagrams while the data plane stands still, lets it go on, and returns the counters once all are accounted
/// for. The steering program takes a worker for dead after a second, so that there is time for one try after the other.
fn overflow(daemon: &Towpathd, wire: &Wire) -> Stats {
    let received = |stats: &Stats| values(&stats.totals)["rx_packets"];
    let before = received(&daemon.stats().unwrap());
    let pid = Pid::from_raw(daemon.data_plane().unwrap() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let start = Instant::now();
    while !stands_still(pid) {
        assert!(start.elapsed() < Duration::from_secs(10), "the data plane does not stop");
    }
    let frame = probe::datagram();
    for _ in 0..SENT {
        wire.send(&frame).unwrap();
    }
    // The receiving side of a veth pair works a moment behind the sender.
    std::thread::sleep(Duration::from_millis(100));
    kill_process(pid, Signal::CONT).unwrap();
    let start = Instant::now();
    loop {
        let stats = daemon.stats().unwrap();
        let rings = values(&stats.rings);
        let accounted = received(&stats) - before + rings["rx_ring_full"] + rings["rx_dropped"];
        if accounted >= SENT {
            return stats;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{accounted} of {SENT}: {stats:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start(twin: &Twin, rings: &str) -> (Towpathd, Wire) {
    let config = std::fs::read_to_string(folder().join("gateway.toml")).unwrap();
    let daemon = Towpathd::start(&twin.gateway, &format!("{config}\n[rings]\n{rings}\n")).unwrap();
    daemon.apply(&std::fs::read_to_string(folder().join("objects.yaml")).unwrap()).unwrap();
    (daemon, Wire::open(&twin.far, "w0").unwrap())
}

#[test]
fn a_full_receive_ring_is_a_loss_of_its_own() {
    let twin = Twin::new("full").unwrap();
    let (daemon, wire) = start(&twin, "rx = 64\nfill = 512");
    let stats = overflow(&daemon, &wire);
    let rings = values(&stats.rings);
    assert!(rings["rx_ring_full"] >= SENT - 64 - 32, "{rings:?}");
    assert_eq!((rings["rx_dropped"], rings["rx_fill_ring_empty_descs"]), (0, 0));
    let lost = rings["rx_ring_full"];

    let text = daemon.ctl(&["drops"]).unwrap();
    assert!(text.contains("Lost in the rings") && text.contains("rx_ring_full"), "{text}");
    let drops: Drops = serde_json::from_str(&daemon.ctl(&["drops", "-o", "json"]).unwrap()).unwrap();
    assert_eq!(values(&drops.rings)["rx_ring_full"], lost);
    assert!(!values(&drops.reasons).contains_key("rx_ring_full"), "no reason of the pipeline");
    let ports = daemon.ctl(&["get", "ports", "-o", "wide"]).unwrap();
    let (header, uplink) = (ports.lines().next().unwrap(), ports.lines().nth(1).unwrap());
    assert!(header.contains("RX-FULL") && uplink.contains(&format!(" {lost} ")), "{ports}");

    // The sockets live in the keeper, and what the kernel counted for them with it.
    daemon.kill_data_plane().unwrap();
    let start = Instant::now();
    while daemon.stats().is_err() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(values(&daemon.stats().unwrap().rings)["rx_ring_full"], lost);
    daemon.finish(&[]).unwrap();
}

#[test]
fn an_empty_fill_ring_is_told_apart_from_a_full_receive_ring() {
    let twin = Twin::new("fill").unwrap();
    let (daemon, wire) = start(&twin, "rx = 512\nfill = 64");
    let stats = overflow(&daemon, &wire);
    let rings = values(&stats.rings);
    assert!(rings["rx_dropped"] >= SENT - 64 - 32, "{rings:?}");
    // In copy mode the kernel counts such a packet twice; only one of the counters is a number of packets.
    assert_eq!(rings["rx_fill_ring_empty_descs"], rings["rx_dropped"]);
    assert_eq!(rings["rx_ring_full"], 0);
    daemon.finish(&[]).unwrap();
}
