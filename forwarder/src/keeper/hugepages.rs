//! The kernel's pool of 2 MiB pages, and how large it must be.

use std::path::Path;

/// The pool as /sys shows it, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// In the pool at all (`nr_hugepages`).
    pub total: u64,
    /// Not used by anybody.
    pub free: u64,
    /// Free, but promised to somebody.
    pub promised: u64,
}

impl Pool {
    /// Reads it. A kernel without hugepages has an empty one.
    pub fn read() -> Pool {
        let read = |name| {
            let file = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name);
            std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        Pool { total: read("nr_hugepages"), free: read("free_hugepages"), promised: read("resv_hugepages") }
    }

    /// How large the pool must be so that we have `needed` pages. `ours`: pages of it that we have already.
    pub fn enough_for(&self, needed: u64, ours: u64) -> u64 {
        let others = self.total.saturating_sub(self.free.saturating_sub(self.promised)).saturating_sub(ours);
        others + needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_stays_theirs() {
        assert_eq!(Pool::default().enough_for(66, 0), 66);
        assert_eq!(Pool { total: 33, free: 33, promised: 0 }.enough_for(66, 0), 66);
        assert_eq!(
            Pool { total: 33, free: 0, promised: 0 }.enough_for(66, 33),
            66,
            "the first worker has its pages"
        );
        assert_eq!(Pool { total: 100, free: 50, promised: 10 }.enough_for(66, 0), 126);
    }
}
