//! Ports over AF_XDP.

pub mod steer;
