//! Published ports: which one a service gets that named none, and who has the one that it named.

use std::collections::BTreeSet;

use super::Manager;
use crate::epoch::Epoch;
use crate::service::{AUTO_PORTS, Protocol, Publish, PublishMode, Service};

impl Manager {
    /// The published ports with a number for each that the ingress mesh carries, the same as `before` where that had one. Ports of mode
    /// host that name none get theirs on their host.
    pub(super) fn choose_ports(
        &self,
        wanted: &[Publish],
        before: Option<&Service>,
    ) -> Result<Vec<Publish>, String> {
        self.check_ports(wanted, before.map(|service| service.epoch))?;
        let others = self.state.services.values();
        let others =
            others.filter(|other| Some(other.epoch) != before.map(|service| service.epoch));
        let taken = others
            .flat_map(|service| &service.spec.publish)
            .chain(wanted);
        let mut taken: BTreeSet<(Protocol, u16)> = taken
            .filter_map(|publish| Some((publish.protocol, publish.published?)))
            .collect();
        let mut chosen = Vec::with_capacity(wanted.len());
        for publish in wanted {
            let mut publish = publish.clone();
            if publish.published.is_none() && publish.mode == PublishMode::Ingress {
                let protocol = publish.protocol;
                let free = |port: &u16| !taken.contains(&(protocol, *port));
                let kept = before.into_iter().flat_map(|service| &service.spec.publish);
                let kept = kept.filter(|old| same_but_number(old, &publish));
                let port = kept
                    .filter_map(|old| old.published)
                    .find(free)
                    .or_else(|| AUTO_PORTS.clone().find(free))
                    .ok_or_else(|| {
                        format!(
                            "every {protocol} port from {} to {} is published: name another with published=",
                            AUTO_PORTS.start(),
                            AUTO_PORTS.end()
                        )
                    })?;
                taken.insert((protocol, port));
                publish.published = Some(port);
            }
            chosen.push(publish);
        }
        Ok(chosen)
    }

    /// Whether no other service has one of these ports. Two may have one in mode host: their members are told apart by their hosts.
    pub(super) fn check_ports(&self, wanted: &[Publish], own: Option<Epoch>) -> Result<(), String> {
        for service in self.state.services.values() {
            if Some(service.epoch) == own {
                continue;
            }
            for held in &service.spec.publish {
                let Some(port) = held.published else {
                    continue;
                };
                let clash = wanted.iter().any(|publish| {
                    (publish.published, publish.protocol) == (Some(port), held.protocol)
                        && (publish.mode, held.mode) != (PublishMode::Host, PublishMode::Host)
                });
                if clash {
                    let how = match held.mode {
                        PublishMode::Ingress => "an ingress port",
                        PublishMode::Host => "a host-published port",
                    };
                    return Err(format!(
                        "port '{port}' is already in use by service '{}' ({}) as {how}",
                        service.spec.name, service.id
                    ));
                }
            }
        }
        Ok(())
    }
}

fn same_but_number(one: &Publish, other: &Publish) -> bool {
    (one.target, one.protocol, one.mode, &one.on)
        == (other.target, other.protocol, other.mode, &other.on)
}
