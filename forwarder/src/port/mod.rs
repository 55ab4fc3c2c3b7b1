//! To come.

pub mod xsk;
