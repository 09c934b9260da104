//! What `network create --opt KEY=VALUE` sets.

use std::collections::BTreeSet;

use anyhow::bail;
use control::{Addressing, MacMode};

/// The keys, for whoever gives another.
const KEYS: &str = "mac, address-rest";

/// The settings of a new network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// How addresses are given.
    pub(super) addressing: Addressing,
}

impl Options {
    /// Reads settings, each once.
    ///
    /// # Errors
    /// An unknown key, a key given twice, a value that the key does not have.
    pub(super) fn parse(texts: &[String]) -> anyhow::Result<Self> {
        let mut options = Self::default();
        let mut seen = BTreeSet::new();
        for text in texts {
            let Some((key, value)) = text.split_once('=') else {
                bail!("invalid option '{text}': write KEY=VALUE; the keys are {KEYS}");
            };
            if !seen.insert(key) {
                bail!("the option {key} was given twice: give it once");
            }
            options.set(key, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &str) -> anyhow::Result<()> {
        match key {
            "mac" => {
                self.addressing.mac = match value {
                    "epoch" => MacMode::Epoch,
                    "docker" => MacMode::Docker,
                    _ => bail!("invalid option mac={value}: it is 'epoch' or 'docker'"),
                }
            }
            "address-rest" => {
                self.addressing.rest_seconds = value.parse().map_err(|_| {
                    anyhow::anyhow!(
                        "invalid option address-rest={value}: it is a number of seconds"
                    )
                })?;
            }
            _ => bail!("unknown option '{key}': the keys are {KEYS}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> anyhow::Result<Options> {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        Options::parse(&texts)
    }

    #[test]
    fn settings_are_keys_and_values() {
        assert_eq!(parse(&[]).expect("none"), Options::default());
        let options = parse(&["mac=docker", "address-rest=30"]).expect("settings");
        assert_eq!(options.addressing.mac, MacMode::Docker);
        assert_eq!(options.addressing.rest_seconds, 30);
        for (texts, word) in [
            (&["mac"][..], "KEY=VALUE"),
            (&["mac=random"], "'epoch' or 'docker'"),
            (&["mac=docker", "mac=epoch"], "twice"),
            (&["address-rest=-1"], "number of seconds"),
            (&["encrypted=true"], "unknown option 'encrypted'"),
        ] {
            let error = parse(texts).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
