//! What a Node says.

use config::fault::{Code, Fault};
use config::gateway::{Mac, OverlayKind};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;

use super::annotation::Annotations;
use super::read_addr;
use crate::addr::Addr;
use crate::control::address::parse_cidr;

/// What Towpath reads from a Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// `spec.podCIDRs`, each with the path of its field.
    pub pod_cidrs: Vec<(IpNet, String)>,
    /// `status.addresses` of type InternalIP.
    pub internal_ips: Vec<Addr>,
    /// `status.addresses` of type ExternalIP.
    pub external_ips: Vec<Addr>,
    /// Label `topology.kubernetes.io/zone`, may be empty.
    pub zone: String,
    /// It is being deleted, or about to be: no load balancer should send to it any more.
    pub leaving: bool,
    /// Label `node.kubernetes.io/exclude-from-external-load-balancers`: load balancers do not send to it.
    pub excluded: bool,
    /// Annotation `towpath.dev/overlay`: how its pods are reached.
    pub overlay: Option<OverlayKind>,
    /// Link-layer address of its VXLAN device: annotation `towpath.dev/vxlan-mac`, or what flannel or Calico say of it.
    pub vxlan_mac: Option<Mac>,
}

/// Where flannel keeps a JSON object with `VtepMAC` (its pkg/backend/vxlan).
const FLANNEL: &str = "flannel.alpha.coreos.com/backend-data";
/// Where Calico keeps an address (its libcalico-go/lib/backend/k8s/conversion).
const CALICO: &str = "projectcalico.org/VXLANTunnelMACAddr";

/// What the network that made the node's VXLAN device says of it. What cannot be read is not ours to complain of.
fn announced_mac(node: &Node) -> Option<Mac> {
    let annotation = |name| node.metadata.annotations.as_ref()?.get(name);
    let of_flannel = || {
        let data: serde_json::Value = serde_json::from_str(annotation(FLANNEL)?).ok()?;
        data.get("VtepMAC")?.as_str()?.parse().ok()
    };
    of_flannel().or_else(|| annotation(CALICO)?.parse().ok())
}

/// Taint that the cluster autoscaler puts on a node that it will remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// kubernetes pkg/proxy/healthcheck/proxy_health.go `NodeEligible`.
fn is_leaving(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    node.metadata.deletion_timestamp.is_some()
        || taints.into_iter().flatten().any(|taint| taint.key == TO_BE_DELETED)
}

impl NodeFacts {
    pub(super) fn read(node: &Node, faults: &mut Vec<Fault>, warnings: &mut Vec<Fault>) -> NodeFacts {
        let mut annotations = Annotations::of(&node.metadata, warnings);
        let overlay = annotations.word("overlay", &OverlayKind::WORDS);
        let vxlan_mac = annotations.mac("vxlan-mac").or_else(|| announced_mac(node));
        annotations.finish("Node");
        let labels = node.metadata.labels.as_ref();
        let label = |name: &str| labels.and_then(|labels| labels.get(name));
        let mut facts = NodeFacts {
            zone: label("topology.kubernetes.io/zone").cloned().unwrap_or_default(),
            // Its presence counts, not its value (k8s.io/cloud-provider controllers/service).
            excluded: label("node.kubernetes.io/exclude-from-external-load-balancers").is_some(),
            leaving: is_leaving(node),
            overlay,
            vxlan_mac,
            ..NodeFacts::default()
        };
        if let Some(spec) = &node.spec {
            let listed = spec.pod_cidrs.iter().flatten().enumerate();
            let mut cidrs: Vec<_> =
                listed.map(|(index, text)| (format!("spec.podCIDRs[{index}]"), text)).collect();
            if let (true, Some(text)) = (cidrs.is_empty(), &spec.pod_cidr) {
                cidrs.push(("spec.podCIDR".into(), text));
            }
            for (field, text) in cidrs.into_iter().filter(|(_, text)| !text.is_empty()) {
                match parse_cidr(text) {
                    Some(net) if net.prefix_len() > 0 => facts.pod_cidrs.push((net, field)),
                    _ => {
                        let fault = Fault::new(Code::Invalid, "not a prefix").field(field).value(text);
                        faults.push(fault.remedy("write it as 10.244.1.0/24 or fd00:244:1::/64"));
                    }
                }
            }
        }
        let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
        for (index, address) in addresses.into_iter().flatten().enumerate() {
            let list = match address.type_.as_str() {
                "InternalIP" => &mut facts.internal_ips,
                "ExternalIP" => &mut facts.external_ips,
                _ => continue,
            };
            let addr = read_addr(&format!("status.addresses[{index}].address"), &address.address, faults);
            list.extend(addr.filter(|addr| !list.contains(addr)));
        }
        facts
    }

    /// Every address of the node.
    pub fn addresses(&self) -> impl Iterator<Item = Addr> + '_ {
        self.internal_ips.iter().chain(&self.external_ips).copied()
    }
}
