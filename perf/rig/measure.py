"""One measurement: a rig, a forwarder, a load; and the names of the loads."""

import json
import os
import pathlib
import subprocess
import time

import objects
import systems
from network import NODES, Failure, Rig, busy_s, run
from systems import Case

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flows that are new find room for as long as a measurement takes: without it they would go on without an entry.
ROOM = 1 << 22
LOADS = {
    "base": Case(),
    "new": Case(new_flows=None, room=ROOM),
    "churn": Case(flows=200_000, new_flows=20_000),
    "replies": Case(kind="replies"),
    "v6": Case(family=6),
    "v6-new": Case(family=6, new_flows=None, room=ROOM),
    "512": Case(size=512),
    "1500": Case(size=1514),
    "1-flow": Case(flows=1),
    "100k-flows": Case(flows=100_000),
    "200k-flows": Case(flows=200_000),
    "1k-services": Case(services=1000, room=ROOM),
    "10k-services": Case(services=10_000, room=ROOM),
    "1k-services-new": Case(services=1000, new_flows=None, room=ROOM),
    "10k-services-new": Case(services=10_000, new_flows=None, room=ROOM),
    "two-queues": Case(queues=2),
    "tcp-connect": Case(kind="connect"),
    "tcp-bulk": Case(kind="bulk"),
    "idle": Case(kind="idle", flows=1),
    "memory": Case(kind="memory", services=10_000, flows=1_000_000),
}

# More than anything here can forward, in packets a second.
OVERLOAD = 1_500_000
# Latency is measured at this rate where the zero-loss rate is not known.
LATENCY_RATE = 100_000
# Of idle: single packets, and how many a second, so that each finds the forwarder at rest.
SINGLE_PACKETS, SINGLE_RATE = 50, 8
# Seconds without traffic, and those before, in which start-up work ends.
IDLE_S, CALM_S = 3.0, 1.0
# A rate at which no forwarder here loses flows while they begin.
GENTLE_RATE = 250_000


def split(scenario):
    """`towpath/new` to its system and load."""
    system, _, load = scenario.partition("/")
    load = load or "base"
    if load not in LOADS:
        raise Failure(f"no load {load}; there are: {', '.join(LOADS)}")
    return system, load


def build():
    """Builds everything that takes part; returns the folder of the binaries."""
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{pathlib.Path.home()}/.cargo/bin"}
    command = ["cargo", "build", "--locked", "--quiet", "--release", "-p", "perf", "-p", "forwarder", "-p", "ctl"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise Failure("the build failed")
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"


def commit():
    """What is measured, for reports."""
    return run("git", "-C", ROOT, "describe", "--always", "--dirty", check=False).strip() or "unknown"


class Measurement:
    """A forwarder that runs on a rig of its own, under a load. Use it in a `with` statement."""

    def __init__(self, scenario, binaries, seconds):
        self.system_name, _ = split(scenario)
        self.binaries = binaries
        self.seconds = seconds
        self.system = systems.find(self.system_name, binaries)
        self.turn_to(scenario)
        self.rig = Rig(self.case.queues, self.system.is_direct)

    def turn_to(self, scenario):
        """Takes another load that needs the same set-up."""
        _, self.load = split(scenario)
        self.scenario = f"{self.system_name}/{self.load}"
        self.case = LOADS[self.load]
        if self.case.family not in self.system.families:
            raise Failure(f"{self.scenario}: {self.system_name} is not measured with IPv{self.case.family}")
        if self.case.kind not in self.system.kinds or self.case.queues > self.system.queues:
            raise Failure(f"{self.scenario}: {self.system_name} is not measured with this load")

    def __enter__(self):
        self.rig.__enter__()
        try:
            self.system.start(self.rig, self.case)
        except BaseException:
            self.rig.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.rig.__exit__()

    def stays(self):
        """True if its set-up takes so long that the rig is better kept, and costs nothing meanwhile: rules of the kernel."""
        return self.system.is_rules and self.case.services >= 10_000

    def report(self):
        """What the load is for. The key `kind` says what it is."""
        return {
            "packets": self.overload, "replies": self.overload, "connect": self.connect, "bulk": self.bulk, "idle": self.idle,
            "memory": self.memory,
        }[self.case.kind]()

    def overload(self):
        """The report of towpath-perf at more packets than can be forwarded."""
        return {**self.at(OVERLOAD), "kind": "overload"}

    def at(self, rate):
        """The report of towpath-perf at so many packets a second. Loss is no failure, a wrong packet is."""
        new_flows = rate if self.case.new_flows is None else self.case.new_flows
        # Long enough for every flow to begin.
        warm_up = 0.3 + self.case.flows / GENTLE_RATE
        return self._packets("--rate", rate, "--new-flows", min(new_flows, rate), "--time", self.seconds, "--warm-up", warm_up)

    def search(self, seconds=1.0):
        """The highest rate without loss, and that with 0.5 % of loss, in packets a second."""
        if self.case.kind not in ("packets", "replies"):
            raise Failure(f"{self.scenario}: only packets have a rate to search for")
        if self.case.new_flows is None:
            raise Failure(f"{self.scenario}: new flows cannot be searched for, since their number follows the rate; use --rate")
        # No rate that is carried is much higher than what comes through under overload.
        most = max(self.at(OVERLOAD)["rate_received"], 50_000) * 1.3
        report = self._perf("search", "--json", "--low", most / 20, "--high", most, "--time", seconds, "--trials", 1,
                            "--precision", 0.05, "--warm-up", 0.2, "--new-flows", self.case.new_flows, *self._ends())
        return report["ndr_pps"], report["pdr_pps"]

    def connect(self):
        """TCP connections, clients and servers on CPU 0."""
        self._open_to_sockets()
        report = self._perf(
            "connect", "--json", "--client-if", self._place("cli", "v0"), "--server-if", self._place("be", "v1"), "--cpu", 0,
            "--time", self.seconds, *self.case.targets(self.system.translates))
        return {**report, "kind": "connect"}

    def bulk(self):
        """One TCP stream by iperf3, both ends on CPU 0."""
        self._open_to_sockets()
        server = self.rig.start("taskset", "-c", 0, "iperf3", "--server", "--forceflush", "--port", objects.TARGET_PORT,
                                log="iperf3.log", side="be")
        self.rig.wait_for("iperf3 to listen", self.rig.log_has("iperf3.log", "listening"), server)
        addr, port = (objects.VIPS[4], objects.PORT) if self.system.translates else (NODES[0], objects.TARGET_PORT)
        busy = busy_s()
        shown = json.loads(self.rig.inside(
            "cli", "taskset", "-c", "0", "iperf3", "--client", addr, "--port", port, "--time", max(round(self.seconds), 1), "--json"))
        received = shown["end"]["sum_received"]
        return {
            "scenario": self.scenario, "kind": "bulk", "gbit_per_s": received["bits_per_second"] / 1e9,
            "received_bytes": received["bytes"], "busy_cpu_s": busy_s() - busy,
        }

    def idle(self):
        """CPU time without traffic, and the latency of single packets."""
        time.sleep(CALM_S)
        used, begin = self._cpu_s(), time.monotonic()
        time.sleep(IDLE_S)
        share = (self._cpu_s() - used) / (time.monotonic() - begin)
        report = self._packets("--rate", SINGLE_RATE, "--time", SINGLE_PACKETS / SINGLE_RATE, "--warm-up", 0.5)
        return {**report, "kind": "idle", "cpu_share": share}

    def memory(self):
        """Memory with a million connections."""
        # Twice, for those that were lost.
        seconds = 2 * self.case.flows / GENTLE_RATE
        return {**self._packets("--rate", GENTLE_RATE, "--time", seconds, "--warm-up", 0), "kind": "memory"}

    def _open_to_sockets(self):
        self.rig.open_to_sockets(objects.VIPS[4], objects.endpoints(0, 4), self.system.is_transparent, self.system.offloads)

    def _place(self, side, device):
        return f"{self.rig.namespace(side)}/{device}"

    def _packets(self, *words):
        return self._perf("run", "--json", "-", *words, *self._ends())

    def _ends(self):
        return (
            "--tx-if", self._place("cli", "v0"), "--rx-if", self._place("be", "v1"),
            "--via", self.rig.next_hop(self.system.is_transparent), "--tx-cpu", 0, "--rx-cpu", 0,
            *self.case.traffic(self.system.translates),
        )

    def _perf(self, command, *words):
        words = [self.binaries / "towpath-perf", command, "--name", self.scenario, *words]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2) or not done.stdout:
            raise Failure(f"{self.scenario}: towpath-perf: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        if done.returncode == 2:
            mistakes = {key: report[key] for key in ("duplicates", "wrong_endpoint", "damaged", "errors") if report.get(key)}
            raise Failure(f"{self.scenario}: what should not have been: {mistakes}")
        return report

    def resident(self):
        """Memory of its processes in bytes: all of it, and what of it is Towpath's packet memory. What several have mapped is
        shared out among them."""
        mapped = [size for pid in self._pids() for size in _mapped(pid)]
        return {
            "memory_bytes": sum(size for _, size in mapped),
            "packet_memory_bytes": sum(size for name, size in mapped if "af-xdp-umem" in name),
        }

    def _cpu_s(self):
        """Seconds that its processes have run."""
        return sum(_ran_s(pid) for pid in self._pids())

    def _pids(self):
        return [pid for process in self.rig.processes for pid in _family(process.pid)]


def _family(pid):
    """A process and its descendants."""
    yield pid
    # Each thread has those that it started.
    children = [word for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children") for line in _lines(task) for word in line.split()]
    for child in children:
        yield from _family(int(child))


def _mapped(pid):
    """Name and resident bytes of each mapping of a process."""
    name = ""
    for line in _lines(f"/proc/{pid}/smaps"):
        words = line.split()
        if words[0] == "Pss:":
            yield name, int(words[1]) * 1024
        elif not words[0].endswith(":"):
            name = line


def _ran_s(pid):
    for line in _lines(f"/proc/{pid}/stat"):
        # The name before the last bracket may hold anything.
        fields = line.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _lines(path):
    try:
        return pathlib.Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
