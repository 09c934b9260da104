//! Any messages of a manager in any order, between anything that an agent's program may do: no panic; what is said is bounded;
//! and a datapath that was told of the changes alone has what the agent's table has.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use control::agent::{Agent, Output};
use control::message::{ToAgent, ToManager};
use control::testing::Installed;
use control::{EndpointState, Event};
use control_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vtep::Vni;

const CLUSTER: &str = "0123456789abcdef";
/// Messages that an agent may say because of one thing: what it runs, follows and asks, and a hello.
const SAID_MAX: usize = 2048;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let host = Input(&[0, 1, 10, 0, 0]).host();
    let manager = ([192, 0, 2, 1], 4789).into();
    let mut agent = Agent::new(host, CLUSTER.to_owned(), vec![manager]);
    let mut installed: BTreeMap<Vni, Installed> = BTreeMap::new();
    // Of its own endpoints an agent tells what no manager has told it yet.
    let mut own: BTreeSet<IpAddr> = BTreeSet::new();
    let mut now = Duration::ZERO;
    let mut calls = 0;
    if input.below(2) == 0 {
        // Most of what may come has a meaning only after this.
        agent.subscribe(Vni::new(4096).expect("24 bits"));
        agent.handle_connected(manager, now);
        let mut welcome = Input(&[0, 0, 50, 2, 0]);
        agent.handle_message(welcome.to_agent(CLUSTER), now);
    }
    while !input.is_empty() {
        match input.below(16) {
            0 => agent.handle_connected(manager, now),
            1 => agent.handle_disconnected("fuzzed", now),
            2 => {
                now += Duration::from_millis(u64::from(input.byte()) * 50);
                agent.handle_timeout(now);
            }
            3 => agent.subscribe(input.vni()),
            4 => {
                let vni = input.vni();
                agent.unsubscribe(vni);
                installed.remove(&vni);
            }
            5 => {
                let state = if input.below(2) == 0 {
                    EndpointState::Up
                } else {
                    EndpointState::Down
                };
                let endpoint = input.endpoint();
                own.extend(&endpoint.ips);
                agent.publish(endpoint, state);
            }
            6 if input.below(4) == 0 => {
                let (vni, wanted) = (input.vni(), input.endpoint().ips);
                if let Ok((endpoint, left)) = agent.take_leased(vni, "c", &wanted) {
                    assert!(wanted.iter().all(|ip| endpoint.ips.contains(ip)));
                    assert_eq!(
                        ToAgent::decode(&left.encode()).expect("our own bytes"),
                        left
                    );
                    own.extend(&endpoint.ips);
                    agent.publish(endpoint, EndpointState::Up);
                }
            }
            6 => {
                calls += 1;
                agent.call(calls % 4, input.request(), now);
            }
            7 => {
                if let Ok(message) = ToAgent::decode(input.bytes()) {
                    agent.handle_message(message, now);
                }
            }
            8 | 9 => {
                let bytes = input.to_agent(CLUSTER).encode().to_vec();
                if let Ok(message) = ToAgent::decode(&input.damage(bytes)) {
                    agent.handle_message(message, now);
                }
            }
            _ => agent.handle_message(input.to_agent(CLUSTER), now),
        }
        let mut said = 0;
        while let Some(message) = agent.poll_message() {
            said += 1;
            assert_eq!(
                ToManager::decode(&message.encode()).expect("our own bytes"),
                message
            );
        }
        assert!(said < SAID_MAX, "{said} messages at once");
        while let Some(output) = agent.poll_output() {
            match output {
                Output::Event(Event::Table { vni, changes }) => {
                    installed.entry(vni).or_default().apply(&changes)
                }
                Output::Event(Event::NetworkRemoved(vni)) => drop(installed.remove(&vni)),
                Output::Event(_) | Output::Answer { .. } => {}
            }
        }
        for vni in (4096..4099).filter_map(|n| Vni::new(n).ok()) {
            let Some(table) = agent.table(vni) else {
                continue;
            };
            let mut told = installed.entry(vni).or_default().clone();
            let mut whole = Installed::from_table(table);
            for installed in [&mut told, &mut whole] {
                installed.neighbors.retain(|ip, _| !own.contains(ip));
                installed.names.retain(|ip, _| !own.contains(ip));
            }
            assert_eq!(told, whole, "{vni}");
        }
    }
    let _ = agent.status(now);
});
