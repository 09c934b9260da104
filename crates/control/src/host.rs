//! A host: a machine that runs the agent, and what the cluster knows of it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::network::quote;

/// A host's identity: 128 random bits made once, kept in its state folder for ever.
///
/// Text form: 32 lower-case hexadecimal digits, also in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId([u8; 16]);

impl HostId {
    /// No host at all: the owner of what is a service's.
    pub const NOBODY: Self = Self([0; 16]);

    /// A new identity from the kernel's random numbers.
    #[must_use]
    pub fn random() -> Self {
        Self(random_bytes())
    }

    /// The identity of a host that is known by its name alone: the start of the name's SHA-256.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        let digest = sha2::Sha256::digest(name.as_bytes());
        let (start, _) = digest
            .split_first_chunk()
            .expect("SHA-256 has 32 bytes, half of them are 16");
        Self(*start)
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

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid host id: it must be 32 hexadecimal digits")]
pub struct HostIdError;

impl FromStr for HostId {
    type Err = HostIdError;

    fn from_str(text: &str) -> Result<Self, HostIdError> {
        parse_hex(text).map(Self).ok_or(HostIdError)
    }
}

impl Serialize for HostId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What a host tells of itself when it connects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its identity.
    pub id: HostId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its underlay address. Control connections come from it too.
    pub vtep: IpAddr,
    /// The UDP port on which it receives VXLAN.
    pub port: u16,
    /// The MTU of the link that carries the underlay, in bytes of IP packet.
    pub link_mtu: u16,
    /// Rises with every start of the agent; tells two runs of one host apart.
    pub incarnation: u64,
}

/// A host as the manager sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// What the host tells of itself.
    #[serde(flatten)]
    pub info: HostInfo,
    /// Its heartbeats arrive. `false` masks it from flood lists and never removes a unicast entry.
    pub up: bool,
    /// Milliseconds since the manager last heard of it, when this view was made.
    pub last_seen_ms_ago: u64,
    /// It runs the manager.
    pub manager: bool,
    /// The UDP port on which the cluster wants it to receive VXLAN; `None`: as it likes.
    #[serde(default)]
    pub wanted_port: Option<u16>,
    /// Why it does not receive there, in its own words.
    #[serde(default)]
    pub port_problem: Option<String>,
    /// Where its manager listens, or would if it were promoted; `None`: it runs none and stands by for none.
    #[serde(default)]
    pub control: Option<SocketAddr>,
    /// What constraints can ask for.
    #[serde(default)]
    pub traits: HostTraits,
}

/// Most labels of one host, of each kind.
const LABELS_MAX: usize = 32;
/// Longest key and longest value of a label, in bytes.
const KEY_MAX: usize = 128;
const VALUE_MAX: usize = 256;
/// Most bytes of all labels of one kind: many hosts go out in one message.
const LABEL_BYTES: usize = 2048;
/// Longest name of a system or a processor in bytes.
const PLATFORM_MAX: usize = 32;

/// What a host is beyond its place in the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTraits {
    /// Labels that operators gave it; they are the cluster's.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Labels of its own configuration.
    #[serde(default)]
    pub own_labels: BTreeMap<String, String>,
    /// What it runs on.
    #[serde(default)]
    pub platform: Platform,
}

/// What a host runs on; empty where it has not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The system, such as `linux`.
    pub os: String,
    /// The processor, such as `x86_64`.
    pub arch: String,
}

impl Platform {
    /// What this program was built for.
    #[must_use]
    pub fn here() -> Self {
        Self {
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let word = |text: &str| {
            text.len() <= PLATFORM_MAX
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if word(&self.os) && word(&self.arch) {
            Ok(())
        } else {
            Err("invalid platform: a system and a processor are short words".to_owned())
        }
    }
}

/// Refuses labels that no constraint could ask for, or that are too many to tell everybody of.
///
/// # Errors
/// Names the label.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    for (key, value) in labels {
        let valid = !key.is_empty()
            && key.len() <= KEY_MAX
            && key
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !valid {
            return Err(format!(
                "invalid label {}: a key is 1 to {KEY_MAX} letters, digits, '-', '_' or '.'",
                quote(key)
            ));
        }
        if value.len() > VALUE_MAX || value.contains(char::is_control) {
            return Err(format!(
                "invalid label {key}: a value is at most {VALUE_MAX} bytes without control characters"
            ));
        }
    }
    let bytes: usize = labels
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if labels.len() > LABELS_MAX || bytes > LABEL_BYTES {
        return Err(format!(
            "{} labels of {bytes} bytes: a host has at most {LABELS_MAX} of {LABEL_BYTES} bytes in all",
            labels.len()
        ));
    }
    Ok(())
}

/// Random bytes from the kernel.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .expect("getrandom cannot fail on Linux 5.6 and later once the pool is initialised");
    bytes
}

/// Writes bytes as lower-case hexadecimal digits.
pub(crate) fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Exactly 2·N hexadecimal digits.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_text_and_json() {
        let id = HostId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<HostId>(&json).unwrap(), id);
        assert_ne!(HostId::random(), id);
    }

    #[test]
    fn labels_are_bounded() {
        let one = |key: &str, value: &str| {
            check_labels(&BTreeMap::from([(key.to_owned(), value.to_owned())]))
        };
        assert!(one("disk", "ssd").is_ok() && one("a.b-c_d", "").is_ok());
        for key in ["", "a b", "a/b", "a=b", "é", &"x".repeat(KEY_MAX + 1)] {
            assert!(one(key, "x").is_err(), "{key}");
        }
        assert!(one("disk", &"x".repeat(VALUE_MAX + 1)).is_err());
        assert!(one("disk", "a\nb").is_err());
        let many = |count, length: usize| {
            let labels = (0..count).map(|n: usize| (format!("k{n}"), "v".repeat(length)));
            check_labels(&labels.collect())
        };
        assert!(many(LABELS_MAX, 1).is_ok() && many(LABELS_MAX + 1, 1).is_err());
        assert!(many(LABELS_MAX, 100).is_err(), "too many bytes");
        assert!(Platform::here().check().is_ok());
        let long = Platform {
            os: "x".repeat(PLATFORM_MAX + 1),
            arch: String::new(),
        };
        assert!(long.check().is_err());
    }

    #[test]
    fn wrong_texts_are_refused() {
        for text in [
            "",
            "00",
            "0123456789abcdef0123456789abcdeg",
            "é123456789abcdef0123456789abcde",
        ] {
            assert_eq!(text.parse::<HostId>(), Err(HostIdError), "{text}");
        }
    }
}
