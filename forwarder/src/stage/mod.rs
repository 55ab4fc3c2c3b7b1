//! The stages of the pipeline, in packet order. Each loops over the burst, writes packet metadata, and calls no other stage, clock,
//! lock, log or allocator. Frames are changed by the last one only, so that a packet can be judged again at any time.

pub mod parse;
pub mod flow;
pub mod icmp_error;
pub mod service;
pub mod route;
pub mod nat;
pub mod overflow;
pub mod rewrite;
