//! Where connections come in, and what they must show.
//!
//! Everything is TLS ([`crate::tls`]). Who shows a host's certificate may say hello and is that host from then on; who shows none
//! may ask for one with a token's secret, gets one answer, and is gone. A connection is *pending* until it is known to be a
//! host's: pending ones are few (`pending.rs`), say little, and end after [`HELLO_PATIENCE`].

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::pending::PendingRoom;
use super::refusals::reject;
use super::turns::{Input, Room};
use super::{ManagerError, Signer, TICK, lock};
use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo};
use crate::limits::{
    CONNECTIONS_MAX, CONNECTIONS_PER_ADDRESS, FRAME_MAX, HELLO_MAX, HELLO_PATIENCE,
    INPUT_BYTES_MAX, INPUT_BYTES_OF_ONE, MESSAGE_OVERHEAD, UNSENT_MAX,
};
use crate::manager::{Connection, Rank};
use crate::message::{MessageError, ToManager, VERSION};
use crate::pki::{Certificate, Identity, Role};
use crate::tls;
use crate::token::Secret;
use crate::transport::{Backlog, Outbox, read_frame, write_frame};

/// The wait between two new certificates of the manager's own, should its clock never be content.
const RENEWAL_WAIT: Duration = Duration::from_secs(60);

/// The listening side of a manager.
pub(super) struct Door {
    host: HostId,
    signer: Signer,
    lock: Mutex<Lock>,
    inputs: mpsc::Sender<Input>,
    pending: Arc<PendingRoom>,
    backlog: Backlog,
    /// Places for hosts' connections, and how many of them each address has.
    connections: Arc<Semaphore>,
    conversing: Arc<Mutex<HashMap<IpAddr, usize>>>,
    /// Bytes of messages that may wait for the state machine.
    input_bytes: Arc<Semaphore>,
}

/// What the manager shows of itself: a certificate made at each start, and anew when it grows old.
struct Lock {
    identity: Identity,
    acceptor: TlsAcceptor,
    made: Instant,
}

impl Lock {
    fn new(host: HostId, signer: &Signer) -> Result<Self, ManagerError> {
        let Signer {
            authority,
            lifetime,
            clock,
        } = signer;
        let identity = authority.issue(host, Role::Manager, clock.unix(), *lifetime)?;
        let acceptor = tls::server_config(&identity)?.into();
        let made = Instant::now();
        Ok(Self {
            identity,
            acceptor,
            made,
        })
    }
}

/// A host's connection, until nothing of it is held any more.
struct Conversing {
    addresses: Arc<Mutex<HashMap<IpAddr, usize>>>,
    from: IpAddr,
    _place: OwnedSemaphorePermit,
}

impl Drop for Conversing {
    fn drop(&mut self) {
        let mut addresses = lock(&self.addresses);
        if let Some(own) = addresses.get_mut(&self.from) {
            *own -= 1;
            if *own == 0 {
                addresses.remove(&self.from);
            }
        }
    }
}

/// What a connection began with.
enum Greeting {
    Join(Secret, Vec<u8>),
    Hello(Box<(Certificate, HostInfo, Epoch)>),
    Peer(Rank),
}

impl Door {
    pub(super) fn new(
        host: HostId,
        signer: Signer,
        inputs: mpsc::Sender<Input>,
        pending: Arc<PendingRoom>,
        backlog: Backlog,
    ) -> Result<Self, ManagerError> {
        Ok(Self {
            host,
            lock: Mutex::new(Lock::new(host, &signer)?),
            signer,
            inputs,
            pending,
            backlog,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            conversing: Arc::default(),
            input_bytes: Arc::new(Semaphore::new(INPUT_BYTES_MAX)),
        })
    }

    /// Takes connections until the future is dropped, and tells the time.
    pub(super) async fn open(self: Arc<Self>, listener: std::net::TcpListener) {
        tokio::select! {
            () = self.accept(listener) => {}
            () = self.tick() => {}
        }
    }

    async fn tick(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.inputs.send(Input::Tick).await.is_err() {
                return;
            }
        }
    }

    async fn accept(self: &Arc<Self>, listener: std::net::TcpListener) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "failed to listen");
                return;
            }
        };
        for connection in 0.. {
            match listener.accept().await {
                Ok((stream, from)) => {
                    let from = from.ip();
                    let door = Arc::clone(self);
                    tokio::spawn(async move { door.serve(stream, connection, from).await });
                }
                Err(error) => {
                    tracing::error!(%error, "failed to accept a connection");
                    tokio::time::sleep(TICK).await;
                }
            }
        }
    }

    /// One connection, from its first byte to its last.
    async fn serve(&self, stream: TcpStream, connection: Connection, from: IpAddr) {
        let pending = self.pending.enter(from);
        // Heartbeats and single rows must not wait for more.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_MAX);
        let greeted = tokio::select! {
            greeted = timeout(HELLO_PATIENCE, self.greet(stream, from)) => greeted,
            () = pending.evicted() => return,
        };
        let Ok(Some((stream, greeting))) = greeted else {
            return;
        };
        match greeting {
            Greeting::Join(secret, request) => {
                tokio::select! {
                    () = self.join(stream, from, secret, request) => {}
                    () = pending.evicted() => {}
                }
            }
            Greeting::Peer(rank) => {
                tokio::select! {
                    () = self.compare(stream, from, rank) => {}
                    () = pending.evicted() => {}
                }
            }
            Greeting::Hello(hello) => {
                let Some(place) = self.place(from) else {
                    return;
                };
                drop(pending);
                self.converse(stream, connection, from, *hello, place).await;
            }
        }
    }

    /// The handshake and the first message, or nothing: the connection is over then.
    async fn greet(
        &self,
        stream: TcpStream,
        from: IpAddr,
    ) -> Option<(TlsStream<TcpStream>, Greeting)> {
        let shaken = self.acceptor().accept(stream).await;
        // Whoever can reach the port can make this happen: no line in the log that an operator reads.
        let refused =
            |error: &dyn std::fmt::Display| tracing::debug!(%from, %error, "refused a handshake");
        let mut stream = shaken.inspect_err(|error| refused(error)).ok()?;
        let certificate = tls::peer(stream.get_ref().1.peer_certificates())
            .inspect_err(|error| refused(error))
            .ok()?;
        let frame = read_frame(&mut stream, HELLO_MAX).await.ok()?;
        match greeting(&frame, certificate) {
            Ok(greeting) => Some((stream, greeting)),
            Err(reason) => {
                let reject = reject(reason.to_owned(), from).encode();
                // A peer that is wrong may also be gone.
                let _ = write_frame(&mut stream, &reject).await;
                let _ = stream.shutdown().await;
                None
            }
        }
    }

    /// Answers a stranger, once.
    async fn join(
        &self,
        stream: TlsStream<TcpStream>,
        from: IpAddr,
        secret: Secret,
        request: Vec<u8>,
    ) {
        let (outbox, closed) = Outbox::new(stream);
        let input = Input::Join {
            from,
            secret,
            request,
            outbox,
        };
        if self.inputs.send(input).await.is_ok() {
            // The answer is written by then, or never will be.
            let _ = timeout(HELLO_PATIENCE, closed.notified()).await;
        }
    }

    /// Answers another manager, once.
    async fn compare(&self, stream: TlsStream<TcpStream>, from: IpAddr, rank: Rank) {
        let (outbox, closed) = Outbox::new(stream);
        let input = Input::Peer {
            rank,
            at: from,
            outbox: Some(outbox),
        };
        if self.inputs.send(input).await.is_ok() {
            let _ = timeout(HELLO_PATIENCE, closed.notified()).await;
        }
    }

    async fn converse<S: AsyncRead + AsyncWrite + Send + 'static>(
        &self,
        stream: S,
        connection: Connection,
        from: IpAddr,
        (certificate, host, last_epoch): (Certificate, HostInfo, Epoch),
        place: Conversing,
    ) {
        let (mut reader, writer) = tokio::io::split(stream);
        let name = host.name.clone();
        let (outbox, closed) = Outbox::counted(writer, self.backlog.clone(), place);
        let own_bytes = Arc::new(Semaphore::new(INPUT_BYTES_OF_ONE));
        let hello = Input::Hello {
            connection,
            certificate,
            from,
            host,
            last_epoch,
            outbox,
        };
        if self.inputs.send(hello).await.is_err() {
            return;
        }
        loop {
            let frame = tokio::select! {
                frame = read_frame(&mut reader, FRAME_MAX) => frame,
                () = closed.notified() => break,
            };
            let Ok(frame) = frame else { break };
            let room = tokio::select! {
                room = self.room(&own_bytes, frame.len()) => room,
                () = closed.notified() => break,
            };
            match ToManager::decode(&frame) {
                Ok(message) => {
                    let input = Input::Message {
                        connection,
                        message,
                        room,
                    };
                    if self.inputs.send(input).await.is_err() {
                        break;
                    }
                }
                // From a newer agent; what it says besides is still right.
                Err(MessageError::Kind) => {}
                Err(error) => {
                    tracing::warn!(host = %name, %from, %error, "closed a connection");
                    break;
                }
            }
        }
        // Where the state machine is gone, so is its view of this connection.
        let _ = self.inputs.send(Input::Disconnected { connection }).await;
    }

    /// A place for a host's connection; none where too many are open.
    fn place(&self, from: IpAddr) -> Option<Conversing> {
        let place = Arc::clone(&self.connections).try_acquire_owned().ok()?;
        let mut addresses = lock(&self.conversing);
        let own = addresses.entry(from).or_default();
        if *own >= CONNECTIONS_PER_ADDRESS {
            return None;
        }
        *own += 1;
        Some(Conversing {
            addresses: Arc::clone(&self.conversing),
            from,
            _place: place,
        })
    }

    /// Waits until a message of this length may wait for the state machine. The own share comes first: who sends much waits for
    /// itself, and holds nothing of what is for all.
    async fn room(&self, own: &Arc<Semaphore>, length: usize) -> Option<Room> {
        let cost = u32::try_from(length + MESSAGE_OVERHEAD).ok()?;
        let own = Arc::clone(own).acquire_many_owned(cost).await.ok()?;
        let all = Arc::clone(&self.input_bytes);
        Some((own, all.acquire_many_owned(cost).await.ok()?))
    }

    fn acceptor(&self) -> TlsAcceptor {
        let mut present = lock(&self.lock);
        let due = present.identity.renewal_due(self.signer.clock.unix());
        if due && present.made.elapsed() >= RENEWAL_WAIT {
            match Lock::new(self.host, &self.signer) {
                Ok(new) => *present = new,
                // The old one still opens: hosts do not look at its dates.
                Err(error) => {
                    tracing::warn!(%error, "failed to renew the manager's certificate");
                    present.made = Instant::now();
                }
            }
        }
        present.acceptor.clone()
    }
}

/// What a first message asks for, on a connection with or without a certificate. A refusal tells nothing of the cluster.
fn greeting(frame: &[u8], certificate: Option<Certificate>) -> Result<Greeting, &'static str> {
    const VERSIONS: &str =
        "another version of the control protocol: run the same release of towline on every host";
    match (ToManager::decode(frame), certificate) {
        (
            Ok(
                ToManager::Hello { version, .. }
                | ToManager::Join { version, .. }
                | ToManager::Peer { version, .. },
            ),
            _,
        ) if version != VERSION => Err(VERSIONS),
        (
            Ok(ToManager::Peer {
                generation,
                manager,
                ..
            }),
            Some(certificate),
        ) if (certificate.role, certificate.host) == (Role::Manager, manager) => {
            Ok(Greeting::Peer((generation, manager)))
        }
        (
            Ok(ToManager::Join {
                secret, request, ..
            }),
            None,
        ) => Ok(Greeting::Join(secret, request)),
        (
            Ok(ToManager::Hello {
                host, last_epoch, ..
            }),
            Some(certificate),
        ) => Ok(Greeting::Hello(Box::new((certificate, host, last_epoch)))),
        (Ok(ToManager::Hello { .. }), None) => Err("no certificate: `towline join` asks for one"),
        (Ok(_) | Err(_), _) => Err("no hello"),
    }
}
