//! A hash map for snapshots: cloned in the time of its shards, changed in the time of one shard.
//!
//! Keys are spread over shards, each behind an [`Arc`]. A clone shares them all; a change copies the one it falls into, and
//! only if a snapshot still holds it, so a batch of changes copies each shard once.
//!
//! The number of shards grows with the entries, by one at a time (linear hashing: W. Litwin, VLDB 1980): the next in turn
//! gives about half of its entries to the new one. So no change ever moves more than one shard's entries, whatever the
//! size of the map.
//!
//! A shard is one array of entries, found by linear probing, so that a lookup in a large map misses the caches once: a table
//! that keeps its tags apart from its entries would miss them three times, for its own head, a tag and an entry.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

// Not the fast one: addresses are given in order, and what it makes of an order leaves long runs of taken slots.
use foldhash::quality::RandomState;

/// Entries per shard, on average. One that was not split since the number of shards last doubled has up to twice as many.
const SHARD_LEN: usize = 512;
/// A shard with more than this many tenths of its slots in use gets new ones, twice as many as it has entries.
const FULL_TENTHS: usize = 7;

/// A map whose absent keys have the value `V::default()`; a key that is given that value is absent.
pub(crate) struct ShardedMap<K, V> {
    shards: Vec<Shard<K, V>>,
    /// One random seed for all shards and clones: containers choose keys, so they must not know it.
    hasher: RandomState,
    len: usize,
}

struct Shard<K, V> {
    /// Free slots have the default value, and some key. There is always one, except where there is no slot at all.
    slots: Arc<[(K, V)]>,
    len: usize,
}

impl<K: Copy + Eq + Hash, V: Copy + Default + PartialEq> ShardedMap<K, V> {
    pub(crate) fn new() -> Self {
        Self {
            shards: vec![Shard::empty()],
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
        let slots = &*self.shards[shard_index(hash, self.shards.len())].slots;
        let mut index = home(hash, slots.len());
        loop {
            let (other, value) = slots.get(index)?;
            let free = *value == V::default();
            if free || *other == key {
                return (!free).then_some(value);
            }
            index = after(index, slots.len());
        }
    }

    /// Replaces a key's value by what `change` makes of it.
    pub(crate) fn update(&mut self, key: K, change: impl FnOnce(V) -> V) {
        let hash = self.hasher.hash_one(key);
        let old = self.get(key).copied().unwrap_or_default();
        let new = change(old);
        let count = self.shards.len();
        let shard = &mut self.shards[shard_index(hash, count)];
        match (old != V::default(), new != V::default()) {
            (false, false) => {}
            (true, true) => shard.replace(&self.hasher, key, new),
            (false, true) => {
                shard.insert(&self.hasher, key, new);
                self.len += 1;
            }
            (true, false) => {
                shard.remove(&self.hasher, key);
                self.len -= 1;
            }
        }
        if self.len > count * SHARD_LEN {
            self.grow();
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.shards.iter().flat_map(Shard::iter)
    }

    /// Adds one shard, with the entries that belong there.
    fn grow(&mut self) {
        let count = self.shards.len();
        // Shards are split in order, from the first, until all of the last power of two are.
        let split = count - (1 << count.ilog2());
        let stays = |entry: &(K, V)| shard_index(self.hasher.hash_one(entry.0), count + 1) == split;
        let (old, new): (Vec<_>, Vec<_>) = self.shards[split].iter().partition(stays);
        self.shards[split] = Shard::of(&self.hasher, &old);
        self.shards.push(Shard::of(&self.hasher, &new));
    }
}

impl<K: Copy + Eq + Hash, V: Copy + Default + PartialEq> Shard<K, V> {
    fn empty() -> Self {
        Self {
            slots: Arc::from([]),
            len: 0,
        }
    }

    /// One that holds these entries, of different keys, with as many free slots.
    fn of(hasher: &RandomState, entries: &[(K, V)]) -> Self {
        let Some(&(key, _)) = entries.first() else {
            return Self::empty();
        };
        let mut slots = vec![(key, V::default()); 2 * entries.len()];
        for entry in entries {
            let free = find(&slots, hasher, |(_, value)| *value == V::default(), entry.0);
            slots[free] = *entry;
        }
        Self {
            slots: slots.into(),
            len: entries.len(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        let taken = |(_, value): &(K, V)| *value != V::default();
        self.slots.iter().copied().filter(taken)
    }

    /// A key that is there gets another value.
    fn replace(&mut self, hasher: &RandomState, key: K, value: V) {
        let slots = Arc::make_mut(&mut self.slots);
        let index = find(slots, hasher, |(other, _)| *other == key, key);
        slots[index].1 = value;
    }

    /// A key comes that is not there.
    fn insert(&mut self, hasher: &RandomState, key: K, value: V) {
        if (self.len + 1) * 10 > self.slots.len() * FULL_TENTHS {
            let entries: Vec<(K, V)> = self.iter().chain([(key, value)]).collect();
            *self = Self::of(hasher, &entries);
            return;
        }
        let slots = Arc::make_mut(&mut self.slots);
        let free = find(slots, hasher, |(_, value)| *value == V::default(), key);
        slots[free] = (key, value);
        self.len += 1;
    }

    /// A key that is there goes, and those behind it that it kept from their places move up (Knuth, TAOCP 6.4, algorithm R).
    fn remove(&mut self, hasher: &RandomState, key: K) {
        let slots = Arc::make_mut(&mut self.slots);
        let count = slots.len();
        // How far behind `from` a slot lies, round the end.
        let distance = |from: usize, to: usize| (to + count - from) % count;
        let mut gap = find(slots, hasher, |(other, _)| *other == key, key);
        let mut index = gap;
        loop {
            index = after(index, count);
            let (other, value) = slots[index];
            if value == V::default() {
                break;
            }
            let from = home(hasher.hash_one(other), count);
            if distance(from, index) >= distance(gap, index) {
                slots[gap] = slots[index];
                gap = index;
            }
        }
        slots[gap].1 = V::default();
        self.len -= 1;
    }
}

/// The first slot, of those in which `key` may be, that is what is looked for; there must be one.
fn find<K: Copy + Hash, V>(
    slots: &[(K, V)],
    hasher: &RandomState,
    wanted: impl Fn(&(K, V)) -> bool,
    key: K,
) -> usize {
    let mut index = home(hasher.hash_one(key), slots.len());
    while !wanted(&slots[index]) {
        index = after(index, slots.len());
    }
    index
}

/// The slot that a key of this hash has when it is free: from the lower half of the hash, as the shard is from the upper.
#[inline]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the lower half is what is wanted, and the product's upper half is below `count`"
)]
fn home(hash: u64, count: usize) -> usize {
    ((u64::from(hash as u32) * count as u64) >> 32) as usize
}

#[inline]
fn after(index: usize, count: usize) -> usize {
    if index + 1 == count { 0 } else { index + 1 }
}

#[inline]
fn shard_index(hash: u64, count: usize) -> usize {
    let mask = count.next_power_of_two() - 1;
    let index = (hash >> 32) as usize & mask;
    // What isn't there yet is still in the shard that will be split for it.
    if index < count {
        index
    } else {
        index & (mask >> 1)
    }
}

// Derived, these would ask for `K: Clone, V: Clone`, which `Arc` does not need.
impl<K, V> Clone for ShardedMap<K, V> {
    fn clone(&self) -> Self {
        Self {
            shards: self.shards.clone(),
            hasher: self.hasher.clone(),
            len: self.len,
        }
    }
}

impl<K, V> Clone for Shard<K, V> {
    fn clone(&self) -> Self {
        Self {
            slots: Arc::clone(&self.slots),
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
            map.update(key, |_| key + 1);
        }
        assert!(map.shards.len() > 8, "{} shards", map.shards.len());
        let snapshot = map.clone();
        map.update(5, |_| 0);
        map.update(6, |_| 66);
        assert_eq!(
            (snapshot.get(5), snapshot.get(6), snapshot.len()),
            (Some(&6), Some(&7), 10_000)
        );
        assert_eq!(
            (map.get(5), map.get(6), map.len()),
            (None, Some(&66), 9_999)
        );
        let copied = map
            .shards
            .iter()
            .zip(&snapshot.shards)
            .filter(|(a, b)| !Arc::ptr_eq(&a.slots, &b.slots))
            .count();
        assert!(copied <= 2, "{copied} shards copied for two changes");
    }

    #[test]
    fn no_change_moves_more_than_two_shards_and_none_is_crowded() {
        let mut map = ShardedMap::new();
        let mut snapshot: ShardedMap<u64, u64> = map.clone();
        for key in 0..40_000_u64 {
            map.update(key, |_| 1);
            let same = |(a, b): &(&Shard<_, _>, &Shard<_, _>)| Arc::ptr_eq(&a.slots, &b.slots);
            let shared = map.shards.iter().zip(&snapshot.shards).filter(same).count();
            assert!(shared + 2 >= snapshot.shards.len(), "at key {key}");
            snapshot = map.clone();
        }
        assert_eq!(map.shards.len(), 40_000_usize.div_ceil(SHARD_LEN));
        let most = map.shards.iter().map(|shard| shard.len).max();
        assert!(most < Some(3 * SHARD_LEN), "{most:?} in one shard");
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_map(changes in prop::collection::vec((0..2_000_u64, 0..4_u8), 0..4_000)) {
            let (mut map, mut plain) = (ShardedMap::new(), HashMap::new());
            for (key, value) in changes {
                map.update(key, |_| value);
                match value {
                    0 => { plain.remove(&key); }
                    value => { plain.insert(key, value); }
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
