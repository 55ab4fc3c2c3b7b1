//! The walk of a command: socket -> validate -> state -> compile -> publish.

pub mod flow;
pub mod health;
pub mod persist;
pub mod publish;
pub mod socket;
