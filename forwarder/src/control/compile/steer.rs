//! What the steering program must catch.

use std::net::IpAddr;

use config::gateway::Gateway;
use ipnet::IpNet;

use super::Compiler;
use super::identities::{is_pod_address, pod_ranges, tunnels};
use crate::addr::{Addr, protocol};
use crate::control::facts::Facts;
use crate::control::state::{State, Touch};
use crate::port::xsk::steer::{LocalAddress, LocalPort, PrefixUse, SteerSet};
use crate::tables::FrontendKind;

impl Compiler {
    /// What the steering program must catch for the tables that were compiled last.
    ///
    /// `local`: every address of the gateway, those of no port included: packets to them are the kernel's but for
    /// NodePorts and masquerade ports.
    pub fn steer_set(&self, state: &State, local: &[Addr]) -> SteerSet {
        let mut set = SteerSet::default();
        set.vips.extend(self.tables.vips.iter().map(|(addr, _)| IpAddr::from(*addr)));
        let range = self.gateway.snat.ports;
        let masquerade_ports = Some((range.first, range.last));
        for addr in local.iter().chain(&self.surroundings.own) {
            set.local.insert((*addr).into(), LocalAddress::default());
        }
        // Without addresses of their family, packets are masqueraded to the address of the port that they leave by.
        let is_given =
            |ip: &IpAddr| self.gateway.snat.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        let of_ports = self.own.iter().map(|addr| IpAddr::from(*addr)).filter(|ip| !is_given(ip));
        let masqueraded = of_ports.chain(self.gateway.masquerade_addresses());
        set.local.extend(masqueraded.map(|ip| (ip, LocalAddress { masquerade_ports })));
        for (key, frontend) in self.services.values().flat_map(|compiled| &compiled.frontends) {
            if matches!(frontend.kind, FrontendKind::NodePort | FrontendKind::HostPort) {
                let (addr, protocol, port) = (key.addr.into(), key.protocol, key.port);
                set.local_ports.insert(LocalPort { addr, protocol, port });
            }
        }
        if !tunnels(state, &self.gateway).is_empty() {
            let given = &self.gateway.overlay.addresses;
            let of_ports = self.own.iter().map(|addr| IpAddr::from(*addr)).filter(|_| given.is_empty());
            for addr in of_ports.chain(given.iter().copied()) {
                set.local.entry(addr).or_default();
                let port = self.gateway.overlay.port;
                set.local_ports.insert(LocalPort { addr, protocol: protocol::UDP, port });
            }
        }
        for net in &self.gateway.gateway.service_cidrs {
            set.prefixes.entry(*net).or_insert_with(PrefixUse::default).service = true;
        }
        for net in pod_ranges(state, &self.gateway) {
            let usage = set.prefixes.entry(net).or_insert_with(PrefixUse::default);
            (usage.destination, usage.source) = (true, true);
        }
        let host = |addr: Addr| IpNet::from(IpAddr::from(addr));
        let far = |addr: &Addr| !is_pod_address(state, &self.gateway, *addr);
        for (_, pod) in state.pods().filter(|(_, pod)| !pod.host_network) {
            for addr in pod.addresses.iter().map(|(addr, _)| *addr).filter(far) {
                let usage = set.prefixes.entry(host(addr)).or_insert_with(PrefixUse::default);
                (usage.destination, usage.source) = (true, true);
            }
        }
        for (_, slice) in state.slices() {
            for addr in slice.endpoints.iter().map(|endpoint| endpoint.addr).filter(far) {
                set.prefixes.entry(host(addr)).or_insert_with(PrefixUse::default).source = true;
            }
        }
        set
    }
}

/// True if a change touches an endpoint or a pod whose address is not known as a pod's anyway.
pub(super) fn sources_differ(state: &State, gateway: &Gateway, touched: &[Touch]) -> bool {
    let far = |addr: Addr| !is_pod_address(state, gateway, addr);
    touched.iter().flat_map(|touch| touch.old.iter().chain(&touch.new)).any(|entry| match &entry.facts {
        Facts::Slice(slice) => slice.endpoints.iter().any(|endpoint| far(endpoint.addr)),
        Facts::Pod(pod) => !pod.host_network && pod.addresses.iter().any(|(addr, _)| far(*addr)),
        _ => false,
    })
}
