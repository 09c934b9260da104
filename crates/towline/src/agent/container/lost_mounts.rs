//! Mounts of containers that run, kept where they were put, whatever is done to this host's files below them.
//!
//! ```text
//! rename over /etc/resolv.conf ──inotify──▶ who has a mount there? ──▶ shim::mount::put_back
//!                                           every five seconds, and at a start ──▲
//! ```
//!
//! Looked at are the folders that targets are in, and those that symbolic links at their ends lead to. What is not seen so, such as a
//! folder on the way that is replaced, is found a few seconds later.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use super::{Agent, Phase, held};
use crate::shim::folder::Spec;
use crate::shim::mount::{self, Mount};
use crate::shim::process::ProcessId;

/// Symbolic links that are followed, one after the other: as many as the kernel follows.
const LINKS: usize = 40;

/// What is known of containers' mounts.
#[derive(Debug)]
pub(super) struct Places {
    /// None: this host has no more of them. All is found by looking then.
    inotify: Option<OwnedFd>,
    watched: Mutex<HashMap<String, HashSet<Entry>>>,
    /// What was last said of mounts that can't be put back, by container.
    said: Mutex<HashMap<String, String>>,
}

/// An entry of a folder that is watched.
type Entry = (i32, OsString);

impl Places {
    pub(super) fn new() -> Self {
        let inotify = inotify::init(CreateFlags::CLOEXEC);
        if let Err(error) = &inotify {
            tracing::info!(
                "replaced files of this host are noticed a few seconds late: {error}; \
                 fs.inotify.max_user_instances allows more"
            );
        }
        Self {
            inotify: inotify.ok(),
            watched: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// A container's mounts stand on these entries from now on.
    fn watch(&self, container: &str, mounts: &[Mount]) {
        let Some(inotify) = &self.inotify else { return };
        let mut watched = held(&self.watched);
        let mut entries = HashSet::new();
        for (folder, name) in mounts.iter().flat_map(|mount| entries_of(&mount.target)) {
            let changes = WatchFlags::CREATE
                | WatchFlags::DELETE
                | WatchFlags::MOVED_FROM
                | WatchFlags::MOVED_TO
                | WatchFlags::ONLYDIR;
            // One that is watched already has its number. A folder that is gone, or no more of them: found by looking.
            if let Ok(number) = inotify::add_watch(inotify, &folder, changes) {
                entries.insert((number, name));
            }
        }
        let before = watched.insert(container.to_owned(), entries);
        close_unused(inotify, &watched, before);
    }

    fn forget(&self, container: &str) {
        held(&self.said).remove(container);
        let mut watched = held(&self.watched);
        let before = watched.remove(container);
        if let Some(inotify) = &self.inotify {
            close_unused(inotify, &watched, before);
        }
    }

    /// Containers with a mount on this entry.
    fn standing_on(&self, entry: &Entry) -> Vec<String> {
        let watched = held(&self.watched);
        let on = watched
            .iter()
            .filter(|(_, entries)| entries.contains(entry));
        on.map(|(container, _)| container.clone()).collect()
    }

    /// Waits until entries of folders change; the containers with a mount there. Nothing when this is not to be had.
    fn changed(&self) -> Option<io::Result<HashSet<String>>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.inotify.as_ref()?, &mut buffer);
        let mut containers = HashSet::new();
        loop {
            match reader.next() {
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Some(Err(error.into())),
                // More than could be kept: anything may have changed.
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    containers.extend(held(&self.watched).keys().cloned());
                }
                Ok(event) => {
                    let name = event.file_name().map(std::ffi::CStr::to_bytes);
                    let name = OsStr::from_bytes(name.unwrap_or_default());
                    containers.extend(self.standing_on(&(event.wd(), name.to_owned())));
                }
            }
            // What was read at once is looked at to its end.
            if reader.is_buffer_empty() {
                return Some(Ok(containers));
            }
        }
    }
}

/// Ends the watches of folders in which nobody has a mount any more.
fn close_unused(
    inotify: &OwnedFd,
    watched: &HashMap<String, HashSet<Entry>>,
    before: Option<HashSet<Entry>>,
) {
    let numbers: HashSet<i32> = before
        .into_iter()
        .flatten()
        .map(|(number, _)| number)
        .collect();
    for number in numbers {
        let used = |(other, _): &Entry| *other == number;
        if !watched.values().flatten().any(used) {
            // The kernel has ended it where the folder is gone.
            let _ = inotify::remove_watch(inotify, number);
        }
    }
}

/// The entry that a path ends in, with the folder that it is in; where it is a symbolic link, also that which it leads to.
fn entries_of(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut entries = Vec::new();
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            break;
        };
        entries.push((folder.to_owned(), name.to_owned()));
        let Ok(target) = fs::read_link(&path) else {
            break;
        };
        path = folder.join(target);
    }
    entries
}

/// Learns of changes below mounts, from now on.
pub(super) fn start(agent: &Arc<Agent>) {
    let watching = Arc::clone(agent);
    let watch = move || {
        while let Some(changed) = watching.containers.lost_mounts.changed() {
            match changed {
                Ok(names) => {
                    for name in names {
                        if let Err(error) = look_again(&watching, &name) {
                            tracing::warn!("container {name}: {error:#}");
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!("replaced files of this host are noticed late: {error}");
                    return;
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("mounts".into())
        .spawn(watch)
    {
        tracing::warn!("can't start a thread, replaced files are noticed late: {error}");
    }
}

/// Puts back what a container has lost, and learns of changes from now on. The caller holds its lock; `command` is its first
/// process.
pub(super) fn look(agent: &Agent, spec: &Spec, command: &ProcessId) {
    let places = &agent.containers.lost_mounts;
    if spec.mounts.is_empty() {
        return;
    }
    // Before the look, so that nothing is lost between them.
    places.watch(&spec.name, &spec.mounts);
    let put_back = mount::put_back(command, &spec.mounts);
    let mut said = held(&places.said);
    match put_back {
        Ok(back) => {
            said.remove(&spec.name);
            for target in back {
                tracing::info!(
                    "container {}: {} is mounted again, it was replaced on this host",
                    spec.name,
                    target.display()
                );
            }
        }
        Err(error) => {
            // Said once, not every few seconds.
            let problem = format!("{error:#}");
            if said.get(&spec.name) != Some(&problem) {
                tracing::warn!("container {}: {problem}", spec.name);
                said.insert(spec.name.clone(), problem);
            }
        }
    }
}

fn look_again(agent: &Agent, name: &str) -> anyhow::Result<()> {
    let folder = agent.containers.folder(name)?;
    let lock = agent.containers.lock(name);
    let _held = held(&lock);
    let spec = folder.spec()?.filter(|spec| spec.phase == Phase::Ready);
    let command = folder.running()?.and_then(|running| running.command);
    if let (Some(spec), Some(command)) = (spec, command) {
        look(agent, &spec, &command);
    }
    Ok(())
}

/// A container ends.
pub(super) fn forget(agent: &Agent, name: &str) {
    agent.containers.lost_mounts.forget(name);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::mount::Source;

    fn at(target: PathBuf) -> Mount {
        Mount {
            source: Source::Bind("/".into()),
            target,
            readonly: false,
        }
    }

    #[test]
    fn what_is_replaced_is_told_to_who_has_a_mount_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let at_name = |name: &str| folder.path().join(name);
        fs::create_dir(at_name("run")).expect("a folder");
        for file in ["file", "run/stub", "other", "new"] {
            fs::write(at_name(file), b"x").expect("a file");
        }
        std::os::unix::fs::symlink("run/stub", at_name("link")).expect("a link");
        let places = Places::new();
        places.watch("a", &[at(at_name("file")), at(at_name("link"))]);
        places.watch("b", &[at(at_name("link"))]);
        let told = || {
            let told = places.changed().expect("inotify").expect("readable");
            let mut told: Vec<String> = told.into_iter().collect();
            told.sort();
            told
        };
        fs::rename(at_name("new"), at_name("file")).expect("replaced");
        assert_eq!(told(), ["a"]);
        fs::remove_file(at_name("run/stub")).expect("removed");
        assert_eq!(told(), ["a", "b"]);
        places.forget("a");
        fs::remove_file(at_name("other")).expect("removed");
        fs::remove_file(at_name("link")).expect("removed");
        assert_eq!(told(), ["b"]);
        // Nobody is told of what nobody has.
        places.forget("b");
        assert!(held(&places.watched).is_empty());
    }

    #[test]
    fn links_are_followed_to_their_end_and_not_in_a_circle() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("round", at("about")).expect("a link");
        std::os::unix::fs::symlink("about", at("round")).expect("a link");
        std::os::unix::fs::symlink("/nowhere/at/all", at("out")).expect("a link");
        assert_eq!(entries_of(&at("round")).len(), LINKS);
        let names: Vec<_> = entries_of(&at("out"))
            .into_iter()
            .map(|(folder, name)| folder.join(name))
            .collect();
        assert_eq!(names, [at("out"), "/nowhere/at/all".into()]);
        assert!(entries_of(Path::new("/")).is_empty());
    }
}
