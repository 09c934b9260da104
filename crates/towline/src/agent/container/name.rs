//! Containers' names: which are allowed, and random ones; and their ids.

use std::io::{self, Read};
use std::sync::Arc;

use anyhow::bail;
use control::Names;
use control::names::{ALIASES_MAX, is_valid_alias};

use crate::shim::folder::Spec;

const ADJECTIVES: [&str; 32] = [
    "amber", "brisk", "calm", "clear", "coastal", "deep", "distant", "eager", "early", "fair",
    "fleet", "gentle", "grey", "hardy", "high", "keen", "late", "lively", "long", "low", "mellow",
    "northern", "open", "quiet", "ready", "salty", "silver", "southern", "steady", "sunny",
    "swift", "tidal",
];
const NOUNS: [&str; 32] = [
    "anchor", "barge", "bay", "beacon", "bow", "buoy", "canal", "channel", "current", "deck",
    "dock", "ferry", "fjord", "gull", "harbour", "heron", "keel", "lagoon", "lock", "mast", "pier",
    "quay", "reef", "rope", "rudder", "sail", "shore", "sound", "strait", "tide", "tug", "wharf",
];

/// Refuses a name that can't be a container's.
pub(super) fn check(name: &str) -> anyhow::Result<()> {
    if !control::is_valid_name(name) {
        bail!(
            "{} can't be a container's name: use [a-z0-9][a-z0-9_.-]{{0,62}}, \
             that is 1 to 63 lower-case letters, digits, '_', '.' or '-'",
            control::quote(name)
        );
    }
    Ok(())
}

/// What a container is called on a network.
pub(super) fn names(spec: &Spec, aliases: Vec<String>) -> Arc<Names> {
    Arc::new(Names {
        container: spec.name.clone(),
        id: spec.id.clone(),
        aliases,
    })
}

/// Other names that a user gives a container on a network, in lower case and each once.
///
/// # Errors
/// One that can't be asked for, or too many.
pub(super) fn aliases(wanted: &[String]) -> anyhow::Result<Vec<String>> {
    let mut aliases: Vec<String> = Vec::new();
    for alias in wanted {
        let lower = alias.to_ascii_lowercase();
        if !is_valid_alias(&lower) {
            bail!(
                "{} can't be an alias: use letters, digits, '_', '-', and '.' between them, at most 63 characters",
                control::quote(alias)
            );
        }
        if !aliases.contains(&lower) {
            aliases.push(lower);
        }
    }
    if aliases.len() > ALIASES_MAX {
        bail!(
            "{} aliases are too many: a container has at most {ALIASES_MAX} on a network",
            aliases.len()
        );
    }
    Ok(aliases)
}

/// A name nobody had to think of.
pub(super) fn random() -> io::Result<String> {
    let [adjective, noun, number] = random_bytes::<3>()?;
    let pick = |words: &[&'static str; 32], byte: u8| words[usize::from(byte) % words.len()];
    Ok(format!(
        "{}_{}{}",
        pick(&ADJECTIVES, adjective),
        pick(&NOUNS, noun),
        number % 100
    ))
}

/// A container's id: 12 hexadecimal digits.
pub(super) fn random_id() -> io::Result<String> {
    Ok(random_bytes::<6>()?
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_names_that_can_be_asked_for() {
        let given = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            aliases(&texts)
        };
        assert_eq!(given(&["DB", "db", "a.b"]).expect("names"), ["db", "a.b"]);
        for bad in ["", "a b", "a..b", "-a", "ä", &"x".repeat(64)] {
            let error = given(&[bad]).expect_err(bad).to_string();
            assert!(error.contains("can't be an alias"), "{error}");
        }
        let many: Vec<String> = (0..=ALIASES_MAX).map(|n| format!("a{n}")).collect();
        assert!(aliases(&many).is_err());
    }

    #[test]
    fn random_names_are_allowed_and_ids_make_interface_names() {
        for _ in 0..100 {
            let name = random().expect("random bytes");
            assert!(check(&name).is_ok(), "{name}");
            assert_eq!(random_id().expect("random bytes").len(), 12);
        }
    }

    #[test]
    fn other_names_are_refused_on_one_line() {
        for name in ["", "..", "a/b", "a b", "A", "-a", "a\nb", &"x".repeat(300)] {
            let error = check(name).expect_err(name).to_string();
            assert!(!error.contains('\n') && error.len() < 300, "{error}");
        }
    }
}
