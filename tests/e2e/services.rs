//! Services: who is reached through which address.

mod affinity;
mod basic;
mod policy;
mod readiness;
mod types;

pub use affinity::{spreads, sticks};

use crate::scenario::{Group, Scenario, not_applicable};

pub const GROUPS: &[Group] = &[
    Group { name: "Services", scenarios: basic::SCENARIOS },
    Group { name: "Services", scenarios: types::SCENARIOS },
    Group { name: "Services", scenarios: affinity::SCENARIOS },
    Group { name: "Services", scenarios: readiness::SCENARIOS },
    Group { name: "Services", scenarios: policy::SCENARIOS },
    Group { name: "Services", scenarios: ELSEWHERE },
    Group { name: "Service endpoints latency", scenarios: basic::LATENCY },
    Group { name: "Service CIDRs", scenarios: basic::SERVICE_CIDRS },
    Group { name: "ServiceCIDR and IPAddress API", scenarios: SERVICE_CIDR_API },
];

/// What is decided elsewhere than by packets.
const ELSEWHERE: &[Scenario] = &[
    not_applicable("should work after restarting apiserver", "about a restart of the API server"),
    not_applicable("should prevent NodePort collisions", "the allocator of the API server"),
    not_applicable("should check NodePort out-of-range", "the allocator of the API server"),
    not_applicable("should release NodePorts on delete", "the allocator of the API server"),
    not_applicable(
        "should connect to the ports exposed by restartable init containers",
        "init containers: the pod's address and port are like any other's",
    ),
    not_applicable(
        "should connect to the named ports exposed by restartable init containers",
        "init containers: names of ports are resolved in EndpointSlices",
    ),
    not_applicable("should provide secure master service", "the API server alone"),
    not_applicable("should find a service from listing all namespaces", "the API server alone"),
    not_applicable("should test the lifecycle of an Endpoint", "the API server alone"),
    not_applicable("should complete a service status lifecycle", "the API server alone"),
    not_applicable("should delete a collection of services", "the API server alone"),
];

const SERVICE_CIDR_API: &[Scenario] = &[
    not_applicable("should support ServiceCIDR API operations", "the API server alone"),
    not_applicable("should support IPAddress API operations", "the API server alone"),
];
