//! Structures that know no networking: each has a slow twin in its tests.

pub mod flow_map;
pub mod lpm;
pub mod maglev;
pub mod paged;
pub mod record_ring;
pub mod spread;
