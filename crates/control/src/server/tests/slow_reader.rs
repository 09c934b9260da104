use std::io::Cursor;

use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::*;
use crate::agent::Agent;
use crate::limits::{FRAME_MAX, OUTBOX_BEHIND};
use crate::message::ToAgent;
use crate::transport::read_frame;

const ENDPOINTS: usize = 1000;
/// Far more than the kernel keeps of a connection whose reader does not read.
const ROUNDS_MAX: usize = 2000;

/// An agent whose reading the test decides about.
struct Reader {
    stream: TlsStream<TcpStream>,
    /// Read, and not looked at yet.
    sipped: Cursor<Vec<u8>>,
    agent: Agent,
    started: Instant,
}

impl Reader {
    async fn connect(stand: &Stand, host: u16, vni: Vni) -> Self {
        let stream = connect(stand.at, &stand.authority, host).await.unwrap();
        let small = socket2::SockRef::from(stream.get_ref().0).set_recv_buffer_size(4096);
        small.unwrap();
        let cluster = stand.authority.cluster();
        let mut agent = Agent::new(info(stand.at, host), cluster, vec![stand.at]);
        agent.subscribe(vni);
        agent.handle_connected(stand.at, Duration::ZERO);
        let started = Instant::now();
        Self {
            stream,
            sipped: Cursor::default(),
            agent,
            started,
        }
    }

    async fn write(&mut self) {
        while let Some(message) = self.agent.poll_message() {
            say(&mut self.stream, &message).await;
        }
    }

    /// Reads a little of what is there: enough not to be taken for dead.
    async fn sip(&mut self) {
        let mut bytes = [0; 512];
        if let Ok(read) = timeout(Duration::from_millis(10), self.stream.read(&mut bytes)).await {
            let read = read.expect("the connection stands");
            self.sipped.get_mut().extend_from_slice(&bytes[..read]);
        }
    }

    /// Reads until `holds`.
    async fn read_until(&mut self, what: &str, holds: impl Fn(&Agent) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(&self.agent) {
            self.write().await;
            let mut reader = (&mut self.sipped).chain(&mut self.stream);
            let frame = timeout(PATIENCE, read_frame(&mut reader, FRAME_MAX)).await;
            let message = ToAgent::decode(&frame.expect(what).unwrap()).unwrap();
            self.agent.handle_message(message, self.started.elapsed());
            while self.agent.poll_output().is_some() {}
            assert!(Instant::now() < deadline, "{what}");
        }
    }
}

fn up(agent: &Agent, vni: Vni) -> usize {
    let rows = agent.table(vni).into_iter().flat_map(|table| table.rows());
    rows.filter(|row| row.state == crate::State::Up).count()
}

#[test]
fn a_slow_reader_costs_little_and_misses_nothing() {
    let stand = Stand::start(123);
    let (one, two) = (stand.join(1), stand.join(2));
    let vni = create(&one, "10.64.0.0/16");
    two.subscribe(vni);
    // Several at once, for each waits for its answer.
    let endpoints: Vec<Endpoint> = std::thread::scope(|scope| {
        let allocating: Vec<_> = (0..8)
            .map(|part| {
                let one = &one;
                let names = (0..ENDPOINTS / 8).map(move |n| format!("c{part}-{n}"));
                scope.spawn(move || names.map(|name| allocate(one, name)).collect::<Vec<_>>())
            })
            .collect();
        let all = allocating.into_iter().flat_map(|part| part.join().unwrap());
        all.collect()
    });
    let publish = |state| {
        for endpoint in &endpoints {
            one.publish(endpoint.clone(), state);
        }
        // Answered after all of them: what is published faster than it is handled would wait for itself alone.
        one.request(Request::Networks).unwrap();
    };
    runtime().block_on(async {
        let mut reader = Reader::connect(&stand, 3, vni).await;
        reader
            .read_until("the reader follows the network", |agent| {
                agent.is_up() && agent.table(vni).is_some_and(|table| !table.is_empty())
            })
            .await;
        // It nearly stops reading, and all changes, again and again.
        let mut most = 0;
        let mut rounds = 0;
        while stand.manager.status().behind == 0 {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "the reader is never behind");
            publish([EndpointState::Down, EndpointState::Up][rounds % 2]);
            say(&mut reader.stream, &ToManager::Heartbeat).await;
            most = most.max(stand.manager.status().queued_bytes);
            reader.sip().await;
        }
        for state in [EndpointState::Down, EndpointState::Up, EndpointState::Down] {
            publish(state);
            reader.sip().await;
            most = most.max(stand.manager.status().queued_bytes);
        }
        publish(EndpointState::Up);
        // Others hear all of it meanwhile.
        let last = await_news(&one, &two, "last");
        most = most.max(stand.manager.status().queued_bytes);
        println!("{rounds} rounds of {ENDPOINTS} changes; at most {most} bytes waited");
        // News above the limit are left out; the one message that reached it may be long, and others' answers count too.
        assert!(most < OUTBOX_BEHIND + FRAME_MAX, "{most}");
        assert_eq!(stand.manager.status().behind, 1);
        // It reads again, and has all.
        reader
            .read_until("what was missed is made up", |agent| {
                up(agent, vni) == ENDPOINTS + 1
            })
            .await;
        let mut rows = reader.agent.table(vni).unwrap().rows();
        assert!(rows.any(|row| (row.ip, row.mac) == (last.ips[0], last.mac)));
    });
    wait_until("nobody is behind", || stand.manager.status().behind == 0);
}
