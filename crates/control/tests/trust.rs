//! Who may come in, over real TLS on loopback addresses: tokens, certificates, renewal, removal, clocks that are wrong.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use control::manager::{Manager, Settings};
use control::{
    AgentConfig, AgentError, AgentHandle, Authority, Event, HostId, Identity, JoinError, Lasts,
    ManagerConfig, ManagerHandle, MemoryStore, Prober, Request, RequestError, Response, Role,
    Secret, Token, WallClock, join, pki,
};

use common::await_event;

const PATIENCE: Duration = Duration::from_secs(30);
const DAY: i64 = 24 * 3600;

struct NoProbes;

impl Prober for NoProbes {
    fn expect(&self, _: [u8; 16]) {}

    fn reply(&self, _: [u8; 16], _: SocketAddr, _: [u8; 16], _: &[u16]) -> Vec<u16> {
        Vec::new()
    }
}

/// A clock that is wrong by so many seconds.
fn clock_off_by(seconds: &Arc<AtomicI64>) -> WallClock {
    let (right, seconds) = (WallClock::default(), Arc::clone(seconds));
    WallClock::new(move || {
        let off = seconds.load(Ordering::Relaxed);
        let by = Duration::from_secs(off.unsigned_abs());
        if off < 0 {
            right.unix().saturating_sub(by)
        } else {
            right.unix() + by
        }
    })
}

struct Cluster {
    authority: Arc<Authority>,
    store: MemoryStore,
    manager: SocketAddr,
    lifetime: Duration,
    manager_clock: Arc<AtomicI64>,
    host_clock: Arc<AtomicI64>,
}

impl Cluster {
    /// Each test has its own 127.N.0.0/16, so that all may run at once.
    fn new(net: u8) -> Self {
        Self {
            authority: Arc::new(Authority::create(WallClock::default().unix()).unwrap()),
            store: MemoryStore::default(),
            manager: SocketAddr::new([127, net, 0, 1].into(), 4789),
            lifetime: pki::LIFETIME,
            manager_clock: Arc::default(),
            host_clock: Arc::default(),
        }
    }

    fn start(&self) -> ManagerHandle {
        ManagerHandle::start(ManagerConfig {
            listen: self.manager,
            host: HostId::from_bytes([1; 16]),
            store: Box::new(self.store.clone()),
            authority: Arc::clone(&self.authority),
            lifetime: self.lifetime,
            prober: Arc::new(NoProbes),
            pools: Vec::new(),
            clock: clock_off_by(&self.manager_clock),
            succeeds: None,
        })
        .unwrap()
    }

    fn address(&self, host: u8) -> IpAddr {
        let IpAddr::V4(manager) = self.manager.ip() else {
            panic!("tests run over IPv4")
        };
        let [a, b, c, _] = manager.octets();
        [a, b, c, host].into()
    }

    fn issue(&self, host: HostId, role: Role) -> Arc<Identity> {
        let unix = clock_off_by(&self.manager_clock).unix();
        Arc::new(
            self.authority
                .issue(host, role, unix, self.lifetime)
                .unwrap(),
        )
    }

    fn config(&self, host: u8, identity: &Arc<Identity>) -> AgentConfig {
        AgentConfig {
            host: control::testing::host_info(
                identity.certificate().host,
                host.into(),
                self.address(host),
            ),
            managers: vec![self.manager],
            identity: Arc::clone(identity),
            bind: self.address(host),
            endpoints: Vec::new(),
            cache: None,
            clock: clock_off_by(&self.host_clock),
        }
    }

    fn connect(&self, host: u8, identity: &Arc<Identity>) -> Result<AgentHandle, RequestError> {
        let agent = AgentHandle::start(self.config(host, identity)).unwrap();
        agent.wait_connected(PATIENCE)?;
        Ok(agent)
    }

    /// The agent of the manager's own host, which may see tokens.
    fn operator(&self) -> AgentHandle {
        let identity = self.issue(HostId::from_bytes([1; 16]), Role::Manager);
        self.connect(1, &identity).unwrap()
    }

    fn token(
        &self,
        operator: &AgentHandle,
        role: Role,
        rotate: bool,
        lasts: Option<Lasts>,
    ) -> Token {
        match operator.request(Request::Token {
            role,
            rotate,
            lasts,
        }) {
            Ok(Response::Token { secret, .. }) => Token::new(self.authority.digest(), secret),
            other => panic!("{other:?}"),
        }
    }

    fn join(&self, host: u8, token: &Token) -> Result<Arc<Identity>, JoinError> {
        join(&[self.manager], token, self.address(host)).map(Arc::new)
    }

    fn refused(&self, host: u8, token: &Token) -> String {
        match self.join(host, token) {
            Err(JoinError::Refused(reason) | JoinError::Unreachable(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }
}

/// Conformance H12: no token, wrong token, expired token, wrong authority.
#[test]
fn a_token_is_asked_and_each_wrong_one_is_refused_in_words() {
    let cluster = Cluster::new(111);
    let manager = cluster.start();
    let operator = cluster.operator();
    let token = cluster.token(&operator, Role::Worker, false, None);
    assert_eq!(
        cluster.token(&operator, Role::Worker, false, None),
        token,
        "asked again: the same"
    );

    // The manager chooses the id: two that join with one token are two hosts.
    let (first, second) = (
        cluster.join(2, &token).unwrap(),
        cluster.join(3, &token).unwrap(),
    );
    assert_ne!(first.certificate().host, second.certificate().host);
    assert_eq!(first.certificate().role, Role::Worker);
    let _two = cluster.connect(2, &first).unwrap();
    let manager_token = cluster.token(&operator, Role::Manager, false, None);
    assert_eq!(
        cluster.join(4, &manager_token).unwrap().certificate().role,
        Role::Manager
    );

    let guess = Token::new(cluster.authority.digest(), Secret::random());
    assert!(cluster.refused(5, &guess).starts_with("wrong token"));
    let elsewhere = Token::new([9; 32], token.secret().clone());
    assert!(cluster.refused(5, &elsewhere).contains("another cluster"));

    // Rotated: the old one is good no more, the new one is; the other role's stays.
    let rotated = cluster.token(&operator, Role::Worker, true, None);
    assert_ne!(rotated, token);
    assert!(cluster.refused(5, &token).starts_with("wrong token"));
    cluster.join(5, &rotated).unwrap();
    cluster.join(5, &manager_token).unwrap();

    // Expired by the manager's clock, until it is good for ever again.
    cluster.token(&operator, Role::Worker, false, Some(Lasts::Seconds(3600)));
    cluster.join(5, &rotated).unwrap();
    cluster.manager_clock.store(3601, Ordering::Relaxed);
    assert!(cluster.refused(5, &rotated).contains("expired"));
    cluster.token(&operator, Role::Worker, false, Some(Lasts::Forever));
    cluster.join(5, &rotated).unwrap();

    // All of it is in the store.
    manager.shutdown();
    let _manager = cluster.start();
    cluster.join(6, &rotated).unwrap();
    assert!(cluster.refused(6, &token).starts_with("wrong token"));
}

#[test]
fn a_worker_sees_no_token() {
    let cluster = Cluster::new(112);
    let _manager = cluster.start();
    let worker = cluster
        .connect(2, &cluster.issue(HostId::random(), Role::Worker))
        .unwrap();
    for role in [Role::Worker, Role::Manager] {
        let asked = worker.request(Request::Token {
            role,
            rotate: true,
            lasts: None,
        });
        assert!(
            matches!(&asked, Err(RequestError::Refused(reason)) if reason.contains("manager's host")),
            "{asked:?}"
        );
    }
}

/// Conformance H13: a host with one certificate calls itself another.
#[test]
fn a_host_is_who_its_certificate_says() {
    let cluster = Cluster::new(113);
    let identity = cluster.issue(HostId::random(), Role::Worker);
    let mut config = cluster.config(2, &identity);
    config.host.id = HostId::random();
    assert!(matches!(
        AgentHandle::start(config),
        Err(AgentError::OtherHost { .. })
    ));

    // An agent that does not look at itself meets a manager that does.
    let settings = Settings {
        host: HostId::from_bytes([1; 16]),
        cluster: cluster.authority.cluster(),
        seed: 1,
        unix_at_zero: WallClock::default().unix(),
        pools: Vec::new(),
    };
    let mut manager = Manager::new(settings, &Default::default(), Duration::ZERO).unwrap();
    let victim = cluster
        .config(3, &cluster.issue(HostId::random(), Role::Worker))
        .host;
    let from = victim.vtep;
    manager
        .handle_hello(
            1,
            from,
            victim.clone(),
            control::Epoch::ZERO,
            Duration::ZERO,
        )
        .unwrap();
    let refusal = manager
        .admit(2, identity.certificate().clone(), &victim)
        .unwrap_err();
    let names = [identity.certificate().host.to_string(), "h3".to_owned()];
    assert!(
        names.iter().all(|name| refusal.reason.contains(name)),
        "{refusal:?}"
    );
}

#[test]
fn a_removed_host_is_cut_off_at_once_and_for_ever() {
    let cluster = Cluster::new(114);
    let manager = cluster.start();
    let operator = cluster.operator();
    let token = cluster.token(&operator, Role::Worker, false, None);
    let identity = cluster.join(2, &token).unwrap();
    let agent = cluster.connect(2, &identity).unwrap();
    let remove = |force| {
        operator.request(Request::RemoveHost {
            host: "h2".to_owned(),
            force,
        })
    };
    let refused = remove(false).unwrap_err().to_string();
    assert!(
        refused.contains("h2 is connected") && refused.contains("--force"),
        "{refused}"
    );
    remove(true).unwrap();
    await_event(&agent, PATIENCE, "end of the connection", |event| {
        matches!(event, Event::Disconnected { reason } if reason.contains("removed")).then_some(())
    });
    let again = |identity| match cluster.connect(2, identity) {
        Err(RequestError::Refused(reason)) => assert!(reason.contains("removed"), "{reason}"),
        other => panic!("{other:?}"),
    };
    again(&identity);
    manager.shutdown();
    let _manager = cluster.start();
    again(&identity);
    // With a token the machine is a new host, under its old name.
    let fresh = cluster.join(2, &token).unwrap();
    cluster.connect(2, &fresh).unwrap();
}

#[test]
fn a_removed_host_can_be_shut_out_again_after_the_store_was_lost() {
    let mut cluster = Cluster::new(121);
    let manager = cluster.start();
    let operator = cluster.operator();
    let token = cluster.token(&operator, Role::Worker, false, None);
    let [kept, removed] = [2, 3].map(|host| cluster.join(host, &token).unwrap());
    let remove = |by: &AgentHandle, host: String| {
        let force = true;
        by.request(Request::RemoveHost { host, force })
    };
    let _agent = cluster.connect(3, &removed).unwrap();
    remove(&operator, "h3".to_owned()).unwrap();
    drop(operator);
    manager.shutdown();

    cluster.store = MemoryStore::default();
    let _manager = cluster.start();
    let operator = cluster.operator();
    let id = removed.certificate().host.to_string();
    // Not by any host: the list would grow as long as it likes.
    let worker = cluster.connect(2, &kept).unwrap();
    let refused = remove(&worker, id.clone()).unwrap_err().to_string();
    assert!(refused.contains("manager's host"), "{refused}");
    remove(&operator, id).unwrap();
    match cluster.connect(3, &removed) {
        Err(RequestError::Refused(reason)) => assert!(reason.contains("removed"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let unknown = remove(&operator, "h3".to_owned()).unwrap_err().to_string();
    assert!(unknown.contains("not found"), "{unknown}");
}

#[test]
fn a_host_that_stands_by_takes_over_and_the_old_manager_stands_down() {
    let cluster = Cluster::new(120);
    let first = cluster.start();
    let operator = cluster.operator();
    // A worker may not; a host that joined with the manager's token gets the authority.
    let listen = SocketAddr::new(cluster.address(2), 4789);
    let worker = cluster.issue(HostId::random(), Role::Worker);
    let worker = cluster.connect(3, &worker).unwrap();
    let refused = worker.request(Request::StandBy {
        listen: SocketAddr::new(cluster.address(3), 4789),
    });
    assert!(
        matches!(&refused, Err(RequestError::Refused(reason)) if reason.contains("joined as a worker")),
        "{refused:?}"
    );
    let token = cluster.token(&operator, Role::Manager, false, None);
    let identity = cluster.join(2, &token).unwrap();
    let second = cluster.connect(2, &identity).unwrap();
    let elsewhere = second.request(Request::StandBy {
        listen: cluster.manager,
    });
    assert!(elsewhere.is_err(), "{elsewhere:?}");
    let Ok(Response::Authority(pem)) = second.request(Request::StandBy { listen }) else {
        panic!("no authority")
    };
    let authority = Arc::new(Authority::from_pem(&pem.0).unwrap());
    assert_eq!(authority.digest(), cluster.authority.digest());
    assert!(!format!("{pem:?}").contains("PRIVATE"));
    await_event(
        &worker,
        PATIENCE,
        "a host that stands by",
        |event| match event {
            Event::Hosts(views) => views
                .iter()
                .any(|view| view.control == Some(listen))
                .then_some(()),
            _ => None,
        },
    );
    assert_eq!(worker.status().managers, [cluster.manager, listen]);

    // The first manager is gone; the second begins above all that it has seen, with nothing.
    first.shutdown();
    let promoted = ManagerHandle::start(ManagerConfig {
        listen,
        host: identity.certificate().host,
        store: Box::new(MemoryStore::default()),
        authority,
        lifetime: cluster.lifetime,
        prober: Arc::new(NoProbes),
        pools: Vec::new(),
        clock: WallClock::default(),
        succeeds: Some(second.last_epoch()),
    })
    .unwrap();
    let connected_to = |agent: &AgentHandle, manager: SocketAddr| {
        let deadline = Instant::now() + PATIENCE;
        while agent.status().connected_to != Some(manager) {
            assert!(Instant::now() < deadline, "{:?}", agent.status());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    connected_to(&worker, listen);

    // The first one comes back with its store, hears of the other, and is gone again.
    let returned = cluster.start();
    let deadline = Instant::now() + PATIENCE;
    while returned.status().stood_down.is_none() {
        assert!(Instant::now() < deadline, "two managers");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(promoted.status().stood_down.is_none());
    connected_to(&second, listen);
    assert!(
        std::net::TcpStream::connect(cluster.manager).is_err(),
        "nobody listens there"
    );
}

/// Conformance H12: what somebody without a certificate can say on the control port.
#[test]
fn who_shows_no_certificate_gets_nothing_but_a_refusal() {
    use std::io::{Read as _, Write as _};
    let cluster = Cluster::new(115);
    let manager = cluster.start();
    for said in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 2, 0x12, 0x00],
        &[0x16, 0x03, 0x01, 0xff, 0xff],
        &[],
    ] {
        let mut stream = std::net::TcpStream::connect(cluster.manager).unwrap();
        stream.write_all(said).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        // Ends by a close or a reset.
        let _ = stream.read_to_end(&mut heard);
        assert!(heard.len() <= 7, "an alert at most: {heard:?}");
    }
    assert_eq!(manager.status().hosts, 0);
}

#[test]
fn certificates_are_renewed_before_they_end() {
    let mut cluster = Cluster::new(116);
    cluster.lifetime = Duration::from_secs(6);
    let _manager = cluster.start();
    let identity = cluster.issue(HostId::random(), Role::Worker);
    let agent = cluster.connect(2, &identity).unwrap();
    let mut last = identity;
    for _ in 0..2 {
        let renewed = await_event(&agent, PATIENCE, "new certificate", |event| match event {
            Event::IdentityRenewed(identity) => Some(identity),
            _ => None,
        });
        let (old, new) = (last.certificate(), renewed.certificate());
        assert_eq!((new.host, new.role), (old.host, old.role));
        assert_ne!(new.serial, old.serial);
        assert!(new.not_after > old.not_after);
        assert_ne!(renewed.to_pem(), last.to_pem(), "with a key of its own");
        last = renewed;
    }
    // The last one opens the door after a restart.
    agent.shutdown();
    cluster.connect(2, &last).unwrap();
}

#[test]
fn clocks_that_are_wrong_by_hours_break_nothing() {
    let cluster = Cluster::new(117);
    // Also one that was never set, and one that is years ahead, on the host's side.
    for (round, (manager, host)) in [
        (20 * 3600, -20 * 3600),
        (-20 * 3600, 20 * 3600),
        (0, -50 * 365 * DAY),
        (0, 3 * 365 * DAY),
    ]
    .into_iter()
    .enumerate()
    {
        cluster.manager_clock.store(manager, Ordering::Relaxed);
        cluster.host_clock.store(host, Ordering::Relaxed);
        let running = cluster.start();
        let token = cluster.token(&cluster.operator(), Role::Worker, false, None);
        let host = u8::try_from(round).unwrap() + 2;
        let identity = cluster.join(host, &token).unwrap();
        let agent = cluster.connect(host, &identity).unwrap();
        agent.request(Request::Networks).unwrap();
        running.shutdown();
    }
}

#[test]
fn a_clock_that_jumps_renews_and_a_known_host_stays() {
    let cluster = Cluster::new(118);
    let manager = cluster.start();
    let token = cluster.token(&cluster.operator(), Role::Worker, false, None);
    let (known, unknown) = (
        cluster.join(2, &token).unwrap(),
        cluster.join(3, &token).unwrap(),
    );
    let agent = cluster.connect(2, &known).unwrap();
    // The host's clock jumps by most of the certificate's time: a new one comes.
    cluster.host_clock.store(80 * DAY, Ordering::Relaxed);
    await_event(&agent, PATIENCE, "new certificate", |event| {
        matches!(event, Event::IdentityRenewed(_)).then_some(())
    });
    agent.shutdown();
    manager.shutdown();

    // The manager's clock jumps past the end of all certificates: the host on its list stays in, by the certificate that it last
    // came with; one that never came must join again.
    cluster.manager_clock.store(200 * DAY, Ordering::Relaxed);
    let _manager = cluster.start();
    cluster.connect(2, &known).unwrap();
    match cluster.connect(3, &unknown) {
        Err(RequestError::Refused(reason)) => assert!(reason.contains("out of date"), "{reason}"),
        other => panic!("{other:?}"),
    }
}
