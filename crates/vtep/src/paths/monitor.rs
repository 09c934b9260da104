//! Judges what is said about paths: a kernel's word is taken, a router's only when it quotes what this host sent.
//!
//! Anyone who can send to this host can send it an ICMP error with a forged source. It is believed when the datagram it quotes is
//! one that this host may have sent: a network that the remote is a member of, from a MAC that is here to one that is there, and longer
//! than the size it claims to be the limit. All else, and what quotes too little to tell (RFC 792 asks for no more than eight bytes
//! of UDP header), only has the path probed.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Paths, least};
use crate::ethernet::{self, Frame};
use crate::fdb::{Location, SharedTables, Tables};
use crate::vxlan::{Class, Family, Header, Protection, classify, overhead};

/// Somebody says that a datagram was too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathReport<'a> {
    /// Where the datagram was to go.
    pub to: SocketAddr,
    /// The largest IP packet that would pass, in bytes, as they say; 0 when they don't.
    pub mtu: u32,
    /// Whether it was this host's own kernel that refused it; else it is an ICMP error from anywhere.
    pub local: bool,
    /// What the error quotes of the datagram's UDP payload, from its start; of a local one all or nothing.
    pub quoted: &'a [u8],
}

/// Who is told what is said about paths: by any of the threads that send, and by one that waits for it.
pub trait PathListener: Send + Sync {
    /// Takes a report.
    fn told(&self, report: &PathReport<'_>, now: Instant);
}

/// Judges reports by the tables and writes down what is believed.
#[derive(Clone)]
pub struct PathMonitor {
    tables: SharedTables,
    paths: Arc<Paths>,
}

impl PathMonitor {
    /// A monitor that writes to `paths`.
    #[must_use]
    pub const fn new(tables: SharedTables, paths: Arc<Paths>) -> Self {
        Self { tables, paths }
    }
}

impl PathListener for PathMonitor {
    fn told(&self, report: &PathReport<'_>, now: Instant) {
        let (paths, remote) = (&self.paths, report.to.ip());
        let tables = self.tables.load();
        if tables.remote_meter(remote).is_none() {
            // A stranger, or a member that has just gone: nobody sends there.
            paths.doubted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mtu = u16::try_from(report.mtu).unwrap_or(u16::MAX);
        let ours = report.local || was_sent_here(&tables, remote, report.quoted, mtu);
        if !ours || mtu < least(remote) {
            paths.doubted.fetch_add(1, Ordering::Relaxed);
            // A probe of ours that was refused tells by not arriving.
            if classify(report.quoted) != Class::Probe {
                paths.suspect(remote);
            }
            return;
        }
        paths.believed.fetch_add(1, Ordering::Relaxed);
        if paths.lower(remote, mtu, now) {
            tracing::info!(%remote, mtu, local = report.local, "the path to this host carries less than the link");
        }
    }
}

/// Whether this host may have sent a datagram that begins so, and it was longer than `mtu` on the wire.
fn was_sent_here(tables: &Tables, remote: IpAddr, quoted: &[u8], mtu: u16) -> bool {
    let Some((header, frame)) = Header::parse(quoted) else {
        return false;
    };
    let Some(network) = tables.network(header.vni) else {
        return false;
    };
    let Some(frame) = Frame::parse(frame) else {
        return false;
    };
    let from_here = matches!(network.lookup(frame.source()), Some(Location::Local(_)));
    let to_there = match network.lookup(frame.destination()) {
        Some(Location::Remote(behind)) => behind.ip() == remote,
        Some(Location::Local(_)) => false,
        // Groups and unknown addresses go to every member.
        None => network.config().settings.flood,
    };
    // All but the Ethernet header, which the overhead counts, and what stands before the quoted packet.
    let tags = frame.payload_offset() - ethernet::HEADER_LEN;
    let too_long = ip_len(&frame).is_some_and(|len| {
        len + tags + usize::from(overhead(Family::of(remote), Protection::Cleartext))
            > usize::from(mtu)
    });
    header.vni_valid
        && !header.reserved
        && network.is_member(remote)
        && from_here
        && to_there
        && too_long
}

/// How long the frame's IP packet says it is, in bytes, though its end may not be quoted.
fn ip_len(frame: &Frame<'_>) -> Option<usize> {
    let short = |at: usize| {
        let bytes = frame.payload().get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    };
    match frame.ethertype() {
        ethernet::TYPE_IPV4 => short(2),
        // RFC 8200 §3: what follows the fixed header of 40 bytes.
        ethernet::TYPE_IPV6 => Some(short(4)? + 40),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;
    use crate::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
    use crate::paths::Reports;
    use crate::settings::WireSettings;
    use crate::{MacAddr, Vni};

    const HERE: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const THERE: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);
    const ELSEWHERE: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 3]);
    const VNI: u32 = 4096;

    fn remote(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 4789))
    }

    /// A host with one port, and members at 2 and 3.
    fn monitor() -> (PathMonitor, Arc<Paths>) {
        let vni = Vni::new(VNI).unwrap();
        let mut writer = TableWriter::new();
        let mut changes = vec![
            Change::SetNetwork(NetworkConfig {
                vni,
                mtu: 1450,
                gateway_mac: MacAddr::new([2, 0, 0, 0, 0, 0xfe]),
                service_ips: Default::default(),
                gateway_ips: Vec::new(),
                settings: WireSettings::default(),
            }),
            Change::AddPort(Port {
                id: PortId(1),
                vni,
                mac: HERE,
                ips: Vec::new(),
                mtu: 1450,
                any_source: false,
            }),
        ];
        for (mac, remote) in [(THERE, remote(2)), (ELSEWHERE, remote(3))] {
            changes.push(Change::SetMember {
                vni,
                remote,
                flood: true,
            });
            changes.push(Change::SetFdb { vni, mac, remote });
        }
        writer.apply(&changes);
        let paths = Arc::new(Paths::new());
        (PathMonitor::new(writer.shared(), Arc::clone(&paths)), paths)
    }

    /// A datagram's payload as an error quotes it.
    fn quoted(vni: u32, from: MacAddr, to: MacAddr, v6: bool, len: usize) -> Vec<u8> {
        let mut payload = Header::emit(Vni::new(vni).unwrap()).to_vec();
        let builder = PacketBuilder::ethernet2(from.octets(), to.octets());
        let builder = if v6 {
            builder.ipv6([1; 16], [2; 16], 64)
        } else {
            builder.ipv4([10, 0, 9, 2], [10, 0, 9, 3], 64)
        };
        let headers = if v6 { 48 } else { 28 };
        builder
            .udp(1, 2)
            .write(&mut payload, &vec![0; len - headers])
            .unwrap();
        payload.truncate(548);
        payload
    }

    fn report(mtu: u32, quoted: &[u8]) -> PathReport<'_> {
        PathReport {
            to: remote(2),
            mtu,
            local: false,
            quoted,
        }
    }

    #[test]
    fn a_router_is_believed_when_it_quotes_what_was_sent() {
        // Conformance V13, H6.
        let now = Instant::now();
        for v6 in [false, true] {
            let (monitor, paths) = monitor();
            let quoted = quoted(VNI, HERE, THERE, v6, 1450);
            monitor.told(&report(1400, &quoted), now);
            assert_eq!(paths.mtu(remote(2).ip(), now), Some(1400));
            assert_eq!(paths.mtu(remote(3).ip(), now), None);
            assert!(paths.take_suspects().is_empty());
            // The shortest quote that tells: up to the inner packet's length.
            let least = 8 + 14 + if v6 { 6 } else { 4 };
            monitor.told(&report(1300, &quoted[..least]), now);
            assert_eq!(paths.mtu(remote(2).ip(), now), Some(1300));
        }
    }

    #[test]
    fn forged_errors_only_have_the_path_probed() {
        // Conformance H6: an ICMP error must quote what this host may have sent.
        let (monitor, paths) = monitor();
        let now = Instant::now();
        let right = quoted(VNI, HERE, THERE, false, 1450);
        let mut reserved = right.clone();
        reserved[1] = 1;
        for (what, quoted) in [
            ("nothing quoted", Vec::new()),
            ("eight bytes of header", right[..8].to_vec()),
            ("no length", right[..8 + 14].to_vec()),
            ("another network", quoted(7, HERE, THERE, false, 1450)),
            ("from nowhere", quoted(VNI, ELSEWHERE, THERE, false, 1450)),
            ("to another host", quoted(VNI, HERE, ELSEWHERE, false, 1450)),
            (
                "to a port of this host",
                quoted(VNI, HERE, HERE, false, 1450),
            ),
            (
                "a packet that fits what is claimed",
                quoted(VNI, HERE, THERE, false, 1350),
            ),
            ("bits that are never set", reserved),
            ("no VXLAN", vec![0; 548]),
        ] {
            monitor.told(&report(1400, &quoted), now);
            assert_eq!(paths.mtu(remote(2).ip(), now), None, "{what}");
            assert_eq!(paths.take_suspects().len(), 1, "{what}");
        }
        // RFC 1191 §5: a router of old that names no size; and sizes that no path has.
        for mtu in [0, 68, 575] {
            monitor.told(&report(mtu, &right), now);
            assert_eq!(paths.mtu(remote(2).ip(), now), None, "{mtu}");
        }
        let stranger = PathReport {
            to: remote(9),
            local: true,
            ..report(1400, &right)
        };
        monitor.told(&stranger, now);
        assert_eq!(paths.all(now), []);
        let probe = crate::probe::payload(&remote(2), &[7; 16], 1500).unwrap();
        assert_eq!(paths.take_suspects().len(), 1);
        monitor.told(&report(1400, &probe), now);
        assert!(paths.take_suspects().is_empty());
        let reports = Reports {
            believed: 0,
            doubted: 15,
        };
        assert_eq!(paths.reports(), reports);
    }

    #[test]
    fn the_own_kernel_is_believed() {
        let (monitor, paths) = monitor();
        let now = Instant::now();
        let local = PathReport {
            local: true,
            ..report(1400, &[])
        };
        monitor.told(&local, now);
        assert_eq!(paths.mtu(remote(2).ip(), now), Some(1400));
    }
}
