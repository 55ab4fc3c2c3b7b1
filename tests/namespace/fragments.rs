//! Datagrams longer than the link, from real sockets and from raw frames: through Services in both families, over one queue and over
//! two, beside a flood of fragments that never become a datagram, and over the death of the data plane.

use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use tests::cluster::{Cluster, GATEWAY, SNAT_VIP, SNAT_VIP6, VIP, VIP6};
use tests::fragments::cut;
use tests::length;
use tests::wire::Wire;

/// Packets of connections that both ends have closed come too late for their flow.
const LATE: &str = "no_flow";
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];

/// A socket of the client that hears only what comes from the echo port of `vip`.
fn socket(cluster: &Cluster, vip: &str) -> UdpSocket {
    let (bind, to) = if vip.contains(':') {
        ("[2001:db8:c::2]:0", format!("[{vip}]:7"))
    } else {
        ("198.51.100.2:0", format!("{vip}:7"))
    };
    let open = || -> Result<UdpSocket> {
        let socket = UdpSocket::bind(bind)?;
        socket.connect(&to).with_context(|| to.clone())?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(socket)
    };
    cluster.client.inside(open).unwrap()
}

fn payload(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) % 251) as u8).collect()
}

/// Sends `len` bytes and expects them back.
#[track_caller]
fn echo(socket: &UdpSocket, len: usize, seed: usize) {
    let sent = payload(len, seed);
    socket.send(&sent).unwrap();
    expect(socket, &sent);
}

#[track_caller]
fn expect(socket: &UdpSocket, sent: &[u8]) {
    let mut buffer = vec![0; 65_536];
    let received = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{} bytes: {error}", sent.len()));
    assert!(buffer[..received] == *sent, "{received} bytes came back for {}", sent.len());
}

/// The gateway file with two workers.
fn two_workers() -> String {
    GATEWAY.replace("cpus = [1]", "cpus = [0, 1]")
}

/// A counter, summed over the workers.
fn total(cluster: &Cluster, name: &str) -> u64 {
    let totals = cluster.daemon().stats().unwrap().totals;
    totals.iter().find(|count| count.name == name).map_or(0, |count| count.value)
}

/// Kubernetes e2e "Services should be able to handle large requests: udp" sends 2,000 bytes.
#[test]
fn large_datagrams_come_back_in_both_families() {
    let cluster = Cluster::new("large", 5).unwrap();
    let mut datagrams = 0;
    for (vip, most) in [(VIP, 65_507), (VIP6, 65_527), (SNAT_VIP, 65_507), (SNAT_VIP6, 65_527)] {
        let socket = socket(&cluster, vip);
        for len in [2_000, 8_000, 1_452, 1_453, 1_472, 1_473, 2_952, 2_953, 30_000, most] {
            echo(&socket, len, 0);
            datagrams += 2 * u64::from(len > 1_472);
        }
    }
    let complete = total(&cluster, "datagrams_complete");
    assert!(complete >= datagrams, "{complete} of {datagrams} datagrams came in fragments");
    cluster.finish(&[]).unwrap();
}

#[test]
fn large_pings_are_answered_and_routed() {
    let cluster = Cluster::new("bigping", 1).unwrap();
    for address in [VIP, VIP6, "10.244.1.11", "fd00:244:1::11"] {
        cluster.client.run("ping", &["-c", "3", "-i", "0.2", "-W", "2", "-s", "8000", address]).unwrap();
    }
    cluster.finish(&["echo_answered"]).unwrap();
}

#[test]
fn two_queues_bring_datagrams_together() {
    let cluster = Cluster::with("queues", 5, 2, &two_workers()).unwrap();
    for vip in [VIP, VIP6, SNAT_VIP, SNAT_VIP6] {
        for round in 0..length::pick(25, 250) {
            // A port of its own each time, so that datagrams take either queue.
            let socket = socket(&cluster, vip);
            echo(&socket, 2_000, round);
            echo(&socket, 8_000, round);
        }
    }
    let handed = total(&cluster, "fragments_handed_over");
    println!("{handed} fragments were handed to the other worker");
    assert!(handed > 100, "{handed}");
    cluster.finish(&[]).unwrap();
}

/// As network cards do that hash ports where there are some: the first fragment takes one queue, the others the other one.
#[test]
fn fragments_of_one_datagram_take_different_queues() {
    let cluster = Cluster::with("split", 1, 2, &two_workers()).unwrap();
    // What CPU 0 sends takes queue 0, what CPU 1 sends takes queue 1.
    let choose = "for q in 0 1; do echo $((1 << q)) > /sys/class/net/c0/queues/tx-$q/xps_cpus; done";
    cluster.client.sh(choose).unwrap();
    let wire = Wire::open(&cluster.client, "c0").unwrap();
    let before = received_by_worker(&cluster);
    for round in 0..40u32 {
        let vip = [VIP, VIP6, SNAT_VIP, SNAT_VIP6][round as usize % 4];
        let socket = socket(&cluster, vip);
        let sent = payload(3_000, round as usize);
        let mut pieces = cut(&datagram(&socket, &sent), 0x1000 + round, 1_400);
        if round % 3 == 1 {
            pieces.reverse();
        }
        for (number, piece) in pieces.iter().enumerate() {
            let cpu = (number + round as usize) % 2;
            assert!(core_affinity::set_for_current(core_affinity::CoreId { id: cpu }));
            wire.send(piece).unwrap();
        }
        expect(&socket, &sent);
    }
    let after = received_by_worker(&cluster);
    for (worker, (before, after)) in before.iter().zip(&after).enumerate() {
        println!("worker {worker} received {} packets", after - before);
        assert!(after - before >= 40, "both queues take fragments");
    }
    cluster.finish(&[]).unwrap();
}

fn received_by_worker(cluster: &Cluster) -> Vec<u64> {
    let workers = cluster.daemon().stats().unwrap().workers;
    workers.iter().map(|worker| worker.counters.get("rx_packets").copied().unwrap_or(0)).collect()
}

/// A frame with a whole datagram of this socket, as long as it may be.
fn datagram(socket: &UdpSocket, payload: &[u8]) -> Vec<u8> {
    let (from, to) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
    let ethernet = PacketBuilder::ethernet2(CLIENT_MAC, GATEWAY_MAC);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("one family"),
    };
    let mut frame = Vec::new();
    ip.udp(from.port(), to.port()).write(&mut frame, payload).unwrap();
    frame
}

/// First fragments without end (FragmentSmack, CVE-2018-5391), beside connections that must not notice.
#[test]
fn a_flood_of_fragments_is_bounded_and_disturbs_nobody() {
    let cluster = Cluster::new("smack", 3).unwrap();
    let wire = Wire::open(&cluster.client, "c0").unwrap();
    let victim = socket(&cluster, VIP);
    let first = cut(&datagram(&victim, &payload(1_000, 0)), 0, 64);
    let stop = AtomicBool::new(false);
    let seconds = length::pick(4, 30);
    let (flooded, report) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let (start, mut sent) = (Instant::now(), 0u32);
            while !stop.load(Ordering::Relaxed) {
                // Any fragment but the last one of any datagram; late ones are not made up for.
                let burst = 64.min((start.elapsed().as_micros() as u32 / 25).saturating_sub(sent));
                for _ in 0..burst {
                    let mut piece = first[sent as usize % (first.len() - 1)].clone();
                    piece[18..20].copy_from_slice(&(sent as u16).to_be_bytes());
                    piece[29] = 3 + (sent >> 16) as u8;
                    wire.send(&fixed(piece)).unwrap();
                    sent += 1;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            sent
        });
        let url = format!("http://{VIP}/");
        let args = ["-q", "-t", &seconds.to_string(), "-n", "1000000", "-c", "10", &url];
        let report = cluster.client.run("ab", &args);
        stop.store(true, Ordering::Relaxed);
        (flood.join().unwrap(), report.unwrap())
    });
    let line = |what: &str| report.lines().find(|line| line.starts_with(what)).unwrap_or_default().to_owned();
    println!(
        "{flooded} fragments in {seconds} s; {}; {}",
        line("Complete requests"),
        line("Failed requests")
    );
    assert!(line("Failed requests").ends_with(" 0"), "{report}");
    let waiting = total(&cluster, "fragments_gathered") - total(&cluster, "fragments_released");
    let dropped = cluster.daemon().drops().unwrap().get("fragment_limit").copied().unwrap_or(0);
    println!("{waiting} wait, {dropped} were dropped");
    assert!((1..=512).contains(&waiting) && dropped > 1_000);
    // Right after the flood it is as before.
    echo(&victim, 8_000, 1);
    cluster.finish(&["fragment_limit", "fragment_duplicate", LATE]).unwrap();
}

/// The IPv4 header checksum set right.
fn fixed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[24..26].fill(0);
    let sum: u32 =
        frame[14..34].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    frame
}

#[test]
fn frames_of_waiting_fragments_outlive_the_data_plane() {
    let cluster = Cluster::new("outlive", 3).unwrap();
    let wire = Wire::open(&cluster.client, "c0").unwrap();
    let victim = socket(&cluster, VIP);
    let whole = datagram(&victim, &payload(3_000, 0));
    for id in 0..100 {
        wire.send(&cut(&whole, id, 1_480)[1]).unwrap();
    }
    let start = Instant::now();
    while total(&cluster, "fragments_gathered") < 100 {
        assert!(start.elapsed() < Duration::from_secs(10), "the fragments do not come");
        std::thread::sleep(Duration::from_millis(10));
    }
    cluster.daemon().kill_data_plane().unwrap();
    echo(&victim, 8_000, 1);
    // Found by the ledger, and free again.
    let log = cluster.daemon().log();
    let found = log.lines().rfind(|line| line.contains("frames found")).unwrap_or_default();
    println!("{found}");
    assert!(found.contains("held=100"), "{log}");
    cluster.finish(&[]).unwrap();
}
