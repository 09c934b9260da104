//! What a question for a name costs does not grow with who is behind the name: of a thousand members of a service as many are
//! looked at as the answer has room for.

// A global allocator is unsafe by its trait; it counts and passes on.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use control::service::{Publish, Service, ServiceSpec};
use control::{Backend, Epoch, HostId, Names, Network, TableChange};
use discovery::names::{Reply, Transport, Zones, answer};
use vtep::Vni;

struct Counting;

thread_local! {
    /// Bytes that this thread asked for; other threads of the test harness may do as they like.
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged; the counter is a plain `Cell` that is initialised
// at compile time and has no destructor, so touching it neither allocates nor runs into a dying thread. No safe code can
// stand in for the global allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.with(|count| count.set(count.get() + layout.size()));
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` through this allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        BYTES.with(|count| count.set(count.get() + size.saturating_sub(layout.size())));
        // SAFETY: as for `dealloc`; the caller keeps the contract for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const A: u16 = 1;
const SRV: u16 = 33;

/// A network with a service `web` of so many members, all of which have the alias `all`.
fn zones(members: u16) -> (Zones, Vni) {
    let vni = Vni::new(4096).unwrap();
    let network: Network = serde_json::from_value(serde_json::json!({
        "id": "n", "name": "blue", "vni": 4096, "subnets": [{"net": "10.0.0.0/16", "gateway": "10.0.0.1"}],
        "gateway_mac": "06:74:6c:00:10:00", "mtu": 1450, "flood": true, "labels": {}, "options": {}, "created": 0,
        "epoch": Epoch::new(1, 2), "dns_ttl": 5,
    }))
    .unwrap();
    let service = Service {
        id: "web".to_owned(),
        epoch: Epoch::new(1, 5),
        version: Epoch::new(1, 5),
        vni,
        spec: ServiceSpec {
            publish: vec![Publish {
                target: 80,
                published: Some(8080),
                protocol: Default::default(),
                mode: Default::default(),
                on: None,
            }],
            ..ServiceSpec::named("web", "blue")
        },
        vips: vec!["10.0.255.1".parse().unwrap()],
        created: 0,
    };
    let mut zones = Zones::default();
    zones.network(&network);
    zones.services(vni, vec![service]);
    for n in 0..members {
        let [high, low] = (n + 2).to_be_bytes();
        let ip = [10, 0, high, low].into();
        let names = Some(Arc::new(Names {
            container: format!("c{n:05}"),
            id: format!("{n:012x}"),
            aliases: vec!["all".to_owned()],
        }));
        let backend = Some(Backend {
            service: Epoch::new(1, 5),
            host: HostId::from_bytes([1; 16]),
            weight: 1,
            serving: true,
        });
        zones.table(
            vni,
            &[
                TableChange::Names { ip, names },
                TableChange::Backend { ip, backend },
            ],
        );
    }
    (zones, vni)
}

/// RFC 1035 §4.1: a header and one question.
fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len().try_into().unwrap());
        query.extend_from_slice(label.as_bytes());
    }
    query.push(0);
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&[0, 1]);
    query
}

/// Bytes asked for to answer one question, in the long run.
fn cost((zones, vni): &(Zones, Vni), name: &str, kind: u16) -> usize {
    let query = question(name, kind);
    let before = BYTES.get();
    for _ in 0..100 {
        let reply = answer(&query, zones, &[*vni], Transport::Udp, false);
        assert!(matches!(reply, Reply::Answer(_)), "{name}");
    }
    (BYTES.get() - before) / 100
}

#[test]
fn a_thousand_members_cost_no_more_than_an_answer_has_room_for() {
    let (some, many) = (zones(50), zones(1000));
    for (name, kind) in [
        ("tasks.web", A),
        ("all", A),
        ("web", A),
        ("_80._tcp.web", SRV),
    ] {
        let (few, all) = (cost(&some, name, kind), cost(&many, name, kind));
        println!("{name}: {few} bytes with 50 members, {all} with 1,000");
        // Names of members have one length, so that answers have.
        assert_eq!(few, all, "{name}");
    }
}
