//! Containers on two hosts with real agents between them: ping, bulk TCP, and agents that are killed meanwhile.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use netns::{Netlink, Netns};
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{sh, wait_until};

const GIGABYTE: u64 = 1_000_000_000;
const LIMIT: Duration = Duration::from_secs(20);

/// Content that is different at every place, so that a lost, doubled or misplaced byte shows.
fn word(index: u64) -> [u8; 8] {
    let mut z = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()
}

/// Sends `bytes` of content over TCP from one container to another and checks each byte that arrives.
/// `progress` follows the bytes received.
fn transfer(from: &Netns, to: &Netns, address: IpAddr, bytes: u64, progress: &AtomicU64) {
    let listener = to.run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
    let target: SocketAddr = listener.local_addr().unwrap();
    let words = bytes / 8;
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let mut stream = from.run(|| TcpStream::connect(target)).unwrap().unwrap();
            stream
                .set_write_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            let mut next = 0;
            while next < words {
                let end = words.min(next + 8192);
                let chunk: Vec<u8> = (next..end).flat_map(word).collect();
                stream.write_all(&chunk).unwrap();
                next = end;
            }
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut chunk = vec![0; 65_536];
        let mut next = 0;
        while next < words {
            let length = usize::try_from((words - next) * 8)
                .unwrap()
                .min(chunk.len());
            stream.read_exact(&mut chunk[..length]).unwrap();
            for (at, got) in chunk[..length].chunks_exact(8).enumerate() {
                assert_eq!(
                    got,
                    word(next),
                    "byte {} of the content, {at} of the chunk",
                    next * 8
                );
                next += 1;
            }
            progress.store(next * 8, Ordering::Relaxed);
        }
        assert_eq!(
            stream.read(&mut chunk).unwrap(),
            0,
            "more arrived than was sent"
        );
        sender.join().unwrap();
    });
}

/// Two containers on two hosts, on one network of both families.
struct Pair {
    cluster: Cluster,
    names: [String; 2],
}

impl Pair {
    fn new(agent_options: &[&str]) -> Self {
        let cluster = Cluster::joined(2, agent_options);
        cluster.hosts[0]
            .ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 -d overlay myoverlay");
        let names = [cluster.container("c1"), cluster.container("c2")];
        for (host, name) in cluster.hosts.iter().zip(&names) {
            host.ok(&format!(
                "run -d --name {name} --network myoverlay -- sleep infinity"
            ));
        }
        Self { cluster, names }
    }

    fn netns(&self, index: usize) -> Netns {
        Netns::open(&self.names[index]).unwrap()
    }
}

/// The address of this family on a container's eth0, link-local ones aside.
fn address(netns: &Netns, v6: bool) -> IpAddr {
    let local = "fe80::/10".parse::<ipnet::IpNet>().unwrap();
    Netlink::open(netns)
        .unwrap()
        .addresses()
        .unwrap()
        .into_iter()
        .find(|address| {
            address.ifname == "eth0"
                && address.net.addr().is_ipv6() == v6
                && !local.contains(&address.net.addr())
        })
        .unwrap_or_else(|| panic!("{netns}: eth0 has no address of the family asked for"))
        .net
        .addr()
}

fn ping(from: &Netns, to: IpAddr) {
    let said = sh(from, &format!("ping -c 5 -i 0.05 -W 5 {to}"));
    assert!(said.contains(" 0% packet loss"), "{said}");
}

#[test]
fn ping_and_a_gigabyte_both_ways() {
    for backend in ["offload", "plain"] {
        let pair = Pair::new(&["--backend", backend]);
        let (c1, c2) = (pair.netns(0), pair.netns(1));
        for v6 in [false, true] {
            ping(&c1, address(&c2, v6));
            ping(&c2, address(&c1, v6));
        }
        // The whole gigabyte on the backend that people use; the other is slow and its code is one system call.
        let bytes = if backend == "offload" {
            GIGABYTE
        } else {
            GIGABYTE / 10
        };
        transfer(&c1, &c2, address(&c2, false), bytes, &AtomicU64::new(0));
        transfer(&c2, &c1, address(&c1, false), bytes, &AtomicU64::new(0));
        transfer(
            &c1,
            &c2,
            address(&c2, true),
            GIGABYTE / 10,
            &AtomicU64::new(0),
        );
    }
}

#[test]
fn addresses_go_in_order_across_hosts() {
    let pair = Pair::new(&[]);
    assert_eq!(
        address(&pair.netns(0), false),
        "10.0.9.2".parse::<IpAddr>().unwrap()
    );
    assert_eq!(
        address(&pair.netns(1), false),
        "10.0.9.3".parse::<IpAddr>().unwrap()
    );
}

#[test]
fn ipv6_underlay() {
    let cluster = Cluster::start(2, &[]);
    let [h1, h2] = &cluster.hosts[..] else {
        unreachable!("two were asked for")
    };
    let token = h1.json("init --advertise 2001:db8:2::1 --json")["token"]
        .as_str()
        .unwrap()
        .to_owned();
    h2.ok(&format!(
        "join --token {token} --advertise 2001:db8:2::2 2001:db8:2::1"
    ));
    h1.ok("network create --subnet 10.0.9.0/24 myoverlay");
    let network = h1.json("network inspect myoverlay --json");
    assert_eq!(network[0]["mtu"], 1430, "V14: 1500 - 70 over IPv6");
    let names = [cluster.container("c1"), cluster.container("c2")];
    for (host, name) in cluster.hosts.iter().zip(&names) {
        host.ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
    }
    let (c1, c2) = (
        Netns::open(&names[0]).unwrap(),
        Netns::open(&names[1]).unwrap(),
    );
    ping(&c1, address(&c2, false));
    transfer(
        &c1,
        &c2,
        address(&c2, false),
        GIGABYTE / 20,
        &AtomicU64::new(0),
    );
}

/// Kills and restarts the agent of `host` as soon as a fifth of the content is over.
fn restart_in_the_middle(pair: &mut Pair, host: usize) {
    let (c1, c2) = (pair.netns(0), pair.netns(1));
    let to = address(&c2, false);
    let bytes = GIGABYTE / 4;
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| transfer(&c1, &c2, to, bytes, &progress));
        wait_until("the transfer is on its way", LIMIT, || {
            progress.load(Ordering::Relaxed) > bytes / 5
        });
        let host: &mut Host = &mut pair.cluster.hosts[host];
        host.kill_agent();
        assert!(
            progress.load(Ordering::Relaxed) < bytes,
            "the transfer ended before the agent was killed"
        );
        host.start_agent();
        running.join().unwrap();
    });
}

#[test]
fn a_transfer_outlives_the_agents() {
    let mut pair = Pair::new(&[]);
    // The second host's, then the first's, which is the manager too.
    restart_in_the_middle(&mut pair, 1);
    restart_in_the_middle(&mut pair, 0);
    ping(&pair.netns(0), address(&pair.netns(1), false));
}

/// A veth end that goes when the container's namespace is truly gone, and not only its name.
fn plant_probe(pair: &Pair, container: usize) {
    Netlink::open(&pair.cluster.switch)
        .unwrap()
        .add_veth("probe", "probe", &pair.netns(container))
        .unwrap();
}

fn probe_is_gone(pair: &Pair) -> bool {
    Netlink::open(&pair.cluster.switch)
        .unwrap()
        .link("probe")
        .unwrap()
        .is_none()
}

/// Ends the container's command from outside.
fn end_command(name: &str) {
    let pids = std::process::Command::new("ip")
        .args(["netns", "pids", name])
        .output()
        .unwrap();
    for pid in String::from_utf8_lossy(&pids.stdout).split_whitespace() {
        assert!(
            std::process::Command::new("kill")
                .args(["-9", pid])
                .status()
                .unwrap()
                .success()
        );
    }
}

#[test]
fn a_container_that_ends_after_an_agent_restart_leaves_no_namespace() {
    let mut pair = Pair::new(&[]);
    let host = &mut pair.cluster.hosts[1];
    host.kill_agent();
    host.start_agent();
    // The restarted agent has opened the TAP's queues from inside the namespace.
    ping(&pair.netns(0), address(&pair.netns(1), false));
    plant_probe(&pair, 1);
    end_command(&pair.names[1]);
    wait_until("the namespace is gone", LIMIT, || {
        !Netns::exists(&pair.names[1]) && probe_is_gone(&pair)
    });
    let fdb = pair.cluster.hosts[0]
        .json("fdb --network myoverlay --json")
        .to_string();
    assert!(
        !fdb.contains("192.0.2.2"),
        "the other host still has the endpoint: {fdb}"
    );
}

#[test]
fn a_container_that_ends_while_no_agent_runs_leaves_no_namespace() {
    let mut pair = Pair::new(&[]);
    pair.cluster.hosts[1].kill_agent();
    plant_probe(&pair, 1);
    end_command(&pair.names[1]);
    pair.cluster.hosts[1].start_agent();
    wait_until("the namespace is gone", LIMIT, || {
        !Netns::exists(&pair.names[1]) && probe_is_gone(&pair)
    });
    wait_until("the address is free again", LIMIT, || {
        !pair.cluster.hosts[0]
            .json("fdb --network myoverlay --json")
            .to_string()
            .contains("192.0.2.2")
    });
}

#[test]
fn two_networks_of_one_host_do_not_meet() {
    let cluster = Cluster::joined(1, &[]);
    let host = &cluster.hosts[0];
    host.ok("network create --subnet 10.0.9.0/24 one");
    host.ok("network create --subnet 10.0.10.0/24 two");
    let names = [cluster.container("c1"), cluster.container("c2")];
    host.ok(&format!(
        "run -d --name {} --network one -- sleep infinity",
        names[0]
    ));
    host.ok(&format!(
        "run -d --name {} --network two -- sleep infinity",
        names[1]
    ));
    let (c1, c2) = (
        Netns::open(&names[0]).unwrap(),
        Netns::open(&names[1]).unwrap(),
    );
    let refused = towline_tests::try_sh(&c1, &format!("ping -c 1 -W 1 {}", address(&c2, false)));
    assert!(
        !refused.status.success(),
        "{}",
        String::from_utf8_lossy(&refused.stdout)
    );
    ping(&c1, "10.0.9.1".parse().unwrap());
}
