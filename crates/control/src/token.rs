//! The secret that lets a host into a cluster.

use std::fmt;
use std::str::FromStr;

use crate::host::{parse_hex, random_bytes, write_hex};

/// A cluster's join token: `tl1-<cluster>-<secret>`, 16 and 32 hexadecimal digits.
///
/// [`fmt::Display`] shows the whole token, because `init` prints it; [`fmt::Debug`] hides the secret, so that no log holds it.
/// Comparison takes the same time wherever two secrets differ.
#[derive(Clone)]
pub struct Token {
    cluster: [u8; 8],
    secret: [u8; 16],
}

impl Token {
    /// A new cluster and its secret.
    #[must_use]
    pub fn random() -> Self {
        Self {
            cluster: random_bytes(),
            secret: random_bytes(),
        }
    }

    /// The public half: which cluster this is, as 16 hexadecimal digits.
    #[must_use]
    pub fn cluster(&self) -> String {
        struct Hex([u8; 8]);
        impl fmt::Display for Hex {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }
        Hex(self.cluster).to_string()
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        // Every byte is looked at, wherever the first difference is: the time tells nothing of the secret. `black_box` keeps
        // the compiler from turning the fold into an early exit.
        let difference = self
            .secret
            .iter()
            .zip(&other.secret)
            .fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
        self.cluster == other.cluster && difference == 0
    }
}

impl Eq for Token {}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tl1-")?;
        write_hex(f, &self.cluster)?;
        f.write_str("-")?;
        write_hex(f, &self.secret)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(tl1-{}-…)", self.cluster())
    }
}

/// A text that is no token. The text itself is not repeated: it may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid token: it must look like tl1-<16 hex digits>-<32 hex digits>, as `towline init` printed it"
)]
pub struct TokenError;

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let (cluster, secret) = text
            .strip_prefix("tl1-")
            .and_then(|rest| rest.split_once('-'))
            .ok_or(TokenError)?;
        Ok(Self {
            cluster: parse_hex(cluster).ok_or(TokenError)?,
            secret: parse_hex(secret).ok_or(TokenError)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_text_and_hides_from_debug() {
        let token = Token::random();
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert_eq!(text.len(), 4 + 16 + 1 + 32);
        let debug = format!("{token:?}");
        assert!(debug.contains(&token.cluster()));
        assert!(!debug.contains(text.rsplit('-').next().unwrap()));
    }

    #[test]
    fn one_other_bit_is_another_token() {
        let token = Token::random();
        for bit in 0..128 {
            let mut other = token.clone();
            other.secret[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(token, other);
        }
        assert_ne!(
            Token {
                cluster: [0; 8],
                ..token.clone()
            },
            Token {
                cluster: [1; 8],
                ..token
            }
        );
    }

    #[test]
    fn wrong_texts_are_refused() {
        for text in [
            "",
            "tl1-",
            "tl1-00-00",
            "tl2-0000000000000000-00000000000000000000000000000000",
            "tl1-000000000000000g-00000000000000000000000000000000",
        ] {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text}");
        }
    }
}
