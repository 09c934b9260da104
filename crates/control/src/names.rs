//! What a container is called: its name, its short id, and the aliases it was given on one network.

use serde::{Deserialize, Serialize};

use crate::network::is_valid_name;

/// The most aliases of an endpoint.
pub const ALIASES_MAX: usize = 16;
/// Hexadecimal digits of a container's short id.
const ID_DIGITS: usize = 12;

/// The names of an endpoint, by its owner's word.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Names {
    /// The container's name.
    pub container: String,
    /// Its short id: 12 lower-case hexadecimal digits.
    pub id: String,
    /// Other names on this network, at most [`ALIASES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

impl Names {
    /// Whether every name is one that can be asked for, and there are no more than may be: a host may say anything.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        is_valid_name(&self.container)
            && self.id.len() == ID_DIGITS
            && self
                .id
                .bytes()
                .all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
            && self.aliases.len() <= ALIASES_MAX
            && self.aliases.iter().all(|alias| is_valid_alias(alias))
    }

    /// Bytes that they take in a message, about.
    pub(crate) fn size(&self) -> usize {
        let aliases = self.aliases.iter().map(|alias| alias.len() + 2);
        self.container.len() + self.id.len() + aliases.sum::<usize>() + 8
    }
}

/// Whether an alias is a name that can be asked for: as a container's, and no label between its dots is empty (RFC 1035 §3.1).
#[must_use]
pub fn is_valid_alias(alias: &str) -> bool {
    is_valid_name(alias) && alias.split('.').all(|label| !label.is_empty())
}

/// How names that several rows share are written, for `#[serde(with = …)]`: as if each had its own.
pub mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Names;

    /// Writes them.
    ///
    /// # Errors
    /// Those of the serialiser.
    pub fn serialize<S: Serializer>(
        names: &Option<Arc<Names>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        names.as_deref().serialize(serializer)
    }

    /// Reads them.
    ///
    /// # Errors
    /// What is no names.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Arc<Names>>, D::Error> {
        Ok(Option::<Names>::deserialize(deserializer)?.map(Arc::new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_may_call_its_containers() {
        let good = Names {
            container: "c1".to_owned(),
            id: "0123456789ab".to_owned(),
            aliases: vec!["db.local".to_owned(); ALIASES_MAX],
        };
        assert!(good.is_valid());
        let wrong: [fn(&mut Names); 7] = [
            |names| names.container = "A".to_owned(),
            |names| names.container.clear(),
            |names| names.id = "0123456789aB".to_owned(),
            |names| names.id.truncate(11),
            |names| names.aliases.push("x".to_owned()),
            |names| names.aliases[3] = "a..b".to_owned(),
            |names| names.aliases[0] = "x".repeat(64),
        ];
        for spoil in wrong {
            let mut names = good.clone();
            spoil(&mut names);
            assert!(!names.is_valid(), "{names:?}");
        }
        assert!(!is_valid_alias("a."));
        let json = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<Names>(&json).unwrap(), good);
    }
}
