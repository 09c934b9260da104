//! The scenarios by which moby tests `networkdb`, its gossip store (`libnetwork/networkdb/convergence_test.go` and its
//! neighbours), and the faults that it had: at 2, 3, 5, 10 and 25 hosts, with the virtual time each takes until every view is
//! right. Wires take 0.25 to 2 ms; the manager takes 1 ms for a turn. Where moby's misses wait for a sweep every 30 s, these
//! must not take 50 ms.

use std::time::Duration;

use control::{EndpointState, MemberState, Request, Response};
use vtep::Vni;

use crate::net::Weather;
use crate::plane::{Plane, check_views};
use crate::world::World;

const SIZES: [usize; 5] = [2, 3, 5, 10, 25];
const SECOND: Duration = Duration::from_secs(1);
/// Endpoint up to every subscriber forwards, at ten hosts; and some more for 25.
const SOON: Duration = Duration::from_millis(50);

fn world(hosts: usize) -> (World, Vni) {
    let mut world = World::with(11, hosts, &["10.1.0.0/16"]);
    let vni = world.networks[0];
    for host in 0..hosts {
        world.start(host, vni, Vec::new());
    }
    world.run(SECOND);
    converged(&mut world, "at the start", SECOND);
    (world, vni)
}

/// Lets time pass until every view is right, and the manager's table as its hosts' programs want it. Answers how long it took.
fn converged(world: &mut World, what: &str, bound: Duration) -> Duration {
    let begin = world.now();
    loop {
        let wanted: usize = world
            .hosts
            .iter()
            .flat_map(|host| &host.runs)
            .filter(|(_, s)| *s == EndpointState::Up)
            .count();
        let idle = world.hosts.iter().all(|host| host.starting.is_empty());
        let views = check_views(world);
        let took = world.now() - begin;
        if idle && views.is_ok() && world.truth().len() == wanted {
            println!("{what}, {} hosts: {took:?}", world.hosts.len());
            return took;
        }
        assert!(
            took < bound,
            "{what}, {} hosts: not after {took:?}: {views:?}",
            world.hosts.len()
        );
        world.run(Duration::from_millis(1));
    }
}

#[test]
fn entries_are_created_updated_and_deleted() {
    for hosts in SIZES {
        let (mut world, vni) = world(hosts);
        world.start(hosts - 1, vni, Vec::new());
        converged(&mut world, "create entry", SOON);
        let last = world
            .hosts
            .iter()
            .map(|host| host.runs.len())
            .sum::<usize>()
            - 1;
        world.toggle(last);
        converged(&mut world, "update entry", SOON);
        world.toggle(last);
        converged(&mut world, "update entry back", SOON);
        world.stop(last);
        converged(&mut world, "delete entry", SOON);
        world.check_settled();
    }
}

#[test]
fn networks_are_joined_and_left() {
    for hosts in SIZES {
        let (mut world, vni) = world(hosts);
        // The last host has one endpoint, the last of all.
        let last = world.hosts.len() - 1;
        world.stop(last);
        converged(&mut world, "leave network", SOON);
        assert!(!world.hosts[last].follows.contains(&vni));
        world.hosts[last].follow(vni);
        world.pump(last);
        converged(&mut world, "join network", SOON);
        world.hosts[last].leave_idle(vni);
        world.pump(last);
        // What moby calls write after join: at once, without waiting for the network's state.
        world.start(last, vni, Vec::new());
        converged(&mut world, "write after join", SOON);
        world.check_settled();
    }
}

#[test]
fn a_populated_network_is_joined() {
    for hosts in SIZES {
        let (mut world, vni) = world(hosts);
        world.stop(hosts - 1);
        converged(&mut world, "leave", SOON);
        for n in 0..500 {
            world.start(n % (hosts - 1), vni, Vec::new());
        }
        converged(&mut world, "500 entries created at once", SECOND);
        world.hosts[hosts - 1].follow(vni);
        world.pump(hosts - 1);
        converged(&mut world, "join populated", SOON);
        world.check_settled();
    }
}

/// A thousand rows from one host at once: an epidemic with bounded resending leaves most hosts without most of them.
#[test]
fn a_burst_of_one_host_reaches_all() {
    let (mut world, vni) = world(25);
    for _ in 0..1000 {
        world.start(7, vni, Vec::new());
    }
    converged(&mut world, "1,000 entries of one host", SECOND);
    world.check_settled();
}

/// Entries of a failed host are kept and its host is masked; when it is back, so is all of it.
#[test]
fn a_failed_host_is_hidden_and_restored() {
    for hosts in SIZES {
        let (mut world, vni) = world(hosts);
        world.run(SECOND * 10);
        let failed = hosts - 1;
        let id = world.hosts[failed].info.id;
        world.part(failed, u32::MAX);
        world.run(SECOND * 3);
        let masked = |world: &World| {
            let view = world.hosts[0].agent.as_ref().unwrap().table(vni).unwrap();
            view.member(id) == MemberState::Masked
        };
        assert!(masked(&world), "within 3 s");
        assert_eq!(check_views(&world), Ok(()), "its entries stay");
        world.run(SECOND * 30);
        world.heal(failed);
        world.run(SECOND * 5);
        assert!(!masked(&world), "within 5 s");
        converged(&mut world, "failed host restored", SECOND);
        world.check_settled();
    }
}

/// Half of the hosts are cut off from the manager, and from nothing else. Both halves change; then the wires are mended.
#[test]
fn islands_grow_together() {
    for hosts in SIZES {
        let (mut world, vni) = world(hosts);
        let cut_off = hosts / 2..hosts;
        for host in cut_off.clone() {
            world.part(host, u32::MAX);
        }
        let before: Vec<_> = world.views().split_off(hosts / 2);
        for host in 0..hosts / 2 {
            world.start(host, vni, Vec::new());
            world.stop(0);
        }
        // Those that are cut off end what they have, and forward on what they know.
        let first = world.hosts[..hosts / 2]
            .iter()
            .map(|host| host.runs.len())
            .sum::<usize>();
        world.toggle(first);
        world.run(SECOND * 60);
        assert_eq!(
            world.views().split_off(hosts / 2),
            before,
            "what they know stays in force"
        );
        cut_off.for_each(|host| world.heal(host));
        converged(&mut world, "islands", SECOND * 5);
        world.check_settled();
    }
}

/// moby#53437: a host that missed the news that another joined refused all of that one's rows for ever.
#[test]
fn a_host_that_missed_anothers_coming_takes_its_rows() {
    let (mut world, vni) = world(3);
    world.net.set_weather(
        1,
        Weather {
            lost: 100,
            ..Weather::FAIR
        },
    );
    world.cut(2);
    world.run(SECOND);
    world.start(2, vni, Vec::new());
    world.run(SECOND / 2);
    world.net.set_weather(1, Weather::FAIR);
    world.start(2, vni, Vec::new());
    converged(&mut world, "news missed", SECOND * 5);
    world.check_settled();
}

/// Deletions are kept for 30 min there and then forgotten, and a host that was away for longer brings the deleted back.
#[test]
fn a_host_that_was_away_for_hours_brings_nothing_back() {
    let (mut world, vni) = world(3);
    let gone = world.hosts[0].runs[0].0.clone();
    world.part(2, u32::MAX);
    world.run(SECOND * 30);
    world.stop(0);
    world.start(0, vni, Vec::new());
    world.run(SECOND * 60 * 60);
    assert!(
        world.hosts[2].installed[&vni]
            .neighbors
            .contains_key(&gone.ips[0]),
        "it knows no better"
    );
    world.heal(2);
    converged(&mut world, "away for an hour", SECOND * 5);
    world.check_settled();
    assert!(
        !world.hosts[2].installed[&vni]
            .neighbors
            .contains_key(&gone.ips[0])
    );
}

/// All hosts at once after the manager's end: each resumes where it was.
#[test]
fn everybody_is_back_soon_after_the_manager() {
    let (mut world, vni) = world(25);
    world.kill_manager(true, 2000);
    world.run(SECOND);
    world.stop(3);
    world.start(4, vni, Vec::new());
    world.run(SECOND * 2);
    converged(&mut world, "manager restarted", SECOND * 5);
    let hosts = world.call(0, Request::Hosts);
    let Ok(Response::Hosts(hosts)) = hosts else {
        panic!("{hosts:?}")
    };
    assert!(hosts.iter().all(|view| view.up), "nobody is masked");
    world.check_settled();
}
