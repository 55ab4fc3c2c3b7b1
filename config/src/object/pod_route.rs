//! A route to pods that no Node object tells of.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, Resource};
use serde::{Deserialize, Serialize};

/// towpath.dev/v1 PodRoute: for networks whose pod ranges are not in `spec.podCIDRs` of Nodes, such as IPAM blocks of Cilium and
/// Calico. It has no namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodRoute {
    api_version: Version,
    kind: TheKind,
    /// Name, labels, annotations.
    pub metadata: ObjectMeta,
    /// Where the route leads.
    pub spec: PodRouteSpec,
}

/// `spec` of a [`PodRoute`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodRouteSpec {
    /// Range of the pods: `10.244.7.0/24`.
    pub prefix: String,
    /// Address that their packets go by: an InternalIP of their node, or a router's. A Node that is reached by a tunnel has its pods
    /// reached by it.
    pub via: String,
}

impl PodRoute {
    /// A route of this name.
    pub fn new(name: String, spec: PodRouteSpec) -> PodRoute {
        let metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
        PodRoute { metadata, spec, ..PodRoute::default() }
    }
}

/// `apiVersion`, of which there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
enum Version {
    #[default]
    #[serde(rename = "towpath.dev/v1")]
    V1,
}

/// `kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
enum TheKind {
    #[default]
    PodRoute,
}

impl Resource for PodRoute {
    const API_VERSION: &'static str = "towpath.dev/v1";
    const GROUP: &'static str = "towpath.dev";
    const KIND: &'static str = "PodRoute";
    const VERSION: &'static str = "v1";
    const URL_PATH_SEGMENT: &'static str = "podroutes";
    type Scope = ClusterResourceScope;
}
