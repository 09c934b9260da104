//! The text that lets a host into a cluster: which authority to believe, and a secret to be believed by.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::host::{parse_hex, random_bytes};
use crate::pki::{Hex, cluster_of};

/// 128 random bits that a manager gives a certificate for.
///
/// [`fmt::Debug`] hides them, so that no log holds them. Comparison takes the same time wherever two secrets differ.
#[derive(Clone)]
pub struct Secret([u8; 16]);

impl Secret {
    /// A new one from the kernel's random numbers.
    #[must_use]
    pub fn random() -> Self {
        Self(random_bytes())
    }

    /// From its 16 bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        // Every byte is looked at, wherever the first difference is: the time tells nothing of the secret. `black_box` keeps
        // the compiler from turning the fold into an early exit.
        let pairs = self.0.iter().zip(&other.0);
        pairs.fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b))) == 0
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        // The text is not repeated: it may be nearly a secret.
        parse_hex(&text)
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("not 32 hexadecimal digits"))
    }
}

/// A text that no log may hold: [`fmt::Debug`] hides it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(pub String);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(…)")
    }
}

/// A cluster's join token: `tl1-<digest>-<secret>`, 64 and 32 hexadecimal digits. The digest is the SHA-256 of the certificate of
/// the cluster's authority; what the host may become, a worker or a manager, only the manager knows.
///
/// [`fmt::Display`] shows the whole token, because commands print it; [`fmt::Debug`] hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    digest: [u8; 32],
    secret: Secret,
}

impl Token {
    /// The token of the authority with this digest and this secret.
    #[must_use]
    pub const fn new(digest: [u8; 32], secret: Secret) -> Self {
        Self { digest, secret }
    }

    /// The SHA-256 digest of the authority's certificate.
    #[must_use]
    pub const fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// What opens the door.
    #[must_use]
    pub const fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The public half: which cluster this is, as 16 hexadecimal digits.
    #[must_use]
    pub fn cluster(&self) -> String {
        cluster_of(&self.digest)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tl1-{}-{}", Hex(&self.digest), Hex(&self.secret.0))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(tl1-{}…)", self.cluster())
    }
}

/// A text that is no token. The text itself is not repeated: it may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid token: it must look like tl1-<64 hex digits>-<32 hex digits>, as `towline token` on a manager's host prints it"
)]
pub struct TokenError;

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let (digest, secret) = text
            .strip_prefix("tl1-")
            .and_then(|rest| rest.split_once('-'))
            .ok_or(TokenError)?;
        Ok(Self {
            digest: parse_hex(digest).ok_or(TokenError)?,
            secret: Secret(parse_hex(secret).ok_or(TokenError)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_text_and_hides_from_debug() {
        let token = Token::new(random_bytes(), Secret::random());
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert_eq!(text.len(), 4 + 64 + 1 + 32);
        let secret = text.rsplit('-').next().unwrap();
        let debug = format!("{token:?} {:?}", token.secret());
        assert!(debug.contains(&token.cluster()));
        assert!(!debug.contains(secret));
        let stored = serde_json::to_string(token.secret()).unwrap();
        assert_eq!(
            &serde_json::from_str::<Secret>(&stored).unwrap(),
            token.secret()
        );
        let error = serde_json::from_str::<Secret>(&stored[..20])
            .unwrap_err()
            .to_string();
        assert!(!error.contains(&secret[..8]), "{error}");
    }

    #[test]
    fn one_other_bit_is_another_token() {
        let token = Token::new([7; 32], Secret::random());
        for bit in 0..128 {
            let mut other = token.clone();
            other.secret.0[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(token, other);
        }
        assert_ne!(
            Token {
                digest: [8; 32],
                ..token.clone()
            },
            token
        );
    }

    #[test]
    fn wrong_texts_are_refused() {
        let zeros = "0".repeat(64);
        for text in [
            String::new(),
            "tl1-".to_owned(),
            "tl1-00-00".to_owned(),
            format!("tl2-{zeros}-{}", "0".repeat(32)),
            format!("tl1-{zeros}-{}", "0".repeat(31)),
            format!("tl1-{zeros}-{}g", "0".repeat(31)),
            format!("tl1-{}-{}", "0".repeat(16), "0".repeat(32)),
        ] {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text}");
        }
    }
}
