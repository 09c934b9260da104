//! The thread that owns the state machine and the store: takes what has come as one turn, writes, then sends.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};

use super::behind::Behind;
use super::probing::probe;
use super::refusals::reject;
use super::{Keeper, ManagerStatus, Members, Prober, STORE_RETRY, Signer, lock};
use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo};
use crate::limits::{TURN_MAX, TURN_OUTPUTS_MAX};
use crate::manager::{Connection, Manager, Output, Rank, Refusal};
use crate::message::{ToAgent, ToManager};
use crate::pki::{Certificate, Role};
use crate::request::Response;
use crate::token::{Secret, SecretText};
use crate::transport::Outbox;

/// What comes to the state machine.
pub(super) enum Input {
    Join {
        from: IpAddr,
        secret: Secret,
        request: Vec<u8>,
        outbox: Outbox,
    },
    Hello {
        connection: Connection,
        certificate: Certificate,
        from: IpAddr,
        host: HostInfo,
        last_epoch: Epoch,
        outbox: Outbox,
    },
    /// Another manager speaks up, and may await an answer.
    Peer {
        rank: Rank,
        at: IpAddr,
        outbox: Option<Outbox>,
    },
    Message {
        connection: Connection,
        message: ToManager,
        /// Its share of what may wait, given back when it is handled.
        room: Option<Room>,
    },
    Disconnected {
        connection: Connection,
    },
    Tick,
}

/// Bytes of one connection's messages, and of all connections'.
pub(super) type Room = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// What the thread is made of.
pub(super) struct Parts {
    pub(super) manager: Manager,
    pub(super) keeper: Keeper,
    pub(super) signer: Signer,
    pub(super) prober: Arc<dyn Prober>,
    pub(super) status: Arc<Mutex<ManagerStatus>>,
    /// Where other managers would listen, for who asks them.
    pub(super) standbys: Arc<Mutex<Vec<SocketAddr>>>,
    pub(super) members: Members,
    pub(super) stop: Arc<Notify>,
}

/// The thread that owns the state machine.
pub(super) struct Turns {
    /// Or why there is none, and when to try again.
    manager: Result<Manager, (String, Duration)>,
    keeper: Keeper,
    signer: Signer,
    outboxes: HashMap<Connection, Outbox>,
    behind: Behind,
    prober: Arc<dyn Prober>,
    probing: Arc<AtomicUsize>,
    status: Arc<Mutex<ManagerStatus>>,
    /// Where other managers would listen, for who asks them.
    standbys: Arc<Mutex<Vec<SocketAddr>>>,
    members: Members,
    stop: Arc<Notify>,
}

impl Turns {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            manager,
            keeper,
            signer,
            prober,
            status,
            standbys,
            members,
            stop,
        } = parts;
        Self {
            manager: Ok(manager),
            keeper,
            signer,
            outboxes: HashMap::new(),
            behind: Behind::default(),
            prober,
            probing: Arc::default(),
            status,
            standbys,
            members,
            stop,
        }
    }

    pub(super) fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        while let Some(first) = inputs.blocking_recv() {
            self.handle(first);
            for _ in 1..TURN_MAX {
                if self.has_much_to_send() {
                    break;
                }
                let Ok(input) = inputs.try_recv() else { break };
                self.handle(input);
            }
            self.finish();
        }
    }

    /// Whether what is to be sent must be sent before more is made of what came.
    fn has_much_to_send(&self) -> bool {
        let manager = self.manager.as_ref();
        manager.is_ok_and(|manager| manager.pending_outputs() > TURN_OUTPUTS_MAX)
    }

    fn handle(&mut self, input: Input) {
        if lock(&self.status).stood_down.is_some() {
            return;
        }
        let now = self.keeper.now();
        if let Err((_, retry_at)) = &self.manager
            && now >= *retry_at
        {
            self.manager = self
                .keeper
                .load()
                .map_err(|error| (error.to_string(), now + STORE_RETRY));
        }
        if let Ok(manager) = &mut self.manager {
            manager.set_unix(self.keeper.wall.unix());
        }
        match (&mut self.manager, input) {
            (
                Ok(manager),
                Input::Join {
                    from,
                    secret,
                    request,
                    outbox,
                },
            ) => {
                let answer = manager
                    .redeem(&secret)
                    .and_then(|role| join(&self.signer, from, role, &request));
                outbox.send(
                    answer
                        .unwrap_or_else(|reason| reject(reason, from))
                        .encode(),
                );
            }
            (
                Ok(manager),
                Input::Hello {
                    connection,
                    certificate,
                    from,
                    host,
                    last_epoch,
                    outbox,
                },
            ) => {
                let name = host.name.clone();
                let admitted = manager
                    .admit(connection, certificate, &host)
                    .and_then(|()| manager.handle_hello(connection, from, host, last_epoch, now));
                match admitted {
                    Ok(()) => {
                        self.outboxes.insert(connection, outbox);
                    }
                    Err(Refusal { reason, removed }) => {
                        tracing::warn!(host = %name, %from, %reason, "refused a host");
                        outbox.send(ToAgent::Reject { reason, removed }.encode());
                    }
                }
            }
            (
                Ok(manager),
                Input::Message {
                    connection,
                    message,
                    room,
                },
            ) => {
                manager.handle_message(connection, message, now);
                drop(room);
            }
            (Ok(manager), Input::Peer { rank, at, outbox }) => {
                let (generation, host) = manager.rank();
                if let Some(outbox) = outbox {
                    let peer = ToAgent::Peer {
                        generation,
                        manager: host,
                    };
                    outbox.send(peer.encode());
                }
                if rank.1 != host && rank > (generation, host) {
                    let reason = format!(
                        "host {} at {at} is the cluster's manager in generation {}, after this one's {generation}",
                        rank.1, rank.0
                    );
                    tracing::warn!(%reason, "stood down; this host's agent goes on with the other manager");
                    lock(&self.status).stood_down = Some(reason);
                    self.forget_connections();
                    self.stop.notify_one();
                }
            }
            (Ok(manager), Input::Disconnected { connection }) => {
                manager.handle_disconnected(connection);
                self.outboxes.remove(&connection);
                self.behind.forget(connection);
            }
            (Ok(manager), Input::Tick) => manager.handle_timeout(now),
            (
                Err((cause, _)),
                Input::Hello { outbox, from, .. } | Input::Join { outbox, from, .. },
            ) => {
                let reason = format!("the manager cannot use its store: {cause}");
                outbox.send(reject(reason, from).encode());
            }
            (
                Err(_),
                Input::Peer { .. }
                | Input::Message { .. }
                | Input::Disconnected { .. }
                | Input::Tick,
            ) => {}
        }
    }

    /// Makes the turn's changes durable, then sends what follows from them.
    fn finish(&mut self) {
        let Ok(manager) = &mut self.manager else {
            return;
        };
        let now = self.keeper.now();
        manager.finish_turn(now);
        let writes = manager.take_writes();
        if !writes.is_empty()
            && let Err(error) = self.keeper.store.commit(&writes)
        {
            // What was not made durable did not happen: forget it, and begin again from what is.
            tracing::error!(%error, "failed to write the store; every agent connects anew");
            lock(&self.status).store_error = Some(error.to_string());
            self.manager = Err((error.to_string(), self.keeper.now() + STORE_RETRY));
            self.forget_connections();
            return;
        }
        // From what is durable now.
        let outboxes = &self.outboxes;
        let slow = |connection| outboxes.get(&connection).is_some_and(Outbox::is_behind);
        for (connection, missed) in self.behind.take(slow) {
            for (vni, after) in missed.streams {
                manager.resend_rows(connection, vni, after);
            }
            if missed.hosts {
                manager.resend_hosts(connection, now);
            }
        }
        while let Some(output) = manager.poll_output() {
            match output {
                Output::Send { to, message } => {
                    // Encoded once, however many follow the network.
                    let mut bytes = None;
                    for connection in to {
                        let Some(outbox) = self.outboxes.get(&connection) else {
                            continue;
                        };
                        let slow = outbox.is_behind();
                        if !self.behind.misses(connection, slow, &message) {
                            outbox.send(bytes.get_or_insert_with(|| message.encode()).clone());
                        }
                    }
                }
                Output::Close(connection) => {
                    self.outboxes.remove(&connection);
                    self.behind.forget(connection);
                }
                Output::Sign {
                    connection,
                    call,
                    host,
                    role,
                    request,
                } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        let signed = self.signer.sign(&request, host, role);
                        let answer = signed
                            .map(Response::Certificate)
                            .map_err(|error| error.to_string());
                        for part in Manager::reply(call, &answer) {
                            outbox.send(part.encode());
                        }
                    }
                }
                Output::Authority { connection, call } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        let pem = SecretText(self.signer.authority.to_pem());
                        for part in Manager::reply(call, &Ok(Response::Authority(pem))) {
                            outbox.send(part.encode());
                        }
                    }
                }
                Output::Probe {
                    connection,
                    call,
                    request,
                } => {
                    if let Some(outbox) = self.outboxes.get(&connection) {
                        probe(&self.prober, &self.probing, outbox.clone(), call, request);
                    }
                }
            }
        }
        let standbys = manager.standbys();
        *lock(&self.standbys) = standbys;
        let (connected, hosts) = manager.counts();
        let mut status = lock(&self.status);
        if status.hosts != hosts {
            *lock(&self.members) = manager.vteps().collect();
        }
        (status.connected, status.hosts) = (connected, hosts);
        status.behind = self.behind.count();
        status.store_error = None;
    }

    /// Every agent connects anew.
    fn forget_connections(&mut self) {
        self.outboxes.clear();
        self.behind.clear();
    }
}

/// A certificate for a new host, under an id that nobody has yet.
fn join(signer: &Signer, from: IpAddr, role: Role, request: &[u8]) -> Result<ToAgent, String> {
    let host = HostId::random();
    let certificate = signer
        .sign(request, host, role)
        .map_err(|error| error.to_string())?;
    tracing::info!(%from, %host, %role, "signed a certificate for a new host");
    Ok(ToAgent::Joined {
        certificate,
        ca: signer.authority.certificate().to_vec(),
    })
}

#[cfg(test)]
mod tests;
