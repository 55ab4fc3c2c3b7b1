"""A campaign: many scenarios in turns, and what their figures come to."""

import dataclasses
import math
import statistics
from collections.abc import Callable

from measure import LATENCY_RATE

# Rounds that a goal needs, and those of scenarios that carry no goal.
PAIRS, SELDOM_PAIRS = 15, 5


def _each(load, *systems):
    return [f"{system}/{load}" for system in systems]


QUICK = [
    *_each("base", "towpath", "bypass", "redirect", "veth", "testpmd", "ovs", "kernel", "nftables", "iptables"),
    *_each("new", "towpath", "ovs", "nftables", "iptables"),
    *_each("1k-services", "towpath", "nftables", "iptables"),
    *_each("1k-services-new", "towpath", "nftables", "iptables"),
    *_each("200k-flows", "towpath", "nftables"),
    *_each("v6", "towpath", "nftables"),
    *_each("replies", "towpath", "ovs", "nftables"),
    *_each("tcp-connect", "towpath", "ovs", "nftables", "iptables"),
    *_each("tcp-bulk", "towpath", "nftables"),
    "towpath/two-queues",
    "towpath-adaptive/idle",
]
# In every round: what goals are about.
OFTEN = [
    *_each("base", "towpath", "bypass", "veth", "testpmd", "ovs", "nftables"),
    *_each("new", "towpath", "ovs", "nftables", "iptables"),
    *_each("10k-services", "towpath", "nftables", "iptables"),
    *_each("10k-services-new", "towpath", "nftables", "iptables"),
    "towpath-adaptive/idle",
]
# In every third.
SELDOM = [
    *_each("base", "redirect", "macswap", "kernel", "iptables"),
    *_each("1k-services", "towpath", "nftables", "iptables"),
    *_each("1k-services-new", "towpath", "nftables", "iptables"),
    *_each("1-flow", "towpath", "ovs", "nftables"),
    *_each("100k-flows", "towpath", "ovs", "nftables"),
    *_each("200k-flows", "towpath", "ovs", "nftables"),
    *_each("churn", "towpath", "bypass", "ovs", "nftables", "iptables"),
    *_each("512", "towpath", "testpmd", "nftables"),
    *_each("1500", "towpath", "bypass", "testpmd", "ovs", "nftables"),
    *_each("v6", "towpath", "bypass", "nftables", "iptables"),
    *_each("v6-new", "towpath", "nftables", "iptables"),
    *_each("replies", "towpath", "testpmd", "ovs", "kernel", "nftables", "iptables"),
    *_each("tcp-connect", "towpath", "testpmd", "ovs", "kernel", "nftables", "iptables"),
    *_each("tcp-bulk", "towpath", "testpmd", "ovs", "kernel", "nftables"),
    *_each("two-queues", "towpath", "bypass"),
    "towpath/idle",
    "towpath/memory",
]

RATE, PER_CPU = "packets a second", "packets per busy CPU-second"
CONNECTIONS, CONNECTIONS_PER_CPU = "TCP connections a second", "TCP connections per busy CPU-second"
STREAM = "Gbit/s in one TCP stream"

# Each figure: of which kind of report, how it is read, and whether more is better.
FIGURES = {
    RATE: ("overload", lambda report: report["rate_received"], True),
    PER_CPU: ("overload", lambda report: report["received"] / report["busy_cpu_s"], True),
    CONNECTIONS: ("connect", lambda report: report["connections_per_s"], True),
    CONNECTIONS_PER_CPU: ("connect", lambda report: report["connections"] / report["busy_cpu_s"], True),
    "time of a TCP connection, p50, us": ("connect", lambda report: report["latency"]["p50_us"], False),
    "time of a TCP connection, p99, us": ("connect", lambda report: report["latency"]["p99_us"], False),
    STREAM: ("bulk", lambda report: report["gbit_per_s"], True),
    "latency, p50, us": ("latency", lambda report: report["latency"]["p50_us"], False),
    "latency, p99, us": ("latency", lambda report: report["latency"]["p99_us"], False),
    "latency, p99.99, us": ("latency", lambda report: report["latency"]["p9999_us"], False),
    "CPU without traffic, %": ("idle", lambda report: 100 * report["cpu_share"], False),
    "slowest of 50 single packets, us": ("idle", lambda report: report["latency"]["max_us"], False),
    "in force, p50, us": ("update", lambda report: report["in_force_us"]["p50"], False),
    "in force, p99, us": ("update", lambda report: report["in_force_us"]["p99"], False),
    "in force after the last byte, us": ("update", lambda report: report["in_force_after_last_byte_us"]["p50"], False),
    "endpoint changes a second": ("update", lambda report: 10 * report["changes"] / report["seconds"], True),
    "memory, MB": ("memory", lambda report: (report["memory_bytes"] - report["packet_memory_bytes"]) / 1e6, False),
}


def values(reports, scenario, name):
    """A figure of a scenario, by round."""
    kind, read, _ = FIGURES[name]
    return {report["round"]: read(report) for report in reports if report["scenario"] == scenario and report["kind"] == kind}


def median(reports, scenario, name):
    """The median of a figure over the rounds; None: not measured."""
    found = values(reports, scenario, name)
    return statistics.median(found.values()) if found else None


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached. Met only if that end of the 95 % interval meets it which is the worse one."""

    what: str
    figure: str
    scenario: str
    limit: float
    # Measured beside this scenario, if any.
    beside: str | None = None
    # How both are put together.
    joined: Callable[[float, float], float] | None = None
    # Ratios multiply: their mean and interval are taken over the logarithms.
    is_ratio: bool = False
    # The limit is the least that is to be reached, not the most that is allowed.
    is_least: bool = False
    pairs: int = PAIRS

    def measured(self, reports):
        """Mean over the rounds, its 95 % interval after Student's t, and the number of rounds. None: not measured."""
        ours = values(reports, self.scenario, self.figure)
        if self.beside:
            theirs = values(reports, self.beside, self.figure)
            found = [self.joined(ours[turn], theirs[turn]) for turn in sorted(ours.keys() & theirs.keys()) if theirs[turn] > 0]
        else:
            found = list(ours.values())
        if self.is_ratio:
            found = [math.log(value) for value in found if value > 0]
        if not found:
            return None
        middle = statistics.fmean(found)
        spread = _student(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf
        back = math.exp if self.is_ratio else float
        return back(middle), back(middle - spread), back(middle + spread), len(found)

    def is_met(self, low, high):
        """True if the whole interval meets it."""
        return low >= self.limit if self.is_least else high <= self.limit


def _ratio(what, figure, scenario, beside, least):
    return Goal(what, figure, scenario, least, beside, lambda our, their: our / their, is_ratio=True, is_least=True)


def _beyond_veth(percentile, most):
    return Goal(f"latency beyond that of a bare veth pair, {percentile}, us", f"latency, {percentile}, us", "towpath/base", most,
                "veth/base", lambda our, their: our - their)


GOALS = (
    _ratio("as fast as its own rings without a pipeline, within 3 %", PER_CPU, "towpath/base", "bypass/base", 0.97),
    _ratio("as DPDK testpmd, which only forwards", RATE, "towpath/base", "testpmd/base", 1.0),
    _ratio("as Open vSwitch's connection tracking and DNAT", RATE, "towpath/base", "ovs/base", 1.4),
    _ratio("every packet a new flow: as Open vSwitch", RATE, "towpath/new", "ovs/new", 3.0),
    _ratio("the same with 10,000 Services: as nftables rules", RATE, "towpath/10k-services-new", "nftables/10k-services-new", 2.0),
    _ratio("the same with 10,000 Services: as iptables rules", RATE, "towpath/10k-services-new", "iptables/10k-services-new", 30.0),
    _beyond_veth("p50", 10),
    _beyond_veth("p99", 25),
    _beyond_veth("p99.99", 250),
    Goal("idle with adaptive polling: CPU, %", "CPU without traffic, %", "towpath-adaptive/idle", 3),
    Goal("idle with adaptive polling: slowest of 50 single packets, us", "slowest of 50 single packets, us", "towpath-adaptive/idle", 1000),
    Goal("one endpoint list changed among 10,000, p50, us", "in force, p50, us", "towpath: one endpoint list", 100, pairs=SELDOM_PAIRS),
    Goal("the same, p99, us", "in force, p99, us", "towpath: one endpoint list", 1000, pairs=SELDOM_PAIRS),
    Goal("endpoint changes a second, by eight clients", "endpoint changes a second", "towpath: lists of eight Services at once", 50_000,
         is_least=True, pairs=SELDOM_PAIRS),
    Goal("10,000 Services with 100,000 endpoints loaded at once, us", "in force after the last byte, us", "towpath: everything, cold", 300_000,
         pairs=SELDOM_PAIRS),
    Goal("a million connections, 10,000 Services with 100,000 endpoints, without packet memory, MB", "memory, MB", "towpath/memory", 250,
         pairs=SELDOM_PAIRS),
)


def _student(freedom):
    """The 97.5 % quantile of Student's t; Cornish and Fisher's expansion, within 1 % from 3 degrees on."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in exact:
        return exact[freedom]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def spread(found):
    """Median, least, most."""
    return statistics.median(found), min(found), max(found)


def scenarios(reports):
    """The scenarios, in the order of their first report."""
    return list(dict.fromkeys(report["scenario"] for report in reports))


def losses(reports):
    """Where the median of another system is better than Towpath's: load, figure, Towpath's median, the other's, its name. Best
    first; a bare veth pair is no forwarder."""
    found = []
    measured = scenarios(reports)
    for load in dict.fromkeys(scenario.partition("/")[2] for scenario in measured):
        for name, (_, _, is_more_better) in FIGURES.items():
            ours = median(reports, f"towpath/{load}", name)
            if ours is None:
                continue
            peers = [
                (median(reports, scenario, name), scenario.partition("/")[0]) for scenario in measured
                if scenario.endswith(f"/{load}") and not scenario.startswith(("towpath", "veth"))
            ]
            better = [peer for peer in peers if peer[0] is not None and (peer[0] > ours) == is_more_better and peer[0] != ours]
            found += [(load, name, ours, *peer) for peer in sorted(better, reverse=is_more_better)]
    return found


def zero_loss(searches):
    """System to the median of its rates without loss and with 0.5 % of loss, and the least and the most without loss."""
    return {
        system: (*spread([search["ndr_pps"] for search in searches if search["system"] == system]),
                 statistics.median(search["pdr_pps"] for search in searches if search["system"] == system))
        for system in dict.fromkeys(search["system"] for search in searches)
    }


def latency_rate(searches, system):
    """Half of the rate that the system carries without loss. A bare veth pair is given Towpath's, to compare with."""
    found = zero_loss(searches).get("towpath" if system == "veth" else system)
    return round(found[0] / 2) if found and found[0] > 0 else LATENCY_RATE
