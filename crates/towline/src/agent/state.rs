//! The agent's state file: what must be known again after a SIGKILL.
//!
//! One JSON file, replaced as a whole and fsynced before the change counts.
//! Containers keep their own files (`container.rs`), the manager its own store.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, bail};
use control::service::Publish;
use control::{AddressPool, Endpoint, Epoch, HostId, Network};
use serde::{Deserialize, Serialize};
use vtep::datapath::Backend;
use vtep::{MacAddr, Vni};

const FILE: &str = "agent.json";
/// Rises when a field changes its meaning: an older agent must not take up what a newer one wrote.
const VERSION: u32 = 1;

/// All that the agent remembers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct State {
    /// [`VERSION`] of the agent that wrote it.
    #[serde(default)]
    pub(crate) version: u32,
    /// This host's id, made once.
    pub(crate) host: HostId,
    /// Goes up by one at each start of the agent.
    pub(crate) incarnation: u64,
    /// Its place in a cluster; none before `init` and `join`.
    pub(crate) membership: Option<Membership>,
    /// The id of the next port.
    pub(crate) next_port: u32,
    /// Networks with endpoints here, as the manager last described them.
    pub(crate) networks: Vec<Network>,
    /// Containers' places in networks, on this host.
    pub(crate) endpoints: Vec<EndpointRecord>,
    /// Containers' places on the gateway bridge.
    pub(crate) attachments: Vec<AttachmentRecord>,
    /// Ports of this host that containers asked for which have no place on the gateway bridge now.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) closed_ports: BTreeMap<String, Vec<Publish>>,
    /// Which of the ports that containers have are those of their services.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) service_ports: BTreeMap<String, Vec<ServicePort>>,
    /// What the kernel's limits of neighbours were before they were raised, by IP version.
    #[serde(default)]
    pub(crate) neighbor_limits: BTreeMap<String, u64>,
    /// Mount points that were made on this host for containers.
    #[serde(default)]
    pub(crate) mount_points: Vec<PathBuf>,
}

/// What `init` or `join` settled.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Membership {
    /// Whether this host runs a manager.
    pub(crate) manager: bool,
    /// Where managers listen.
    pub(crate) managers: Vec<SocketAddr>,
    /// This host's VTEP address.
    pub(crate) vtep: IpAddr,
    /// UDP port of VXLAN.
    pub(crate) port: u16,
    /// On a manager, the TCP port of control; 0: the same number. It stays when the UDP port changes.
    #[serde(default)]
    pub(crate) control_port: u16,
    /// MTU of the underlay link in bytes.
    pub(crate) link_mtu: u16,
    /// On a manager: the address pools that `init` was given.
    #[serde(default)]
    pub(crate) pools: Vec<AddressPool>,
}

impl Membership {
    /// Where the manager of this host listens, if there is one.
    pub(crate) fn control_address(&self) -> SocketAddr {
        let port = match self.control_port {
            0 => self.port,
            port => port,
        };
        SocketAddr::new(self.vtep, port)
    }
}

/// One container's place in one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct EndpointRecord {
    /// The container's name; also that of its namespace.
    pub(crate) container: String,
    /// The datapath's port.
    pub(crate) port: u32,
    /// The network.
    pub(crate) vni: Vni,
    /// The MAC address.
    pub(crate) mac: MacAddr,
    /// The addresses, one per subnet.
    pub(crate) ips: Vec<IpAddr>,
    /// The allocation.
    pub(crate) epoch: Epoch,
    /// The interface inside the container.
    pub(crate) ifname: String,
    /// Its MTU in bytes.
    pub(crate) mtu: u16,
    /// How the port is served; fixed at attach.
    pub(crate) backend: Backend,
    /// Which service it is a member of, as the manager was last told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) member: Option<control::service::Membership>,
    /// What its container is called there, as the manager was last told.
    #[serde(
        default,
        with = "control::names::shared",
        skip_serializing_if = "Option::is_none"
    )]
    pub(crate) names: Option<Arc<control::Names>>,
    /// In static mode: the namespace of somebody else that the port is in; none: a container of `towline run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) netns: Option<String>,
    /// How far it has come.
    #[serde(default, skip_serializing_if = "Standing::is_whole")]
    pub(crate) standing: Standing,
}

/// How far an endpoint has come that is made or taken away while its container runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Standing {
    /// All of it stands, or stands and falls with its container.
    #[default]
    Whole,
    /// It is being made: an agent that finds it so takes it away again.
    Coming,
    /// It is being taken away: an agent that finds it so goes on with that.
    Going,
}

impl Standing {
    /// Whether all of it stands.
    pub(crate) fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

impl EndpointRecord {
    /// The endpoint as the manager knows it.
    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint {
            vni: self.vni,
            container: self.container.clone(),
            mac: self.mac,
            ips: self.ips.clone(),
            epoch: self.epoch,
            member: self.member,
            names: self.names.clone(),
        }
    }
}

impl State {
    /// The record of a new endpoint, under a port that nobody has. It is not among [`Self::endpoints`] yet.
    pub(crate) fn new_endpoint(
        &mut self,
        endpoint: Endpoint,
        ifname: String,
        mtu: u16,
        backend: Backend,
    ) -> EndpointRecord {
        let port = self.next_port;
        self.next_port = port.wrapping_add(1);
        EndpointRecord {
            container: endpoint.container,
            port,
            vni: endpoint.vni,
            mac: endpoint.mac,
            ips: endpoint.ips,
            epoch: endpoint.epoch,
            ifname,
            mtu,
            backend,
            member: endpoint.member,
            names: endpoint.names,
            netns: None,
            standing: Standing::Whole,
        }
    }

    /// A container has this port no more by its service.
    pub(crate) fn forget_port(&mut self, container: &str, port: &Publish) {
        if let Some(known) = self.service_ports.get_mut(container) {
            known.retain(|known| known.port != *port);
        }
        self.service_ports.retain(|_, ports| !ports.is_empty());
        let records = self.attachments.iter_mut();
        for record in records.filter(|record| record.container == container) {
            record.publish.retain(|known| known != port);
        }
        if let Some(closed) = self.closed_ports.get_mut(container) {
            closed.retain(|known| known != port);
        }
        self.closed_ports.retain(|_, ports| !ports.is_empty());
    }

    /// A container's places in networks, as far as they stand.
    pub(crate) fn places(&self, container: &str) -> impl Iterator<Item = &EndpointRecord> {
        let own = move |record: &&EndpointRecord| record.container == container;
        let records = self.endpoints.iter().filter(own);
        records.filter(|record| record.standing.is_whole())
    }
}

/// A port of this host that a container has by its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct ServicePort {
    /// As the service asks for it.
    pub(crate) asked: Publish,
    /// As the container has it: with a number, where the service asks for any.
    pub(crate) port: Publish,
}

/// One container's place on the gateway bridge.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct AttachmentRecord {
    /// The container's name.
    pub(crate) container: String,
    /// The interface inside the container.
    pub(crate) ifname: String,
    /// The interface on the host.
    pub(crate) host_ifname: String,
    /// The addresses.
    pub(crate) addresses: (Ipv4Addr, Ipv6Addr),
    /// Ports of this host that are its own, as `run --publish` asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) publish: Vec<Publish>,
    /// Whether the container was started without a network: it keeps this place whatever networks come and go.
    #[serde(default)]
    pub(crate) own: bool,
}

/// The state in memory and on disk; both change together.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    state: Mutex<State>,
}

impl StateFile {
    /// Reads the state below `dir`, or makes a new one; counts the incarnation up.
    ///
    /// # Errors
    /// When the folder cannot be made or the file cannot be read, parsed or written.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        make_dir(dir)?;
        let path = dir.join(FILE);
        let mut state = match fs::read(&path) {
            Ok(bytes) => parse(&bytes, &path)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => State {
                version: VERSION,
                host: HostId::random(),
                incarnation: 0,
                membership: None,
                next_port: 1,
                networks: Vec::new(),
                endpoints: Vec::new(),
                attachments: Vec::new(),
                closed_ports: BTreeMap::new(),
                service_ports: BTreeMap::new(),
                neighbor_limits: BTreeMap::new(),
                mount_points: Vec::new(),
            },
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        state.version = VERSION;
        state.incarnation += 1;
        write(&path, &state)?;
        Ok(Self {
            path,
            state: Mutex::new(state),
        })
    }

    /// What `look` finds in the state.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the state; it is on disk when this returns, or unchanged after an error.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> anyhow::Result<T> {
        let mut state = self.lock();
        let mut next = state.clone();
        let result = change(&mut next);
        write(&self.path, &next)?;
        *state = next;
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is replaced in one assignment, so a panic elsewhere cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(bytes: &[u8], path: &Path) -> anyhow::Result<State> {
    /// What every version of the file has.
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(default)]
        version: u32,
    }
    let unknown = || {
        format!(
            "cannot understand {}; put a good copy back or move it away",
            path.display()
        )
    };
    let Versioned { version } = serde_json::from_slice(bytes).with_context(unknown)?;
    if version > VERSION {
        bail!(
            "{} was written by a newer towline (its version is {version}, this one knows up to {VERSION}): \
             install that one again, or 'towline leave' with it first",
            path.display()
        );
    }
    serde_json::from_slice(bytes).with_context(unknown)
}

/// Makes a folder for root's eyes alone, with its parents.
pub(crate) fn make_dir(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the folder {}", dir.display()))
}

/// Replaces the file at `path` so that a crash leaves the old or the new one, whole.
///
/// # Errors
/// When the folder cannot be written.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The rename itself is on disk only when the folder is.
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    })();
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn write(path: &Path, state: &State) -> anyhow::Result<()> {
    replace(path, &serde_json::to_vec_pretty(state)?)
}

#[cfg(test)]
pub(super) mod tests {
    use control::NetworkSpec;
    use vtep::settings::WireSettings;

    use super::*;

    /// What is known of the container `c1` with a place in each of these networks: 1 leads outside, 2 is internal, 3 carries
    /// published ports. `attached`: it has a place on the gateway bridge, its own or not.
    pub(in crate::agent) fn state_with(
        places: &[(u32, Standing)],
        attached: Option<bool>,
    ) -> State {
        let vni = |number| Vni::new(number).expect("a VNI");
        let epoch = |counter| Epoch::new(1, counter);
        let network = |number| Network {
            id: format!("id{number}"),
            name: format!("net{number}"),
            vni: vni(number),
            subnets: Vec::new(),
            gateway_mac: control::allocator::gateway_mac(vni(number)),
            mtu: 1450,
            settings: WireSettings::default(),
            addressing: NetworkSpec::named("").addressing,
            ingress: number == 3,
            internal: number == 2,
            attachable: true,
            dns_ttl: control::dns_ttl(),
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
            created: 0,
            epoch: epoch(1),
        };
        let mut state = State {
            version: VERSION,
            host: HostId::from_bytes([1; 16]),
            incarnation: 1,
            membership: None,
            next_port: 1,
            networks: (1..=3).map(network).collect(),
            endpoints: Vec::new(),
            attachments: Vec::new(),
            closed_ports: BTreeMap::new(),
            service_ports: BTreeMap::new(),
            mount_points: Vec::new(),
            neighbor_limits: BTreeMap::new(),
        };
        for (counter, (number, standing)) in (2..).zip(places) {
            let endpoint = Endpoint {
                vni: vni(*number),
                container: "c1".to_owned(),
                mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
                ips: Vec::new(),
                epoch: epoch(counter),
                member: None,
                names: None,
            };
            let record = state.new_endpoint(endpoint, "eth0".to_owned(), 1450, Backend::Plain);
            state.endpoints.push(EndpointRecord {
                standing: *standing,
                ..record
            });
        }
        state
            .attachments
            .extend(attached.map(|own| AttachmentRecord {
                container: "c1".to_owned(),
                ifname: "eth1".to_owned(),
                host_ifname: "tl1".to_owned(),
                addresses: (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
                publish: Vec::new(),
                own,
            }));
        state
    }

    #[test]
    fn state_survives_and_the_incarnation_counts_up() {
        let dir = tempfile::tempdir().expect("tempdir");
        let dir = dir.path().join("deep/state");
        let first = StateFile::open(&dir).expect("open");
        first.update(|state| state.next_port = 7).expect("update");
        let host = first.read(|state| state.host);
        let again = StateFile::open(&dir).expect("open again");
        assert_eq!(again.read(|state| (state.host, state.next_port)), (host, 7));
        assert_eq!(
            again.read(|state| state.incarnation),
            first.read(|state| state.incarnation) + 1
        );
    }

    #[test]
    fn a_torn_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join(FILE), b"{\"host\":").expect("write");
        let error = format!("{:#}", StateFile::open(dir.path()).expect_err("torn"));
        assert!(error.contains("agent.json"), "{error}");
        assert_eq!(
            fs::read(dir.path().join(FILE)).expect("read"),
            b"{\"host\":"
        );
    }

    #[test]
    fn a_newer_agents_file_is_left_alone_and_an_older_ones_taken() {
        let dir = tempfile::tempdir().expect("tempdir");
        drop(StateFile::open(dir.path()).expect("open"));
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path).expect("read");
        let with = |version: &str| text.replace("\"version\": 1,", version);
        fs::write(&path, with("")).expect("write");
        let old = StateFile::open(dir.path()).expect("from before there were versions");
        assert_eq!(old.read(|state| state.version), VERSION);
        let newer = with("\"version\": 2, \"new\": 1,");
        fs::write(&path, &newer).expect("write");
        let error = format!("{:#}", StateFile::open(dir.path()).expect_err("newer"));
        assert!(error.contains("newer towline"), "{error}");
        assert_eq!(fs::read_to_string(&path).expect("read"), newer);
    }

    #[test]
    fn a_failed_write_changes_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = StateFile::open(dir.path()).expect("open");
        fs::remove_dir_all(dir.path()).expect("remove");
        assert!(file.update(|state| state.next_port = 9).is_err());
        assert_eq!(file.read(|state| state.next_port), 1);
    }
}
