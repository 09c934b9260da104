//! What `towline verify` asks of services: are the kernel's rules those that follow from the table?
//!
//! They are read back from the host's namespace and the containers', and compared with what the services and members that this host
//! has heard of call for by now. What is wrong is told, and then made anew.

use control::installed::{Fault, RuleDifference};
use discovery::{ApplyError, Inspector, InstalledClient, InstalledMember, Wrong};
use netns::Netns;
use vtep::Vni;

use super::{Host, Keeper, Place, wanted};
use crate::agent::{Agent, Member, ingress};

impl Keeper {
    /// Answers a manager's questions. Says whether something is to be made anew.
    pub(super) fn answer(&mut self, agent: &Agent, member: &Member) -> bool {
        let asked = std::mem::take(&mut self.asked);
        if asked.is_empty() {
            return false;
        }
        let inspector = Inspector::new();
        let mut broken = false;
        for (inspection, installed) in asked {
            let rules = match &inspector {
                Ok(inspector) => self.inspect(agent, member, inspector, inspection.vni),
                Err(error) => vec![unreadable(None, error)],
            };
            broken |= !rules.is_empty();
            for rule in &rules {
                let place = rule.container.as_deref().unwrap_or("this host");
                tracing::warn!("{place}: {:?}: {}", rule.fault, rule.rule);
            }
            member.control.report(inspection, &installed, rules);
        }
        broken
    }

    /// All that is wrong for one network's services; it is as if nothing were installed there then.
    fn inspect(
        &mut self,
        agent: &Agent,
        member: &Member,
        inspector: &Inspector,
        vni: Vni,
    ) -> Vec<RuleDifference> {
        let on_ports = member.services.ingress_network();
        let networks = agent.state.read(|state| state.networks.clone());
        let mut found = Vec::new();
        for (name, place) in &mut self.places {
            // Its rules are those of an earlier agent, or its namespace is just going.
            let known = place
                .ports
                .iter()
                .all(|port| self.complete.contains(&port.vni));
            let here = place.ports.iter().any(|port| port.vni == vni);
            let Some(netns) = Netns::open(name).ok().filter(|_| known && here) else {
                continue;
            };
            let wanted = wanted(&self.services, &networks, on_ports, name, &place.ports);
            let wrong = if Some(vni) == on_ports {
                inspector.member(&netns, wanted.member.as_ref())
            } else {
                // What is no single network's is told with the first.
                let first = wanted.own.first() == Some(&vni);
                let is_meant = |wrong: &Wrong| {
                    let network = wrong.network;
                    network.map_or(first, |network| network == vni.get())
                };
                let wrong = inspector.client(&netns, &wanted.client);
                wrong.map(|all| all.into_iter().filter(is_meant).collect())
            };
            let wrong = told(Some(name), wrong);
            if !wrong.is_empty() {
                place.forget();
            }
            found.extend(wrong);
        }
        if Some(vni) == on_ports && ingress::is_attached(agent, vni) && self.complete.contains(&vni)
        {
            let (_, plan) = self.entry_plan(agent, member, vni);
            let wrong = told(None, inspector.entry(&agent.netns, &plan));
            if !wrong.is_empty() {
                self.host.forget();
            }
            found.extend(wrong);
        }
        found
    }
}

impl Place {
    /// All is made anew.
    fn forget(&mut self) {
        self.client = InstalledClient::default();
        self.member = InstalledMember::default();
        self.stale = true;
    }
}

impl Host {
    /// All is made anew.
    fn forget(&mut self) {
        self.entry = discovery::InstalledEntry::default();
        self.stale = true;
    }
}

fn told(container: Option<&str>, found: Result<Vec<Wrong>, ApplyError>) -> Vec<RuleDifference> {
    let difference = |wrong: Wrong| RuleDifference {
        container: container.map(str::to_owned),
        service: wrong.service,
        rule: wrong.what,
        fault: if wrong.missing {
            Fault::Missing
        } else {
            Fault::Extra
        },
    };
    match found {
        Ok(found) => found
            .into_iter()
            .map(|wrong| difference(wrong).printable())
            .collect(),
        Err(error) => vec![unreadable(container, &error)],
    }
}

/// Rules that could not be compared are as good as none.
fn unreadable(container: Option<&str>, error: &ApplyError) -> RuleDifference {
    RuleDifference {
        container: container.map(str::to_owned),
        service: None,
        rule: format!("rules that can be read back: {error}"),
        fault: Fault::Missing,
    }
}
