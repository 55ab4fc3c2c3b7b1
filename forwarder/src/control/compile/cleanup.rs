//! UDP flows that must be forgotten after a change (kubernetes pkg/proxy/conntrack/cleanup.go).
//!
//! A UDP client never opens a connection anew, so a flow to an endpoint that is gone would last as long as the client
//! sends. TCP flows are left alone: their clients notice.

use std::collections::HashMap;
use std::sync::Arc;

use super::service::{Compiled, Destinations};
use crate::addr::{Addr, Tuple, protocol};
use crate::tables::FrontendKey;

/// Endpoints that still serve, by UDP frontend, for the Services that a change touched.
///
/// Frontends without any serving endpoint are not in it: their flows are left alone, there is nothing better. Traffic
/// policy, topology and termination do not matter: an endpoint that serves keeps its flows.
#[derive(Clone, Debug, Default)]
pub struct UdpCleanup {
    serving: HashMap<FrontendKey, Arc<Destinations>>,
}

impl UdpCleanup {
    pub(super) fn add(&mut self, compiled: &Compiled) {
        let serving = compiled.udp_serving.iter().filter(|(_, serving)| !serving.is_empty());
        self.serving.extend(serving.map(|(key, serving)| (*key, serving.clone())));
    }

    /// True if no flow can be stale: the change touched no UDP frontend.
    pub fn is_empty(&self) -> bool {
        self.serving.is_empty()
    }

    /// True if a flow is to be forgotten. `original`: its first packet as the client sent it; then its endpoint.
    pub fn is_stale(&self, original: &Tuple, endpoint: Addr, endpoint_port: u16) -> bool {
        if original.protocol != protocol::UDP {
            return false;
        }
        let key = FrontendKey { addr: original.dst, port: original.dst_port, protocol: protocol::UDP };
        self.serving.get(&key).is_some_and(|serving| !serving.contains(&(endpoint, endpoint_port)))
    }

    /// Adds what a later change touched; the later one holds.
    pub fn merge(&mut self, later: UdpCleanup) {
        self.serving.extend(later.serving);
    }
}
