//! Three hosts with a container each, on one network.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use etherparse::PacketBuilder;
use vtep::fdb::{Change, NetworkConfig, Port, PortId, TableWriter};
use vtep::misdelivery::Misdeliveries;
use vtep::settings::WireSettings;
use vtep::stats::{Counters, DropReason, WorkerCounters};
use vtep::tap::Backend;
use vtep::testing::{Container, MemoryTap, MemoryUnderlay, Wire};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};
use vtep::{MacAddr, Vni};

pub(crate) const VNI: u32 = 4096;
pub(crate) const MTU: u16 = 1450;
pub(crate) const PORT: PortId = PortId(1);

pub(crate) struct Host {
    pub(crate) addr: SocketAddr,
    pub(crate) writer: TableWriter,
    pub(crate) worker: Worker<MemoryUnderlay>,
    pub(crate) counters: Arc<WorkerCounters>,
    pub(crate) misdeliveries: Arc<Misdeliveries>,
    pub(crate) container: Container,
}

pub(crate) struct Cluster {
    pub(crate) wire: Wire,
    pub(crate) hosts: Vec<Host>,
}

pub(crate) fn vni(number: u32) -> Vni {
    Vni::new(number).unwrap()
}

pub(crate) fn mac(number: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, number])
}

pub(crate) fn ip(number: u8) -> IpAddr {
    IpAddr::from([10, 0, 9, 1 + number])
}

pub(crate) fn port(number: u8) -> Port {
    Port {
        id: PORT,
        vni: vni(VNI),
        mac: mac(number),
        ips: vec![ip(number)],
        mtu: MTU,
        any_source: false,
    }
}

impl Cluster {
    pub(crate) fn new(backend: Backend) -> Self {
        Self::with_underlay(backend, |number| {
            SocketAddr::from(([192, 0, 2, number], 4789))
        })
    }

    pub(crate) fn with_underlay(backend: Backend, addr: impl Fn(u8) -> SocketAddr) -> Self {
        let wire = Wire::new(7);
        let host = |number| {
            let network = NetworkConfig {
                vni: vni(VNI),
                mtu: MTU,
                gateway_mac: mac(0xfe),
                service_ips: Default::default(),
                gateway_ips: vec![IpAddr::from([10, 0, 9, 1])],
                settings: WireSettings::default(),
            };
            let mut changes = vec![Change::SetNetwork(network), Change::AddPort(port(number))];
            for other in (1..=3).filter(|other| *other != number) {
                let remote = addr(other);
                changes.push(Change::SetMember {
                    vni: vni(VNI),
                    remote,
                    flood: true,
                });
                changes.push(Change::SetFdb {
                    vni: vni(VNI),
                    mac: mac(other),
                    remote,
                });
                changes.push(Change::SetNeighbor {
                    vni: vni(VNI),
                    ip: ip(other),
                    mac: mac(other),
                });
            }
            let mut writer = TableWriter::new();
            writer.apply(&changes);
            let (tap, container) = MemoryTap::new(1_000);
            let config = WorkerConfig::new(writer.shared());
            let misdeliveries = Arc::clone(&config.misdeliveries);
            let mut worker = Worker::new(wire.underlay(addr(number)), config);
            worker.add_port(PORT, MTU, backend, Box::new(tap));
            Host {
                addr: addr(number),
                counters: worker.counters(),
                misdeliveries,
                writer,
                worker,
                container,
            }
        };
        let hosts = (1..=3).map(host).collect();
        Self { wire, hosts }
    }

    /// Host by its number, from 1.
    pub(crate) fn host(&mut self, number: usize) -> &mut Host {
        &mut self.hosts[number - 1]
    }

    /// Lets all hosts work until nothing moves, with the clock moving past all delays.
    pub(crate) fn run(&mut self) {
        self.wire.run(|now| {
            self.hosts
                .iter_mut()
                .fold(false, |worked, host| host.worker.run_once(now) | worked)
        });
    }

    /// The frames that a host's container got.
    pub(crate) fn taken(&mut self, number: usize) -> Vec<Vec<u8>> {
        self.host(number)
            .container
            .take()
            .into_iter()
            .map(|(frame, _)| frame)
            .collect()
    }

    /// Requires exactly these drops on a host, and no others.
    pub(crate) fn assert_drops(&mut self, number: usize, expected: &[(DropReason, u64)]) {
        let sum = Counters::sum([&self.host(number).counters]);
        let moved: Vec<_> = sum.drops.iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(moved, expected, "host {number}");
    }
}

pub(crate) fn udp(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    flow(from, mac(to), 1000, payload)
}

pub(crate) fn flow(from: u8, to: MacAddr, source_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac(from).octets(), to.octets())
        .ipv4([10, 0, 9, 1 + from], [10, 0, 9, 99], 64)
        .udp(source_port, 2000)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

pub(crate) fn encapsulated(frame: &[u8]) -> Vec<u8> {
    [&Header::emit(vni(VNI))[..], frame].concat()
}
