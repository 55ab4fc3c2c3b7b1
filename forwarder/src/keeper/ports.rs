//! The ports of the gateway, opened: steering program, packet memories, AF_XDP sockets, TAPs.
//!
//! Each has a slot, the number by which packet memories and steering maps know it: that stays as it is when ports before it go.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use af_xdp::{FramePool, OpenError, Socket, SocketConfig, Umem, UmemConfig, UmemError};
use config::fault::{Code, Fault};
use config::gateway::{Gateway, Mode, PortSection};
use tracing::{info, warn};

use super::driver;
use super::hugepages::Pool;
use super::manifest::{Inherited, ManifestPort};
use super::preflight::interface_index;
use super::tap::Tap;
use crate::port::tap::redirect;
use crate::port::xsk::queue::mode_of;
use crate::port::xsk::steer::{AttachMode, Heartbeats, MAX_PORTS, SteerError, SteerSizes, Steering};

/// How long to wait for links and queues of a keeper that was just killed: the kernel takes them down a moment later.
const PATIENCE: Duration = Duration::from_millis(800);

/// Everything that the keeper holds for the packets. Dropping it detaches, closes and frees all of it.
pub struct Ports {
    // Dropped first: what is ours reaches the kernel before the sockets close.
    steering: Steering,
    ports: Vec<Port>,
    /// Ports whose sockets a data plane may have mapped still.
    leaving: Vec<Port>,
    /// By worker.
    umems: Vec<(Umem, OwnedFd)>,
    /// Taken last.
    slot: u8,
}

/// One port.
struct Port {
    slot: u8,
    ifindex: u32,
    /// By worker.
    sockets: Vec<OwnedFd>,
    attached: AttachMode,
    tap: Tap,
    partial_checksums: bool,
}

/// The configuration of the sockets of a gateway; keeper and data plane need the same.
pub fn socket_config(gateway: &Gateway) -> SocketConfig {
    SocketConfig {
        rx_len: gateway.rings.rx,
        tx_len: gateway.rings.tx,
        fill_len: gateway.rings.fill,
        completion_len: gateway.rings.completion,
        patience: PATIENCE,
        ..SocketConfig::default()
    }
}

impl Ports {
    /// Opens everything that the gateway file names.
    ///
    /// # Errors
    /// What cannot be had, with field, value and remedy.
    pub fn open(gateway: &Gateway) -> Result<Ports, Fault> {
        let steering = Steering::load(SteerSizes::default())
            .map_err(|cause| Fault::new(Code::Invalid, cause.to_string()))?;
        let slot = MAX_PORTS as u8 - 1;
        let mut ports = Ports { steering, ports: Vec::new(), leaving: Vec::new(), umems: Vec::new(), slot };
        let mut pools = Vec::new();
        for worker in 0..gateway.workers.cpus.len() {
            let (umem, fd) = packet_memory(gateway, worker)?;
            ports.umems.push((umem, fd));
            pools.push(umem.take_frames().ok_or_else(|| {
                Fault::new(Code::Other, "the frames of a new packet memory are taken; this is a bug")
            })?);
        }
        for index in 0..gateway.ports.len() {
            ports.open_port(gateway, index, &mut pools)?;
        }
        Ok(ports)
    }

    /// Opens the last port of `gateway`, the others being open. Its fill rings are empty: the frames are the data plane's, and the next
    /// one fills them.
    ///
    /// # Errors
    /// What cannot be had, with field, value and remedy. Everything is as it was.
    pub fn add(&mut self, gateway: &Gateway) -> Result<(), Fault> {
        let mut pools: Vec<_> = self.umems.iter().map(|(umem, _)| umem.no_frames()).collect();
        self.open_port(gateway, self.ports.len(), &mut pools)
    }

    /// Takes the port at `index` out. The kernel gets its packets from now on; its sockets stay until [`Ports::close_removed`].
    pub fn remove(&mut self, index: usize) {
        let port = self.ports.remove(index);
        self.steering.detach(port.ifindex);
        self.leaving.push(port);
    }

    /// Closes the sockets of removed ports: while no data plane runs, for the next one takes their frames for free.
    pub fn close_removed(&mut self) {
        self.leaving.clear();
    }

    /// Index of the interface of the port at `index`.
    pub fn ifindex(&self, index: usize) -> u32 {
        self.ports[index].ifindex
    }

    fn open_port(&mut self, gateway: &Gateway, index: usize, pools: &mut [FramePool]) -> Result<(), Fault> {
        let section = &gateway.ports[index];
        let slot = self.free_slot().ok_or_else(|| {
            Fault::new(Code::Limit, "too many ports").field("port").remedy(format!("use at most {MAX_PORTS}"))
        })?;
        let ifindex = interface_index(&section.interface).ok_or_else(|| {
            let interface = section.interface.clone();
            open_fault(index, section, &OpenError::NoSuchInterface { interface })
        })?;
        if self.ports.iter().any(|port| port.ifindex == ifindex) {
            return Err(Fault::new(Code::Conflict, "is another name of the interface of another port")
                .field(format!("port[{index}].interface"))
                .value(&section.interface)
                .remedy("give each port an interface of its own"));
        }
        let opened = Port::attach(index, slot, ifindex, section, &mut self.steering)
            .and_then(|mut port| port.open_queues(gateway, index, pools, &mut self.steering).map(|()| port));
        match opened {
            Ok(port) => self.ports.push(port),
            Err(fault) => {
                self.steering.detach(ifindex);
                return Err(fault);
            }
        }
        self.slot = slot;
        Ok(())
    }

    /// A slot that nobody has, not one that was left a moment ago.
    fn free_slot(&self) -> Option<u8> {
        let is_free = |slot: &u8| self.ports.iter().chain(&self.leaving).all(|port| port.slot != *slot);
        (1..=MAX_PORTS as u8).map(|step| (self.slot + step) % MAX_PORTS as u8).find(is_free)
    }

    /// The heartbeats, mapped.
    ///
    /// # Errors
    /// The process may not map another page.
    pub fn heartbeats(&self) -> io::Result<Heartbeats> {
        Heartbeats::map(self.steering.heartbeats())
    }

    /// The steering program.
    pub fn steering(&self) -> &Steering {
        &self.steering
    }

    /// The steering program, to be changed.
    pub fn steering_mut(&mut self) -> &mut Steering {
        &mut self.steering
    }

    /// Name of the TAP of each port, by port index.
    pub fn taps(&self) -> impl ExactSizeIterator<Item = &str> {
        self.ports.iter().map(|port| port.tap.name())
    }

    /// What the data plane is told of the ports.
    pub fn manifest(&self) -> Vec<ManifestPort> {
        let entry = |port: &Port| ManifestPort {
            slot: port.slot,
            ifindex: port.ifindex,
            sockets: port.sockets.iter().map(Inherited::of).collect(),
            attached: port.attached,
            tap: Inherited::of(&port.tap),
            partial_checksums: port.partial_checksums,
        };
        self.ports.iter().map(entry).collect()
    }

    /// The packet memories, by worker.
    pub fn umems(&self) -> Vec<Inherited> {
        self.umems.iter().map(|(_, fd)| Inherited::of(fd)).collect()
    }
}

impl Port {
    /// Attaches the steering program and makes the TAP.
    fn attach(
        index: usize,
        slot: u8,
        ifindex: u32,
        section: &PortSection,
        steering: &mut Steering,
    ) -> Result<Port, Fault> {
        let interface = &section.interface;
        let modes: &[AttachMode] = match section.mode {
            Mode::Auto => &[AttachMode::Native, AttachMode::Generic],
            Mode::ZeroCopy | Mode::Copy => &[AttachMode::Native],
            Mode::Generic => &[AttachMode::Generic],
        };
        let start = Instant::now();
        let (attached, refusals) = loop {
            match steering.attach(slot, interface, ifindex, modes) {
                Err(SteerError::Occupied { .. }) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                outcome => break outcome.map_err(|cause| steer_fault(index, section.mode, &cause))?,
            }
        };
        if attached == AttachMode::Generic {
            // The kernel merges none on the port itself while the program is there (netif_elide_gro), but splits none either.
            warn!(
                port = section.name,
                refusals,
                "the steering program runs in the generic path: every packet is copied once more, and packets that come in \
                 merged beyond the MTU cannot be forwarded; see that none do: on the other end of a veth pair ethtool -K NAME \
                 tso off tx-udp-segmentation off, below a VLAN or macvlan ethtool -K NAME gro off"
            );
        }
        let tap = Tap::create(interface)
            .and_then(|tap| redirect(tap.ifindex(), ifindex).map(|()| tap))
            .map_err(|cause| {
                let complaint = format!("the TAP for packets that are not ours cannot be made: {cause}");
                Fault::new(Code::Invalid, complaint)
                    .field(format!("port[{index}].interface"))
                    .value(interface)
                    .remedy("see that the kernel has them: modprobe -a tun sch_ingress cls_bpf act_mirred")
            })?;
        let driver = driver::name(interface).unwrap_or_default();
        info!(port = section.name, interface, driver, steering = %attached, punt = tap.name(), "port opened");
        let partial_checksums = matches!(driver.as_str(), "veth" | "tun");
        Ok(Port { slot, ifindex, sockets: Vec::new(), attached, tap, partial_checksums })
    }

    /// Opens a socket for each worker and has the steering program give it the packets of its queue. `pools`: by worker.
    fn open_queues(
        &mut self,
        gateway: &Gateway,
        index: usize,
        pools: &mut [FramePool],
        steering: &mut Steering,
    ) -> Result<(), Fault> {
        let section = &gateway.ports[index];
        let copy_only = matches!(section.mode, Mode::Copy | Mode::Generic);
        let config = SocketConfig { copy_only, ..socket_config(gateway) };
        for (worker, pool) in pools.iter_mut().enumerate() {
            let socket = Socket::open(&section.interface, worker as u32, self.slot.into(), pool, &config)
                .map_err(|cause| open_fault(index, section, &cause))?;
            if section.mode == Mode::ZeroCopy && !socket.is_zero_copy() {
                return Err(Fault::new(Code::Invalid, "its driver has no zero copy")
                    .field(format!("port[{index}].mode"))
                    .value("zero-copy")
                    .remedy("use mode = \"auto\" or \"copy\""));
            }
            info!(port = section.name, queue = worker, mode = %mode_of(&socket, self.attached), "queue opened");
            let fd = socket.into_fd();
            steering
                .set_socket(self.slot, worker as u32, fd.as_fd())
                .map_err(|cause| steer_fault(index, section.mode, &cause))?;
            self.sockets.push(fd);
        }
        Ok(())
    }
}

/// Makes the packet memory of a worker; those before it have theirs.
fn packet_memory(gateway: &Gateway, worker: usize) -> Result<(Umem, OwnedFd), Fault> {
    let config = UmemConfig {
        chunks: gateway.frames_per_worker(),
        chunk_len: gateway.umem.chunk_size,
        hugepages: gateway.umem.hugepages,
    };
    let start = Instant::now();
    loop {
        match Umem::create(config) {
            Ok(created) => return Ok(created),
            // Those of a keeper that was just killed are free a moment later.
            Err(_) if config.hugepages && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20))
            }
            Err(cause) => return Err(memory_fault(&config, worker, gateway.workers.cpus.len(), &cause)),
        }
    }
}

fn memory_fault(config: &UmemConfig, worker: usize, workers: usize, cause: &UmemError) -> Fault {
    let fault = Fault::new(Code::Limit, cause.to_string());
    if !matches!(cause, UmemError::Memory { hugepages: true, .. }) {
        return fault.field("umem.frames").value(config.chunks);
    }
    let each = config.hugepage_count();
    let pages = Pool::read().enough_for(each * workers as u64, each * worker as u64);
    let remedy = format!(
        "{workers} worker(s) need {each} pages each; reserve them: sysctl -w vm.nr_hugepages={pages}, early after boot"
    );
    fault.field("umem.hugepages").value(true).remedy(remedy)
}

fn steer_fault(port: usize, mode: Mode, cause: &SteerError) -> Fault {
    let fault = Fault::new(Code::Invalid, cause.to_string());
    let at_interface = |interface| fault.clone().field(format!("port[{port}].interface")).value(interface);
    match cause {
        SteerError::Occupied { interface } => at_interface(interface).remedy(format!(
            "stop what attached it, which may be another towpathd; if nobody needs it: ip link set dev {interface} xdp off"
        )),
        SteerError::NoXdp { interface, .. } => match mode {
            Mode::Auto | Mode::Generic => at_interface(interface).remedy("use another interface"),
            Mode::Copy | Mode::ZeroCopy => fault
                .field(format!("port[{port}].mode"))
                .value(format!("{} on {interface}", mode.name()))
                .remedy("use mode = \"auto\", which takes the slower generic path then"),
        },
        _ => fault,
    }
}

fn open_fault(port: usize, section: &PortSection, cause: &OpenError) -> Fault {
    Fault::new(Code::Invalid, cause.to_string())
        .field(format!("port[{port}].interface"))
        .value(&section.interface)
}
