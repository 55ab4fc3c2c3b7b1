//! Why a packet went where it went: the pipeline tells each step to a [`Trace`]. In production the trace is `()` and costs nothing.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::addr::Tuple;
use crate::packet::{Answer, Layer4};
use crate::table::flow_map::Direction;
use crate::tables::{FrontendKind, Identity, List, Origin, ServicePort, Tunnel};
use crate::verdict::{Reason, Verdict};

/// One thing that the pipeline found out or decided.
#[derive(Clone, Debug)]
pub enum Step {
    /// It came inside a packet of this tunnel.
    Decapsulate(Tunnel),
    /// The headers are sound.
    Parsed(Tuple),
    /// The source of the packet, as the tables know it.
    Origin(Origin),
    /// A flow was found.
    FlowHit {
        /// Which direction of it the packet is.
        direction: Direction,
        /// What the packet becomes.
        out: Tuple,
        /// Generation that the flow was created under.
        generation: u32,
        /// [`ServicePort::stable_id`] of its Service.
        service: u64,
    },
    /// No flow has this tuple.
    FlowMiss,
    /// The flow is to end: its endpoint is gone, and its Service resets such connections.
    Resetting,
    /// An ICMP error quotes a packet of a flow.
    QuotedFlow(Tuple),
    /// The destination is a frontend of a Service.
    Frontend {
        /// The service port.
        service: Arc<ServicePort>,
        /// Field of the Service that it comes from.
        kind: FrontendKind,
    },
    /// The source is in `spec.loadBalancerSourceRanges`, by this range.
    SourceRange(IpNet),
    /// The list of endpoints in use.
    List {
        /// Which one.
        list: List,
        /// How many endpoints it has.
        endpoints: usize,
    },
    /// An endpoint was chosen.
    Chosen {
        /// Address of the endpoint.
        addr: IpAddr,
        /// Port of the endpoint.
        port: u16,
        /// Pod that it is, as namespace/name, or its address.
        name: Arc<str>,
        /// Node that it runs on, may be empty.
        node: Arc<str>,
        /// By what.
        by: ChosenBy,
        /// Session affinity remembers it from now on.
        remembered: bool,
    },
    /// A pod's packet to the outside, which this rule of `[[egress]]` is about.
    Egress {
        /// Its index.
        rule: usize,
    },
    /// The source is translated as well.
    Masquerade {
        /// New source address.
        addr: IpAddr,
        /// New source port.
        port: u16,
        /// Why.
        because: &'static str,
    },
    /// The flow table has no room for the connection, which goes on without an entry.
    NoRoom,
    /// The packet belongs to a connection without an entry.
    WithoutEntry(Tuple),
    /// The destination address is owned by Services, but the packet is for no port of theirs.
    OwnedAddress(Layer4),
    /// The destination address is owned by Services, for the inside only, and the packet is from outside.
    InternalAddress,
    /// The destination is inside a Service range, and no Service has it.
    UnknownService,
    /// No Service; the packet is routed as it is, to this one of the cluster or to somebody else.
    NotAService(Option<Identity>),
    /// The route to the next hop.
    Route {
        /// The prefix.
        prefix: IpNet,
        /// Address of the next hop.
        gateway: IpAddr,
        /// Index of the port.
        port: u8,
    },
    /// It leaves inside a packet of this tunnel.
    Encapsulate(Tunnel),
    /// The maximum segment size of a connection is lowered.
    Mss {
        /// What the sender named, bytes.
        from: u16,
        /// What the receiver will read, bytes.
        to: u16,
    },
    /// The answer of the gateway.
    Answer(Answer),
    /// The end.
    Verdict(Verdict),
}

/// What chose an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChosenBy {
    /// The Maglev table.
    Maglev,
    /// Session affinity remembers the client.
    Affinity,
    /// A random endpoint, by weight.
    Random,
    /// Of two random endpoints the one with fewer connections for its weight.
    LeastConnections,
}

/// Listens to the steps of a burst.
pub trait Trace {
    /// Packet `index` of the burst took a step. The closure runs only if somebody listens.
    fn step(&mut self, index: usize, step: impl FnOnce() -> Step);
}

/// Nobody listens.
impl Trace for () {
    #[inline(always)]
    fn step(&mut self, _: usize, _: impl FnOnce() -> Step) {}
}

/// The steps of a burst of one packet, in order.
impl Trace for Vec<Step> {
    fn step(&mut self, _: usize, step: impl FnOnce() -> Step) {
        self.push(step());
    }
}

impl Step {
    /// The stage that took the step, one word.
    pub fn stage(&self) -> &'static str {
        match self {
            Step::Decapsulate(_) | Step::Encapsulate(_) => "overlay",
            Step::Parsed(_) => "parse",
            Step::Origin(_) => "classify",
            Step::FlowHit { .. } | Step::FlowMiss | Step::Resetting | Step::QuotedFlow(_) => "flow",
            Step::Frontend { .. }
            | Step::SourceRange(_)
            | Step::List { .. }
            | Step::Chosen { .. }
            | Step::WithoutEntry(_)
            | Step::OwnedAddress(_)
            | Step::InternalAddress
            | Step::UnknownService
            | Step::Egress { .. }
            | Step::NotAService(_) => "service",
            Step::Masquerade { .. } | Step::NoRoom => "nat",
            Step::Route { .. } | Step::Mss { .. } => "route",
            Step::Answer(_) => "answer",
            Step::Verdict(_) => "verdict",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Decapsulate(tunnel) => {
                write!(f, "inside a VXLAN packet from {} to {}", tunnel.node, tunnel.local)
            }
            Step::Encapsulate(tunnel) => {
                write!(f, "inside a VXLAN packet from {} to {}", tunnel.local, tunnel.node)
            }
            Step::Parsed(tuple) => write!(f, "{tuple}"),
            Step::Origin(Origin::Outside) => write!(f, "source is outside the cluster"),
            Step::Origin(Origin::Pod) => write!(f, "source is a pod of this cluster"),
            Step::Origin(Origin::Node) => write!(f, "source is a node of this cluster"),
            Step::FlowHit { direction, out, generation, .. } => {
                let direction = match direction {
                    Direction::Original => "known connection",
                    Direction::Reply => "reply of a known connection",
                };
                write!(f, "{direction}, created under generation {generation}: becomes {out}")
            }
            Step::Resetting => write!(f, "its endpoint is gone, and its Service resets such connections"),
            Step::FlowMiss => write!(f, "no connection has this tuple"),
            Step::QuotedFlow(tuple) => write!(f, "ICMP error about {tuple} of a known connection"),
            Step::Frontend { service, kind } => {
                let port = if service.port_name.is_empty() {
                    String::new()
                } else {
                    format!(" port {}", service.port_name)
                };
                let owner = if *kind == FrontendKind::HostPort { "Pod" } else { "Service" };
                write!(f, "{owner} {}/{}{port}, {}", service.namespace, service.name, field(*kind))
            }
            Step::SourceRange(range) => write!(f, "source is in loadBalancerSourceRanges: {range}"),
            Step::List { list, endpoints } => write!(f, "list {}", list_text(*list, *endpoints)),
            Step::Chosen { addr, port, name, node, by, remembered } => {
                let by = match by {
                    ChosenBy::Maglev => "by consistent hash",
                    ChosenBy::Affinity => "by session affinity",
                    ChosenBy::Random => "at random",
                    ChosenBy::LeastConnections => "as the one of two with fewer connections",
                };
                let memory = match (remembered, by) {
                    (true, by) if by != "by session affinity" => ", remembered by session affinity",
                    _ => "",
                };
                let node = if node.is_empty() { String::new() } else { format!(" on {node}") };
                write!(f, "endpoint {} ({name}{node}), {by}{memory}", std::net::SocketAddr::new(*addr, *port))
            }
            Step::Masquerade { addr, port, because } => {
                write!(f, "source becomes {}: {because}", std::net::SocketAddr::new(*addr, *port))
            }
            Step::NoRoom => {
                write!(f, "the flow table has no room: goes on without an entry, always to this endpoint")
            }
            Step::WithoutEntry(out) => {
                write!(
                    f,
                    "its connection found no room in the flow table and goes on without an entry: becomes {out}"
                )
            }
            Step::OwnedAddress(layer4) => write!(f, "an address of Services{}", owned(*layer4)),
            Step::InternalAddress => write!(f, "a ClusterIP, for the inside only"),
            Step::UnknownService => write!(f, "inside a Service range, but no Service has this address"),
            Step::Egress { rule } => {
                write!(f, "from a pod to the outside of the cluster: [[egress]] number {}", rule + 1)
            }
            Step::NotAService(identity) => match identity {
                Some(Identity::Pod) => write!(f, "a pod of this cluster: routed untranslated"),
                Some(Identity::Node) => write!(f, "a node of this cluster: routed untranslated"),
                _ => write!(f, "no Service has this address: routed untranslated"),
            },
            Step::Route { prefix, gateway, port } => {
                write!(f, "route {prefix} by port {port}, next hop {gateway}")
            }
            Step::Mss { from, to } => {
                write!(f, "maximum segment size {from} becomes {to}: larger segments would not fit the way")
            }
            Step::Answer(answer) => match answer {
                Answer::Reset => write!(f, "answered with TCP RST"),
                Answer::PortUnreachable => write!(f, "answered with ICMP port unreachable"),
                Answer::NoRoute => write!(f, "answered with ICMP no route"),
                Answer::TimeExceeded => write!(f, "answered with ICMP time exceeded"),
                Answer::TooBig { mtu } => write!(f, "answered with ICMP packet too big, MTU {mtu}"),
                Answer::EchoReply => write!(f, "answered with an echo reply"),
            },
            Step::Verdict(verdict) => match verdict {
                Verdict::Undecided => write!(f, "undecided"),
                Verdict::Forward { port } => write!(f, "forwarded by port {port}"),
                Verdict::Answer { reason, .. } => explain_reason(f, "not forwarded", *reason),
                Verdict::Punt => write!(f, "handed to the kernel untouched: not ours"),
                Verdict::Hold { .. } => write!(f, "waits until the next hop is resolved"),
                Verdict::Gather => write!(f, "waits for the other fragments of its datagram"),
                Verdict::Drop(reason) => explain_reason(f, "dropped", *reason),
            },
        }
    }
}

fn explain_reason(f: &mut fmt::Formatter<'_>, what: &str, reason: Reason) -> fmt::Result {
    write!(f, "{what}: {} ({})", clause(reason.help()), reason.name())
}

/// A sentence as a clause after a colon: no full stop, and no capital unless the first word is one of capitals.
pub fn clause(sentence: &str) -> String {
    let sentence = sentence.trim_end_matches('.');
    let mut chars = sentence.chars();
    match (chars.next(), chars.next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(sentence.chars().skip(1)).collect()
        }
        _ => sentence.to_owned(),
    }
}

/// Why a packet to an address of Services is for none of their ports.
fn owned(layer4: Layer4) -> &'static str {
    match layer4 {
        Layer4::Echo { request: true } => ": a ping of it is answered by the gateway",
        Layer4::Echo { request: false } | Layer4::IcmpOther => {
            ": of ICMP, only pings and errors about known connections are for it"
        }
        Layer4::IcmpError => ": the ICMP error is about no known connection",
        Layer4::Fragment => ": a fragment does not name a port",
        Layer4::Malformed => ": the header does not name a port",
        Layer4::Tcp { .. } | Layer4::Udp | Layer4::Sctp => ", none of them on this port",
        Layer4::Other => ", none of them with this protocol",
    }
}

/// The field of a Service that a kind of frontend comes from.
fn field(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "spec.clusterIPs",
        FrontendKind::LoadBalancer => "status.loadBalancer.ingress",
        FrontendKind::ExternalIp => "spec.externalIPs",
        FrontendKind::NodePort => "spec.ports[].nodePort",
        FrontendKind::HostPort => "spec.containers[].ports[].hostPort",
    }
}

/// A list and its length, in the words of kube-proxy.
fn list_text(list: List, endpoints: usize) -> String {
    let ones = if endpoints == 1 { "endpoint" } else { "endpoints" };
    match list {
        List::Cluster => format!("cluster: {endpoints} ready {ones} of the cluster"),
        List::ClusterTerminating => {
            format!(
                "cluster-terminating: no endpoint is ready; {endpoints} terminating {ones} that still serve"
            )
        }
        List::Local => format!("local: {endpoints} ready local {ones}"),
        List::LocalTerminating => format!(
            "local-terminating: no local endpoint is ready; {endpoints} terminating local {ones} that still serve"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_become_clauses() {
        assert_eq!(clause("The source is wrong."), "the source is wrong");
        assert_eq!(clause("A ClusterIP."), "a ClusterIP");
        assert_eq!(clause("TTL used up."), "TTL used up");
    }

    #[test]
    fn a_packet_to_an_address_of_services_has_its_own_words() {
        for (layer4, words) in [
            (
                Layer4::Echo { request: true },
                "an address of Services: a ping of it is answered by the gateway",
            ),
            (Layer4::Udp, "an address of Services, none of them on this port"),
            (Layer4::IcmpError, "an address of Services: the ICMP error is about no known connection"),
            (Layer4::Fragment, "an address of Services: a fragment does not name a port"),
        ] {
            assert_eq!(Step::OwnedAddress(layer4).to_string(), words);
        }
    }
}
