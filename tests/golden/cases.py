"""The inputs of the golden cases, one JSON object a line; `scripts/golden record` adds what Linux makes of them.

packets.py has the words that cases are written in, fragments.py the cases about fragments.
"""

import struct

import fragments
from packets import (
    CLIENT_MAC,
    FOUR,
    NODE2_MAC,
    ROUTER_MAC,
    SIX,
    aged,
    broken,
    case,
    fresh,
    icmp_error,
    inside,
    ip_checksum_fixed,
    outside,
    patched,
    resummed,
    tcp,
    udp,
)
from scapy.layers.inet import ICMP, IP, UDP, IPOption_LSRR, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.packet import Raw


def services(f, v):
    # --- one way ---
    case(f"udp-{v}", "UDP to a Service: destination and port translated, TTL one less, the rest untouched.", outside(udp(f)))
    case(f"udp-odd-{v}", "A payload of odd length: the checksum pads it.", outside(udp(f, b"odd")))
    case(f"udp-no-payload-{v}", "A datagram without payload.", outside(udp(f, b"")))
    case(f"udp-full-size-{v}", "A datagram that fills the link.", outside(udp(f, bytes(1472 if f.v == 4 else 1452))))
    case(f"tcp-syn-{v}", "A SYN with the options of today's stacks.", outside(tcp(f, options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)])))
    tos = {"tos": 0xB9} if f.v == 4 else {"tc": 0xB9}
    case(f"ecn-{v}", "DSCP and ECN are not ours to change (RFC 6040).", outside(udp(f, **tos)))
    if f.v == 4:
        case("ip-id-4", "The identification of a packet that may be fragmented is kept (RFC 6864).", outside(udp(f, id=0xBEEF, flags=0)))
    else:
        case("flow-label-6", "The flow label is kept (RFC 6437).", outside(udp(f, fl=0xBEEF5)))
    case(f"tcp-urgent-{v}", "The urgent pointer and unknown options are kept.", outside(tcp(f, "PAU", ack=1, payload=b"urgent", urgptr=3, options=[(254, b"\x12\x34ab")])))
    case(f"remote-client-{v}", "A client behind a router of the outside; the reply goes back to that router.", *remote(f))

    # --- connections ---
    sport, pod = fresh(), f.pod(1, 10)
    case(
        f"udp-reply-{v}",
        "The pod's answer leaves with the Service's address and port.",
        outside(udp(f, sport=sport)),
        inside(udp(f, b"answer", src=pod, dst=f.client, sport=5353, dport=sport)),
        outside(udp(f, b"again", sport=sport)),
    )
    sport = fresh()
    back = dict(src=pod, dst=f.client, sport=8080, dport=sport)
    case(
        f"tcp-connection-{v}",
        "A whole connection: handshake, data both ways, close both ways.",
        outside(tcp(f, "S", sport=sport)),
        inside(tcp(f, "SA", seq=5000, ack=1001, **back)),
        outside(tcp(f, "A", sport=sport, seq=1001, ack=5001)),
        outside(tcp(f, "PA", sport=sport, seq=1001, ack=5001, payload=b"GET / HTTP/1.0\r\n\r\n")),
        inside(tcp(f, "PA", seq=5001, ack=1019, payload=b"HTTP/1.0 200 OK\r\n\r\nhello", **back)),
        inside(tcp(f, "FA", seq=5025, ack=1019, **back)),
        outside(tcp(f, "FA", sport=sport, seq=1019, ack=5026)),
        inside(tcp(f, "A", seq=5026, ack=1020, **back)),
    )
    sport = fresh()
    case(
        f"tcp-refused-{v}",
        "The pod refuses: its RST leaves with the Service's address.",
        outside(tcp(f, "S", sport=sport)),
        inside(tcp(f, "RA", seq=0, ack=1001, src=pod, dst=f.client, sport=8080, dport=sport)),
    )
    sport = fresh()
    case(
        f"tcp-syn-again-{v}",
        "A SYN is sent again, and again with another sequence number.",
        outside(tcp(f, "S", sport=sport)),
        outside(tcp(f, "S", sport=sport)),
        inside(tcp(f, "SA", seq=5000, ack=1001, src=pod, dst=f.client, sport=8080, dport=sport)),
        outside(tcp(f, "A", sport=sport, seq=1001, ack=5001)),
    )
    case(f"tcp-pickup-{v}", "A lone ACK of a connection that began elsewhere is taken up.", outside(tcp(f, "A", seq=7, ack=9, payload=b"middle")))
    case(f"tcp-fin-alone-{v}", "A FIN without a connection goes nowhere.", outside(tcp(f, "F")))
    case(f"tcp-rst-alone-{v}", "An RST without a connection goes nowhere.", outside(tcp(f, "R")))
    case(f"tcp-syn-ack-alone-{v}", "A SYN+ACK without a connection goes nowhere.", outside(tcp(f, "SA", ack=1)))
    case(f"stray-reply-{v}", "A pod's packet from a port that is a Service's endpoint, but of no connection: routed as it is.", inside(udp(f, src=pod, dst=f.client, sport=5353, dport=fresh())))

    # --- masquerade, NodePort, hairpin, inside ---
    for proto, make, dport, target in (("udp", udp, 53, 5353), ("tcp", tcp, 80, 8080)):
        sport = fresh()
        answer = dict(src=f.pod(2, 20), dst=f.own_inside, sport=target, dport=sport)
        if proto == "tcp":
            answer.update(flags="SA", seq=5000, ack=1001)
        case(
            f"masquerade-{proto}-{v}",
            "externalTrafficPolicy Cluster: the source becomes the gateway's, and the answer finds back.",
            outside(make(f, dst=f.vip(20), sport=sport, dport=dport)),
            inside(make(f, **answer), src=NODE2_MAC),
        )
        sport = fresh()
        answer = dict(src=pod, dst=f.client, sport=target, dport=sport)
        if proto == "tcp":
            answer.update(flags="SA", seq=5000, ack=1001)
        case(
            f"node-port-{proto}-{v}",
            "A NodePort on the gateway's own address.",
            outside(make(f, dst=f.own, sport=sport, dport=30053 if proto == "udp" else 30080)),
            inside(make(f, **answer)),
        )
    sport = fresh()
    case(
        f"hairpin-{v}",
        "A pod reaches itself through its Service: masqueraded, or the answer would never pass here.",
        inside(udp(f, src=pod, dst=f.cluster_ip(10), sport=sport)),
        inside(udp(f, b"answer", src=pod, dst=f.own_inside, sport=5353, dport=sport)),
    )
    sport = fresh()
    case(
        f"pod-to-cluster-ip-{v}",
        "A pod reaches a Service's ClusterIP: its own address is kept.",
        inside(tcp(f, "S", src=pod, dst=f.cluster_ip(20), sport=sport)),
        inside(tcp(f, "SA", src=f.pod(2, 20), dst=pod, sport=8080, dport=sport, seq=5000, ack=1001), src=NODE2_MAC),
    )
    sport = fresh()
    case(
        f"pod-to-vip-{v}",
        "A pod reaches a load balancer address of policy Local: straight to an endpoint, its address kept.",
        inside(udp(f, src=f.pod(2, 20), dst=f.vip(10), sport=sport), src=NODE2_MAC),
        inside(udp(f, b"answer", src=pod, dst=f.pod(2, 20), sport=5353, dport=sport)),
    )
    case(f"pod-to-pod-{v}", "Pods reach each other without translation.", inside(udp(f, src=pod, dst=f.pod(2, 99), dport=7)))
    case(f"pod-to-outside-{v}", "A pod on its way out is routed.", inside(tcp(f, src=pod, dst=f.client, dport=443)))
    case(f"outside-to-pod-{v}", "A pod's own address is routed.", outside(tcp(f, dst=f.pod(2, 99), dport=22)))
    if f.v == 4:
        echo = f.ip(f.client, f.pod(1, 10)) / ICMP(type=8, id=fresh(), seq=1) / Raw(b"ping")
    else:
        echo = f.ip(f.client, f.pod(1, 10)) / ICMPv6EchoRequest(id=fresh(), seq=1, data=b"ping")
    case(f"ping-pod-{v}", "A ping of a pod is routed.", outside(echo))

    # --- what is not served ---
    case(f"no-endpoints-tcp-{v}", "No endpoints: a SYN is answered with RST, at once.", outside(tcp(f, dst=f.vip(30))))
    case(f"no-endpoints-udp-{v}", "No endpoints: UDP is answered with port unreachable.", outside(udp(f, dst=f.vip(30))))
    case(f"unknown-port-tcp-{v}", "The address is owned, the port is not served: RST.", outside(tcp(f, dport=81)))
    case(f"unknown-port-udp-{v}", "The address is owned, the port is not served: port unreachable.", outside(udp(f, dport=54)))
    case(f"unknown-port-tcp-data-{v}", "A RST to a packet with data acknowledges nothing and takes its acknowledgement (RFC 9293 3.10.7.1).", outside(tcp(f, "PA", dport=81, seq=77, ack=4242, payload=b"data")))
    case(f"unknown-port-rst-{v}", "A RST is never answered with a RST.", outside(tcp(f, "R", dport=81)))
    case(f"cluster-ip-no-endpoints-{v}", "The same for a ClusterIP, asked by a pod.", inside(tcp(f, src=pod, dst=f.cluster_ip(30))))
    case(f"cluster-ip-unknown-port-{v}", "A ClusterIP's port that is not served.", inside(udp(f, src=pod, dst=f.cluster_ip(20), dport=54)))
    case(f"unknown-service-{v}", "An address of the service range without a Service: silence.", inside(udp(f, src=pod, dst=f.cluster_ip(99))))
    case(f"cluster-ip-outside-{v}", "ClusterIPs are for the inside.", outside(udp(f, dst=f.cluster_ip(10))))
    case(f"source-range-refused-{v}", "A source outside loadBalancerSourceRanges: silence.", outside(udp(f, dst=f.vip(50))))
    case(f"source-range-allowed-{v}", "A source inside loadBalancerSourceRanges.", outside(udp(f, src=f.remote, dst=f.vip(50)), src=ROUTER_MAC))
    case(f"internal-local-{v}", "internalTrafficPolicy Local without a local endpoint: silence.", inside(udp(f, src=pod, dst=f.cluster_ip(60))))
    for name, n in (("", 10), ("-no-endpoints", 30)):
        if f.v == 4:
            echo = f.ip(f.client, f.vip(n)) / ICMP(type=8, id=fresh(), seq=7) / Raw(b"are you there?")
        else:
            echo = f.ip(f.client, f.vip(n)) / ICMPv6EchoRequest(id=fresh(), seq=7, data=b"are you there?")
        case(f"ping-vip{name}-{v}", "A ping of an owned address is answered.", outside(echo))

    # --- none of ours ---
    case(f"own-port-closed-{v}", "A port of the gateway's own address that nobody listens on.", outside(udp(f, dst=f.own, dport=9)), ledger="kernel-path")
    case(f"other-node-{v}", "A node's own address is the kernel's to route.", outside(tcp(f, dst=f.node1, dport=22)), ledger="kernel-path")

    # --- TTL and MTU ---
    case(f"ttl-1-{v}", "TTL used up: time exceeded, from the Service's address.", outside(udp(f, ttl=1)))
    case(f"ttl-1-tcp-{v}", "The same for TCP.", outside(tcp(f, ip={"ttl": 1})))
    case(f"ttl-2-{v}", "One hop is left.", outside(udp(f, ttl=2)))
    sport = fresh()
    case(
        f"ttl-1-reply-{v}",
        "TTL used up on the way back: time exceeded to the pod, which quotes the pod's own packet.",
        outside(udp(f, sport=sport)),
        inside(udp(f, src=pod, dst=f.client, sport=5353, dport=sport, ttl=1)),
    )
    case(f"mtu-{v}", "Too large for the way to the pod: the MTU is told, from the Service's address.", outside(udp(f, bytes(1300), dst=f.vip(40))))
    case(f"mtu-tcp-{v}", "The same for TCP.", outside(tcp(f, "PA", dst=f.vip(40), ack=1, payload=bytes(1300))))
    fits = 1000 - 28 if f.v == 4 else 1280 - 48
    case(f"mtu-fits-{v}", "Just as large as the way to the pod.", outside(udp(f, bytes(fits), dst=f.vip(40))))
    case(f"mtu-one-more-{v}", "One byte too large.", outside(udp(f, bytes(fits + 1), dst=f.vip(40))))

    # --- checksums ---
    case(f"udp-checksum-zero-{v}", "No checksum: IPv4 keeps it so (RFC 768), IPv6 forbids it (RFC 8200 8.1).", without_checksum(f), ledger="udp6-without-checksum" if f.v == 6 else None)
    case(f"udp-checksum-bad-{v}", "A wrong UDP checksum: Linux drops, Towpath forwards it as wrong as it came.", broken(outside(udp(f)), f, 6), ledger="bad-l4-checksum")
    case(f"tcp-checksum-bad-{v}", "A wrong TCP checksum: the same.", broken(outside(tcp(f)), f, 16), ledger="bad-l4-checksum")
    case(f"udp-checksum-ffff-{v}", "A checksum that comes out as zero is sent as ffff (RFC 768).", becoming_zero(f))

    # --- malformed ---
    l4 = 34 if f.v == 4 else 54
    for name, length in (("short", 7), ("long", 60)):
        case(f"udp-length-{name}-{v}", "The UDP length contradicts the IP length.", patched(outside(udp(f)), l4 + 4, struct.pack("!H", length)))
    case(f"tcp-offset-4-{v}", "A TCP header shorter than 20 bytes.", resummed(patched(outside(tcp(f)), l4 + 12, b"\x40"), f, 6))
    case(f"tcp-offset-15-{v}", "A TCP header longer than the packet.", resummed(patched(outside(tcp(f)), l4 + 12, b"\xf0"), f, 6))
    for name, flags in (("null", ""), ("xmas", "FPU"), ("syn-fin", "SF"), ("syn-rst", "SR")):
        case(f"tcp-{name}-{v}", "Flags that no implementation sends.", outside(tcp(f, flags)))
    case(f"version-5-{v}", "A version that contradicts the EtherType.", patched(outside(udp(f)), 14, b"\x55" if f.v == 4 else b"\x50"))
    case(f"truncated-tcp-{v}", "The packet ends inside the TCP header.", short(f))
    case(f"trailer-{v}", "Bytes behind the packet (Ethernet padding) go no further.", trailer(f))
    case(f"port-zero-{v}", "Source port 0 is legal in UDP (RFC 768).", outside(udp_from_zero(f)))

    # --- ICMP errors ---
    sport = fresh()
    request = udp(f, sport=sport)
    at_pod = aged(udp(f, dst=pod, sport=sport, dport=5353))
    case(
        f"icmp-port-unreachable-{v}",
        "The pod's port unreachable: from the Service's address, and its quote shows what the client sent.",
        outside(request),
        inside(icmp_error(f, "port", pod, f.client, at_pod)),
        outside(request),
    )
    sport = fresh()
    segment = tcp(f, "PA", sport=sport, seq=5, ack=5, payload=b"x" * 200)
    case(
        f"icmp-too-big-from-node-{v}",
        "A router between the gateway and the pod tells its MTU: the client must see it, quote translated.",
        outside(segment),
        inside(icmp_error(f, "big", f.node1, f.client, aged(tcp(f, "PA", dst=pod, sport=sport, dport=8080, seq=5, ack=5, payload=b"x" * 200)), mtu=1280)),
    )
    sport = fresh()
    case(
        f"icmp-time-exceeded-from-node-{v}",
        "Traceroute behind the gateway: time exceeded of a node reaches the client.",
        outside(udp(f, sport=sport, ttl=2)),
        inside(icmp_error(f, "ttl", f.node1, f.client, aged(udp(f, dst=pod, sport=sport, dport=5353, ttl=2)))),
    )
    for who, address, mac in (("client", f.client, CLIENT_MAC), ("router", f.router, ROUTER_MAC)):
        sport = fresh()
        reply = dict(dst=f.client, dport=sport)
        case(
            f"icmp-too-big-from-{who}-{v}",
            "The way to the client has a small MTU: the pod must learn it, in its own words.",
            outside(tcp(f, "S", sport=sport)),
            inside(tcp(f, "SA", src=pod, sport=8080, seq=5000, ack=1001, **reply)),
            outside(icmp_error(f, "big", address, f.vip(10), aged(tcp(f, "SA", src=f.vip(10), sport=80, seq=5000, ack=1001, **reply)), mtu=1280), src=mac),
        )
    sport = fresh()
    case(
        f"icmp-port-unreachable-from-client-{v}",
        "The client no longer listens: the pod is told.",
        outside(udp(f, sport=sport)),
        inside(udp(f, src=pod, dst=f.client, sport=5353, dport=sport)),
        outside(icmp_error(f, "port", f.client, f.vip(10), aged(udp(f, src=f.vip(10), dst=f.client, sport=53, dport=sport)))),
    )
    sport = fresh()
    case(
        f"icmp-masqueraded-{v}",
        "An error about a masqueraded packet: both translations are undone, in the quote as well.",
        outside(udp(f, dst=f.vip(20), sport=sport)),
        inside(icmp_error(f, "port", f.pod(2, 20), f.own_inside, aged(udp(f, src=f.own_inside, dst=f.pod(2, 20), sport=sport, dport=5353))), src=NODE2_MAC),
    )
    case(
        f"icmp-unknown-flow-{v}",
        "An error about a connection that is not there goes nowhere.",
        outside(icmp_error(f, "big", f.client, f.vip(10), udp(f, src=f.vip(10), dst=f.client, sport=53, dport=fresh()), mtu=1280)),
    )
    sport = fresh()
    quoted = aged(udp(f, dst=pod, sport=sport, dport=5353))
    case(
        f"icmp-bad-checksum-{v}",
        "An error whose own checksum is wrong is dropped: a translation would make it right.",
        outside(udp(f, sport=sport)),
        broken(inside(icmp_error(f, "port", pod, f.client, quoted)), f, 2),
    )
    sport = fresh()
    quoted = bytes(aged(udp(f, dst=pod, sport=sport, dport=5353)))[: 28 if f.v == 4 else 48]
    case(
        f"icmp-short-quote-{v}",
        "An error that quotes no more than eight bytes behind the header (RFC 792).",
        outside(udp(f, sport=sport)),
        inside(icmp_error(f, "port", pod, f.client, quoted)),
    )
    sport = fresh()
    quoted = bytes(aged(udp(f, dst=pod, sport=sport, dport=5353)))[: 24 if f.v == 4 else 44]
    case(
        f"icmp-shorter-quote-{v}",
        "An error whose quote ends inside the ports goes nowhere.",
        outside(udp(f, sport=sport)),
        inside(icmp_error(f, "port", pod, f.client, quoted)),
    )

    # --- fragments ---
    form = fragments.FORM[f.v]
    case(f"fragments-{v}", "A datagram in fragments: put together, translated, and sent on in the same fragments.", *fragments.datagram(f, fresh()), ledger=form)
    case(f"fragments-reversed-{v}", "The same, last fragment first.", *fragments.datagram(f, fresh())[::-1], ledger=form)
    case(f"fragment-later-alone-{v}", "A later fragment alone has no ports and goes nowhere.", fragments.datagram(f, fresh())[1])

    # --- who may say what ---
    own_vip = f.vip(10)
    case(f"land-{v}", "Source and destination are the same (LAND).", outside(udp(f, src=own_vip)))
    case(f"spoofed-own-{v}", "The gateway's own address as source.", outside(udp(f, src=f.own)))
    case(f"spoofed-pod-{v}", "A pod's address from the outside.", outside(udp(f, src=f.pod(2, 99))))
    case(f"spoofed-client-{v}", "A client's address from the inside.", inside(udp(f, src=f.client, dst=f.cluster_ip(10))))
    martians = (
        {"loopback": "127.0.0.1", "zero": "0.0.0.0", "broadcast": "255.255.255.255", "multicast": "224.0.0.1", "class-e": "240.0.0.1"}
        if f.v == 4
        else {"loopback": "::1", "zero": "::", "multicast": "ff02::1", "mapped": "::ffff:10.1.0.2"}
    )
    for name, address in martians.items():
        case(f"martian-{name}-{v}", "A source that may not appear on a wire.", outside(udp(f, src=address)))
    case(f"foreign-mac-{v}", "A frame for somebody else.", outside(udp(f), dst="02:00:00:00:99:99"))
    if f.v == 4:
        case("broadcast-mac-4", "A unicast packet in a broadcast frame (RFC 1122 3.3.6).", outside(udp(f), dst="ff:ff:ff:ff:ff:ff"))


def remote(f):
    sport = fresh()
    return (
        outside(udp(f, src=f.remote, sport=sport), src=ROUTER_MAC),
        inside(udp(f, b"answer", src=f.pod(1, 10), dst=f.remote, sport=5353, dport=sport)),
    )


def without_checksum(f):
    packet = udp(f)
    packet[UDP].chksum = 0
    return outside(packet)


def udp_from_zero(f):
    packet = udp(f)
    packet[UDP].sport = 0
    return packet


def becoming_zero(f):
    """A datagram whose checksum after translation is zero, and so is sent as ffff."""
    sport = fresh()
    plain = udp(f, b"\0\0", sport=sport)
    translated = udp(f, b"\0\0", dst=f.pod(1, 10), sport=sport, dport=5353)
    value = bytes(translated)[-4:-2]  # The checksum stands before two bytes of payload.
    return outside(udp(f, value, sport=sport))


def short(f):
    side, frame = outside(tcp(f))
    frame = frame[:-8]
    if f.v == 4:
        return ip_checksum_fixed(patched((side, frame), 16, struct.pack("!H", len(frame) - 14)))
    return patched((side, frame), 18, struct.pack("!H", len(frame) - 54))


def trailer(f):
    side, frame = outside(udp(f))
    return (side, frame + b"\xaa" * 6)


def only_four():
    f = FOUR
    case("bad-ip-checksum-4", "A wrong header checksum.", patched(outside(udp(f)), 24, b"\xde\xad"))
    case("ihl-4-4", "A header shorter than 20 bytes.", ip_checksum_fixed(patched(outside(udp(f)), 14, b"\x44")))
    case("ihl-15-4", "A header longer than the packet.", patched(outside(udp(f, b"")), 14, b"\x4f"))
    case("total-length-long-4", "A total length beyond the frame.", ip_checksum_fixed(patched(outside(udp(f)), 16, struct.pack("!H", 1400))))
    case("total-length-short-4", "A total length shorter than the header.", ip_checksum_fixed(patched(outside(udp(f)), 16, struct.pack("!H", 19))))
    case("option-record-route-4", "Record route: Linux writes its address, Towpath leaves the option as it is.", outside(udp(f, options=IPOption_RR(length=11, pointer=4, routers=["0.0.0.0", "0.0.0.0"]))), ledger="record-route")
    case("option-nop-4", "Options that ask for nothing.", outside(udp(f, options=[IPOption_NOP()] * 4)))
    case("option-source-route-4", "A loose source route is refused.", outside(udp(f, options=IPOption_LSRR(length=7, pointer=4, routers=["10.1.0.9"]))))
    case("mtu-may-fragment-4", "Too large, but may be fragmented.", outside(udp(f, bytes(1300), dst=f.vip(40), flags=0)))
    case("dst-loopback-4", "A loopback destination from the wire.", outside(udp(f, dst="127.0.0.1")))
    case("icmp-address-mask-4", "An obsolete question to an owned address.", outside(f.ip(f.client, f.vip(10)) / ICMP(type=17, id=1, seq=1) / Raw(bytes(4))))
    case("tiny-tcp-fragment-4", "A first fragment that cuts the TCP header (RFC 1858): Linux forwards it, put together.", *[outside(p) for p in fragments.pieces(tcp(f, payload=b"hidden", ip={"flags": 0}), 0x7777, 8)], ledger="hostile-fragments")


def only_six():
    f = SIX
    case("no-route-6", "A destination that no route leads to.", outside(udp(f, dst="2001:db8:bad::9")), ledger="kernel-path")
    sport = fresh()
    options = lambda header: IPv6(src=f.client, dst=f.vip(10)) / header / UDP(sport=fresh(), dport=53) / Raw(b"golden packet")
    case("payload-length-long-6", "A payload length beyond the frame.", patched(outside(udp(f)), 18, struct.pack("!H", 1400)))
    case("hop-by-hop-6", "A hop-by-hop header that asks for nothing (RFC 8200 4.3).", outside(options(IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))]))))
    case("destination-options-6", "Destination options before UDP.", outside(options(IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]))))
    case("routing-header-0-6", "Routing header type 0 (RFC 5095).", outside(options(IPv6ExtHdrRouting(type=0, segleft=1, addresses=["fd00:1::9"]))))
    case("atomic-fragment-6", "A fragment header on a whole packet (RFC 6946).", outside(IPv6(src=f.client, dst=f.vip(10)) / IPv6ExtHdrFragment(id=sport, offset=0, m=0) / UDP(sport=sport, dport=53) / Raw(b"golden packet")), ledger="atomic-fragment")
    case("dst-loopback-6", "A loopback destination from the wire.", outside(udp(f, dst="::1")))


def errors_on_the_way(f, v):
    """ICMP errors of routers, which no object names. Last, so that the ports of the cases before stay what they were."""
    pod = f.pod(1, 10)
    for kind, words in (("ttl", "time-exceeded"), ("host", "host-unreachable"), ("big", "too-big")):
        sport = fresh()
        data = dict(sport=sport, seq=5, ack=5, payload=b"x" * 200)
        case(
            f"icmp-{words}-from-inside-router-{v}",
            "A router on the way to the pod, which is neither node nor pod: the client must hear it in its own words.",
            outside(tcp(f, "PA", **data)),
            inside(icmp_error(f, kind, f.router_inside, f.client, aged(tcp(f, "PA", dst=pod, dport=8080, **data)), mtu=1280 if kind == "big" else 0)),
        )
    sport = fresh()
    reply = dict(src=pod, dst=f.client, sport=5353, dport=sport)
    case(
        f"icmp-time-exceeded-from-outside-router-{v}",
        "The pod's answer ends at a router on the way to the client: the pod must hear it in its own words.",
        outside(udp(f, sport=sport)),
        inside(udp(f, **reply)),
        outside(icmp_error(f, "ttl", f.router, f.vip(10), aged(udp(f, src=f.vip(10), dst=f.client, sport=53, dport=sport))), src=ROUTER_MAC),
    )
    sport = fresh()
    case(
        f"icmp-masqueraded-from-inside-router-{v}",
        "The same about a masqueraded packet: it comes to the gateway's own address.",
        outside(udp(f, dst=f.vip(20), sport=sport)),
        inside(icmp_error(f, "ttl", f.router_inside, f.own_inside, aged(udp(f, src=f.own_inside, dst=f.pod(2, 20), sport=sport, dport=5353))), src=NODE2_MAC),
    )
    sport = fresh()
    at_pod = aged(with_options(udp(f, dst=pod, sport=sport, dport=5353)))
    case(
        f"icmp-behind-options-{v}",
        "IPv4 options or IPv6 destination options in the error and in the packet that it quotes.",
        outside(with_options(udp(f, sport=sport))),
        inside(with_options(icmp_error(f, "ttl", f.router_inside, f.client, at_pod))),
    )
    sport = fresh()
    case(
        f"icmp-about-routed-{v}",
        "An error about a packet that was routed to a pod's own address is routed back.",
        outside(udp(f, dst=f.pod(2, 99), sport=sport)),
        inside(icmp_error(f, "ttl", f.router_inside, f.client, aged(udp(f, dst=f.pod(2, 99), sport=sport))), src=NODE2_MAC),
    )
    sport = fresh()
    case(
        f"icmp-about-routed-out-{v}",
        "An error about a pod's packet on its way out is routed back.",
        inside(udp(f, src=f.pod(2, 99), dst=f.remote, sport=sport), src=NODE2_MAC),
        outside(icmp_error(f, "ttl", f.router, f.pod(2, 99), aged(udp(f, src=f.pod(2, 99), dst=f.remote, sport=sport))), src=ROUTER_MAC),
    )
    case(
        f"icmp-about-nothing-{v}",
        "An error about a packet to a pod that was never seen: Linux drops it, Towpath knows only what it translates.",
        inside(icmp_error(f, "ttl", f.router_inside, f.client, udp(f, dst=pod, sport=fresh(), dport=5353))),
        ledger="untracked-error",
    )
    sport = fresh()
    case(
        f"icmp-made-up-{v}",
        "An error that does not go to who sent the packet that it quotes goes nowhere.",
        outside(udp(f, sport=sport)),
        inside(icmp_error(f, "ttl", f.router_inside, f.remote, aged(udp(f, dst=pod, sport=sport, dport=5353)))),
    )
    if f.v == 4:
        for name, about, message in (
            ("redirect", "A better way to the pod is none for the client, who knows of no pod.", ICMP(type=5, code=1, gw=f.router_inside)),
            ("quench", "Source quench, which nobody heeds any more (RFC 6633), is an error like the others.", ICMP(type=4)),
        ):
            sport = fresh()
            quoted = bytes(aged(udp(f, dst=pod, sport=sport, dport=5353)))
            case(
                f"icmp-{name}-4",
                about,
                outside(udp(f, sport=sport)),
                inside(f.ip(f.node1, f.client) / message / Raw(quoted)),
            )


def with_options(packet):
    """The packet with 8 bytes of options that ask for nothing behind its IP header."""
    packet = packet.copy()
    if IP in packet:
        header = packet[IP]
        header.options = [IPOption_NOP()] * 8
        del header.ihl, header.len, header.chksum
    else:
        header = packet[IPv6]
        upper, number = header.payload, bytes(header)[6]
        header.remove_payload()
        header.nh = 60
        del header.plen
        packet = header / IPv6ExtHdrDestOpt(nh=number, options=[PadN(optdata=bytes(4))]) / upper
    return packet.__class__(bytes(packet))


services(FOUR, 4)
services(SIX, 6)
only_four()
only_six()
errors_on_the_way(FOUR, 4)
errors_on_the_way(SIX, 6)
fragments.all_cases()
