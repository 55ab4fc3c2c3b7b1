"""How the golden cases are made: addresses of tests/src/twin.rs and tests/golden/objects.yaml, packets of both families, and how a
case is printed.

Every case has client ports of its own, so that no case finds the connection of another. Malformed packets are made by changing
bytes of good ones.
"""

import json
import struct

from scapy.layers.inet import ICMP, IP, TCP, UDP, Ether
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.packet import Raw

OUTSIDE, INSIDE = "02:00:00:00:00:01", "02:00:00:00:01:01"
CLIENT_MAC, ROUTER_MAC = "02:00:00:00:00:02", "02:00:00:00:00:77"
NODE1_MAC, NODE2_MAC, NODE3_MAC = "02:00:00:00:01:11", "02:00:00:00:01:12", "02:00:00:00:01:13"


class Family:
    """Addresses of one family, and how its headers are made."""

    def __init__(self, version):
        four = version == 4
        self.v = version
        self.client = "10.1.0.2" if four else "fd00:1::2"
        self.remote = "198.51.100.7" if four else "2001:db8:51::7"
        self.router = "10.1.0.77" if four else "fd00:1::77"
        self.own = "10.1.0.1" if four else "fd00:1::1"
        self.own_inside = "10.2.0.1" if four else "fd00:2::1"
        self.node1 = "10.2.0.11" if four else "fd00:2::11"
        self.router_inside = "10.2.0.99" if four else "fd00:2::99"  # neither node nor pod: in no table of ours
        self.ethertype = 0x0800 if four else 0x86DD

    def vip(self, n):
        return f"203.0.113.{n}" if self.v == 4 else f"2001:db8::{n}"

    def cluster_ip(self, n):
        return f"10.96.0.{n}" if self.v == 4 else f"fd00:96::{n}"

    def pod(self, node, n):
        return f"10.244.{node}.{n}" if self.v == 4 else f"fd00:244:{node}::{n}"

    def ip(self, src, dst, ttl=64, **more):
        if self.v == 4:
            more.setdefault("id", 0x1234)
            more.setdefault("flags", "DF")
            return IP(src=src, dst=dst, ttl=ttl, **more)
        return IPv6(src=src, dst=dst, hlim=ttl, **more)


FOUR, SIX = Family(4), Family(6)
port_counter = [61000]
names = set()


def fresh():
    """A client port that no other case has; inside the range for masquerading, where Linux and Towpath both keep it."""
    port_counter[0] += 1
    return port_counter[0]


def outside(packet, src=CLIENT_MAC, dst=OUTSIDE):
    return ("outside", bytes(Ether(src=src, dst=dst) / packet))


def inside(packet, src=NODE1_MAC, dst=INSIDE):
    return ("inside", bytes(Ether(src=src, dst=dst) / packet))


def case(name, about, *frames, ledger=None):
    assert name not in names, name
    names.add(name)
    line = {"name": name, "about": about, "ledger": ledger, "frames": [(side, data.hex()) for side, data in frames]}
    print(json.dumps(line))


def patched(sided, at, data):
    """The frame with bytes replaced; `at` counts from the Ethernet header."""
    side, frame = sided
    return (side, frame[:at] + data + frame[at + len(data) :])


def ip_checksum_fixed(sided):
    side, frame = sided
    ihl = (frame[14] & 15) * 4
    header = bytearray(frame[14 : 14 + max(ihl, 20)])
    header[10:12] = b"\0\0"
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return patched(sided, 24, struct.pack("!H", ~total & 0xFFFF))


def udp(f, payload=b"golden packet", src=None, dst=None, sport=None, dport=53, **ip):
    return f.ip(src or f.client, dst or f.vip(10), **ip) / UDP(sport=sport or fresh(), dport=dport) / Raw(payload)


def tcp(f, flags="S", src=None, dst=None, sport=None, dport=80, seq=1000, ack=0, payload=b"", options=(), ip=None, **more):
    packet = f.ip(src or f.client, dst or f.vip(10), **(ip or {}))
    packet /= TCP(sport=sport or fresh(), dport=dport, flags=flags, seq=seq, ack=ack, window=8192, options=list(options), **more)
    return packet / Raw(payload) if payload else packet


def icmp_error(f, kind, src, dst, quoted, mtu=0, **ip):
    """kind: port, big, ttl, host. `quoted`: the packet that the error is about."""
    if f.v == 4:
        types = {"port": (3, 3), "host": (3, 1), "big": (3, 4), "ttl": (11, 0)}
        t, c = types[kind]
        return f.ip(src, dst, **ip) / ICMP(type=t, code=c, nexthopmtu=mtu) / Raw(bytes(quoted)[:548])
    makers = {
        "port": ICMPv6DestUnreach(code=4),
        "host": ICMPv6DestUnreach(code=3),
        "big": ICMPv6PacketTooBig(mtu=mtu),
        "ttl": ICMPv6TimeExceeded(code=0),
    }
    return f.ip(src, dst, **ip) / makers[kind] / Raw(bytes(quoted)[:1200])


def aged(packet, hops=1):
    """A packet as it looks `hops` routers later."""
    packet = packet.copy()
    if IP in packet:
        packet[IP].ttl -= hops
        del packet[IP].chksum
    else:
        packet[IPv6].hlim -= hops
    return packet.__class__(bytes(packet))


def broken(sided, f, at):
    """The checksum at `at` of the transport header, one bit flipped."""
    at += 34 if f.v == 4 else 54
    return patched(sided, at, bytes([sided[1][at] ^ 0x10]))


def resummed(sided, f, protocol):
    """The TCP checksum made right after bytes were changed."""
    side, frame = sided
    l4 = 34 if f.v == 4 else 54
    body = bytearray(frame[l4:])
    body[16:18] = b"\0\0"
    addresses = frame[26:34] if f.v == 4 else frame[22:54]
    data = addresses + struct.pack("!HH", protocol, len(body)) + bytes(body)
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return patched(sided, l4 + 16, struct.pack("!H", ~total & 0xFFFF))
