//! Ports over AF_XDP: the queue that a worker serves, and the program that decides which packets come to it.

pub mod queue;
pub mod steer;
