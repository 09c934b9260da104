//! Ports of a host that lead to containers through the gateway bridge.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bridge::{BridgeError, Gateway, HostPort, On};
use netns::conntrack::Filter;
use netns::nftables::Protocol;
use netns::{NetfilterSocket, Netns, sysctl};
use towline_tests::outward::{DEFAULTS, OUTSIDE, World, gets_outside, netns, snapshot, spec};
use towline_tests::{sh, wait_until};

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
            caller(&world.outside, to, &container),
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
    assert_eq!(caller(&world.outside, "192.0.2.1:8081", &container), None);
    for (neighbour, link, via) in [
        (&world.router, "to-host", "192.0.2.1".to_owned()),
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
    assert_eq!(caller(&world.outside, "192.0.2.1:8080", &container), None);
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
    let answers = |to: &str| caller(&world.outside, to, &listener).is_some();
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
        .outside
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
