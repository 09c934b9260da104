//! Puts what a container was given from its host at its place, in the mount namespace that was just made.
//!
//! All sources are opened before anything is mounted: what one mount hides may be another's source. A target is
//! resolved in the container's own view, through symbolic links but never through `/proc`'s links into another
//! namespace, and mounted by descriptor, so that nothing can be exchanged in between.
//!
//! Does NOT make mount points on the host, nor fill volumes: the agent has done that. A place inside another mount is
//! made here, because only here can it be seen.
#![allow(unsafe_code)]

mod lost;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
};
use serde::{Deserialize, Serialize};

pub(crate) use lost::put_back;

/// One thing that a container finds at a place of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// What it is.
    pub(crate) source: Source,
    /// Where the container finds it: an absolute path.
    pub(crate) target: PathBuf,
    /// Whether the container can't write there, nor to what is mounted below it.
    pub(crate) readonly: bool,
}

/// What can be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Source {
    /// A file or folder of the host.
    Bind(PathBuf),
    /// A volume of the host.
    Volume {
        /// Its name.
        name: String,
        /// Where its content is.
        data: PathBuf,
        /// It was made for this container alone, and has a random name.
        anonymous: bool,
        /// An empty one stays empty.
        nocopy: bool,
        /// Labels of one that is made.
        labels: BTreeMap<String, String>,
    },
    /// Memory.
    Tmpfs {
        /// Most bytes; none: half of the memory, as the kernel has it.
        size: Option<u64>,
        /// Permissions of its root.
        mode: u32,
    },
}

impl Mount {
    /// What of the host's files it shows.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::Bind(path) | Source::Volume { data: path, .. } => Some(path),
            Source::Tmpfs { .. } => None,
        }
    }

    /// Whether it stands inside the place of `other`.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.target != other.target && self.target.starts_with(&other.target)
    }
}

/// Outer places first: what is mounted later would hide what is inside it.
pub(crate) fn in_order(mounts: &mut [Mount]) {
    mounts.sort_by_key(|mount| mount.target.components().count());
}

/// Mounts all of it. The caller has one thread, in a mount namespace of its own.
pub(super) fn all(mounts: &[Mount]) -> anyhow::Result<()> {
    let trees = mounts
        .iter()
        .map(|mount| {
            tree(mount).with_context(|| match mount.path() {
                Some(path) => format!("can't mount {}", path.display()),
                None => format!("can't mount memory at {}", mount.target.display()),
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    for (index, (mount, tree)) in mounts.iter().zip(trees).enumerate() {
        // In order, so whatever it is inside of is mounted by now.
        attach(mount, &tree, is_nested(mounts, index))
            .with_context(|| format!("can't mount at {}", mount.target.display()))?;
    }
    Ok(())
}

/// Whether the place of this mount, of several in order, is inside that of one before it.
fn is_nested(mounts: &[Mount], index: usize) -> bool {
    let mut outer = mounts.iter().take(index);
    mounts
        .get(index)
        .is_some_and(|mount| outer.any(|outer| mount.is_within(outer)))
}

/// A copy of what is to be mounted, at no place yet.
fn tree(mount: &Mount) -> anyhow::Result<OwnedFd> {
    let tree = match &mount.source {
        Source::Bind(path) | Source::Volume { data: path, .. } => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            match rustix::mount::open_tree(CWD, path, flags) {
                Err(Errno::NOSYS) => {
                    bail!("this kernel is older than Linux 5.2, which mounts need")
                }
                // A copy can be had of this namespace's mounts alone.
                Err(Errno::INVAL) => bail!("it leads to files of another namespace"),
                other => other?,
            }
        }
        Source::Tmpfs { size, mode } => memory(*size, *mode)?,
    };
    if mount.readonly {
        match make_read_only(tree.as_fd()) {
            // Done once it is attached.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            other => other.context("can't make it read-only")?,
        }
    }
    Ok(tree)
}

/// A new filesystem in memory.
fn memory(size: Option<u64>, mode: u32) -> io::Result<OwnedFd> {
    let filesystem = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(size) = size {
        rustix::mount::fsconfig_set_string(&filesystem, "size", size.to_string())?;
    }
    rustix::mount::fsconfig_set_string(&filesystem, "mode", format!("{mode:o}"))?;
    rustix::mount::fsconfig_create(&filesystem)?;
    // As Docker's: nothing there becomes another user or a device.
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(
        &filesystem,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

fn attach(mount: &Mount, tree: &OwnedFd, nested: bool) -> anyhow::Result<()> {
    let target = match open_place(CWD, &mount.target) {
        Err(Errno::NOENT) if nested => make_place(&mount.target, is_folder(tree)?)?,
        Err(Errno::NOENT) => bail!("it went away: start the container again"),
        Err(Errno::LOOP) => bail!("it leads through a link into another namespace, or in a circle"),
        other => other?,
    };
    if is_folder(tree)? != is_folder(&target)? {
        // Docker's words.
        bail!(
            "not a directory: are you trying to mount a directory onto a file (or vice-versa)? \
             check if the specified host path exists and is the expected type"
        );
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", &target, "", flags)?;
    if mount.readonly {
        remount_read_only(tree)?;
    }
    Ok(())
}

/// A place in this namespace, without a look at what it is.
fn open_place(folder: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(
        folder,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
}

/// Makes the folders that lead to `path`, and it.
fn make_place(path: &Path, folder: bool) -> anyhow::Result<OwnedFd> {
    let names: Vec<_> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(Path::new(name)),
            _ => None,
        })
        .collect();
    let mut at = open_place(CWD, Path::new("/"))?;
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        at = match open_place(&at, name) {
            Err(Errno::NOENT) => {
                let made = if last && !folder {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                    rustix::fs::openat(&at, *name, flags, Mode::from_raw_mode(0o644)).map(drop)
                } else {
                    rustix::fs::mkdirat(&at, *name, Mode::from_raw_mode(0o755))
                };
                made.map_err(io::Error::from)
                    .context("can't make it inside the other mount")?;
                open_place(&at, name)?
            }
            other => other?,
        };
    }
    Ok(at)
}

fn is_folder(fd: &OwnedFd) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Makes a tree read-only, with all that is mounted below it (mount_setattr(2), Linux 5.12).
fn make_read_only(tree: BorrowedFd<'_>) -> io::Result<()> {
    set_read_only(tree.as_raw_fd())
}

/// Whether what is mounted below something read-only can be made read-only too.
pub(crate) fn reaches_what_is_below() -> bool {
    // No tree: a kernel that has the call says that it is none, and changes nothing.
    match set_read_only(-1) {
        Err(error) => error.raw_os_error() != Some(libc::ENOSYS),
        Ok(()) => true,
    }
}

fn set_read_only(fd: RawFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a static string that ends with a zero, and the structure is a whole `mount_attr` of the size
    // told, which the kernel only reads; it refuses a descriptor that is none. rustix has no call for it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The older way, for the outermost mount alone; nothing where [`make_read_only`] has done it.
fn remount_read_only(tree: &OwnedFd) -> io::Result<()> {
    let status = rustix::fs::fstatvfs(tree)?.f_flag;
    if status.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    // A remount sets all of them: what held before goes on holding.
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    for (was, flag) in [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ] {
        flags.set(flag, status.contains(was));
    }
    let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
    Ok(rustix::mount::mount_remount(path, flags, c"")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(target: &str) -> Mount {
        Mount {
            source: Source::Bind("/src".into()),
            target: target.into(),
            readonly: false,
        }
    }

    #[test]
    fn outer_places_come_first() {
        let mut mounts: Vec<Mount> = ["/a/b/c", "/z", "/a"].into_iter().map(at).collect();
        in_order(&mut mounts);
        let targets: Vec<_> = mounts.iter().map(|mount| mount.target.to_str()).collect();
        assert_eq!(targets, [Some("/z"), Some("/a"), Some("/a/b/c")]);
        assert!(mounts[2].is_within(&mounts[1]));
        assert!(!mounts[1].is_within(&mounts[1]) && !mounts[0].is_within(&mounts[1]));
        let beside = at("/ab");
        assert!(!beside.is_within(&mounts[1]), "a name that begins alike");
    }
}
