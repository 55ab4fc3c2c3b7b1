//! What `towpathctl capture` sees of real traffic, and that traffic sees nothing of it.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etherparse::{LaxNetSlice, LaxSlicedPacket, PacketBuilder, TransportSlice};
use rustix::process::Signal;
use tests::case::folder;
use tests::cluster::{Cluster, SNAT_VIP, VIP, pod_v4};
use tests::gateway::{Towpathd, binary};
use tests::length;
use tests::namespace::{Namespace, run};
use tests::pcapng::{self, Packet};
use tests::probe;
use tests::process::Process;
use tests::twin::Twin;
use tests::wire::Wire;

const PATIENCE: Duration = Duration::from_secs(20);

/// A `towpathctl capture -w FILE` that runs.
struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    /// Starts it, and returns when every worker captures.
    fn start(namespace: &Namespace, daemon: &Towpathd, file: &Path, args: &[&str]) -> Capture {
        let ctl = binary("towpathctl").unwrap();
        let socket = daemon.socket();
        let name = file.to_string_lossy();
        let mut words = vec!["--socket", socket.to_str().unwrap(), "capture", "-w", &name];
        words.extend(args);
        let log = file.with_extension("log");
        let mut process = Process::start(namespace, &ctl.to_string_lossy(), &words, &log).unwrap();
        process
            .wait_until(PATIENCE, || std::fs::read_to_string(&log).unwrap_or_default().contains("Ctrl-C"))
            .unwrap();
        Capture { process, file: file.to_owned() }
    }

    /// Ends it as Ctrl-C does. Returns what it wrote, and how many packets it missed.
    fn end(mut self) -> (Vec<Packet>, u64) {
        self.process.signal(Signal::INT).unwrap();
        let (captured, missed) = self.wait();
        let packets = pcapng::read(&std::fs::read(&self.file).unwrap()).unwrap();
        assert_eq!(packets.len() as u64, captured);
        (packets, missed)
    }

    /// Waits for its end. Returns how many packets it says that it captured and missed.
    fn wait(&mut self) -> (u64, u64) {
        let status = self.process.wait(PATIENCE).unwrap();
        let log = self.process.log();
        assert!(status.success(), "{status}: {log}");
        let summary = log.lines().last().unwrap_or_default().replace(',', "");
        let numbers: Vec<u64> = summary.split(' ').filter_map(|word| word.parse().ok()).collect();
        (numbers[0], numbers[1])
    }
}

/// `10.1.2.3:4 > 5.6.7.8:9` of a TCP or UDP packet.
fn ends(packet: &Packet) -> String {
    // It may have been cut.
    let sliced = LaxSlicedPacket::from_ethernet(&packet.bytes).unwrap();
    let Some(LaxNetSlice::Ipv4(ip)) = sliced.net else { panic!("{packet:?}") };
    let (src, dst) = match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        other => panic!("{other:?}"),
    };
    let (from, to) = (ip.header().source_addr(), ip.header().destination_addr());
    format!("{from}:{src} > {to}:{dst}")
}

fn word<'p>(packet: &'p Packet, name: &str) -> &'p str {
    packet.comment.get(name).map_or("", String::as_str)
}

/// Checks that each packet came at `from` and left at `to`, and returns both frames of each.
fn pairs<'p>(packets: &'p [Packet], from: &str, to: &str, flow: &str) -> Vec<(&'p Packet, &'p Packet)> {
    let came = packets.iter().filter(|packet| packet.interface == from && word(packet, "flow") == flow);
    came.map(|came| {
        let mut left = packets.iter().filter(|packet| packet.interface == to && packet.id == came.id);
        let pair = (came, left.next().unwrap_or_else(|| panic!("nothing left at {to} for {came:?}")));
        assert!(left.next().is_none());
        assert_eq!((pair.0.direction, pair.1.direction), (1, 2));
        assert_eq!(word(came, "packet"), came.id.to_string());
        pair
    })
    .collect()
}

#[test]
fn requests_and_replies_are_seen_before_and_after_translation() {
    let cluster = Cluster::new("seen", 1).unwrap();
    let generation = cluster.daemon().status().unwrap().generation.to_string();
    let path = |name: &str| cluster.folder.path().join(name);
    let start =
        |name: &str, args: &[&str]| Capture::start(&cluster.gateway, cluster.daemon(), &path(name), args);
    let web = start("web.pcapng", &["service", "default/web:http"]);
    let shop = start("shop.pcapng", &["--snaplen", "80", "tcp", "port", "80", "and", "host", SNAT_VIP]);
    let drops = start("drops.pcapng", &["--at", "drop"]);
    cluster.curl(&[&format!("http://{VIP}/")]).unwrap();
    cluster.curl(&[&format!("http://{SNAT_VIP}/")]).unwrap();
    // A SYN with a FIN, which nobody sends.
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 2, 2], [2, 0, 0, 0, 2, 1])
        .ipv4([198, 51, 100, 2], [203, 0, 113, 10], 64)
        .tcp(4242, 80, 1, 64_000)
        .syn()
        .fin()
        .write(&mut frame, &[])
        .unwrap();
    Wire::open(&cluster.client, "c0").unwrap().send(&frame).unwrap();
    let begin = Instant::now();
    while !cluster.daemon().drops().unwrap().contains_key("bad_tcp_flags") {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }

    let (packets, missed) = web.end();
    assert_eq!(missed, 0);
    let (vip, pod) = (format!("{VIP}:80"), format!("{}:80", pod_v4(1)));
    let requests = pairs(&packets, "uplink:rx", "fabric:tx", "original");
    assert!(requests.len() >= 4, "SYN, ACK, request, FIN: {packets:#?}");
    for (came, left) in &requests {
        let client = ends(came).split(" > ").next().unwrap().to_owned();
        assert!(client.starts_with("198.51.100.2:"));
        assert_eq!((ends(came), ends(left)), (format!("{client} > {vip}"), format!("{client} > {pod}")));
        for packet in [came, left] {
            assert_eq!(word(packet, "service"), "default/web:http");
            assert_eq!((word(packet, "endpoint"), word(packet, "verdict")), (&*pod, "forward"));
            assert_eq!(
                (word(packet, "generation"), word(packet, "flow-generation")),
                (&*generation, &*generation)
            );
            assert_eq!(packet.len as usize, packet.bytes.len());
        }
    }
    let replies = pairs(&packets, "fabric:rx", "uplink:tx", "reply");
    assert!(replies.len() >= 3, "SYN-ACK, answer, FIN: {packets:#?}");
    for (came, left) in &replies {
        let client = ends(came).split(" > ").nth(1).unwrap().to_owned();
        assert_eq!((ends(came), ends(left)), (format!("{pod} > {client}"), format!("{vip} > {client}")));
    }
    let dropped: Vec<_> = packets.iter().filter(|packet| packet.interface == "uplink:drop").collect();
    assert_eq!(dropped.len(), 1, "the bad flags are of this Service too");
    assert_eq!(packets.len(), 2 * requests.len() + 2 * replies.len() + 2, "each has its pair: {packets:#?}");
    // Another reader finds as many.
    let text = run("tcpdump", &["-n", "-r", &path("web.pcapng").to_string_lossy()]).unwrap();
    assert_eq!(text.lines().filter(|line| line.contains("IP ")).count(), packets.len(), "{text}");

    // Behind a masqueraded source, by an address that is on one side only.
    let (packets, _) = shop.end();
    let requests = pairs(&packets, "uplink:rx", "fabric:tx", "original");
    let replies = pairs(&packets, "fabric:rx", "uplink:tx", "reply");
    assert!(requests.len() >= 4 && replies.len() >= 3, "{packets:#?}");
    assert!(ends(requests[0].1).starts_with("10.2.0.1:"), "{}", ends(requests[0].1));
    assert_eq!(word(requests[0].1, "service"), "default/shop:http");
    assert!(
        packets.iter().all(|packet| packet.bytes.len() <= 80 && packet.len as usize >= packet.bytes.len())
    );

    let (packets, _) = drops.end();
    let bad: Vec<_> = packets.iter().filter(|packet| word(packet, "reason") == "bad_tcp_flags").collect();
    assert_eq!(bad.len(), 1, "{packets:#?}");
    assert_eq!((&*bad[0].interface, &bad[0].bytes), ("uplink:drop", &frame));
    assert_eq!((word(bad[0], "verdict"), word(bad[0], "service")), ("drop", "default/web:http"));
    cluster.finish(&["no_flow", "bad_tcp_flags"]).unwrap();
}

#[test]
fn captures_come_and_go_under_load_and_no_packet_is_lost() {
    let twin = Twin::new("load").unwrap();
    let config = std::fs::read_to_string(folder().join("gateway.toml")).unwrap();
    let config = format!("{config}\n[rings]\nrx = 32768\nfill = 32768\n");
    let daemon = Towpathd::start(&twin.gateway, &config).unwrap();
    daemon.apply(&std::fs::read_to_string(folder().join("objects.yaml")).unwrap()).unwrap();
    let files = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let rate = 20_000;
    let filters = ["", "udp port 53", "drop", "net 10.244.0.0/16 and not tcp"];
    let (report, captured, missed) = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            probe::run((&twin.far, "w0"), (&twin.far, "w1"), &probe::datagram(), rate, &stop).unwrap()
        });
        let (mut captured, mut missed) = (0, 0);
        for _ in 0..length::pick(20, 100) {
            let mut captures: Vec<Capture> = filters
                .iter()
                .enumerate()
                .map(|(index, filter)| {
                    let file = files.path().join(format!("{index}.pcapng"));
                    Capture::start(&twin.gateway, &daemon, &file, &[filter])
                })
                .collect();
            std::thread::sleep(Duration::from_millis(50));
            for capture in &captures {
                capture.process.signal(Signal::INT).unwrap();
            }
            for capture in &mut captures {
                let (packets, lost) = capture.wait();
                captured += packets;
                missed += lost;
            }
        }
        stop.store(true, Ordering::Relaxed);
        (traffic.join().unwrap(), captured, missed)
    });
    println!("{report:?} at {rate}/s; {captured} captured, {missed} not captured");
    assert_eq!((report.arrived, report.doubled), (report.sent, 0), "{report:?}");
    assert!(captured > 10_000, "{captured} captured");
    daemon.finish(&[]).unwrap();
}

#[test]
fn a_data_plane_that_is_killed_ends_its_captures_in_words_and_nothing_else() {
    let cluster = Cluster::new("kill", 1).unwrap();
    let file = cluster.folder.path().join("killed.pcapng");
    let mut capture = Capture::start(&cluster.gateway, cluster.daemon(), &file, &["udp port 7"]);
    let socket = cluster
        .client
        .inside(|| {
            let socket = UdpSocket::bind("198.51.100.2:0")?;
            socket.connect((VIP, 7))?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(socket)
        })
        .unwrap();
    let echo = || {
        socket.send(b"hello").unwrap();
        socket.recv(&mut [0; 16]).unwrap();
    };
    echo();
    // Everything that was captured is in the file before the data plane dies.
    let begin = Instant::now();
    while std::fs::read(&file).map_or(0, |bytes| pcapng::read(&bytes).map_or(0, |packets| packets.len())) < 4
    {
        assert!(begin.elapsed() < PATIENCE, "{}", capture.process.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    cluster.daemon().kill_data_plane().unwrap();
    echo();
    let status = capture.process.wait(PATIENCE).unwrap();
    let log = capture.process.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("the data plane died") && log.contains("restarts: 1") && log.contains("after 4 packets"),
        "{log}"
    );
    // The next one can be captured as well.
    let next = Capture::start(&cluster.gateway, cluster.daemon(), &file, &["udp port 7"]);
    echo();
    let (packets, _) = next.end();
    assert_eq!(packets.len(), 4, "{packets:#?}");
    cluster.finish(&["no_flow"]).unwrap();
}
