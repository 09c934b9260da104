//! The gateway bridge on a whole host: out through a router, nothing between containers, and nothing left behind.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bridge::{Attached, BRIDGE_ALTERNATIVE_NAME, BRIDGE_NAME, BridgeError, Gateway, Settings};
use ipnet::IpNet;
use netns::{Netlink, Route, sysctl};
use towline_tests::outward::{
    DEFAULTS, World, gets_outside, link, net, netns, reaches, reaches_outside, snapshot, spec,
};
use towline_tests::{sh, try_sh};

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
    let router = Netlink::open(&world.router).expect("a socket");
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
    assert!(!reaches(&world.router, &attached.ipv4.to_string()));
    assert!(!reaches(&world.router, &attached.ipv6.to_string()));
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
