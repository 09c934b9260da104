//! What is done to a cluster: each step of `plane.rs`, and how all of it is mended.

use std::net::IpAddr;
use std::time::Duration;

use control::{
    Endpoint, EndpointState, HostId, Membership, MemoryStore, Request, Response, ServiceSpec, Store,
};
use vtep::Vni;

use crate::host::{Line, Wanted, named};
use crate::net::{Way, Weather};
use crate::plane::{Owners, Plane, Step};
use crate::world::{Happens, RETRY, World, last_issued, network_name, spec};

/// Few addresses, so that they come round.
const SUBNETS: [&str; 2] = ["10.0.9.0/28", "10.0.8.0/29"];
const HOSTS: usize = 5;
/// Names of services.
const SERVICES: usize = 3;
/// Longer than every grace, patience and rest.
const QUIET: Duration = Duration::from_secs(25);

impl Plane for World {
    fn new(seed: u64) -> Self {
        Self::with(seed, HOSTS, &SUBNETS)
    }

    fn step(&mut self, step: &Step) {
        let host = |n: usize| n % self.hosts.len();
        match *step {
            Step::Start { host: h, network } => {
                let vni = self.networks[network % self.networks.len()];
                self.start(host(h), vni, Vec::new());
            }
            Step::StartAgain { host: h, network } => {
                let vni = self.networks[network % self.networks.len()];
                let again = self.freed.get(&vni).copied().into_iter().collect();
                self.start(host(h), vni, again);
            }
            Step::Stop { which } => drop(self.stop(which)),
            Step::Move { which, to } => {
                let to = host(to);
                if let Some(endpoint) = self.stop(which) {
                    self.start(to, endpoint.vni, endpoint.ips);
                }
            }
            Step::Toggle { which } => self.toggle(which),
            Step::Service {
                host: h,
                network,
                name,
                remove,
            } => {
                let network = network_name(network % self.networks.len());
                let name = format!("s{}", name % SERVICES);
                let request = if remove {
                    Request::RemoveService(name)
                } else {
                    Request::CreateService(ServiceSpec::named(&name, &network))
                };
                self.ask(host(h), request);
            }
            Step::Serve { which, serving } => self.serve(which, serving),
            Step::Network { network } => self.toggle_network(network % self.networks.len()),
            Step::Cut { host: h } => self.cut(host(h)),
            Step::Part {
                host: h,
                milliseconds,
            } => self.part(host(h), milliseconds.into()),
            Step::Weather { host: h, weather } => {
                let h = host(h);
                self.harsh |= (weather.lost, weather.doubled, weather.reordered) != (0, 0, 0);
                self.net.set_weather(h, weather);
            }
            Step::KillAgent {
                host: h,
                milliseconds,
            } => self.kill_agent(host(h), milliseconds),
            Step::Freeze {
                host: h,
                milliseconds,
            } => {
                let now = self.now();
                let host = &mut self.hosts[h % HOSTS];
                // What waits for the end of an earlier freeze must not be overtaken by what comes after a shorter one.
                let until = now + Duration::from_millis(milliseconds.into());
                host.frozen_until = host.frozen_until.max(until);
                host.disturbed = host.frozen_until;
            }
            Step::Leap {
                host: h,
                milliseconds,
            } => {
                let now = self.now();
                let host = &mut self.hosts[h % HOSTS];
                host.ahead += Duration::from_millis(milliseconds.into());
                host.disturbed = now;
            }
            Step::RemoveHost { host: h } => self.remove_host(host(h)),
            Step::Leave { host: h } => self.leave(host(h)),
            Step::KillManager {
                committed,
                milliseconds,
            } => self.kill_manager(committed, milliseconds),
            Step::SetClock { minutes } => {
                let shift = Duration::from_secs(u64::from(minutes.unsigned_abs()) * 60);
                self.clock = if minutes < 0 {
                    self.clock.saturating_sub(shift)
                } else {
                    self.clock + shift
                };
            }
            Step::Backup => self.backup = self.store.load().unwrap(),
            Step::Restore => {
                let backup = self.backup.clone();
                self.replace_store(&backup);
            }
            Step::Wipe => self.replace_store(&Default::default()),
            Step::Promote { host: h } => self.promote(host(h)),
            Step::Wait { milliseconds } => self.run(Duration::from_millis(milliseconds.into())),
        }
        self.check_always();
    }

    fn settle(&mut self) {
        self.mend();
        self.run(QUIET);
        self.remove_ghosts();
        // What was lost within a connection is told again on the next one, and what that uncovers on the one after.
        if self.harsh {
            for _ in 0..2 {
                (0..self.hosts.len()).for_each(|host| self.cut(host));
                self.run(QUIET);
            }
        }
        self.check_always();
    }

    fn truth(&self) -> Owners {
        let manager = self
            .manager
            .as_ref()
            .expect("a settled cluster has a manager");
        let tables = self
            .networks
            .iter()
            .filter_map(|vni| Some((*vni, manager.table(*vni)?)));
        let rows = tables.flat_map(|(vni, table)| table.rows().map(move |row| (vni, row)));
        rows.filter(|(_, row)| row.state == control::State::Up)
            .map(|(vni, row)| ((vni, row.ip), row.owner))
            .collect()
    }

    fn views(&self) -> Vec<(String, Owners)> {
        let view = |host: &crate::host::Host| {
            let tables = host.installed.iter();
            let owners = tables.flat_map(|(vni, installed)| {
                let owner = |(ip, mac): (&IpAddr, &vtep::MacAddr)| {
                    Some(((*vni, *ip), *installed.macs.get(mac)?))
                };
                installed.neighbors.iter().filter_map(owner)
            });
            (host.info.name.clone(), owners.collect())
        };
        self.hosts.iter().map(view).collect()
    }

    fn follows(&self, host: usize, vni: Vni) -> bool {
        self.hosts[host].follows.contains(&vni)
    }
}

impl World {
    /// A container starts: the network is followed first, the address asked for, and the answer makes it up. Where no manager
    /// answers, it is one that was leased ahead.
    pub(crate) fn start(&mut self, host: usize, vni: Vni, ips: Vec<IpAddr>) {
        let id = self.next_call();
        let network = self
            .networks
            .iter()
            .position(|known| *known == vni)
            .expect("a network of this world");
        let container = format!("c{id}");
        let request = Request::Allocate {
            network: network_name(network),
            container: container.clone(),
            ips: ips.clone(),
            mac: None,
            service: None,
            weight: None,
        };
        let now = self.now();
        let host_ = &mut self.hosts[host];
        let now = host_.now(now);
        if host_.agent.is_none() {
            return;
        }
        let wanted = Wanted {
            vni,
            container,
            ips,
        };
        host_.starting.insert(id, wanted);
        host_.follow(vni);
        if let Some(agent) = &mut host_.agent {
            agent.call(id, request, now);
        }
        self.pump(host);
    }

    /// Ends an endpoint. Cut off, its owner frees it later, when the manager tells what it holds.
    pub(crate) fn stop(&mut self, which: usize) -> Option<Endpoint> {
        let (host, i) = self.pick(which)?;
        let id = self.next_call();
        let now = self.hosts[host].now(self.now());
        let (endpoint, _) = self.hosts[host].runs.remove(i);
        let request = Request::Free {
            vni: endpoint.vni,
            epoch: endpoint.epoch,
        };
        if let Some(agent) = &mut self.hosts[host].agent {
            agent.call(id, request, now);
        }
        self.hosts[host].leave_idle(endpoint.vni);
        self.pump(host);
        self.hosts[host].answers.clear();
        self.freed.insert(endpoint.vni, endpoint.ips[0]);
        Some(endpoint)
    }

    pub(crate) fn toggle(&mut self, which: usize) {
        let Some((host, i)) = self.pick(which) else {
            return;
        };
        let (endpoint, state) = self.hosts[host].runs[i].clone();
        let other = match state {
            EndpointState::Up => EndpointState::Down,
            EndpointState::Down => EndpointState::Up,
        };
        // What is up again has another alias.
        let aliased = endpoint.names.as_ref();
        let aliased = aliased.is_some_and(|names| !names.aliases.is_empty());
        self.hosts[host].publish(named(endpoint, !aliased), other);
        self.pump(host);
    }

    /// An endpoint's part in the first service on its network.
    pub(crate) fn serve(&mut self, which: usize, serving: bool) {
        let Some((host, i)) = self.pick(which) else {
            return;
        };
        let (mut endpoint, state) = self.hosts[host].runs[i].clone();
        let services = self.hosts[host].services.get(&endpoint.vni);
        let Some(service) = services.and_then(|services| services.first()) else {
            return;
        };
        endpoint.member = Some(Membership {
            service: service.epoch,
            weight: 1,
            serving,
        });
        self.hosts[host].publish(endpoint, state);
        self.pump(host);
    }

    fn pick(&self, which: usize) -> Option<(usize, usize)> {
        let all = || {
            self.hosts
                .iter()
                .enumerate()
                .flat_map(|(h, host)| (0..host.runs.len()).map(move |i| (h, i)))
        };
        all().nth(which.checked_rem(all().count())?)
    }

    fn toggle_network(&mut self, network: usize) {
        let vni = self.networks[network];
        let there = self
            .manager
            .as_ref()
            .is_some_and(|manager| manager.table(vni).is_some());
        let request = if there {
            Request::RemoveNetwork(network_name(network))
        } else {
            Request::CreateNetwork {
                spec: spec(network, vni, SUBNETS[network]),
                routes_in_use: Vec::new(),
            }
        };
        self.ask(0, request);
    }

    /// Asks, and does not wait.
    fn ask(&mut self, host: usize, request: Request) {
        let id = self.next_call();
        let now = self.hosts[host].now(self.now());
        if let Some(agent) = &mut self.hosts[host].agent {
            agent.call(id, request, now);
        }
        self.pump(host);
    }

    /// A reset: both ends hear of it, each when it does.
    pub(crate) fn cut(&mut self, host: usize) {
        let now = self.now();
        let Line::Open(connection) = self.hosts[host].line else {
            return;
        };
        self.hosts[host].disturbed = now;
        self.hosts[host].closed("reset", now);
        self.pump(host);
        self.net
            .send_surely(host, Way::FromHost, Happens::AgentClosed { connection });
        self.net.after(RETRY, Happens::Retry { host });
    }

    pub(crate) fn part(&mut self, host: usize, milliseconds: u32) {
        let until = self.now() + Duration::from_millis(milliseconds.into());
        self.hosts[host].disturbed = until;
        if !self.net.is_parted(host) {
            self.net.part(host);
            self.net.after(
                Duration::from_millis(milliseconds.into()),
                Happens::Heal { host },
            );
        }
    }

    pub(crate) fn heal(&mut self, host: usize) {
        self.hosts[host].disturbed = self.hosts[host].disturbed.max(self.now());
        self.net.heal(host);
    }

    pub(crate) fn kill_agent(&mut self, host: usize, milliseconds: u16) {
        let now = self.now();
        if self.hosts[host].agent.is_none() {
            return;
        }
        if let Line::Open(connection) = self.hosts[host].line {
            self.net
                .send_surely(host, Way::FromHost, Happens::AgentClosed { connection });
        }
        self.hosts[host].kill();
        self.hosts[host].disturbed = now + Duration::from_millis(milliseconds.into());
        self.net.after(
            Duration::from_millis(milliseconds.into()),
            Happens::StartAgent { host },
        );
    }

    pub(crate) fn start_agent(&mut self, host: usize) {
        if self.hosts[host].agent.is_none() {
            let now = self.now();
            self.hosts[host].start(now);
            self.start_ticking(host);
        }
    }

    /// An operator gives up a host that is not connected; the manager refuses others.
    pub(crate) fn remove_host(&mut self, host: usize) {
        let info = &self.hosts[host].info;
        let connected = self.accepted.values().any(|accepted| *accepted == host);
        if host == 0 || connected {
            return;
        }
        // By its id: an order that comes late must not hit the host that has the name by then.
        let id = info.id;
        self.removed.insert(id);
        self.ask(0, remove(&id.to_string()));
    }

    /// Where the answer is lost, the host has left all the same.
    fn leave(&mut self, host: usize) {
        if host != 0 {
            self.removed.insert(self.hosts[host].info.id);
            self.ask(host, Request::Leave);
        }
    }

    /// A host that left, or was removed, joins as a new one.
    pub(crate) fn join_again(&mut self, host: usize) {
        let now = self.now();
        if let Line::Open(connection) = self.hosts[host].line {
            self.net
                .send_surely(host, Way::FromHost, Happens::AgentClosed { connection });
        }
        let mut id = [0xff; 16];
        id[..8].copy_from_slice(&self.next_call().to_le_bytes());
        self.hosts[host].reborn(HostId::from_bytes(id), now);
        self.hosts[host].disturbed = now;
        self.start_ticking(host);
    }

    /// Killed: what it had not written is gone, and what it had written may not have been told.
    pub(crate) fn kill_manager(&mut self, committed: bool, milliseconds: u16) {
        if self.manager.is_none() {
            return;
        }
        let writes = self.decide();
        if committed {
            self.commit(&writes);
        }
        self.manager = None;
        self.manager_life += 1;
        for (connection, host) in std::mem::take(&mut self.accepted) {
            self.net.send_surely(
                host,
                Way::ToHost,
                Happens::ManagerClosed { host, connection },
            );
        }
        self.disturbed = self.now() + Duration::from_millis(milliseconds.into());
        self.net.after(
            Duration::from_millis(milliseconds.into()),
            Happens::StartManager,
        );
    }

    pub(crate) fn replace_store(&mut self, entries: &std::collections::BTreeMap<String, String>) {
        self.kill_manager(true, 1000);
        self.lost.push((
            last_issued(entries),
            last_issued(&self.store.load().unwrap()),
        ));
        let mut old = MemoryStore::default();
        let write = |(key, value): (&String, &String)| control::store::Write {
            key: key.clone(),
            value: Some(value.clone()),
        };
        old.commit(&entries.iter().map(write).collect::<Vec<_>>())
            .unwrap();
        self.store = old;
    }

    fn promote(&mut self, host: usize) {
        if let Some(agent) = &self.hosts[host].agent {
            self.succeeds = Some(agent.last_epoch());
            self.replace_store(&Default::default());
        }
    }

    /// A store of old knows hosts that have left since, by names and addresses that others have now: for an operator to mend.
    fn remove_ghosts(&mut self) {
        let Ok(Response::Hosts(known)) = self.call(0, Request::Hosts) else {
            panic!("no answer")
        };
        let exists = |id| self.hosts.iter().any(|host| host.info.id == id);
        let ghosts: Vec<HostId> = known
            .into_iter()
            .map(|view| view.info.id)
            .filter(|id| !exists(*id))
            .collect();
        assert!(
            ghosts.is_empty() || !self.lost.is_empty(),
            "{ghosts:?} left and are known"
        );
        for id in &ghosts {
            let removed = self.call(0, remove(&id.to_string()));
            assert!(matches!(removed, Ok(Response::Done)), "{removed:?}");
        }
        if !ghosts.is_empty() {
            self.run(QUIET);
        }
    }

    /// Everything is there and every wire carries.
    pub(crate) fn mend(&mut self) {
        self.start_manager();
        for host in 0..self.hosts.len() {
            self.net.set_weather(host, Weather::FAIR);
            self.heal(host);
            self.start_agent(host);
        }
    }
}

/// An operator gives a host up.
pub(crate) fn remove(host: &str) -> Request {
    let (host, force) = (host.to_owned(), false);
    Request::RemoveHost { host, force }
}
