//! Puts back mounts that the kernel took away from a container that runs.
//!
//! A mount stands on an entry of a folder. When somebody removes that entry, or puts another file there by rename, the
//! kernel lets go of what is mounted on it in all other mount namespaces (`__detach_mounts` in fs/namespace.c): a DHCP client
//! that replaces this host's `/etc/resolv.conf`, or an editor, does that to every container. And when a symbolic link on
//! the way is made to lead elsewhere, the mount stands where nobody looks.
//!
//! A mount counts as lost when its target, as the container resolves it, is no root of a mount. So whatever the
//! container itself has mounted there is left alone; what it has unmounted comes back.
//!
//! Does NOT make targets that are gone: where the host has no such file, the container has none either until there is one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::{Mount, attach, is_nested, tree};
use crate::shim::process::{ProcessId, wait_ended};

/// Puts back what of these mounts, outer places first, is lost in the mount namespace of that process. Returns the targets. Nothing is
/// done when the process has ended, or sees another root than this one does: then the places are not those that were meant.
///
/// # Errors
/// Names each mount that could not be put back; the others are.
pub(crate) fn put_back(process: &ProcessId, mounts: &[Mount]) -> anyhow::Result<Vec<PathBuf>> {
    let Some(pidfd) = process.open()? else {
        return Ok(Vec::new());
    };
    let root = match rustix::fs::open(
        format!("/proc/{}/root", process.pid),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        // It has ended just now.
        Err(Errno::NOENT | Errno::SRCH) => return Ok(Vec::new()),
        other => other.context("can't look at the container's files")?,
    };
    // The process id was its own all the while: the folder is.
    if wait_ended(&pidfd, Duration::ZERO)? || !is_our_root(&root)? {
        return Ok(Vec::new());
    }
    let lost = lost(&root, mounts)?;
    if lost.is_empty() {
        return Ok(lost);
    }
    // Copies of mounts can be had in their own namespace alone, and be attached in any.
    let trees: Vec<_> = lost
        .iter()
        .map(|target| {
            let mount = mounts.iter().find(|mount| mount.target == *target);
            mount.context("it was one of them").and_then(tree)
        })
        .collect();
    let attached = std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .name("mounts".into())
            .spawn_scoped(scope, || attach_all(pidfd.as_fd(), mounts, lost, trees))?;
        worker
            .join()
            .unwrap_or_else(|payload| std::panic::resume_unwind(payload))
    });
    attached.context("can't put back what was mounted")
}

/// Attaches what was lost. Ends in the container's mount namespace: the thread is good for nothing else.
fn attach_all(
    pidfd: BorrowedFd<'_>,
    mounts: &[Mount],
    lost: Vec<PathBuf>,
    trees: Vec<anyhow::Result<OwnedFd>>,
) -> anyhow::Result<Vec<PathBuf>> {
    enter(pidfd).context("can't enter the container's mount namespace")?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut back = Vec::new();
    let mut problems = Vec::new();
    for (target, tree) in lost.into_iter().zip(trees) {
        let index = mounts.iter().position(|mount| mount.target == target);
        let Some((index, mount)) = index.and_then(|index| Some((index, mounts.get(index)?))) else {
            continue;
        };
        let done = tree.and_then(|tree| {
            // Another one may have been put there meanwhile.
            if stands(&root, mount)? == Some(true) {
                return Ok(());
            }
            attach(mount, &tree, is_nested(mounts, index))?;
            let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
            // As the container's other mounts are: what it mounts below stays its own.
            let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
            Ok(rustix::mount::mount_change(path, slave)?)
        });
        match done {
            Ok(()) => back.push(target),
            Err(error) => problems.push(format!("{}: {error:#}", target.display())),
        }
    }
    if !problems.is_empty() {
        anyhow::bail!(problems.join("; "));
    }
    Ok(back)
}

/// Enters a mount namespace with the calling thread alone.
fn enter(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: unshare is unsafe because of CLONE_FILES alone; CLONE_FS gives this thread a root and a working folder of its own,
    // without which it may not enter a mount namespace (setns(2)). There is no safe call for it.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
    Ok(rustix::thread::move_into_thread_name_spaces(
        pidfd,
        ThreadNameSpaceType::MOUNT,
    )?)
}

/// Whether the root seen by a process is the folder that is this one's.
fn is_our_root(root: &OwnedFd) -> io::Result<bool> {
    let theirs = rustix::fs::fstat(root)?;
    let ours = std::fs::metadata("/")?;
    Ok((theirs.st_dev, theirs.st_ino) == (ours.dev(), ours.ino()))
}

/// The targets at which nothing is mounted any more.
fn lost(root: &OwnedFd, mounts: &[Mount]) -> anyhow::Result<Vec<PathBuf>> {
    let mut lost: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        // With an outer one all went that stood in it.
        let outer = lost.iter().any(|outer| mount.target.starts_with(outer));
        if outer || stands(root, mount)? == Some(false) {
            lost.push(mount.target.clone());
        }
    }
    Ok(lost)
}

/// Whether anything is mounted at its target; `None`: there is no such place.
fn stands(root: &OwnedFd, mount: &Mount) -> anyhow::Result<Option<bool>> {
    let inside = mount.target.strip_prefix("/").unwrap_or(Path::new(""));
    let found = rustix::fs::openat2(
        root,
        inside,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    );
    let found = match found {
        // Not there, or not the place that was meant: a file on the way, a link into another namespace.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        other => other.with_context(|| format!("can't look at {}", mount.target.display()))?,
    };
    let known = rustix::fs::statx(&found, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    let is_root = StatxAttributes::MOUNT_ROOT;
    // Known since Linux 5.8; of an older one all of them stand.
    let is_told = known.stx_attributes_mask.contains(is_root);
    Ok(Some(!is_told || known.stx_attributes.contains(is_root)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::mount::Source;

    fn at(target: &str) -> Mount {
        Mount {
            source: Source::Bind("/".into()),
            target: target.into(),
            readonly: false,
        }
    }

    #[test]
    fn what_is_no_root_of_a_mount_is_lost() {
        let root = rustix::fs::open("/", OFlags::PATH, Mode::empty()).expect("a root");
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").expect("a file");
        std::os::unix::fs::symlink("/proc", folder.path().join("link")).expect("a link");
        let name = |name: &str| folder.path().join(name).display().to_string();
        let mounts = [
            // Stands everywhere, also through a link.
            at("/proc"),
            at(&name("link")),
            // Nothing stands there, or there is no such place.
            at(&name("file")),
            at(&name("absent")),
            at(&name("file/below")),
            at(&name("absent/below")),
        ];
        let lost = lost(&root, &mounts).expect("can be looked at");
        assert_eq!(
            lost,
            [PathBuf::from(name("file")), name("file/below").into()]
        );
    }

    #[test]
    fn a_process_that_is_gone_has_nothing_put_back() {
        let mut child = std::process::Command::new("true").spawn().expect("a child");
        let process = ProcessId::of(child.id()).expect("ours");
        child.wait().expect("ours");
        let back = put_back(&process, &[at("/")]).expect("no error");
        assert!(back.is_empty());
    }
}
