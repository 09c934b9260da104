//! The durable part of services: definitions, and when each name was last given up.

use std::collections::{BTreeMap, BTreeSet};

use vtep::Vni;

use super::{NetworkState, State};
use crate::epoch::Epoch;
use crate::network::Endpoint;
use crate::service::Service;

impl NetworkState {
    /// The last change of an endpoint's rows.
    pub(in super::super) fn revision_of(&self, endpoint: &Endpoint) -> Epoch {
        let revisions = endpoint.ips.iter();
        let revisions = revisions.filter_map(|ip| self.revisions.get(ip).copied());
        revisions.max().unwrap_or_default()
    }
}

impl State {
    /// The network of published ports.
    pub(in super::super) fn ingress(&self) -> Option<Vni> {
        self.ingress
    }

    /// Whether this cluster ever had a network of published ports.
    pub(in super::super) fn had_ingress(&self) -> bool {
        self.had_ingress
    }

    /// A network came: it may be the one of published ports.
    pub(super) fn enter_ingress(&mut self, vni: Vni, ingress: bool) {
        if ingress {
            self.ingress = Some(vni);
            self.had_ingress = true;
            self.meta_changed = true;
        }
    }

    /// Bytes of all definitions.
    pub(in super::super) fn service_bytes(&self) -> usize {
        self.service_bytes
    }

    pub(super) fn enter_service(&mut self, service: Service) -> Option<Service> {
        self.service_bytes += service.size();
        let before = self.services.insert(service.epoch, service);
        self.service_bytes -= before.as_ref().map_or(0, Service::size);
        before
    }

    pub(in super::super) fn put_service(&mut self, service: Service) {
        self.write(format!("service/{}", service.epoch.get()), &service);
        self.note_news(&service);
        if let Some(before) = self.enter_service(service) {
            // Where it was told and is not any more.
            self.note_news(&before);
        }
    }

    /// Removes a service, and sees to it that it does not come back.
    pub(in super::super) fn remove_service(&mut self, epoch: Epoch) -> Option<Service> {
        let gone = self.services.remove(&epoch)?;
        self.service_bytes -= gone.size();
        self.erase(format!("service/{}", epoch.get()));
        let floor = self.draw();
        self.write(format!("gone/{}", gone.spec.name), &floor);
        self.service_floors.insert(gone.spec.name.clone(), floor);
        self.note_news(&gone);
        Some(gone)
    }

    /// When a service of this name was last removed.
    pub(in super::super) fn service_floor(&self, name: &str) -> Option<Epoch> {
        self.service_floors.get(name).copied()
    }

    /// Services that came, changed or went since the last call, by the networks that they are or were told on.
    pub(in super::super) fn take_service_news(&mut self) -> BTreeMap<Vni, BTreeSet<Epoch>> {
        std::mem::take(&mut self.service_news)
    }

    fn note_news(&mut self, service: &Service) {
        for vni in service.networks(self.ingress) {
            self.service_news
                .entry(vni)
                .or_default()
                .insert(service.epoch);
        }
    }
}

#[cfg(test)]
impl State {
    /// As if the store were from before this service.
    pub(in super::super) fn forget_service(&mut self, vni: Vni, service: &Service) {
        self.services.remove(&service.epoch);
        self.service_bytes -= service.size();
        if let Some(network) = self.networks.get_mut(&vni) {
            let gone = |row: &crate::row::Row| !service.vips.contains(&row.ip);
            network.table.retain(gone, &mut Vec::new());
        }
    }
}
