//! What a thousand hosts' connections cost a manager. A measurement:
//! `cargo test --release -p control --test thousand -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::{
    AgentConfig, AgentHandle, Authority, HostId, HostInfo, ManagerConfig, ManagerHandle,
    MemoryStore, Prober, Role, WallClock, pki,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const HOSTS: u16 = 1000;
const MANAGER: [u8; 4] = [127, 119, 255, 1];
/// Names the file with the authority, for the process that plays the hosts.
const PLAY_HOSTS: &str = "TOWLINE_TEST_PLAY_HOSTS";
const PATIENCE: Duration = Duration::from_secs(300);

struct NoProbes;

impl Prober for NoProbes {
    fn expect(&self, _: [u8; 16]) {}

    fn reply(&self, _: [u8; 16], _: SocketAddr, _: [u8; 16], _: &[u16]) -> Vec<u16> {
        Vec::new()
    }
}

fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: usize = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib * 1024
}

/// The hosts, in a process of their own, until it is killed.
fn play_hosts(file: &str) {
    let authority = Authority::from_pem(&std::fs::read_to_string(file).unwrap()).unwrap();
    let agents: Vec<AgentHandle> = (0..HOSTS)
        .map(|n| {
            let id = HostId::random();
            let now = WallClock::default().unix();
            let [high, low] = n.to_be_bytes();
            let vtep = [127, 119, high, low].into();
            let config = AgentConfig {
                host: HostInfo {
                    id,
                    name: format!("h{n}"),
                    vtep,
                    port: 4789,
                    link_mtu: 1500,
                    incarnation: 1,
                },
                managers: vec![SocketAddr::new(MANAGER.into(), 4789)],
                identity: Arc::new(
                    authority
                        .issue(id, Role::Worker, now, pki::LIFETIME)
                        .unwrap(),
                ),
                bind: vtep,
                endpoints: Vec::new(),
                cache: None,
                clock: WallClock::default(),
            };
            AgentHandle::start(config).unwrap()
        })
        .collect();
    std::thread::sleep(PATIENCE);
    drop(agents);
}

#[test]
#[ignore = "a measurement of memory, with a thousand agents"]
fn connections_of_a_thousand_hosts() {
    allow_many_files();
    if let Ok(file) = std::env::var(PLAY_HOSTS) {
        return play_hosts(&file);
    }
    let authority = Arc::new(Authority::create(WallClock::default().unix()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("authority.pem");
    std::fs::write(&file, authority.to_pem()).unwrap();
    let manager = ManagerHandle::start(ManagerConfig {
        listen: SocketAddr::new(MANAGER.into(), 4789),
        host: HostId::random(),
        store: Box::new(MemoryStore::default()),
        authority,
        lifetime: pki::LIFETIME,
        prober: Arc::new(NoProbes),
        pools: Vec::new(),
        clock: WallClock::default(),
        succeeds: None,
    })
    .unwrap();
    let before = resident();
    let mut hosts = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "connections_of_a_thousand_hosts"])
        .env(PLAY_HOSTS, &file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while manager.status().connected < usize::from(HOSTS) && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(50));
    }
    let (connected, took) = (manager.status().connected, started.elapsed());
    let grown = resident().saturating_sub(before);
    hosts.kill().unwrap();
    hosts.wait().unwrap();
    assert_eq!(connected, usize::from(HOSTS));
    let each = grown / connected;
    println!(
        "{connected} hosts in {:.1} s, {each} bytes each in the manager",
        took.as_secs_f64()
    );
    assert!(each < 256 * 1024, "{each} bytes for each host");
}
