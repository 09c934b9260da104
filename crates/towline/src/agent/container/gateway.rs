//! A container's place on the gateway bridge, its way to the outside: there while one of its networks leads there.
//!
//! A container that was started without a network has it for itself. One that is on internal networks alone has neither this place
//! nor a default route; ports of this host that it asked for are kept and open once it has one.

use anyhow::bail;
use control::Network;
use ipnet::IpNet;
use netns::{Netlink, Netns};

use super::{Agent, host_interface, publish};
use crate::agent::Member;
use crate::agent::state::{AttachmentRecord, Standing, State};
use crate::shim::folder::Spec;

/// Names that are tried for an interface.
const ETHERNETS_MAX: usize = 4096;

/// Gives the container its place, or takes it away, as its networks say. What is as it should be is left alone.
///
/// # Errors
/// What the gateway bridge refused; ports that are another's by now.
pub(super) fn settle(
    agent: &Agent,
    member: &Member,
    netns: &Netns,
    spec: &Spec,
) -> anyhow::Result<()> {
    let (wanted, has) = agent.state.read(|state| {
        let mut attachments = state.attachments.iter();
        let has = attachments.any(|attachment| attachment.container == spec.name);
        (is_wanted(state, &spec.name), has)
    });
    match (wanted, has) {
        (true, true) => Ok(()),
        (true, false) => attach(agent, member, netns, spec),
        (false, _) => detach(agent, member, spec),
    }
}

fn is_wanted(state: &State, container: &str) -> bool {
    let mut attachments = state.attachments.iter();
    let own = attachments
        .find(|attachment| attachment.container == container)
        .map(|attachment| attachment.own);
    let mut records = state
        .endpoints
        .iter()
        .filter(|record| record.container == container)
        .peekable();
    if own == Some(true) || (own.is_some() && records.peek().is_none()) {
        return true;
    }
    records.any(|record| {
        let mut networks = state.networks.iter();
        let network = networks.find(|network| network.vni == record.vni);
        record.standing != Standing::Going && network.is_some_and(leads_outside)
    })
}

/// Whether containers on this network have a way to the outside. The network of published ports leads from clients to members, and
/// nowhere else.
pub(super) fn leads_outside(network: &Network) -> bool {
    !network.internal && !network.ingress
}

/// Refuses a network that a container could not tell from its way to the outside.
///
/// # Errors
/// When a subnet overlaps the gateway bridge's on this host.
pub(super) fn check_subnets(member: &Member, network: &Network) -> anyhow::Result<()> {
    let (ipv4, ipv6) = member.gateway().networks();
    for gateway in [IpNet::from(ipv4), IpNet::from(ipv6)] {
        let mut subnets = network.subnets.iter().map(|subnet| subnet.net);
        if let Some(subnet) = subnets.find(|subnet| {
            subnet.contains(&gateway.network()) || gateway.contains(&subnet.network())
        }) {
            bail!(
                "the network {} has the subnet {subnet}, which overlaps this host's gateway bridge ({gateway}): \
                 give the agent another --gwbridge-subnet, or make the network with another subnet",
                network.name
            );
        }
    }
    Ok(())
}

/// Gives the container its place, on the first name that is free there.
///
/// # Errors
/// As [`settle`]; with ports that could not be opened the place stands.
pub(super) fn attach(
    agent: &Agent,
    member: &Member,
    netns: &Netns,
    spec: &Spec,
) -> anyhow::Result<()> {
    let host_ifname = host_interface(spec);
    // What an agent left that was killed before it wrote so down.
    member.gateway().detach(&host_ifname)?;
    let ifname = free_ethernet(agent, netns, &spec.name)?;
    let attached = member.gateway().attach(&bridge::Attachment {
        container: netns.clone(),
        ifname: ifname.clone(),
        host_ifname: host_ifname.clone(),
        addresses: None,
    })?;
    let closed = agent.state.update(|state| {
        let mut records = state.endpoints.iter();
        let own = !records.any(|record| record.container == spec.name);
        state.attachments.push(AttachmentRecord {
            container: spec.name.clone(),
            ifname,
            host_ifname: host_ifname.clone(),
            addresses: (attached.ipv4, attached.ipv6),
            publish: Vec::new(),
            own,
        });
        state.closed_ports.get(&spec.name).cloned()
    })?;
    Netlink::open(&agent.netns)?
        .set_alias(&host_ifname, &format!("towline container {}", spec.name))?;
    publish::open(agent, member, &spec.name, &closed.unwrap_or_default(), &[])?;
    Ok(())
}

/// Takes the container's place away, with its default route. Its ports are closed and kept. None is fine.
///
/// # Errors
/// What the gateway bridge refused.
pub(super) fn detach(agent: &Agent, member: &Member, spec: &Spec) -> anyhow::Result<()> {
    member.gateway().detach(&host_interface(spec))?;
    let any = agent.state.read(|state| {
        let mut attachments = state.attachments.iter();
        attachments.any(|attachment| attachment.container == spec.name)
    });
    if !any {
        return Ok(());
    }
    agent.state.update(|state| {
        let (gone, kept) = std::mem::take(&mut state.attachments)
            .into_iter()
            .partition(|attachment| attachment.container == spec.name);
        state.attachments = kept;
        let gone: Vec<AttachmentRecord> = gone;
        let ports: Vec<_> = gone.into_iter().flat_map(|gone| gone.publish).collect();
        if !ports.is_empty() {
            state.closed_ports.insert(spec.name.clone(), ports);
        }
    })?;
    // A service may have its port here now.
    member.services.host_changed();
    Ok(())
}

/// Takes the container's place away for good.
///
/// # Errors
/// As [`detach`].
pub(super) fn release(agent: &Agent, member: &Member, spec: &Spec) -> anyhow::Result<()> {
    detach(agent, member, spec)?;
    let kept = agent.state.read(|state| {
        let of_service = state.service_ports.contains_key(&spec.name);
        of_service || state.closed_ports.contains_key(&spec.name)
    });
    if kept {
        agent.state.update(|state| {
            state.closed_ports.remove(&spec.name);
            state.service_ports.remove(&spec.name);
        })?;
    }
    Ok(())
}

/// The first of `eth0`, `eth1` … that neither stands in the container nor is about to.
///
/// # Errors
/// When its interfaces can't be listed, or all names are taken.
pub(super) fn free_ethernet(
    agent: &Agent,
    netns: &Netns,
    container: &str,
) -> anyhow::Result<String> {
    let links = Netlink::open(netns)?.links()?;
    let mut taken: Vec<String> = links.into_iter().map(|link| link.name).collect();
    agent.state.read(|state| {
        let endpoints = state.endpoints.iter();
        let attachments = state.attachments.iter();
        let of_endpoints = endpoints.map(|record| (&record.container, &record.ifname));
        let of_attachments = attachments.map(|record| (&record.container, &record.ifname));
        let own = of_endpoints
            .chain(of_attachments)
            .filter(|(owner, _)| *owner == container);
        taken.extend(own.map(|(_, ifname)| ifname.clone()));
    });
    let names = (0..ETHERNETS_MAX).map(|number| format!("eth{number}"));
    first_free(names, &taken).ok_or_else(|| {
        anyhow::anyhow!(
            "container {container} has no name free for an interface: eth0 to eth{} are taken",
            ETHERNETS_MAX - 1
        )
    })
}

fn first_free(mut names: impl Iterator<Item = String>, taken: &[String]) -> Option<String> {
    names.find(|name| !taken.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::state::tests::state_with;

    #[test]
    fn the_first_name_that_is_free_is_taken() {
        let names = || (0..3).map(|number| format!("eth{number}"));
        let taken = |texts: &[&str]| {
            texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            first_free(names(), &taken(&["lo"])).as_deref(),
            Some("eth0")
        );
        assert_eq!(
            first_free(names(), &taken(&["eth2", "eth0"])).as_deref(),
            Some("eth1")
        );
        assert_eq!(first_free(names(), &taken(&["eth0", "eth1", "eth2"])), None);
    }

    #[test]
    fn a_container_has_a_way_out_while_one_of_its_networks_leads_there() {
        let (outward, inward, ingress) = (1, 2, 3);
        let whole = Standing::Whole;
        for (places, attached, wanted) in [
            (&[][..], None, false),
            (&[], Some(false), true),
            (&[(outward, whole)], None, true),
            (&[(inward, whole)], None, false),
            (&[(inward, whole)], Some(true), true),
            (&[(inward, whole)], Some(false), false),
            (&[(inward, whole), (ingress, whole)], None, false),
            (&[(inward, whole), (outward, whole)], None, true),
            (&[(inward, whole), (outward, Standing::Coming)], None, true),
            (
                &[(inward, whole), (outward, Standing::Going)],
                Some(false),
                false,
            ),
            (&[(outward, Standing::Going)], Some(false), false),
            (&[(outward, Standing::Going)], Some(true), true),
        ] {
            let state = state_with(places, attached);
            assert_eq!(is_wanted(&state, "c1"), wanted, "{places:?} {attached:?}");
        }
    }
}
