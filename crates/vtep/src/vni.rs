//! VXLAN network identifiers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A VXLAN network identifier: 24 bits (RFC 7348 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

/// What is wrong with a would-be VNI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VniError {
    /// The number needs more than 24 bits.
    #[error("VNI {0} does not fit in 24 bits: the largest is {max}", max = Vni::MAX)]
    TooLarge(u32),
    /// The text is no number.
    #[error("{0:?} is no VNI: write a number from 0 to {max}", max = Vni::MAX)]
    NoNumber(String),
}

impl Vni {
    /// The largest VNI, 2^24 − 1.
    pub const MAX: Self = Self(0x00ff_ffff);

    /// The VNI with this number.
    ///
    /// # Errors
    /// [`VniError::TooLarge`] above [`Vni::MAX`].
    pub const fn new(number: u32) -> Result<Self, VniError> {
        if number <= Self::MAX.0 {
            Ok(Self(number))
        } else {
            Err(VniError::TooLarge(number))
        }
    }

    /// The number, at most 2^24 − 1.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The VNI with these bytes; any three bytes are one.
    pub(crate) const fn from_be_bytes([a, b, c]: [u8; 3]) -> Self {
        Self(u32::from_be_bytes([0, a, b, c]))
    }

    /// The three bytes as they stand on the wire.
    pub(crate) const fn to_be_bytes(self) -> [u8; 3] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [a, b, c]
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(number: u32) -> Result<Self, VniError> {
        Self::new(number)
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Vni {
    type Err = VniError;

    fn from_str(text: &str) -> Result<Self, VniError> {
        let number = text
            .parse()
            .map_err(|_| VniError::NoNumber(text.chars().take(64).collect()))?;
        Self::new(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_24_bits_and_no_more() {
        assert_eq!(Vni::new(0).unwrap().get(), 0);
        assert_eq!(Vni::new(0xff_ffff), Ok(Vni::MAX));
        assert_eq!(Vni::new(1 << 24), Err(VniError::TooLarge(1 << 24)));
        assert_eq!(Vni::MAX.to_be_bytes(), [0xff; 3]);
        assert_eq!(Vni::from_be_bytes([1, 2, 3]).get(), 0x01_02_03);
        assert_eq!("4096".parse::<Vni>().unwrap().to_string(), "4096");
        assert_eq!(
            "16777216".parse::<Vni>().unwrap_err().to_string(),
            "VNI 16777216 does not fit in 24 bits: the largest is 16777215"
        );
        assert!("-1".parse::<Vni>().is_err());
    }
}
