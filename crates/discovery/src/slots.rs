//! Which member a new connection goes to, as a table that the kernel walks: slot after slot, or by a hash.
//!
//! The kernel takes slot `n mod len` for the n-th new connection (round robin, weighted), or `hash(source) mod len` (source). All
//! that is decided here is who stands in which slot. A table is a pure function of what it is made of: two hosts, or one before
//! and after a restart, make the same.

use std::net::IpAddr;

use control::service::Balance;

/// Slots of a weighted table, unless there are more members.
const MOST_WEIGHTED: u64 = 1024;
/// Slots of a table by source, for as many members as leave several slots for each; a power of two.
const BY_SOURCE: usize = 256;
/// The same for more members.
const BY_SOURCE_MANY: usize = 1024;

/// Who stands in which slot. `members` are those that take new connections, with their weights; a weight of 0 takes none.
///
/// `rotation` says where round robin begins: with another for each client, many clients with one connection each are spread evenly
/// too. A table by source has none, so that all hosts send a client to the same member.
#[must_use]
pub fn slots(balance: Balance, members: &[(IpAddr, u16)], rotation: u64) -> Vec<IpAddr> {
    let mut members: Vec<_> = members
        .iter()
        .copied()
        .filter(|(_, weight)| *weight > 0)
        .collect();
    members.sort_unstable();
    members.dedup_by_key(|(ip, _)| *ip);
    let mut slots = match balance {
        Balance::RoundRobin => members.iter().map(|(ip, _)| *ip).collect(),
        Balance::Weighted => interleaved(&members),
        Balance::Source => return by_source(&members),
    };
    if let Some(start) = rotation.checked_rem(slots.len() as u64) {
        slots.rotate_left(usize::try_from(start).unwrap_or(0));
    }
    slots
}

/// A number that is the same everywhere for the same words, and spread over all 64 bits.
#[must_use]
pub fn mix(words: impl IntoIterator<Item = u64>) -> u64 {
    // The finaliser of SplitMix64, over each word in turn.
    words
        .into_iter()
        .fold(0x9e37_79b9_7f4a_7c15, |state, word| {
            let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
}

/// An address as two words for [`mix`].
#[must_use]
pub fn words_of(ip: IpAddr) -> [u64; 2] {
    let bits = match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
    let halves = [(bits >> 64) as u64, bits as u64];
    halves
}

/// Each member as often as its weight says, its turns as far apart as can be (the "smooth" weighted round robin of nginx).
fn interleaved(members: &[(IpAddr, u16)]) -> Vec<IpAddr> {
    let weights = scaled(members);
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0; weights.len()];
    let mut slots = Vec::new();
    for _ in 0..total {
        for (credit, weight) in credits.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of the highest, so that the order does not depend on how a maximum is looked for.
        let Some((next, _)) = credits
            .iter()
            .enumerate()
            .max_by_key(|(index, credit)| (**credit, usize::MAX - index))
        else {
            break;
        };
        credits[next] -= total;
        slots.push(members[next].0);
    }
    slots
}

/// Weights in smallest numbers, and where even these are too many slots, in as many as there may be; nobody gets none.
fn scaled(members: &[(IpAddr, u16)]) -> Vec<i64> {
    let divisor = members.iter().fold(0, |divisor, (_, weight)| {
        greatest_common_divisor(divisor, u64::from(*weight))
    });
    let sum: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
    members
        .iter()
        .map(|(_, weight)| {
            let weight = u64::from(*weight);
            let slots = if sum / divisor.max(1) <= MOST_WEIGHTED {
                weight / divisor.max(1)
            } else {
                ((weight * MOST_WEIGHTED + sum / 2) / sum).max(1)
            };
            i64::try_from(slots).unwrap_or(1)
        })
        .collect()
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Weighted rendezvous hashing: each slot goes to the member that draws the lowest ticket for it. A member that comes takes slots
/// for itself, one that goes leaves its own; no other slot changes hands.
fn by_source(members: &[(IpAddr, u16)]) -> Vec<IpAddr> {
    let len = if members.len() * 4 <= BY_SOURCE {
        BY_SOURCE
    } else {
        BY_SOURCE_MANY
    };
    let ticket = |slot: usize, (ip, weight): &(IpAddr, u16)| {
        let [high, low] = words_of(*ip);
        // 53 bits, never zero: a uniform number in (0, 1].
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let uniform = ((mix([slot as u64, high, low]) >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        -uniform.ln() / f64::from(*weight)
    };
    (0..len)
        .filter_map(|slot| {
            let lowest = members
                .iter()
                .min_by(|a, b| ticket(slot, a).total_cmp(&ticket(slot, b)));
            lowest.map(|(ip, _)| *ip)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn ip(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number])
    }

    fn members(weights: &[u16]) -> Vec<(IpAddr, u16)> {
        (1..).map(ip).zip(weights.iter().copied()).collect()
    }

    fn counts(slots: &[IpAddr]) -> BTreeMap<IpAddr, usize> {
        slots.iter().fold(BTreeMap::new(), |mut counts, ip| {
            *counts.entry(*ip).or_default() += 1;
            counts
        })
    }

    #[test]
    fn round_robin_has_each_once_and_begins_where_it_is_told() {
        let members = members(&[1, 7, 1]);
        assert_eq!(
            slots(Balance::RoundRobin, &members, 0),
            [ip(1), ip(2), ip(3)]
        );
        assert_eq!(
            slots(Balance::RoundRobin, &members, 4),
            [ip(2), ip(3), ip(1)]
        );
        assert_eq!(slots(Balance::RoundRobin, &[], 4), Vec::<IpAddr>::new());
    }

    #[test]
    fn weights_are_exact_and_turns_far_apart() {
        let table = slots(Balance::Weighted, &members(&[50, 10, 10]), 0);
        assert_eq!(
            table,
            [ip(1), ip(1), ip(2), ip(1), ip(3), ip(1), ip(1)],
            "nginx's own example"
        );
    }

    #[test]
    fn a_weight_of_zero_takes_nothing() {
        for balance in [Balance::RoundRobin, Balance::Weighted, Balance::Source] {
            let table = slots(balance, &members(&[0, 3]), 0);
            assert_eq!(
                BTreeSet::from_iter(table),
                BTreeSet::from([ip(2)]),
                "{balance:?}"
            );
            assert!(slots(balance, &members(&[0]), 1).is_empty());
        }
    }

    #[test]
    fn sources_spread_by_weight() {
        let counts = counts(&slots(Balance::Source, &members(&[1, 1, 2]), 5));
        let share = |number| counts[&ip(number)];
        // Binomial with 256 draws: far more than four standard deviations.
        assert!((34..=94).contains(&share(1)), "{counts:?}");
        assert!((98..=158).contains(&share(3)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn any_run_of_slots_is_even_within_one(weights in prop::collection::vec(1..9_u16, 1..9), from in 0..100_usize, len in 0..100_usize) {
            let members = members(&weights);
            let table = slots(Balance::Weighted, &members, 0);
            let total: usize = weights.iter().map(|weight| usize::from(*weight)).sum();
            let run: Vec<_> = table.iter().cycle().skip(from).take(len).copied().collect();
            for (ip, weight) in &members {
                let got = run.iter().filter(|slot| *slot == ip).count() as f64;
                let due = len as f64 * f64::from(*weight) / total as f64;
                prop_assert!((got - due).abs() < 2.0, "{ip} got {got} of {due} in {run:?}");
            }
        }

        #[test]
        fn large_weights_keep_their_shares(weights in prop::collection::vec(1..u16::MAX, 1..40)) {
            let members = members(&weights);
            let table = slots(Balance::Weighted, &members, 0);
            prop_assert!(table.len() <= 1024 + 40);
            let sum: f64 = weights.iter().copied().map(f64::from).sum();
            for (ip, weight) in &members {
                let got = table.iter().filter(|slot| *slot == ip).count() as f64;
                let due = f64::from(*weight) / sum * table.len() as f64;
                prop_assert!(got >= 1.0 && (got - due).abs() <= 2.0, "{got} of {due}");
            }
        }

        #[test]
        fn by_source_only_the_slots_of_who_goes_change(weights in prop::collection::vec(1..9_u16, 2..9), gone in 0..8_usize) {
            let all = members(&weights);
            let gone = all[gone % all.len()].0;
            let rest: Vec<_> = all.iter().copied().filter(|(ip, _)| *ip != gone).collect();
            let before = slots(Balance::Source, &all, 0);
            let after = slots(Balance::Source, &rest, 1);
            for (was, is) in before.iter().zip(&after) {
                prop_assert!(was == is || *was == gone);
            }
        }

        #[test]
        fn order_and_repetition_of_members_say_nothing(weights in prop::collection::vec(0..9_u16, 0..9), rotation: u64) {
            let once = members(&weights);
            let mut other: Vec<_> = once.iter().rev().copied().collect();
            other.extend(once.first().copied());
            for balance in [Balance::RoundRobin, Balance::Weighted, Balance::Source] {
                prop_assert_eq!(slots(balance, &once, rotation), slots(balance, &other, rotation));
            }
        }
    }
}
