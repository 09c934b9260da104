//! What `network create --opt KEY=VALUE` sets.

use std::collections::BTreeSet;

use anyhow::bail;
use control::{Addressing, MacMode};
use vtep::settings::{SettingError, WireSettings};

/// The keys, for whoever gives another.
const KEYS: &str = "mtu, vlan, flood, dscp, ttl, udp-checksum, mac, address-rest, dns-ttl";

/// The settings of a new network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// How addresses are given.
    pub(super) addressing: Addressing,
    /// Which frames it carries, and what their outer headers say.
    pub(super) settings: WireSettings,
    /// The MTU of the containers' interfaces, in bytes.
    pub(super) mtu: Option<u16>,
    /// How long an answer with a name of it may be kept, in seconds.
    pub(super) dns_ttl: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            addressing: Addressing::default(),
            settings: WireSettings::default(),
            mtu: None,
            dns_ttl: control::dns_ttl(),
        }
    }
}

impl Options {
    /// Reads settings, each once.
    ///
    /// # Errors
    /// An unknown key, a key given twice, a value that the key does not have.
    pub(super) fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Self> {
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
            // Docker's own name for it, too.
            "mtu" | "com.docker.network.driver.mtu" => {
                let mtu = value.parse().map_err(|_| {
                    anyhow::anyhow!("invalid option {key}={value}: it is a number of bytes")
                })?;
                if self.mtu.replace(mtu).is_some() {
                    bail!("the MTU was given twice: give it once");
                }
            }
            "address-rest" => self.addressing.rest_seconds = seconds(key, value)?,
            "dns-ttl" => self.dns_ttl = seconds(key, value)?,
            _ => match self.settings.set(key, value) {
                Err(SettingError::Unknown(_)) => {
                    bail!("unknown option '{key}': the keys are {KEYS}")
                }
                set => set?,
            },
        }
        Ok(())
    }
}

fn seconds(key: &str, value: &str) -> anyhow::Result<u32> {
    let number = value.parse();
    number.map_err(|_| anyhow::anyhow!("invalid option {key}={value}: it is a number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> anyhow::Result<Options> {
        Options::parse(texts.iter().copied())
    }

    #[test]
    fn settings_are_keys_and_values() {
        assert_eq!(parse(&[]).expect("none"), Options::default());
        let options = parse(&["mac=docker", "address-rest=30"]).expect("settings");
        assert_eq!(options.addressing.mac, MacMode::Docker);
        assert_eq!(options.addressing.rest_seconds, 30);
        assert_eq!(parse(&["dns-ttl=0"]).expect("a setting").dns_ttl, 0);
        let options = parse(&["vlan=pass", "udp-checksum=false"]).expect("settings");
        assert!(!options.settings.udp_checksum && options.settings.flood);
        let options = parse(&["com.docker.network.driver.mtu=1400"]).expect("Docker's name");
        assert_eq!(options.mtu, Some(1400));
        for (texts, word) in [
            (&["mtu=big"][..], "number of bytes"),
            (
                &["mtu=1400", "com.docker.network.driver.mtu=1400"],
                "given twice",
            ),
            (&["mac"][..], "KEY=VALUE"),
            (&["mac=random"], "'epoch' or 'docker'"),
            (&["mac=docker", "mac=epoch"], "twice"),
            (&["address-rest=-1"], "number of seconds"),
            (&["dns-ttl=soon"], "number of seconds"),
            (&["flood=true", "flood=false"], "twice"),
            (&["ttl=0"], "1 to 255"),
            (&["encrypted=true"], "unknown option 'encrypted'"),
        ] {
            let error = parse(texts).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
