//! This host's place in a cluster, or in a file of static tables, while the agent
//! runs: datapath, control, gateway bridge, and the manager where this host runs one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use bridge::{Gateway, Settings};
use control::{
    AgentConfig, AgentHandle, Authority, CacheConfig, EndpointState, HostInfo, Identity,
    ManagerHandle, Network, Request, RequestError, Response, WallClock,
};
use vtep::Vni;
use vtep::datapath::{Datapath, UserspaceConfig, UserspaceDatapath};
use vtep::fdb::Change;

use super::control_source::Control;
use super::keys::{self, Keys};
use super::names::Names;
use super::port::PortKeeper;
use super::services::Services;
use super::state::Membership;
use super::static_mode::StaticTables;
use super::tables::{Follower, network_config};
use super::{Agent, manager};

/// The parts that live and die with this process; they change nothing of the host.
pub(crate) struct Parts {
    /// What `init` or `join` settled.
    pub(super) settled: Membership,
    /// What this host is known by.
    pub(super) keys: Keys,
    /// Carries frames.
    pub(super) datapath: Arc<dyn Datapath>,
    /// Asks the manager.
    pub(super) control: AgentHandle,
    host: HostInfo,
    manager: Option<ManagerHandle>,
}

/// All parts that exist while this host is in a cluster.
pub(crate) struct Member {
    /// What `init` or `join` settled.
    pub(crate) settled: Membership,
    /// This host as it presents itself to the manager.
    pub(crate) host: HostInfo,
    /// Carries frames.
    pub(crate) datapath: Arc<dyn Datapath>,
    /// Asks the manager, or the file of static tables.
    pub(crate) control: Control,
    /// Follows the manager's news and knows hosts by their ids.
    pub(super) follower: Arc<Follower>,
    /// None in static mode.
    keys: Mutex<Option<Keys>>,
    /// What this host does for services.
    pub(crate) services: Services,
    /// What this host does for names.
    pub(crate) names: Names,
    /// The UDP port of VXLAN, which may change.
    pub(super) port: PortKeeper,
    manager: Mutex<Option<ManagerHandle>>,
    gateway: Mutex<Gateway>,
}

impl Parts {
    /// Starts datapath, manager and control.
    ///
    /// # Errors
    /// Whichever could not start says why; those before it are stopped again.
    pub(super) fn start(agent: &Agent, settled: Membership, keys: Keys) -> anyhow::Result<Self> {
        let incarnation = agent.state.read(|state| state.incarnation);
        let id = keys.identity.certificate().host;
        let datapath = start_datapath(agent, &settled)?;
        let host = HostInfo {
            id,
            name: agent.config.name.clone(),
            vtep: settled.vtep,
            port: settled.port,
            link_mtu: settled.link_mtu,
            incarnation,
        };
        let manager = settled
            .manager
            .then(|| manager::start(agent, &settled, &keys, &datapath, None))
            .transpose()?;
        let control = AgentHandle::start(AgentConfig {
            host: host.clone(),
            managers: settled.managers.clone(),
            identity: Arc::clone(&keys.identity),
            bind: settled.vtep,
            endpoints: agent.state.read(|state| {
                // Those that ended meanwhile are freed soon; a row that went down and up again would
                // cost the others their frames.
                let records = state.endpoints.iter();
                records
                    .filter(|record| record.standing.is_whole())
                    .map(|record| (record.endpoint(), EndpointState::Up))
                    .collect()
            }),
            cache: Some(CacheConfig {
                file: agent.tables_file(),
                networks: agent
                    .state
                    .read(|state| state.networks.iter().map(|known| known.vni).collect()),
            }),
            clock: WallClock::default(),
        })?;
        Ok(Self {
            settled,
            keys,
            datapath,
            control,
            host,
            manager,
        })
    }

    /// Adds the gateway bridge, which changes the host.
    ///
    /// # Errors
    /// The parts come back with the reason; the bridge has undone what it began.
    pub(super) fn finish(self, agent: &Agent) -> Result<Member, (Box<Self>, anyhow::Error)> {
        let gateway = match ensure_gateway(agent, &self.settled) {
            Ok(gateway) => gateway,
            Err(error) => return Err((Box::new(self), error)),
        };
        Ok(Member {
            follower: Arc::new(Follower::new(self.host.id, Arc::clone(&self.datapath))),
            services: Services::new(agent.netns.clone()),
            names: Names::new(agent.netns.clone(), agent.config.resolv_conf.clone()),
            port: PortKeeper::new(self.settled.port),
            settled: self.settled,
            host: self.host,
            datapath: self.datapath,
            control: Control::Manager(self.control),
            keys: Mutex::new(Some(self.keys)),
            manager: Mutex::new(self.manager),
            gateway: Mutex::new(gateway),
        })
    }

    /// Has the manager forget this host, which could not come in after all.
    pub(super) fn withdraw(&self) {
        withdrawn(&self.control.request(Request::Leave));
    }
}

fn withdrawn(left: &Result<Response, RequestError>) {
    if let Err(error) = left {
        tracing::warn!("the manager still lists this host: {error}");
    }
}

fn start_datapath(agent: &Agent, settled: &Membership) -> anyhow::Result<Arc<dyn Datapath>> {
    Ok(Arc::new(UserspaceDatapath::start(UserspaceConfig {
        netns: agent.netns.clone(),
        vtep: settled.vtep,
        port: settled.port,
        workers: agent.config.workers,
        backend: agent.config.backend,
        strict_reserved_bits: agent.config.strict_reserved_bits,
    })?))
}

fn ensure_gateway(agent: &Agent, settled: &Membership) -> anyhow::Result<Gateway> {
    let settings = Settings {
        ipv4: agent.config.gwbridge.0,
        ipv6: agent.config.gwbridge.1,
        mtu: settled.link_mtu.into(),
    };
    Ok(Gateway::ensure(&agent.netns, &settings)?)
}

impl Member {
    /// The parts of a host whose tables come from a file.
    ///
    /// # Errors
    /// Whichever could not start says why; nothing is left then.
    pub(super) fn with_static_tables(
        agent: &Agent,
        settled: Membership,
        host: HostInfo,
        tables: Arc<StaticTables>,
    ) -> anyhow::Result<Self> {
        let datapath = start_datapath(agent, &settled)?;
        let gateway = ensure_gateway(agent, &settled)?;
        Ok(Self {
            follower: Arc::new(Follower::new(host.id, Arc::clone(&datapath))),
            services: Services::new(agent.netns.clone()),
            names: Names::new(agent.netns.clone(), agent.config.resolv_conf.clone()),
            port: PortKeeper::new(settled.port),
            settled,
            host,
            datapath,
            control: Control::Static(tables),
            keys: Mutex::new(None),
            manager: Mutex::new(None),
            gateway: Mutex::new(gateway),
        })
    }

    /// What this host is known by.
    ///
    /// # Errors
    /// In static mode: there are no keys.
    pub(super) fn keys(&self) -> anyhow::Result<Keys> {
        let keys = self.lock_keys().clone();
        keys.context("static mode: there is no manager, and this host has no cluster's keys")
    }

    /// Takes a renewed identity, for the next start too.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn renew(&self, agent: &Agent, identity: Arc<Identity>) -> anyhow::Result<()> {
        keys::save_identity(&agent.config, &identity)?;
        if let Some(keys) = &mut *self.lock_keys() {
            keys.identity = identity;
        }
        Ok(())
    }

    /// Takes the cluster's authority, for the next start too.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn keep_authority(
        &self,
        agent: &Agent,
        authority: Arc<Authority>,
    ) -> anyhow::Result<()> {
        match &mut *self.lock_keys() {
            Some(keys) => {
                keys.authority = Some(authority);
                keys.save(&agent.config)
            }
            None => Ok(()),
        }
    }

    /// Whether the cluster's manager runs here.
    pub(super) fn runs_manager(&self) -> bool {
        self.lock_manager().is_some()
    }

    /// Why the manager that ran here has ended by itself, if it has.
    pub(super) fn manager_stood_down(&self) -> Option<String> {
        let manager = self.lock_manager();
        manager
            .as_ref()
            .and_then(|manager| manager.status().stood_down)
    }

    /// Puts a manager here or takes it away; the one before is shut down.
    pub(super) fn set_manager(&self, manager: Option<ManagerHandle>) {
        let before = std::mem::replace(&mut *self.lock_manager(), manager);
        if let Some(before) = before {
            before.shutdown();
        }
    }

    fn lock_manager(&self) -> MutexGuard<'_, Option<ManagerHandle>> {
        self.manager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_keys(&self) -> MutexGuard<'_, Option<Keys>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gateway bridge.
    pub(crate) fn gateway(&self) -> MutexGuard<'_, Gateway> {
        self.gateway.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this host take part in `network`: its table is followed, the datapath
    /// knows it, and both are so again after a restart. A second time is harmless.
    ///
    /// # Errors
    /// When the state file cannot be written.
    pub(crate) fn enter_network(&self, agent: &Agent, network: &Network) -> anyhow::Result<()> {
        agent.state.update(|state| {
            state.networks.retain(|known| known.vni != network.vni);
            state.networks.push(network.clone());
        })?;
        self.follow(network);
        Ok(())
    }

    /// As [`Self::enter_network`] for a network that the state file has already.
    pub(super) fn follow(&self, network: &Network) {
        self.datapath.apply(&[Change::SetNetwork(network_config(
            network,
            self.services.vips(network.vni),
        ))]);
        self.follower.follow(network.vni);
        self.names.network(network);
        self.control.subscribe(network.vni);
    }

    /// Stops taking part in the network `vni` when no endpoint of this host is left on it.
    ///
    /// # Errors
    /// When the state file cannot be written.
    pub(crate) fn leave_idle_network(&self, agent: &Agent, vni: Vni) -> anyhow::Result<()> {
        let idle = agent.state.update(|state| {
            let idle = state.endpoints.iter().all(|endpoint| endpoint.vni != vni);
            if idle {
                state.networks.retain(|network| network.vni != vni);
            }
            idle
        })?;
        if idle {
            self.control.unsubscribe(vni);
            self.follower.forget(vni);
            self.services.forget(vni);
            self.names.forget(vni);
            self.datapath.apply(&[Change::RemoveNetwork(vni)]);
        }
        Ok(())
    }

    /// Has the manager forget this host.
    pub(super) fn withdraw(&self) {
        withdrawn(&self.control.request(Request::Leave));
    }

    /// Ends all parts of this process, control before the manager that it talks to.
    pub(super) fn stop(self) {
        self.control.shutdown();
        let manager = self.manager.into_inner();
        if let Some(manager) = manager.unwrap_or_else(PoisonError::into_inner) {
            manager.shutdown();
        }
    }
}
