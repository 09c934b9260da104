//! The forwarding database of one network, small enough for a million endpoints.
//!
//! Endpoints are many, the places they are at few: each place is kept once, and an entry names it by a number of four bytes.
//! An entry takes 16 bytes, and between 23 and 32 with the slots that are kept free.

use std::num::NonZeroU32;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::{Location, PortId};
use crate::MacAddr;
use crate::sharded::ShardedMap;

/// Names a place in one network; one above its index in [`Fdb::places`].
type Number = NonZeroU32;

/// What snapshots hold.
#[derive(Clone)]
pub(super) struct Fdb {
    entries: ShardedMap<MacAddr, Entry>,
    /// By number. Those without a use stay until their number is given again.
    places: Arc<Vec<Location>>,
}

/// Where an endpoint is; while both are there the local port counts.
#[derive(Clone, Copy, Default, PartialEq)]
struct Entry {
    local: Option<Number>,
    remote: Option<Number>,
}

/// Which numbers are given; the writer's alone, so that no snapshot copies it.
#[derive(Default)]
pub(super) struct Numbers {
    by_place: HashMap<Location, Number, RandomState>,
    /// How many entries use each.
    uses: Vec<u32>,
    free: Vec<Number>,
}

impl Fdb {
    pub(super) fn new() -> Self {
        Self {
            entries: ShardedMap::new(),
            places: Arc::default(),
        }
    }

    #[inline]
    pub(super) fn get(&self, mac: MacAddr) -> Option<Location> {
        self.place_of(*self.entries.get(mac)?)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (MacAddr, Location)> + '_ {
        self.entries
            .iter()
            .filter_map(|(mac, entry)| Some((mac, self.place_of(entry)?)))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// `mac` is at `place`, whatever is known of it at a place of the other kind.
    pub(super) fn set(&mut self, numbers: &mut Numbers, mac: MacAddr, place: Location) {
        let number = numbers.take(place, &mut self.places);
        let side = match place {
            Location::Local(_) => Entry::local,
            Location::Remote(_) => Entry::remote,
        };
        self.replace(numbers, mac, side, Some(number));
    }

    /// `mac` is behind no remote VTEP any more.
    pub(super) fn remove_remote(&mut self, numbers: &mut Numbers, mac: MacAddr) {
        self.replace(numbers, mac, Entry::remote, None);
    }

    /// `mac` is not at this port any more; where another port has taken it over it stays there.
    pub(super) fn remove_local(&mut self, numbers: &mut Numbers, mac: MacAddr, port: PortId) {
        if self.get(mac) == Some(Location::Local(port)) {
            self.replace(numbers, mac, Entry::local, None);
        }
    }

    fn replace(
        &mut self,
        numbers: &mut Numbers,
        mac: MacAddr,
        side: fn(&mut Entry) -> &mut Option<Number>,
        new: Option<Number>,
    ) {
        let mut old = None;
        self.entries.update(mac, |mut entry| {
            old = std::mem::replace(side(&mut entry), new);
            entry
        });
        if let Some(old) = old {
            numbers.release(old, &self.places);
        }
    }

    #[inline]
    fn place_of(&self, entry: Entry) -> Option<Location> {
        let number = entry.local.or(entry.remote)?;
        self.places.get(index(number)).copied()
    }
}

impl Entry {
    fn local(&mut self) -> &mut Option<Number> {
        &mut self.local
    }

    fn remote(&mut self) -> &mut Option<Number> {
        &mut self.remote
    }
}

impl Numbers {
    /// The number of a place, for one use more.
    fn take(&mut self, place: Location, places: &mut Arc<Vec<Location>>) -> Number {
        if let Some(&number) = self.by_place.get(&place) {
            self.uses[index(number)] += 1;
            return number;
        }
        let places = Arc::make_mut(places);
        let number = match self.free.pop() {
            Some(number) => {
                places[index(number)] = place;
                self.uses[index(number)] = 1;
                number
            }
            None => {
                places.push(place);
                self.uses.push(1);
                let count = u32::try_from(places.len()).unwrap_or(u32::MAX);
                Number::new(count).expect("one was just pushed")
            }
        };
        self.by_place.insert(place, number);
        number
    }

    fn release(&mut self, number: Number, places: &[Location]) {
        let uses = &mut self.uses[index(number)];
        *uses -= 1;
        if *uses == 0 {
            self.by_place.remove(&places[index(number)]);
            self.free.push(number);
        }
    }
}

fn index(number: Number) -> usize {
    number.get() as usize - 1
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn mac(number: u8) -> MacAddr {
        MacAddr::new([2, 0, 0, 0, 0, number])
    }

    fn remote(number: u8) -> Location {
        Location::Remote(SocketAddr::from(([192, 0, 2, number], 4789)))
    }

    #[test]
    fn an_entry_takes_sixteen_bytes() {
        assert_eq!(size_of::<(MacAddr, Entry)>(), 16);
    }

    #[test]
    fn a_number_is_given_again_when_its_place_has_no_use() {
        let (mut fdb, mut numbers) = (Fdb::new(), Numbers::default());
        for turn in 0..100 {
            fdb.set(&mut numbers, mac(1), remote(turn));
            fdb.set(&mut numbers, mac(2), remote(turn));
        }
        assert!(fdb.places.len() <= 2, "{} places", fdb.places.len());
        let before = fdb.clone();
        fdb.remove_remote(&mut numbers, mac(1));
        fdb.set(&mut numbers, mac(2), remote(200));
        fdb.set(&mut numbers, mac(3), remote(201));
        assert_eq!(fdb.places.len(), 2);
        // A snapshot keeps the meaning that numbers had.
        assert_eq!(before.get(mac(2)), Some(remote(99)));
        assert_eq!(
            (fdb.get(mac(1)), fdb.get(mac(2)), fdb.get(mac(3))),
            (None, Some(remote(200)), Some(remote(201)))
        );
        fdb.remove_remote(&mut numbers, mac(2));
        fdb.remove_remote(&mut numbers, mac(3));
        assert_eq!((fdb.len(), numbers.by_place.len()), (0, 0));
    }

    #[test]
    fn a_place_of_one_kind_leaves_that_of_the_other() {
        let (mut fdb, mut numbers) = (Fdb::new(), Numbers::default());
        let port = Location::Local(PortId(u32::MAX));
        fdb.set(&mut numbers, mac(1), port);
        fdb.set(&mut numbers, mac(1), remote(1));
        assert_eq!(fdb.get(mac(1)), Some(port));
        fdb.remove_local(&mut numbers, mac(1), PortId(0));
        assert_eq!(fdb.get(mac(1)), Some(port), "another port's end");
        fdb.remove_local(&mut numbers, mac(1), PortId(u32::MAX));
        assert_eq!(fdb.get(mac(1)), Some(remote(1)));
        assert_eq!(fdb.iter().collect::<Vec<_>>(), [(mac(1), remote(1))]);
    }
}
