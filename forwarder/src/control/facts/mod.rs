//! What Towpath reads from Kubernetes objects: parsed once, when an object is accepted, so that nothing behind has to
//! parse or doubt again. Every field that is wrong by itself becomes a fault here; what two objects do to each other is
//! judged in [`validate`](super::validate).

mod annotation;
mod node;
mod pod;
mod pod_route;
mod service;
mod slice;

use std::net::IpAddr;

use config::fault::{Code, Fault};
use config::object::Object;

use super::address::{parse_ip, special};
use crate::addr::{Addr, protocol};

pub use node::NodeFacts;
pub use pod::{HostPort, PodFacts};
pub use pod_route::PodRouteFacts;
pub use service::{AddressKind, Distribution, PortFacts, ServiceAddress, ServiceFacts, ServiceType, Skip};
pub use slice::{EndpointFacts, SliceFacts, SlicePort};

/// What Towpath reads from one object.
#[derive(Clone, Debug, PartialEq)]
pub enum Facts {
    /// Nothing but its name and labels.
    Namespace,
    /// Addresses, podCIDRs, zone.
    Node(NodeFacts),
    /// Addresses and names.
    Pod(PodFacts),
    /// Frontends and policies.
    Service(ServiceFacts),
    /// Endpoints.
    Slice(SliceFacts),
    /// A range of pods and the way there.
    PodRoute(PodRouteFacts),
}

impl Facts {
    /// Reads an object. Faults are added to `faults`; if there are any, the object must not be used.
    /// Warnings are added to `warnings`. Neither names the object yet.
    pub fn read(object: &Object, faults: &mut Vec<Fault>, warnings: &mut Vec<Fault>) -> Facts {
        check_name(object, faults);
        match object {
            Object::Namespace(_) => Facts::Namespace,
            Object::Node(node) => Facts::Node(NodeFacts::read(node, faults, warnings)),
            Object::Pod(pod) => Facts::Pod(PodFacts::read(pod, faults, warnings)),
            Object::Service(service) => Facts::Service(ServiceFacts::read(service, faults, warnings)),
            Object::EndpointSlice(slice) => Facts::Slice(SliceFacts::read(slice, faults, warnings)),
            Object::PodRoute(route) => Facts::PodRoute(PodRouteFacts::read(route, faults)),
        }
    }
}

/// Names are DNS subdomains (RFC 1123), as the API server demands: they end up in a hosts file.
fn check_name(object: &Object, faults: &mut Vec<Fault>) {
    let metadata = object.metadata();
    let mut check = |field: &str, value: &str, most: usize| {
        let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if value.is_empty() {
            let remedy = "give the object a name; generateName needs an API server";
            faults.push(Fault::new(Code::Missing, "missing").field(field).remedy(remedy));
        } else if value.len() > most
            || !value.chars().all(is_good)
            || !value.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !value.ends_with(|c: char| c.is_ascii_alphanumeric())
        {
            let remedy = format!("use at most {most} lower-case letters, digits, - and .");
            faults.push(Fault::new(Code::Invalid, "not a name").field(field).value(value).remedy(remedy));
        }
    };
    check("metadata.name", metadata.name.as_deref().unwrap_or_default(), 253);
    if let Some(namespace) = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        check("metadata.namespace", namespace, 63);
    }
}

/// Reads an address of any kind.
fn read_any_ip(field: &str, text: &str, faults: &mut Vec<Fault>) -> Option<IpAddr> {
    let ip = parse_ip(text);
    if ip.is_none() {
        let remedy = "write an IPv4 or IPv6 address";
        faults.push(Fault::new(Code::Invalid, "not an IP address").field(field).value(text).remedy(remedy));
    }
    ip
}

/// Reads an address of a pod, node or Service.
fn read_ip(field: &str, text: &str, faults: &mut Vec<Fault>) -> Option<IpAddr> {
    let ip = read_any_ip(field, text, faults)?;
    if let Some(why) = special(ip) {
        let remedy = "use a unicast address that other machines can reach";
        faults.push(Fault::new(Code::Invalid, why).field(field).value(text).remedy(remedy));
        return None;
    }
    Some(ip)
}

/// Reads an address into the form of the fast path.
fn read_addr(field: &str, text: &str, faults: &mut Vec<Fault>) -> Option<Addr> {
    read_ip(field, text, faults).map(Addr::from)
}

/// Reads a port of a Service or a slice.
fn read_port(field: &str, value: i32, faults: &mut Vec<Fault>) -> Option<u16> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Some(port),
        _ => {
            let fault = Fault::new(Code::Invalid, "not a port").field(field).value(value);
            faults.push(fault.remedy("use a number from 1 to 65535"));
            None
        }
    }
}

/// Reads a protocol; absent is TCP.
fn read_protocol(field: &str, value: Option<&str>, faults: &mut Vec<Fault>) -> Option<u8> {
    match value {
        None | Some("TCP") => Some(protocol::TCP),
        Some("UDP") => Some(protocol::UDP),
        Some("SCTP") => Some(protocol::SCTP),
        Some(other) => {
            let fault = Fault::new(Code::Invalid, "not a protocol of a Service").field(field).value(other);
            faults.push(fault.remedy("use TCP, UDP or SCTP, in capitals"));
            None
        }
    }
}

/// The word for a protocol in Kubernetes objects.
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        protocol::UDP => "UDP",
        protocol::SCTP => "SCTP",
        _ => "TCP",
    }
}

/// The number of a protocol that [`protocol_name`] named.
pub fn protocol_number(name: &str) -> u8 {
    match name {
        "UDP" => protocol::UDP,
        "SCTP" => protocol::SCTP,
        _ => protocol::TCP,
    }
}

/// Reads a field that takes one of a few words; absent and empty are `None`.
fn read_word<T: Copy>(
    field: &str,
    value: Option<&str>,
    words: &[(&str, T)],
    faults: &mut Vec<Fault>,
) -> Option<T> {
    let value = value.filter(|value| !value.is_empty())?;
    let known = words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning);
    if known.is_none() {
        let list: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let fault = Fault::new(Code::Invalid, "not a value of this field").field(field).value(value);
        faults.push(fault.remedy(format!("use {}", list.join(" or "))));
    }
    known
}

#[cfg(test)]
mod tests;
