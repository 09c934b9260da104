//! Names: of a lab, and of the network namespaces it is made of.
//!
//! `lab down` finds what a crashed lab left by these names alone, so a lab's namespaces can be told from another
//! lab's and from anything else by their names alone: the part after the lab's name has one of few exact forms.

use std::fmt;
use std::str::FromStr;

/// Most hosts of one lab: the last octets above are the router's and the bench's own hosts'.
pub(crate) const MAX_HOSTS: u16 = 200;
/// Most containers on one host of a lab.
pub(crate) const MAX_CONTAINERS: u16 = 1000;
/// Longest name of a lab: a socket's path has 108 bytes, and a container's name 63.
const MAX_LEN: usize = 32;

/// The name of a lab: `[a-z0-9][a-z0-9-]{0,31}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabName(String);

/// Why a text is no lab's name.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' can't be a lab's name: use 1 to {MAX_LEN} of a-z, 0-9 and '-', beginning with a letter or digit"
)]
pub(crate) struct NameError(String);

impl FromStr for LabName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let good = (1..=MAX_LEN).contains(&text.len())
            && text.bytes().all(|byte| letter(byte) || byte == b'-')
            && text.bytes().next().is_some_and(letter);
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which kinds of hosts a lab can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs an agent; made by `lab up`.
    Host,
    /// Runs the kernel's VXLAN; made by `lab bench` while it measures.
    Kernel,
    /// Runs an agent on the plain backend; made by `lab bench` while it measures.
    Plain,
    /// Runs another program's tunnel; made by `lab bench` while it measures.
    Peer,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Host, Self::Kernel, Self::Plain, Self::Peer];

    const fn letter(self) -> char {
        match self {
            Self::Host => 'h',
            Self::Kernel => 'k',
            Self::Plain => 'p',
            Self::Peer => 'o',
        }
    }
}

/// What one of a lab's namespaces is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The underlay: a switch, and the router to the outside.
    Switch,
    /// What lies behind the router.
    Outside,
    /// A host, counted from 1.
    Node(Kind, u16),
    /// A container: its host, and its number there, both counted from 1.
    Container(Kind, u16, u16),
}

impl LabName {
    /// The namespace, host or container of this role.
    pub(crate) fn of(&self, role: Role) -> String {
        match role {
            Role::Switch => format!("{self}-sw"),
            Role::Outside => format!("{self}-out"),
            Role::Node(kind, host) => format!("{self}-{}{host}", kind.letter()),
            Role::Container(kind, host, index) => format!("{self}-{}{host}c{index}", kind.letter()),
        }
    }

    /// What the namespace of this name is in this lab, if it is this lab's.
    pub(crate) fn role(&self, namespace: &str) -> Option<Role> {
        role(namespace.strip_prefix(&self.0)?.strip_prefix('-')?)
    }

    /// The lab that a namespace belongs to, going by its name.
    pub(crate) fn owning(namespace: &str) -> Option<Self> {
        let (lab, rest) = namespace.rsplit_once('-')?;
        role(rest)?;
        lab.parse().ok()
    }
}

fn role(text: &str) -> Option<Role> {
    match text {
        "sw" => return Some(Role::Switch),
        "out" => return Some(Role::Outside),
        _ => {}
    }
    let kind = Kind::ALL
        .into_iter()
        .find(|kind| text.starts_with(kind.letter()))?;
    let numbers = &text[1..];
    match numbers.split_once('c') {
        None => Some(Role::Node(kind, number(numbers)?)),
        Some((host, index)) => Some(Role::Container(kind, number(host)?, number(index)?)),
    }
}

/// A number as this module writes it: no sign, no leading zero.
fn number(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab(name: &str) -> LabName {
        name.parse().unwrap()
    }

    #[test]
    fn names_are_checked() {
        for good in ["lab", "a", "0", "two-labs", &"x".repeat(32)] {
            assert_eq!(lab(good).to_string(), good);
        }
        for bad in [
            "",
            "-a",
            "Lab",
            "a b",
            "a/b",
            "a.b",
            "a_b",
            "é",
            &"x".repeat(33),
            &"x".repeat(300),
        ] {
            let error = bad.parse::<LabName>().unwrap_err().to_string();
            assert!(error.len() < 250, "{error}");
        }
    }

    #[test]
    fn every_role_round_trips() {
        let name = lab("my-lab");
        let roles = [
            Role::Switch,
            Role::Outside,
            Role::Node(Kind::Host, 1),
            Role::Node(Kind::Kernel, 2),
            Role::Container(Kind::Host, 12, 34),
            Role::Container(Kind::Plain, 1, 1),
            Role::Node(Kind::Peer, 8),
        ];
        for role in roles {
            let namespace = name.of(role);
            assert_eq!(name.role(&namespace), Some(role), "{namespace}");
            assert_eq!(LabName::owning(&namespace), Some(name.clone()));
        }
        assert_eq!(name.of(Role::Container(Kind::Host, 3, 2)), "my-lab-h3c2");
    }

    #[test]
    fn nothing_else_is_ours() {
        let name = lab("lab");
        let others = [
            "lab",
            "lab-",
            "lab-h",
            "lab-h0",
            "lab-h01",
            "lab-h+1",
            "lab-h1c",
            "lab-h1c0",
            "lab-h1c1c1",
            "lab-h1-sw",
            "lab-x1",
            "lab-swx",
            "lab2-h1",
            "other-h1",
            "lab-h99999",
            "lab-é",
        ];
        for other in others {
            assert_eq!(name.role(other), None, "{other}");
        }
        // A lab whose name begins as another's does.
        assert_eq!(lab("lab-h1").role("lab-h1-sw"), Some(Role::Switch));
        assert_eq!(LabName::owning("lab-h1-sw"), Some(lab("lab-h1")));
    }
}
