//! Who may send what, and bytes that nobody should.

use proptest::prelude::*;

use super::*;

#[test]
fn only_members_may_send() {
    // Conformance H1.
    assert_eq!(
        arrived(remote(9), &udp(FAR, A)),
        Verdict::Drop(DropReason::NotAMember)
    );
    let v6 = "[2001:db8::2]:4789".parse().unwrap();
    assert_eq!(
        arrived(v6, &udp(FAR, A)),
        Verdict::Drop(DropReason::NotAMember)
    );
}

#[test]
fn a_mac_comes_only_from_its_own_host() {
    // Conformance H2 (another host's), H3 (a local container's), H5 (nobody's), V18 (nothing moves by it).
    assert_eq!(
        arrived(remote(3), &udp(FAR, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
    assert_eq!(
        arrived(remote(2), &udp(B, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
    assert_eq!(
        arrived(remote(2), &udp(NOBODY, A)),
        Verdict::Drop(DropReason::UnknownSource)
    );
    assert_eq!(
        arrived(remote(4), &udp(FAR, A)),
        Verdict::Drop(DropReason::SourceElsewhere)
    );
}

#[test]
fn the_guard_stands_before_everything() {
    // Conformance H8.
    assert_eq!(
        sent(PORT_A, &udp(B, FAR)),
        Verdict::Drop(DropReason::GuardMac)
    );
    let mut spoofed = udp(A, FAR);
    spoofed[29] = 3;
    assert_eq!(sent(PORT_A, &spoofed), Verdict::Drop(DropReason::GuardIp));
}

#[test]
fn unknown_ports_and_short_frames() {
    // Conformance H6.
    assert_eq!(
        sent(PortId(99), &udp(A, B)),
        Verdict::Drop(DropReason::UnknownPort)
    );
    for len in 0..14 {
        assert_eq!(
            sent(PORT_A, &udp(A, B)[..len]),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
        assert_eq!(
            arrived(remote(2), &udp(FAR, A)[..len]),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
    }
    for len in 0..8 {
        let payload = &encapsulated(VNI, &[])[..len];
        assert_eq!(
            received(Settings::default(), remote(2), payload),
            Verdict::Drop(DropReason::Truncated),
            "{len} bytes"
        );
    }
    let mut bad_ihl = udp(A, B);
    bad_ihl[14] = 0x42;
    assert_eq!(sent(PORT_A, &bad_ihl), Verdict::Drop(DropReason::Malformed));
    let mut bad_ihl = udp(FAR, A);
    bad_ihl[14] = 0x42;
    assert_eq!(
        arrived(remote(2), &bad_ihl),
        Verdict::Drop(DropReason::Malformed)
    );
}

/// Bytes that get past the first checks often, and go wrong anywhere behind.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let start = prop_oneof![
        Just(udp(A, B)),
        Just(udp(FAR, A)),
        Just(arp([10, 0, 9, 4])),
        Just(tagged(udp(A, B)))
    ];
    let solicited = solicitation(
        "fd00::1".parse().unwrap(),
        A,
        "fd00::2".parse().unwrap(),
        Some(A),
    );
    let start = prop_oneof![4 => start, 1 => Just(solicited)];
    (
        start,
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(mut frame, edits, cut, whole)| {
            for (index, value) in edits {
                let index = index.index(frame.len());
                frame[index] = value;
            }
            if !whole {
                frame.truncate(cut.index(frame.len() + 1));
            }
            frame
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn nothing_a_container_sends_passes_with_anothers_mac_or_panics(frame in hostile()) {
        // Conformance H6 and H8.
        let tables = tables();
        let mut engine = Engine::new(Settings::default());
        let verdict = engine.handle_frame(&tables, PORT_A, &frame, Instant::now());
        if !matches!(verdict, Verdict::Drop(_)) {
            prop_assert_eq!(&frame[6..12], A.octets());
        }
    }

    #[test]
    fn nothing_a_host_sends_goes_to_a_host_or_panics(frame in hostile(), from in 1..6_u8, number in VNI..=TAGGED) {
        // Conformance H2, H6, V17.
        let tables = tables();
        let engine = Engine::new(Settings::default());
        let payload = encapsulated(number, &frame);
        let arrival = engine.handle_datagram(&tables, remote(from), &payload, Instant::now());
        match arrival.verdict {
            Verdict::Drop(_) => {}
            Verdict::Deliver { .. } | Verdict::Flood { remotes: [], .. } => {
                let network = tables.network(vni(number)).unwrap();
                let source = Frame::parse(&frame).unwrap().source();
                prop_assert_eq!(network.lookup(source), Some(Location::Remote(remote(from))));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn no_bytes_at_all_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // Conformance H6.
        let tables = tables();
        let mut engine = Engine::new(Settings::default());
        let _ = engine.handle_frame(&tables, PORT_A, &bytes, Instant::now());
        let _ = engine.handle_datagram(&tables, remote(2), &bytes, Instant::now());
    }
}
