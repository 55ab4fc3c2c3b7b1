//! A hash map in pages that snapshots share: changing one entry copies one page and its directory, nothing else.
//!
//! Linear hashing (Litwin, VLDB 1980): the map grows and shrinks by one page at a time, so no single change ever rehashes everything,
//! and a change of a map of any size costs about the same.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::prefetch;

/// Entries a page has on average before the map grows.
const ENTRIES_PER_PAGE: usize = 6;
/// Pages a directory has: a power of two.
const PAGES_PER_DIRECTORY: usize = 128;

/// The hash is kept: it rejects most other entries of a page, and growing needs no keys.
#[derive(Clone, Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    hash: u32,
}

type Page<K, V> = Arc<[Entry<K, V>]>;
type Directory<K, V> = Arc<Vec<Page<K, V>>>;

/// Immutable once published; a clone shares all pages and costs a reference for each 128 of them (about 1 us at 100,000 entries).
#[derive(Clone, Debug)]
pub struct PagedMap<K, V> {
    directories: Vec<Directory<K, V>>,
    pages: usize,
    len: usize,
    hasher: RandomState,
}

impl<K, V> Default for PagedMap<K, V> {
    fn default() -> Self {
        PagedMap { directories: Vec::new(), pages: 0, len: 0, hasher: RandomState::default() }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> PagedMap<K, V> {
    /// The value of `key`: four dependent loads, the last in a page of about six entries.
    #[inline]
    pub fn get(&self, key: &K) -> Option<&V> {
        if self.pages == 0 {
            return None;
        }
        let hash = self.hash(key);
        self.page(self.page_of(hash))
            .iter()
            .find(|entry| entry.hash == hash && entry.key == *key)
            .map(|entry| &entry.value)
    }

    /// Asks for the page of `key`, ahead of its use.
    #[inline]
    pub fn prefetch(&self, key: &K) {
        if self.pages > 0 {
            prefetch(&**self.page(self.page_of(self.hash(key))));
        }
    }

    /// Sets the value of `key`; returns the one it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if self.pages == 0 {
            self.push_page(Arc::new([]));
        }
        let hash = self.hash(&key);
        let page = self.page_mut(self.page_of(hash));
        if let Some(at) = page.iter().position(|entry| entry.hash == hash && entry.key == key) {
            return Some(std::mem::replace(&mut Arc::make_mut(page)[at].value, value));
        }
        *page = page.iter().cloned().chain([Entry { key, value, hash }]).collect();
        self.len += 1;
        if self.len > self.pages * ENTRIES_PER_PAGE {
            self.grow();
        }
        None
    }

    /// Removes `key`; returns the value it had.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        if self.pages == 0 {
            return None;
        }
        let hash = self.hash(key);
        // Looked for before anything is copied.
        let index = self.page_of(hash);
        let at = self.page(index).iter().position(|entry| entry.hash == hash && entry.key == *key)?;
        let page = self.page_mut(index);
        let value = page[at].value.clone();
        *page = page[..at].iter().chain(&page[at + 1..]).cloned().collect();
        self.len -= 1;
        // Far below where it grows, so that one entry that comes and goes does not move pages.
        if self.pages > 1 && self.len < self.pages * ENTRIES_PER_PAGE / 3 {
            self.shrink();
        }
        Some(value)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let pages = self.directories.iter().flat_map(|directory| directory.iter());
        pages.flat_map(|page| page.iter()).map(|entry| (&entry.key, &entry.value))
    }

    #[inline]
    fn hash(&self, key: &K) -> u32 {
        self.hasher.hash_one(key) as u32
    }

    /// Linear hashing: pages below the last power of two that were split already use one bit more.
    #[inline]
    fn page_of(&self, hash: u32) -> usize {
        let bits = usize::BITS - (self.pages - 1).leading_zeros();
        let index = hash as usize & ((1 << bits) - 1);
        if index < self.pages { index } else { index ^ 1 << (bits - 1) }
    }

    #[inline]
    fn page(&self, index: usize) -> &Page<K, V> {
        &self.directories[index / PAGES_PER_DIRECTORY][index % PAGES_PER_DIRECTORY]
    }

    /// Copies the directory if a snapshot shares it.
    fn page_mut(&mut self, index: usize) -> &mut Page<K, V> {
        let directory = Arc::make_mut(&mut self.directories[index / PAGES_PER_DIRECTORY]);
        &mut directory[index % PAGES_PER_DIRECTORY]
    }

    fn push_page(&mut self, page: Page<K, V>) {
        if self.pages.is_multiple_of(PAGES_PER_DIRECTORY) {
            self.directories.push(Arc::new(Vec::with_capacity(PAGES_PER_DIRECTORY)));
        }
        Arc::make_mut(&mut self.directories[self.pages / PAGES_PER_DIRECTORY]).push(page);
        self.pages += 1;
    }

    fn pop_page(&mut self) -> Option<Page<K, V>> {
        let page = Arc::make_mut(self.directories.last_mut()?).pop();
        self.pages -= 1;
        if self.pages.is_multiple_of(PAGES_PER_DIRECTORY) {
            self.directories.pop();
        }
        page
    }

    /// The page that shares its entries with page `index`, the last one: the same index without its highest bit.
    fn buddy(index: usize) -> usize {
        index ^ 1 << index.ilog2()
    }

    fn grow(&mut self) {
        let added = self.pages;
        let bit = 1u32 << added.ilog2();
        let split = self.page_mut(Self::buddy(added));
        let (stay, go): (Vec<_>, Vec<_>) = split.iter().cloned().partition(|entry| entry.hash & bit == 0);
        *split = stay.into();
        self.push_page(go.into());
    }

    fn shrink(&mut self) {
        let buddy = Self::buddy(self.pages - 1);
        if let Some(last) = self.pop_page() {
            let page = self.page_mut(buddy);
            *page = page.iter().chain(last.iter()).cloned().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u16, u32),
        Remove(u16),
        Snapshot,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..2_000u16, any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
            3 => (0..2_000u16).prop_map(Step::Remove),
            1 => Just(Step::Snapshot),
        ]
    }

    fn assert_agrees(map: &PagedMap<u16, u32>, twin: &HashMap<u16, u32>) -> Result<(), TestCaseError> {
        prop_assert_eq!((map.len(), map.is_empty()), (twin.len(), twin.is_empty()));
        for key in 0..2_000 {
            prop_assert_eq!(map.get(&key), twin.get(&key));
        }
        let listed: HashMap<u16, u32> = map.iter().map(|(k, v)| (*k, *v)).collect();
        prop_assert_eq!(&listed, twin);
        prop_assert_eq!(map.iter().count(), twin.len());
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn it_agrees_with_a_hash_map_and_snapshots_do_not_change(steps in prop::collection::vec(step(), 1..1_500)) {
            let (mut map, mut twin) = (PagedMap::default(), HashMap::new());
            let mut snapshots = Vec::new();
            for step in steps {
                match step {
                    Step::Insert(key, value) => prop_assert_eq!(map.insert(key, value), twin.insert(key, value)),
                    Step::Remove(key) => prop_assert_eq!(map.remove(&key), twin.remove(&key)),
                    Step::Snapshot => {
                        if snapshots.len() < 3 {
                            snapshots.push((map.clone(), twin.clone()));
                        }
                    }
                }
            }
            assert_agrees(&map, &twin)?;
            for (map, twin) in &snapshots {
                assert_agrees(map, twin)?;
            }
        }
    }

    #[test]
    fn it_grows_and_shrinks_through_every_size() {
        let mut map = PagedMap::default();
        for i in 0..5_000u32 {
            assert_eq!(map.insert(i, i), None);
            assert_eq!(map.get(&(i / 2)), Some(&(i / 2)));
        }
        assert!(map.pages > 800);
        for i in 0..5_000u32 {
            assert_eq!(map.remove(&i), Some(i));
            assert_eq!(map.get(&i), None);
            assert_eq!(map.get(&4_999), (i < 4_999).then_some(&4_999));
        }
        assert!(map.is_empty() && map.pages < 10);
        assert_eq!(map.insert(1, 1), None);
    }

    #[test]
    fn one_change_copies_one_page() {
        let mut map = PagedMap::default();
        for i in 0..50_000u32 {
            map.insert(i, Arc::new(i));
        }
        let old = map.clone();
        map.insert(7, Arc::new(70));
        let pages = |map: &PagedMap<u32, Arc<u32>>| {
            map.directories.iter().flat_map(|d| d.iter().map(|page| page.as_ptr())).collect::<Vec<_>>()
        };
        let copied = pages(&old).iter().zip(pages(&map)).filter(|(a, b)| **a != *b).count();
        assert_eq!(copied, 1);
        let shared = old.directories.iter().zip(&map.directories).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!(shared, old.directories.len() - 1);
        assert_eq!((old.get(&7).map(|v| **v), map.get(&7).map(|v| **v)), (Some(7), Some(70)));
        assert_eq!(Arc::strong_count(old.get(&30_000).unwrap()), 1);
    }
}
