//! This host's own endpoints: published, compared with what the manager holds for this host, and lost to newer allocations.

use std::collections::BTreeSet;

use vtep::Vni;

use super::{Agent, Link, Output, PartialOwned};
use crate::epoch::Epoch;
use crate::message::{OwnedEndpoint, ToManager};
use crate::network::Endpoint;
use crate::request::{EndpointState, Event, Owned};
use crate::row::Row;

impl Agent {
    /// This host's endpoint is up or down. Remembered, and published again on every connection where the manager differs,
    /// until the endpoint is freed or lost.
    pub fn publish(&mut self, endpoint: Endpoint, state: EndpointState) {
        let key = (endpoint.vni, endpoint.epoch);
        self.last_epoch = self.last_epoch.max(endpoint.epoch);
        if !self.is_up() {
            self.announce_own(&endpoint, state == EndpointState::Up);
        }
        self.endpoints.insert(key, (endpoint, state));
        // Before the manager's list is here, the edit's number is not known; that list's arrival publishes everything.
        if matches!(self.link, Link::Up { owned: None, .. }) {
            self.send_publish(key);
        }
    }

    pub(super) fn owned(&mut self, endpoints: Vec<OwnedEndpoint>, names: Vec<String>, last: bool) {
        let Link::Up {
            owned: partial @ Some(_),
            ..
        } = &mut self.link
        else {
            return;
        };
        let whole = partial.get_or_insert_default();
        whole.endpoints.extend(endpoints);
        whole.names.extend(names);
        if !last {
            return;
        }
        let PartialOwned { endpoints, names } = std::mem::take(whole);
        *partial = None;
        // As this host last said it: the state, and by the last of this host's edits that anybody may have heard of.
        let mut current: BTreeSet<(Vni, Epoch)> = BTreeSet::new();
        for owned in &endpoints {
            let key = (owned.endpoint.vni, owned.endpoint.epoch);
            let seq = self.owner_seqs.entry(key).or_default();
            let said = self.endpoints.get(&key);
            let same = said.is_some_and(|(endpoint, state)| {
                (*state, endpoint.member) == (owned.state, owned.endpoint.member)
            });
            if same && *seq <= owned.owner_seq {
                current.insert(key);
            }
            *seq = (*seq).max(owned.owner_seq);
        }
        let all = self.endpoints.keys().copied();
        let differing: Vec<(Vni, Epoch)> = all.filter(|key| !current.contains(key)).collect();
        for key in differing {
            self.send_publish(key);
        }
        self.tell_blocks();
        let endpoints = endpoints.into_iter().map(|owned| owned.endpoint).collect();
        self.outputs
            .push_back(Output::Event(Event::Owned(Owned { endpoints, names })));
    }

    pub(super) fn send_publish(&mut self, key: (Vni, Epoch)) {
        if let Some((endpoint, state)) = self.endpoints.get(&key) {
            let seq = self.owner_seqs.entry(key).or_default();
            *seq = seq.saturating_add(1);
            self.messages.push_back(ToManager::Publish {
                endpoint: endpoint.clone(),
                owner_seq: *seq,
                state: *state,
            });
        }
    }

    /// Learns from rows that pass by: the highest epoch, the numbers of this host's edits, and what it has lost.
    pub(super) fn watch_own(&mut self, rows: &[Row], vni: Vni) {
        let mut lost = Vec::new();
        for row in rows {
            self.last_epoch = self.last_epoch.max(row.epoch);
            let key = (vni, row.epoch);
            if row.owner == self.host.id && self.endpoints.contains_key(&key) {
                let seq = self.owner_seqs.entry(key).or_default();
                *seq = (*seq).max(row.owner_seq);
            }
            let older = self
                .endpoints
                .range((vni, Epoch::ZERO)..key)
                .filter(|(_, (e, _))| e.ips.contains(&row.ip));
            lost.extend(older.map(|((_, epoch), _)| *epoch));
        }
        for epoch in lost {
            self.lose(vni, epoch);
        }
    }

    pub(super) fn lose(&mut self, vni: Vni, epoch: Epoch) {
        self.owner_seqs.remove(&(vni, epoch));
        if let Some((endpoint, _)) = self.endpoints.remove(&(vni, epoch)) {
            // What was announced without a manager, no table takes back.
            self.announce_own(&endpoint, false);
            self.outputs
                .push_back(Output::Event(Event::RowLost { vni, epoch }));
        }
    }

    /// An operator removed this host: what it held is others' now, and it is not to come back.
    pub(super) fn removed(&mut self) {
        self.left = true;
        let own: Vec<(Vni, Epoch)> = self.endpoints.keys().copied().collect();
        for (vni, epoch) in own {
            self.lose(vni, epoch);
        }
    }
}
