//! Thousands of hosts.

use std::time::{Duration, Instant};

use crate::net::Weather;
use crate::plane::Plane;
use crate::world::World;

const HOSTS: usize = 2000;
const NETWORKS: usize = 20;
const SECOND: Duration = Duration::from_secs(1);

/// Two thousand hosts with four thousand endpoints in twenty networks, through all that can go wrong at once: hosts cut off,
/// agents killed, wires slow, the manager killed and its store put back to an older state, addresses used again meanwhile.
#[test]
#[ignore = "takes a minute: scripts/test simulation"]
fn two_thousand_hosts_converge_after_a_bad_day() {
    let began = Instant::now();
    let subnets: Vec<String> = (1..=NETWORKS).map(|n| format!("10.{n}.0.0/22")).collect();
    let mut world = World::empty(3, HOSTS);
    // As many messages in one turn as come at once.
    world.turn = Duration::from_millis(20);
    world.run(SECOND * 2);
    world.make_networks(&subnets.iter().map(String::as_str).collect::<Vec<_>>());
    for host in 0..HOSTS {
        for n in [host, host + 7] {
            let vni = world.networks[n % NETWORKS];
            world.start(host, vni, Vec::new());
        }
    }
    world.run(SECOND * 5);
    let up = world.truth().len();
    assert_eq!(up, 2 * HOSTS, "every endpoint is up within 5 s");
    world.check_settled();
    world.backup = control::Store::load(&mut world.store).unwrap();

    // Ends and beginnings, with the addresses that became free.
    for n in 0..400 {
        if let Some(endpoint) = world.stop(n * 9) {
            world.start((n * 31) % HOSTS, endpoint.vni, endpoint.ips);
        }
        if n % 40 == 0 {
            world.run(SECOND / 2);
        }
    }
    for host in (1..HOSTS).step_by(10) {
        world.part(host, 20_000);
    }
    for host in (2..HOSTS).step_by(20) {
        world.kill_agent(host, 3000);
    }
    for host in (3..HOSTS).step_by(5) {
        world.net.set_weather(
            host,
            Weather {
                delay: 500,
                ..Weather::FAIR
            },
        );
    }
    world.run(SECOND * 3);
    let backup = world.backup.clone();
    world.replace_store(&backup);
    for n in 0..200 {
        world.stop(n * 17);
        world.start((n * 13) % HOSTS, world.networks[n % NETWORKS], Vec::new());
    }
    world.run(SECOND * 30);
    world.settle();
    world.check_settled();
    println!(
        "{HOSTS} hosts, {} endpoints, {:?} of virtual time in {:?}",
        world.truth().len(),
        world.now(),
        began.elapsed()
    );
}
