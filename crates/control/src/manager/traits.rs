//! What hosts are beyond their place in the network: labels that operators give them, and what they say of themselves.

use std::collections::BTreeMap;

use super::Manager;
use crate::host::{HostId, HostTraits, Platform, check_labels};
use crate::network::quote;
use crate::request::Response;

impl Manager {
    /// Labels are the cluster's: any host may change any host's.
    pub(super) fn label_host(
        &mut self,
        wanted: &str,
        add: BTreeMap<String, String>,
        remove: &[String],
    ) -> Result<Response, String> {
        let mut hosts = self.state.hosts.values();
        let found = hosts.find(|info| info.name == wanted || info.id.to_string() == wanted);
        let Some(id) = found.map(|info| info.id) else {
            return Err(format!(
                "no host {}: `towline host ls` lists them",
                quote(wanted)
            ));
        };
        let mut traits = self.state.traits(id);
        for key in remove {
            if traits.labels.remove(key).is_none() {
                return Err(format!(
                    "host {} has no label {}: `towline host inspect` shows those that it has",
                    self.host_name(id),
                    quote(key)
                ));
            }
        }
        traits.labels.extend(add);
        check_labels(&traits.labels)?;
        self.put_traits(id, traits);
        Ok(Response::Done)
    }

    /// A host says what it is; nothing that operators gave it is changed.
    pub(super) fn take_traits(
        &mut self,
        host: HostId,
        platform: Platform,
        labels: BTreeMap<String, String>,
    ) -> Result<Response, String> {
        if !self.state.hosts.contains_key(&host) {
            return Err("this host is not known: it left the cluster".to_owned());
        }
        platform.check()?;
        check_labels(&labels)?;
        let traits = HostTraits {
            platform,
            own_labels: labels,
            labels: self.state.traits(host).labels,
        };
        self.put_traits(host, traits);
        Ok(Response::Done)
    }

    fn put_traits(&mut self, host: HostId, traits: HostTraits) {
        if self.state.put_traits(host, traits) {
            self.changed_hosts.insert(host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, NOW, id};
    use super::*;
    use crate::message::ToAgent;
    use crate::request::Request;

    fn label(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn labels_reach_everybody_and_outlive_the_manager_but_not_the_host() {
        let (mut bench, _, _) = Bench::new();
        let give = Request::LabelHost {
            host: crate::testing::host_info(id(2), 2, super::super::testing::vtep(2)).name,
            add: label("disk", "ssd"),
            remove: Vec::new(),
        };
        bench.say(
            2,
            crate::message::ToManager::Call {
                id: 1,
                request: give,
            },
        );
        let told = bench.sent.iter().filter(|(_, message)| {
            matches!(message, ToAgent::Hosts { hosts, .. }
                if hosts.iter().any(|view| view.info.id == id(2) && view.traits.labels == label("disk", "ssd")))
        });
        assert_eq!(told.count(), 2);
        let writes = bench.manager.state.take_writes();
        let key = format!("traits/{}", id(2));
        assert!(
            writes
                .iter()
                .any(|write| write.key == key && write.value.is_some())
        );
        bench.manager.forget_host(id(2), NOW);
        let writes = bench.manager.state.take_writes();
        assert!(
            writes
                .iter()
                .any(|write| write.key == key && write.value.is_none())
        );
    }

    #[test]
    fn a_host_speaks_for_itself_within_bounds() {
        let (mut bench, _, _) = Bench::new();
        let manager = &mut bench.manager;
        let name = manager.host_name(id(2));
        manager
            .label_host(&name, label("disk", "ssd"), &[])
            .expect("a label");
        manager
            .take_traits(id(2), Platform::here(), label("disk", "own"))
            .expect("its own");
        let traits = manager.state.traits(id(2));
        assert_eq!(
            (traits.labels, traits.own_labels),
            (label("disk", "ssd"), label("disk", "own")),
            "what operators said stays"
        );
        let long = label("disk", &"x".repeat(100_000));
        assert!(manager.label_host(&name, long.clone(), &[]).is_err());
        assert!(manager.take_traits(id(2), Platform::here(), long).is_err());
        let refused = manager.label_host(&name, BTreeMap::new(), &["none".to_owned()]);
        assert!(refused.is_err_and(|reason| reason.contains("no label \"none\"")));
        let refused = manager.label_host("nobody", BTreeMap::new(), &[]);
        assert!(refused.is_err_and(|reason| reason.contains("no host \"nobody\"")));
        manager
            .label_host(&name, BTreeMap::new(), &["disk".to_owned()])
            .expect("taken away");
        assert!(manager.state.traits(id(2)).labels.is_empty());
    }
}
