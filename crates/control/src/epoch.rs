//! Epochs: the order of all allocations and changes of a cluster.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `generation:16 | counter:48`, compared as one number. Issued only by the allocator.
///
/// The counter orders what one manager's store has handed out. The generation rises when a manager finds that its store is
/// older than what agents have seen, so that whatever it issues next is above everything issued before.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(u64);

impl Epoch {
    /// Below every epoch that was ever issued.
    pub const ZERO: Self = Self(0);
    /// The largest counter: 2⁴⁸ − 1.
    pub const MAX_COUNTER: u64 = (1 << 48) - 1;

    /// An epoch of this generation; a counter above [`Self::MAX_COUNTER`] is cut to it.
    #[must_use]
    pub const fn new(generation: u16, counter: u64) -> Self {
        let counter = if counter > Self::MAX_COUNTER {
            Self::MAX_COUNTER
        } else {
            counter
        };
        Self((generation as u64) << 48 | counter)
    }

    /// From the number that [`Self::get`] gives.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Both halves as one number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Which life of the manager's store issued it.
    #[must_use]
    pub const fn generation(self) -> u16 {
        let [high, low, ..] = self.0.to_be_bytes();
        u16::from_be_bytes([high, low])
    }

    /// Its place within the generation.
    #[must_use]
    pub const fn counter(self) -> u64 {
        self.0 & Self::MAX_COUNTER
    }

    /// The next one. A full counter goes on in the next generation, as the number's carry does.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation(), self.counter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_outranks_counter() {
        assert!(Epoch::new(2, 0) > Epoch::new(1, Epoch::MAX_COUNTER));
        assert_eq!(Epoch::new(1, u64::MAX), Epoch::new(1, Epoch::MAX_COUNTER));
        assert_eq!(Epoch::new(1, Epoch::MAX_COUNTER).next(), Epoch::new(2, 0));
        let epoch = Epoch::new(0xabcd, 0x1234_5678_9abc);
        assert_eq!(
            (epoch.generation(), epoch.counter()),
            (0xabcd, 0x1234_5678_9abc)
        );
        assert_eq!(Epoch::from_bits(epoch.get()), epoch);
        assert_eq!(Epoch::new(1, 7).to_string(), "1.7");
    }
}
