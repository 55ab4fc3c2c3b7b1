//! Ports that come and go while the gateway runs: those that `towpathctl port` adds and removes, and those that are found by the patterns
//! of `[[attach]]`.
//!
//! A port that was added, or found, is a port as long as its interface exists: it goes with the interface and comes back with one of the
//! same name. What `towpathctl port` did is kept in a file beside the flow region, so that it holds until the machine starts again.
//!
//! The keeper binds a new port while the data plane runs, then starts the data plane anew with it: packets wait in the receive rings
//! meanwhile, as after a crash, and none is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use config::control::PortChange;
use config::fault::{Code, Fault};
use config::gateway::{Gateway, PortSection, Role};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::ports::Ports;
use super::preflight;
use super::region::beside;
use crate::kernel::decode;
use crate::kernel::message::kind;
use crate::kernel::snapshot::Link;
use crate::kernel::socket::Socket;

/// RTNLGRP_LINK.
const LINKS: u32 = 1;

/// What `towpathctl port` did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Record {
    /// Ports that were added.
    added: Vec<PortSection>,
    /// Names of ports of the gateway file that were removed.
    removed: BTreeSet<String>,
}

/// The ports that there are now.
pub struct Attached {
    /// The gateway file as it was read.
    file: Gateway,
    /// The same with the ports that there are now.
    gateway: Gateway,
    record: Record,
    path: PathBuf,
    events: Socket,
    /// Links have changed, or may have.
    is_stale: bool,
    /// Interfaces that could not become ports, and why, so that it is said once.
    refused: BTreeMap<String, String>,
    is_changed: bool,
}

impl Attached {
    /// The ports of the gateway file but for those that were removed. [`Attached::follow`] adds the others. Packet memory has room for
    /// all of them.
    ///
    /// # Errors
    /// The record of an earlier run cannot be read, or the kernel does not tell of its links.
    pub fn new(file: Gateway) -> anyhow::Result<Attached> {
        let path = beside(&file.flows.region, ".ports");
        let record = Record::read(&path)?.fit(&file);
        let mut gateway = file.clone();
        gateway.ports.retain(|port| !record.removed.contains(&port.name));
        for port in file.ports.iter().filter(|port| record.removed.contains(&port.name)) {
            info!(port = port.name, "left out: `towpathctl port remove` took it away");
        }
        let mut attached = Attached {
            file,
            gateway,
            record,
            path,
            // Before the first look, so that no change falls between the two.
            events: Socket::subscribe(LINKS)?,
            is_stale: true,
            refused: BTreeMap::new(),
            is_changed: false,
        };
        let mut all = attached.gateway.clone();
        all.ports.extend(attached.wanted(&attached.links()?));
        attached.gateway.umem.frames = Some(all.frames_per_worker());
        Ok(attached)
    }

    /// The gateway file with the ports that there are now.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// True once after each change of the ports.
    pub fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.is_changed)
    }

    /// Adds or removes a port for `towpathctl`.
    ///
    /// # Errors
    /// What is wrong with it, with field, value and remedy. Nothing is changed.
    pub fn change(&mut self, change: PortChange, ports: &mut Ports) -> Result<(), Fault> {
        match change {
            PortChange::Add(section) => self.add(section, ports),
            PortChange::Remove { name } => self.remove(&name, ports),
        }
    }

    fn add(&mut self, section: PortSection, ports: &mut Ports) -> Result<(), Fault> {
        self.open(&section, ports)?;
        let mut record = self.record.clone();
        // What was added by this name before has no interface now, or the port would not have been opened.
        record.added.retain(|added| added.name != section.name);
        record.added.push(section);
        self.keep(record).inspect_err(|_| self.close(self.gateway.ports.len() - 1, ports))
    }

    fn remove(&mut self, name: &str, ports: &mut Ports) -> Result<(), Fault> {
        let fault = |code, message: &str| Fault::new(code, message).field("name").value(name);
        let Some(index) = self.gateway.ports.iter().position(|port| port.name == name) else {
            // One that was added, and would come back with its interface.
            let mut record = self.record.clone();
            record.added.retain(|added| added.name != name);
            if record == self.record {
                return Err(fault(Code::NotFound, "no such port").remedy("see `towpathctl get ports`"));
            }
            self.keep(record)?;
            self.is_changed = true;
            return Ok(());
        };
        let role = self.gateway.ports[index].role;
        let others = || self.gateway.ports.iter().filter(|port| port.name != name).map(|port| port.role);
        let is_only = |of_kind: fn(Role) -> bool| of_kind(role) && !others().any(of_kind);
        for (kind, of_kind) in
            [("outside", Role::is_outside as fn(Role) -> bool), ("inside", Role::is_inside)]
        {
            if is_only(of_kind) {
                let fault = fault(Code::Conflict, &format!("is the only {kind} port"));
                return Err(fault.remedy(format!("add another {kind} port first")));
            }
        }
        let mut record = self.record.clone();
        if let Some(added) = record.added.iter().position(|port| port.name == name) {
            record.added.remove(added);
        } else if self.file.ports.iter().any(|port| port.name == name) {
            record.removed.insert(name.to_owned());
        } else {
            let remedy = "delete or rename the interface; or change the pattern, and start towpathd again";
            return Err(fault(Code::Conflict, "its interface matches a pattern of [[attach]]").remedy(remedy));
        }
        self.keep(record)?;
        self.close(index, ports);
        Ok(())
    }

    /// Follows the links: ports that come and go go with their interfaces, and come with them.
    pub fn follow(&mut self, ports: &mut Ports) {
        loop {
            match self.events.receive(|_| {}) {
                Ok(false) => break,
                // An error says that some were lost.
                Ok(true) | Err(_) => self.is_stale = true,
            }
        }
        if !std::mem::take(&mut self.is_stale) {
            return;
        }
        let links = match self.links() {
            Ok(links) => links,
            Err(cause) => {
                warn!("the kernel does not tell of its links, asking again: {cause}");
                self.is_stale = true;
                return;
            }
        };
        for index in (0..self.gateway.ports.len()).rev() {
            let port = &self.gateway.ports[index];
            let is_it = |link: &Link| link.name == port.interface && link.index == ports.ifindex(index);
            if self.comes_and_goes(port) && !links.iter().any(is_it) {
                info!(
                    port = port.name,
                    interface = port.interface,
                    "the interface is gone, and its port with it"
                );
                self.close(index, ports);
            }
        }
        let wanted = self.wanted(&links);
        self.refused.retain(|interface, _| wanted.iter().any(|port| port.interface == *interface));
        for section in wanted {
            let Err(fault) = self.open(&section, ports) else {
                self.refused.remove(&section.interface);
                continue;
            };
            let text = fault.to_string();
            if self.refused.get(&section.interface) != Some(&text) {
                warn!(interface = section.interface, "does not become a port: {text}");
                self.refused.insert(section.interface, text);
            }
        }
    }

    /// What should be a port and is none: what was added, and what matches a pattern.
    fn wanted(&self, links: &[Link]) -> Vec<PortSection> {
        let is_there = |interface: &String| links.iter().any(|link| link.name == *interface);
        let is_port = |interface: &String| self.gateway.ports.iter().any(|port| port.interface == *interface);
        let added = self.record.added.iter().filter(|port| is_there(&port.interface)).cloned();
        let found = links.iter().filter_map(|link| {
            let section = self.file.attach.iter().find(|section| section.matches(&link.name))?;
            let is_added = self.record.added.iter().any(|port| port.interface == link.name);
            (!is_added).then(|| section.port(&link.name))
        });
        added.chain(found).filter(|port| !is_port(&port.interface)).collect()
    }

    /// True for a port that is not of the gateway file.
    fn comes_and_goes(&self, port: &PortSection) -> bool {
        self.record.removed.contains(&port.name)
            || self.file.ports.iter().all(|of_file| of_file.name != port.name)
    }

    /// Makes `section` the last port.
    fn open(&mut self, section: &PortSection, ports: &mut Ports) -> Result<(), Fault> {
        let index = self.gateway.ports.len();
        let mut gateway = self.gateway.clone();
        gateway.ports.push(section.clone());
        let workers = gateway.workers.cpus.len();
        let faults = preflight::interface(index, section, workers).into_iter().chain(gateway.check());
        if let Some(mut fault) = faults.map(|fault| of_port(fault, index)).next() {
            if fault.field.as_deref() == Some("umem.frames") {
                let needed = gateway.frames_needed();
                fault = fault.remedy(format!(
                    "set it to {needed} or more, or make [rings] smaller, and start towpathd again"
                ));
            }
            return Err(fault);
        }
        ports.add(&gateway).map_err(|fault| of_port(fault, index))?;
        (self.gateway, self.is_changed) = (gateway, true);
        Ok(())
    }

    fn close(&mut self, index: usize, ports: &mut Ports) {
        self.gateway.ports.remove(index);
        ports.remove(index);
        self.is_changed = true;
    }

    fn links(&self) -> io::Result<Vec<Link>> {
        Socket::open()?.dump(kind::GET_LINK, &[0; 16], decode::link)
    }

    /// Writes the record and makes it the one that counts.
    fn keep(&mut self, record: Record) -> Result<(), Fault> {
        record.write(&self.path).map_err(|cause| {
            Fault::new(Code::Storage, format!("cannot be kept: {cause}"))
                .field("flows.region")
                .value(self.path.display())
                .remedy("see that there is room")
        })?;
        self.record = record;
        Ok(())
    }
}

impl Record {
    fn read(path: &Path) -> Result<Record, Fault> {
        let read = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(cause) => Err(cause),
        };
        read.map_err(|cause| {
            Fault::new(Code::Storage, format!("what `towpathctl port` did cannot be read: {cause}"))
                .field("flows.region")
                .value(path.display())
                .remedy("remove the file, and add and remove the ports again")
        })
    }

    /// Without what a gateway file that was changed meanwhile says otherwise.
    fn fit(mut self, file: &Gateway) -> Record {
        self.removed.retain(|name| file.ports.iter().any(|port| port.name == *name));
        let removed = &self.removed;
        self.added.retain(|added| {
            let claims = |port: &&PortSection| port.name == added.name || port.interface == added.interface;
            let claimant = file.ports.iter().filter(|port| !removed.contains(&port.name)).find(claims);
            if let Some(port) = claimant {
                warn!(port = added.name, "not added again: the gateway file has port {} instead", port.name);
            }
            claimant.is_none()
        });
        self
    }

    /// A death at any moment leaves the old file or the new one, whole.
    fn write(&self, path: &Path) -> io::Result<()> {
        let aside = beside(path, ".new");
        let mut file = File::create(&aside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    }
}

/// A fault of the port at `index`, by the names of its own fields.
fn of_port(mut fault: Fault, index: usize) -> Fault {
    if let Some(field) =
        fault.field.as_deref().and_then(|field| field.strip_prefix(&format!("port[{index}].")))
    {
        fault.field = Some(field.into());
    }
    fault
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, interface: &str) -> PortSection {
        let (name, interface) = (name.to_owned(), interface.to_owned());
        PortSection { name, interface, role: Role::Pod, expose_cluster_ips: false, mode: Default::default() }
    }

    #[test]
    fn a_record_is_found_again_and_gives_way_to_the_gateway_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flows.ports");
        assert_eq!(Record::read(&path).unwrap(), Record::default());
        let record = Record {
            added: vec![
                port("pod1", "veth1"),
                port("twice", "g1"),
                port("fabric", "veth2"),
                port("up", "g0"),
            ],
            removed: ["uplink".to_owned(), "gone".to_owned()].into(),
        };
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        // It has the ports uplink at g0 and fabric at g1.
        let text = include_str!("../../../config/examples/gateway.toml");
        let fit = record.fit(&Gateway::parse(text, "gateway.toml").unwrap());
        assert_eq!(fit.added, [port("pod1", "veth1"), port("up", "g0")]);
        assert_eq!(fit.removed, ["uplink".to_owned()].into());
        std::fs::write(&path, "{").unwrap();
        let fault = Record::read(&path).unwrap_err().to_string();
        assert!(fault.contains("flows.region") && fault.contains("remove the file"), "{fault}");
    }
}
