//! What large forwarding databases take of the allocator, and what it is asked for when one of a million entries changes.

// A global allocator is unsafe by its trait; it counts and passes on.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;

use vtep::fdb::{Change, Location};

#[path = "../benches/crowd/mod.rs"]
mod crowd;

use crowd::{mac, vni, writer};

struct Counting;

thread_local! {
    /// Bytes that this thread asked for and has not given back; what it takes from other threads is not counted apart.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// Bytes that it asked for in all.
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

fn count(taken: usize, given: usize) {
    HELD.with(|held| held.set(held.get() + taken.cast_signed() - given.cast_signed()));
    ASKED.with(|asked| asked.set(asked.get() + taken));
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged; the counters are plain `Cell`s that are
// initialised at compile time and have no destructor, so touching them neither allocates nor runs into a dying thread. No safe
// code can stand in for the global allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: `pointer` came from `System` through this allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as for `dealloc`; the caller keeps the contract for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn held() -> isize {
    HELD.with(Cell::get)
}

fn asked() -> usize {
    ASKED.with(Cell::get)
}

fn remote(number: u32) -> SocketAddr {
    crowd::remote(number % 10_000)
}

fn set(number: u32) -> Change {
    crowd::set(number, number % 10_000)
}

#[test]
fn a_million_macs_fit_into_forty_megabytes() {
    let mut writer = writer();
    let before = held();
    let mut entries = 0;
    // Also where tables are emptiest, which is just after they have grown.
    for size in [300_000, 500_000, 700_000, 850_000, 1_000_000] {
        for start in (entries..size).step_by(1_000) {
            let changes: Vec<Change> = (start..start + 1_000).map(set).collect();
            writer.apply(&changes);
        }
        entries = size;
        let each = (held() - before) / isize::try_from(size).unwrap();
        assert!(each <= 40, "{each} bytes for each of {size} MACs");
    }
    let tables = writer.shared().load_full();
    let network = tables.network(vni()).unwrap();
    assert_eq!(network.len(), 1_000_000);
    assert_eq!(
        network.lookup(mac(765_432)),
        Some(Location::Remote(remote(765_432)))
    );
    drop(tables);

    // A change copies the list of shards and one of them, two where the map grows; a shard has at most 2,500 slots of 16 bytes.
    let shards = 1_000_000_usize.div_ceil(512);
    for number in [0, 999_999, 1_000_000] {
        let before = asked();
        writer.apply(&[set(number), set(number + 1)]);
        let taken = asked() - before;
        let most = 3 * shards * size_of::<usize>() + 6 * 2_500 * 16;
        assert!(taken <= most, "{taken} bytes for a change, at most {most}");
    }

    // All of it is given back with the network, although readers came and went.
    let reader = writer.shared().load_full();
    writer.apply(&[Change::RemoveNetwork(vni())]);
    drop(reader);
    writer.apply(&[]);
    let left = held() - before;
    assert!(left <= 100_000, "{left} bytes are left");
}
