//! What the datapath itself holds of a network, to be compared with what the manager's rows say.

use std::collections::BTreeSet;
use std::net::IpAddr;

use control::installed::{Entry, Verified};
use control::{Inspection, Request, Response};
use vtep::Vni;
use vtep::fdb::{Location, Tables};

use super::network::unexpected;
use super::{Agent, Member};

/// Answers a manager's question, as soon as rules for services are read back too.
pub(super) fn report(member: &Member, inspection: Inspection) {
    let installed = entries(
        &member.datapath.tables(),
        inspection.vni,
        member.settled.vtep,
    );
    member.services.inspect(inspection, installed);
}

/// Has the manager ask every host.
///
/// # Errors
/// When the network is unknown or no manager answers.
pub(super) fn verify(agent: &Agent, network: Option<String>) -> anyhow::Result<Vec<Verified>> {
    match agent.member()?.control.request(Request::Verify(network))? {
        Response::Verified(found) => Ok(found),
        _ => Err(unexpected()),
    }
}

fn entries(tables: &Tables, vni: Vni, own: IpAddr) -> BTreeSet<Entry> {
    let Some(network) = tables.network(vni) else {
        return BTreeSet::new();
    };
    let macs = network.entries().map(|(mac, location)| Entry::Mac {
        mac,
        vtep: match location {
            Location::Local(_) => own,
            Location::Remote(remote) => remote.ip(),
        },
    });
    let neighbors = network.neighbors();
    let neighbors = neighbors.map(|(ip, mac)| Entry::Neighbor { ip, mac });
    let members = network.members().map(|(vtep, flood)| Entry::Member {
        vtep: vtep.ip(),
        flood,
    });
    macs.chain(neighbors).chain(members).collect()
}
