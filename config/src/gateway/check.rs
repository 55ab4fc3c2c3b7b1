//! What a gateway file must hold besides the right types.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;

use super::{Gateway, PortRange, RING_SIZES, Role};
use crate::fault::{Code, Fault};

/// Where NodePorts are, unless the API server was told otherwise (`--service-node-port-range` of kube-apiserver).
const NODE_PORTS: PortRange = PortRange { first: 30_000, last: 32_767 };

/// Everything that is wrong with the file, as far as the file alone can tell.
pub(super) fn check(gateway: &Gateway) -> Vec<Fault> {
    let mut faults = Vec::new();
    names(gateway, &mut faults);
    ranges(gateway, &mut faults);
    snat(gateway, &mut faults);
    egress(gateway, &mut faults);
    overlay(gateway, &mut faults);
    paths(gateway, &mut faults);
    health(gateway, &mut faults);
    workers(gateway, &mut faults);
    flows(gateway, &mut faults);
    fragments(gateway, &mut faults);
    memory(gateway, &mut faults);
    ports(gateway, &mut faults);
    attach(gateway, &mut faults);
    faults
}

fn invalid(
    field: impl Display,
    value: impl Display,
    message: impl Into<String>,
    remedy: impl Display,
) -> Fault {
    Fault::new(Code::Invalid, message).field(field).value(value).remedy(remedy)
}

fn names(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let name = &gateway.gateway.name;
    if name.is_empty() || name.len() > 253 || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let remedy = "name it as its Node object, or as its host";
        faults.push(invalid("gateway.name", format!("{name:?}"), "not a name", remedy));
    }
    if gateway.gateway.lb_key.is_empty() {
        let remedy = "give any text, the same on every gateway, or leave the key out";
        faults.push(invalid("gateway.lb_key", "\"\"", "empty", remedy));
    }
    for (field, account) in
        [("control.group", &gateway.control.group), ("control.user", &gateway.control.user)]
    {
        if account.as_ref().is_some_and(String::is_empty) {
            faults.push(invalid(
                field,
                "\"\"",
                "empty",
                "give an account of this machine or leave the key out",
            ));
        }
    }
}

/// Prefixes must be whole (no host bits) and may not overlap another range of the file.
fn ranges(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let section = &gateway.gateway;
    let disjoint = [
        ("gateway.cluster_cidrs", &section.cluster_cidrs),
        ("gateway.service_cidrs", &section.service_cidrs),
        ("gateway.load_balancer_cidrs", &section.load_balancer_cidrs),
    ];
    let all: Vec<(String, IpNet)> = disjoint
        .iter()
        .flat_map(|(field, nets)| {
            nets.iter().enumerate().map(move |(i, net)| (format!("{field}[{i}]"), *net))
        })
        .collect();
    for (index, (field, net)) in all.iter().enumerate() {
        if let Some((other, range)) = all[..index].iter().find(|(_, earlier)| overlap(earlier, net)) {
            let message = format!("overlaps {other} = {range}");
            faults.push(
                Fault::new(Code::Conflict, message)
                    .field(field)
                    .value(net)
                    .remedy("ranges of pods, Services and load balancers must be disjoint"),
            );
        }
    }
    let others = [
        ("gateway.external_ip_cidrs", &section.external_ip_cidrs),
        ("gateway.nodeport_addresses", &section.nodeport_addresses),
    ];
    for (field, nets) in disjoint.iter().chain(&others) {
        whole(field, nets, faults);
    }
}

/// Prefixes without bits after their length.
fn whole(field: &str, nets: &[IpNet], faults: &mut Vec<Fault>) {
    for (index, net) in nets.iter().enumerate().filter(|(_, net)| net.trunc() != **net) {
        let remedy = format!("write {}", net.trunc());
        faults.push(invalid(format!("{field}[{index}]"), net, "has bits set after its prefix", remedy));
    }
}

/// True if the prefixes have an address in common.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn snat(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let ports = gateway.snat.ports;
    if ports.first < 1024 {
        faults.push(invalid(
            "snat.ports",
            ports,
            "takes ports of well-known services",
            "begin at 1024 or later",
        ));
    }
    if ports.overlaps(NODE_PORTS) {
        let message = format!("overlaps the range of NodePorts, {NODE_PORTS}");
        faults.push(conflict(
            "snat.ports".into(),
            &ports.to_string(),
            message,
            "use other ports, such as 61000-65535",
        ));
    }
    sources("snat.addresses", &gateway.snat.addresses, gateway, faults);
}

fn egress(gateway: &Gateway, faults: &mut Vec<Fault>) {
    for (index, section) in gateway.egress.iter().enumerate() {
        let field = |name: &str| format!("egress[{index}].{name}");
        whole(&field("pods"), &section.pods, faults);
        whole(&field("destinations"), &section.destinations, faults);
        whole(&field("except"), &section.except, faults);
        sources(&field("addresses"), &section.addresses, gateway, faults);
    }
}

fn overlay(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let overlay = &gateway.overlay;
    if !(1..1 << 24).contains(&overlay.vni) {
        let remedy = "use 1 to 16777215, the same as on the nodes";
        faults.push(invalid("overlay.vni", overlay.vni, "out of range", remedy));
    }
    if overlay.port == 0 {
        faults.push(invalid("overlay.port", 0, "port 0 is no port", "use 4789, or 8472 as flannel does"));
    }
    for (range, name) in
        [(gateway.snat.ports, "the masquerade ports"), (NODE_PORTS, "the range of NodePorts")]
    {
        if range.contains(overlay.port) {
            let message = format!("lies in {name}, {range}");
            let remedy = "use 4789, or 8472 as flannel does";
            faults.push(conflict("overlay.port".into(), &overlay.port.to_string(), message, remedy));
        }
    }
    if let Some(mtu) = overlay.mtu {
        // The least that IPv6 needs (RFC 8200 section 5) and the outer headers.
        bounds("overlay.mtu", mtu.into(), 1_350, u16::MAX.into(), "bytes", faults);
    }
    sources("overlay.addresses", &overlay.addresses, gateway, faults);
}

/// Addresses of ours that packets may be sent from.
fn sources(list: &str, addresses: &[IpAddr], gateway: &Gateway, faults: &mut Vec<Fault>) {
    let ranges = [
        ("cluster_cidrs", &gateway.gateway.cluster_cidrs),
        ("service_cidrs", &gateway.gateway.service_cidrs),
        ("load_balancer_cidrs", &gateway.gateway.load_balancer_cidrs),
    ];
    for (index, address) in addresses.iter().enumerate() {
        let field = format!("{list}[{index}]");
        if !is_usable(*address) {
            faults.push(invalid(
                &field,
                address,
                "cannot be a source address",
                "give a unicast address of this gateway",
            ));
        }
        if addresses[..index].contains(address) {
            faults.push(invalid(&field, address, "stands there twice", "remove one of them"));
        }
        for (name, nets) in ranges {
            if let Some(net) = nets.iter().find(|net| net.contains(address)) {
                let message = format!("lies in gateway.{name} ({net})");
                faults.push(invalid(
                    &field,
                    address,
                    message,
                    "give an address of this gateway that nobody else has",
                ));
            }
        }
    }
}

/// True for a unicast address that may appear on a wire beyond its link.
fn is_usable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_unspecified()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.octets()[0] >= 224
                || v4.octets()[0] == 0)
        }
        IpAddr::V6(v6) => {
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.to_ipv4_mapped().is_some())
        }
    }
}

fn health(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let Some(listen) = gateway.health.listen.0 else { return };
    let (field, ip) = ("health.listen", listen.ip());
    if listen.port() == 0 {
        faults.push(invalid(field, listen, "port 0 is no port", "use 10256, as kube-proxy does"));
    }
    if gateway.snat.ports.contains(listen.port()) {
        let message =
            format!("lies in the masquerade ports {}: its packets would not reach it", gateway.snat.ports);
        faults.push(
            Fault::new(Code::Conflict, message)
                .field(field)
                .value(listen)
                .remedy("use another port, or move snat.ports"),
        );
    }
    if !(ip.is_unspecified() || ip.is_loopback() || is_usable(ip)) {
        let remedy = "give an address of this gateway, 0.0.0.0 for all of them, or \"off\"";
        faults.push(invalid(field, listen, "nobody can be asked there", remedy));
    }
}

fn paths(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let mut absolute = |field: &str, path: &Path| {
        if !path.is_absolute() {
            faults.push(invalid(field, path.display(), "not an absolute path", "begin it with /"));
        }
    };
    absolute("control.socket", &gateway.control.socket);
    absolute("control.state_dir", &gateway.control.state_dir);
    absolute("flows.region", &gateway.flows.region);
    let length = gateway.control.socket.as_os_str().len();
    // sun_path of unix(7) has 108 bytes with its final zero.
    if length > 107 {
        let message = format!("{length} bytes; a socket path has at most 107");
        faults.push(invalid(
            "control.socket",
            gateway.control.socket.display(),
            message,
            "choose a shorter path",
        ));
    }
    let control = &gateway.control;
    bounds("control.staging_bytes", control.staging_bytes, 4 << 20, 64 << 30, "bytes", faults);
    bounds("control.max_clients", control.max_clients.into(), 1, 1024, "clients", faults);
}

fn bounds(field: &str, value: u64, least: u64, most: u64, unit: &str, faults: &mut Vec<Fault>) {
    if !(least..=most).contains(&value) {
        faults.push(invalid(field, value, "out of range", format!("use {least} to {most} {unit}")));
    }
}

fn workers(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let cpus = &gateway.workers.cpus;
    if cpus.is_empty() {
        faults.push(invalid(
            "workers.cpus",
            "[]",
            "no CPU, so no worker",
            "name at least one CPU, such as [1]",
        ));
    }
    if cpus.len() > Gateway::MAX_WORKERS {
        let remedy = format!("use at most {}", Gateway::MAX_WORKERS);
        faults.push(invalid("workers.cpus", format!("{} CPUs", cpus.len()), "too many workers", remedy));
    }
    for (index, cpu) in cpus.iter().enumerate() {
        if cpus[..index].contains(cpu) {
            let field = format!("workers.cpus[{index}]");
            faults.push(invalid(field, cpu, "stands there twice", "one worker a CPU: remove one of them"));
        }
    }
}

fn flows(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let flows = &gateway.flows;
    bounds("flows.capacity", flows.capacity.into(), 1024, 1 << 27, "connections", faults);
    if flows.affinity_entries() > flows.capacity {
        let remedy = format!("use at most flows.capacity, which is {}", flows.capacity);
        faults.push(invalid(
            "flows.affinity_capacity",
            flows.affinity_entries(),
            "more than the table holds",
            remedy,
        ));
    }
    for (field, seconds) in [
        ("flows.tcp_established_s", flows.tcp_established_s),
        ("flows.tcp_transitory_s", flows.tcp_transitory_s),
        ("flows.udp_s", flows.udp_s),
        ("flows.udp_one_way_s", flows.udp_one_way_s),
        ("flows.icmp_s", flows.icmp_s),
    ] {
        bounds(field, seconds.into(), 1, 7 * 86_400, "seconds", faults);
    }
}

fn fragments(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let fragments = &gateway.fragments;
    bounds("fragments.datagrams", fragments.datagrams.into(), 1, 1 << 16, "datagrams", faults);
    // The longest datagram, in packets of 1,500 bytes, has 45 fragments.
    bounds("fragments.frames", fragments.frames.into(), 64, 1 << 16, "frames", faults);
    for (field, seconds) in [("fragments.ipv4_s", fragments.ipv4_s), ("fragments.ipv6_s", fragments.ipv6_s)] {
        bounds(field, seconds.into(), 1, 600, "seconds", faults);
    }
}

fn memory(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let rings = &gateway.rings;
    for (field, size) in [
        ("rings.rx", rings.rx),
        ("rings.tx", rings.tx),
        ("rings.fill", rings.fill),
        ("rings.completion", rings.completion),
    ] {
        if !size.is_power_of_two() || !RING_SIZES.contains(&size) {
            let near = size.clamp(*RING_SIZES.start(), *RING_SIZES.end()).next_power_of_two();
            let message = format!("not a power of two from {} to {}", RING_SIZES.start(), RING_SIZES.end());
            faults.push(invalid(field, size, message, format!("use {near}")));
        }
    }
    let umem = &gateway.umem;
    if ![2048, 4096].contains(&umem.chunk_size) {
        let remedy = "use 4096, or 2048 for more frames in the same memory";
        faults.push(invalid("umem.chunk_size", umem.chunk_size, "not a size of a frame", remedy));
    }
    let least = gateway.frames_needed();
    if let Some(frames) = umem.frames
        && !(least..=Gateway::MAX_FRAMES).contains(&frames)
    {
        let message =
            format!("the rings of {} ports and fragments hold up to {least} frames", gateway.ports.len());
        faults.push(invalid(
            "umem.frames",
            frames,
            message,
            format!("use {least} to {}, or leave the key out", Gateway::MAX_FRAMES),
        ));
    }
}

fn ports(gateway: &Gateway, faults: &mut Vec<Fault>) {
    let ports = &gateway.ports;
    if ports.is_empty() && gateway.attach.is_empty() {
        let remedy = "add [[port]] sections, one outside and one inside, or one with role = \"both\"";
        faults.push(Fault::new(Code::Missing, "there is no port").field("port").remedy(remedy));
        return;
    }
    if ports.len() > Gateway::MAX_PORTS {
        let remedy = format!("use at most {}", Gateway::MAX_PORTS);
        faults.push(invalid("port", format!("{} ports", ports.len()), "too many ports", remedy));
    }
    let later = || gateway.attach.iter().map(|section| section.role);
    for (is_there, role) in [
        (ports.iter().map(|p| p.role).chain(later()).any(Role::is_outside), "outside"),
        (ports.iter().map(|p| p.role).chain(later()).any(Role::is_inside), "inside"),
    ] {
        if !is_there {
            let remedy = format!("give a port role = \"{role}\" or \"both\"");
            faults.push(Fault::new(Code::Missing, format!("no port is {role}")).field("port").remedy(remedy));
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("port[{index}].{name}");
        let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let reserved = ["outside", "inside"].contains(&port.name.as_str());
        if port.name.is_empty() || port.name.len() > 63 || !port.name.chars().all(is_word) || reserved {
            let remedy =
                "use letters, digits, - _ and . (and neither \"outside\" nor \"inside\", which mean roles)";
            faults.push(invalid(field("name"), format!("{:?}", port.name), "not a name for a port", remedy));
        }
        if !is_interface_name(&port.interface) {
            let remedy = "see `ip link` for the interfaces of this machine";
            faults.push(invalid(
                field("interface"),
                format!("{:?}", port.interface),
                "not an interface name",
                remedy,
            ));
        }
        for other in &ports[..index] {
            if other.name == port.name {
                faults.push(conflict(
                    field("name"),
                    &port.name,
                    "two ports have this name",
                    "rename one of them",
                ));
            }
            if other.interface == port.interface {
                let message = format!("port {} takes this interface already", other.name);
                let remedy = "give each port an interface of its own, or use one port with role = \"both\"";
                faults.push(conflict(field("interface"), &port.interface, message, remedy));
            }
        }
        if port.expose_cluster_ips && !port.role.is_outside() {
            let remedy = "remove it: ports with role = \"inside\" serve ClusterIPs anyway";
            faults.push(invalid(
                field("expose_cluster_ips"),
                true,
                "has no meaning on an inside port",
                remedy,
            ));
        }
    }
}

/// IFNAMSIZ of linux/if.h is 16 with the final zero; dev_valid_name() forbids / and : and spaces.
fn is_interface_name(name: &str) -> bool {
    let is_bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&name.len()) && !name.contains(is_bad) && ![".", ".."].contains(&name)
}

fn attach(gateway: &Gateway, faults: &mut Vec<Fault>) {
    for (index, section) in gateway.attach.iter().enumerate() {
        let (field, pattern) = (format!("attach[{index}].pattern"), &section.pattern);
        if !is_interface_name(pattern) {
            let remedy = "write the names of the interfaces, with * for what differs: \"pod*\"";
            faults.push(invalid(&field, format!("{pattern:?}"), "matches no interface name", remedy));
        }
        if section.matches("lo") || section.matches("towpath0") {
            let message = "would take the loopback or Towpath's own TAPs, towpath0 and so on";
            faults.push(invalid(
                &field,
                pattern,
                message,
                "name the interfaces more narrowly, such as \"pod*\"",
            ));
        }
    }
}

fn conflict(field: String, value: &str, message: impl Into<String>, remedy: &str) -> Fault {
    Fault::new(Code::Conflict, message).field(field).value(value).remedy(remedy)
}
