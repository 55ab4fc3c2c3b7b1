//! What the kernel knows of links, addresses, routes and neighbors, mirrored by netlink into the forwarding table.
//!
//! ```text
//! kernel --netlink--> socket -> message -> decode -> snapshot -> fib -> publish (an epoch of the Fib)
//!    ^                                                             |
//!    +---- privileged (the keeper) <---- keep <--------------------+  neighbors to keep resolved
//! ```
//!
//! [`Mirror`](mirror::Mirror) is the thread that does it. It needs no privilege but for what [`privileged`] asks of the keeper.
//! Only the tables local, main and default are read; other policy rules are not followed, and said so in the log.

pub mod changes;
pub mod decode;
pub mod fib;
pub mod keep;
pub mod message;
pub mod mirror;
pub mod privileged;
pub mod snapshot;
pub mod socket;
