//! The gateway as its user sees it: made or adopted, joined, looked after, removed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::nftables::Snapshot;
use netns::{Link, NetfilterSocket, Netlink, Netns, sysctl};
use serde::Serialize;

use crate::addresses::{self, Pool};
use crate::apply::Site;
use crate::foreign::{self, Foreign};
use crate::plan::{self, Before, Existing, PortPlan, Standing, Step, Wanted};
use crate::publish::HostPort;
use crate::ruleset::Needs;
use crate::{BRIDGE_NAME, BridgeError, BridgeErrors, INGRESS_NAME, nat};

/// What the operator may choose. `None` lets [`Gateway::ensure`] choose.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Default: the first /16 of 172.16.0.0/12, from the top, that no route of the host overlaps.
    pub ipv4: Option<Ipv4Net>,
    /// Default: a unique local /64 of random bits (RFC 4193).
    pub ipv6: Option<Ipv6Net>,
    /// Bytes of the largest packet; that of the host's link to the outside.
    pub mtu: u32,
}

/// One container to be joined.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Its namespace.
    pub container: Netns,
    /// The interface it gets there: `eth1`, or `eth0` where it has no other.
    pub ifname: String,
    /// The other end, on the host; at most 15 bytes.
    pub host_ifname: String,
    /// The addresses it had before, to have again. `None` takes the next free ones.
    pub addresses: Option<(Ipv4Addr, Ipv6Addr)>,
}

/// What a joined container has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its IPv4 address on the gateway bridge.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address there.
    pub ipv6: Ipv6Addr,
    /// Its Ethernet address there.
    pub mac: [u8; 6],
}

/// How the gateway does.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The bridge's name.
    pub bridge: &'static str,
    /// Whether it stands and is up.
    pub up: bool,
    /// Its IPv4 subnet; the first address is the gateway's.
    pub ipv4: Ipv4Net,
    /// Its IPv6 subnet; the first address is the gateway's.
    pub ipv6: Ipv6Net,
    /// How many containers are joined.
    pub attached: usize,
    /// Foreign tables that drop forwarded packets, and whether ours pass.
    pub foreign: Vec<Foreign>,
}

impl Status {
    /// What keeps containers from the outside, each with what to do: one line each.
    pub fn problems(&self) -> impl Iterator<Item = &str> {
        self.foreign
            .iter()
            .filter_map(|foreign| foreign.problem.as_deref())
    }
}

/// What [`Gateway::repair`] did, in words for the log. Empty when all was well.
#[derive(Clone, Debug, Default)]
pub struct Repair {
    /// What was gone and stands again.
    pub put_back: Vec<String>,
}

/// The gateway bridge of one host.
#[derive(Debug)]
pub struct Gateway {
    pub(crate) host: Netns,
    wanted: Wanted,
    before: Before,
    pool: Pool,
    /// The joined containers' addresses by the host's end of their link.
    pub(crate) ports: BTreeMap<String, (Ipv4Addr, Ipv6Addr)>,
    /// The ports of this host that lead to them, by the same name.
    pub(crate) published: BTreeMap<String, Vec<HostPort>>,
    /// Our table as the kernel showed it when it was new.
    pub(crate) table: Option<Snapshot>,
    /// The number of the kernel's rulesets, and what had to pass, when all was well.
    settled: Option<(u32, Needs)>,
}

impl Gateway {
    /// Makes the gateway bridge, or adopts the one that stands there with its addresses. One that has another subnet than the one
    /// asked for, and no containers, is made anew. A second time is harmless.
    ///
    /// # Errors
    /// Without root or nf_tables, when the bridge's name is taken by another's interface, or no subnet can be used: the host is
    /// as before then, but for a bridge that was to be made anew.
    pub fn ensure(host: &Netns, settings: &Settings) -> Result<Self, BridgeError> {
        match Self::stand(host, settings) {
            Err(BridgeError::OtherSubnet { .. }) if !has_ports(&Netlink::open(host)?)? => {
                tracing::info!("{BRIDGE_NAME} gets another subnet");
                if let Err(mut errors) = Self::remove(host)
                    && let Some(error) = errors.0.pop()
                {
                    return Err(error);
                }
                Self::stand(host, settings)
            }
            stood => stood,
        }
    }

    fn stand(host: &Netns, settings: &Settings) -> Result<Self, BridgeError> {
        let table = nat::own(&mut NetfilterSocket::open(host)?)?;
        let netlink = Netlink::open(host)?;
        let existing = look(&netlink)?;
        let standing = plan::standing(&existing)?;
        let ipv4 = plan::ipv4_subnet(&existing, settings.ipv4)?;
        let ipv6 = plan::ipv6_subnet(
            &existing,
            settings.ipv6,
            random().map_err(BridgeError::Random)?,
        )?;
        addresses::check(ipv4, ipv6)?;
        let pool = Pool::new(ipv4, ipv6);
        let wanted = Wanted {
            ipv4,
            ipv6,
            gateways: pool.gateways(),
            mtu: settings.mtu,
        };
        let before = match standing {
            Standing::Ours(before) => before,
            Standing::Absent | Standing::Unsigned => Before {
                ipv4_forward: existing.ipv4_forward,
                ipv6_forward: existing.ipv6_forward,
                advertised: existing.advertised.clone(),
            },
        };
        let mut steps = plan::bridge(&existing, &wanted, &before);
        if table.is_none() {
            steps.push(Step::Table { ipv4, ipv6 });
        }
        Site {
            host: &netlink,
            container: None,
        }
        .apply(&steps)?;
        let mut gateway = Self {
            host: host.clone(),
            wanted,
            before,
            pool,
            ports: BTreeMap::new(),
            published: BTreeMap::new(),
            table: None,
            settled: None,
        };
        // The bridge stands; what is still amiss is told, and mended by the next repair.
        if let Err(error) = gateway.settle(table.is_some()) {
            tracing::warn!("{error}");
        }
        Ok(gateway)
    }

    /// The subnets, IPv4 and IPv6.
    pub fn networks(&self) -> (Ipv4Net, Ipv6Net) {
        self.pool.subnets()
    }

    /// The bridge's own addresses: the first of each subnet, and the containers' way out.
    pub fn gateways(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.pool.gateways()
    }

    /// Gives a container its interface: addresses, default routes, no way to other containers.
    ///
    /// # Errors
    /// When its addresses are taken or none is left, a name is taken on either side, or the kernel refuses. Nothing of it
    /// is left then.
    pub fn attach(&mut self, spec: &Attachment) -> Result<Attached, BridgeError> {
        let netlink = Netlink::open(&self.host)?;
        let addresses = self.addresses(spec)?;
        let made = self.make(&netlink, spec, addresses);
        self.note(spec, addresses, made)
    }

    /// Takes a container back that was joined before, after a restart of the agent. What is missing is made again.
    ///
    /// # Errors
    /// As [`Self::attach`], and when an interface of its name is not ours.
    pub fn adopt(&mut self, spec: &Attachment) -> Result<Attached, BridgeError> {
        let netlink = Netlink::open(&self.host)?;
        let link = own_link(&netlink, &spec.host_ifname)?;
        let addresses = self.addresses(spec)?;
        let made = match link {
            Some(_) if is_complete(spec, addresses)? => Site {
                host: &netlink,
                container: None,
            }
            .apply(&plan::rejoin(&spec.host_ifname)),
            Some(_) => {
                netlink.delete_link(&spec.host_ifname)?;
                self.make(&netlink, spec, addresses)
            }
            None => self.make(&netlink, spec, addresses),
        };
        self.note(spec, addresses, made)
    }

    /// Takes a container's interface and its published ports away. An absent one is fine.
    ///
    /// # Errors
    /// When the interface is not ours, or the kernel refuses.
    pub fn detach(&mut self, host_ifname: &str) -> Result<(), BridgeError> {
        self.unpublish(host_ifname)?;
        let netlink = Netlink::open(&self.host)?;
        if own_link(&netlink, host_ifname)?.is_some() {
            netlink.delete_link(host_ifname)?;
        }
        if let Some((ipv4, _)) = self.ports.remove(host_ifname) {
            self.pool.release(ipv4);
        }
        Ok(())
    }

    /// How it does. Changes nothing.
    ///
    /// # Errors
    /// When the host's links or filters cannot be read.
    pub fn status(&self) -> Result<Status, BridgeError> {
        let netlink = Netlink::open(&self.host)?;
        let links = netlink.links()?;
        let bridge = links.iter().find(|link| link.name == BRIDGE_NAME);
        let attached = bridge.map_or(0, |bridge| {
            links
                .iter()
                .filter(|link| link.master == Some(bridge.index))
                .count()
        });
        let (ipv4, ipv6) = self.pool.subnets();
        Ok(Status {
            bridge: BRIDGE_NAME,
            up: bridge.is_some_and(|bridge| bridge.up),
            ipv4,
            ipv6,
            attached,
            foreign: foreign::survey(
                &self.host,
                &foreign::ruleset(&self.host)?,
                self.needs(&netlink)?,
            )?,
        })
    }

    /// Puts back what others took away: the bridge with its addresses and ports, forwarding, our table, our accepts in
    /// Docker's chain. Meant to be called every few seconds; foreign rules are read only after some rule changed.
    ///
    /// # Errors
    /// When something cannot be read or put back. What was put back before stays.
    pub fn repair(&mut self) -> Result<Repair, BridgeError> {
        let mut repair = Repair::default();
        let netlink = Netlink::open(&self.host)?;
        let site = Site {
            host: &netlink,
            container: None,
        };
        let existing = look(&netlink)?;
        plan::standing(&existing)?;
        let steps = plan::bridge(&existing, &self.wanted, &self.before);
        if !steps.is_empty() {
            site.apply(&steps)?;
            repair
                .put_back
                .push(format!("{BRIDGE_NAME} ({} settings)", steps.len()));
        }
        let links = netlink.links()?;
        let bridge = links
            .iter()
            .find(|link| link.name == BRIDGE_NAME)
            .map(|link| link.index);
        for link in links
            .iter()
            .filter(|link| self.ports.contains_key(&link.name))
        {
            if link.master != bridge || !link.up {
                site.apply(&plan::rejoin(&link.name))?;
                repair
                    .put_back
                    .push(format!("{} as a port of {BRIDGE_NAME}", link.name));
            }
        }
        if !self.published.is_empty() {
            self.open_localhost()?;
        }
        let mut socket = NetfilterSocket::open(&self.host)?;
        let now = (socket.generation()?, self.needs(&netlink)?);
        let changed = self.settled != Some(now);
        if changed && nat::own(&mut socket)? != self.table {
            nat::apply(&self.host, self.networks(), &self.leads())?;
            self.table = nat::own(&mut socket)?;
            repair
                .put_back
                .push(format!("the nftables table inet {}", nat::TABLE));
        }
        // iptables-legacy is not part of the kernel's number, and is looked at each time.
        let ruleset = match changed {
            true => foreign::ruleset(&self.host)?,
            false => foreign::Ruleset::default(),
        };
        repair
            .put_back
            .extend(foreign::put_back(&self.host, &ruleset, now.1)?);
        // Had anybody changed something meanwhile, the number would be another at the next repair.
        self.settled = repair.put_back.is_empty().then_some(now);
        Ok(repair)
    }

    /// Leaves the host as it was: our rules, our table, the containers' links, the bridge, and the settings it found. A
    /// second time is harmless, and so is a host that never had a gateway.
    ///
    /// # Errors
    /// All that could not be undone; everything else is.
    pub fn remove(host: &Netns) -> Result<(), BridgeErrors> {
        let mut errors = Vec::new();
        let docker = foreign::remove(host, &mut errors);
        errors.extend(nat::remove(host).err());
        match Netlink::open(host)
            .map_err(BridgeError::from)
            .and_then(|netlink| {
                let existing = look(&netlink)?;
                Ok((netlink, existing))
            }) {
            Ok((netlink, existing)) => remove_links(&netlink, &existing, docker, &mut errors),
            Err(error) => errors.push(error),
        }
        BridgeErrors::none_or(errors)
    }

    /// The part of making a gateway that may fail without harm.
    fn settle(&mut self, replace_table: bool) -> Result<(), BridgeError> {
        if replace_table {
            // An older version may have made it.
            nat::adopt(&self.host, self.networks())?;
        }
        self.table = nat::own(&mut NetfilterSocket::open(&self.host)?)?;
        let mut ruleset = foreign::ruleset(&self.host)?;
        let needs = self.needs(&Netlink::open(&self.host)?)?;
        for done in foreign::put_back(&self.host, &ruleset, needs)? {
            tracing::info!("added {done}");
            ruleset = foreign::ruleset(&self.host)?;
        }
        for problem in foreign::survey(&self.host, &ruleset, needs)?
            .into_iter()
            .filter_map(|foreign| foreign.problem)
        {
            tracing::warn!("{problem}");
        }
        Ok(())
    }

    fn needs(&self, netlink: &Netlink) -> Result<Needs, BridgeError> {
        Ok(Needs {
            published: !self.published.is_empty(),
            ingress: netlink.link(INGRESS_NAME)?.is_some(),
        })
    }

    fn addresses(&mut self, spec: &Attachment) -> Result<(Ipv4Addr, Ipv6Addr), BridgeError> {
        match (spec.addresses, self.ports.get(&spec.host_ifname)) {
            // Adopted twice, the same place.
            (Some(asked), Some(held)) if asked == *held => Ok(asked),
            (Some(asked), _) => self.pool.reserve(&spec.host_ifname, asked).map(|()| asked),
            (None, _) => self.pool.allocate(),
        }
    }

    fn make(
        &self,
        host: &Netlink,
        spec: &Attachment,
        (ipv4, ipv6): (Ipv4Addr, Ipv6Addr),
    ) -> Result<(), BridgeError> {
        let container = Netlink::open(&spec.container)?;
        let port = PortPlan {
            host_ifname: &spec.host_ifname,
            ifname: &spec.ifname,
            ipv4,
            ipv6,
        };
        Site {
            host,
            container: Some(&container),
        }
        .apply(&plan::port(&port, &self.wanted))
    }

    /// Remembers a port that was made, or forgets the addresses of one that was not.
    fn note(
        &mut self,
        spec: &Attachment,
        (ipv4, ipv6): (Ipv4Addr, Ipv6Addr),
        made: Result<(), BridgeError>,
    ) -> Result<Attached, BridgeError> {
        let held = self.ports.get(&spec.host_ifname) == Some(&(ipv4, ipv6));
        if let Err(error) = made {
            if !held {
                self.pool.release(ipv4);
            }
            return Err(error);
        }
        self.ports.insert(spec.host_ifname.clone(), (ipv4, ipv6));
        Ok(Attached {
            ipv4,
            ipv6,
            mac: plan::mac_of(ipv4),
        })
    }
}

fn remove_links(
    netlink: &Netlink,
    existing: &Existing,
    docker: bool,
    errors: &mut Vec<BridgeError>,
) {
    let before = match plan::standing(existing) {
        Ok(Standing::Ours(before)) => Some(before),
        Ok(Standing::Unsigned) => None,
        // Nothing to remove, and another's is not touched.
        Ok(Standing::Absent) | Err(_) => return,
    };
    match netlink.links() {
        Ok(links) => {
            for port in links
                .iter()
                .filter(|link| link.alias.as_deref() == Some(plan::PORT_ALIAS))
            {
                errors.extend(netlink.delete_link(&port.name).err().map(BridgeError::from));
            }
        }
        Err(error) => errors.push(error.into()),
    }
    // The settings first: once the bridge is gone, so is what they were.
    let host = netlink.netns();
    let mut back = Vec::new();
    // Docker, where it came after us, found forwarding on and would not set it again.
    if let Some(before) = before.filter(|_| !docker) {
        if !before.ipv4_forward {
            back.push((plan::IPV4_FORWARD.to_owned(), "0"));
        }
        if !before.ipv6_forward {
            back.push((plan::IPV6_FORWARD.to_owned(), "0"));
            back.extend(
                before
                    .advertised
                    .iter()
                    .map(|name| (plan::accept_ra(name), "1")),
            );
        }
    }
    for (key, value) in back {
        // An interface that has gone since has no setting to put back.
        if sysctl::get(host, &key).is_ok() {
            errors.extend(sysctl::set(host, &key, value).err().map(BridgeError::from));
        }
    }
    errors.extend(
        netlink
            .delete_link(BRIDGE_NAME)
            .err()
            .map(BridgeError::from),
    );
}

/// Whether any container is joined.
fn has_ports(netlink: &Netlink) -> Result<bool, BridgeError> {
    let links = netlink.links()?;
    let bridge = links.iter().find(|link| link.name == BRIDGE_NAME);
    Ok(bridge.is_some_and(|bridge| {
        let mut ports = links.iter();
        ports.any(|link| link.master == Some(bridge.index))
    }))
}

/// What stands on the host.
fn look(netlink: &Netlink) -> Result<Existing, BridgeError> {
    let host = netlink.netns();
    let on = |key: &str| Ok::<bool, BridgeError>(sysctl::get(host, key)? != "0");
    let bridge = netlink.link(BRIDGE_NAME)?;
    let addresses = netlink
        .addresses()?
        .into_iter()
        .filter(|address| address.ifname == BRIDGE_NAME);
    let routes = netlink.routes()?;
    let mut advertised: Vec<String> = routes
        .iter()
        .filter(|route| matches!(route.dst, IpNet::V6(net) if net.prefix_len() == 0))
        .filter_map(|route| route.dev.clone())
        .filter(|name| sysctl::get(host, &plan::accept_ra(name)).is_ok_and(|value| value == "1"))
        .collect();
    advertised.sort_unstable();
    advertised.dedup();
    Ok(Existing {
        bridge,
        addresses: addresses.map(|address| address.net).collect(),
        routes: routes
            .into_iter()
            .filter(|route| route.dst.prefix_len() > 0 && route.dev.as_deref() != Some(BRIDGE_NAME))
            .map(|route| route.dst)
            .collect(),
        ipv4_forward: on(plan::IPV4_FORWARD)?,
        ipv6_forward: on(plan::IPV6_FORWARD)?,
        advertised,
    })
}

/// A container's link of that name; an error when it is another's.
fn own_link(netlink: &Netlink, name: &str) -> Result<Option<Link>, BridgeError> {
    match netlink.link(name)? {
        Some(link) if plan::is_port(&link) => Ok(Some(link)),
        Some(link) => Err(BridgeError::NotOurs(link.name)),
        None => Ok(None),
    }
}

/// Whether the container's side was finished: its default routes are what comes last.
fn is_complete(spec: &Attachment, (ipv4, ipv6): (Ipv4Addr, Ipv6Addr)) -> Result<bool, BridgeError> {
    let container = Netlink::open(&spec.container)?;
    let addresses = container.addresses()?;
    let routes = container.routes()?;
    Ok([IpAddr::from(ipv4), IpAddr::from(ipv6)]
        .into_iter()
        .all(|own| {
            addresses
                .iter()
                .any(|address| address.ifname == spec.ifname && address.net.addr() == own)
                && routes.iter().any(|route| {
                    route.dst.prefix_len() == 0
                        && route.dst.addr().is_ipv4() == own.is_ipv4()
                        && route.dev.as_ref() == Some(&spec.ifname)
                })
        }))
}

fn random() -> std::io::Result<[u8; 5]> {
    let mut bytes = [0; 5];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
