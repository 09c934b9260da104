//! Connections that nobody is known to be behind yet: few, and where there are too many the oldest makes room.
//!
//! Who holds connections open and says nothing must not keep out who comes to say something, and nobody can tell the two apart
//! before the hello. An honest hello takes milliseconds, so the oldest is the likeliest to be neither. Known hosts' addresses
//! are counted apart from all others.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::{Members, lock};
use crate::limits::{PENDING_KNOWN, PENDING_PER_ADDRESS, PENDING_STRANGERS};

/// All pending connections.
#[derive(Debug)]
pub(super) struct PendingRoom {
    book: Mutex<Book>,
    members: Members,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    waiting: HashMap<u64, Waiting>,
    by_address: HashMap<IpAddr, VecDeque<u64>>,
    /// In order of age.
    strangers: BTreeSet<u64>,
    known: BTreeSet<u64>,
}

#[derive(Debug)]
struct Waiting {
    from: IpAddr,
    leave: Arc<Notify>,
}

/// A pending connection's place; dropping it makes room.
#[derive(Debug)]
pub(super) struct Place<'r> {
    room: &'r PendingRoom,
    number: u64,
    leave: Arc<Notify>,
}

impl PendingRoom {
    /// An empty room, where `members` are the known hosts' addresses.
    pub(super) fn new(members: Members) -> Self {
        Self {
            book: Mutex::default(),
            members,
        }
    }

    /// Takes a connection in, at the cost of another one where it must be.
    pub(super) fn enter(&self, from: IpAddr) -> Place<'_> {
        let from = from.to_canonical();
        let known = lock(&self.members).contains(&from);
        let mut book = lock(&self.book);
        let own = book.by_address.get(&from);
        let oldest = match own {
            Some(own) if own.len() >= PENDING_PER_ADDRESS => own.front().copied(),
            _ => book.oldest_in_full_class(known),
        };
        if let Some(oldest) = oldest {
            book.evict(oldest);
        }
        let number = book.next;
        book.next += 1;
        let leave = Arc::new(Notify::new());
        let waiting = Waiting {
            from,
            leave: Arc::clone(&leave),
        };
        book.waiting.insert(number, waiting);
        book.by_address.entry(from).or_default().push_back(number);
        book.class(known).insert(number);
        Place {
            room: self,
            number,
            leave,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.book).waiting.len()
    }
}

impl Book {
    fn class(&mut self, known: bool) -> &mut BTreeSet<u64> {
        if known {
            &mut self.known
        } else {
            &mut self.strangers
        }
    }

    fn oldest_in_full_class(&mut self, known: bool) -> Option<u64> {
        let max = if known {
            PENDING_KNOWN
        } else {
            PENDING_STRANGERS
        };
        let class = self.class(known);
        (class.len() >= max).then(|| class.first().copied())?
    }

    fn evict(&mut self, number: u64) {
        if let Some(waiting) = self.remove(number) {
            waiting.leave.notify_one();
        }
    }

    fn remove(&mut self, number: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&number)?;
        self.strangers.remove(&number);
        self.known.remove(&number);
        if let Some(own) = self.by_address.get_mut(&waiting.from) {
            own.retain(|&other| other != number);
            if own.is_empty() {
                self.by_address.remove(&waiting.from);
            }
        }
        Some(waiting)
    }
}

impl Place<'_> {
    /// Returns when another connection needs the place.
    pub(super) async fn evicted(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        lock(&self.room.book).remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn room(known: &[IpAddr]) -> PendingRoom {
        let members: HashSet<IpAddr> = known.iter().copied().collect();
        PendingRoom::new(Arc::new(Mutex::new(members)))
    }

    fn address(number: usize) -> IpAddr {
        let [.., a, b, c] = number.to_be_bytes();
        IpAddr::from([10, a, b, c])
    }

    fn is_evicted(place: &Place<'_>) -> bool {
        !lock(&place.room.book).waiting.contains_key(&place.number)
    }

    #[test]
    fn one_address_pushes_out_its_own_and_the_oldest_first() {
        let room = room(&[]);
        let other = room.enter(address(2));
        let places: Vec<_> = (0..PENDING_PER_ADDRESS + 3)
            .map(|_| room.enter(address(1)))
            .collect();
        let evicted: Vec<bool> = places.iter().map(is_evicted).collect();
        assert!(evicted[..3].iter().all(|&evicted| evicted), "{evicted:?}");
        assert!(!evicted[3..].iter().any(|&evicted| evicted), "{evicted:?}");
        assert!(!is_evicted(&other));
        drop((places, other));
        assert_eq!(room.count(), 0);
        let book = lock(&room.book);
        assert!(book.by_address.is_empty() && book.strangers.is_empty());
    }

    #[test]
    fn strangers_push_out_strangers_and_no_known_host() {
        let known = address(7);
        let room = room(&[known]);
        // As IPv6 sockets show it.
        let IpAddr::V4(v4) = known else {
            panic!("an IPv4 address")
        };
        let host = room.enter(v4.to_ipv6_mapped().into());
        let strangers: Vec<_> = (100..100 + PENDING_STRANGERS + 2)
            .map(|number| room.enter(address(number)))
            .collect();
        assert!(!is_evicted(&host));
        let evicted = strangers.iter().filter(|place| is_evicted(place)).count();
        assert_eq!(evicted, 2);
        assert!(is_evicted(&strangers[0]) && is_evicted(&strangers[1]));
        assert_eq!(room.count(), PENDING_STRANGERS + 1);
    }
}
