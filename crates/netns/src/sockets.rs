//! TCP sockets of one namespace, whoever has them: what connections stand, whatever the packet filter makes of their packets.
//!
//! Read from `/proc/net/tcp` and `tcp6` (`net/ipv4/tcp_ipv4.c`, `tcp4_seq_show`), which show the namespace of the *thread* that opens them,
//! hence a thread inside the namespace.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufReader};
use std::net::{IpAddr, SocketAddr};

use procfs_core::net::{TcpNetEntries, TcpNetEntry, TcpState};
use procfs_core::{ExplicitSystemInfo, FromBufReadSI};

use crate::{Netns, NetnsError};

/// The TCP sockets of a namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpSockets {
    /// Ports that a socket listens on.
    pub listening: HashSet<u16>,
    /// Connections over which data may still come or go.
    pub open: Vec<TcpConnection>,
}

/// One connection, as its socket knows it. IPv4 that an IPv6 socket serves is IPv4 here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TcpConnection {
    /// This side.
    pub local: SocketAddr,
    /// The other side.
    pub remote: SocketAddr,
}

impl TcpSockets {
    /// Those of `netns` now.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel's tables cannot be read.
    pub fn of(netns: &Netns) -> Result<Self, NetnsError> {
        let read = netns.run(|| -> io::Result<Vec<TcpNetEntry>> {
            let mut entries = read("/proc/thread-self/net/tcp")?;
            match read("/proc/thread-self/net/tcp6") {
                Ok(v6) => entries.extend(v6),
                // A host without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            Ok(entries)
        })?;
        let entries = read.map_err(|cause| NetnsError::Refused {
            operation: "read the TCP sockets".to_owned(),
            cause,
        })?;
        Ok(Self::from_entries(&entries))
    }

    fn from_entries(entries: &[TcpNetEntry]) -> Self {
        let mut sockets = Self::default();
        for entry in entries {
            let local = plain(entry.local_address);
            let open = match entry.state {
                TcpState::Listen => {
                    sockets.listening.insert(local.port());
                    false
                }
                TcpState::Established
                | TcpState::FinWait1
                | TcpState::CloseWait
                | TcpState::LastAck
                | TcpState::Closing => true,
                // What we sent has arrived; who still reads has the socket open.
                TcpState::FinWait2 => entry.inode != 0,
                // Not accepted yet, or over.
                _ => false,
            };
            if open {
                let remote = plain(entry.remote_address);
                sockets.open.push(TcpConnection { local, remote });
            }
        }
        sockets
    }
}

fn read(path: &str) -> io::Result<Vec<TcpNetEntry>> {
    let file = fs::File::open(path)?;
    // Of these the tables' reader asks for the order of bytes alone.
    let system = ExplicitSystemInfo {
        boot_time_secs: 0,
        ticks_per_second: 0,
        page_size: 0,
        is_little_endian: cfg!(target_endian = "little"),
    };
    let entries = TcpNetEntries::from_buf_read(BufReader::new(file), &system);
    entries
        .map(|entries| entries.0)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {error}")))
}

fn plain(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn now() -> TcpSockets {
        TcpSockets::of(&Netns::current().expect("every thread has one")).expect("readable")
    }

    #[test]
    fn connections_are_seen_from_their_first_to_their_last() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(at).expect("a port is free");
            let to = listener.local_addr().expect("bound");
            let client = TcpStream::connect(to).expect("it listens");
            let (server, from) = listener.accept().expect("it came");
            let sockets = now();
            assert!(sockets.listening.contains(&to.port()));
            let (local, remote) = (to, from);
            assert!(sockets.open.contains(&TcpConnection { local, remote }));
            drop(server);
            drop(client);
            let own = |connection: &TcpConnection| connection.local == to;
            // The kernel may take its last packets a moment later.
            let deadline = Instant::now() + Duration::from_secs(30);
            while now().open.iter().any(own) {
                assert!(Instant::now() < deadline, "over, but for TIME_WAIT");
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn an_ipv4_client_of_an_ipv6_socket_is_ipv4() {
        let listener = TcpListener::bind("[::]:0").expect("a port is free");
        let port = listener.local_addr().expect("bound").port();
        let client = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        let remote = client.local_addr().expect("connected");
        let local = SocketAddr::new([127, 0, 0, 1].into(), port);
        assert!(now().open.contains(&TcpConnection { local, remote }));
    }
}
