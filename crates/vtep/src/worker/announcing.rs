//! What a worker tells the ports of this host by itself: that an address has another MAC.

use std::io::IoSlice;

use super::Worker;
use super::delivery::hand_over;
use crate::announce::Announcement;
use crate::edge::{Offload, TapFrame, Underlay};

impl<U: Underlay> Worker<U> {
    /// Hands the announcement to every port of its network that has a queue here, but for the one that owns the address. When the
    /// tables say something else by now, it is not made: news may come faster than they can be told.
    pub fn announce(&mut self, announcement: &Announcement) {
        let tables = self.config.tables.load();
        let Some(network) = tables.network(announcement.vni) else {
            return;
        };
        if network.neighbor(announcement.ip) != Some(announcement.mac) {
            return;
        }
        let mut frame = Vec::new();
        announcement.emit(&mut frame);
        let slices = [IoSlice::new(&frame)];
        let frame = TapFrame {
            slices: &slices,
            offload: Offload::default(),
        };
        let ledger = self.config.ledger(&self.counters, &tables, None);
        for id in network.ports() {
            let owner = tables
                .port(*id)
                .is_none_or(|port| port.mac == announcement.mac);
            if let (false, Some(&place)) = (owner, self.places.get(id)) {
                hand_over(&mut self.ports[place], &[frame], &ledger);
                ledger.announced();
            }
        }
    }
}
