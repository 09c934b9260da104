//! What the datapath's tables say, in names that people know.

use std::collections::HashMap;
use std::net::IpAddr;

use vtep::MacAddr;
use vtep::fdb::Location;

use super::{Agent, network, traffic};
use crate::api::FdbEntry;

/// All entries of this host, or those of one network, by VNI and MAC.
pub(super) fn list(agent: &Agent, only: Option<&str>) -> anyhow::Result<Vec<FdbEntry>> {
    let member = agent.member()?;
    let only = only
        .map(|name| network::known(agent, name))
        .transpose()?
        .map(|network| network.vni);
    let names = member.follower.host_names();
    let (networks, containers): (HashMap<_, _>, HashMap<_, _>) = agent.state.read(|state| {
        (
            state
                .networks
                .iter()
                .map(|network| (network.vni, network.name.clone()))
                .collect(),
            state
                .endpoints
                .iter()
                .map(|endpoint| (endpoint.port, endpoint.container.clone()))
                .collect(),
        )
    });
    let tables = member.datapath.tables();
    let mut entries = Vec::new();
    for table in tables.networks() {
        let config = table.config();
        if only.is_some_and(|vni| vni != config.vni) {
            continue;
        }
        let mut ips: HashMap<MacAddr, Vec<IpAddr>> = HashMap::new();
        for (ip, mac) in table.neighbors() {
            ips.entry(mac).or_default().push(ip);
        }
        let mut entry = |mac: MacAddr, kind: &str| {
            let mut ips = ips.remove(&mac).unwrap_or_default();
            ips.sort_unstable();
            FdbEntry {
                network: networks
                    .get(&config.vni)
                    .cloned()
                    .unwrap_or_else(|| "-".to_owned()),
                vni: config.vni.get(),
                mac: mac.to_string(),
                kind: kind.to_owned(),
                ips,
                remote: None,
                host: None,
                container: None,
                traffic: None,
            }
        };
        entries.push(FdbEntry {
            ips: config.gateway_ips.clone(),
            ..entry(config.gateway_mac, "gateway")
        });
        for (mac, location) in table.entries() {
            entries.push(match location {
                Location::Local(port) => FdbEntry {
                    container: containers.get(&port.0).cloned(),
                    ips: tables
                        .port(port)
                        .map(|port| port.ips.clone())
                        .unwrap_or_default(),
                    traffic: tables
                        .port_meter(port)
                        .map(|meter| traffic::passed(&meter.read())),
                    ..entry(mac, "local")
                },
                Location::Remote(remote) => FdbEntry {
                    remote: Some(remote.to_string()),
                    host: names.get(&remote).cloned(),
                    traffic: tables
                        .remote_meter(remote.ip())
                        .map(|meter| traffic::passed(&meter.read())),
                    ..entry(mac, "remote")
                },
            });
        }
    }
    entries.sort_by(|a, b| (a.vni, &a.mac).cmp(&(b.vni, &b.mac)));
    Ok(entries)
}
