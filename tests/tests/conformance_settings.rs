//! What can be set for a network, seen on the link: TTL, DSCP and outer checksums.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::num::NonZeroU8;

use towline_tests::frames::{Checksum, Datagram, Udp};
use towline_tests::raw::Rig;
use towline_tests::wire::{Endpoint, Outer, Setup};
use towline_tests::wire_tests;
use vtep::fdb::PortId;
use vtep::settings::Dscp;

wire_tests!(
    the_ttl_is_the_networks,
    a_fixed_dscp_hides_the_inner_one,
    a_uniform_dscp_goes_out_and_comes_back,
    checksums_are_zero_only_where_they_are_switched_off,
);

/// Conformance V19.
fn the_ttl_is_the_networks(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        for ttl in [1, 17, 255, 64] {
            let ttl = NonZeroU8::new(ttl).unwrap();
            rig.set_network(|config| config.settings.ttl = ttl);
            for frame in [
                Udp::between(&rig.ours, &rig.theirs).build(),
                Udp::broadcast(&rig.ours).build(),
            ] {
                assert_eq!(rig.sent(&frame).ttl, ttl.get());
            }
        }
    }
}

/// Conformance V19, V20: the pipe model of RFC 2983; the congestion mark is copied all the same.
fn a_fixed_dscp_hides_the_inner_one(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        for dscp in [0u8, 10, 46, 63] {
            let fixed: Dscp = dscp.to_string().parse().unwrap();
            rig.set_network(|config| config.settings.dscp = fixed);
            for (inner, tos) in [(0u8, 0u8), (34, 2), (63, 3)] {
                for udp in [Udp::between, Udp::between6] {
                    let there = Udp {
                        tos: inner << 2 | tos,
                        ..udp(&rig.ours, &rig.theirs)
                    }
                    .build();
                    let seen = rig.sent(&there);
                    assert_eq!(
                        (seen.tos, seen.inner()),
                        (dscp << 2 | tos, there.as_slice())
                    );
                    // And what the underlay made of it stays outside.
                    let back = Udp {
                        tos: inner << 2 | 2,
                        ..udp(&rig.theirs, &rig.ours)
                    }
                    .build();
                    let datagram = Datagram {
                        tos: 7 << 2 | 2,
                        ..rig.carry(&back)
                    };
                    assert_eq!(rig.delivered(&datagram), back);
                }
            }
        }
    }
}

/// Conformance V19, V20: the uniform model of RFC 2983.
fn a_uniform_dscp_goes_out_and_comes_back(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        rig.set_network(|config| config.settings.dscp = Dscp::UNIFORM);
        for udp in [Udp::between, Udp::between6] {
            for dscp in [0u8, 10, 46, 63] {
                let there = Udp {
                    tos: dscp << 2 | 1,
                    ..udp(&rig.ours, &rig.theirs)
                }
                .build();
                assert_eq!(rig.sent(&there).tos, dscp << 2 | 1);
                // A router on the way has changed it: so it is inside, its IP checksum right.
                let with = |tos| Udp {
                    tos,
                    ..udp(&rig.theirs, &rig.ours)
                };
                let datagram = Datagram {
                    tos: dscp << 2 | 3,
                    ..rig.carry(&with(18 << 2 | 2).build())
                };
                assert_eq!(rig.delivered(&datagram), with(dscp << 2 | 3).build());
            }
        }
    }
}

/// Conformance V10, V11: for that network and no other; a wrong checksum is none even then.
fn checksums_are_zero_only_where_they_are_switched_off(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        let there = Udp::between(&rig.ours, &rig.theirs).build();
        assert!(rig.sent(&there).checksum_is_right);
        rig.set_network(|config| config.settings.udp_checksum = false);
        for udp in [Udp::between, Udp::between6] {
            let frame = udp(&rig.ours, &rig.theirs).build();
            let seen = rig.sent(&frame);
            assert_eq!((seen.checksum, seen.inner()), (0, frame.as_slice()));
            assert!(seen.from.port() >= 49_152 && seen.dont_fragment);
            let back = udp(&rig.theirs, &rig.ours).build();
            for checksum in [Checksum::Zero, Checksum::Right] {
                let datagram = Datagram {
                    checksum,
                    ..rig.carry(&back)
                };
                assert_eq!(rig.delivered(&datagram), back, "{checksum:?}");
            }
            rig.from_host(&Datagram {
                checksum: Checksum::Wrong,
                ..rig.carry(&frame)
            });
            assert_eq!(rig.delivered(&rig.carry(&back)), back);
            assert!(rig.inside.drain().is_empty());
        }
        // Another network of the same host keeps its checksums.
        let other = |number| Endpoint {
            port: PortId(100),
            mtu: rig.ours.mtu,
            ..Endpoint::new(0x77, number)
        };
        let (ours, theirs) = (other(2), other(3));
        rig.datapath.apply(&[ours.network()]);
        rig.datapath.apply(&theirs.at(outer.remote(2)));
        let (_container, inside) = rig.neighbor(&ours);
        inside.send(&Udp::between(&ours, &theirs).build()).unwrap();
        let seen = rig.on_wire();
        assert!(seen.checksum != 0 && seen.checksum_is_right);
    }
}
