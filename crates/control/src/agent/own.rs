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
        self.announce_unless_told(&endpoint, state == EndpointState::Up);
        self.endpoints.insert(key, (endpoint, state));
        // Before the manager's list is here, the edit's number is not known; that list's arrival publishes everything.
        if matches!(self.link, Link::Up { owned: None, .. }) {
            self.send_publish(key);
        }
    }

    /// Announces what an own endpoint is by now, unless the row that the manager makes of it will tell. It may not where the
    /// manager's list is not here yet: what was done until then and undone is no edit. Nor where the program was told something
    /// else than the table says: the manager tells of two edits at once as of one.
    pub(super) fn announce_unless_told(&mut self, endpoint: &Endpoint, up: bool) {
        let listed = matches!(self.link, Link::Up { owned: None, .. });
        let stream = self.streams.get(&endpoint.vni);
        if !listed || stream.is_some_and(|stream| stream.is_announced(endpoint)) {
            self.announce(endpoint, up);
        }
    }

    /// Tells this host's other containers where an own endpoint is, or that it is nowhere.
    fn announce(&mut self, endpoint: &Endpoint, up: bool) {
        if let Some(stream) = self.streams.get_mut(&endpoint.vni) {
            stream.announce(endpoint, up, &mut self.outputs);
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
        // As this host last said it: the state and names, and by the last of this host's edits that anybody may have heard of.
        let mut current: BTreeSet<(Vni, Epoch)> = BTreeSet::new();
        for owned in &endpoints {
            let key = (owned.endpoint.vni, owned.endpoint.epoch);
            let seq = self.owner_seqs.entry(key).or_default();
            let said = self.endpoints.get(&key);
            let same = said.is_some_and(|(endpoint, state)| {
                *state == owned.state
                    && endpoint.member == owned.endpoint.member
                    && endpoint.names == owned.endpoint.names
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
            self.announce(&endpoint, false);
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use vtep::MacAddr;

    use super::*;
    use crate::host::HostId;
    use crate::message::{Rows, ToAgent};
    use crate::request::Request;
    use crate::row::State;
    use crate::testing::{Installed, host_info};

    const CLUSTER: &str = "0123456789abcdef";
    const NOW: Duration = Duration::from_secs(1);

    /// One agent, a manager that is this test, and a datapath that does as it is told.
    struct Bench {
        agent: Agent,
        installed: Installed,
        revision: u64,
    }

    fn vni() -> Vni {
        Vni::new(4096).unwrap()
    }

    fn id(n: u8) -> HostId {
        HostId::from_bytes([n; 16])
    }

    fn endpoint() -> Endpoint {
        Endpoint {
            vni: vni(),
            container: "c1".to_owned(),
            mac: MacAddr::new([2, 0, 10, 0, 9, 2]),
            ips: vec![[10, 0, 9, 2].into()],
            epoch: Epoch::new(1, 10),
            member: None,
            names: None,
        }
    }

    impl Bench {
        fn new() -> Self {
            let manager: SocketAddr = "192.0.2.1:4789".parse().unwrap();
            let info = host_info(id(2), 2, [192, 0, 2, 2]);
            let mut agent = Agent::new(info, CLUSTER.to_owned(), vec![manager]);
            agent.subscribe(vni());
            Self {
                agent,
                installed: Installed::default(),
                revision: 0,
            }
        }

        fn welcome(&mut self) {
            let manager = self.agent.managers()[0];
            self.agent.handle_connected(manager, NOW);
            self.hear(ToAgent::Welcome {
                cluster: CLUSTER.to_owned(),
                manager: id(1),
                heartbeat: Duration::from_millis(500),
                last_epoch: Epoch::new(1, 10),
                warnings: Vec::new(),
                ingress: None,
            });
        }

        fn list(&mut self, state: Option<(u32, EndpointState)>) {
            let endpoints = state.map(|(owner_seq, state)| OwnedEndpoint {
                endpoint: endpoint(),
                owner_seq,
                state,
            });
            self.hear(ToAgent::Owned {
                endpoints: endpoints.into_iter().collect(),
                names: Vec::new(),
                last: true,
            });
        }

        /// The manager tells what it made of this host's edits.
        fn row(&mut self, epoch: Epoch, owner_seq: u32, state: State) {
            let from = self.revision;
            self.revision += 1;
            let row = Row {
                ip: endpoint().ips[0],
                epoch,
                owner: id(2),
                owner_seq,
                state,
                mac: endpoint().mac,
                member: None,
                names: None,
            };
            self.hear(ToAgent::Rows(Rows {
                vni: vni(),
                generation: 1,
                from,
                to: self.revision,
                part: 0,
                last: true,
                settled: true,
                rows: vec![row],
            }));
        }

        fn hear(&mut self, message: ToAgent) {
            self.agent.handle_message(message, NOW);
        }

        fn is_installed(&mut self) -> bool {
            for output in std::iter::from_fn(|| self.agent.poll_output()) {
                if let Output::Event(Event::Table { changes, .. }) = output {
                    self.installed.apply(&changes);
                }
            }
            let table = self.agent.table(vni()).unwrap();
            assert_eq!(self.installed, Installed::from_table(table));
            self.installed.neighbors.contains_key(&endpoint().ips[0])
        }
    }

    /// Down without a manager, and up again on a connection that has only just begun: the manager never hears of it.
    #[test]
    fn what_was_undone_before_the_list_came_is_undone_here_too() {
        for (before, meanwhile) in [
            (EndpointState::Up, EndpointState::Down),
            (EndpointState::Down, EndpointState::Up),
        ] {
            let up = before == EndpointState::Up;
            let mut bench = Bench::new();
            bench.welcome();
            bench.list(None);
            bench.agent.publish(endpoint(), before);
            let state = if up { State::Up } else { State::Down };
            bench.row(endpoint().epoch, 1, state);
            assert_eq!(bench.is_installed(), up);

            bench.agent.handle_disconnected("reset", NOW);
            bench.agent.publish(endpoint(), meanwhile);
            bench.welcome();
            bench.agent.publish(endpoint(), before);
            while bench.agent.poll_message().is_some() {}
            bench.list(Some((1, before)));
            let said: Vec<ToManager> = std::iter::from_fn(|| bench.agent.poll_message()).collect();
            let published = |message: &ToManager| matches!(message, ToManager::Publish { .. });
            assert!(!said.iter().any(published), "{said:?}");
            assert_eq!(bench.is_installed(), up);
        }
    }

    /// An endpoint that began without a manager ends as soon as there is one: of both the manager tells at once.
    #[test]
    fn two_edits_that_are_told_as_one_leave_nothing_behind() {
        for freed in [true, false] {
            let mut bench = Bench::new();
            bench.agent.publish(endpoint(), EndpointState::Up);
            bench.welcome();
            bench.list(None);
            if freed {
                let (vni, epoch) = (vni(), endpoint().epoch);
                let free = Request::Free { vni, epoch };
                bench.agent.call(1, free, NOW);
                bench.row(Epoch::new(1, 11), 0, State::Free);
            } else {
                bench.agent.publish(endpoint(), EndpointState::Down);
                bench.row(endpoint().epoch, 2, State::Down);
            }
            assert!(!bench.is_installed());
        }
    }

    /// What the table has told since is not announced again: the row that comes of an edit tells.
    #[test]
    fn an_endpoint_that_the_table_has_is_left_to_it() {
        let mut bench = Bench::new();
        bench.agent.publish(endpoint(), EndpointState::Up);
        bench.welcome();
        bench.list(None);
        bench.row(endpoint().epoch, 1, State::Up);
        assert!(bench.is_installed());
        bench.agent.publish(endpoint(), EndpointState::Down);
        assert!(bench.is_installed(), "nobody has said so yet");
        bench.row(endpoint().epoch, 2, State::Down);
        assert!(!bench.is_installed());
    }
}
