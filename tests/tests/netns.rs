//! Namespaces and what stands in them, against the kernel and `ip`'s own view of it.

use std::net::IpAddr;

use ipnet::IpNet;
use netns::nftables::Protocol;
use netns::{Hop, Netlink, Netns, NetnsError, Route, Rule, TableRoute, Vxlan, sysctl};
use towline_tests::{TestNetns, sh, unique};

const PREFIX: &str = "tb-";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

/// An interface with a carrier.
fn add_link(netlink: &Netlink, name: &str) {
    netlink
        .add_veth(name, "other-end", netlink.netns())
        .expect("a veth pair");
    netlink.set_up(name).expect("up");
    netlink.set_up("other-end").expect("up");
}

#[test]
fn a_namespace_is_seen_by_ip_netns_and_goes_without_a_trace() {
    let netns = TestNetns::new(unique(PREFIX));
    let name = netns.name().to_owned();
    assert!(
        sh(&netns, "ip netns list")
            .lines()
            .any(|line| line.split(' ').next() == Some(&name))
    );
    assert!(
        sh(&netns, "ip -o link show lo").contains("LOOPBACK,UP"),
        "lo is to be up"
    );
    assert!(matches!(Netns::create(&name), Err(NetnsError::Exists(_))));
    assert!(
        Netns::open(&name).expect("it exists").id() == netns.id(),
        "opened twice, the same namespace"
    );
    assert!(Netns::list().expect("a list").contains(&name));

    Netns::delete(&name).expect("it exists");
    assert!(!Netns::exists(&name));
    Netns::delete(&name).expect("a second time is harmless");
    assert!(
        !std::fs::read_to_string("/proc/mounts")
            .expect("mounts")
            .contains(&name)
    );
}

#[test]
fn a_left_over_file_is_told_from_a_namespace() {
    towline_tests::require_root();
    let name = unique(PREFIX);
    // Makes the folder a mount point first, as any namespace would.
    drop(TestNetns::new(unique(PREFIX)));
    std::fs::write(format!("/run/netns/{name}"), "").expect("a file");
    let opened = Netns::open(&name);
    Netns::delete(&name).expect("a left-over is removed");
    assert!(matches!(opened, Err(NetnsError::LeftOver(_))), "{opened:?}");
    assert!(!Netns::exists(&name));
}

#[test]
fn the_caller_stays_where_it_was() {
    let netns = TestNetns::new(unique(PREFIX));
    let before = Netns::current().expect("the own namespace").id();
    let inside = netns
        .run(|| Netns::current().map(|inside| inside.id()))
        .expect("entered");
    assert_eq!(inside.expect("the own namespace"), netns.id());
    let panicked = std::panic::catch_unwind(|| netns.run(|| panic!("inside")));
    assert!(panicked.is_err(), "a panic goes on in the caller");
    assert_eq!(Netns::current().expect("the own namespace").id(), before);
}

#[test]
fn sysctls_are_those_of_the_namespace() {
    let (one, other) = (
        TestNetns::new(unique(PREFIX)),
        TestNetns::new(unique(PREFIX)),
    );
    let key = "net/ipv4/ip_forward";
    sysctl::set(&other, key, "0").expect("set");
    sysctl::set(&one, key, "1").expect("set");
    assert_eq!(sysctl::get(&one, key).expect("read"), "1");
    assert_eq!(sysctl::get(&other, key).expect("read"), "0");
    let error = sysctl::set(&one, "net/ipv4/no_such_key", "1").expect_err("no such key");
    assert!(
        error.to_string().contains("net/ipv4/no_such_key"),
        "{error}"
    );
}

#[test]
fn links_are_made_changed_and_removed() {
    let (host, container) = (
        TestNetns::new(unique(PREFIX)),
        TestNetns::new(unique(PREFIX)),
    );
    let netlink = Netlink::open(&host).expect("a socket");
    netlink.add_bridge("br0").expect("a bridge");
    netlink
        .add_veth("v0", "eth7", &container)
        .expect("a veth pair");
    netlink.set_master("v0", Some("br0")).expect("a port");
    netlink
        .set_bridge_port_isolated("v0", true)
        .expect("isolated");
    netlink.set_mtu("v0", 1400).expect("an MTU");
    netlink.set_mac("v0", [2, 0, 0, 0, 0, 7]).expect("a MAC");
    netlink.set_alias("v0", "towline test").expect("an alias");
    netlink.set_up("v0").expect("up");

    let long = "a-name-longer-than-fifteen-bytes";
    netlink
        .add_alternative_name("br0", long)
        .expect("another name");
    netlink
        .add_alternative_name("br0", long)
        .expect("twice is fine");
    assert!(
        netlink.add_alternative_name("v0", long).is_err(),
        "one name, one interface"
    );
    assert!(sh(&host, &format!("ip link show {long}")).contains("br0"));

    let bridge = netlink
        .link("br0")
        .expect("a look-up")
        .expect("it is there");
    let port = netlink.link("v0").expect("a look-up").expect("it is there");
    assert_eq!(bridge.kind.as_deref(), Some("bridge"));
    assert!(!bridge.up, "a new link is down until it is set up");
    assert_eq!(port.kind.as_deref(), Some("veth"));
    assert_eq!(port.master, Some(bridge.index));
    assert_eq!(
        (port.mtu, port.up, port.mac),
        (1400, true, [2, 0, 0, 0, 0, 7])
    );
    assert_eq!(port.alias.as_deref(), Some("towline test"));
    assert!(sh(&host, "bridge -d link show dev v0").contains("isolated on"));
    let peer = Netlink::open(&container).expect("a socket");
    assert!(
        peer.link("eth7").expect("a look-up").is_some(),
        "the peer is born inside"
    );
    assert_eq!(netlink.link("eth7").expect("a look-up"), None);

    peer.rename("eth7", "eth1").expect("renamed");
    assert!(peer.link("eth1").expect("a look-up").is_some());
    netlink.set_master("v0", None).expect("no port any more");
    assert_eq!(
        netlink
            .link("v0")
            .expect("a look-up")
            .expect("there")
            .master,
        None
    );
    assert!(netlink.delete_link("v0").expect("removed"));
    assert!(!netlink.delete_link("v0").expect("absent is fine"));
    assert_eq!(
        peer.link("eth1").expect("a look-up"),
        None,
        "the pair goes together"
    );
    let error = netlink.add_bridge("br0").expect_err("the name is taken");
    assert!(
        error.to_string().contains("br0") && error.to_string().contains("exists"),
        "{error}"
    );
}

#[test]
fn a_veth_whose_peer_cannot_be_leaves_nothing() {
    let (host, container) = (
        TestNetns::new(unique(PREFIX)),
        TestNetns::new(unique(PREFIX)),
    );
    Netlink::open(&container)
        .expect("a socket")
        .add_bridge("eth1")
        .expect("the name is taken");
    let netlink = Netlink::open(&host).expect("a socket");
    assert!(netlink.add_veth("v0", "eth1", &container).is_err());
    assert_eq!(netlink.link("v0").expect("a look-up"), None);
}

#[test]
fn addresses_come_and_go() {
    let host = TestNetns::new(unique(PREFIX));
    let netlink = Netlink::open(&host).expect("a socket");
    add_link(&netlink, "d0");
    for net in [net("192.0.2.7/24"), net("2001:db8::7/64")] {
        netlink.add_address("d0", net).expect("added");
        netlink.add_address("d0", net).expect("twice is fine");
        let listed = netlink.addresses().expect("a list");
        assert_eq!(
            listed
                .iter()
                .filter(|address| address.ifname == "d0" && address.net == net)
                .count(),
            1
        );
    }
    // Without duplicate address detection it is usable at once.
    assert!(!sh(&host, "ip -6 addr show dev d0 scope global").contains("tentative"));
    netlink
        .del_address("d0", net("192.0.2.7/24"))
        .expect("removed");
    netlink
        .del_address("d0", net("192.0.2.7/24"))
        .expect("absent is fine");
    assert!(
        netlink
            .addresses()
            .expect("a list")
            .iter()
            .all(|address| address.net != net("192.0.2.7/24"))
    );
    let error = netlink
        .add_address("d9", net("192.0.2.7/24"))
        .expect_err("no such interface");
    assert!(error.to_string().contains("d9"), "{error}");
}

#[test]
fn routes_are_replaced_listed_and_removed() {
    let host = TestNetns::new(unique(PREFIX));
    let netlink = Netlink::open(&host).expect("a socket");
    add_link(&netlink, "d0");
    netlink
        .add_address("d0", net("192.0.2.7/24"))
        .expect("added");
    netlink
        .add_address("d0", net("2001:db8::7/64"))
        .expect("added");
    let route = |dst: &str, via: Option<&str>, dev: Option<&str>, metric: Option<u32>| Route {
        dst: net(dst),
        via: via.map(ip),
        dev: dev.map(str::to_owned),
        metric,
    };
    let wanted = [
        route("0.0.0.0/0", Some("192.0.2.1"), Some("d0"), None),
        route("0.0.0.0/0", Some("192.0.2.2"), Some("d0"), Some(50)),
        route("::/0", Some("2001:db8::1"), Some("d0"), Some(1024)),
        route("198.51.100.0/24", None, Some("d0"), None),
        route("2001:db8:1::/64", None, Some("d0"), Some(7)),
        route("203.0.113.0/24", None, None, None),
        route("2001:db8:2::/64", None, None, Some(1024)),
    ];
    for route in &wanted {
        netlink
            .add_route(route)
            .unwrap_or_else(|error| panic!("{error}"));
        netlink
            .add_route(route)
            .unwrap_or_else(|error| panic!("a second time: {error}"));
    }
    let listed = netlink.routes().expect("a list");
    for route in &wanted {
        assert_eq!(
            listed.iter().filter(|other| *other == route).count(),
            1,
            "{route} in {listed:#?}"
        );
    }
    assert!(
        listed.contains(&route("192.0.2.0/24", None, Some("d0"), None)),
        "connected ones too: {listed:#?}"
    );
    assert!(sh(&host, "ip route").contains("unreachable 203.0.113.0/24"));

    let moved = route("0.0.0.0/0", Some("192.0.2.3"), Some("d0"), None);
    netlink.add_route(&moved).expect("replaced");
    let listed = netlink.routes().expect("a list");
    assert!(
        listed.contains(&moved) && !listed.contains(&wanted[0]),
        "{listed:#?}"
    );
    for route in wanted.iter().skip(1).chain([&moved]) {
        netlink
            .del_route(route)
            .unwrap_or_else(|error| panic!("{error}"));
        netlink
            .del_route(route)
            .unwrap_or_else(|error| panic!("absent is fine: {error}"));
    }
    let listed = netlink.routes().expect("a list");
    assert!(
        !listed.iter().any(|route| wanted.contains(route)),
        "{listed:#?}"
    );
}

#[test]
fn neighbours_and_vxlan_entries_are_permanent() {
    let host = TestNetns::new(unique(PREFIX));
    let netlink = Netlink::open(&host).expect("a socket");
    add_link(&netlink, "d0");
    netlink
        .add_address("d0", net("192.0.2.7/24"))
        .expect("added");
    netlink
        .add_address("d0", net("2001:db8::7/64"))
        .expect("added");
    netlink
        .add_neighbor("d0", ip("192.0.2.9"), [2, 0, 0, 0, 0, 1])
        .expect("added");
    netlink
        .add_neighbor("d0", ip("192.0.2.9"), [2, 0, 0, 0, 0, 9])
        .expect("replaced");
    let shown = sh(&host, "ip neigh show dev d0");
    assert!(
        shown.contains("192.0.2.9 lladdr 02:00:00:00:00:09 PERMANENT"),
        "{shown}"
    );
    netlink
        .del_neighbor("d0", ip("192.0.2.9"))
        .expect("removed");
    netlink
        .del_neighbor("d0", ip("192.0.2.9"))
        .expect("absent is fine");

    let spec = |local| Vxlan {
        vni: 5001,
        local,
        port: 4790,
        learning: false,
        dev: None,
        udp_checksum: true,
    };
    netlink
        .add_vxlan("vx4", &spec(ip("192.0.2.7")))
        .expect("a vxlan device");
    assert_eq!(
        netlink
            .link("vx4")
            .expect("a look-up")
            .expect("there")
            .vxlan_port,
        Some(4790)
    );
    let shown = sh(&host, "ip -d link show vx4");
    for part in [
        "id 5001",
        "local 192.0.2.7",
        "dstport 4790",
        "nolearning",
        " udpcsum",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let zero = Vxlan {
        udp_checksum: false,
        dev: Some("d0".to_owned()),
        vni: 5002,
        ..spec(ip("2001:db8::7"))
    };
    netlink.add_vxlan("vx6", &zero).expect("a vxlan device");
    let shown = sh(&host, "ip -d link show vx6");
    for part in [
        "local 2001:db8::7",
        "dev d0",
        " udp6zerocsumtx",
        " udp6zerocsumrx",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let mac = [2, 0, 0, 0, 0, 3];
    netlink
        .add_fdb("vx4", mac, ip("192.0.2.20"))
        .expect("added");
    netlink
        .add_fdb("vx4", mac, ip("192.0.2.21"))
        .expect("replaced");
    netlink
        .add_fdb("vx4", [0; 6], ip("192.0.2.20"))
        .expect("added");
    netlink
        .add_fdb("vx4", [0; 6], ip("192.0.2.21"))
        .expect("appended");
    let shown = sh(&host, "bridge fdb show dev vx4");
    assert!(
        shown.contains("02:00:00:00:00:03 dst 192.0.2.21 self permanent"),
        "{shown}"
    );
    assert!(
        !shown.contains("02:00:00:00:00:03 dst 192.0.2.20"),
        "{shown}"
    );
    for remote in ["192.0.2.20", "192.0.2.21"] {
        assert!(
            shown.contains(&format!("00:00:00:00:00:00 dst {remote} self permanent")),
            "{shown}"
        );
    }
}

#[test]
fn rules_lead_to_tables_of_their_own() {
    let netns = TestNetns::new(unique(PREFIX));
    let netlink = Netlink::open(&netns).expect("a socket");
    add_link(&netlink, "ingress");
    let rule = |from: Option<&str>, to: Option<&str>, input: Option<&str>| Rule {
        priority: 4789,
        from: from.map(net),
        to: to.map(net),
        input: input.map(str::to_owned),
        source_port: None,
        not_by_default: false,
        table: 4789,
    };
    let answers_of_a_server = |any| Rule {
        source_port: Some((Protocol::Udp, 53)),
        not_by_default: true,
        ..rule(Some(any), None, None)
    };
    let mut rules = [
        answers_of_a_server("0.0.0.0/0"),
        answers_of_a_server("::/0"),
        rule(None, Some("::1/128"), Some("ingress")),
        rule(Some("10.0.0.2/32"), None, None),
        rule(Some("fd00::2/128"), None, None),
    ];
    rules.sort();
    let route = |dst: &str, hop| TableRoute {
        table: 4789,
        dst: net(dst),
        hop,
        dev: "ingress".to_owned(),
    };
    // No address of these subnets stands on the link: only `onlink` makes their gateways reachable.
    let mut routes = [
        route("0.0.0.0/0", Hop::Gateway(ip("10.0.0.1"))),
        route("::/0", Hop::Gateway(ip("fd00::1"))),
        route("::1/128", Hop::Local),
        route("192.0.2.0/24", Hop::Link),
    ];
    routes.sort();
    for _twice in 0..2 {
        for rule in &rules {
            netlink
                .add_rule(rule)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        for route in &routes {
            netlink
                .add_table_route(route)
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }
    assert_eq!(netlink.rules().expect("a list"), rules);
    assert_eq!(netlink.table_routes(4789).expect("a list"), routes);
    assert!(sh(&netns, "ip rule").contains("4789:\tfrom 10.0.0.2 lookup 4789"));
    sh(&netns, "ip addr add 10.0.0.2/32 dev lo");
    assert!(
        sh(&netns, "ip route get 198.51.100.1 from 10.0.0.2").contains("via 10.0.0.1 dev ingress")
    );
    assert!(sh(&netns, "ip -6 route show table 4789").contains("local ::1 dev ingress"));
    for _twice in 0..2 {
        for rule in &rules {
            netlink
                .del_rule(rule)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        for route in &routes {
            netlink
                .del_table_route(route)
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }
    assert_eq!(netlink.rules().expect("a list"), []);
    assert_eq!(netlink.table_routes(4789).expect("a list"), []);
    let absent = TableRoute {
        dev: "absent".to_owned(),
        ..routes[0].clone()
    };
    let error = netlink
        .add_table_route(&absent)
        .expect_err("no such interface");
    assert!(error.to_string().contains("absent"), "{error}");
}
