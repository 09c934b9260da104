//! Static mode: two hosts whose tables come from a file, and the kernel's own `vxlan` device as a third.
//!
//! ```text
//!   h1  agent --static     h2  agent --static      h3  kernel vxlan, no agent
//!    ├─ blue (namespace)    └─ c1 (towline run)      └─ vx0
//!    └─ red  (later)
//! ```
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use netns::{Netlink, Netns, Vxlan};
use serde_json::Value;
use tempfile::TempDir;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{TestNetns, sh, try_sh, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
const VNI: u32 = 4097;

/// The last byte of an endpoint's MAC address and of its addresses.
fn mac(number: u8) -> String {
    format!("02:00:0a:00:09:{number:02x}")
}

fn ip(number: u8) -> IpAddr {
    [10, 0, 9, number].into()
}

fn ip6(number: u8) -> IpAddr {
    [0xfd09, 0, 0, 0, 0, 0, 0, number.into()].into()
}

/// What the tests share: hosts h1 and h2 in static mode, h3 with a kernel device, and the file.
struct Stand {
    cluster: Cluster,
    blue: TestNetns,
    red: String,
    c1: String,
    folder: TempDir,
}

impl Stand {
    fn start() -> Self {
        let mut cluster = Cluster::start(3, &[]);
        let (blue, red) = (TestNetns::new(unique("tw-blue")), unique("tw-red"));
        let c1 = cluster.container("c1");
        for host in &mut cluster.hosts {
            host.kill_agent();
        }
        let stand = Self {
            cluster,
            blue,
            red,
            c1,
            folder: TempDir::new().unwrap(),
        };
        stand.write(&stand.tables(&[2, 3, 4]));
        stand.make_kernel_peer();
        stand
    }

    /// Starts the agents of h1 and h2.
    fn begin(&mut self) {
        let file = self.file().display().to_string();
        for host in &mut self.cluster.hosts[..2] {
            host.set_agent_options(&["--static", &file]);
            host.start_agent();
        }
        let c1 = &self.c1;
        self.cluster.hosts[1].ok(&format!(
            "run -d --name {c1} --network net1 -- sleep infinity"
        ));
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("tables.toml")
    }

    fn write(&self, text: &str) {
        fs::write(self.file(), text).unwrap();
    }

    /// A file with these endpoints: 2 is blue, 3 is c1, 4 is the kernel's, 5 is red.
    fn tables(&self, endpoints: &[u8]) -> String {
        let mut text = String::new();
        for (index, host) in self.cluster.hosts.iter().enumerate() {
            let (name, number) = (&host.name, index + 1);
            text += &format!("[[hosts]]\nname = '{name}'\nvtep = '192.0.2.{number}'\n\n");
        }
        text += &format!(
            "[[networks]]\nname = 'net1'\nvni = {VNI}\nsubnets = ['10.0.9.0/24', 'fd09::/64']\n\n"
        );
        for &number in endpoints {
            let (host, place) = match number {
                2 => (0, format!("netns = '{}'", self.blue.name())),
                3 => (1, format!("container = '{}'", self.c1)),
                4 => (2, "container = 'vx0'".to_owned()),
                _ => (0, format!("netns = '{}'\ninterface = 'over0'", self.red)),
            };
            text += &format!(
                "[[endpoints]]\nnetwork = 'net1'\nhost = '{}'\nmac = '{}'\nips = ['{}', '{}']\n{place}\n\n",
                self.cluster.hosts[host].name,
                mac(number),
                ip(number),
                ip6(number),
            );
        }
        text
    }

    /// A device on h3 that knows where the others are.
    fn make_kernel_peer(&self) {
        let h3 = &self.cluster.hosts[2].netns;
        let netlink = Netlink::open(h3).unwrap();
        let spec = Vxlan {
            vni: VNI,
            local: [192, 0, 2, 3].into(),
            port: 4789,
            learning: false,
            dev: Some("eth0".to_owned()),
            udp_checksum: true,
        };
        let octets = |number| [0x02, 0, 0x0a, 0, 9, number];
        netlink.add_vxlan("vx0", &spec).unwrap();
        netlink.set_mac("vx0", octets(4)).unwrap();
        netlink.set_mtu("vx0", 1450).unwrap();
        for net in [
            IpNet::new(ip(4), 24).unwrap(),
            IpNet::new(ip6(4), 64).unwrap(),
        ] {
            netlink.add_address("vx0", net).unwrap();
        }
        netlink.set_up("vx0").unwrap();
        for (number, host) in [(2, 1), (3, 2), (5, 1)] {
            netlink
                .add_fdb("vx0", octets(number), [192, 0, 2, host].into())
                .unwrap();
            for ip in [ip(number), ip6(number)] {
                netlink.add_neighbor("vx0", ip, octets(number)).unwrap();
            }
        }
    }

    fn h1(&self) -> &Host {
        &self.cluster.hosts[0]
    }

    /// Sends h1 SIGHUP.
    fn reload(&self) {
        sh(
            &self.h1().netns,
            &format!("kill -HUP {}", self.h1().agent_pid()),
        );
    }

    /// Everyone reaches everyone.
    fn ping_all(&self) {
        let c1 = Netns::open(&self.c1).unwrap();
        let kernel = &self.cluster.hosts[2].netns;
        let all: [(&Netns, u8); 3] = [(&self.blue, 2), (&c1, 3), (kernel, 4)];
        for (from, own) in all {
            for (_, number) in all.iter().filter(|(_, number)| *number != own) {
                ping(from, ip(*number));
                ping(from, ip6(*number));
            }
        }
    }
}

/// Pings until there is an answer: an IPv6 address may still be tentative (RFC 4862 §5.4).
fn ping(from: &Netns, to: IpAddr) {
    wait_until(&format!("{to} answers"), LIMIT, || {
        try_sh(from, &format!("ping -c 1 -W 1 -q {to}"))
            .status
            .success()
    });
}

/// The index of an interface, if it is there.
fn interface(netns: &Netns, name: &str) -> Option<u32> {
    let link = Netlink::open(netns).unwrap().link(name).unwrap();
    link.map(|link| link.index)
}

fn source(host: &Host) -> Value {
    host.json("status --json")["cluster"]["static"].clone()
}

fn macs(host: &Host) -> Vec<String> {
    let entries = host.json("fdb --json");
    let entries = entries.as_array().unwrap().iter();
    let found = entries.filter(|entry| entry["kind"] != "gateway");
    found
        .map(|entry| entry["mac"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn hosts_without_a_manager_and_a_kernel_peer_reach_each_other() {
    let mut stand = Stand::start();
    stand.begin();
    stand.ping_all();

    // What can be looked at, and what is refused by name.
    let h1 = stand.h1();
    assert_eq!(macs(h1), [mac(2), mac(3), mac(4)]);
    let status = h1.ok("status");
    assert!(status.contains("static: tables come from"), "{status}");
    assert_eq!(h1.json("status --json")["cluster"]["role"], "static");
    assert_eq!(h1.json("network ls --json")[0]["vni"], VNI);
    let inspected = h1.json("network inspect net1");
    assert_eq!(inspected[0]["endpoints"].as_array().unwrap().len(), 3);
    assert_eq!(h1.json("host ls --json")[1]["state"], "static");
    for refused in [
        "init",
        "join --token tl1-x 192.0.2.2",
        "token",
        "ca export /nowhere/ca.pem",
        "network create net2",
        "network rm net1",
        "host rm x",
        "promote",
        "update --vxlan-port 5000",
        "verify",
        "events",
    ] {
        h1.refused(refused, 1, &["static"]);
    }
    let c1 = &stand.c1;
    h1.refused(
        &format!("run --name {c1}x --network net1 -- true"),
        125,
        &["no endpoint of container"],
    );

    // A killed agent's successor takes its port up again.
    let index = interface(&stand.blue, "eth0");
    assert!(index.is_some());
    stand.cluster.hosts[0].kill_agent();
    stand.cluster.hosts[0].start_agent();
    stand.ping_all();
    assert_eq!(interface(&stand.blue, "eth0"), index);

    // Another agent would not know what to do with what is here.
    let mut h1 = stand.cluster.hosts.remove(0);
    h1.kill_agent();
    let state = h1.state_dir();
    let refused = h1.towline(&format!("agent --name x --state-dir {}", state.display()));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("--static"),
        "{said}"
    );
    h1.start_agent();

    // To leave takes all away.
    h1.ok("leave");
    assert_eq!(interface(&stand.blue, "eth0"), None);
}

#[test]
fn the_file_is_read_again_whole_or_not_at_all() {
    let mut stand = Stand::start();
    stand.begin();
    stand.ping_all();
    let h1 = stand.h1();

    // Files that do not do: nothing changes, and the operator is told.
    let good = stand.tables(&[2, 3, 4]);
    let lying = stand.tables(&[5, 3, 4]).replace("10.0.9.5", "10.0.9.4");
    for (bad, said) in [
        ("[[hosts", "line 1"),
        (&lying, "another endpoint of the network has 10.0.9.4"),
    ] {
        stand.write(bad);
        stand.reload();
        wait_until("the bad file is told of", LIMIT, || {
            source(h1)["problem"]
                .as_str()
                .is_some_and(|problem| problem.contains(said))
        });
        assert!(h1.log().contains("nothing was changed"), "{}", h1.log());
        assert_eq!(macs(h1), [mac(2), mac(3), mac(4)]);
        stand.ping_all();
        stand.write(&good);
        stand.reload();
        wait_until("the good file is taken", LIMIT, || {
            source(h1)["problem"].is_null()
        });
    }

    // An endpoint goes, and one comes whose namespace is not there yet.
    stand.write(&stand.tables(&[2, 3, 5]));
    stand.reload();
    wait_until("what is missing is told of", LIMIT, || {
        source(h1)["ports"][0]
            .as_str()
            .is_some_and(|port| port.contains(&stand.red))
    });
    wait_until("the kernel's endpoint is gone", LIMIT, || {
        macs(h1) == [mac(2), mac(3)]
    });
    assert!(
        !try_sh(&stand.blue, "ping -c 1 -W 1 10.0.9.4")
            .status
            .success()
    );
    let red = TestNetns::new(&stand.red);
    wait_until("its port comes with it", LIMIT, || {
        source(h1)["ports"] == Value::Array(Vec::new())
    });
    ping(&red, ip(2));
    ping(&stand.blue, ip(5));
    assert!(interface(&red, "over0").is_some());

    // The namespace goes, and nothing of the agent holds it.
    drop(red);
    wait_until("its end is noticed", LIMIT, || {
        source(h1)["ports"][0].is_string()
    });

    // An endpoint of this host goes, with its interface.
    stand.write(&stand.tables(&[3, 4]));
    stand.reload();
    wait_until("the interface goes", LIMIT, || {
        interface(&stand.blue, "eth0").is_none()
    });
    wait_until("nothing is missing", LIMIT, || {
        source(h1)["ports"] == Value::Array(Vec::new())
    });

    // What a running container has stays as it is.
    let h2 = &stand.cluster.hosts[1];
    sh(&h2.netns, &format!("kill -HUP {}", h2.agent_pid()));
    wait_until("h2 has read it too", LIMIT, || source(h2)["reads"] == 2);
    stand.write(&stand.tables(&[4]));
    sh(&h2.netns, &format!("kill -HUP {}", h2.agent_pid()));
    wait_until("the file that forgets it is refused", LIMIT, || {
        source(h2)["problem"]
            .as_str()
            .is_some_and(|problem| problem.contains("runs with"))
    });
    let c1 = Netns::open(&stand.c1).unwrap();
    ping(&c1, ip(4));
}
