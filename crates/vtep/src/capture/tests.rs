//! Who sees what, and what it costs those who do not look.

use super::*;

const PORT: PortId = PortId(1);

fn vni(number: u32) -> Vni {
    Vni::new(number).unwrap()
}

fn remote(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 4789))
}

fn datagram(number: u32) -> Vec<u8> {
    [&Header::emit(vni(number))[..], b"frame"].concat()
}

/// Places of what waits.
fn places(capture: &Capture) -> Vec<Place> {
    capture.waiting().map(|copy| copy.place).collect()
}

/// A frame from port 1 on network 7 that is sent to host 2, one flooded from port 2, one delivered to port 1 from
/// host 2, and one from port 3 on network 8 that is dropped.
fn traffic(hub: &CaptureHub) {
    let to_remote = Verdict::Send {
        vni: vni(7),
        remote: remote(2),
    };
    hub.from_port(PORT, Some(vni(7)), b"a", &to_remote);
    hub.to_remote(
        Some(PORT),
        (remote(2), OuterFields::default(), 0),
        &[IoSlice::new(&datagram(7))],
        None,
    );
    let flood = Verdict::Flood {
        vni: vni(7),
        ports: &[PORT, PortId(2)],
        remotes: &[remote(3)],
    };
    hub.from_port(PortId(2), Some(vni(7)), b"b", &flood);
    hub.from_remote(remote(2), 0, &datagram(7), Fate::Deliver(PORT), &[PORT]);
    hub.to_port(
        PORT,
        Some(vni(7)),
        &[IoSlice::new(b"c")],
        Some(DropReason::PortFull),
    );
    let drop = Verdict::Drop(DropReason::GuardMac);
    hub.from_port(PortId(3), Some(vni(8)), b"d", &drop);
    hub.from_remote(remote(3), 0, b"x", Fate::Drop(DropReason::NoVniFlag), &[]);
}

#[test]
fn filters_by_network_port_and_remote() {
    use Place::{FromPort, FromRemote, ToPort, ToRemote};
    let hub = Arc::new(CaptureHub::default());
    let start = |filter| hub.start(filter);
    let none = CaptureFilter::default;
    let captures = [
        start(none()),
        start(CaptureFilter {
            vni: Some(vni(8)),
            ..none()
        }),
        start(CaptureFilter {
            ports: vec![PORT, PortId(9)],
            ..none()
        }),
        start(CaptureFilter {
            remote: Some(remote(3).ip()),
            ..none()
        }),
        start(CaptureFilter {
            vni: Some(vni(7)),
            ports: vec![PortId(2)],
            remote: Some(remote(3).ip()),
        }),
    ];
    traffic(&hub);
    let seen = captures.each_ref().map(places);
    assert_eq!(seen[0].len(), 7);
    assert_eq!(seen[1], [FromPort(PortId(3))]);
    let (out, back) = (ToRemote(remote(2)), FromRemote(remote(2)));
    let flooded = FromPort(PortId(2));
    assert_eq!(seen[2], [FromPort(PORT), out, flooded, back, ToPort(PORT)]);
    assert_eq!(seen[3], [flooded, FromRemote(remote(3))]);
    assert_eq!(seen[4], [flooded]);
}

#[test]
fn a_copy_says_what_became_of_it_and_how_it_was_addressed() {
    let listen = remote(1);
    let hub = Arc::new(CaptureHub::default());
    hub.set_own(listen, (50_000..50_064).collect());
    let capture = hub.start(CaptureFilter::default());
    traffic(&hub);
    let copies: Vec<_> = capture.waiting().collect();
    let fates: Vec<_> = copies.iter().map(|copy| copy.fate).collect();
    let flood = Fate::Flood {
        ports: 1,
        remotes: 1,
    };
    assert_eq!(
        fates,
        [
            Fate::Send(remote(2)),
            Fate::Passed,
            flood,
            Fate::Deliver(PORT),
            Fate::Drop(DropReason::PortFull),
            Fate::Drop(DropReason::GuardMac),
            Fate::Drop(DropReason::NoVniFlag),
        ]
    );
    let out = copies[1].outer.unwrap();
    assert_eq!((out.from.port(), out.to), (50_000, remote(2)));
    assert_eq!(copies[3].outer.unwrap().to, listen);
    assert_eq!(
        (copies[1].frame(), copies[0].frame()),
        (&b"frame"[..], &b"a"[..])
    );
    assert_eq!((copies[6].vni, copies[6].frame()), (None, &[][..]));
}

#[test]
fn a_slow_reader_loses_frames_and_stops_nobody() {
    let hub = Arc::new(CaptureHub::default());
    let slow = hub.start(CaptureFilter::default());
    for _ in 0..QUEUE_COPIES + 3 {
        hub.to_port(PORT, None, &[IoSlice::new(b"x")], None);
    }
    assert_eq!((slow.waiting().count(), slow.missed()), (QUEUE_COPIES, 3));
    // Bytes count as well, and come free again.
    let large = vec![0; 65_000];
    let fit = QUEUE_BYTES / large.len();
    for round in 1..=2 {
        for _ in 0..fit + 2 {
            hub.to_port(PORT, None, &[IoSlice::new(&large)], None);
        }
        assert_eq!(
            (slow.waiting().count(), slow.missed()),
            (fit, 3 + 2 * round)
        );
    }
}

#[test]
fn the_last_reader_switches_it_off() {
    let hub = Arc::new(CaptureHub::default());
    assert!(!hub.is_active());
    let (one, two) = (
        hub.start(CaptureFilter::default()),
        hub.start(CaptureFilter::default()),
    );
    drop(one);
    assert!(hub.is_active());
    drop(two);
    assert!(!hub.is_active());
}
