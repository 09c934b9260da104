//! Where a container's addresses come from: a manager, or while none answers the block that this host was leased ahead.
//!
//! Without a manager a container starts on networks that this host takes part in already, and its name is compared with
//! those of this host alone. When a manager is back it is told of both. Should another host hold the name by then, the name stays
//! that host's, and both containers run on.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use control::service::{Membership, Service};
use control::{Endpoint, LeaseError, Network, NetworkDetails, Request, RequestError, Response};
use vtep::MacAddr;

use super::Agent;
use crate::agent::state::EndpointRecord;
use crate::agent::{Member, network};
use crate::shim::folder::Spec;

/// Who hands out what a container needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A manager that answers.
    Manager,
    /// This host's own block, for this reason: no manager could be asked.
    Block(RequestError),
}

impl Source {
    /// The network of this name or id, followed from now on.
    pub(super) fn network(
        &self,
        agent: &Agent,
        member: &Member,
        name: &str,
    ) -> anyhow::Result<Network> {
        match self {
            Self::Manager => {
                let request = Request::Network(name.to_owned());
                let Response::Details(NetworkDetails { network, .. }) =
                    member.control.request(request)?
                else {
                    return Err(network::unexpected());
                };
                member.enter_network(agent, &network)?;
                Ok(network)
            }
            Self::Block(unanswered) => match network::known(agent, name) {
                Ok(network) => Ok(network),
                Err(_) => bail!(
                    "no container of this host is on a network {}, and {unanswered}",
                    control::quote(name)
                ),
            },
        }
    }

    /// The service of this name or id.
    pub(super) fn service(&self, member: &Member, name: &str) -> anyhow::Result<Service> {
        match self {
            Self::Manager => {
                let request = Request::Service(name.to_owned());
                match member.control.request(request)? {
                    Response::ServiceDetails(details) => Ok(details.service),
                    _ => Err(network::unexpected()),
                }
            }
            Self::Block(unanswered) => member.services.by_name(name).with_context(|| {
                format!(
                    "no container of this host is on the network of a service {}, and {unanswered}",
                    control::quote(name)
                )
            }),
        }
    }

    /// Addresses on a network. `ips` and `mac`: what the user asks for; `part`: which service it is a member of there, with which
    /// weight.
    pub(super) fn endpoint(
        &self,
        member: &Member,
        spec: &Spec,
        network: &Network,
        ips: Vec<IpAddr>,
        mac: Option<MacAddr>,
        part: Option<(&Service, u16)>,
    ) -> anyhow::Result<Endpoint> {
        if let Self::Block(_) = self {
            if !network.attachable && part.is_none() {
                bail!(control::not_attachable(network));
            }
            if mac.is_some() {
                bail!(
                    "no manager answers, and a MAC address comes with each leased address: leave --mac out, \
                     or try again when a manager answers"
                );
            }
            match member.control.take_leased(network.vni, &spec.name, &ips) {
                Ok(mut endpoint) => {
                    endpoint.member = part.map(|(service, weight)| Membership {
                        service: service.epoch,
                        weight,
                        serving: false,
                    });
                    return Ok(endpoint);
                }
                // It has come back meanwhile.
                Err(LeaseError::ManagerAnswers) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let request = Request::Allocate {
            network: network.name.clone(),
            container: spec.name.clone(),
            ips,
            mac,
            service: part.map(|(service, _)| service.id.clone()),
            weight: part.map(|(_, weight)| weight),
        };
        match member.control.request(request)? {
            Response::Endpoint(endpoint) => Ok(endpoint),
            _ => Err(network::unexpected()),
        }
    }

    /// What the operator should know of a container that was made so.
    pub(super) fn warning(&self, member: &Member, records: &[EndpointRecord]) -> Option<String> {
        if *self == Self::Manager {
            return None;
        }
        let name = "its name was compared with this host's containers alone";
        if records.is_empty() {
            return Some(format!("no manager answers: {name}"));
        }
        let status = member.control.status();
        let left = |record: &EndpointRecord| {
            let mut known = status.subscriptions.iter();
            known
                .find(|known| known.vni == record.vni)
                .map_or(0, |known| known.leased.len())
        };
        let given: Vec<String> = records
            .iter()
            .map(|record| {
                let ips: Vec<String> = record.ips.iter().map(IpAddr::to_string).collect();
                format!("{} ({} left)", ips.join(", "), left(record))
            })
            .collect();
        Some(format!(
            "no manager answers: {} was leased to this host ahead; other hosts reach it once a manager answers; {name}",
            given.join(", ")
        ))
    }
}
