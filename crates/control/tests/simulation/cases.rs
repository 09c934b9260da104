//! Scenarios by name: what an operator may see, and lines of the conformance page.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use control::manager::GRACE;
use control::service::ServiceSpec;
use control::{Endpoint, EndpointState, Epoch, MemberState, Request, Response, State, TableChange};
use vtep::{MacAddr, Vni};

use crate::check::sorted;
use crate::faults::remove;
use crate::net::Weather;
use crate::plane::Plane;
use crate::world::{World, network_name};

const SECOND: Duration = Duration::from_secs(1);

fn one_network(hosts: usize) -> (World, Vni) {
    let world = World::with(7, hosts, &["10.0.9.0/28"]);
    let vni = world.networks[0];
    (world, vni)
}

/// Starts a container and waits until it runs.
fn started(world: &mut World, host: usize, vni: Vni) -> Endpoint {
    let before = world.hosts[host].runs.len();
    world.start(host, vni, Vec::new());
    world.run(SECOND);
    assert_eq!(world.hosts[host].runs.len(), before + 1, "it runs");
    world.hosts[host].runs[before].0.clone()
}

fn member(world: &World, viewer: usize, vni: Vni, of: usize) -> MemberState {
    world.hosts[viewer]
        .agent
        .as_ref()
        .unwrap()
        .table(vni)
        .unwrap()
        .member(world.hosts[of].info.id)
}

#[test]
fn a_silent_host_is_masked_and_a_healed_one_unmasked() {
    let (mut world, vni) = one_network(4);
    let endpoint = started(&mut world, 1, vni);
    started(&mut world, 0, vni);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Up);
    // Nothing is masked while the manager is young: hosts may still be on their way back.
    world.part(1, 60_000);
    world.run(GRACE - world.now() - SECOND / 2);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Up);
    world.run(SECOND);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Masked);
    let table = world.hosts[0].agent.as_ref().unwrap().table(vni).unwrap();
    assert_eq!(
        table.mac_host(endpoint.mac),
        Some(world.hosts[1].info.id),
        "a mask removes no unicast entry"
    );
    world.heal(1);
    world.run(SECOND);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Up);
    // From now on a host that falls silent is masked within 3 s, and back within 5 s of being healed.
    world.part(1, 60_000);
    world.run(SECOND * 3);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Masked);
    world.run(SECOND * 20);
    world.heal(1);
    world.run(SECOND * 5);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Up);
    world.settle();
    world.check_settled();
}

#[test]
fn a_reused_address_has_another_mac_and_a_rest() {
    let (mut world, vni) = one_network(2);
    let mut last: HashMap<IpAddr, (MacAddr, Duration)> = HashMap::new();
    for _ in 0..60 {
        let endpoint = started(&mut world, 0, vni);
        let before = last.insert(endpoint.ips[0], (endpoint.mac, world.now()));
        if let Some((mac, freed)) = before {
            assert_ne!(mac, endpoint.mac);
            assert!(world.now() - freed >= control::allocator::REST);
        }
        world.stop(0);
        world.run(SECOND);
    }
    let leased = 13 / 4;
    assert_eq!(
        last.len() + leased,
        13,
        "round the whole subnet, but what its host is leased ahead"
    );
}

#[test]
fn a_host_that_returns_after_its_removal_takes_its_ports_down() {
    let (mut world, vni) = one_network(3);
    started(&mut world, 1, vni);
    world.part(1, 60_000);
    world.run(SECOND * 15);
    let gone = world.hosts[1].info.clone();
    world.removed.insert(gone.id);
    assert_eq!(world.call(0, remove(&gone.name)), Ok(Response::Done));
    assert_eq!(world.hosts[1].runs.len(), 1);
    world.settle();
    assert!(world.hosts[1].runs.is_empty());
    world.check_settled();
}

/// Conformance H13: a host publishes an entry for another host.
#[test]
fn nobody_edits_another_hosts_rows() {
    let (mut world, vni) = one_network(2);
    let endpoint = started(&mut world, 1, vni);
    let rows = |world: &World| sorted(world.manager.as_ref().unwrap().table(vni).unwrap().rows());
    let before = rows(&world);
    assert_eq!(before[0].state, State::Up);
    let liar = world.hosts[0].agent.as_mut().unwrap();
    liar.publish(endpoint.clone(), EndpointState::Down);
    let forged = Endpoint {
        epoch: Epoch::new(1, endpoint.epoch.counter() + 100),
        ..endpoint
    };
    liar.publish(forged, EndpointState::Up);
    world.pump(0);
    world.run(SECOND);
    assert_eq!(rows(&world), before);
}

/// Conformance V24: an endpoint that moves to another host is reached there, and news of its old place changes nothing, in
/// whatever order it comes. The old owner's wire is so slow that its last words come after all others'.
#[test]
fn an_endpoint_that_moves_is_reached_at_its_new_place() {
    let (mut world, vni) = one_network(4);
    for host in [0, 3] {
        started(&mut world, host, vni);
    }
    let old = started(&mut world, 1, vni);
    let slow = Weather {
        delay: 2000,
        ..Weather::FAIR
    };
    world.net.set_weather(1, slow);
    world.hosts[1].publish(old.clone(), EndpointState::Down);
    world.pump(1);
    let at = world.hosts[1]
        .runs
        .iter()
        .position(|(e, _)| *e == old)
        .unwrap();
    let which = world.hosts[0].runs.len() + at;
    assert_eq!(world.stop(which), Some(old.clone()));
    // The manager frees it when it hears of that, and only then is it given away.
    let moved = loop {
        world.start(2, vni, old.ips.clone());
        world.run(SECOND / 10);
        if let Some((moved, _)) = world.hosts[2].runs.first() {
            break moved.clone();
        }
        assert!(world.now() < SECOND * 30, "{} was never free", old.ips[0]);
    };
    world.run(SECOND / 10);
    assert!(moved.epoch > old.epoch && moved.mac != old.mac);
    for viewer in [0, 3] {
        let installed = &world.hosts[viewer].installed[&vni];
        assert_eq!(installed.neighbors[&old.ips[0]], moved.mac);
        assert_eq!(installed.macs[&moved.mac], world.hosts[2].info.id);
        assert_eq!(installed.macs.get(&old.mac), None);
    }
    // News of the old holder that was under way all the time.
    let late = control::Row {
        ip: old.ips[0],
        epoch: old.epoch,
        owner: world.hosts[1].info.id,
        owner_seq: u32::MAX,
        state: State::Up,
        mac: old.mac,
        member: None,
        names: None,
    };
    let mut table = world.hosts[0]
        .agent
        .as_ref()
        .unwrap()
        .table(vni)
        .unwrap()
        .clone();
    let mut changes: Vec<TableChange> = Vec::new();
    for state in [State::Up, State::Down, State::Free] {
        assert!(!table.apply(
            control::Row {
                state,
                ..late.clone()
            },
            &mut changes
        ));
    }
    assert_eq!(changes, []);
    world.settle();
    world.check_settled();
}

/// Conformance H15: a host that was frozen, and whose clock leaps when it goes on, as a laptop's does.
#[test]
fn a_host_that_slept_is_back_within_five_seconds() {
    let (mut world, vni) = one_network(3);
    for host in 0..3 {
        started(&mut world, host, vni);
    }
    world.run(GRACE);
    world.hosts[1].frozen_until = world.now() + SECOND * 600;
    world.run(SECOND * 600);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Masked);
    world.hosts[1].ahead += SECOND * 600;
    world.run(SECOND * 5);
    assert_eq!(member(&world, 0, vni, 1), MemberState::Up);
    assert_eq!(world.hosts[1].runs.len(), 1, "what ran runs on");
    world.settle();
    world.check_settled();
}

/// What a connection carries keeps its order however often its host is stopped: rows that came in another would have to be
/// asked for again.
#[test]
fn a_host_that_is_stopped_twice_hears_all_in_order() {
    let (mut world, vni) = one_network(2);
    for host in [0, 1] {
        started(&mut world, host, vni);
    }
    let began = world.now();
    world.hosts[1].frozen_until = began + SECOND;
    world.start(0, vni, Vec::new());
    world.run(SECOND / 2);
    // What comes from now on is heard at once with what waits already, when both freezes are over.
    world.hosts[1].frozen_until = began + SECOND * 2;
    world.start(0, vni, Vec::new());
    world.run(began + SECOND * 2 - world.now());
    let place = |world: &World, host: usize| {
        let agent = world.hosts[host].agent.as_ref().unwrap();
        let stream = agent.status(world.now()).subscriptions.remove(0);
        (stream.generation, stream.revision)
    };
    assert_eq!(place(&world, 1), place(&world, 0));
}

/// Conformance H15: a store of old, a clock that was years ahead when it was written, and a host that was away for longer than
/// the manager waits. What the lost life handed out must not be handed out again under the same epoch.
#[test]
fn a_clock_that_was_ahead_hides_no_lost_store() {
    let (mut world, vni) = one_network(4);
    let normal = world.clock;
    world.clock += SECOND * 86_400 * 365;
    world.kill_manager(true, 100);
    world.run(SECOND * 30);
    world.backup = control::Store::load(&mut world.store).unwrap();
    world.clock = normal;
    // A life of the store that is about to be lost: the host that is given something then goes away.
    world.kill_manager(true, 100);
    world.run(SECOND * 30);
    let kept = started(&mut world, 3, vni);
    world.part(3, 60_000);
    let backup = world.backup.clone();
    world.replace_store(&backup);
    world.run(SECOND * 30);
    // The successor hands out as many epochs as its predecessor did, and more.
    for _ in 0..3 {
        started(&mut world, 1, vni);
    }
    let again: Vec<Epoch> = world.hosts[1].runs.iter().map(|(e, _)| e.epoch).collect();
    assert!(
        !again.contains(&kept.epoch),
        "{kept:?} was handed out twice"
    );
    world.settle();
    world.check_settled();
}

/// Conformance H15: an agent is killed and its host's state is older than what the manager knows of it.
#[test]
fn a_host_that_restarts_with_an_older_state_converges() {
    let (mut world, vni) = one_network(3);
    started(&mut world, 0, vni);
    let kept = started(&mut world, 1, vni);
    let older = world.hosts[1].runs.clone();
    let since = started(&mut world, 1, vni);
    world.hosts[1].publish(kept.clone(), EndpointState::Down);
    world.pump(1);
    world.run(SECOND);
    world.kill_agent(1, 100);
    // The disk is put back: what was started since is not known there, and what was down is up.
    world.hosts[1].runs = older;
    world.settle();
    world.check_settled();
    let table = world.manager.as_ref().unwrap().table(vni).unwrap();
    assert_eq!(table.row(kept.ips[0]).unwrap().state, State::Up);
    assert_eq!(
        table.row(since.ips[0]).unwrap().state,
        State::Free,
        "nobody holds it"
    );
}

/// A member is about to go: its host may end it once nobody sends it connections any more, and is told who still may.
#[test]
fn a_member_goes_when_every_host_that_is_there_has_heard_that_it_serves_no_more() {
    let (mut world, vni) = one_network(4);
    let name = network_name(0);
    let spec = ServiceSpec::named("web", &name);
    assert!(world.call(0, Request::CreateService(spec)).is_ok());
    for host in 0..3 {
        started(&mut world, host, vni);
    }
    // The last host is on no network, and is not waited for.
    world.run(GRACE);
    let which = 1;
    world.serve(which, true);
    world.run(SECOND);
    let host = (0..3)
        .find(|&host| {
            world.hosts[host]
                .runs
                .iter()
                .any(|(e, _)| e.member.is_some())
        })
        .expect("one is a member");
    let other = (host + 1) % 3;
    let serving = |world: &World, of: usize| {
        let agent = world.hosts[of].agent.as_ref().unwrap();
        let rows = agent.table(vni).unwrap().rows();
        rows.filter_map(|row| row.member)
            .any(|member| member.serving)
    };
    assert!(serving(&world, other));
    // One that is cut off has not heard, until it counts as lost.
    world.part(other, 60_000);
    world.serve(which, false);
    world.run(SECOND / 10);
    let ask = |world: &mut World| {
        let (endpoint, _) = world.hosts[host].runs[0].clone();
        let row = {
            let agent = world.hosts[host].agent.as_ref().unwrap();
            agent
                .table(vni)
                .unwrap()
                .row(endpoint.ips[0])
                .unwrap()
                .clone()
        };
        assert!(row.member.is_some_and(|member| !member.serving));
        let answer = world.call(
            host,
            Request::Confirmed {
                vni,
                epoch: endpoint.epoch,
                owner_seq: row.owner_seq,
            },
        );
        let Ok(Response::Confirmed { waiting }) = answer else {
            panic!("{answer:?}");
        };
        waiting
    };
    let lost = world.hosts[other].info.name.clone();
    assert_eq!(ask(&mut world), std::slice::from_ref(&lost));
    assert!(serving(&world, other), "it cannot have heard");
    world.run(SECOND * 3);
    assert_eq!(
        ask(&mut world),
        Vec::<String>::new(),
        "{lost} counts as lost"
    );
    // Back again, it hears before anybody could ask.
    world.heal(other);
    world.run(SECOND * 5);
    assert_eq!(ask(&mut world), Vec::<String>::new());
    assert!(!serving(&world, other));
    world.settle();
    world.check_settled();
}
