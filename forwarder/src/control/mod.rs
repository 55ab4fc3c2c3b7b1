//! The walk of a command: socket -> validate -> state -> compile -> publish.

pub mod socket;

pub mod address;
pub mod facts;
pub mod state;
pub mod validate;

pub mod compile;

pub mod flow;
pub mod health;
pub mod persist;
pub mod publish;
