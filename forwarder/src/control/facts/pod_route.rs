//! What a PodRoute says.

use config::fault::{Code, Fault};
use config::object::PodRoute;
use ipnet::IpNet;

use super::read_addr;
use crate::addr::Addr;
use crate::control::address::parse_cidr;

/// What Towpath reads from a PodRoute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PodRouteFacts {
    /// `spec.prefix` and `spec.via`; absent if either is wrong.
    pub route: Option<(IpNet, Addr)>,
}

impl PodRouteFacts {
    pub(super) fn read(object: &PodRoute, faults: &mut Vec<Fault>) -> PodRouteFacts {
        let spec = &object.spec;
        let net = parse_cidr(&spec.prefix).filter(|net| net.prefix_len() > 0);
        if net.is_none() {
            let fault = Fault::new(Code::Invalid, "not a prefix").field("spec.prefix").value(&spec.prefix);
            faults.push(fault.remedy("write it as 10.244.1.0/24 or fd00:244:1::/64"));
        }
        let via = read_addr("spec.via", &spec.via, faults);
        PodRouteFacts { route: net.zip(via) }
    }
}
