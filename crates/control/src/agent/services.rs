//! Services of the subscribed networks, and how far this host acts on what it was told.
//!
//! What a manager's whole list lacks may be what it lost: it is offered, and stays in force until the manager says that it is gone.

use std::collections::VecDeque;

use vtep::Vni;

use super::stream::Stream;
use super::{Agent, Output};
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
    /// News of services. What the manager seems to have lost is to be offered by the messages that are added to `messages`.
    pub(super) fn handle_services(
        &mut self,
        full: bool,
        services: Vec<Service>,
        removed: &[Epoch],
        last: bool,
        messages: &mut VecDeque<ToManager>,
        outputs: &mut VecDeque<Output>,
    ) {
        let before = self.services.clone();
        if full {
            let mut listing = self.listing.take().unwrap_or_default();
            listing.0.extend(services);
            if last {
                self.replace_services(listing.0, messages);
            } else {
                self.listing = Some(listing);
                return;
            }
        } else {
            let changed = services.into_iter().map(|service| (service.epoch, service));
            self.services.extend(changed);
            for epoch in removed {
                self.services.remove(epoch);
            }
        }
        if self.services != before || !self.services_told {
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
