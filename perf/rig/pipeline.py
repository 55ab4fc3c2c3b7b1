"""The pipeline alone: worlds of connections, Services and routes, each held by a process, and DPDK's tables beside them."""

import json
import os
import pathlib
import re
import subprocess
import time

import callgrind
from network import Failure

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = ("parse", "flow", "icmp_error", "service", "route", "nat", "rewrite")
KINDS = ("established", "reply", "new", "routed")
BURST = 64
# No huge pages set aside and no device; memory in MB.
EAL = ("--no-huge", "--no-pci", "--no-shconf", "--no-telemetry", "--log-level", "4")
TESTPMD = ("io", "macswap", "5tswap")


class World:
    """So many connections, Services and routes, and what is measured in it."""

    def __init__(self, name, commands, flows=1_000_000, services=10_000, routes=1_000, options=(), dpdk=()):
        self.name, self.commands, self.dpdk = name, commands, dpdk
        self.flows, self.services, self.routes, self.options = flows, services, routes, options

    def arguments(self):
        sizes = {"flows": self.flows, "services": self.services, "routes": self.routes}
        return [*(word for name, size in sizes.items() for word in (f"--{name}", str(size))), *self.options]


def every_stage(*kinds):
    return [(kind, stage) for kind in kinds for stage in ("all", *STAGES)]


def whole(*kinds):
    return [(kind, "all") for kind in kinds]


def worlds(size):
    """`size`: smoke, quick or full."""
    if size == "smoke":
        small = {"flows": 1_000, "services": 10, "routes": 10}
        return [
            World("IPv4", every_stage(*KINDS), **small, dpdk=("hash", "lpm", "both")),
            World("IPv6", every_stage(*KINDS), **small, options=["--v6"]),
            World("IPv4 masquerade", whole("established", "reply", "new"), **small, options=["--masquerade"]),
        ]
    side = {"flows": 100_000, "services": 1_000} if size == "quick" else {}
    both = ("both",)
    all_worlds = [
        World("IPv4", every_stage(*KINDS), dpdk=("hash", "lpm", "both")),
        World("IPv6", every_stage(*KINDS), options=["--v6"]),
        World("IPv4 masquerade", every_stage("established", "reply", "new"), options=["--masquerade"], **side),
        World("IPv6 masquerade", whole("established", "reply", "new"), options=["--masquerade", "--v6"], **side),
        World("IPv4 TCP", whole("established", "reply", "new"), options=["--tcp"], **side),
        World("IPv4 veth", whole("established", "reply"), options=["--veth"], **side),
        *(World(f"flows {flows}", whole("established", "reply", "new"), flows=flows, dpdk=both) for flows in (1, 1_000, 100_000)),
        *(World(f"services {services}", whole("established", "new"), services=services) for services in (10, 100_000)),
        *(World(f"routes {routes}", whole("established", "routed"), routes=routes) for routes in (1, 1_000_000)),
    ]
    if size == "full":
        all_worlds.append(World("flows 10000000", whole("established", "reply", "new"), flows=10_000_000, dpdk=both))
        all_worlds.append(World("routes 100000", whole("established", "routed"), routes=100_000))
        all_worlds.append(World("IPv6 routes 1000000", whole("established", "routed"), routes=1_000_000, options=["--v6"]))
    return all_worlds


def build():
    """Builds the bench; returns its path."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{pathlib.Path.home()}/.cargo/bin"}
    command = ["cargo", "bench", "--locked", "--no-run", "-p", "forwarder", "--bench", "pipeline", "--message-format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise Failure("the build failed")
    messages = map(json.loads, done.stdout.splitlines())
    return next(message["executable"] for message in messages if message.get("target", {}).get("kind") == ["bench"] and message.get("executable"))


def build_lookup(folder, architecture="native"):
    """Builds DPDK's part; None if DPDK is not installed. Valgrind does not know every instruction of `native`."""
    found = subprocess.run(["pkg-config", "--cflags", "--libs", "libdpdk"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return None
    out = folder / f"lookup-{architecture}"
    flags = [flag for flag in found.stdout.split() if not flag.startswith("-march")]
    source = ROOT / "perf" / "dpdk" / "lookup.c"
    done = subprocess.run(["cc", "-O3", f"-march={architecture}", "-Wall", "-Wextra", "-o", out, source, *flags], check=False)
    if done.returncode != 0:
        raise Failure("perf/dpdk/lookup.c does not compile")
    return out


class Process:
    """A program that builds tables, says so in a line of JSON, and then answers commands, a line each."""

    def __init__(self, command):
        self.command = [str(word) for word in command]
        # The allocator as the data plane has it, forwarder/src/keeper/supervise.rs.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment
        )
        self.ready = json.loads(self._line())

    def _line(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failure(f"{' '.join(self.command)}: ended with {self.process.wait()}")
        return line

    def ask(self, command):
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self):
        self.process.stdin.close()
        if self.process.wait() != 0:
            raise Failure(f"{' '.join(self.command)}: ended with {self.process.returncode}")


def dpdk_command(lookup, keys, flows):
    memory = 256 + flows // 5_000
    return [lookup, keys, *EAL, "-m", memory, "--lcores", "0"]


def start(all_worlds, bench, lookup, folder):
    """Starts a process a world, and one of DPDK where it takes part. Returns (world, ours, DPDK's)."""
    running = []
    for index, world in enumerate(all_worlds):
        keys = folder / f"keys-{index}"
        has_dpdk = world.dpdk and lookup is not None
        ours = Process([bench, *world.arguments(), *(["--keys", keys] if has_dpdk else [])])
        theirs = Process(dpdk_command(lookup, keys, world.flows)) if has_dpdk else None
        running.append((world, ours, theirs))
        print(f"    {world.name}: built", flush=True)
    return running


def one_pass(running, bursts):
    """Asks everybody once. Returns ns per packet by `world/kind/stage` and `world/dpdk/what`."""
    times = {}
    for world, ours, theirs in running:
        for kind, stage in world.commands:
            times[f"{world.name}/{kind}/{stage}"] = ours.ask(f"{kind} {stage} {bursts}")
        for what in world.dpdk if theirs else ():
            times[f"{world.name}/dpdk/{what}"] = theirs.ask(f"{what} {bursts}")
    return times


def testpmd(mode, seconds):
    """ns per packet of DPDK's testpmd between two ports that do nothing; None if it is not installed."""
    command = ["dpdk-testpmd", "-l", "0,1", "--main-lcore", "0", *EAL, "-m", "256", "--vdev", "net_null0", "--vdev", "net_null1"]
    command += ["--", f"--forward-mode={mode}", "--total-num-mbufs=4096", "--stats-period=1"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/"
        )
    except FileNotFoundError:
        return None
    time.sleep(seconds)
    process.terminate()
    try:
        text = process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure("dpdk-testpmd does not end") from None
    # Two ports a report; the first report and the last one are of shorter times.
    rates = [int(rate) for rate in re.findall(r"Rx-pps:\s+(\d+)", text)]
    sums = [a + b for a, b in zip(rates[::2], rates[1::2])]
    whole_seconds = [rate for rate in sums[1:] if rate]
    return 1e9 / max(whole_seconds) if whole_seconds else None


def instructions(all_worlds, bench, lookup, folder, bursts):
    """Instructions per packet, by the same names."""
    counted = {}
    for index, world in enumerate(all_worlds):
        lines = [f"{kind} {stage} {bursts}" for kind, stage in world.commands]
        for (kind, stage), counts in zip(world.commands, callgrind.run([bench, *world.arguments()], lines)):
            name = f"{world.name}/{kind}/{stage}"
            counted[name] = sum(counts.values()) / (bursts * BURST)
        if world.dpdk and lookup is not None:
            keys = folder / f"counted-{index}"
            subprocess.run([bench, *world.arguments(), "--keys", keys], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
            lines = [f"{what} {bursts}" for what in world.dpdk]
            for what, counts in zip(world.dpdk, callgrind.run(dpdk_command(lookup, keys, world.flows), lines)):
                counted[f"{world.name}/dpdk/{what}"] = sum(counts.values()) / (bursts * BURST)
        print(f"    {world.name}: counted", flush=True)
    return counted


def counted_worlds(size):
    """Instructions hardly depend on sizes: the first world is counted as it is, the others small."""
    first, *others = [world for world in worlds(size) if world.name.startswith("IPv") and "routes" not in world.name]
    for world in others:
        world.flows, world.services = min(world.flows, 10_000), min(world.services, 100)
    return [first, *others]
