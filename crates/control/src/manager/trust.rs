//! Who may come in: tokens for hosts that are new, certificates for hosts that are known, and nobody who was removed.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Connection, Manager, Output};
use crate::host::{HostId, HostInfo};
use crate::message::ToAgent;
use crate::network::quote;
use crate::pki::{Certificate, Role};
use crate::request::Response;
use crate::token::Secret;

/// Why a host is not let in: the line to reject it with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub reason: String,
    /// It was a member and was removed: it takes its ports down and does not come back.
    pub removed: bool,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        let removed = false;
        Self { reason, removed }
    }
}

/// A join token's secret, in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ticket {
    pub(super) secret: Secret,
    /// Seconds since 1970 from which on nobody joins with it; `None`: never.
    pub(super) expires: Option<u64>,
}

impl Manager {
    /// Tells the time of day, which only dates of certificates and tokens are measured by.
    pub fn set_unix(&mut self, unix: Duration) {
        self.unix = unix;
    }

    /// What the holder of this secret may become. A refusal tells nothing of the cluster.
    pub fn redeem(&self, secret: &Secret) -> Result<Role, String> {
        let roles = [Role::Worker, Role::Manager];
        let found = roles.into_iter().find_map(|role| {
            let ticket = self.state.ticket(role)?;
            (ticket.secret == *secret).then_some((role, ticket))
        });
        let Some((role, ticket)) = found else {
            return Err("wrong token, or one that was rotated away: `towline token` on the manager's host shows the \
                        present one"
                .to_owned());
        };
        if ticket
            .expires
            .is_some_and(|expires| self.unix.as_secs() >= expires)
        {
            return Err("the token has expired: `towline token --rotate` on the manager's host makes a new one".to_owned());
        }
        Ok(role)
    }

    /// A host shows its certificate on this connection and names itself; to be asked before its hello is handled. The
    /// authority's signature and the host's own have been checked.
    pub fn admit(
        &mut self,
        connection: Connection,
        certificate: Certificate,
        info: &HostInfo,
    ) -> Result<(), Refusal> {
        if certificate.host != info.id {
            let (holder, claimed) = (self.host_name(certificate.host), self.host_name(info.id));
            tracing::warn!(%holder, %claimed, "a host calls itself another");
            return Err(format!(
                "the certificate is host {holder}'s, and says nothing for host {claimed}: \
                 run `towline leave --force` and join again"
            )
            .into());
        }
        self.check_revoked(info.id)?;
        // The host's last certificate is good whatever a clock says of it; another must be good by its dates.
        let listed = self.state.certificate(info.id) == Some(certificate.serial.as_str());
        if !listed && !certificate.holds_at(self.unix) {
            return Err(format!(
                "the certificate of host {} is out of date by this manager's clock: set the clocks of both, \
                 or run `towline leave --force` there and join again",
                info.name
            )
            .into());
        }
        self.admitted.insert(connection, certificate);
        Ok(())
    }

    pub(super) fn check_revoked(&self, host: HostId) -> Result<(), Refusal> {
        if !self.state.is_revoked(host) {
            return Ok(());
        }
        Err(Refusal {
            reason: "this host was removed from the cluster: run `towline leave --force`, and join again with a token"
                .to_owned(),
            removed: true,
        })
    }

    /// Refuses, from now on, a host by its id that is no member: one that was removed, of which a store that was lost knew. Managers'
    /// hosts alone may, because each is remembered for ever.
    pub(super) fn shut_out(&mut self, asker: Connection, wanted: &str) -> Result<Response, String> {
        let Ok(id) = wanted.parse::<HostId>() else {
            return Err(format!(
                "host {} not found: `towline host ls` shows the hosts",
                quote(wanted)
            ));
        };
        let role = self.connections.get(&asker).map(|peer| peer.role);
        if role != Some(Role::Manager) {
            return Err(format!(
                "no host has the id {id}: to shut it out all the same, run `towline host rm` on a manager's host"
            ));
        }
        if !self.state.is_revoked(id) {
            tracing::info!(%id, "no certificate of this id is taken");
            self.state.remove_host(id, self.unix);
        }
        Ok(Response::Done)
    }

    /// Shows or changes a token. Managers' hosts alone may: a token makes members.
    pub(super) fn token(
        &mut self,
        asker: Role,
        role: Role,
        rotate: bool,
        lasts: Option<Lasts>,
    ) -> Result<Response, String> {
        if asker != Role::Manager {
            return Err(
                "tokens are shown on a manager's host only: run `towline token` there".to_owned(),
            );
        }
        let mut ticket = self
            .state
            .ticket(role)
            .cloned()
            .unwrap_or_else(Ticket::random);
        if rotate {
            ticket = Ticket::random();
        }
        match lasts {
            Some(Lasts::Seconds(seconds)) => {
                ticket.expires = Some(self.unix.as_secs().saturating_add(seconds));
            }
            Some(Lasts::Forever) => ticket.expires = None,
            None => {}
        }
        if rotate || lasts.is_some() {
            tracing::info!(%role, rotate, expires = ?ticket.expires, "changed the token");
            self.state.put_ticket(role, ticket.clone());
        }
        let left = |expires: u64| expires.saturating_sub(self.unix.as_secs());
        Ok(Response::Token {
            secret: ticket.secret,
            expires_in: ticket.expires.map(left),
        })
    }

    /// A known host wants a new certificate for a new key.
    pub(super) fn renew(&mut self, connection: Connection, call: u64, request: Vec<u8>) {
        if let Some(peer) = self.connections.get(&connection) {
            let (host, role) = (peer.host, peer.role);
            self.outputs.push_back(Output::Sign {
                connection,
                call,
                host,
                role,
                request,
            });
        }
    }

    /// Tells a host on its own connection that it is no member any more, and ends that connection.
    pub(super) fn dismiss(&mut self, host: HostId) {
        let Some(connection) = self.by_host.get(&host).copied() else {
            return;
        };
        if let Err(Refusal { reason, removed }) = self.check_revoked(host) {
            self.send(connection, ToAgent::Reject { reason, removed });
        }
        self.drop_connection(connection);
    }
}

impl Ticket {
    /// A new secret, for ever. Randomness, unlike clocks and sockets, is the same to a state machine wherever it comes from.
    pub(super) fn random() -> Self {
        Self {
            secret: Secret::random(),
            expires: None,
        }
    }
}

/// For how long a token is to be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lasts {
    /// So many seconds from now.
    Seconds(u64),
    /// Until it is rotated.
    Forever,
}
