//! Services of the subscribed networks, and how far this host acts on what it was told.
//!
//! What a manager's whole list lacks may be what it lost: it is offered, and stays in force until the manager says that it is gone.

use std::collections::VecDeque;

use vtep::Vni;

use super::stream::Stream;
use super::{Agent, Link, Output};
use crate::epoch::Epoch;
use crate::message::{ToAgent, ToManager};
use crate::request::{Event, Request};
use crate::service::Service;

/// Bytes of definitions in one message: far below the largest message, with room for one of the longest.
pub(crate) const DEFINITIONS_PER_MESSAGE: usize = 256 * 1024;

impl Agent {
    /// All news of a network up to this place are in force here.
    pub fn applied(&mut self, vni: Vni, generation: u16, revision: u64) {
        if self.is_up() && self.streams.contains_key(&vni) {
            self.messages.push_back(ToManager::Applied {
                vni,
                generation,
                revision,
            });
        }
    }

    /// The question which hosts do not act yet on the last that this host said of its endpoint.
    #[must_use]
    pub fn confirmation(&self, vni: Vni, epoch: Epoch) -> Request {
        let owner_seq = self.owner_seqs.get(&(vni, epoch)).copied();
        Request::Confirmed {
            vni,
            epoch,
            owner_seq: owner_seq.unwrap_or_default(),
        }
    }

    /// News of services. This host's endpoints leave a service that was known and is gone.
    pub(super) fn learn_services(
        &mut self,
        vni: Vni,
        full: bool,
        services: Vec<Service>,
        removed: &[Epoch],
        last: bool,
    ) {
        let Some(stream) = self.streams.get_mut(&vni) else {
            return;
        };
        let (messages, outputs) = (&mut self.messages, &mut self.outputs);
        if full {
            stream.list_services(services, last, messages, outputs);
            return;
        }
        let known: Vec<Epoch> = removed
            .iter()
            .filter(|epoch| stream.services.contains_key(epoch))
            .copied()
            .collect();
        stream.change_services(services, removed, outputs);
        let all = (vni, Epoch::ZERO)..=(vni, Epoch::from_bits(u64::MAX));
        let own = self.endpoints.range_mut(all);
        let mut left = Vec::new();
        for (key, (endpoint, _)) in own {
            if endpoint
                .member
                .is_some_and(|member| known.contains(&member.service))
            {
                endpoint.member = None;
                left.push(*key);
            }
        }
        if matches!(self.link, Link::Up { owned: None, .. }) {
            for key in left {
                self.send_publish(key);
            }
        }
    }

    /// The network of published ports is this one.
    pub(super) fn learn_ingress(&mut self, ingress: Option<Vni>) {
        if self.ingress != Some(ingress) {
            self.ingress = Some(ingress);
            self.outputs
                .push_back(Output::Event(Event::Ingress(ingress)));
        }
    }
}

/// A whole list, until its last part is here.
#[derive(Debug, Default)]
pub(super) struct Listing(Vec<Service>);

impl Stream {
    /// A part of the whole list. What the manager seems to have lost is to be offered by the messages that are added to `messages`.
    pub(super) fn list_services(
        &mut self,
        services: Vec<Service>,
        last: bool,
        messages: &mut VecDeque<ToManager>,
        outputs: &mut VecDeque<Output>,
    ) {
        let mut listing = self.listing.take().unwrap_or_default();
        listing.0.extend(services);
        if !last {
            self.listing = Some(listing);
            return;
        }
        self.said.services = true;
        let before = self.services.clone();
        self.replace_services(listing.0, messages);
        if self.services != before || !self.services_told {
            self.tell_services(outputs);
        }
    }

    /// Services that came or changed, and that went.
    pub(super) fn change_services(
        &mut self,
        services: Vec<Service>,
        removed: &[Epoch],
        outputs: &mut VecDeque<Output>,
    ) {
        let mut changed = !self.services_told;
        for service in services {
            let before = self.services.insert(service.epoch, service.clone());
            changed |= before != Some(service);
        }
        for epoch in removed {
            changed |= self.services.remove(epoch).is_some();
        }
        if changed {
            self.tell_services(outputs);
        }
    }

    fn replace_services(&mut self, listed: Vec<Service>, messages: &mut VecDeque<ToManager>) {
        let known = std::mem::take(&mut self.services);
        let listed = listed.into_iter().map(|service| (service.epoch, service));
        self.services = listed.collect();
        let newer = |service: &Service| {
            let listed = self.services.get(&service.epoch);
            listed.is_none_or(|listed| listed.version < service.version)
        };
        let missing: Vec<Service> = known.into_values().filter(newer).collect();
        let kept = missing
            .iter()
            .map(|service| (service.epoch, service.clone()));
        self.services.extend(kept);
        for services in in_parts(missing) {
            messages.push_back(ToManager::Offer {
                vni: self.vni,
                services,
            });
        }
    }

    pub(super) fn tell_services(&mut self, outputs: &mut VecDeque<Output>) {
        self.services_told = true;
        outputs.push_back(Output::Event(Event::Services {
            vni: self.vni,
            services: self.services.values().cloned().collect(),
        }));
    }

    /// The services as messages of a manager.
    pub(super) fn services_snapshot(&self) -> Vec<ToAgent> {
        listing(self.vni, self.services.values().cloned().collect())
    }

    /// The network is another one.
    pub(super) fn forget_services(&mut self) {
        self.services.clear();
        self.listing = None;
        self.services_told = false;
    }
}

/// The whole list of a network's services as messages; none for no services makes one empty message.
pub(crate) fn listing(vni: Vni, services: Vec<Service>) -> Vec<ToAgent> {
    let mut parts = in_parts(services);
    if parts.is_empty() {
        parts.push(Vec::new());
    }
    let count = parts.len();
    let numbered = parts.into_iter().enumerate();
    numbered
        .map(|(index, services)| ToAgent::Services {
            vni,
            full: true,
            services,
            removed: Vec::new(),
            last: index + 1 == count,
        })
        .collect()
}

/// Definitions in parts that fit into messages.
pub(crate) fn in_parts(services: Vec<Service>) -> Vec<Vec<Service>> {
    let mut parts: Vec<Vec<Service>> = Vec::new();
    let mut room = 0;
    for service in services {
        let size = service.size();
        if size > room || parts.is_empty() {
            parts.push(Vec::new());
            room = DEFINITIONS_PER_MESSAGE;
        }
        room = room.saturating_sub(size);
        if let Some(part) = parts.last_mut() {
            part.push(service);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::host::HostId;
    use crate::message::Rows;
    use crate::network::Endpoint;
    use crate::request::EndpointState;
    use crate::row::{Row, State};
    use crate::service::{Membership, ServiceSpec};

    const CLUSTER: &str = "0123456789abcdef";

    fn vni() -> Vni {
        Vni::new(4096).unwrap()
    }

    fn service(counter: u64, version: u64) -> Service {
        Service {
            id: format!("{counter:025}"),
            epoch: Epoch::new(1, counter),
            version: Epoch::new(1, version),
            vni: vni(),
            spec: ServiceSpec::named(&format!("s{counter}"), "blue"),
            vips: Vec::new(),
            created: 0,
        }
    }

    /// An agent that a manager has just taken in, with nothing left to say or tell.
    fn connected() -> Agent {
        let host = crate::testing::host_info(HostId::from_bytes([2; 16]), 2, [192, 0, 2, 2]);
        let manager = "192.0.2.1:4789".parse().unwrap();
        let mut agent = Agent::new(host, CLUSTER.to_owned(), vec![manager]);
        agent.subscribe(vni());
        welcome(&mut agent);
        agent
    }

    fn welcome(agent: &mut Agent) {
        agent.handle_connected(agent.managers()[0], Duration::ZERO);
        let welcome = ToAgent::Welcome {
            cluster: CLUSTER.to_owned(),
            manager: HostId::from_bytes([1; 16]),
            heartbeat: Duration::from_millis(500),
            last_epoch: Epoch::new(1, 90),
            ingress: Some(vni()),
            warnings: Vec::new(),
        };
        let owned = ToAgent::Owned {
            endpoints: Vec::new(),
            names: Vec::new(),
            last: true,
        };
        hear(agent, [welcome, owned]);
        drop(said(agent));
    }

    fn hear(agent: &mut Agent, messages: impl IntoIterator<Item = ToAgent>) {
        for message in messages {
            agent.handle_message(message, Duration::ZERO);
        }
    }

    fn said(agent: &mut Agent) -> Vec<ToManager> {
        std::iter::from_fn(|| agent.poll_message()).collect()
    }

    fn events(agent: &mut Agent) -> Vec<Event> {
        std::iter::from_fn(|| agent.poll_output())
            .filter_map(|output| match output {
                Output::Event(event) => Some(event),
                Output::Answer { .. } => None,
            })
            .collect()
    }

    fn told(agent: &mut Agent) -> Vec<Vec<u64>> {
        let events = events(agent).into_iter();
        let services = events.filter_map(|event| match event {
            Event::Services { services, .. } => Some(services),
            _ => None,
        });
        let versions = services.map(|all| all.iter().map(|s| s.version.counter()).collect());
        versions.collect()
    }

    fn change(services: Vec<Service>, removed: Vec<Epoch>) -> ToAgent {
        ToAgent::Services {
            vni: vni(),
            full: false,
            services,
            removed,
            last: true,
        }
    }

    #[test]
    fn a_list_in_parts_is_told_once_and_what_it_lacks_is_offered_and_kept() {
        let mut agent = connected();
        assert!(events(&mut agent).contains(&Event::Ingress(Some(vni()))));
        hear(&mut agent, listing(vni(), Vec::new()));
        assert_eq!(told(&mut agent), [Vec::<u64>::new()], "that there are none");
        hear(&mut agent, listing(vni(), Vec::new()));
        assert!(told(&mut agent).is_empty(), "no news");
        hear(
            &mut agent,
            [change(vec![service(1, 1), service(2, 5)], Vec::new())],
        );
        assert_eq!(told(&mut agent), [vec![1, 5]]);

        // A manager with an older store: it has never heard of 1, and of an earlier form of 2.
        welcome(&mut agent);
        drop(events(&mut agent));
        let mut parts = listing(vni(), vec![service(2, 2)]);
        let rest = listing(vni(), vec![service(3, 3)]);
        if let Some(ToAgent::Services { last, .. }) = parts.last_mut() {
            *last = false;
        }
        hear(&mut agent, parts);
        assert!(told(&mut agent).is_empty(), "the list is not whole");
        hear(&mut agent, rest);
        assert_eq!(
            told(&mut agent),
            [vec![1, 5, 3]],
            "what is known stays in force"
        );
        let offer = ToManager::Offer {
            vni: vni(),
            services: vec![service(1, 1), service(2, 5)],
        };
        assert_eq!(said(&mut agent), [offer]);
        // The manager's word on what was offered.
        let truth = change(vec![service(2, 2)], vec![service(1, 1).epoch]);
        hear(&mut agent, [truth]);
        assert_eq!(told(&mut agent), [vec![2, 3]]);
    }

    #[test]
    fn what_was_known_is_known_to_the_next_agent() {
        let mut agent = connected();
        hear(&mut agent, [change(vec![service(1, 1)], Vec::new())]);
        let kept = agent.snapshot(CLUSTER);
        let host = crate::testing::host_info(HostId::from_bytes([2; 16]), 2, [192, 0, 2, 2]);
        let mut next = Agent::new(host, CLUSTER.to_owned(), Vec::new());
        next.subscribe(vni());
        for message in kept {
            let bytes = message.encode();
            next.restore(ToAgent::decode(&bytes).unwrap(), Duration::ZERO);
        }
        let events = events(&mut next);
        assert!(events.contains(&Event::Ingress(Some(vni()))));
        let services = vec![service(1, 1)];
        assert!(events.contains(&Event::Services {
            vni: vni(),
            services
        }));
    }

    #[test]
    fn a_member_leaves_a_service_that_is_gone() {
        let mut agent = connected();
        hear(&mut agent, [change(vec![service(1, 1)], Vec::new())]);
        let endpoint = |member| Endpoint {
            vni: vni(),
            container: "c1".to_owned(),
            mac: vtep::MacAddr::new([2, 0, 10, 0, 9, 2]),
            ips: vec![[10, 0, 9, 2].into()],
            epoch: Epoch::new(1, 7),
            member,
            names: None,
        };
        let member = Membership {
            service: service(1, 1).epoch,
            weight: 1,
            serving: true,
        };
        agent.publish(endpoint(Some(member)), EndpointState::Up);
        drop(said(&mut agent));
        assert_eq!(
            agent.confirmation(vni(), Epoch::new(1, 7)),
            Request::Confirmed {
                vni: vni(),
                epoch: Epoch::new(1, 7),
                owner_seq: 1,
            }
        );
        hear(&mut agent, [change(Vec::new(), vec![service(1, 1).epoch])]);
        let left = ToManager::Publish {
            endpoint: endpoint(None),
            owner_seq: 2,
            state: EndpointState::Up,
        };
        assert_eq!(said(&mut agent), [left]);
    }

    #[test]
    fn the_program_is_told_how_far_it_has_come_when_a_member_changes() {
        let mut agent = connected();
        drop(events(&mut agent));
        let rows = |to, rows| {
            ToAgent::Rows(Rows {
                vni: vni(),
                generation: 1,
                from: 0,
                to,
                part: 0,
                last: true,
                settled: true,
                rows,
            })
        };
        let row = |counter, member| Row {
            ip: [10, 0, 9, 2].into(),
            epoch: Epoch::new(1, 7),
            owner: HostId::from_bytes([1; 16]),
            owner_seq: counter,
            state: State::Up,
            mac: vtep::MacAddr::new([2, 0, 10, 0, 9, 2]),
            member,
            names: None,
        };
        let reached = |agent: &mut Agent| {
            let events = events(agent).into_iter();
            let places = events.filter_map(|event| match event {
                Event::Reached { revision, .. } => Some(revision),
                _ => None,
            });
            places.collect::<Vec<u64>>()
        };
        hear(&mut agent, [rows(10, vec![row(0, None)])]);
        assert_eq!(reached(&mut agent), [10], "the stream has begun");
        hear(&mut agent, [rows(20, vec![row(1, None)])]);
        assert!(reached(&mut agent).is_empty(), "no member has changed");
        let member = Membership {
            service: Epoch::new(1, 1),
            weight: 1,
            serving: true,
        };
        hear(&mut agent, [rows(30, vec![row(2, Some(member))])]);
        assert_eq!(reached(&mut agent), [30]);
        agent.applied(vni(), 1, 30);
        let applied = ToManager::Applied {
            vni: vni(),
            generation: 1,
            revision: 30,
        };
        assert_eq!(said(&mut agent), [applied]);
        // Another connection: the manager does not know any more how far this host has come.
        welcome(&mut agent);
        hear(&mut agent, [rows(30, Vec::new())]);
        assert_eq!(reached(&mut agent), [30]);
    }

    #[test]
    fn the_program_is_told_once_a_manager_of_now_has_said_all() {
        let mut agent = connected();
        let all = |settled| {
            ToAgent::Rows(Rows {
                vni: vni(),
                generation: 1,
                from: 0,
                to: 10,
                part: 0,
                last: true,
                settled,
                rows: Vec::new(),
            })
        };
        let told = |agent: &mut Agent| {
            let events = events(agent).into_iter();
            let caught_up = events.filter(|event| *event == Event::CaughtUp(vni()));
            caught_up.count()
        };
        hear(&mut agent, [all(true)]);
        assert_eq!(told(&mut agent), 0, "the services are still to come");
        hear(&mut agent, listing(vni(), Vec::new()));
        assert_eq!(told(&mut agent), 1);
        hear(&mut agent, [all(true)]);
        assert_eq!(told(&mut agent), 0, "once");

        // A manager that is still learning what it lost.
        welcome(&mut agent);
        hear(&mut agent, listing(vni(), Vec::new()));
        hear(&mut agent, [all(false)]);
        assert_eq!(told(&mut agent), 0);
        hear(&mut agent, [all(true)]);
        assert_eq!(told(&mut agent), 1);

        // What an earlier agent knew may be old by now.
        let kept = agent.snapshot(CLUSTER);
        let host = crate::testing::host_info(HostId::from_bytes([2; 16]), 2, [192, 0, 2, 2]);
        let mut next = Agent::new(host, CLUSTER.to_owned(), agent.managers().to_vec());
        next.subscribe(vni());
        for message in kept {
            next.restore(message, Duration::ZERO);
        }
        assert_eq!(told(&mut next), 0);
        welcome(&mut next);
        hear(&mut next, listing(vni(), Vec::new()));
        assert_eq!(told(&mut next), 0, "rows are of before");
        hear(&mut next, [all(true)]);
        assert_eq!(told(&mut next), 1);
    }
}
