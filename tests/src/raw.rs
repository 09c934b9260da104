//! Raw frames at both edges of a datapath: on the underlay, where another host stands, and on a container's port.
//!
//! ```text
//!   container ─ eth0 ── datapath on host a ── u0 ═══ veth ═══ u0 ─ host b: 192.0.2.2, and as many more as are asked for
//!             ▲                                                 ▲
//!          `inside`: what a program with CAP_NET_RAW sends   `outside`: what any machine on the link may send
//! ```
//!
//! Nothing but the test sends anything: the container has no addresses and no IPv6, and the kernel of host b only answers
//! ARP and neighbour solicitations of the underlay.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use vtep::datapath::Datapath;
use vtep::fdb::{Change, NetworkConfig, PortId};
use vtep::settings::Vlan;
use vtep::stats::{Counters, DropReason};
use vtep::vxlan::DEFAULT_PORT;

use crate::frames::{Checksum, Datagram, Seen, Udp, ether_of, vxlan};
use crate::packet::PacketSocket;
use crate::wire::{Endpoint, Options, Outer, Pair, Setup, netlink};
use crate::{TestNetns, try_sh, wait_until};

/// How long anything may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The network of a [`Rig`].
pub const VNI: u32 = 0x12_3456;
/// Frames between two looks at the counters: no more than a TAP's queue or any receive buffer holds.
const CHUNK: usize = 250;

/// A datapath with one container on it, raw sockets at both edges, and a fake host.
pub struct Rig {
    /// The hosts.
    pub pair: Pair,
    /// The family of the underlay.
    pub outer: Outer,
    /// What is tested, on host a.
    pub datapath: Box<dyn Datapath>,
    /// The container's place.
    pub ours: Endpoint,
    /// An endpoint at host b.
    pub theirs: Endpoint,
    /// The container.
    pub container: TestNetns,
    /// In the container, on its port.
    pub inside: PacketSocket,
    /// On host b, on the underlay.
    pub outside: PacketSocket,
    setup: Setup,
    macs: [[u8; 6]; 2],
    // Take the port on host b, so that no ICMP answers.
    _sinks: Vec<UdpSocket>,
}

impl Rig {
    /// Our endpoint 2 here, endpoint 3 at host b, both in network [`VNI`].
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn new(setup: Setup, outer: Outer) -> Self {
        Self::with(setup, outer, Options::default())
    }

    /// The same on a datapath that is set up otherwise.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn with(setup: Setup, outer: Outer, options: Options) -> Self {
        let pair = Pair::new().without_offloads();
        // A new link's IPv6 addresses are reached only some time after it came up.
        let vtep = outer.vtep(1);
        wait_until("the underlay carries packets", PATIENCE, || {
            let ping = try_sh(&pair.b, &format!("ping -c 1 -W 1 -q {vtep}"));
            ping.status.success()
        });
        let datapath = (setup.start_with)((*pair.a).clone(), outer.vtep(1), options)
            .unwrap_or_else(|error| panic!("{error}: {error:?}"));
        let endpoint = |number| Endpoint {
            mtu: outer.mtu(),
            ..Endpoint::new(VNI, number)
        };
        let (ours, theirs) = (endpoint(2), endpoint(3));
        let listeners = ["0.0.0.0", "::"];
        let sinks = pair
            .b
            .run(|| {
                listeners.map(|ip| {
                    let ip: IpAddr = ip.parse().expect("an address");
                    let domain = socket2::Domain::for_address(SocketAddr::new(ip, 0));
                    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)
                        .expect("a UDP socket");
                    if ip.is_ipv6() {
                        socket.set_only_v6(true).expect("before it is bound");
                    }
                    let address = SocketAddr::new(ip, DEFAULT_PORT);
                    socket
                        .bind(&address.into())
                        .expect("nobody has the port on host b");
                    UdpSocket::from(socket)
                })
            })
            .expect("a running test's namespace");
        let container = silent_container(&pair, "c");
        datapath.apply(&[ours.network()]);
        attach(&*datapath, &ours, &container, setup);
        datapath.apply(&theirs.at(outer.remote(2)));
        let mac = |host| {
            let link = netlink(host).link("u0").expect("links can be listed");
            link.expect("u0 is there").mac
        };
        Self {
            inside: PacketSocket::open(&container, "eth0"),
            outside: PacketSocket::open(&pair.b, "u0"),
            macs: [mac(&pair.a), mac(&pair.b)],
            pair,
            outer,
            datapath,
            ours,
            theirs,
            container,
            setup,
            _sinks: sinks.into(),
        }
    }

    /// Another container on host a, with a raw socket on its port.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn neighbor(&self, endpoint: &Endpoint) -> (TestNetns, PacketSocket) {
        let name = format!("c{}-{}", endpoint.vni.get(), endpoint.number);
        let container = silent_container(&self.pair, &name);
        attach(&*self.datapath, endpoint, &container, self.setup);
        let socket = PacketSocket::open(&container, "eth0");
        (container, socket)
    }

    /// One more host on the far side of the link: host `number` has its own address there.
    ///
    /// # Panics
    /// When host b can't have the address.
    pub fn add_host(&self, number: u8) {
        let bits = if self.outer == Outer::V4 { 24 } else { 64 };
        let net = IpNet::new(self.outer.vtep(number), bits).expect("a prefix that fits");
        netlink(&self.pair.b)
            .add_address("u0", net)
            .expect("a new address");
    }

    /// A further endpoint of the network, at a host of its own on the far side.
    ///
    /// # Panics
    /// When host b can't have the host's address.
    #[must_use]
    pub fn further(&self, number: u8) -> Endpoint {
        self.add_host(number);
        let endpoint = Endpoint {
            mtu: self.ours.mtu,
            ..Endpoint::new(self.ours.vni.get(), number)
        };
        self.datapath.apply(&endpoint.at(self.outer.remote(number)));
        endpoint
    }

    /// A further network, sized for an IPv4 underlay: endpoint 2 on a port and a container of its own here, endpoint 3 at host b.
    ///
    /// # Panics
    /// When it can't be made, or `vni` is no VNI.
    #[must_use]
    pub fn further_network(
        &self,
        port: PortId,
        vni: u32,
    ) -> (Endpoint, Endpoint, TestNetns, PacketSocket) {
        let endpoint = |number| Endpoint {
            port,
            ..Endpoint::new(vni, number)
        };
        let (ours, theirs) = (endpoint(2), endpoint(3));
        self.datapath.apply(&[ours.network()]);
        self.datapath.apply(&theirs.at(self.outer.remote(2)));
        let (container, inside) = self.neighbor(&ours);
        (ours, theirs, container, inside)
    }

    /// Requires that `send`, called with 10,000 source MACs that nobody has, moves nothing but the counter of `reason`. The second
    /// byte of the MACs is `mark`.
    ///
    /// # Panics
    /// When a frame is not dropped so, or the tables were changed.
    pub fn learns_nothing(&self, mark: u8, reason: DropReason, send: impl Fn([u8; 6])) {
        let before = self.datapath.tables();
        let macs: Vec<[u8; 6]> = (0..10_000u16)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                [0x02, mark, 0, 0, high, low]
            })
            .collect();
        for some in macs.chunks(CHUNK) {
            self.dropped(reason, some.len() as u64, || {
                for source in some {
                    send(*source);
                }
            });
        }
        assert!(
            Arc::ptr_eq(&before, &self.datapath.tables()),
            "the tables were changed"
        );
        self.still_works();
    }

    /// From now on the network passes 802.1Q tags.
    pub fn pass_tags(&self) {
        self.set_network(|config| config.settings.vlan = Vlan::Pass);
    }

    /// From now on the network floods nothing.
    pub fn stop_floods(&self) {
        self.set_network(|config| config.settings.flood = false);
    }

    /// Changes what the network is, from what it is at first.
    ///
    /// # Panics
    /// Never: an endpoint's network is one change.
    pub fn set_network(&self, change: impl FnOnce(&mut NetworkConfig)) {
        let Change::SetNetwork(mut config) = self.ours.network() else {
            unreachable!("an endpoint's network is one change");
        };
        change(&mut config);
        self.datapath.apply(&[Change::SetNetwork(config)]);
    }

    /// A datagram from host b, its VXLAN header right, with this frame.
    #[must_use]
    pub fn carry(&self, frame: &[u8]) -> Datagram {
        self.datagram(vxlan(VNI, frame))
    }

    /// A datagram from host b with this payload.
    #[must_use]
    pub fn datagram(&self, payload: Vec<u8>) -> Datagram {
        Datagram {
            from: SocketAddr::new(self.outer.vtep(2), 50_000),
            to: self.outer.remote(1),
            tos: 0,
            ttl: 64,
            checksum: Checksum::Right,
            payload,
        }
    }

    /// Puts a datagram on the link, towards host a.
    ///
    /// # Panics
    /// When the link refuses it.
    pub fn from_host(&self, datagram: &Datagram) {
        self.on_link(ether_of(datagram.from), &datagram.packet());
    }

    /// Puts an IP packet on the link, towards host a.
    ///
    /// # Panics
    /// When the link refuses it.
    pub fn on_link(&self, ether_type: u16, packet: &[u8]) {
        let mut frame = [self.macs[0], self.macs[1]].concat();
        frame.extend(ether_type.to_be_bytes());
        frame.extend(packet);
        self.outside
            .send(&frame)
            .unwrap_or_else(|error| panic!("{} bytes on the link: {error}", frame.len()));
    }

    /// The next frame that reaches the container.
    ///
    /// # Panics
    /// When none does in time.
    #[must_use]
    pub fn at_container(&self) -> Vec<u8> {
        self.inside
            .recv(PATIENCE)
            .unwrap_or_else(|| panic!("no frame for the container: {:?}", self.drops()))
    }

    /// The next VXLAN datagram on the link.
    ///
    /// # Panics
    /// When none comes in time.
    #[must_use]
    pub fn on_wire(&self) -> Seen {
        loop {
            let frame = self
                .outside
                .recv(PATIENCE)
                .unwrap_or_else(|| panic!("no datagram on the link: {:?}", self.drops()));
            if let Some(seen) = Seen::parse(&frame) {
                return seen;
            }
        }
    }

    /// What the container sends, as host b gets it.
    ///
    /// # Panics
    /// When it does not come in time.
    #[must_use]
    pub fn sent(&self, frame: &[u8]) -> Seen {
        self.inside.send(frame).expect("the port is up");
        self.on_wire()
    }

    /// What host b sends, as the container gets it.
    ///
    /// # Panics
    /// When it does not come in time.
    #[must_use]
    pub fn delivered(&self, datagram: &Datagram) -> Vec<u8> {
        self.from_host(datagram);
        self.at_container()
    }

    /// Runs `act`, which is to end in exactly `count` drops for `reason` and in nothing else: no frame for the container
    /// and no datagram on the link.
    ///
    /// # Panics
    /// When anything else comes of it.
    pub fn dropped(&self, reason: DropReason, count: u64, act: impl FnOnce()) {
        let before = self.datapath.counters();
        act();
        let now = || self.datapath.counters();
        let so_far = || now().drops.get(reason) - before.drops.get(reason);
        let limit = Instant::now() + PATIENCE;
        while so_far() < count && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(2));
        }
        let after = now();
        assert_eq!(
            (so_far(), after.drops.total() - before.drops.total()),
            (count, count),
            "drops for {}, and all: {:?}",
            reason.name(),
            self.drops()
        );
        // Counters of what passed are no use here: they follow a frame that a test has seen, a moment later.
        assert_eq!(self.inside.drain(), Vec::<Vec<u8>>::new());
        assert_eq!(self.wire_drain().len(), 0);
    }

    /// Fails when a frame does not cross in each direction, unchanged.
    ///
    /// # Panics
    /// When one is lost or changed.
    pub fn still_works(&self) {
        let there = Udp::between(&self.ours, &self.theirs).build();
        assert_eq!(self.sent(&there).inner(), there);
        let back = Udp::between(&self.theirs, &self.ours).build();
        assert_eq!(self.delivered(&self.carry(&back)), back);
    }

    /// All VXLAN datagrams on the link that have not been looked at.
    #[must_use]
    pub fn wire_drain(&self) -> Vec<Seen> {
        let frames = self.outside.drain();
        frames
            .iter()
            .filter_map(|frame| Seen::parse(frame))
            .collect()
    }

    /// What was dropped since the start, and why.
    #[must_use]
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let counters = self.datapath.counters();
        counters
            .drops
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| (reason.name(), count))
            .collect()
    }

    /// Waits until `count` datagrams have come in since `before`.
    ///
    /// # Panics
    /// When they don't in time.
    pub fn wait_for_datagrams(&self, before: &Counters, count: u64) {
        wait_until("every datagram is looked at", PATIENCE, || {
            self.datapath.counters().datagrams_in - before.datagrams_in >= count
        });
    }
}

/// A container whose kernel sends nothing by itself.
fn silent_container(pair: &Pair, name: &str) -> TestNetns {
    let container = pair.container(name);
    for scope in ["all", "default"] {
        let key = format!("net/ipv6/conf/{scope}/disable_ipv6");
        netns::sysctl::set(&container, &key, "1").expect("a namespace's own setting");
    }
    container
}

fn attach(datapath: &dyn Datapath, endpoint: &Endpoint, container: &TestNetns, setup: Setup) {
    datapath
        .attach(&endpoint.spec(container, setup.backend))
        .unwrap_or_else(|error| panic!("{error}"));
    netlink(container)
        .set_up("eth0")
        .expect("the port's interface is there");
}
