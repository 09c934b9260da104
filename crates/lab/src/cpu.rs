//! Edge: CPU time of groups of processes, by control groups of either version, of single processes, and of ksoftirqd.
//!
//! Packets are also handled in whatever process was running when they came (softirq); Linux counts that time as that
//! process's, unless the kernel was built with CONFIG_IRQ_TIME_ACCOUNTING. What is put off runs in ksoftirqd.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use crate::name::LabName;
use crate::process::Process;

/// The unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture Towline runs on.
const TICK: Duration = Duration::from_millis(10);

/// A group of processes whose CPU time is counted.
#[derive(Debug)]
pub(crate) struct CpuGroup {
    path: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// `cpuacct.usage`, nanoseconds.
    V1,
    /// `cpu.stat`, `usage_usec`.
    V2,
}

impl CpuGroup {
    /// Makes the group `name` of a lab, or takes the one that is there.
    pub(crate) fn create(lab: &LabName, name: &str) -> anyhow::Result<Self> {
        let mounts =
            fs::read_to_string("/proc/self/mounts").context("can't read /proc/self/mounts")?;
        let (root, version) = hierarchies(&mounts).into_iter().next().context(
            "no control groups are mounted: mount cgroup2 at /sys/fs/cgroup to count CPU time",
        )?;
        let path = root.join(folder(lab)).join(name);
        fs::create_dir_all(&path).with_context(|| {
            format!(
                "can't make the control group {}: is /sys/fs/cgroup mounted read-only?",
                path.display()
            )
        })?;
        Ok(Self { path, version })
    }

    /// Moves a process with all its threads into the group.
    pub(crate) fn add(&self, pid: u32) -> anyhow::Result<()> {
        let path = self.path.join("cgroup.procs");
        match fs::write(&path, pid.to_string()) {
            // It has ended already.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other
                .with_context(|| format!("can't put process {pid} into {}", self.path.display())),
        }
    }

    /// CPU time that its processes have used since it was made, ended ones included.
    pub(crate) fn usage(&self) -> anyhow::Result<Duration> {
        let (file, parse): (_, fn(&str) -> Option<Duration>) = match self.version {
            Version::V1 => ("cpuacct.usage", |text| {
                text.trim().parse().ok().map(Duration::from_nanos)
            }),
            Version::V2 => ("cpu.stat", |text| {
                let value = text
                    .lines()
                    .find_map(|line| line.strip_prefix("usage_usec "))?;
                value.trim().parse().ok().map(Duration::from_micros)
            }),
        };
        let path = self.path.join(file);
        let text =
            fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
        parse(&text).with_context(|| format!("{} holds no CPU time", path.display()))
    }
}

/// Removes every group of the lab, in whatever hierarchy. Their processes must have ended.
pub(crate) fn remove_groups(lab: &LabName) -> anyhow::Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("can't read /proc/self/mounts")?;
    let mut any = false;
    for (root, _) in hierarchies(&mounts) {
        any |= remove_tree(&root.join(folder(lab)))?;
    }
    Ok(any)
}

/// Removes groups from the leaves up: their files can't be removed, only the folders.
fn remove_tree(path: &Path) -> anyhow::Result<bool> {
    let Ok(entries) = fs::read_dir(path) else {
        return Ok(false);
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        remove_tree(&entry.path())?;
    }
    // A killed process stays in its group until it is reaped, which is soon.
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("can't remove the control group {}", path.display()));
            }
        }
    }
    anyhow::bail!(
        "the control group {} still has processes: see its cgroup.procs",
        path.display()
    )
}

fn folder(lab: &LabName) -> String {
    format!("towline-lab-{lab}")
}

/// Where CPU time can be counted: the cpuacct hierarchy, then the unified one.
fn hierarchies(mounts: &str) -> Vec<(PathBuf, Version)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(path), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        match kind {
            "cgroup" if options.split(',').any(|option| option == "cpuacct") => {
                found.insert(0, (PathBuf::from(path), Version::V1));
            }
            "cgroup2" => found.push((PathBuf::from(path), Version::V2)),
            _ => {}
        }
    }
    found
}

/// CPU time of all ksoftirqd threads since boot.
pub(crate) fn ksoftirqd() -> Duration {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .as_encoded_bytes()
                .first()
                .is_some_and(u8::is_ascii_digit)
        })
        .filter(|entry| {
            fs::read(entry.path().join("comm")).is_ok_and(|comm| comm.starts_with(b"ksoftirqd/"))
        })
        .filter_map(|entry| thread_time(&entry.path()))
        .sum()
}

/// CPU time of processes with all their threads; of one that has ended, nothing.
pub(crate) fn of_processes(processes: &[Process]) -> Duration {
    processes
        .iter()
        .filter_map(|process| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
            ticks(&stat)
        })
        .sum()
}

/// CPU time of one thread: in nanoseconds where the kernel tells, else in ticks.
fn thread_time(path: &Path) -> Option<Duration> {
    if let Ok(text) = fs::read_to_string(path.join("schedstat")) {
        return text
            .split(' ')
            .next()?
            .parse()
            .ok()
            .map(Duration::from_nanos);
    }
    ticks(&fs::read_to_string(path.join("stat")).ok()?)
}

/// CPU time in a stat file of /proc: a thread's, or a whole process's.
fn ticks(stat: &str) -> Option<Duration> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    // Fields 14 and 15 of all: time in user mode and in the kernel.
    let (user, system): (u32, u32) = (
        fields.nth(14 - 3)?.parse().ok()?,
        fields.next()?.parse().ok()?,
    );
    Some(TICK * user.checked_add(system)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      proc /proc proc rw 0 0\n";
        assert_eq!(
            hierarchies(mounts),
            [
                (PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"), Version::V1),
                (PathBuf::from("/sys/fs/cgroup/unified"), Version::V2),
            ]
        );
        assert_eq!(
            hierarchies("cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0").len(),
            1
        );
        assert!(hierarchies("").is_empty());
    }

    #[test]
    fn each_version_is_read_in_its_unit() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpuacct.usage"), "1500000\n").unwrap();
        fs::write(
            dir.path().join("cpu.stat"),
            "usage_usec 2500\nuser_usec 1\n",
        )
        .unwrap();
        let group = |version| CpuGroup {
            path: dir.path().to_owned(),
            version,
        };
        assert_eq!(
            group(Version::V1).usage().unwrap(),
            Duration::from_micros(1500)
        );
        assert_eq!(
            group(Version::V2).usage().unwrap(),
            Duration::from_micros(2500)
        );
        fs::write(dir.path().join("cpu.stat"), "").unwrap();
        assert!(
            group(Version::V2)
                .usage()
                .unwrap_err()
                .to_string()
                .contains("cpu.stat")
        );
    }

    #[test]
    fn a_threads_time_is_read() {
        let own = thread_time(Path::new("/proc/self")).unwrap();
        assert!(own < Duration::from_secs(600));
        let dir = tempfile::tempdir().unwrap();
        let stat = "9 (ksoftirqd/0) S 2 0 0 0 -1 69238848 0 0 0 0 3 4 0 0 20 0 1 0 2 0 0";
        fs::write(dir.path().join("stat"), stat).unwrap();
        assert_eq!(thread_time(dir.path()), Some(Duration::from_millis(70)));
    }
}
