//! A forwarder over two veth ports is killed with SIGKILL again and again under load; no packet may be lost, doubled or
//! half rewritten, and no frame may be missing afterwards.
//!
//! ```text
//! namespace -a           namespace -gw                    namespace -b
//! source: a0  ------->   g0  forwarder (a child,  g1  ------->  b0 :sink
//!                            killed and restarted)
//! ```
//!
//! This process holds the descriptors, as a keeper does; the forwarder is this program again, with descriptors inherited.
//! Needs root (CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, CAP_SYS_ADMIN for namespaces). The source never has more packets on
//! their way than the rings hold, so a slow machine makes the test slow, not wrong.

use std::env;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use af_xdp::redirect::UdpRedirect;
use af_xdp::{Burst, FramePool, Kick, Socket, SocketConfig, Umem, UmemConfig, recover_frames};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::netdevice::name_to_index;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const KILLS: u32 = 15;
const ON_THEIR_WAY_MAX: u64 = 2000;
const PACKET_LEN: usize = 64;
const HEADERS_LEN: usize = 42;
/// Counted up by the forwarder; so a packet that is rewritten twice, or half, is seen.
const MARK: usize = 15;

fn config() -> SocketConfig {
    SocketConfig { tx_len: 4096, completion_len: 4096, ..SocketConfig::default() }
}

fn main() -> ExitCode {
    if let Ok(fds) = env::var("AF_XDP_KILL_TEST_FDS") {
        let fds: Vec<i32> = fds.split(',').map(|fd| fd.parse().unwrap()).collect();
        forward(&fds);
    }
    // cargo test passes filters and --list; this is one test with one name.
    let arguments: Vec<String> = env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    if env::args().any(|a| a == "--list") {
        println!("kill: test");
        return ExitCode::SUCCESS;
    }
    if !arguments.is_empty() && !arguments.iter().any(|a| "kill".contains(a.as_str())) {
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED kill: needs root to make network namespaces");
        return ExitCode::SUCCESS;
    }
    let rig = Rig::new();
    let result = thread::spawn(move || run(&rig)).join();
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Three namespaces with unique names, deleted on drop.
struct Rig {
    prefix: String,
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip(8)");
    assert!(status.success(), "ip {arguments}");
}

impl Rig {
    fn new() -> Rig {
        let rig = Rig { prefix: format!("xdp-kill-{}", std::process::id()) };
        let p = &rig.prefix;
        for ns in ["a", "gw", "b"] {
            ip(&format!("netns add {p}-{ns}"));
            ip(&format!("-n {p}-{ns} link set lo up"));
        }
        for (ns, peer, port) in [("a", "a0", "g0"), ("b", "b0", "g1")] {
            ip(&format!("link add {peer} netns {p}-{ns} type veth peer name {port} netns {p}-gw"));
            ip(&format!("-n {p}-{ns} link set {peer} addrgenmode none up"));
            ip(&format!("-n {p}-gw link set {port} addrgenmode none up"));
        }
        rig
    }

    /// Moves this thread into one of the namespaces.
    fn enter(&self, ns: &str) {
        let file = File::open(format!("/run/netns/{}-{ns}", self.prefix)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for ns in ["a", "gw", "b"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{ns}", self.prefix)]).status();
        }
    }
}

/// A socket with a UMEM of its own.
fn open(interface: &str) -> (Socket, FramePool) {
    let umem = Umem::anonymous(config().chunks(), 2048);
    let mut pool = umem.take_frames().unwrap();
    let socket = Socket::open(interface, 0, 0, &mut pool, &config()).unwrap();
    (socket, pool)
}

fn redirect(interface: &str, socket: &impl AsFd) -> UdpRedirect {
    let any = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let redirect = UdpRedirect::attach(name_to_index(&any, interface).unwrap()).unwrap();
    assert!(redirect.is_native());
    redirect.set_socket(0, socket).unwrap();
    redirect
}

fn packet(number: u64) -> [u8; PACKET_LEN] {
    let mut packet = [0; PACKET_LEN];
    packet[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    packet[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    packet[12..14].copy_from_slice(&[0x08, 0x00]);
    packet[14] = 0x45;
    packet[23] = 17;
    packet[HEADERS_LEN..HEADERS_LEN + 8].copy_from_slice(&number.to_be_bytes());
    packet
}

fn run(rig: &Rig) {
    let (sent, received, stop) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));

    rig.enter("gw");
    let chunks = 2 * config().chunks();
    let (umem, umem_fd) = Umem::create(UmemConfig { chunks, chunk_len: 2048, hugepages: false }).unwrap();
    let mut pool = umem.take_frames().unwrap();
    let sockets: Vec<Socket> = ["g0", "g1"]
        .iter()
        .enumerate()
        .map(|(port, name)| Socket::open(name, 0, port, &mut pool, &config()).unwrap())
        .collect();
    let _programs = [redirect("g0", &sockets[0]), redirect("g1", &sockets[1])];
    let mut fds = vec![umem_fd];
    fds.extend(sockets.into_iter().map(Socket::into_fd));
    let mut forwarder = start(&fds);

    rig.enter("b");
    let (sink, sink_pool) = open("b0");
    let program = redirect("b0", &sink);
    let sink = {
        let (received, stop) = (received.clone(), stop.clone());
        thread::spawn(move || {
            let _program = program;
            drain(sink, sink_pool, &received, &stop)
        })
    };
    rig.enter("a");
    let (source, source_pool) = open("a0");
    let source = {
        let (sent, received, stop) = (sent.clone(), received.clone(), stop.clone());
        thread::spawn(move || emit(source, source_pool, &sent, &received, &stop))
    };

    let begin = Instant::now();
    for kill in 0..KILLS {
        // Each life is long enough to work, and ends at another moment.
        let before = received.load(Ordering::Relaxed);
        let patience = Instant::now();
        while received.load(Ordering::Relaxed) < before + 5000 {
            assert!(patience.elapsed() < Duration::from_secs(20), "traffic stopped after {kill} kills");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(u64::from(kill) * 137));
        forwarder.kill().unwrap();
        forwarder.wait().unwrap();
        forwarder = start(&fds);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let during = received.load(Ordering::Relaxed);
    stop.store(true, Ordering::Relaxed);
    source.join().unwrap();
    let total = sent.load(Ordering::Relaxed);
    let seen = sink.join().unwrap();
    forwarder.kill().unwrap();
    forwarder.wait().unwrap();

    let lost = (0..total).filter(|&n| seen.get(n as usize) != Some(&1)).count();
    let doubled = seen.iter().filter(|&&times| times > 1).count();
    println!(
        "kill: {total} packets, {KILLS} kills, {:.0} packets/s: {lost} lost, {doubled} doubled",
        during as f64 / seconds
    );
    assert_eq!((lost, doubled), (0, 0));

    // Nobody has frames now but the rings: all are accounted for.
    let again = Umem::inherit(&fds[0]).unwrap();
    let mut sockets: Vec<Socket> = fds
        .drain(1..)
        .enumerate()
        .map(|(port, fd)| Socket::inherit(fd, again, port, &config()).unwrap())
        .collect();
    let (pool, found) = recover_frames(again, &mut sockets).unwrap();
    let kept: u32 = sockets.iter().map(|s| s.in_kernel() + s.in_flight()).sum();
    assert_eq!(pool.len() as u32 + kept, chunks);
    assert_eq!((found.interrupted, found.held), (0, 0));
    for socket in &sockets {
        let statistics = socket.statistics().unwrap();
        assert_eq!((statistics.rx_invalid_descs, statistics.tx_invalid_descs), (0, 0));
    }
    println!("test kill ... ok");
    println!("\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
}

/// Starts the forwarder with the descriptors inherited.
fn start(fds: &[OwnedFd]) -> Child {
    for fd in fds {
        fcntl_setfd(fd, FdFlags::empty()).unwrap();
    }
    let list: Vec<String> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    let mut child = Command::new(env::current_exe().unwrap())
        .env("AF_XDP_KILL_TEST_FDS", list.join(","))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first byte says that it forwards.
    let mut ready = [0];
    child.stdout.take().unwrap().read_exact(&mut ready).expect("the forwarder starts");
    child
}

/// The forwarder: both directions, until it is killed.
fn forward(fds: &[i32]) -> ! {
    // SAFETY: the descriptors are inherited for this process alone, and each is taken once.
    #[allow(unsafe_code)]
    let fds: Vec<OwnedFd> = fds.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    let mut fds = fds.into_iter();
    let umem = Umem::inherit(fds.next().unwrap()).unwrap();
    let mut sockets: Vec<Socket> =
        fds.enumerate().map(|(port, fd)| Socket::inherit(fd, umem, port, &config()).unwrap()).collect();
    let (mut pool, found) = recover_frames(umem, &mut sockets).unwrap();
    assert_eq!((found.interrupted, found.held), (0, 0));
    println!("!");
    let mut burst = Burst::with_capacity(64);
    loop {
        let mut idle = true;
        for from in 0..2 {
            let to = 1 - from;
            if sockets[from].receive(&mut pool, &mut burst, 64) > 0 {
                idle = false;
                for frame in &mut burst.heads {
                    frame.head_mut()[MARK] += 1;
                }
                while !burst.is_empty() {
                    sockets[to].transmit(&mut pool, &mut burst);
                    sockets[to].kick();
                    sockets[to].complete(&mut pool);
                }
            }
            sockets[from].release(&mut pool);
            sockets[from].complete(&mut pool);
            sockets[from].refill(&mut pool);
        }
        if idle {
            wait(&sockets, 10);
        }
    }
}

fn wait(sockets: &[Socket], milliseconds: i64) {
    let mut fds: Vec<PollFd> = sockets.iter().map(|s| PollFd::new(s, PollFlags::IN)).collect();
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 }));
}

/// Counts how often each packet comes, until the source has stopped and everything is there, or nothing comes any more.
fn drain(mut socket: Socket, mut pool: FramePool, received: &AtomicU64, stop: &AtomicBool) -> Vec<u8> {
    let mut seen = vec![];
    let mut burst = Burst::with_capacity(64);
    let mut last = Instant::now();
    while !(stop.load(Ordering::Relaxed) && last.elapsed() > Duration::from_secs(1)) {
        if socket.receive(&mut pool, &mut burst, 64) == 0 {
            wait(std::slice::from_ref(&socket), 5);
            continue;
        }
        last = Instant::now();
        for frame in &burst.heads {
            let data = frame.data();
            assert_eq!((data.len(), data[MARK]), (PACKET_LEN, 1), "a packet is rewritten once");
            let number = u64::from_be_bytes(data[HEADERS_LEN..HEADERS_LEN + 8].try_into().unwrap()) as usize;
            if seen.len() <= number {
                seen.resize(number + 1, 0);
            }
            seen[number] += 1;
        }
        received.fetch_add(burst.len() as u64, Ordering::Relaxed);
        burst.recycle(&mut pool);
        socket.release(&mut pool);
        socket.refill(&mut pool);
    }
    let statistics = socket.statistics().unwrap();
    assert_eq!(
        (statistics.rx_dropped, statistics.rx_ring_full, statistics.rx_fill_ring_empty_descs),
        (0, 0, 0)
    );
    seen
}

/// Sends numbered packets, a bounded number ahead of the sink.
fn emit(mut socket: Socket, mut pool: FramePool, sent: &AtomicU64, received: &AtomicU64, stop: &AtomicBool) {
    let mut burst = Burst::with_capacity(32);
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        socket.complete(&mut pool);
        if number >= received.load(Ordering::Relaxed) + ON_THEIR_WAY_MAX {
            thread::sleep(Duration::from_micros(50));
            continue;
        }
        while burst.len() < 32 {
            let Some(frame) = pool.frame_from(&packet(number)) else { break };
            burst.push(frame);
            number += 1;
        }
        socket.transmit(&mut pool, &mut burst);
        while socket.kick() == Kick::Left {
            socket.complete(&mut pool);
        }
        sent.store(number - burst.len() as u64, Ordering::Relaxed);
    }
}
