//! What agent, client and shim of a container tell each other through files.
//!
//! ```text
//! <state-dir>/containers/NAME/
//!     spec.json   what the container is; the agent writes it
//!     lock        locked by the shim as long as it lives, or by the agent while it clears away
//!     shim.json   which processes are the shim and the command; the shim writes it
//!     exit.json   how the command ended; the shim writes it
//!     log         what the command printed
//! ```
//!
//! Every JSON file is replaced whole and synced, so a reader and a crash find the old or the new one.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::dns::Dns;
use super::mount::Mount;
use super::process::ProcessId;

/// What a container is. Its places in networks are in the agent's state file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// 12 hexadecimal digits.
    pub(crate) id: String,
    /// Its name, and that of its network namespace.
    pub(crate) name: String,
    /// Command and arguments, for people: bytes that are no UTF-8 are replaced.
    pub(crate) command: Vec<String>,
    /// Whether it goes when its command ends.
    pub(crate) remove: bool,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// How far it has come.
    pub(crate) phase: Phase,
    /// The process that asked for it; while it lives and no shim does, the start is under way.
    pub(crate) client: Option<ProcessId>,
    /// Device and inode of its network namespace, once it exists.
    pub(crate) netns: Option<(u64, u64)>,
    /// What of the host it finds at places of its own, the outer places first.
    #[serde(default)]
    pub(crate) mounts: Vec<Mount>,
    /// Whom it asks for names that are none of the cluster's.
    #[serde(default)]
    pub(crate) dns: Dns,
    /// Whether its volumes without a name go with it.
    #[serde(default)]
    pub(crate) remove_volumes: bool,
}

/// How far a container has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// The agent is making its namespace and interfaces.
    Preparing,
    /// All is in place: a shim may start the command.
    Ready,
    /// It is being cleared away.
    Ending,
    /// Its command has ended and it holds nothing on the host but this folder.
    Exited,
}

/// Which processes a running container has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    /// The shim.
    pub(crate) shim: ProcessId,
    /// The command, once it was started.
    pub(crate) command: Option<ProcessId>,
}

/// How a container ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// The command's exit code, or 128 + the signal that ended it.
    pub(crate) code: u8,
    /// Whether the command was started at all.
    pub(crate) started: bool,
    /// Seconds since 1970.
    pub(crate) finished: u64,
}

/// The folder of one container.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`, whether it exists or not.
    pub(crate) fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Creates it, for root alone.
    pub(crate) fn create(&self) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        fs::set_permissions(&self.0, Permissions::from_mode(0o700))?;
        self.0.parent().map_or(Ok(()), sync_folder)
    }

    /// Removes it with all it holds; an absent one is no error.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.0.parent().map_or(Ok(()), sync_folder),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Where the command's output is kept.
    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// The log, to append to.
    pub(crate) fn open_log(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.log())
    }

    /// What the container is; nothing when the folder holds none.
    pub(crate) fn spec(&self) -> io::Result<Option<Spec>> {
        self.read("spec.json")
    }

    /// Replaces what the container is.
    pub(crate) fn write_spec(&self, spec: &Spec) -> io::Result<()> {
        self.replace("spec.json", spec)
    }

    /// Which processes it has; nothing before a shim was started.
    pub(crate) fn running(&self) -> io::Result<Option<Running>> {
        self.read("shim.json")
    }

    /// Replaces which processes it has.
    pub(crate) fn write_running(&self, running: &Running) -> io::Result<()> {
        self.replace("shim.json", running)
    }

    /// How it ended; nothing when it hasn't, or its shim was killed.
    pub(crate) fn exit(&self) -> io::Result<Option<Exit>> {
        self.read("exit.json")
    }

    /// Records how it ended.
    pub(crate) fn write_exit(&self, exit: &Exit) -> io::Result<()> {
        self.replace("exit.json", exit)
    }

    /// Takes the container for the caller alone; nothing when another holds it or it was removed meanwhile.
    /// Held until the answer is dropped or the process ends.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let path = self.0.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path);
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Whoever held it before may have removed the folder.
        Ok((file.metadata()?.nlink() > 0).then_some(file))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        let path = self.0.join(name);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}: {error}", path.display()),
                )
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace(&self, name: &str, value: &impl Serialize) -> io::Result<()> {
        let temporary = self.0.join(format!("{name}.new"));
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(value)?)?;
        file.sync_all()?;
        fs::rename(&temporary, self.0.join(name))?;
        sync_folder(&self.0)
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A rename or a removal is on the disk only when its folder is.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_and_dies_with_its_folder() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let folder = Folder::at(parent.path().join("c1"));
        assert!(
            folder
                .lock()
                .expect("an absent folder is no error")
                .is_none()
        );
        folder.create().expect("may be made");
        let held = folder.lock().expect("lockable").expect("free");
        assert!(
            folder.lock().expect("lockable").is_none(),
            "held by the other"
        );
        drop(held);
        assert!(folder.lock().expect("lockable").is_some());

        folder.remove().expect("may be removed");
        folder.remove().expect("a second time is harmless");
        assert!(folder.spec().expect("absent is no error").is_none());
    }

    #[test]
    fn files_are_replaced_whole_and_broken_ones_named() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let folder = Folder::at(parent.path().join("c1"));
        folder.create().expect("may be made");
        assert!(folder.exit().expect("absent is no error").is_none());
        for code in [3, 137] {
            folder
                .write_exit(&Exit {
                    code,
                    started: true,
                    finished: 1,
                })
                .expect("written");
            assert_eq!(folder.exit().expect("sound").expect("written").code, code);
        }
        fs::write(folder.path().join("shim.json"), b"{\"shim\":").expect("written");
        let error = folder.running().expect_err("half a file");
        assert!(error.to_string().contains("shim.json"), "{error}");
    }
}
