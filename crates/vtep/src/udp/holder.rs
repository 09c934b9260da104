//! Who has a UDP port: read from `/proc` and netlink, to name the cause when ours can't be bound.
//!
//! It only looks, and answers as well as it can: a socket may close, and a process end, between two looks.

use std::fmt;
use std::fs;
use std::net::IpAddr;

use netns::{Netlink, Netns};

/// What holds a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortHolder {
    /// A process has a socket on it.
    Process {
        /// Its process id, as this process sees it.
        pid: u32,
        /// Its name (`/proc/PID/comm`).
        command: String,
    },
    /// A vxlan device of the kernel in this namespace.
    VxlanDevice {
        /// The device.
        name: String,
    },
    /// A socket of the kernel without a device in this namespace: Swarm keeps its vxlan devices in namespaces of
    /// their own, their socket stays in the host's.
    Swarm,
    /// A socket of the kernel, and nothing more is known.
    Kernel,
    /// Nothing was found: it was gone when we looked.
    Unknown,
}

impl fmt::Display for PortHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command } if command == "towline" => {
                write!(f, "another towline agent (pid {pid}): stop it first")
            }
            Self::Process { pid, command } => {
                write!(f, "{command} (pid {pid}): stop it, or choose another port")
            }
            Self::VxlanDevice { name } => {
                write!(
                    f,
                    "the kernel's vxlan device {name}: remove it (`ip link del`), or choose another port"
                )
            }
            Self::Swarm => write!(
                f,
                "the kernel, most likely for Docker Swarm's overlay networks (dockerd is running): choose another port, or \
                 move Swarm's with `docker swarm init --data-path-port`"
            ),
            Self::Kernel => write!(
                f,
                "the kernel, for a vxlan device in another network namespace: choose another port"
            ),
            Self::Unknown => write!(f, "somebody who let go of it just now: try again"),
        }
    }
}

/// Looks for what keeps `vtep`:`port` from being bound in `netns`.
#[must_use]
pub fn find_holder(netns: &Netns, vtep: IpAddr, port: u16) -> PortHolder {
    let inodes = netns.run(|| socket_inodes(vtep, port)).unwrap_or_default();
    if let Some((pid, command)) = inodes.iter().find_map(|inode| process_with_socket(*inode)) {
        return PortHolder::Process { pid, command };
    }
    // A socket that no process has open is the kernel's.
    if let Some(name) = vxlan_device(netns, port) {
        return PortHolder::VxlanDevice { name };
    }
    if inodes.is_empty() {
        return PortHolder::Unknown;
    }
    if processes().any(|pid| command(pid) == "dockerd") {
        PortHolder::Swarm
    } else {
        PortHolder::Kernel
    }
}

/// Inodes of the sockets in the calling thread's namespace that stand in the way of `vtep`:`port`.
fn socket_inodes(vtep: IpAddr, port: u16) -> Vec<u64> {
    // `/proc/net` is the namespace of the process's first thread; `thread-self` is the caller's.
    ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| {
            table
                .lines()
                .filter_map(|line| parse_socket(line, vtep, port))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// One line of `/proc/net/udp`: the inode, when the socket's port is `port` and its address `vtep` or any.
fn parse_socket(line: &str, vtep: IpAddr, port: u16) -> Option<u64> {
    // sl local_address rem_address st tx:rx tr:tm->when retrnsmt uid timeout inode …
    let mut fields = line.split_ascii_whitespace();
    let (address, local_port) = fields.nth(1)?.split_once(':')?;
    let inode = fields.nth(7)?.parse().ok()?;
    if u16::from_str_radix(local_port, 16).ok()? != port {
        return None;
    }
    let words: Option<Vec<u8>> = (0..address.len() / 8)
        .map(|word| u32::from_str_radix(address.get(word * 8..word * 8 + 8)?, 16).ok())
        // Each 32-bit word of the address is printed as a number of the host's byte order.
        .map(|word| word.map(u32::to_ne_bytes))
        .collect::<Option<Vec<_>>>()
        .map(|words| words.concat());
    let words = words?;
    let any = words.iter().all(|byte| *byte == 0);
    let same = match vtep {
        IpAddr::V4(v4) => words == v4.octets(),
        IpAddr::V6(v6) => words == v6.octets(),
    };
    (any || same).then_some(inode)
}

/// The process that has this socket open, as far as our rights to look go.
fn process_with_socket(inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    let holds = |pid: &u32| {
        fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|descriptors| {
            descriptors.flatten().any(|entry| {
                fs::read_link(entry.path())
                    .is_ok_and(|target| target.as_os_str() == wanted.as_str())
            })
        })
    };
    processes().find(holds).map(|pid| (pid, command(pid)))
}

fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn command(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".to_owned(), |name| name.trim_end().to_owned())
}

/// The kernel's vxlan device on this port, if the namespace has one.
fn vxlan_device(netns: &Netns, port: u16) -> Option<String> {
    let links = Netlink::open(netns)
        .and_then(|netlink| netlink.links())
        .unwrap_or_default();
    links
        .into_iter()
        .find(|link| link.vxlan_port == Some(port))
        .map(|link| link.name)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    // Lines of a real table, cut behind the inode.
    const V4: &str = "  871: 010200C0:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 28411 2";
    const ANY: &str = "  871: 00000000:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 28412 2";
    const V6: &str = "  871: B80D0120020000000000000001000000:12B5 00000000000000000000000000000000:0000 07 \
                      00000000:00000000 00:00000000 00000000     0        0 28413 2";

    #[test]
    fn reads_the_kernels_table() {
        let v4 = "192.0.2.1".parse().unwrap();
        let v6 = "2001:db8:0:2::1".parse().unwrap();
        assert_eq!(parse_socket(V4, v4, 4789), Some(28411));
        assert_eq!(parse_socket(ANY, v4, 4789), Some(28412));
        assert_eq!(parse_socket(V6, v6, 4789), Some(28413));
        assert_eq!(parse_socket(V4, v4, 4790), None);
        assert_eq!(parse_socket(V4, "192.0.2.2".parse().unwrap(), 4789), None);
        assert_eq!(
            parse_socket("  sl  local_address rem_address   st", v4, 4789),
            None
        );
        assert_eq!(parse_socket("", v4, 4789), None);
    }

    #[test]
    fn names_this_very_process() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let holder = find_holder(&Netns::current().unwrap(), address.ip(), address.port());
        let PortHolder::Process { pid, command } = holder else {
            panic!("{holder:?}")
        };
        assert_eq!(pid, std::process::id());
        assert!(!command.is_empty());
    }
}
