//! A store of idle things, found by key, evicted oldest first.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

#[derive(Debug)]
pub(crate) struct Idle<K, V> {
    // Ordered by the moment of `push`: the first is the oldest.
    by_age: BTreeMap<u64, Entry<K, V>>,
    // Ages of each key's values, oldest first.
    by_key: HashMap<K, Vec<u64>>,
    bytes: u64,
    next_age: u64,
}

#[derive(Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    bytes: u64,
}

impl<K, V> Default for Idle<K, V> {
    fn default() -> Self {
        Self {
            by_age: BTreeMap::new(),
            by_key: HashMap::new(),
            bytes: 0,
            next_age: 0,
        }
    }
}

impl<K: Copy + Eq + Hash, V> Idle<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.by_age.len()
    }

    /// Sum of the `bytes` that the values were pushed with.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn push(&mut self, key: K, value: V, bytes: u64) {
        let age = self.next_age;
        self.next_age += 1;
        self.bytes += bytes;
        self.by_key.entry(key).or_default().push(age);
        self.by_age.insert(age, Entry { key, value, bytes });
    }

    /// The youngest value of `key` that `fits`: the one whose pages are likeliest in the cache.
    pub(crate) fn take(&mut self, key: K, fits: impl Fn(&V) -> bool) -> Option<V> {
        let ages = self.by_key.get(&key)?;
        let age = ages
            .iter()
            .rev()
            .copied()
            .find(|age| self.by_age.get(age).is_some_and(|entry| fits(&entry.value)))?;
        self.remove(age)
    }

    pub(crate) fn take_oldest(&mut self) -> Option<V> {
        let age = *self.by_age.first_key_value()?.0;
        self.remove(age)
    }

    /// The oldest value that `fits`.
    pub(crate) fn take_oldest_where(&mut self, fits: impl Fn(&V) -> bool) -> Option<V> {
        let found = self.by_age.iter().find(|(_, entry)| fits(&entry.value));
        let age = *found?.0;
        self.remove(age)
    }

    pub(crate) fn take_all(&mut self, key: K) -> Vec<V> {
        let ages = self.by_key.get(&key).cloned().unwrap_or_default();
        ages.into_iter()
            .filter_map(|age| self.remove(age))
            .collect()
    }

    pub(crate) fn keys_where(&self, fits: impl Fn(&V) -> bool) -> Vec<K> {
        self.by_age
            .values()
            .filter(|entry| fits(&entry.value))
            .map(|entry| entry.key)
            .collect()
    }

    fn remove(&mut self, age: u64) -> Option<V> {
        let entry = self.by_age.remove(&age)?;
        self.bytes -= entry.bytes;
        if let Some(ages) = self.by_key.get_mut(&entry.key) {
            ages.retain(|known| *known != age);
            if ages.is_empty() {
                self.by_key.remove(&entry.key);
            }
        }
        Some(entry.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn youngest_of_a_key_and_oldest_of_all() {
        let mut idle = Idle::default();
        for (key, value) in [('a', 1), ('b', 2), ('a', 3), ('a', 4)] {
            idle.push(key, value, 10);
        }
        assert_eq!((idle.len(), idle.bytes()), (4, 40));
        assert_eq!(idle.take('a', |value| *value < 4), Some(3));
        assert_eq!(idle.take_oldest(), Some(1));
        assert_eq!(idle.take('c', |_| true), None);
        assert_eq!(idle.take_oldest_where(|value| *value > 4), None);
        assert_eq!(idle.keys_where(|value| *value == 2), ['b']);
        assert_eq!(idle.take_all('a'), [4]);
        assert_eq!((idle.len(), idle.bytes()), (1, 10));
        assert_eq!(idle.take_oldest(), Some(2));
        assert_eq!((idle.len(), idle.bytes()), (0, 0));
        assert!(idle.by_key.is_empty());
    }
}
