//! What can be set for one network: which frames it carries, and what their outer headers say.
//!
//! All hosts of a network have the same settings. The defaults are what RFC 7348 asks for, or where it is silent what asks least of
//! the underlay. [`WireSettings::set`] reads them as an operator writes them, `NAME=VALUE`.

use std::fmt;
use std::num::NonZeroU8;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::edge::OuterFields;
use crate::traffic_class;

/// The outer TTL or hop limit unless a network says otherwise.
pub const DEFAULT_TTL: NonZeroU8 = NonZeroU8::new(64).expect("invariant: 64 is not 0");

/// What is set for one network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WireSettings {
    /// Whether broadcast, multicast and unknown unicast go to every member; if not, ARP and ND are answered from the tables and the
    /// rest is dropped.
    pub flood: bool,
    /// What becomes of frames with 802.1Q tags.
    pub vlan: Vlan,
    /// The outer DSCP.
    pub dscp: Dscp,
    /// The outer TTL or hop limit.
    pub ttl: NonZeroU8,
    /// Whether outer UDP checksums are computed; if not, they are sent as zero and zero is accepted (over IPv6 RFC 6935 §5 allows that
    /// for tunnels). The kernel does not cut messages without checksums, so each datagram costs a message of its own then.
    pub udp_checksum: bool,
}

impl Default for WireSettings {
    fn default() -> Self {
        Self {
            flood: true,
            vlan: Vlan::Drop,
            dscp: Dscp::default(),
            ttl: DEFAULT_TTL,
            udp_checksum: true,
        }
    }
}

/// What becomes of frames with 802.1Q tags, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vlan {
    /// They are dropped (RFC 7348 §6.1).
    #[default]
    Drop,
    /// They pass unchanged. A MAC is the same endpoint in all VLANs, and a packet's source address is checked behind the tags.
    Pass,
}

/// The outer DSCP (RFC 2983).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "DscpForm", into = "DscpForm")]
pub struct Dscp(
    /// `None`: uniform. Else 0 to 63.
    Option<u8>,
);

/// How a DSCP is written in JSON: a number or a word.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum DscpForm {
    Number(u8),
    Word(String),
}

impl Dscp {
    /// The uniform model: the outer field is a copy of the inner one, and what the underlay made of it is copied back.
    pub const UNIFORM: Self = Self(None);

    /// The outer field is 0, whatever the inner one is.
    pub const NONE: Self = Self(Some(0));

    /// The pipe model: always this outer value, and the inner one stays as it is. `None` above 63.
    #[must_use]
    pub const fn fixed(value: u8) -> Option<Self> {
        if value < 64 {
            Some(Self(Some(value)))
        } else {
            None
        }
    }

    /// Whether inner and outer field are one.
    #[must_use]
    pub const fn is_uniform(self) -> bool {
        self.0.is_none()
    }

    /// The outer traffic class around a packet with this one. ECN is always copied (RFC 6040 §4.1).
    #[inline]
    #[must_use]
    pub const fn outer_class(self, inner: u8) -> u8 {
        match self.0 {
            None => inner,
            Some(value) => value << 2 | inner & traffic_class::ECN,
        }
    }
}

impl Default for Dscp {
    fn default() -> Self {
        Self::NONE
    }
}

impl fmt::Display for Dscp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("uniform"),
            Some(value) => value.fmt(f),
        }
    }
}

impl FromStr for Dscp {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        if text == "uniform" {
            return Ok(Self::UNIFORM);
        }
        number(text)
            .and_then(Self::fixed)
            .ok_or_else(|| wrong("dscp", text))
    }
}

impl TryFrom<DscpForm> for Dscp {
    type Error = SettingError;

    fn try_from(form: DscpForm) -> Result<Self, SettingError> {
        match form {
            DscpForm::Number(value) => {
                Self::fixed(value).ok_or_else(|| wrong("dscp", &value.to_string()))
            }
            DscpForm::Word(word) => word.parse(),
        }
    }
}

impl From<Dscp> for DscpForm {
    fn from(dscp: Dscp) -> Self {
        match dscp.0 {
            None => Self::Word("uniform".to_owned()),
            Some(value) => Self::Number(value),
        }
    }
}

/// Why a setting can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// There is no setting of this name.
    #[error("unknown option {0:?}: use one of {known}", known = names())]
    Unknown(String),
    /// The value is none of those it may have.
    #[error("invalid value {value:?} of option {name}: it is {expected}")]
    Value {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

/// Each setting's name as an operator writes it, and what it may be.
const FORMS: [(&str, &str); 5] = [
    ("vlan", "'pass' or 'drop'"),
    ("flood", "'true' or 'false'"),
    ("dscp", "'uniform' or a number from 0 to 63"),
    ("ttl", "a number from 1 to 255"),
    ("udp-checksum", "'true' or 'false'"),
];

impl WireSettings {
    /// The names of all settings.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FORMS.iter().map(|(name, _)| *name)
    }

    /// Sets one of them by its name.
    ///
    /// # Errors
    /// [`SettingError`]; nothing is changed then.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), SettingError> {
        match name {
            "vlan" => {
                self.vlan = match value {
                    "pass" => Vlan::Pass,
                    "drop" => Vlan::Drop,
                    _ => return Err(wrong("vlan", value)),
                }
            }
            "flood" => self.flood = value.parse().map_err(|_| wrong("flood", value))?,
            "dscp" => self.dscp = value.parse()?,
            "ttl" => {
                self.ttl = number(value)
                    .and_then(NonZeroU8::new)
                    .ok_or_else(|| wrong("ttl", value))?;
            }
            "udp-checksum" => {
                self.udp_checksum = value.parse().map_err(|_| wrong("udp-checksum", value))?;
            }
            _ => return Err(SettingError::Unknown(value_shown(name))),
        }
        Ok(())
    }

    /// What the outer header around this frame says.
    #[inline]
    #[must_use]
    pub fn outer(&self, frame: &[u8]) -> OuterFields {
        OuterFields {
            class: self.dscp.outer_class(traffic_class::of_frame(frame)),
            ttl: self.ttl.get(),
            checksum: self.udp_checksum,
        }
    }
}

/// A number in plain digits: `u8::from_str` would take a sign, too.
fn number(text: &str) -> Option<u8> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn wrong(name: &'static str, value: &str) -> SettingError {
    let form = FORMS.iter().find(|(known, _)| *known == name);
    SettingError::Value {
        name,
        value: value_shown(value),
        expected: form.map_or("", |(_, expected)| *expected),
    }
}

/// What was given, short enough for a line.
fn value_shown(value: &str) -> String {
    value.chars().take(64).collect()
}

fn names() -> String {
    WireSettings::names().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_set_by_name_and_wrong_values_change_nothing() {
        let mut settings = WireSettings::default();
        for (name, value) in [
            ("vlan", "pass"),
            ("flood", "false"),
            ("dscp", "uniform"),
            ("ttl", "255"),
            ("udp-checksum", "false"),
        ] {
            settings.set(name, value).unwrap();
        }
        let all = WireSettings {
            flood: false,
            vlan: Vlan::Pass,
            dscp: Dscp::UNIFORM,
            ttl: NonZeroU8::MAX,
            udp_checksum: false,
        };
        assert_eq!(settings, all);
        for (name, value) in [
            ("vlan", "yes"),
            ("vlan", ""),
            ("flood", "0"),
            ("dscp", "64"),
            ("dscp", "-1"),
            ("dscp", "+1"),
            ("dscp", "Uniform"),
            ("ttl", "0"),
            ("ttl", "256"),
            ("ttl", "inherit"),
            ("udp-checksum", "zero"),
        ] {
            let error = settings.set(name, value).unwrap_err().to_string();
            assert!(
                error.contains(name) && error.contains(&format!("{value:?}")),
                "{error}"
            );
        }
        assert_eq!(settings, all);
        settings.set("dscp", "46").unwrap();
        assert_eq!(settings.dscp, Dscp::fixed(46).unwrap());
    }

    #[test]
    fn what_is_unknown_is_told_what_is_known() {
        let error = WireSettings::default().set("vlna", "pass").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown option \"vlna\": use one of vlan, flood, dscp, ttl, udp-checksum"
        );
        let error = WireSettings::default().set("ttl", &"9".repeat(5_000));
        assert!(error.unwrap_err().to_string().len() < 200);
    }

    #[test]
    fn json_is_read_back_and_what_is_missing_is_the_default() {
        let mut settings = WireSettings::default();
        assert_eq!(
            serde_json::to_string(&settings).unwrap(),
            r#"{"flood":true,"vlan":"drop","dscp":0,"ttl":64,"udp_checksum":true}"#
        );
        settings.set("dscp", "uniform").unwrap();
        let json = serde_json::to_string(&settings).unwrap();
        assert!(json.contains(r#""dscp":"uniform""#), "{json}");
        assert_eq!(
            serde_json::from_str::<WireSettings>(&json).unwrap(),
            settings
        );
        assert_eq!(
            serde_json::from_str::<WireSettings>("{}").unwrap(),
            WireSettings::default()
        );
        for wrong in [r#"{"dscp":64}"#, r#"{"dscp":"even"}"#, r#"{"ttl":0}"#] {
            assert!(
                serde_json::from_str::<WireSettings>(wrong).is_err(),
                "{wrong}"
            );
        }
    }
}
