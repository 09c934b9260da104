//! Readers that are too slow for the news: what they have missed, so that it can be made up.
//!
//! A network's rows and the list of hosts are states, not messages: whoever has missed some of their changes gets one message
//! with all that has changed since. So a slow reader costs a number for each network that it follows, however fast it changes.

use std::collections::{BTreeMap, HashMap};

use vtep::Vni;

use crate::manager::Connection;
use crate::message::ToAgent;

/// What each slow reader has missed.
#[derive(Debug, Default)]
pub(super) struct Behind {
    connections: HashMap<Connection, Missed>,
}

/// What one has missed.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// Networks, and the revision after which changes are missing.
    pub(super) streams: BTreeMap<Vni, u64>,
    /// Whether the list of hosts has changed.
    pub(super) hosts: bool,
}

impl Behind {
    /// Whether to leave this message out; `slow`: the reader cannot take it now.
    pub(super) fn misses(&mut self, connection: Connection, slow: bool, message: &ToAgent) -> bool {
        if !slow && !self.connections.contains_key(&connection) {
            return false;
        }
        match message {
            ToAgent::Rows(rows) => {
                let missed = self.connections.entry(connection).or_default();
                // What follows a gap is no use; nor are the later parts of a message whose first part is missing.
                let gap = missed.streams.contains_key(&rows.vni);
                if gap || slow && rows.part == 0 {
                    let from = missed.streams.entry(rows.vni).or_insert(rows.from);
                    *from = rows.from.min(*from);
                    return true;
                }
                false
            }
            ToAgent::Hosts { .. } => {
                let missed = self.connections.entry(connection).or_default();
                missed.hosts |= slow;
                missed.hosts
            }
            // Nothing makes these up, and they are few: answers, and what concerns the reader alone.
            _ => false,
        }
    }

    /// Forgets a connection that has ended.
    pub(super) fn forget(&mut self, connection: Connection) {
        self.connections.remove(&connection);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
    }

    /// How many readers have missed something.
    pub(super) fn count(&self) -> usize {
        self.connections.len()
    }

    /// Takes out what those have missed that are slow no more.
    pub(super) fn take(
        &mut self,
        mut slow: impl FnMut(Connection) -> bool,
    ) -> Vec<(Connection, Missed)> {
        let fast: Vec<Connection> = self
            .connections
            .keys()
            .copied()
            .filter(|&connection| !slow(connection))
            .collect();
        let take = |connection| Some((connection, self.connections.remove(&connection)?));
        fast.into_iter().filter_map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Rows;

    fn rows(vni: u32, from: u64, part: u32) -> ToAgent {
        ToAgent::Rows(Rows {
            vni: Vni::new(vni).unwrap(),
            generation: 1,
            from,
            to: from + 1,
            part,
            last: true,
            settled: true,
            rows: Vec::new(),
        })
    }

    fn hosts() -> ToAgent {
        ToAgent::Hosts {
            full: false,
            hosts: Vec::new(),
            removed: Vec::new(),
        }
    }

    #[test]
    fn a_gap_lasts_until_it_is_made_up() {
        let mut behind = Behind::default();
        assert!(!behind.misses(1, false, &rows(7, 3, 0)));
        assert!(behind.misses(1, true, &rows(7, 4, 0)));
        assert!(behind.misses(1, false, &rows(7, 5, 0)), "after the gap");
        assert!(!behind.misses(1, false, &rows(8, 5, 0)), "another network");
        assert!(!behind.misses(2, false, &rows(7, 5, 0)), "another reader");
        assert!(behind.misses(1, false, &rows(7, 0, 0)), "a whole snapshot");
        assert!(behind.take(|_| true).is_empty());
        let (connection, missed) = behind.take(|_| false).pop().unwrap();
        assert_eq!(connection, 1);
        assert_eq!(
            missed.streams.into_iter().collect::<Vec<_>>(),
            [(Vni::new(7).unwrap(), 0)]
        );
        assert!(!missed.hosts);
        assert!(!behind.misses(1, false, &rows(7, 6, 0)));
    }

    #[test]
    fn a_message_that_has_begun_is_finished_and_answers_always_go() {
        let mut behind = Behind::default();
        assert!(!behind.misses(1, true, &rows(7, 0, 1)));
        assert!(!behind.misses(1, true, &ToAgent::Heartbeat));
        assert!(behind.misses(1, true, &hosts()));
        assert!(behind.misses(1, false, &hosts()));
        assert_eq!(behind.count(), 1);
        assert!(behind.take(|_| false).pop().unwrap().1.hosts);
        assert_eq!(behind.count(), 0);
    }
}
