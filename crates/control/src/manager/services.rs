//! Services: made, changed, removed, and taken back from agents after a loss. A refusal is one line for the user, in Docker's words
//! where Docker has them. Who is a member stands in rows (`members.rs`); which ports are free, in `ports.rs`.

use std::net::IpAddr;
use std::time::Duration;

use vtep::Vni;

use super::{Connection, Manager};
use crate::agent::services::{in_parts, listing};
use crate::epoch::Epoch;
use crate::events::Action;
use crate::host::HostId;
use crate::message::ToAgent;
use crate::network::quote;
use crate::request::Response;
use crate::row::{Row, State as RowState};
use crate::service::{EndpointMode, Service, ServiceSpec, check_spec};

impl Manager {
    pub(super) fn create_service(
        &mut self,
        spec: ServiceSpec,
        asking: HostId,
        now: Duration,
    ) -> Result<Response, String> {
        check_spec(&spec)?;
        self.check_service_name(&spec.name)?;
        let vni = self.find_network(&spec.network)?;
        let network = self.state.networks[&vni].network.clone();
        if network.ingress {
            return Err(format!(
                "Service cannot be explicitly attached to the ingress network \"{}\"",
                network.name
            ));
        }
        self.check_ingress(&spec)?;
        let spec = ServiceSpec {
            network: network.name.clone(),
            publish: self.choose_ports(&spec.publish, None)?,
            ..spec
        };
        let mut service = Service {
            id: self.random_id(),
            epoch: Epoch::ZERO,
            version: Epoch::ZERO,
            vni,
            spec,
            vips: Vec::new(),
            created: self.unix_seconds(now),
        };
        self.check_service(&service)?;
        if service.spec.mode == EndpointMode::Vip {
            let mut vips = self.check_wanted(&network, &service.spec.vips)?;
            self.clear_leases(&network, &vips, asking, now)?;
            // What can refuse from here on leaves a cursor that moved for nothing, which does no harm.
            for v4 in [true, false] {
                if let Some(ip) = self.draw_family(&network, v4, &vips, now)? {
                    vips.push(ip);
                }
            }
            vips.sort_by_key(IpAddr::is_ipv6);
            service.vips = vips;
        }
        service.epoch = self.state.draw();
        service.version = service.epoch;
        self.put_virtual(&service, service.epoch, RowState::Down, now);
        self.state.put_service(service.clone());
        self.note_service(Action::Create, &service);
        self.shrink(vni);
        Ok(Response::Service(Box::new(service)))
    }

    pub(super) fn update_service(
        &mut self,
        wanted: &str,
        version: Epoch,
        spec: ServiceSpec,
    ) -> Result<Response, String> {
        let known = self.find_service(wanted)?.clone();
        let name = &known.spec.name;
        if known.version != version {
            return Err(format!(
                "service {name} was changed in between (version {}, not {version}): update out of sequence, try again",
                known.version
            ));
        }
        check_spec(&spec)?;
        let fixed = |spec: &ServiceSpec| (spec.name.clone(), spec.mode, spec.vips.clone());
        let same_network = self.find_network(&spec.network)? == known.vni;
        if fixed(&spec) != fixed(&known.spec) || !same_network {
            return Err(format!(
                "the name, network, endpoint mode and virtual addresses of service {name} can't be changed: \
                 remove it and create another"
            ));
        }
        self.check_ingress(&spec)?;
        let spec = ServiceSpec {
            network: known.spec.network.clone(),
            publish: self.choose_ports(&spec.publish, Some(&known))?,
            ..spec
        };
        let mut service = Service { spec, ..known };
        self.check_service(&service)?;
        service.version = self.state.draw();
        self.state.put_service(service.clone());
        self.note_service(Action::Update, &service);
        Ok(Response::Service(Box::new(service)))
    }

    pub(super) fn remove_service(
        &mut self,
        wanted: &str,
        now: Duration,
    ) -> Result<Response, String> {
        let epoch = self.find_service(wanted)?.epoch;
        let service = self
            .state
            .remove_service(epoch)
            .ok_or("the service is gone")?;
        let freed = self.state.draw();
        self.put_virtual(&service, freed, RowState::Free, now);
        self.note_service(Action::Remove, &service);
        Ok(Response::Service(Box::new(service)))
    }

    /// The service of this name, id, or unique start of an id.
    pub(super) fn find_service(&self, wanted: &str) -> Result<&Service, String> {
        let services = || self.state.services.values();
        let exact = |service: &&Service| service.spec.name == wanted || service.id == wanted;
        if let Some(service) = services().find(exact) {
            return Ok(service);
        }
        let mut starts =
            services().filter(|service| !wanted.is_empty() && service.id.starts_with(wanted));
        match (starts.next(), starts.next()) {
            (Some(service), None) => Ok(service),
            (Some(_), Some(_)) => Err(format!(
                "service id {} is ambiguous: give more of it",
                quote(wanted)
            )),
            (None, _) => Err(format!(
                "service {} not found: `towline service ls` shows what exists",
                quote(wanted)
            )),
        }
    }

    /// Sends the whole list of a network's services.
    pub(super) fn send_services(&mut self, connection: Connection, vni: Vni) {
        for message in listing(vni, self.services_on(vni)) {
            self.send(connection, message);
        }
    }

    /// An agent knows services that are not here, or newer ones: they are taken back, or it is told what is true.
    pub(super) fn offered(
        &mut self,
        connection: Connection,
        vni: Vni,
        offered: Vec<Service>,
        now: Duration,
    ) {
        let follows = self
            .connections
            .get(&connection)
            .is_some_and(|peer| peer.subscriptions.contains(&vni));
        if !follows {
            return;
        }
        let (mut known, mut gone) = (Vec::new(), Vec::new());
        for service in offered {
            let here = self.state.services.get(&service.epoch);
            if self.may_adopt_service(&service) {
                tracing::info!(service = %service.spec.name, "took back a service that the store had lost");
                if here.is_none() {
                    self.put_virtual(&service, service.epoch, RowState::Down, now);
                }
                self.state.put_service(service);
            } else if let Some(here) = here {
                known.push(here.clone());
            } else if self.unsettled_until.is_none()
                || self.state.networks.contains_key(&service.vni)
            {
                gone.push(service.epoch);
            }
            // Else its network may still be told of, and it again once what was lost is known.
        }
        let message = |services, removed| ToAgent::Services {
            vni,
            full: false,
            services,
            removed,
            last: true,
        };
        for services in in_parts(known) {
            self.send(connection, message(services, Vec::new()));
        }
        if !gone.is_empty() {
            self.send(connection, message(Vec::new(), gone));
        }
    }

    /// Tells what changed of services in this turn, before the rows of their members.
    pub(super) fn tell_services(&mut self) {
        for (vni, news) in self.state.take_service_news() {
            let to = self.subscribers(vni);
            if to.is_empty() {
                continue;
            }
            let (changed, removed): (Vec<Epoch>, Vec<Epoch>) =
                news.into_iter().partition(|epoch| self.is_on(*epoch, vni));
            let changed = changed
                .iter()
                .filter_map(|epoch| self.state.services.get(epoch).cloned());
            let mut parts = in_parts(changed.collect());
            if parts.is_empty() {
                parts.push(Vec::new());
            }
            let count = parts.len();
            for (index, services) in parts.into_iter().enumerate() {
                let last = index + 1 == count;
                let message = ToAgent::Services {
                    vni,
                    full: false,
                    services,
                    removed: if last { removed.clone() } else { Vec::new() },
                    last,
                };
                let to = to.clone();
                self.outputs.push_back(super::Output::Send { to, message });
            }
        }
    }

    fn is_on(&self, epoch: Epoch, vni: Vni) -> bool {
        let ingress = self.state.ingress();
        let service = self.state.services.get(&epoch);
        service.is_some_and(|service| service.networks(ingress).any(|on| on == vni))
    }

    /// Sets the rows of a service's virtual addresses. They are nobody's, and no frame goes to them.
    fn put_virtual(&mut self, service: &Service, epoch: Epoch, state: RowState, now: Duration) {
        let Some(network) = self.state.networks.get(&service.vni) else {
            return;
        };
        let mac = network.network.gateway_mac;
        for &ip in &service.vips {
            let row = Row {
                ip,
                epoch,
                owner: HostId::NOBODY,
                owner_seq: 0,
                state,
                mac,
                member: None,
                names: None,
            };
            self.state.put_row(service.vni, row, now);
        }
    }

    /// Whether a service that an agent remembers may be taken back into a store that lost it, or lost its last change.
    fn may_adopt_service(&self, service: &Service) -> bool {
        let Some(network) = self.state.networks.get(&service.vni) else {
            return false;
        };
        let floor = self.state.service_floor(&service.spec.name);
        let newer = match self.state.services.get(&service.epoch) {
            Some(here) => {
                here.version < service.version
                    && (&here.id, here.vni, &here.vips, &here.spec.name)
                        == (&service.id, service.vni, &service.vips, &service.spec.name)
            }
            None => {
                self.check_service_name(&service.spec.name).is_ok()
                    && self
                        .state
                        .services
                        .values()
                        .all(|other| other.id != service.id)
                    && self.may_adopt_virtual(service)
            }
        };
        newer
            && service.epoch <= service.version
            && service.version <= self.state.last()
            && service.epoch > network.network.epoch
            && floor.is_none_or(|floor| service.epoch > floor)
            && service.spec.network == network.network.name
            && !network.network.ingress
            && check_spec(&service.spec).is_ok()
            && self.check_service(service).is_ok()
            && self
                .check_ports(&service.spec.publish, Some(service.epoch))
                .is_ok()
    }

    /// Whether nobody has a lost service's virtual addresses, and nobody had them since.
    fn may_adopt_virtual(&self, service: &Service) -> bool {
        let network = &self.state.networks[&service.vni];
        let families = |v4| service.vips.iter().filter(|ip| ip.is_ipv4() == v4).count();
        let right = match service.spec.mode {
            EndpointMode::Vip => {
                !service.vips.is_empty() && families(true) <= 1 && families(false) <= 1
            }
            EndpointMode::Dnsrr => service.vips.is_empty(),
        };
        right
            && service.vips.iter().all(|ip| {
                let subnets = &network.network.subnets;
                let row = network.table.row(*ip);
                subnets.iter().any(|subnet| subnet.is_assignable(*ip))
                    && row
                        .is_none_or(|row| row.epoch < service.epoch && row.state == RowState::Free)
                    && network.leases.holder(*ip).is_none()
            })
    }

    fn check_service_name(&self, name: &str) -> Result<(), String> {
        let taken = |service: &Service| service.spec.name == name;
        if self.state.services.values().any(taken) {
            return Err(format!(
                "service with name {name} already exists: choose another, or remove it first"
            ));
        }
        Ok(())
    }

    fn check_ingress(&self, spec: &ServiceSpec) -> Result<(), String> {
        if spec.uses_ingress() && self.state.ingress().is_none() {
            return Err(
                "there is no ingress network to carry published ports: make one with `towline network create --ingress ingress`, \
                 or publish with mode=host"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
