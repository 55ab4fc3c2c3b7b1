//! Names of Services and pods (the Kubernetes DNS specification, version 1.1.0), for a hosts file.

use config::control::DnsRow;

use crate::control::facts::{AddressKind, Skip};
use crate::control::state::State;

/// The domain that clusters use unless they are told otherwise.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// Names with their addresses, sorted: of each Service its ClusterIPs; of a headless one the addresses of its ready
/// endpoints, and of those with a hostname that too, as `HOSTNAME.NAME.NAMESPACE.svc.DOMAIN`.
pub fn names(state: &State, domain: &str) -> Vec<DnsRow> {
    let mut rows = Vec::new();
    for (entry, facts) in state.services() {
        let (namespace, service) = (&entry.reference.namespace, &entry.reference.name);
        let name = format!("{service}.{namespace}.svc.{domain}");
        for address in facts.addresses.iter().filter(|address| address.kind == AddressKind::Cluster) {
            rows.push(DnsRow { name: name.clone(), address: address.addr.to_string() });
        }
        if facts.skip != Some(Skip::Headless) {
            continue;
        }
        for (_, slice) in state.slices_of(namespace, service) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready) {
                let address = endpoint.addr.to_string();
                rows.push(DnsRow { name: name.clone(), address: address.clone() });
                if let Some(hostname) = &endpoint.hostname {
                    rows.push(DnsRow { name: format!("{hostname}.{name}"), address });
                }
            }
        }
    }
    rows.sort();
    rows.dedup();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::compile::fixture::Cluster;

    // Rules 15.1, 15.2.
    #[test]
    fn services_headless_services_and_pods() {
        let cluster = Cluster::new(
            "[gateway]\nname = 'gw'",
            "
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIPs: [10.96.0.1, 'fd00:96::1'], ports: [{port: 80}]}
---
kind: Service
metadata: {name: db}
spec: {clusterIP: None}
---
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: example.org}
---
kind: EndpointSlice
metadata: {name: db-1, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints:
- {addresses: [10.244.0.1], hostname: db-0}
- {addresses: [10.244.0.2], hostname: db-1, conditions: {ready: false}}
- {addresses: [10.244.0.3]}
---
kind: EndpointSlice
metadata: {name: db-2, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
endpoints: [{addresses: ['fd00::1'], hostname: db-0}]
",
        );
        let shown: Vec<_> = names(&cluster.state, CLUSTER_DOMAIN)
            .iter()
            .map(|row| format!("{} {}", row.address, row.name))
            .collect();
        assert_eq!(
            shown,
            [
                "10.244.0.1 db-0.db.default.svc.cluster.local",
                "fd00::1 db-0.db.default.svc.cluster.local",
                "10.244.0.1 db.default.svc.cluster.local",
                "10.244.0.3 db.default.svc.cluster.local",
                "fd00::1 db.default.svc.cluster.local",
                "10.96.0.1 web.shop.svc.cluster.local",
                "fd00:96::1 web.shop.svc.cluster.local",
            ]
        );
    }
}
