//! Static mode: what a manager would tell comes from a file instead.
//!
//! ```text
//!  FILE ─▶ file.rs: checked whole ─▶ changes.rs: what differs ─▶ events, as a manager's ─▶ news.rs ─▶ datapath
//!                                └─▶ ports.rs: interfaces in others' namespaces
//! ```
//!
//! The file is read at the start and on SIGHUP; one that does not do changes nothing. Containers of `towline run` take their addresses
//! from it. What would need a manager is refused by name. It does NOT watch the file, and knows nothing of whether other hosts live.

mod changes;
mod file;
mod ports;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use control::{
    ControlStatus, EndpointView, Event, HostView, NetworkDetails, Request, RequestError, Response,
    State, SubscriptionStatus,
};
use crossbeam_channel::{Receiver, Sender};
use vtep::Vni;

use super::membership::Member;
use super::state::{EndpointRecord, Membership};
use super::{Agent, neighbors, news, port, retry, survey, underlay};
use crate::api::StaticSource;
use changes::Told;
use file::{File, Plan, PlannedEndpoint, PlannedNetwork};

/// The tables that a file gives.
#[derive(Debug)]
pub(crate) struct StaticTables {
    path: PathBuf,
    inner: Mutex<Inner>,
    /// Unbounded: what a file says is bounded by the file.
    news: Sender<Event>,
    events: Receiver<Event>,
    /// Ports in others' namespaces.
    ports: ports::Served,
}

#[derive(Debug)]
struct Inner {
    plan: Arc<Plan>,
    read: Instant,
    reads: u64,
    /// Why the file as it is now is not in force.
    problem: Option<String>,
    /// What has been told of each network that is followed.
    told: BTreeMap<Vni, Told>,
}

/// Begins with what the file says, in the place of a cluster's membership.
///
/// # Errors
/// A file that does not do, a state folder of a cluster's member, and what the datapath needs and does not get. Nothing of the
/// host was changed then.
pub(super) fn start(agent: &Arc<Agent>, path: &Path) -> anyhow::Result<()> {
    if agent.state.read(|state| state.membership.is_some()) {
        bail!(
            "the state folder {} is that of a cluster's member: run 'towline leave' with an agent without --static, \
             or give this one another --state-dir",
            agent.config.state_dir.display()
        );
    }
    let (plan, settled) = read(agent, path)?;
    check_running(agent, &plan)?;
    let own = plan.hosts.iter().find(|host| host.id == plan.own);
    let own = own.cloned().context("invariant: the plan has this host")?;
    let tables = StaticTables::new(path, plan);
    let member = retry(|| {
        Member::with_static_tables(agent, settled.clone(), own.clone(), Arc::clone(&tables))
    })?;
    let member = Arc::new(member);
    // As they are now: the file may have changed since the agent before.
    agent.state.update(|state| {
        state.networks.retain_mut(|known| {
            let plan = &tables.lock().plan;
            let network = plan.networks.get(&known.vni);
            network.is_some_and(|planned| {
                known.clone_from(&planned.network);
                true
            })
        });
    })?;
    for network in agent.state.read(|state| state.networks.clone()) {
        member.follow(&network);
    }
    neighbors::raise(agent);
    agent.set_member(Some(Arc::clone(&member)));
    news::start(agent, &member)?;
    survey::start(&member)?;
    ports::settle(agent, &member, &tables);
    tracing::info!("static mode: tables come from {}", path.display());
    Ok(())
}

/// Reads the file again. One that does not do changes nothing, and is told of in the log and by `towline status`.
pub(super) fn reload(agent: &Arc<Agent>, path: &Path) {
    let _changing = agent.changing();
    let Ok(member) = agent.member() else {
        // After `towline leave`.
        if let Err(error) = start(agent, path) {
            tracing::error!("static mode does not begin again: {error:#}");
        }
        return;
    };
    let Some(tables) = member.control.static_tables() else {
        return;
    };
    let taken = read(agent, path).and_then(|(plan, settled)| {
        ensure!(
            (settled.vtep, settled.port) == (member.settled.vtep, member.settled.port),
            "this host's VTEP is another now, {}: stop the agent and start it again",
            SocketAddr::new(settled.vtep, settled.port)
        );
        check_running(agent, &plan)?;
        Ok(plan)
    });
    match taken {
        Ok(plan) => {
            tables.replace(plan);
            ports::settle(agent, &member, tables);
            tracing::info!("read {} again", path.display());
        }
        Err(error) => {
            let problem = format!("{error:#}");
            tracing::error!(
                "{} is not taken, nothing was changed: {problem}",
                path.display()
            );
            tables.lock().problem = Some(problem);
        }
    }
}

/// Looks after ports in namespaces that come and go. To be called every few seconds.
pub(super) fn look(agent: &Arc<Agent>) {
    let _changing = agent.changing();
    let Ok(member) = agent.member() else { return };
    if let Some(tables) = member.control.static_tables() {
        ports::settle(agent, &member, tables);
    }
}

/// Takes away the ports in others' namespaces.
///
/// # Errors
/// Names those that could not be removed.
pub(super) fn remove_ports(agent: &Agent, member: &Member) -> anyhow::Result<()> {
    match member.control.static_tables() {
        Some(tables) => ports::remove_all(agent, member, tables),
        None => Ok(()),
    }
}

/// Refuses to go on without a file where an agent with one has left something.
///
/// # Errors
/// When there is something.
pub(super) fn check_no_leftovers(agent: &Agent) -> anyhow::Result<()> {
    let left = agent
        .state
        .read(|state| state.membership.is_none().then_some(state.endpoints.len()));
    match left {
        Some(count) if count > 0 => bail!(
            "the state folder {} holds {count} endpoints of static mode: start the agent with --static, and run 'towline leave' \
             to remove them; or give this one another --state-dir",
            agent.config.state_dir.display()
        ),
        _ => Ok(()),
    }
}

/// The file, checked whole, and what it makes of this host.
fn read(agent: &Agent, path: &Path) -> anyhow::Result<(Plan, Membership)> {
    let in_file = || format!("{} does not do", path.display());
    let file = File::read(path)?;
    let (own, at) = file.own(&agent.config.name).with_context(in_file)?;
    port::check(at.port())
        .with_context(|| format!("host {own}"))
        .with_context(in_file)?;
    let underlay = underlay::settle(&agent.netns, Some(at.ip()), None)
        .with_context(|| format!("host {own}"))
        .with_context(in_file)?;
    let plan = file.plan(own, underlay.link_mtu).with_context(in_file)?;
    let settled = Membership {
        manager: false,
        managers: Vec::new(),
        vtep: at.ip(),
        port: at.port(),
        control_port: 0,
        link_mtu: underlay.link_mtu,
        pools: Vec::new(),
    };
    Ok((plan, settled))
}

/// Containers keep what they were started with: a file that says otherwise of one does not do.
fn check_running(agent: &Agent, plan: &Plan) -> anyhow::Result<()> {
    agent.state.read(|state| {
        for record in state.endpoints.iter().filter(|record| record.netns.is_none()) {
            let planned = plan.networks.get(&record.vni);
            // A file gives no names.
            let runs = control::Endpoint {
                names: None,
                ..record.endpoint()
            };
            let stays = planned.is_some_and(|planned| {
                planned.network.mtu == record.mtu
                    && planned.endpoints.iter().any(|endpoint| {
                        endpoint.endpoint == runs && endpoint.host == plan.own
                    })
            });
            ensure!(
                stays,
                "container {} runs with {} ({}) on VNI {}, MTU {}, and the file says otherwise: remove it first with 'towline rm -f {0}'",
                record.container,
                record.mac,
                record.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                record.vni,
                record.mtu
            );
        }
        Ok(())
    })
}

impl StaticTables {
    fn new(path: &Path, plan: Plan) -> Arc<Self> {
        let (news, events) = crossbeam_channel::unbounded();
        let tables = Self {
            path: path.to_owned(),
            inner: Mutex::new(Inner {
                plan: Arc::new(plan),
                read: Instant::now(),
                reads: 1,
                problem: None,
                told: BTreeMap::new(),
            }),
            news,
            events,
            ports: ports::Served::default(),
        };
        tables.tell(Event::Hosts(views(&tables.lock().plan)));
        Arc::new(tables)
    }

    /// Takes another plan, and tells what differs.
    fn replace(&self, plan: Plan) {
        let mut inner = self.lock();
        if inner.plan.hosts != plan.hosts {
            self.tell(Event::Hosts(views(&plan)));
        }
        let before = std::mem::replace(&mut inner.plan, Arc::new(plan));
        (inner.read, inner.problem) = (Instant::now(), None);
        inner.reads += 1;
        let Inner { plan, told, .. } = &mut *inner;
        told.retain(|&vni, told| match plan.networks.get(&vni) {
            Some(planned) => {
                if before.networks.get(&vni).map(|old| &old.network) != Some(&planned.network) {
                    self.tell(Event::NetworkChanged(planned.network.clone()));
                }
                self.tell_table(vni, told, planned);
                true
            }
            None => {
                self.tell(Event::NetworkRemoved(vni));
                false
            }
        });
    }

    pub(super) fn subscribe(&self, vni: Vni) {
        let mut inner = self.lock();
        let Inner { plan, told, .. } = &mut *inner;
        let Some(planned) = plan.networks.get(&vni) else {
            return;
        };
        if let std::collections::btree_map::Entry::Vacant(place) = told.entry(vni) {
            self.tell_table(vni, place.insert(Told::default()), planned);
        }
    }

    pub(super) fn unsubscribe(&self, vni: Vni) {
        self.lock().told.remove(&vni);
    }

    pub(super) fn events(&self) -> &Receiver<Event> {
        &self.events
    }

    /// Answers as a manager would that knows this file.
    pub(super) fn answer(&self, request: &Request) -> Result<Response, RequestError> {
        let inner = self.lock();
        let plan = &inner.plan;
        let refused = |reason: String| Err(RequestError::Refused(reason));
        match request {
            Request::ClaimName(_)
            | Request::ReleaseName(_)
            | Request::Free { .. }
            | Request::Leave => Ok(Response::Done),
            Request::Networks => {
                let networks = plan.networks.values();
                Ok(Response::Networks(
                    networks.map(|planned| planned.network.clone()).collect(),
                ))
            }
            Request::Network(name) => match plan.network(name) {
                Some(planned) => Ok(Response::Details(details(plan, planned))),
                None => refused(format!(
                    "no network {} in {}",
                    control::quote(name),
                    self.path.display()
                )),
            },
            Request::Hosts => Ok(Response::Hosts(views(plan))),
            Request::Allocate {
                network,
                container,
                ips,
                mac,
                ..
            } => {
                let planned = plan.network(network);
                let endpoint = planned.and_then(|planned| planned.of_container(plan, container));
                match endpoint {
                    None => refused(format!(
                        "no endpoint of container {} on network {} of this host in {}: add it to [[endpoints]] and send the agent SIGHUP",
                        control::quote(container),
                        control::quote(network),
                        self.path.display()
                    )),
                    Some(found) => {
                        let endpoint = &found.endpoint;
                        let differs = ips.iter().any(|ip| !endpoint.ips.contains(ip))
                            || mac.is_some_and(|mac| mac != endpoint.mac);
                        if differs {
                            return refused(format!(
                                "{} gives container {container} {} on network {network}: leave --ip and --mac out, or change the file",
                                self.path.display(),
                                endpoint.mac
                            ));
                        }
                        Ok(Response::Endpoint(endpoint.clone()))
                    }
                }
            }
            other => refused(format!(
                "static mode: this host's tables come from {} and there is no manager, so it cannot {}",
                self.path.display(),
                purpose(other)
            )),
        }
    }

    /// As `towline status` shows the tables of a manager.
    pub(super) fn control_status(&self) -> ControlStatus {
        let inner = self.lock();
        let age_ms = u64::try_from(inner.read.elapsed().as_millis()).unwrap_or(u64::MAX);
        let subscriptions = inner.told.iter().filter_map(|(&vni, told)| {
            let planned = inner.plan.networks.get(&vni)?;
            Some(SubscriptionStatus {
                vni,
                name: Some(planned.network.name.clone()),
                generation: planned.network.epoch.generation(),
                revision: inner.reads,
                rows: told.rows(),
                age_ms: Some(age_ms),
                leased: Vec::new(),
            })
        });
        ControlStatus {
            connected_to: None,
            since_ms: None,
            managers: Vec::new(),
            last_error: None,
            subscriptions: subscriptions.collect(),
            masked: Vec::new(),
        }
    }

    /// Where the tables come from, and what is wrong with it.
    pub(super) fn source(&self) -> StaticSource {
        let inner = self.lock();
        StaticSource {
            file: self.path.display().to_string(),
            age_ms: u64::try_from(inner.read.elapsed().as_millis()).unwrap_or(u64::MAX),
            reads: inner.reads,
            problem: inner.problem.clone(),
            ports: self.ports.problems(),
        }
    }

    fn tell_table(&self, vni: Vni, told: &mut Told, planned: &PlannedNetwork) {
        let changes = told.become_table_of(planned);
        if !changes.is_empty() {
            self.tell(Event::Table { vni, changes });
        }
    }

    fn tell(&self, event: Event) {
        // Nobody listens once the agent ends.
        let _ = self.news.send(event);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plan {
    /// A network by name or id.
    fn network(&self, name: &str) -> Option<&PlannedNetwork> {
        let mut networks = self.networks.values();
        networks.find(|planned| planned.network.name == name || planned.network.id == name)
    }

    /// This host's endpoints in others' namespaces, each with its network.
    fn placed(&self) -> impl Iterator<Item = (&PlannedNetwork, &PlannedEndpoint)> {
        let all = self.networks.values();
        let all = all.flat_map(|planned| planned.endpoints.iter().map(move |one| (planned, one)));
        all.filter(|(_, endpoint)| endpoint.place.is_some())
    }
}

impl PlannedNetwork {
    /// The endpoint of one of this host's containers.
    fn of_container(&self, plan: &Plan, container: &str) -> Option<&PlannedEndpoint> {
        let mut own = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.host == plan.own && endpoint.place.is_none());
        own.find(|endpoint| endpoint.endpoint.container == container)
    }
}

impl PlannedEndpoint {
    /// Whether a port that is recorded is this one.
    fn is(&self, record: &EndpointRecord, mtu: u16) -> bool {
        let place = self.place.as_ref();
        self.endpoint == record.endpoint()
            && record.mtu == mtu
            && place.is_some_and(|place| {
                record.netns.as_ref() == Some(&place.netns) && record.ifname == place.ifname
            })
    }
}

/// The hosts as a manager would list them. Nobody knows whether they live.
fn views(plan: &Plan) -> Vec<HostView> {
    let view = |info: &control::HostInfo| HostView {
        info: info.clone(),
        up: true,
        last_seen_ms_ago: 0,
        manager: false,
        wanted_port: None,
        port_problem: None,
        control: None,
        traits: control::HostTraits::default(),
    };
    plan.hosts.iter().map(view).collect()
}

fn details(plan: &Plan, planned: &PlannedNetwork) -> NetworkDetails {
    let names: HashMap<_, _> = plan
        .hosts
        .iter()
        .map(|host| (host.id, &host.name))
        .collect();
    let endpoints = planned.endpoints.iter().map(|planned| EndpointView {
        endpoint: planned.endpoint.clone(),
        host: names
            .get(&planned.host)
            .map_or_else(String::new, |name| (*name).clone()),
        host_id: planned.host,
        state: State::Up,
    });
    let has = |view: &HostView| {
        let mut endpoints = planned.endpoints.iter();
        endpoints.any(|endpoint| endpoint.host == view.info.id)
    };
    NetworkDetails {
        network: planned.network.clone(),
        endpoints: endpoints.collect(),
        peers: views(plan).into_iter().filter(has).collect(),
        usage: Vec::new(),
    }
}

/// What a request would do, in the words of its command.
fn purpose(request: &Request) -> &'static str {
    match request {
        Request::CreateNetwork { .. } => {
            "create a network: add it to [[networks]] and send the agent SIGHUP"
        }
        Request::RemoveNetwork(_) => {
            "remove a network: take it out of [[networks]] and send the agent SIGHUP"
        }
        Request::RemoveHost { .. } => {
            "remove a host: take it out of [[hosts]] and send the agent SIGHUP"
        }
        Request::LabelHost { .. } => "label hosts",
        Request::Token { .. } => "show a token: no host joins here",
        Request::SetVxlanPort(_) => {
            "change the VXLAN port: change 'port' in [[hosts]] and restart the agents"
        }
        Request::Verify(_) => "verify its tables against a manager's",
        Request::CreateService(_)
        | Request::UpdateService { .. }
        | Request::RemoveService(_)
        | Request::Services
        | Request::Service(_) => "have services",
        Request::Events(_) => "follow a manager's events",
        _ => "do what only a manager can",
    }
}
