//! Hosts for tests of names: two networks, containers that ask, and a server for the rest of the world.
//!
//! ```text
//!   container ──▶ 127.0.0.11:53 ──▶ its host's agent ──▶ 192.0.2.254, the switch: a server for the rest of the world
//! ```

use std::time::Duration;

use netns::Netns;

use crate::cluster::{Cluster, Host};
use crate::dns::{Dig, Upstream, dig};
use crate::wait_until;

/// For all that comes true by itself, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Where the server for the rest of the world is.
pub const WORLD: &str = "192.0.2.254";

/// Three hosts with networks `blue`, of both families, and `my.green`, and containers that ask the switch for the rest.
pub struct Named {
    /// The hosts; the first is the manager.
    pub cluster: Cluster,
}

impl Default for Named {
    fn default() -> Self {
        Self::new()
    }
}

impl Named {
    /// The hosts and the networks, without containers.
    ///
    /// # Panics
    /// When they can't be made.
    #[must_use]
    pub fn new() -> Self {
        let cluster = Cluster::joined(3, &[]);
        let manager = &cluster.hosts[0];
        manager.ok("network create --subnet 10.0.9.0/24 --subnet fd00:9::/64 blue");
        manager.ok("network create --subnet 10.0.8.0/24 --opt dns-ttl=60 my.green");
        Self { cluster }
    }

    /// Starts a container that sleeps; its name and namespace.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn run(&self, host: usize, name: &str, options: &str) -> (String, Netns) {
        let name = self.cluster.container(name);
        self.cluster.hosts[host].ok(&format!(
            "run -d --name {name} --dns {WORLD} {options} -- sleep infinity"
        ));
        let netns = Netns::open(&name).expect("the namespace of a container that runs");
        (name, netns)
    }

    /// The server for the rest of the world.
    ///
    /// # Panics
    /// When its port can't be had.
    #[must_use]
    pub fn world(&self) -> Upstream {
        let ip = WORLD.parse().expect("an address");
        Upstream::start(&self.cluster.switch, ip)
    }

    /// The addresses of a container, IPv4 first.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn ips(&self, host: usize, name: &str, network: &str) -> Vec<String> {
        let found = self
            .host(host)
            .json(&format!("resolve {name} --network {network} --json"));
        let records = found["records"].as_array().expect("records").iter();
        records
            .map(|record| record["address"].as_str().expect("an address").to_owned())
            .collect()
    }

    /// One of the hosts.
    #[must_use]
    pub fn host(&self, host: usize) -> &Host {
        &self.cluster.hosts[host]
    }
}

/// Waits until a name has exactly these addresses, or there is no such name, asked as that container asks. Silence and a
/// server's failure are no answers.
///
/// # Panics
/// When it doesn't come true.
pub fn wait_for(netns: &Netns, question: &str, expected: &[&str]) {
    let what = format!("{question} is {expected:?} in {netns}");
    let mut expected: Vec<String> = expected.iter().map(|&ip| ip.to_owned()).collect();
    expected.sort();
    wait_until(&what, LIMIT, || {
        let found = dig(netns, question);
        let answered = ["NOERROR", "NXDOMAIN"].contains(&found.status.as_str());
        answered && found.answers == expected
    });
}

/// The answers of a question that has some, or a name without records of the kind.
///
/// # Panics
/// When there is no such name, or no answer.
#[must_use]
pub fn ok(found: &Dig) -> &[String] {
    assert_eq!(found.status, "NOERROR", "{}", found.text);
    &found.answers
}
