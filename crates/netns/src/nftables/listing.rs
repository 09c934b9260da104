//! A table read back part by part, to be compared with what another table holds: of another namespace, or of another time.
//!
//! Names, order of rules and all that decides about packets count; handles, counters and the kernel's names of unnamed maps do not.
//! How long a time limit's connections may be idle is not read back: the kernel mixes settings of the namespace into it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::netfilter::attributes::{Attributes, Writer};
use crate::netfilter::{NetfilterError, NetfilterSocket};

use super::list::SNAPSHOT;
use super::{Table, comment_of, uapi};

/// How the kernel names maps that belong to one rule.
const UNNAMED: &str = "__";
/// The name of `nft_lookup`, and where it names the set (`NFTA_LOOKUP_SET`).
const LOOKUP: &str = "lookup";
const LOOKUP_SET: u16 = 1;

/// All of a table, part by part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    is_there: bool,
    /// Chains, sets and time limits.
    things: BTreeMap<Part, Vec<u8>>,
    /// Of each chain, in their order.
    rules: BTreeMap<String, Vec<(Vec<u8>, Part)>>,
    /// Of all named sets and maps.
    elements: BTreeMap<(String, Vec<u8>), Part>,
}

/// One part of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The table itself.
    Table,
    /// A chain, with its hook.
    Chain(String),
    /// A rule.
    Rule {
        /// Its chain.
        chain: String,
        /// Its comment.
        comment: Option<String>,
    },
    /// The order of a chain's rules.
    Order(String),
    /// A set or map, without what is in it.
    Set(String),
    /// An element of a set or map.
    Element {
        /// The set or map.
        set: String,
        /// Its key, in the kernel's bytes.
        key: Vec<u8>,
        /// The chain that it leads to.
        chain: Option<String>,
    },
    /// A time limit.
    Limit(String),
}

/// A part that one table has and the other has not; one that is another has both forms.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Which.
    pub part: Part,
    /// It should be there and is not; else the other way round.
    pub missing: bool,
}

impl Listing {
    /// Whether there is such a table.
    pub fn is_there(&self) -> bool {
        self.is_there
    }

    /// What stands here otherwise than in `expected`.
    pub fn differences(&self, expected: &Self) -> Vec<Difference> {
        let one = |part: Part, missing| Difference { part, missing };
        if self.is_there != expected.is_there {
            return vec![one(Part::Table, expected.is_there)];
        }
        let mut found = BTreeSet::new();
        for (these, those, missing) in [(expected, self, true), (self, expected, false)] {
            for (part, bytes) in &these.things {
                if those.things.get(part) != Some(bytes) {
                    found.insert((part.clone(), missing));
                }
            }
            for ((set, bytes), part) in &these.elements {
                if !those.elements.contains_key(&(set.clone(), bytes.clone())) {
                    found.insert((part.clone(), missing));
                }
            }
        }
        let chains: BTreeSet<&String> = self.rules.keys().chain(expected.rules.keys()).collect();
        let mut all: Vec<Difference> = found
            .into_iter()
            .map(|(part, missing)| one(part, missing))
            .collect();
        for chain in chains {
            let rules = |of: &Self| of.rules.get(chain).cloned().unwrap_or_default();
            let (here, there) = (rules(self), rules(expected));
            let missing = without(&there, &here);
            let extra = without(&here, &there);
            if missing.is_empty() && extra.is_empty() && here != there {
                all.push(one(Part::Order(chain.clone()), true));
            }
            all.extend(missing.into_iter().map(|part| one(part, true)));
            all.extend(extra.into_iter().map(|part| one(part, false)));
        }
        all
    }
}

/// Those of `all` that `others` has not as often.
fn without(all: &[(Vec<u8>, Part)], others: &[(Vec<u8>, Part)]) -> Vec<Part> {
    let mut others: Vec<&[u8]> = others.iter().map(|(bytes, _)| bytes.as_slice()).collect();
    let left = all.iter().filter(|(bytes, _)| {
        let same = others.iter().position(|other| other == bytes);
        same.map(|at| others.swap_remove(at)).is_none()
    });
    left.map(|(_, part)| part.clone()).collect()
}

impl NetfilterSocket {
    /// A table as it stands. Empty when there is none.
    ///
    /// # Errors
    /// When the kernel refuses, or has no nf_tables.
    pub fn listing(&mut self, table: &Table) -> Result<Listing, NetfilterError> {
        let mut listing = Listing::default();
        if !self.tables()?.contains(table) {
            return Ok(listing);
        }
        listing.is_there = true;
        let names = self.of_table(table, uapi::GET_SET, |set| {
            set.text(uapi::set::NAME).map(str::to_owned)
        })?;
        // What unnamed maps hold stands for their names.
        let mut unnamed = BTreeMap::new();
        for name in names {
            let elements = self.elements_of(table, &name)?;
            if name.starts_with(UNNAMED) {
                unnamed.insert(name, elements.concat());
                continue;
            }
            for bytes in elements {
                let part = element(&name, &bytes);
                listing.elements.insert((name.clone(), bytes), part);
            }
        }
        for (kind, left_out) in SNAPSHOT {
            for (part, bytes) in self.of_table(table, *kind, |attributes| {
                named(*kind, attributes, left_out, &unnamed)
            })? {
                match &part {
                    Part::Rule { chain, .. } => {
                        let rules = listing.rules.entry(chain.clone()).or_default();
                        rules.push((bytes, part));
                    }
                    _ => {
                        listing.things.insert(part, bytes);
                    }
                }
            }
        }
        Ok(listing)
    }
}

/// What an answer of the kernel is about, and the bytes of it that count.
fn named(
    kind: u16,
    attributes: Attributes<'_>,
    left_out: &[u16],
    unnamed: &BTreeMap<String, Vec<u8>>,
) -> Option<(Part, Vec<u8>)> {
    let name = |number| attributes.text(number).map(str::to_owned);
    let part = match kind {
        uapi::GET_CHAIN => Part::Chain(name(uapi::chain::NAME)?),
        uapi::GET_RULE => Part::Rule {
            chain: name(uapi::rule::CHAIN)?,
            comment: attributes
                .find(uapi::rule::USER_DATA)
                .and_then(comment_of)
                .map(str::to_owned),
        },
        uapi::GET_SET => {
            Part::Set(name(uapi::set::NAME).filter(|name| !name.starts_with(UNNAMED))?)
        }
        _ => Part::Limit(name(uapi::object::NAME)?),
    };
    let mut kept = Writer::default();
    for (number, value) in attributes {
        let counts = match kind {
            uapi::GET_OBJECT => number != uapi::object::DATA,
            _ => true,
        };
        if left_out.contains(&number) || !counts {
            continue;
        }
        if (kind, number) == (uapi::GET_RULE, uapi::rule::EXPRESSIONS) {
            for (_, expression) in Attributes(value) {
                write(&mut kept, Attributes(expression), unnamed);
            }
        } else {
            kept.bytes(number, value);
        }
    }
    Some((part, kept.as_bytes().to_vec()))
}

/// An expression of a rule, but for what it counts, and with what is in an unnamed map for the map's name.
fn write(kept: &mut Writer, expression: Attributes<'_>, unnamed: &BTreeMap<String, Vec<u8>>) {
    let name = expression.text(uapi::expression::NAME).unwrap_or_default();
    kept.text(uapi::expression::NAME, name);
    match name {
        "counter" => {}
        LOOKUP => {
            for (number, value) in expression.inside(uapi::expression::DATA) {
                let text = crate::netfilter::attributes::text(value);
                let map = text.filter(|_| number == LOOKUP_SET);
                match map.and_then(|name| unnamed.get(name)) {
                    Some(elements) => kept.raw(elements),
                    None => kept.bytes(number, value),
                }
            }
        }
        _ => kept.raw(expression.find(uapi::expression::DATA).unwrap_or_default()),
    }
}

fn element(set: &str, bytes: &[u8]) -> Part {
    let element = Attributes(bytes);
    let key = element.inside(uapi::elements::KEY);
    let data = element.inside(uapi::elements::DATA);
    let verdict = data.inside(uapi::expression::VERDICT);
    Part::Element {
        set: set.to_owned(),
        key: key
            .find(uapi::expression::VALUE)
            .unwrap_or_default()
            .to_vec(),
        chain: verdict
            .text(uapi::expression::VERDICT_CHAIN)
            .map(str::to_owned),
    }
}

impl fmt::Display for Part {
    /// `rule "members of web" of chain svc-web`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table => write!(f, "all of it"),
            Self::Chain(name) => write!(f, "chain {name}"),
            Self::Rule { chain, comment } => match comment {
                Some(comment) => write!(f, "rule \"{comment}\" of chain {chain}"),
                None => write!(f, "rule without a comment of chain {chain}"),
            },
            Self::Order(chain) => write!(f, "order of rules of chain {chain}"),
            Self::Set(name) => write!(f, "set {name}"),
            Self::Element { set, key, chain } => {
                write!(f, "element {} of set {set}", shown(key))?;
                chain
                    .iter()
                    .try_for_each(|chain| write!(f, ", to chain {chain}"))
            }
            Self::Limit(name) => write!(f, "time limit {name}"),
        }
    }
}

/// A key as people read it: an address, or a protocol and a port, each padded to four bytes.
fn shown(key: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(key) {
        return Ipv4Addr::from(v4).to_string();
    }
    if let Ok(v6) = <[u8; 16]>::try_from(key) {
        return Ipv6Addr::from(v6).to_string();
    }
    match *key {
        [protocol, _, _, _, high, low, _, _] => {
            let port = u16::from_be_bytes([high, low]);
            match protocol {
                6 => format!("tcp {port}"),
                17 => format!("udp {port}"),
                other => format!("protocol {other} port {port}"),
            }
        }
        _ => key.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(comment: &str, byte: u8) -> (Vec<u8>, Part) {
        let part = Part::Rule {
            chain: "c".to_owned(),
            comment: Some(comment.to_owned()),
        };
        (vec![byte], part)
    }

    fn listing(rules: &[(&str, u8)]) -> Listing {
        let rules = rules.iter().map(|(comment, byte)| rule(comment, *byte));
        Listing {
            is_there: true,
            rules: BTreeMap::from([("c".to_owned(), rules.collect())]),
            ..Listing::default()
        }
    }

    fn told(found: &[Difference]) -> Vec<String> {
        let told = found.iter().map(|difference| {
            let word = if difference.missing {
                "missing"
            } else {
                "extra"
            };
            format!("{word} {}", difference.part)
        });
        told.collect()
    }

    #[test]
    fn rules_differ_by_what_they_are_and_by_their_order() {
        let expected = listing(&[("a", 1), ("a", 1), ("b", 2)]);
        assert!(expected.differences(&expected).is_empty());
        let one_less = listing(&[("a", 1), ("b", 2)]);
        assert_eq!(
            told(&one_less.differences(&expected)),
            ["missing rule \"a\" of chain c"]
        );
        let changed = listing(&[("a", 1), ("a", 1), ("b", 3)]);
        assert_eq!(
            told(&changed.differences(&expected)),
            [
                "missing rule \"b\" of chain c",
                "extra rule \"b\" of chain c"
            ]
        );
        let turned = listing(&[("b", 2), ("a", 1), ("a", 1)]);
        assert_eq!(
            told(&turned.differences(&expected)),
            ["missing order of rules of chain c"]
        );
        assert_eq!(
            told(&Listing::default().differences(&expected)),
            ["missing all of it"]
        );
        assert_eq!(
            told(&expected.differences(&Listing::default())),
            ["extra all of it"]
        );
    }

    #[test]
    fn keys_read_as_what_they_are() {
        assert_eq!(shown(&[10, 0, 9, 7]), "10.0.9.7");
        assert_eq!(shown(&[6, 0, 0, 0, 0x1f, 0x90, 0, 0]), "tcp 8080");
        assert_eq!(shown(&[1, 2]), "0102");
    }
}
