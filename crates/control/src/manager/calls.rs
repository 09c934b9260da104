//! Requests of agents: answered at once, by another's answer, or held back while the manager may hand nothing out.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;

use super::endpoints::Wish;
use super::{Connection, GRACE, Manager, Output};
use crate::host::HostId;
use crate::message::ToAgent;
use crate::pki::Role;
use crate::request::{Request, Response};

/// Bytes of an answer in one message.
const REPLY_PART: usize = 256 * 1024;
/// How long a request is held back while hosts come back, before it is refused.
const HOLD: Duration = Duration::from_secs(3);
/// Requests held back.
const HELD_MAX: usize = 1024;
/// Sizes in one probe request.
const PROBES_MAX: usize = 16;

/// A request that waits until the manager may hand things out.
#[derive(Debug)]
pub(super) struct HeldCall {
    pub(super) connection: Connection,
    pub(super) host: HostId,
    pub(super) id: u64,
    pub(super) request: Request,
    pub(super) asked: Duration,
}

impl Manager {
    /// The parts of an answer.
    pub(crate) fn reply(id: u64, result: &Result<Response, String>) -> Vec<ToAgent> {
        let json = serde_json::to_vec(result)
            .expect("our types have string keys and no failing serialiser");
        let json = Bytes::from(json);
        let starts = (0..json.len()).step_by(REPLY_PART);
        let parts = starts.map(|start| (start, json.len().min(start + REPLY_PART)));
        parts
            .map(|(start, end)| ToAgent::Reply {
                id,
                part: json.slice(start..end),
                last: end == json.len(),
            })
            .collect()
    }

    pub(super) fn call(&mut self, call: HeldCall, now: Duration) {
        let (connection, host, id) = (call.connection, call.host, call.id);
        if hands_out(&call.request)
            && let Some(reason) = self.not_ready(now)
        {
            return self.hold(call, reason, now);
        }
        if is_of_all(&call.request)
            && let Err(reason) = self.may_change(host, now)
        {
            return self.hold(call, reason, now);
        }
        let request = call.request.clone();
        let result = match request {
            Request::CreateNetwork {
                spec,
                routes_in_use,
            } => self.create_network(spec, &routes_in_use, host, now),
            Request::RemoveNetwork(network) => self.remove_network(&network),
            Request::Networks => Ok(self.networks()),
            Request::Network(network) => self.network_details(&network, now),
            Request::ClaimName(name) => self.claim_name(&name, host),
            Request::ReleaseName(name) => self.release_name(&name, host),
            Request::Allocate {
                network,
                container,
                ips,
                mac,
                service,
                weight,
            } => {
                self.recalled = false;
                let joining = service
                    .as_deref()
                    .map(|service| (service, weight.unwrap_or(1)));
                let wish = Wish {
                    network: &network,
                    container,
                    ips: &ips,
                    mac,
                    joining,
                };
                match self.allocate(wish, host, now) {
                    Err(reason) if self.recalled => return self.hold(call, reason, now),
                    answer => answer,
                }
            }
            Request::MakeIngress { routes_in_use } => self.make_ingress(&routes_in_use, host, now),
            Request::CreateService(spec) => {
                self.recalled = false;
                match self.create_service(spec, host, now) {
                    Err(reason) if self.recalled => return self.hold(call, reason, now),
                    answer => answer,
                }
            }
            Request::UpdateService {
                version,
                service,
                spec,
            } => self.update_service(&service, version, spec),
            Request::RemoveService(service) => self.remove_service(&service, now),
            Request::Services => Ok(self.services()),
            Request::Service(service) => self.service_details(&service),
            Request::Confirmed {
                vni,
                epoch,
                owner_seq,
            } => match self.confirm_edit(connection, id, host, (vni, epoch, owner_seq), now) {
                Ok(()) => return,
                Err(refused) => Err(refused),
            },
            Request::Free { vni, epoch } => self.free(vni, epoch, host, now),
            Request::Hosts => Ok(Response::Hosts(self.views(now))),
            Request::SetVxlanPort(port) => self.set_vxlan_port(port, now),
            Request::TellPort { port, problem } => self.take_port(host, port, problem),
            Request::LabelHost {
                host: wanted,
                add,
                remove,
            } => self.label_host(&wanted, add, &remove),
            Request::TellTraits { platform, labels } => self.take_traits(host, platform, labels),
            Request::RemoveHost {
                host: wanted,
                force,
            } => self.remove_host(connection, &wanted, force, now),
            Request::Token {
                role,
                rotate,
                lasts,
            } => {
                let asker = self
                    .connections
                    .get(&connection)
                    .map_or(Role::Worker, |peer| peer.role);
                self.token(asker, role, rotate, lasts)
            }
            Request::StandBy { listen } => match self.stand_by(connection, id, listen) {
                Ok(()) => return,
                Err(refused) => Err(refused),
            },
            Request::Renew { request } => {
                self.renew(connection, id, request);
                return;
            }
            Request::Events(from) => match self.follow(connection, id, from, now) {
                Ok(()) => return,
                Err(refused) => Err(refused),
            },
            Request::Verify(network) => {
                match self.verify(connection, id, network.as_deref(), now) {
                    Ok(()) => return,
                    Err(refused) => Err(refused),
                }
            }
            Request::Leave => {
                self.forget_host(host, now);
                self.answer(connection, id, &Ok(Response::Done));
                self.drop_connection(connection);
                return;
            }
            Request::ProbeExpect { .. } | Request::ProbeReply { .. } => {
                match self.check_probe(&request, host) {
                    Ok(()) => {
                        self.outputs.push_back(Output::Probe {
                            connection,
                            call: id,
                            request,
                        });
                        return;
                    }
                    Err(refused) => Err(refused),
                }
            }
        };
        self.answer(connection, id, &result);
    }

    /// Keeps a request until it can be met, or until it has waited for long enough.
    pub(super) fn hold(&mut self, call: HeldCall, reason: String, now: Duration) {
        if self.held.len() < HELD_MAX
            && self.may_hold(call.host)
            && now.saturating_sub(call.asked) < HOLD
        {
            self.held.push_back(call);
        } else {
            self.answer(call.connection, call.id, &Err(reason));
        }
    }

    pub(super) fn answer(
        &mut self,
        connection: Connection,
        id: u64,
        result: &Result<Response, String>,
    ) {
        for part in Self::reply(id, result) {
            self.send(connection, part);
        }
    }

    /// Why nothing may be handed out yet.
    pub(super) fn not_ready(&self, now: Duration) -> Option<String> {
        let (started, back) = (self.started + GRACE, self.by_host.len());
        let (until, cause) = match self.unsettled_until {
            Some(until) => (until, "its store was old".to_owned()),
            None if now < started && back * 2 <= self.known_at_start && self.known_at_start > 0 => {
                (
                    started,
                    format!("{back} of {} are back", self.known_at_start),
                )
            }
            None => return None,
        };
        let seconds = until.saturating_sub(now).as_secs() + 1;
        Some(format!(
            "the manager has just started and waits for its hosts ({cause}): try again in {seconds} s"
        ))
    }

    /// Answers requests that were held back, once it may, or says why not.
    pub(super) fn release_held(&mut self, now: Duration) {
        for held in std::mem::take(&mut self.held) {
            let gone = self
                .connections
                .get(&held.connection)
                .is_none_or(|peer| peer.host != held.host);
            if !gone {
                self.call(held, now);
            }
        }
    }

    /// A manager sends probes to the asking host only: else it could be made to send to anybody.
    fn check_probe(&self, request: &Request, host: HostId) -> Result<(), String> {
        let Request::ProbeReply { to, sizes, .. } = request else {
            return Ok(());
        };
        let vtep = self
            .state
            .hosts
            .get(&host)
            .map(|info| SocketAddr::new(info.vtep, info.port));
        if vtep.map(|vtep| vtep.ip()) != Some(to.ip()) {
            return Err(format!(
                "probes go to the asking host's own underlay address, not to {to}"
            ));
        }
        if sizes.len() > PROBES_MAX {
            return Err(format!("at most {PROBES_MAX} probes at once"));
        }
        Ok(())
    }
}

/// Whether a request gives something to somebody that an older store could give twice.
fn hands_out(request: &Request) -> bool {
    matches!(
        request,
        Request::CreateNetwork { .. }
            | Request::MakeIngress { .. }
            | Request::CreateService(_)
            | Request::UpdateService { .. }
            | Request::Allocate { .. }
            | Request::ClaimName(_)
    )
}

/// Whether a request changes what the whole cluster keeps and hears of, so that one host's are counted.
fn is_of_all(request: &Request) -> bool {
    matches!(
        request,
        Request::CreateNetwork { .. }
            | Request::RemoveNetwork(_)
            | Request::MakeIngress { .. }
            | Request::CreateService(_)
            | Request::UpdateService { .. }
            | Request::RemoveService(_)
            | Request::SetVxlanPort(_)
            | Request::TellPort { .. }
            | Request::LabelHost { .. }
            | Request::TellTraits { .. }
            | Request::RemoveHost { .. }
            | Request::Token { .. }
    )
}
