"""The page about the pipeline alone: tables, goals and plots of growth."""

import statistics

import plot
from pipeline import KINDS, STAGES

# Ranks of the 95 % interval of a median, by the number of values (binomial); fewer than six give none.
RANKS = {5: 0, 6: 0, 7: 0, 8: 0, 9: 1, 10: 1, 11: 1, 12: 2, 13: 2, 14: 2, 15: 3}
GOOD_PASSES = 15
MEGA = 1e6


def series(record, name):
    """A figure in every pass that has it."""
    return [times[name] for times in record["passes"] if times.get(name) is not None]


def median(record, name):
    values = series(record, name)
    return statistics.median(values) if values else None


def interval(values):
    """Median and the ends of its 95 % interval; with few values, of all of them."""
    ordered = sorted(values)
    rank = RANKS.get(len(ordered), 3 if len(ordered) > 15 else 0)
    return statistics.median(ordered), ordered[rank], ordered[-1 - rank]


def ratios(record, above, below):
    """Pass by pass."""
    pairs = [(times.get(above), times.get(below)) for times in record["passes"]]
    return [a / b for a, b in pairs if a and b]


def show(value, digits=0):
    return "" if value is None else f"{value:,.{digits}f}"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def worlds_by(record, word, base):
    """Worlds that differ in one size: (size, name), in order, the first world among them."""
    found = [(sizes[word], name) for name, sizes in record["sizes"].items() if name.startswith(f"{word} ")]
    if base in record["sizes"]:
        found.append((record["sizes"][base][word], base))
    return sorted(found)


def goals(record):
    """Rows of goal, measured, met."""
    rows = []

    def judge(text, values, limit, unit="", digits=2):
        if not values:
            return
        middle, low, high = interval(values)
        met = "yes" if high <= limit else "no" if low > limit else "not sure"
        spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
        rows.append([text, f"{middle:.{digits}f}{unit}{spread}", met])

    counted = record["instructions"].get("IPv4/established/all")
    judge("instructions per established IPv4 packet <= 140", [counted] if counted else [], 140, digits=0)
    judge("established IPv4 / rte_hash bulk + rte_lpm <= 1", ratios(record, "IPv4/established/all", "IPv4/dpdk/both"), 1)
    judge("new connection / established <= 4", ratios(record, "IPv4/new/all", "IPv4/established/all"), 4)
    judge("ns per new connection <= 200 (5 M/s)", series(record, "IPv4/new/all"), 200, " ns", 0)
    for text, high, low, kind, limit in (
        ("services 10 to 100k, established <= 1.05", "services 100000", "services 10", "established", 1.05),
        ("services 10 to 100k, new <= 1.3", "services 100000", "services 10", "new", 1.3),
        ("connections 1k to 10M, established <= 2", "flows 10000000", "flows 1000", "established", 2),
        ("routes 1 to 1M, established <= 1.3", "routes 1000000", "routes 1", "established", 1.3),
        ("routes 1 to 1M, routed <= 1.3", "routes 1000000", "routes 1", "routed", 1.3),
    ):
        judge(text, ratios(record, f"{high}/{kind}/all", f"{low}/{kind}/all"), limit)
    sizes = record["sizes"]
    if record["size"] != "smoke":
        for world, limit in (("IPv4", 128), ("IPv6", 256)):
            judge(f"bytes a connection, {world} <= {limit}", [sizes[world]["flows_bytes"] / sizes[world]["flows"]], limit, digits=0)
        large = sizes["services 100000"]
        judge("bytes a Service of 10 endpoints <= 2,500", [large["services_bytes"] / large["services"]], 2_500, digits=0)
        total = sum(sizes["IPv4"][part] for part in ("flows_bytes", "services_bytes", "routes_bytes")) / MEGA
        judge("1M connections, 10k Services, 1k routes <= 250 MB", [total], 250, " MB", 0)
    return rows


def stage_tables(record):
    parts = []
    for world in ("IPv4", "IPv6", "IPv4 masquerade"):
        for title, value, digits in (
            ("ns", lambda name: median(record, name), 1), ("instructions", record["instructions"].get, 0)
        ):
            rows = [
                [kind, *(show(value(f"{world}/{kind}/{stage}"), digits) for stage in ("all", *STAGES))]
                for kind in KINDS if value(f"{world}/{kind}/parse") is not None
            ]
            if rows:
                parts.append(f"### {world}, {title} per packet\n\n" + table(["packets", "all", *STAGES], rows))
    return "\n".join(parts)


def other_rows(record):
    rows = []
    for world in record["sizes"]:
        for kind in KINDS:
            name = f"{world}/{kind}/all"
            if median(record, name) is not None:
                middle, low, high = interval(series(record, name))
                counted = record["instructions"].get(name)
                rows.append([world, kind, show(middle, 1), f"{low:.1f} to {high:.1f}", show(counted)])
    return rows


def dpdk_rows(record):
    rows = []
    for world, sizes in record["sizes"].items():
        for what, title in (("hash", "rte_hash bulk"), ("lpm", "rte_lpm bulk"), ("both", "rte_hash bulk + rte_lpm bulk")):
            name = f"{world}/dpdk/{what}"
            if median(record, name) is not None:
                rows.append([f"{title}, {sizes['flows']:,} keys", show(median(record, name), 1), show(record["instructions"].get(name))])
    for mode in ("io", "macswap", "5tswap"):
        if median(record, f"testpmd/{mode}") is not None:
            rows.append([f"testpmd {mode}, net_null", show(median(record, f"testpmd/{mode}"), 1), ""])
    return rows


def page(record):
    passes = len(record["passes"])
    parts = [
        f"# The pipeline alone, {record['date']}\n",
        f"{record['machine']}, Linux {record['kernel']}, commit {record['commit']}; {passes} passes, everybody in turns; one thread, "
        "bursts of 64 in memory, the shortest UDP frames with 18 bytes of data, random connections. If not said otherwise, one million "
        "connections, 10,000 Services with ten endpoints each, 1,000 routes. A time is the median over bursts of one pass, and here "
        "the median over passes, with its 95 % interval. A packet of a new connection is judged and makes its entry; the entries are "
        "removed between bursts. Frames are in the cache; connections are not, as many as there are. Instructions are callgrind's; "
        "all worlds but the first are counted small, since sizes hardly change them.\n",
        "`scripts/perf-pipeline` measures this again.\n",
        "## Goals\n",
        table(["goal", "measured", "met"], goals(record)),
    ]
    if passes < GOOD_PASSES:
        parts.append(f"Fewer than {GOOD_PASSES} passes: an indication only.\n")
    parts += ["## By stage\n", stage_tables(record), "## By size\n"]
    parts.append(table(["world", "packets", "ns", "interval", "instructions"], other_rows(record)))
    rows = dpdk_rows(record)
    if rows:
        parts += ["## DPDK\n", "The same keys in the same order; routes are looked up for the address that a packet leaves for.\n"]
        parts.append(table(["what", "ns", "instructions"], rows))
    rows = [
        [name, *(show(sizes[part] / MEGA, 1) for part in ("flows_bytes", "services_bytes", "routes_bytes")), show(sizes["fill_s"], 2)]
        for name, sizes in record["sizes"].items()
    ]
    parts += ["## Memory\n", table(["world", "connections, MB", "Services, MB", "routes, MB", "filled in, s"], rows)]
    parts += [f"![{name}]({name})\n" for name in plots(record)]
    return "\n".join(parts)


def plots(record):
    """SVG by file name."""
    found = {}
    for word, title, kinds in (
        ("flows", "ns per packet by connections", ("established", "reply", "new")),
        ("services", "ns per packet by Services of ten endpoints", ("established", "new")),
        ("routes", "ns per packet by routes", ("established", "routed")),
    ):
        steps = worlds_by(record, word, "IPv4")
        if len(steps) < 2:
            continue
        names = [*((kind, f"{kind}/all") for kind in kinds), ("rte_hash + rte_lpm", "dpdk/both")]
        lines = {}
        for label, what in names:
            line = [(size, median(record, f"{world}/{what}")) for size, world in steps]
            line = [point for point in line if point[1] is not None]
            if len(line) > 1:
                lines[label] = line
        found[f"pipeline-{word}.svg"] = plot.lines(title, word, "ns per packet", lines, log_y=True)
    return found
