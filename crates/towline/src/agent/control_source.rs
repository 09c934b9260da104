//! Where this host's tables and addresses come from: a manager, or a file.
//!
//! Both tell their news as the same events and answer the same requests, so the rest of the agent need not know which it is.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use control::installed::{Entry, RuleDifference};
use control::{
    AgentHandle, ControlStatus, Endpoint, EndpointState, Epoch, Event, Inspection, LeaseError,
    Request, RequestError, Response,
};
use crossbeam_channel::Receiver;
use vtep::{MacAddr, Vni};

use super::static_mode::StaticTables;

/// Who tells this host what its tables hold.
pub(crate) enum Control {
    /// A manager.
    Manager(AgentHandle),
    /// A file.
    Static(Arc<StaticTables>),
}

impl Control {
    /// Asks and waits for the answer.
    pub(crate) fn request(&self, request: Request) -> Result<Response, RequestError> {
        match self {
            Self::Manager(control) => control.request(request),
            Self::Static(tables) => tables.answer(&request),
        }
    }

    /// Tells of this network from now on: what it is now, then every change.
    pub(crate) fn subscribe(&self, vni: Vni) {
        match self {
            Self::Manager(control) => control.subscribe(vni),
            Self::Static(tables) => tables.subscribe(vni),
        }
    }

    /// Tells of this network no more.
    pub(crate) fn unsubscribe(&self, vni: Vni) {
        match self {
            Self::Manager(control) => control.unsubscribe(vni),
            Self::Static(tables) => tables.unsubscribe(vni),
        }
    }

    /// An endpoint of this host is up or down; a file says so itself.
    pub(crate) fn publish(&self, endpoint: Endpoint, state: EndpointState) {
        if let Self::Manager(control) = self {
            control.publish(endpoint, state);
        }
    }

    /// What was told up to there is in force on this host.
    pub(crate) fn applied(&self, vni: Vni, generation: u16, revision: u64) {
        if let Self::Manager(control) = self {
            control.applied(vni, generation, revision);
        }
    }

    /// Which hosts do not act yet on what was last said of an endpoint; waits a second for them. A file has no services.
    pub(crate) fn confirmed(&self, vni: Vni, epoch: Epoch) -> Result<Vec<String>, RequestError> {
        match self {
            Self::Manager(control) => control.confirmed(vni, epoch),
            Self::Static(_) => Ok(Vec::new()),
        }
    }

    /// A frame came here that should not have; only a manager can tell its sender.
    pub(crate) fn misdelivered(&self, vni: Vni, mac: MacAddr, from: IpAddr) {
        if let Self::Manager(control) = self {
            control.misdelivered(vni, mac, from);
        }
    }

    /// Answers a manager's question.
    pub(crate) fn report(
        &self,
        inspection: Inspection,
        installed: &BTreeSet<Entry>,
        rules: Vec<RuleDifference>,
    ) {
        if let Self::Manager(control) = self {
            control.report(inspection, installed, rules);
        }
    }

    /// This host receives VXLAN on another port from now on.
    pub(crate) fn set_port(&self, port: u16) {
        if let Self::Manager(control) = self {
            control.set_port(port);
        }
    }

    /// An endpoint out of what a manager has leased to this host; a file leases nothing, and always answers.
    pub(crate) fn take_leased(
        &self,
        vni: Vni,
        container: &str,
        ips: &[IpAddr],
    ) -> Result<Endpoint, LeaseError> {
        match self {
            Self::Manager(control) => control.take_leased(vni, container, ips),
            Self::Static(_) => Err(LeaseError::ManagerAnswers),
        }
    }

    /// The news, in order.
    pub(crate) fn events(&self) -> &Receiver<Event> {
        match self {
            Self::Manager(control) => control.events(),
            Self::Static(tables) => tables.events(),
        }
    }

    /// The highest epoch that this host has ever seen of its cluster.
    pub(crate) fn last_epoch(&self) -> Epoch {
        match self {
            Self::Manager(control) => control.last_epoch(),
            Self::Static(_) => Epoch::ZERO,
        }
    }

    /// How things stand.
    pub(crate) fn status(&self) -> ControlStatus {
        match self {
            Self::Manager(control) => control.status(),
            Self::Static(tables) => tables.control_status(),
        }
    }

    /// The tables that a file gives, if one does.
    pub(crate) fn static_tables(&self) -> Option<&StaticTables> {
        match self {
            Self::Manager(_) => None,
            Self::Static(tables) => Some(tables),
        }
    }

    /// Ends the connection to a manager.
    pub(crate) fn shutdown(self) {
        if let Self::Manager(control) = self {
            control.shutdown();
        }
    }
}
