//! More hosts that may run the manager: who stands by, and which of two managers goes on.
//!
//! One manager answers at a time. A host whose certificate has the manager's role stands by: it holds the authority, and agents
//! know where it would listen. Promoted with an empty store it begins a generation above all that it has seen. Managers that
//! see each other compare generations, and the lower one stands down (`server/peers.rs`). What an agent says of generations
//! ends no manager: one host that lies must not be able to.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Connection, GRACE, Manager, Output};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::pki::Role;

/// Of two managers the one with the higher rank goes on: the later generation, then, by agreement only, the higher host id.
pub(crate) type Rank = (u16, HostId);

impl Manager {
    /// Tells where this manager listens.
    pub fn listens_at(&mut self, listen: SocketAddr) {
        self.listen = Some(listen);
    }

    /// Begins, with an empty store, in the place of a manager that is gone: above everything up to `seen`, and handing out
    /// nothing before hosts had the time to tell what runs.
    pub fn succeed(&mut self, seen: Epoch, now: Duration) {
        self.state.raise_generation(seen.max(self.state.last()));
        self.unsettled_until = Some(now + GRACE);
    }

    /// Where other managers would listen.
    pub(crate) fn standbys(&self) -> Vec<SocketAddr> {
        self.state.standbys().map(|(_, listen)| listen).collect()
    }

    /// The underlay addresses of all hosts known.
    pub(crate) fn vteps(&self) -> impl Iterator<Item = std::net::IpAddr> {
        self.state.hosts.values().map(|info| info.vtep)
    }

    pub(crate) fn rank(&self) -> Rank {
        (self.state.last().generation(), self.settings.host)
    }

    /// A host that may run the manager says where it would listen, and is given the authority.
    pub(super) fn stand_by(
        &mut self,
        connection: Connection,
        call: u64,
        listen: SocketAddr,
    ) -> Result<(), String> {
        let peer = self.connections.get(&connection);
        let Some(host) = peer
            .filter(|peer| peer.role == Role::Manager)
            .map(|peer| peer.host)
        else {
            return Err(
                "this host joined as a worker: to stand by it joins with `towline token manager`"
                    .to_owned(),
            );
        };
        if self.state.hosts.get(&host).map(|info| info.vtep) != Some(listen.ip()) {
            return Err(format!(
                "{listen} is not on the host's own underlay address"
            ));
        }
        if self.state.put_standby(host, listen) {
            tracing::info!(host = %self.host_name(host), %listen, "stands by as a manager");
            self.changed_hosts.insert(host);
        }
        self.outputs
            .push_back(Output::Authority { connection, call });
        Ok(())
    }

    /// Where a host's manager listens, or would.
    pub(super) fn control_of(&self, host: HostId) -> Option<SocketAddr> {
        if host == self.settings.host {
            self.listen
        } else {
            self.state.standby(host)
        }
    }
}
