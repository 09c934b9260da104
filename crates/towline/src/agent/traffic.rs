//! What passed each port and each remote VTEP, in names that people know.

use std::collections::BTreeMap;

use vtep::fdb::PortId;
use vtep::stats::{DropReason, Reading};

use super::{Agent, Member};
use crate::api::{Passed, PortTraffic, RemoteTraffic};

/// Why a datagram did not leave: what `send_failures` counts.
const SEND_FAILURES: [DropReason; 3] = [
    DropReason::PathTooSmall,
    DropReason::UnderlayFull,
    DropReason::UnderlayFailed,
];

/// The ports of this host, by container and network.
pub(super) fn ports(agent: &Agent, member: &Member) -> Vec<PortTraffic> {
    let tables = member.datapath.tables();
    let mut ports = agent.state.read(|state| {
        let name = |vni| {
            let networks = state.networks.iter();
            networks
                .filter(|network| network.vni == vni)
                .map(|network| network.name.clone())
                .next()
        };
        let records = state.endpoints.iter();
        records
            .filter_map(|record| {
                let reading = tables.port_meter(PortId(record.port))?.read();
                Some(PortTraffic {
                    port: record.port,
                    container: record.container.clone(),
                    network: name(record.vni).unwrap_or_else(|| "-".to_owned()),
                    interface: record.ifname.clone(),
                    frames_in: reading.received,
                    frame_bytes_in: reading.received_bytes,
                    frames_out: reading.sent,
                    frame_bytes_out: reading.sent_bytes,
                    drops: drops(&reading, |_| true),
                })
            })
            .collect::<Vec<_>>()
    });
    ports.sort_by(|a, b| {
        (&a.container, &a.network, a.port).cmp(&(&b.container, &b.network, b.port))
    });
    ports
}

/// The VTEPs that share a network with this host, by address.
pub(super) fn remotes(member: &Member) -> Vec<RemoteTraffic> {
    let tables = member.datapath.tables();
    let names = member.follower.host_names();
    let name = |addr| {
        let mut known = names.iter();
        known
            .find(|(vtep, _)| vtep.ip() == addr)
            .map(|(_, name)| name.clone())
    };
    let mut remotes: Vec<_> = tables
        .remotes()
        .map(|(addr, meter)| {
            let reading = meter.read();
            RemoteTraffic {
                remote: addr,
                host: name(addr),
                datagrams_in: reading.received,
                datagram_bytes_in: reading.received_bytes,
                datagrams_out: reading.sent,
                datagram_bytes_out: reading.sent_bytes,
                drops: drops(&reading, |reason| !SEND_FAILURES.contains(&reason)),
                send_failures: drops(&reading, |reason| SEND_FAILURES.contains(&reason)),
            }
        })
        .collect();
    remotes.sort_by_key(|remote| remote.remote);
    remotes
}

/// A reading as a line of `fdb` has it.
pub(super) fn passed(reading: &Reading) -> Passed {
    Passed {
        received: reading.received,
        sent: reading.sent,
        dropped: reading.drops.total(),
    }
}

/// Reasons that happened.
fn drops(reading: &Reading, wanted: impl Fn(DropReason) -> bool) -> BTreeMap<String, u64> {
    let happened = reading.drops.iter().filter(|&(_, count)| count > 0);
    happened
        .filter(|&(reason, _)| wanted(reason))
        .map(|(reason, count)| (reason.name().to_owned(), count))
        .collect()
}
