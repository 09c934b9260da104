//! The userspace datapath: TAPs on one side, UDP sockets on the other, and worker threads between.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, bounded};
use netns::{Netlink, Netns};

use super::{
    Announcement, Backend, BackendStatus, Datapath, DatapathError, DatapathStatus, PortSpec,
    StartError,
};
use crate::capture::{Capture, CaptureFilter, CaptureHub};
use crate::edge::{Datagram, OuterFields, TapFeatures};
use crate::engine::Settings;
use crate::fdb::{Change, Port, PortId, SharedTables, TableWriter, Tables};
use crate::misdelivery::{Misdelivered, Misdeliveries};
use crate::paths::{PathMonitor, Paths};
use crate::probe::{self, Nonce, ProbeRegistry, ProbeWatch};
use crate::stats::{Counters, WorkerCounters};
use crate::tap::{self, OpenTap, Sharing, TapControl, TapError};
use crate::udp::{Batching, ErrorWatch, ReceiveSocket, SendSockets, UdpUnderlay};
use crate::worker::{Command, Worker, WorkerConfig, WorkerThread};

/// Workers made when nothing else is asked for, at most; fewer on a machine with fewer cores.
const WORKERS_DEFAULT_MAX: usize = 8;
/// The kernel gives one TAP no more queues (`MAX_TAP_QUEUES`).
const WORKERS_MAX: usize = 256;
/// Ports up to here have a queue for each worker, those above one queue that all share: queues cost the kernel memory, and one
/// container of so many seldom needs more than a core.
const MULTI_QUEUE_PORTS: usize = 256;
/// Files to be allowed: each port takes one a worker and one more.
const FILES_WANTED: u64 = 262_144;

/// How a userspace datapath is to run.
#[derive(Clone, Debug)]
pub struct UserspaceConfig {
    /// The host's network namespace, where the underlay is.
    pub netns: Netns,
    /// The host's underlay address.
    pub vtep: IpAddr,
    /// The UDP port, own and default for remotes; 4789 unless configured.
    pub port: u16,
    /// Threads that carry frames; by default one a core, at most 8.
    pub workers: Option<usize>,
    /// What its edges leave to the kernel. [`Backend::Plain`] is one frame for each system call at both of them: it says what the
    /// rest is worth. (The backend of a port is the port's own: [`PortSpec::backend`].)
    pub backend: Backend,
    /// Drop what has reserved bits set in its VXLAN header, as Linux and Open vSwitch do.
    pub strict_reserved_bits: bool,
}

/// A running userspace datapath. Dropping it stops its threads and leaves its interfaces for [`Datapath::adopt`].
pub struct UserspaceDatapath {
    // Field order is drop order: threads end, and close their queues, first.
    errors: ErrorWatch,
    workers: Vec<WorkerThread<UdpUnderlay>>,
    ports: Mutex<HashMap<PortId, AttachedPort>>,
    writer: Mutex<TableWriter>,
    tables: SharedTables,
    counters: Vec<Arc<WorkerCounters>>,
    captures: Arc<CaptureHub>,
    misdeliveries: Arc<Misdeliveries>,
    probes: Arc<ProbeRegistry>,
    paths: Arc<Paths>,
    send: Arc<SendSockets>,
    netns: Netns,
    /// The workers' engines'.
    settings: Settings,
    /// Where it receives, and by which sockets.
    receiving: Mutex<Receiving>,
}

struct Receiving {
    listen: SocketAddr,
    sockets: Vec<Arc<ReceiveSocket>>,
    /// Whether datagrams without checksums are taken.
    unsummed: bool,
}

struct AttachedPort {
    backend: Backend,
    features: TapFeatures,
    control: TapControl,
}

impl UserspaceDatapath {
    /// Opens the sockets in the host's namespace and starts the workers.
    ///
    /// # Errors
    /// See [`StartError`]; nothing on the host was changed.
    pub fn start(config: UserspaceConfig) -> Result<Self, StartError> {
        let UserspaceConfig {
            netns,
            vtep,
            port,
            workers,
            backend,
            strict_reserved_bits,
        } = config;
        tap::check_device().map_err(|error| match error {
            TapError::NotPermitted(_) => StartError::NotPermitted,
            other => StartError::Tap(other),
        })?;
        raise_file_limit();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = workers
            .unwrap_or_else(|| cores.min(WORKERS_DEFAULT_MAX))
            .clamp(1, WORKERS_MAX);
        let listen = SocketAddr::new(vtep, port);
        let batching = match backend {
            Backend::Offload => Batching::Full,
            Backend::Plain => Batching::Single,
        };
        let writer = TableWriter::for_workers(workers);
        let tables = writer.shared();
        let paths = Arc::new(Paths::new());
        let monitor = Arc::new(PathMonitor::new(Arc::clone(&tables), Arc::clone(&paths)));
        let underlays = netns
            .run(|| UdpUnderlay::open(vtep, port, workers, batching, monitor))
            .map_err(StartError::Namespace)?
            .map_err(|error| StartError::from_sockets(&netns, listen, error))?;
        let probes = Arc::new(ProbeRegistry::default());
        let send = Arc::clone(underlays[0].send_sockets());
        let source_ports = send
            .source_ports()
            .map_err(|error| StartError::from_sockets(&netns, listen, error))?;
        let captures = Arc::new(CaptureHub::default());
        captures.set_own(listen, source_ports);
        let misdeliveries = Arc::<Misdeliveries>::default();
        let receiving = Receiving::new(listen, &underlays);
        let settings = Settings {
            strict_reserved_bits,
            ..Settings::default()
        };
        let mut counters = Vec::with_capacity(workers);
        let mut threads = Vec::with_capacity(workers);
        for (index, underlay) in underlays.into_iter().enumerate() {
            let worker = Worker::new(
                underlay,
                WorkerConfig {
                    tables: Arc::clone(&tables),
                    captures: Arc::clone(&captures),
                    probes: Arc::clone(&probes),
                    paths: Arc::clone(&paths),
                    misdeliveries: Arc::clone(&misdeliveries),
                    settings,
                    index,
                },
            );
            counters.push(worker.counters());
            threads.push(
                WorkerThread::spawn(format!("vtep-{index}"), worker)
                    .map_err(StartError::Threads)?,
            );
        }
        let errors = ErrorWatch::spawn(Arc::clone(&send)).map_err(StartError::Threads)?;
        Ok(Self {
            errors,
            workers: threads,
            ports: Mutex::default(),
            writer: Mutex::new(writer),
            tables,
            counters,
            captures,
            misdeliveries,
            probes,
            paths,
            send,
            netns,
            settings,
            receiving: Mutex::new(receiving),
        })
    }

    /// Sends and takes datagrams without checksums from now on. Where that fails, they go with checksums, which any receiver takes.
    fn allow_unsummed(&self) {
        let mut receiving = lock(&self.receiving);
        if receiving.unsummed {
            return;
        }
        let listen = receiving.listen;
        let opened = self.netns.run(|| self.send.open_unsummed(listen.ip()));
        let allowed = opened
            .map_err(io::Error::other)
            .and_then(|opened| opened)
            .and_then(|()| receiving.accept_unsummed())
            .and_then(|()| self.send.source_ports());
        match allowed {
            Ok(source_ports) => {
                self.captures.set_own(listen, source_ports);
                self.errors.refresh();
                receiving.unsummed = true;
            }
            Err(error) => tracing::warn!(
                %error, "can't switch UDP checksums off: networks with udp-checksum=false send them, and lose what comes without over IPv6"
            ),
        }
    }

    /// Opens the queues of a port that is not attached yet, from inside its namespace.
    fn open(
        &self,
        spec: &PortSpec,
        ports: &HashMap<PortId, AttachedPort>,
        opener: fn(&str, Backend, Sharing) -> Result<OpenTap, TapError>,
    ) -> Result<OpenTap, DatapathError> {
        let id = spec.id;
        if ports.contains_key(&id) {
            return Err(DatapathError::AlreadyAttached(id));
        }
        let workers = self.workers.len();
        let sharing = Sharing {
            workers,
            // Which worker reads where there is one queue.
            reader: usize::try_from(id.0).unwrap_or(0) % workers,
            one_queue: ports.len() >= MULTI_QUEUE_PORTS,
        };
        spec.netns
            .run(|| opener(&spec.ifname, spec.backend, sharing))
            .map_err(|source| DatapathError::Namespace { id, source })?
            .map_err(|source| DatapathError::Tap { id, source })
    }

    /// Gives each worker its queue of the port and waits until all have it; then the tables name it.
    fn plug(
        &self,
        spec: &PortSpec,
        open: OpenTap,
        ports: &mut HashMap<PortId, AttachedPort>,
    ) -> Result<(), DatapathError> {
        let (done, finished) = bounded(0);
        for (worker, tap) in self.workers.iter().zip(open.queues) {
            worker.command(Command::AddPort {
                id: spec.id,
                mtu: spec.mtu,
                backend: spec.backend,
                tap,
                done: done.clone(),
            });
        }
        drop(done);
        // Nobody sends on it: it ends when the last worker has dropped its end.
        let _ = finished.recv();
        ports.insert(
            spec.id,
            AttachedPort {
                backend: spec.backend,
                features: open.features,
                control: open.control,
            },
        );
        let port = Port {
            id: spec.id,
            vni: spec.vni,
            mac: spec.mac,
            ips: spec.ips.clone(),
            mtu: spec.mtu,
            any_source: spec.any_source,
        };
        self.apply(&[Change::AddPort(port)]);
        Ok(())
    }

    /// Takes the port out of the tables and waits until every worker has closed its queue.
    fn unplug(&self, id: PortId) -> Option<AttachedPort> {
        let port = lock(&self.ports).remove(&id)?;
        self.apply(&[Change::RemovePort(id)]);
        let (done, finished) = bounded(0);
        for worker in &self.workers {
            worker.command(Command::RemovePort {
                id,
                done: done.clone(),
            });
        }
        drop(done);
        let _ = finished.recv();
        Some(port)
    }
}

impl Receiving {
    fn new(listen: SocketAddr, underlays: &[UdpUnderlay]) -> Self {
        let sockets = underlays.iter().map(UdpUnderlay::receive_socket);
        Self {
            listen,
            sockets: sockets.cloned().collect(),
            unsummed: false,
        }
    }

    fn accept_unsummed(&self) -> io::Result<()> {
        self.sockets
            .iter()
            .try_for_each(|socket| socket.accept_unsummed())
    }
}

impl Datapath for UserspaceDatapath {
    fn kind(&self) -> &'static str {
        "userspace"
    }

    fn attach(&self, spec: &PortSpec) -> Result<(), DatapathError> {
        let id = spec.id;
        let mut ports = lock(&self.ports);
        // Until it is made persistent, dropping `open` removes the interface again.
        let open = self.open(spec, &ports, tap::create)?;
        Netlink::open(&spec.netns)
            .and_then(|netlink| {
                netlink.set_mac(&spec.ifname, spec.mac.octets())?;
                netlink.set_mtu(&spec.ifname, u32::from(spec.mtu))
            })
            .map_err(|source| DatapathError::Netlink { id, source })?;
        open.control
            .set_persistent(true)
            .map_err(|source| DatapathError::Interface {
                id,
                operation: "keep",
                source,
            })?;
        self.plug(spec, open, &mut ports)
    }

    fn adopt(&self, spec: &PortSpec) -> Result<(), DatapathError> {
        let mut ports = lock(&self.ports);
        let open = self.open(spec, &ports, tap::open)?;
        self.plug(spec, open, &mut ports)
    }

    fn detach(&self, id: PortId) -> Result<(), DatapathError> {
        let Some(port) = self.unplug(id) else {
            return Ok(());
        };
        match port.control.set_persistent(false) {
            Ok(()) => Ok(()),
            // Somebody removed the interface before us.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
            Err(source) => Err(DatapathError::Interface {
                id,
                operation: "remove",
                source,
            }),
        }
        // `port.control` is the last to hold the queue: the interface goes here, and so does our hold on the namespace.
    }

    fn release(&self, id: PortId) -> Result<(), DatapathError> {
        drop(self.unplug(id));
        Ok(())
    }

    fn apply(&self, changes: &[Change]) {
        let unsummed = |change: &Change| matches!(change, Change::SetNetwork(config) if !config.settings.udp_checksum);
        if changes.iter().any(unsummed) {
            self.allow_unsummed();
        }
        lock(&self.writer).apply(changes);
    }

    fn announce(&self, announcement: Announcement) -> usize {
        let tables = self.tables.load();
        let ports = tables
            .network(announcement.vni)
            .map_or(0, |network| network.ports().len());
        // Every worker reaches every port; one tells them all.
        let worker = usize::try_from(announcement.vni.get()).unwrap_or(0) % self.workers.len();
        if ports > 0 {
            self.workers[worker].command(Command::Announce(announcement));
        }
        ports
    }

    fn listen_on(&self, port: u16) -> Result<(), StartError> {
        let mut receiving = lock(&self.receiving);
        let listen = SocketAddr::new(receiving.listen.ip(), port);
        if listen == receiving.listen {
            return Ok(());
        }
        let failed = |error| StartError::from_sockets(&self.netns, listen, error);
        let underlays = self
            .netns
            .run(|| UdpUnderlay::reopen(listen.ip(), port, self.workers.len(), &self.send))
            .map_err(StartError::Namespace)?
            .map_err(failed)?;
        let mut next = Receiving::new(listen, &underlays);
        if receiving.unsummed {
            next.accept_unsummed().map_err(failed)?;
            next.unsummed = true;
        }
        self.captures
            .set_own(listen, self.send.source_ports().map_err(failed)?);
        let (done, finished) = bounded(0);
        for (worker, underlay) in self.workers.iter().zip(underlays) {
            worker.command(Command::SetUnderlay {
                underlay,
                done: done.clone(),
            });
        }
        drop(done);
        // The old sockets close when the last worker has let go of its own.
        *receiving = next;
        let _ = finished.recv();
        Ok(())
    }

    fn tables(&self) -> Arc<Tables> {
        self.tables.load_full()
    }

    fn counters(&self) -> Counters {
        Counters::sum(&self.counters)
    }

    fn misdeliveries(&self) -> Receiver<Misdelivered> {
        self.misdeliveries.receiver()
    }

    fn capture(&self, filter: CaptureFilter) -> Capture {
        self.captures.start(filter)
    }

    fn send_probe(&self, to: SocketAddr, nonce: Nonce, size: u16) -> io::Result<()> {
        let payload = probe::payload(&to, &nonce, size)?;
        let flow = u32::from_be_bytes([nonce[0], nonce[1], nonce[2], nonce[3]]);
        let slices = [IoSlice::new(&payload)];
        let report = self.send.send(&[Datagram {
            to,
            flow,
            outer: OuterFields::default(),
            segment_size: None,
            slices: &slices,
        }]);
        if report.too_big > 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        if report.sent == 0 {
            return Err(io::Error::other(format!(
                "the kernel refused to send to {to}: is there a route?"
            )));
        }
        Ok(())
    }

    fn expect_probe(&self, nonce: Nonce) -> ProbeWatch {
        self.probes.expect(nonce)
    }

    fn paths(&self) -> &Paths {
        &self.paths
    }

    fn status(&self) -> DatapathStatus {
        let ports = lock(&self.ports);
        let backends = [Backend::Offload, Backend::Plain]
            .map(|backend| {
                let offload = backend == Backend::Offload;
                let of_backend = ports.values().filter(|port| port.backend == backend);
                BackendStatus {
                    backend,
                    ports: of_backend.clone().count(),
                    multi_queue: offload,
                    vnet_header: offload,
                    features: of_backend
                        .map(|port| port.features)
                        .reduce(TapFeatures::common)
                        .unwrap_or_default(),
                }
            })
            .to_vec();
        let receiving = lock(&self.receiving);
        let socket = receiving.sockets.first();
        DatapathStatus {
            kind: self.kind(),
            listen: receiving.listen,
            workers: self.workers.len(),
            source_ports: crate::flow::SOURCE_PORTS,
            receive_buffer_bytes: socket.map_or(0, |socket| socket.buffer()),
            segments_max: self.send.segments_max(),
            merges_datagrams: socket.is_some_and(|socket| socket.merges()),
            port_floods: self.settings.port_floods,
            remote_floods: self.settings.remote_floods,
            path_reports: self.paths.reports(),
            backends,
        }
    }
}

/// What these locks guard is whole between any two statements, so a panic elsewhere while one was held spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Allows this process as many open files as many ports need; as many as it may have, where that is less.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let enough = |value: Option<u64>| value.is_none_or(|files| files >= FILES_WANTED);
    if enough(limit.current) {
        return;
    }
    let wanted = Rlimit {
        current: Some(FILES_WANTED),
        maximum: limit.maximum.map(|files| files.max(FILES_WANTED)),
    };
    if setrlimit(Resource::Nofile, wanted).is_err()
        && let Err(error) = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                maximum: limit.maximum,
            },
        )
    {
        tracing::warn!(%error, "can't raise the limit of open files; hosts with many containers may meet it");
    }
}
