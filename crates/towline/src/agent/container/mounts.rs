//! From the mounts that a client asks for to those that a container has.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::mount_points;
use crate::agent::volumes::{self, Volumes};
use crate::api::mount::{MountWanted, Wanted};
use crate::shim::mount::{self, Mount, Source};

/// Permissions of memory's root unless asked otherwise: everybody writes, and removes what is theirs.
const TMPFS_MODE: u32 = 0o1777;

/// Settles what is mounted. Sources of binds are there afterwards.
///
/// # Errors
/// Names the mount that can't be had.
pub(super) fn settle(on_host: &Volumes, wanted: &[MountWanted]) -> anyhow::Result<Vec<Mount>> {
    let mut mounts = wanted
        .iter()
        .map(|wanted| {
            Ok(Mount {
                source: source(on_host, wanted)?,
                target: PathBuf::from(&wanted.target),
                readonly: wanted.readonly,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    mount::in_order(&mut mounts);
    Ok(mounts)
}

/// What the operator should know of them.
pub(super) fn warning(mounts: &[Mount]) -> Option<String> {
    let read_only = mounts
        .iter()
        .find(|mount| mount.readonly && mount.path().is_some_and(Path::is_dir))?;
    (!mount::reaches_what_is_below()).then(|| {
        format!(
            "this kernel is older than Linux 5.12: what is mounted below {} on this host can be written to",
            read_only.path().unwrap_or(&read_only.target).display()
        )
    })
}

fn source(on_host: &Volumes, wanted: &MountWanted) -> anyhow::Result<Source> {
    Ok(match &wanted.source {
        Wanted::Bind { source, create } => {
            let path = PathBuf::from(source);
            match fs::metadata(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound && *create => {
                    mount_points::make_source(&path)?;
                }
                Err(error) if error.kind() == ErrorKind::NotFound => bail!(
                    "invalid mount config for type \"bind\": bind source path does not exist: {source}"
                ),
                other => {
                    other.with_context(|| format!("can't look at the bind source {source}"))?;
                }
            }
            Source::Bind(path)
        }
        Wanted::Volume {
            name,
            nocopy,
            labels,
        } => {
            volumes::check_labels(labels)?;
            let (name, anonymous) = match name {
                Some(name) => (name.clone(), false),
                None => (volumes::random_name()?, true),
            };
            Source::Volume {
                data: on_host.data(&name),
                name,
                anonymous,
                nocopy: *nocopy,
                labels: labels.clone(),
            }
        }
        Wanted::Tmpfs { size, mode } => Source::Tmpfs {
            size: *size,
            mode: mode.unwrap_or(TMPFS_MODE),
        },
    })
}
