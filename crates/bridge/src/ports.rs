//! Ports of this host that lead to joined containers: opened, closed, and found again after a restart.
//!
//! Containers of this host reach them by any address of the host but localhost. Not where bridged packets pass through
//! netfilter (`bridge-nf-call-iptables`, which belongs to whoever loaded `br_netfilter`): what is led to a container is then
//! handed from port to port of the bridge, and those are isolated from each other.
//!
//! A connection to 127.0.0.1 is led there, too. Its packets leave with that source until they get the bridge's address, and
//! the answers are for 127.0.0.1 again once they are translated back, which needs `route_localnet` on the bridge; what
//! containers send to 127/8 themselves is dropped before (`nat.rs`). ::1 is left alone: where bridged packets pass through
//! netfilter (`bridge-nf-call-ip6tables`), answers are translated back while still on the bridge, and the kernel drops
//! what comes in for ::1 before any rule could save it. A program that asks for `localhost` goes on to 127.0.0.1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netns::conntrack::Filter;
use netns::nftables::Protocol;
use netns::{NetfilterSocket, Netlink, sysctl};

use crate::publish::{HostPort, Leads, On, leads};
use crate::{BRIDGE_NAME, BridgeError, Gateway, nat};

impl Gateway {
    /// Opens ports of this host that lead to a joined container, all of them or none, besides those it has. One that it
    /// has already is fine.
    ///
    /// # Errors
    /// When a port leads to another container, is to be open on ::1, the container is not joined, or the kernel refuses.
    pub fn publish(&mut self, host_ifname: &str, ports: &[HostPort]) -> Result<(), BridgeError> {
        let addresses = *self
            .ports
            .get(host_ifname)
            .ok_or_else(|| BridgeError::NotAttached(host_ifname.to_owned()))?;
        let held = self.published.get(host_ifname).cloned().unwrap_or_default();
        let mut all = held.clone();
        for port in ports {
            if !all.contains(port) {
                self.check_free(host_ifname, port, &all)?;
                all.push(port.clone());
            }
        }
        let added = &all[held.len()..];
        if added.is_empty() {
            return Ok(());
        }
        self.open_localhost()?;
        let elements: Vec<Leads> = added
            .iter()
            .flat_map(|port| leads(port, addresses))
            .collect();
        match nat::change(&self.host, &elements, &[]) {
            // After a restart, an element may stand there that leads elsewhere: all are replaced by those known.
            Err(BridgeError::Netfilter(_)) => {
                let mut known = self.leads();
                known.extend(elements);
                nat::replace(&self.host, &known)?;
            }
            done => done?,
        }
        let mut socket = NetfilterSocket::open(&self.host)?;
        forget_untranslated(&Netlink::open(&self.host)?, &mut socket, added)?;
        self.published.insert(host_ifname.to_owned(), all);
        self.table = nat::own(&mut socket)?;
        Ok(())
    }

    /// Closes the ports of a container, and forgets their connections. None is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unpublish(&mut self, host_ifname: &str) -> Result<(), BridgeError> {
        let ports = self.published.get(host_ifname).cloned();
        self.close(host_ifname, &ports.unwrap_or_default())
    }

    /// Closes these ports of a container, and forgets their connections. One that it has not is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn close(&mut self, host_ifname: &str, ports: &[HostPort]) -> Result<(), BridgeError> {
        let (Some(held), Some(addresses)) = (
            self.published.get(host_ifname).cloned(),
            self.ports.get(host_ifname).copied(),
        ) else {
            return Ok(());
        };
        let (ports, kept): (Vec<HostPort>, Vec<HostPort>) =
            held.into_iter().partition(|port| ports.contains(port));
        if ports.is_empty() {
            return Ok(());
        }
        self.lead_no_more(&ports, addresses)?;
        if kept.is_empty() {
            self.published.remove(host_ifname);
        } else {
            self.published.insert(host_ifname.to_owned(), kept);
        }
        let mut socket = NetfilterSocket::open(&self.host)?;
        for port in &ports {
            for address in [addresses.0.into(), addresses.1.into()] {
                let led = Filter::new()
                    .protocol(port.protocol)
                    .original_destination_port(port.published)
                    .reply_source(address)
                    .reply_source_port(port.target);
                socket.delete_connections(&led)?;
            }
        }
        self.table = nat::own(&mut socket)?;
        Ok(())
    }

    /// Takes no new connections by these ports of a container, which has them until they are closed: those that stand go on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn drain(&mut self, host_ifname: &str, ports: &[HostPort]) -> Result<(), BridgeError> {
        let Some(addresses) = self.ports.get(host_ifname).copied() else {
            return Ok(());
        };
        self.lead_no_more(ports, addresses)?;
        self.table = nat::own(&mut NetfilterSocket::open(&self.host)?)?;
        Ok(())
    }

    fn lead_no_more(
        &self,
        ports: &[HostPort],
        addresses: (Ipv4Addr, Ipv6Addr),
    ) -> Result<(), BridgeError> {
        let elements: Vec<Leads> = ports
            .iter()
            .flat_map(|port| leads(port, addresses))
            .collect();
        match nat::change(&self.host, &[], &elements) {
            // Somebody took one away: what is left is written anew.
            Err(BridgeError::Netfilter(error)) if error.is_absent() => {
                let kept = self.leads();
                let kept: Vec<Leads> = kept
                    .into_iter()
                    .filter(|leads| !elements.contains(leads))
                    .collect();
                nat::apply(&self.host, self.networks(), &kept)
            }
            done => done,
        }
    }

    /// Closes every port that was published before a restart and not since: to be called once all containers that still
    /// run have been adopted and their ports published again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn keep_published(&mut self) -> Result<(), BridgeError> {
        nat::replace(&self.host, &self.leads())?;
        self.table = nat::own(&mut NetfilterSocket::open(&self.host)?)?;
        Ok(())
    }

    /// The published ports, each with the host's end of the link of the container that it leads to.
    pub fn published(&self) -> impl Iterator<Item = (&str, &HostPort)> {
        self.published
            .iter()
            .flat_map(|(name, ports)| ports.iter().map(|port| (name.as_str(), port)))
    }

    /// What all published ports are in our maps.
    pub(crate) fn leads(&self) -> Vec<Leads> {
        self.published()
            .filter_map(|(name, port)| Some(leads(port, *self.ports.get(name)?)))
            .flatten()
            .collect()
    }

    fn check_free(
        &self,
        host_ifname: &str,
        port: &HostPort,
        own: &[HostPort],
    ) -> Result<(), BridgeError> {
        if port.on == Some(On::Address(IpAddr::V6(Ipv6Addr::LOCALHOST))) {
            return Err(BridgeError::Localhost(port.to_string()));
        }
        let others = self.published().filter(|(name, _)| *name != host_ifname);
        let own = own.iter().map(|port| (host_ifname, port));
        match others.chain(own).find(|(_, other)| port.collides(other)) {
            Some((holder, _)) => Err(BridgeError::PortTaken {
                port: port.to_string(),
                holder: holder.to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Lets connections of this host's localhost pass by the bridge.
    pub(crate) fn open_localhost(&self) -> Result<(), BridgeError> {
        let key = format!("net/ipv4/conf/{BRIDGE_NAME}/route_localnet");
        if sysctl::get(&self.host, &key)? != "1" {
            sysctl::set(&self.host, &key, "1")?;
        }
        Ok(())
    }
}

/// Whoever sent to a port of UDP before it led anywhere is remembered as somebody that nothing is translated for, and would
/// be as long as it goes on sending.
fn forget_untranslated(
    netlink: &Netlink,
    socket: &mut NetfilterSocket,
    ports: &[HostPort],
) -> Result<(), BridgeError> {
    let mut own = Vec::new();
    for port in ports {
        if port.protocol != Protocol::Udp {
            continue;
        }
        if own.is_empty() {
            own = netlink.addresses()?;
        }
        for address in &own {
            let address = address.net.addr();
            let answered_here = Filter::new()
                .protocol(Protocol::Udp)
                .original_destination(address)
                .original_destination_port(port.published)
                .reply_source(address);
            socket.delete_connections(&answered_here)?;
        }
    }
    Ok(())
}
