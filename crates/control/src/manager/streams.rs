//! Streams: a network's rows go to who follows it, from where each of them is.

use vtep::Vni;

use super::{Connection, Manager, Output, SUBSCRIPTIONS_MAX};
use crate::epoch::Epoch;
use crate::message::{Rows, ToAgent, rows};
use crate::network::Network;

impl Manager {
    pub(super) fn subscribe(
        &mut self,
        connection: Connection,
        vni: Vni,
        has: (u16, u64),
        network: Option<Network>,
    ) {
        let Some(peer) = self.connections.get_mut(&connection) else {
            return;
        };
        if peer.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            return;
        }
        peer.subscriptions.insert(vni);
        // One host more shares what may be leased.
        self.shrink(vni);
        if let Some(lost) = network.filter(|network| network.vni == vni)
            && !self.state.networks.contains_key(&vni)
            && self.may_adopt_network(&lost)
        {
            tracing::info!(network = %lost.name, "took back a network that the store had lost");
            let ingress = lost.ingress;
            self.state.put_network(lost);
            self.tell_network(vni);
            if ingress {
                self.tell_ingress();
            }
        }
        let Some(state) = self.state.networks.get(&vni) else {
            // A network that this store never had may be one that it lost: nobody is stopped for that.
            if self.state.floors.contains_key(&vni) {
                self.send(connection, ToAgent::NetworkRemoved { vni });
            }
            return;
        };
        let network = state.network.clone();
        let (generation, revision) = has;
        let resumes = generation == self.state.last().generation()
            && !self.state.is_lost(Epoch::new(generation, revision));
        self.send(connection, ToAgent::Network(network));
        self.send_services(connection, vni);
        self.send_rows(connection, vni, if resumes { revision } else { 0 });
    }

    pub(super) fn subscribers(&self, vni: Vni) -> Vec<Connection> {
        let subscribed = self
            .connections
            .iter()
            .filter(|(_, peer)| peer.subscriptions.contains(&vni));
        subscribed.map(|(connection, _)| *connection).collect()
    }

    /// A new or changed network goes to who waits for it.
    pub(super) fn tell_network(&mut self, vni: Vni) {
        let to = self.subscribers(vni);
        let Some(state) = self.state.networks.get(&vni) else {
            return;
        };
        let message = ToAgent::Network(state.network.clone());
        self.outputs.push_back(Output::Send {
            to: to.clone(),
            message,
        });
        for connection in to {
            self.send_services(connection, vni);
            self.send_rows(connection, vni, 0);
        }
    }

    pub(super) fn tell_network_removed(&mut self, vni: Vni) {
        let to = self.subscribers(vni);
        for peer in self.connections.values_mut() {
            peer.subscriptions.remove(&vni);
        }
        self.outputs.push_back(Output::Send {
            to,
            message: ToAgent::NetworkRemoved { vni },
        });
    }

    pub(super) fn send_rows(&mut self, connection: Connection, vni: Vni, from: u64) {
        for message in self.rows(vni, from) {
            self.send(connection, message);
        }
    }

    /// All changes of a network after `from`, in parts.
    pub(super) fn rows(&self, vni: Vni, from: u64) -> Vec<ToAgent> {
        let Some(state) = self.state.networks.get(&vni) else {
            return Vec::new();
        };
        let generation = self.state.last().generation();
        let after = match from {
            0 => Epoch::ZERO,
            revision => Epoch::new(generation, revision),
        };
        let changed: Vec<_> = state.rows_after(after).cloned().collect();
        let mut parts: Vec<_> = rows::parts(&changed)
            .into_iter()
            .map(<[_]>::to_vec)
            .collect();
        if parts.is_empty() {
            // Also tells that there is nothing.
            parts.push(Vec::new());
        }
        let count = parts.len();
        let numbered = (0..).zip(parts);
        let rows = numbered.map(|(part, rows)| Rows {
            vni,
            generation,
            from,
            // All changes up to now are here, other networks' aside.
            to: self.state.last().counter(),
            part,
            last: part as usize + 1 == count,
            settled: self.unsettled_until.is_none(),
            rows,
        });
        rows.map(ToAgent::Rows).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::testing::Bench;
    use crate::message::ToManager;
    use crate::network::Endpoint;
    use crate::request::EndpointState;

    fn down(endpoint: &Endpoint) -> ToManager {
        ToManager::Publish {
            endpoint: endpoint.clone(),
            owner_seq: 2,
            state: EndpointState::Down,
        }
    }

    fn subscribe(vni: Vni, generation: u16, revision: u64) -> ToManager {
        ToManager::Subscribe {
            vni,
            generation,
            revision,
            network: None,
        }
    }

    /// The rows that were sent since the last look, and up to where.
    fn told(bench: &mut Bench) -> Rows {
        let sent = std::mem::take(&mut bench.sent).into_iter();
        let mut rows = sent.filter_map(|(_, message)| match message {
            ToAgent::Rows(rows) => Some(rows),
            _ => None,
        });
        let told = rows.next().expect("rows were sent");
        assert!(rows.next().is_none(), "and once");
        told
    }

    /// The counter of revisions begins anew with each generation.
    #[test]
    fn changes_of_every_generation_are_told() {
        let (mut bench, vni, endpoints) = Bench::new();
        bench.say(1, subscribe(vni, 0, 0));
        told(&mut bench);
        let mut seen = Vec::new();
        for (host, endpoint) in (1..).zip(&endpoints) {
            let last = bench.manager.state.last();
            bench.manager.state.raise_generation(last);
            bench.say(host, down(endpoint));
            let rows = told(&mut bench);
            assert_eq!(rows.generation, last.generation() + 1);
            assert_eq!((rows.from, rows.rows.len()), (0, 2), "all is told anew");
            seen.push(rows.to);
        }
        assert_eq!(seen[0], seen[1], "one revision of two generations");
        bench.say(2, subscribe(vni, 0, 0));
        let mut ips: Vec<_> = told(&mut bench).rows.iter().map(|row| row.ip).collect();
        ips.sort();
        assert_eq!(ips, endpoints.map(|endpoint| endpoint.ips[0]));
        // Who has the last revision of all lacks nothing; of an earlier generation it says nothing.
        let last = bench.manager.state.last();
        bench.say(2, subscribe(vni, last.generation(), last.counter()));
        assert!(told(&mut bench).rows.is_empty());
        bench.say(2, subscribe(vni, last.generation() - 1, last.counter()));
        assert_eq!(told(&mut bench).rows.len(), 2);
    }
}
