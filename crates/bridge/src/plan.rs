//! What exists and what is wanted → the steps between, as data. Nothing here touches the host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::Link;

use crate::{BRIDGE_ALTERNATIVE_NAME, BRIDGE_NAME, BridgeError};

/// What every alias of ours begins with.
const ALIAS: &str = "towline ";
/// The alias of a container's port.
pub(crate) const PORT_ALIAS: &str = "towline gateway port";
const BRIDGE_ALIAS: &str = "towline gateway bridge";

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

/// The host's settings before we changed them. Written into the bridge's alias, so that whoever removes the bridge can put
/// them back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    pub(crate) ipv4_forward: bool,
    pub(crate) ipv6_forward: bool,
    /// Interfaces that took router advertisements only while the host did not forward (`accept_ra` 1, which we set to 2).
    pub(crate) advertised: Vec<String>,
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ipv4, ipv6) = (u8::from(self.ipv4_forward), u8::from(self.ipv6_forward));
        write!(
            f,
            "{BRIDGE_ALIAS}; before: ipv4={ipv4} ipv6={ipv6} ra={}",
            self.advertised.join(",")
        )
    }
}

impl Before {
    /// Reads an alias; `None` when it is none of ours.
    pub(crate) fn parse(alias: &str) -> Option<Self> {
        let mut before = Self {
            ipv4_forward: true,
            ipv6_forward: true,
            advertised: Vec::new(),
        };
        // Without the settings (somebody shortened the alias) nothing is put back.
        for word in alias.strip_prefix(BRIDGE_ALIAS)?.split_whitespace() {
            match word.split_once('=') {
                Some(("ipv4", value)) => before.ipv4_forward = value != "0",
                Some(("ipv6", value)) => before.ipv6_forward = value != "0",
                Some(("ra", names)) => {
                    before.advertised = names
                        .split(',')
                        .filter(|name| !name.is_empty())
                        .map(str::to_owned)
                        .collect();
                }
                _ => {}
            }
        }
        Some(before)
    }
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

/// The interface of the bridge's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Absent,
    /// We ended between making it and signing it: nothing was changed for it yet.
    Unsigned,
    Ours(Before),
}

/// What stands under the bridge's name; an error when it is another's.
pub(crate) fn standing(existing: &Existing) -> Result<Standing, BridgeError> {
    let Some(link) = &existing.bridge else {
        return Ok(Standing::Absent);
    };
    let is_bridge = link.kind.as_deref() == Some("bridge");
    match link.alias.as_deref().map(Before::parse) {
        Some(Some(before)) if is_bridge => Ok(Standing::Ours(before)),
        None if is_bridge && !link.up && existing.addresses.is_empty() => Ok(Standing::Unsigned),
        _ => Err(BridgeError::NotOurs(link.name.clone())),
    }
}

/// Whether an interface is the host's end of a container's link, be it one that we had no time to sign.
pub(crate) fn is_port(link: &Link) -> bool {
    match &link.alias {
        Some(alias) => alias.starts_with(ALIAS),
        None => link.kind.as_deref() == Some("veth") && !link.up && link.master.is_none(),
    }
}

/// The subnet for IPv4: the bridge's, else the one asked for, else the first free one.
pub(crate) fn ipv4_subnet(
    existing: &Existing,
    asked: Option<Ipv4Net>,
) -> Result<Ipv4Net, BridgeError> {
    let standing = existing.addresses.iter().find_map(|net| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    });
    match (standing, asked) {
        (Some(standing), Some(asked)) if standing.trunc() != asked => {
            Err(BridgeError::OtherSubnet {
                standing: standing.into(),
                wanted: asked.into(),
            })
        }
        (Some(standing), _) => Ok(standing.trunc()),
        (None, Some(asked)) => free(existing, asked.into()).map(|()| asked),
        (None, None) => (16..=31)
            .rev()
            .filter_map(|second| Ipv4Net::new(Ipv4Addr::new(172, second, 0, 0), 16).ok())
            .find(|net| free(existing, (*net).into()).is_ok())
            .ok_or(BridgeError::NoFreeSubnet),
    }
}

/// The subnet for IPv6: the bridge's, else the one asked for, else the ULA /64 of 40 random bits (RFC 4193 §3.2).
pub(crate) fn ipv6_subnet(
    existing: &Existing,
    asked: Option<Ipv6Net>,
    random: [u8; 5],
) -> Result<Ipv6Net, BridgeError> {
    let standing = existing.addresses.iter().find_map(|net| match net {
        IpNet::V6(net) if !net.addr().is_unicast_link_local() => Some(*net),
        _ => None,
    });
    match (standing, asked) {
        (Some(standing), Some(asked)) if standing.trunc() != asked => {
            Err(BridgeError::OtherSubnet {
                standing: standing.into(),
                wanted: asked.into(),
            })
        }
        (Some(standing), _) => Ok(standing.trunc()),
        (None, Some(asked)) => free(existing, asked.into()).map(|()| asked),
        (None, None) => {
            let [a, b, c, d, e] = random;
            let words = [
                u16::from_be_bytes([0xfd, a]),
                u16::from_be_bytes([b, c]),
                u16::from_be_bytes([d, e]),
            ];
            let address = Ipv6Addr::new(words[0], words[1], words[2], 0, 0, 0, 0, 0);
            let net = Ipv6Net::new_assert(address, 64);
            free(existing, net.into()).map(|()| net)
        }
    }
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

fn free(existing: &Existing, wanted: IpNet) -> Result<(), BridgeError> {
    let overlaps = |route: &&IpNet| route.contains(&wanted) || wanted.contains(*route);
    match existing.routes.iter().find(overlaps) {
        Some(route) => Err(BridgeError::Overlap {
            wanted,
            route: *route,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts
            .iter()
            .map(|text| text.parse().expect("a prefix"))
            .collect()
    }

    fn wanted() -> Wanted {
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

    fn host(before: &Before) -> Existing {
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
    fn the_default_subnet_is_the_first_free_one_from_the_top() {
        let with = |routes: &[&str]| Existing {
            routes: nets(routes),
            ..Existing::default()
        };
        let chosen = |routes: &[&str]| ipv4_subnet(&with(routes), None).map(|net| net.to_string());
        assert_eq!(chosen(&[]).expect("free"), "172.31.0.0/16");
        assert_eq!(
            chosen(&["172.31.7.0/24", "172.30.0.1/32"]).expect("free"),
            "172.29.0.0/16"
        );
        assert_eq!(chosen(&["172.24.0.0/13"]).expect("free"), "172.23.0.0/16");
        assert!(matches!(
            chosen(&["172.0.0.0/8"]),
            Err(BridgeError::NoFreeSubnet)
        ));
    }

    #[test]
    fn a_subnet_asked_for_must_be_free_and_the_one_that_stands() {
        let asked: Ipv4Net = "10.99.0.0/16".parse().expect("a subnet");
        let busy = Existing {
            routes: nets(&["10.99.4.0/24"]),
            ..Existing::default()
        };
        assert!(matches!(
            ipv4_subnet(&busy, Some(asked)),
            Err(BridgeError::Overlap { .. })
        ));
        let existing = host(&Before::default());
        assert!(matches!(
            ipv4_subnet(&existing, Some(asked)),
            Err(BridgeError::OtherSubnet { .. })
        ));
        assert_eq!(
            ipv4_subnet(&existing, None).expect("it stands"),
            wanted().ipv4
        );
        assert_eq!(
            ipv6_subnet(&existing, None, [9; 5]).expect("it stands"),
            wanted().ipv6,
            "not the link-local one"
        );
    }

    #[test]
    fn the_ipv6_default_is_a_unique_local_subnet() {
        let net =
            ipv6_subnet(&Existing::default(), None, [0x12, 0x34, 0x56, 0x78, 0x9a]).expect("free");
        assert_eq!(net.to_string(), "fd12:3456:789a::/64");
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
    fn the_alias_round_trips_and_strangers_are_not_ours() {
        let before = Before {
            ipv4_forward: true,
            ipv6_forward: false,
            advertised: vec!["eth0".to_owned(), "eth1".to_owned()],
        };
        assert_eq!(Before::parse(&before.to_string()), Some(before.clone()));
        assert_eq!(Before::parse("my bridge"), None);
        let shortened = Before::parse(BRIDGE_ALIAS).expect("still ours");
        assert!(
            shortened.ipv4_forward && shortened.ipv6_forward,
            "nothing to put back"
        );
        let mut existing = host(&before);
        assert_eq!(standing(&existing).expect("ours"), Standing::Ours(before));
        if let Some(link) = &mut existing.bridge {
            link.alias = None;
        }
        assert!(matches!(standing(&existing), Err(BridgeError::NotOurs(_))));
    }

    #[test]
    fn a_bridge_we_had_no_time_to_sign_is_ours() {
        let mut existing = host(&Before::default());
        existing.addresses.clear();
        if let Some(link) = &mut existing.bridge {
            (link.alias, link.up) = (None, false);
        }
        assert_eq!(standing(&existing).expect("ours"), Standing::Unsigned);
        assert_eq!(
            standing(&Existing::default()).expect("nobody's"),
            Standing::Absent
        );
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
