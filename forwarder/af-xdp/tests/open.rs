//! Opening sockets on real interfaces: what works, and what each mistake is told. Needs root, for network namespaces.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use af_xdp::redirect::UdpRedirect;
use af_xdp::{Burst, FramePool, OpenError, Socket, SocketConfig, Umem};
use rustix::net::netdevice::name_to_index;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, capabilities, move_into_link_name_space, set_capabilities,
};

/// Small rings, so that a test needs little memory.
fn config() -> SocketConfig {
    SocketConfig {
        rx_len: 64,
        tx_len: 64,
        fill_len: 64,
        completion_len: 64,
        patience: Duration::from_millis(300),
        ..SocketConfig::default()
    }
}

fn pool(chunk_len: u32) -> FramePool {
    Umem::anonymous(config().chunks(), chunk_len).take_frames().unwrap()
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip(8)");
    assert!(status.success(), "ip {arguments}");
}

/// A namespace with a veth pair, v0 and v1, of two queues each, with one in use. Deleted on drop.
struct Namespace(String);

impl Namespace {
    fn new(test: &str) -> Namespace {
        let ns = Namespace(format!("xdp-open-{}-{test}", std::process::id()));
        let name = &ns.0;
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!(
            "-n {name} link add v0 mtu 3000 numrxqueues 2 numtxqueues 2 type veth peer name v1 mtu 3000 \
             numrxqueues 2 numtxqueues 2"
        ));
        for port in ["v0", "v1"] {
            ip(&format!("-n {name} link set {port} addrgenmode none up"));
        }
        ns
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Runs `test` on a thread of its own inside a new namespace.
fn inside(name: &str, test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED {name}: needs root to make network namespaces");
        return;
    }
    let ns = Namespace::new(name);
    let file = File::open(format!("/run/netns/{}", ns.0)).unwrap();
    thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        test();
    })
    .join()
    .unwrap();
}

fn refused(interface: &str, queue: u32, config: &SocketConfig) -> OpenError {
    let mut pool = pool(2048);
    let all = pool.len();
    let error = Socket::open(interface, queue, 0, &mut pool, config).err().expect("refused");
    assert_eq!(pool.len(), all, "every frame is back");
    error
}

#[test]
fn each_mistake_is_named_with_its_remedy() {
    inside("mistake", || {
        let error = refused("nope", 0, &config());
        assert_eq!(error.to_string(), "interface nope: there is none of this name; see `ip link`");

        let used = Command::new("ethtool").args("-L v0 rx 1 tx 1".split(' ')).status();
        let error = refused("v0", if used.is_ok_and(|s| s.success()) { 1 } else { 2 }, &config());
        let OpenError::NoSuchQueue { have, ref remedy, .. } = error else { panic!("{error}") };
        match have {
            1 => assert_eq!(remedy, "mend it with: ethtool -L v0 rx 2 tx 2"),
            _ => assert!(remedy.contains("it can have 2 at most"), "{remedy}"),
        }

        let error = refused("v0", 0, &SocketConfig { tx_len: 1000, ..config() });
        assert!(error.to_string().starts_with("tx ring of 1000 entries: use a power of two"), "{error}");
        assert!(error.to_string().ends_with("1024"), "{error}");
    });
}

#[test]
fn a_queue_has_one_socket_and_is_free_again_after_it() {
    inside("taken", || {
        let mut first_pool = pool(2048);
        let first = Socket::open("v0", 0, 0, &mut first_pool, &config()).unwrap();
        assert!(!first.is_zero_copy(), "veth copies");
        let begin = Instant::now();
        let error = refused("v0", 0, &config());
        assert!(matches!(error, OpenError::QueueTaken { queue: 0, .. }), "{error}");
        assert!(begin.elapsed() >= config().patience);
        drop(first);
        // The teardown is asynchronous, and waited for.
        let patient = SocketConfig { patience: Duration::from_secs(10), ..config() };
        Socket::open("v0", 0, 0, &mut pool(2048), &patient).unwrap();
    });
}

#[test]
fn missing_privileges_are_named() {
    inside("privilege", || {
        // Of this thread only.
        let mut caps = capabilities(None).unwrap();
        caps.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, caps).unwrap();
        let limit = getrlimit(Resource::Memlock);
        setrlimit(Resource::Memlock, Rlimit { current: Some(65536), ..limit }).unwrap();
        let error = refused("v0", 0, &config());
        setrlimit(Resource::Memlock, limit).unwrap();
        let OpenError::LockedMemory { needed_bytes, limit_bytes } = error else { panic!("{error}") };
        assert_eq!((needed_bytes, limit_bytes), (128 * 2048, Some(65536)));
        assert!(error.to_string().contains("CAP_IPC_LOCK"), "{error}");

        caps.effective.remove(CapabilitySet::NET_RAW);
        set_capabilities(None, caps).unwrap();
        let error = refused("v0", 0, &config());
        assert!(matches!(error, OpenError::Capability { missing: "CAP_NET_RAW", .. }), "{error}");
    });
}

/// An Ethernet frame with an IPv4 UDP header, as far as the redirecting program looks, and numbered bytes behind.
fn udp(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|i| i as u8).collect();
    packet[..12].copy_from_slice(&[0xff; 12]);
    packet[12..14].copy_from_slice(&[0x08, 0x00]);
    packet[23] = 17;
    packet
}

#[test]
fn packets_longer_than_a_frame_pass_whole() {
    inside("jumbo", || {
        let (mut to_pool, mut from_pool) = (pool(2048), pool(2048));
        let mut to = Socket::open("v1", 0, 0, &mut to_pool, &config()).unwrap();
        let mut from = Socket::open("v0", 0, 0, &mut from_pool, &config()).unwrap();
        let any = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let program = UdpRedirect::attach(name_to_index(&any, "v1").unwrap()).unwrap();
        program.set_socket(0, &to).unwrap();

        let mut burst = Burst::default();
        let sizes = [60, 1792, 1793, 2900, 61];
        for size in sizes {
            let packet = udp(size);
            let mut segments = packet.chunks(1792);
            burst.push(from_pool.frame_from(segments.next().unwrap()).unwrap());
            segments.for_each(|s| burst.push_tail(from_pool.frame_from(s).unwrap()));
        }
        assert_eq!(from.transmit(&mut from_pool, &mut burst), sizes.len());
        let mark = from.tx_mark();
        assert!(!from.is_sent(mark));
        from.kick();
        assert!(from.is_sent(mark));

        let begin = Instant::now();
        while burst.len() < sizes.len() && begin.elapsed() < Duration::from_secs(5) {
            to.receive(&mut to_pool, &mut burst, 64);
        }
        for (i, size) in sizes.into_iter().enumerate() {
            let mut bytes = burst.heads[i].data().to_vec();
            let tails = burst.tails.iter().filter(|t| usize::from(t.of) == i);
            tails.for_each(|t| bytes.extend_from_slice(t.frame.data()));
            assert_eq!(bytes, udp(size));
        }
        burst.recycle(&mut to_pool);
        to.release(&mut to_pool);
        to.refill(&mut to_pool);
        assert_eq!(to_pool.len() as u32 + to.in_kernel(), config().chunks());
        while from.in_flight() > 0 && begin.elapsed() < Duration::from_secs(5) {
            from.complete(&mut from_pool);
        }
        assert_eq!(from_pool.len() as u32 + from.in_kernel(), config().chunks());
        assert_eq!(from.statistics().unwrap().tx_invalid_descs, 0);
        assert_eq!((to.refused(), from.refused()), Default::default());
    });
}
