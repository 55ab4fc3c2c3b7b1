//! What only this machine can tell about a gateway file, asked before anything is opened.
//!
//! Every answer names field, value and remedy; several are given at once.

use std::net::UdpSocket;

use af_xdp::Channels;
use config::fault::{Code, Fault};
use config::gateway::{Gateway, PortRange, PortSection};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use super::{account, listen, tap};

/// What the keeper cannot do without, by name and purpose.
const NEEDED: [(CapabilitySet, &str, &str); 3] = [
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", "attaches the steering program and makes TAPs"),
    (CapabilitySet::NET_RAW, "CAP_NET_RAW", "opens AF_XDP sockets"),
    (CapabilitySet::BPF, "CAP_BPF", "loads the steering program"),
];

/// What a keeper that runs as root needs besides, because its data plane runs as another account.
const NEEDED_AS_ROOT: [(CapabilitySet, &str, &str); 4] = [
    (CapabilitySet::SETUID, "CAP_SETUID", "gives the data plane its account"),
    (CapabilitySet::SETGID, "CAP_SETGID", "gives the data plane its group"),
    (CapabilitySet::CHOWN, "CAP_CHOWN", "gives it the state directory"),
    (CapabilitySet::KILL, "CAP_KILL", "stops it"),
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
    for (index, port) in gateway.ports.iter().enumerate() {
        faults.extend(interface(index, port, gateway.workers.cpus.len()));
    }
    faults.extend(machine_bytes().and_then(|machine| memory(gateway, machine)));
    faults.extend(masquerade_ports(gateway));
    faults.extend(accounts(gateway));
    faults.extend(listen::obstacle(&gateway.control.socket));
    faults
}

fn capabilities(gateway: &Gateway) -> Vec<Fault> {
    let Ok(have) = rustix::thread::capabilities(None) else { return Vec::new() };
    let is_root = rustix::process::geteuid().is_root();
    let mut faults: Vec<_> = missing(have.effective, is_root).into_iter().collect();
    if !have.effective.contains(CapabilitySet::IPC_LOCK) {
        faults.extend(locked_memory(gateway, getrlimit(Resource::Memlock).current));
    }
    faults
}

/// One fault for all that is missing: what gives one privilege gives the others.
fn missing(have: CapabilitySet, is_root: bool) -> Option<Fault> {
    let as_root = if is_root { &NEEDED_AS_ROOT[..] } else { &[] };
    let missing: Vec<_> = NEEDED
        .iter()
        .chain(as_root)
        .filter(|(capability, ..)| !have.contains(*capability))
        .map(|(_, name, purpose)| format!("{name}, which {purpose}"))
        .collect();
    if missing.is_empty() {
        return None;
    }
    let word = if missing.len() == 1 { "privilege" } else { "privileges" };
    let remedy = if is_root {
        "leave it in CapabilityBoundingSet= of the systemd unit and in the capabilities of the container"
    } else {
        "run as root, or give all four: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW CAP_BPF CAP_IPC_LOCK \
         in the systemd unit, or setcap cap_net_admin,cap_net_raw,cap_bpf,cap_ipc_lock+ep on towpathd"
    };
    Some(Fault::new(Code::Forbidden, format!("missing {word} {}", missing.join("; "))).remedy(remedy))
}

/// Bytes of packet memory of all workers.
fn memory_bytes(gateway: &Gateway) -> u64 {
    let umem = u64::from(gateway.frames_per_worker()) * u64::from(gateway.umem.chunk_size);
    umem * gateway.workers.cpus.len() as u64
}

/// Bytes of packet memory that the kernel counts as locked: each port of a worker registers the whole of it.
fn locked_bytes(gateway: &Gateway) -> u64 {
    memory_bytes(gateway) * gateway.ports.len() as u64
}

/// Packet memory that is larger than the machine would only be missed when it is filled, and then by anybody.
fn memory(gateway: &Gateway, machine_bytes: u64) -> Option<Fault> {
    let needed = memory_bytes(gateway);
    let frames = gateway.frames_per_worker();
    (needed > machine_bytes).then(|| {
        let complaint = format!("packet memory needs {needed} bytes, this machine has {machine_bytes}");
        Fault::new(Code::Limit, complaint)
            .field("umem.frames")
            .value(frames)
            .remedy("use fewer frames, chunk_size = 2048, smaller rings, or fewer workers")
    })
}

/// MemTotal of proc_meminfo(5).
fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))?;
    Some(kib.parse::<u64>().ok()? * 1024)
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

/// Exists, has Ethernet frames, and a queue for each worker.
pub fn interface(index: usize, port: &PortSection, workers: usize) -> Option<Fault> {
    let name = &port.interface;
    let fault = |message: &str, remedy: &str| {
        let fault = Fault::new(Code::Invalid, message).field(format!("port[{index}].interface"));
        Some(fault.value(name).remedy(remedy))
    };
    if interface_index(name).is_none() {
        return fault("no such interface in this network namespace", "ip link show lists those that exist");
    }
    if let Ok(false) = tap::is_ethernet(name) {
        return fault(
            "has no Ethernet frames, so it cannot be a port",
            "name an interface for which ip link shows link/ether",
        );
    }
    queues(index, port, workers)
}

/// A queue without a worker would swallow its packets, a worker without a queue would be idle: there are as many of one
/// as of the other.
fn queues(index: usize, port: &PortSection, workers: usize) -> Option<Fault> {
    let interface = &port.interface;
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0"));
    // Without any socket the queue check of the AF_XDP socket itself has to do.
    let channels = Channels::of(socket.ok()?, interface).ok()?;
    let receiving = channels.rx + channels.combined;
    if receiving as usize == workers {
        return None;
    }
    let fewer = workers > receiving as usize;
    let complaint = format!(
        "has {receiving} receive queue(s) for {workers} worker(s); {}",
        if fewer { "each worker needs one" } else { "packets of the others would reach no worker" }
    );
    let fault = Fault::new(Code::Invalid, complaint).field(format!("port[{index}].interface"));
    Some(fault.value(interface).remedy(channels.remedy(interface, workers as u32)))
}

/// Account and group exist.
fn accounts(gateway: &Gateway) -> Vec<Fault> {
    let user = account::data_plane_account(gateway.control.user.as_deref()).err();
    let group = gateway.control.group.as_deref().and_then(|group| account::control_group(group).err());
    user.into_iter().chain(group).collect()
}

/// Index of an interface of this network namespace.
pub fn interface_index(name: &str) -> Option<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    rustix::net::netdevice::name_to_index(&socket, name).ok()
}

/// Source ports for masquerading must not be those that the kernel gives to its own connections from the same addresses.
fn masquerade_ports(gateway: &Gateway) -> Option<Fault> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut bounds = text.split_whitespace().map_while(|bound| bound.parse().ok());
    let kernel = PortRange { first: bounds.next()?, last: bounds.next()? };
    overlap(gateway.snat.ports, kernel)
}

fn overlap(ours: PortRange, kernel: PortRange) -> Option<Fault> {
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
    fn packet_memory_is_not_larger_than_the_machine() {
        let gateway = example();
        let needed = memory_bytes(&gateway);
        assert!(memory(&gateway, needed).is_none());
        let fault = memory(&gateway, needed - 1).unwrap().to_string();
        assert!(fault.contains(&format!("needs {needed} bytes")), "{fault}");
        assert!(machine_bytes().unwrap() > 1 << 26);
    }

    #[test]
    fn all_missing_privileges_are_named_at_once() {
        let all = CapabilitySet::all();
        assert!(missing(all, true).is_none());
        let rest = CapabilitySet::SETUID | CapabilitySet::NET_RAW;
        assert!(
            missing(NEEDED.iter().fold(CapabilitySet::empty(), |set, (needed, ..)| set | *needed), false)
                .is_none()
        );
        let fault = missing(all - rest, true).unwrap().to_string();
        assert!(
            fault.contains("missing privileges CAP_NET_RAW, which opens AF_XDP sockets; CAP_SETUID,"),
            "{fault}"
        );
        let fault = missing(all - CapabilitySet::BPF, false).unwrap().to_string();
        assert!(fault.contains("missing privilege CAP_BPF, which") && fault.contains("setcap"), "{fault}");
    }

    #[test]
    fn masquerade_ports_stay_out_of_the_kernels_range() {
        let kernel = PortRange { first: 32_768, last: 60_999 };
        assert!(overlap(PortRange::default(), kernel).is_none());
        let fault = overlap(PortRange { first: 60_000, last: 65_535 }, kernel).unwrap().to_string();
        assert!(fault.contains("snat.ports: 60000-65535") && fault.contains("\"32768 59999\""), "{fault}");
    }
}
