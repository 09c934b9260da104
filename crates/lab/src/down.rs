//! `towline lab down`: everything of a lab goes, whatever there is of it.
//!
//! It goes by names, not by what was written down: namespaces of the lab's names, the processes in them, agents,
//! shims and virtual machines with paths in the lab's folder. So it works after a crash at any moment, and a second time.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use netns::Netns;

use crate::cpu;
use crate::name::{Kind, LabName, Role};
use crate::process::{self, Process};
use crate::state::Folder;
use crate::topology;

/// Takes the lab down. Whether there was anything of it.
pub(crate) fn run(lab: &LabName) -> anyhow::Result<bool> {
    let folder = Folder::of(lab);
    // A command that works on the lab would make anew what is taken away here.
    let _lock = if folder.path().exists() {
        Some(folder.lock()?)
    } else {
        None
    };
    take_down(lab, &folder)
}

/// What [`run`] does, for a command that holds the lab's lock itself.
pub(crate) fn take_down(lab: &LabName, folder: &Folder) -> anyhow::Result<bool> {
    let any = remove(lab, folder, |_| true)?;
    let groups = rustix::process::geteuid().is_root() && cpu::remove_groups(lab)?;
    Ok(folder.remove()? || groups || any)
}

/// Takes away only the hosts that the bench adds, of all kinds.
pub(crate) fn take_down_bench(lab: &LabName, folder: &Folder) -> anyhow::Result<()> {
    let added = |role| matches!(role, Role::Node(kind, _) | Role::Container(kind, ..) if kind != Kind::Host);
    remove(lab, folder, added)?;
    let added = [(Kind::Kernel, 2), (Kind::Plain, 2), (Kind::Peer, 8)];
    for (kind, count) in added {
        for host in 1..=count {
            topology::unplug_host(lab, kind, host)?;
            folder.remove_host(kind, host)?;
        }
    }
    Ok(())
}

fn remove(lab: &LabName, folder: &Folder, which: impl Fn(Role) -> bool) -> anyhow::Result<bool> {
    let whole = which(Role::Switch);
    let root = rustix::process::geteuid().is_root();
    let mut names = BTreeSet::new();
    let mut any = false;
    // Until nobody is left who could make a namespace or start a process after it was looked for.
    loop {
        // Who is not root has none, and those of the lab's name are root's.
        if root {
            let listed = Netns::list()?.into_iter();
            names.extend(listed.filter(|name| lab.role(name).is_some_and(&which)));
        }
        if whole {
            // Containers that a user has started on the lab's hosts, under names of their own.
            names.extend(folder.containers().into_iter().map(|(name, _)| name));
        }
        let found = processes(&names, whole.then_some(folder))?;
        if whole {
            names.extend(shims_namespaces(&found, folder.path())?);
        }
        if found.is_empty() {
            break;
        }
        any = true;
        process::kill_all(&found)?;
    }
    any |= !names.is_empty();
    for name in names {
        Netns::delete(&name)?;
    }
    Ok(any)
}

/// Processes in these namespaces, and the agents, shims and virtual machines of the lab's folder.
fn processes(
    names: &BTreeSet<String>,
    folder: Option<&Folder>,
) -> anyhow::Result<HashSet<Process>> {
    let ids: HashSet<(u64, u64)> = names
        .iter()
        .filter_map(|name| Netns::open(name).ok())
        .map(|netns| netns.id())
        .collect();
    let own = std::process::id();
    Ok(process::all()?
        .into_iter()
        .filter(|process| process.pid != own && process.alive())
        .filter(|process| {
            process.netns().is_some_and(|id| ids.contains(&id))
                || folder.is_some_and(|folder| process.belongs_to(folder.path()))
        })
        .collect())
}

/// Names of the namespaces that shims of the lab stand in. A shim's namespace is its container's, and nobody else's.
fn shims_namespaces(processes: &HashSet<Process>, folder: &Path) -> anyhow::Result<Vec<String>> {
    let root = Netns::current()?.id();
    let ids: HashSet<(u64, u64)> = processes
        .iter()
        .filter(|process| process.belongs_to(folder))
        .filter_map(|process| process.netns())
        .filter(|&id| id != root)
        .collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let named = |name: &String| Netns::open(name).is_ok_and(|netns| ids.contains(&netns.id()));
    Ok(Netns::list()?.into_iter().filter(named).collect())
}
