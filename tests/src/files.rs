//! Files of this host for tests of mounts and volumes.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A folder of the host, with `file` in it.
#[must_use]
pub fn folder() -> TempDir {
    let folder = tempfile::Builder::new()
        .prefix("towline-mounts-")
        .tempdir()
        .unwrap();
    fs::write(folder.path().join("file"), "from the host\n").unwrap();
    folder
}

/// Mount points of this process' own namespace, which is the host's.
fn host_mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = |line: &str| line.split(' ').nth(4).unwrap().to_owned();
    text.lines().map(point).collect()
}

/// Whether something is mounted at or below `path` on the host.
#[must_use]
pub fn is_mounted(path: &Path) -> bool {
    host_mounts()
        .iter()
        .any(|point| Path::new(point).starts_with(path))
}

/// A filesystem in memory on the host, for as long as the value lives.
pub struct Mounted(PathBuf);

impl Mounted {
    /// At this folder.
    #[must_use]
    pub fn tmpfs(path: &Path) -> Self {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", path, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}
