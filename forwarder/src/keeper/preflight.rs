//! What only this machine can tell about a gateway file, asked before anything is opened.
//!
//! Every answer names field, value and remedy; several are given at once.

use std::net::IpAddr;

use config::fault::{Code, Fault};
use config::gateway::{Gateway, PortRange};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

/// What the keeper cannot do without, by name.
const NEEDED: [(CapabilitySet, &str, &str); 3] = [
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", "attaches the steering program and makes TAPs"),
    (CapabilitySet::NET_RAW, "CAP_NET_RAW", "opens AF_XDP sockets"),
    (CapabilitySet::BPF, "CAP_BPF", "loads the steering program"),
];

/// Checks privileges, CPUs, interfaces and port ranges of this machine against the gateway file.
///
/// # Errors
/// Everything that is wrong.
pub fn check(gateway: &Gateway) -> Result<(), Vec<Fault>> {
    let mut faults = check_file(gateway);
    faults.extend(capabilities(gateway));
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// What `towpathd check` says about this machine: everything that needs no privilege to be found out.
pub fn check_file(gateway: &Gateway) -> Vec<Fault> {
    let mut faults = cpus(gateway);
    faults.extend(interfaces(gateway));
    faults.extend(masquerade_ports(gateway));
    faults
}

fn capabilities(gateway: &Gateway) -> Vec<Fault> {
    let Ok(have) = rustix::thread::capabilities(None) else { return Vec::new() };
    let mut faults: Vec<_> = NEEDED
        .iter()
        .filter(|(capability, ..)| !have.effective.contains(*capability))
        .map(|(_, name, purpose)| {
            Fault::new(Code::Forbidden, format!("missing privilege {name}, which {purpose}")).remedy(
                "run as root, or give all four: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW CAP_BPF CAP_IPC_LOCK \
                 in the systemd unit, or setcap cap_net_admin,cap_net_raw,cap_bpf,cap_ipc_lock+ep on towpathd",
            )
        })
        .collect();
    if !have.effective.contains(CapabilitySet::IPC_LOCK) {
        faults.extend(locked_memory(gateway, getrlimit(Resource::Memlock).current));
    }
    faults
}

/// Bytes of packet memory that the kernel counts as locked: each port of a worker registers the whole of it.
pub fn locked_bytes(gateway: &Gateway) -> u64 {
    let umem = u64::from(gateway.frames_per_worker()) * u64::from(gateway.umem.chunk_size);
    umem * gateway.workers.cpus.len() as u64 * gateway.ports.len() as u64
}

fn locked_memory(gateway: &Gateway, limit: Option<u64>) -> Option<Fault> {
    let needed = locked_bytes(gateway);
    let limit = limit.filter(|limit| *limit < needed)?;
    Some(
        Fault::new(
            Code::Limit,
            format!("packet memory needs {needed} bytes of locked memory, the limit is {limit}"),
        )
        .field("umem.frames")
        .value(gateway.frames_per_worker())
        .remedy(format!(
            "grant CAP_IPC_LOCK, or raise the limit: LimitMEMLOCK={needed} in the systemd unit, ulimit -l {} in a shell",
            needed.div_ceil(1024)
        )),
    )
}

fn cpus(gateway: &Gateway) -> Vec<Fault> {
    let usable: Vec<u32> =
        core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id as u32).collect();
    let list = usable.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let missing = gateway.workers.cpus.iter().enumerate().filter(|(_, cpu)| !usable.contains(cpu));
    missing
        .map(|(index, cpu)| {
            Fault::new(Code::Invalid, "no such CPU is online and allowed for this process")
                .field(format!("workers.cpus[{index}]"))
                .value(cpu)
                .remedy(format!("use some of {list}"))
        })
        .collect()
}

fn interfaces(gateway: &Gateway) -> Vec<Fault> {
    let missing =
        gateway.ports.iter().enumerate().filter(|(_, port)| interface_index(&port.interface).is_none());
    missing
        .map(|(index, port)| {
            Fault::new(Code::Invalid, "no such interface in this network namespace")
                .field(format!("port[{index}].interface"))
                .value(&port.interface)
                .remedy("ip link show lists those that exist")
        })
        .collect()
}

/// Index of an interface of this network namespace.
pub fn interface_index(name: &str) -> Option<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    rustix::net::netdevice::name_to_index(&socket, name).ok()
}

/// Source ports for masquerading must not be those that the kernel gives to its own connections, if an address is shared
/// with it, as the ports' own addresses are.
fn masquerade_ports(gateway: &Gateway) -> Option<Fault> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut bounds = text.split_whitespace().map_while(|bound| bound.parse().ok());
    let kernel = PortRange { first: bounds.next()?, last: bounds.next()? };
    overlap(gateway.snat.ports, kernel, &gateway.snat.addresses)
}

fn overlap(ours: PortRange, kernel: PortRange, _addresses: &[IpAddr]) -> Option<Fault> {
    ours.overlaps(kernel).then(|| {
        Fault::new(Code::Conflict, format!("overlaps the kernel's own source ports, {kernel}"))
            .field("snat.ports")
            .value(ours)
            .remedy(format!(
                "move one of them, for example: sysctl -w net.ipv4.ip_local_port_range=\"{} {}\"",
                kernel.first.min(ours.first.saturating_sub(1)),
                ours.first.saturating_sub(1)
            ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Gateway {
        Gateway::parse(include_str!("../../../config/examples/gateway.toml"), "example").unwrap()
    }

    #[test]
    fn names_the_cpu_and_the_interface_that_do_not_exist() {
        let mut gateway = example();
        gateway.workers.cpus = vec![0, 4_000];
        gateway.ports[0].interface = "nosuch0".into();
        let faults = check_file(&gateway).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(faults.contains("workers.cpus[1]: 4000: no such CPU"), "{faults}");
        assert!(faults.contains("port[0].interface: nosuch0: no such interface"), "{faults}");
        assert!(!faults.contains("workers.cpus[0]"), "{faults}");
    }

    #[test]
    fn says_exactly_how_much_locked_memory_is_needed() {
        let gateway = example();
        let needed = locked_bytes(&gateway);
        assert!(locked_memory(&gateway, Some(needed)).is_none() && locked_memory(&gateway, None).is_none());
        let fault = locked_memory(&gateway, Some(needed - 1)).unwrap().to_string();
        assert!(fault.contains(&format!("LimitMEMLOCK={needed}")), "{fault}");
    }

    #[test]
    fn masquerade_ports_stay_out_of_the_kernels_range() {
        let kernel = PortRange { first: 32_768, last: 60_999 };
        assert!(overlap(PortRange::default(), kernel, &[]).is_none());
        let fault = overlap(PortRange { first: 60_000, last: 65_535 }, kernel, &[]).unwrap().to_string();
        assert!(fault.contains("snat.ports: 60000-65535") && fault.contains("\"32768 59999\""), "{fault}");
    }
}
