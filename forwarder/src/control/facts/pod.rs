//! What a Pod says.

use config::fault::Fault;
use k8s_openapi::api::core::v1::Pod;

use super::annotation::{self, Annotations};
use super::read_addr;
use crate::addr::Addr;

/// What Towpath reads from a Pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodFacts {
    /// `status.podIPs`, each with the path of its field; none of a pod that has ended, since its addresses are given
    /// to others while the object is still there.
    pub addresses: Vec<(Addr, String)>,
    /// `spec.hostNetwork`: the addresses are those of its node.
    pub host_network: bool,
    /// Annotation `towpath.dev/weight`.
    pub weight: Option<u16>,
}

impl PodFacts {
    pub(super) fn read(pod: &Pod, faults: &mut Vec<Fault>, warnings: &mut Vec<Fault>) -> PodFacts {
        let mut annotations = Annotations::of(&pod.metadata, warnings);
        let weight = annotation::weight(&mut annotations);
        annotations.finish("Pod");
        let mut facts = PodFacts {
            weight,
            host_network: pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false),
            ..PodFacts::default()
        };
        let Some(status) = &pod.status else { return facts };
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return facts;
        }
        let listed = status.pod_ips.iter().flatten().enumerate();
        let mut texts: Vec<_> =
            listed.map(|(index, pod_ip)| (format!("status.podIPs[{index}].ip"), &pod_ip.ip)).collect();
        if let (true, Some(text)) = (texts.is_empty(), &status.pod_ip) {
            texts.push(("status.podIP".into(), text));
        }
        for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            if let Some(addr) = read_addr(&field, text, faults) {
                facts.addresses.push((addr, field));
            }
        }
        facts
    }
}
