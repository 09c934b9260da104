//! Which frames go to many, and how many may.

use proptest::prelude::*;

use super::*;

#[test]
fn group_and_unknown_frames_go_once_to_every_host_with_an_endpoint() {
    // Conformance V16; host 4 is a member that gets no floods.
    for destination in [
        MacAddr::BROADCAST,
        MacAddr::new([0x33, 0x33, 0, 0, 0, 1]),
        NOBODY,
    ] {
        let Verdict::Flood {
            vni: of,
            ports,
            remotes,
        } = sent(PORT_A, &udp(A, destination))
        else {
            panic!("no flood")
        };
        assert_eq!(
            (of, ports, remotes),
            (vni(VNI), &[PORT_A, PORT_B][..], &[remote(2), remote(3)][..])
        );
    }
}

#[test]
fn without_flooding_only_the_table_answers() {
    // Conformance V16: `flood = false`.
    assert_eq!(
        sent(PORT_QUIET, &udp(A, MacAddr::BROADCAST)),
        Verdict::Drop(DropReason::FloodOff)
    );
    assert_eq!(
        sent(PORT_QUIET, &udp(A, NOBODY)),
        Verdict::Drop(DropReason::FloodOff)
    );
    assert_eq!(
        sent(PORT_QUIET, &arp([10, 0, 9, 4])),
        Verdict::Answer { len: 42 }
    );
    assert_eq!(
        sent(PORT_QUIET, &arp([10, 0, 9, 5])),
        Verdict::Drop(DropReason::FloodOff)
    );
    let payload = encapsulated(QUIET, &udp(FAR, MacAddr::BROADCAST));
    assert_eq!(
        received(Settings::default(), remote(2), &payload),
        Verdict::Drop(DropReason::FloodOff)
    );
}

#[test]
fn floods_are_limited_per_port_and_recover() {
    // Conformance V16 and H9. Two hosts and one other port: three copies a frame.
    let tables = tables();
    let mut engine = Engine::new(Settings {
        port_floods: Limit {
            rate: 30,
            burst: 30,
        },
        ..Settings::default()
    });
    let start = Instant::now();
    let mut flooded = |port, source: MacAddr, at: Duration| {
        let mut frame = udp(source, MacAddr::BROADCAST);
        frame[29] = if source == A { 2 } else { 3 };
        match engine.handle_frame(&tables, port, &frame, start + at) {
            Verdict::Flood { .. } => true,
            Verdict::Drop(DropReason::FloodLimit) => false,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::ZERO))
            .count(),
        10
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_B, B, Duration::ZERO))
            .count(),
        10,
        "another port has its own budget"
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::from_millis(500)))
            .count(),
        5
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::ZERO))
            .count(),
        0,
        "time going back gives nothing"
    );
    assert_eq!(
        (0..100)
            .filter(|_| flooded(PORT_A, A, Duration::from_secs(100)))
            .count(),
        10,
        "the burst is the most"
    );
}

#[test]
fn a_flood_to_more_hosts_than_the_burst_still_passes_sometimes() {
    let tables = tables();
    let mut engine = Engine::new(Settings {
        port_floods: Limit { rate: 1, burst: 1 },
        ..Settings::default()
    });
    let now = Instant::now();
    let frame = udp(A, MacAddr::BROADCAST);
    assert!(matches!(
        engine.handle_frame(&tables, PORT_A, &frame, now),
        Verdict::Flood { .. }
    ));
    assert_eq!(
        engine.handle_frame(&tables, PORT_A, &frame, now),
        Verdict::Drop(DropReason::FloodLimit)
    );
    assert!(matches!(
        engine.handle_frame(&tables, PORT_A, &frame, now + Duration::from_secs(1)),
        Verdict::Flood { .. }
    ));
}

#[test]
fn all_workers_draw_from_one_budget() {
    // Conformance V16 and H9: rate-limited per port, however many queues its interface has.
    let tables = tables();
    let settings = Settings {
        port_floods: Limit {
            rate: 30,
            burst: 30,
        },
        ..Settings::default()
    };
    let mut engines = [Engine::new(settings), Engine::new(settings)];
    let (now, frame) = (Instant::now(), udp(A, MacAddr::BROADCAST));
    let flooded = (0..100)
        .filter(|round| {
            let verdict = engines[round % 2].handle_frame(&tables, PORT_A, &frame, now);
            matches!(verdict, Verdict::Flood { .. })
        })
        .count();
    assert_eq!(flooded, 10);
}

#[test]
fn floods_of_a_remote_are_limited_where_they_arrive() {
    // Conformance H9: a host that does not limit its containers. Two ports here: two copies a frame.
    let tables = tables();
    let engine = Engine::new(Settings {
        remote_floods: Limit {
            rate: 20,
            burst: 20,
        },
        ..Settings::default()
    });
    let start = Instant::now();
    let flooded = |from: u8, source: MacAddr, at: Duration| {
        let payload = encapsulated(VNI, &udp(source, MacAddr::BROADCAST));
        let arrival = engine.handle_datagram(&tables, remote(from), &payload, start + at);
        match arrival.verdict {
            Verdict::Flood { .. } => true,
            Verdict::Drop(DropReason::FloodLimit) => false,
            other => panic!("{other:?}"),
        }
    };
    let storm = |at| (0..100).filter(|_| flooded(2, FAR, at)).count();
    assert_eq!(storm(Duration::ZERO), 10);
    assert!(
        flooded(3, FARTHER, Duration::ZERO),
        "another remote has its own budget"
    );
    assert_eq!(storm(Duration::from_secs(1)), 10);
    // What is not flooded is not limited.
    let payload = encapsulated(VNI, &udp(FAR, A));
    let verdict = engine
        .handle_datagram(&tables, remote(2), &payload, start + Duration::from_secs(1))
        .verdict;
    assert_eq!(verdict, Verdict::Deliver { port: PORT_A });
}

proptest! {
    /// Conformance H9: whatever a container floods and however many hosts there are, its copies stay within its limit, and another
    /// container's frames, flooded or not, all pass.
    #[test]
    fn a_storm_takes_nothing_from_others(
        hosts in 1u8..120,
        storm in proptest::collection::vec((0u64..5_000, 0usize..400), 1..40),
    ) {
        let limit = Settings::default().port_floods;
        let tables = tables_with((0..hosts).map(|host| Change::SetMember {
            vni: vni(VNI),
            remote: SocketAddr::from(([198, 51, 100, host], 4789)),
            flood: true,
        }));
        let mut engine = Engine::new(Settings::default());
        let start = Instant::now();
        let (mut now, mut copies) = (start, 0);
        let copies_of = |verdict: Verdict<'_>| match verdict {
            Verdict::Flood { ports, remotes, .. } => ports.len() - 1 + remotes.len(),
            Verdict::Drop(DropReason::FloodLimit) => 0,
            other => panic!("{other:?}"),
        };
        let mut quiet = udp(B, MacAddr::BROADCAST);
        quiet[29] = 3;
        let mut unicast = udp(B, A);
        unicast[29] = 3;
        for (millis, frames) in storm {
            // At ten a second and 120 hosts the quiet one is far below its own limit.
            now += Duration::from_millis(100 + millis);
            for _ in 0..frames {
                copies += copies_of(engine.handle_frame(&tables, PORT_A, &udp(A, MacAddr::BROADCAST), now));
            }
            prop_assert_eq!(
                copies_of(engine.handle_frame(&tables, PORT_B, &quiet, now)),
                usize::from(hosts) + 3
            );
            prop_assert_eq!(
                engine.handle_frame(&tables, PORT_B, &unicast, now),
                Verdict::Deliver { port: PORT_A }
            );
            let most = f64::from(limit.burst) + (now - start).as_secs_f64() * f64::from(limit.rate);
            prop_assert!(copies as f64 <= most + 1.0, "{copies} copies, at most {most}");
        }
    }
}
