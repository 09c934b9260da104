//! A service `web` on whole hosts, published on port 8080 of each, and what tests ask of it.
//!
//! ```text
//!   client (192.0.2.254, the switch) ──▶ any host:8080 ──▶ any member, on any host
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use netns::Netns;
use serde_json::Value;

use crate::cluster::{Cluster, Host};
use crate::service::{ANSWER_LIMIT, Asked, Asking, Load, Server};
use crate::{strict_times, wait_until};

/// For all that comes true by itself, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
/// How long a question may take while members go: a packet that is lost is sent again after a second, and a busy machine stands still
/// for as long.
pub const QUESTION_LIMIT: Duration = Duration::from_secs(3);
/// The client's addresses.
pub const CLIENT: [&str; 2] = ["192.0.2.254", "2001:db8:2::fe"];
/// A check that finds out soon.
pub const CHECKED: &str =
    "--health-tcp 80 --health-interval 100ms --health-timeout 2s --health-retries 1";

/// The service, on a network of both families.
pub struct Web {
    /// Its members, by name.
    pub members: BTreeMap<String, Member>,
    /// The hosts; the first is the manager.
    pub cluster: Cluster,
}

/// A container of the service.
pub struct Member {
    /// Which host it is on.
    pub host: usize,
    /// Its namespace.
    pub netns: Netns,
    /// What it serves with; none: nothing listens.
    pub server: Option<Server>,
}

impl Web {
    /// The service without members, with these options besides.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn new(hosts: u8, agent_options: &[&str], service_options: &str) -> Self {
        let cluster = Cluster::joined(hosts, agent_options);
        let manager = &cluster.hosts[0];
        manager.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 myoverlay");
        manager.ok(&format!(
            "service create --name web --network myoverlay --publish 8080:80 {service_options}"
        ));
        Self {
            members: BTreeMap::new(),
            cluster,
        }
    }

    /// Starts a member with a server; it serves soon.
    ///
    /// # Panics
    /// When it does not start.
    pub fn add(&mut self, host: usize, name: &str) -> String {
        self.add_with_weight(host, name, 1)
    }

    /// The same for a member of another weight.
    ///
    /// # Panics
    /// When it does not start.
    pub fn add_with_weight(&mut self, host: usize, name: &str, weight: u16) -> String {
        let name = self.cluster.container(name);
        self.cluster.hosts[host].ok(&format!(
            "run -d --name {name} --service web,weight={weight} -- sleep infinity"
        ));
        let netns = open(&name);
        let server = Some(Server::tcp(&netns, &name, 80));
        let member = Member {
            host,
            netns,
            server,
        };
        self.members.insert(name.clone(), member);
        name
    }

    /// Starts a container on the service's network that is no member, and returns its namespace.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn add_client(&self, host: usize, name: &str) -> Netns {
        let name = self.cluster.container(name);
        self.cluster.hosts[host].ok(&format!(
            "run -d --name {name} --network myoverlay -- sleep infinity"
        ));
        open(&name)
    }

    /// Waits until these hosts all send connections to `count` members.
    ///
    /// # Panics
    /// When they don't in time.
    pub fn wait_serving(&self, hosts: &[usize], count: usize) {
        for &host in hosts {
            let host = &self.cluster.hosts[host];
            let serving = || seen(host)["serving"] == count;
            let what = format!("{}: {count} members serve", host.name);
            wait_until(&what, LIMIT, serving);
        }
    }

    /// Where a host's published port is, in both families.
    #[must_use]
    pub fn ports(&self, host: usize) -> [SocketAddr; 2] {
        at(&self.cluster.hosts[host], 8080)
    }

    /// The same of several hosts.
    #[must_use]
    pub fn ports_of(&self, hosts: &[usize]) -> Vec<SocketAddr> {
        hosts.iter().flat_map(|&host| self.ports(host)).collect()
    }

    /// The service's virtual addresses, the IPv4 one first.
    ///
    /// # Panics
    /// When it has not one of each family.
    #[must_use]
    pub fn vips(&self) -> [SocketAddr; 2] {
        let service = &self.cluster.hosts[0].json("service inspect web")[0];
        let mut vips = addresses(&service["vips"]);
        vips.sort();
        let &[v4, v6] = vips.as_slice() else {
            panic!("not two virtual addresses: {service}")
        };
        [(v4, 80).into(), (v6, 80).into()]
    }

    /// A member's addresses on the ingress network.
    ///
    /// # Panics
    /// When its host lists no such member.
    #[must_use]
    pub fn ingress_of(&self, name: &str) -> Vec<IpAddr> {
        let listed = self.cluster.hosts[self.members[name].host].json("ps --json");
        let mut listed = listed.as_array().expect("a list").iter();
        let own = listed
            .find(|container| container["name"] == name)
            .expect("a member's host lists it");
        let places = own["endpoints"].as_array().expect("a list").iter();
        places
            .filter(|place| place["network"] == "ingress")
            .flat_map(|place| addresses(&place["ips"]))
            .collect()
    }

    /// Takes a member away as a person does, with its server when it is gone.
    ///
    /// # Panics
    /// When it stays.
    pub fn remove(&mut self, name: &str) {
        let host = self.members[name].host;
        self.cluster.hosts[host].ok(&format!("rm -f {name}"));
        self.members.remove(name);
    }

    /// Outside of the hosts.
    #[must_use]
    pub fn client(&self) -> &Netns {
        &self.cluster.switch
    }

    /// A connection from outside to each of `targets`.
    ///
    /// # Panics
    /// When one is not taken.
    #[must_use]
    pub fn connect(&self, targets: &[SocketAddr]) -> Vec<Asking> {
        connect(self.client(), targets)
    }
}

/// A connection from `netns` to each of `targets`.
///
/// # Panics
/// When one is not taken.
#[must_use]
pub fn connect(netns: &Netns, targets: &[SocketAddr]) -> Vec<Asking> {
    let connect = |&target| {
        Asking::connect(target, ANSWER_LIMIT).unwrap_or_else(|error| panic!("{target}: {error}"))
    };
    netns
        .run(|| targets.iter().map(connect).collect())
        .expect("the namespace of a running test can be entered")
}

/// A port of a host, in both families.
#[must_use]
pub fn at(host: &Host, port: u16) -> [SocketAddr; 2] {
    let last = host.address.octets()[3];
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, last.into());
    [(host.address, port).into(), (v6, port).into()]
}

fn open(container: &str) -> Netns {
    Netns::open(container).expect("a running container's namespace")
}

fn addresses(list: &Value) -> Vec<IpAddr> {
    let list = list.as_array().expect("a list of addresses").iter();
    list.map(|ip| ip.as_str().expect("a text").parse().expect("an address"))
        .collect()
}

/// What a host's `status` says of the service `web`.
///
/// # Panics
/// When it says nothing of services.
#[must_use]
pub fn seen(host: &Host) -> Value {
    let status = host.json("status --json");
    let services = status["cluster"]["services"].as_array().expect("a list");
    let mut services = services.iter();
    services
        .find(|service| service["name"] == "web")
        .cloned()
        .unwrap_or_default()
}

/// From when on no new connection may fail, `within` after what happened at `since`: a slow machine shows it late, and is given
/// until all hosts show it, unless `TOWLINE_STRICT_TIMES` is set, as `scripts/soak` does.
#[must_use]
pub fn promised(since: Instant, within: Duration) -> Instant {
    if strict_times() {
        since + within
    } else {
        Instant::now().max(since + within)
    }
}

/// For people who measure (`--nocapture`).
pub fn tell_last_failure(asked: &[Asked], since: Instant, what: &str) {
    let failed = asked.iter().filter(|asked| asked.result.is_err());
    match failed.map(|asked| asked.at).max() {
        Some(at) => eprintln!(
            "{what}: the last new connection that failed began {:?} after it",
            at.saturating_duration_since(since)
        ),
        None => eprintln!("{what}: no new connection failed"),
    }
}

/// What a load asked, half a second of it after `from`.
#[must_use]
pub fn stopped_after(load: Load, from: Instant) -> Vec<Asked> {
    std::thread::sleep(from.saturating_duration_since(Instant::now()) + Duration::from_millis(500));
    load.stop()
}
