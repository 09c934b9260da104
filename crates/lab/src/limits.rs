//! The kernel's limit of neighbours, which all namespaces of a machine share: 1,024 of each family by default, too few
//! where every one of 40 containers talks to every other.
//!
//! A lab that needs more raises it. What it was stands in a file beside the labs' folders, written first, and is put
//! back when the last lab goes. In a network namespace that isn't the machine's first there is no such setting to
//! change, and nothing is done.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;

/// The hard limits (Documentation/networking/ip-sysctl.rst, `neigh/default/gc_thresh3`).
const SETTINGS: [&str; 2] = [
    "/proc/sys/net/ipv4/neigh/default/gc_thresh3",
    "/proc/sys/net/ipv6/neigh/default/gc_thresh3",
];
/// In the labs' common folder; no lab's name begins with a dot.
const FILE: &str = ".neighbor-limits.json";
/// As many as are worth having: half a GiB of them.
const MOST: u64 = 1 << 20;

/// Makes room for the neighbours of this many containers that all talk to each other, and of their hosts.
pub(crate) fn raise(root: &Path, hosts: u16, containers: u64) -> anyhow::Result<()> {
    raise_in(root, &SETTINGS.map(Path::new), need(hosts, containers))
}

/// Puts back what [`raise`] has changed, if it has.
pub(crate) fn restore(root: &Path) -> anyhow::Result<()> {
    let file = root.join(FILE);
    for (setting, old) in read(&file) {
        fs::write(&setting, old.to_string())
            .with_context(|| format!("can't put {setting} back to {old}"))?;
    }
    match fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

fn need(hosts: u16, containers: u64) -> u64 {
    let hosts = u64::from(hosts);
    // Every container: every other, two gateways and the router; every host: its containers, the router, the others.
    (containers * (containers + 4) + hosts * (hosts + 2)).min(MOST)
}

fn raise_in(root: &Path, settings: &[&Path], need: u64) -> anyhow::Result<()> {
    let file = root.join(FILE);
    for setting in settings {
        let value = fs::read_to_string(setting)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok());
        let Some(value) = value.filter(|&value| value < need) else {
            continue;
        };
        let mut saved = read(&file);
        // An earlier lab's note is of what was there before any.
        saved.entry(setting.display().to_string()).or_insert(value);
        let text = serde_json::to_vec(&saved).context("numbers by name are plain data")?;
        fs::write(&file, text).with_context(|| format!("can't write {}", file.display()))?;
        fs::write(setting, need.to_string())
            .with_context(|| format!("can't raise {} to {need}", setting.display()))?;
    }
    Ok(())
}

fn read(file: &Path) -> BTreeMap<String, u64> {
    serde_json::from_slice(&fs::read(file).unwrap_or_default()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_labs_change_nothing() {
        assert!(need(3, 6) < 1024 && need(10, 20) < 1024);
        assert!(need(20, 60) > 3600);
        assert_eq!(need(200, 40_000), MOST);
    }

    #[test]
    fn what_was_there_before_the_first_lab_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let setting = dir.path().join("gc_thresh3");
        fs::write(&setting, "1024\n").unwrap();
        let value = || fs::read_to_string(&setting).unwrap().trim().to_owned();
        let absent = dir.path().join("absent");
        let raise = |need| raise_in(dir.path(), &[&setting, &absent], need).unwrap();
        raise(1000);
        assert!(value() == "1024" && !dir.path().join(FILE).exists());
        raise(5000);
        raise(9000);
        assert_eq!(value(), "9000");
        restore(dir.path()).unwrap();
        assert!(value() == "1024" && !dir.path().join(FILE).exists());
        restore(dir.path()).unwrap();
        assert!(!absent.exists());
    }
}
