"""The rig: three network namespaces and two veth pairs, and the processes in them.

    NAME-cli                NAME-gw                NAME-be: all pods
    v0 10.1.0.2  <----->  g0 10.1.0.1
                          g1 10.2.0.1  <----->  v1 10.2.0.2, in front of 10.128.0.0/12 and fd00:244::/48

Clients are 10.1.1.0/24 and fd00:1::1:0/120, behind v0. A direct rig has v0 and v1 joined, and nothing between them.
"""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

POD_CIDRS = ("10.128.0.0/12", "fd00:244::/48")
CLIENT_CIDRS = ("10.1.1.0/24", "fd00:1::1:0/120")
CLIENTS, NODES = ("10.1.0.2", "fd00:1::2"), ("10.2.0.2", "fd00:2::2")


# Of rigs, since several may be there at a time.
_NUMBERS = itertools.count()


class Failure(Exception):
    """What went wrong, for whoever started the measurement."""


def run(*command, stdin=None, check=True):
    """Runs a command to its end and returns what it printed."""
    done = subprocess.run([str(word) for word in command], input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


class Rig:
    """A rig of its own for each measurement: nothing is left over from another forwarder. Use it in a `with` statement."""

    def __init__(self, queues=1, is_direct=False):
        self.name = f"perf-{os.getpid()}-{next(_NUMBERS)}"
        self.queues = ("numrxqueues", queues, "numtxqueues", queues)
        self.is_direct = is_direct
        self.folder = None
        self.processes = []

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="towpath-perf."))
        self.folder.chmod(0o711)  # the data plane, which is not root, has its state below
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            stop(process)
        self.processes.clear()
        for side in ("cli", "gw", "be"):
            run("ip", "netns", "del", self.namespace(side), check=False)
        _settle()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connect(self):
        for side in ("cli", "gw", "be"):
            run("ip", "netns", "add", self.namespace(side))
            run("ip", "-n", self.namespace(side), "link", "set", "lo", "up")
            # While an interface looks whether its own address is in use, it cannot ask for those of others.
            self.inside(side, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
        ends = {"v0": ("cli", "10.1.0.2/16", "fd00:1::2/64"), "v1": ("be", "10.2.0.2/16", "fd00:2::2/64")}
        if self.is_direct:
            self._pair("v0", "cli", "v1", "be")
        else:
            self._pair("v0", "cli", "g0", "gw")
            self._pair("v1", "be", "g1", "gw")
            ends.update(g0=("gw", "10.1.0.1/16", "fd00:1::1/64"), g1=("gw", "10.2.0.1/16", "fd00:2::1/64"))
        for device, (side, v4, v6) in ends.items():
            self.ip(side, "addr", "add", v4, "dev", device)
            self.ip(side, "addr", "add", v6, "dev", device, "nodad")
            self.ip(side, "link", "set", device, "up")
        if self.is_direct:
            return
        self.inside("gw", "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for behind, node in (*zip(POD_CIDRS, NODES), *zip(CLIENT_CIDRS, CLIENTS)):
            self.ip("gw", "route", "add", behind, "via", node)

    def _pair(self, left, left_side, right, right_side):
        run("ip", "link", "add", left, "netns", self.namespace(left_side), *self.queues,
            "type", "veth", "peer", "name", right, "netns", self.namespace(right_side), *self.queues)

    def namespace(self, side):
        return f"{self.name}-{side}"

    def ip(self, side, *words):
        return run("ip", "-n", self.namespace(side), *words)

    def inside(self, side, *command, stdin=None):
        """Runs a command in a namespace to its end and returns what it printed."""
        return run("ip", "netns", "exec", self.namespace(side), *command, stdin=stdin)

    def mac(self, side, device):
        return json.loads(self.ip(side, "-j", "link", "show", "dev", device))[0]["address"]

    def know_neighbors(self):
        """For forwarders that use the kernel's neighbor table: no packet waits for ARP or ND."""
        for nodes, side, outer, inner in ((CLIENTS, "cli", "v0", "g0"), (NODES, "be", "v1", "g1")):
            for node in nodes:
                self.ip("gw", "neigh", "replace", node, "lladdr", self.mac(side, outer), "dev", inner)

    def next_hop(self, is_transparent):
        """Where a client's packets go first: to the gateway, or, if nothing between changes frames, to the far end."""
        return self.mac("be", "v1") if is_transparent else self.mac("gw", "g0")

    def open_to_sockets(self, vip, endpoints, is_transparent, offloads):
        """Makes both ends ready for real sockets: routes, neighbors, the endpoints' addresses. Without `offloads` checksums
        are complete when a packet leaves, and no packet is longer than the MTU."""
        to_client = self.mac("cli", "v0") if is_transparent else self.mac("gw", "g1")
        for side, device, gateway, lladdr, targets in (
            ("cli", "v0", "10.1.0.1", self.next_hop(is_transparent), (vip, "10.2.0.0/16")),
            ("be", "v1", "10.2.0.1", to_client, ("10.1.0.0/16",)),
        ):
            self.ip(side, "neigh", "replace", gateway, "lladdr", lladdr, "dev", device)
            for target in targets:
                self.ip(side, "route", "add", target, "via", gateway, "dev", device)
            if not offloads:
                self.inside(side, "ethtool", "-K", device, "tx", "off")
        for addr in endpoints:
            self.ip("be", "addr", "add", addr, "dev", "lo")
        # Each connection has a port of its own while it is remembered.
        self.inside("cli", "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")

    def start(self, *command, log, environment=None, side="gw"):
        """Starts a process in a namespace, the gateway's if not said otherwise; it ends with the rig."""
        with open(self.folder / log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(side), *map(str, command)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.processes.append(process)
        return process

    def wait_for(self, what, condition, process=None, patience=20.0):
        """Waits until `condition` holds, while the process lives."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if condition():
                return
            if process is not None and process.poll() is not None:
                break
            time.sleep(0.02)
        logs = [f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.log")]
        raise Failure("\n".join([f"waited in vain for {what}", *logs]))

    def log_has(self, log, word):
        """A condition for `wait_for`."""
        return lambda: word in (self.folder / log).read_text(errors="replace")


def _settle():
    """The kernel takes a namespace apart later; that must not be the next measurement's time. Ends when the machine has calmed
    down, and after a second anyway."""
    for _ in range(10):
        before = busy_s()
        time.sleep(0.1)
        if busy_s() - before < 0.03:
            return


def busy_s():
    """Seconds that the CPUs of this machine were busy since boot, as towpath-perf counts them."""
    ticks = [int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(ticks[index] for index in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def stop(process):
    """Asks a process to end, and makes it and its children end."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_in_order():
    """Whatever ends this program, what it started is taken down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
