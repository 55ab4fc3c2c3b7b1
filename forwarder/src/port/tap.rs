//! How a frame written to a TAP is received by the kernel as if a port had just received it.
//!
//! A classifier at the TAP's ingress matches every frame and redirects it to the ingress of the port (act_mirred). From there
//! on the kernel cannot tell it from one off the wire: reverse-path filter, firewall rules, VLAN interfaces, captures and
//! `SO_BINDTODEVICE` see the port, and no address, route or filter setting is needed on the TAP. Two things make it sound:
//!
//! - act_mirred marks the packet as redirected, and the generic XDP path lets such packets pass (`netif_receive_generic_xdp` in
//!   net/core/dev.c), so a steering program in that path does not see the packet again; one in the driver never does.
//!   `bpf_redirect` with BPF_F_INGRESS sets no such mark: the packet would be steered, given back and steered without end.
//! - The TAP has the port's MAC address: whether a frame is for this host is decided when the TAP receives it
//!   (`eth_type_trans`), and not again.
//!
//! The classifier is one instruction of classic BPF: cls_bpf is in every kernel that runs Kubernetes with eBPF,
//! cls_matchall is not.

use std::io;

use crate::kernel::message::{Request, kind};
use crate::kernel::socket::Socket;

/// TC_H_CLSACT: the pair of hooks at ingress and egress of an interface (`include/uapi/linux/pkt_sched.h`).
const CLSACT: u32 = 0xffff_fff1;
/// Its own handle.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// The hook at ingress: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS).
const INGRESS: u32 = 0xffff_fff2;
/// TCA_KIND and TCA_OPTIONS; TCA_ACT_KIND and TCA_ACT_OPTIONS have the same numbers.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;

/// Sends everything that the TAP receives on to the ingress of the port. `tap`, `port`: interface indexes. It lasts as long as
/// the TAP does; if the port is deleted, frames are dropped.
///
/// # Errors
/// CAP_NET_ADMIN is missing, an interface does not exist, the TAP has such a classifier already (EEXIST), or the kernel lacks
/// sch_ingress, cls_bpf or act_mirred (ENOENT).
pub fn redirect(tap: u32, port: u32) -> io::Result<()> {
    let mut socket = Socket::open()?;
    let new = kind::F_ACK | kind::F_CREATE | kind::F_EXCLUSIVE;
    let clsact = Request::new(kind::NEW_QDISC, new, &tcmsg(tap, CLSACT_HANDLE, CLSACT, 0));
    socket.request(clsact.attribute(KIND, b"clsact\0"))?;

    // Priority 1, ETH_P_ALL in network byte order.
    let info = 1 << 16 | u32::from(3u16.to_be());
    let filter = Request::new(kind::NEW_FILTER, new, &tcmsg(tap, 0, INGRESS, info));
    socket.request(filter.attribute(KIND, b"bpf\0").nest(OPTIONS, |options| {
        const ACTIONS: u16 = 1;
        const INSTRUCTION_COUNT: u16 = 4;
        const INSTRUCTIONS: u16 = 5;
        options
            .attribute(INSTRUCTION_COUNT, &1u16.to_ne_bytes())
            .attribute(INSTRUCTIONS, &return_all_ones())
            .nest(ACTIONS, |actions| {
                actions.nest(1, |action| {
                    let parameters = mirred(port);
                    action
                        .attribute(KIND, b"mirred\0")
                        .nest(OPTIONS, |options| options.attribute(2, &parameters))
                })
            })
    }))
}

/// `struct tcmsg`.
fn tcmsg(link: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&link.to_ne_bytes());
    header[8..12].copy_from_slice(&handle.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header[16..20].copy_from_slice(&info.to_ne_bytes());
    header
}

/// `struct sock_filter`: BPF_RET | BPF_K of all ones, which is a match whatever the packet is (`cls_bpf_classify`).
fn return_all_ones() -> [u8; 8] {
    const RETURN_CONSTANT: u16 = 0x06;
    let mut instruction = [0; 8];
    instruction[..2].copy_from_slice(&RETURN_CONSTANT.to_ne_bytes());
    instruction[4..].copy_from_slice(&u32::MAX.to_ne_bytes());
    instruction
}

/// `struct tc_mirred`: redirect to the ingress of `port`; this hook is done with the packet then.
fn mirred(port: u32) -> [u8; 28] {
    const STOLEN: u32 = 4;
    const INGRESS_REDIRECT: u32 = 3;
    let mut parameters = [0; 28];
    parameters[8..12].copy_from_slice(&STOLEN.to_ne_bytes());
    parameters[20..24].copy_from_slice(&INGRESS_REDIRECT.to_ne_bytes());
    parameters[24..28].copy_from_slice(&port.to_ne_bytes());
    parameters
}
