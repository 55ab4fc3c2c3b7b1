//! The words that `towpathd` and `towpathctl` share.
//!
//! - [`gateway`]: the gateway file, one TOML file of the gateway's own settings;
//! - [`object`]: Kubernetes manifests, which are the rest of the configuration;
//! - [`control`]: the messages on the control socket;
//! - [`packet`]: the grammar of the packets that `explain` and `trace` take;
//! - [`capture`]: captured packets, and the grammar of the filters of `capture`;
//! - [`fault`]: errors and warnings that name where, what and the remedy.
#![deny(unsafe_code)]

pub mod capture;
pub mod control;
pub mod fault;
pub mod gateway;
pub mod object;
pub mod packet;
