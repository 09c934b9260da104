//! What an agent knew, out of one life and into the next: the messages of a manager that make the same state again.

use std::time::Duration;

use super::Agent;
use crate::host::HostId;
use crate::message::ToAgent;

/// Hosts in one message, below 500 bytes each.
const HOSTS_PER_MESSAGE: usize = 1024;

impl Agent {
    /// Takes in a message that an earlier agent of this host had from a manager, heard at `heard`. To be called before the
    /// first connection, with this host's networks subscribed and its endpoints published.
    pub fn restore(&mut self, message: ToAgent, heard: Duration) {
        // Who was connected then is not now.
        if self.link_changed.is_none() {
            self.link_changed = Some(heard);
        }
        match message {
            ToAgent::Welcome {
                manager,
                last_epoch,
                ingress,
                ..
            } => {
                self.learn_ingress(ingress);
                self.last_manager = Some(manager);
                self.last_epoch = self.last_epoch.max(last_epoch);
            }
            other => self.learn(other, heard),
        }
    }

    /// The messages that make another agent know what this one knows; none before a manager was ever heard.
    #[must_use]
    pub fn snapshot(&self, cluster: &str) -> Vec<ToAgent> {
        let Some(manager) = self.last_manager else {
            return Vec::new();
        };
        let mut messages = vec![ToAgent::Welcome {
            cluster: cluster.to_owned(),
            manager,
            heartbeat: super::SILENCE,
            last_epoch: self.last_epoch,
            ingress: self.ingress.flatten(),
            warnings: Vec::new(),
        }];
        let views: Vec<_> = self.hosts.values().cloned().collect();
        for (index, hosts) in views.chunks(HOSTS_PER_MESSAGE).enumerate() {
            messages.push(ToAgent::Hosts {
                full: index == 0,
                hosts: hosts.to_vec(),
                removed: Vec::<HostId>::new(),
            });
        }
        for stream in self.streams.values() {
            stream.snapshot(&mut messages);
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::*;
    use crate::agent::Output;
    use crate::agent::testing::{row, rows, vni};
    use crate::epoch::Epoch;
    use crate::host::{HostInfo, HostTraits, HostView};
    use crate::message::ToManager;
    use crate::network::Network;
    use crate::request::Event;
    use crate::row::{Row, State};

    fn host(n: u8) -> HostInfo {
        crate::testing::host_info(HostId::from_bytes([n; 16]), n.into(), [192, 0, 2, n])
    }

    const CLUSTER: &str = "0123456789abcdef";

    fn agent() -> Agent {
        let manager: SocketAddr = "192.0.2.1:4789".parse().unwrap();
        let mut agent = Agent::new(host(2), CLUSTER.to_owned(), vec![manager]);
        agent.subscribe(vni());
        agent
    }

    /// What a manager says to an agent that has just said hello.
    fn news() -> Vec<ToAgent> {
        let view = |n, up| HostView {
            info: host(n),
            up,
            last_seen_ms_ago: 0,
            manager: n == 1,
            wanted_port: None,
            port_problem: None,
            control: None,
            traits: HostTraits::default(),
        };
        let network: Network = serde_json::from_value(serde_json::json!({
            "id": "n1", "name": "net1", "vni": vni().get(),
            "subnets": [{"net": "10.0.9.0/24", "gateway": "10.0.9.1"}],
            "gateway_mac": "06:74:6c:00:10:00", "mtu": 1450, "flood": true,
            "labels": {}, "options": {}, "created": 0, "epoch": Epoch::new(1, 2),
        }))
        .unwrap();
        vec![
            ToAgent::Welcome {
                cluster: CLUSTER.to_owned(),
                manager: host(1).id,
                heartbeat: Duration::from_millis(500),
                last_epoch: Epoch::new(1, 90),
                ingress: None,
                warnings: Vec::new(),
            },
            ToAgent::Hosts {
                full: true,
                hosts: vec![view(1, true), view(2, true), view(3, false)],
                removed: Vec::new(),
            },
            ToAgent::Network(network),
            ToAgent::Rows(rows(
                0,
                20,
                vec![row(2, 10, State::Up), row(3, 20, State::Up)],
            )),
            ToAgent::Rows(rows(20, 30, vec![row(2, 30, State::Free)])),
        ]
    }

    fn table(agent: &Agent) -> Vec<Row> {
        let mut rows: Vec<Row> = agent.table(vni()).unwrap().rows().cloned().collect();
        rows.sort_by_key(|row| row.ip);
        rows
    }

    #[test]
    fn an_agent_knows_what_the_one_before_it_knew() {
        let mut first = agent();
        first.handle_connected(first.managers()[0], Duration::ZERO);
        for message in news() {
            first.handle_message(message, Duration::from_secs(1));
        }
        let written: Vec<ToAgent> = first.snapshot(CLUSTER);
        // From a file written anew, and from one to which messages were appended.
        for messages in [written, news()] {
            let mut second = agent();
            for message in messages {
                let bytes = message.encode();
                second.restore(ToAgent::decode(&bytes).unwrap(), Duration::from_secs(1));
            }
            assert_eq!(table(&second), table(&first));
            let status = second.status(Duration::from_secs(61));
            assert_eq!(
                status.since_ms,
                Some(60_000),
                "no manager for a minute, restarts included"
            );
            assert_eq!(status.subscriptions[0].age_ms, Some(60_000));
            assert_eq!(status.connected_to, None);
            let mut masked = Vec::new();
            while let Some(output) = second.poll_output() {
                if let Output::Event(Event::Hosts(views)) = output {
                    masked = views
                        .into_iter()
                        .filter(|view| !view.up)
                        .map(|view| view.info.name)
                        .collect();
                }
            }
            assert_eq!(masked, ["h3"]);

            // It goes on from where the first one was, and says the highest epoch ever seen.
            second.handle_connected(second.managers()[0], Duration::from_secs(61));
            second.handle_message(news().swap_remove(0), Duration::from_secs(61));
            let mut said = std::iter::from_fn(|| second.poll_message());
            assert!(matches!(
                said.next(),
                Some(ToManager::Hello { last_epoch, .. }) if last_epoch == Epoch::new(1, 90)
            ));
            assert!(said.any(|message| matches!(
                message,
                ToManager::Subscribe {
                    generation: 1,
                    revision: 30,
                    ..
                }
            )));
            // A manager with an older store cannot take it back.
            second.handle_message(
                ToAgent::Rows(rows(0, 25, vec![row(2, 10, State::Up)])),
                Duration::from_secs(61),
            );
            let ip: IpAddr = [10, 0, 9, 2].into();
            let epoch = second.table(vni()).unwrap().row(ip).unwrap().epoch;
            assert_eq!(epoch, Epoch::new(1, 30));
        }
    }

    #[test]
    fn other_networks_than_those_subscribed_are_not_taken_up() {
        let mut second = Agent::new(host(2), CLUSTER.to_owned(), Vec::new());
        for message in news() {
            second.restore(message, Duration::ZERO);
        }
        assert!(second.table(vni()).is_none());
        assert!(
            second.snapshot(CLUSTER).len() == 2,
            "the cluster and its hosts"
        );
    }
}
