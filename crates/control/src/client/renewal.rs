//! Keeps this host's certificate young: asks for a new one in time, and once more when the clock makes no sense.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use crate::pki::{Identity, KeyRequest, WallClock};
use crate::request::{Request, RequestError, Response};
use crate::tls;

/// The wait between two askings: a hundredth of a certificate's time, within these. Clocks that are wrong for good would
/// ask for ever.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));

type Answer = Result<Response, RequestError>;

/// The identity that connections are made with, and the asking for the next one.
#[derive(Debug)]
pub(super) struct Renewal {
    identity: Arc<Identity>,
    config: Arc<ClientConfig>,
    clock: WallClock,
    asking: Option<(KeyRequest, Receiver<Answer>)>,
    not_before: Instant,
}

impl Renewal {
    pub(super) fn new(identity: Arc<Identity>, clock: WallClock) -> Result<Self, rustls::Error> {
        Ok(Self {
            config: tls::client_config(&identity)?,
            identity,
            clock,
            asking: None,
            not_before: Instant::now(),
        })
    }

    /// What the next connection is made with.
    pub(super) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    /// The request to make now, and where its answer is to go. To be asked while a manager is connected.
    pub(super) fn poll_request(&mut self) -> Option<(Request, SyncSender<Answer>)> {
        let due = self.asking.is_none()
            && self.identity.renewal_due(self.clock.unix())
            && Instant::now() >= self.not_before;
        if !due {
            return None;
        }
        self.wait();
        let key = KeyRequest::new()
            .inspect_err(|error| tracing::warn!(%error, "failed to make a key"))
            .ok()?;
        let request = key.request().to_vec();
        let (sender, answer) = sync_channel(1);
        self.asking = Some((key, answer));
        Some((Request::Renew { request }, sender))
    }

    /// The new identity, when it has come. Connections from now on are made with it; the present one stands.
    pub(super) fn poll_identity(&mut self) -> Option<Arc<Identity>> {
        let answer = match self.asking.as_ref()?.1.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err("the request was dropped".to_owned()),
            Ok(answer) => answer.map_err(|error| error.to_string()),
        };
        let (key, _) = self.asking.take()?;
        let renewed = answer.and_then(|answer| match answer {
            Response::Certificate(der) => self.take(key, &der),
            other => Err(format!("{other:?} is no certificate")),
        });
        match renewed {
            Ok(identity) => {
                let until = identity.certificate().not_after.as_secs();
                tracing::info!(until, "this host's certificate is renewed");
                Some(identity)
            }
            Err(error) => {
                tracing::warn!(%error, "failed to renew this host's certificate; will ask again");
                None
            }
        }
    }

    fn take(&mut self, key: KeyRequest, certificate: &[u8]) -> Result<Arc<Identity>, String> {
        let identity = key
            .into_identity(certificate, self.identity.ca())
            .map_err(|error| error.to_string())?;
        if identity.certificate().host != self.identity.certificate().host {
            return Err("it is another host's".to_owned());
        }
        self.config = tls::client_config(&identity).map_err(|error| error.to_string())?;
        self.identity = Arc::new(identity);
        self.wait();
        Ok(Arc::clone(&self.identity))
    }

    fn wait(&mut self) {
        let wait = (self.identity.lifetime() / 100).clamp(WAIT.0, WAIT.1);
        self.not_before = Instant::now() + wait;
    }
}
