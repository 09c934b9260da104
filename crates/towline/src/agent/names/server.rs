//! One container's questions, by UDP and TCP.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use discovery::names::{Reply, ResponseCode, Transport, answer, failure, truncated};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Asker, IN_FLIGHT, IN_FLIGHT_CROWDED, IN_FLIGHT_OF_ALL, Shared, upstream};

/// The longest question: one name, and what EDNS adds.
const QUERY_MAX: usize = 4096;
/// Connections of one container; above, the next waits to be taken.
const CONNECTIONS: usize = 64;
/// How long a connection may say nothing (RFC 7766 §6.2.3 leaves it to the server), or not read.
const IDLE: Duration = Duration::from_secs(10);
/// The wait after the kernel could not give a question: it may be out of memory.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until it is aborted, and everything it has begun with it.
pub(super) async fn serve(
    shared: Arc<Shared>,
    asker: Arc<Asker>,
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
) {
    let sockets = UdpSocket::from_std(udp).and_then(|udp| Ok((udp, TcpListener::from_std(tcp)?)));
    let (udp, tcp) = match sockets {
        Ok(sockets) => sockets,
        Err(error) => {
            let place = &asker.netns;
            return tracing::warn!("names are not answered in {place}: {error}");
        }
    };
    tokio::join!(
        datagrams(&shared, &asker, Arc::new(udp)),
        connections(&shared, &asker, tcp)
    );
}

async fn datagrams(shared: &Arc<Shared>, asker: &Arc<Asker>, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; QUERY_MAX];
    let mut waiting = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            Some(_) = waiting.join_next() => continue,
        };
        let (length, from) = match received {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("questions from {} can't be read: {error}", asker.netns);
                sleep(PAUSE).await;
                continue;
            }
        };
        let query = &buffer[..length];
        match shared.decide(asker, query, Transport::Udp) {
            Decision::Say(reply) => say(&socket, &reply, from).await,
            Decision::Nothing => {}
            Decision::Ask { limit, permits } => {
                let (shared, asker) = (Arc::clone(shared), Arc::clone(asker));
                let (socket, query) = (Arc::clone(&socket), query.to_vec());
                waiting.spawn(async move {
                    let reply = shared.ask(&asker, &query, Transport::Udp, limit).await;
                    say(&socket, &reply, from).await;
                    drop(permits);
                });
            }
        }
    }
}

async fn say(socket: &UdpSocket, reply: &[u8], to: SocketAddr) {
    if let Err(error) = socket.send_to(reply, to).await {
        // Who asked has gone, or has no room: it asks again.
        tracing::trace!("an answer to {to} is lost: {error}");
    }
}

async fn connections(shared: &Arc<Shared>, asker: &Arc<Asker>, listener: TcpListener) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if open.len() < CONNECTIONS => accepted,
            Some(_) = open.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let (shared, asker) = (Arc::clone(shared), Arc::clone(asker));
                open.spawn(async move {
                    if let Err(error) = connection(&shared, &asker, stream).await {
                        tracing::trace!("a connection in {} ended: {error}", asker.netns);
                    }
                });
            }
            Err(error) => {
                tracing::debug!("connections in {} can't be taken: {error}", asker.netns);
                sleep(PAUSE).await;
            }
        }
    }
}

/// One question after the other, each with its length in front (RFC 1035 §4.2.2).
async fn connection(shared: &Shared, asker: &Asker, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let query = match timeout(IDLE, read(&mut stream)).await {
            Ok(Ok(query)) => query,
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        let reply = match shared.decide(asker, &query, Transport::Tcp) {
            Decision::Say(reply) => reply,
            Decision::Nothing => return Ok(()),
            Decision::Ask { limit, permits } => {
                let reply = shared.ask(asker, &query, Transport::Tcp, limit).await;
                drop(permits);
                reply
            }
        };
        timeout(IDLE, write(&mut stream, &reply)).await??;
    }
}

/// A message with its length in front.
pub(super) async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    read_at_most(stream, QUERY_MAX).await
}

/// The same of any length that can be said.
pub(super) async fn read_at_most(stream: &mut TcpStream, max: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes, and {max} is the most"),
        ));
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message with its length in front, as one piece.
pub(super) async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a message above 65,535 bytes"))?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// What is to be done about a question.
enum Decision {
    Say(Vec<u8>),
    Nothing,
    /// Ask upstream; of how many wait, this is one.
    Ask {
        limit: usize,
        permits: [OwnedSemaphorePermit; 2],
    },
}

impl Shared {
    fn decide(&self, asker: &Asker, query: &[u8], transport: Transport) -> Decision {
        let counters = &self.counters;
        counters.queries.fetch_add(1, Ordering::Relaxed);
        let keep_single = asker
            .dns
            .keeps_single()
            .unwrap_or_else(|| self.upstreams.keep_single());
        let reply = answer(
            query,
            &self.zones(),
            &asker.networks(),
            transport,
            keep_single,
        );
        match reply {
            Reply::Answer(reply) => {
                counters.answered.fetch_add(1, Ordering::Relaxed);
                Decision::Say(reply)
            }
            Reply::Nothing => Decision::Nothing,
            Reply::Forward { limit } => {
                let waiting = IN_FLIGHT - asker.in_flight.available_permits();
                let crowded = self.in_flight.available_permits() < IN_FLIGHT_OF_ALL / 2;
                if crowded && waiting >= IN_FLIGHT_CROWDED {
                    counters.refused.fetch_add(1, Ordering::Relaxed);
                    return Decision::Say(failure(query, ResponseCode::Refused));
                }
                let own = Arc::clone(&asker.in_flight).try_acquire_owned();
                let of_all = Arc::clone(&self.in_flight).try_acquire_owned();
                let (Ok(own), Ok(of_all)) = (own, of_all) else {
                    counters.refused.fetch_add(1, Ordering::Relaxed);
                    return Decision::Say(failure(query, ResponseCode::Refused));
                };
                counters.forwarded.fetch_add(1, Ordering::Relaxed);
                Decision::Ask {
                    limit,
                    permits: [own, of_all],
                }
            }
        }
    }

    /// Somebody else's answer, or that there is none.
    async fn ask(
        &self,
        asker: &Asker,
        query: &[u8],
        transport: Transport,
        limit: usize,
    ) -> Vec<u8> {
        match upstream::ask(self, asker, query, transport).await {
            Some(reply) => truncated(query, reply, limit),
            None => {
                self.counters.failed.fetch_add(1, Ordering::Relaxed);
                failure(query, ResponseCode::ServFail)
            }
        }
    }
}
