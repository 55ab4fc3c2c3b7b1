//! Longest-prefix match, one table for both families.

use ipnet::IpNet;

use crate::addr::Addr;

/// Prefixes to values. Immutable once published.
#[derive(Clone, Debug)]
pub struct Lpm<T> {
    entries: Vec<(IpNet, T)>,
}

impl<T> Default for Lpm<T> {
    fn default() -> Self {
        Lpm { entries: Vec::new() }
    }
}

impl<T: Copy> Lpm<T> {
    /// Builds the table; of two equal prefixes the later wins.
    pub fn build(entries: impl IntoIterator<Item = (IpNet, T)>) -> Self {
        Lpm { entries: entries.into_iter().collect() }
    }

    /// The longest prefix that contains `addr`, with its value.
    pub fn lookup_entry(&self, addr: Addr) -> Option<(IpNet, T)> {
        let ip: std::net::IpAddr = addr.into();
        self.entries
            .iter()
            .rev()
            .filter(|(net, _)| net.contains(&ip))
            .max_by_key(|(net, _)| net.prefix_len())
            .copied()
    }

    /// The value of the longest prefix that contains `addr`.
    pub fn lookup(&self, addr: Addr) -> Option<T> {
        let ip: std::net::IpAddr = addr.into();
        self.entries
            .iter()
            .rev()
            .filter(|(net, _)| net.contains(&ip))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|e| e.1)
    }
}
