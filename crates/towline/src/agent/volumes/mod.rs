//! Volumes: folders of this host that outlive the containers that use them.
//!
//! ```text
//! <state-dir>/volumes/NAME/
//!     volume.json   when it was made, its labels
//!     _data/        what containers see
//!     copying/      what is copied for it from a container's target; not whole
//!     copied/       the same, whole, on its way into _data
//! <state-dir>/volumes/~NAME/    was removed
//! ```
//!
//! A volume is there when its `volume.json` is. Who uses one stands in the containers' own folders, written before the
//! volume is made; a volume is removed under the same lock under which it is made, after a look at them. Filling has a lock
//! of its own: whoever makes a container that finds the volume there must not wait for it with all others behind.

mod copy;
mod fill;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::locks::Locks;
use super::state::make_dir;
use super::{Agent, container};
use crate::api::mount::check_name;
use crate::api::volume::{Request, Response, User, Volume};
use crate::shim::folder::{Spec, now};
use crate::shim::mount::Source;

const FILE: &str = "volume.json";
const DATA: &str = "_data";
/// No volume's name begins so.
const REMOVED: char = '~';
/// Most labels of one volume, and the most bytes of a label's key and value together.
const MAX_LABELS: usize = 64;
const MAX_LABEL: usize = 1024;

/// The volumes of this host.
#[derive(Debug)]
pub(crate) struct Volumes {
    dir: PathBuf,
    /// One at a time makes or removes a volume.
    locks: Locks,
    /// One at a time fills it, which may take long. Who removes it waits for that; of both locks this is the inner.
    filling: Locks,
}

/// What is kept of a volume beside its content.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Seconds since 1970.
    created: u64,
    labels: BTreeMap<String, String>,
    anonymous: bool,
}

impl Volumes {
    /// The volumes below `dir`. What an agent that was killed has left half done is finished or taken away.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub(crate) fn new(dir: PathBuf) -> anyhow::Result<Self> {
        make_dir(&dir)?;
        let volumes = Self {
            dir,
            locks: Locks::default(),
            filling: Locks::default(),
        };
        for name in volumes.folders()? {
            let folder = volumes.dir.join(&name);
            let done = if name.starts_with(REMOVED) {
                fs::remove_dir_all(&folder).map_err(Into::into)
            } else {
                fill::resume(&folder)
            };
            if let Err(error) = done {
                tracing::warn!("{} is left as it is: {error:#}", folder.display());
            }
        }
        Ok(volumes)
    }

    /// Makes a volume unless there is one.
    ///
    /// # Errors
    /// When its folder can't be made.
    fn make(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        anonymous: bool,
    ) -> anyhow::Result<()> {
        check_name(name)?;
        let lock = self.locks.of(name);
        let _held = container::held(&lock);
        let folder = self.dir.join(name);
        if self.record(name)?.is_some() {
            return Ok(());
        }
        let record = Record {
            created: now(),
            labels: labels.clone(),
            anonymous,
        };
        make_data(&folder)
            .and_then(|()| write_record(&folder, &record))
            .with_context(|| format!("can't make the volume {name} in {}", folder.display()))
    }

    /// Makes a container's volumes.
    ///
    /// # Errors
    /// Names the one that can't be made.
    pub(crate) fn make_all(&self, spec: &Spec) -> anyhow::Result<()> {
        for mount in &spec.mounts {
            if let Source::Volume {
                name,
                anonymous,
                labels,
                ..
            } = &mount.source
            {
                self.make(name, labels, *anonymous)?;
            }
        }
        Ok(())
    }

    /// Fills a container's volumes that are empty from its targets, while `wanted` says that somebody still waits for it.
    ///
    /// # Errors
    /// Names the volume, and what could not be copied; it is empty then.
    pub(crate) fn fill_all(&self, spec: &Spec, wanted: &dyn Fn() -> bool) -> anyhow::Result<()> {
        for mount in &spec.mounts {
            if let Source::Volume {
                name,
                nocopy: false,
                ..
            } = &mount.source
            {
                let lock = self.filling.of(name);
                let _held = container::held(&lock);
                let folder = self.dir.join(name);
                fill::fill(&folder, &mount.target, &self.dir, wanted).with_context(|| {
                    let target = mount.target.display();
                    format!("can't fill the volume {name} from {target}")
                })?;
            }
        }
        Ok(())
    }

    /// Where the content of the volume `name` is, whether it exists or not.
    pub(crate) fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name).join(DATA)
    }

    /// Takes a volume away that no container has any more: at once for those who look, then from the disk.
    fn remove(&self, name: &str) -> anyhow::Result<()> {
        // Who fills it for a container that was removed gives up soon.
        let lock = self.filling.of(name);
        let _held = container::held(&lock);
        let folder = self.dir.join(name);
        let failed = || format!("can't remove the volume {name}");
        if let Some(place) = container::mounted()?
            .into_iter()
            .find(|place| place.starts_with(&folder))
        {
            bail!(
                "remove {name}: something is mounted at {}: unmount it first, or its content goes too",
                place.display()
            );
        }
        let removed = self.dir.join(format!("{REMOVED}{name}"));
        match fs::rename(&folder, &removed) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other.and_then(|()| sync(&self.dir)).with_context(failed)?,
        }
        fs::remove_dir_all(&removed).with_context(failed)
    }

    fn record(&self, name: &str) -> anyhow::Result<Option<Record>> {
        let path = self.dir.join(name).join(FILE);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("can't read {}", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
        }
    }

    fn folders(&self) -> anyhow::Result<Vec<String>> {
        let unreadable = || format!("can't read the folder {}", self.dir.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).with_context(unreadable)? {
            let name = entry.with_context(unreadable)?.file_name();
            names.extend(name.into_string().ok());
        }
        names.sort();
        Ok(names)
    }
}

/// Answers a client.
///
/// # Errors
/// One line for the person who asked.
pub(crate) fn handle(agent: &Arc<Agent>, request: Request) -> anyhow::Result<Response> {
    Ok(match request {
        Request::Create { name, labels } => Response::Created(create(agent, name, &labels)?),
        Request::List => Response::List(list(agent)?),
        Request::Remove { name, force } => Response::Removed(remove(agent, &name, force)?),
    })
}

fn create(
    agent: &Agent,
    name: Option<String>,
    labels: &BTreeMap<String, String>,
) -> anyhow::Result<String> {
    check_labels(labels)?;
    let anonymous = name.is_none();
    let name = match name {
        Some(name) => name,
        None => random_name()?,
    };
    agent.volumes.make(&name, labels, anonymous)?;
    Ok(name)
}

/// Refuses labels that would take more than a volume is worth.
pub(crate) fn check_labels(labels: &BTreeMap<String, String>) -> anyhow::Result<()> {
    if labels.len() > MAX_LABELS {
        bail!("a volume has at most {MAX_LABELS} labels");
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() + value.len() > MAX_LABEL {
            bail!("a label has a key, and at most {MAX_LABEL} bytes in all");
        }
    }
    Ok(())
}

fn list(agent: &Agent) -> anyhow::Result<Vec<Volume>> {
    let users = users(agent)?;
    let mut found = Vec::new();
    for name in agent.volumes.folders()? {
        match agent.volumes.record(&name) {
            Ok(Some(record)) if !name.starts_with(REMOVED) => found.push(Volume {
                driver: "local".to_owned(),
                scope: "local".to_owned(),
                mountpoint: agent.volumes.data(&name).display().to_string(),
                created: record.created,
                labels: record.labels,
                anonymous: record.anonymous,
                containers: users.get(&name).cloned().unwrap_or_default(),
                name,
            }),
            Ok(_) => {}
            Err(error) => tracing::warn!("the volume {name} is left alone: {error:#}"),
        }
    }
    Ok(found)
}

fn remove(agent: &Agent, name: &str, force: bool) -> anyhow::Result<bool> {
    check_name(name)?;
    let lock = agent.volumes.locks.of(name);
    let _held = container::held(&lock);
    if agent.volumes.record(name)?.is_none() {
        if force {
            return Ok(false);
        }
        bail!("get {name}: no such volume: 'towline volume ls' lists them");
    }
    if let Some(users) = users(agent)?.get(name) {
        let ids: Vec<&str> = users.iter().map(|user| user.id.as_str()).collect();
        bail!("remove {name}: volume is in use - [{}]", ids.join(", "));
    }
    agent.volumes.remove(name)?;
    Ok(true)
}

/// Removes a container's volumes that were made for it alone, but for one that another container has too.
///
/// # Errors
/// Names the one that can't be removed.
pub(crate) fn remove_anonymous(agent: &Agent, spec: &Spec) -> anyhow::Result<()> {
    for mount in &spec.mounts {
        if let Source::Volume {
            name,
            anonymous: true,
            ..
        } = &mount.source
        {
            let lock = agent.volumes.locks.of(name);
            let _held = container::held(&lock);
            let users = users(agent)?;
            let shared = users
                .get(name)
                .is_some_and(|users| users.iter().any(|user| user.id != spec.id));
            if !shared {
                agent.volumes.remove(name)?;
            }
        }
    }
    Ok(())
}

/// Which containers have which volume; ended ones too, as in Docker.
fn users(agent: &Agent) -> anyhow::Result<BTreeMap<String, Vec<User>>> {
    let mut users: BTreeMap<String, Vec<User>> = BTreeMap::new();
    for (_, spec) in agent.containers.all()? {
        for mount in &spec.mounts {
            if let Source::Volume { name, .. } = &mount.source {
                let of = users.entry(name.clone()).or_default();
                if of.iter().all(|user| user.id != spec.id) {
                    of.push(User {
                        id: spec.id.clone(),
                        name: spec.name.clone(),
                    });
                }
            }
        }
    }
    Ok(users)
}

/// A name for a volume that nobody named: 64 hexadecimal digits.
pub(crate) fn random_name() -> anyhow::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("can't make a volume's name")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn make_data(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let make = |path: &Path, mode| match fs::DirBuilder::new().mode(mode).create(path) {
        // Made by an agent that was killed before the record.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    make(folder, 0o700)?;
    make(&folder.join(DATA), 0o755)
}

fn write_record(folder: &Path, record: &Record) -> std::io::Result<()> {
    let temporary = folder.join(format!("{FILE}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(record)?)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(FILE))?;
    sync(folder)?;
    folder.parent().map_or(Ok(()), sync)
}

/// A rename is on the disk only when its folder is.
fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes(dir: &Path) -> Volumes {
        Volumes::new(dir.join("volumes")).expect("a folder")
    }

    #[test]
    fn a_volume_is_made_once_and_removed_whole() {
        let dir = tempfile::tempdir().expect("a folder");
        let some = volumes(dir.path());
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        some.make("data", &labels, false).expect("made");
        fs::write(some.data("data").join("file"), "x").expect("written");
        some.make("data", &BTreeMap::new(), true).expect("there");
        let record = some.record("data").expect("sound").expect("there");
        assert_eq!((record.labels, record.anonymous), (labels, false));
        some.remove("data").expect("removed");
        some.remove("data").expect("a second time is harmless");
        assert!(some.record("data").expect("sound").is_none());
        assert!(some.folders().expect("a folder").is_empty());
        assert!(some.make("../data", &BTreeMap::new(), false).is_err());
    }

    #[test]
    fn what_a_killed_agent_left_is_taken_away_or_finished() {
        let dir = tempfile::tempdir().expect("a folder");
        let some = volumes(dir.path());
        some.make("data", &BTreeMap::new(), false).expect("made");
        let at = |path: &str| dir.path().join("volumes").join(path);
        fs::create_dir_all(at("data/copying/sub")).expect("half a copy");
        fs::create_dir_all(at("~gone/_data/sub")).expect("half removed");
        // Killed before the record: not there, and made again all the same.
        fs::create_dir_all(at("half/_data")).expect("half made");
        let some = volumes(dir.path());
        assert!(!at("data/copying").exists() && !at("~gone").exists());
        assert!(some.record("half").expect("sound").is_none());
        some.make("half", &BTreeMap::new(), false).expect("made");
        assert!(some.record("half").expect("sound").is_some());

        fs::create_dir_all(at("data/copied/sub")).expect("a whole copy");
        fs::write(at("data/copied/kept"), "from the target").expect("written");
        fs::write(at("data/_data/kept"), "of the volume").expect("written");
        let _ = volumes(dir.path());
        assert!(at("data/_data/sub").is_dir() && !at("data/copied").exists());
        let kept = fs::read_to_string(at("data/_data/kept")).expect("there");
        assert_eq!(kept, "of the volume", "what is there is never replaced");
    }

    #[test]
    fn labels_are_bounded() {
        let label = |length| BTreeMap::from([("k".to_owned(), "v".repeat(length))]);
        assert!(check_labels(&label(MAX_LABEL - 1)).is_ok());
        assert!(check_labels(&label(MAX_LABEL)).is_err());
        assert!(check_labels(&BTreeMap::from([(String::new(), String::new())])).is_err());
        let many = (0..=MAX_LABELS).map(|n| (n.to_string(), String::new()));
        assert!(check_labels(&many.collect()).is_err());
    }
}
