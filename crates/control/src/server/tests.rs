//! A real manager on loopback addresses, and peers that are hostile, slow or many (conformance H14).

mod half_open;
mod many;
mod nonsense;
mod slow_reader;

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use vtep::Vni;

use super::*;
use crate::client::{AgentConfig, AgentHandle};
use crate::dial::dial;
use crate::epoch::Epoch;
use crate::host::HostInfo;
use crate::message::{ToManager, VERSION};
use crate::network::{Endpoint, NetworkSpec};
use crate::pki::LIFETIME;
use crate::request::{EndpointState, Event, Request, Response};
use crate::store::MemoryStore;
use crate::table::TableChange;
use crate::tls;
use crate::transport::write_frame;

/// For what must come to pass on a slow machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct NoProbes;

impl Prober for NoProbes {
    fn expect(&self, _: [u8; 16]) {}

    fn reply(&self, _: [u8; 16], _: SocketAddr, _: [u8; 16], _: &[u16]) -> Vec<u16> {
        Vec::new()
    }
}

/// A manager in its own 127.N.0.0/16.
struct Stand {
    authority: Arc<Authority>,
    at: SocketAddr,
    manager: ManagerHandle,
}

impl Stand {
    fn start(net: u8) -> Self {
        let clock = WallClock::default();
        let authority = Arc::new(Authority::create(clock.unix()).unwrap());
        let at = SocketAddr::new([127, net, 0, 1].into(), 4789);
        let manager = ManagerHandle::start(ManagerConfig {
            listen: at,
            host: id(1),
            store: Box::new(MemoryStore::default()),
            authority: Arc::clone(&authority),
            lifetime: LIFETIME,
            prober: Arc::new(NoProbes),
            pools: Vec::new(),
            clock,
            succeeds: None,
        });
        Self {
            authority,
            at,
            manager: manager.unwrap(),
        }
    }

    fn config(&self, host: u16) -> AgentConfig {
        let info = info(self.at, host);
        AgentConfig {
            bind: info.vtep,
            host: info,
            managers: vec![self.at],
            identity: Arc::new(identity(&self.authority, host)),
            endpoints: Vec::new(),
            cache: None,
            clock: WallClock::default(),
        }
    }

    /// A well-behaved agent.
    fn join(&self, host: u16) -> AgentHandle {
        let agent = AgentHandle::start(self.config(host)).unwrap();
        agent.wait_connected(PATIENCE).unwrap();
        agent
    }
}

fn id(host: u16) -> HostId {
    let [a, b] = host.to_be_bytes();
    HostId::from_bytes([a, b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
}

fn info(manager: SocketAddr, host: u16) -> HostInfo {
    let IpAddr::V4(manager) = manager.ip() else {
        panic!("tests run over IPv4")
    };
    let [_, net, ..] = manager.octets();
    let [a, b] = host.to_be_bytes();
    crate::testing::host_info(id(host), host, [127, net, a, b])
}

fn identity(authority: &Authority, host: u16) -> crate::Identity {
    let unix = WallClock::default().unix();
    authority
        .issue(id(host), Role::Worker, unix, LIFETIME)
        .unwrap()
}

/// A connection that has shown a host's certificate and said nothing yet.
async fn connect(
    manager: SocketAddr,
    authority: &Authority,
    host: u16,
) -> Result<TlsStream<TcpStream>, String> {
    let config = tls::client_config(&identity(authority, host)).unwrap();
    dial(info(manager, host).vtep, manager, config).await
}

async fn say(stream: &mut TlsStream<TcpStream>, message: &ToManager) {
    write_frame(stream, &message.encode()).await.unwrap();
    stream.flush().await.unwrap();
}

fn hello(manager: SocketAddr, host: u16) -> ToManager {
    ToManager::Hello {
        version: VERSION,
        host: info(manager, host),
        last_epoch: Epoch::ZERO,
    }
}

fn create(agent: &AgentHandle, subnet: &str) -> Vni {
    let request = Request::CreateNetwork {
        spec: NetworkSpec {
            subnets: vec![subnet.parse().unwrap()],
            ..NetworkSpec::named("net1")
        },
        routes_in_use: Vec::new(),
    };
    let Response::Network(network) = agent.request(request).unwrap() else {
        panic!("no network")
    };
    network.vni
}

fn allocate(agent: &AgentHandle, container: String) -> Endpoint {
    let request = Request::Allocate {
        network: "net1".to_owned(),
        container,
        ips: Vec::new(),
        mac: None,
        service: None,
        weight: None,
    };
    let Response::Endpoint(endpoint) = agent.request(request).unwrap() else {
        panic!("no endpoint")
    };
    endpoint
}

/// Another host's endpoint comes up, and this one hears of it.
fn await_news(publisher: &AgentHandle, listener: &AgentHandle, container: &str) -> Endpoint {
    let endpoint = allocate(publisher, container.to_owned());
    publisher.publish(endpoint.clone(), EndpointState::Up);
    let wanted = TableChange::Neighbor {
        ip: endpoint.ips[0],
        mac: Some(endpoint.mac),
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let event = listener.events().recv_deadline(deadline);
        if let Event::Table { changes, .. } = event.expect("news of the endpoint come")
            && changes.contains(&wanted)
        {
            return endpoint;
        }
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<usize>().unwrap() * 1024
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Lets this process open so many files.
fn raise_file_limit(files: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < files) {
        let raised = Rlimit {
            current: Some(files),
            maximum,
        };
        setrlimit(Resource::Nofile, raised)
            .unwrap_or_else(|error| panic!("this test opens {files} files (ulimit -Hn): {error}"));
    }
}
