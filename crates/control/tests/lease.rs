//! Addresses leased ahead: who gets them, what a host that is cut off may do with them, and how they come back.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::IpAddr;
use std::time::Duration;

use control::agent::{self, Agent};
use control::manager::{self, Manager, Settings};
use control::message::{ToAgent, ToManager};
use control::{
    Endpoint, EndpointState, Event, HostId, HostInfo, LEASE_TIME, LeaseError, MemoryStore,
    NetworkSpec, Request, RequestError, Response, Row, State, Store,
};
use vtep::Vni;

const CLUSTER: &str = "0123456789abcdef";
const TICK: Duration = Duration::from_millis(100);

struct World {
    now: Duration,
    store: MemoryStore,
    manager: Option<Manager>,
    hosts: Vec<Host>,
    connections: u64,
}

struct Host {
    info: HostInfo,
    agent: Agent,
    connection: Option<u64>,
    /// No connection comes about.
    cut: bool,
    to_agent: Vec<ToAgent>,
    answers: Vec<Result<Response, RequestError>>,
    lost: Vec<control::Epoch>,
}

fn vni() -> Vni {
    Vni::new(4096).unwrap()
}

impl World {
    /// Hosts that follow one network.
    fn new(hosts: u8, subnets: &[&str]) -> Self {
        let mut world = Self {
            now: Duration::ZERO,
            store: MemoryStore::default(),
            manager: None,
            hosts: Vec::new(),
            connections: 0,
        };
        world.start_manager();
        world.add_host(1);
        let spec = NetworkSpec {
            subnets: subnets.iter().map(|net| net.parse().unwrap()).collect(),
            vni: Some(vni()),
            ..NetworkSpec::named("net1")
        };
        let made = world.call(
            0,
            Request::CreateNetwork {
                spec,
                routes_in_use: Vec::new(),
            },
        );
        assert!(made.is_ok(), "{made:?}");
        for n in 2..=hosts {
            world.add_host(n);
        }
        for n in 0..usize::from(hosts) {
            world.hosts[n].agent.subscribe(vni());
        }
        world.settle();
        world
    }

    fn agent(&self, info: &HostInfo) -> Agent {
        Agent::new(
            info.clone(),
            CLUSTER.to_owned(),
            vec!["192.0.2.1:4789".parse().unwrap()],
        )
    }

    fn add_host(&mut self, n: u8) {
        let info =
            control::testing::host_info(HostId::from_bytes([n; 16]), n.into(), [192, 0, 2, n]);
        self.hosts.push(Host {
            agent: self.agent(&info),
            info,
            connection: None,
            cut: false,
            to_agent: Vec::new(),
            answers: Vec::new(),
            lost: Vec::new(),
        });
        self.settle();
    }

    fn start_manager(&mut self) {
        let settings = Settings {
            host: HostId::from_bytes([1; 16]),
            cluster: CLUSTER.to_owned(),
            seed: 7,
            unix_at_zero: Duration::from_secs(1_000_000),
            pools: Vec::new(),
        };
        let stored = self.store.load().unwrap();
        self.manager = Some(Manager::new(settings, &stored, self.now).unwrap());
    }

    fn kill_manager(&mut self) {
        self.manager = None;
        for host in 0..self.hosts.len() {
            self.disconnect(host);
        }
    }

    fn disconnect(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        if let Some(connection) = host.connection.take() {
            host.to_agent.clear();
            host.agent.handle_disconnected("cut", self.now);
            if let Some(manager) = &mut self.manager {
                manager.handle_disconnected(connection);
            }
        }
    }

    fn cut(&mut self, host: usize) {
        self.hosts[host].cut = true;
        self.disconnect(host);
    }

    fn heal(&mut self, host: usize) {
        self.hosts[host].cut = false;
        self.settle();
    }

    /// Connects who may be, and passes messages on until nobody has anything to say.
    fn settle(&mut self) {
        loop {
            let mut busy = false;
            for n in 0..self.hosts.len() {
                let host = &mut self.hosts[n];
                if host.connection.is_none() && !host.cut && self.manager.is_some() {
                    self.connections += 1;
                    host.connection = Some(self.connections);
                    let manager = host.agent.managers()[0];
                    host.agent.handle_connected(manager, self.now);
                }
                busy |= self.turn(n);
            }
            if !busy {
                return;
            }
        }
    }

    /// All that one host has to say and to hear.
    fn turn(&mut self, n: usize) -> bool {
        let mut busy = false;
        let host = &mut self.hosts[n];
        for message in std::mem::take(&mut host.to_agent) {
            busy = true;
            let message = ToAgent::decode(&message.encode()).unwrap();
            host.agent.handle_message(message, self.now);
        }
        while let Some(output) = host.agent.poll_output() {
            match output {
                agent::Output::Answer { result, .. } => host.answers.push(result),
                agent::Output::Event(Event::RowLost { epoch, .. }) => host.lost.push(epoch),
                agent::Output::Event(_) => {}
            }
        }
        while let Some(message) = self.hosts[n].agent.poll_message() {
            busy = true;
            let (Some(connection), Some(manager)) =
                (self.hosts[n].connection, self.manager.as_mut())
            else {
                continue;
            };
            match ToManager::decode(&message.encode()).unwrap() {
                ToManager::Hello {
                    host, last_epoch, ..
                } => {
                    let from = self.hosts[n].info.vtep;
                    let welcomed =
                        manager.handle_hello(connection, from, host, last_epoch, self.now);
                    assert!(welcomed.is_ok(), "{welcomed:?}");
                }
                message => manager.handle_message(connection, message, self.now),
            }
            self.flush();
        }
        busy
    }

    fn flush(&mut self) {
        let Some(manager) = &mut self.manager else {
            return;
        };
        manager.finish_turn(self.now);
        self.store.commit(&manager.take_writes()).unwrap();
        while let Some(output) = manager.poll_output() {
            if let manager::Output::Send { to, message } = output {
                for host in &mut self.hosts {
                    if host.connection.is_some_and(|c| to.contains(&c)) {
                        host.to_agent.push(message.clone());
                    }
                }
            }
        }
    }

    fn wait(&mut self, how_long: Duration) {
        let until = self.now + how_long;
        while self.now < until {
            self.now += TICK;
            for host in &mut self.hosts {
                host.agent.handle_timeout(self.now);
            }
            if let Some(manager) = &mut self.manager {
                manager.handle_timeout(self.now);
            }
            self.flush();
            self.settle();
        }
    }

    fn call(&mut self, host: usize, request: Request) -> Result<Response, RequestError> {
        self.hosts[host].agent.call(1, request, self.now);
        loop {
            self.settle();
            if let Some(answer) = self.hosts[host].answers.pop() {
                return answer;
            }
            self.wait(TICK);
        }
    }

    fn allocate(&mut self, host: usize, name: &str, ip: Option<&str>) -> Result<Endpoint, String> {
        let answer = self.call(
            host,
            Request::Allocate {
                network: "net1".to_owned(),
                container: name.to_owned(),
                ips: ip.iter().map(|ip| ip.parse().unwrap()).collect(),
                mac: None,
                service: None,
                weight: None,
            },
        );
        match answer {
            Ok(Response::Endpoint(endpoint)) => Ok(endpoint),
            Err(error) => Err(error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    /// What a program does for a container that starts without a manager.
    fn start_alone(&mut self, host: usize, name: &str) -> Result<Endpoint, LeaseError> {
        let agent = &mut self.hosts[host].agent;
        let (endpoint, _) = agent.take_leased(vni(), name, &[])?;
        agent.publish(endpoint.clone(), EndpointState::Up);
        Ok(endpoint)
    }

    fn leased(&self, host: usize) -> Vec<String> {
        let status = self.hosts[host].agent.status(self.now);
        let leased = status.subscriptions[0].leased.iter();
        leased.map(IpAddr::to_string).collect()
    }

    /// The row that everybody who is connected has.
    fn row(&self, ip: IpAddr) -> Option<Row> {
        let row = self.manager.as_ref()?.table(vni())?.row(ip).cloned();
        for host in self.hosts.iter().filter(|host| host.connection.is_some()) {
            assert_eq!(host.agent.table(vni()).unwrap().row(ip).cloned(), row);
        }
        row
    }
}

#[test]
fn blocks_come_from_the_top_and_share_what_is_free() {
    let world = World::new(2, &["10.0.9.0/24", "fd00:9::/64"]);
    let (one, two) = (world.leased(0), world.leased(1));
    assert_eq!((one.len(), two.len()), (32, 32), "16 of each family");
    assert_eq!(one[..2], ["10.0.9.254", "fd00:9::ffff:ffff:ffff:fffe"]);
    assert!(one.iter().all(|ip| !two.contains(ip)));

    // 29 addresses: a quarter for one host, for two half of that each.
    let mut world = World::new(1, &["10.0.9.0/27"]);
    assert_eq!(world.leased(0).len(), 7);
    world.add_host(2);
    world.hosts[1].agent.subscribe(vni());
    world.settle();
    assert_eq!((world.leased(0).len(), world.leased(1).len()), (3, 3));
    // One that follows it no more gives its block back, and the others may grow.
    world.hosts[1].agent.unsubscribe(vni());
    world.wait(Duration::from_secs(21));
    assert_eq!(world.leased(0).len(), 7);
    // In order from below all the same.
    let ip = world.allocate(0, "c1", None).unwrap().ips[0];
    assert_eq!(ip.to_string(), "10.0.9.2");
}

#[test]
fn a_network_too_small_to_share_is_not_leased() {
    let world = World::new(3, &["10.0.9.0/28"]);
    assert_eq!(world.leased(0).len(), 1);
    let world = World::new(4, &["10.0.9.0/28"]);
    assert!((0..4).all(|host| world.leased(host).is_empty()));
}

#[test]
fn a_block_is_used_only_while_no_manager_answers_and_each_address_once() {
    let mut world = World::new(2, &["10.0.9.0/24"]);
    assert_eq!(world.start_alone(1, "c1"), Err(LeaseError::ManagerAnswers));
    world.kill_manager();
    let block = world.leased(1);
    let mut taken = Vec::new();
    for (n, ip) in block.iter().enumerate() {
        let endpoint = world.start_alone(1, &format!("c{n}")).unwrap();
        assert_eq!(endpoint.ips[0].to_string(), *ip);
        taken.push(endpoint);
    }
    let empty = world.start_alone(1, "one-more").unwrap_err();
    assert!(empty.to_string().contains("\"net1\""), "{empty}");
    // One of them ends again before anybody else has heard of it.
    let ended = taken.pop().unwrap();
    let (vni, epoch) = (ended.vni, ended.epoch);
    assert!(world.call(1, Request::Free { vni, epoch }).is_err());

    world.start_manager();
    world.settle();
    for endpoint in &taken {
        let row = world.row(endpoint.ips[0]).unwrap();
        assert_eq!(
            (row.epoch, row.state, row.owner),
            (endpoint.epoch, State::Up, world.hosts[1].info.id)
        );
    }
    assert!(world.row(ended.ips[0]).is_none());
    assert!(world.hosts[1].lost.is_empty());
    world.wait(Duration::from_secs(30));
    let again = world.leased(1);
    assert_eq!(again.len(), 16, "a new block");
    assert!(
        taken
            .iter()
            .all(|endpoint| !again.contains(&endpoint.ips[0].to_string()))
    );
}

#[test]
fn another_address_than_those_leased_is_refused_by_name() {
    let mut world = World::new(1, &["10.0.9.0/27"]);
    world.kill_manager();
    let agent = &mut world.hosts[0].agent;
    let (mine, other) = (
        "10.0.9.29".parse().unwrap(),
        "10.0.9.7".parse::<IpAddr>().unwrap(),
    );
    let (endpoint, _) = agent.take_leased(vni(), "c1", &[mine]).unwrap();
    assert_eq!(endpoint.ips, [mine]);
    let refused = agent.take_leased(vni(), "c2", &[other]).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("10.0.9.7") && text.contains("10.0.9.30") && !text.contains("10.0.9.29"),
        "{text}"
    );
}

#[test]
fn nothing_that_is_leased_keeps_a_network_from_being_filled() {
    let mut world = World::new(1, &["10.0.9.0/29"]);
    assert_eq!(world.leased(0), ["10.0.9.6"]);
    for n in 0..5 {
        let endpoint = world.allocate(0, &format!("c{n}"), None).unwrap();
        assert_eq!(endpoint.ips[0].to_string(), format!("10.0.9.{}", n + 2));
    }
    let full = world.allocate(0, "c5", None).unwrap_err();
    assert!(full.contains("5 of 5 in use"), "{full}");

    // Also where the addresses are other hosts'.
    let mut world = World::new(3, &["10.0.9.0/27"]);
    for n in 0..29 {
        world.allocate(0, &format!("c{n}"), None).unwrap();
    }
    assert!((0..3).all(|host| world.leased(host).is_empty()));
}

#[test]
fn an_address_of_anothers_block_is_given_to_who_names_it() {
    let mut world = World::new(2, &["10.0.9.0/24"]);
    let theirs = world.leased(1)[0].clone();
    let own = world.leased(0)[0].clone();
    for (name, ip) in [("c1", &theirs), ("c2", &own)] {
        let endpoint = world.allocate(0, name, Some(ip)).unwrap();
        assert_eq!(endpoint.ips[0].to_string(), *ip);
        assert!((0..2).all(|host| !world.leased(host).contains(ip)));
    }
    // Not from one that is away and may be using it.
    let theirs = world.leased(1)[0].clone();
    world.cut(1);
    let refused = world.allocate(0, "c3", Some(&theirs)).unwrap_err();
    assert!(refused.contains("leased to host h2"), "{refused}");
    world.wait(LEASE_TIME);
    assert!(world.allocate(0, "c3", Some(&theirs)).is_ok());
}

#[test]
fn only_the_unused_part_of_a_block_goes_by_time_and_the_higher_epoch_wins() {
    let mut world = World::new(2, &["10.0.9.0/27"]);
    let block = world.leased(1);
    world.cut(1);
    let used = world.start_alone(1, "away").unwrap();
    // 29 addresses, of which each host has three.
    let mut filled = 0;
    let refused = loop {
        match world.allocate(0, &format!("c{filled}"), None) {
            Ok(_) => filled += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(filled, 29 - block.len());
    assert!(
        refused.contains("3 leased to hosts that do not answer"),
        "{refused}"
    );
    world.wait(LEASE_TIME);
    for n in 0..block.len() {
        world.allocate(0, &format!("late{n}"), None).unwrap();
    }
    // What the host that was away had started is another's now, and it is told so.
    world.heal(1);
    assert_eq!(world.hosts[1].lost, [used.epoch]);
    assert_eq!(
        world.row(used.ips[0]).unwrap().owner,
        world.hosts[0].info.id
    );

    // An address that was up is never given away by time.
    let up = world.allocate(1, "x", None).unwrap_err();
    assert!(up.contains("29 of 29 in use"), "{up}");
    world.cut(0);
    world.wait(Duration::from_secs(3600));
    assert!(world.allocate(1, "x", None).is_err());
}

#[test]
fn blocks_outlive_the_manager_and_are_nobody_elses() {
    let mut world = World::new(2, &["10.0.9.0/27"]);
    let before = [world.leased(0), world.leased(1)];
    world.kill_manager();
    world.wait(Duration::from_secs(60));
    world.start_manager();
    world.settle();
    assert_eq!([world.leased(0), world.leased(1)], before);
    // And the agent too, as long as it remembers.
    world.kill_manager();
    let used = world.start_alone(1, "c1").unwrap();
    let kept = world.hosts[1].agent.snapshot(CLUSTER);
    let mut restarted = world.agent(&world.hosts[1].info);
    restarted.publish(used.clone(), EndpointState::Up);
    restarted.subscribe(vni());
    for message in kept {
        restarted.restore(message, world.now);
    }
    world.hosts[1].agent = restarted;
    let rest: Vec<String> = before[1][1..].to_vec();
    assert_eq!(world.leased(1), rest);
    world.start_manager();
    world.settle();
    assert_eq!(world.row(used.ips[0]).unwrap().state, State::Up);
}

#[test]
fn a_manager_that_lost_its_store_knows_of_no_block() {
    let mut world = World::new(2, &["10.0.9.0/24"]);
    let empty = MemoryStore::default();
    world.kill_manager();
    world.store = empty;
    world.start_manager();
    world.settle();
    assert!(world.leased(1).is_empty(), "{:?}", world.leased(1));
    // Nothing is handed out before it has heard what runs; then there are blocks again, of the new generation.
    world.wait(Duration::from_secs(25));
    assert_eq!(world.leased(1).len(), 16);
}

#[test]
fn two_hosts_that_took_one_name_apart_both_run_on() {
    let mut world = World::new(2, &["10.0.9.0/24"]);
    world.kill_manager();
    let both = [0, 1].map(|host| world.start_alone(host, "twin").unwrap());
    world.start_manager();
    world.settle();
    for (host, endpoint) in both.iter().enumerate() {
        let row = world.row(endpoint.ips[0]).unwrap();
        assert_eq!((row.state, row.epoch), (State::Up, endpoint.epoch));
        assert!(world.hosts[host].lost.is_empty());
    }
    // The name is one host's; the other is told whose.
    let claims = [0, 1].map(|host| world.call(host, Request::ClaimName("twin".to_owned())));
    let refused: Vec<String> = claims
        .into_iter()
        .filter_map(|claim| claim.err().map(|error| error.to_string()))
        .collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].contains("twin is already in use on host"));
}

#[test]
fn a_restart_is_not_taken_for_a_lost_store() {
    let mut world = World::new(2, &["10.0.9.0/24"]);
    for n in 0..4 {
        // A life that issues nothing in between, too.
        world.wait(Duration::from_secs(1));
        world.kill_manager();
        world.start_manager();
        world.settle();
        if n % 2 == 1 {
            let before = world.now;
            world.allocate(1, &format!("c{n}"), None).unwrap();
            assert_eq!(world.now, before, "handed out at once");
        }
    }
}
