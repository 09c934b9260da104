//! Any bytes from a member's address: never a panic, never to another host, and only with a MAC that is the sender's.
#![no_main]

mod tables;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vtep::engine::{Engine, Settings, Verdict};
use vtep::ethernet::Frame;
use vtep::fdb::Location;
use vtep::flow;
use vtep::offload::checksum::{self, L4};

static TABLES: LazyLock<std::sync::Arc<vtep::fdb::Tables>> = LazyLock::new(tables::tables);

fuzz_target!(|payload: &[u8]| {
    let engine = Engine::new(Settings::default());
    let arrival = engine.handle_datagram(
        &TABLES,
        tables::remote(),
        payload,
        std::time::Instant::now(),
    );
    match arrival.verdict {
        Verdict::Drop(_) => return,
        Verdict::Deliver { .. } | Verdict::Flood { remotes: [], .. } => {}
        other => panic!("{other:?} for a frame from a host"),
    }
    let frame = Frame::parse(arrival.frame).expect("a frame that passes can be read");
    let network = arrival
        .vni
        .and_then(|vni| TABLES.network(vni))
        .expect("a frame that passes has a network");
    assert_eq!(
        network.lookup(frame.source()),
        Some(Location::Remote(tables::remote()))
    );
    // What is done to a frame behind the engine.
    let _ = flow::hash(arrival.frame);
    if let L4::Partial { start, offset } = checksum::inspect(arrival.frame) {
        assert!(checksum::complete(
            &mut arrival.frame.to_vec(),
            start,
            offset
        ));
    }
});
