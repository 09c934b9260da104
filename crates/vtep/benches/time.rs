//! How long the engine and its table take: nanoseconds by criterion. Shared machines make these vary; `instructions` gates.
#![allow(
    missing_docs,
    reason = "criterion's macros make public items without documentation"
)]

mod fixture;

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fixture::{Fixture, PORT};
use vtep::engine::{Engine, Settings, Verdict};
use vtep::flow;
use vtep::frame::FrameBuf;
use vtep::vxlan::Header;

fn fdb(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fdb-lookup");
    group.throughput(Throughput::Elements(1_000));
    for endpoints in [1_000, 64_000, 1_000_000] {
        let fixture = Fixture::new(endpoints);
        let tables = fixture.tables.load_full();
        let network = tables.network(fixture.vni).expect("the fixture's network");
        group.bench_function(endpoints.to_string(), |bencher| {
            bencher.iter(|| {
                fixture
                    .macs
                    .iter()
                    .filter(|mac| network.lookup(black_box(**mac)).is_some())
                    .count()
            });
        });
    }
    group.finish();
}

fn engine(criterion: &mut Criterion) {
    let fixture = Fixture::new(1_000);
    let tables = fixture.tables.load_full();
    let mut engine = Engine::new(Settings::default());
    let now = Instant::now();
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(1_000));
    let mut bufs: Vec<FrameBuf> = fixture
        .frames
        .iter()
        .map(|frame| {
            let mut buf = FrameBuf::new();
            buf.space()[..frame.len()].copy_from_slice(frame);
            buf.set_frame(frame.len(), vtep::edge::Offload::default());
            buf
        })
        .collect();
    group.bench_function("encapsulate", |bencher| {
        bencher.iter(|| {
            for buf in &mut bufs {
                let verdict = engine.handle_frame(&tables, PORT, black_box(buf.frame()), now);
                let Verdict::Send { vni, remote } = verdict else {
                    panic!("{verdict:?}")
                };
                buf.set_header(&Header::emit(vni));
                black_box((remote, flow::hash(buf.frame()), buf.datagram().len()));
            }
        });
    });
    group.bench_function("decapsulate", |bencher| {
        bencher.iter(|| {
            for (from, payload) in &fixture.datagrams {
                let arrival = engine.handle_datagram(&tables, *from, black_box(payload), now);
                assert!(matches!(arrival.verdict, Verdict::Deliver { .. }));
                black_box(arrival.frame);
            }
        });
    });
    group.finish();
}

criterion_group!(benches, fdb, engine);
criterion_main!(benches);
