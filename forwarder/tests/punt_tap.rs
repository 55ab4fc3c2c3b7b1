//! A frame given back through the TAP is received by the kernel exactly as if the port had received it.

mod netns;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use etherparse::PacketBuilder;
use forwarder::addr::protocol::UDP;
use forwarder::keeper::tap::{Tap, follow};
use forwarder::port::tap::redirect;
use forwarder::port::xsk::steer::{
    AttachMode, LocalAddress, LocalPort, SteerCounter, SteerSet, SteerSizes, Steering,
};
use netns::{Namespace, is_root};

const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const OURS_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const PEER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PORT: u16 = 5_000;
/// `struct virtio_net_hdr` without any flag.
const PLAIN: [u8; 10] = [0; 10];

/// Port g0 with a strict reverse-path filter. Its steering program drops what is for UDP port 5000, since no worker lives:
/// whatever a server there receives has not passed the program.
struct Rig {
    ns: Namespace,
    peer: Namespace,
    steering: Steering,
    tap: Tap,
    g0: u32,
}

fn rig(mode: AttachMode) -> Rig {
    let (ns, peer) = (Namespace::new("gw"), Namespace::new("peer"));
    for key in ["all", "default"] {
        ns.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "1");
        ns.sysctl(&format!("net.ipv6.conf.{key}.accept_dad"), "0");
        peer.sysctl(&format!("net.ipv6.conf.{key}.accept_dad"), "0");
    }
    ns.ip("link add g0 address 02:00:00:00:00:01 type veth peer name c0 address 02:00:00:00:00:02");
    ns.ip(&format!("link set c0 netns {}", peer.name));
    ns.ip_batch("link set g0 addrgenmode none\n link set g0 up\n addr add 192.0.2.1/24 dev g0\n addr add fe80::1/64 dev g0\n");
    peer.ip_batch("link set c0 addrgenmode none\n link set c0 up\n addr add 192.0.2.2/24 dev c0\n addr add fe80::2/64 dev c0\n");
    let g0 = ns.ip("-o link show g0").split(':').next().unwrap().parse().unwrap();
    ns.enter();
    let mut steering = Steering::load(SteerSizes { addresses: 16, local_ports: 16, prefixes: 16 }).unwrap();
    let mut set = SteerSet::default();
    for addr in [IpAddr::from(OURS), OURS_V6.into()] {
        set.local.insert(addr, LocalAddress::default());
        set.local_ports.insert(LocalPort { addr, protocol: UDP, port: PORT });
    }
    let (grow, _) = steering.contents().difference(&set.contents());
    steering.apply(&grow).unwrap();
    assert_eq!(steering.attach(0, "g0", g0, &[mode]).unwrap().0, mode);
    let tap = Tap::create("g0").unwrap();
    redirect(tap.ifindex(), g0).unwrap();
    Rig { ns, peer, steering, tap, g0 }
}

fn server(addr: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(addr).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// Nothing (more) comes.
fn assert_silent(socket: &UdpSocket, why: &str) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let outcome = socket.recv_from(&mut [0; 2_048]);
    assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::WouldBlock), "{why}");
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
}

fn frame(dst_mac: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let builder =
        PacketBuilder::ethernet2(PEER_MAC, dst_mac).ipv4(PEER.octets(), OURS.octets(), 64).udp(4_000, PORT);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

impl Rig {
    fn inject(&self, header: [u8; 10], frame: &[u8]) {
        let written = rustix::io::write(self.tap.as_fd(), &[&header[..], frame].concat()).unwrap();
        assert_eq!(written, 10 + frame.len());
    }

    /// What the steering program has seen so far, by cause, but for the chatter of the kernels: ARP, neighbor discovery and groups.
    /// None of that can be a UDP datagram to a unicast address.
    fn steered(&self) -> Vec<(SteerCounter, u64)> {
        use SteerCounter::{PassGroup, PassNeighbor, PassNotIp};
        let counters = SteerCounter::ALL.iter().copied().zip(self.steering.counters().unwrap());
        counters.filter(|(cause, _)| !matches!(cause, PassNotIp | PassGroup | PassNeighbor)).collect()
    }
}

fn is_received_once_as_from_the_port(mode: AttachMode) {
    let rig = rig(mode);
    let socket = server((OURS, PORT).into());
    let mut received = [0; 2_048];

    // Off the wire it is ours: the server sees nothing.
    rig.peer.exec(&format!("bash -c echo>/dev/udp/{OURS}/{PORT}"));
    assert_silent(&socket, "the steering program takes it");

    // Given back, the server gets each of them, once, and its answer leaves by the port.
    let steered = rig.steered();
    assert!(steered.contains(&(SteerCounter::DropWorkerDead, 1)), "the one off the wire: {steered:?}");
    for n in 0..1_000u32 {
        rig.inject(PLAIN, &frame(MAC, &n.to_be_bytes()));
        let (len, from) = socket.recv_from(&mut received).unwrap();
        assert_eq!((&received[..len], from), (&n.to_be_bytes()[..], (PEER, 4_000).into()));
    }
    assert_silent(&socket, "no copies");
    assert_eq!(rig.steered(), steered, "no frame passes the steering program again");

    // Link-local IPv6 says by its scope which interface the packet came in by.
    let socket_v6 = server(std::net::SocketAddrV6::new(OURS_V6, PORT, 0, rig.g0).into());
    let builder =
        PacketBuilder::ethernet2(PEER_MAC, MAC).ipv6(PEER_V6.octets(), OURS_V6.octets(), 64).udp(4_000, PORT);
    let mut frame_v6 = Vec::new();
    builder.write(&mut frame_v6, b"six").unwrap();
    rig.inject(PLAIN, &frame_v6);
    let (len, from) = socket_v6.recv_from(&mut received).unwrap();
    assert_eq!(&received[..len], b"six");
    assert_eq!(from, std::net::SocketAddrV6::new(PEER_V6, 4_000, 0, rig.g0).into());

    // A checksum that was left to the hardware is as good as whole, if said; one that is wrong is not.
    let checksum_at = 14 + 20 + 6;
    let mut partial = frame(MAC, b"partial");
    let udp_len = partial.len() as u32 - 34;
    let words = [PEER, OURS].into_iter().flat_map(|addr| [addr.to_bits() >> 16, addr.to_bits() & 0xffff]);
    let sum: u32 = words.sum::<u32>() + u32::from(UDP) + udp_len;
    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
    partial[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    rig.inject(PLAIN, &partial);
    assert_silent(&socket, "the checksum is wrong as it stands");
    let mut needs_checksum = PLAIN;
    needs_checksum[0] = 1;
    needs_checksum[6..8].copy_from_slice(&34u16.to_ne_bytes());
    needs_checksum[8..10].copy_from_slice(&6u16.to_ne_bytes());
    rig.inject(needs_checksum, &partial);
    let (len, _) = socket.recv_from(&mut received).unwrap();
    assert_eq!(&received[..len], b"partial");

    // A frame for another host is not for this one, and a source that belongs elsewhere is filtered on the port.
    rig.inject(PLAIN, &frame([2, 0, 0, 0, 0, 9], b"other"));
    let mut spoofed = Vec::new();
    let builder =
        PacketBuilder::ethernet2(PEER_MAC, MAC).ipv4([198, 51, 100, 7], OURS.octets(), 64).udp(4_000, PORT);
    builder.write(&mut spoofed, b"spoofed").unwrap();
    rig.inject(PLAIN, &spoofed);
    assert_silent(&socket, "neither is accepted");
    rig.ns.ip("route add 198.51.100.0/24 dev g0");
    rig.inject(PLAIN, &spoofed);
    assert_eq!(socket.recv_from(&mut received).unwrap().1, (Ipv4Addr::new(198, 51, 100, 7), 4_000).into());
}

#[test]
fn is_received_once_as_from_the_port_past_a_program_in_the_driver() {
    if is_root() {
        is_received_once_as_from_the_port(AttachMode::Native);
    }
}

#[test]
fn is_received_once_as_from_the_port_past_a_program_in_the_generic_path() {
    if is_root() {
        is_received_once_as_from_the_port(AttachMode::Generic);
    }
}

#[test]
fn the_tap_follows_the_mac_address_of_its_port() {
    if !is_root() {
        return;
    }
    let rig = rig(AttachMode::Native);
    let socket = server((OURS, PORT).into());
    let new_mac = [2, 0, 0, 0, 0, 0x11];
    assert!(!follow(rig.tap.name(), "g0").unwrap(), "nothing to do yet");
    rig.ns.ip("link set g0 address 02:00:00:00:00:11");
    rig.inject(PLAIN, &frame(new_mac, b"early"));
    assert_silent(&socket, "the TAP takes it for another host's");
    assert!(follow(rig.tap.name(), "g0").unwrap());
    rig.inject(PLAIN, &frame(new_mac, b"late"));
    assert_eq!(socket.recv_from(&mut [0; 64]).unwrap().0, 4);
    rig.ns.ip("link del g0");
    assert!(follow(rig.tap.name(), "g0").is_err());
}

#[test]
fn what_is_given_back_is_forwarded_by_the_kernel_too() {
    if !is_root() {
        return;
    }
    let rig = rig(AttachMode::Native);
    rig.ns.sysctl("net.ipv4.ip_forward", "1");
    rig.ns.ip_batch("link add g1 type veth peer name c1\n link set g1 up\n addr add 10.0.0.1/24 dev g1\n");
    rig.ns.ip(&format!("link set c1 netns {}", rig.peer.name));
    rig.peer.ip_batch("link set c1 up\n addr add 10.0.0.2/24 dev c1\n");
    let (peer, go) = (&rig.peer, Ipv4Addr::new(10, 0, 0, 2));
    std::thread::scope(|scope| {
        let (ready, wait) = std::sync::mpsc::channel();
        let receiver = scope.spawn(move || {
            peer.enter();
            let socket = server((go, PORT).into());
            ready.send(()).unwrap();
            let mut received = [0; 64];
            let (len, from) = socket.recv_from(&mut received).unwrap();
            (received[..len].to_vec(), from)
        });
        wait.recv().unwrap();
        let mut routed = Vec::new();
        // From beyond the peer, so that the answering namespace does not take it for its own.
        let client = Ipv4Addr::new(192, 0, 2, 77);
        let builder =
            PacketBuilder::ethernet2(PEER_MAC, MAC).ipv4(client.octets(), go.octets(), 64).udp(4_000, PORT);
        builder.write(&mut routed, b"routed").unwrap();
        rig.inject(PLAIN, &routed);
        assert_eq!(receiver.join().unwrap(), (b"routed".to_vec(), (client, 4_000).into()));
    });
}
