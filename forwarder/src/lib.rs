//! The library behind `towpathd`.
//!
//! The `mod` lines follow the walk of a packet, then the walk of a command;
//! `ARCHITECTURE.md` tells both. The daemon's `main.rs` is thin, so that tests,
//! benches and `towpathctl explain` drive exactly this code.
#![deny(unsafe_code)]

// The walk of a packet.
pub mod worker;
pub mod port;
pub mod packet;
pub mod pipeline;
pub mod stage;
pub mod verdict;
pub mod trace;
pub mod capture;
pub mod wire;

// What a packet is judged by.
pub mod addr;
pub mod tables;
pub mod table;
pub mod stats;

// The walk of a command.
pub mod control;
pub mod kernel;
pub mod assume;
pub mod explain;
pub mod replay;

// The process around them.
pub mod keeper;
