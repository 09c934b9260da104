//! A network namespace: made, found, entered, removed.
//!
//! Names are those of `ip netns`: a file in `/run/netns` with the namespace bind-mounted on it. Both programs see each
//! other's namespaces.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use rustix::fs::FlockOperation;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::Netlink;

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// The namespace of the calling thread (`/proc/self` would be that of the process's first thread).
const OWN: &str = "/proc/thread-self/ns/net";
/// `NSFS_MAGIC` of `linux/magic.h`: what a namespace file is mounted from.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Why something could not be done with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The name cannot be a file's name.
    #[error(
        "`{0}` cannot name a network namespace: use letters, digits, `-`, `_` and `.`, at most 255 of them"
    )]
    BadName(String),
    /// There is no namespace of that name.
    #[error("there is no network namespace {0}: `ip netns` lists those that exist")]
    Absent(String),
    /// The name is taken.
    #[error(
        "a network namespace {0} exists already: choose another name, or remove it with `ip netns delete {0}`"
    )]
    Exists(String),
    /// A file of that name stands in `/run/netns`, but no namespace is mounted on it.
    #[error(
        "/run/netns/{0} is no network namespace but a left-over file: remove it with `ip netns delete {0}`"
    )]
    LeftOver(String),
    /// The kernel refused.
    #[error("cannot {operation}: {cause}{}", hint(cause))]
    Refused {
        /// What was tried.
        operation: String,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// What to do about the commonest refusal.
fn hint(cause: &io::Error) -> &'static str {
    if cause.kind() == io::ErrorKind::PermissionDenied {
        " (root is needed)"
    } else {
        ""
    }
}

fn refused(operation: impl Into<String>) -> impl FnOnce(io::Error) -> NetnsError {
    let operation = operation.into();
    move |cause| NetnsError::Refused { operation, cause }
}

/// An open network namespace. Clones share one open file; the namespace lives at least as long as they do.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    name: Option<Arc<str>>,
    id: (u64, u64),
}

impl Netns {
    /// The calling thread's namespace.
    ///
    /// # Errors
    /// When `/proc` is not mounted or no file can be opened.
    pub fn current() -> Result<Self, NetnsError> {
        Self::from_path(Path::new(OWN), None).map_err(refused("open the own network namespace"))
    }

    /// The namespace `/run/netns/NAME`.
    ///
    /// # Errors
    /// When the name is absent, or a file without a namespace on it.
    pub fn open(name: &str) -> Result<Self, NetnsError> {
        let path = path_of(name)?;
        if !is_namespace(&path) {
            return Err(match path.exists() {
                true => NetnsError::LeftOver(name.to_owned()),
                false => NetnsError::Absent(name.to_owned()),
            });
        }
        Self::from_path(&path, Some(name))
            .map_err(refused(format!("open network namespace {name}")))
    }

    /// The namespace of a process. The caller makes sure that the pid is still the process it means.
    ///
    /// # Errors
    /// When there is no such process, or it may not be looked at.
    pub fn from_pid(pid: u32) -> Result<Self, NetnsError> {
        Self::from_path(&PathBuf::from(format!("/proc/{pid}/ns/net")), None).map_err(refused(
            format!("open the network namespace of process {pid}"),
        ))
    }

    /// Makes a namespace and names it, as `ip netns add` does, with its `lo` up.
    ///
    /// # Errors
    /// When the name is taken or bad, or without root. Nothing is left behind then.
    pub fn create(name: &str) -> Result<Self, NetnsError> {
        let path = path_of(name)?;
        share_names().map_err(refused(format!("prepare {NAMES} for namespaces")))?;
        match OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o000)
            .open(&path)
        {
            Ok(file) => drop(file),
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NetnsError::Exists(name.to_owned()));
            }
            Err(cause) => return Err(refused(format!("create {}", path.display()))(cause)),
        }
        let made = on_own_thread(|| {
            // SAFETY: only CLONE_FILES is unsafe to unshare, and only CLONE_NEWNET is asked for here. No safe call exists.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            rustix::mount::mount_bind(OWN, &path)
        });
        let made = match made {
            Ok(Ok(())) => Self::open(name).and_then(|netns| {
                let up = Netlink::open(&netns).and_then(|netlink| netlink.set_up("lo"));
                up.map_err(|error| {
                    refused(format!("set up lo in {name}"))(io::Error::other(error))
                })?;
                Ok(netns)
            }),
            Ok(Err(errno)) => Err(refused(format!("make network namespace {name}"))(
                errno.into(),
            )),
            Err(cause) => Err(refused(format!(
                "start a thread for network namespace {name}"
            ))(cause)),
        };
        if made.is_err() {
            // The first error is the one to tell; whatever this removal cannot take away was never made.
            let _ = Self::delete(name);
        }
        made
    }

    /// Makes a namespace that has no name and ends with this value and its copies. Its `lo` is down.
    ///
    /// # Errors
    /// Without root.
    pub fn unnamed() -> Result<Self, NetnsError> {
        let made = on_own_thread(|| {
            // SAFETY: only CLONE_FILES is unsafe to unshare, and only CLONE_NEWNET is asked for here. No safe call exists.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            Self::from_path(Path::new(OWN), None)
        });
        made.and_then(|made| made)
            .map_err(refused("make a network namespace"))
    }

    /// Takes a name away. The namespace itself ends with its last process, socket and open file. An absent name is fine.
    ///
    /// # Errors
    /// When the kernel refuses, as it does without root.
    pub fn delete(name: &str) -> Result<(), NetnsError> {
        let path = path_of(name)?;
        match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
            // EINVAL: nothing is mounted there.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(refused(format!("unmount {}", path.display()))(errno.into())),
        }
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(refused(format!("remove {}", path.display()))(cause))
            }
            _ => Ok(()),
        }
    }

    /// Whether the name is taken, be it by a namespace or a left-over file.
    pub fn exists(name: &str) -> bool {
        path_of(name).is_ok_and(|path| path.symlink_metadata().is_ok())
    }

    /// The names in `/run/netns`, sorted. None when the folder is not there yet.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list() -> Result<Vec<String>, NetnsError> {
        let entries = match fs::read_dir(NAMES) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(refused(format!("list {NAMES}"))(cause)),
        };
        // A name that is no UTF-8 cannot be one of ours, nor be asked for through this crate.
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The name it was opened by, if any.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Device and inode of the namespace file: equal for two handles if and only if they are the same namespace.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// The open file, for `setns` and `IFLA_NET_NS_FD`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Runs `f` inside the namespace, on a thread of its own that ends with it, and hands its result over. Processes that
    /// `f` starts are born inside, with the caller's `/sys` still mounted. A panic of `f` goes on in the caller.
    ///
    /// # Errors
    /// When the thread cannot be started or may not enter the namespace; `f` has not run then.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let entered = on_own_thread(|| {
            // Whoever is inside already needs no right to enter.
            let inside = fs::metadata(OWN).is_ok_and(|own| (own.dev(), own.ino()) == self.id);
            if !inside {
                let kind = Some(LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(self.as_fd(), kind)?;
            }
            Ok::<T, rustix::io::Errno>(f())
        });
        match entered {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(errno)) => Err(refused(format!("enter network namespace {self}"))(
                errno.into(),
            )),
            Err(cause) => Err(refused(format!(
                "start a thread in network namespace {self}"
            ))(cause)),
        }
    }

    fn from_path(path: &Path, name: Option<&str>) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            fd: Arc::new(file.into()),
            name: name.map(Into::into),
            id: (metadata.dev(), metadata.ino()),
        })
    }
}

impl std::fmt::Display for Netns {
    /// The name, or `net:[INODE]` as `readlink /proc/PID/ns/net` prints it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "net:[{}]", self.id.1),
        }
    }
}

/// A scoped thread, so that entering a namespace never changes the caller's.
fn on_own_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, f)?;
        Ok(handle
            .join()
            .unwrap_or_else(|payload| panic::resume_unwind(payload)))
    })
}

fn path_of(name: &str) -> Result<PathBuf, NetnsError> {
    let bad = name.is_empty()
        || name.len() > 255
        || name == "."
        || name == ".."
        || name.contains(['/', '\0']);
    if bad {
        Err(NetnsError::BadName(name.to_owned()))
    } else {
        Ok(Path::new(NAMES).join(name))
    }
}

fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path)
        .is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|magic| magic == NSFS_MAGIC))
}

/// Makes `/run/netns` a shared mount point, so that names made in one mount namespace are seen, and above all vanish, in
/// the others. iproute2 (`ip/ipnetns.c`, `netns_add`) does the same under the same lock.
fn share_names() -> io::Result<()> {
    fs::create_dir_all(NAMES)?;
    let folder = File::open(NAMES)?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive)?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    match rustix::mount::mount_change(NAMES, shared) {
        // Not a mount point yet.
        Err(rustix::io::Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(NAMES, NAMES)?;
            Ok(rustix::mount::mount_change(NAMES, shared)?)
        }
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "/etc/passwd",
            "a\0b",
            &"x".repeat(256),
        ] {
            assert!(
                matches!(Netns::open(name), Err(NetnsError::BadName(_))),
                "{name:?}"
            );
            assert!(
                matches!(Netns::create(name), Err(NetnsError::BadName(_))),
                "{name:?}"
            );
            assert!(
                matches!(Netns::delete(name), Err(NetnsError::BadName(_))),
                "{name:?}"
            );
            assert!(!Netns::exists(name));
        }
    }

    #[test]
    fn an_absent_name_is_said_to_be_absent() {
        let error = Netns::open("no-such-namespace").expect_err("nobody made it");
        assert!(matches!(error, NetnsError::Absent(_)), "{error}");
    }

    #[test]
    fn the_own_namespace_is_the_same_from_each_side() {
        let current = Netns::current().expect("/proc is mounted");
        let by_pid = Netns::from_pid(std::process::id()).expect("we exist");
        assert_eq!(current.id(), by_pid.id());
        assert!(current.name().is_none());
        let inside = current
            .run(Netns::current)
            .expect("no right is needed to stay");
        assert_eq!(inside.expect("/proc is mounted").id(), current.id());
    }
}
