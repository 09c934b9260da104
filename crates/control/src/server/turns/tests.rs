use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;
use crate::limits::INPUTS_MAX;
use crate::network::NetworkSpec;
use crate::pki::{Authority, LIFETIME, WallClock};
use crate::request::Request;
use crate::store::{MemoryStore, Store, StoreError, Write};

/// Counts what it is asked to make durable, and fails when it is told to.
#[derive(Clone, Default)]
struct Watched {
    inner: MemoryStore,
    commits: Arc<AtomicUsize>,
    full: Arc<AtomicBool>,
}

impl Store for Watched {
    fn load(&mut self) -> Result<BTreeMap<String, String>, StoreError> {
        self.inner.load()
    }

    fn commit(&mut self, batch: &[Write]) -> Result<(), StoreError> {
        if self.full.load(Ordering::Relaxed) {
            return Err(StoreError::Full {
                path: "store".into(),
            });
        }
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.inner.commit(batch)
    }
}

struct NoProbes;

impl Prober for NoProbes {
    fn expect(&self, _: [u8; 16]) {}

    fn reply(&self, _: [u8; 16], _: SocketAddr, _: [u8; 16], _: &[u16]) -> Vec<u16> {
        Vec::new()
    }
}

const HOST: HostId = HostId::from_bytes([1; 16]);

fn turns(store: &Watched) -> Turns {
    let clock = WallClock::default();
    let authority = Arc::new(Authority::create(clock.unix()).unwrap());
    let mut keeper = Keeper {
        store: Box::new(store.clone()),
        host: HOST,
        cluster: authority.cluster(),
        pools: Vec::new(),
        wall: clock.clone(),
        started: Instant::now(),
        listen: ([127, 0, 0, 1], 4789).into(),
        succeeds: None,
    };
    Turns::new(Parts {
        manager: keeper.load().unwrap(),
        keeper,
        signer: Signer {
            authority,
            lifetime: LIFETIME,
            clock,
        },
        prober: Arc::new(NoProbes),
        status: Arc::new(Mutex::new(ManagerStatus::at_start(
            ([127, 0, 0, 1], 4789).into(),
        ))),
        standbys: Arc::default(),
        members: Arc::default(),
        stop: Arc::default(),
    })
}

fn hello(turns: &Turns, connection: Connection) -> Input {
    let signer = &turns.signer;
    let unix = signer.clock.unix();
    let identity = signer.authority.issue(HOST, Role::Worker, unix, LIFETIME);
    let vtep = IpAddr::from([192, 0, 2, 1]);
    Input::Hello {
        connection,
        certificate: identity.unwrap().certificate().clone(),
        from: vtep,
        host: crate::testing::host_info(HOST, 1, vtep),
        last_epoch: Epoch::ZERO,
        outbox: Outbox::new(tokio::io::sink()).0,
    }
}

fn call(id: u64, request: Request) -> Input {
    Input::Message {
        connection: 1,
        message: ToManager::Call { id, request },
        room: None,
    }
}

fn entries(store: &Watched, kind: &str) -> usize {
    let stored = store.clone().load().unwrap();
    stored.keys().filter(|key| key.starts_with(kind)).count()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
}

#[test]
fn requests_that_come_at_once_share_a_commit() {
    let runtime = runtime();
    let _entered = runtime.enter();
    let store = Watched::default();
    let turns = turns(&store);
    let (inputs, received) = mpsc::channel(INPUTS_MAX);
    let create = Request::CreateNetwork {
        spec: NetworkSpec::named("net1"),
        routes_in_use: Vec::new(),
    };
    let allocate = |number| Request::Allocate {
        network: "net1".to_owned(),
        container: format!("c{number}"),
        ips: Vec::new(),
        mac: None,
        service: None,
        weight: None,
    };
    let changes = 200;
    let calls = (1..=changes).map(|number| call(number, allocate(number)));
    for input in [hello(&turns, 1), call(0, create)].into_iter().chain(calls) {
        inputs.try_send(input).ok().unwrap();
    }
    drop(inputs);
    turns.run(received);
    assert_eq!(entries(&store, "endpoint/"), 200);
    assert_eq!(store.commits.load(Ordering::Relaxed), 1);
}

#[test]
fn a_full_disk_is_told_and_the_manager_goes_on_when_there_is_room() {
    let runtime = runtime();
    let _entered = runtime.enter();
    let store = Watched::default();
    let mut turns = turns(&store);
    store.full.store(true, Ordering::Relaxed);
    turns.handle(hello(&turns, 1));
    turns.finish();
    let said = turns.status.lock().unwrap().store_error.clone().unwrap();
    assert!(said.contains("no space left for store"), "{said}");
    // Who was told nothing connects anew.
    assert!(turns.outboxes.is_empty());
    assert_eq!(entries(&store, ""), 0);

    store.full.store(false, Ordering::Relaxed);
    let deadline = Instant::now() + Duration::from_secs(30);
    while turns.manager.is_err() {
        assert!(Instant::now() < deadline, "the store is not read again");
        turns.handle(Input::Tick);
        std::thread::yield_now();
    }
    turns.handle(hello(&turns, 2));
    turns.finish();
    assert_eq!(entries(&store, "host/"), 1);
    assert_eq!(turns.status.lock().unwrap().store_error, None);
}
