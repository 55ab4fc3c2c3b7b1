//! UDP flows that must be forgotten after a change (kubernetes pkg/proxy/conntrack/cleanup.go).
//!
//! A UDP client never opens a connection anew, so a flow to an endpoint that is gone would last as long as the client
//! sends. TCP and SCTP flows are left alone: their clients notice.

use std::collections::HashMap;
use std::sync::Arc;

use super::service::{Compiled, Destinations};
use crate::addr::protocol;
use crate::table::flow_map::FlowSnapshot;
use crate::tables::FrontendKey;

/// What a NodePort is known by, whatever address of the gateway it is on or was on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct NodePort {
    /// Stable id of the service port.
    pub service: u64,
    pub port: u16,
    pub is_v4: bool,
}

/// Endpoints that still serve, by UDP frontend, for the Services that a change touched.
///
/// Frontends without any serving endpoint are not in it: their flows are left alone, there is nothing better. Traffic
/// policy, topology, termination and weight do not matter: an endpoint that serves keeps its flows.
#[derive(Clone, Debug, Default)]
pub struct UdpCleanup {
    serving: HashMap<FrontendKey, Arc<Destinations>>,
    node_ports: HashMap<NodePort, Arc<Destinations>>,
}

impl UdpCleanup {
    pub(super) fn add(&mut self, compiled: &Compiled) {
        let serving = compiled.udp_serving.iter().filter(|(_, serving)| !serving.is_empty());
        self.serving.extend(serving.map(|(key, serving)| (*key, serving.clone())));
        let serving = compiled.udp_node_ports.iter().filter(|(_, serving)| !serving.is_empty());
        self.node_ports.extend(serving.map(|(key, serving)| (*key, serving.clone())));
    }

    /// True if no flow can be stale: the change touched no UDP frontend.
    pub fn is_empty(&self) -> bool {
        self.serving.is_empty() && self.node_ports.is_empty()
    }

    /// True if a flow is to be forgotten.
    pub fn is_stale(&self, flow: &FlowSnapshot) -> bool {
        let original = &flow.original;
        if original.protocol != protocol::UDP {
            return false;
        }
        let key = FrontendKey { addr: original.dst, port: original.dst_port, protocol: protocol::UDP };
        let serving = self.serving.get(&key).or_else(|| {
            let is_v4 = original.dst.is_v4();
            self.node_ports.get(&NodePort { service: flow.service, port: original.dst_port, is_v4 })
        });
        serving.is_some_and(|serving| !serving.contains(&(flow.endpoint_addr, flow.endpoint_port)))
    }

    /// Adds what a later change touched; the later one holds.
    pub fn merge(&mut self, later: UdpCleanup) {
        self.serving.extend(later.serving);
        self.node_ports.extend(later.node_ports);
    }
}
