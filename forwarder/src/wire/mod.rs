//! Bytes to fields and back; no policy. Past this folder everything is in host byte order.
//!
//! The fast path reads headers through `zerocopy` structs, so that a header is a checked reference into the frame.
//! `etherparse` builds and reads packets where speed does not matter: traces, tests and load tests.

pub mod checksum;
pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod sctp;
pub mod tcp;
pub mod udp;
pub mod vxlan;
