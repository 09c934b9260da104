//! Constraints: which hosts a container may run on, in the words of Swarm's `--constraint`.
//!
//! `KEY==VALUE` or `KEY!=VALUE`, all of which must hold. Values are compared without regard to case, as Swarm does; names of
//! labels are not. A label that is missing is as one with an empty value; a key that nobody knows never holds.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::host::HostView;

const HOST_LABEL: &str = "node.labels.";
const OWN_LABEL: &str = "engine.labels.";
/// Longest text of a constraint in bytes.
const TEXT_MAX: usize = 512;

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraint {
    key: String,
    equal: bool,
    value: String,
}

/// A text that is no constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// Neither operator is there.
    #[error(
        "invalid constraint '{0}': constraint expected one operator from ==, !=, such as node.labels.disk==ssd"
    )]
    Operator(String),
    /// The key is none.
    #[error(
        "invalid constraint: key '{0}' is invalid; the keys are node.id, node.hostname, node.ip, node.role, \
         node.platform.os, node.platform.arch, node.labels.NAME and engine.labels.NAME"
    )]
    Key(String),
    /// The value is none.
    #[error("invalid constraint: value '{0}' is invalid")]
    Value(String),
    /// It is too long.
    #[error("invalid constraint: it is longer than {TEXT_MAX} bytes")]
    Long,
}

impl FromStr for Constraint {
    type Err = ConstraintError;

    fn from_str(text: &str) -> Result<Self, ConstraintError> {
        if text.len() > TEXT_MAX {
            return Err(ConstraintError::Long);
        }
        let shown = || text.escape_debug().to_string();
        let (key, equal, value) = [("==", true), ("!=", false)]
            .into_iter()
            .find_map(|(operator, equal)| {
                let (key, value) = text.split_once(operator)?;
                Some((key.trim(), equal, value.trim()))
            })
            .ok_or_else(|| ConstraintError::Operator(shown()))?;
        if !is_key(key) {
            return Err(ConstraintError::Key(key.escape_debug().to_string()));
        }
        if !is_value(value) {
            return Err(ConstraintError::Value(value.escape_debug().to_string()));
        }
        Ok(Self {
            key: key.to_owned(),
            equal,
            value: value.to_owned(),
        })
    }
}

/// Swarm's `^(?i)[a-z_][a-z0-9\-_.]+$`.
fn is_key(key: &str) -> bool {
    key.len() > 1
        && key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// Swarm's `^(?i)[a-z0-9:\-_\s\.\*\(\)\?\+\[\]\\\^\$\|\/]+$`, without line ends.
fn is_value(value: &str) -> bool {
    !value.is_empty()
        && value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || r":-_ .*()?+[]\^$|/".contains(c))
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operator = if self.equal { "==" } else { "!=" };
        write!(f, "{}{operator}{}", self.key, self.value)
    }
}

impl Constraint {
    /// Whether it holds for a host.
    #[must_use]
    pub fn holds(&self, host: &HostView) -> bool {
        if self.key.eq_ignore_ascii_case("node.ip") {
            let vtep = host.info.vtep;
            let is = if let Ok(ip) = self.value.parse::<IpAddr>() {
                ip == vtep
            } else if let Ok(net) = self.value.parse::<IpNet>() {
                net.contains(&vtep)
            } else {
                // Neither an address nor a prefix: it holds for nobody, whichever the operator.
                return false;
            };
            return is == self.equal;
        }
        match self.actual(host) {
            Some(actual) => actual.to_lowercase().eq(&self.value.to_lowercase()) == self.equal,
            None => false,
        }
    }

    /// What the host has for the key; `None`: nobody knows that key.
    #[must_use]
    pub fn actual(&self, host: &HostView) -> Option<String> {
        let is = |key: &str| self.key.eq_ignore_ascii_case(key);
        let label = |prefix: &str| {
            let (start, name) = self.key.split_at_checked(prefix.len())?;
            (start.eq_ignore_ascii_case(prefix) && !name.is_empty()).then_some(name)
        };
        let traits = &host.traits;
        Some(if is("node.id") {
            host.info.id.to_string()
        } else if is("node.hostname") {
            host.info.name.clone()
        } else if is("node.ip") {
            host.info.vtep.to_string()
        } else if is("node.role") {
            if host.manager { "manager" } else { "worker" }.to_owned()
        } else if is("node.platform.os") {
            traits.platform.os.clone()
        } else if is("node.platform.arch") {
            traits.platform.arch.clone()
        } else if let Some(name) = label(HOST_LABEL) {
            traits.labels.get(name).cloned().unwrap_or_default()
        } else if let Some(name) = label(OWN_LABEL) {
            traits.own_labels.get(name).cloned().unwrap_or_default()
        } else {
            return None;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{HostId, HostInfo, HostTraits, Platform};

    fn host(manager: bool) -> HostView {
        let labels = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                .collect()
        };
        HostView {
            info: HostInfo {
                id: HostId::from_bytes([0xab; 16]),
                name: "h1".to_owned(),
                vtep: "192.0.2.1".parse().unwrap(),
                port: 4789,
                link_mtu: 1500,
                incarnation: 1,
            },
            up: true,
            last_seen_ms_ago: 0,
            manager,
            wanted_port: None,
            port_problem: None,
            control: None,
            traits: HostTraits {
                labels: labels(&[("disk", "SSD"), ("Zone", "a")]),
                own_labels: labels(&[("gpu", "yes")]),
                platform: Platform {
                    os: "linux".to_owned(),
                    arch: "x86_64".to_owned(),
                },
            },
        }
    }

    #[test]
    fn every_key_and_both_operators() {
        let id = "ab".repeat(16);
        for (text, holds) in [
            (format!("node.id=={id}"), true),
            (format!("node.id=={}", id.to_uppercase()), true),
            (format!("node.id!={id}"), false),
            ("node.hostname==H1".to_owned(), true),
            ("node.hostname!=h2".to_owned(), true),
            ("node.ip==192.0.2.1".to_owned(), true),
            ("node.ip!=192.0.2.1".to_owned(), false),
            ("node.ip==192.0.2.0/24".to_owned(), true),
            ("node.ip!=192.0.2.0/24".to_owned(), false),
            ("node.ip==198.51.100.0/24".to_owned(), false),
            ("node.ip==2001:db8::/32".to_owned(), false),
            // Neither an address nor a prefix.
            ("node.ip==192.0.2".to_owned(), false),
            ("node.ip!=192.0.2".to_owned(), false),
            ("node.role==worker".to_owned(), true),
            ("node.role!=manager".to_owned(), true),
            ("node.platform.os==Linux".to_owned(), true),
            ("node.platform.arch == x86_64".to_owned(), true),
            ("node.platform.arch==aarch64".to_owned(), false),
            // Values without regard to case, names of labels with.
            ("node.labels.disk==ssd".to_owned(), true),
            ("node.labels.disk!=ssd".to_owned(), false),
            ("NODE.LABELS.disk==ssd".to_owned(), true),
            ("node.labels.Disk==ssd".to_owned(), false),
            ("node.labels.Zone==A".to_owned(), true),
            // A label that is missing is empty.
            ("node.labels.none==x".to_owned(), false),
            ("node.labels.none!=x".to_owned(), true),
            ("engine.labels.gpu==yes".to_owned(), true),
            ("engine.labels.disk==ssd".to_owned(), false),
            // Nobody knows these keys.
            ("node.colour==red".to_owned(), false),
            ("node.colour!=red".to_owned(), false),
            ("node.labels.==x".to_owned(), false),
        ] {
            let constraint: Constraint = text.parse().unwrap();
            assert_eq!(constraint.holds(&host(false)), holds, "{text}");
        }
        let manager: Constraint = "node.role==manager".parse().unwrap();
        assert!(manager.holds(&host(true)) && !manager.holds(&host(false)));
        assert_eq!(manager.to_string(), "node.role==manager");
    }

    #[test]
    fn what_is_no_constraint_is_named() {
        for (text, word) in [
            ("node.labels.disk", "expected one operator"),
            ("node.labels.disk=ssd", "expected one operator"),
            ("==ssd", "key ''"),
            ("1node==x", "key '1node'"),
            ("n==x", "key 'n'"),
            ("node.labels.a b==x", "key 'node.labels.a b'"),
            ("node.labels.disk==", "value ''"),
            ("node.labels.disk==a,b", "value 'a,b'"),
            ("node.labels.disk==a\nb", "value 'a\\nb'"),
            (&format!("node.id=={}", "x".repeat(600)), "longer than"),
        ] {
            let error = text.parse::<Constraint>().unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }
}
