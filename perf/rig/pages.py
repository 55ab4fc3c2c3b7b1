"""The tables and plots of a campaign."""

import statistics

import compare
import plot
import updates
from compare import CONNECTIONS_PER_CPU, PER_CPU, RATE

PERCENTILES = (("p50_us", "p50"), ("p90_us", "p90"), ("p99_us", "p99"), ("p999_us", "p99.9"), ("p9999_us", "p99.99"))
# They do not translate, so that they do less than what is compared.
UNTRANSLATED = ("bypass", "redirect", "testpmd", "macswap", "kernel")


def _cells(*cells):
    return f"| {' | '.join(cells)} |"


def _head(first, *others):
    return [_cells(first, *others), _cells("---", *["--:"] * len(others))]


def _of(reports, kind):
    """Scenario to its reports of that kind."""
    chosen = [report for report in reports if report["kind"] == kind]
    return {name: [report for report in chosen if report["scenario"] == name] for name in compare.scenarios(chosen)}


def throughput(reports):
    lines = _head("scenario", "Mpps", "least to most", "k packets per busy CPU-second", "memory, MB")
    for scenario, rounds in _of(reports, "overload").items():
        middle, least, most = compare.spread([report["rate_received"] / 1e6 for report in rounds])
        per_cpu = compare.median(reports, scenario, PER_CPU) / 1e3
        memory = statistics.median(report["memory_bytes"] / 1e6 for report in rounds)
        lines.append(_cells(scenario, f"{middle:.3f}", f"{least:.3f} to {most:.3f}", f"{per_cpu:.0f}", f"{memory:.0f}" if memory else ""))
    return lines


def zero_loss(searches):
    lines = _head("system", "no loss, Mpps", "least to most", "0.5 % loss, Mpps")
    for system, (middle, least, most, some) in compare.zero_loss(searches).items():
        lines.append(_cells(system, f"{middle / 1e6:.3f}", f"{least / 1e6:.3f} to {most / 1e6:.3f}", f"{some / 1e6:.3f}"))
    return lines


def _latencies(reports):
    """Scenario to the median of each percentile over the rounds, in microseconds."""
    return {
        scenario: {key: statistics.median(report["latency"][key] for report in rounds) for key, _ in PERCENTILES}
        for scenario, rounds in _of(reports, "latency").items()
    }


def latency(reports):
    lines = _head("scenario", "packets a second", *(name for _, name in PERCENTILES))
    found = _latencies(reports)
    for scenario, values in found.items():
        rate = statistics.median(report["rate_received"] for report in _of(reports, "latency")[scenario])
        lines.append(_cells(scenario, f"{rate:,.0f}", *(f"{values[key]:.1f}" for key, _ in PERCENTILES)))
    if {"towpath/base", "veth/base"} <= found.keys():
        beyond = [found["towpath/base"][key] - found["veth/base"][key] for key, _ in PERCENTILES]
        lines.append(_cells("towpath beyond veth", "", *(f"{value:.1f}" for value in beyond)))
    return lines


def connections(reports):
    lines = _head("scenario", "connections/s", "least to most", "per busy CPU-second", "p50, us", "p99, us")
    for scenario, rounds in _of(reports, "connect").items():
        middle, least, most = compare.spread([report["connections_per_s"] for report in rounds])
        per_cpu = compare.median(reports, scenario, CONNECTIONS_PER_CPU)
        times = (statistics.median(report["latency"][key] for report in rounds) for key in ("p50_us", "p99_us"))
        lines.append(_cells(scenario, f"{middle:.0f}", f"{least:.0f} to {most:.0f}", f"{per_cpu:.0f}", *(f"{time:.0f}" for time in times)))
    return lines


def streams(reports):
    lines = _head("scenario", "Gbit/s", "least to most", "Gbit per busy CPU-second")
    for scenario, rounds in _of(reports, "bulk").items():
        middle, least, most = compare.spread([report["gbit_per_s"] for report in rounds])
        per_cpu = statistics.median(report["received_bytes"] * 8e-9 / report["busy_cpu_s"] for report in rounds)
        lines.append(_cells(scenario, f"{middle:.2f}", f"{least:.2f} to {most:.2f}", f"{per_cpu:.2f}"))
    return lines


def idle(reports):
    lines = _head("scenario", "CPU without traffic, %", "single packets: p50, us", "slowest, us", "lost")
    for scenario, rounds in _of(reports, "idle").items():
        share = statistics.median(100 * report["cpu_share"] for report in rounds)
        middle, most = (statistics.median(report["latency"][key] for report in rounds) for key in ("p50_us", "max_us"))
        lines.append(_cells(scenario, f"{share:.1f}", f"{middle:.0f}", f"{most:.0f}", str(sum(report["lost"] for report in rounds))))
    return lines


def memory(reports):
    lines = _head("scenario", "connections", "all, MB", "packet memory, MB", "the rest, MB")
    for scenario, rounds in _of(reports, "memory").items():
        every, packets = (statistics.median(report[key] / 1e6 for report in rounds) for key in ("memory_bytes", "packet_memory_bytes"))
        flows = statistics.median(report["flows"] for report in rounds)
        lines.append(_cells(scenario, f"{flows:,.0f}", f"{every:.0f}", f"{packets:.0f}", f"{every - packets:.0f}"))
    return lines


def _number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(reports, scenario, figure):
    middle = compare.median(reports, scenario, figure) if scenario else None
    return "" if middle is None else _number(middle)


def goals(reports):
    lines = [
        _cells("goal", "figure", "Towpath", "peer", "goal", "measured", "95 % interval", "rounds", ""),
        _cells("---", "---", *["--:"] * 6, "---"),
    ]
    for goal in compare.GOALS:
        limit = f"{'at least' if goal.is_least else 'at most'} {goal.limit:g}"
        ours, theirs = (_shown(reports, scenario, goal.figure) for scenario in (goal.scenario, goal.beside))
        found = goal.measured(reports)
        if found is None:
            lines.append(_cells(goal.what, goal.figure, ours, theirs, limit, "not measured", "", "0", ""))
            continue
        middle, low, high, pairs = found
        verdict = f"needs {goal.pairs} rounds to count" if pairs < goal.pairs else "met" if goal.is_met(low, high) else "not met"
        interval = f"{_number(low)} to {_number(high)}" if pairs > 1 else ""
        lines.append(_cells(goal.what, goal.figure, ours, theirs, limit, _number(middle), interval, str(pairs), verdict))
    return lines


def losses(reports):
    lines = [_cells("load", "figure", "Towpath", "better", "by"), _cells("---", "---", "--:", "--:", "---")]
    for load, figure, ours, theirs, peer in compare.losses(reports):
        lines.append(_cells(load, figure, _number(ours), _number(theirs), f"{peer}, no translation" if peer in UNTRANSLATED else peer))
    return lines


def page(campaign):
    """The report as Markdown."""
    reports, searches = campaign["reports"], campaign["searches"]
    if not reports:
        return "# Nothing was measured\n"
    first = next((report for report in reports if "machine" in report), {"machine": "?", "kernel": "?", "commit": "?"})
    lines = [
        f"# Towpath beside other forwarders, {campaign['date']}",
        "",
        f"{first['machine']}, Linux {first['kernel']}, commit {first['commit']}; {campaign['rounds']} rounds of {campaign['seconds']:g} s, "
        f"{campaign['minutes']:.0f} minutes, scenarios in turns{', those without a goal in every third round' if campaign['seldom'] else ''}"
        f"{', ' + campaign['note'] if 'note' in campaign else ''}; "
        "veth pairs between network namespaces, the shortest UDP frames in 1,000 flows if not said otherwise, ten endpoints a Service. Medians over the rounds. "
        "Every packet is checked: address, port, checksums, once only.",
        "",
        "Kernel forwarders (redirect, kernel, nftables, iptables) run on the sender's CPU; those in user space have a CPU of their own and "
        "keep the sender's busy too. So packets per busy CPU-second of the whole machine say more than Mpps. `bypass`, `redirect`, "
        "`testpmd`, `macswap` and `kernel` forward without translation; `veth` is no forwarder but both ends joined. The rules of nftables "
        "and iptables are ours, after those that kube-proxy writes. Where every packet is a new flow, and with 1,000 Services or more, the "
        f"kernel's UDP entries live for one second, so that its table ({campaign['conntrack_max']} entries, the default here) need not "
        "overflow, and Towpath's table has room for all of them.",
        "",
        "## Goals",
        "",
        *goals(reports + campaign["updates"]),
        "",
        "A goal is met if the worse end of the interval meets it. Ratios and differences are taken within each round.",
        "",
        "## Under overload",
        "",
        *throughput(reports),
        "",
        "`replies`: every packet is sent back by its endpoint; what is counted are round trips that were checked at both ends, each of "
        "which is two packets. `two-queues`: two workers, one of them beside the generator, so only packets per busy CPU-second count. "
        "Memory is what processes have resident, packet memory included.",
        "",
    ]
    lines += [line for name in plots(campaign) if name != "latency.svg" for line in (f"![{name.removesuffix('.svg')}]({name})", "")]
    for title, note, table in (
        ("The highest rate", "Without loss, and with 0.5 %, by bisection; no rate is higher than what the generator can send.", zero_loss(searches)),
        ("Latency", "At half of the rate without loss (of `veth`: Towpath's rate), from the time at which a packet was to be sent. Generator "
         "and sink share a CPU, which every percentile contains.\n\n![latency](latency.svg)", latency(reports)),
        ("TCP connections", "Connect, request, answer, close, by 16 clients at a time, all sockets on CPU 0; none failed.", connections(reports)),
        ("One TCP stream", "iperf3, both ends on CPU 0. The kernel passes segments of 64 KiB on whole; over AF_XDP each frame is of the MTU.",
         streams(reports)),
        ("Changes under load", f"{updates.RATE:,} packets a second, each a new flow, to the Service that changes, with {updates.SERVICES:,} Services of ten "
         "endpoints a family. In force: from the begin of writing the change, to the control socket or to the standard input of a process "
         "that is started for it, to the first packet that leaves by it. Load, packets and control threads share CPU 0. *Eight Services at "
         "once*: as many connections, each changes all ten endpoints of its Service. *Everything*: all objects anew, in one change.",
         updates.table(campaign["updates"])),
        ("Idle", "Three seconds without traffic; then fifty single packets, eight a second.", idle(reports)),
        ("Memory", "10,000 Services with 100,000 endpoints, and a million connections in a table with room for 1,048,576.", memory(reports)),
    ):
        if len(table) > 2:
            lines += [f"## {title}", "", *table, "", note, ""]
    lines += ["## Where Towpath loses", "", "Where the median of another is better, of all that was measured; latency is at half of each one's own rate.", "", *losses(reports)]
    for failure in campaign["failures"]:
        lines += ["", f"Failed: {failure}"]
    if campaign["skipped"]:
        lines += ["", f"Not measured, since not installed here: {', '.join(campaign['skipped'])}."]
    return "\n".join(lines) + "\n"


SERVICES = {"base": 1, "1k-services": 1000, "10k-services": 10_000}
SERVICES_NEW = {"new": 1, "1k-services-new": 1000, "10k-services-new": 10_000}
FLOWS = {"1-flow": 1, "base": 1000, "100k-flows": 100_000, "200k-flows": 200_000}


def _growth(reports, loads, systems, suffix=""):
    """System to its Mpps by what the loads stand for; those with one point are left out."""
    found = {}
    for system in systems:
        middles = {count: compare.median(reports, f"{system}/{load}", RATE) for load, count in loads.items()}
        line = [(count, middle / 1e6) for count, middle in middles.items() if middle is not None]
        if len(line) > 1:
            found[system + suffix] = line
    return found


def plots(campaign):
    """File name to SVG."""
    reports, drawn = campaign["reports"], {}
    rows = [
        (scenario.removesuffix("/base"), *compare.spread([report["rate_received"] / 1e6 for report in rounds]))
        for scenario, rounds in _of(reports, "overload").items() if scenario.endswith(("/base", "/new"))
    ]
    if rows:
        drawn["throughput.svg"] = plot.bars("Forwarded under overload, 1,000 flows; /new: every packet a new flow", "Mpps; the line is least to most", rows)
    balancing = ("towpath", "nftables", "iptables")
    services = _growth(reports, SERVICES, balancing) | _growth(reports, SERVICES_NEW, balancing, ", new flows")
    if services:
        drawn["services.svg"] = plot.lines("Forwarded, by the number of Services", "Services", "Mpps", services)
    flows = _growth(reports, FLOWS, ("towpath", "ovs", "nftables"))
    if flows:
        drawn["flows.svg"] = plot.lines("Forwarded, by the number of flows", "flows", "Mpps", flows)
    names = [name for _, name in PERCENTILES]
    series = {
        scenario.removesuffix("/base"): [(index, max(values[key], 0.1)) for index, (key, _) in enumerate(PERCENTILES)]
        for scenario, values in _latencies(reports).items()
    }
    if series:
        drawn["latency.svg"] = plot.lines("Latency at half of the zero-loss rate", "percentile", "microseconds", series, names, log_y=True)
    return drawn
