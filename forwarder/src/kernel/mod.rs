//! What the kernel knows of links, addresses, routes and neighbors, mirrored by netlink into the forwarding table.

pub mod decode;
pub mod fib;
pub mod message;
pub mod snapshot;
