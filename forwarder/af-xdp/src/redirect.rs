//! Small XDP programs that send all UDP to sockets, or to another interface, for tools and tests; everything else (ARP, ND)
//! goes to the kernel.
//!
//! They are assembled here instead of compiled, so that neither a C compiler nor a loader is needed. In C they would be:
//!
//! ```c
//! if (data + 34 > data_end) return XDP_PASS;
//! if (ethertype == 0x0800 ? data[23] != 17 : ethertype == 0x86dd ? data[20] != 17 : 1) return XDP_PASS;
//! return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS); // or bpf_redirect(other_interface, 0)
//! ```

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: i64 = 0;
const BPF_MAP_UPDATE_ELEM: i64 = 2;
const BPF_PROG_LOAD: i64 = 5;
const BPF_LINK_CREATE: i64 = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const QUEUES: u32 = 64;

/// The program on an interface. It is gone, and packets go to the kernel again, when this is dropped.
pub struct UdpRedirect {
    sockets: OwnedFd,
    _link: OwnedFd,
    native: bool,
}

impl UdpRedirect {
    /// Attaches the program: in the driver, or behind it where the driver has no hook.
    ///
    /// # Errors
    /// Not permitted (CAP_BPF and CAP_NET_ADMIN), or another program is attached (`EBUSY`), or no such interface.
    pub fn attach(ifindex: u32) -> io::Result<UdpRedirect> {
        let sockets = create_map()?;
        let program = load(&program(&to_socket(sockets.as_raw_fd())))?;
        let (link, native) = match link(&program, ifindex, XDP_FLAGS_DRV_MODE) {
            Ok(link) => (link, true),
            Err(_) => (self::link(&program, ifindex, XDP_FLAGS_SKB_MODE)?, false),
        };
        Ok(UdpRedirect { sockets, _link: link, native })
    }

    /// From here on the UDP packets of `queue` go to `socket`, which must be bound to that queue.
    ///
    /// # Errors
    /// `queue` is 64 or more, or `socket` is not a bound AF_XDP socket.
    pub fn set_socket(&self, queue: u32, socket: impl AsFd) -> io::Result<()> {
        #[repr(C)]
        struct Attr {
            map_fd: u32,
            _pad: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let value = socket.as_fd().as_raw_fd() as u32;
        let attr = Attr {
            map_fd: self.sockets.as_raw_fd() as u32,
            _pad: 0,
            key: (&raw const queue).expose_provenance() as u64,
            value: (&raw const value).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: key and value are u32s, as the map was made with, and live during the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attr) }.map(drop)
    }

    /// True if it runs in the driver.
    pub fn is_native(&self) -> bool {
        self.native
    }
}

/// The program on an interface, with another interface as target. Packets go to the kernel again when this is dropped.
pub struct UdpForward {
    _link: OwnedFd,
}

impl UdpForward {
    /// UDP of the interface `from` leaves by the interface `to`, untouched. In the driver only.
    ///
    /// # Errors
    /// Not permitted (CAP_BPF and CAP_NET_ADMIN), or another program is attached (`EBUSY`), or no such interface, or a
    /// driver without a hook.
    pub fn attach(from: u32, to: u32) -> io::Result<UdpForward> {
        let program = load(&program(&to_interface(to)))?;
        Ok(UdpForward { _link: link(&program, from, XDP_FLAGS_DRV_MODE)? })
    }
}

/// bpf(2).
///
/// # Safety
/// `attr` is what `command` expects, and the memory that it refers to is as long as it says.
unsafe fn bpf<T>(command: i64, attr: &T) -> io::Result<i64> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A command that returns a descriptor.
///
/// # Safety
/// As for [`bpf`], and `command` makes a descriptor.
unsafe fn bpf_fd<T>(command: i64, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is new, so nobody else owns it.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}

fn create_map() -> io::Result<OwnedFd> {
    // map_type, key_size, value_size, max_entries, map_flags
    let attr: [u32; 5] = [BPF_MAP_TYPE_XSKMAP, 4, 4, QUEUES, 0];
    // SAFETY: these are the first fields of the union for this command; it refers to no memory.
    unsafe { bpf_fd(BPF_MAP_CREATE, &attr) }
}

/// One instruction: operation, destination, source, jump or memory offset, immediate value.
const fn op(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    let bytes = [[code, src << 4 | dst], off.to_ne_bytes()];
    let imm = imm.to_ne_bytes();
    u64::from_ne_bytes([bytes[0][0], bytes[0][1], bytes[1][0], bytes[1][1], imm[0], imm[1], imm[2], imm[3]])
}

const MOV: u8 = 0xbf;
const MOV_IMM: u8 = 0xb7;
const ADD_IMM: u8 = 0x07;
const LOAD_U8: u8 = 0x71;
const LOAD_U16: u8 = 0x69;
const LOAD_U32: u8 = 0x61;
const LOAD_IMM64: u8 = 0x18;
const JUMP: u8 = 0x05;
const JUMP_GREATER: u8 = 0x2d;
const JUMP_EQUAL_IMM: u8 = 0x15;
const JUMP_NOT_EQUAL_IMM: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const MAP_FD: u8 = 1;
const REDIRECT: i32 = 23;
const REDIRECT_MAP: i32 = 51;
const XDP_PASS: i32 = 2;

fn to_socket(map_fd: i32) -> [u64; 6] {
    [
        op(LOAD_IMM64, 1, MAP_FD, 0, map_fd),
        0,
        op(LOAD_U32, 2, 6, 16, 0), // rx_queue_index
        op(MOV_IMM, 3, 0, 0, XDP_PASS),
        op(CALL, 0, 0, 0, REDIRECT_MAP),
        op(EXIT, 0, 0, 0, 0),
    ]
}

fn to_interface(ifindex: u32) -> [u64; 4] {
    [
        op(MOV_IMM, 1, 0, 0, ifindex as i32),
        op(MOV_IMM, 2, 0, 0, 0),
        op(CALL, 0, 0, 0, REDIRECT),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// The whole program: UDP goes to `target`, which finds the context in register 6.
fn program(target: &[u64]) -> Vec<u64> {
    let ethertype = |bytes: [u8; 2]| i32::from(u16::from_ne_bytes(bytes));
    let len = target.len() as i16;
    let is_udp = [
        op(MOV, 6, 1, 0, 0),
        op(LOAD_U32, 2, 1, 0, 0), // data
        op(LOAD_U32, 3, 1, 4, 0), // data_end
        op(MOV, 4, 2, 0, 0),
        op(ADD_IMM, 4, 0, 0, 34),
        op(JUMP_GREATER, 4, 3, len + 7, 0), // too short: pass
        op(LOAD_U16, 5, 2, 12, 0),
        op(JUMP_EQUAL_IMM, 5, 0, 3, ethertype([0x08, 0x00])),
        op(JUMP_NOT_EQUAL_IMM, 5, 0, len + 4, ethertype([0x86, 0xdd])), // pass
        op(LOAD_U8, 5, 2, 20, 0),
        op(JUMP, 0, 0, 1, 0),
        op(LOAD_U8, 5, 2, 23, 0),
        op(JUMP_NOT_EQUAL_IMM, 5, 0, len, 17), // pass
    ];
    let pass = [op(MOV_IMM, 0, 0, 0, XDP_PASS), op(EXIT, 0, 0, 0, 0)];
    [&is_udp, target, &pass].concat()
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    let mut prog_name = [0; 16];
    prog_name[..12].copy_from_slice(b"udp_redirect");
    let attr = Attr {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr().expose_provenance() as u64,
        license: c"Dual MIT/GPL".as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: BPF_F_XDP_HAS_FRAGS,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    // SAFETY: instructions and license live during the call and are as long as said.
    unsafe { bpf_fd(BPF_PROG_LOAD, &attr) }
}

fn link(program: &OwnedFd, ifindex: u32, flags: u32) -> io::Result<OwnedFd> {
    // prog_fd, target_ifindex, attach_type, flags
    let attr: [u32; 4] = [program.as_raw_fd() as u32, ifindex, BPF_XDP, flags];
    // SAFETY: these are the first fields of the union for this command; it refers to no memory.
    unsafe { bpf_fd(BPF_LINK_CREATE, &attr) }
}
