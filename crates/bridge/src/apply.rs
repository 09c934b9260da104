//! Runs a plan's steps in order. When one fails, those before it are taken back, the last first.
//!
//! A step is one request to the kernel, so the one that failed has done nothing.

use std::thread;
use std::time::{Duration, Instant};

use netns::{Netlink, Route, sysctl};

use crate::nat;
use crate::plan::{Place, Step};
use crate::{BRIDGE_ALTERNATIVE_NAME, BRIDGE_NAME, BridgeError};

/// How long a port's carrier is waited for, and how often it is asked for meanwhile.
const CARRIER_LIMIT: Duration = Duration::from_secs(1);
const CARRIER_PAUSE: Duration = Duration::from_millis(1);

/// Where steps act.
pub(crate) struct Site<'a> {
    pub(crate) host: &'a Netlink,
    /// The container's namespace, where the plan is for one.
    pub(crate) container: Option<&'a Netlink>,
}

/// How a step that is done is taken back.
enum Undo {
    DeleteLink(String),
    DeleteAddress(Place, String, ipnet::IpNet),
    Sysctl(Place, String, String),
    DeleteTable,
}

impl Site<'_> {
    /// Runs all steps, or none in effect.
    pub(crate) fn apply(&self, steps: &[Step]) -> Result<(), BridgeError> {
        let mut undo = Vec::new();
        for step in steps {
            match self.run(step) {
                Ok(back) => undo.extend(back),
                Err(error) => {
                    for back in undo.into_iter().rev() {
                        if let Err(second) = self.take_back(back) {
                            tracing::warn!("while undoing after \"{error}\": {second}");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn run(&self, step: &Step) -> Result<Option<Undo>, BridgeError> {
        match step {
            Step::AddBridge => {
                self.host.add_bridge(BRIDGE_NAME)?;
                return Ok(Some(Undo::DeleteLink(BRIDGE_NAME.to_owned())));
            }
            Step::AddVeth {
                host_ifname,
                ifname,
            } => {
                self.host
                    .add_veth(host_ifname, ifname, self.at(Place::Container).netns())?;
                return Ok(Some(Undo::DeleteLink(host_ifname.clone())));
            }
            Step::AddAddress { place, name, net } => {
                self.at(*place).add_address(name, *net)?;
                return Ok(Some(Undo::DeleteAddress(*place, name.clone(), *net)));
            }
            Step::Sysctl { place, key, value } => {
                let netns = self.at(*place).netns();
                let old = sysctl::get(netns, key)?;
                if old != *value {
                    sysctl::set(netns, key, value)?;
                    return Ok(Some(Undo::Sysctl(*place, key.clone(), old)));
                }
            }
            Step::Table { ipv4, ipv6 } => {
                nat::apply(self.host.netns(), (*ipv4, *ipv6), &[])?;
                return Ok(Some(Undo::DeleteTable));
            }
            // What follows changes a link that an earlier step made, or makes one that stood already what it should be.
            Step::AddAlternativeName => self
                .host
                .add_alternative_name(BRIDGE_NAME, BRIDGE_ALTERNATIVE_NAME)?,
            Step::SetAlias { name, alias } => self.host.set_alias(name, alias)?,
            Step::SetMac { place, name, mac } => self.at(*place).set_mac(name, *mac)?,
            Step::SetMtu { place, name, mtu } => self.at(*place).set_mtu(name, *mtu)?,
            Step::Enslave { name } => self.host.set_master(name, Some(BRIDGE_NAME))?,
            Step::Isolate { name } => self.host.set_bridge_port_isolated(name, true)?,
            Step::AwaitCarrier { name } => self.await_carrier(name)?,
            Step::SetUp { place, name } => self.at(*place).set_up(name)?,
            Step::AddDefaultRoute { name, via } => {
                let any = if via.is_ipv4() {
                    ipnet::IpNet::V4(<_>::default())
                } else {
                    ipnet::IpNet::V6(<_>::default())
                };
                let route = Route {
                    dst: any,
                    via: Some(*via),
                    dev: Some(name.clone()),
                    metric: None,
                };
                self.at(Place::Container).add_route(&route)?;
            }
        }
        Ok(None)
    }

    /// The bridge forwards nothing to a port before it hears of its carrier, and the host sends nothing by the bridge before
    /// that has one itself. The kernel tells both by a worker of its own: a container that speaks first would lose a frame
    /// and wait a second for the next. A port that never gets a carrier (its owner set it down) is no error.
    fn await_carrier(&self, name: &str) -> Result<(), BridgeError> {
        let deadline = Instant::now() + CARRIER_LIMIT;
        for awaited in [name, BRIDGE_NAME] {
            while self.host.link(awaited)?.is_some_and(|link| !link.running)
                && Instant::now() < deadline
            {
                thread::sleep(CARRIER_PAUSE);
            }
        }
        Ok(())
    }

    fn take_back(&self, undo: Undo) -> Result<(), BridgeError> {
        match undo {
            Undo::DeleteLink(name) => self.host.delete_link(&name).map(drop)?,
            Undo::DeleteAddress(place, name, net) => self.at(place).del_address(&name, net)?,
            Undo::Sysctl(place, key, value) => sysctl::set(self.at(place).netns(), &key, &value)?,
            Undo::DeleteTable => nat::remove(self.host.netns())?,
        }
        Ok(())
    }

    fn at(&self, place: Place) -> &Netlink {
        match place {
            Place::Host => self.host,
            Place::Container => self
                .container
                .expect("plans for containers are applied with their namespace"),
        }
    }
}
