//! Bad input of every kind gets a clear answer, and traffic goes on without loss while it comes.
//!
//! [`start_up`]: gateway files, machines and privileges that do not fit. [`objects`]: manifests. [`socket`]: what programs that are
//! not `towpathctl` may send.

#[path = "refusals/objects.rs"]
mod objects;
#[path = "refusals/socket.rs"]
mod socket;
#[path = "refusals/start_up.rs"]
mod start_up;

use std::sync::atomic::{AtomicBool, Ordering};

use etherparse::PacketBuilder;
use tests::cluster::{Cluster, GATEWAY, VIP};
use tests::probe;

/// Datagrams a second that go through the gateway meanwhile.
const RATE: u64 = 10_000;

/// A cluster with room in its rings for what comes in while this machine is busy with others (3 s), a small staging budget, and a node
/// that lets the datagrams of [`undisturbed`] be seen and then forgets them.
fn cluster(name: &str) -> Cluster {
    let config = format!(
        "{GATEWAY}[rings]\nrx = 32768\nfill = 32768\n[umem]\nchunk_size = 2048\nframes = 73728\n\
         [control]\nstaging_bytes = 4194304\n"
    );
    let cluster = Cluster::with(name, 3, 1, &config).unwrap();
    let forget = "nft 'add table ip forget; add chain ip forget prerouting { type filter hook prerouting priority raw; }; \
                  add rule ip forget prerouting udp dport 5201 drop'";
    cluster.node.sh(forget).unwrap();
    cluster
}

/// Does `work` while numbered datagrams and one request after the other go through the gateway: none may be lost or fail.
fn undisturbed(cluster: &Cluster, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let url = format!("http://{VIP}/");
    let (report, requests) = std::thread::scope(|scope| {
        let _ended = OnDrop(&stop);
        let datagrams = scope.spawn(|| {
            let (from, to) = ((&cluster.client, "c0"), (&cluster.node, "n0"));
            probe::run(from, to, &datagram(), RATE, &stop).unwrap()
        });
        let requests = scope.spawn(|| {
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let answer = cluster.curl(&["-f", &url]).unwrap();
                assert!(answer.starts_with("10.244.1.1"), "{answer}");
                done += 1;
            }
            done
        });
        work();
        stop.store(true, Ordering::Relaxed);
        (datagrams.join().unwrap(), requests.join().unwrap())
    });
    println!("{report:?} at {RATE}/s, {requests} requests");
    assert_eq!((report.arrived, report.doubled), (report.sent, 0), "{report:?}");
    assert!(report.sent > 1000 && requests > 0, "there was no traffic to disturb");
}

/// Ends the traffic when the work panics.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// From the client to the Service, without a checksum, so that it can be numbered.
fn datagram() -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 2, 2], [2, 0, 0, 0, 2, 1])
        .ipv4([198, 51, 100, 2], VIP.parse::<std::net::Ipv4Addr>().unwrap().octets(), 64)
        .udp(20_000, 5201)
        .write(&mut frame, &[0; 18])
        .unwrap();
    frame[40..42].copy_from_slice(&[0, 0]);
    frame
}
