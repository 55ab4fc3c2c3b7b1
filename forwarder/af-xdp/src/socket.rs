//! One AF_XDP socket: a queue of an interface, with its four rings.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::sockopt;
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, XdpMmapOffsets, XdpOptionsFlags, XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};
use rustix::process::{Resource, getrlimit};

use crate::burst::Burst;
use crate::error::OpenError;
use crate::frame::FramePool;
use crate::interface::Channels;
use crate::option;
use crate::queue::{Queue, QueueFrames, Refused};
use crate::recover::{Recovered, recover};
use crate::ring::{Consumer, Producer};
use crate::umem::Umem;

/// What a socket shall be like. The same values are needed to inherit it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketConfig {
    /// Entries of the RX ring, a power of two.
    pub rx_len: u32,
    /// Entries of the TX ring, a power of two.
    pub tx_len: u32,
    /// Entries of the fill ring, a power of two: so many frames wait for packets.
    pub fill_len: u32,
    /// Entries of the completion ring, a power of two, at least `tx_len`.
    pub completion_len: u32,
    /// Never ask for zero copy.
    pub copy_only: bool,
    /// Accept packets of several frames (`XDP_USE_SG`, Linux 6.6; needs an `xdp.frags` program).
    pub multi_frame: bool,
    /// Packets that one `sendto` may send in copy mode (`XDP_MAX_TX_SKB_BUDGET`, Linux 6.17; 32 without it).
    pub tx_budget: u32,
    /// `SO_SNDBUF` in bytes; in copy mode it bounds what is on its way. Raised beyond `net.core.wmem_max` if permitted.
    pub send_buffer_bytes: u32,
    /// Preferred busy polling: how long one system call may poll the driver.
    pub busy_poll: Option<BusyPoll>,
    /// How long to wait for the queue of a process that has just ended; its socket is torn down asynchronously.
    pub patience: Duration,
}

impl Default for SocketConfig {
    fn default() -> SocketConfig {
        SocketConfig {
            rx_len: 4096,
            tx_len: 2048,
            fill_len: 4096,
            completion_len: 2048,
            copy_only: false,
            multi_frame: true,
            tx_budget: 256,
            send_buffer_bytes: 8 << 20,
            busy_poll: None,
            patience: Duration::from_secs(2),
        }
    }
}

impl SocketConfig {
    /// Chunks that one socket can keep busy at most.
    pub fn chunks(&self) -> u32 {
        self.fill_len + self.tx_len
    }

    fn check(&self) -> Result<(), OpenError> {
        let rings = [
            ("rx", self.rx_len),
            ("tx", self.tx_len),
            ("fill", self.fill_len),
            ("completion", self.completion_len),
        ];
        match rings.into_iter().find(|(_, len)| !len.is_power_of_two() || !(64..=65536).contains(len)) {
            Some((ring, len)) => Err(OpenError::RingLen { ring, len }),
            None if self.completion_len < self.tx_len => {
                Err(OpenError::RingLen { ring: "completion", len: self.completion_len })
            }
            None => Ok(()),
        }
    }
}

/// `SO_PREFER_BUSY_POLL`: the driver is polled by the worker's system calls instead of interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BusyPoll {
    /// `SO_BUSY_POLL`, in microseconds.
    pub time_us: u32,
    /// `SO_BUSY_POLL_BUDGET`, in packets.
    pub budget: u32,
}

/// `XDP_STATISTICS` of a socket: what the kernel dropped or missed. They belong to the socket: a process that inherits it
/// finds them where the last one left them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Packets dropped for want of a frame, or since they are longer than the frames that the socket takes.
    pub rx_dropped: u64,
    /// Fill descriptors that were invalid.
    pub rx_invalid_descs: u64,
    /// TX descriptors that were invalid.
    pub tx_invalid_descs: u64,
    /// Packets dropped since the RX ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found the fill ring empty. In copy mode each is a packet of `rx_dropped` as well
    /// (Linux 6.18, `__xp_alloc` and `__xsk_rcv`).
    pub rx_fill_ring_empty_descs: u64,
    /// Times that the kernel found the TX ring empty: no loss.
    pub tx_ring_empty_descs: u64,
}

impl Statistics {
    /// What the kernel counted for `socket`. A system call.
    ///
    /// # Errors
    /// It is no AF_XDP socket.
    pub fn of(socket: impl AsFd) -> io::Result<Statistics> {
        let s = sockopt::xdp_statistics(socket)?;
        Ok(Statistics {
            rx_dropped: s.rx_dropped,
            rx_invalid_descs: s.rx_invalid_descs,
            tx_invalid_descs: s.tx_invalid_descs,
            rx_ring_full: s.rx_ring_full.unwrap_or(0),
            rx_fill_ring_empty_descs: s.rx_fill_ring_empty_descs.unwrap_or(0),
            tx_ring_empty_descs: s.tx_ring_empty_descs.unwrap_or(0),
        })
    }
}

impl std::ops::Add for Statistics {
    type Output = Statistics;

    /// Of two sockets together.
    fn add(self, other: Statistics) -> Statistics {
        Statistics {
            rx_dropped: self.rx_dropped + other.rx_dropped,
            rx_invalid_descs: self.rx_invalid_descs + other.rx_invalid_descs,
            tx_invalid_descs: self.tx_invalid_descs + other.tx_invalid_descs,
            rx_ring_full: self.rx_ring_full + other.rx_ring_full,
            rx_fill_ring_empty_descs: self.rx_fill_ring_empty_descs + other.rx_fill_ring_empty_descs,
            tx_ring_empty_descs: self.tx_ring_empty_descs + other.tx_ring_empty_descs,
        }
    }
}

/// What became of a [`Socket::kick`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kick {
    /// Nothing is left on the TX ring, or the kernel goes on by itself.
    Done,
    /// The kernel did not take all of it now; kick again later.
    Left,
    /// The interface is down or gone; the frames stay on the ring.
    Down,
}

/// An AF_XDP socket, bound to one queue of one interface, and its rings. For one thread.
pub struct Socket {
    fd: OwnedFd,
    queue: Queue,
    zero_copy: bool,
    busy_poll: bool,
    lost_sends: u64,
}

impl Socket {
    /// Opens a socket for `queue` of `interface`, in zero copy if driver and kernel can, else in copy mode.
    ///
    /// `port` is the number of the socket among those that share the UMEM of `pool`. The fill ring is
    /// filled from `pool`, as far as that has frames, before the queue is bound. Waits up to [`SocketConfig::patience`] for a queue that is taken.
    ///
    /// # Errors
    /// See [`OpenError`]; `pool` then has its frames back.
    pub fn open(
        interface: &str,
        queue: u32,
        port: usize,
        pool: &mut FramePool,
        config: &SocketConfig,
    ) -> Result<Socket, OpenError> {
        config.check()?;
        let place =
            Place { interface, queue, port: u8::try_from(port).map_err(|_| OpenError::PortNumber(port))? };
        let deadline = Instant::now() + config.patience;
        let mut attempts = Attempt::all(config);
        loop {
            let attempt = attempts[0];
            let error = match place.open(pool, config, attempt) {
                Ok(socket) => return Ok(socket),
                Err(error) => error,
            };
            place.take_back(pool);
            match error {
                OpenError::Unsupported { .. } if attempts.len() > 1 => {
                    attempts.remove(0);
                }
                OpenError::QueueTaken { .. } if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                error => return Err(error),
            }
        }
    }

    /// Goes on with a socket that another process has opened: maps its rings again.
    ///
    /// `config` as it was opened with. The frames are found by [`recover_frames`], which must run before anything else.
    ///
    /// # Errors
    /// The descriptor is something else, or its rings are smaller.
    pub fn inherit(fd: OwnedFd, umem: Umem, port: usize, config: &SocketConfig) -> Result<Socket, OpenError> {
        config.check()?;
        let port = u8::try_from(port).map_err(|_| OpenError::PortNumber(port))?;
        let failed = |call| move |source: io::Error| OpenError::Inherited { call, source };
        let queue = map_rings(&fd, umem, port, config).map_err(|(call, source)| failed(call)(source))?;
        let options = sockopt::xdp_options(&fd).map_err(|e| failed("XDP_OPTIONS")(e.into()))?;
        let zero_copy = options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY);
        Ok(Socket { fd, queue, zero_copy, busy_poll: config.busy_poll.is_some(), lost_sends: 0 })
    }

    /// Takes at most `max` packets from the RX ring and appends them to `burst`. Returns how many.
    ///
    /// Their entries stay in the ring, so that the packets come again if the process dies, until
    /// [`Socket::release`].
    #[inline]
    pub fn receive(&mut self, pool: &mut FramePool, burst: &mut Burst, max: usize) -> usize {
        self.queue.receive(pool, burst, max)
    }

    /// Gives the RX entries of all received packets back. Call it once the packets are on TX rings, kept or recycled,
    /// and before any [`Socket::refill`] from the same pool.
    #[inline]
    pub fn release(&mut self, pool: &mut FramePool) {
        self.queue.release(pool);
    }

    /// Puts packets from the front of `burst` on the TX ring, as many as fit whole. Returns how many; the rest stays in
    /// `burst`. The kernel sends them after [`Socket::kick`].
    #[inline]
    pub fn transmit(&mut self, pool: &mut FramePool, burst: &mut Burst) -> usize {
        self.queue.transmit(pool, burst)
    }

    /// Takes sent frames back onto the pool. Returns how many.
    #[inline]
    pub fn complete(&mut self, pool: &mut FramePool) -> usize {
        self.queue.complete(pool)
    }

    /// Gives frames to the kernel until it has as many as the fill ring holds. Returns how many.
    #[inline]
    pub fn refill(&mut self, pool: &mut FramePool) -> usize {
        let n = self.queue.refill(pool);
        if n > 0 && self.zero_copy && self.queue.fill.needs_wakeup() {
            self.poll_driver();
        }
        n
    }

    /// Makes the kernel send what is on the TX ring.
    ///
    /// In copy mode the kernel sends inside this call, at most [`SocketConfig::tx_budget`] packets at a time, and no
    /// flag says that it wants one; so the call is made whenever descriptors are left, and again while the kernel makes
    /// progress. In zero copy it is made when the ring's flag asks for it.
    pub fn kick(&mut self) -> Kick {
        if self.zero_copy && !self.queue.tx.needs_wakeup() {
            return Kick::Done;
        }
        let mut left = self.queue.tx.pending();
        let mut stuck = 0;
        while left > 0 && stuck < 3 {
            match send(&self.fd, &[], SendFlags::DONTWAIT) {
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => {}
                // The frame was completed, but its packet is lost (the device's queue was full).
                Err(Errno::BUSY) => self.lost_sends += 1,
                Err(Errno::NETDOWN | Errno::NXIO | Errno::NODEV) => return Kick::Down,
                Err(_) => return Kick::Left,
            }
            let before = std::mem::replace(&mut left, self.queue.tx.pending());
            stuck = if left < before { 0 } else { stuck + 1 };
        }
        if left == 0 { Kick::Done } else { Kick::Left }
    }

    /// Lets the driver receive, where it waits for a system call: after a refill in zero copy, and with busy polling.
    pub fn poll_driver(&mut self) {
        // Only the side effect counts; there is nothing to read from such a socket.
        let _ = recv(&self.fd, &mut [0u8; 0][..], RecvFlags::DONTWAIT);
    }

    /// True if the worker must call [`Socket::poll_driver`] in each round.
    pub fn is_busy_polled(&self) -> bool {
        self.busy_poll
    }

    /// A mark behind everything that is on the TX ring now; see [`Socket::is_sent`].
    #[inline]
    pub fn tx_mark(&self) -> u32 {
        self.queue.tx.next()
    }

    /// True once the kernel has taken everything before `mark` off the TX ring.
    #[inline]
    pub fn is_sent(&mut self, mark: u32) -> bool {
        let pending = self.queue.tx.pending();
        let consumed = self.queue.tx.next().wrapping_sub(pending);
        consumed.wrapping_sub(mark) as i32 >= 0
    }

    /// Frames that were sent and not completed.
    pub fn in_flight(&self) -> u32 {
        self.queue.in_flight
    }

    /// Frames that wait for packets, or hold packets that were not received yet.
    pub fn in_kernel(&self) -> u32 {
        self.queue.in_kernel
    }

    /// True if the driver reads and writes the UMEM itself.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// What was refused, to be counted.
    pub fn refused(&self) -> Refused {
        self.queue.refused
    }

    /// Packets that the device dropped on their way out (`EBUSY` from `sendto`), at least.
    pub fn lost_sends(&self) -> u64 {
        self.lost_sends
    }

    /// Where the frames of its rings are. No system call.
    pub fn frames(&mut self) -> QueueFrames {
        self.queue.frames()
    }

    /// What the kernel counted for this socket. A system call.
    ///
    /// # Errors
    /// As the kernel says; none is known.
    pub fn statistics(&self) -> io::Result<Statistics> {
        Statistics::of(&self.fd)
    }

    /// The memory of its frames.
    pub fn umem(&self) -> Umem {
        self.queue.umem
    }

    /// The descriptor, for another process to go on with; the rings are unmapped, the frames stay where they are.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Finds the frames of a UMEM again, and sets `sockets` going where the last process stopped; see [`Recovered`].
///
/// `sockets` are all that share `umem`, each with a port number of its own. The same call serves a first start, after
/// another process has opened the sockets, and a restart after a crash. `None` if the frames were taken before in this
/// process.
///
/// # Panics
/// If a socket is of another UMEM, or two have one port number.
pub fn recover_frames(umem: Umem, sockets: &mut [Socket]) -> Option<(FramePool, Recovered)> {
    if !umem.claim() {
        return None;
    }
    for (index, socket) in sockets.iter().enumerate() {
        let is_other = |other: &Socket| other.queue.port != socket.queue.port;
        assert!(
            socket.queue.umem == umem && sockets[..index].iter().all(is_other),
            "sockets of one UMEM, each with a number of its own"
        );
    }
    let mut queues: Vec<&mut Queue> = sockets.iter_mut().map(|socket| &mut socket.queue).collect();
    let recovered = recover(umem, &mut queues);
    // What the last process has put on a TX ring, but not sent.
    sockets.iter_mut().for_each(|socket| _ = socket.kick());
    Some(recovered)
}

/// A combination of bind flags to be tried.
#[derive(Clone, Copy)]
struct Attempt {
    zero_copy: bool,
    multi_frame: bool,
}

impl Attempt {
    /// Best first: zero copy before copy; where jumbo frames are wanted, with them before without.
    fn all(config: &SocketConfig) -> Vec<Attempt> {
        let mut attempts = vec![];
        for zero_copy in [true, false] {
            for multi_frame in [true, false] {
                if !(zero_copy && config.copy_only || multi_frame && !config.multi_frame) {
                    attempts.push(Attempt { zero_copy, multi_frame });
                }
            }
        }
        attempts
    }

    fn flags(self) -> SocketAddrXdpFlags {
        let mut flags = if self.zero_copy {
            SocketAddrXdpFlags::XDP_ZEROCOPY | SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP
        } else {
            SocketAddrXdpFlags::XDP_COPY | SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP
        };
        flags.set(SocketAddrXdpFlags::XDP_USE_SG, self.multi_frame);
        flags
    }
}

/// Which queue, and as which port.
struct Place<'a> {
    interface: &'a str,
    queue: u32,
    port: u8,
}

impl Place<'_> {
    fn open(
        &self,
        pool: &mut FramePool,
        config: &SocketConfig,
        attempt: Attempt,
    ) -> Result<Socket, OpenError> {
        let umem = pool.umem();
        let fd = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None).map_err(
            |e| match e {
                Errno::PERM => {
                    OpenError::Capability { call: "open an AF_XDP socket", missing: "CAP_NET_RAW" }
                }
                Errno::AFNOSUPPORT => self.unsupported(e),
                _ => self.failed("socket", e),
            },
        )?;
        let index = self.check_queue()?;
        register(&fd, umem).map_err(|e| match e {
            Errno::NOBUFS => OpenError::LockedMemory {
                needed_bytes: umem.len_bytes(),
                limit_bytes: getrlimit(Resource::Memlock).current,
            },
            _ => self.failed("XDP_UMEM_REG", e),
        })?;
        sockopt::set_xdp_umem_fill_ring_size(&fd, config.fill_len)
            .and_then(|()| sockopt::set_xdp_umem_completion_ring_size(&fd, config.completion_len))
            .and_then(|()| sockopt::set_xdp_rx_ring_size(&fd, config.rx_len))
            .and_then(|()| sockopt::set_xdp_tx_ring_size(&fd, config.tx_len))
            .map_err(|e| self.failed("set the ring sizes", e))?;
        option::set_send_buffer(&fd, config.send_buffer_bytes);
        option::set_tx_budget(&fd, config.tx_budget);
        if let Some(busy_poll) = config.busy_poll {
            option::set_busy_poll(&fd, busy_poll)
                .map_err(|source| self.system("SO_PREFER_BUSY_POLL (needs CAP_NET_ADMIN)", source))?;
        }
        let mut queue =
            map_rings(&fd, umem, self.port, config).map_err(|(call, source)| self.system(call, source))?;
        queue.refill(pool);
        bind(&fd, &SocketAddrXdp::new(attempt.flags(), index, self.queue)).map_err(|e| match e {
            Errno::BUSY => OpenError::QueueTaken { interface: self.interface.into(), queue: self.queue },
            Errno::OPNOTSUPP | Errno::INVAL => self.unsupported(e),
            Errno::PERM => OpenError::Capability { call: "bind an AF_XDP socket", missing: "CAP_NET_RAW" },
            Errno::NODEV => OpenError::NoSuchInterface { interface: self.interface.into() },
            _ => self.failed("bind", e),
        })?;
        let options = sockopt::xdp_options(&fd).map_err(|e| self.failed("XDP_OPTIONS", e))?;
        let zero_copy = options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY);
        Ok(Socket { fd, queue, zero_copy, busy_poll: config.busy_poll.is_some(), lost_sends: 0 })
    }

    /// Index of the interface, if it has the queue. The kernel says no more than EINVAL when it has not, so that is asked
    /// before; of another socket, since one of AF_XDP takes no ioctl.
    fn check_queue(&self) -> Result<u32, OpenError> {
        let any = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| self.failed("socket", e))?;
        let index = name_to_index(&any, self.interface).map_err(|e| match e {
            Errno::NODEV => OpenError::NoSuchInterface { interface: self.interface.into() },
            _ => self.failed("SIOCGIFINDEX", e),
        })?;
        let channels =
            Channels::of(&any, self.interface).map_err(|source| self.system("ETHTOOL_GCHANNELS", source))?;
        if self.queue < channels.pairs() {
            return Ok(index);
        }
        Err(OpenError::NoSuchQueue {
            interface: self.interface.into(),
            queue: self.queue,
            have: channels.pairs(),
            remedy: channels.remedy(self.interface, self.queue + 1),
        })
    }

    /// Takes back what was filled for a socket that did not come about.
    fn take_back(&self, pool: &mut FramePool) {
        let umem = pool.umem();
        let filled = (0..umem.chunks()).filter(|&chunk| umem.0.word(chunk).is_fill_of(self.port));
        pool.adopt(filled.collect());
    }

    fn unsupported(&self, source: Errno) -> OpenError {
        OpenError::Unsupported { interface: self.interface.into(), queue: self.queue, source: source.into() }
    }

    fn failed(&self, call: &'static str, source: Errno) -> OpenError {
        self.system(call, source.into())
    }

    fn system(&self, call: &'static str, source: io::Error) -> OpenError {
        OpenError::System { interface: self.interface.into(), queue: self.queue, call, source }
    }
}

fn register(fd: &OwnedFd, umem: Umem) -> Result<(), Errno> {
    sockopt::set_xdp_umem_reg(
        fd,
        XdpUmemReg {
            addr: umem.0.chunk_ptr(0).as_ptr().expose_provenance() as u64,
            len: umem.len_bytes() as u64,
            chunk_size: umem.chunk_len(),
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        },
    )
}

/// Where `mmap` finds the rings, `XDP_PGOFF_*`.
const RX_AT: u64 = 0;
const TX_AT: u64 = 0x8000_0000;
const FILL_AT: u64 = 0x1_0000_0000;
const COMPLETION_AT: u64 = 0x1_8000_0000;

fn map_rings(
    fd: &OwnedFd,
    umem: Umem,
    port: u8,
    config: &SocketConfig,
) -> Result<Queue, (&'static str, io::Error)> {
    let offsets: XdpMmapOffsets =
        sockopt::xdp_mmap_offsets(fd).map_err(|e| ("XDP_MMAP_OFFSETS", io::Error::from(e)))?;
    let map = |call, at: u64, desc: u64, entries: u32, entry_len: u64| -> Result<MmapRaw, _> {
        let len = desc + u64::from(entries) * entry_len;
        MmapOptions::new().offset(at).len(len as usize).populate().map_raw(fd).map_err(|e| (call, e))
    };
    let odd = |call| (call, io::Error::from(io::ErrorKind::InvalidData));
    let rx = map("mmap the RX ring", RX_AT, offsets.rx.desc, config.rx_len, 16)?;
    let tx = map("mmap the TX ring", TX_AT, offsets.tx.desc, config.tx_len, 16)?;
    let fill = map("mmap the fill ring", FILL_AT, offsets.fr.desc, config.fill_len, 8)?;
    let completion =
        map("mmap the completion ring", COMPLETION_AT, offsets.cr.desc, config.completion_len, 8)?;
    Ok(Queue {
        umem,
        port,
        rx: Consumer::mapped(rx, &offsets.rx, config.rx_len).ok_or_else(|| odd("RX ring"))?,
        tx: Producer::mapped(tx, &offsets.tx, config.tx_len).ok_or_else(|| odd("TX ring"))?,
        fill: Producer::mapped(fill, &offsets.fr, config.fill_len).ok_or_else(|| odd("fill ring"))?,
        completion: Consumer::mapped(completion, &offsets.cr, config.completion_len)
            .ok_or_else(|| odd("completion ring"))?,
        in_kernel: 0,
        in_flight: 0,
        refused: Refused::default(),
    })
}
