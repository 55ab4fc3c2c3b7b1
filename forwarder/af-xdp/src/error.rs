//! Why a queue cannot be had, in words that name the remedy.

use std::io;

/// Why [`crate::Socket::open`] or [`crate::Socket::inherit`] failed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No interface of this name in this network namespace.
    #[error("interface {interface}: there is none of this name; see `ip link`")]
    NoSuchInterface {
        /// As given.
        interface: String,
    },
    /// The interface has fewer receive or transmit queues.
    #[error("interface {interface}: queue {queue} does not exist, it has {have}; {remedy}")]
    NoSuchQueue {
        /// Interface.
        interface: String,
        /// As given, counted from 0.
        queue: u32,
        /// How many there are.
        have: u32,
        /// The command that mends it.
        remedy: String,
    },
    /// The ring sizes are powers of two.
    #[error("{ring} ring of {len} entries: use a power of two from 64 to 65536, for example {}", nearest_power(*.len))]
    RingLen {
        /// `rx`, `tx`, `fill` or `completion`.
        ring: &'static str,
        /// As given.
        len: u32,
    },
    /// The process may not do this.
    #[error("{call}: not permitted; give {missing} (setcap {}+ep FILE, or AmbientCapabilities= in the systemd unit)", .missing.to_lowercase())]
    Capability {
        /// What failed.
        call: &'static str,
        /// The capability.
        missing: &'static str,
    },
    /// The packet memory cannot be locked.
    #[error(
        "packet memory: {needed_bytes} bytes cannot be locked for one more socket, RLIMIT_MEMLOCK is {}; give \
         CAP_IPC_LOCK, or raise the limit by at least {needed_bytes} bytes (ulimit -l in KiB, LimitMEMLOCK= in systemd)",
        .limit_bytes.map_or("unlimited".into(), |limit| format!("{limit} bytes"))
    )]
    LockedMemory {
        /// Bytes that each socket locks.
        needed_bytes: usize,
        /// The limit; `None`: there is none.
        limit_bytes: Option<u64>,
    },
    /// The kernel or the driver cannot.
    #[error(
        "interface {interface}, queue {queue}: AF_XDP is not supported by its driver or this kernel ({source})"
    )]
    Unsupported {
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another socket is bound to the queue, and stays so.
    #[error(
        "interface {interface}, queue {queue}: another process has an AF_XDP socket on it; stop that one \
         (another towpathd? `ss --xdp` or `fuser` may name it)"
    )]
    QueueTaken {
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
    },
    /// More than 256 sockets on one UMEM.
    #[error("port number {0}: a UMEM serves at most 256 sockets")]
    PortNumber(usize),
    /// The inherited descriptor is no AF_XDP socket with rings of these sizes.
    #[error("the inherited descriptor is not an AF_XDP socket with these ring sizes ({call}: {source})")]
    Inherited {
        /// What failed.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("interface {interface}, queue {queue}: {call}: {source}")]
    System {
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
        /// What failed.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn nearest_power(len: u32) -> u32 {
    len.clamp(64, 65536).next_power_of_two()
}
