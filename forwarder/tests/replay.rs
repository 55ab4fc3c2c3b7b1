//! `towpathd replay` on a golden capture: what leaves, when, and what is counted. No root.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};
use forwarder::port::pcap::{Reader, Writer};

const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../ctl/tests/manifests/cluster.yaml");
/// When the capture begins.
const START_NS: u64 = 1_700_000_000_123_456_789;
const MS: u64 = 1_000_000;
/// The gateway's link-layer addresses in the capture, outside and inside.
const GATEWAY: [[u8; 6]; 2] = [[2, 0xca, 0xfe, 0, 0, 1], [2, 0xca, 0xfe, 0, 1, 1]];

fn mac(inside: bool) -> [u8; 6] {
    GATEWAY[usize::from(inside)]
}

fn ip(inside: bool, src: [u8; 4], dst: [u8; 4]) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 9, u8::from(inside)], mac(inside)).ipv4(src, dst, 64)
}

fn tcp(inside: bool, src: ([u8; 4], u16), dst: ([u8; 4], u16), flags: &str) -> Vec<u8> {
    let mut header = TcpHeader::new(src.1, dst.1, 1000, 64_240);
    (header.syn, header.ack) = (flags.contains('s'), flags.contains('a'));
    let mut bytes = Vec::new();
    ip(inside, src.0, dst.0).tcp_header(header).write(&mut bytes, &[]).unwrap();
    bytes
}

fn udp(inside: bool, src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Vec<u8> {
    let mut bytes = Vec::new();
    ip(inside, src.0, dst.0).udp(src.1, dst.1).write(&mut bytes, b"question").unwrap();
    bytes
}

/// A client of `shop/billing`, which keeps its address, and of `default/my-nginx`, which masquerades; a pod that asks the
/// cluster's DNS, whose second answer comes when the connection has expired; a ping, a closed port, ARP.
fn capture() -> Vec<u8> {
    let client = [198, 51, 100, 7];
    let (billing, nginx, dns) = ([203, 0, 113, 11], [203, 0, 113, 10], [10, 96, 0, 10]);
    let (pod, coredns) = ([10, 244, 1, 7], [10, 244, 1, 2]);
    let mut ping = Vec::new();
    ip(false, client, nginx).icmpv4_echo_request(7, 1).write(&mut ping, b"ping").unwrap();
    let mut arp = vec![0xff; 6];
    arp.extend([2, 0, 0, 0, 9, 0, 8, 6]);
    arp.extend([0; 28]);
    let mut foreign = tcp(false, (client, 4242), (billing, 443), "s");
    foreign[5] ^= 0xff;
    let packets = [
        (0, tcp(false, (client, 4242), (billing, 443), "s")),
        (1, tcp(true, ([10, 244, 2, 21], 8443), (client, 4242), "sa")),
        (2, tcp(false, (client, 4242), (billing, 443), "a")),
        (3, tcp(false, (client, 4300), (nginx, 8080), "s")),
        (4, udp(true, (pod, 5353), (dns, 53))),
        (5, udp(true, (coredns, 53), (pod, 5353))),
        (6, ping),
        (7, tcp(false, (client, 4301), (nginx, 81), "s")),
        (8, arp),
        (9, foreign),
        // Earlier than the one before.
        (8, udp(true, (pod, 5354), ([10, 96, 200, 200], 53))),
        (400_000, udp(true, (coredns, 53), (pod, 5353))),
    ];
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file).unwrap();
    for (at_ms, bytes) in packets {
        writer.write_record(START_NS + at_ms * MS, &bytes).unwrap();
    }
    file
}

fn replay(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towpathd"));
    command.current_dir(folder).env("TOWPATH_LOG", "off").args(["replay", "in.pcap", "out.pcap"]).args(args);
    command.output().unwrap()
}

/// A line for each packet: milliseconds since the start, MACs, what it is.
fn describe(file: &[u8]) -> String {
    let mut reader = Reader::new(file).unwrap();
    let mut text = String::new();
    while let Some(record) = reader.next_record().unwrap() {
        let packet = SlicedPacket::from_ethernet(&record.bytes).unwrap();
        let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("{:?}", record.bytes) };
        let (src, dst) = (ip.header().source_addr(), ip.header().destination_addr());
        let what = match &packet.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                let flags = [(tcp.syn(), "syn"), (tcp.ack(), "ack"), (tcp.rst(), "rst")];
                let flags: Vec<&str> = flags.iter().filter(|flag| flag.0).map(|flag| flag.1).collect();
                format!(
                    "tcp {src}:{} > {dst}:{} {}",
                    tcp.source_port(),
                    tcp.destination_port(),
                    flags.join("|")
                )
            }
            Some(TransportSlice::Udp(udp)) => {
                format!("udp {src}:{} > {dst}:{}", udp.source_port(), udp.destination_port())
            }
            Some(TransportSlice::Icmpv4(icmp)) => format!("icmp {src} > {dst} type {}", icmp.type_u8()),
            _ => format!("{:?} {src} > {dst}", IpNumber(ip.header().protocol().0)),
        };
        let from = record.bytes[6..12].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        let _ = writeln!(text, "{:>6} {from} {what}", (record.time_ns - START_NS) / MS);
    }
    text
}

#[test]
fn a_golden_capture() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("in.pcap"), capture()).unwrap();
    let output = replay(folder.path(), &["--objects", CLUSTER]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let out = std::fs::read(folder.path().join("out.pcap")).unwrap();
    insta::assert_snapshot!(describe(&out), @"
         0 02:ca:fe:00:01:01 tcp 198.51.100.7:4242 > 10.244.2.21:8443 syn
         1 02:ca:fe:00:00:01 tcp 203.0.113.11:443 > 198.51.100.7:4242 syn|ack
         2 02:ca:fe:00:01:01 tcp 198.51.100.7:4242 > 10.244.2.21:8443 ack
         3 02:ca:fe:00:01:01 tcp 192.0.2.129:64221 > 10.244.1.7:80 syn
         4 02:ca:fe:00:01:01 udp 10.244.1.7:5353 > 10.244.1.2:53
         5 02:ca:fe:00:01:01 udp 10.96.0.10:53 > 10.244.1.7:5353
         6 02:ca:fe:00:00:01 icmp 203.0.113.10 > 198.51.100.7 type 0
         7 02:ca:fe:00:00:01 tcp 203.0.113.10:81 > 198.51.100.7:4301 ack|rst
    400000 02:ca:fe:00:01:01 udp 10.244.1.2:53 > 10.244.1.7:5353
    ");
    insta::assert_snapshot!(String::from_utf8(output.stdout.clone()).unwrap(), @r#"
    rx_packets              12
    forwarded               7
    answered                2
    punted                  1
    flows_created           3
    flows_expired           2

    Dropped or answered
    not_our_mac             1         A unicast packet in a link-layer broadcast, multicast or foreign frame.
    unknown_port            1         The address belongs to a Service, but not this port: rejected.
    unknown_service         1         An address inside a service range without a Service.
    echo_answered           1         A ping of an address that we own, answered.

    Assumed
      one port outside, one inside; nodes and pods are inside
      return = "routed": the cluster routes replies to clients through the gateway
      service ranges 10.96.0.0/16, fd00:96::/112, from the ClusterIPs
      the gateway's own addresses are of the documentation ranges 192.0.2.128/25 and 2001:db8:ffff::/48
    "#);

    // The same again to the byte, and other choices with another seed.
    let again = replay(folder.path(), &["--objects", CLUSTER, "--seed", "1"]);
    assert_eq!(again.stdout, output.stdout);
    assert_eq!(std::fs::read(folder.path().join("out.pcap")).unwrap(), out);
    let other = replay(folder.path(), &["--objects", CLUSTER, "--seed", "77"]);
    assert_eq!(other.stdout, output.stdout, "the counters do not depend on random choices here");
    assert_ne!(std::fs::read(folder.path().join("out.pcap")).unwrap(), out);
}

#[test]
fn what_cannot_be_replayed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refuses = |args: &[&str], words: &[&str]| {
        let output = replay(folder.path(), args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    };
    std::fs::write(folder.path().join("bad.yaml"), "apiVersion: v1\nkind: Service\nspec: {ports: 7}\n")
        .unwrap();
    refuses(&["--objects", CLUSTER], &["in.pcap", "No such file"]);
    std::fs::write(folder.path().join("in.pcap"), b"no capture, whatever its name says").unwrap();
    refuses(&["--objects", CLUSTER], &["in.pcap", "not a pcap file"]);
    refuses(&["--objects", "bad.yaml"], &["bad.yaml:3", "spec.ports"]);
    refuses(&["--objects", "."], &["bad.yaml:3"]);
    refuses(&["--objects", CLUSTER, "--config", "none.toml"], &["none.toml"]);
}
