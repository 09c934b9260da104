//! For the driver: how much is to be sent, and what a reader that was too slow for the news has missed.

use std::time::Duration;

use vtep::Vni;

use super::{Connection, Manager};

impl Manager {
    /// Outputs that wait to be taken.
    pub(crate) fn pending_outputs(&self) -> usize {
        self.outputs.len()
    }

    /// Sends all changes of a network after a revision, if the connection still follows it.
    pub(crate) fn resend_rows(&mut self, connection: Connection, vni: Vni, after: u64) {
        let follows = self
            .connections
            .get(&connection)
            .is_some_and(|peer| peer.subscriptions.contains(&vni));
        if follows {
            self.send_rows(connection, vni, after);
        }
    }

    /// Sends the whole list of hosts.
    pub(crate) fn resend_hosts(&mut self, connection: Connection, now: Duration) {
        if self.connections.contains_key(&connection) {
            self.tell_all_hosts(&[connection], now);
        }
    }
}
