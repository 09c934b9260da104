//! Members of services: who they are, and whether every host acts on what their owners said last.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use vtep::Vni;

use super::{Connection, Manager};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::network::Endpoint;
use crate::request::{MemberView, Response, ServiceDetails};
use crate::row::Row;
use crate::service::{Membership, Service, WEIGHT_MAX};

/// How long an answer waits for hosts to act: below the deadline of a request.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// Questions that wait.
const WAITING_MAX: usize = 4096;
/// Questions of one host that wait.
const WAITING_PER_HOST: usize = 256;

/// A question whether all hosts act on an edit.
#[derive(Debug)]
pub(super) struct Confirmation {
    connection: Connection,
    host: HostId,
    call: u64,
    vni: Vni,
    /// Who has come so far acts on the edit.
    place: (u16, u64),
    until: Duration,
}

impl Manager {
    /// The part that an endpoint on a network is to have in a service.
    pub(super) fn join_service(
        &self,
        vni: Vni,
        (wanted, weight): (&str, u16),
    ) -> Result<Membership, String> {
        let service = self.find_service(wanted)?;
        let name = &service.spec.name;
        let ingress = self.state.ingress();
        if !service.networks(ingress).any(|on| on == vni) {
            let network = &self.state.networks[&vni].network.name;
            return Err(if ingress == Some(vni) {
                format!("service {name} has no port that the network {network} carries")
            } else {
                format!(
                    "service {name} is on network {}, not on {network}",
                    service.spec.network
                )
            });
        }
        if !(1..=WEIGHT_MAX).contains(&weight) {
            return Err(format!(
                "invalid weight {weight} in service {name}: it must be from 1 to {WEIGHT_MAX}"
            ));
        }
        Ok(Membership {
            service: service.epoch,
            weight,
            serving: false,
        })
    }

    pub(super) fn service_details(&self, wanted: &str) -> Result<Response, String> {
        let service = self.find_service(wanted)?;
        let mut members = self.members_of(service.vni);
        let members = members.remove(&service.epoch).unwrap_or_default();
        Ok(Response::ServiceDetails(Box::new(ServiceDetails {
            service: service.clone(),
            members,
        })))
    }

    pub(super) fn services(&self) -> Response {
        let mut members: BTreeMap<Vni, BTreeMap<Epoch, Vec<MemberView>>> = BTreeMap::new();
        let details = self.state.services.values().map(|service| {
            let on = members
                .entry(service.vni)
                .or_insert_with(|| self.members_of(service.vni));
            ServiceDetails {
                service: service.clone(),
                members: on.remove(&service.epoch).unwrap_or_default(),
            }
        });
        let mut details: Vec<ServiceDetails> = details.collect();
        details.sort_by(|a, b| a.service.spec.name.cmp(&b.service.spec.name));
        Response::Services(details)
    }

    /// The members of every service on a network, by container name.
    fn members_of(&self, vni: Vni) -> BTreeMap<Epoch, Vec<MemberView>> {
        let ingress: BTreeMap<(&str, Epoch), &[IpAddr]> = self
            .state
            .ingress()
            .into_iter()
            .flat_map(|vni| self.members_on(vni))
            .map(|(endpoint, _, member)| {
                let key = (endpoint.container.as_str(), member.service);
                (key, endpoint.ips.as_slice())
            })
            .collect();
        let mut members: BTreeMap<Epoch, Vec<MemberView>> = BTreeMap::new();
        for (endpoint, row, member) in self.members_on(vni) {
            let on_ingress = ingress.get(&(endpoint.container.as_str(), member.service));
            let view = MemberView {
                container: endpoint.container.clone(),
                host: self.host_name(row.owner),
                host_id: row.owner,
                ips: endpoint.ips.clone(),
                ingress: on_ingress.map(|ips| ips.to_vec()).unwrap_or_default(),
                state: row.state,
                member,
                masked: !self.is_up(row.owner),
            };
            members.entry(member.service).or_default().push(view);
        }
        for views in members.values_mut() {
            views.sort_by(|a, b| a.container.cmp(&b.container));
        }
        members
    }

    fn members_on(&self, vni: Vni) -> impl Iterator<Item = (&Endpoint, &Row, Membership)> {
        let network = self.state.networks.get(&vni);
        network.into_iter().flat_map(|network| {
            network.endpoints.values().filter_map(|held| {
                let row = network.row_of(&held.endpoint)?;
                Some((&held.endpoint, row, row.member?))
            })
        })
    }

    /// A host acts on all of a network's news up to here.
    pub(super) fn applied(&mut self, connection: Connection, vni: Vni, place: (u16, u64)) {
        let Some(peer) = self.connections.get_mut(&connection) else {
            return;
        };
        if peer.subscriptions.contains(&vni) {
            let applied = peer.applied.entry(vni).or_default();
            *applied = place.max(*applied);
        }
    }

    /// Answers once all hosts act on an edit of the asking host's endpoint, or do not for too long.
    pub(super) fn confirm_edit(
        &mut self,
        connection: Connection,
        call: u64,
        host: HostId,
        (vni, epoch, owner_seq): (Vni, Epoch, u32),
        now: Duration,
    ) -> Result<(), String> {
        let waiting = |host| {
            let waiting = self.confirmations.iter();
            waiting.filter(|asked| asked.host == host).count()
        };
        if self.confirmations.len() >= WAITING_MAX || waiting(host) >= WAITING_PER_HOST {
            return Err("too many questions of this kind wait already: try again".to_owned());
        }
        let state = self.state.networks.get(&vni);
        let edit = state.and_then(|state| {
            let held = state.endpoints.get(&epoch)?;
            let row = state.row_of(&held.endpoint)?;
            let mine = held.owner == host && row.owner_seq >= owner_seq;
            mine.then(|| state.revision_of(&held.endpoint))
        });
        let Some(revision) = edit else {
            return Err(format!(
                "endpoint {epoch} on VNI {vni} is not this host's, or what it said of it last has not come"
            ));
        };
        // What was told in an earlier generation, everybody has again who follows this one.
        let generation = self.state.last().generation();
        let revision = if revision.generation() == generation {
            revision.counter()
        } else {
            0
        };
        self.confirmations.push(Confirmation {
            connection,
            host,
            call,
            vni,
            place: (generation, revision),
            until: now + PATIENCE,
        });
        Ok(())
    }

    /// Answers the questions that can be answered now; where `now` is told, also those that have waited for long enough.
    pub(super) fn answer_confirmations(&mut self, now: Option<Duration>) {
        for asked in std::mem::take(&mut self.confirmations) {
            let waiting = self.not_yet(asked.vni, asked.place);
            if waiting.is_empty() || now.is_some_and(|now| now >= asked.until) {
                let answer = Ok(Response::Confirmed { waiting });
                if self.connections.contains_key(&asked.connection) {
                    self.answer(asked.connection, asked.call, &answer);
                }
            } else {
                self.confirmations.push(asked);
            }
        }
    }

    /// Hosts that follow a network, are here, and do not act on its news up to this place.
    fn not_yet(&self, vni: Vni, place: (u16, u64)) -> Vec<String> {
        let late = self.connections.values().filter(|peer| {
            peer.subscriptions.contains(&vni)
                && self.is_up(peer.host)
                && peer
                    .applied
                    .get(&vni)
                    .is_none_or(|applied| *applied < place)
        });
        let mut names: Vec<String> = late.map(|peer| self.host_name(peer.host)).collect();
        names.sort();
        names
    }

    /// The service that a membership names, if it exists.
    pub(super) fn service_of(&self, member: Membership) -> Option<&Service> {
        self.state.services.get(&member.service)
    }
}
