"""One measurement: a rig, a forwarder, a load; and the names of the loads."""

import json
import os
import pathlib
import subprocess

import systems
from network import Failure, Rig, run
from systems import Case

ROOT = pathlib.Path(__file__).resolve().parents[2]

LOADS = {
    "base": Case(),
    "new": Case(new_flows=None),
    "churn": Case(flows=200_000, new_flows=20_000),
    "v6": Case(family=6),
    "v6-new": Case(family=6, new_flows=None),
    "512": Case(size=512),
    "1500": Case(size=1514),
    "1k-services": Case(services=1000),
    "10k-services": Case(services=10_000),
    "1k-services-new": Case(services=1000, new_flows=None),
    "10k-services-new": Case(services=10_000, new_flows=None),
}

# More than anything here can forward, in packets a second.
OVERLOAD = 1_500_000


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
        self.system_name, self.load = split(scenario)
        self.scenario = f"{self.system_name}/{self.load}"
        self.case = LOADS[self.load]
        self.binaries = binaries
        self.seconds = seconds
        self.system = systems.find(self.system_name, binaries)
        self.rig = Rig()

    def __enter__(self):
        if self.case.family not in self.system.families:
            raise Failure(f"{self.scenario}: {self.system_name} is not measured with IPv{self.case.family}")
        self.rig.__enter__()
        try:
            self.system.start(self.rig, self.case)
        except BaseException:
            self.rig.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.rig.__exit__()

    def at(self, rate):
        """The report of towpath-perf at so many packets a second. Loss is no failure, a wrong packet is."""
        new_flows = rate if self.case.new_flows is None else self.case.new_flows
        return self._perf("run", "--json", "-", "--rate", rate, "--new-flows", min(new_flows, rate), "--time", self.seconds)

    def search(self):
        """The highest rate without loss, and that with 0.5 % of loss, in packets a second."""
        if self.case.new_flows is None:
            raise Failure(f"{self.scenario}: new flows cannot be searched for, since their number follows the rate; use --rate")
        report = self._perf("search", "--json", "--high", OVERLOAD, "--time", 1, "--trials", 2, "--precision", 0.04,
                            "--warm-up", 0.3, "--new-flows", self.case.new_flows)
        return report["ndr_pps"], report["pdr_pps"]

    def _perf(self, *words):
        cli, be = self.rig.namespace("cli"), self.rig.namespace("be")
        command = [
            self.binaries / "towpath-perf", *words, "--name", self.scenario, "--tx-if", f"{cli}/v0", "--rx-if", f"{be}/v1",
            "--via", self.rig.mac("gw", "g0"), "--tx-cpu", 0, "--rx-cpu", 0, *self.case.traffic(self.system.translates),
        ]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2) or not done.stdout:
            raise Failure(f"{self.scenario}: towpath-perf: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        if done.returncode == 2:
            mistakes = {key: report[key] for key in ("duplicates", "wrong_endpoint", "damaged") if report[key]}
            raise Failure(f"{self.scenario}: packets came that should not have: {mistakes}")
        return report

    def memory(self):
        """Resident memory of its processes in bytes; what several have mapped is counted for each."""
        return sum(_resident(pid) for process in self.rig.processes for pid in _family(process.pid))


def _family(pid):
    """A process and its descendants."""
    yield pid
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def _resident(pid):
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
