"""The tables and plots of a campaign."""

import compare
import plot
from compare import PER_CPU, RATE

PERCENTILES = (("p50_us", "p50"), ("p90_us", "p90"), ("p99_us", "p99"), ("p999_us", "p99.9"), ("p9999_us", "p99.99"))


def _cells(*cells):
    return f"| {' | '.join(cells)} |"


def throughput(reports):
    lines = [
        _cells("scenario", "Mpps", "least to most", "k packets per busy CPU-second", "memory, MB"), _cells("---", "--:", "--:", "--:", "--:"),
    ]
    for scenario in compare.scenarios(reports):
        rounds = compare.overload(reports, scenario).values()
        if not rounds:
            continue
        middle, least, most = compare.spread([compare.figure(report, RATE) / 1e6 for report in rounds])
        per_cpu, _, _ = compare.spread([compare.figure(report, PER_CPU) / 1e3 for report in rounds])
        memory, _, _ = compare.spread([report["memory_bytes"] / 1e6 for report in rounds])
        lines.append(_cells(scenario, f"{middle:.3f}", f"{least:.3f} to {most:.3f}", f"{per_cpu:.0f}", f"{memory:.0f}" if memory else ""))
    return lines


def _latencies(reports):
    """Scenario to the median of each percentile over the rounds, in microseconds."""
    slow = [report for report in reports if report["rate_asked"] == compare.LATENCY_RATE]
    return {
        scenario: {
            key: compare.spread([report["latency"][key] for report in slow if report["scenario"] == scenario])[0]
            for key, _ in PERCENTILES
        }
        for scenario in compare.scenarios(slow)
    }


def latency(reports):
    lines = [_cells("scenario", *(name for _, name in PERCENTILES)), _cells("---", *["--:"] * len(PERCENTILES))]
    for scenario, values in _latencies(reports).items():
        lines.append(_cells(scenario, *(f"{values[key]:.1f}" for key, _ in PERCENTILES)))
    return lines


def goals(reports):
    lines = [_cells("Towpath as fast as", "figure", "goal", "measured", "95 % interval", "pairs", ""), _cells("---", "---", "--:", "--:", "--:", "--:", "---")]
    for what, scenario, beside, name, goal in compare.GOALS:
        found = compare.ratio(reports, scenario, beside, name)
        if found is None:
            lines.append(_cells(what, name, f"{goal:g}", "not measured", "", "0", ""))
            continue
        middle, low, high, pairs = found
        if pairs < compare.PAIRS:
            verdict = f"needs {compare.PAIRS} pairs to count"
        else:
            verdict = "met" if low >= goal else "not met"
        lines.append(_cells(what, name, f"{goal:g}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", str(pairs), verdict))
    return lines


def page(campaign):
    """The report as Markdown."""
    reports = campaign["reports"]
    if not reports:
        return "# Nothing was measured\n"
    first = reports[0]
    lines = [
        f"# Towpath beside other forwarders, {campaign['date']}",
        "",
        f"{first['machine']}, Linux {first['kernel']}, commit {first['commit']}; {campaign['rounds']} rounds of {campaign['seconds']:g} s, "
        "all scenarios in turns; veth pairs between network namespaces, the shortest UDP frames if not said otherwise, ten "
        "endpoints a Service. Medians over the rounds. Every packet is checked: address, port, checksums, once only.",
        "",
        "Kernel forwarders (kernel, nftables, iptables) run on the sender's CPU; those in user space have a CPU of their own and "
        "keep the sender's busy too. So packets per busy CPU-second of the whole machine say more than Mpps. The rules of "
        "nftables and iptables are ours, after those that kube-proxy writes. Where every packet is a new flow, the kernel's entries live for "
        f"one second, so that its table ({campaign['conntrack_max']} entries, the default here) need not overflow, and Towpath's "
        "table has room for all of them.",
        "",
        "## Under overload",
        "",
        *throughput(reports),
        "",
        "![throughput](throughput.svg)",
        "",
        "![by the number of Services](services.svg)",
        "",
        f"## Latency at {compare.LATENCY_RATE:,} packets a second, microseconds",
        "",
        *latency(reports),
        "",
        "![latency](latency.svg)",
        "",
        "Generator and sink share a CPU, which every percentile contains.",
        "",
        "## Goals",
        "",
        *goals(reports),
    ]
    for failure in campaign["failures"]:
        lines += ["", f"Failed: {failure}"]
    if campaign["skipped"]:
        lines += ["", f"Not measured, since not installed here: {', '.join(campaign['skipped'])}."]
    return "\n".join(lines) + "\n"


SERVICES = {"base": 1, "1k-services": 1000, "10k-services": 10_000}


def plots(reports):
    """File name to SVG."""

    def median(scenario):
        rounds = compare.overload(reports, scenario).values()
        return compare.spread([compare.figure(report, RATE) / 1e6 for report in rounds]) if rounds else None

    drawn = {}
    rows = [(scenario.removesuffix("/base"), *median(scenario)) for scenario in compare.scenarios(reports) if scenario.endswith(("/base", "/new"))]
    if rows:
        drawn["throughput.svg"] = plot.bars("Forwarded under overload, 1,000 flows; /new: every packet a new flow", "Mpps; the line is least to most", rows)
    growth = {}
    for system in ("towpath", "nftables", "iptables"):
        for suffix, name in (("", system), ("-new", f"{system}, new flows")):
            loads = {"new" if suffix and load == "base" else load + suffix: count for load, count in SERVICES.items()}
            line = [(count, median(f"{system}/{load}")[0]) for load, count in loads.items() if median(f"{system}/{load}")]
            if len(line) > 1:
                growth[name] = line
    if growth:
        drawn["services.svg"] = plot.lines("Forwarded, by the number of Services", "Services", "Mpps", growth)
    names = [name for _, name in PERCENTILES]
    series = {
        scenario.removesuffix("/base"): [(index, max(values[key], 0.1)) for index, (key, _) in enumerate(PERCENTILES)]
        for scenario, values in _latencies(reports).items()
    }
    if series:
        drawn["latency.svg"] = plot.lines("Latency at 100,000 packets a second", "percentile", "microseconds", series, names, log_y=True)
    return drawn
