//! Against the Linux kernel's own `vxlan` device, in both directions.
//!
//! The link is a veth pair. With its default offloads the kernel peer sends inner TCP with checksums that hold only the
//! pseudo-header's sum, and packets far above the MTU; with all offloads off it sends what a plain card would.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use netns::Vxlan;
use towline_tests::wire::{
    Endpoint, Outer, Pair, Setup, bulk_both_ways, connect, netlink, ping, transfer,
};
use towline_tests::{TestNetns, wire_tests};
use vtep::capture::{CaptureFilter, Place};
use vtep::datapath::Datapath;
use vtep::offload::checksum::{L4, inspect};
use vtep::stats::DropReason;

const BYTES: usize = 64 << 20;

wire_tests!(
    kernel_peer_with_default_offloads,
    kernel_peer_without_offloads,
    kernel_peer_over_ipv6,
    kernel_peer_without_outer_checksums,
    default_offloads_leave_work_to_us,
);

fn kernel_peer_with_default_offloads(setup: Setup) {
    interop(setup, &Pair::new(), Outer::V4, true);
}

fn kernel_peer_without_offloads(setup: Setup) {
    interop(setup, &Pair::new().without_offloads(), Outer::V4, true);
}

fn kernel_peer_over_ipv6(setup: Setup) {
    interop(setup, &Pair::new(), Outer::V6, true);
}

/// Conformance V10: a zero outer checksum is accepted over IPv4.
fn kernel_peer_without_outer_checksums(setup: Setup) {
    interop(setup, &Pair::new().without_offloads(), Outer::V4, false);
}

/// The two traps of a veth link are really there, or the tests above prove less than they say.
fn default_offloads_leave_work_to_us(setup: Setup) {
    let pair = Pair::new();
    let mesh = Mesh::new(setup, &pair, Outer::V4, true);
    let capture = mesh.datapath.capture(CaptureFilter::default());
    let (client, server) = connect(&mesh.container, &pair.b, mesh.theirs.ip());
    transfer(server, client, 1 << 20, || ());
    let frames: Vec<_> = capture
        .waiting()
        .filter(|captured| matches!(captured.place, Place::FromRemote(_)))
        .map(|captured| captured.frame().to_vec())
        .collect();
    let partial = |frame: &Vec<u8>| matches!(inspect(frame), L4::Partial { .. });
    assert!(frames.iter().any(partial), "no partial checksum");
    let largest = frames.iter().map(Vec::len).max();
    assert!(
        largest > Some(usize::from(mesh.ours.mtu) * 2),
        "no super-frame: {largest:?}"
    );
}

/// A container of ours on host a, and the kernel's device on host b.
struct Mesh {
    ours: Endpoint,
    theirs: Endpoint,
    container: TestNetns,
    datapath: Box<dyn Datapath>,
}

impl Mesh {
    fn new(setup: Setup, pair: &Pair, outer: Outer, udp_checksum: bool) -> Self {
        let ours = Endpoint {
            mtu: outer.mtu(),
            ..Endpoint::new(4097, 2)
        };
        let theirs = Endpoint {
            mtu: outer.mtu(),
            ..Endpoint::new(4097, 3)
        };

        let kernel = netlink(&pair.b);
        let spec = Vxlan {
            vni: theirs.vni.get(),
            local: outer.vtep(2),
            port: outer.remote(2).port(),
            learning: true,
            dev: Some("u0".to_owned()),
            udp_checksum,
        };
        kernel.add_vxlan("vx0", &spec).unwrap();
        kernel.set_mac("vx0", theirs.mac().octets()).unwrap();
        kernel.set_mtu("vx0", u32::from(theirs.mtu)).unwrap();
        kernel.add_fdb("vx0", [0; 6], outer.vtep(1)).unwrap();
        theirs.configure(&pair.b, "vx0");

        let container = pair.container("c");
        let datapath = (setup.start)((*pair.a).clone(), outer.vtep(1)).unwrap();
        ours.attach(&*datapath, &container, setup.backend);
        datapath.apply(&theirs.at(outer.remote(2)));
        Self {
            ours,
            theirs,
            container,
            datapath,
        }
    }
}

fn interop(setup: Setup, pair: &Pair, outer: Outer, udp_checksum: bool) {
    let Mesh {
        ours,
        theirs,
        container,
        datapath,
    } = Mesh::new(setup, pair, outer, udp_checksum);
    ping(&container, theirs.ip(), 3);
    ping(&pair.b, ours.ip(), 3);
    ping(&container, theirs.ip6(), 3);
    bulk_both_ways((&container, ours.ip()), (&pair.b, theirs.ip()), BYTES);
    bulk_both_ways((&container, ours.ip6()), (&pair.b, theirs.ip6()), BYTES / 4);

    let counters = datapath.counters();
    for reason in [
        DropReason::Oversize,
        DropReason::SuperFrame,
        DropReason::PathTooSmall,
        DropReason::Malformed,
    ] {
        assert_eq!(
            counters.drops.get(reason),
            0,
            "{}: {counters:?}",
            reason.name()
        );
    }
}
