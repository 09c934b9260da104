//! What a VTEP sends, read by Wireshark's dissectors: nothing malformed, no warning, every checksum right.
#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;

use towline_tests::frames::{
    Udp, arp, cut_to, ethernet, solicitation, tagged, unfinished_tcp, vxlan,
};
use towline_tests::packet::PacketSocket;
use towline_tests::raw::{Rig, VNI};
use towline_tests::wire::{Outer, Setup};
use towline_tests::wire_tests;
use vtep::datapath::Backend;

wire_tests!(what_leaves_is_well_formed, what_is_answered_is_well_formed);

/// Wireshark's severity from which an expert's note is a complaint (`PI_WARN`).
const WARNING: u32 = 0x0060_0000;

/// Classic pcap of Ethernet frames.
fn write_pcap(path: &Path, frames: &[Vec<u8>]) {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 0x0004_0000, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap();
        for word in [0, 0, length, length] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(frame);
    }
    std::fs::write(path, bytes).unwrap();
}

/// The named fields of each frame, all layers' values after each other, and fails when Wireshark complains of one.
fn dissect(frames: &[Vec<u8>], fields: &[&str]) -> Vec<Vec<String>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("seen.pcap");
    write_pcap(&path, frames);
    let mut command = Command::new("tshark");
    command.arg("-n").arg("-r").arg(&path);
    for preference in [
        "ip.check_checksum:TRUE",
        "udp.check_checksum:TRUE",
        "tcp.check_checksum:TRUE",
        // Sequence numbers of a made-up flow are no matter of the VTEP.
        "tcp.analyze_sequence_numbers:FALSE",
    ] {
        command.args(["-o", preference]);
    }
    command.args(["-T", "fields", "-E", "separator=/t", "-E", "occurrence=a"]);
    let complaints = ["_ws.malformed", "_ws.expert.severity", "_ws.expert.message"];
    for field in complaints.iter().chain(fields) {
        command.args(["-e", field]);
    }
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("can't start tshark ({error}): run scripts/setup test"));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Vec<String>> = text
        .lines()
        .map(|line| line.split('\t').map(str::to_owned).collect())
        .collect();
    assert_eq!(rows.len(), frames.len(), "{text}");
    for (row, frame) in rows.iter().zip(frames) {
        let severities = row[1].split(',').filter(|word| !word.is_empty());
        let worst = severities.map(|word| word.parse::<u32>().unwrap()).max();
        assert!(
            row[0].is_empty() && worst.is_none_or(|worst| worst < WARNING),
            "{}: {frame:02x?}",
            row.join(" ")
        );
    }
    rows.into_iter().map(|row| row[3..].to_vec()).collect()
}

/// Conformance V1, V5, V7, V10, V11, V12, V19, V20, V22.
fn what_leaves_is_well_formed(setup: Setup) {
    for outer in [Outer::V4, Outer::V6] {
        let rig = Rig::new(setup, outer);
        rig.pass_tags();
        let mut sent: Vec<Vec<u8>> = Vec::new();
        for inner in [Udp::between, Udp::between6] {
            for (length, ecn) in [(0, 0), (1, 1), (512, 2), (1300, 3)] {
                let udp = Udp {
                    payload: vec![0x21; length],
                    tos: ecn,
                    ..inner(&rig.ours, &rig.theirs)
                };
                sent.push(udp.build());
            }
        }
        let nested = Udp {
            to: (rig.theirs.ip(), 4789).into(),
            payload: vxlan(7, &sent[0]),
            ..Udp::between(&rig.ours, &rig.theirs)
        };
        sent.push(nested.build());
        sent.push(tagged(sent[1].clone(), 0x8100, 5));
        let seen: Vec<_> = sent.iter().map(|frame| rig.sent(frame).frame).collect();
        let rows = dissect(
            &seen,
            &[
                "vxlan.flags",
                "vxlan.vni",
                "vxlan.reserved8",
                "udp.checksum.status",
                "udp.srcport",
            ],
        );
        for row in &rows {
            // The first of each is the outer one; a checksum's status 1 is "good".
            let first = |at: usize| row[at].split(',').next().unwrap().to_owned();
            assert_eq!(
                [first(0), first(1), first(2)],
                ["0x0800".to_owned(), VNI.to_string(), "0".to_owned()]
            );
            assert!(row[3].split(',').all(|status| status == "1"), "{row:?}");
            assert!(first(4).parse::<u16>().unwrap() >= 49_152, "{row:?}");
        }
        if setup.backend == Backend::Offload {
            segments_are_well_formed(&rig);
        }
    }
}

/// What is cut here from one large frame has each header right by itself.
fn segments_are_well_formed(rig: &Rig) {
    let payload: Vec<u8> = (0..20_000u32).map(|at| (at % 251) as u8).collect();
    let frame = unfinished_tcp(&rig.ours, &rig.theirs, &payload);
    let size = rig.ours.mtu - 40;
    PacketSocket::with_vnet_header(&rig.container, "eth0")
        .send_offloaded(cut_to(size), &frame)
        .unwrap();
    let count = payload.len().div_ceil(usize::from(size));
    let mut segments: Vec<_> = (0..count).map(|_| rig.on_wire()).collect();
    segments.sort_by_key(|seen| seen.inner()[38..42].to_vec());
    let frames: Vec<_> = segments.iter().map(|seen| seen.frame.clone()).collect();
    let rows = dissect(
        &frames,
        &["tcp.checksum.status", "tcp.len", "tcp.flags.push"],
    );
    let mut carried = Vec::new();
    for (index, (row, seen)) in rows.iter().zip(&segments).enumerate() {
        let length: usize = row[1].parse().unwrap();
        let last = index + 1 == count;
        assert_eq!(
            (row[0].as_str(), row[2] == "1" || row[2] == "True"),
            ("1", last)
        );
        let bytes = seen.inner();
        carried.extend_from_slice(&bytes[54..54 + length]);
    }
    assert_eq!(carried, payload);
}

/// Conformance V21: ARP replies, advertisements and echo replies that the VTEP makes itself.
fn what_is_answered_is_well_formed(setup: Setup) {
    let rig = Rig::new(setup, Outer::V4);
    let own = rig.ours.mac().octets();
    let (IpAddr::V4(own4), IpAddr::V6(own6)) = (rig.ours.ip(), rig.ours.ip6()) else {
        panic!("an address of each family");
    };
    let gateway4 = Ipv4Addr::new(10, 0, 9, 1);
    let gateway6: Ipv6Addr = "fd09::1".parse().unwrap();
    let gateway_mac = [0x02, 0, 10, 0, 9, 1];
    let (IpAddr::V4(their4), IpAddr::V6(their6)) = (rig.theirs.ip(), rig.theirs.ip6()) else {
        panic!("an address of each family");
    };
    let mut questions = Vec::new();
    for target in [their4, gateway4] {
        for sender in [own4, Ipv4Addr::UNSPECIFIED] {
            questions.push(arp([0xff; 6], 1, (own, sender), ([0; 6], target)));
        }
    }
    for target in [their6, gateway6] {
        for sender in [own6, Ipv6Addr::UNSPECIFIED] {
            questions.push(solicitation((own, sender), target));
        }
    }
    let builder = || etherparse::PacketBuilder::ethernet2(own, gateway_mac);
    for length in [0, 1, 56, 1300] {
        let payload = vec![0x61; length];
        let (mut echo4, mut echo6) = (Vec::new(), Vec::new());
        builder()
            .ipv4(own4.octets(), gateway4.octets(), 64)
            .icmpv4_echo_request(7, 1)
            .write(&mut echo4, &payload)
            .unwrap();
        builder()
            .ipv6(own6.octets(), gateway6.octets(), 64)
            .icmpv6_echo_request(7, 1)
            .write(&mut echo6, &payload)
            .unwrap();
        questions.extend([echo4, echo6]);
    }
    let answers: Vec<_> = questions
        .iter()
        .map(|question| {
            rig.inside.send(question).unwrap();
            rig.at_container()
        })
        .collect();
    let rows = dissect(&answers, &["arp.opcode", "icmpv6.type", "icmp.type"]);
    let expected = |at: usize| match at {
        0..4 => ["2", "", ""],
        4..8 => ["", "136", ""],
        _ if at.is_multiple_of(2) => ["", "", "0"],
        _ => ["", "129", ""],
    };
    for (at, row) in rows.iter().enumerate() {
        assert_eq!(*row, expected(at), "answer {at}");
    }
    // The oracle is awake: it complains of a frame that is wrong.
    let mut wrong = answers[8].clone();
    wrong[24] ^= 1;
    let caught = std::panic::catch_unwind(|| dissect(&[wrong], &[]));
    assert!(caught.is_err(), "a wrong IP checksum went unnoticed");
    let short = ethernet(own, gateway_mac, 0x0806, &[0, 1, 8, 0]);
    let caught = std::panic::catch_unwind(|| dissect(&[short], &[]));
    assert!(caught.is_err(), "a cut-off ARP packet went unnoticed");
}
