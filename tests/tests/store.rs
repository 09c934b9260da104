//! What a manager told anybody, it still knows: killed again and again, with an older store put back, with none.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use control::{AgentHandle, Endpoint, EndpointState, Request, Response};
use serde_json::Value;
use towline_tests::cluster::{Cluster, Host};
use towline_tests::member::{ask, connect};
use towline_tests::wait_until;

const NETWORK: &str = "myoverlay";
/// Endpoints taken, brought up or freed while the manager is killed.
const CHANGES: usize = 1000;
/// How often it is killed meanwhile.
const KILLS: usize = 5;
/// Containers that each host changes at once.
const AT_ONCE: usize = 4;
/// For all that waits for a manager, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the manager has acknowledged: an endpoint for each container, or that it is freed.
type Acknowledged = Mutex<BTreeMap<String, Option<Endpoint>>>;

/// Takes endpoints for one container after another, brings them up, and frees two of five.
fn change(agent: &AgentHandle, prefix: &str, changes: &AtomicUsize, acknowledged: &Acknowledged) {
    for number in 0.. {
        if changes.load(Ordering::Relaxed) >= CHANGES {
            return;
        }
        let container = format!("{prefix}-{number}");
        let allocate = Request::Allocate {
            network: NETWORK.to_owned(),
            container: container.clone(),
            ips: Vec::new(),
            mac: None,
            service: None,
            weight: None,
        };
        let endpoint = match ask(agent, &allocate) {
            Ok(Response::Endpoint(endpoint)) => endpoint,
            other => panic!("{container}: {other:?}"),
        };
        agent.publish(endpoint.clone(), EndpointState::Up);
        let note = |endpoint| {
            let mut acknowledged = acknowledged.lock().expect("no change panics holding it");
            acknowledged.insert(container.clone(), endpoint);
            changes.fetch_add(1, Ordering::Relaxed);
        };
        let free = Request::Free {
            vni: endpoint.vni,
            epoch: endpoint.epoch,
        };
        note(Some(endpoint));
        if number % 5 < 2 {
            ask(agent, &free).expect("an endpoint is its owner's to free");
            note(None);
        }
    }
}

fn endpoints(manager: &Host) -> Vec<Value> {
    let networks = manager.json(&format!("network inspect {NETWORK}"));
    let endpoints = networks[0]["endpoints"].as_array();
    endpoints.expect("inspect lists endpoints").clone()
}

/// An endpoint as `network inspect` shows one that is up.
fn shown(container: &str, host: &str, endpoint: &Endpoint) -> Value {
    serde_json::json!({
        "id": endpoint.epoch.to_string(),
        "container": container,
        "host": host,
        "mac": endpoint.mac.to_string(),
        "ips": endpoint.ips,
        "state": "up",
    })
}

#[test]
fn a_manager_killed_during_a_thousand_changes_has_lost_none() {
    let mut cluster = Cluster::start(3, &[]);
    let token = cluster.hosts[0].json("init --json")["token"]
        .as_str()
        .expect("init shows the token")
        .to_owned();
    cluster.hosts[0].ok(&format!("network create --subnet 10.9.0.0/20 {NETWORK}"));
    let manager = SocketAddr::new(cluster.hosts[0].address.into(), 4789);
    let clients = [&cluster.hosts[1], &cluster.hosts[2]].map(|host| {
        let vtep = host.address.into();
        let agent = connect(&host.netns, &host.name, vtep, manager, &token);
        (host.name.clone(), agent)
    });
    let (changes, acknowledged) = (AtomicUsize::new(0), Acknowledged::default());
    std::thread::scope(|scope| {
        for (name, agent) in &clients {
            for lane in 0..AT_ONCE {
                let prefix = format!("{name}-{lane}");
                let (changes, acknowledged) = (&changes, &acknowledged);
                scope.spawn(move || change(agent, &prefix, changes, acknowledged));
            }
        }
        for kill in 1..=KILLS {
            wait_until("changes go on", PATIENCE, || {
                changes.load(Ordering::Relaxed) >= CHANGES * kill / (KILLS + 1)
            });
            cluster.hosts[0].kill_agent();
            cluster.hosts[0].start_agent();
        }
    });
    let acknowledged = acknowledged.into_inner().expect("no change has panicked");
    let host_of = |container: &str| {
        let mut names = clients.iter().map(|(name, _)| name.as_str());
        names.find(|name| container.starts_with(*name))
    };
    let mut expected: Vec<Value> = acknowledged
        .iter()
        .filter_map(|(container, endpoint)| {
            let host = host_of(container).expect("a container is named after its host");
            Some(shown(container, host, endpoint.as_ref()?))
        })
        .collect();
    expected.sort_by_key(|endpoint| endpoint["container"].to_string());
    // News of the last that came up may be under way.
    let mut found = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while found != expected && Instant::now() < deadline {
        found = endpoints(&cluster.hosts[0]);
        found.sort_by_key(|endpoint| endpoint["container"].to_string());
    }
    assert_eq!(found, expected);
    // The hosts could have made a lost store whole again; here there was nothing to mend.
    let log = cluster.hosts[0].log();
    assert!(!log.contains("the store is older"), "{log}");
    let freed = acknowledged
        .values()
        .filter(|endpoint| endpoint.is_none())
        .count();
    assert!(freed > 100, "{freed} of {} were freed", acknowledged.len());
    for (_, agent) in clients {
        agent.request(Request::Leave).expect("the manager answers");
    }
}

/// Keeps a ping going from one container to another, once a tenth of a second.
fn ping(host: &Host, from: &str, to: &str) -> std::process::Output {
    host.towline(&format!("exec {from} -- ping -c 20 -i 0.1 -W 5 {to}"))
}

#[test]
fn an_older_store_put_back_and_a_lost_one_are_made_whole_by_the_hosts() {
    let mut cluster = Cluster::joined(2, &[]);
    let [c1, c2, c3, c4] = ["c1", "c2", "c3", "c4"].map(|name| cluster.container(name));
    let run = |host: &Host, name: &str| {
        host.ok(&format!(
            "run -d --name {name} --network {NETWORK} -- sleep infinity"
        ));
    };
    cluster.hosts[0].ok(&format!(
        "network create --subnet 10.9.0.0/24 --ip-range 10.9.0.64/26 --gateway 10.9.0.254 {NETWORK}"
    ));
    run(&cluster.hosts[1], &c1);

    // A copy of the store, as a backup takes it while no manager runs.
    let store = cluster.hosts[0].state_dir().join("manager/store");
    cluster.hosts[0].kill_agent();
    let older = std::fs::read(&store).expect("the manager has a store");
    cluster.hosts[0].start_agent();
    run(&cluster.hosts[0], &c2);
    run(&cluster.hosts[1], &c3);
    let all_up = |endpoints: &[Value]| endpoints.iter().all(|endpoint| endpoint["state"] == "up");
    wait_until("all containers are up", PATIENCE, || {
        all_up(&endpoints(&cluster.hosts[0]))
    });
    let before = endpoints(&cluster.hosts[0]);
    assert_eq!(before.len(), 3);

    for (what, content) in [("older", Some(&older)), ("lost", None)] {
        cluster.hosts[0].kill_agent();
        match content {
            Some(older) => std::fs::write(&store, older).expect("the store can be replaced"),
            None => std::fs::remove_file(&store).expect("the store can be removed"),
        }
        // Frames go on meanwhile.
        let output = ping(&cluster.hosts[1], &c1, &address_in(&before, &c3));
        assert!(output.status.success(), "{what}: {output:?}");
        cluster.hosts[0].start_agent();
        wait_until("the manager knows all endpoints again", PATIENCE, || {
            let found = cluster.hosts[0].towline(&format!("network inspect {NETWORK}"));
            found.status.success() && endpoints(&cluster.hosts[0]) == before
        });
        let output = ping(&cluster.hosts[0], &c2, &address_in(&before, &c1));
        assert!(output.status.success(), "{what}: {output:?}");
    }
    // What was given out is given to nobody else.
    wait_until("the manager hands out addresses again", PATIENCE, || {
        let run = cluster.hosts[1].towline(&format!(
            "run -d --name {c4} --network {NETWORK} -- sleep infinity"
        ));
        run.status.success()
    });
    let new = address_in(&endpoints(&cluster.hosts[0]), &c4);
    assert!(
        before
            .iter()
            .all(|endpoint| endpoint["ips"][0] != new.as_str()),
        "{new} of {before:?}"
    );
    assert!(new.starts_with("10.9.0."), "{new}");
    for (host, names) in [(0, vec![&c2]), (1, vec![&c1, &c3, &c4])] {
        for name in names {
            cluster.hosts[host].ok(&format!("rm -f {name}"));
        }
    }
}

fn address_in(endpoints: &[Value], container: &str) -> String {
    let found = endpoints
        .iter()
        .find(|endpoint| endpoint["container"] == container);
    let found = found.unwrap_or_else(|| panic!("{container} is not listed"));
    found["ips"][0].as_str().expect("an address").to_owned()
}
