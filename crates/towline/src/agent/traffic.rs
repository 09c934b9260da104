//! What passed each port and each remote VTEP, in names that people know.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use vtep::fdb::{PortId, Tables};
use vtep::stats::{DropReason, Reading};
use vtep::vxlan::{Family, Protection, overhead};

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
    let (paths, now) = (member.datapath.paths(), Instant::now());
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
                path_mtu: paths
                    .mtu(addr, now)
                    .filter(|&mtu| mtu < needed(&tables, addr)),
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

/// The largest IP packet that any network sends to a member, in bytes.
fn needed(tables: &Tables, addr: IpAddr) -> u16 {
    let overhead = overhead(Family::of(addr), Protection::Cleartext);
    let shared = tables.networks().filter(|network| network.is_member(addr));
    let mtus = shared.map(|network| network.config().mtu.saturating_add(overhead));
    mtus.max().unwrap_or(0)
}

/// What the operator should know of paths that carry less than a network needs.
pub(super) fn narrow_paths(remotes: &[RemoteTraffic]) -> Vec<String> {
    let narrow = remotes
        .iter()
        .filter_map(|remote| Some((remote, remote.path_mtu?)));
    narrow
        .map(|(remote, mtu)| {
            let overhead = overhead(Family::of(remote.remote), Protection::Cleartext);
            let name = remote.host.as_deref().unwrap_or("an unknown host");
            format!(
                "the path to {name} ({}) carries packets of {mtu} bytes, less than a network needs: TCP is cut to fit, all else that is \
                 too big is answered so; create networks with --mtu {} or less, or mend the path",
                remote.remote,
                mtu.saturating_sub(overhead)
            )
        })
        .collect()
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
