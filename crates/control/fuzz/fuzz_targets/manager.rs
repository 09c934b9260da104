//! Any messages of hosts in any order: no panic; nobody changes another host's rows; no two endpoints have one MAC; what is
//! said at once is bounded; and what was written can be read again.
#![no_main]

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use control::manager::{Manager, Output, Settings};
use control::message::{ToAgent, ToManager};
use control::store::Write;
use control::{HostId, Request, Row, State};
use control_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vtep::Vni;

/// Bytes that a manager may say because of one message: some snapshots of small networks.
const SAID_MAX: usize = 1 << 20;

struct Bench {
    manager: Manager,
    stored: BTreeMap<String, String>,
    now: Duration,
    connections: u64,
    open: BTreeMap<u64, HostId>,
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let now = Duration::from_secs(1);
    let stored = BTreeMap::new();
    let mut bench = Bench {
        manager: load(&stored, now),
        stored,
        now,
        connections: 0,
        open: BTreeMap::new(),
    };
    // Half of all inputs begin where hosts are known and something runs.
    if input.below(2) == 0 {
        bench.furnish();
    }
    while !input.is_empty() {
        bench.step(&mut input);
    }
    load(&bench.stored, bench.now);
});

fn load(stored: &BTreeMap<String, String>, now: Duration) -> Manager {
    Manager::new(settings(), stored, now).expect("what a manager wrote, a manager reads")
}

fn settings() -> Settings {
    Settings {
        host: HostId::from_bytes([1; 16]),
        cluster: "c".to_owned(),
        // So that epochs begin where the messages' are.
        seed: 0,
        unix_at_zero: Duration::from_secs(999_999),
        pools: Vec::new(),
    }
}

impl Bench {
    fn furnish(&mut self) {
        for n in 1..=3 {
            self.hello(&mut Input(&[n - 1, 1, 10, 0, 0]));
        }
        self.now += Duration::from_secs(11);
        let spec = Input(&[0, 2, 1, 0, 1, 1, 1, 0, 0, 1]).request();
        for (connection, request) in [
            (1, spec),
            (
                1,
                Request::Allocate {
                    network: "net0".to_owned(),
                    container: "a".to_owned(),
                    ips: Vec::new(),
                    mac: None,
                    service: None,
                    weight: None,
                },
            ),
            (
                2,
                Request::Allocate {
                    network: "net0".to_owned(),
                    container: "b".to_owned(),
                    ips: Vec::new(),
                    mac: None,
                    service: None,
                    weight: None,
                },
            ),
        ] {
            self.manager
                .handle_message(connection, ToManager::Call { id: 1, request }, self.now);
            self.finish();
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0 => self.hello(input),
            1 => {
                let connection = self.connection(input);
                self.manager.handle_disconnected(connection);
                self.open.remove(&connection);
            }
            2 => {
                self.now += Duration::from_millis(u64::from(input.byte()) * 50);
                self.manager.handle_timeout(self.now);
            }
            3 => {
                // A restart: connections are gone, what was written is not.
                self.manager = load(&self.stored, self.now);
                self.open.clear();
                self.damage(input);
            }
            4 => {
                if let Ok(message) = ToManager::decode(input.bytes()) {
                    self.say(input, message);
                }
            }
            5 | 6 => {
                let bytes = input.to_manager().encode().to_vec();
                if let Ok(message) = ToManager::decode(&input.damage(bytes)) {
                    self.say(input, message);
                }
            }
            _ => {
                let message = input.to_manager();
                self.say(input, message);
            }
        }
        self.finish();
        self.check();
    }

    /// A store with an entry that was changed is refused, or is one of another content.
    fn damage(&self, input: &mut Input<'_>) {
        let mut stored = self.stored.clone();
        let which = usize::from(input.byte()) % stored.len().max(1);
        let Some((_, value)) = stored.iter_mut().nth(which) else {
            return;
        };
        *value = String::from_utf8_lossy(&input.damage(value.clone().into_bytes())).into_owned();
        if let Ok(mut manager) = Manager::new(settings(), &stored, self.now) {
            manager.handle_timeout(self.now + Duration::from_secs(60));
            manager.finish_turn(self.now);
            manager.take_writes();
        }
    }

    fn connection(&self, input: &mut Input<'_>) -> u64 {
        self.connections.saturating_sub(u64::from(input.below(4)))
    }

    fn hello(&mut self, input: &mut Input<'_>) {
        let info = input.host();
        self.connections += 1;
        let (id, from) = (info.id, info.vtep);
        if self
            .manager
            .handle_hello(self.connections, from, info, input.epoch(), self.now)
            .is_ok()
        {
            self.open.insert(self.connections, id);
        }
        self.finish();
    }

    fn say(&mut self, input: &mut Input<'_>, message: ToManager) {
        let connection = self.connection(input);
        let sender = self.open.get(&connection).copied();
        // An operator's word is meant to change others' rows.
        let by_order = matches!(
            &message,
            ToManager::Call {
                request: Request::RemoveHost { .. }
                    | Request::RemoveNetwork(_)
                    | Request::RemoveService(_),
                ..
            }
        );
        let before = (!by_order).then(|| self.rows());
        self.manager.handle_message(connection, message, self.now);
        let Some(before) = before else { return };
        let after = self.rows();
        for (place, row) in before {
            let changed = after.get(&place) != Some(&row);
            assert!(
                !changed || Some(row.owner) == sender || row.state == State::Free,
                "{sender:?} changed {row:?}"
            );
        }
    }

    fn rows(&self) -> HashMap<(Vni, std::net::IpAddr), Row> {
        let tables = vnis().filter_map(|vni| Some((vni, self.manager.table(vni)?)));
        tables
            .flat_map(|(vni, table)| table.rows().map(move |row| ((vni, row.ip), row.clone())))
            .collect()
    }

    /// Written first, then said, and only to who is there.
    fn finish(&mut self) {
        self.manager.finish_turn(self.now);
        for Write { key, value } in self.manager.take_writes() {
            match value {
                Some(value) => self.stored.insert(key, value),
                None => self.stored.remove(&key),
            };
        }
        let mut said = 0;
        while let Some(output) = self.manager.poll_output() {
            match output {
                Output::Send { to, message } => {
                    let bytes = message.encode();
                    said += bytes.len() * to.len();
                    assert_eq!(ToAgent::decode(&bytes).expect("our own bytes"), message);
                }
                Output::Close(connection) => drop(self.open.remove(&connection)),
                Output::Probe { .. } | Output::Sign { .. } | Output::Authority { .. } => {}
            }
        }
        assert!(said < SAID_MAX, "{said} bytes at once");
    }

    fn check(&self) {
        for table in vnis().filter_map(|vni| self.manager.table(vni)) {
            for row in table.rows().filter(|row| row.state == State::Up) {
                let other = table
                    .holders(row.mac)
                    .find(|other| other.epoch != row.epoch);
                assert!(other.is_none(), "{row:?} and {other:?} have one MAC");
            }
        }
    }
}

fn vnis() -> impl Iterator<Item = Vni> {
    (4096..4100).map(|n| Vni::new(n).expect("24 bits"))
}
