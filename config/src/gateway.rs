//! The gateway file: one TOML file of the gateway's own settings. What is forwarded comes from Kubernetes objects.
//!
//! [`Gateway::parse`] reads and checks it; every complaint names line, field, value and remedy. What only the machine
//! can tell (does the interface exist, is the CPU there, do the SNAT ports overlap the kernel's) is checked at start.

mod check;
mod health;
mod locate;
mod overlay;
mod port;

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fault::{Code, Fault, Source};

pub use health::{HealthSection, Listen};
pub use overlay::{Mac, OverlayKind, OverlaySection};
pub use port::{AttachSection, Mode, PortSection, Role};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// What the gateway is in its cluster.
    pub gateway: GatewaySection,
    /// Addresses and ports for masquerading.
    #[serde(default)]
    pub snat: SnatSection,
    /// What a source address is checked for.
    #[serde(default)]
    pub source_checks: SourceChecks,
    /// Connections of pods to the outside of the cluster that are masqueraded; the first that fits counts.
    #[serde(default)]
    pub egress: Vec<EgressSection>,
    /// How pods on other nodes are reached.
    #[serde(default)]
    pub overlay: OverlaySection,
    /// The control socket and the kept state.
    #[serde(default)]
    pub control: ControlSection,
    /// Servers that tell how the gateway is.
    #[serde(default)]
    pub health: HealthSection,
    /// Threads that forward.
    #[serde(default)]
    pub workers: WorkersSection,
    /// The flow table.
    #[serde(default)]
    pub flows: FlowsSection,
    /// Fragments that wait for the others of their datagram.
    #[serde(default)]
    pub fragments: FragmentsSection,
    /// AF_XDP rings.
    #[serde(default)]
    pub rings: RingsSection,
    /// Packet memory.
    #[serde(default)]
    pub umem: UmemSection,
    /// Interfaces that packets are taken from and put on; their order is the order of the port indexes.
    #[serde(default, rename = "port")]
    pub ports: Vec<PortSection>,
    /// Interfaces that become ports by themselves; the first section that fits counts.
    #[serde(default)]
    pub attach: Vec<AttachSection>,
}

/// `[gateway]`: what the gateway is in its cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySection {
    /// Name of the gateway; if there is a Node object of this name, that is ours.
    pub name: String,
    /// Zone of the gateway for topology aware routing; the label of our Node object if absent.
    #[serde(default)]
    pub zone: Option<String>,
    /// Ranges of pod addresses; podCIDRs of Nodes and addresses of Pods are known without them.
    #[serde(default)]
    pub cluster_cidrs: Vec<IpNet>,
    /// Ranges that ClusterIPs are taken from. Inside them, an address without a Service is dropped.
    #[serde(default)]
    pub service_cidrs: Vec<IpNet>,
    /// Where set, addresses of LoadBalancers must lie inside.
    #[serde(default)]
    pub load_balancer_cidrs: Vec<IpNet>,
    /// externalIPs are honoured inside these ranges only; by default nowhere (CVE-2020-8554).
    #[serde(default)]
    pub external_ip_cidrs: Vec<IpNet>,
    /// How replies come back when the client's address is kept.
    #[serde(default, rename = "return")]
    pub return_path: ReturnPath,
    /// What `externalTrafficPolicy: Local` means here.
    #[serde(default)]
    pub external_traffic_policy: LocalPolicy,
    /// Masquerade all traffic to ClusterIPs, as kube-proxy's `--masquerade-all`.
    #[serde(default)]
    pub masquerade_all: bool,
    /// Own addresses that serve NodePorts, as prefixes that select among them; empty: the InternalIPs of our Node object,
    /// and without one the first addresses of the ports.
    #[serde(default)]
    pub nodeport_addresses: Vec<IpNet>,
    /// Largest TCP segment that connections through the gateway may agree on.
    #[serde(default)]
    pub mss_clamp: MssClamp,
    /// Any text, the same on every gateway, so that all of them choose alike for a flow that none of them knows.
    #[serde(default = "default_lb_key")]
    pub lb_key: String,
    /// How new connections are spread over endpoints, where no annotation `towpath.dev/lb-algorithm` of the Service says otherwise.
    #[serde(default)]
    pub lb_algorithm: Algorithm,
    /// What becomes of the connections of an endpoint that is gone, where no annotation `towpath.dev/on-endpoint-removed` of the
    /// Service says otherwise.
    #[serde(default)]
    pub on_endpoint_removed: OnEndpointRemoved,
}

fn default_lb_key() -> String {
    "towpath".to_owned()
}

/// How replies of flows that keep the client's address come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReturnPath {
    /// No promise: replies pass us only because we masquerade. Frontends that must keep the client's address are off.
    #[default]
    Snat,
    /// The cluster routes replies to clients through this gateway.
    Routed,
}

/// How new connections are spread over the endpoints of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// By consistent hash of addresses and ports (Maglev): every gateway chooses alike.
    #[default]
    Maglev,
    /// At random.
    Random,
    /// The one of two random endpoints that has fewer connections through this gateway.
    LeastConnections,
}

impl Algorithm {
    /// All of them, with their words in the gateway file and in annotations.
    pub const WORDS: [(&'static str, Algorithm); 3] = [
        ("maglev", Algorithm::Maglev),
        ("random", Algorithm::Random),
        ("least-connections", Algorithm::LeastConnections),
    ];

    /// Its word in the gateway file and in annotations.
    pub const fn name(self) -> &'static str {
        Algorithm::WORDS[self as usize].0
    }
}

/// What becomes of the connections of an endpoint that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnEndpointRemoved {
    /// Nothing, as with kube-proxy: both ends find out by themselves.
    #[default]
    Leave,
    /// TCP connections are reset, at both ends; others are forgotten.
    Reset,
}

impl OnEndpointRemoved {
    /// Both, with their words in the gateway file and in annotations.
    pub const WORDS: [(&'static str, OnEndpointRemoved); 2] =
        [("leave", OnEndpointRemoved::Leave), ("reset", OnEndpointRemoved::Reset)];
}

/// What `externalTrafficPolicy: Local` means on a gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalPolicy {
    /// The gateway is the load balancer in front: straight to a ready endpoint of any node, the client's address kept.
    #[default]
    Frontend,
    /// As kube-proxy: endpoints on our own node only.
    Literal,
}

/// What becomes of the maximum segment size in the SYNs of TCP connections (RFC 9293 section 3.7.1). It is only ever lowered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MssClamp {
    /// Lowered to what fits the MTU of the way there and of the way back, as the gateway knows them.
    #[default]
    Auto,
    /// Left alone: the ends learn of a smaller MTU by ICMP.
    Off,
    /// As [`MssClamp::Auto`], and at most so many bytes.
    AtMost(u16),
}

impl Serialize for MssClamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MssClamp::Auto => serializer.serialize_str("auto"),
            MssClamp::Off => serializer.serialize_str("off"),
            MssClamp::AtMost(bytes) => serializer.serialize_u16(*bytes),
        }
    }
}

impl<'de> Deserialize<'de> for MssClamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MssClamp, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Word(String),
            Bytes(i64),
        }
        let bad = || D::Error::custom("not \"auto\", \"off\" or a number of bytes from 536 to 65495");
        match Form::deserialize(deserializer).map_err(|_| bad())? {
            Form::Word(word) if word == "auto" => Ok(MssClamp::Auto),
            Form::Word(word) if word == "off" => Ok(MssClamp::Off),
            Form::Bytes(bytes @ 536..=65_495) => Ok(MssClamp::AtMost(bytes as u16)),
            _ => Err(bad()),
        }
    }
}

/// `[snat]`: addresses and ports for masquerading.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnatSection {
    /// Addresses to masquerade to; empty: the address of the port that a packet leaves by.
    pub addresses: Vec<IpAddr>,
    /// Source ports that are ours alone.
    pub ports: PortRange,
}

/// `[source_checks]`: packets whose source cannot be right are dropped, each kind unless it is switched off here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceChecks {
    /// A source that is inside, such as a pod's, from the outside (RFC 3704).
    pub pod_from_outside: bool,
    /// A source that is outside, such as a client's, from the inside (RFC 2827).
    pub client_from_inside: bool,
    /// At the port of a pod, a source that is not routed to that port (RFC 3704 section 2.2).
    pub foreign_source: bool,
    /// A source that is ours: an address of a Service, or of the gateway.
    pub own_source: bool,
    /// A source that may not appear on a wire: loopback, multicast, reserved (RFC 1812 section 5.3.7, RFC 6890).
    pub martian_source: bool,
    /// A source that is the destination.
    pub land: bool,
}

impl Default for SourceChecks {
    fn default() -> SourceChecks {
        SourceChecks {
            pod_from_outside: true,
            client_from_inside: true,
            foreign_source: true,
            own_source: true,
            martian_source: true,
            land: true,
        }
    }
}

/// `[[egress]]`: connections that pods open to the outside of the cluster and that leave with an address of the gateway. Pods, nodes and
/// Services see pods' own addresses in any case, as the Kubernetes network model wants it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressSection {
    /// Ranges of the pods; empty: all pods.
    pub pods: Vec<IpNet>,
    /// Ranges of destinations; empty: everything that is outside of the cluster.
    pub destinations: Vec<IpNet>,
    /// Destinations that see pods' own addresses all the same.
    pub except: Vec<IpNet>,
    /// Addresses to masquerade to; empty: as for Services.
    pub addresses: Vec<IpAddr>,
}

/// An inclusive range of ports, written `61000-65535`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not less than the first.
    pub last: u16,
}

impl Default for PortRange {
    fn default() -> PortRange {
        PortRange { first: 61000, last: 65535 }
    }
}

impl PortRange {
    /// True if any port is in both.
    pub fn overlaps(self, other: PortRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// True if `port` is in the range.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<PortRange, String> {
        let bad = || "not a range of ports; write it as \"61000-65535\"".to_owned();
        let (first, last) = text.split_once('-').ok_or_else(bad)?;
        let range = PortRange {
            first: first.trim().parse().map_err(|_| bad())?,
            last: last.trim().parse().map_err(|_| bad())?,
        };
        if range.first > range.last { Err(bad()) } else { Ok(range) }
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortRange, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// `[control]`: the control socket and the kept state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlSection {
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Members of this group may use the socket; absent: root and the daemon's own user only.
    pub group: Option<String>,
    /// Account that the data plane runs as; absent: `towpath` if it exists, else `nobody`.
    pub user: Option<String>,
    /// Where accepted objects are kept over restarts.
    pub state_dir: PathBuf,
    /// Bytes that unfinished changes of all clients together may take.
    pub staging_bytes: u64,
    /// Clients served at a time.
    pub max_clients: u32,
}

impl Default for ControlSection {
    fn default() -> ControlSection {
        ControlSection {
            socket: crate::control::DEFAULT_SOCKET.into(),
            group: None,
            user: None,
            state_dir: "/var/lib/towpath".into(),
            staging_bytes: 256 << 20,
            max_clients: 64,
        }
    }
}

/// `[workers]`: threads that forward; worker i serves queue i of every port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersSection {
    /// CPUs, one worker each.
    pub cpus: Vec<u32>,
    /// What a worker does when there is nothing to do.
    pub poll: Poll,
}

impl Default for WorkersSection {
    fn default() -> WorkersSection {
        WorkersSection { cpus: vec![1], poll: Poll::Adaptive }
    }
}

/// What a worker does when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Poll {
    /// Spins a little, then sleeps until packets come.
    #[default]
    Adaptive,
    /// Spins: a whole CPU, the lowest latency.
    Busy,
}

/// `[flows]`: the flow table. Timeouts are those of RFC 5382 (TCP), RFC 4787 (UDP) and RFC 5508 (ICMP).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowsSection {
    /// Connections that fit.
    pub capacity: u32,
    /// File of the table, on a tmpfs.
    pub region: PathBuf,
    /// Clients that session affinity remembers, part of the capacity; absent: a quarter of it.
    pub affinity_capacity: Option<u32>,
    /// Idle seconds of an established TCP connection (RFC 5382 REQ-5: at least 2 h 4 min).
    pub tcp_established_s: u32,
    /// Idle seconds of a TCP connection that is opening or closing (RFC 5382 REQ-5: at least 4 min).
    pub tcp_transitory_s: u32,
    /// Idle seconds of a UDP flow with packets in both directions (RFC 4787 REQ-5: 5 min recommended).
    pub udp_s: u32,
    /// Idle seconds of a UDP flow without a reply.
    pub udp_one_way_s: u32,
    /// Idle seconds of a ping (RFC 5508 REQ-2: at least 60 s).
    pub icmp_s: u32,
}

impl Default for FlowsSection {
    fn default() -> FlowsSection {
        FlowsSection {
            capacity: 262_144,
            region: "/run/towpath/flows".into(),
            affinity_capacity: None,
            tcp_established_s: 7_440,
            tcp_transitory_s: 240,
            udp_s: 300,
            udp_one_way_s: 30,
            icmp_s: 60,
        }
    }
}

/// `[fragments]`: datagrams whose fragments are not all here yet. When something is full, the datagram that has waited for longest
/// goes. The times are those of Linux (net.ipv4.ipfrag_time, net.ipv6.ip6frag_time).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FragmentsSection {
    /// Datagrams that wait in each worker at most.
    pub datagrams: u32,
    /// Frames of packet memory that they take in each worker at most.
    pub frames: u32,
    /// Seconds that fragments of IPv4 wait.
    pub ipv4_s: u32,
    /// Seconds that fragments of IPv6 wait (RFC 8200 section 4.5).
    pub ipv6_s: u32,
}

impl Default for FragmentsSection {
    fn default() -> FragmentsSection {
        FragmentsSection { datagrams: 256, frames: 512, ipv4_s: 30, ipv6_s: 60 }
    }
}

/// `[rings]`: descriptors in the rings of each queue; powers of two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RingsSection {
    /// Receive ring.
    pub rx: u32,
    /// Transmit ring.
    pub tx: u32,
    /// Fill ring.
    pub fill: u32,
    /// Completion ring.
    pub completion: u32,
}

impl Default for RingsSection {
    fn default() -> RingsSection {
        RingsSection { rx: 2048, tx: 2048, fill: 4096, completion: 2048 }
    }
}

/// `[umem]`: packet memory, one area for each worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UmemSection {
    /// Bytes of a frame: 2048 or 4096.
    pub chunk_size: u32,
    /// Frames of a worker; absent: twice what the rings of all ports and fragments can hold.
    pub frames: Option<u32>,
    /// Take hugepages (2 MiB); they must have been reserved.
    pub hugepages: bool,
}

impl Default for UmemSection {
    fn default() -> UmemSection {
        UmemSection { chunk_size: 4096, frames: None, hugepages: false }
    }
}

impl FlowsSection {
    /// Clients that session affinity remembers: `affinity_capacity`, or a quarter of the capacity.
    pub fn affinity_entries(&self) -> u32 {
        self.affinity_capacity.unwrap_or(self.capacity / 4)
    }
}

impl Gateway {
    /// Ports at most; the steering program numbers queues by port.
    pub const MAX_PORTS: usize = 16;
    /// Workers at most, and thus queues of a port.
    pub const MAX_WORKERS: usize = 64;
    /// Frames of a worker at most, as many as the ledger of their owners numbers.
    pub const MAX_FRAMES: u32 = 1 << 22;

    /// Reads and checks a gateway file. `file` is its name in errors. Errors: all that were found, in file order.
    pub fn parse(text: &str, file: &str) -> Result<Gateway, Vec<Fault>> {
        let places = locate::Places::of(text);
        let mut faults = match toml::from_str::<Gateway>(text) {
            Ok(gateway) => match gateway.check() {
                faults if faults.is_empty() => return Ok(gateway),
                faults => faults,
            },
            Err(error) => vec![places.describe(text, &error)],
        };
        for fault in &mut faults {
            let line = match (&fault.source, &fault.field) {
                (Some(known), _) => known.line,
                (None, Some(field)) => places.line(text, field),
                (None, None) => None,
            };
            fault.source = Some(Box::new(Source { file: file.to_owned(), document: 0, line }));
        }
        faults.sort_by_key(|fault| fault.source.as_ref().and_then(|source| source.line));
        Err(faults)
    }

    /// Reads and checks the gateway file at `path`.
    pub fn load(path: &Path) -> Result<Gateway, Vec<Fault>> {
        let file = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Gateway::parse(&text, &file),
            Err(error) => {
                let source = Source { file, ..Source::default() };
                Err(vec![Fault::new(Code::Invalid, format!("cannot be read: {error}")).source(&source)])
            }
        }
    }

    /// Everything that is wrong, as far as the file alone can tell.
    pub fn check(&self) -> Vec<Fault> {
        check::check(self)
    }

    /// Frames of one worker's packet memory: `[umem] frames`, or twice what is needed.
    pub fn frames_per_worker(&self) -> u32 {
        self.umem.frames.unwrap_or_else(|| {
            self.frames_needed().saturating_mul(2).next_power_of_two().min(Gateway::MAX_FRAMES)
        })
    }

    /// Frames that a worker needs, so that fragments that wait leave the rings their own.
    pub fn frames_needed(&self) -> u32 {
        self.frames_in_rings().saturating_add(self.fragments.frames)
    }

    /// Frames that the rings of one worker's queues can hold at a time: a frame is in the fill or receive ring of its
    /// port, or in a transmit or completion ring.
    pub fn frames_in_rings(&self) -> u32 {
        let per_port = self.rings.fill.max(self.rings.rx).saturating_add(self.rings.tx);
        per_port.saturating_mul(self.ports.len() as u32)
    }

    /// Addresses that are there to be masqueraded to, those of Services in front.
    pub fn masquerade_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.snat.addresses.iter().chain(self.egress.iter().flat_map(|section| &section.addresses)).copied()
    }

    /// Indexes of the ports that clients are behind.
    pub fn outside_ports(&self) -> impl Iterator<Item = usize> {
        self.ports.iter().enumerate().filter(|(_, port)| port.role.is_outside()).map(|(index, _)| index)
    }

    /// Indexes of the ports that nodes and pods are behind.
    pub fn inside_ports(&self) -> impl Iterator<Item = usize> {
        self.ports.iter().enumerate().filter(|(_, port)| port.role.is_inside()).map(|(index, _)| index)
    }
}

/// Ring sizes that the kernel takes without falling back to scattered memory.
pub(crate) const RING_SIZES: RangeInclusive<u32> = 64..=65_536;

#[cfg(test)]
mod tests;
