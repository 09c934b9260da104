//! The kernel's limit of neighbours, which all network namespaces of a machine share: 1,024 of each family by default, too few where
//! forty containers talk to each other.
//!
//! The agent raises it, writes down what it was first, and puts it back when the host leaves its cluster. In a network namespace that
//! is not the machine's first there is no such setting, and nothing is done: whoever rules the machine sets it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::Agent;

/// The hard limits (Documentation/networking/ip-sysctl.rst, `neigh/default/gc_thresh3`), by IP version.
const SETTINGS: [(&str, &str); 2] = [
    ("ipv4", "/proc/sys/net/ipv4/neigh/default/gc_thresh3"),
    ("ipv6", "/proc/sys/net/ipv6/neigh/default/gc_thresh3"),
];
/// What it is raised to: some 32 MiB of neighbours of each family, which one container could make the kernel keep.
const RAISED: u64 = 65_536;

/// Raises the limits that are lower. A second time is harmless.
pub(super) fn raise(agent: &Agent) {
    for (family, setting) in SETTINGS {
        let note = |before: u64| {
            agent.state.update(|state| {
                // What an earlier run of the agent found is what was there before any.
                let known = state.neighbor_limits.entry(family.to_owned());
                known.or_insert(before);
            })
        };
        if let Err(error) = raise_one(Path::new(setting), note) {
            tracing::warn!(
                "containers share the kernel's limit of neighbours, which stays as it is: {error:#}"
            );
        }
    }
}

/// Puts the limits back, where nobody has changed them since.
///
/// # Errors
/// When a limit cannot be written.
pub(super) fn restore(agent: &Agent) -> anyhow::Result<()> {
    let before = agent.state.read(|state| state.neighbor_limits.clone());
    for (family, setting) in SETTINGS {
        if let Some(before) = before.get(family) {
            restore_one(Path::new(setting), *before)?;
        }
    }
    if before.is_empty() {
        return Ok(());
    }
    agent.state.update(|state| state.neighbor_limits.clear())
}

/// The limits as they are, by IP version; none in a namespace that has no such setting.
pub(super) fn limits() -> BTreeMap<String, u64> {
    SETTINGS
        .into_iter()
        .filter_map(|(family, setting)| Some((family.to_owned(), read(Path::new(setting))?)))
        .collect()
}

fn raise_one(setting: &Path, note: impl FnOnce(u64) -> anyhow::Result<()>) -> anyhow::Result<()> {
    match read(setting) {
        Some(before) if before < RAISED => {
            note(before)?;
            write(setting, RAISED)
        }
        _ => Ok(()),
    }
}

fn restore_one(setting: &Path, before: u64) -> anyhow::Result<()> {
    match read(setting) {
        Some(RAISED) => write(setting, before),
        _ => Ok(()),
    }
}

fn read(setting: &Path) -> Option<u64> {
    fs::read_to_string(setting).ok()?.trim().parse().ok()
}

fn write(setting: &Path, value: u64) -> anyhow::Result<()> {
    fs::write(setting, value.to_string())
        .with_context(|| format!("cannot set {} to {value}", setting.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_raised_once_and_put_back_unless_somebody_changed_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let setting = dir.path().join("gc_thresh3");
        let set = |value: &str| fs::write(&setting, value).expect("a file");
        let mut noted = Vec::new();
        set("1024\n");
        for _ in 0..2 {
            let raised = raise_one(&setting, |before| {
                noted.push(before);
                Ok(())
            });
            raised.expect("it can be written");
        }
        assert_eq!((read(&setting), &noted[..]), (Some(RAISED), &[1024][..]));
        restore_one(&setting, 1024).expect("it can be written");
        assert_eq!(read(&setting), Some(1024));
        // Higher already, or set by somebody else meanwhile.
        set("1000000");
        raise_one(&setting, |_| panic!("nothing is to be noted")).expect("nothing to do");
        restore_one(&setting, 1024).expect("nothing to do");
        assert_eq!(read(&setting), Some(1_000_000));
    }

    #[test]
    fn what_cannot_be_noted_is_not_changed_and_an_absent_setting_is_fine() {
        let dir = tempfile::tempdir().expect("a folder");
        let setting = dir.path().join("gc_thresh3");
        raise_one(&setting, |_| panic!("there is none")).expect("nothing to do");
        restore_one(&setting, 1024).expect("nothing to do");
        assert!(!setting.exists());
        fs::write(&setting, "512").expect("a file");
        let full = raise_one(&setting, |_| anyhow::bail!("the disk is full"));
        assert!(full.is_err());
        assert_eq!(read(&setting), Some(512));
    }
}
