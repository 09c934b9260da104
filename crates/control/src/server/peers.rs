//! Looks for another manager of the same cluster, so that not two of them hand out addresses for long.
//!
//! Hosts that stand by are asked every few seconds; one that was promoted answers with its generation, and whichever of the two
//! ranks lower stands down. Two managers that cannot reach each other, nor hosts of each other, both go on until they can.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Input, ManagerError, Signer, lock};
use crate::dial::dial;
use crate::host::HostId;
use crate::limits::HELLO_MAX;
use crate::manager::Rank;
use crate::message::{ToAgent, ToManager, VERSION};
use crate::pki::Role;
use crate::tls;
use crate::transport::{read_frame, write_frame};

const EVERY: Duration = Duration::from_secs(2);
/// How long one is given to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a manager that starts waits for an answer before it takes hosts in.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Asks other managers.
pub(super) struct Peers {
    bind: IpAddr,
    host: HostId,
    config: Arc<ClientConfig>,
    standbys: Arc<Mutex<Vec<SocketAddr>>>,
    inputs: mpsc::Sender<Input>,
}

impl Peers {
    pub(super) fn new(
        listen: SocketAddr,
        host: HostId,
        signer: &Signer,
        standbys: Arc<Mutex<Vec<SocketAddr>>>,
        inputs: mpsc::Sender<Input>,
    ) -> Result<Self, ManagerError> {
        let unix = signer.clock.unix();
        let identity = signer
            .authority
            .issue(host, Role::Manager, unix, signer.lifetime)?;
        Ok(Self {
            bind: listen.ip(),
            host,
            config: tls::client_config(&identity)?,
            standbys,
            inputs,
        })
    }

    /// Asks all once, within a second.
    pub(super) async fn first_round(&self) {
        // Who has not answered by then is asked again soon.
        let _ = timeout(FIRST_PATIENCE, self.round()).await;
    }

    /// Asks for ever.
    pub(super) async fn watch(&self) {
        loop {
            tokio::time::sleep(EVERY).await;
            self.round().await;
        }
    }

    async fn round(&self) {
        let standbys = lock(&self.standbys).clone();
        for at in standbys {
            // A host that stands by refuses the connection: nobody listens there.
            if let Ok(Some(rank)) = timeout(PATIENCE, self.ask(at)).await {
                let input = Input::Peer {
                    rank,
                    at: at.ip(),
                    outbox: None,
                };
                if self.inputs.send(input).await.is_err() {
                    return;
                }
            }
        }
    }

    /// The rank of the manager that listens there, if one does.
    async fn ask(&self, at: SocketAddr) -> Option<Rank> {
        let mut stream = dial(self.bind, at, Arc::clone(&self.config)).await.ok()?;
        // The lowest rank: the other learns this one's own when it asks.
        let peer = ToManager::Peer {
            version: VERSION,
            generation: 0,
            manager: self.host,
        };
        write_frame(&mut stream, &peer.encode()).await.ok()?;
        stream.flush().await.ok()?;
        let frame = read_frame(&mut stream, HELLO_MAX).await.ok()?;
        match ToAgent::decode(&frame) {
            Ok(ToAgent::Peer {
                generation,
                manager,
            }) => Some((generation, manager)),
            _ => None,
        }
    }
}
