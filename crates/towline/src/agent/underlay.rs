//! Which of this host's addresses is its VTEP, and how large its link's packets are.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context as _, bail};
use netns::{Address, Link, Netlink, Netns, Route};

/// The underlay as this host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Underlay {
    /// The VTEP address.
    pub(super) vtep: IpAddr,
    /// MTU of its link in bytes.
    pub(super) link_mtu: u16,
}

/// What the kernel says of interfaces, addresses and routes.
struct Host {
    links: Vec<Link>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
}

/// Settles the underlay: the address `wanted`, else the one that leads `toward` a
/// manager, else that of the default route's interface, else the only one there is.
///
/// # Errors
/// An address that is not this host's, and a choice that only an operator can make.
pub(super) fn settle(
    netns: &Netns,
    wanted: Option<IpAddr>,
    toward: Option<SocketAddr>,
) -> anyhow::Result<Underlay> {
    let netlink = Netlink::open(netns)?;
    let host = Host {
        links: netlink.links()?,
        addresses: netlink.addresses()?,
        routes: netlink.routes()?,
    };
    let vtep = match (wanted, toward) {
        (Some(wanted), _) => wanted,
        (None, Some(manager)) => source_toward(manager)?,
        (None, None) => host.default_address()?,
    };
    host.underlay(vtep)
}

/// The MTU of the link that has this host's VTEP address now, in bytes.
///
/// # Errors
/// When no interface has the address any more.
pub(super) fn link_mtu(netns: &Netns, vtep: IpAddr) -> anyhow::Result<u16> {
    Ok(settle(netns, Some(vtep), None)?.link_mtu)
}

/// What is to be said of the link, when it is not what this host told the cluster.
pub(super) fn changed(netns: &Netns, vtep: IpAddr, told: u16) -> Option<String> {
    match link_mtu(netns, vtep) {
        Ok(now) if now == told => None,
        Ok(now) => Some(format!(
            "the link of {vtep} takes packets of {now} bytes, {told} when the agent started: restart the agent, so that new networks \
             reckon with it (containers run on); networks that exist keep their MTU, and containers are told of what is too big"
        )),
        Err(error) => Some(format!("the underlay is not as it was: {error:#}")),
    }
}

/// The address that the kernel would send from.
fn source_toward(manager: SocketAddr) -> anyhow::Result<IpAddr> {
    let any: SocketAddr = if manager.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0; 16], 0).into()
    };
    // Connecting a UDP socket sends nothing; it only asks the routing table.
    let socket = UdpSocket::bind(any).context("cannot make a socket")?;
    socket
        .connect(manager)
        .and_then(|()| socket.local_addr())
        .map(|addr| addr.ip())
        .with_context(|| {
            format!(
                "no route to {}: check this host's routes and the address",
                manager.ip()
            )
        })
}

impl Host {
    fn underlay(&self, vtep: IpAddr) -> anyhow::Result<Underlay> {
        if !reachable(vtep) {
            bail!(
                "other hosts cannot reach {vtep}: give this host's underlay address with --advertise"
            );
        }
        let Some(address) = self
            .addresses
            .iter()
            .find(|address| address.net.addr() == vtep)
        else {
            bail!(
                "{vtep} is no address of this host: give one of {} with --advertise",
                self.candidates()
            );
        };
        let link = self.links.iter().find(|link| link.name == address.ifname);
        let link = link.with_context(|| format!("the interface of {vtep} has just gone"))?;
        Ok(Underlay {
            vtep,
            link_mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        })
    }

    fn default_address(&self) -> anyhow::Result<IpAddr> {
        for ipv4 in [true, false] {
            let default = self
                .routes
                .iter()
                .filter(|route| route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4() == ipv4)
                .min_by_key(|route| route.metric.unwrap_or(0));
            let Some(dev) = default.and_then(|route| route.dev.as_deref()) else {
                continue;
            };
            let here: Vec<IpAddr> = self
                .global()
                .filter(|address| address.ifname == dev && address.net.addr().is_ipv4() == ipv4)
                .map(|address| address.net.addr())
                .collect();
            match here[..] {
                [] => {}
                [only] => return Ok(only),
                _ => bail!(
                    "{dev} has several addresses: say which one other hosts reach, with --advertise {}",
                    here.iter()
                        .map(IpAddr::to_string)
                        .collect::<Vec<_>>()
                        .join(" or ")
                ),
            }
        }
        let all: Vec<IpAddr> = self.global().map(|address| address.net.addr()).collect();
        match all[..] {
            [] => bail!(
                "this host has no address that other hosts could reach: give its interface one first"
            ),
            [only] => Ok(only),
            _ => bail!(
                "cannot tell which address other hosts reach: give one of {} with --advertise",
                self.candidates()
            ),
        }
    }

    fn global(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(|address| {
            reachable(address.net.addr()) && address.ifname != bridge::BRIDGE_NAME
        })
    }

    fn candidates(&self) -> String {
        let all: Vec<String> = self
            .global()
            .map(|address| format!("{} ({})", address.net.addr(), address.ifname))
            .collect();
        if all.is_empty() {
            "its addresses (it has none yet)".to_owned()
        } else {
            all.join(", ")
        }
    }
}

/// Whether another host could send to `addr`.
fn reachable(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_broadcast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    !(addr.is_loopback() || addr.is_unspecified() || addr.is_multicast() || link_local)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(addresses: &[(&str, &str)], default: Option<(&str, &str)>) -> Host {
        let addresses: Vec<Address> = addresses
            .iter()
            .map(|(ifname, net)| Address {
                ifname: (*ifname).into(),
                net: net.parse().expect("net"),
            })
            .collect();
        let links = addresses
            .iter()
            .map(|address| Link {
                index: 1,
                name: address.ifname.clone(),
                mtu: if address.ifname == "lo" { 65536 } else { 1500 },
                mac: [0; 6],
                up: true,
                running: true,
                kind: None,
                master: None,
                alias: None,
                vxlan_port: None,
                alternative_names: Vec::new(),
            })
            .collect();
        let routes = default
            .into_iter()
            .map(|(dst, dev)| Route {
                dst: dst.parse().expect("net"),
                via: None,
                dev: Some(dev.into()),
                metric: None,
            })
            .collect();
        Host {
            links,
            addresses,
            routes,
        }
    }

    #[test]
    fn the_default_routes_interface_decides() {
        let host = host(
            &[
                ("lo", "127.0.0.1/8"),
                ("eth0", "192.0.2.1/24"),
                ("eth1", "198.51.100.1/24"),
            ],
            Some(("0.0.0.0/0", "eth1")),
        );
        let vtep: IpAddr = [198, 51, 100, 1].into();
        assert_eq!(host.default_address().expect("address"), vtep);
        assert_eq!(
            host.underlay(vtep).expect("underlay"),
            Underlay {
                vtep,
                link_mtu: 1500
            }
        );
    }

    #[test]
    fn without_a_default_route_the_only_address_is_taken_and_two_are_asked_about() {
        let one = host(
            &[
                ("lo", "127.0.0.1/8"),
                ("eth0", "192.0.2.1/24"),
                ("eth0", "fe80::1/64"),
            ],
            None,
        );
        assert_eq!(
            one.default_address().expect("address"),
            IpAddr::from([192, 0, 2, 1])
        );
        let two = host(
            &[("eth0", "192.0.2.1/24"), ("eth1", "2001:db8::1/64")],
            None,
        );
        let error = two.default_address().expect_err("ambiguous").to_string();
        assert!(
            error.contains("192.0.2.1 (eth0), 2001:db8::1 (eth1)"),
            "{error}"
        );
    }

    #[test]
    fn several_addresses_on_the_interface_are_named() {
        let two = host(
            &[("eth0", "192.0.2.1/24"), ("eth0", "192.0.2.9/24")],
            Some(("0.0.0.0/0", "eth0")),
        );
        let error = two.default_address().expect_err("ambiguous").to_string();
        assert!(error.contains("192.0.2.1 or 192.0.2.9"), "{error}");
    }

    #[test]
    fn addresses_of_nobody_or_nowhere_are_refused() {
        let host = host(&[("lo", "127.0.0.1/8"), ("eth0", "192.0.2.1/24")], None);
        for addr in [
            "192.0.2.9",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "::1",
            "fe80::1",
        ] {
            let error = host
                .underlay(addr.parse().expect("addr"))
                .expect_err(addr)
                .to_string();
            assert!(
                error.contains(addr) && error.contains("--advertise"),
                "{error}"
            );
        }
    }
}
