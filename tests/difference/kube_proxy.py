#!/usr/bin/python3
"""Says to Linux what kube-proxy would say: reads a v1 List of objects, writes nftables rules.

    kube_proxy.py NODE ZONE OBJECTS.json >RULES.nft

Written from what kube-proxy's nftables mode does (pkg/proxy/nftables/proxier.go and README.md, pkg/proxy/topology.go,
pkg/proxy/endpointslicecache.go), on its own and in another language than Towpath's compiler, so that an error in one is not
repeated in the other. NODE: the node that the rules are for; ZONE: its topology.kubernetes.io/zone, may be empty.

One thing differs on purpose: endpoints are taken in turn (`numgen inc`) instead of at random, so that as many packets as there
are endpoints show the whole list.
"""

import ipaddress
import json
import sys

CLUSTER = {4: "10.244.0.0/16", 6: "fd00:244::/32"}
SERVICES = {4: "10.96.0.0/16", 6: "fd00:96::/112"}
MASQUERADE_PORTS = "61000-65535"
NAME, PROXY, HEADLESS = "kubernetes.io/service-name", "service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"


def family(address):
    return ipaddress.ip_address(address).version


def word(version):
    return "ip" if version == 4 else "ip6"


def at(address, port):
    return f"{address}:{port}" if family(address) == 4 else f"[{address}]:{port}"


def should_skip(service):
    spec, labels = service["spec"], service["metadata"].get("labels", {})
    return (
        spec.get("type") == "ExternalName"
        or spec.get("clusterIP", "") in ("", "None")
        or PROXY in labels
        or HEADLESS in labels
    )


# --- endpoints -------------------------------------------------------------------------------------------------------


def endpoints_of(service, port, version, slices, node):
    """The merged endpoints of one port in one family; local wins over a duplicate that is not (endpointslicecache.go)."""
    merged = {}
    for piece in slices:
        meta = piece["metadata"]
        if meta["namespace"] != service["metadata"]["namespace"] or meta.get("labels", {}).get(NAME) != service["metadata"]["name"]:
            continue
        if piece["addressType"] != f"IPv{version}":
            continue
        for entry in piece.get("ports") or []:
            if entry.get("name") is None or not entry.get("port"):
                continue
            if entry["name"] != port.get("name", "") or entry.get("protocol", "TCP") != port.get("protocol", "TCP"):
                continue
            for endpoint in piece.get("endpoints") or []:
                conditions = endpoint.get("conditions") or {}
                ready = conditions.get("ready")
                serving = conditions.get("serving")
                hints = endpoint.get("hints") or {}
                key = (endpoint["addresses"][0], entry["port"])
                found = {
                    "key": key,
                    "ready": ready is None or ready,
                    "serving": serving is None or serving,
                    "terminating": bool(conditions.get("terminating")),
                    "local": endpoint.get("nodeName") == node,
                    "zones": [zone["name"] for zone in hints.get("forZones") or []],
                    "nodes": [one["name"] for one in hints.get("forNodes") or []],
                }
                if key not in merged or found["local"]:
                    merged[key] = found
    return [merged[key] for key in sorted(merged)]


def categorize(endpoints, node, zone):
    """Cluster list, local list, whether there is anything anywhere (topology.go, CategorizeEndpoints)."""
    ready = [one for one in endpoints if one["ready"]]
    last = [one for one in endpoints if not one["ready"] and one["serving"] and one["terminating"]]
    near = ready
    if ready and all(one["nodes"] for one in ready) and any(node in one["nodes"] for one in ready):
        near = [one for one in ready if node in one["nodes"]]
    elif ready and zone and all(one["zones"] for one in ready) and any(zone in one["zones"] for one in ready):
        near = [one for one in ready if zone in one["zones"]]
    cluster = near or [one for one in endpoints if one["serving"] and one["terminating"]]
    local = [one for one in ready if one["local"]] or [one for one in last if one["local"]]
    return [one["key"] for one in cluster], [one["key"] for one in local], bool(ready or last)


# --- rules -----------------------------------------------------------------------------------------------------------


class Rules:
    def __init__(self):
        self.chains = []
        self.service_ips = []  # (address, protocol, port, chain)
        self.node_ports = []  # (version, protocol, port, chain)
        self.no_endpoints = []  # (address, protocol, port, verdict)
        self.no_endpoint_node_ports = []  # (version, protocol, port, verdict)
        self.firewall = []  # (address, protocol, port, chain)
        self.cluster_ips = []
        self.count = 0

    def chain(self, *lines):
        self.count += 1
        name = f"c{self.count}"
        self.chains.append(f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}\n")
        return name

    def endpoints(self, version, protocol, keys):
        """A chain that translates to one of the endpoints in turn."""
        turns = []
        for address, port in keys:
            # A client that is its own endpoint must be masqueraded, or it would answer itself directly.
            hairpin = f"{word(version)} saddr {address} meta mark set meta mark or 0x4000"
            turns.append(self.chain(hairpin, f"meta l4proto {protocol} dnat {word(version)} to {at(address, port)}"))
        arms = ", ".join(f"{i} : goto {name}" for i, name in enumerate(turns))
        return self.chain(f"numgen inc mod {len(turns)} vmap {{ {arms} }}")

    def service(self, service, slices, node, zone, node_ips):
        spec, status = service["spec"], service.get("status") or {}
        cluster_ips = spec.get("clusterIPs") or [spec["clusterIP"]]
        external = spec.get("type") in ("NodePort", "LoadBalancer")
        external_local = external and spec.get("externalTrafficPolicy") == "Local"
        internal_local = spec.get("internalTrafficPolicy") == "Local"
        ingress = (status.get("loadBalancer") or {}).get("ingress") or []
        balancers = [one["ip"] for one in ingress if one.get("ip") and one.get("ipMode", "VIP") != "Proxy"]
        if spec.get("type") != "LoadBalancer":
            balancers = []
        for cluster_ip in cluster_ips:
            version = family(cluster_ip)
            self.cluster_ips.append(cluster_ip)
            for port in spec["ports"]:
                protocol, number = port.get("protocol", "TCP").lower(), port["port"]
                found = endpoints_of(service, port, version, slices, node)
                cluster, local, anywhere = categorize(found, node, zone)
                cluster_chain = self.endpoints(version, protocol, cluster) if cluster else None
                local_chain = self.endpoints(version, protocol, local) if local else None
                # Internal traffic.
                inner = local_chain if internal_local else cluster_chain
                if inner:
                    masquerade = f"{word(version)} saddr != {CLUSTER[version]} meta mark set meta mark or 0x4000"
                    self.service_ips.append((cluster_ip, protocol, number, self.chain(masquerade, f"goto {inner}")))
                else:
                    self.no_endpoints.append((cluster_ip, protocol, number, "drop" if anywhere else "reject"))
                # External traffic.
                addresses = [ip for ip in balancers + (spec.get("externalIPs") or []) if family(ip) == version]
                node_port = port.get("nodePort") if external else None
                if not addresses and not node_port:
                    continue
                outer = self.external(version, external_local, cluster_chain, local_chain) if anywhere else None
                verdict = None
                if not anywhere:
                    verdict = "reject"
                elif not (local if external_local else cluster):
                    verdict = "drop"
                for address in addresses:
                    if outer:
                        self.service_ips.append((address, protocol, number, outer))
                    if verdict:
                        self.no_endpoints.append((address, protocol, number, verdict))
                if node_port:
                    if outer:
                        self.node_ports.append((version, protocol, node_port, outer))
                    if verdict:
                        self.no_endpoint_node_ports.append((version, protocol, node_port, verdict))
                ranges = [text.strip() for text in spec.get("loadBalancerSourceRanges") or []]
                ranges = [net for net in ranges if ipaddress.ip_network(net, strict=False).version == version]
                if spec.get("loadBalancerSourceRanges") and spec.get("type") == "LoadBalancer":
                    for address in balancers:
                        if family(address) == version and ranges:
                            allowed = list(ranges)
                            if any(ipaddress.ip_address(ip) in ipaddress.ip_network(net, strict=False) for ip in node_ips if family(ip) == version for net in ranges):
                                allowed.append(address)
                            lines = [f"{word(version)} saddr {net} return" for net in allowed]
                            self.firewall.append((address, protocol, number, self.chain(*lines, "drop")))

    def external(self, version, external_local, cluster_chain, local_chain):
        """The chain of what comes from outside the cluster's own addresses."""
        if not external_local:
            return self.chain("meta mark set meta mark or 0x4000", *([f"goto {cluster_chain}"] if cluster_chain else []))
        lines = []
        if cluster_chain:
            # Pods, and the node itself, go to the Cluster list, as if out and in again.
            lines.append(f"{word(version)} saddr {CLUSTER[version]} goto {cluster_chain}")
            lines.append("fib saddr type local meta mark set meta mark or 0x4000")
            lines.append(f"fib saddr type local goto {cluster_chain}")
        if local_chain:
            lines.append(f"goto {local_chain}")
        return self.chain(*lines)

    def map_of(self, name, rows, target):
        """Maps by family: address, protocol and port to a verdict."""
        text = ""
        for version in (4, 6):
            elements = [
                f"{address} . {protocol} . {port} : {target(verdict)}"
                for address, protocol, port, verdict in rows
                if family(address) == version
            ]
            body = f"\t\telements = {{ {', '.join(elements)} }}\n" if elements else ""
            text += f"\tmap {name}{version} {{\n\t\ttype ipv{version}_addr . inet_proto . inet_service : verdict\n{body}\t}}\n"
        return text

    def write(self, node_ips):
        out = ["table inet kube-proxy {\n"]
        out += ["\tchain rejects {\n\t\tmeta l4proto tcp reject with tcp reset\n\t\treject\n\t}\n"]
        out += self.chains
        out.append(self.map_of("service-ips", self.service_ips, lambda chain: f"goto {chain}"))
        out.append(self.map_of("no-endpoints", self.no_endpoints, lambda v: "goto rejects" if v == "reject" else "drop"))
        out.append(self.map_of("firewall", self.firewall, lambda chain: f"goto {chain}"))
        for version in (4, 6):
            ips = [ip for ip in node_ips if family(ip) == version]
            for name, rows in (("nodeports", self.node_ports), ("no-endpoint-nodeports", self.no_endpoint_node_ports)):
                target = {"reject": "goto rejects", "drop": "drop"}
                elements = [f"{proto} . {port} : {target.get(v, f'goto {v}')}" for one, proto, port, v in rows if one == version]
                body = f"\t\telements = {{ {', '.join(elements)} }}\n" if elements else ""
                out.append(f"\tmap {name}{version} {{\n\t\ttype inet_proto . inet_service : verdict\n{body}\t}}\n")
            cluster_ips = [ip for ip in self.cluster_ips if family(ip) == version]
            for name, members in (("cluster-ips", cluster_ips), ("nodeport-ips", ips)):
                body = f"\t\telements = {{ {', '.join(members)} }}\n" if members else ""
                out.append(f"\tset {name}{version} {{\n\t\ttype ipv{version}_addr\n{body}\t}}\n")
        per_family = lambda rule: "".join("\t\t" + rule.format(ip=word(v), v=v, services=SERVICES[v]) + "\n" for v in (4, 6))
        th = "{ip} daddr . meta l4proto . th dport vmap @%s{v}"
        node = "{ip} daddr @nodeport-ips{v} meta l4proto . th dport vmap @%s{v}"
        out.append("\tchain services {\n" + per_family(th % "service-ips") + per_family(node % "nodeports") + "\t}\n")
        out.append("\tchain endpoint-check {\n" + per_family(th % "no-endpoints") + per_family(node % "no-endpoint-nodeports") + "\t}\n")
        out.append(
            "\tchain cluster-ips-check {\n"
            + per_family("{ip} daddr @cluster-ips{v} goto rejects")
            + per_family("{ip} daddr {services} drop")
            + "\t}\n"
        )
        out.append(
            "\tchain pre-dnat {\n\t\ttype filter hook prerouting priority dstnat - 10; policy accept;\n"
            + "".join("\t\tct state new" + " " + rule.strip() + "\n" for rule in per_family(th % "firewall").splitlines())
            + "\t}\n"
        )
        out.append("\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\t\tjump services\n\t}\n")
        for hook in ("input", "forward"):
            check = "\t\tct state new jump cluster-ips-check\n" if hook == "forward" else ""
            out.append(
                f"\tchain {hook} {{\n\t\ttype filter hook {hook} priority filter; policy accept;\n"
                f"\t\tct state new jump endpoint-check\n{check}\t}}\n"
            )
        out.append(
            "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
            f"\t\tmeta mark and 0x4000 != 0 meta l4proto {{ tcp, udp }} masquerade to :{MASQUERADE_PORTS}\n\t}}\n"
        )
        out.append("}\n")
        return "".join(out)


def main():
    node, zone, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        items = json.load(file)["items"]
    slices = [item for item in items if item["kind"] == "EndpointSlice"]
    own = [item for item in items if item["kind"] == "Node" and item["metadata"]["name"] == node]
    node_ips = [one["address"] for item in own for one in item["status"]["addresses"] if one["type"] == "InternalIP"]
    rules = Rules()
    for item in items:
        if item["kind"] == "Service" and not should_skip(item):
            rules.service(item, slices, node, zone, node_ips)
    print(rules.write(node_ips))


if __name__ == "__main__":
    main()
