//! Addresses that pass from one container to another: who remembers the former holder reaches the new one at once, nobody gets what
//! was for somebody else, and a host whose table is wrong hears of it.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use control::{AgentHandle, Endpoint, EndpointState, Event, Request, Response, TableChange};
use etherparse::PacketBuilder;
use netns::{Netns, sysctl};
use serde_json::Value;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::member::{ask, connect};
use towline_tests::packet::PacketSocket;
use towline_tests::wire::netlink;
use towline_tests::{TestNetns, sh, try_sh, wait_until};
use vtep::datapath::{Backend, Datapath, PortSpec, UserspaceConfig, UserspaceDatapath};
use vtep::fdb::{Change, NetworkConfig, PortId};
use vtep::settings::WireSettings;
use vtep::{MacAddr, Vni};

const LIMIT: Duration = Duration::from_secs(30);
const REUSED: [&str; 2] = ["10.0.9.50", "fd00:9::50"];

fn run(host: &Host, name: &str, options: &str) {
    host.ok(&format!(
        "run -d --name {name} --network myoverlay {options} -- sleep infinity"
    ));
}

/// The MAC that the container's kernel has for an address, and how sure it is.
fn remembered(container: &Netns, ip: &str) -> String {
    sh(container, &format!("ip neigh show {ip}"))
}

/// The endpoints of the network, as its manager's host shows it.
fn endpoints(host: &Host) -> Vec<Value> {
    let networks = host.json("network inspect myoverlay");
    networks[0]["endpoints"].as_array().unwrap().clone()
}

fn mac_of(host: &Host, name: &str) -> String {
    let endpoints = endpoints(host);
    let found = endpoints.iter().find(|shown| shown["container"] == name);
    found.unwrap()["mac"].as_str().unwrap().to_owned()
}

#[test]
fn who_remembers_the_former_holder_is_told_and_reaches_the_new_one() {
    // Conformance V24.
    for backend in ["offload", "plain"] {
        let cluster = Cluster::joined(2, &["--backend", backend]);
        let [one, two] = &cluster.hosts[..] else {
            unreachable!("two were asked for")
        };
        one.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 --no-flood --opt address-rest=0 myoverlay");
        let [asker, first, second, third] =
            ["asker", "first", "second", "third"].map(|name| cluster.container(name));
        let wanted = format!("--ip {} --ip6 {}", REUSED[0], REUSED[1]);
        run(one, &asker, "");
        let container = Netns::open(&asker).unwrap();
        for family in ["ipv4", "ipv6"] {
            // The kernel would doubt what it remembers after half a minute; here it takes longer than the test.
            let key = format!("net/{family}/neigh/eth0/base_reachable_time_ms");
            sysctl::set(&container, &key, "3600000").unwrap();
        }
        run(two, &first, &wanted);
        for ip in REUSED {
            wait_until(&format!("{ip} is reached"), LIMIT, || {
                let ping = try_sh(&container, &format!("ping -c 1 -W 1 {ip}"));
                ping.status.success()
            });
            let shown = remembered(&container, ip);
            assert!(shown.contains(&mac_of(one, &first)), "{shown}");
        }
        // From the other host to this one, and from this one to itself.
        let mut before = first;
        for (from, to, next) in [(two, one, second), (one, one, third)] {
            from.ok(&format!("rm -f {before}"));
            run(to, &next, &wanted);
            let mac = mac_of(one, &next);
            for ip in REUSED {
                wait_until("the asker's kernel has the new MAC", LIMIT, || {
                    remembered(&container, ip).contains(&mac)
                });
                sh(&container, &format!("ping -c 1 -W 5 {ip}"));
            }
            before = next;
        }
        let status = one.json("status --json");
        // Both families, twice, to the asker alone: an owner is never told of itself.
        assert_eq!(status["cluster"]["traffic"]["announcements"], 4);
        let other = two.json("status --json");
        assert_eq!(other["cluster"]["traffic"]["announcements"], 0);
    }
}

/// A host of its own beside one of the cluster's, made of the libraries: it changes endpoints as fast as a manager takes them, and
/// its table is what the test says. Its containers are namespaces that stay; a port of each comes and goes.
struct Bare {
    control: AgentHandle,
    datapath: UserspaceDatapath,
    slots: Vec<Slot>,
    vni: Vni,
    mtu: u16,
}

struct Slot {
    netns: TestNetns,
    frames: PacketSocket,
}

impl Bare {
    /// Knows what the manager's host shows of the network now, and has no port yet.
    fn beside(cluster: &Cluster, host: &Host, token: &str, slots: u8) -> Self {
        let manager = &cluster.hosts[0];
        let shown = manager.json("network inspect myoverlay");
        let number = |key: &str| shown[0][key].as_u64().unwrap();
        let vni = Vni::new(number("vni").try_into().unwrap()).unwrap();
        let mtu = number("mtu").try_into().unwrap();
        let [.., last] = host.address.octets();
        let vtep = IpAddr::from([192, 0, 2, 100 + last]);
        let net = format!("{vtep}/24").parse().unwrap();
        netlink(&host.netns).add_address("eth0", net).unwrap();
        let at = SocketAddr::new(manager.address.into(), 4789);
        let name = format!("{}-bare", host.name);
        let datapath = UserspaceDatapath::start(UserspaceConfig {
            netns: (*host.netns).clone(),
            vtep,
            port: 4789,
            workers: Some(1),
            backend: Backend::Offload,
            strict_reserved_bits: false,
        });
        let mut bare = Self {
            control: connect(&host.netns, &name, vtep, at, token),
            datapath: datapath.unwrap(),
            slots: Vec::new(),
            vni,
            mtu,
        };
        bare.learn(cluster);
        bare.slots = (0..slots)
            .map(|slot| bare.slot(slot, cluster.container(&format!("b{last}-{slot}"))))
            .collect();
        bare
    }

    fn learn(&self, cluster: &Cluster) {
        let vni = self.vni;
        let mut changes = vec![Change::SetNetwork(NetworkConfig {
            vni,
            mtu: self.mtu,
            gateway_mac: MacAddr::new([2, 0, 0, 0, 0, 0xfe]),
            service_ips: Default::default(),
            gateway_ips: Vec::new(),
            settings: WireSettings {
                flood: false,
                ..WireSettings::default()
            },
        })];
        for endpoint in endpoints(&cluster.hosts[0]) {
            let mut hosts = cluster.hosts.iter();
            let host = hosts.find(|host| endpoint["host"] == host.name.as_str());
            let remote = SocketAddr::new(host.unwrap().address.into(), 4789);
            let mac = endpoint["mac"].as_str().unwrap().parse().unwrap();
            changes.push(Change::SetMember {
                vni,
                remote,
                flood: false,
            });
            changes.push(Change::SetFdb { vni, mac, remote });
        }
        self.datapath.apply(&changes);
    }

    /// A namespace with an interface that is up and has no port.
    fn slot(&self, number: u8, name: String) -> Slot {
        let netns = TestNetns::new(name);
        sysctl::set(&netns, "net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let unused = self.spec(&netns, number, MacAddr::new([2; 6]), Vec::new());
        self.datapath.attach(&unused).unwrap();
        netlink(&netns).set_up("eth0").unwrap();
        let frames = PacketSocket::open(&netns, "eth0");
        self.datapath.release(unused.id).unwrap();
        Slot { netns, frames }
    }

    fn spec(&self, netns: &Netns, slot: u8, mac: MacAddr, ips: Vec<IpAddr>) -> PortSpec {
        PortSpec {
            id: PortId(slot.into()),
            vni: self.vni,
            netns: netns.clone(),
            ifname: "eth0".to_owned(),
            mac,
            ips,
            mtu: self.mtu,
            any_source: false,
            backend: Backend::Offload,
        }
    }

    /// A container comes up in a slot, with an address.
    fn come(&self, slot: u8, name: &str, ip: IpAddr) -> Endpoint {
        let allocate = Request::Allocate {
            network: "myoverlay".to_owned(),
            container: name.to_owned(),
            ips: vec![ip],
            mac: None,
            service: None,
            weight: None,
        };
        let Ok(Response::Endpoint(endpoint)) = ask(&self.control, &allocate) else {
            panic!("{name} does not get {ip}")
        };
        let netns = &self.slots[usize::from(slot)].netns;
        let spec = self.spec(netns, slot, endpoint.mac, endpoint.ips.clone());
        self.datapath.adopt(&spec).unwrap();
        self.control.publish(endpoint.clone(), EndpointState::Up);
        endpoint
    }

    fn go(&self, slot: u8, endpoint: &Endpoint) {
        self.datapath.release(PortId(slot.into())).unwrap();
        let (vni, epoch) = (endpoint.vni, endpoint.epoch);
        ask(&self.control, &Request::Free { vni, epoch }).unwrap();
        // The next of this name may be on another host.
        let release = Request::ReleaseName(endpoint.container.clone());
        ask(&self.control, &release).unwrap();
    }

    fn leave(self) {
        ask(&self.control, &Request::Leave).unwrap();
    }
}

/// Hosts between which addresses move, and containers that send to them.
const HOSTS: u8 = 5;
/// Addresses that are used again and again, each by one container at a time.
const ADDRESSES: u8 = 8;
/// Reuses unless `TOWLINE_REUSES` says otherwise; `scripts/soak` asks for 100,000.
const REUSES: usize = 1000;
/// How often each sender sends to each address.
const PAUSE: Duration = Duration::from_millis(10);
const PORT: u16 = 7000;

fn address(which: u8) -> IpAddr {
    [10, 0, 9, 100 + which].into()
}

/// Sends to every address from one container, for as long as the test lasts: each datagram says whom it is for and who sent it.
fn send(from: &Netns, number: usize, stop: &AtomicBool) {
    let socket = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    while !stop.load(Ordering::Relaxed) {
        for which in 0..ADDRESSES {
            let to = address(which);
            // An address that nobody has just now cannot be resolved, and the kernel says so.
            let _ = socket.send_to(format!("{number}>{to}\n").as_bytes(), (to, PORT));
        }
        std::thread::sleep(PAUSE);
    }
}

/// One life of an address: on this host until every sender has reached it, then gone again.
fn live(bare: &Bare, which: u8, senders: usize) {
    let ip = address(which);
    let frames = &bare.slots[usize::from(which)].frames;
    assert_eq!(
        frames.drain(),
        Vec::<Vec<u8>>::new(),
        "{ip}: nobody is here"
    );
    let endpoint = bare.come(which, &format!("r{which}"), ip);
    let deadline = Instant::now() + LIMIT;
    let mut reached = HashSet::new();
    while reached.len() < senders {
        assert!(
            Instant::now() < deadline,
            "{ip} at {} is reached by {reached:?} of {senders} alone",
            endpoint.mac
        );
        let frame = frames.recv(Duration::from_millis(100));
        reached.extend(frame.map(|frame| sender_of(&frame, &endpoint, ip)));
    }
    bare.go(which, &endpoint);
    for frame in frames.drain() {
        sender_of(&frame, &endpoint, ip);
    }
}

/// Who sent a frame, which may be several that were merged. Panics when it is not for this endpoint.
fn sender_of(frame: &[u8], endpoint: &Endpoint, ip: IpAddr) -> usize {
    // Behind Ethernet, IPv4 and UDP.
    let said = String::from_utf8_lossy(frame.get(42..).unwrap_or_default());
    let first = said.lines().next().unwrap_or_default();
    let (sender, to) = first.split_once('>').unwrap_or_default();
    let mine = frame[..6] == endpoint.mac.octets() && to == ip.to_string();
    assert!(
        mine && said.lines().all(|line| line == first),
        "{ip} at {} got a frame that is another's: {frame:02x?}",
        endpoint.mac
    );
    sender.parse().unwrap()
}

#[test]
fn addresses_that_move_under_traffic_are_reached_and_nobody_gets_what_is_anothers() {
    // Conformance V24.
    let reuses = std::env::var("TOWLINE_REUSES").unwrap_or_default();
    let reuses = reuses.parse().unwrap_or(REUSES);
    let cluster = Cluster::joined(HOSTS, &[]);
    let token = cluster.hosts[0].json("token --json")["token"]
        .as_str()
        .unwrap()
        .to_owned();
    // A flood of frames to an unknown destination goes to everybody, as in any switch.
    cluster.hosts[0]
        .ok("network create --subnet 10.0.9.0/24 --no-flood --opt address-rest=0 myoverlay");
    let senders: Vec<Netns> = (0..)
        .zip(&cluster.hosts)
        .map(|(number, host)| {
            let name = cluster.container(&format!("s{number}"));
            run(host, &name, "");
            Netns::open(&name).unwrap()
        })
        .collect();
    let bares: Vec<Bare> = cluster
        .hosts
        .iter()
        .map(|host| Bare::beside(&cluster, host, &token, ADDRESSES))
        .collect();
    let (stop, turns) = (AtomicBool::new(false), AtomicUsize::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for (number, netns) in senders.iter().enumerate() {
            let stop = &stop;
            scope.spawn(move || send(netns, number, stop));
        }
        let lives: Vec<_> = (0..ADDRESSES)
            .map(|which| {
                let (bares, turns, senders) = (&bares, &turns, senders.len());
                scope.spawn(move || {
                    // Another host each time.
                    for bare in bares.iter().cycle().skip(which.into()) {
                        if turns.fetch_add(1, Ordering::Relaxed) >= reuses {
                            return;
                        }
                        live(bare, which, senders);
                    }
                })
            })
            .collect();
        let failed: Vec<_> = lives
            .into_iter()
            .filter_map(|life| life.join().err())
            .collect();
        stop.store(true, Ordering::Relaxed);
        if let Some(panic) = failed.into_iter().next() {
            std::panic::resume_unwind(panic);
        }
    });
    println!("{reuses} reuses in {:?}", start.elapsed());
    for host in &cluster.hosts {
        let status = host.json("status --json");
        println!(
            "{}: {} announcements; dropped: {}",
            host.name, status["cluster"]["traffic"]["announcements"], status["cluster"]["drops"]
        );
        wait_until("nothing is left of them", LIMIT, || {
            let entries = host.json("fdb --json");
            let mut entries = entries.as_array().unwrap().iter();
            entries.all(|entry| {
                let remote = entry["remote"].as_str().unwrap_or_default();
                !remote.starts_with("192.0.2.10")
            })
        });
    }
    bares.into_iter().for_each(Bare::leave);
}

#[test]
fn a_host_whose_table_is_wrong_hears_of_it_from_who_got_its_frame() {
    let cluster = Cluster::joined(3, &[]);
    let [one, two, three] = &cluster.hosts[..] else {
        unreachable!("three were asked for")
    };
    let token = one.json("token --json")["token"]
        .as_str()
        .unwrap()
        .to_owned();
    one.ok("network create --subnet 10.0.9.0/24 --no-flood myoverlay");
    let names = ["c2", "c3"].map(|name| cluster.container(name));
    run(two, &names[0], "");
    run(three, &names[1], "");
    let bare = Bare::beside(&cluster, one, &token, 1);
    bare.control.subscribe(bare.vni);
    let own = bare.come(0, "sender", address(0));
    let [elsewhere, there] = names.each_ref().map(|name| {
        let netns = Netns::open(name).unwrap();
        PacketSocket::open(&netns, "eth0")
    });
    let (vni, mac) = (bare.vni, mac_of(one, &names[1]).parse().unwrap());
    let lead_to = |host: &Host| {
        let remote = SocketAddr::new(host.address.into(), 4789);
        bare.datapath.apply(&[Change::SetFdb { vni, mac, remote }]);
    };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(own.mac.octets(), mac.octets())
        .ipv4([10, 0, 9, 100], [10, 0, 9, 3], 64)
        .udp(1000, 2000)
        .write(&mut frame, b"misled")
        .unwrap();
    let send = || bare.slots[0].frames.send(&frame).unwrap();
    // What the manager tells of its own accord has come: from here on only a repair says where the MAC is.
    let told = |event| match event {
        Event::Table { changes, .. } => changes.into_iter().find_map(|change| match change {
            TableChange::Mac { mac: told, host } if told == mac => host,
            _ => None,
        }),
        _ => None,
    };
    let mut right = None;
    wait_until("the table has come", LIMIT, || {
        right = right.or(bare.control.events().try_iter().find_map(told));
        right.is_some()
    });
    // The hosts know this one as a member by then, too.
    let heard = |host: &Host| {
        let fdb = host.json("fdb --json").to_string();
        fdb.contains(&own.mac.to_string())
    };
    wait_until("the others know the sender", LIMIT, || {
        heard(two) && heard(three)
    });
    // Several may be merged to one.
    let arrived = |frames: &PacketSocket| {
        let got = frames.drain();
        let mut got = got.iter();
        got.any(|got| got[..12] == frame[..12] && got.ends_with(b"misled"))
    };
    lead_to(two);
    let mut mended = None;
    wait_until("the sender is told", LIMIT, || {
        send();
        mended = bare.control.events().try_iter().find_map(told);
        mended.is_some()
    });
    assert_eq!(mended, right);
    assert!(!arrived(&there), "it was led to another host");
    lead_to(three);
    send();
    wait_until("the frame arrives", LIMIT, || arrived(&there));
    assert!(!arrived(&elsewhere), "it came to who it is not for");
    bare.go(0, &own);
    bare.leave();
}
