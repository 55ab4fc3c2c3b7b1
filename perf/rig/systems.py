"""The forwarders that are compared. Each is started on a rig for a case, and says what it forwards to where."""

import dataclasses
import shutil

import objects
from network import NODES, POD_CIDRS, Failure


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: the load, and what is configured."""

    # What is sent: packets, packets that come back, TCP connections, a TCP stream, or nothing for a while.
    kind: str = "packets"
    family: int = 4
    services: int = 1
    queues: int = 1
    flows: int = 1000
    # Flows a second that are new; None: every packet is.
    new_flows: float | None = 0.0
    # Bytes a frame; None: the least.
    size: int | None = None
    # Flows that Towpath has room for.
    room: int = 1 << 20

    def setup(self):
        """Cases of which this is the same can take turns on one rig. Those whose set-up is quick do not."""
        return (self.family, self.services, self.queues, self.room) if self.services > 1 else self

    def targets(self, translated):
        """Where to send, and where that must arrive. `translated`: through the Service; otherwise straight to the far side."""
        if translated:
            pods = objects.endpoints(0, self.family)
            to = _target(objects.VIPS[self.family], objects.PORT)
            return ["--dst", to, "--expect", _target(f"{pods[0]}-{pods[-1]}", objects.TARGET_PORT)]
        to = _target(dict(zip((4, 6), NODES))[self.family], objects.TARGET_PORT)
        return ["--dst", to, "--expect", to]

    def traffic(self, translated):
        """Arguments of towpath-perf for packets."""
        source = {4: "10.1.1.0-10.1.1.255", 6: "fd00:1::1:0-fd00:1::1:ff"}[self.family]
        arguments = ["--src", source, *self.targets(translated), "--flows", self.flows, "--queues", self.queues]
        return arguments + (["--replies"] if self.kind == "replies" else []) + (["--size", self.size] if self.size else [])


def _target(addr, port):
    return f"[{addr}]:{port}" if ":" in addr else f"{addr}:{port}"


class System:
    """A forwarder between g0 and g1."""

    # Its packets go through a Service and come out translated.
    translates = True
    # Programs that it needs; `scripts/setup --perf` installs them.
    needs = ()
    families = (4, 6)
    # What a case may send (see Case), and over how many queues.
    kinds = ("packets", "replies")
    queues = 1
    # Frames come out as they went in, Ethernet addresses included.
    is_transparent = False
    # There is no gateway at all.
    is_direct = False
    # Nothing but rules in the kernel, which rest while no packet comes.
    is_rules = False
    # Real sockets may leave checksums and segments to the interface: they are taken care of on the way.
    offloads = True

    def __init__(self, binaries):
        self.binaries = binaries

    def start(self, rig, case):
        """Starts it; returns when it forwards."""
        raise NotImplementedError

    def notes(self, rig):
        """What it has to say after a measurement."""
        del rig
        return ""

    def missing(self):
        """The programs that are not installed."""
        return [program for program in self.needs if shutil.which(program) is None]


class Towpath(System):
    """towpathd: a LoadBalancer Service of ten endpoints, with one worker on CPU 1, or two on both."""

    CONFIG = """
[gateway]
name = "perf"
cluster_cidrs = ["{pods_v4}", "{pods_v6}"]
service_cidrs = ["10.96.0.0/12", "fd00:96::/112"]
return = "routed"
[control]
socket = "{folder}/control.sock"
state_dir = "{folder}/state"
[workers]
cpus = {cpus}
poll = "{poll}"
[flows]
capacity = {capacity}
region = "{folder}/flows"
[umem]
chunk_size = 2048
[[port]]
name = "uplink"
interface = "g0"
role = "outside"
[[port]]
name = "fabric"
interface = "g1"
role = "inside"
"""
    poll = "busy"
    kinds = ("packets", "replies", "connect", "bulk", "idle", "memory")
    queues = 2

    def start(self, rig, case):
        config = rig.folder / "gateway.toml"
        config.write_text(self.CONFIG.format(
            pods_v4=POD_CIDRS[0], pods_v6=POD_CIDRS[1], folder=rig.folder, poll=self.poll, capacity=case.room,
            cpus=[1, 0][:case.queues]))
        daemon = rig.start(self.binaries / "towpathd", "--config", config, log="towpathd.log")
        rig.wait_for("towpathd to listen", (rig.folder / "control.sock").exists, daemon)
        (rig.folder / "objects.json").write_text(objects.manifest(case.services))
        self.control(rig, "apply", "-f", rig.folder / "objects.json")

    def control(self, rig, *words):
        return rig.inside("gw", self.binaries / "towpathctl", "--socket", rig.folder / "control.sock",
                          "--request-timeout", "60", *words)

    def notes(self, rig):
        return self.control(rig, "drops")


class TowpathAdaptive(Towpath):
    """The same with adaptive polling."""

    poll = "adaptive"


class Bypass(System):
    """Towpath's rings without its pipeline: the least possible AF_XDP forwarder. It touches no packet."""

    translates = False
    is_transparent = True
    queues = 2
    # What it does otherwise than Towpath.
    tricks = ()

    def start(self, rig, case):
        cpus = [word for cpu in (1, 0)[:case.queues] for word in ("--cpu", cpu)]
        _forward(rig, self.binaries, "bypass", *cpus, *self.tricks)


class BypassThreaded(Bypass):
    """Bypass with threaded NAPI: kernel threads receive, instead of whoever sends."""

    def start(self, rig, case):
        for device in ("g0", "g1"):
            rig.inside("gw", "sh", "-c", f"echo 1 > /sys/class/net/{device}/threaded")
        super().start(rig, case)


def _bypass(said, *tricks):
    return type("BypassVariant", (Bypass,), {"__doc__": f"Bypass {said}.", "tricks": tricks})


class Redirect(System):
    """XDP_REDIRECT in the kernel, the ceiling. It touches no packet."""

    translates = False
    is_transparent = True

    def start(self, rig, case):
        _forward(rig, self.binaries, "redirect")


def _forward(rig, binaries, command, *words):
    """A forwarder of towpath-perf."""
    gateway = rig.namespace("gw")
    process = rig.start(
        binaries / "towpath-perf", command, "--left", f"{gateway}/g0", "--right", f"{gateway}/g1", *words, log="forward.log")
    rig.wait_for(f"the {command} to be ready", rig.log_has("forward.log", "ready"), process)


class Veth(System):
    """No forwarder: one veth pair between both ends. What the ends themselves take."""

    translates = False
    is_transparent = True
    is_direct = True
    kinds = ("packets", "replies", "connect", "bulk")

    def start(self, rig, case):
        pass


class Testpmd(System):
    """DPDK testpmd, io forwarding over net_af_xdp. It touches no packet."""

    translates = False
    is_transparent = True
    offloads = False
    kinds = ("packets", "replies", "connect", "bulk")
    needs = ("dpdk-testpmd",)
    mode = "io"

    def start(self, rig, case):
        process = rig.start(
            "dpdk-testpmd", "-l", "0,1", "--main-lcore", "0", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry",
            "--file-prefix", rig.name, "--vdev", "net_af_xdp0,iface=g0", "--vdev", "net_af_xdp1,iface=g1",
            "--", f"--forward-mode={self.mode}", "--nb-cores=1", "--auto-start", "--no-mlockall", "--total-num-mbufs=65536",
            "--stats-period=60", log="testpmd.log",
        )
        rig.wait_for("testpmd to forward", rig.log_has("testpmd.log", "statistics"), process)


class TestpmdMacswap(Testpmd):
    """DPDK testpmd that swaps the Ethernet addresses."""

    kinds = ("packets", "replies")

    mode = "macswap"


class Kernel(System):
    """Linux forwarding, no NAT, on the sender's CPU."""

    translates = False
    kinds = ("packets", "replies", "connect", "bulk")

    def start(self, rig, case):
        rig.know_neighbors()


def _forget_soon(rig, case):
    """Lets entries of one-way UDP live for a second where every packet makes one: a table that is full would be measured else."""
    if case.room > Case.room:
        rig.inside("gw", "sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=1")


class Nftables(System):
    """Rules as kube-proxy writes them for nftables, loaded with nft, on the sender's CPU."""

    needs = ("nft",)
    is_rules = True
    kinds = ("packets", "replies", "connect", "bulk")

    def start(self, rig, case):
        rig.know_neighbors()
        rig.inside("gw", "nft", "-f", "-", stdin=objects.nftables(case.services, case.family))
        _forget_soon(rig, case)


class Iptables(System):
    """Rules as kube-proxy writes them for iptables (the legacy kind), on the sender's CPU."""

    needs = ("iptables-legacy-restore", "ip6tables-legacy-restore")
    is_rules = True
    kinds = ("packets", "replies", "connect", "bulk")

    def start(self, rig, case):
        rig.know_neighbors()
        program = {4: "iptables-legacy-restore", 6: "ip6tables-legacy-restore"}[case.family]
        rig.inside("gw", program, stdin=objects.iptables(case.services, case.family))
        _forget_soon(rig, case)


class OpenVSwitch(System):
    """Open vSwitch's userspace datapath over AF_XDP, connection tracking and DNAT by OpenFlow rules, on CPU 1. It balances
    over the addresses of the ten endpoints by hash."""

    needs = ("ovs-vswitchd", "ovsdb-server")
    families = (4,)
    kinds = ("packets", "replies", "connect", "bulk")
    offloads = False

    def start(self, rig, case):
        folder, environment = rig.folder / "ovs", {"OVS_RUNDIR": str(rig.folder / "ovs"), "OVS_LOGDIR": str(rig.folder / "ovs"),
                                                   "OVS_DBDIR": str(rig.folder / "ovs"), "OVS_SYSCONFDIR": str(rig.folder / "ovs")}
        folder.mkdir()
        database, socket = folder / "conf.db", f"unix:{folder}/db.sock"
        rig.inside("gw", "ovsdb-tool", "create", database, "/usr/share/openvswitch/vswitch.ovsschema")
        server = rig.start("ovsdb-server", database, f"--remote=p{socket}", "--log-file=/dev/null", log="ovsdb.log", environment=environment)
        rig.wait_for("ovsdb-server to listen", (folder / "db.sock").exists, server)
        vsctl = ("ovs-vsctl", f"--db={socket}", "--no-wait")
        rig.inside("gw", *vsctl, "init")
        rig.inside("gw", *vsctl, "set", "Open_vSwitch", ".", "other_config:pmd-cpu-mask=2", "other_config:lcore-mask=1")
        switch = rig.start("ovs-vswitchd", socket, f"--unixctl={folder}/ctl", f"--pidfile={folder}/pid", log="ovs.log", environment=environment)
        rig.wait_for("ovs-vswitchd to listen", (folder / "ctl").exists, switch)
        bridge = ("--", "set", "bridge", "br0", "datapath_type=netdev", "protocols=OpenFlow13")
        rig.inside("gw", *vsctl, "add-br", "br0", *bridge)
        for number, port in enumerate(("g0", "g1"), 1):
            options = ("type=afxdp", "options:n_rxq=1", "options:xdp-mode=native", f"ofport_request={number}")
            rig.inside("gw", *vsctl, "add-port", "br0", port, "--", "set", "interface", port, *options)
        management = folder / "br0.mgmt"
        rig.wait_for("the bridge", management.exists, switch)
        rig.inside("gw", "ovs-ofctl", "-O", "OpenFlow13", "add-flows", f"unix:{management}", "-", stdin=self._flows(rig))
        rig.wait_for("the ports", lambda: self._has_ports(rig, folder), switch)

    @staticmethod
    def _has_ports(rig, folder):
        shown = rig.inside("gw", "ovs-appctl", "-t", folder / "ctl", "dpif-netdev/pmd-rxq-show")
        return "g0" in shown and "g1" in shown

    @staticmethod
    def _flows(rig):
        pods = objects.endpoints(0, 4)
        vip, node = objects.VIPS[4], rig.mac("be", "v1")
        translate = f"ct(commit,zone=1,nat(dst={pods[0]}-{pods[-1]}:{objects.TARGET_PORT}))"
        send = f"mod_dl_src:{rig.mac('gw', 'g1')},mod_dl_dst:{node},dec_ttl,output:2"
        back = f"mod_dl_src:{rig.mac('gw', 'g0')},mod_dl_dst:{rig.mac('cli', 'v0')},dec_ttl,output:1"
        return "\n".join([
            "table=0,priority=10,ip,ct_state=-trk,actions=ct(zone=1,nat,table=1)",
            "table=0,priority=1,actions=drop",
            *(f"table=1,priority=20,in_port=1,{protocol},ct_state=+new+trk,nw_dst={vip},tp_dst={objects.PORT},actions={translate},{send}"
              for protocol in ("udp", "tcp")),
            # A connection is new until it is answered; the packets after its first come here translated already.
            f"table=1,priority=20,in_port=1,ip,ct_state=+trk,nw_dst={POD_CIDRS[0]},actions={send}",
            f"table=1,priority=20,in_port=2,ip,ct_state=+est+trk,actions={back}",
            "table=1,priority=1,actions=drop",
        ]) + "\n"


SYSTEMS = {
    "towpath": Towpath,
    "towpath-adaptive": TowpathAdaptive,
    "bypass": Bypass,
    "bypass-spin": _bypass("without a pause between two looks at empty rings", "--spin"),
    "bypass-rings-512": _bypass("with rings of 512 descriptors", "--rings", 512),
    "bypass-rings-4096": _bypass("with rings of 4,096 descriptors", "--rings", 4096),
    "bypass-budget-32": _bypass("with the kernel's default of 32 packets a system call", "--tx-budget", 32),
    "bypass-budget-512": _bypass("with up to 512 packets a system call", "--tx-budget", 512),
    "bypass-burst-16": _bypass("with bursts of 16 packets", "--burst", 16),
    "bypass-burst-256": _bypass("with bursts of 256 packets", "--burst", 256),
    "bypass-busy-poll": _bypass("with preferred busy polling, 20 us a system call", "--busy-poll", 20),
    "bypass-threaded": BypassThreaded,
    "redirect": Redirect,
    "veth": Veth,
    "testpmd": Testpmd,
    "macswap": TestpmdMacswap,
    "ovs": OpenVSwitch,
    "kernel": Kernel,
    "nftables": Nftables,
    "iptables": Iptables,
}


def find(name, binaries):
    """The system of that name, ready to be started."""
    if name not in SYSTEMS:
        raise Failure(f"no system {name}; there are: {', '.join(SYSTEMS)}")
    return SYSTEMS[name](binaries)
