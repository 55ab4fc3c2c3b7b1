"""The rig: three network namespaces and two veth pairs, and the processes in them.

    NAME-cli                NAME-gw                NAME-be: all pods
    v0 10.1.0.2  <----->  g0 10.1.0.1
                          g1 10.2.0.1  <----->  v1 10.2.0.2, in front of 10.128.0.0/12 and fd00:244::/48
"""

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

    def __init__(self):
        self.name = f"perf-{os.getpid()}"
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
        # The kernel takes a namespace apart later; that must not be the next measurement's time.
        time.sleep(1.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connect(self):
        for side in ("cli", "gw", "be"):
            run("ip", "netns", "add", self.namespace(side))
            run("ip", "-n", self.namespace(side), "link", "set", "lo", "up")
            # While an interface looks whether its own address is in use, it cannot ask for those of others.
            self.inside(side, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
        for outer, side, inner in (("v0", "cli", "g0"), ("v1", "be", "g1")):
            run("ip", "link", "add", outer, "netns", self.namespace(side),
                "type", "veth", "peer", "name", inner, "netns", self.namespace("gw"))
        for side, device, v4, v6 in (
            ("cli", "v0", "10.1.0.2/16", "fd00:1::2/64"),
            ("gw", "g0", "10.1.0.1/16", "fd00:1::1/64"),
            ("gw", "g1", "10.2.0.1/16", "fd00:2::1/64"),
            ("be", "v1", "10.2.0.2/16", "fd00:2::2/64"),
        ):
            self.ip(side, "addr", "add", v4, "dev", device)
            self.ip(side, "addr", "add", v6, "dev", device, "nodad")
            self.ip(side, "link", "set", device, "up")
        self.inside("gw", "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for pods, node in zip(POD_CIDRS, ("10.2.0.2", "fd00:2::2")):
            self.ip("gw", "route", "add", pods, "via", node)

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
        for node in ("10.2.0.2", "fd00:2::2"):
            self.ip("gw", "neigh", "replace", node, "lladdr", self.mac("be", "v1"), "dev", "g1")

    def start(self, *command, log, environment=None):
        """Starts a process in the gateway's namespace; it ends with the rig."""
        with open(self.folder / log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace("gw"), *map(str, command)],
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
