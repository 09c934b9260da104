//! What this host does for services: a thread that carries the manager's news into the kernel's rules.
//!
//! ```text
//!  news ──▶ Keeper ──▶ what each namespace and the host should have (`discovery`) ──▶ nftables, rules, conntrack
//!             │  ▲
//!             │  └── containers come and go, ports are taken, members turn healthy or not
//!             └────▶ `applied`, to the manager: what was told up to here is in force
//! ```
//!
//! Nothing of it is on the path of a packet: the rules are the kernel's and stay while no agent runs. A new agent changes them only
//! once it has heard of all that a namespace's networks hold, and looks for connections to who left meanwhile once that is a manager's
//! word and not what its predecessor knew. Does NOT say what rules look like: that is `discovery`'s.

mod keeper;
mod members;
mod reserve;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use control::installed::Entry;
use control::service::{Publish, PublishMode, Service};
use control::{Epoch, Inspection, TableChange};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use netns::Netns;
use vtep::Vni;

use super::{Agent, Member};
use crate::api::service::Summary;
use keeper::Keeper;

/// How long a container that starts waits for its rules.
const RULES_LIMIT: Duration = Duration::from_secs(2);

/// Something to look at.
#[derive(Debug)]
enum Work {
    /// All services of a network.
    Services { vni: Vni, services: Vec<Service> },
    /// Changes of a network's rows.
    Table { vni: Vni, changes: Vec<TableChange> },
    /// The news before hold all up to here.
    Reached {
        vni: Vni,
        generation: u16,
        revision: u64,
    },
    /// The news of a network before are a manager's of now.
    CaughtUp(Vni),
    /// The network of published ports.
    Ingress(Option<Vni>),
    /// A network is followed no more.
    Forget(Vni),
    /// A container has come, or has other places now. Whoever asked hears when its rules stand.
    Container {
        name: String,
        /// Its command runs.
        started: bool,
        done: Option<Sender<()>>,
    },
    /// A container is about to go: nothing more is done in its namespace once this was heard.
    Gone { name: String, done: Sender<()> },
    /// A member's command runs.
    Started { name: String },
    /// A member is healthy, or not.
    Health {
        name: String,
        healthy: bool,
        why: String,
    },
    /// The ports that a member has by its service are as they should be, or not.
    Ports {
        name: String,
        problem: Option<String>,
    },
    /// A member goes: it serves no more, whatever its health.
    Drain { name: String, done: Sender<()> },
    /// The host's own port has come.
    Host,
    /// A manager asks what is in force; the datapath holds `installed`.
    Inspect {
        inspection: Inspection,
        installed: BTreeSet<Entry>,
    },
    /// Time has passed: what failed is tried again.
    Look,
}

/// The thread's letter box, and what others look at.
#[derive(Debug)]
pub(crate) struct Services {
    netns: Netns,
    work: Sender<Work>,
    /// Taken by the thread.
    waiting: Mutex<Option<Receiver<Work>>>,
    shared: Mutex<Shared>,
}

/// What others look at.
#[derive(Debug, Default)]
struct Shared {
    ingress: Option<Vni>,
    services: BTreeMap<Vni, Vec<Service>>,
    /// Services, as this host sees them.
    summaries: Vec<Summary>,
    /// What the operator should know.
    problems: Vec<String>,
    /// Health of members here, by container.
    health: BTreeMap<String, String>,
}

impl Services {
    /// For the host in this namespace. Nothing runs before [`start`].
    pub(super) fn new(netns: Netns) -> Self {
        let (work, waiting) = unbounded();
        Self {
            netns,
            work,
            waiting: Mutex::new(Some(waiting)),
            shared: Mutex::default(),
        }
    }

    /// All services of a network.
    pub(super) fn services(&self, vni: Vni, services: Vec<Service>) {
        self.send(Work::Services { vni, services });
    }

    /// Changes of a network's rows; those that are no matter of services are passed over.
    pub(super) fn table(&self, vni: Vni, changes: &[TableChange]) {
        let of_members = |change: &&TableChange| matches!(change, TableChange::Backend { .. });
        let changes: Vec<TableChange> = changes.iter().filter(of_members).cloned().collect();
        if !changes.is_empty() {
            self.send(Work::Table { vni, changes });
        }
    }

    /// The news before hold all up to here.
    pub(super) fn reached(&self, vni: Vni, generation: u16, revision: u64) {
        self.send(Work::Reached {
            vni,
            generation,
            revision,
        });
    }

    /// The news of a network before are a manager's of now.
    pub(super) fn caught_up(&self, vni: Vni) {
        self.send(Work::CaughtUp(vni));
    }

    /// The network of published ports is this one.
    pub(super) fn ingress(&self, vni: Option<Vni>) {
        self.send(Work::Ingress(vni));
    }

    /// A network is followed no more.
    pub(super) fn forget(&self, vni: Vni) {
        self.send(Work::Forget(vni));
    }

    /// A container is ready for its command: returns when the rules in its namespace stand, or have taken too long.
    pub(crate) fn container(&self, name: &str) {
        self.wait(RULES_LIMIT, |done| Work::Container {
            name: name.to_owned(),
            started: false,
            done: Some(done),
        });
    }

    /// As [`Self::container`], for one that runs already: returns at once.
    pub(crate) fn found(&self, name: &str, started: bool) {
        self.send(Work::Container {
            name: name.to_owned(),
            started,
            done: None,
        });
    }

    /// A container goes: returns when nothing is done in its namespace any more.
    pub(crate) fn gone(&self, name: &str) {
        self.wait(RULES_LIMIT, |done| Work::Gone {
            name: name.to_owned(),
            done,
        });
    }

    /// The command of a container runs.
    pub(crate) fn started(&self, name: &str) {
        self.send(Work::Started {
            name: name.to_owned(),
        });
    }

    /// The ports that a container has by its service have been brought to what it asks for; `problem`: not all.
    pub(crate) fn ports_followed(&self, name: &str, problem: Option<String>) {
        self.send(Work::Ports {
            name: name.to_owned(),
            problem,
        });
    }

    /// A member goes: returns when it has been told to the manager that it serves no more.
    pub(crate) fn drain(&self, name: &str) {
        self.wait(RULES_LIMIT, |done| Work::Drain {
            name: name.to_owned(),
            done,
        });
    }

    /// This host has its port on the network of published ports, or a container has let go of ports of its own.
    pub(crate) fn host_changed(&self) {
        self.send(Work::Host);
    }

    /// Answers a manager's question: what the datapath holds of a network is known, rules for services are read back.
    pub(super) fn inspect(&self, inspection: Inspection, installed: BTreeSet<Entry>) {
        self.send(Work::Inspect {
            inspection,
            installed,
        });
    }

    /// Tries again what failed. To be called every few seconds.
    pub(crate) fn look(&self) {
        self.send(Work::Look);
    }

    /// Whether this host could publish a port now.
    ///
    /// # Errors
    /// Why not, as part of a sentence.
    pub(crate) fn could_publish(&self, publish: &Publish) -> Result<(), String> {
        // Held by this agent itself: the manager names the service.
        if self.that_publishes(publish).is_some() {
            return Ok(());
        }
        reserve::could_be(&self.netns, publish)
    }

    /// The service that has this port on every host, as far as this one has heard.
    pub(crate) fn that_publishes(&self, publish: &Publish) -> Option<Service> {
        let same = |known: &Publish| {
            known.mode == PublishMode::Ingress
                && (known.protocol, known.published) == (publish.protocol, publish.published)
        };
        self.find(|service| service.spec.publish.iter().any(same))
    }

    /// The network of published ports.
    pub(crate) fn ingress_network(&self) -> Option<Vni> {
        self.shared().ingress
    }

    /// A service of a network that this host follows.
    pub(crate) fn by_epoch(&self, epoch: Epoch) -> Option<Service> {
        self.find(|service| service.epoch == epoch)
    }

    /// A service of a network that this host follows, by name or id.
    pub(crate) fn by_name(&self, name: &str) -> Option<Service> {
        self.find(|service| service.spec.name == name || service.id == name)
    }

    fn find(&self, wanted: impl Fn(&Service) -> bool) -> Option<Service> {
        self.shared().all().find(|service| wanted(service)).cloned()
    }

    /// Addresses of the services of a network itself.
    pub(super) fn vips(&self, vni: Vni) -> BTreeSet<IpAddr> {
        let shared = self.shared();
        let services = shared.services.get(&vni).into_iter().flatten();
        services
            .filter(|service| service.vni == vni)
            .flat_map(|service| service.vips.iter().copied())
            .collect()
    }

    /// What the operator should know: one sentence each.
    pub(super) fn problems(&self) -> Vec<String> {
        self.shared().problems.clone()
    }

    /// All services that this host acts for.
    pub(super) fn summaries(&self) -> Vec<Summary> {
        self.shared().summaries.clone()
    }

    /// How a member here is, as far as it is checked.
    pub(crate) fn health(&self, container: &str) -> Option<String> {
        self.shared().health.get(container).cloned()
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Replaced a field at a time, so a panic elsewhere leaves nothing half done.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, work: Work) {
        // Nobody listens once the member has ended: nothing is to be done then.
        let _ = self.work.send(work);
    }

    fn wait(&self, limit: Duration, work: impl FnOnce(Sender<()>) -> Work) {
        let (done, heard) = bounded(1);
        self.send(work(done));
        let _ = heard.recv_timeout(limit);
    }
}

/// Starts carrying; ends with the member.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(agent: &Arc<Agent>, member: &Arc<Member>) -> anyhow::Result<()> {
    let mut slot = member
        .services
        .waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let Some(waiting) = slot.take() else {
        return Ok(());
    };
    drop(slot);
    // Not the member itself: the thread must not keep alive what ends it.
    let (agent, member) = (Arc::clone(agent), Arc::downgrade(member));
    std::thread::Builder::new()
        .name("services".into())
        .spawn(move || {
            let mut keeper = Keeper::default();
            while let Ok(first) = waiting.recv() {
                let Some(member) = member.upgrade() else {
                    return;
                };
                let work = std::iter::once(first).chain(waiting.try_iter());
                keeper.turn(&agent, &member, work.collect());
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
