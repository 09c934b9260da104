//! How many instructions the engine and its table take, by gungraun (Valgrind), with limits that fail the run: these do
//! not depend on how busy the machine is. Each measurement is of a thousand packets or lookups.
#![allow(
    missing_docs,
    unused_qualifications,
    reason = "gungraun's macros make such items"
)]

mod fixture;

use std::hint::black_box;
use std::time::Instant;

use fixture::{Fixture, PORT};
use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use vtep::engine::{Engine, Settings, Verdict};
use vtep::flow;
use vtep::vxlan::Header;

/// Fails when a thousand take more than this many thousand instructions.
fn at_most(each: u64) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([(EventKind::Ir, each * 1_000)]));
    config
}

// The fixture is handed back, so that dropping it is not counted.

#[library_benchmark(setup = Fixture::new, config = at_most(80))]
#[bench::macs_1k(1_000)]
#[bench::macs_64k(64_000)]
#[bench::macs_1m(1_000_000)]
fn fdb_lookup(fixture: Fixture) -> (Fixture, usize) {
    let network = fixture
        .tables
        .network(fixture.vni)
        .expect("the fixture's network");
    let found = fixture
        .macs
        .iter()
        .filter(|mac| network.lookup(black_box(**mac)).is_some())
        .count();
    assert_eq!(found, fixture.macs.len());
    (fixture, found)
}

fn with_engine(endpoints: usize) -> (Fixture, Engine, Instant) {
    (
        Fixture::new(endpoints),
        Engine::new(Settings::default()),
        Instant::now(),
    )
}

#[library_benchmark(setup = with_engine, config = at_most(780))]
#[bench::macs_1k(1_000)]
fn encapsulate((fixture, mut engine, now): (Fixture, Engine, Instant)) -> (Fixture, Engine) {
    for frame in &fixture.frames {
        let verdict = engine.handle_frame(&fixture.tables, PORT, black_box(frame), now);
        let Verdict::Send { vni, remote } = verdict else {
            panic!("{verdict:?}")
        };
        black_box((Header::emit(vni), remote, flow::hash(frame)));
    }
    (fixture, engine)
}

#[library_benchmark(setup = with_engine, config = at_most(610))]
#[bench::macs_1k(1_000)]
fn decapsulate((fixture, engine, now): (Fixture, Engine, Instant)) -> (Fixture, Engine) {
    for (from, payload) in &fixture.datagrams {
        let arrival = engine.handle_datagram(&fixture.tables, *from, black_box(payload), now);
        assert!(matches!(
            black_box(arrival).verdict,
            Verdict::Deliver { .. }
        ));
    }
    (fixture, engine)
}

library_benchmark_group!(
    name = engine,
    benchmarks = [fdb_lookup, encapsulate, decapsulate]
);
main!(library_benchmark_groups = engine);
