//! A hash map for snapshots: cloned in the time of its shards, changed in the time of one shard.
//!
//! Keys are spread over a power of two of shards, each behind an [`Arc`]. A clone shares them all; a change copies the one
//! it falls into, and only if a snapshot still holds it, so a batch of changes copies each shard once. The number of
//! shards grows with the entries, which keeps a copy at some hundred entries whatever the size of the map.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

/// Entries per shard, on average, above which the map is spread over four times as many.
const SPLIT_ABOVE: usize = 512;

pub(crate) struct ShardedMap<K, V> {
    shards: Vec<Arc<HashTable<(K, V)>>>,
    /// One random seed for all shards and clones: containers choose keys, so they must not know it.
    hasher: RandomState,
    len: usize,
}

impl<K: Copy + Eq + Hash, V: Copy> ShardedMap<K, V> {
    pub(crate) fn new() -> Self {
        Self {
            shards: vec![Arc::default()],
            hasher: RandomState::default(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn get(&self, key: K) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        self.shards[self.shard_of(hash)]
            .find(hash, |entry| entry.0 == key)
            .map(|entry| &entry.1)
    }

    /// Replaces a key's value by what `change` makes of it; `None` stands for an absent key, before and after.
    pub(crate) fn update(&mut self, key: K, change: impl FnOnce(Option<V>) -> Option<V>) {
        let hash = self.hasher.hash_one(key);
        let index = self.shard_of(hash);
        let old = self.shards[index]
            .find(hash, |entry| entry.0 == key)
            .map(|entry| entry.1);
        let new = change(old);
        if old.is_none() && new.is_none() {
            return;
        }
        let hasher = &self.hasher;
        let shard = Arc::make_mut(&mut self.shards[index]);
        match new {
            Some(value) => match shard.entry(
                hash,
                |entry| entry.0 == key,
                |entry| hasher.hash_one(entry.0),
            ) {
                hashbrown::hash_table::Entry::Occupied(mut entry) => entry.get_mut().1 = value,
                hashbrown::hash_table::Entry::Vacant(entry) => {
                    entry.insert((key, value));
                    self.len += 1;
                }
            },
            None => {
                if let Ok(entry) = shard.find_entry(hash, |entry| entry.0 == key) {
                    entry.remove();
                    self.len -= 1;
                }
            }
        }
        if self.len > self.shards.len() * SPLIT_ABOVE {
            self.split();
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.shards.iter().flat_map(|shard| shard.iter().copied())
    }

    fn split(&mut self) {
        let count = self.shards.len() * 4;
        let mut shards: Vec<HashTable<(K, V)>> = (0..count)
            .map(|_| HashTable::with_capacity(SPLIT_ABOVE / 2))
            .collect();
        for (key, value) in self.iter() {
            let hash = self.hasher.hash_one(key);
            shards[shard_index(hash, count)]
                .insert_unique(hash, (key, value), |entry| self.hasher.hash_one(entry.0));
        }
        self.shards = shards.into_iter().map(Arc::new).collect();
    }

    fn shard_of(&self, hash: u64) -> usize {
        shard_index(hash, self.shards.len())
    }
}

/// The tables take their buckets from the lowest bits of the hash and their tags from the highest seven; the shard comes
/// from bits between, or all of a shard's entries would crowd into few buckets.
fn shard_index(hash: u64, count: usize) -> usize {
    (hash >> 32) as usize & (count - 1)
}

// Derived, this would ask for `K: Clone, V: Clone`, which `Arc` does not need.
impl<K, V> Clone for ShardedMap<K, V> {
    fn clone(&self) -> Self {
        Self {
            shards: self.shards.clone(),
            hasher: self.hasher.clone(),
            len: self.len,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_clone_does_not_see_later_changes() {
        let mut map = ShardedMap::new();
        for key in 0..10_000_u64 {
            map.update(key, |_| Some(key));
        }
        assert!(map.shards.len() > 8, "{} shards", map.shards.len());
        let snapshot = map.clone();
        map.update(5, |_| None);
        map.update(6, |_| Some(66));
        assert_eq!(
            (snapshot.get(5), snapshot.get(6), snapshot.len()),
            (Some(&5), Some(&6), 10_000)
        );
        assert_eq!(
            (map.get(5), map.get(6), map.len()),
            (None, Some(&66), 9_999)
        );
        let copied = map
            .shards
            .iter()
            .zip(&snapshot.shards)
            .filter(|(a, b)| !Arc::ptr_eq(a, b))
            .count();
        assert!(copied <= 2, "{copied} shards copied for two changes");
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_map(changes in prop::collection::vec((0..2_000_u64, prop::option::of(0..9_u8)), 0..4_000)) {
            let (mut map, mut plain) = (ShardedMap::new(), HashMap::new());
            for (key, value) in changes {
                map.update(key, |_| value);
                match value {
                    Some(value) => { plain.insert(key, value); }
                    None => { plain.remove(&key); }
                }
            }
            prop_assert_eq!(map.len(), plain.len());
            for key in 0..2_000 {
                prop_assert_eq!(map.get(key), plain.get(&key));
            }
            prop_assert_eq!(map.iter().collect::<HashMap<_, _>>(), plain);
        }
    }
}
