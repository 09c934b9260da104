//! A lab's folder: NAME below root's /run/towline-lab, or below a folder of the user's own, with `lab.json` and a folder
//! for each host.
//!
//! It is a memory aid: `lab down` works without it, by the names of namespaces.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use netns::Netns;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::limits;
use crate::name::{Kind, LabName, Role};
use crate::process::Process;
use crate::topology::{Underlay, Wire};
use crate::vm::Shape;

/// Where all of root's labs' folders are.
const ROOT: &str = "/run/towline-lab";

/// Where all labs' folders of the caller are. Only root has labs with namespaces; who is not root may have virtual machines.
pub(crate) fn root() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from(ROOT);
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => Path::new(&folder).join("towline-lab"),
        None => {
            let user = rustix::process::geteuid().as_raw();
            std::env::temp_dir().join(format!("towline-lab-{user}"))
        }
    }
}

/// What was asked for at `lab up`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) hosts: u16,
    pub(crate) containers: u16,
    pub(crate) subnet: ipnet::IpNet,
    pub(crate) wire: Wire,
    pub(crate) underlay: Underlay,
    /// How many of the hosts, the last ones, are virtual machines.
    #[serde(default)]
    pub(crate) vms: u16,
    /// What these have in common.
    #[serde(default)]
    pub(crate) machines: Option<Shape>,
}

impl Settings {
    /// Whether this host, counted from 1, is a virtual machine.
    pub(crate) const fn is_machine(&self, host: u16) -> bool {
        host > self.hosts - self.vms && host <= self.hosts
    }

    /// Whether all hosts are virtual machines, and nothing of the lab is in a namespace.
    pub(crate) const fn only_machines(&self) -> bool {
        self.vms == self.hosts
    }
}

/// What is known of a lab that stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    #[serde(flatten)]
    pub(crate) settings: Settings,
    /// Whether `lab up` came to its end.
    pub(crate) complete: bool,
    /// The agents, in the order of their hosts.
    pub(crate) agents: Vec<Process>,
}

/// A lab's folder.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    lab: LabName,
    path: PathBuf,
}

impl Folder {
    pub(crate) fn of(lab: &LabName) -> Self {
        Self {
            lab: lab.clone(),
            path: root().join(lab.to_string()),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder, for root alone.
    pub(crate) fn create(&self) -> anyhow::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .with_context(|| format!("can't make the folder {}", self.path.display()))?;
        // In a folder that all users share, somebody else may have made it first.
        let root = self.path.parent().context("a lab's folder is in another")?;
        let found = fs::symlink_metadata(root)
            .with_context(|| format!("can't look at {}", root.display()))?;
        let own = found.uid() == rustix::process::geteuid().as_raw();
        if !found.is_dir() || !own || found.mode() & 0o022 != 0 {
            bail!(
                "{} is not a folder that only you can write to: remove it, or set XDG_RUNTIME_DIR",
                root.display()
            );
        }
        Ok(())
    }

    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        fs::read_dir(&self.path).map_or(true, |mut entries| entries.next().is_none())
    }

    /// Takes back [`Self::create`] of a folder that nothing was put into.
    pub(crate) fn remove_empty(&self) {
        // Refused by the kernel when there is something in it, which then is to stay.
        if fs::remove_dir(&self.path).is_ok() {
            let _ = fs::remove_dir(root());
        }
    }

    /// The folder of one host's agent; made if it isn't there.
    pub(crate) fn host(&self, kind: Kind, host: u16) -> anyhow::Result<PathBuf> {
        let path = self.host_path(kind, host);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("can't make the folder {}", path.display()))?;
        Ok(path)
    }

    /// Where that folder is.
    pub(crate) fn host_path(&self, kind: Kind, host: u16) -> PathBuf {
        let name = self.lab.of(Role::Node(kind, host));
        self.path.join(name.rsplit('-').next().unwrap_or(&name))
    }

    /// Where the agent of this host listens.
    pub(crate) fn socket(&self, kind: Kind, host: u16) -> PathBuf {
        self.host_path(kind, host).join("agent.sock")
    }

    /// Takes the lab for one command that changes or loads it; let go when the process ends, however it does.
    pub(crate) fn lock(&self) -> anyhow::Result<File> {
        let folder = File::open(&self.path)
            .with_context(|| format!("can't open {}", self.path.display()))?;
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(folder),
            Err(rustix::io::Errno::WOULDBLOCK) => bail!(
                "another 'towline lab' is at work on lab '{}': wait for it or end it, then try again",
                self.lab
            ),
            Err(error) => Err(error).with_context(|| format!("can't lock {}", self.path.display())),
        }
    }

    /// What is written down, if anything readable is.
    pub(crate) fn read(&self) -> Option<State> {
        serde_json::from_slice(&fs::read(self.path.join("lab.json")).ok()?).ok()
    }

    /// What is written down of a lab that is up.
    pub(crate) fn open(&self) -> anyhow::Result<State> {
        match self.read() {
            Some(state) if state.complete => Ok(state),
            _ if self.is_half_made() => bail!("{}", self.half_made()),
            _ => bail!(
                "there is no lab '{0}': 'towline lab up --name {0}' makes it{1}",
                self.lab,
                others()
                    .map(|names| format!("; up now: {names}"))
                    .unwrap_or_default()
            ),
        }
    }

    /// Whether there is something in it, but no lab that `lab up` has made to its end.
    pub(crate) fn is_half_made(&self) -> bool {
        let complete = match fs::read(self.path.join("lab.json")) {
            // What can't be read may be a lab that stands.
            Ok(text) => serde_json::from_slice::<State>(&text).map_or(true, |state| state.complete),
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        };
        !complete && !self.is_empty()
    }

    /// Why it is half made: somebody is at it, or was killed.
    fn half_made(&self) -> String {
        let lab = &self.lab;
        if self.lock().is_err() {
            return format!("lab '{lab}' is not complete: another 'towline lab' is at work on it");
        }
        format!(
            "lab '{lab}' is not complete, since what made it was killed: 'towline lab up --name {lab}' begins again, \
             'towline lab down --name {lab}' takes away what there is of it"
        )
    }

    /// Writes it down; a reader sees the old or the new, never half.
    pub(crate) fn write(&self, state: &State) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(state).context("a lab's state is plain data")?;
        let new = self.path.join("lab.json.new");
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, self.path.join("lab.json")))
            .with_context(|| format!("can't write {}", self.path.join("lab.json").display()))
    }

    /// Containers that the lab's agents have written down, whatever they are called: names, and their agents' sockets.
    ///
    /// A namespace that has the name of a container but is not the one the agent made is somebody else's.
    pub(crate) fn containers(&self) -> Vec<(String, PathBuf)> {
        let mut found = Vec::new();
        for host in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let socket = host.path().join("agent.sock");
            let folder = host.path().join("state").join("containers");
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let spec = fs::read(entry.path().join("spec.json")).unwrap_or_default();
                let made = noted_namespace(&spec);
                if made.is_some() && Netns::open(&name).ok().map(|netns| netns.id()) == made {
                    found.push((name, socket.clone()));
                }
            }
        }
        found
    }

    /// Removes the folder of one host's agent.
    pub(crate) fn remove_host(&self, kind: Kind, host: u16) -> anyhow::Result<()> {
        let path = self.host_path(kind, host);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("can't remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Removes the folder, and the folder of all labs with the last of them. Whether there was anything.
    pub(crate) fn remove(&self) -> anyhow::Result<bool> {
        let there = match fs::remove_dir_all(&self.path) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => {
                return Err(error).with_context(|| format!("can't remove {}", self.path.display()));
            }
        };
        if others().is_none() {
            limits::restore(&root())?;
            // Not empty when a lab came up just now.
            let _ = fs::remove_dir(root());
        }
        Ok(there)
    }
}

/// Device and inode of the namespace that an agent has noted of a container.
fn noted_namespace(spec: &[u8]) -> Option<(u64, u64)> {
    #[derive(Deserialize)]
    struct Spec {
        netns: Option<(u64, u64)>,
    }
    serde_json::from_slice::<Spec>(spec).ok()?.netns
}

/// The labs that have a folder, separated by commas.
fn others() -> Option<String> {
    let entries = fs::read_dir(root()).ok()?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    if names.is_empty() {
        None
    } else {
        Some(names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &tempfile::TempDir) -> Folder {
        Folder {
            lab: "t".parse().unwrap(),
            path: dir.path().join("t"),
        }
    }

    #[test]
    fn state_round_trips_and_half_made_labs_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(&dir);
        assert!(
            folder
                .open()
                .unwrap_err()
                .to_string()
                .contains("there is no lab 't'")
        );
        folder.create().unwrap();
        let settings = Settings {
            hosts: 3,
            containers: 2,
            subnet: "10.0.9.0/24".parse().unwrap(),
            wire: Wire::Mtu,
            underlay: Underlay::V6,
            vms: 0,
            machines: None,
        };
        let mut state = State {
            settings: settings.clone(),
            complete: false,
            agents: vec![Process { pid: 7, start: 8 }],
        };
        folder.write(&state).unwrap();
        assert!(
            folder
                .open()
                .unwrap_err()
                .to_string()
                .contains("was killed")
        );
        assert!(folder.is_half_made());
        let lock = folder.lock().unwrap();
        let error = folder.open().unwrap_err().to_string();
        assert!(error.contains("at work on it"), "{error}");
        drop(lock);
        state.complete = true;
        folder.write(&state).unwrap();
        assert!(!folder.is_half_made());
        let read = folder.open().unwrap();
        assert_eq!(read.settings, settings);
        assert_eq!(read.agents, state.agents);
        fs::write(folder.path.join("lab.json"), "{ torn").unwrap();
        assert!(folder.read().is_none() && !folder.is_half_made());
        // Killed before it had written anything down.
        fs::remove_file(folder.path.join("lab.json")).unwrap();
        assert!(!folder.is_half_made());
        folder.host(Kind::Host, 1).unwrap();
        let error = folder.open().unwrap_err().to_string();
        assert!(error.contains("was killed"), "{error}");
    }

    #[test]
    fn a_namespace_is_the_labs_only_as_noted() {
        assert_eq!(
            noted_namespace(br#"{"name":"x","netns":[4,4026532]}"#),
            Some((4, 4_026_532))
        );
        for other in [&br#"{"netns":null}"#[..], b"{}", b"", b"{ torn"] {
            assert_eq!(noted_namespace(other), None);
        }
        // Named like a namespace of nobody: an ended container's.
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(&dir);
        let container = folder.path.join("h1/state/containers/no-such-namespace");
        fs::create_dir_all(&container).unwrap();
        fs::write(container.join("spec.json"), r#"{"netns":[4,1]}"#).unwrap();
        assert!(folder.containers().is_empty());
    }

    #[test]
    fn one_command_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(&dir);
        folder.create().unwrap();
        let first = folder.lock().unwrap();
        assert!(
            folder
                .lock()
                .unwrap_err()
                .to_string()
                .contains("another 'towline lab'")
        );
        drop(first);
        folder.lock().unwrap();
    }

    #[test]
    fn sockets_have_room_in_an_address() {
        let lab: LabName = "x".repeat(32).parse().unwrap();
        let socket = Folder::of(&lab).socket(Kind::Host, 200);
        assert!(socket.as_os_str().len() < 108, "{}", socket.display());
    }
}
