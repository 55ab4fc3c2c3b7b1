"""A campaign: many scenarios in turns, and what their figures come to."""

import math
import statistics

# Scenarios whose latency is measured too, at this rate.
LATENCY_RATE = 100_000

BASE = ("towpath", "bypass", "testpmd", "macswap", "ovs", "kernel", "nftables", "iptables")
BALANCING = ("towpath", "ovs", "nftables", "iptables")
QUICK = (
    [f"{system}/base" for system in BASE]
    + [f"{system}/new" for system in BALANCING]
    + [f"{system}/{load}" for load in ("1k-services", "1k-services-new") for system in ("towpath", "nftables", "iptables")]
    + [f"{system}/{load}" for load in ("churn", "1500") for system in ("towpath", "nftables")]
    + [f"{system}/v6" for system in ("towpath", "nftables")]
)
FULL = (
    QUICK
    + [f"{system}/{load}" for load in ("10k-services", "10k-services-new") for system in ("towpath", "nftables", "iptables")]
    + [f"{system}/{load}" for load in ("512", "1500", "churn") for system in ("bypass", "testpmd")]
    + [f"{system}/512" for system in ("towpath", "nftables", "iptables")]
    + ["iptables/churn", "iptables/1500", "ovs/churn"]
    + [f"{system}/v6-new" for system in ("towpath", "nftables")]
)

RATE, PER_CPU = "packets a second", "packets per busy CPU-second"
# What is to be reached: what, scenario, beside, figure, at least this ratio.
GOALS = (
    ("as its own rings without a pipeline, within 3 %", "towpath/base", "bypass/base", PER_CPU, 0.97),
    ("as DPDK testpmd, which only forwards", "towpath/base", "testpmd/base", RATE, 1.0),
    ("Open vSwitch's connection tracking and DNAT", "towpath/base", "ovs/base", RATE, 1.4),
    ("every packet a new flow: Open vSwitch", "towpath/new", "ovs/new", RATE, 3.0),
    ("every packet a new flow, 10,000 Services: nftables rules", "towpath/10k-services-new", "nftables/10k-services-new", RATE, 2.0),
    ("every packet a new flow, 10,000 Services: iptables rules", "towpath/10k-services-new", "iptables/10k-services-new", RATE, 30.0),
)
# A goal counts as met only if the lower end of the 95 % interval over so many pairs meets it.
PAIRS = 15


def figure(report, name):
    """Packets a second, or packets per busy CPU-second of the whole machine."""
    return report["rate_received"] if name == RATE else report["received"] / report["busy_cpu_s"]


def overload(reports, scenario):
    """The reports of a scenario under overload, by round."""
    return {report["round"]: report for report in reports if report["scenario"] == scenario and report["rate_asked"] > LATENCY_RATE}


def ratio(reports, scenario, beside, name):
    """Mean of the ratio of a figure over rounds, its 95 % interval, and the number of rounds. Both are taken over the logarithms,
    since ratios multiply; the interval is that of Student's t. None: not measured, or nothing came through."""
    ours, theirs = overload(reports, scenario), overload(reports, beside)
    pairs = [(figure(ours[turn], name), figure(theirs[turn], name)) for turn in sorted(ours.keys() & theirs.keys())]
    logs = [math.log(our / their) for our, their in pairs if our > 0 and their > 0]
    if not logs:
        return None
    middle = statistics.fmean(logs)
    spread = _student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return math.exp(middle), math.exp(middle - spread), math.exp(middle + spread), len(logs)


def _student(freedom):
    """The 97.5 % quantile of Student's t; Cornish and Fisher's expansion, within 1 % from 3 degrees on."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in exact:
        return exact[freedom]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def spread(values):
    """Median, least, most."""
    return statistics.median(values), min(values), max(values)


def scenarios(reports):
    """The scenarios, in the order of their first report."""
    return list(dict.fromkeys(report["scenario"] for report in reports))
