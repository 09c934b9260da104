//! What exists and what is wanted → the steps between, as data. Nothing here touches the host.

mod ours;
mod subnet;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::Link;

use crate::{BRIDGE_ALTERNATIVE_NAME, BRIDGE_NAME};

pub(crate) use ours::{Before, PORT_ALIAS, Standing, is_port, standing};
pub(crate) use subnet::{ipv4_subnet, ipv6_subnet};

pub(crate) const IPV4_FORWARD: &str = "net/ipv4/ip_forward";
pub(crate) const IPV6_FORWARD: &str = "net/ipv6/conf/all/forwarding";

/// One request to the kernel: it happens whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    AddBridge,
    AddAlternativeName,
    AddVeth {
        host_ifname: String,
        ifname: String,
    },
    SetAlias {
        name: String,
        alias: String,
    },
    SetMac {
        place: Place,
        name: String,
        mac: [u8; 6],
    },
    SetMtu {
        place: Place,
        name: String,
        mtu: u32,
    },
    AddAddress {
        place: Place,
        name: String,
        net: IpNet,
    },
    /// Makes the host's end a port of the bridge.
    Enslave {
        name: String,
    },
    /// No frames to other isolated ports.
    Isolate {
        name: String,
    },
    SetUp {
        place: Place,
        name: String,
    },
    AddDefaultRoute {
        name: String,
        via: IpAddr,
    },
    Sysctl {
        place: Place,
        key: String,
        value: String,
    },
    /// Waits, a second at most, until the port has a carrier.
    AwaitCarrier {
        name: String,
    },
    /// Our nftables table, instead of the one there is.
    Table {
        ipv4: Ipv4Net,
        ipv6: Ipv6Net,
    },
}

/// Which namespace a step acts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Container,
}

/// What stands on the host.
#[derive(Clone, Debug, Default)]
pub(crate) struct Existing {
    pub(crate) bridge: Option<Link>,
    /// The bridge's addresses.
    pub(crate) addresses: Vec<IpNet>,
    /// Destinations of all routes but the bridge's own and the default ones.
    pub(crate) routes: Vec<IpNet>,
    pub(crate) ipv4_forward: bool,
    pub(crate) ipv6_forward: bool,
    /// Interfaces with an IPv6 default route and `accept_ra` 1.
    pub(crate) advertised: Vec<String>,
}

/// What the bridge is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) ipv4: Ipv4Net,
    pub(crate) ipv6: Ipv6Net,
    pub(crate) gateways: (Ipv4Addr, Ipv6Addr),
    pub(crate) mtu: u32,
}

/// The steps to a bridge as wanted; none when all is well.
pub(crate) fn bridge(existing: &Existing, wanted: &Wanted, before: &Before) -> Vec<Step> {
    let host = Place::Host;
    let name = || BRIDGE_NAME.to_owned();
    let link = existing.bridge.as_ref();
    let mac = mac_of(wanted.gateways.0);
    let mut steps = Vec::new();
    if link.is_none() {
        steps.push(Step::AddBridge);
    }
    // First of all who we are and what was before: whatever happens next, it can be undone.
    let alias = before.to_string();
    if link.is_none_or(|link| link.alias.as_ref() != Some(&alias)) {
        steps.push(Step::SetAlias {
            name: name(),
            alias,
        });
    }
    if link.is_none_or(|link| {
        !link
            .alternative_names
            .iter()
            .any(|other| other == BRIDGE_ALTERNATIVE_NAME)
    }) {
        steps.push(Step::AddAlternativeName);
    }
    if link.is_none() {
        // A host may switch IPv6 off for new interfaces, and would then refuse the address below.
        let key = format!("net/ipv6/conf/{BRIDGE_NAME}/disable_ipv6");
        steps.push(Step::Sysctl {
            place: host,
            key,
            value: "0".to_owned(),
        });
    }
    // A bridge without an address of its own takes that of a port, and another one when that port goes.
    if link.is_none_or(|link| link.mac != mac) {
        steps.push(Step::SetMac {
            place: host,
            name: name(),
            mac,
        });
    }
    if link.is_none_or(|link| link.mtu != wanted.mtu) {
        steps.push(Step::SetMtu {
            place: host,
            name: name(),
            mtu: wanted.mtu,
        });
    }
    for net in gateway_nets(wanted) {
        if link.is_none() || !existing.addresses.contains(&net) {
            steps.push(Step::AddAddress {
                place: host,
                name: name(),
                net,
            });
        }
    }
    if link.is_none_or(|link| !link.up) {
        steps.push(Step::SetUp {
            place: host,
            name: name(),
        });
    }
    steps.extend(forwarding(existing));
    steps
}

/// The steps that let the host forward.
fn forwarding(existing: &Existing) -> Vec<Step> {
    let set = |key: String, value: &str| Step::Sysctl {
        place: Place::Host,
        key,
        value: value.to_owned(),
    };
    let mut steps = Vec::new();
    if !existing.ipv4_forward {
        steps.push(set(IPV4_FORWARD.to_owned(), "1"));
    }
    if !existing.ipv6_forward {
        // A forwarding host ignores router advertisements and drops the default route it has from them, unless accept_ra
        // is 2 by then (Linux, Documentation/networking/ip-sysctl.rst).
        steps.extend(
            existing
                .advertised
                .iter()
                .map(|name| set(accept_ra(name), "2")),
        );
        steps.push(set(IPV6_FORWARD.to_owned(), "1"));
    }
    steps
}

pub(crate) fn accept_ra(ifname: &str) -> String {
    format!("net/ipv6/conf/{ifname}/accept_ra")
}

/// A container's place on the bridge.
#[derive(Clone, Debug)]
pub(crate) struct PortPlan<'a> {
    pub(crate) host_ifname: &'a str,
    pub(crate) ifname: &'a str,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
}

/// The steps that give a container its interface. The veth comes first and takes all the rest with it when it goes.
pub(crate) fn port(port: &PortPlan<'_>, wanted: &Wanted) -> Vec<Step> {
    let (host, container) = (Place::Host, Place::Container);
    let outer = || port.host_ifname.to_owned();
    let inner = || port.ifname.to_owned();
    let sysctl = |place, key: String, value: &str| Step::Sysctl {
        place,
        key,
        value: value.to_owned(),
    };
    let (ipv4_len, ipv6_len) = (wanted.ipv4.prefix_len(), wanted.ipv6.prefix_len());
    let mut steps = vec![
        Step::AddVeth {
            host_ifname: outer(),
            ifname: inner(),
        },
        Step::SetAlias {
            name: outer(),
            alias: PORT_ALIAS.to_owned(),
        },
        Step::SetMtu {
            place: host,
            name: outer(),
            mtu: wanted.mtu,
        },
        Step::SetMtu {
            place: container,
            name: inner(),
            mtu: wanted.mtu,
        },
        Step::SetMac {
            place: container,
            name: inner(),
            mac: mac_of(port.ipv4),
        },
        // A port of a bridge needs no address of its own, a container no advice from routers.
        sysctl(
            host,
            format!("net/ipv6/conf/{}/disable_ipv6", port.host_ifname),
            "1",
        ),
        sysctl(container, accept_ra(port.ifname), "0"),
    ];
    steps.extend(join(port.host_ifname));
    for net in [
        IpNet::new_assert(port.ipv4.into(), ipv4_len),
        IpNet::new_assert(port.ipv6.into(), ipv6_len),
    ] {
        steps.push(Step::AddAddress {
            place: container,
            name: inner(),
            net,
        });
    }
    steps.push(Step::SetUp {
        place: container,
        name: inner(),
    });
    for via in [
        IpAddr::from(wanted.gateways.0),
        IpAddr::from(wanted.gateways.1),
    ] {
        steps.push(Step::AddDefaultRoute { name: inner(), via });
    }
    steps.push(Step::AwaitCarrier { name: outer() });
    steps
}

/// The steps that make an interface a port again whose other end stands.
pub(crate) fn rejoin(host_ifname: &str) -> Vec<Step> {
    let mut steps = join(host_ifname);
    steps.push(Step::AwaitCarrier {
        name: host_ifname.to_owned(),
    });
    steps
}

/// The steps that make an interface an isolated port. It comes up last, so that no frame passes before it is isolated.
fn join(host_ifname: &str) -> Vec<Step> {
    let name = || host_ifname.to_owned();
    vec![
        Step::Enslave { name: name() },
        Step::Isolate { name: name() },
        Step::SetUp {
            place: Place::Host,
            name: name(),
        },
    ]
}

/// A locally administered address from an IPv4 one: unique on the bridge, and the same again after a restart.
pub(crate) fn mac_of(ipv4: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ipv4.octets();
    [0x02, 0x74, a, b, c, d]
}

/// The bridge's addresses. A host asks for its neighbours' addresses from its link-local one when it forwards, and the one
/// that the kernel makes comes up to a second after the first port and is then checked for duplicates for another: the
/// first container would have no IPv6 that long.
fn gateway_nets(wanted: &Wanted) -> [IpNet; 3] {
    [
        IpNet::new_assert(wanted.gateways.0.into(), wanted.ipv4.prefix_len()),
        IpNet::new_assert(wanted.gateways.1.into(), wanted.ipv6.prefix_len()),
        IpNet::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into(), 64),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts
            .iter()
            .map(|text| text.parse().expect("a prefix"))
            .collect()
    }

    pub(super) fn wanted() -> Wanted {
        Wanted {
            ipv4: "172.31.0.0/16".parse().expect("a subnet"),
            ipv6: "fd00::/64".parse().expect("a subnet"),
            gateways: (
                "172.31.0.1".parse().expect("an address"),
                "fd00::1".parse().expect("an address"),
            ),
            mtu: 1500,
        }
    }

    pub(super) fn host(before: &Before) -> Existing {
        Existing {
            bridge: Some(Link {
                index: 3,
                name: BRIDGE_NAME.to_owned(),
                mtu: 1500,
                mac: mac_of(wanted().gateways.0),
                up: true,
                running: true,
                kind: Some("bridge".to_owned()),
                master: None,
                alias: Some(before.to_string()),
                alternative_names: vec![BRIDGE_ALTERNATIVE_NAME.to_owned()],
                vxlan_port: None,
            }),
            addresses: nets(&["172.31.0.1/16", "fd00::1/64", "fe80::1/64"]),
            ipv4_forward: true,
            ipv6_forward: true,
            ..Existing::default()
        }
    }

    #[test]
    fn a_bridge_as_wanted_needs_no_step() {
        let before = Before {
            ipv4_forward: true,
            ..Before::default()
        };
        assert_eq!(bridge(&host(&before), &wanted(), &before), []);
    }

    #[test]
    fn only_what_is_missing_is_put_back() {
        let before = Before::default();
        let mut existing = host(&before);
        existing.addresses.retain(|net| net.addr().is_ipv6());
        existing.ipv4_forward = false;
        if let Some(link) = &mut existing.bridge {
            link.up = false;
        }
        let name = BRIDGE_NAME.to_owned();
        let net = "172.31.0.1/16".parse().expect("a prefix");
        assert_eq!(
            bridge(&existing, &wanted(), &before),
            [
                Step::AddAddress {
                    place: Place::Host,
                    name: name.clone(),
                    net
                },
                Step::SetUp {
                    place: Place::Host,
                    name
                },
                Step::Sysctl {
                    place: Place::Host,
                    key: IPV4_FORWARD.to_owned(),
                    value: "1".to_owned()
                },
            ]
        );
    }

    #[test]
    fn what_was_before_is_written_before_it_is_changed() {
        let existing = Existing {
            advertised: vec!["eth0".to_owned()],
            ..Existing::default()
        };
        let before = Before {
            advertised: existing.advertised.clone(),
            ..Before::default()
        };
        let steps = bridge(&existing, &wanted(), &before);
        let at = |wanted: &dyn Fn(&Step) -> bool| {
            steps.iter().position(wanted).expect("the step is there")
        };
        let alias = at(&|step| matches!(step, Step::SetAlias { .. }));
        let accept =
            at(&|step| matches!(step, Step::Sysctl { key, .. } if key.contains("accept_ra")));
        let forward = at(&|step| matches!(step, Step::Sysctl { key, .. } if key == IPV6_FORWARD));
        assert!(alias < accept && accept < forward, "{steps:?}");
    }

    #[test]
    fn a_port_is_isolated_before_it_is_up() {
        let plan = PortPlan {
            host_ifname: "tlg1",
            ifname: "eth1",
            ipv4: "172.31.0.2".parse().expect("an address"),
            ipv6: "fd00::2".parse().expect("an address"),
        };
        let steps = port(&plan, &wanted());
        assert!(
            matches!(steps[0], Step::AddVeth { .. }),
            "all the rest goes with it"
        );
        let at = |wanted: &Step| {
            steps
                .iter()
                .position(|step| step == wanted)
                .expect("the step is there")
        };
        let isolated = at(&Step::Isolate {
            name: "tlg1".to_owned(),
        });
        let up = at(&Step::SetUp {
            place: Place::Host,
            name: "tlg1".to_owned(),
        });
        assert!(isolated < up);
        let last = steps.last();
        assert!(matches!(last, Some(Step::AwaitCarrier { .. })), "{last:?}");
    }
}
