//! A host's own `/etc`, so that a test may replace its files and this machine's stay.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// A mount namespace with a copy of this machine's `/etc`. It goes with the value.
pub struct OwnEtc {
    /// Sleeps in it.
    keeper: Child,
    folder: TempDir,
}

impl OwnEtc {
    /// Makes it.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn new() -> Self {
        crate::require_root();
        let folder = tempfile::Builder::new()
            .prefix("towline-etc-")
            .tempdir()
            .expect("a folder");
        // All other mounts are shared with this namespace: names of network namespaces come and go in both.
        let script = format!(
            "set -e; mount --make-private /; cp -a /etc {0}; mount --bind {0}/etc /etc; echo made; exec sleep infinity",
            folder.path().display()
        );
        let mut keeper = Command::new("unshare")
            .args(["--mount", "--propagation", "unchanged", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut said = String::new();
        let output = keeper.stdout.take().expect("it was asked for");
        BufReader::new(output)
            .read_line(&mut said)
            .expect("it says something");
        let made = Self { keeper, folder };
        assert_eq!(said, "made\n", "an /etc of its own");
        made
    }

    /// A program that sees it, ready to be given arguments.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let keeper = self.keeper.id().to_string();
        command.args(["--target", &keeper, "--mount", "--"]);
        command.arg(program);
        command
    }

    /// Where this test finds a file of it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("etc").join(name)
    }
}

impl Default for OwnEtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for OwnEtc {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
