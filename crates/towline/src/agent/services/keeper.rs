//! Keeps the kernel's rules as the news say: in each container's namespace, and on the host itself.

mod inspect;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use control::installed::Entry;
use control::service::{Publish, PublishMode, Service};
use control::{Epoch, Inspection, Network};
use crossbeam_channel::Sender;
use discovery::plan::{ClientPlan, EntryPlan, MemberPlan};
use discovery::slots::mix;
use discovery::{EntryHost, InstalledClient, InstalledEntry, InstalledMember, MemberNetwork};
use ipnet::IpNet;
use netns::Netns;
use vtep::Vni;
use vtep::fdb::Change;

use super::members::Members;
use super::reserve::Reserved;
use super::{Shared, Work};
use crate::agent::container::publish;
use crate::agent::tables::network_config;
use crate::agent::{Agent, Member, ingress};
use crate::api::service::Summary;

/// What the thread knows.
#[derive(Default)]
pub(super) struct Keeper {
    services: discovery::Services,
    /// Networks of which all has been told.
    complete: BTreeSet<Vni>,
    /// Those of them of which a manager has told since this agent's start.
    caught_up: BTreeSet<Vni>,
    /// Networks that have changed since their namespaces were seen to.
    changed: BTreeSet<Vni>,
    /// What is to be told of once it is in force.
    reached: BTreeMap<Vni, (u16, u64)>,
    /// What the datapath answers for.
    vips: BTreeMap<Vni, BTreeSet<IpAddr>>,
    places: BTreeMap<String, Place>,
    host: Host,
    members: Members,
    /// Questions of a manager, with what the datapath holds.
    asked: Vec<(Inspection, BTreeSet<Entry>)>,
}

/// What a container's namespace has.
#[derive(Default)]
struct Place {
    ports: Vec<Port>,
    client: InstalledClient,
    member: InstalledMember,
    stale: bool,
    /// No connections are left in it of a time before this agent's.
    looked_through: bool,
    problem: Option<String>,
    /// Who waits for its rules.
    waiting: Vec<Sender<()>>,
}

/// A container's place in a network.
#[derive(Clone, Debug)]
struct Port {
    vni: Vni,
    ips: Vec<IpAddr>,
    service: Option<Epoch>,
}

/// What the host itself has.
#[derive(Default)]
struct Host {
    entry: InstalledEntry,
    reserved: Reserved,
    stale: bool,
    /// As [`Place::looked_through`].
    looked_through: bool,
    problem: Option<String>,
}

impl Keeper {
    /// Takes what has come, and brings the rules up to it.
    pub(super) fn turn(&mut self, agent: &Arc<Agent>, member: &Arc<Member>, work: Vec<Work>) {
        for work in work {
            self.take(agent, member, work);
        }
        self.answer_for_vips(agent, member);
        let behind = self.settle_places(agent, member);
        self.settle_host(agent, member);
        self.members
            .settle(agent, member, &self.services, &self.complete);
        self.tell(member, &behind);
        if self.answer(agent, member) {
            self.settle_places(agent, member);
            self.settle_host(agent, member);
        }
        self.share(member);
    }

    fn take(&mut self, agent: &Arc<Agent>, member: &Arc<Member>, work: Work) {
        match work {
            Work::Services { vni, services } => {
                self.services.services(vni, services.clone());
                member.services.shared().services.insert(vni, services);
                self.changed.insert(vni);
                self.members.stale = true;
            }
            Work::Table { vni, changes } => {
                if self.services.table(vni, &changes) {
                    self.changed.insert(vni);
                }
            }
            Work::Reached {
                vni,
                generation,
                revision,
            } => {
                self.reached.insert(vni, (generation, revision));
                if self.complete.insert(vni) {
                    self.changed.insert(vni);
                    self.members.stale = true;
                }
            }
            Work::CaughtUp(vni) => {
                self.caught_up.insert(vni);
                self.changed.insert(vni);
            }
            Work::Ingress(vni) => {
                member.services.shared().ingress = vni;
                self.host.stale = true;
                ingress::look_after(agent, member.services.ingress_network());
            }
            Work::Forget(vni) => {
                self.services.forget(vni);
                member.services.shared().services.remove(&vni);
                self.complete.remove(&vni);
                self.caught_up.remove(&vni);
                self.vips.remove(&vni);
                self.reached.remove(&vni);
                self.changed.insert(vni);
            }
            Work::Container {
                name,
                started,
                done,
            } => {
                let place = self.places.entry(name.clone()).or_default();
                place.ports = ports(agent, &name);
                place.stale = true;
                // One that waits for its rules has not sent anything yet.
                place.looked_through |= done.is_some();
                place.waiting.extend(done);
                self.members.found(name, started);
            }
            Work::Gone { name, done } => {
                self.places.remove(&name);
                self.members.gone(&name);
                let _ = done.send(());
            }
            Work::Started { name } => self.members.started(&name),
            Work::Health { name, healthy, why } => self.members.health(&name, healthy, &why),
            Work::Ports { name, problem } => self.members.ports_followed(&name, problem),
            Work::Drain { name, done } => {
                self.members.drain(agent, member, &name);
                let _ = done.send(());
            }
            Work::Inspect {
                inspection,
                installed,
            } => self.asked.push((inspection, installed)),
            Work::Host => self.host.stale = true,
            Work::Look => {
                self.host.stale = true;
                match self.host.entry.repair(&agent.netns) {
                    Ok(false) => {}
                    Ok(true) => tracing::warn!("put back: rules of published ports"),
                    Err(error) => tracing::warn!("published ports need help: {error}"),
                }
                self.members.stale = true;
                for place in self.places.values_mut() {
                    place.stale |= place.problem.is_some() || !place.waiting.is_empty();
                }
                ingress::look_after(agent, member.services.ingress_network());
            }
        }
    }

    /// The datapath answers ARP, neighbour discovery and pings for virtual addresses.
    fn answer_for_vips(&mut self, agent: &Agent, member: &Member) {
        let networks = agent.state.read(|state| state.networks.clone());
        let mut changes = Vec::new();
        for network in networks {
            let vips = member.services.vips(network.vni);
            if self.changed.contains(&network.vni) && self.vips.get(&network.vni) != Some(&vips) {
                changes.push(Change::SetNetwork(network_config(&network, vips.clone())));
                self.vips.insert(network.vni, vips);
            }
        }
        member.datapath.apply(&changes);
    }

    /// Brings the namespaces up to what is known; the networks of which some could not be, because they are on another one that is not
    /// known yet.
    fn settle_places(&mut self, agent: &Agent, member: &Member) -> BTreeSet<Vni> {
        let mut behind = BTreeSet::new();
        let ingress = member.services.ingress_network();
        let networks = agent.state.read(|state| state.networks.clone());
        for (name, place) in &mut self.places {
            let mut vnis = place.ports.iter().map(|port| port.vni);
            if !place.stale && !vnis.any(|vni| self.changed.contains(&vni)) {
                continue;
            }
            // What a predecessor left stays in force until all is known.
            let known = |port: &Port| self.complete.contains(&port.vni);
            if !place.ports.iter().all(known) {
                place.stale = true;
                behind.extend(place.ports.iter().map(|port| port.vni));
                continue;
            }
            place.stale = false;
            let Wanted {
                own,
                on_ingress,
                client,
                member: as_member,
            } = wanted(&self.services, &networks, ingress, name, &place.ports);
            let applied = Netns::open(name)
                .map_err(anyhow::Error::from)
                .and_then(|netns| {
                    place.client.apply(&netns, &client)?;
                    match &as_member {
                        Some(plan) => place.member.apply(&netns, plan)?,
                        // Its service publishes nothing any more, or is gone.
                        None if on_ingress => place.member.remove(&netns)?,
                        None => {}
                    }
                    let now = own.iter().all(|vni| self.caught_up.contains(vni));
                    if now && !place.looked_through {
                        place
                            .client
                            .purge_unknown(&netns, &subnets_of(&networks, &own))?;
                        place.looked_through = true;
                    }
                    Ok(())
                });
            let problem = applied.err().map(|error| format!("{error:#}"));
            if problem != place.problem
                && let Some(problem) = &problem
            {
                tracing::warn!("container {name}: services are not as they should be: {problem}");
            }
            place.problem = problem;
            for waiting in place.waiting.drain(..) {
                let _ = waiting.send(());
            }
        }
        behind
    }

    fn settle_host(&mut self, agent: &Agent, member: &Member) {
        let Some(vni) = member.services.ingress_network() else {
            return;
        };
        if !ingress::is_attached(agent, vni) {
            self.host = Host::default();
            return;
        }
        let changed = self.changed.contains(&vni) || std::mem::take(&mut self.host.stale);
        if !changed || !self.complete.contains(&vni) {
            return;
        }
        let published = self
            .services
            .of(vni)
            .flat_map(|service| &service.spec.publish)
            .filter(|publish| publish.mode == PublishMode::Ingress);
        let holder = |published: &Publish| publish::holder(agent, published);
        self.host.reserved.settle(&agent.netns, published, holder);
        let (host, plan) = self.entry_plan(agent, member, vni);
        let entry = &mut self.host.entry;
        let mut applied = entry.apply(&agent.netns, &plan);
        if applied.is_ok() && !self.host.looked_through && self.caught_up.contains(&vni) {
            applied = entry.purge_unknown(&agent.netns, &host.subnets);
            self.host.looked_through = applied.is_ok();
        }
        let applied = applied.context("published ports are not as they should be");
        let problem = applied.err().map(|error| format!("{error:#}"));
        if problem != self.host.problem
            && let Some(problem) = &problem
        {
            tracing::warn!("{problem}");
        }
        self.host.problem = problem;
    }

    /// What this host needs to accept published ports.
    fn entry_plan(&self, agent: &Agent, member: &Member, vni: Vni) -> (EntryHost, EntryPlan) {
        let networks = agent.state.read(|state| state.networks.clone());
        let subnets = subnets_of(&networks, &BTreeSet::from([vni]));
        let (ipv4, ipv6) = member.gateway().networks();
        let host = EntryHost {
            salt: salt(member.host.id.as_bytes()),
            subnets,
            // The gateway bridge's addresses mean nothing on another host.
            local_sources: [IpNet::from(ipv4), IpNet::from(ipv6)].into(),
            excluded: self.host.reserved.taken(),
        };
        let plan = self.services.entry_plan(vni, &host);
        (host, plan)
    }

    /// Tells the manager what is in force here. A namespace whose rules could not be set is no reason to say nothing of all others:
    /// `status` names it. Of networks with namespaces that are `behind` it is told once these are not.
    fn tell(&mut self, member: &Member, behind: &BTreeSet<Vni>) {
        self.changed.clear();
        self.reached.retain(|vni, (generation, revision)| {
            let waits = behind.contains(vni);
            if !waits {
                member.control.applied(*vni, *generation, *revision);
            }
            waits
        });
    }

    fn share(&self, member: &Member) {
        let of_places = self.places.iter().filter_map(|(name, place)| {
            let problem = place.problem.as_ref()?;
            Some(format!(
                "container {name}: services are not as they should be: {problem}"
            ))
        });
        let mut problems: Vec<String> = of_places.collect();
        problems.extend(self.host.problem.clone());
        problems.extend(self.host.reserved.problems());
        problems.extend(self.members.problems());
        let health = self.members.shown();
        let mut shared = member.services.shared();
        let summaries = shared.all().map(|service| self.summary(service)).collect();
        shared.summaries = summaries;
        shared.problems = problems;
        shared.health = health;
    }
}

impl Keeper {
    fn summary(&self, service: &Service) -> Summary {
        // On its own network where this host is on that, else on that of published ports.
        let vni = if self.complete.contains(&service.vni) {
            Some(service.vni)
        } else {
            let mut networks = self.complete.iter();
            networks
                .find(|&&vni| {
                    self.services
                        .of(vni)
                        .any(|known| known.epoch == service.epoch)
                })
                .copied()
        };
        let backends = || {
            vni.into_iter()
                .flat_map(|vni| self.services.members(vni, service.epoch))
        };
        // A member has an address of each family that the network has.
        let members = |serving: bool| {
            let of = |v4| {
                let own = backends().filter(|(ip, _)| ip.is_ipv4() == v4);
                own.filter(|(_, backend)| backend.serving || !serving)
                    .count()
            };
            of(true).max(of(false))
        };
        Summary {
            id: service.id.clone(),
            name: service.spec.name.clone(),
            network: service.spec.network.clone(),
            mode: service.spec.mode.to_string(),
            vips: service.vips.clone(),
            serving: members(true),
            members: members(false),
            ports: service.spec.publish.clone(),
            labels: service.spec.labels.clone(),
        }
    }
}

impl Shared {
    /// All services that this host hears of, each once.
    pub(super) fn all(&self) -> impl Iterator<Item = &Service> {
        let mut seen = BTreeSet::new();
        self.services
            .values()
            .flatten()
            .filter(move |service| seen.insert(service.epoch))
    }
}

/// What a container's namespace should have.
struct Wanted {
    /// The networks that it is on, but for that of published ports.
    own: BTreeSet<Vni>,
    /// It is on that of published ports.
    on_ingress: bool,
    client: ClientPlan,
    member: Option<MemberPlan>,
}

fn wanted(
    services: &discovery::Services,
    networks: &[Network],
    ingress: Option<Vni>,
    name: &str,
    ports: &[Port],
) -> Wanted {
    let own: BTreeSet<Vni> = ports
        .iter()
        .map(|port| port.vni)
        .filter(|&vni| Some(vni) != ingress)
        .collect();
    let on_ingress = ports.iter().find(|port| Some(port.vni) == ingress);
    let member = on_ingress.and_then(|port| {
        let mut networks = networks.iter();
        let network = networks.find(|network| network.vni == port.vni)?;
        let subnets = network.subnets.iter();
        let place = MemberNetwork {
            ips: port.ips.iter().copied().collect(),
            gateways: subnets.map(|subnet| subnet.gateway).collect(),
            gateway_mac: network.gateway_mac.octets(),
        };
        services.member_plan(port.vni, port.service?, &place)
    });
    Wanted {
        client: services.client_plan(&own, salt(name.as_bytes())),
        on_ingress: on_ingress.is_some(),
        own,
        member,
    }
}

fn subnets_of(networks: &[Network], vnis: &BTreeSet<Vni>) -> BTreeSet<IpNet> {
    let wanted = networks
        .iter()
        .filter(|network| vnis.contains(&network.vni));
    let subnets = wanted.flat_map(|network| &network.subnets);
    subnets.map(|subnet| subnet.net).collect()
}

fn ports(agent: &Agent, name: &str) -> Vec<Port> {
    agent.state.read(|state| {
        state
            .places(name)
            .map(|record| Port {
                vni: record.vni,
                ips: record.ips.clone(),
                service: record.member.map(|member| member.service),
            })
            .collect()
    })
}

/// A number of one's own, the same after a restart.
fn salt(name: &[u8]) -> u64 {
    mix(name.iter().map(|&byte| u64::from(byte)))
}
