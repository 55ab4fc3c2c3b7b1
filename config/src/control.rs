//! The control protocol: JSON, one message a line, over a Unix stream socket.
//!
//! # A conversation
//!
//! The client speaks first. Each line of it is a [`Request`], each line of the daemon a [`Reply`]; replies come in the
//! order of their requests. No line is longer than [`MAX_LINE_BYTES`].
//!
//! 1. `hello` in both directions, with the version of the protocol.
//! 2. Questions: `get`, `describe`, `status` and so on. A dump is any number of `item`s and one `end`.
//! 3. A change: `begin`, then one `apply` or `delete` a line, then `commit` (or `abort`). It is one transaction and one
//!    generation, all or nothing. `begin`, `apply` and `delete` are not answered; what was wrong with any of them is told
//!    in the `refused` that answers `commit`. Only what makes it pointless to go on (a limit, garbage) is answered at
//!    once, by `fault`, and then the daemon closes the connection. Closing the connection before `commit` is an `abort`.
//! 4. A stream: `capture` is answered by `capturing`, then by an `item` for each packet as it passes, until `captured`. It
//!    ends by itself after the count that was asked for, or at the next byte that the client sends, or when the client
//!    closes its side (shutdown(2) of writing is enough); what was captured until then is still sent, for a second at most.
//!
//! ```text
//! > {"hello":{"version":1,"client":"towpathctl 0.1.0"}}
//! < {"hello":{"version":1,"server":"towpathd 0.1.0","gateway":"gw-1","generation":6}}
//! > {"begin":{}}
//! > {"apply":{"source":{"file":"web.yaml","document":1},"object":{"apiVersion":"v1","kind":"Service",...}}}
//! > "commit"
//! < {"committed":{"generation":7,...}}
//! ```
//!
//! # Versions
//!
//! [`VERSION`] is raised when a message changes so that an older peer would misunderstand it. A daemon serves exactly
//! one version and answers a `hello` of another with a [`Code::Version`](crate::fault::Code) fault that names both, then
//! closes. Within a version only optional fields, new requests and new row fields are added: readers ignore fields that
//! they do not know, and a request that the daemon does not know is answered by a `fault`, after which the connection goes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::capture::{Capture, CapturedPacket};
use crate::fault::{Fault, Source};
use crate::gateway::PortSection;
use crate::packet::PacketSpec;

/// Version of the protocol.
pub const VERSION: u32 = 1;

/// Longest line in either direction, bytes, the newline included.
pub const MAX_LINE_BYTES: usize = 2 << 20;

/// Where the daemon listens unless the gateway file says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/towpath/control.sock";

/// What a client asks. The whole API of the daemon is this enum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// First line of a conversation. Answer: [`Reply::Hello`].
    Hello {
        /// [`VERSION`] of the client.
        version: u32,
        /// Name and version of the client, for logs.
        client: String,
    },
    /// Begins a change. Not answered.
    Begin(Begin),
    /// Adds or replaces one object of the change. Not answered.
    Apply(Apply),
    /// Removes one object in the change. Not answered.
    Delete(Delete),
    /// Ends the change and puts it in force. Answer: [`Reply::Committed`] or [`Reply::Refused`].
    Commit,
    /// Forgets the change. Answer: [`Reply::Done`].
    Abort,
    /// Lists things. Answer: [`Reply::Item`]..., [`Reply::End`].
    Get(Get),
    /// Everything about one Service. Answer: [`Reply::Service`], or [`Reply::Fault`] with `not_found`.
    DescribeService {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// Health at a glance. Answer: [`Reply::Status`].
    Status,
    /// Counters of all workers. Answer: [`Reply::Stats`].
    Stats,
    /// Counters of drop reasons. Answer: [`Reply::Drops`].
    Drops,
    /// Everything that is measured, for Prometheus. Answer: [`Reply::Metrics`].
    Metrics,
    /// Lists flows. Answer: [`Reply::Item`] with [`Item::Flow`]..., [`Reply::End`].
    Flows {
        /// Which flows.
        #[serde(default)]
        filter: FlowFilter,
        /// At most so many.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u64>,
    },
    /// Counts flows. Answer: [`Reply::FlowCount`].
    CountFlows {
        /// Which flows.
        #[serde(default)]
        filter: FlowFilter,
    },
    /// Removes flows; their next packet is judged anew. Answer: [`Reply::FlowCount`] with how many were removed.
    FlushFlows {
        /// Which flows; an empty filter means all of them.
        #[serde(default)]
        filter: FlowFilter,
    },
    /// What would happen to a packet now, on the live tables and flows, changing nothing. Answer: [`Reply::Trace`].
    Trace {
        /// The packet.
        packet: PacketSpec,
    },
    /// Packets as they pass. Answer: [`Reply::Capturing`], [`Item::Packet`]..., [`Reply::Captured`].
    Capture(Capture),
    /// Adds or removes a port. Answer: [`Reply::Fault`] if it is refused. If it is done, the data plane starts anew, so that the
    /// connection ends without an answer; [`Noun::Ports`] tells then what there is.
    Port(PortChange),
}

/// A change of the ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortChange {
    /// Makes an interface a port.
    Add(PortSection),
    /// Takes a port away.
    Remove {
        /// Its name.
        name: String,
    },
}

/// Begins a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Check everything, change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Objects that this change does not apply are removed: the state becomes exactly what is applied.
    /// A change that applies nothing is refused.
    #[serde(default)]
    pub prune: bool,
    /// Refuse the change unless this generation is the current one (compare and set).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect_generation: Option<u64>,
}

/// One object of a change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// Where the client read it, for errors.
    #[serde(default)]
    pub source: Source,
    /// The Kubernetes object as JSON, with `apiVersion` and `kind`.
    pub object: serde_json::Value,
}

/// One removal of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delete {
    /// Where the client read it, for errors.
    #[serde(default)]
    pub source: Source,
    /// Which object.
    pub object: ObjectRef,
    /// An object that does not exist is no error.
    #[serde(default)]
    pub ignore_not_found: bool,
}

/// The kinds of objects that Towpath keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// v1 Namespace.
    Namespace,
    /// v1 Node.
    Node,
    /// v1 Pod.
    Pod,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// towpath.dev/v1 PodRoute, Towpath's own.
    PodRoute,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 6] =
        [Kind::Namespace, Kind::Node, Kind::Pod, Kind::Service, Kind::EndpointSlice, Kind::PodRoute];

    /// Its name as `kind:` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Namespace => "Namespace",
            Kind::Node => "Node",
            Kind::Pod => "Pod",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::PodRoute => "PodRoute",
        }
    }

    /// Its name as kubectl prints it before a slash, such as `service/web`.
    pub const fn resource(self) -> &'static str {
        match self {
            Kind::Namespace => "namespace",
            Kind::Node => "node",
            Kind::Pod => "pod",
            Kind::Service => "service",
            Kind::EndpointSlice => "endpointslice.discovery.k8s.io",
            Kind::PodRoute => "podroute.towpath.dev",
        }
    }

    /// True if its objects live in a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Kind::Namespace | Kind::Node | Kind::PodRoute)
    }
}

/// Names one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// `metadata.namespace`; empty for kinds without one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl std::fmt::Display for ObjectRef {
    /// `Service default/my-nginx`, `Node node-1`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.kind.is_namespaced() {
            write!(f, "{} {}/{}", self.kind.name(), self.namespace, self.name)
        } else {
            write!(f, "{} {}", self.kind.name(), self.name)
        }
    }
}

/// Lists things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Get {
    /// What to list.
    pub what: Noun,
    /// Only this namespace; absent: all of them. Ignored for nouns without namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Only this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whole Kubernetes objects ([`Item::Object`]) instead of rows; only for nouns that are Kubernetes objects.
    #[serde(default)]
    pub objects: bool,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Noun {
    /// [`Item::Service`], or Service objects.
    Services,
    /// [`Item::Endpoint`], or EndpointSlice objects.
    Endpoints,
    /// [`Item::Node`], or Node objects.
    Nodes,
    /// [`Item::Pod`], or Pod objects.
    Pods,
    /// [`Item::Namespace`], or Namespace objects.
    Namespaces,
    /// Objects of every kind, each as [`Item::Object`], in the order in which they can be applied again.
    All,
    /// [`Item::Route`].
    Routes,
    /// [`Item::Neighbor`].
    Neighbors,
    /// [`Item::Port`].
    Ports,
    /// [`Item::Worker`].
    Workers,
    /// [`Item::Dns`]: names of Services and pods, for a hosts file.
    Dns,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To `hello`.
    Hello {
        /// [`VERSION`] of the daemon.
        version: u32,
        /// Name and version of the daemon.
        server: String,
        /// `[gateway] name`.
        gateway: String,
        /// Generation in force.
        generation: u64,
    },
    /// Nothing to tell.
    Done,
    /// The change is accepted.
    Committed(Committed),
    /// Nothing of the change took effect.
    Refused {
        /// What was wrong, at most 20 of them, in the order of the objects.
        faults: Vec<Fault>,
        /// How many more there were.
        #[serde(default)]
        more: u32,
        /// What else was noticed.
        #[serde(default)]
        warnings: Vec<Fault>,
    },
    /// One of a list.
    Item(Item),
    /// The list is complete.
    End {
        /// How many items there were.
        count: u64,
    },
    /// To `describe_service`.
    Service(Box<ServiceDescription>),
    /// To `status`.
    Status(Box<Status>),
    /// To `stats`.
    Stats(Stats),
    /// To `drops`.
    Drops(Drops),
    /// To `metrics`.
    Metrics {
        /// In the OpenMetrics text format.
        text: String,
    },
    /// To `count_flows` and `flush_flows`.
    FlowCount {
        /// How many flows matched.
        count: u64,
    },
    /// To `trace`.
    Trace(Box<Trace>),
    /// To `capture`: from now on every worker captures.
    Capturing {
        /// Names of the ports that are looked at.
        ports: Vec<String>,
    },
    /// The capture is over.
    Captured {
        /// How many packets were sent.
        count: u64,
        /// How many more it wanted, and could not keep or send since its reader was slow.
        missed: u64,
    },
    /// The request failed.
    Fault(Fault),
}

/// A change that was accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The generation that holds the change; the current one if nothing changed or for a dry run.
    pub generation: u64,
    /// Nothing was changed, only checked.
    pub dry_run: bool,
    /// What became of each object, in the order of the requests; pruned ones last.
    pub changes: Vec<Change>,
    /// Workers that had the generation in force when the answer was sent.
    pub workers_in_force: u32,
    /// Workers there are.
    pub workers: u32,
    /// What is accepted but deserves a look.
    #[serde(default)]
    pub warnings: Vec<Fault>,
}

/// What became of one object of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The object.
    pub object: ObjectRef,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of one object, in kubectl's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It did not exist.
    Created,
    /// It was different.
    Configured,
    /// It was the same.
    Unchanged,
    /// It is gone.
    Deleted,
    /// It was not applied, and the change prunes.
    Pruned,
    /// It was to be deleted and did not exist.
    NotFound,
}

/// One row of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// A whole Kubernetes object.
    Object(serde_json::Value),
    /// A Service.
    Service(ServiceRow),
    /// An endpoint of a slice.
    Endpoint(EndpointRow),
    /// A Node.
    Node(NodeRow),
    /// A Pod.
    Pod(PodRow),
    /// A Namespace.
    Namespace(NamespaceRow),
    /// A route.
    Route(RouteRow),
    /// A neighbor.
    Neighbor(NeighborRow),
    /// A port.
    Port(PortRow),
    /// A worker.
    Worker(WorkerRow),
    /// A flow.
    Flow(FlowRow),
    /// A name.
    Dns(DnsRow),
    /// A captured packet.
    Packet(CapturedPacket),
}

/// A Service, with kubectl's columns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRow {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.type`, `ClusterIP` if absent.
    #[serde(rename = "type")]
    pub type_: String,
    /// `spec.clusterIPs`; `None` for a headless Service.
    pub cluster_ips: Vec<String>,
    /// LoadBalancer addresses, then externalIPs; for ExternalName the name.
    pub external_ips: Vec<String>,
    /// `80/TCP`, with a node port `80:30080/TCP`.
    pub ports: Vec<String>,
    /// `metadata.creationTimestamp`, RFC 3339, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// `spec.selector` as `k=v,k=v`.
    pub selector: String,
    /// Frontends that are served.
    pub frontends: u32,
    /// Frontends that are switched off; `describe service` says why.
    pub frontends_off: u32,
    /// Different endpoints that are ready.
    pub endpoints_ready: u32,
    /// Different endpoints there are.
    pub endpoints: u32,
}

/// One endpoint of one port of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// `metadata.namespace` of the slice.
    pub namespace: String,
    /// Label `kubernetes.io/service-name`; empty if absent.
    pub service: String,
    /// `metadata.name` of the slice.
    pub slice: String,
    /// `endpoints[].addresses[0]`.
    pub address: String,
    /// `ports[].port`.
    pub port: u16,
    /// `ports[].name`.
    pub port_name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `conditions.ready`, absent meaning true.
    pub ready: bool,
    /// `conditions.serving`, absent meaning true.
    pub serving: bool,
    /// `conditions.terminating`, absent meaning false.
    pub terminating: bool,
    /// `endpoints[].nodeName`.
    pub node: String,
    /// `endpoints[].zone`.
    pub zone: String,
    /// `endpoints[].targetRef` as `Pod/name`.
    pub target: String,
    /// The Service is not known yet: the slice waits for it.
    pub waits: bool,
}

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// `metadata.name`.
    pub name: String,
    /// Addresses of type InternalIP.
    pub internal_ips: Vec<String>,
    /// Addresses of type ExternalIP.
    pub external_ips: Vec<String>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<String>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: String,
    /// Condition Ready: `True`, `False`, `Unknown`, or empty if there is none.
    pub ready: String,
    /// It is the gateway itself.
    pub this_gateway: bool,
    /// How its pods are reached: `native` or `vxlan`.
    #[serde(default)]
    pub overlay: String,
    /// `metadata.creationTimestamp`, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
}

/// A Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRow {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `status.podIPs`.
    pub ips: Vec<String>,
    /// `spec.nodeName`.
    pub node: String,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.containers[].ports[]` that have a `hostPort`, as `8080->80/TCP` or `192.0.2.1:8080->80/TCP`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<String>,
    /// `status.phase`.
    pub phase: String,
    /// `metadata.creationTimestamp`, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
}

/// A Namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceRow {
    /// `metadata.name`.
    pub name: String,
    /// `status.phase`, `Active` if absent.
    pub phase: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.creationTimestamp`, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
}

/// A route of the forwarding table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRow {
    /// Destination, such as `10.244.1.0/24`.
    pub prefix: String,
    /// `next-hop`, `on-link`, `local`, `kernel` or `blackhole`.
    pub kind: String,
    /// Address of the next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// Name of the port to leave by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Link-layer address of the next hop, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Largest IP packet, bytes: in an overlay, of those inside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// The overlay that packets travel in, and the node where it ends, such as `vxlan:10.0.0.2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<String>,
}

/// A neighbor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighborRow {
    /// Its address.
    pub address: String,
    /// Name of the port that it is behind.
    pub port: String,
    /// Its link-layer address, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// `reachable` or `unresolved`.
    pub state: String,
}

/// A port of the gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    /// Its index.
    pub index: u32,
    /// `[[port]] name`.
    pub name: String,
    /// `[[port]] interface`.
    pub interface: String,
    /// `outside`, `inside` or `both`.
    pub role: String,
    /// `zero-copy`, `copy` or `generic`: what the kernel granted.
    pub mode: String,
    /// Queues that are served.
    pub queues: u32,
    /// Link-layer address.
    pub mac: String,
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// Has a carrier and is administratively up.
    pub up: bool,
    /// Its first global addresses.
    pub addresses: Vec<String>,
    /// Counters of the port by name, those of its rings included.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

/// A worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRow {
    /// Its index.
    pub index: u32,
    /// CPU that it is pinned to.
    pub cpu: u32,
    /// `adaptive` or `busy`.
    pub poll: String,
    /// Generation that it has in force.
    pub generation: u64,
    /// Milliseconds since its last heartbeat.
    pub heartbeat_age_ms: u64,
    /// `running`, `sleeping` or `stuck`.
    pub state: String,
    /// Its counters by name.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
    /// Where the frames of its packet memory are.
    #[serde(default)]
    pub frames: FramesRow,
}

/// Where the frames of a worker's packet memory are, at about one moment of the last few milliseconds. When no packet moves
/// they are exactly `total` = `free` + `held` + `fill` + `rx` + `tx` + `completion` + `kernel`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FramesRow {
    /// All there are.
    pub total: u64,
    /// Free.
    pub free: u64,
    /// In packets that wait for a next hop.
    pub held: u64,
    /// On the fill rings, for packets to come.
    pub fill: u64,
    /// On the receive rings.
    pub rx: u64,
    /// On the transmit rings.
    pub tx: u64,
    /// On the completion rings: sent.
    pub completion: u64,
    /// On no ring: in the hands of kernel or driver.
    pub kernel: u64,
    /// Nowhere; negative if some are in two places. Anything but 0 is a bug. Exact at every moment.
    pub missing: i64,
}

/// A flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRow {
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `sctp`.
    pub protocol: String,
    /// Client, `address:port`.
    pub client: String,
    /// What the client spoke to, `address:port`.
    pub frontend: String,
    /// Endpoint, `address:port`; the same as `frontend` if nothing is translated.
    pub endpoint: String,
    /// Source that the endpoint sees, `address:port`, if it is not the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masqueraded_as: Option<String>,
    /// State of the connection, such as `established`.
    pub state: String,
    /// `namespace/name:port` of the Service, if it is one's flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Seconds since it was created.
    pub age_s: u32,
    /// Seconds since its last packet.
    pub idle_s: u32,
    /// Seconds after which it expires when idle.
    pub timeout_s: u32,
    /// Generation of the tables that created it.
    pub generation: u64,
}

/// A name for a hosts file.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DnsRow {
    /// Fully qualified, without the dot at the end: `web.default.svc.cluster.local`.
    pub name: String,
    /// One address of it.
    pub address: String,
}

/// Which flows; what is absent does not matter, what is present must all hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowFilter {
    /// `tcp`, `udp`, `icmp`, `icmpv6` or `sctp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Address or prefix of the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// Address or prefix, or `address:port`, that the client spoke to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontend: Option<String>,
    /// Address or prefix, or `address:port`, of the endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// `namespace/name` of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// State of the connection, such as `established`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// Everything about one Service: what is served, which endpoints are used, and why the others are not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceDescription {
    /// The Service as a row.
    pub service: ServiceRow,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic_policy: String,
    /// `spec.externalTrafficPolicy`; empty if the Service is not reachable from outside.
    pub external_traffic_policy: String,
    /// `spec.sessionAffinity`, with its timeout: `None`, `ClientIP (10800 s)`.
    pub session_affinity: String,
    /// `spec.trafficDistribution`; empty if absent.
    pub traffic_distribution: String,
    /// How new connections are spread: `maglev`, `random` or `least-connections`.
    #[serde(default)]
    pub lb_algorithm: String,
    /// What becomes of the connections of an endpoint that goes: `leave`, or when they are reset.
    #[serde(default)]
    pub on_endpoint_removed: String,
    /// Why the Service is not served at all, if it is not: headless, ExternalName, another proxy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// What is served.
    pub frontends: Vec<FrontendDescription>,
    /// Every endpoint of every slice.
    pub endpoints: Vec<EndpointDescription>,
    /// What deserves a look.
    #[serde(default)]
    pub warnings: Vec<Fault>,
}

/// One (address, protocol, port) of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendDescription {
    /// Its address.
    pub address: String,
    /// Its port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `spec.ports[].name`.
    pub port_name: String,
    /// `ClusterIP`, `LoadBalancer`, `ExternalIP` or `NodePort`.
    pub kind: String,
    /// `spec.loadBalancerSourceRanges` that apply.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<String>,
    /// What happens to clients outside the cluster.
    pub from_outside: ActionDescription,
    /// What happens to pods of the cluster.
    pub from_pod: ActionDescription,
    /// What happens to nodes.
    pub from_node: ActionDescription,
}

/// What happens to the first packet of a connection to a frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionDescription {
    /// `dnat`, `reject` or `drop`.
    pub action: String,
    /// For `dnat`, which list: `cluster`, `cluster-terminating`, `local`, `local-terminating`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<String>,
    /// For `dnat`, how many endpoints share the connections.
    #[serde(default)]
    pub endpoints: u32,
    /// For `dnat`, whether the source is translated too.
    #[serde(default)]
    pub masquerade: bool,
    /// For `reject` and `drop`, the name of the drop reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The rule that decided, in a sentence.
    pub rule: String,
}

/// One endpoint of a Service and what it is used for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointDescription {
    /// The endpoint as a row.
    pub endpoint: EndpointRow,
    /// Lists that it is in: `cluster`, `local` and so on. Empty if it gets no new connection.
    pub lists: Vec<String>,
    /// Its share of the new connections of each of `lists`, in their order, in hundredths of a percent.
    #[serde(default)]
    pub shares_bp: Vec<u32>,
    /// Its weight, from 0 for no new connections to 1000.
    #[serde(default)]
    pub weight: u16,
    /// Its connections through this gateway now, whichever Service they came by; absent where nobody counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// If it gets none, the rule why, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused: Option<String>,
}

/// A number with its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Its name, as in metrics.
    pub name: String,
    /// Its value.
    pub value: u64,
    /// What it counts, in a sentence.
    pub help: String,
}

/// Packets that were received but not forwarded, and those that were lost before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops {
    /// Every reason of the pipeline, in the order of the counters, those with a count of 0 too. Of packets received.
    pub reasons: Vec<Count>,
    /// Losses in the receive rings. They were never received, and are in no other sum.
    #[serde(default)]
    pub rings: Vec<Count>,
}

/// Counters of all workers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Milliseconds since the data plane started, so that two answers give a rate.
    pub uptime_ms: u64,
    /// Sums over the workers.
    pub totals: Vec<Count>,
    /// Sums of the drop reasons.
    pub drops: Vec<Count>,
    /// Losses in the receive rings, as in [`Drops::rings`].
    #[serde(default)]
    pub rings: Vec<Count>,
    /// Each worker.
    pub workers: Vec<WorkerRow>,
    /// Flows in the table.
    pub flows: u64,
}

/// Health at a glance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name and version of the daemon.
    pub server: String,
    /// `[gateway] name`.
    pub gateway: String,
    /// Milliseconds since the data plane started.
    pub uptime_ms: u64,
    /// Times that the data plane was started again by its keeper.
    pub restarts: u32,
    /// Generation of the desired state.
    pub generation: u64,
    /// Epoch of the forwarding table.
    pub epoch: u32,
    /// Workers there are.
    pub workers: u32,
    /// Workers that have the generation in force.
    pub workers_in_force: u32,
    /// Objects kept, by kind.
    pub objects: BTreeMap<String, u64>,
    /// Slices whose Service is unknown.
    pub slices_waiting: u64,
    /// Frontends that are served.
    pub frontends: u64,
    /// Frontends that are switched off.
    pub frontends_off: u64,
    /// Flows in the table.
    pub flows: u64,
    /// Of them, those not established yet.
    pub flows_embryonic: u64,
    /// Flows that fit.
    pub flows_capacity: u64,
    /// The ports.
    pub ports: Vec<PortRow>,
    /// What needs attention; empty when all is well.
    pub problems: Vec<Fault>,
}

/// What becomes of a packet, stage by stage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The packet as it came in.
    pub packet: String,
    /// What each stage found, in packet order.
    pub steps: Vec<TraceStep>,
    /// `forward`, `answer`, `punt`, `hold` or `drop`.
    pub verdict: String,
    /// Name of the reason, for `answer` and `drop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the reason means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The packet as it leaves, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// Name of the port that it leaves by, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The Service that it belongs to, with every endpoint and why it is used or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceDescription>,
    /// Where its client is, as far as it was judged: `outside`, `pod` or `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The frontend that it matched: `address:port/protocol`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontend: Option<String>,
    /// The endpoint that was chosen, `address:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// What one stage found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStep {
    /// Name of the stage, as its file is named.
    pub stage: String,
    /// What it found or did, in a sentence.
    pub text: String,
}

impl Request {
    /// The request as a line, newline included.
    pub fn to_line(&self) -> String {
        line(self)
    }

    /// Reads one line. Pure; never panics, whatever the bytes are.
    pub fn from_line(line: &[u8]) -> Result<Request, Fault> {
        read(line, "request")
    }
}

impl Reply {
    /// The reply as a line, newline included.
    pub fn to_line(&self) -> String {
        line(self)
    }

    /// Reads one line. Pure; never panics, whatever the bytes are.
    pub fn from_line(line: &[u8]) -> Result<Reply, Fault> {
        read(line, "reply")
    }
}

fn line(message: &impl Serialize) -> String {
    // Messages have string keys and no maps of other keys, so that serializing them cannot fail.
    let mut text = serde_json::to_string(message).expect("a message is always JSON");
    text.push('\n');
    text
}

fn read<T: serde::de::DeserializeOwned>(line: &[u8], what: &str) -> Result<T, Fault> {
    use crate::fault::Code;
    if line.len() > MAX_LINE_BYTES {
        let fault = Fault::new(Code::Limit, format!("the {what} is longer than {MAX_LINE_BYTES} bytes"));
        return Err(fault.value(format!("{} bytes", line.len())));
    }
    serde_json::from_slice(line).map_err(|e| {
        let code = if e.is_data() { Code::Request } else { Code::Syntax };
        Fault::new(code, format!("not a {what} of control protocol version {VERSION}: {e}"))
            .remedy("use the towpathctl of the daemon's version")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    fn object() -> ObjectRef {
        ObjectRef { kind: Kind::Service, namespace: "default".into(), name: "web".into() }
    }

    #[test]
    fn requests_survive_the_round_trip() {
        let requests = [
            Request::Hello { version: VERSION, client: "c".into() },
            Request::Begin(Begin { dry_run: true, prune: false, expect_generation: Some(3) }),
            Request::Apply(Apply {
                source: Source::default(),
                object: serde_json::json!({"kind": "Service"}),
            }),
            Request::Delete(Delete { source: Source::default(), object: object(), ignore_not_found: true }),
            Request::Commit,
            Request::Get(Get { what: Noun::Services, namespace: None, name: None, objects: true }),
            Request::FlushFlows { filter: FlowFilter { protocol: Some("udp".into()), ..Default::default() } },
        ];
        for request in requests {
            let line = request.to_line();
            assert!(line.ends_with('\n') && !line[..line.len() - 1].contains('\n'));
            assert_eq!(Request::from_line(line.trim_end().as_bytes()).unwrap(), request);
        }
    }

    #[test]
    fn the_wire_form_is_what_the_module_documents() {
        assert_eq!(
            Request::from_line(br#"{"hello":{"version":1,"client":"towpathctl 0.1.0"}}"#).unwrap(),
            Request::Hello { version: 1, client: "towpathctl 0.1.0".into() }
        );
        assert_eq!(Request::from_line(br#"{"begin":{}}"#).unwrap(), Request::Begin(Begin::default()));
        assert_eq!(Request::from_line(br#""commit""#).unwrap(), Request::Commit);
        assert_eq!(
            Request::from_line(br#"{"flows":{}}"#).unwrap().to_line(),
            "{\"flows\":{\"filter\":{}}}\n"
        );
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_requests_are_not() {
        let known = Request::from_line(br#"{"begin":{"dry_run":true,"from_the_future":1}}"#).unwrap();
        assert_eq!(known, Request::Begin(Begin { dry_run: true, ..Default::default() }));
        assert_eq!(Request::from_line(br#"{"teleport":{}}"#).unwrap_err().code, Code::Request);
    }

    #[test]
    fn garbage_is_refused_with_words() {
        let deep = "[".repeat(100_000);
        let long = vec![b' '; MAX_LINE_BYTES + 1];
        for (bytes, code) in [
            (&b""[..], Code::Syntax),
            (b"\0\0", Code::Syntax),
            (b"\xff\xfe", Code::Syntax),
            (b"{\"begin\":", Code::Syntax),
            (deep.as_bytes(), Code::Request),
            (&long, Code::Limit),
        ] {
            let fault = Request::from_line(bytes).unwrap_err();
            assert!(fault.code == code || fault.code == Code::Syntax, "{fault}");
            assert!(!fault.message.is_empty());
        }
    }
}
