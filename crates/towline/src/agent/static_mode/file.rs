//! The file of static mode: TOML, checked whole before anything is made of it. Pure.
//!
//! One file serves all hosts: each takes out of it what is its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use control::{Addressing, Endpoint, Epoch, HostId, HostInfo, Network, Subnet, allocator, dns_ttl};
use ipnet::IpNet;
use serde::Deserialize;
use vtep::settings::{Dscp, Vlan, WireSettings};
use vtep::vxlan::{DEFAULT_PORT, Family, Protection, overhead};
use vtep::{MacAddr, Vni};

use crate::config::{check_name, read_toml};

/// The interface of a port in a namespace, unless the file names another.
const DEFAULT_INTERFACE: &str = "eth0";
/// The longest name of an interface (IFNAMSIZ - 1).
const INTERFACE_MAX: usize = 15;
/// The least IPv4 MTU that every host takes (RFC 791 §3.2), and that of IPv6 (RFC 8200 §5).
const MTU_MIN: (u16, u16) = (576, 1280);
/// Generation of all epochs: nothing here is ever newer than the file.
const GENERATION: u16 = 1;

/// What a file says, checked, as the host sees it that has read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// All hosts, this one included.
    pub(super) hosts: Vec<HostInfo>,
    /// This host's id.
    pub(super) own: HostId,
    /// All networks.
    pub(super) networks: BTreeMap<Vni, PlannedNetwork>,
}

/// A network and all that is on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedNetwork {
    /// The network.
    pub(super) network: Network,
    /// Its endpoints, on all hosts, in the file's order.
    pub(super) endpoints: Vec<PlannedEndpoint>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedEndpoint {
    /// As the rest of the agent knows it. Its epoch is made of its MAC address: unique in its network.
    pub(super) endpoint: Endpoint,
    /// Which host has it.
    pub(super) host: HostId,
    /// On this host: the namespace and interface to make; none: `towline run` makes the container.
    pub(super) place: Option<Place>,
}

/// A namespace that is somebody else's, and the interface there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The namespace's name.
    pub(super) netns: String,
    /// The interface.
    pub(super) ifname: String,
}

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct File {
    /// Which of the hosts this is; none: the one of the agent's name.
    host: Option<String>,
    hosts: Vec<HostEntry>,
    #[serde(default)]
    networks: Vec<NetworkEntry>,
    #[serde(default)]
    endpoints: Vec<EndpointEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct HostEntry {
    name: String,
    vtep: IpAddr,
    port: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NetworkEntry {
    name: String,
    vni: u32,
    subnets: Vec<IpNet>,
    #[serde(default)]
    gateways: Vec<IpAddr>,
    mtu: Option<u16>,
    flood: Option<bool>,
    vlan: Option<Vlan>,
    dscp: Option<Dscp>,
    ttl: Option<NonZeroU8>,
    udp_checksum: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct EndpointEntry {
    network: String,
    host: String,
    mac: MacAddr,
    ips: Vec<IpAddr>,
    container: Option<String>,
    netns: Option<String>,
    interface: Option<String>,
}

impl File {
    /// Reads a file, which need not make sense yet.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, or has keys that nobody knows: with its line.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        read_toml("static tables", path)
    }

    /// Which host this is, when the agent has this name, and where its VTEP is.
    ///
    /// # Errors
    /// When the file has no such host.
    pub(super) fn own(&self, agent_name: &str) -> anyhow::Result<(&str, SocketAddr)> {
        let name = self.host.as_deref().unwrap_or(agent_name);
        let entry = self.hosts.iter().find(|entry| entry.name == name);
        let entry = entry.with_context(|| {
            format!(
                "no host {}: add it to [[hosts]], or say with 'host' or 'towline agent --name' which of them this is",
                control::quote(name)
            )
        })?;
        Ok((&entry.name, entry.at()))
    }

    /// Makes a plan of it, for the host `own` whose link carries packets of `link_mtu` bytes.
    ///
    /// # Errors
    /// What does not fit, with the entry's name.
    pub(super) fn plan(&self, own: &str, link_mtu: u16) -> anyhow::Result<Plan> {
        let hosts = self.plan_hosts(link_mtu)?;
        let own_vtep = hosts
            .get(own)
            .context("invariant: the host was found")?
            .vtep;
        let mut networks = BTreeMap::new();
        let mut names = HashMap::new();
        for entry in &self.networks {
            let network = entry
                .network(link_mtu, own_vtep)
                .with_context(|| format!("network {}", control::quote(&entry.name)))?;
            let vni = network.vni;
            ensure!(
                names.insert(entry.name.as_str(), vni).is_none(),
                "network {} is there twice: give one of them another name",
                entry.name
            );
            let planned = PlannedNetwork {
                network,
                endpoints: Vec::new(),
            };
            if let Some(other) = networks.insert(vni, planned) {
                bail!(
                    "networks {} and {} both have VNI {vni}: give one of them another",
                    other.network.name,
                    entry.name
                );
            }
        }
        let mut taken = Taken::default();
        for (index, entry) in self.endpoints.iter().enumerate() {
            let planned = names
                .get(entry.network.as_str())
                .and_then(|vni| networks.get_mut(vni));
            let placed = planned
                .with_context(|| format!("no network {}", control::quote(&entry.network)))
                .and_then(|planned| {
                    let host = hosts.get(&entry.host);
                    let host =
                        host.with_context(|| format!("no host {}", control::quote(&entry.host)))?;
                    let is_own = entry.host == own;
                    let endpoint = entry.plan(host.id, is_own, &planned.network, &mut taken)?;
                    planned.endpoints.push(endpoint);
                    Ok(())
                });
            placed.with_context(|| {
                format!(
                    "endpoint {} ({} on {}, host {})",
                    index + 1,
                    entry.mac,
                    control::quote(&entry.network),
                    control::quote(&entry.host)
                )
            })?;
        }
        Ok(Plan {
            hosts: hosts.into_values().collect(),
            own: id(own),
            networks,
        })
    }

    fn plan_hosts(&self, link_mtu: u16) -> anyhow::Result<BTreeMap<String, HostInfo>> {
        let mut hosts = BTreeMap::new();
        let mut vteps = HashSet::new();
        for entry in &self.hosts {
            let HostEntry { name, vtep, port } = entry;
            check_name("host name", name)?;
            ensure!(
                *port != Some(0),
                "host {name}: port 0 is none: leave it out for {DEFAULT_PORT}"
            );
            ensure!(
                vteps.insert(*vtep),
                "host {name}: the VTEP address {vtep} is another host's too: each has its own"
            );
            ensure!(
                self.hosts[0].vtep.is_ipv4() == vtep.is_ipv4(),
                "host {name}: {vtep} is not of the IP version of host {}: all VTEPs have the same",
                self.hosts[0].name
            );
            let info = HostInfo {
                id: id(name),
                name: name.clone(),
                vtep: *vtep,
                port: entry.at().port(),
                link_mtu,
                incarnation: 0,
            };
            ensure!(
                hosts.insert(name.clone(), info).is_none(),
                "host {name} is there twice: give one of them another name"
            );
        }
        Ok(hosts)
    }
}

impl HostEntry {
    fn at(&self) -> SocketAddr {
        SocketAddr::new(self.vtep, self.port.unwrap_or(DEFAULT_PORT))
    }
}

impl NetworkEntry {
    fn network(&self, link_mtu: u16, vtep: IpAddr) -> anyhow::Result<Network> {
        check_name("network name", &self.name)?;
        let vni = Vni::new(self.vni)?;
        let subnets = self.planned_subnets()?;
        let largest = link_mtu.saturating_sub(overhead(Family::of(vtep), Protection::Cleartext));
        let mtu = self.mtu.unwrap_or(largest);
        let has_ipv6 = subnets.iter().any(|subnet| subnet.net.addr().is_ipv6());
        let least = if has_ipv6 { MTU_MIN.1 } else { MTU_MIN.0 };
        ensure!(
            (least..=largest).contains(&mtu),
            "an mtu of {mtu} does not fit: {least} to {largest} bytes do, on this host's link of {link_mtu}"
        );
        let default = WireSettings::default();
        Ok(Network {
            id: format!("static{vni:019}", vni = vni.get()),
            name: self.name.clone(),
            vni,
            subnets,
            gateway_mac: allocator::gateway_mac(vni),
            mtu,
            settings: WireSettings {
                flood: self.flood.unwrap_or(default.flood),
                vlan: self.vlan.unwrap_or(default.vlan),
                dscp: self.dscp.unwrap_or(default.dscp),
                ttl: self.ttl.unwrap_or(default.ttl),
                udp_checksum: self.udp_checksum.unwrap_or(default.udp_checksum),
            },
            addressing: Addressing::default(),
            ingress: false,
            internal: false,
            attachable: true,
            dns_ttl: dns_ttl(),
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
            created: 0,
            epoch: Epoch::new(GENERATION, 0),
        })
    }

    fn planned_subnets(&self) -> anyhow::Result<Vec<Subnet>> {
        ensure!(
            !self.subnets.is_empty(),
            "it has no subnet: give at least one"
        );
        let mut subnets: Vec<Subnet> = Vec::new();
        for &net in &self.subnets {
            ensure!(net == net.trunc(), "subnet {net}: write {}", net.trunc());
            ensure!(
                net.prefix_len() + 2 <= net.max_prefix_len(),
                "subnet {net} has no room for containers"
            );
            let overlapping = subnets.iter().find(|other| {
                other.net.contains(&net.network()) || net.contains(&other.net.network())
            });
            if let Some(other) = overlapping {
                bail!("subnets {} and {net} overlap", other.net);
            }
            subnets.push(Subnet::new(net));
        }
        let mut given = BTreeSet::new();
        for &gateway in &self.gateways {
            let subnet = subnets
                .iter_mut()
                .find(|subnet| subnet.net.contains(&gateway));
            let subnet = subnet.with_context(|| format!("gateway {gateway} is in no subnet"))?;
            ensure!(
                given.insert(subnet.net),
                "subnet {} has two gateways: give one",
                subnet.net
            );
            ensure!(
                gateway == subnet.gateway || subnet.is_assignable(gateway),
                "gateway {gateway} {}",
                subnet.reserved(gateway).unwrap_or_default()
            );
            subnet.gateway = gateway;
        }
        Ok(subnets)
    }
}

/// What endpoints have already.
#[derive(Default)]
struct Taken {
    macs: HashSet<(Vni, MacAddr)>,
    ips: HashSet<(Vni, IpAddr)>,
    containers: HashSet<(Vni, String)>,
    interfaces: HashSet<(String, String)>,
}

impl EndpointEntry {
    fn plan(
        &self,
        host: HostId,
        is_own: bool,
        network: &Network,
        taken: &mut Taken,
    ) -> anyhow::Result<PlannedEndpoint> {
        let (vni, mac) = (network.vni, self.mac);
        ensure!(
            !mac.is_multicast() && !mac.is_zero(),
            "{mac} is no unicast MAC address"
        );
        ensure!(
            mac != network.gateway_mac,
            "{mac} is the gateway's MAC address"
        );
        ensure!(
            taken.macs.insert((vni, mac)),
            "another endpoint of the network has this MAC address"
        );
        ensure!(
            !self.ips.is_empty(),
            "it has no address: give 'ips' at least one"
        );
        for family in [true, false] {
            let count = self.ips.iter().filter(|ip| ip.is_ipv4() == family).count();
            ensure!(
                count <= 1,
                "it has several addresses of one IP version: give one"
            );
        }
        for &ip in &self.ips {
            let subnet = network
                .subnets
                .iter()
                .find(|subnet| subnet.net.contains(&ip));
            let subnet = subnet.with_context(|| format!("{ip} is in no subnet of the network"))?;
            if let Some(reason) = subnet.reserved(ip) {
                bail!("{ip} {reason}");
            }
            ensure!(
                taken.ips.insert((vni, ip)),
                "another endpoint of the network has {ip}"
            );
        }
        let name = match (&self.container, &self.netns) {
            (Some(name), None) | (None, Some(name)) => {
                check_name("name", name)?;
                name.clone()
            }
            (Some(_), Some(_)) => bail!("it has both 'container' and 'netns': give one"),
            (None, None) if is_own => {
                bail!(
                    "it is this host's: say with 'container' or 'netns' where its interface is to be"
                )
            }
            (None, None) => mac.to_string(),
        };
        let ifname = self.interface.as_deref().unwrap_or(DEFAULT_INTERFACE);
        check_interface(ifname)?;
        ensure!(
            self.interface.is_none() || self.container.is_none(),
            "interfaces of a container have the names that 'towline run' gives: leave 'interface' out"
        );
        let place = match &self.netns {
            Some(netns) if is_own => {
                ensure!(
                    taken.interfaces.insert((netns.clone(), ifname.to_owned())),
                    "another endpoint is interface {ifname} of the namespace {netns} already: give one of them 'interface'"
                );
                Some(Place {
                    netns: netns.clone(),
                    ifname: ifname.to_owned(),
                })
            }
            _ => None,
        };
        if is_own && place.is_none() {
            ensure!(
                taken.containers.insert((vni, name.clone())),
                "container {name} is on this network already"
            );
        }
        Ok(PlannedEndpoint {
            endpoint: Endpoint {
                vni,
                container: name,
                mac,
                ips: self.ips.clone(),
                epoch: epoch(mac),
                member: None,
                names: None,
            },
            host,
            place,
        })
    }
}

fn check_interface(name: &str) -> anyhow::Result<()> {
    let allowed = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    ensure!(
        (1..=INTERFACE_MAX).contains(&name.len())
            && name.chars().all(allowed)
            && name != "."
            && name != "..",
        "interface {} does not do: 1 to {INTERFACE_MAX} letters, digits or other signs, no '/', ':' or space",
        control::quote(name)
    );
    Ok(())
}

/// Names are unique in a file, and ids only have to tell hosts apart: the name's digest does.
fn id(name: &str) -> HostId {
    HostId::of_name(name)
}

/// An endpoint is its MAC address here: 48 bits, as a counter has.
fn epoch(mac: MacAddr) -> Epoch {
    let [a, b, c, d, e, f] = mac.octets();
    Epoch::new(GENERATION, u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
}

#[cfg(test)]
mod tests;
