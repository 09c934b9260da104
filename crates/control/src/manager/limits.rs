//! What one host can make the manager keep, and for how long it can make it wait. Who is over a limit is told which.
//!
//! The bytes of one message, and what waits for a connection, are bounded where they are read and written (`transport.rs`).

use std::time::Duration;

use super::Manager;
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::network::Network;
use crate::service::Service;

/// Names of containers that one host may have.
const NAMES_PER_HOST: usize = 16_384;
/// Endpoints that one host may have, on all networks together.
const ENDPOINTS_PER_HOST: usize = 16_384;
/// Networks of a cluster.
const NETWORKS: usize = 16_384;
/// Services of a cluster.
const SERVICES: usize = 16_384;
/// Bytes of all their descriptions: they go whole to a host that follows their network.
const SERVICE_BYTES: usize = 32 << 20;
/// Bytes of a network's or a service's description, which goes out as one message: labels take half of them at most.
const DESCRIPTION: usize = 128 * 1024;
/// Requests of one host that wait for others to come back.
const HELD_PER_HOST: usize = 64;
/// The highest generation taken from an agent's word: the rest of the range is out of reach of a lie.
const GENERATION_MAX: u16 = 0xff00;
/// What one host may ask for in a second, of a kind that is counted.
pub(super) const RATE: u32 = 50;

/// What one host may still ask for.
#[derive(Debug)]
pub(super) struct Budget {
    left: u32,
    since: Duration,
}

impl Budget {
    /// All of it.
    pub(super) const fn new(now: Duration) -> Self {
        Self {
            left: RATE,
            since: now,
        }
    }

    /// Takes one, unless this second's are used up.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        if now.saturating_sub(self.since) >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        let enough = self.left > 0;
        self.left = self.left.saturating_sub(1);
        enough
    }
}

impl Manager {
    /// Whether this host may have one more container name.
    pub(super) fn check_names(&self, host: HostId) -> Result<(), String> {
        let names = &self.state.names;
        if names.len() < NAMES_PER_HOST {
            return Ok(());
        }
        let held = names.values().filter(|holder| **holder == host).count();
        check(held, NAMES_PER_HOST, || {
            format!(
                "host {} has {held} container names, and {NAMES_PER_HOST} is the most: remove some with `towline rm`",
                self.host_name(host)
            )
        })
    }

    /// Whether this host may have one more endpoint.
    pub(super) fn check_endpoints(&self, host: HostId) -> Result<(), String> {
        let networks = || self.state.networks.values();
        let all: usize = networks().map(|state| state.endpoints.len()).sum();
        if all < ENDPOINTS_PER_HOST {
            return Ok(());
        }
        let endpoints = networks().flat_map(|state| state.endpoints.values());
        let held = endpoints.filter(|held| held.owner == host).count();
        check(held, ENDPOINTS_PER_HOST, || {
            format!(
                "host {} has {held} endpoints, and {ENDPOINTS_PER_HOST} is the most: remove some containers there",
                self.host_name(host)
            )
        })
    }

    /// Whether there may be one more network, with this description.
    pub(super) fn check_network(&self, network: &Network) -> Result<(), String> {
        let networks = self.state.networks.len();
        check(networks, NETWORKS, || {
            format!(
                "the cluster has {networks} networks, and {NETWORKS} is the most: remove some with `towline network rm`"
            )
        })?;
        let bytes =
            serde_json::to_vec(network).map_or(DESCRIPTION, |description| description.len());
        check(bytes, DESCRIPTION, || {
            format!(
                "the description of network {} takes {bytes} bytes, and {DESCRIPTION} is the most: \
                 give it fewer labels, subnets or addresses",
                network.name
            )
        })
    }

    /// Whether there may be a service with this description, new or in place of itself.
    pub(super) fn check_service(&self, service: &Service) -> Result<(), String> {
        let before = self.state.services.get(&service.epoch);
        let services = self.state.services.len() - usize::from(before.is_some());
        check(services, SERVICES, || {
            format!(
                "the cluster has {services} services, and {SERVICES} is the most: remove some with `towline service rm`"
            )
        })?;
        let bytes = service.size();
        let name = &service.spec.name;
        check(bytes, DESCRIPTION, || {
            format!(
                "the description of service {name} takes {bytes} bytes, and {DESCRIPTION} is the most: \
                 give it fewer labels or ports"
            )
        })?;
        let all = self.state.service_bytes() - before.map_or(0, Service::size) + bytes;
        check(all, SERVICE_BYTES, || {
            format!(
                "with service {name} the descriptions of all services take {all} bytes, and {SERVICE_BYTES} is the most: \
                 remove some with `towline service rm`"
            )
        })
    }

    /// Counts one change of what the whole cluster keeps and hears of; the refusal when this host has had its share of this second.
    pub(super) fn may_change(&mut self, host: HostId, now: Duration) -> Result<(), String> {
        let budget = self.changes.entry(host);
        if budget.or_insert_with(|| Budget::new(now)).take(now) {
            return Ok(());
        }
        Err(format!(
            "host {} changes networks, services, hosts or labels more than {RATE} times a second: try again more slowly",
            self.host_name(host)
        ))
    }

    /// Whether one more request of this host may wait.
    pub(super) fn may_hold(&self, host: HostId) -> bool {
        let held = self.held.iter().filter(|held| held.host == host).count();
        held < HELD_PER_HOST
    }

    /// A host names the last epoch that it has seen. `true`: it is one that this store has lost, and nothing is to be handed out
    /// for a while. What it issues is above that epoch from now on in any case; but one host, which may lie, makes it wait only
    /// once in a life. An honest one has no reason to do so twice: at its welcome it hears of an epoch that is not lost.
    pub(super) fn has_lost(&mut self, host: HostId, last_epoch: Epoch) -> bool {
        if !self.state.is_lost(last_epoch) || last_epoch.generation() >= GENERATION_MAX {
            return false;
        }
        if last_epoch > self.state.last() {
            self.state.raise_generation(last_epoch);
        }
        self.told_of_loss.insert(host)
    }
}

fn check(count: usize, max: usize, refusal: impl FnOnce() -> String) -> Result<(), String> {
    if count < max { Ok(()) } else { Err(refusal()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::GRACE;
    use crate::manager::testing::{Bench, NOW, id, vtep};
    use crate::message::{ToAgent, ToManager};
    use crate::request::Request;

    #[test]
    fn a_host_that_lies_of_lost_epochs_makes_all_wait_once() {
        let (mut bench, ..) = Bench::new();
        let manager = &mut bench.manager;
        let info = manager.state.hosts[&id(2)].clone();
        let mut hello = |connection, last_epoch, now| {
            let from = vtep(2);
            let welcomed = manager.handle_hello(connection, from, info.clone(), last_epoch, now);
            assert_eq!(welcomed, Ok(()));
            manager.handle_timeout(now);
            (manager.not_ready(now).is_some(), manager.state.last())
        };
        let (waits, last) = hello(3, Epoch::new(5, 7), NOW);
        assert!(waits && last > Epoch::new(5, 7), "it may be true");
        let (waits, last) = hello(4, Epoch::new(9, 7), NOW + GRACE);
        assert!(!waits, "the grace is over, and that host had its say");
        assert!(last > Epoch::new(9, 7), "nothing is handed out twice");
        let (waits, last) = hello(5, Epoch::new(GENERATION_MAX, 0), NOW + GRACE);
        assert!(
            !waits && last < Epoch::new(11, 0),
            "generations are not used up"
        );
    }

    #[test]
    fn names_of_one_host_are_counted_and_others_are_not_stopped() {
        let (mut bench, ..) = Bench::new();
        let manager = &mut bench.manager;
        // One of its endpoints has one.
        for n in 1..NAMES_PER_HOST {
            assert!(manager.claim_name(&format!("n{n}"), id(2)).is_ok());
        }
        let refused = manager.claim_name("one-more", id(2)).unwrap_err();
        assert!(refused.contains("h2 has 16384"), "{refused}");
        assert!(manager.claim_name("n1", id(2)).is_ok(), "it has that");
        assert!(manager.claim_name("one-more", id(1)).is_ok());
        assert!(manager.release_name("n1", id(2)).is_ok());
        assert!(manager.claim_name("another", id(2)).is_ok());
    }

    #[test]
    fn a_network_of_a_megabyte_is_refused() {
        let (bench, vni, _) = Bench::new();
        let manager = &bench.manager;
        let mut network = manager.state.networks[&vni].network.clone();
        assert_eq!(manager.check_network(&network), Ok(()));
        network.id = "i".repeat(1 << 20);
        let refused = manager.check_network(&network).unwrap_err();
        assert!(refused.contains("network blue takes 10"), "{refused}");
        assert!(!manager.may_adopt_network(&network));
    }

    #[test]
    fn a_budget_ends_and_comes_back() {
        let mut budget = Budget::new(Duration::ZERO);
        let taken = (0..2 * RATE)
            .filter(|_| budget.take(Duration::ZERO))
            .count();
        assert_eq!(taken, RATE as usize);
        assert!(!budget.take(Duration::from_millis(999)));
        assert!(budget.take(Duration::from_secs(1)));
    }

    #[test]
    fn one_hosts_changes_are_slowed_down_and_others_are_not() {
        let (mut bench, ..) = Bench::new();
        let name = bench.manager.host_name(id(2));
        let label = |n: u32| Request::LabelHost {
            host: name.clone(),
            add: [("turn".to_owned(), n.to_string())].into(),
            remove: Vec::new(),
        };
        let answers = |bench: &mut Bench, connection| {
            let sent = std::mem::take(&mut bench.sent).into_iter();
            let replies = sent.filter(|(to, message)| {
                *to == connection && matches!(message, ToAgent::Reply { .. })
            });
            replies.count()
        };
        let say = |bench: &mut Bench, connection, n: u32, now| {
            let call = ToManager::Call {
                id: n.into(),
                request: label(n),
            };
            bench.manager.handle_message(connection, call, now);
            bench.turn();
        };
        let _ = answers(&mut bench, 2);
        for n in 0..2 * RATE {
            say(&mut bench, 2, n, NOW);
        }
        assert_eq!(answers(&mut bench, 2), RATE as usize, "the others wait");
        say(&mut bench, 1, 0, NOW);
        assert_eq!(answers(&mut bench, 1), 1, "another host is not stopped");
        // Questions, and what containers need, are not counted.
        bench.call(2, Request::Hosts);
        bench.call(2, Request::ClaimName("c9".to_owned()));
        let later = NOW + Duration::from_secs(1);
        bench.manager.handle_timeout(later);
        bench.turn();
        assert_eq!(answers(&mut bench, 2), RATE as usize, "done a second later");
        let traits = bench.manager.state.traits(id(2));
        assert_eq!(traits.labels["turn"], (2 * RATE - 1).to_string());
        // More than may wait are refused at once.
        let waiting = u32::try_from(HELD_PER_HOST).unwrap();
        for n in 0..RATE + waiting + 5 {
            say(&mut bench, 2, n, later + Duration::from_secs(1));
        }
        assert_eq!(answers(&mut bench, 2), RATE as usize + 5);
        bench.manager.forget_host(id(2), later);
        assert!(!bench.manager.changes.contains_key(&id(2)));
    }
}
