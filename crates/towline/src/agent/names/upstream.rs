//! Whom names are asked for that are none of ours: the container's own servers (`run --dns`), or the host's.
//!
//! They are asked from the container's namespace, through the gateway bridge, each with a socket of its own: so its port is random
//! and only that server's packets arrive. A server of the host's own loopback addresses exists nowhere else; it is asked from the
//! host's namespace, but never for a container that has no way out.

use std::fs;
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use discovery::names::{Transport, answers, is_last_word};
use netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout;

use super::server::{read_at_most, write};
use super::{Asker, Shared, lock};
use crate::shim::dns::Dns;

/// Servers that are asked, in their order.
const SERVERS: usize = 3;
/// How long each is waited for.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long the host's file is taken as it was read.
const FRESH: Duration = Duration::from_secs(1);
/// So much of it.
const FILE_MAX: u64 = 1 << 16;
/// The longest answer.
const ANSWER_MAX: usize = 65_535;
/// What the host's file says, read again when it is a second old.
#[derive(Debug)]
pub(super) struct HostServers {
    file: PathBuf,
    read: Mutex<Option<(Instant, Arc<Dns>)>>,
}

impl HostServers {
    /// Nothing is read before somebody asks.
    pub(super) fn new(file: PathBuf) -> Self {
        Self {
            file,
            read: Mutex::default(),
        }
    }

    fn servers(&self) -> Arc<Dns> {
        let mut read = lock(&self.read);
        match &*read {
            Some((at, dns)) if at.elapsed() < FRESH => Arc::clone(dns),
            _ => {
                let dns = Arc::new(host(&self.file));
                *read = Some((Instant::now(), Arc::clone(&dns)));
                dns
            }
        }
    }

    /// Whether a name without a dot is no other server's matter.
    pub(super) fn keep_single(&self) -> bool {
        self.servers().keeps_single().unwrap_or(false)
    }
}

/// What the host's file says; nothing where there is none.
pub(super) fn host(file: &Path) -> Dns {
    let mut text = Vec::new();
    // A pipe in its place does not make anybody wait, nor one without an end.
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(file);
    if let Ok(opened) = opened
        && opened.metadata().is_ok_and(|metadata| metadata.is_file())
    {
        // What can't be read to its end is taken as far as it goes.
        let _ = opened.take(FILE_MAX).read_to_end(&mut text);
    }
    parse(&String::from_utf8_lossy(&text))
}

/// A `resolv.conf`, as resolv.conf(5) says: the last `search` or `domain` counts, what is not understood is passed over.
fn parse(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                dns.servers
                    .extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()));
            }
            Some("search" | "domain") => dns.search = words.map(str::to_owned).collect(),
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    dns
}

/// The first answer that is one.
pub(super) async fn ask(
    shared: &Shared,
    asker: &Asker,
    query: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let own = !asker.dns.servers.is_empty();
    let of_host = shared.upstreams.servers();
    let servers = if own {
        &asker.dns.servers
    } else {
        &of_host.servers
    };
    for server in servers.iter().take(SERVERS) {
        let netns = if !own && server.is_loopback() {
            if !asker.gateway.load(Ordering::Relaxed) {
                continue;
            }
            &shared.host
        } else {
            &asker.netns
        };
        let server = SocketAddr::new(*server, 53);
        let asked = timeout(PATIENCE, ask_one(netns, server, query, transport)).await;
        match asked {
            Ok(Ok(reply)) if is_last_word(&reply) => return Some(reply),
            Ok(Ok(_)) => tracing::debug!("{server} failed to answer {}", asker.netns),
            Ok(Err(error)) => {
                tracing::debug!("{server} can't be asked for {}: {error}", asker.netns)
            }
            Err(_) => tracing::debug!("{server} does not answer {}", asker.netns),
        }
    }
    None
}

async fn ask_one(
    netns: &Netns,
    server: SocketAddr,
    query: &[u8],
    transport: Transport,
) -> io::Result<Vec<u8>> {
    // A number that nobody can guess who does not see it.
    let mut asked = query.to_vec();
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(|error| io::Error::other(error.to_string()))?;
    asked[..2].copy_from_slice(&id);
    let mut reply = match transport {
        Transport::Udp => by_udp(netns, server, &asked).await?,
        Transport::Tcp => by_tcp(netns, server, &asked).await?,
    };
    reply[..2].copy_from_slice(&query[..2]);
    Ok(reply)
}

async fn by_udp(netns: &Netns, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = open(netns, server, Type::DGRAM, Protocol::UDP).await?;
    // Now packets of nobody else arrive.
    socket.connect(&server.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(query).await?;
    loop {
        // Thousands may wait: memory for an answer only when there is one.
        socket.readable().await?;
        let mut buffer = vec![0; ANSWER_MAX];
        let length = match socket.try_recv(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            received => received?,
        };
        if answers(query, &buffer[..length]) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn by_tcp(netns: &Netns, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = open(netns, server, Type::STREAM, Protocol::TCP).await?;
    let socket = TcpSocket::from_std_stream(socket.into());
    let mut stream = socket.connect(server).await?;
    write(&mut stream, query).await?;
    let reply = read_at_most(&mut stream, ANSWER_MAX).await?;
    if answers(query, &reply) {
        return Ok(reply);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "an answer to another question",
    ))
}

/// A socket of that namespace, on a port that the kernel chooses at random.
async fn open(
    netns: &Netns,
    server: SocketAddr,
    kind: Type,
    protocol: Protocol,
) -> io::Result<Socket> {
    let netns = netns.clone();
    let opened = tokio::task::spawn_blocking(move || {
        netns.run(|| {
            let socket = Socket::new(Domain::for_address(server), kind, Some(protocol))?;
            socket.set_nonblocking(true)?;
            let any: IpAddr = match server {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            socket.bind(&SocketAddr::new(any, 0).into())?;
            Ok(socket)
        })
    });
    opened
        .await
        .map_err(io::Error::other)?
        .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_servers() {
        let dns = parse(
            "# made by hand\nnameserver 192.0.2.53\nnameserver ::1 \nnameserver fe80::1%eth0\nnameserver nonsense\nnameserver\n\
             domain a.example\nsearch b.example c.example\noptions ndots:2 rotate\n;nameserver 9.9.9.9\noptions edns0",
        );
        let servers: Vec<String> = dns.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.53", "::1"]);
        assert_eq!(dns.search, ["b.example", "c.example"]);
        assert_eq!(dns.options, ["ndots:2", "rotate", "edns0"]);
        assert_eq!(dns.keeps_single(), Some(true));
        assert_eq!(parse("").keeps_single(), None);
        assert_eq!(parse("options ndots:0").keeps_single(), Some(false));
    }
}
