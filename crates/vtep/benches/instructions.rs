//! How many instructions the engine and its table take, by gungraun (Valgrind), with limits that fail the run: these do
//! not depend on how busy the machine is. Each measurement is of a thousand packets or lookups.
#![allow(
    missing_docs,
    unused_qualifications,
    reason = "gungraun's macros make such items"
)]

mod fixture;
mod traffic;

use std::hint::black_box;
use std::time::Instant;

use fixture::{Fixture, PORT};
use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use traffic::{SEGMENTS, SUPER_FRAMES};
use vtep::edge::Offload;
use vtep::engine::{Engine, Settings, Verdict};
use vtep::flow;
use vtep::stats::Counters;
use vtep::tap::Backend;
use vtep::testing::{Merged, RepeatingTap, RepeatingUnderlay};
use vtep::vxlan::Header;
use vtep::worker::{Worker, WorkerConfig};

/// Fails when all takes more than this many instructions.
fn at_most_in_all(total: u64) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([(EventKind::Ir, total)]));
    config
}

/// Fails when a thousand take more than this many thousand instructions.
fn at_most(each: u64) -> LibraryBenchmarkConfig {
    at_most_in_all(each * 1_000)
}

// The fixture is handed back, so that dropping it is not counted.

#[library_benchmark(setup = Fixture::new, config = at_most(103))]
#[bench::macs_1k(1_000)]
#[bench::macs_64k(64_000)]
#[bench::macs_1m(1_000_000)]
fn fdb_lookup(fixture: Fixture) -> (Fixture, usize) {
    let tables = fixture.tables.load_full();
    let network = tables.network(fixture.vni).expect("the fixture's network");
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
    let tables = fixture.tables.load_full();
    for frame in &fixture.frames {
        let verdict = engine.handle_frame(&tables, PORT, black_box(frame), now);
        let Verdict::Send { vni, remote } = verdict else {
            panic!("{verdict:?}")
        };
        black_box((Header::emit(vni), remote, flow::hash(frame)));
    }
    (fixture, engine)
}

#[library_benchmark(setup = with_engine, config = at_most(740))]
#[bench::macs_1k(1_000)]
fn decapsulate((fixture, engine, now): (Fixture, Engine, Instant)) -> (Fixture, Engine) {
    let tables = fixture.tables.load_full();
    for (from, payload) in &fixture.datagrams {
        let arrival = engine.handle_datagram(&tables, *from, black_box(payload), now);
        assert!(matches!(
            black_box(arrival).verdict,
            Verdict::Deliver { .. }
        ));
    }
    (fixture, engine)
}

// Whole workers between edges that only copy: offloads, runs, merging and the books included.

type Busy = (Worker<RepeatingUnderlay>, Instant);

/// A worker whose port sends `frames`, and whose underlay brings `datagrams`; warm, with all of them still to come.
fn busy(
    frames: impl FnOnce(&Fixture) -> Vec<(Vec<u8>, Offload)>,
    datagrams: impl FnOnce(&Fixture) -> Vec<Merged>,
) -> Busy {
    let fixture = Fixture::new(1_000);
    let underlay = RepeatingUnderlay::new(datagrams(&fixture));
    let mut worker = Worker::new(underlay, WorkerConfig::new(fixture.tables.clone()));
    let tap = RepeatingTap::new(frames(&fixture));
    worker.add_port(PORT, 1450, Backend::Offload, Box::new(tap));
    let now = Instant::now();
    round(&mut worker, now);
    (worker, now)
}

/// All that there is once.
fn round(worker: &mut Worker<RepeatingUnderlay>, now: Instant) {
    while worker.poll_port(PORT, now).expect("edges that never fail") {}
    while worker.poll_underlay(now).expect("edges that never fail") {}
}

/// What a warm worker has sent and delivered by now.
fn passed(worker: &Worker<RepeatingUnderlay>) -> (u64, u64) {
    let sum = Counters::sum([&worker.counters()]);
    assert_eq!(sum.drops.total(), 0);
    (sum.datagrams_out, sum.frames_out)
}

#[library_benchmark(config = at_most(1_880))]
#[bench::one_flow(busy(traffic::small_frames, |_| Vec::new()))]
fn small_out((mut worker, now): Busy) -> Busy {
    round(&mut worker, now);
    assert_eq!(passed(&worker), (2_000, 0));
    (worker, now)
}

#[library_benchmark(config = at_most(2_080))]
#[bench::one_flow(busy(|_| Vec::new(), traffic::small_datagrams))]
fn small_in((mut worker, now): Busy) -> Busy {
    round(&mut worker, now);
    // Merged within a batch of 32 buffers to super-frames of at most 64 segments.
    let (_, delivered) = passed(&worker);
    assert!(
        (2 * 1_000_u64.div_ceil(64)..=40).contains(&delivered),
        "{delivered}"
    );
    (worker, now)
}

#[library_benchmark(config = at_most_in_all(2_000_000))]
#[bench::one_flow(busy(traffic::super_frames, |_| Vec::new()))]
fn super_out((mut worker, now): Busy) -> Busy {
    round(&mut worker, now);
    assert_eq!(passed(&worker).0, 2 * (SUPER_FRAMES * SEGMENTS) as u64);
    (worker, now)
}

#[library_benchmark(config = at_most_in_all(3_150_000))]
#[bench::one_flow(busy(|_| Vec::new(), traffic::super_datagrams))]
fn super_in((mut worker, now): Busy) -> Busy {
    round(&mut worker, now);
    assert_eq!(passed(&worker).1, 2 * SUPER_FRAMES as u64);
    (worker, now)
}

library_benchmark_group!(
    name = engine,
    benchmarks = [fdb_lookup, encapsulate, decapsulate]
);
library_benchmark_group!(
    name = worker,
    benchmarks = [small_out, small_in, super_out, super_in]
);
main!(library_benchmark_groups = engine, worker);
