//! A forwarding database of a million MACs: what a lookup costs beside a plain hash map of that size, how much memory it takes,
//! how soon a change is seen by a reader, and whether readers pause meanwhile. Prints figures; a quiet machine gives good ones.
//! What does not depend on speed is tested: `tests/table_memory.rs`, and the unit tests of `sharded.rs`.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use vtep::MacAddr;
use vtep::fdb::{Change, Location, SharedTables, TableWriter, Tables};

mod crowd;

use crowd::{mac, vni};

const ENDPOINTS: u32 = 1_000_000;
/// Hosts that the endpoints are spread over.
const HOSTS: u32 = 1_000;
/// Rounds of lookups, of every endpoint once over either map.
const ROUNDS: usize = 15;
/// Changes, one every two milliseconds.
const CHANGES: u32 = 1_000;
const PACE: Duration = Duration::from_millis(2);
/// Lookups between two loads of the tables, as a worker's batch has.
const BATCH: usize = 64;

fn main() {
    let (mut writer, built) = timed(build);
    println!("{ENDPOINTS} MACs behind {HOSTS} hosts, built in {built:.1?}");
    lookups(&writer.shared().load_full());
    let (applied, seen) = changes(&mut writer);
    print("a change applied", applied);
    print("a change seen by a reader, from the call on", seen);
    let tables = writer.shared();
    let quiet = pauses(&tables, || std::thread::sleep(PACE * CHANGES));
    print("a reader's batch of 64 lookups, nothing changing", quiet);
    let busy = pauses(&tables, || {
        for change in 0..CHANGES {
            std::thread::sleep(PACE);
            writer.apply(&[set(change, change + 2)]);
        }
    });
    print("the same with a change every 2 ms", busy);
    let thousand: Vec<Change> = (0..1_000)
        .map(|number| set(number * 7, number + 1))
        .collect();
    let ((), all) = timed(|| writer.apply(&thousand));
    println!("a thousand changes applied together: {all:.1?}");
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

fn remote(number: u32) -> SocketAddr {
    crowd::remote(number % HOSTS)
}

fn set(endpoint: u32, number: u32) -> Change {
    crowd::set(endpoint, number % HOSTS)
}

fn build() -> TableWriter {
    let mut writer = crowd::writer();
    let changes: Vec<Change> = (0..ENDPOINTS).map(|number| set(number, number)).collect();
    writer.apply(&changes);
    writer
}

/// Every endpoint once, in an order that no cache guesses, over either map in turns.
fn lookups(tables: &Tables) {
    let network = tables.network(vni()).expect("it was just built");
    let mut plain: HashMap<MacAddr, Location, RandomState> = HashMap::default();
    plain.extend((0..ENDPOINTS).map(|number| (mac(number), Location::Remote(remote(number)))));
    let mut order: Vec<MacAddr> = (0..ENDPOINTS).map(mac).collect();
    shuffle(&mut order);
    let count = |find: &dyn Fn(MacAddr) -> bool| {
        let found = order.iter().filter(|mac| find(black_box(**mac))).count();
        assert_eq!(found, order.len());
    };
    let (mut own, mut other, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let ((), a) = timed(|| count(&|mac| black_box(network.lookup(mac)).is_some()));
        let ((), b) = timed(|| count(&|mac| black_box(plain.get(&mac).copied()).is_some()));
        own.push(a / ENDPOINTS);
        other.push(b / ENDPOINTS);
        ratios.push(a.as_secs_f64() / b.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "lookup {:?}, at best {:?}; plain hash map {:?}, at best {:?}; ratio {:.2} ({:.2} - {:.2}), medians of {ROUNDS} rounds",
        median(&mut own),
        own[0],
        median(&mut other),
        other[0],
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1]
    );
}

/// The same each time (Fisher and Yates; Knuth's MMIX generator). A stride would not do: a hash may make a stride of it again.
fn shuffle(items: &mut [MacAddr]) {
    let mut state = 1_u64;
    for last in (1..items.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let below = usize::try_from(state >> 33).unwrap_or(0) % (last + 1);
        items.swap(last, below);
    }
}

/// How long a reader's batches take while `meanwhile` happens.
fn pauses(tables: &SharedTables, meanwhile: impl FnOnce()) -> Vec<Duration> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut batches = Vec::with_capacity(8_000_000);
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) && batches.len() < batches.capacity() {
                let ((), time) = timed(|| {
                    let tables = tables.load();
                    let network = tables.network(vni()).expect("it stays");
                    for _ in 0..BATCH {
                        number = (number + 514_229) % ENDPOINTS;
                        black_box(network.lookup(mac(number)));
                    }
                });
                batches.push(time);
            }
            batches
        });
        meanwhile();
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("the reader panics at nothing")
    })
}

/// One change after the other, each awaited by a reader: how long the call took, and how long until it was seen.
fn changes(writer: &mut TableWriter) -> (Vec<Duration>, Vec<Duration>) {
    let tables = writer.shared();
    let start = Instant::now();
    let (wanted, seen_at) = (AtomicU64::new(0), AtomicU64::new(0));
    let nanos = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let (mut applied, mut seen) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for change in 1..=CHANGES {
                while wanted.load(Ordering::Acquire) < u64::from(change) {
                    std::thread::yield_now();
                }
                let new = Some(Location::Remote(remote(change + 1)));
                let endpoint = mac(change);
                loop {
                    let tables = tables.load();
                    let network = tables.network(vni()).expect("it stays");
                    if network.lookup(endpoint) == new {
                        break;
                    }
                    drop(tables);
                    std::thread::yield_now();
                }
                seen_at.store(nanos(), Ordering::Release);
            }
        });
        for change in 1..=CHANGES {
            seen_at.store(0, Ordering::Release);
            wanted.store(change.into(), Ordering::Release);
            std::thread::sleep(PACE);
            let called = nanos();
            let ((), time) = timed(|| writer.apply(&[set(change, change + 1)]));
            applied.push(time);
            let at = loop {
                match seen_at.load(Ordering::Acquire) {
                    0 => std::thread::yield_now(),
                    at => break at,
                }
            };
            seen.push(Duration::from_nanos(at.saturating_sub(called)));
        }
    });
    (applied, seen)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| {
        // Far below 2^53, where f64 is exact.
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let index = ((times.len() - 1) as f64 * share) as usize;
        times[index]
    };
    println!(
        "{what}: median {:.1?}, p99 {:.1?}, p99.99 {:.1?}, most {:.1?}, of {}",
        at(0.5),
        at(0.99),
        at(0.9999),
        at(1.0),
        times.len()
    );
}
