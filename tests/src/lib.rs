//! The rig that the tests run in, as a library.
//!
//! [`namespace`] and [`process`] make the world and clean it up, [`wire`] puts single frames into it and takes them out,
//! [`case`], [`decode`] and [`oracle`] are the golden packets: inputs, what Linux made of them, and how to read a difference.

pub mod case;
pub mod cluster;
pub mod decode;
pub mod fragments;
pub mod frames;
pub mod gateway;
pub mod ledger;
pub mod length;
pub mod marker;
pub mod metrics;
pub mod namespace;
pub mod oracle;
pub mod pcapng;
pub mod probe;
pub mod process;
pub mod pure;
pub mod twin;
pub mod wire;
pub mod worker;
