//! What is ours, and what the host was like before: both stand in interfaces' aliases.

use std::fmt;

use netns::Link;

use super::Existing;
use crate::BridgeError;

/// What every alias of ours begins with.
const ALIAS: &str = "towline ";
/// The alias of a container's port.
pub(crate) const PORT_ALIAS: &str = "towline gateway port";
const BRIDGE_ALIAS: &str = "towline gateway bridge";

/// The host's settings before we changed them. Written into the bridge's alias, so that whoever removes the bridge can put
/// them back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    pub(crate) ipv4_forward: bool,
    pub(crate) ipv6_forward: bool,
    /// Interfaces that took router advertisements only while the host did not forward (`accept_ra` 1, which we set to 2).
    pub(crate) advertised: Vec<String>,
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ipv4, ipv6) = (u8::from(self.ipv4_forward), u8::from(self.ipv6_forward));
        write!(
            f,
            "{BRIDGE_ALIAS}; before: ipv4={ipv4} ipv6={ipv6} ra={}",
            self.advertised.join(",")
        )
    }
}

impl Before {
    /// Reads an alias; `None` when it is none of ours.
    pub(crate) fn parse(alias: &str) -> Option<Self> {
        let mut before = Self {
            ipv4_forward: true,
            ipv6_forward: true,
            advertised: Vec::new(),
        };
        // Without the settings (somebody shortened the alias) nothing is put back.
        for word in alias.strip_prefix(BRIDGE_ALIAS)?.split_whitespace() {
            match word.split_once('=') {
                Some(("ipv4", value)) => before.ipv4_forward = value != "0",
                Some(("ipv6", value)) => before.ipv6_forward = value != "0",
                Some(("ra", names)) => {
                    before.advertised = names
                        .split(',')
                        .filter(|name| !name.is_empty())
                        .map(str::to_owned)
                        .collect();
                }
                _ => {}
            }
        }
        Some(before)
    }
}

/// The interface of the bridge's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Absent,
    /// We ended between making it and signing it: nothing was changed for it yet.
    Unsigned,
    Ours(Before),
}

/// What stands under the bridge's name; an error when it is another's.
pub(crate) fn standing(existing: &Existing) -> Result<Standing, BridgeError> {
    let Some(link) = &existing.bridge else {
        return Ok(Standing::Absent);
    };
    let is_bridge = link.kind.as_deref() == Some("bridge");
    match link.alias.as_deref().map(Before::parse) {
        Some(Some(before)) if is_bridge => Ok(Standing::Ours(before)),
        None if is_bridge && !link.up && existing.addresses.is_empty() => Ok(Standing::Unsigned),
        _ => Err(BridgeError::NotOurs(link.name.clone())),
    }
}

/// Whether an interface is the host's end of a container's link, be it one that we had no time to sign.
pub(crate) fn is_port(link: &Link) -> bool {
    match &link.alias {
        Some(alias) => alias.starts_with(ALIAS),
        None => link.kind.as_deref() == Some("veth") && !link.up && link.master.is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    #[test]
    fn the_alias_round_trips_and_strangers_are_not_ours() {
        let before = Before {
            ipv4_forward: true,
            ipv6_forward: false,
            advertised: vec!["eth0".to_owned(), "eth1".to_owned()],
        };
        assert_eq!(Before::parse(&before.to_string()), Some(before.clone()));
        assert_eq!(Before::parse("my bridge"), None);
        let shortened = Before::parse(BRIDGE_ALIAS).expect("still ours");
        assert!(
            shortened.ipv4_forward && shortened.ipv6_forward,
            "nothing to put back"
        );
        let mut existing = host(&before);
        assert_eq!(standing(&existing).expect("ours"), Standing::Ours(before));
        if let Some(link) = &mut existing.bridge {
            link.alias = None;
        }
        assert!(matches!(standing(&existing), Err(BridgeError::NotOurs(_))));
    }

    #[test]
    fn a_bridge_we_had_no_time_to_sign_is_ours() {
        let mut existing = host(&Before::default());
        existing.addresses.clear();
        if let Some(link) = &mut existing.bridge {
            (link.alias, link.up) = (None, false);
        }
        assert_eq!(standing(&existing).expect("ours"), Standing::Unsigned);
        assert_eq!(
            standing(&Existing::default()).expect("nobody's"),
            Standing::Absent
        );
    }
}
