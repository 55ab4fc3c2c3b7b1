//! What an EndpointSlice says (kubernetes pkg/proxy/endpointslicecache.go).

use std::sync::Arc;

use config::fault::{Code, Fault};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::jiff::Timestamp;

use super::annotation::{self, Annotations};
use super::{read_addr, read_port, read_protocol};
use crate::addr::Addr;

/// Label that names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Annotation: when the pod or Service changed for which the slice was changed (RFC 3339).
const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What Towpath reads from an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SliceFacts {
    /// Name of its Service, in its own namespace; `None` if the label is missing.
    pub service: Option<String>,
    /// Its endpoints; empty for `addressType: FQDN`.
    pub endpoints: Vec<EndpointFacts>,
    /// Its ports.
    pub ports: Vec<SlicePort>,
    /// When what it tells of happened in the cluster, if it says so.
    pub triggered: Option<Timestamp>,
    /// Annotation `towpath.dev/weight`: of all its endpoints whose Pods have none.
    pub weight: Option<u16>,
}

/// One of `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Its name, may be empty.
    pub name: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Its port.
    pub port: u16,
}

/// One of `endpoints`.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointFacts {
    /// `addresses[0]`; the others are never used, as in kube-proxy.
    pub addr: Addr,
    /// `conditions.ready`, absent meaning true.
    pub ready: bool,
    /// `conditions.serving`, absent meaning true.
    pub serving: bool,
    /// `conditions.terminating`, absent meaning false.
    pub terminating: bool,
    /// `nodeName`, may be empty.
    pub node: Arc<str>,
    /// `zone`, may be empty.
    pub zone: Arc<str>,
    /// `hostname`, for names of pods.
    pub hostname: Option<String>,
    /// Namespace and name of the target, or the address if there is none.
    pub name: Arc<str>,
    /// `targetRef` as `Pod/name`, may be empty.
    pub target: String,
    /// `hints.forZones`.
    pub zone_hints: Vec<String>,
    /// `hints.forNodes`.
    pub node_hints: Vec<String>,
}

impl SliceFacts {
    pub(super) fn read(
        slice: &EndpointSlice,
        faults: &mut Vec<Fault>,
        warnings: &mut Vec<Fault>,
    ) -> SliceFacts {
        let mut annotations = Annotations::of(&slice.metadata, warnings);
        let weight = annotation::weight(&mut annotations);
        annotations.finish("EndpointSlice");
        let mut facts = SliceFacts {
            weight,
            service: slice
                .metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get(SERVICE_NAME_LABEL))
                .cloned(),
            triggered: triggered(slice, warnings),
            ..SliceFacts::default()
        };
        if facts.service.as_ref().is_none_or(String::is_empty) {
            facts.service = None;
            let fault = Fault::new(Code::Ignored, "missing: the slice belongs to no Service");
            let fault = fault.field(format!("metadata.labels.{SERVICE_NAME_LABEL}"));
            warnings.push(fault.remedy("label it with the name of its Service"));
        }
        let is_v4 = match slice.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            "FQDN" => {
                let fault =
                    Fault::new(Code::Ignored, "names are not addresses: no endpoint of this slice is used");
                warnings.push(
                    fault.field("addressType").value("FQDN").remedy("use slices of type IPv4 and IPv6"),
                );
                return facts;
            }
            other => {
                let fault =
                    Fault::new(Code::Invalid, "not a type of address").field("addressType").value(other);
                faults.push(fault.remedy("use IPv4 or IPv6"));
                return facts;
            }
        };
        for (index, port) in slice.ports.iter().flatten().enumerate() {
            // The API server completes an absent name to "" and an absent protocol to TCP; an absent port is no endpoint.
            let path = |name: &str| format!("ports[{index}].{name}");
            let protocol = read_protocol(&path("protocol"), port.protocol.as_deref(), faults);
            let number = port.port.filter(|number| *number != 0);
            let number = number.and_then(|number| read_port(&path("port"), number, faults));
            if let (Some(protocol), Some(port_number)) = (protocol, number) {
                let name = port.name.clone().unwrap_or_default();
                facts.ports.push(SlicePort { name, protocol, port: port_number });
            }
        }
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            facts.endpoints.extend(EndpointFacts::read(slice, endpoint, index, is_v4, faults));
        }
        facts
    }
}

fn triggered(slice: &EndpointSlice, warnings: &mut Vec<Fault>) -> Option<Timestamp> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME_ANNOTATION)?;
    let parsed = text.parse().ok();
    if parsed.is_none() {
        let fault = Fault::new(Code::Ignored, "not a time: how long the change took is not measured");
        let fault = fault.field(format!("metadata.annotations.{TRIGGER_TIME_ANNOTATION}")).value(text);
        warnings.push(fault.remedy("write it as 2026-11-27T08:00:00Z, or leave it out"));
    }
    parsed
}

impl EndpointFacts {
    /// `namespace/name` of the Pod that it is, if it says so.
    pub fn pod(&self) -> Option<&str> {
        self.target.starts_with("Pod/").then_some(&*self.name)
    }

    fn read(
        slice: &EndpointSlice,
        endpoint: &Endpoint,
        index: usize,
        is_v4: bool,
        faults: &mut Vec<Fault>,
    ) -> Option<EndpointFacts> {
        let field = format!("endpoints[{index}].addresses[0]");
        let Some(text) = endpoint.addresses.first() else {
            let fault =
                Fault::new(Code::Missing, "no address").field(format!("endpoints[{index}].addresses"));
            faults.push(fault.remedy("give the address of the pod"));
            return None;
        };
        let addr = read_addr(&field, text, faults)?;
        if addr.is_v4() != is_v4 {
            let fault = Fault::new(Code::Invalid, format!("not an {} address", slice.address_type));
            faults.push(fault.field(field).value(text).remedy("put each family into a slice of its own"));
            return None;
        }
        let condition = |choose: fn(&k8s_openapi::api::discovery::v1::EndpointConditions) -> Option<bool>,
                         absent| {
            endpoint.conditions.as_ref().and_then(choose).unwrap_or(absent)
        };
        let target = endpoint.target_ref.as_ref().and_then(|target| {
            Some((
                target.kind.as_deref().unwrap_or("Pod"),
                target.namespace.as_deref(),
                target.name.as_deref()?,
            ))
        });
        let namespace = slice.metadata.namespace.as_deref().unwrap_or("default");
        let hints = endpoint.hints.as_ref();
        Some(EndpointFacts {
            addr,
            ready: condition(|conditions| conditions.ready, true),
            serving: condition(|conditions| conditions.serving, true),
            terminating: condition(|conditions| conditions.terminating, false),
            node: endpoint.node_name.as_deref().unwrap_or_default().into(),
            zone: endpoint.zone.as_deref().unwrap_or_default().into(),
            hostname: endpoint.hostname.clone().filter(|hostname| !hostname.is_empty()),
            name: match target {
                Some((_, own, name)) => format!("{}/{name}", own.unwrap_or(namespace)).into(),
                None => addr.to_string().into(),
            },
            target: target.map(|(kind, _, name)| format!("{kind}/{name}")).unwrap_or_default(),
            zone_hints: hints
                .and_then(|hints| hints.for_zones.as_ref())
                .map(|zones| zones.iter().map(|zone| zone.name.clone()).collect())
                .unwrap_or_default(),
            node_hints: hints
                .and_then(|hints| hints.for_nodes.as_ref())
                .map(|nodes| nodes.iter().map(|node| node.name.clone()).collect())
                .unwrap_or_default(),
        })
    }
}
