//! The agent's control thread: connects to a manager, keeps the state machine supplied, and gives plain threads a handle.

mod renewal;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval};
use tokio_rustls::client::TlsStream;
use vtep::{MacAddr, Vni};

use crate::agent::{Agent, Output, REQUEST_DEADLINE};
use crate::cache::{Kept, TableCache, is_kept};
use crate::dial::{dial, explain};
use crate::epoch::Epoch;
use crate::host::{HostId, HostInfo};
use crate::installed::{Entry, RuleDifference};
use crate::lease::LeaseError;
use crate::limits::FRAME_MAX;
use crate::message::{MessageError, ToAgent};
use crate::network::Endpoint;
use crate::pki::{Identity, WallClock};
use crate::request::{
    ClusterInfo, ControlStatus, EndpointState, Event, Inspection, Request, RequestError, Response,
};
use crate::transport::{FrameError, Outbox, read_frame};
use renewal::Renewal;

/// How often the state machine is told the time.
const TICK: Duration = Duration::from_millis(100);
/// The wait between rounds over the managers: grows from the first to the second, so that a healed host is back within 5 s.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// What an agent is made of.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// This host.
    pub host: HostInfo,
    /// The managers, tried in order.
    pub managers: Vec<SocketAddr>,
    /// This host's key and certificate. Renewed in time, and told by [`Event::IdentityRenewed`].
    pub identity: Arc<Identity>,
    /// The address that connections come from: the VTEP's. Managers take no other.
    pub bind: IpAddr,
    /// What this host runs already, after a restart of its agent.
    pub endpoints: Vec<(Endpoint, EndpointState)>,
    /// Where tables are kept for the agent after this one; `None`: nowhere.
    pub cache: Option<CacheConfig>,
    /// What the certificate's dates are measured by.
    pub clock: WallClock,
}

/// Where an agent's tables are kept, and which of them it takes up again.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// The file, in a folder that exists.
    pub file: PathBuf,
    /// Networks that are subscribed from the start.
    pub networks: Vec<Vni>,
}

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// There is nobody to connect to.
    #[error("no manager is named: give at least one address")]
    NoManager,
    /// The certificate is another host's.
    #[error("the certificate is host {certificate}'s, not this host's, which is {host}")]
    OtherHost {
        /// Whose it is.
        certificate: HostId,
        /// Who this is.
        host: HostId,
    },
    /// The certificate cannot be used.
    #[error("failed to set TLS up")]
    Tls(#[from] rustls::Error),
    /// No thread.
    #[error("failed to start the control thread")]
    Thread(#[source] io::Error),
}

/// A running control thread. Every method may be called from any plain thread; none from async code.
#[derive(Debug)]
pub struct AgentHandle {
    shared: Arc<Shared>,
    events: Receiver<Event>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    core: Mutex<Core>,
    /// The connection came or a manager refused it.
    changed: Condvar,
    /// There is something to send.
    wake: Notify,
    stop: Notify,
}

#[derive(Debug)]
struct Core {
    agent: Agent,
    cluster: Option<ClusterInfo>,
    cache: Option<TableCache>,
    cluster_id: String,
    answers: HashMap<u64, SyncSender<Result<Response, RequestError>>>,
    next_call: u64,
    stopped: bool,
}

impl AgentHandle {
    /// Starts the thread. Its sockets belong to the network namespace of the calling thread.
    pub fn start(config: AgentConfig) -> Result<Self, AgentError> {
        if config.managers.is_empty() {
            return Err(AgentError::NoManager);
        }
        let certificate = config.identity.certificate().host;
        if certificate != config.host.id {
            let host = config.host.id;
            return Err(AgentError::OtherHost { certificate, host });
        }
        let cluster = config.identity.cluster();
        let renewal = Mutex::new(Renewal::new(config.identity, config.clock)?);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AgentError::Thread)?;
        let mut agent = Agent::new(config.host, cluster.clone(), config.managers);
        for (endpoint, state) in config.endpoints {
            agent.publish(endpoint, state);
        }
        let cache = config
            .cache
            .map(|config| restore(&mut agent, config, &cluster));
        let shared = Arc::new(Shared {
            core: Mutex::new(Core {
                agent,
                cluster: None,
                cache,
                cluster_id: cluster,
                answers: HashMap::new(),
                next_call: 0,
                stopped: false,
            }),
            changed: Condvar::new(),
            wake: Notify::new(),
            stop: Notify::new(),
        });
        // Unbounded: the program must take news, and a table's news are bounded by the table.
        let (news, events) = crossbeam_channel::unbounded();
        let driver = Driver {
            shared: Arc::clone(&shared),
            news,
            bind: config.bind,
            renewal,
        };
        let body = move || {
            runtime.block_on(driver.run());
            driver.end();
        };
        let thread = std::thread::Builder::new()
            .name("control-agent".to_owned())
            .spawn(body)
            .map_err(AgentError::Thread)?;
        Ok(Self {
            shared,
            events,
            thread: Some(thread),
        })
    }

    /// Waits until a manager took this host in. A refusal in words (a wrong token, a name taken) ends the wait.
    pub fn wait_connected(&self, patience: Duration) -> Result<ClusterInfo, RequestError> {
        let deadline = Instant::now() + patience;
        let mut core = self.shared.core();
        loop {
            if core.stopped {
                return Err(RequestError::Stopped);
            }
            if let Some(cluster) = &core.cluster {
                return Ok(cluster.clone());
            }
            if let Some(reason) = core.agent.rejected() {
                return Err(RequestError::Refused(reason.to_owned()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let cause = core.agent.last_error().unwrap_or("no answer").to_owned();
                return Err(core.agent.not_connected(&cause, now()));
            }
            let waited = self.shared.changed.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks the manager and waits for the answer, 5 s at most, 2 s of them for a connection.
    pub fn request(&self, request: Request) -> Result<Response, RequestError> {
        let (sender, answer) = sync_channel(1);
        {
            let mut core = self.shared.core();
            if core.stopped {
                return Err(RequestError::Stopped);
            }
            let id = core.next_call;
            core.next_call += 1;
            core.answers.insert(id, sender);
            core.agent.call(id, request, now());
        }
        self.shared.wake.notify_one();
        // The state machine ends every call at its deadline; the margin is for the thread to get there on a busy machine.
        match answer.recv_timeout(REQUEST_DEADLINE * 2) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(RequestError::Stopped)
            }
        }
    }

    /// Keep the table of this network: its present state comes as events, then every change.
    pub fn subscribe(&self, vni: Vni) {
        self.shared.core().agent.subscribe(vni);
        self.shared.wake.notify_one();
    }

    /// Forget the table of this network. No event follows but those already under way.
    pub fn unsubscribe(&self, vni: Vni) {
        let mut core = self.shared.core();
        core.agent.unsubscribe(vni);
        if let Some(cache) = &mut core.cache {
            cache.outdate();
        }
        drop(core);
        self.shared.wake.notify_one();
    }

    /// This host's endpoint is up or down; said again on every connection until the endpoint is freed or lost.
    pub fn publish(&self, endpoint: Endpoint, state: EndpointState) {
        self.shared.core().agent.publish(endpoint, state);
        self.shared.wake.notify_one();
    }

    /// A frame came here from the VTEP `from` for a MAC address that is not here: the sender will be told. Forgotten without a
    /// manager; the next frame tells it again.
    pub fn misdelivered(&self, vni: Vni, mac: MacAddr, from: IpAddr) {
        self.shared.core().agent.misdelivered(vni, mac, from);
        self.shared.wake.notify_one();
    }

    /// Answers [`Event::Inspect`] with what the datapath holds, and with the rules for services that are wrong.
    pub fn report(
        &self,
        inspection: Inspection,
        installed: &BTreeSet<Entry>,
        rules: Vec<RuleDifference>,
    ) {
        let mut core = self.shared.core();
        core.agent.report(inspection, installed, rules);
        drop(core);
        self.shared.wake.notify_one();
    }

    /// Answers [`Event::Reached`]: what was told up to there is in force on this host.
    pub fn applied(&self, vni: Vni, generation: u16, revision: u64) {
        let mut core = self.shared.core();
        core.agent.applied(vni, generation, revision);
        drop(core);
        self.shared.wake.notify_one();
    }

    /// Asks which hosts do not yet act on the last that was [published](Self::publish) of this host's endpoint, by name. Waits up to
    /// a second for all to do so.
    pub fn confirmed(&self, vni: Vni, epoch: Epoch) -> Result<Vec<String>, RequestError> {
        let request = self.shared.core().agent.confirmation(vni, epoch);
        match self.request(request)? {
            Response::Confirmed { waiting } => Ok(waiting),
            other => Err(RequestError::Refused(format!(
                "the manager's answer is not understood: {other:?}"
            ))),
        }
    }

    /// This host receives VXLAN on another UDP port from now on: every later connection says so. [`Request::TellPort`] says so now.
    pub fn set_port(&self, port: u16) {
        self.shared.core().agent.set_port(port);
    }

    /// Takes an endpoint out of what this host was leased, for a container that starts while no manager answers. `ips`: any
    /// addresses where it is empty. To be published like one that a manager gave.
    pub fn take_leased(
        &self,
        vni: Vni,
        container: &str,
        ips: &[IpAddr],
    ) -> Result<Endpoint, LeaseError> {
        let mut core = self.shared.core();
        let (endpoint, left) = core.agent.take_leased(vni, container, ips)?;
        // Before anybody uses it: a later agent must not take it again.
        if let Some(cache) = &mut core.cache {
            cache.record(&left.encode());
        }
        core.keep(now());
        Ok(endpoint)
    }

    /// News, in order. Disconnected once the thread has ended.
    #[must_use]
    pub fn events(&self) -> &Receiver<Event> {
        &self.events
    }

    /// The highest epoch that this host has ever seen.
    #[must_use]
    pub fn last_epoch(&self) -> Epoch {
        self.shared.core().agent.last_epoch()
    }

    /// How things stand.
    #[must_use]
    pub fn status(&self) -> ControlStatus {
        self.shared.core().agent.status(now())
    }

    /// Ends the thread and its connection.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.shared.stop.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control thread ended by a panic");
        }
    }
}

impl Drop for AgentHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// CLOCK_BOOTTIME: it counts while the machine sleeps, so that silence and leases end then too.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// Takes up what an earlier agent of this host knew.
fn restore(agent: &mut Agent, config: CacheConfig, cluster: &str) -> TableCache {
    for vni in config.networks {
        agent.subscribe(vni);
    }
    let (cache, kept) = TableCache::open(config.file, cluster);
    if let Some(Kept { messages, age }) = kept {
        let heard = now().saturating_sub(age);
        for message in messages {
            agent.restore(message, heard);
        }
    }
    cache
}

impl Core {
    fn handle_timeout(&mut self, now: Duration) {
        self.agent.handle_timeout(now);
        self.keep(now);
    }

    /// Writes down what an agent that comes after this one must know.
    fn keep(&mut self, now: Duration) {
        if let Some(cache) = &mut self.cache {
            if cache.wants_rewrite(now) {
                cache.rewrite(&self.agent.snapshot(&self.cluster_id), now);
            }
            cache.flush(self.cluster.is_some(), now);
        }
    }

    /// A message came off the wire in these bytes.
    fn handle_message(&mut self, message: ToAgent, frame: &[u8], now: Duration) {
        let (kept, removed) = (
            is_kept(&message),
            matches!(message, ToAgent::NetworkRemoved { .. }),
        );
        self.agent.handle_message(message, now);
        if let Some(cache) = &mut self.cache {
            // Not the words of a manager that was not taken for one.
            if kept && self.agent.is_up() {
                cache.record(frame);
            } else if removed {
                cache.outdate();
            }
        }
    }
}

/// What the thread runs.
struct Driver {
    shared: Arc<Shared>,
    news: Sender<Event>,
    bind: IpAddr,
    renewal: Mutex<Renewal>,
}

impl Driver {
    async fn run(&self) {
        tokio::select! {
            () = self.shared.stop.notified() => {}
            () = self.connect_for_ever() => {}
        }
    }

    /// Nobody waits for an answer that cannot come.
    fn end(&self) {
        let mut core = self.shared.core();
        core.stopped = true;
        core.cluster = None;
        core.answers.clear();
        self.shared.changed.notify_all();
    }

    async fn connect_for_ever(&self) {
        let mut wait = RETRY.0;
        loop {
            // A manager that answered may have named others.
            let managers = self.shared.core().agent.managers().to_vec();
            for &manager in &managers {
                let config = self.renewal().config();
                match self.ticking(dial(self.bind, manager, config)).await {
                    Ok(stream) => {
                        if self.converse(stream, manager).await {
                            wait = RETRY.0;
                        }
                    }
                    Err(cause) => self.disconnected(&cause),
                }
                if self.shared.core().agent.has_left() {
                    self.ticking(std::future::pending::<()>()).await;
                }
            }
            self.ticking(tokio::time::sleep(wait)).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    /// Waits for something else while requests go on ending at their deadlines.
    async fn ticking<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let mut ticks = ticks();
        loop {
            tokio::select! {
                output = &mut future => return output,
                _ = ticks.tick() => {
                    let mut core = self.shared.core();
                    core.handle_timeout(now());
                    self.deliver(&mut core);
                }
            }
        }
    }

    /// One connection, from its hello to its end. Whether the manager took this host in.
    async fn converse(&self, stream: TlsStream<TcpStream>, manager: SocketAddr) -> bool {
        let (mut reader, writer) = tokio::io::split(stream);
        let (outbox, closed) = Outbox::new(writer);
        // Reading is a task of its own: a frame half read must not be given up when something else happens.
        let (sender, mut frames) = mpsc::channel(64);
        let reading = tokio::spawn(async move {
            loop {
                let frame = read_frame(&mut reader, FRAME_MAX).await;
                let end = frame.is_err();
                if sender.send(frame).await.is_err() || end {
                    return;
                }
            }
        });
        self.shared.core().agent.handle_connected(manager, now());
        let mut welcomed = false;
        let mut ticks = ticks();
        let reason = loop {
            {
                let mut core = self.shared.core();
                if welcomed {
                    self.renew(&mut core);
                }
                while let Some(message) = core.agent.poll_message() {
                    outbox.send(message.encode());
                }
                self.deliver(&mut core);
                welcomed |= core.cluster.is_some();
                if core.agent.wants_close() || core.agent.has_left() {
                    break String::new();
                }
            }
            tokio::select! {
                frame = frames.recv() => match frame.unwrap_or(Err(FrameError::Closed)).map(|frame| (ToAgent::decode(&frame), frame)) {
                    Ok((Ok(message), frame)) => self.shared.core().handle_message(message, &frame, now()),
                    // From a newer manager; what it says besides is still right.
                    Ok((Err(MessageError::Kind), _)) => {}
                    Ok((Err(error), _)) => break format!("{manager}: {error}"),
                    Err(FrameError::Io(error)) => break explain(manager, &error),
                    Err(error) => break format!("{manager}: {error}"),
                },
                () = self.shared.wake.notified() => {}
                () = closed.notified() => break format!("{manager}: the connection was lost"),
                _ = ticks.tick() => self.shared.core().handle_timeout(now()),
            }
        };
        reading.abort();
        if !self.shared.core().agent.wants_close() {
            self.disconnected(&reason);
        }
        welcomed
    }

    /// Asks for a new certificate when it is time, and takes it.
    fn renew(&self, core: &mut Core) {
        let mut renewal = self.renewal();
        if let Some(identity) = renewal.poll_identity() {
            // Nobody listens once the handle is gone, and then the thread ends too.
            let _ = self.news.send(Event::IdentityRenewed(identity));
        }
        if let Some((request, answer)) = renewal.poll_request() {
            let id = core.next_call;
            core.next_call += 1;
            core.answers.insert(id, answer);
            core.agent.call(id, request, now());
        }
    }

    fn renewal(&self) -> MutexGuard<'_, Renewal> {
        self.renewal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disconnected(&self, reason: &str) {
        let mut core = self.shared.core();
        core.agent.handle_disconnected(reason, now());
        self.deliver(&mut core);
    }

    /// Passes on what the state machine has to tell.
    fn deliver(&self, core: &mut Core) {
        while let Some(output) = core.agent.poll_output() {
            match output {
                Output::Event(event) => {
                    match &event {
                        Event::Connected { manager, cluster } => {
                            tracing::info!(%manager, cluster = %cluster.cluster, "connected");
                            core.cluster = Some(cluster.clone());
                        }
                        Event::Disconnected { reason } => {
                            tracing::warn!(%reason, "disconnected from the manager; forwarding goes on");
                            core.cluster = None;
                        }
                        _ => {}
                    }
                    // Nobody listens once the handle is gone, and then the thread ends too.
                    let _ = self.news.send(event);
                }
                Output::Answer { id, result } => {
                    if let Some(asker) = core.answers.remove(&id) {
                        // One place was kept for this answer; an asker that gave up has dropped it.
                        let _ = asker.try_send(result);
                    }
                }
            }
        }
        self.shared.changed.notify_all();
    }
}

fn ticks() -> tokio::time::Interval {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
