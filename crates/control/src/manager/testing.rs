//! A manager with two hosts and one network, for the tests of its parts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use vtep::Vni;

use super::{Connection, Manager, Output, Settings};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::message::{ToAgent, ToManager};
use crate::network::{Endpoint, NetworkSpec};
use crate::request::{EndpointState, Request, Response};

pub(super) const NOW: Duration = Duration::from_secs(100);

pub(super) fn id(n: u8) -> HostId {
    HostId::from_bytes([n; 16])
}

pub(super) fn vtep(n: u8) -> IpAddr {
    [192, 0, 2, n].into()
}

/// A manager and what it has sent.
pub(super) struct Bench {
    pub(super) manager: Manager,
    pub(super) sent: Vec<(Connection, ToAgent)>,
}

impl Bench {
    /// Hosts 1 and 2, connected as connections 1 and 2, with one endpoint each on one network.
    pub(super) fn new() -> (Self, Vni, [Endpoint; 2]) {
        let settings = Settings {
            host: id(1),
            cluster: "test".to_owned(),
            seed: 1,
            unix_at_zero: Duration::ZERO,
            pools: Vec::new(),
        };
        let manager = Manager::new(settings, &BTreeMap::new(), Duration::ZERO);
        let mut bench = Self {
            manager: manager.expect("an empty store is fine"),
            sent: Vec::new(),
        };
        for n in [1, 2] {
            let info = crate::testing::host_info(id(n), n.into(), vtep(n));
            bench
                .manager
                .handle_hello(n.into(), vtep(n), info, Epoch::ZERO, NOW)
                .expect("a good host");
        }
        let spec = NetworkSpec::named("blue");
        let Response::Network(network) = bench.call(
            1,
            Request::CreateNetwork {
                spec,
                routes_in_use: Vec::new(),
            },
        ) else {
            panic!("no network")
        };
        let endpoints = [1_u8, 2].map(|n| {
            let allocate = Request::Allocate {
                network: "blue".to_owned(),
                container: format!("c{n}"),
                ips: Vec::new(),
                mac: None,
                service: None,
                weight: None,
            };
            let Response::Endpoint(endpoint) = bench.call(n.into(), allocate) else {
                panic!("no endpoint")
            };
            bench.say(
                n.into(),
                ToManager::Publish {
                    endpoint: endpoint.clone(),
                    owner_seq: 1,
                    state: EndpointState::Up,
                },
            );
            endpoint
        });
        (bench, network.vni, endpoints)
    }

    pub(super) fn say(&mut self, connection: Connection, message: ToManager) {
        self.manager.handle_message(connection, message, NOW);
        self.turn();
    }

    pub(super) fn turn(&mut self) {
        self.manager.finish_turn(NOW);
        while let Some(output) = self.manager.poll_output() {
            if let Output::Send { to, message } = output {
                self.sent
                    .extend(to.into_iter().map(|to| (to, message.clone())));
            }
        }
    }

    /// The answer to a call, if there is one yet.
    pub(super) fn answer(&mut self) -> Option<Response> {
        let sent = std::mem::take(&mut self.sent);
        let mut answers = sent.into_iter().filter_map(|(_, message)| match message {
            ToAgent::Reply { part, .. } => Some(part),
            _ => None,
        });
        let answer: Result<Response, String> =
            serde_json::from_slice(&answers.next()?).expect("JSON");
        Some(answer.expect("no refusal"))
    }

    pub(super) fn call(&mut self, connection: Connection, request: Request) -> Response {
        self.say(connection, ToManager::Call { id: 1, request });
        self.answer().expect("an answer at once")
    }
}
