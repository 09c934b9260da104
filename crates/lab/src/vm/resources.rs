//! What virtual machines take of this machine, asked for before any is started.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use anyhow::{Context, bail};

use super::machine::{GROUP, QEMU};

/// Most virtual machines of one lab: each takes a core while it is busy.
const MAX_MACHINES: u16 = 16;
/// MiB that QEMU itself takes, beside a guest's memory.
const QEMU_MEMORY: u64 = 160;
/// Where ports are looked for that nobody has.
const FIRST_PORTS: [u16; 8] = [42000, 42100, 42200, 42300, 42400, 42500, 42600, 42700];

/// Refuses before anything has changed.
pub(crate) fn check(machines: u16, memory: u16) -> anyhow::Result<()> {
    if machines > MAX_MACHINES {
        bail!(
            "{machines} virtual machines are too many for one machine: use --vms {MAX_MACHINES} or fewer, and namespaces for the rest"
        );
    }
    crate::require_tool(QEMU, "qemu-system-x86")?;
    let text = fs::read_to_string("/proc/meminfo").context("can't read /proc/meminfo")?;
    let free = available(&text).context("/proc/meminfo has no MemAvailable")?;
    let need = u64::from(machines) * (u64::from(memory) + QEMU_MEMORY);
    if need > free {
        bail!(
            "{machines} virtual machines of {memory} MiB need {need} MiB of memory, {free} MiB are free: use fewer, or a smaller --memory"
        );
    }
    Ok(())
}

/// MiB that can be had, of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes / 1024)
}

/// The first of the ports of loopback that these machines take: the one that was asked for, else the first range that is
/// free.
pub(crate) fn choose_ports(wanted: Option<u16>, machines: u16) -> anyhow::Result<u16> {
    if let Some(first) = wanted {
        return match taken(first, machines) {
            None => Ok(first),
            Some(port) => bail!(
                "port {port} of loopback is taken, and the virtual machines need {first} to {}: give another --first-port",
                u32::from(first) + u32::from(machines)
            ),
        };
    }
    FIRST_PORTS
        .into_iter()
        .find(|&first| taken(first, machines).is_none())
        .with_context(|| {
            format!(
                "no range of {} ports of loopback from {} to {} is free: give another --first-port",
                machines + 1,
                FIRST_PORTS[0],
                FIRST_PORTS[FIRST_PORTS.len() - 1] + machines
            )
        })
}

/// A port of the range that somebody has: the underlay's by UDP is the first, each machine's by TCP follows.
fn taken(first: u16, machines: u16) -> Option<u16> {
    // QEMU shares its port with others of the same group; here it is asked for alone.
    if UdpSocket::bind((GROUP, first)).is_err() {
        return Some(first);
    }
    (1..=machines).find_map(|number| match first.checked_add(number) {
        Some(port) if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() => None,
        other => Some(other.unwrap_or(first)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_and_another_range_is_found() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = choose_ports(Some(port - 1), 2).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port} ")), "{error}");
        assert!(error.contains("--first-port"), "{error}");
        // The underlay's own, which is the first.
        let underlay = UdpSocket::bind((GROUP, 0)).unwrap();
        let port = underlay.local_addr().unwrap().port();
        let error = choose_ports(Some(port), 1).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port} ")), "{error}");
        assert!(choose_ports(Some(65535), 2).is_err());
        let found = choose_ports(None, 2).unwrap();
        assert!(FIRST_PORTS.contains(&found));
    }

    #[test]
    fn memory_that_is_not_there_is_not_promised() {
        let text = "MemTotal: 1 kB\nMemAvailable:    2048000 kB\n";
        assert_eq!(available(text), Some(2000));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        let error = check(MAX_MACHINES + 1, 1).unwrap_err().to_string();
        assert!(error.contains("too many"), "{error}");
    }
}
