"""How soon a change is in force, while packets flow: Towpath, and rules like kube-proxy's changed as kube-proxy changes them."""

import dataclasses
import json
import statistics
import subprocess

import objects
import systems
from network import Failure, Rig

SERVICES = 10_000
# Packets a second, each a new flow, to the Service that changes.
RATE = 50_000
# Flows that the table has room for: those of as long as a measurement takes.
ROOM = 1 << 22
# Connections to towpathd that change Services at once.
CONNECTIONS = 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of change to measure: of whom, and how often."""

    system: str
    what: str
    count: int
    # Services that are there before.
    services: int = SERVICES

    def name(self):
        """What it is called in tables and records."""
        return f"{self.system}: {self.what}"


KINDS = (
    Kind("towpath", "one endpoint list", 500),
    Kind("nftables", "one endpoint list", 20),
    Kind("iptables", "one endpoint list", 20),
    Kind("towpath", "lists of eight Services at once", 500),
    Kind("towpath", "everything, cold", 1, services=1),
    Kind("towpath", "everything", 4),
)


def wanted(turn):
    """The kinds of change of a round. Rules for thousands of Services take so long to load that they have theirs once."""
    return [kind for kind in KINDS if kind.system == "towpath" or turn == 1]


def measure(kind, binaries):
    """The report of towpath-perf about a kind of change."""
    system = systems.find(kind.system, binaries)
    case = systems.Case(services=kind.services, new_flows=None, room=ROOM)
    with Rig() as rig:
        system.start(rig, case)
        command = [
            binaries / "towpath-perf", "updates", "--name", kind.name(), "--count", kind.count, "--rate", RATE,
            "--tx-if", f"{rig.namespace('cli')}/v0", "--rx-if", f"{rig.namespace('be')}/v1", "--via", rig.mac("gw", "g0"),
            "--cpu", 0, "--src", "10.1.1.0-10.1.1.255", "--dst", f"{objects.VIPS[4]}:{objects.PORT}", *_taker(kind, rig),
        ]
        for number, changes in enumerate(_changes(kind)):
            path = rig.folder / f"changes-{number}.json"
            path.write_text(json.dumps(changes))
            command += ["--changes", path]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2):
            raise Failure(f"{kind.name()}: towpath-perf: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        return {**report, "system": kind.system, "what": kind.what}


def _taker(kind, rig):
    inside = f"nsenter --net=/run/netns/{rig.namespace('gw')}"
    return {
        "towpath": ("--socket", rig.folder / "control.sock"),
        "nftables": ("--spawn", f"{inside} nft -f -"),
        "iptables": ("--spawn", f"{inside} iptables-legacy-restore --noflush"),
    }[kind.system]


def _changes(kind):
    """For each connection the changes that take turns."""
    if kind.what.startswith("everything"):
        return [[{"text": _transaction(_state(only)), "endpoint": _elsewhere(0)[only]} for only in (0, 1)]]
    services = range(1, CONNECTIONS + 1) if "at once" in kind.what else (0,)
    text = {"towpath": _slice_text, "nftables": _nft_text, "iptables": _iptables_text}[kind.system]
    return [
        [{"text": text(service, only), "endpoint": objects.endpoints(service, 4)[only]} for only in (0, 1)] for service in services
    ]


def _items(services):
    """The objects of IPv4, parsed."""
    return [item for item in json.loads(objects.manifest(services))["items"] if item.get("addressType") != "IPv6"]


def _elsewhere(service):
    """Addresses that no endpoint has at first."""
    return objects.endpoints(service + SERVICES, 4)


def _state(only):
    """All objects; the measured Service has one endpoint, where it had none before."""
    items = _items(SERVICES)
    for item in items:
        if item["kind"] == "EndpointSlice" and item["metadata"]["name"] == "web-0-4":
            item["endpoints"] = [{**item["endpoints"][0], "addresses": [_elsewhere(0)[only]]}]
    return items


def _transaction(items):
    lines = [{"begin": {}}, *({"apply": {"object": item}} for item in items), "commit"]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def _slice_text(service, only):
    """The measured Service gets one endpoint; of others all ten change their addresses."""
    (wanted,) = [item for item in objects.of_service(service) if item.get("addressType") == "IPv4"]
    if service == 0:
        wanted["endpoints"] = [wanted["endpoints"][only]]
    elif only == 1:
        for endpoint, addr in zip(wanted["endpoints"], _elsewhere(service)):
            endpoint["addresses"] = [addr]
    return _transaction([wanted])


def _nft_text(service, only):
    chain = f"svc-{service}-udp"
    return f"flush chain ip kube {chain}\nadd rule ip kube {chain} numgen random mod 1 vmap {{ 0 : goto ep-{service}-udp-{only} }}\n"


def _iptables_text(service, only):
    chain = f"KUBE-SVC-{service}-udp"
    return f"*nat\n:{chain} - [0:0]\n-A {chain} -j KUBE-SEP-{service}-udp-{only}\nCOMMIT\n"


def line(report):
    """What a report says, in short."""
    if report["in_force_us"] is None:
        return f"{report['name']:44} {report['changes'] / report['seconds']:,.0f} a second"
    middle, longest = report["in_force_us"]["p50"], report["in_force_us"]["max"]
    return f"{report['name']:44} in force after {middle / 1e3:,.3f} ms, longest {longest / 1e3:,.3f} ms"


def _time(us):
    return f"{us:,.0f} us" if us < 1e4 else f"{us / 1e3:,.0f} ms" if us < 1e7 else f"{us / 1e6:,.1f} s"


def table(reports):
    """A row for each kind of change, medians over the rounds."""
    head = ("change", "in force: p50", "p99", "longest", "after the last byte", "changes a second", "packets lost")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    for kind in KINDS:
        rounds = [report for report in reports if report["name"] == kind.name()]
        if not rounds:
            continue

        def middle(part, key, rounds=rounds):
            return "" if rounds[0][part] is None else _time(statistics.median(report[part][key] for report in rounds))

        rate = statistics.median(report["changes"] / report["seconds"] for report in rounds)
        lost = statistics.median(report["sent"] - report["received"] for report in rounds)
        cells = (
            kind.name(), *(middle("in_force_us", key) for key in ("p50", "p99", "max")), middle("in_force_after_last_byte_us", "p50"),
            f"{rate:,.0f}" if "at once" in kind.what else "", "" if "cold" in kind.what else f"{lost:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
