//! A host for the gateway bridge: with a way out, and the outside.
//!
//! ```text
//!  container ── host ──────────── router ── outside
//!     eth1      towline_gwbr,     192.0.2.254     198.51.100.1
//!               eth0 192.0.2.1    2001:db8:2::fe  2001:db8:ff::1
//! ```
//! The router has no route to the containers' subnets: without masquerade no answer finds its way back.

use std::time::Duration;

use bridge::{Attachment, Settings};
use ipnet::IpNet;
use netns::{Netlink, Route, sysctl};

use crate::{TestNetns, sh, try_sh, unique, wait_until};

const PREFIX: &str = "tb-";
/// Addresses of the outside.
pub const OUTSIDE: [&str; 2] = ["198.51.100.1", "2001:db8:ff::1"];
/// Settings as an agent has them.
pub const DEFAULTS: Settings = Settings {
    ipv4: None,
    ipv6: None,
    mtu: 1500,
};

/// An empty namespace.
#[must_use]
pub fn netns() -> TestNetns {
    TestNetns::new(unique(PREFIX))
}

/// A prefix.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

/// A host with a way out, and the outside.
pub struct World {
    /// The host, with the addresses 192.0.2.1 and 2001:db8:2::1.
    pub host: TestNetns,
    /// Between the host and the outside.
    pub router: TestNetns,
    /// Behind the router, with the addresses [`OUTSIDE`].
    pub outside: TestNetns,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Makes all of it.
    ///
    /// # Panics
    /// When something can't be made.
    #[must_use]
    pub fn new() -> Self {
        let (host, router, outside) = (netns(), netns(), netns());
        link(
            &host,
            ("eth0", &["192.0.2.1/24", "2001:db8:2::1/64"]),
            &router,
            ("to-host", &["192.0.2.254/24", "2001:db8:2::fe/64"]),
        );
        link(
            &outside,
            ("eth0", &["198.51.100.1/24", "2001:db8:ff::1/64"]),
            &router,
            ("to-out", &["198.51.100.254/24", "2001:db8:ff::fe/64"]),
        );
        default_routes(&host, ["192.0.2.254", "2001:db8:2::fe"]);
        default_routes(&outside, ["198.51.100.254", "2001:db8:ff::fe"]);
        for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            sysctl::set(&router, key, "1").expect("a router forwards");
            // The kernel may hand the root namespace's setting down.
            sysctl::set(&host, key, "0").expect("a host does not");
        }
        // Until then the router asks for no neighbour, nor would the host.
        for netns in [&host, &router, &outside] {
            wait_until(
                "link-local addresses that are checked",
                Duration::from_secs(10),
                || {
                    let seen = sh(netns, "ip -6 addr show scope link");
                    seen.contains("fe80") && !seen.contains("tentative")
                },
            );
        }
        Self {
            host,
            router,
            outside,
        }
    }
}

/// A link between two namespaces, with addresses at both ends.
///
/// # Panics
/// When it can't be made.
pub fn link(one: &TestNetns, near: (&str, &[&str]), other: &TestNetns, far: (&str, &[&str])) {
    let (here, there) = (
        Netlink::open(one).expect("a socket"),
        Netlink::open(other).expect("a socket"),
    );
    here.add_veth(near.0, far.0, other).expect("a veth pair");
    for (netlink, (name, addresses)) in [(&here, near), (&there, far)] {
        for address in addresses {
            netlink.add_address(name, net(address)).expect("an address");
        }
        netlink.set_up(name).expect("up");
    }
}

fn default_routes(netns: &TestNetns, gateways: [&str; 2]) {
    let netlink = Netlink::open(netns).expect("a socket");
    for via in gateways {
        let dst = if via.contains(':') {
            net("::/0")
        } else {
            net("0.0.0.0/0")
        };
        let via = Some(via.parse().expect("an address"));
        netlink
            .add_route(&Route {
                dst,
                via,
                dev: Some("eth0".to_owned()),
                metric: None,
            })
            .expect("a route");
    }
}

/// A container's place on the bridge, as `eth1`.
#[must_use]
pub fn spec(container: &TestNetns, host_ifname: &str) -> Attachment {
    Attachment {
        container: (**container).clone(),
        ifname: "eth1".to_owned(),
        host_ifname: host_ifname.to_owned(),
        addresses: None,
    }
}

/// Whether a ping is answered.
#[must_use]
pub fn reaches(from: &TestNetns, to: &str) -> bool {
    try_sh(from, &format!("ping -n -c 1 -W 1 {to}"))
        .status
        .success()
}

/// Whether all of [`OUTSIDE`] answers.
#[must_use]
pub fn reaches_outside(container: &TestNetns) -> bool {
    OUTSIDE.iter().all(|address| reaches(container, address))
}

/// Waits for it: the kernel tells a bridge up to a second later that a port's carrier is back (`net/core/link_watch.c`).
///
/// # Panics
/// When it does not come.
pub fn gets_outside(container: &TestNetns, when: &str) {
    wait_until(
        &format!("the way to the outside {when}"),
        Duration::from_secs(30),
        || reaches_outside(container),
    );
}

/// All that a gateway could leave behind.
///
/// # Panics
/// When something can't be read.
#[must_use]
pub fn snapshot(host: &TestNetns) -> Vec<String> {
    let mut seen = vec![
        sh(host, "nft list ruleset"),
        sh(host, "ip -o link"),
        sh(host, "ip route"),
        sh(host, "ip -6 route"),
        sh(host, "ip rule"),
        sh(host, "ip -6 rule"),
    ];
    for key in [
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
        "net/ipv6/conf/eth0/accept_ra",
    ] {
        seen.push(sysctl::get(host, key).expect("a setting"));
    }
    // Counters of foreign rules, and states of links that follow traffic, are nobody's leftovers.
    seen.iter().map(|text| without_counters(text)).collect()
}

/// A listing without the counters of rules.
#[must_use]
pub fn without_counters(text: &str) -> String {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    for index in 1..words.len() {
        if ["packets", "bytes"].contains(&words[index - 1]) {
            words[index] = "N";
        }
    }
    words.join(" ")
}
