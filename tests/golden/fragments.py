"""Golden cases about fragments: datagrams that come in pieces, and packets that must leave in pieces."""

from packets import (
    FOUR,
    NODE2_MAC,
    ROUTER_MAC,
    SIX,
    case,
    fresh,
    inside,
    outside,
    port_counter,
    tcp,
    udp,
)
from scapy.layers.inet import ICMP, IP, UDP, IPOption
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, PadN
from scapy.packet import Raw

# What Linux sends again it numbers anew over IPv6.
FORM = {4: None, 6: "fragment-form"}
# Where Linux goes on without the fragment that is wrong.
HOSTILE = {4: None, 6: "hostile-fragments"}


def piece(packet, number, start, end, more, data=None, **header):
    """Bytes `start` to `end` of the payload of `packet` as a fragment, or `data` in their place. `header`: other IP fields."""
    wire = bytes(packet)
    if packet.version == 4:
        ip = IP(wire)
        payload = wire[ip.ihl * 4 :][start:end] if data is None else data
        fields = dict(src=ip.src, dst=ip.dst, ttl=ip.ttl, tos=ip.tos, proto=ip.proto, options=ip.options, id=number)
        fields |= dict(flags="MF" if more else 0, frag=start // 8) | header
        return IP(**fields) / Raw(payload)
    ip = IPv6(wire)
    payload = wire[40:][start:end] if data is None else data
    fields = dict(src=ip.src, dst=ip.dst, hlim=ip.hlim, tc=ip.tc, fl=ip.fl) | header
    return IPv6(**fields) / IPv6ExtHdrFragment(nh=ip.nh, offset=start // 8, m=int(more), id=number) / Raw(payload)


def pieces(packet, number, size, **header):
    """The whole payload of `packet` in fragments of `size` bytes each; the last one has what is left."""
    wire = bytes(packet)
    length = len(wire) - (IP(wire).ihl * 4 if packet.version == 4 else 40)
    return [piece(packet, number, at, min(at + size, length), at + size < length, **header) for at in range(0, length, size)]


def datagram(f, sport):
    """A datagram of 208 bytes to a Service, in three pieces."""
    packet = udp(f, bytes(range(200)), sport=sport, **({"flags": 0} if f.v == 4 else {}))
    return [outside(p) for p in pieces(packet, sport, 80 if f.v == 4 else 96)]


def may_fragment(f):
    """Fields of an IP header that allows fragments."""
    return {"flags": 0} if f.v == 4 else {}


def sent(f, *order, ledger=None, length=4 * 32, **more):
    """A datagram of `length` bytes to a Service, cut at each 32 bytes and sent in this order. An element of `order` is the
    number of a piece, or (start, end, more-fragments), or that with other data."""
    number = fresh()
    packet = udp(f, bytes(range(length - 8)), sport=number, **may_fragment(f), **more)
    frames = []
    for one in order:
        if isinstance(one, int):
            one = (32 * one, 32 * one + 32, 32 * one + 32 < length)
        frames.append(outside(piece(packet, number, *one)))
    return frames


def arriving(f, v):
    """How pieces come in."""
    form = FORM[v]
    for order in ((1, 0, 3, 2), (2, 3, 0, 1), (3, 1, 0, 2), (0, 3, 2, 1), (3, 2, 1, 0)):
        name = "".join(map(str, order))
        case(f"fragments-permuted-{name}-{v}", "Four fragments out of order leave in order, once all are there.", *sent(f, *order), ledger=form)
    case(f"fragments-doubled-{v}", "Each fragment comes twice: the datagram leaves once.", *sent(f, 0, 0, 1, 1, 2, 2, 3), ledger=form)
    case(f"fragments-late-copy-{v}", "A copy that comes after the datagram has left waits for others in vain.", *sent(f, 0, 1, 2, 3, 2), ledger=form)
    case(f"fragments-inside-{v}", "A fragment whose bytes are there already, in part of a larger one.", *sent(f, (0, 64, True), (32, 64, True), 2, 3), ledger=form)
    case(f"fragments-across-{v}", "A fragment whose bytes are there already, in parts of two.", *sent(f, 0, 1, (16, 48, True), 2, 3), ledger=form)
    other = bytes(32)
    case(f"fragments-other-copy-{v}", "A copy with other bytes: Linux keeps the first, Towpath drops the datagram.", *sent(f, 0, 1, (32, 64, True, other), 2, 3), ledger="hostile-fragments")
    for name, one in {
        "head": (16, 48, True),
        "tail": (48, 80, True),
        "around": (24, 72, True),
        "all": (0, 96, True),
    }.items():
        case(f"fragments-overlap-{name}-{v}", "A fragment that overlaps another, whatever its bytes: nothing of the datagram leaves (RFC 5722).", *sent(f, 1, one, 0, 2))
    case(f"fragments-overlap-first-{v}", "Two first fragments of different lengths.", *sent(f, 0, (0, 40, True), 1, 2, 3))
    case(f"fragments-two-ends-{v}", "Two last fragments that end differently.", *sent(f, 3, (96, 112, False), 0, 1, 2), ledger=HOSTILE[v])
    case(f"fragments-end-inside-{v}", "A last fragment that ends before bytes that are there.", *sent(f, 3, (64, 80, False), 0, 1))
    case(f"fragments-beyond-end-{v}", "Bytes beyond the end that is known.", *sent(f, 3, (128, 160, True), 0, 1, 2), ledger=HOSTILE[v])
    case(f"fragments-end-goes-on-{v}", "The last bytes once more, but with more to come.", *sent(f, 3, (96, 128, True), 0, 1, 2), ledger=form)
    case(f"fragments-empty-{v}", "An empty fragment in the middle.", *sent(f, 0, 1, (64, 64, True), 2, 3), ledger=HOSTILE[v])
    case(f"fragments-empty-last-{v}", "An empty last fragment.", *sent(f, 0, 1, 2, (96, 128, True), (128, 128, False)))
    case(f"fragments-odd-{v}", "A fragment in the middle that is no multiple of eight bytes.", *sent(f, 0, (32, 60, True), 2, 3))
    case(f"fragments-too-long-{v}", "A last fragment that ends beyond 65,535 bytes (ping of death).", *sent(f, 0, (65528, 65560, False, bytes(32)), 1))
    case(f"fragment-first-alone-{v}", "A first fragment alone waits for the others.", *sent(f, 0))
    case(f"fragments-without-first-{v}", "Every fragment but the first.", *sent(f, 1, 2, 3))
    case(f"fragments-tiny-{v}", "Fragments of eight bytes, the first with the whole UDP header.", *sent(f, *[(n, n + 8, n < 24) for n in range(0, 32, 8)], length=32), ledger=form)
    one, two = fresh(), fresh()
    first, second = (pieces(udp(f, bytes([n] * 100), sport=port, **may_fragment(f)), port, 64) for n, port in ((1, one), (2, two)))
    case(f"fragments-interleaved-{v}", "Two datagrams at a time are told apart by their identification.", *[outside(p) for pair in zip(first, second) for p in pair], ledger=form)


def translated(f, v):
    """What becomes of a datagram in pieces."""
    form = FORM[v]
    pod = f.pod(1, 10)
    long = bytes(range(256)) * 12
    size = 1480 if v == 4 else 1448

    def whole(make, payload, way, number, **more):
        return [way(p) for p in pieces(make(f, payload=payload, **more), number, size)]

    sport = fresh()
    case(
        f"fragments-both-ways-{v}",
        "3,000 bytes to a Service and back, each in fragments that fill the link.",
        *whole(udp, long, outside, sport, sport=sport, **may_fragment(f)),
        *whole(udp, long, inside, sport, src=pod, dst=f.client, sport=5353, dport=sport, **may_fragment(f)),
        ledger=form,
    )
    sport = fresh()
    from_node2 = lambda packet: inside(packet, src=NODE2_MAC)
    case(
        f"fragments-masqueraded-{v}",
        "The same, masqueraded.",
        *whole(udp, long, outside, sport, dst=f.vip(20), sport=sport, **may_fragment(f)),
        *whole(udp, long, from_node2, sport, src=f.pod(2, 20), dst=f.own_inside, sport=5353, dport=sport, **may_fragment(f)),
        ledger=form,
    )
    sport = fresh()
    case(
        f"fragments-hairpin-{v}",
        "A pod reaches itself with a datagram in fragments.",
        *whole(udp, long, inside, sport, src=pod, dst=f.cluster_ip(10), sport=sport, **may_fragment(f)),
        *whole(udp, long, inside, sport, src=pod, dst=f.own_inside, sport=5353, dport=sport, **may_fragment(f)),
        ledger=form,
    )
    sport = fresh()
    case(f"fragments-node-port-{v}", "Fragments to a NodePort.", *whole(udp, long, outside, sport, dst=f.own, dport=30053, sport=sport, **may_fragment(f)), ledger=form)
    sport = fresh()
    case(f"fragments-no-service-{v}", "Fragments to a pod's own address are routed.", *whole(udp, long, outside, sport, dst=f.pod(2, 99), sport=sport, **may_fragment(f)), ledger=form)
    sport = fresh()
    segment = tcp(f, "PA", sport=sport, ack=1, payload=long, **({"ip": {"flags": 0}} if v == 4 else {}))
    case(f"fragments-tcp-{v}", "A TCP segment in fragments.", *[outside(p) for p in pieces(segment, sport, size)], ledger=form)
    segment = tcp(f, payload=b"hidden", **({"ip": {"flags": 0}} if v == 4 else {}))
    if v == 6:
        case("tiny-tcp-fragment-6", "A first fragment that cuts the TCP header (RFC 1858).", *[outside(p) for p in pieces(segment, 0x7777, 8)])
    segment = tcp(f, payload=b"hidden", options=[("MSS", 1460), ("Timestamp", (1, 0))], **({"ip": {"flags": 0}} if v == 4 else {}))
    case(f"tiny-tcp-options-{v}", "A first fragment that cuts the TCP options.", *[outside(p) for p in pieces(segment, 0x7778, 24)], ledger="hostile-fragments")
    sport = fresh()
    bad = udp(f, bytes(range(200)), sport=sport, **may_fragment(f))
    bad[UDP].chksum = 0x1234
    case(f"fragments-bad-checksum-{v}", "The checksum of the datagram is wrong, which only the whole of it can show.", *[outside(p) for p in pieces(bad, sport, 64)], ledger="bad-l4-checksum")
    if v == 4:
        none = udp(f, bytes(range(200)), sport=fresh(), flags=0)
        none[UDP].chksum = 0
        case("fragments-no-checksum-4", "No checksum: it stays none.", *[outside(p) for p in pieces(none, 0x7779, 64)])

    # --- answers of the gateway ---
    sport = fresh()
    case(f"fragments-unknown-port-{v}", "To a port that is not served: port unreachable, about the first fragment.", *whole(udp, long, outside, sport, dport=54, sport=sport, **may_fragment(f)), ledger="fragment-form")
    sport = fresh()
    segment = tcp(f, "PA", sport=sport, dport=81, seq=77, ack=4242, payload=long, **({"ip": {"flags": 0}} if v == 4 else {}))
    case(f"fragments-unknown-port-tcp-{v}", "The same for TCP: one RST.", *[outside(p) for p in pieces(segment, sport, size)])
    segment = tcp(f, "S", sport=fresh(), dport=81, seq=77, payload=long, **({"ip": {"flags": 0}} if v == 4 else {}))
    case(f"fragments-unknown-port-syn-{v}", "A RST acknowledges every byte of the segment (RFC 9293 3.10.7.1).", *[outside(p) for p in pieces(segment, 0x777A, size)])
    sport = fresh()
    case(f"fragments-ttl-1-{v}", "TTL used up.", *whole(udp, long, outside, sport, sport=sport, ttl=1, **may_fragment(f)), ledger="fragment-form")
    echo = fresh()
    if v == 4:
        ping = f.ip(f.client, f.vip(10), flags=0) / ICMP(type=8, id=echo, seq=7) / Raw(long)
        pod_ping = f.ip(f.client, pod, flags=0) / ICMP(type=8, id=echo, seq=7) / Raw(long)
    else:
        ping = f.ip(f.client, f.vip(10)) / ICMPv6EchoRequest(id=echo, seq=7, data=long)
        pod_ping = f.ip(f.client, pod) / ICMPv6EchoRequest(id=echo, seq=7, data=long)
    case(f"fragments-ping-vip-{v}", "A large ping of an owned address is answered.", *[outside(p) for p in pieces(ping, echo, size)], ledger="fragment-form")
    case(f"fragments-ping-pod-{v}", "A large ping of a pod is routed.", *[outside(p) for p in pieces(pod_ping, echo, size)], ledger=form)

    # --- who may say what ---
    case(f"fragments-spoofed-{v}", "A pod's address from the outside, in fragments.", *[outside(p) for p in pieces(udp(f, bytes(100), src=f.pod(2, 99), **may_fragment(f)), fresh(), 64)])
    case(f"fragments-source-range-{v}", "A source outside loadBalancerSourceRanges, in fragments.", *[outside(p) for p in pieces(udp(f, bytes(100), dst=f.vip(50), **may_fragment(f)), fresh(), 64)])
    sport = fresh()
    case(
        f"fragments-remote-client-{v}",
        "A client behind a router.",
        *[outside(p, src=ROUTER_MAC) for p in pieces(udp(f, bytes(100), src=f.remote, sport=sport, **may_fragment(f)), sport, 64)],
        *[inside(p) for p in pieces(udp(f, bytes(100), src=pod, dst=f.remote, sport=5353, dport=sport, **may_fragment(f)), sport, 64)],
        ledger=form,
    )


def sized(f, v):
    """Pieces and the MTU of the way out, which to the Service at .40 is 1000 (IPv4) and 1280 (IPv6)."""
    form = FORM[v]
    to = dict(dst=f.vip(40))
    sport = fresh()
    small = 976 if v == 4 else 1232
    packet = udp(f, bytes(3000), sport=sport, **to, **may_fragment(f))
    case(f"fragments-fit-{v}", "Fragments that just fit the way out keep their sizes.", *[outside(p) for p in pieces(packet, sport, small)], ledger=form)
    sport = fresh()
    packet = udp(f, bytes(3000), sport=sport, **to, **may_fragment(f))
    case(f"fragments-small-fit-{v}", "Small fragments are not made larger.", *[outside(p) for p in pieces(packet, sport, 400)], ledger=form)
    sport = fresh()
    packet = udp(f, bytes(n % 251 for n in range(4000)), sport=sport, **to, **may_fragment(f))
    large = 1480 if v == 4 else 1448
    about = "Fragments that do not fit are cut anew." if v == 4 else "Fragments that do not fit: the MTU is told (RFC 8200 5)."
    case(f"fragments-do-not-fit-{v}", about, *[outside(p) for p in pieces(packet, sport, large)], ledger=None if v == 4 else "fragment-form")


def only_four():
    f = FOUR
    to = dict(dst=f.vip(40))
    large = dict(sport=fresh(), payload=bytes(n % 251 for n in range(4000)), **to)
    packet = udp(f, **large, flags=0)
    case("fragments-do-not-fit-df-4", "Fragments that do not fit and may not be cut (RFC 1191): the MTU is told.", *[outside(p) for p in with_df(packet, 0x7801, 1480)], ledger="fragment-form")
    packet = udp(f, bytes(600), sport=fresh(), flags=0, **to)
    case("fragments-df-4", "Fragments that may not be cut further, and fit.", *[outside(p) for p in with_df(packet, 0x7802, 400)], ledger="fragment-form")
    for length in (980, 981, 1480):
        about = f"{length} bytes behind the IP header, where 980 fit."
        case(f"cut-{length}-4", about, outside(udp(f, bytes(n % 251 for n in range(length - 8)), flags=0, **to)))
    case("cut-tcp-4", "A TCP segment that may be cut.", outside(tcp(f, "PA", ack=1, payload=bytes(1400), ip={"flags": 0}, **to)))
    case("cut-no-checksum-4", "No checksum: it stays none.", outside(no_checksum(udp(f, bytes(1400), flags=0, **to))))
    options = [IPOption(b"\x1e\x04\x01\x02"), IPOption(b"\x94\x04\x00\x00")]
    case("cut-options-4", "Options: those without the copied flag are in the first fragment only (RFC 791 3.1).", outside(udp(f, bytes(1400), flags=0, options=options, **to)))
    sport = fresh()
    case(
        "cut-reply-4",
        "A large answer of a pod, on a way back that takes it.",
        outside(udp(f, sport=sport, **to)),
        inside(udp(f, bytes(1472), src=f.pod(3, 40), dst=f.client, sport=5353, dport=sport, flags=0), src="02:00:00:00:01:13"),
    )
    case("cut-unknown-pod-4", "To a pod's own address, too large for the way there.", outside(udp(f, bytes(1400), dst=f.pod(3, 99), flags=0)))
    packet = udp(f, bytes(200), sport=fresh(), flags=0)
    first, second, third = pieces(packet, 0x7803, 80)
    first.tos, second.tos, third.tos = 2, 3, 2
    case("fragments-ecn-4", "Congestion met by one fragment counts for all (RFC 3168 5.3).", outside(first), outside(second), outside(third), ledger="fragment-form")
    packet = udp(f, bytes(200), sport=fresh(), flags=0)
    first, second, third = pieces(packet, 0x7804, 80)
    second.ttl, third.ttl = 1, 33
    case("fragments-ttl-differ-4", "The TTL of the first fragment counts.", outside(first), outside(second), outside(third))
    packet = udp(f, bytes(200), sport=fresh(), flags=0, options=[IPOption(b"\x1e\x04\x01\x02")])
    case("fragments-options-4", "Options in every fragment.", *[outside(p) for p in pieces(packet, 0x7805, 80)], ledger="fragment-form")


def with_df(packet, number, size):
    """Fragments that may not be cut further."""
    cut = pieces(packet, number, size)
    for one in cut:
        one.flags = int(one.flags) | 2
    return cut


def no_checksum(packet):
    packet[UDP].chksum = 0
    return packet


def only_six():
    f = SIX
    number = fresh()
    inner = bytes(IPv6(src=f.client, dst=f.vip(10)) / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]) / UDP(sport=number, dport=53) / Raw(bytes(range(200))))[40:]
    start = lambda offset, more: IPv6(src=f.client, dst=f.vip(10)) / IPv6ExtHdrFragment(nh=60, offset=offset // 8, m=more, id=number)
    case(
        "fragments-destination-options-6",
        "Destination options inside the first fragment.",
        outside(start(0, 1) / Raw(inner[:96])),
        outside(start(96, 1) / Raw(inner[96:192])),
        outside(start(192, 0) / Raw(inner[192:])),
        ledger="fragment-form",
    )


def all_cases():
    # Ports of their own, so that a case that is added before them does not change them all.
    port_counter[0] = 63000
    for f, v in ((FOUR, 4), (SIX, 6)):
        arriving(f, v)
        translated(f, v)
        sized(f, v)
    only_four()
    only_six()
