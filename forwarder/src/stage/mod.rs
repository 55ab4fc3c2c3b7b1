//! The stages of the pipeline, in packet order. Each loops over the burst, writes packet metadata, and calls no other stage, clock,
//! lock, log or allocator. Frames are changed by the last one only, so that a packet can be judged again at any time.
//!
//! [`overlay`] is called where packets are read and where they are rewritten: the stages between see inner packets only.
//! [`overflow`] and [`reset`] are no stages: they hold what several stages do about one kind of connection.

pub mod parse;
pub mod overlay;
pub mod flow;
pub mod icmp_error;
pub mod service;
pub mod route;
pub mod nat;
pub mod rewrite;

pub mod egress;
pub mod overflow;
pub mod reset;
