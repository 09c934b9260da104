//! The list of hosts: who is masked, and where managers listen.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::{Agent, Output};
use crate::host::{HostId, HostView};
use crate::request::Event;

impl Agent {
    pub(super) fn update_hosts(&mut self, full: bool, hosts: Vec<HostView>, removed: &[HostId]) {
        let before = if full {
            std::mem::take(&mut self.hosts)
        } else {
            BTreeMap::new()
        };
        // Of most hosts nothing has changed that a table shows.
        let mut masks: BTreeMap<HostId, bool> = before
            .iter()
            .filter(|(_, view)| !view.up)
            .map(|(id, _)| (*id, false))
            .collect();
        for view in hosts {
            let (id, up) = (view.info.id, view.up);
            let known = self.hosts.insert(id, view);
            let was_up = known
                .as_ref()
                .or(before.get(&id))
                .is_none_or(|view| view.up);
            if up != was_up {
                masks.insert(id, !up);
            } else {
                masks.remove(&id);
            }
        }
        for id in removed {
            self.hosts.remove(id);
            masks.insert(*id, false);
        }
        self.learn_managers();
        self.outputs.push_back(Output::Event(Event::Hosts(
            self.hosts.values().cloned().collect(),
        )));
        for (id, masked) in masks {
            for stream in self.streams.values_mut() {
                stream.set_masked(id, masked, &mut self.outputs);
            }
        }
    }

    /// Managers are hosts: the one that answers first, then those that stand by for it.
    pub(super) fn learn_managers(&mut self) {
        let listening = |manager: bool| {
            let hosts = self
                .hosts
                .values()
                .filter(move |view| view.manager == manager);
            hosts.filter_map(|view| view.control)
        };
        let managers: Vec<SocketAddr> = listening(true).chain(listening(false)).collect();
        if !managers.is_empty() {
            self.managers = managers;
        }
    }
}
