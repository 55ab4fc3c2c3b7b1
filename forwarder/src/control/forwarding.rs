//! Routes, neighbors, ports and workers for people: rows of what is in force, not of what was asked for.

use std::collections::BTreeMap;

use config::control::{FramesRow, NeighborRow, PortRow, RouteRow, WorkerRow};
use config::gateway::{OverlayKind, Poll};

use super::Shared;
use super::health::{STUCK_AFTER_NS, heartbeat_age_ns};
use super::publish::WorkerLink;
use crate::stats::Counter;
use crate::tables::{Fib, Route};
use crate::worker::frames::Frames;

/// `02:00:00:00:00:01`.
fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Shared {
    pub(super) fn port_name(&self, index: u8) -> String {
        let port = self.gateway.ports.get(usize::from(index));
        port.map_or_else(|| format!("port {index}"), |port| port.name.clone())
    }

    /// Every route in force, the shortest prefixes first.
    pub(super) fn route_rows(&self) -> Vec<RouteRow> {
        let fib = self.publisher.fib();
        let mut entries: Vec<_> = fib.routes.iter().collect();
        entries.sort_by_key(|(net, _)| (net.addr().is_ipv6(), net.prefix_len(), net.addr()));
        entries.into_iter().map(|(net, route)| self.route_row(&fib, net.to_string(), route)).collect()
    }

    fn route_row(&self, fib: &Fib, prefix: String, route: Route) -> RouteRow {
        let named =
            |kind: &str| RouteRow { prefix: prefix.clone(), kind: kind.to_owned(), ..RouteRow::default() };
        match route {
            Route::NextHop(index) => match fib.next_hops.get(index as usize) {
                Some(hop) => RouteRow {
                    via: Some(hop.gateway.to_string()),
                    port: Some(self.port_name(hop.port)),
                    mac: hop.mac.map(mac_text),
                    mtu: Some(hop.mtu),
                    overlay: hop.tunnel.zip(fib.overlay.as_ref()).and_then(|(tunnel, overlay)| {
                        let tunnel = overlay.tunnels.get(usize::from(tunnel))?;
                        Some(format!("{}:{}", OverlayKind::Vxlan.name(), tunnel.node))
                    }),
                    ..named("next-hop")
                },
                None => named("next-hop"),
            },
            Route::OnLink { port } => RouteRow { port: Some(self.port_name(port)), ..named("on-link") },
            Route::Local => named("local"),
            Route::Kernel => named("kernel"),
            Route::Blackhole => named("blackhole"),
        }
    }

    /// Every next hop, once, by address.
    pub(super) fn neighbor_rows(&self) -> Vec<NeighborRow> {
        let fib = self.publisher.fib();
        let mut rows = BTreeMap::new();
        for hop in &fib.next_hops {
            let state = if hop.mac.is_some() { "reachable" } else { "unresolved" };
            rows.insert(
                (hop.port, hop.gateway),
                NeighborRow {
                    address: hop.gateway.to_string(),
                    port: self.port_name(hop.port),
                    mac: hop.mac.map(mac_text),
                    state: state.to_owned(),
                },
            );
        }
        rows.into_values().collect()
    }

    /// Every port.
    pub(super) fn port_rows(&self) -> Vec<PortRow> {
        let fib = self.publisher.fib();
        let row = |(index, port): (usize, &config::gateway::PortSection)| {
            let link = fib.ports.get(index).cloned().unwrap_or_default();
            let info = self.ports.get(index).cloned().unwrap_or_default();
            PortRow {
                index: index as u32,
                name: port.name.clone(),
                interface: port.interface.clone(),
                role: port.role.name().to_owned(),
                mode: info.mode,
                queues: info.queues,
                mac: mac_text(link.mac),
                mtu: link.mtu,
                up: link.up,
                addresses: link.v4.iter().chain(&link.v6).map(ToString::to_string).collect(),
                counters: self.port_counters(index),
            }
        };
        self.gateway.ports.iter().enumerate().map(row).collect()
    }

    /// Every worker. `now_ns`: CLOCK_MONOTONIC.
    pub(super) fn worker_rows(&self, now_ns: u64) -> Vec<WorkerRow> {
        self.publisher.workers().iter().map(|worker| self.worker_row(worker, now_ns)).collect()
    }

    fn worker_row(&self, worker: &WorkerLink, now_ns: u64) -> WorkerRow {
        let age_ns = heartbeat_age_ns(worker, now_ns);
        let state = match age_ns {
            None => "starting",
            Some(age) if age > STUCK_AFTER_NS => "stuck",
            Some(_) if worker.is_asleep() => "sleeping",
            Some(_) => "running",
        };
        let poll = match self.gateway.workers.poll {
            Poll::Adaptive => "adaptive",
            Poll::Busy => "busy",
        };
        let counters = worker.counters();
        WorkerRow {
            index: worker.index() as u32,
            cpu: self.gateway.workers.cpus.get(worker.index()).copied().unwrap_or_default(),
            poll: poll.to_owned(),
            generation: worker.in_force(),
            heartbeat_age_ms: age_ns.unwrap_or_default() / 1_000_000,
            state: state.to_owned(),
            counters: Counter::ALL.iter().map(|c| (c.name().to_owned(), counters.get(*c))).collect(),
            frames: self.frames_row(worker.frames()),
        }
    }

    fn frames_row(&self, frames: &Frames) -> FramesRow {
        let mut row = FramesRow {
            total: frames.total(),
            free: frames.free(),
            held: frames.held(),
            missing: frames.missing(),
            ..FramesRow::default()
        };
        for port in 0..self.gateway.ports.len() {
            let on_rings = frames.queue(port).frames;
            row.fill += u64::from(on_rings.fill);
            row.rx += u64::from(on_rings.rx);
            row.tx += u64::from(on_rings.tx);
            row.completion += u64::from(on_rings.completion);
            row.kernel += u64::from(on_rings.kernel);
        }
        row
    }
}
