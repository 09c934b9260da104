//! Random steps: what must hold does, whatever happens in whatever order. `cargo test` plays some thousand of them;
//! `scripts/test simulation` a million, the same each time, `scripts/soak` others. A seed that failed fails again: PROPTEST_RNG_SEED.

use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::plane::{Hardness, Plane, Step, step};
use crate::world::World;

fn run(seed: u64, steps: &[Step]) {
    let mut world = World::new(seed);
    for step in steps {
        world.step(step);
    }
    world.settle();
    world.check_settled();
}

/// All that was said in such a history, by whom and when.
fn trace(seed: u64, steps: &[Step]) -> u64 {
    let mut world = World::new(seed);
    steps.iter().for_each(|step| world.step(step));
    world.settle();
    world.trace
}

fn some() -> Config {
    Config {
        cases: Config::default().cases / 4,
        max_shrink_iters: 5000,
        failure_persistence: None,
        ..Config::default()
    }
}

/// A third of a million steps, 341 histories of 1,000, unless PROPTEST_CASES says otherwise: 256 of its cases are a million steps in all.
fn many() -> Config {
    Config {
        cases: Config::default().cases * 4 / 3,
        ..some()
    }
}

fn steps(hardness: Hardness, count: usize) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(hardness), count / 20..=count)
}

fn thousand(hardness: Hardness) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(hardness), 980..=1020)
}

proptest! {
    #![proptest_config(some())]

    #[test]
    fn streams_that_break(seed: u64, steps in steps(Hardness::Streams, 200)) {
        run(seed, &steps);
    }

    #[test]
    fn messages_that_get_lost(seed: u64, steps in steps(Hardness::Messages, 200)) {
        run(seed, &steps);
    }

    /// Conformance H15.
    #[test]
    fn stores_that_are_replaced_and_clocks_that_are_set(seed: u64, steps in steps(Hardness::Stores, 200)) {
        run(seed, &steps);
    }
}

proptest! {
    #![proptest_config(Config { cases: Config::default().cases / 16, ..some() })]

    /// A failure is of use if the same steps find it again.
    #[test]
    fn the_same_steps_have_the_same_end(seed: u64, steps in steps(Hardness::Stores, 200)) {
        prop_assert_eq!(trace(seed, &steps), trace(seed, &steps));
    }
}

proptest! {
    #![proptest_config(many())]

    #[test]
    #[ignore = "takes a minute: scripts/test simulation"]
    fn long_histories_on_streams(seed: u64, steps in thousand(Hardness::Streams)) {
        run(seed, &steps);
    }

    #[test]
    #[ignore = "takes a minute: scripts/test simulation"]
    fn long_histories_with_messages_lost(seed: u64, steps in thousand(Hardness::Messages)) {
        run(seed, &steps);
    }

    #[test]
    #[ignore = "takes a minute: scripts/test simulation"]
    fn long_histories_with_stores_replaced(seed: u64, steps in thousand(Hardness::Stores)) {
        run(seed, &steps);
    }
}
