//! Addresses that pass from one container to another: who remembers the former holder reaches the new one at once.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::time::Duration;

use netns::{Netns, sysctl};
use towline_tests::cluster::{Cluster, Host};
use towline_tests::{sh, try_sh, wait_until};

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

fn mac_of(host: &Host, name: &str) -> String {
    let networks = host.json("network inspect myoverlay");
    let endpoints = networks[0]["endpoints"].as_array().unwrap();
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
