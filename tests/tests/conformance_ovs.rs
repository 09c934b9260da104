//! Three VTEPs that share no code, on one underlay and in one network: Towline, the kernel's `vxlan` device, and Open vSwitch
//! in userspace.
//!
//! ```text
//!   switch br0 ── t  192.0.2.1  Towline       container 10.0.9.2
//!          ├───── k  192.0.2.2  kernel        10.0.9.3 on vx0 itself
//!          └───── o  192.0.2.3  Open vSwitch  container 10.0.9.4
//! ```
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::IpNet;
use netns::{Netns, Vxlan};
use towline_tests::ovs::OpenVswitch;
use towline_tests::wire::{Endpoint, Outer, Setup, connect, netlink, transfer};
use towline_tests::{TestNetns, sh, try_sh, unique, wait_until, wire_tests};
use vtep::stats::DropReason;
use vtep::vxlan::DEFAULT_PORT;

wire_tests!(three_kinds_of_vtep_understand_each_other);

const VNI: u32 = 4097;
/// Bytes of a ping: small, full, and in two and three fragments of the container's own making.
const SIZES: [u16; 4] = [56, 1422, 1600, 3200];
/// Bytes of each TCP transfer.
const BYTES: usize = 8 << 20;
const NO_OFFLOADS: &str = "tx off tso off gso off gro off";

fn vtep(host: u8) -> IpNet {
    IpNet::new(Ipv4Addr::new(192, 0, 2, host).into(), 24).unwrap()
}

/// A host on the switch, its link without offloads: Open vSwitch takes frames as they are.
fn host(prefix: &str, switch: &Netns, number: u8) -> TestNetns {
    let netns = TestNetns::new(format!("{prefix}h{number}"));
    let (there, port) = (netlink(switch), format!("p{number}"));
    there.add_veth(&port, "u0", &netns).unwrap();
    there.set_master(&port, Some("br0")).unwrap();
    there.set_up(&port).unwrap();
    for name in ["lo", "u0"] {
        netlink(&netns).set_up(name).unwrap();
    }
    sh(&netns, &format!("ethtool -K u0 {NO_OFFLOADS}"));
    sh(switch, &format!("ethtool -K {port} {NO_OFFLOADS}"));
    netns
}

/// Conformance V1, V9, V10, V12, V16 and V17, as peers see them.
fn three_kinds_of_vtep_understand_each_other(setup: Setup) {
    let prefix = unique("te-");
    let switch = TestNetns::new(format!("{prefix}sw"));
    netlink(&switch).add_bridge("br0").unwrap();
    netlink(&switch).set_up("br0").unwrap();
    let [towline, kernel, ovs] = [1, 2, 3].map(|number| host(&prefix, &switch, number));
    let [ours, kernels, switchs] = [2, 3, 4].map(|number| Endpoint::new(VNI, number));

    netlink(&towline).add_address("u0", vtep(1)).unwrap();
    let container = TestNetns::new(format!("{prefix}c1"));
    let datapath = (setup.start)((*towline).clone(), vtep(1).addr()).unwrap();
    ours.attach(&*datapath, &container, setup.backend);
    datapath.apply(&kernels.at(Outer::V4.remote(2)));
    datapath.apply(&switchs.at(Outer::V4.remote(3)));

    let links = netlink(&kernel);
    links.add_address("u0", vtep(2)).unwrap();
    let device = Vxlan {
        vni: VNI,
        local: vtep(2).addr(),
        port: DEFAULT_PORT,
        learning: true,
        dev: Some("u0".to_owned()),
        udp_checksum: true,
    };
    links.add_vxlan("vx0", &device).unwrap();
    links.set_mac("vx0", kernels.mac().octets()).unwrap();
    links.set_mtu("vx0", u32::from(kernels.mtu)).unwrap();
    for remote in [1, 3] {
        links.add_fdb("vx0", [0; 6], vtep(remote).addr()).unwrap();
    }
    kernels.configure(&kernel, "vx0");

    let container3 = TestNetns::new(format!("{prefix}c3"));
    netlink(&ovs).add_veth("c0", "eth0", &container3).unwrap();
    netlink(&ovs).set_up("c0").unwrap();
    let inside = netlink(&container3);
    inside.set_mac("eth0", switchs.mac().octets()).unwrap();
    inside.set_mtu("eth0", u32::from(switchs.mtu)).unwrap();
    switchs.configure(&container3, "eth0");
    for (netns, name) in [(&ovs, "c0"), (&container3, "eth0")] {
        sh(netns, &format!("ethtool -K {name} {NO_OFFLOADS}"));
    }
    let open_vswitch = OpenVswitch::start(&ovs, vtep(3));
    open_vswitch.plug("c0");
    for remote in [1, 2] {
        open_vswitch.add_remote(switchs.vni, vtep(3).addr(), vtep(remote).addr());
    }

    let places: [(&Netns, IpAddr); 3] = [
        (&container, ours.ip()),
        (&kernel, kernels.ip()),
        (&container3, switchs.ip()),
    ];
    let pairs = || {
        let all = (0..3).flat_map(|from| (0..3).map(move |to| (from, to)));
        all.filter(|(from, to)| from != to)
            .map(|(from, to)| (places[from].0, places[to].0, places[to].1))
    };
    // Open vSwitch drops what comes before it knows its tunnels' next hops.
    for (from, _, to) in pairs() {
        wait_until("the first ping", Duration::from_secs(30), || {
            let ping = try_sh(from, &format!("ping -c 1 -W 1 -q {to}"));
            ping.status.success()
        });
    }
    for size in SIZES {
        for (from, _, to) in pairs() {
            let count = "ping -c 3 -i 0.1 -W 10 -q";
            sh(from, &format!("{count} -s {size} {to}"));
        }
    }
    for (from, to, ip) in pairs() {
        let (client, server) = connect(from, to, ip);
        transfer(client, server, BYTES, || ());
    }
    let counters = datapath.counters();
    for reason in [
        DropReason::Malformed,
        DropReason::Oversize,
        DropReason::PathTooSmall,
        DropReason::NotAMember,
        DropReason::SourceElsewhere,
        DropReason::UnknownSource,
    ] {
        let name = reason.name();
        assert_eq!(counters.drops.get(reason), 0, "{name}: {counters:?}");
    }
}
