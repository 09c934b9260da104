//! The gateway bridge on a whole host: out through a router, nothing between containers, next to other people's filters.
//!
//! ```text
//!  container ── host ──────────── router ── outside
//!     eth1      towline_gwbr,     192.0.2.254     198.51.100.1
//!               eth0 192.0.2.1    2001:db8:2::fe  2001:db8:ff::1
//! ```
//! The router has no route to the containers' subnets: without masquerade no answer finds its way back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bridge::{
    Attached, Attachment, BRIDGE_ALTERNATIVE_NAME, BRIDGE_NAME, BridgeError, Gateway, HostPort,
    INGRESS_NAME, On, Settings, State,
};
use ipnet::IpNet;
use netns::conntrack::Filter;
use netns::nftables::Protocol;
use netns::{NetfilterSocket, Netlink, Netns, Route, sysctl};
use towline_tests::{TestNetns, sh, try_sh, unique, wait_until};

const PREFIX: &str = "tb-";
const OUTSIDE: [&str; 2] = ["198.51.100.1", "2001:db8:ff::1"];
const DEFAULTS: Settings = Settings {
    ipv4: None,
    ipv6: None,
    mtu: 1500,
};

fn netns() -> TestNetns {
    TestNetns::new(unique(PREFIX))
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

/// A host with a way out, and the outside.
struct World {
    host: TestNetns,
    // Both live as long as the test.
    _router: TestNetns,
    _outside: TestNetns,
}

impl World {
    fn new() -> Self {
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
            _router: router,
            _outside: outside,
        }
    }
}

fn link(one: &TestNetns, near: (&str, &[&str]), other: &TestNetns, far: (&str, &[&str])) {
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

fn spec(container: &TestNetns, host_ifname: &str) -> Attachment {
    Attachment {
        container: (**container).clone(),
        ifname: "eth1".to_owned(),
        host_ifname: host_ifname.to_owned(),
        addresses: None,
    }
}

fn reaches(from: &TestNetns, to: &str) -> bool {
    try_sh(from, &format!("ping -n -c 1 -W 1 {to}"))
        .status
        .success()
}

fn reaches_outside(container: &TestNetns) -> bool {
    OUTSIDE.iter().all(|address| reaches(container, address))
}

/// Waits for it: the kernel tells a bridge up to a second later that a port's carrier is back (`net/core/link_watch.c`).
fn gets_outside(container: &TestNetns, when: &str) {
    wait_until(
        &format!("the way to the outside {when}"),
        Duration::from_secs(30),
        || reaches_outside(container),
    );
}

/// All that a gateway could leave behind.
fn snapshot(host: &TestNetns) -> Vec<String> {
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

fn without_counters(text: &str) -> String {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    for index in 1..words.len() {
        if ["packets", "bytes"].contains(&words[index - 1]) {
            words[index] = "N";
        }
    }
    words.join(" ")
}

#[test]
fn containers_reach_the_outside_and_not_each_other() {
    let world = World::new();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    assert_eq!(gateway.networks().0.to_string(), "172.31.0.0/16");
    assert_eq!(gateway.gateways().0, Ipv4Addr::new(172, 31, 0, 1));
    let (one, other) = (netns(), netns());
    let first = gateway.attach(&spec(&one, "tb1")).expect("attached");
    let second = gateway.attach(&spec(&other, "tb2")).expect("attached");
    assert_eq!(first.ipv4, Ipv4Addr::new(172, 31, 0, 2));
    assert_eq!(second.ipv4, Ipv4Addr::new(172, 31, 0, 3));

    for container in [&one, &other] {
        gets_outside(container, "of a container");
        assert!(reaches(container, &gateway.gateways().0.to_string()));
        assert!(reaches(container, &gateway.gateways().1.to_string()));
        assert!(
            sh(container, "ip -6 addr show dev eth1 scope global")
                .lines()
                .all(|line| !line.contains("tentative"))
        );
    }
    // On the link, and by way of the host, which would route it back.
    for to in [second.ipv4.to_string(), second.ipv6.to_string()] {
        assert!(!reaches(&one, &to), "on the link, to {to}");
    }
    let netlink = Netlink::open(&one).expect("a socket");
    for (to, via) in [
        (IpAddr::from(second.ipv4), gateway.gateways().0.into()),
        (IpAddr::from(second.ipv6), gateway.gateways().1.into()),
    ] {
        let route = Route {
            dst: IpNet::from(to),
            via: Some(via),
            dev: Some("eth1".to_owned()),
            metric: None,
        };
        netlink
            .add_route(&route)
            .expect("a route by way of the host");
        assert!(
            !reaches(&one, &to.to_string()),
            "by way of the host, to {to}"
        );
    }
    assert!(sh(&world.host, "bridge -d link show dev tb1").contains("isolated on"));
    assert!(
        sh(
            &world.host,
            &format!("ip link show {BRIDGE_ALTERNATIVE_NAME}")
        )
        .contains(BRIDGE_NAME)
    );

    let status = gateway.status().expect("a status");
    assert_eq!(
        (status.up, status.attached, status.foreign.len()),
        (true, 2, 0)
    );
    assert_eq!(status.problems().count(), 0);
}

#[test]
fn bridged_traffic_that_passes_through_iptables_changes_nothing() {
    let world = World::new();
    for key in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        sysctl::set(&world.host, &format!("net/bridge/{key}"), "1")
            .expect("this kernel has br_netfilter");
    }
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let (one, other) = (netns(), netns());
    gateway.attach(&spec(&one, "tb1")).expect("attached");
    let second = gateway.attach(&spec(&other, "tb2")).expect("attached");
    gets_outside(&one, "of a container");
    assert!(!reaches(&one, &second.ipv4.to_string()));
}

#[test]
fn outsiders_reach_no_container_and_containers_send_as_nobody_else() {
    let world = World::new();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let container = netns();
    let attached = gateway.attach(&spec(&container, "tb1")).expect("attached");
    let router = Netlink::open(&world._router).expect("a socket");
    for (subnet, via) in [
        ("172.31.0.0/16", "192.0.2.1"),
        ("fd00::/8", "2001:db8:2::1"),
    ] {
        let via = Some(via.parse().expect("an address"));
        router
            .add_route(&Route {
                dst: net(subnet),
                via,
                dev: Some("to-host".to_owned()),
                metric: None,
            })
            .expect("a route");
    }
    assert!(!reaches(&world._router, &attached.ipv4.to_string()));
    assert!(!reaches(&world._router, &attached.ipv6.to_string()));
    // The router has a way back to this one, so only our filter can stop it.
    Netlink::open(&container)
        .expect("a socket")
        .add_address("eth1", net("172.30.0.9/32"))
        .expect("an address");
    let back = Route {
        dst: net("172.30.0.9/32"),
        via: Some([192, 0, 2, 1].into()),
        dev: Some("to-host".to_owned()),
        metric: None,
    };
    router.add_route(&back).expect("a route");
    let host = Netlink::open(&world.host).expect("a socket");
    host.add_route(&Route {
        dst: net("172.30.0.9/32"),
        via: None,
        dev: Some(BRIDGE_NAME.to_owned()),
        metric: None,
    })
    .expect("a route");
    assert!(
        !try_sh(&container, "ping -n -c 1 -W 1 -I 172.30.0.9 192.0.2.254")
            .status
            .success()
    );
    gets_outside(&container, "as itself");
}

#[test]
fn a_second_ensure_adopts_what_stands_and_remove_leaves_nothing() {
    let world = World::new();
    let before = snapshot(&world.host);
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let networks = gateway.networks();
    let attached = gateway.attach(&spec(&container, "tb1")).expect("attached");
    drop(gateway);

    // As after a restart of the agent.
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("adopted");
    assert_eq!(gateway.networks(), networks, "also the random one");
    let mut again = spec(&container, "tb1");
    again.addresses = Some((attached.ipv4, attached.ipv6));
    assert_eq!(gateway.adopt(&again).expect("it stands"), attached);
    assert_eq!(gateway.adopt(&again).expect("twice is fine"), attached);
    let other = netns();
    assert_ne!(
        gateway.attach(&spec(&other, "tb2")).expect("attached").ipv4,
        attached.ipv4,
        "no address twice"
    );
    gets_outside(&container, "of a container");
    assert!(
        gateway
            .repair()
            .expect("nothing is amiss")
            .put_back
            .is_empty()
    );

    // One whose link is gone gets it again, with its addresses.
    Netlink::open(&world.host)
        .expect("a socket")
        .delete_link("tb1")
        .expect("removed");
    assert_eq!(gateway.adopt(&again).expect("made again"), attached);
    gets_outside(&container, "of a container");

    gateway.detach("tb2").expect("detached");
    gateway.detach("tb2").expect("absent is fine");
    assert!(!sh(&world.host, "ip -o link").contains("tb2"));
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(snapshot(&world.host), before);
    Gateway::remove(&world.host).expect("a second time is harmless");
    assert_eq!(snapshot(&world.host), before);
}

#[test]
fn what_others_take_away_is_put_back() {
    let world = World::new();
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    gateway.attach(&spec(&container, "tb1")).expect("attached");
    for damage in [
        "nft flush ruleset",
        "nft flush chain inet towline gateway-postrouting",
        &format!("ip link delete {BRIDGE_NAME}"),
        &format!("ip link set {BRIDGE_NAME} down"),
        &format!("ip addr flush dev {BRIDGE_NAME}"),
        "ip link set tb1 nomaster",
        "ip link set tb1 down",
        "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0",
    ] {
        sh(&world.host, damage);
        assert!(!reaches_outside(&container), "after `{damage}`");
        assert!(
            !gateway.repair().expect("repaired").put_back.is_empty(),
            "after `{damage}`"
        );
        gets_outside(&container, &format!("repaired after `{damage}`"));
        assert!(
            gateway
                .repair()
                .expect("nothing is amiss")
                .put_back
                .is_empty(),
            "after `{damage}`"
        );
    }
    assert!(sh(&world.host, "bridge -d link show dev tb1").contains("isolated on"));
}

/// What Docker's start leaves: forwarded packets are dropped, users' rules come first.
fn docker(host: &TestNetns, flavour: &str) {
    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        for rule in [
            "-P FORWARD DROP",
            "-N DOCKER-USER",
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
            "-A DOCKER-USER -i docker0 -s 2001:db8::1 -j DROP",
            "-A DOCKER-USER -j RETURN",
        ] {
            let rule = if program.starts_with("iptables") {
                rule.replace("2001:db8::1", "203.0.113.1")
            } else {
                rule.to_owned()
            };
            sh(host, &format!("{program} -w 5 {rule}"));
        }
    }
}

fn next_to_docker(flavour: &str) {
    let world = World::new();
    let listed = |host: &TestNetns| {
        [
            sh(host, &format!("iptables-{flavour} -w 5 -S")),
            sh(host, &format!("ip6tables-{flavour} -w 5 -S")),
        ]
    };
    docker(&world.host, flavour);
    let before = listed(&world.host);
    let ruleset = without_counters(&sh(&world.host, "nft list ruleset"));
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    gateway.attach(&spec(&container, "tb1")).expect("attached");
    gets_outside(&container, "past the policy of drop");

    let status = gateway.status().expect("a status");
    assert_eq!(
        status.foreign.len(),
        2,
        "both families: {:?}",
        status.foreign
    );
    assert!(
        status
            .foreign
            .iter()
            .all(|foreign| foreign.state == State::Present && foreign.chain == "DOCKER-USER")
    );
    assert_eq!(status.problems().count(), 0);
    // Every rule of ours names our interface and carries our comment; iptables can still read them all.
    for (now, then) in listed(&world.host).iter().zip(&before) {
        let added: Vec<&str> = now
            .lines()
            .filter(|line| !then.lines().any(|known| known == *line))
            .collect();
        assert_eq!(added.len(), 2, "{now}");
        assert!(
            added
                .iter()
                .all(|line| line.contains(BRIDGE_NAME) && line.contains("--comment towline")),
            "{now}"
        );
        assert!(
            then.lines().all(|line| now.contains(line)),
            "no foreign rule is gone: {now}"
        );
    }

    // Docker builds its chain anew.
    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        sh(&world.host, &format!("{program} -w 5 -F DOCKER-USER"));
        sh(
            &world.host,
            &format!("{program} -w 5 -A DOCKER-USER -j RETURN"),
        );
    }
    assert!(!reaches(&container, OUTSIDE[0]), "the accepts are gone");
    let status = gateway.status().expect("a status");
    assert!(
        status
            .foreign
            .iter()
            .all(|foreign| foreign.state == State::Missing),
        "{:?}",
        status.foreign
    );
    assert_eq!(
        gateway.repair().expect("repaired").put_back.len(),
        2,
        "one for each family"
    );
    gets_outside(&container, "of a container");
    assert!(
        gateway
            .repair()
            .expect("nothing is amiss")
            .put_back
            .is_empty()
    );

    for program in [
        format!("iptables-{flavour}"),
        format!("ip6tables-{flavour}"),
    ] {
        let address = if program.starts_with("iptables") {
            "203.0.113.1"
        } else {
            "2001:db8::1"
        };
        sh(
            &world.host,
            &format!("{program} -w 5 -I DOCKER-USER 1 -i docker0 -s {address} -j DROP"),
        );
    }
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(listed(&world.host), before);
    assert_eq!(
        without_counters(&sh(&world.host, "nft list ruleset")),
        ruleset
    );
}

#[test]
fn docker_on_iptables_nft_is_left_as_it_was() {
    next_to_docker("nft");
}

#[test]
fn docker_on_iptables_legacy_is_left_as_it_was() {
    next_to_docker("legacy");
}

#[test]
fn accepts_that_a_saved_ruleset_brought_back_are_ours_too() {
    let world = World::new();
    docker(&world.host, "nft");
    let before = sh(&world.host, "iptables-nft -S");
    drop(Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway"));
    // iptables-restore writes the comment in its own form, which nft does not show.
    sh(&world.host, "sh -c iptables-nft-save>/dev/null");
    let saved = sh(&world.host, "iptables-nft-save");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), saved).expect("written");
    sh(
        &world.host,
        &format!("iptables-nft-restore {}", file.path().display()),
    );
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("adopted");
    assert!(gateway.repair().expect("they stand").put_back.is_empty());
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(sh(&world.host, "iptables-nft -S"), before);
}

#[test]
fn a_chain_that_blocks_without_a_place_for_us_is_told_and_the_command_helps() {
    for setup in [
        "iptables-nft -P FORWARD DROP",
        "iptables-legacy -P FORWARD DROP",
        "ip6tables-nft -A FORWARD -j REJECT",
        "nft add table inet fw; add chain inet fw filter-forward { type filter hook forward priority 5; policy drop; }",
    ] {
        let world = World::new();
        sh(&world.host, setup);
        let container = netns();
        let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway all the same");
        gateway.attach(&spec(&container, "tb1")).expect("attached");
        assert!(!reaches_outside(&container), "{setup}");
        assert!(
            gateway
                .repair()
                .expect("nothing that it may do")
                .put_back
                .is_empty(),
            "{setup}"
        );
        let status = gateway.status().expect("a status");
        assert_eq!(status.foreign.len(), 1, "{setup}: {:?}", status.foreign);
        assert_eq!(status.foreign[0].state, State::Blocked);
        let problem = status.problems().next().expect("a problem").to_owned();
        let command = problem
            .split('`')
            .nth(1)
            .unwrap_or_else(|| panic!("a command in: {problem}"));
        for part in command.split(" && ") {
            sh(&world.host, part);
        }
        gets_outside(&container, &format!("after `{command}`"));
        assert_eq!(
            gateway.status().expect("a status").problems().count(),
            0,
            "after `{command}`"
        );
    }
}

#[test]
fn an_attachment_that_fails_leaves_nothing() {
    let world = World::new();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let links = sh(&world.host, "ip -o link");
    let container = netns();
    // The last steps fail: the container refuses the second default route's family.
    sysctl::set(&container, "net/ipv6/conf/default/disable_ipv6", "1").expect("set");
    let inside = sh(&container, "ip -o link");
    gateway
        .attach(&spec(&container, "tb1"))
        .expect_err("no IPv6 address can be added");
    assert_eq!(sh(&world.host, "ip -o link"), links);
    assert_eq!(sh(&container, "ip -o link"), inside);

    // A name that is taken stays its holder's.
    let other = netns();
    link(&world.host, ("tb1", &[]), &other, ("eth1", &[]));
    sysctl::set(&container, "net/ipv6/conf/default/disable_ipv6", "0").expect("set");
    gateway
        .attach(&spec(&container, "tb1"))
        .expect_err("the name is taken");
    assert!(
        sh(&world.host, "ip -o link").contains("tb1"),
        "it is not ours to remove"
    );
    assert!(matches!(
        gateway.detach("tb1"),
        Err(BridgeError::NotOurs(_))
    ));

    let attached = gateway.attach(&spec(&container, "tb2")).expect("attached");
    assert_eq!(
        attached.mac,
        [
            2,
            0x74,
            172,
            31,
            attached.ipv4.octets()[2],
            attached.ipv4.octets()[3]
        ]
    );
    gets_outside(&container, "of a container");
}

#[test]
fn a_gateway_that_cannot_be_leaves_nothing() {
    let world = World::new();
    let host = Netlink::open(&world.host).expect("a socket");
    let before = snapshot(&world.host);
    let overlap = Settings {
        ipv4: Some("192.0.2.0/25".parse().expect("a subnet")),
        ..DEFAULTS
    };
    assert!(matches!(
        Gateway::ensure(&world.host, &overlap),
        Err(BridgeError::Overlap { .. })
    ));
    // An MTU that no bridge can have: the first steps are taken back.
    let mtu = Settings {
        mtu: 70_000,
        ..DEFAULTS
    };
    Gateway::ensure(&world.host, &mtu).expect_err("no such MTU");
    assert_eq!(snapshot(&world.host), before);

    host.add_bridge(BRIDGE_NAME).expect("another's bridge");
    host.add_address(BRIDGE_NAME, net("10.1.2.3/24"))
        .expect("an address");
    assert!(matches!(
        Gateway::ensure(&world.host, &DEFAULTS),
        Err(BridgeError::NotOurs(_))
    ));
    Gateway::remove(&world.host).expect("nothing of ours");
    assert!(
        host.link(BRIDGE_NAME).expect("a look-up").is_some(),
        "another's bridge stays"
    );
}

#[test]
fn subnets_step_aside_for_routes_and_can_be_chosen() {
    let world = World::new();
    let host = Netlink::open(&world.host).expect("a socket");
    let via = Some([192, 0, 2, 254].into());
    for dst in ["172.31.200.0/24", "172.28.0.0/14"] {
        host.add_route(&Route {
            dst: net(dst),
            via,
            dev: Some("eth0".to_owned()),
            metric: None,
        })
        .expect("a route");
    }
    let gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    assert_eq!(gateway.networks().0.to_string(), "172.27.0.0/16");
    Gateway::remove(&world.host).expect("removed");

    let chosen = Settings {
        ipv4: Some("10.200.0.0/24".parse().expect("a subnet")),
        ipv6: Some("fd77::/64".parse().expect("a subnet")),
        mtu: 1400,
    };
    let mut gateway = Gateway::ensure(&world.host, &chosen).expect("a gateway");
    let container = netns();
    let Attached { ipv4, ipv6, .. } = gateway.attach(&spec(&container, "tb1")).expect("attached");
    assert_eq!(
        (ipv4, ipv6),
        (
            Ipv4Addr::new(10, 200, 0, 2),
            "fd77::2".parse::<Ipv6Addr>().expect("an address")
        )
    );
    assert!(sh(&container, "ip link show eth1").contains("mtu 1400"));
    gets_outside(&container, "of a container");
    let other = Settings {
        ipv4: Some("10.201.0.0/24".parse().expect("a subnet")),
        ..chosen
    };
    assert!(matches!(
        Gateway::ensure(&world.host, &other),
        Err(BridgeError::OtherSubnet { .. })
    ));
}

#[test]
fn a_host_that_listens_to_router_advertisements_goes_on_to() {
    let world = World::new();
    sysctl::set(&world.host, "net/ipv6/conf/eth0/accept_ra", "1").expect("set");
    let before = snapshot(&world.host);
    drop(Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway"));
    assert_eq!(
        sysctl::get(&world.host, "net/ipv6/conf/eth0/accept_ra").expect("a setting"),
        "2"
    );
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(snapshot(&world.host), before);
}

#[test]
fn a_host_that_keeps_new_interfaces_from_ipv6_has_a_gateway_all_the_same() {
    let world = World::new();
    sysctl::set(&world.host, "net/ipv6/conf/default/disable_ipv6", "1").expect("set");
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let container = netns();
    gateway.attach(&spec(&container, "tb1")).expect("attached");
    gets_outside(&container, "of a container");
}

fn port(protocol: Protocol, published: u16, on: Option<On>) -> HostPort {
    HostPort {
        protocol,
        published,
        target: 80,
        on,
    }
}

fn tcp(published: u16, on: Option<&str>) -> HostPort {
    let on = on.map(|on| On::Address(on.parse().expect("an address")));
    port(Protocol::Tcp, published, on)
}

fn listen(netns: &Netns) -> TcpListener {
    netns
        .run(|| TcpListener::bind("[::]:80"))
        .expect("inside")
        .expect("a listener of both families")
}

/// Connects from a namespace to a published port; what the container sees as the other end, or `None` if nothing answers.
fn caller(from: &Netns, to: &str, container: &TcpListener) -> Option<IpAddr> {
    let to: SocketAddr = to.parse().expect("an address with a port");
    let limit = Duration::from_secs(2);
    let stream = from
        .run(|| TcpStream::connect_timeout(&to, limit))
        .expect("inside")
        .ok()?;
    container.set_nonblocking(true).expect("set");
    let (_, seen) = container.accept().ok()?;
    drop(stream);
    Some(seen.ip().to_canonical())
}

#[test]
fn published_ports_lead_to_containers_from_everywhere() {
    let world = World::new();
    let before = snapshot(&world.host);
    let (one, other) = (netns(), netns());
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    gateway.attach(&spec(&one, "tb1")).expect("attached");
    gateway.attach(&spec(&other, "tb2")).expect("attached");
    gets_outside(&one, "before any port is published");
    gets_outside(&other, "before any port is published");
    let container = listen(&one);
    let ports = [tcp(8080, None), tcp(8081, Some("127.0.0.1"))];
    gateway.publish("tb1", &ports).expect("published");
    gateway.publish("tb1", &ports).expect("twice is fine");
    let (bridge4, bridge6) = gateway.gateways();
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");

    // Strangers are seen as who they are, on both families.
    for (to, seen) in [
        ("192.0.2.1:8080", OUTSIDE[0]),
        ("[2001:db8:2::1]:8080", OUTSIDE[1]),
    ] {
        assert_eq!(
            caller(&world._outside, to, &container),
            Some(ip(seen)),
            "{to}"
        );
    }
    // This host, by its address and as localhost.
    for (to, seen) in [
        ("192.0.2.1:8080", ip("192.0.2.1")),
        ("[2001:db8:2::1]:8080", ip("2001:db8:2::1")),
        ("127.0.0.1:8080", bridge4.into()),
        ("127.0.0.1:8081", bridge4.into()),
    ] {
        assert_eq!(caller(&world.host, to, &container), Some(seen), "{to}");
    }
    let refused = gateway.publish("tb1", &[tcp(8083, Some("::1"))]);
    assert!(matches!(refused, Err(BridgeError::Localhost(_))));
    // Where bridged packets pass through netfilter, what is led to a neighbour on the bridge is bridged, and isolated.
    for key in ["iptables", "ip6tables"].map(|what| format!("net/bridge/bridge-nf-call-{what}")) {
        if sysctl::get(&world.host, &key).is_ok() {
            sysctl::set(&world.host, &key, "0").expect("set");
        }
    }
    // Its containers, the one that serves among them.
    for from in [&one, &other] {
        for to in ["192.0.2.1:8080", "[2001:db8:2::1]:8080"] {
            let seen = caller(from, to, &container);
            assert!(
                seen == Some(bridge4.into()) || seen == Some(bridge6.into()),
                "{to}: {seen:?}"
            );
        }
    }
    // What is open on localhost alone is open to nobody else, whatever a neighbour sends.
    assert_eq!(caller(&world._outside, "192.0.2.1:8081", &container), None);
    for (neighbour, link, via) in [
        (&world._router, "to-host", "192.0.2.1".to_owned()),
        (&other, "eth1", bridge4.to_string()),
    ] {
        sh(neighbour, "ip addr flush dev lo");
        sh(neighbour, &format!("ip route add 127.0.0.1 via {via}"));
        for name in ["all", link] {
            sysctl::set(
                neighbour,
                &format!("net/ipv4/conf/{name}/route_localnet"),
                "1",
            )
            .expect("set");
        }
        for to in ["127.0.0.1:8080", "127.0.0.1:8081"] {
            assert_eq!(caller(neighbour, to, &container), None, "{to} by {link}");
        }
    }

    // Another container cannot have the port; nor can the same one have it twice.
    let error = gateway
        .publish("tb2", &[tcp(8082, None), tcp(8080, Some("192.0.2.1"))])
        .expect_err("taken");
    assert_eq!(
        error.to_string(),
        "Bind for 192.0.2.1:8080/tcp failed: port is already allocated (to tb1): choose another host port, or remove that container"
    );
    assert_eq!(caller(&world.host, "192.0.2.1:8082", &container), None);
    gateway
        .publish("tb2", &[port(Protocol::Udp, 8080, None)])
        .expect("another protocol");
    assert!(matches!(
        gateway.publish("tb3", &ports),
        Err(BridgeError::NotAttached(_))
    ));

    gateway.unpublish("tb1").expect("closed");
    gateway.unpublish("tb1").expect("a second time is fine");
    let led = Filter::new()
        .protocol(Protocol::Tcp)
        .original_destination_port(8080)
        .reply_source_port(80);
    let mut socket = NetfilterSocket::open(&world.host).expect("a socket");
    assert_eq!(socket.connections(&led).expect("a list"), []);
    assert_eq!(caller(&world._outside, "192.0.2.1:8080", &container), None);
    assert_eq!(gateway.published().count(), 1);
    gateway.detach("tb2").expect("detached");
    assert_eq!(gateway.published().count(), 0);
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(snapshot(&world.host), before);
}

#[test]
fn published_ports_outlive_the_agent_and_damage() {
    let world = World::new();
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let attached = gateway.attach(&spec(&container, "tb1")).expect("attached");
    let listener = listen(&container);
    let by_link = On::Interface("eth0".to_owned());
    let ports = [tcp(8080, None), port(Protocol::Tcp, 8090, Some(by_link))];
    gateway.publish("tb1", &ports).expect("published");
    gets_outside(&container, "of a container");
    let answers = |to: &str| caller(&world._outside, to, &listener).is_some();
    assert!(answers("192.0.2.1:8080") && answers("[2001:db8:2::1]:8090"));
    assert_eq!(
        caller(&world.host, "192.0.2.1:8090", &listener),
        None,
        "nothing came in by eth0"
    );

    drop(gateway);
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("adopted");
    assert!(answers("192.0.2.1:8080"), "before anybody claims it");
    let mut again = spec(&container, "tb1");
    again.addresses = Some((attached.ipv4, attached.ipv6));
    gateway.adopt(&again).expect("it stands");
    gateway.publish("tb1", &ports[..1]).expect("claimed");
    gateway.keep_published().expect("the rest is closed");
    assert!(answers("192.0.2.1:8080") && !answers("192.0.2.1:8090"));
    assert!(gateway.repair().expect("all is well").put_back.is_empty());

    for damage in ["nft flush ruleset", "nft flush map inet towline published4"] {
        sh(&world.host, damage);
        assert!(!answers("192.0.2.1:8080"), "after `{damage}`");
        let repair = gateway.repair().expect("repaired");
        assert_eq!(repair.put_back, ["the nftables table inet towline"]);
        assert!(answers("192.0.2.1:8080"), "repaired after `{damage}`");
    }
    sh(&world.host, "nft flush map inet towline published6");
    gateway.unpublish("tb1").expect("what is gone is closed");
    assert!(!answers("192.0.2.1:8080"));
}

#[test]
fn a_client_of_udp_that_came_too_early_is_served_all_the_same() {
    let world = World::new();
    let container = netns();
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    gateway.attach(&spec(&container, "tb1")).expect("attached");
    gets_outside(&container, "of a container");
    let server = container
        .run(|| UdpSocket::bind("0.0.0.0:80"))
        .expect("inside")
        .expect("a port");
    server
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("set");
    let client = world
        ._outside
        .run(|| UdpSocket::bind("198.51.100.1:0"))
        .expect("inside")
        .expect("a port");
    client
        .send_to(b"too early", "192.0.2.1:5353")
        .expect("sent");
    let mut socket = NetfilterSocket::open(&world.host).expect("a socket");
    let early = Filter::new()
        .protocol(Protocol::Udp)
        .original_destination_port(5353);
    wait_until(
        "the early datagram is remembered",
        Duration::from_secs(30),
        || socket.connections(&early).expect("a list").len() == 1,
    );
    let udp = port(Protocol::Udp, 5353, None);
    gateway.publish("tb1", &[udp]).expect("published");
    client.send_to(b"in time", "192.0.2.1:5353").expect("sent");
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).expect("it arrives");
    assert_eq!(&buffer[..length], b"in time");
    assert_eq!(from, client.local_addr().expect("bound"));
}

#[test]
fn a_filter_of_docker_lets_the_ingress_pass_as_long_as_it_stands() {
    let world = World::new();
    docker(&world.host, "nft");
    let mut gateway = Gateway::ensure(&world.host, &DEFAULTS).expect("a gateway");
    let accepts = || {
        let users = sh(&world.host, "iptables-nft -w 5 -S DOCKER-USER");
        users
            .lines()
            .filter(|line| line.contains(INGRESS_NAME))
            .count()
    };
    assert_eq!(accepts(), 0);
    assert!(gateway.repair().expect("all is well").put_back.is_empty());
    sh(
        &world.host,
        &format!("ip link add {INGRESS_NAME} type bridge"),
    );
    let repair = gateway.repair().expect("let pass");
    assert_eq!(repair.put_back.len(), 2, "{:?}", repair.put_back);
    assert_eq!(accepts(), 2, "in and out");
    assert!(gateway.repair().expect("all is well").put_back.is_empty());
    Gateway::remove(&world.host).expect("removed");
    assert_eq!(accepts(), 0);
}
