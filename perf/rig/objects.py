"""The same Services for every forwarder: Service 0 is the one that is measured, the others are there.

Each has ten endpoints in the pod range and one UDP port, 80. Service 0 has the same port for TCP too, and a LoadBalancer
address besides its ClusterIP with externalTrafficPolicy Local, so that nothing is masqueraded.
"""

import ipaddress
import itertools
import json

ENDPOINTS = 10
PORT = 80
TARGET_PORT = 8080
VIPS = {4: "203.0.113.10", 6: "2001:db8::10"}
_CLUSTER = {4: ipaddress.ip_address("10.96.0.10"), 6: ipaddress.ip_address("fd00:96::10")}
_PODS = {4: ipaddress.ip_address("10.128.0.1"), 6: ipaddress.ip_address("fd00:244::1")}


def cluster_ip(service, family):
    return str(_CLUSTER[family] + service)


def endpoints(service, family):
    first = _PODS[family] + service * ENDPOINTS
    return [str(first + index) for index in range(ENDPOINTS)]


def addresses(service, family):
    """Every address that the Service is reached at."""
    return [VIPS[family], cluster_ip(service, family)] if service == 0 else [cluster_ip(service, family)]


def _protocols(service):
    return ("udp", "tcp") if service == 0 else ("udp",)


def manifest(services):
    """Kubernetes objects as JSON, a List."""
    node = {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"},
        "spec": {"podCIDRs": ["10.128.0.0/12", "fd00:244::/48"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.2.0.2"}, {"type": "InternalIP", "address": "fd00:2::2"}]},
    }
    items = [node, *itertools.chain.from_iterable(of_service(index) for index in range(services))]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def of_service(index):
    """A Service and its EndpointSlices."""
    name = f"web-{index}"
    spec = {
        "clusterIP": cluster_ip(index, 4), "clusterIPs": [cluster_ip(index, 4), cluster_ip(index, 6)],
        "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
        "ports": [
            {"name": protocol, "protocol": protocol.upper(), "port": PORT, "targetPort": TARGET_PORT}
            for protocol in _protocols(index)
        ],
    }
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "perf"}, "spec": spec}
    if index == 0:
        spec.update(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32000)
        for port in spec["ports"]:
            port["nodePort"] = 30080
        service["status"] = {"loadBalancer": {"ingress": [{"ip": VIPS[4]}, {"ip": VIPS[6]}]}}
    yield service
    for family in (4, 6):
        ready = {"ready": True, "serving": True, "terminating": False}
        yield {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": f"{name}-{family}", "namespace": "perf", "labels": {"kubernetes.io/service-name": name}},
            "addressType": f"IPv{family}",
            "ports": [{"name": protocol, "protocol": protocol.upper(), "port": TARGET_PORT} for protocol in _protocols(index)],
            "endpoints": [
                {"addresses": [addr], "nodeName": "node-1", "conditions": ready} for addr in endpoints(index, family)
            ],
        }


def nftables(services, family):
    """The rules of kube-proxy's nftables mode for them, for `nft -f`: one map of all addresses, a chain for each Service and
    endpoint."""
    table, addr, saddr = ("ip", "ipv4_addr", "ip saddr") if family == 4 else ("ip6", "ipv6_addr", "ip6 saddr")
    daddr = saddr.replace("saddr", "daddr")
    lines = [f"table {table} kube {{"]
    ports = [(index, protocol) for index in range(services) for protocol in _protocols(index)]
    elements = [
        f"{vip} . {protocol} . {PORT} : goto svc-{index}-{protocol}" for index, protocol in ports for vip in addresses(index, family)
    ]
    lines.append(f" map services {{ type {addr} . inet_proto . inet_service : verdict; elements = {{ {', '.join(elements)} }} }}")
    for index, protocol in ports:
        for at, endpoint in enumerate(endpoints(index, family)):
            target = f"{endpoint}:{TARGET_PORT}" if family == 4 else f"[{endpoint}]:{TARGET_PORT}"
            lines.append(
                f" chain ep-{index}-{protocol}-{at} {{ {saddr} {endpoint} meta mark set meta mark or 0x4000\n"
                f"  meta l4proto {protocol} dnat to {target}\n }}"
            )
        choice = ", ".join(f"{at} : goto ep-{index}-{protocol}-{at}" for at in range(ENDPOINTS))
        lines.append(f" chain svc-{index}-{protocol} {{ numgen random mod {ENDPOINTS} vmap {{ {choice} }}\n }}")
    lines.append(
        f" chain prerouting {{ type nat hook prerouting priority dstnat\n"
        f"  {daddr} . meta l4proto . th dport vmap @services\n }}\n"
        f" chain postrouting {{ type nat hook postrouting priority srcnat\n  meta mark and 0x4000 != 0 masquerade\n }}\n}}"
    )
    return "\n".join(lines) + "\n"


def iptables(services, family):
    """The rules of kube-proxy's iptables mode for them, for `iptables-restore`: one list of all addresses, a chain for each
    Service and endpoint."""
    chains, rules = [":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]", ":KUBE-POSTROUTING - [0:0]"], []
    rules += [
        "-A PREROUTING -j KUBE-SERVICES", "-A POSTROUTING -j KUBE-POSTROUTING",
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN", "-A KUBE-POSTROUTING -j MASQUERADE",
    ]
    # A Service may be anywhere in the list: the measured one is in the middle.
    half = services // 2 + 1
    for index in (*range(1, half), 0, *range(half, services)):
        for protocol in _protocols(index):
            name = f"{index}-{protocol}"
            chains.append(f":KUBE-SVC-{name} - [0:0]")
            for vip in addresses(index, family):
                rules.append(f"-A KUBE-SERVICES -d {vip} -p {protocol} -m {protocol} --dport {PORT} -j KUBE-SVC-{name}")
            for at, endpoint in enumerate(endpoints(index, family)):
                chains.append(f":KUBE-SEP-{name}-{at} - [0:0]")
                share = f" -m statistic --mode random --probability {1 / (ENDPOINTS - at):.10f}" if at < ENDPOINTS - 1 else ""
                rules.append(f"-A KUBE-SVC-{name}{share} -j KUBE-SEP-{name}-{at}")
                rules.append(f"-A KUBE-SEP-{name}-{at} -s {endpoint} -j KUBE-MARK-MASQ")
                target = f"{endpoint}:{TARGET_PORT}" if family == 4 else f"[{endpoint}]:{TARGET_PORT}"
                rules.append(f"-A KUBE-SEP-{name}-{at} -p {protocol} -m {protocol} -j DNAT --to-destination {target}")
    return "\n".join(["*nat", *chains, *rules, "COMMIT"]) + "\n"
