//! Labs of a test's own: `towline lab` by its commands, and what must be left of one that went.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use netns::Netns;
use serde_json::Value;

use crate::{require_root, towline_bin, unique};

/// A lab of this test alone, taken down when the value goes.
pub struct Lab {
    /// Its name.
    pub name: String,
}

impl Lab {
    /// A name; nothing is up yet.
    #[must_use]
    pub fn new() -> Self {
        require_root();
        Self {
            name: unique("tl-"),
        }
    }

    /// A lab that is up.
    #[must_use]
    pub fn up(options: &str) -> Self {
        let lab = Self::new();
        lab.done("up", options);
        lab
    }

    /// A command of this lab, with options split at spaces.
    #[must_use]
    pub fn command(&self, command: &str, options: &str) -> Command {
        let mut words = Command::new(towline_bin());
        words
            .args(["lab", command, "--name", &self.name])
            .args(options.split_whitespace());
        words
    }

    /// What a command did that may fail.
    #[must_use]
    pub fn try_run(&self, command: &str, options: &str) -> Output {
        self.command(command, options).output().unwrap()
    }

    /// Runs a command that must do what it is asked, and returns what it printed.
    pub fn done(&self, command: &str, options: &str) -> String {
        let output = self.try_run(command, options);
        assert!(
            output.status.success(),
            "lab {command} {options}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same with `--json`, as it is read.
    pub fn json(&self, command: &str, options: &str) -> Value {
        serde_json::from_str(&self.done(command, &format!("{options} --json"))).unwrap()
    }

    /// Runs a command that must fail with exit code 1 and one line, which is returned.
    #[must_use]
    pub fn refused(&self, command: &str, options: &str) -> String {
        one_line(&self.try_run(command, options), 1)
    }

    /// A host, a container, the switch or the outside.
    #[must_use]
    pub fn part(&self, part: &str) -> String {
        format!("{}-{part}", self.name)
    }

    /// Where root's labs keep what they remember.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Path::new("/run/towline-lab").join(&self.name)
    }

    /// Everything on the machine that carries the lab's name.
    #[must_use]
    pub fn traces(&self) -> Vec<String> {
        let mut traces: Vec<String> = Netns::list().unwrap();
        traces.retain(|name| name.starts_with(&self.part("")));
        if self.folder().exists() {
            traces.push(self.folder().display().to_string());
        }
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            // The command that started them names the lab too, but it has ended.
            if line.contains(&format!("{}/", self.folder().display()))
                || line.contains(&self.part("h"))
            {
                traces.push(format!("process {:?}: {line}", entry.file_name()));
            }
        }
        for hierarchy in [
            "/sys/fs/cgroup/cpuacct",
            "/sys/fs/cgroup/unified",
            "/sys/fs/cgroup",
        ] {
            let group = Path::new(hierarchy).join(format!("towline-lab-{}", self.name));
            if group.exists() {
                traces.push(group.display().to_string());
            }
        }
        traces
    }

    /// Nothing carries its name any more.
    pub fn assert_gone(&self) {
        assert_eq!(self.traces(), Vec::<String>::new());
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.try_run("down", "");
        if !output.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Asserts that a command failed with this code and one line on stderr, and returns the line.
#[must_use]
pub fn one_line(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(output.stdout, b"", "results only are on stdout");
    said
}

/// The pairs of one list of `lab ping --json`, every ping of which was answered.
#[must_use]
pub fn pairs(report: &Value, list: &str, count: u64) -> BTreeSet<(String, String)> {
    let lines = report[list].as_array().unwrap();
    for line in lines {
        assert_eq!(line["sent"], count, "{line}");
        assert_eq!(line["received"], count, "{line}");
        let rtt = |name: &str| line["rtt_us"][name].as_u64().unwrap();
        assert!(
            rtt("min") <= rtt("p50") && rtt("p50") <= rtt("p99"),
            "{line}"
        );
    }
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let set: BTreeSet<_> = lines
        .iter()
        .map(|line| (text(&line["from"]), text(&line["to"])))
        .collect();
    assert_eq!(set.len(), lines.len(), "each pair once");
    set
}
