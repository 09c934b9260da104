//! A router between two hosts whose far link carries less than theirs: what containers are told, and that TCP goes through.
//!
//! ```text
//! a's container ── datapath ── a.u0 ═══ r.a   r.b ═══ b.u0 ── datapath ── b's container
//!            192.0.2.1, 2001:db8:1::1             198.51.100.2, 2001:db8:2::2
//! ```
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use towline_tests::wire::{Endpoint, Outer, Setup, connect, netlink, transfer};
use towline_tests::{TestNetns, sh, try_sh, unique, wait_until, wire_tests};
use vtep::datapath::Datapath;
use vtep::stats::DropReason;
use vtep::vxlan::DEFAULT_PORT;

wire_tests!(
    containers_are_told_over_ipv4,
    containers_are_told_over_ipv6,
    tcp_goes_through_over_ipv4,
    tcp_goes_through_over_ipv6,
    a_forged_error_changes_nothing,
);

const LIMIT: Duration = Duration::from_secs(30);
const NARROW: u16 = 1400;

struct Routed {
    outer: Outer,
    ends: [Endpoint; 2],
    datapaths: [Box<dyn Datapath>; 2],
    containers: [TestNetns; 2],
    _a: TestNetns,
    r: TestNetns,
    b: TestNetns,
}

/// The VTEP of host 1 or 2: on different links, unlike those of [`Outer::vtep`].
fn vtep(outer: Outer, host: u8) -> IpAddr {
    match (outer, host) {
        (Outer::V4, 1) => [192, 0, 2, 1].into(),
        (Outer::V4, _) => [198, 51, 100, 2].into(),
        (Outer::V6, host) => {
            let host = u16::from(host);
            [0x2001, 0xdb8, host, 0, 0, 0, 0, host].into()
        }
    }
}

impl Routed {
    fn new(setup: Setup, outer: Outer) -> Self {
        let prefix = unique("te-");
        let host = |name: &str| TestNetns::new(format!("{prefix}{name}"));
        let (a, r, b) = (host("a"), host("r"), host("b"));
        for (end, name, addresses, routers) in [
            (
                &a,
                "a",
                ["192.0.2.1/24", "2001:db8:1::1/64"],
                ["192.0.2.254/24", "2001:db8:1::fe/64"],
            ),
            (
                &b,
                "b",
                ["198.51.100.2/24", "2001:db8:2::2/64"],
                ["198.51.100.254/24", "2001:db8:2::fe/64"],
            ),
        ] {
            netlink(&r).add_veth(name, "u0", end).unwrap();
            for (netns, link, nets) in [(end, "u0", addresses), (&r, name, routers)] {
                for net in nets {
                    netlink(netns)
                        .add_address(link, net.parse().unwrap())
                        .unwrap();
                }
            }
            netlink(end).set_up("u0").unwrap();
            netlink(&r).set_up(name).unwrap();
            for router in routers {
                let via = router.split('/').next().unwrap();
                sh(end, &format!("ip route add default via {via}"));
            }
        }
        netns::sysctl::set(&r, "net/ipv4/ip_forward", "1").unwrap();
        netns::sysctl::set(&r, "net/ipv6/conf/all/forwarding", "1").unwrap();
        let mtu = outer.mtu();
        let ends = [2, 3].map(|number| Endpoint {
            mtu,
            ..Endpoint::new(4096, number)
        });
        let containers = [host("ca"), host("cb")];
        let hosts = [(&a, 1), (&b, 2)];
        let datapaths = hosts
            .map(|(netns, number)| (setup.start)((**netns).clone(), vtep(outer, number)).unwrap());
        for index in 0..2 {
            ends[index].attach(&*datapaths[index], &containers[index], setup.backend);
            let there = u8::try_from(2 - index).unwrap();
            let remote = SocketAddr::new(vtep(outer, there), DEFAULT_PORT);
            datapaths[index].apply(&ends[1 - index].at(remote));
        }
        let routed = Self {
            outer,
            ends,
            datapaths,
            containers,
            _a: a,
            r,
            b,
        };
        // Until duplicate address detection is over, IPv6 loses packets.
        wait_until("the far container answers", LIMIT, || {
            [routed.ends[1].ip(), routed.ends[1].ip6()]
                .iter()
                .all(|ip| {
                    let ping = format!("ping -c 1 -W 1 -q {ip}");
                    try_sh(&routed.containers[0], &ping).status.success()
                })
        });
        routed
    }

    /// Has the far link carry less: the router tells who sends more.
    fn narrow(&self) {
        netlink(&self.r).set_mtu("b", NARROW.into()).unwrap();
        netlink(&self.b).set_mtu("u0", NARROW.into()).unwrap();
    }

    /// What fits the narrow path.
    fn narrow_mtu(&self) -> u16 {
        NARROW - (1500 - self.outer.mtu())
    }

    fn remote(&self) -> IpAddr {
        vtep(self.outer, 2)
    }

    fn path_mtu(&self) -> Option<u16> {
        self.datapaths[0].paths().mtu(self.remote(), Instant::now())
    }
}

/// Conformance V13, V12: with DF and without, IPv4 and IPv6.
fn containers_are_told(setup: Setup, outer: Outer) {
    let routed = Routed::new(setup, outer);
    routed.narrow();
    let (mtu, from) = (routed.narrow_mtu(), &routed.containers[0]);
    for (ip, headers, options) in [
        (routed.ends[1].ip(), 28, "-M do"),
        (routed.ends[1].ip6(), 48, "-M do"),
    ] {
        let full = outer.mtu() - headers;
        // The first may be lost at the router; from then on each is told at once.
        let ping = format!("ping {options} -c 3 -i 0.3 -W 3 -s {full} {ip}");
        let said = String::from_utf8_lossy(&try_sh(from, &ping).stdout).into_owned();
        let told = if ip.is_ipv4() {
            format!("mtu = {mtu}")
        } else {
            format!("mtu={mtu}")
        };
        assert!(
            said.contains(&told) && said.contains(&format!("From {ip}")),
            "{ping}: {said}"
        );
        assert!(!said.contains(", 3 received"), "{said}");
        // What fits passes to the byte.
        sh(
            from,
            &format!("ping {options} -c 2 -i 0.2 -W 5 -s {} {ip}", mtu - headers),
        );
    }
    assert_eq!(routed.path_mtu(), Some(NARROW));
    let counters = routed.datapaths[0].counters();
    assert!(counters.too_big_answers > 0);
    assert!(counters.drops.get(DropReason::PathTooSmall) > 0);
    assert!(routed.datapaths[0].status().path_reports.believed > 0);

    // Without DF: a fresh container's kernel knows nothing yet, sends a whole packet, is told, and cuts from then on.
    sh(from, "ip route flush cache");
    let ip = routed.ends[1].ip();
    let ping = format!("ping -M dont -c 3 -i 0.3 -W 3 -s {} {ip}", outer.mtu() - 28);
    let said = String::from_utf8_lossy(&try_sh(from, &ping).stdout).into_owned();
    assert!(said.contains(&format!("mtu = {mtu}")), "{said}");
    // ping spends one of its tries on hearing it.
    assert!(!said.contains(" 0 received"), "{said}");
}

fn containers_are_told_over_ipv4(setup: Setup) {
    containers_are_told(setup, Outer::V4);
}

fn containers_are_told_over_ipv6(setup: Setup) {
    containers_are_told(setup, Outer::V6);
}

/// Conformance V13: connections that are open when the path becomes narrow go on, and new ones come about.
fn tcp_goes_through(setup: Setup, outer: Outer) {
    const BYTES: usize = 4_000_000;
    let routed = Routed::new(setup, outer);
    let [one, other] = &routed.containers;
    let (client, server) = connect(one, other, routed.ends[1].ip());
    transfer(client, server, BYTES, || routed.narrow());
    for ip in [routed.ends[1].ip(), routed.ends[1].ip6()] {
        let (client, server) = connect(one, other, ip);
        transfer(client, server, BYTES, || ());
        let (client, server) = connect(one, other, ip);
        transfer(server, client, BYTES, || ());
    }
    assert_eq!(routed.path_mtu(), Some(NARROW));
}

fn tcp_goes_through_over_ipv4(setup: Setup) {
    tcp_goes_through(setup, Outer::V4);
}

fn tcp_goes_through_over_ipv6(setup: Setup) {
    tcp_goes_through(setup, Outer::V6);
}

/// Conformance H6: an ICMP error that knows a source port and quotes nothing that was sent narrows no path.
fn a_forged_error_changes_nothing(setup: Setup) {
    let routed = Routed::new(setup, Outer::V4);
    let forger = routed
        .r
        .run(|| {
            let (domain, kind) = (socket2::Domain::IPV4, socket2::Type::RAW);
            socket2::Socket::new(domain, kind, Some(socket2::Protocol::ICMPV4)).unwrap()
        })
        .unwrap();
    let full = format!(
        "ping -c 1 -W 5 -M do -s {} {}",
        Outer::V4.mtu() - 28,
        routed.ends[1].ip()
    );
    sh(&routed.containers[0], &full);
    // The whole range: the forger need not even listen.
    for port in 49_152..=u16::MAX {
        let mut error = vec![3, 4, 0, 0, 0, 0, 0x02, 0x40];
        error.extend([0x45, 0, 0x05, 0xdc, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        error.extend([192, 0, 2, 1, 198, 51, 100, 2]);
        error.extend(port.to_be_bytes());
        error.extend(DEFAULT_PORT.to_be_bytes());
        error.extend([0x05, 0xc8, 0, 0]);
        // A VXLAN header of the right network, and a frame from nobody.
        error.extend([8, 0, 0, 0, 0, 0x10, 0, 0]);
        error.extend([2; 14]);
        let checksum = !vtep::offload::checksum::fold(vtep::offload::checksum::sum(&error));
        error[2..4].copy_from_slice(&checksum.to_be_bytes());
        let to: SocketAddr = "192.0.2.1:0".parse().unwrap();
        forger.send_to(&error, &to.into()).unwrap();
    }
    wait_until("the errors are read", LIMIT, || {
        routed.datapaths[0].status().path_reports.doubted > 0
    });
    assert_eq!(routed.path_mtu(), None);
    assert_eq!(routed.datapaths[0].status().path_reports.believed, 0);
    sh(&routed.containers[0], &full);
    assert!(
        routed.datapaths[0]
            .paths()
            .take_suspects()
            .contains(&routed.remote())
    );
}
