//! Mount points on the host: files and folders that containers' mounts stand on.
//!
//! Containers see the host's own files, so a mount point that is missing has to be made on the host. It is written down before
//! that, and goes with the last container that uses it, if it is still empty.
//!
//! The kernel lets an empty folder be removed although something is mounted on it in another mount namespace, and takes
//! that mount away with it: so all of them are asked before.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::{Agent, held};
use crate::shim::folder::{Phase, Spec};

/// Makes what is missing of the mount points that a container needs on the host.
///
/// # Errors
/// Names the one that can't be made.
pub(super) fn make(agent: &Agent, spec: &Spec) -> anyhow::Result<()> {
    let _changing = held(&agent.containers.mount_points);
    for (index, mount) in spec.mounts.iter().enumerate() {
        let outer = spec.mounts.get(..index).unwrap_or_default();
        if outer.iter().any(|outer| mount.is_within(outer)) {
            // Seen in the container alone, and made there.
            continue;
        }
        let folder = mount.path().is_none_or(Path::is_dir);
        make_one(agent, &mount.target, folder).with_context(|| {
            format!(
                "can't make the mount point {}: make it yourself, or give a target that exists",
                mount.target.display()
            )
        })?;
    }
    Ok(())
}

fn make_one(agent: &Agent, target: &Path, folder: bool) -> anyhow::Result<()> {
    let missing = missing(target)?;
    if missing.is_empty() {
        return Ok(());
    }
    agent.state.update(|state| {
        for point in &missing {
            if !state.mount_points.contains(point) {
                state.mount_points.push(point.clone());
            }
        }
    })?;
    let (last, leading) = missing.split_last().context("something is missing")?;
    for point in leading {
        make_folder(point)?;
    }
    if folder {
        make_folder(last)
    } else {
        let mut file = OpenOptions::new();
        file.write(true).create_new(true).mode(0o644);
        file.open(last)
            .map(drop)
            .with_context(|| last.display().to_string())
    }
}

fn make_folder(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .mode(0o755)
        .create(path)
        .with_context(|| path.display().to_string())
}

/// What is missing of `path`, the outermost first.
fn missing(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut missing = Vec::new();
    for point in path.ancestors() {
        match fs::metadata(point) {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if point.is_symlink() {
                    bail!("{} is a link that leads nowhere", point.display());
                }
                missing.push(point.to_owned());
            }
            Err(error) => return Err(error).with_context(|| point.display().to_string()),
        }
    }
    missing.reverse();
    Ok(missing)
}

/// Removes the mount points that no container uses any more, but for `leaving`, which is being cleared away. One that somebody
/// has put something into stays, and is nobody's of ours any more.
///
/// # Errors
/// When it can't be told who uses them.
pub(super) fn sweep(agent: &Agent, leaving: Option<&str>) -> anyhow::Result<()> {
    let _changing = held(&agent.containers.mount_points);
    let points = agent.state.read(|state| state.mount_points.clone());
    if points.is_empty() {
        return Ok(());
    }
    let specs = agent.containers.all()?;
    let mut targets: HashSet<PathBuf> = specs
        .into_iter()
        .filter(|(_, spec)| spec.phase != Phase::Exited && Some(spec.name.as_str()) != leaving)
        .flat_map(|(_, spec)| spec.mounts)
        .map(|mount| mount.target)
        .collect();
    targets.extend(mounted()?);
    let is_used = |point: &PathBuf| targets.iter().any(|target| target.starts_with(point));
    // Inner places first: an outer one is empty only then.
    let mut unused: Vec<PathBuf> = points.into_iter().filter(|point| !is_used(point)).collect();
    unused.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in &unused {
        if let Err(error) = remove(point) {
            tracing::info!("{} stays on this host: {error}", point.display());
        }
    }
    agent.state.update(|state| {
        state.mount_points.retain(|point| !unused.contains(point));
    })
}

/// Removes an empty folder or file.
fn remove(point: &Path) -> std::io::Result<()> {
    let Ok(metadata) = point.symlink_metadata() else {
        return Ok(());
    };
    if metadata.is_dir() {
        fs::remove_dir(point)
    } else if metadata.is_file() && metadata.len() == 0 {
        fs::remove_file(point)
    } else {
        Err(ErrorKind::DirectoryNotEmpty.into())
    }
}

/// Where something is mounted, in any mount namespace of this machine: other agents' containers use the same files.
///
/// # Errors
/// When `/proc` can't be read.
pub(crate) fn mounted() -> anyhow::Result<HashSet<PathBuf>> {
    let mut namespaces = HashSet::new();
    let mut mounted = HashSet::new();
    for entry in fs::read_dir("/proc").context("can't read /proc")? {
        let process = entry.context("can't read /proc")?.path();
        // A process that ends meanwhile has none.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else {
            continue;
        };
        if namespaces.contains(&namespace) {
            continue;
        }
        if let Ok(text) = fs::read(process.join("mountinfo")) {
            mounted.extend(mount_points(&text));
            namespaces.insert(namespace);
        }
    }
    Ok(mounted)
}

/// The fifth field of each line of `mountinfo` (proc_pid_mountinfo(5)), where blanks are written in octal.
fn mount_points(text: &[u8]) -> impl Iterator<Item = PathBuf> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let field = line.split(|byte| *byte == b' ').nth(4)?;
        let mut path = Vec::with_capacity(field.len());
        let mut rest = field;
        while let Some((&byte, after)) = rest.split_first() {
            let octal = after.get(..3).filter(|_| byte == b'\\');
            let octal = octal
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u8::from_str_radix(digits, 8).ok());
            match octal {
                Some(meant) => {
                    path.push(meant);
                    rest = after.get(3..).unwrap_or_default();
                }
                None => {
                    path.push(byte);
                    rest = after;
                }
            }
        }
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
    })
}

/// Makes the folder that a bind's source names, as Docker's `-v` does.
///
/// # Errors
/// When it can't be made.
pub(super) fn make_source(path: &Path) -> anyhow::Result<()> {
    let parents = path.parent().unwrap_or(path);
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .and_then(|()| File::open(parents)?.sync_all())
        .with_context(|| format!("can't make the folder {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_blanks_in_them() {
        let text = b"26 30 0:24 / /sys rw,nosuid - sysfs sysfs rw\n\
            27 30 0:25 / /mnt/a\\040b\\134c rw - tmpfs tmpfs rw\n\nshort line\n";
        let points: Vec<_> = mount_points(text).collect();
        assert_eq!(points, [Path::new("/sys"), Path::new("/mnt/a b\\c")]);
    }

    #[test]
    fn what_is_missing_of_a_path_comes_outermost_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        assert!(missing(folder.path()).expect("stands").is_empty());
        assert_eq!(
            missing(&at("a/b")).expect("may be made"),
            [at("a"), at("a/b")]
        );
        std::os::unix::fs::symlink("nowhere", at("link")).expect("a link");
        assert!(missing(&at("link/b")).is_err(), "a link that leads nowhere");
        fs::write(at("file"), b"").expect("a file");
        assert!(missing(&at("file/b")).is_err(), "a file is no folder");
    }

    #[test]
    fn what_has_something_in_it_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("full")).expect("a folder");
        fs::write(at("full/file"), b"x").expect("a file");
        fs::write(at("empty"), b"").expect("a file");
        assert!(remove(&at("full")).is_err() && remove(&at("full/file")).is_err());
        assert!(remove(&at("empty")).is_ok() && remove(&at("empty")).is_ok());
        assert!(at("full/file").exists() && !at("empty").exists());
    }
}
