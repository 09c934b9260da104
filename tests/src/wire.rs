//! What the wire tests share: two hosts on a veth underlay, containers on a datapath, and bulk TCP whose every byte is
//! compared.
//!
//! ```text
//! a's containers ── datapath ── u0 ═══ veth ═══ u0 ── datapath, or the kernel's vxlan device ── b's
//!                   192.0.2.1 and 2001:db8:2::1     192.0.2.2 and 2001:db8:2::2
//! ```
//!
//! Every wire test takes the datapath as a parameter: [`wire_tests!`](crate::wire_tests) runs it once for each [`Setup`].

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use ipnet::IpNet;
use netns::{Netlink, Netns};
use vtep::datapath::{Backend, Datapath, PortSpec, StartError, UserspaceConfig, UserspaceDatapath};
use vtep::fdb::{Change, NetworkConfig, PortId};
use vtep::settings::WireSettings;
use vtep::vxlan::{DEFAULT_PORT, Family, Protection, overhead};
use vtep::{MacAddr, Vni};

use crate::{TestNetns, sh, unique};

/// The underlay's MTU.
pub const LINK_MTU: u16 = 1500;
/// How long a peer may stay silent before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Starts a datapath on a host.
pub type Start = fn(Netns, IpAddr) -> Result<Box<dyn Datapath>, StartError>;
/// Starts a datapath on a host that is set up otherwise than by default.
pub type StartWith = fn(Netns, IpAddr, Options) -> Result<Box<dyn Datapath>, StartError>;

/// How a host's datapath is set up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The UDP port it receives on.
    pub port: u16,
    /// Whether reserved bits of the VXLAN header are a reason to drop.
    pub strict_reserved_bits: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: DEFAULT_PORT,
            strict_reserved_bits: false,
        }
    }
}

/// What a wire test runs on.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Which datapath.
    pub start: Start,
    /// The same, for tests that need it otherwise than by default.
    pub start_with: StartWith,
    /// Which backend its ports have.
    pub backend: Backend,
}

impl Setup {
    /// Userspace with the `offload` backend.
    pub const OFFLOAD: Self = Self {
        start: |netns, vtep| userspace(netns, vtep, Options::default(), Backend::Offload),
        start_with: |netns, vtep, options| userspace(netns, vtep, options, Backend::Offload),
        backend: Backend::Offload,
    };
    /// Userspace with the `plain` backend.
    pub const PLAIN: Self = Self {
        start: |netns, vtep| userspace(netns, vtep, Options::default(), Backend::Plain),
        start_with: |netns, vtep, options| userspace(netns, vtep, options, Backend::Plain),
        backend: Backend::Plain,
    };
}

fn userspace(
    netns: Netns,
    vtep: IpAddr,
    options: Options,
    backend: Backend,
) -> Result<Box<dyn Datapath>, StartError> {
    let config = UserspaceConfig {
        netns,
        vtep,
        port: options.port,
        workers: Some(2),
        backend,
        strict_reserved_bits: options.strict_reserved_bits,
    };
    Ok(Box::new(UserspaceDatapath::start(config)?))
}

/// Makes a `#[test]` for each named function and each datapath it is to run on.
#[macro_export]
macro_rules! wire_tests {
    ($($test:ident),+ $(,)?) => {
        mod userspace_offload {
            $(#[test] fn $test() { super::$test($crate::wire::Setup::OFFLOAD); })+
        }
        mod userspace_plain {
            $(#[test] fn $test() { super::$test($crate::wire::Setup::PLAIN); })+
        }
    };
}

/// Two hosts with a link between them.
pub struct Pair {
    /// One host.
    pub a: TestNetns,
    /// The other.
    pub b: TestNetns,
    prefix: String,
}

/// Which outer family a test uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outer {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Outer {
    /// The VTEP address of host 1 or 2.
    #[must_use]
    pub fn vtep(self, host: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 0, 2, host).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, u16::from(host)).into(),
        }
    }

    /// The VTEP address and port of host 1 or 2.
    #[must_use]
    pub fn remote(self, host: u8) -> SocketAddr {
        SocketAddr::new(self.vtep(host), DEFAULT_PORT)
    }

    /// The overlay's MTU on a link of [`LINK_MTU`].
    #[must_use]
    pub fn mtu(self) -> u16 {
        LINK_MTU - overhead(Family::of(self.vtep(1)), Protection::Cleartext)
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

impl Pair {
    /// Two new hosts with veth's default offloads.
    ///
    /// # Panics
    /// When they can't be made.
    #[must_use]
    pub fn new() -> Self {
        let prefix = unique("te-");
        let (a, b) = (
            TestNetns::new(format!("{prefix}a")),
            TestNetns::new(format!("{prefix}b")),
        );
        let (on_a, on_b) = (netlink(&a), netlink(&b));
        on_a.add_veth("u0", "u0", &b)
            .expect("a new namespace has no u0");
        for (netlink, host) in [(&on_a, 1), (&on_b, 2)] {
            netlink
                .add_address(
                    "u0",
                    IpNet::new(Outer::V4.vtep(host), 24).expect("24 bits fit IPv4"),
                )
                .expect("u0 is new");
            netlink
                .add_address(
                    "u0",
                    IpNet::new(Outer::V6.vtep(host), 64).expect("64 bits fit IPv6"),
                )
                .expect("u0 is new");
            netlink.set_up("u0").expect("u0 is there");
        }
        Self { a, b, prefix }
    }

    /// Turns every offload of the link off, so that no partial checksum and no packet above the MTU crosses it.
    pub fn without_offloads(self) -> Self {
        for host in [&self.a, &self.b] {
            sh(host, "ethtool -K u0 tx off tso off gso off gro off");
        }
        self
    }

    /// A namespace for a container.
    #[must_use]
    pub fn container(&self, name: &str) -> TestNetns {
        TestNetns::new(format!("{}{name}", self.prefix))
    }
}

/// One container of a test: where it is, and as whom.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// Its port on its host.
    pub port: PortId,
    /// Its network.
    pub vni: Vni,
    /// Last byte of its MAC and addresses.
    pub number: u8,
    /// Its network's MTU.
    pub mtu: u16,
}

impl Endpoint {
    /// Endpoint `number` in network `vni`, on a port of the same number, sized for an IPv4 underlay.
    ///
    /// # Panics
    /// When `vni` is no VNI.
    #[must_use]
    pub fn new(vni: u32, number: u8) -> Self {
        let vni = Vni::new(vni).expect("a test's VNI has 24 bits");
        Self {
            port: PortId(u32::from(number)),
            vni,
            number,
            mtu: Outer::V4.mtu(),
        }
    }

    /// Its MAC.
    #[must_use]
    pub const fn mac(&self) -> MacAddr {
        MacAddr::new([0x02, 0, 10, 0, 9, self.number])
    }

    /// Its IPv4 address, in 10.0.9.0/24.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        Ipv4Addr::new(10, 0, 9, self.number).into()
    }

    /// Its IPv6 address, in fd09::/64.
    #[must_use]
    pub fn ip6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(self.number)).into()
    }

    /// How its port is made in `netns`.
    #[must_use]
    pub fn spec(&self, netns: &Netns, backend: Backend) -> PortSpec {
        PortSpec {
            id: self.port,
            vni: self.vni,
            netns: netns.clone(),
            ifname: "eth0".to_owned(),
            mac: self.mac(),
            ips: vec![self.ip(), self.ip6()],
            mtu: self.mtu,
            any_source: false,
            backend,
        }
    }

    /// Its network, with 10.0.9.1 and fd09::1 as gateway.
    #[must_use]
    pub fn network(&self) -> Change {
        Change::SetNetwork(NetworkConfig {
            vni: self.vni,
            mtu: self.mtu,
            gateway_mac: MacAddr::new([0x02, 0, 10, 0, 9, 1]),
            service_ips: Default::default(),
            gateway_ips: vec![
                "10.0.9.1".parse().expect("an address"),
                "fd09::1".parse().expect("an address"),
            ],
            settings: WireSettings::default(),
        })
    }

    /// What another host's tables say about it when it is at `remote`.
    #[must_use]
    pub fn at(&self, remote: SocketAddr) -> Vec<Change> {
        let (vni, mac) = (self.vni, self.mac());
        vec![
            Change::SetMember {
                vni,
                remote,
                flood: true,
            },
            Change::SetFdb { vni, mac, remote },
            Change::SetNeighbor {
                vni,
                ip: self.ip(),
                mac,
            },
            Change::SetNeighbor {
                vni,
                ip: self.ip6(),
                mac,
            },
        ]
    }

    /// Attaches it to a datapath and sets its interface up.
    ///
    /// # Panics
    /// When it can't be.
    pub fn attach(&self, datapath: &dyn Datapath, netns: &Netns, backend: Backend) {
        datapath.apply(&[self.network()]);
        datapath
            .attach(&self.spec(netns, backend))
            .unwrap_or_else(|error| panic!("{error}: {:?}", error_source(&error)));
        self.configure(netns, "eth0");
    }

    /// Gives an interface its addresses and sets it up.
    ///
    /// # Panics
    /// When it can't be.
    pub fn configure(&self, netns: &Netns, ifname: &str) {
        let netlink = netlink(netns);
        netlink
            .add_address(ifname, IpNet::new(self.ip(), 24).expect("24 bits fit IPv4"))
            .expect("the interface is there");
        netlink
            .add_address(
                ifname,
                IpNet::new(self.ip6(), 64).expect("64 bits fit IPv6"),
            )
            .expect("the interface is there");
        netlink.set_up(ifname).expect("the interface is there");
    }
}

fn error_source(error: &dyn std::error::Error) -> Option<String> {
    error.source().map(ToString::to_string)
}

/// A netlink socket in a namespace.
///
/// # Panics
/// When it can't be opened.
#[must_use]
pub fn netlink(netns: &Netns) -> Netlink {
    Netlink::open(netns).unwrap_or_else(|error| panic!("{error}"))
}

/// What bulk transfers carry: no block of it equals another at any offset that a lost or doubled segment could cause,
/// because its length is prime.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(1_048_583)
    .collect()
}

/// A TCP connection between two namespaces: the end that connected, and the one that listened.
///
/// # Panics
/// When it does not come about in time.
#[must_use]
pub fn connect(from: &Netns, to: &Netns, ip: IpAddr) -> (TcpStream, TcpStream) {
    let listener = to
        .run(|| TcpListener::bind((ip, 0)))
        .expect("a running test's namespace")
        .expect("its own address");
    let address = listener
        .local_addr()
        .expect("a bound socket has an address");
    let client = from
        .run(|| TcpStream::connect_timeout(&address, PATIENCE))
        .expect("a running test's namespace")
        .unwrap_or_else(|error| panic!("can't connect to {address}: {error}"));
    let (server, _) = listener.accept().expect("the connection is there");
    for stream in [&client, &server] {
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a valid time");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("a valid time");
    }
    (client, server)
}

/// Sends `bytes` bytes over a connection and compares each that arrives. `halfway` runs meanwhile, when a quarter has
/// arrived.
///
/// # Panics
/// When something is lost, changed, doubled, or late.
pub fn transfer(mut from: TcpStream, mut to: TcpStream, bytes: usize, halfway: impl FnOnce()) {
    let pattern = pattern();
    let pattern = &pattern;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while sent < bytes {
                let start = sent % pattern.len();
                let block = &pattern[start..pattern.len().min(start + bytes - sent)];
                from.write_all(block)
                    .unwrap_or_else(|error| panic!("after {sent} bytes: {error}"));
                sent += block.len();
            }
        });
        let mut halfway = Some(halfway);
        let (mut received, mut buffer) = (0, vec![0; 256 * 1024]);
        while received < bytes {
            let length = to
                .read(&mut buffer)
                .unwrap_or_else(|error| panic!("after {received} bytes: {error}"));
            assert!(length > 0, "closed after {received} of {bytes} bytes");
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let start = received % pattern.len();
                let expected = &pattern[start..pattern.len().min(start + rest.len())];
                assert!(
                    rest[..expected.len()] == *expected,
                    "other bytes than were sent, near {received}"
                );
                received += expected.len();
                rest = &rest[expected.len()..];
            }
            if received > bytes / 4
                && let Some(halfway) = halfway.take()
            {
                halfway();
            }
        }
        assert_eq!(
            to.read(&mut buffer).expect("the sender closes"),
            0,
            "more than was sent"
        );
    });
}

/// Carries `bytes` bytes each way, one connection opened from each side.
///
/// # Panics
/// See [`transfer`].
pub fn bulk_both_ways(one: (&Netns, IpAddr), other: (&Netns, IpAddr), bytes: usize) {
    let (client, server) = connect(one.0, other.0, other.1);
    transfer(client, server, bytes, || ());
    let (client, server) = connect(other.0, one.0, one.1);
    transfer(client, server, bytes, || ());
    // And against the direction of the handshake.
    let (client, server) = connect(one.0, other.0, other.1);
    transfer(server, client, bytes / 8, || ());
}

/// Pings once a tenth of a second until `count` have been answered, and fails on the first that is not.
///
/// # Panics
/// When one is lost.
pub fn ping(from: &Netns, to: IpAddr, count: u32) {
    sh(from, &format!("ping -c {count} -i 0.1 -W 2 -q {to}"));
}
