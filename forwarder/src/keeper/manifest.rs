//! What the keeper hands to the data plane: descriptors, and a manifest that says which is which.
//!
//! Descriptors keep their numbers over exec(2); all of them are close-on-exec but for the moment in which the data plane
//! is started. The manifest is JSON in a memfd whose number is the data plane's only argument.

#![allow(unsafe_code)] // A number from the manifest becomes a descriptor.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use config::gateway::Gateway;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};

use crate::port::xsk::steer::AttachMode;

/// A descriptor by its number, valid in the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Inherited(RawFd);

impl Inherited {
    /// The descriptor as the data plane will know it.
    pub fn of(fd: &impl AsFd) -> Inherited {
        Inherited(fd.as_fd().as_raw_fd())
    }

    /// Takes the descriptor over, close-on-exec again.
    ///
    /// # Errors
    /// It is not open: the manifest is not ours.
    pub fn take(self) -> io::Result<OwnedFd> {
        // SAFETY: only `fcntl` is asked about the number, which fails if it is not open; nothing closes it meanwhile,
        // since the data plane has one thread when it reads its manifest.
        let borrowed = unsafe { BorrowedFd::borrow_raw(self.0) };
        fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
        // SAFETY: it is open (checked above), and the keeper made the manifest so that each number stands in it once;
        // the data plane takes each entry once.
        Ok(unsafe { OwnedFd::from_raw_fd(self.0) })
    }
}

/// One port of the gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ManifestPort {
    /// Its number in packet memories and steering maps. It stays while others come and go.
    pub slot: u8,
    /// Index of the interface.
    pub ifindex: u32,
    /// AF_XDP sockets, by worker.
    pub sockets: Vec<Inherited>,
    /// Where the steering program runs.
    pub attached: AttachMode,
    /// Where packets that are not ours go back to the kernel.
    pub tap: Inherited,
    /// Packets from local stacks come in with unfinished checksums (veth, tap).
    pub partial_checksums: bool,
}

/// Everything that the data plane starts with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Process id of the keeper.
    pub keeper_pid: u32,
    /// The checked gateway file, with the ports that there are now.
    pub gateway: Gateway,
    /// Those ports, in the same order.
    pub ports: Vec<ManifestPort>,
    /// Packet memories, by worker.
    pub umems: Vec<Inherited>,
    /// The flow region.
    pub flows: Inherited,
    /// The region of session affinity.
    pub affinity: Inherited,
    /// The map of heartbeats.
    pub heartbeats: Inherited,
    /// The data plane's end of the socket pair to the keeper.
    pub keeper: Inherited,
    /// The listening control socket.
    pub control: Inherited,
    /// Group whose members may use the control socket.
    pub control_group: Option<u32>,
    /// How often the data plane was started again.
    pub restarts: u32,
    /// Who the data plane becomes: user id, group id.
    pub account: super::account::Account,
}

impl Manifest {
    /// Writes the manifest into a memfd.
    ///
    /// # Errors
    /// No descriptor or memory is left.
    pub fn write(&self) -> io::Result<OwnedFd> {
        let mut file = File::from(memfd_create("towpath-manifest", MemfdFlags::CLOEXEC)?);
        file.write_all(&serde_json::to_vec(self)?)?;
        file.rewind()?;
        Ok(file.into())
    }

    /// Reads the manifest from the memfd that the data plane was started with.
    ///
    /// # Errors
    /// It is not open or holds something else.
    pub fn read(fd: RawFd) -> io::Result<Manifest> {
        let mut file = File::from(Inherited(fd).take()?);
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Every descriptor in it.
    fn inherited(&self) -> impl Iterator<Item = Inherited> + '_ {
        let ports = self.ports.iter().flat_map(|port| port.sockets.iter().copied().chain([port.tap]));
        let single = [self.flows, self.affinity, self.heartbeats, self.keeper, self.control];
        ports.chain(self.umems.iter().copied()).chain(single)
    }

    /// Runs `start` while every descriptor of the manifest is inherited by new processes. One thread.
    ///
    /// # Errors
    /// A descriptor of the manifest is not open, or `start` failed.
    pub fn while_inherited<T>(
        &self,
        manifest: &OwnedFd,
        start: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let all: Vec<_> = self.inherited().chain([Inherited::of(manifest)]).collect();
        let set = |flags| {
            all.iter().try_for_each(|inherited| {
                // SAFETY: only `fcntl` is asked about the number; the keeper holds all of them open while it runs.
                fcntl_setfd(unsafe { BorrowedFd::borrow_raw(inherited.0) }, flags)
            })
        };
        set(FdFlags::empty())?;
        let started = start();
        set(FdFlags::CLOEXEC)?;
        started
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_started_process_has_the_descriptors_and_a_later_one_has_not() {
        let memory = File::from(memfd_create("inherited", MemfdFlags::CLOEXEC).unwrap());
        let fd = Inherited::of(&memory);
        let manifest = Manifest {
            keeper_pid: 1,
            gateway: Gateway::parse(include_str!("../../../config/examples/gateway.toml"), "x").unwrap(),
            ports: Vec::new(),
            umems: vec![fd],
            flows: fd,
            affinity: fd,
            heartbeats: fd,
            keeper: fd,
            control: fd,
            control_group: None,
            restarts: 0,
            account: super::super::account::Account { name: "nobody".into(), uid: 65_534, gid: 65_534 },
        };
        let written = manifest.write().unwrap();
        let sees = || {
            let mut command = Command::new("test");
            command.args(["-e", &format!("/proc/self/fd/{}", fd.0)]).stdin(Stdio::null());
            command.status().map(|status| status.success())
        };
        assert!(manifest.while_inherited(&written, sees).unwrap());
        assert!(!sees().unwrap());
        let copy = rustix::io::dup(&written).unwrap();
        let number = std::os::fd::IntoRawFd::into_raw_fd(copy);
        let read = Manifest::read(number).unwrap();
        assert_eq!((read.keeper_pid, read.umems), (1, manifest.umems));
    }
}
