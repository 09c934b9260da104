//! Does a foreign ruleset let our packets through? Read as data, walked as the kernel would, decided without running it.
//!
//! What a rule matches is known only in part: interfaces' names, whether a connection is established, the family. A rule
//! with any other match is taken not to apply, so that the answer errs towards "blocked" where an exotic accept would
//! have let us through, and never takes a specific drop for a general one.

mod read;

use std::collections::HashMap;

use crate::{BRIDGE_NAME, INGRESS_NAME};

pub(crate) use read::tables;

/// How deep chains may jump before the walk gives up. The kernel's own limit is 16.
const MAX_DEPTH: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The name that nftables gives to tables of this family alone.
    pub(crate) fn table_family(self) -> &'static str {
        match self {
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
        }
    }
}

/// One table's forward path.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// `ip`, `ip6`, `inet`.
    pub(crate) family: String,
    pub(crate) name: String,
    /// Chains hooked to forwarding, with whether their policy is drop.
    pub(crate) bases: Vec<(String, bool)>,
    pub(crate) chains: HashMap<String, Vec<Rule>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) matches: Vec<Match>,
    pub(crate) verdict: Verdict,
    /// For removal: nftables' number of the rule and its comment.
    pub(crate) handle: Option<u64>,
    pub(crate) comment: Option<String>,
}

impl Rule {
    /// An accept of ours: everything that enters (or leaves) by an interface of ours.
    pub(crate) fn ours(way: Way) -> Self {
        let names = vec![Pattern {
            name: way.interface.to_owned(),
            prefix: false,
        }];
        let equal = true;
        let only = match way.direction {
            Direction::Out => Match::Input { names, equal },
            Direction::Back => Match::Output { names, equal },
        };
        Self {
            matches: vec![only],
            verdict: Verdict::Accept,
            handle: None,
            comment: Some("towline".to_owned()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// The interface it came in by is one of these, or is none of them.
    Input {
        names: Vec<Pattern>,
        equal: bool,
    },
    /// The interface it goes out by.
    Output {
        names: Vec<Pattern>,
        equal: bool,
    },
    Established,
    Family(Family),
    Unknown,
}

/// An interface's name, or what names begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    pub(crate) name: String,
    pub(crate) prefix: bool,
}

impl Pattern {
    /// From a text whose last character may be the wildcard (`*` in nftables, `+` in iptables).
    pub(crate) fn new(text: &str, wildcard: char) -> Self {
        match text.strip_suffix(wildcard) {
            Some(start) => Self {
                name: start.to_owned(),
                prefix: true,
            },
            None => Self {
                name: text.to_owned(),
                prefix: false,
            },
        }
    }

    fn fits(&self, name: &str) -> bool {
        if self.prefix {
            name.starts_with(&self.name)
        } else {
            name == self.name
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    /// Drop, reject and their like.
    Drop,
    Jump(String),
    Goto(String),
    Return,
    /// Counts, logs, marks: the walk goes on.
    Continue,
}

/// Whether a packet comes from an interface of ours, or goes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Out,
    Back,
}

/// A packet that must pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// The interface of ours, by the kernel's name.
    pub(crate) interface: &'static str,
    pub(crate) direction: Direction,
    /// Whether it is an answer, that a filter for established connections lets pass.
    pub(crate) answer: bool,
}

/// What on this host must be let through, besides containers' connections to the outside and their answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Ports of this host lead to containers.
    pub(crate) published: bool,
    /// This host hands on what comes in at published ports of services.
    pub(crate) ingress: bool,
}

impl Needs {
    /// The packets that must pass.
    pub(crate) fn ways(self) -> Vec<Way> {
        let way = |interface, direction, answer| Way {
            interface,
            direction,
            answer,
        };
        let mut ways = vec![
            way(BRIDGE_NAME, Direction::Out, false),
            way(BRIDGE_NAME, Direction::Back, !self.published),
        ];
        if self.ingress {
            ways.push(way(INGRESS_NAME, Direction::Back, false));
            ways.push(way(INGRESS_NAME, Direction::Out, true));
        }
        ways
    }
}

/// What stops a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) chain: String,
    /// The chain's policy, rather than a rule.
    pub(crate) by_policy: bool,
}

impl Table {
    /// What stops a packet in this table, if anything does, in any of the table's families.
    pub(crate) fn blocks(&self, way: Way) -> Option<Block> {
        let meets = |family: &Family| self.family == "inet" || self.family == family.table_family();
        Family::BOTH
            .into_iter()
            .filter(meets)
            .find_map(|family| self.blocks_family(family, way))
    }

    fn blocks_family(&self, family: Family, way: Way) -> Option<Block> {
        self.bases
            .iter()
            .find_map(|(chain, drops)| match self.walk(chain, family, way, 0) {
                Some(Verdict::Accept) => None,
                Some(_) => Some(Block {
                    chain: chain.clone(),
                    by_policy: false,
                }),
                None => drops.then(|| Block {
                    chain: chain.clone(),
                    by_policy: true,
                }),
            })
    }

    /// The first accept or drop that applies; `None` when the chain ends without.
    fn walk(&self, chain: &str, family: Family, way: Way, depth: usize) -> Option<Verdict> {
        if depth > MAX_DEPTH {
            return None;
        }
        for rule in self.chains.get(chain)? {
            if !rule.matches.iter().all(|part| part.applies(family, way)) {
                continue;
            }
            match &rule.verdict {
                Verdict::Accept => return Some(Verdict::Accept),
                Verdict::Drop => return Some(Verdict::Drop),
                Verdict::Return => return None,
                Verdict::Goto(target) => return self.walk(target, family, way, depth + 1),
                Verdict::Jump(target) => {
                    if let Some(verdict) = self.walk(target, family, way, depth + 1) {
                        return Some(verdict);
                    }
                }
                Verdict::Continue => {}
            }
        }
        None
    }
}

impl Match {
    /// Whether it surely holds.
    fn applies(&self, family: Family, way: Way) -> bool {
        let (input, output) = match way.direction {
            Direction::Out => (Some(way.interface), None),
            Direction::Back => (None, Some(way.interface)),
        };
        // The other side may be any interface but this one.
        let fits = |known: Option<&str>, names: &[Pattern], equal: bool| match (known, names) {
            (Some(name), names) => names.iter().any(|pattern| pattern.fits(name)) == equal,
            (None, [only]) if only.prefix => only.name.is_empty() && equal,
            (None, [only]) => only.name == way.interface && !equal,
            (None, _) => false,
        };
        match self {
            Self::Input { names, equal } => fits(input, names, *equal),
            Self::Output { names, equal } => fits(output, names, *equal),
            Self::Established => way.answer,
            Self::Family(wanted) => *wanted == family,
            Self::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const OUT: Way = Way {
        interface: BRIDGE_NAME,
        direction: Direction::Out,
        answer: false,
    };
    const BACK: Way = Way {
        interface: BRIDGE_NAME,
        direction: Direction::Back,
        answer: true,
    };

    fn ruleset(family: &str, policy: &str, rules: &[(&str, Value)]) -> Value {
        let table = json!({"family": family, "table": "filter"});
        let with = |more: Value| {
            let mut object = table.clone();
            object
                .as_object_mut()
                .expect("an object")
                .extend(more.as_object().expect("an object").clone());
            object
        };
        let mut objects = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            json!({"chain": with(json!({"name": "FORWARD", "hook": "forward", "prio": 0, "policy": policy}))}),
        ];
        for (chain, expr) in rules {
            objects.push(json!({"chain": with(json!({"name": chain}))}));
            objects.push(json!({"rule": with(json!({"chain": chain, "handle": 7, "expr": expr}))}));
        }
        json!({"nftables": objects})
    }

    fn blocked(family: &str, policy: &str, rules: &[(&str, Value)]) -> Vec<Way> {
        let tables = tables(&ruleset(family, policy, rules));
        Needs::default()
            .ways()
            .into_iter()
            .filter(|way| tables.iter().any(|t| t.blocks(*way).is_some()))
            .collect()
    }

    fn meta(key: &str, op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}})
    }

    #[test]
    fn a_policy_of_drop_blocks() {
        assert_eq!(blocked("ip", "drop", &[]), [OUT, BACK]);
        assert_eq!(blocked("ip", "accept", &[]), []);
        let tables = tables(&ruleset("ip6", "drop", &[]));
        let block = Block {
            chain: "FORWARD".to_owned(),
            by_policy: true,
        };
        assert_eq!(tables[0].blocks(OUT), Some(block));
    }

    #[test]
    fn accepts_in_a_chain_that_is_jumped_to_count() {
        let jump = (
            "FORWARD",
            json!([{"counter": {}}, {"jump": {"target": "DOCKER-USER"}}]),
        );
        let accept = |key| {
            (
                "DOCKER-USER",
                json!([meta(key, "==", json!(BRIDGE_NAME)), {"accept": null}]),
            )
        };
        assert_eq!(
            blocked("ip", "drop", std::slice::from_ref(&jump)),
            [OUT, BACK]
        );
        assert_eq!(
            blocked("ip", "drop", &[jump.clone(), accept("iifname")]),
            [BACK]
        );
        assert_eq!(
            blocked("ip", "drop", &[jump, accept("iifname"), accept("oifname")]),
            []
        );
        assert_eq!(
            blocked("ip", "drop", &[accept("iifname"), accept("oifname")]),
            [OUT, BACK],
            "never jumped to"
        );
    }

    #[test]
    fn a_return_hands_over_to_what_follows() {
        let rules = [
            ("FORWARD", json!([{"jump": {"target": "DOCKER-USER"}}])),
            ("DOCKER-USER", json!([{"return": null}])),
            ("DOCKER-USER", json!([{"accept": null}])),
        ];
        assert_eq!(blocked("ip", "drop", &rules), [OUT, BACK]);
    }

    #[test]
    fn a_general_reject_blocks_and_a_specific_drop_does_not() {
        let established = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}});
        let rules = [
            ("FORWARD", json!([established, {"accept": null}])),
            (
                "FORWARD",
                json!([{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                "right": "192.0.2.1"}}, {"drop": null}]),
            ),
        ];
        assert_eq!(blocked("inet", "accept", &rules), []);
        let mut rules = rules.to_vec();
        rules.push((
            "FORWARD",
            json!([{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}]),
        ));
        assert_eq!(
            blocked("inet", "accept", &rules),
            [OUT],
            "answers are accepted above"
        );
        let target = (
            "FORWARD",
            json!([{"counter": {}}, {"xt": {"type": "target", "name": "REJECT"}}]),
        );
        assert_eq!(blocked("ip", "accept", &[target]), [OUT, BACK]);
        let log = (
            "FORWARD",
            json!([{"xt": {"type": "target", "name": "LOG"}}]),
        );
        assert_eq!(blocked("ip", "accept", &[log]), []);
    }

    #[test]
    fn names_are_compared_as_the_kernel_does() {
        let drop_if = |part: Value| ("FORWARD", json!([part, {"drop": null}]));
        for (key, op, right, expected) in [
            ("iifname", "==", json!("docker0"), vec![]),
            ("iifname", "!=", json!("docker0"), vec![OUT]),
            ("iifname", "==", json!("tow*"), vec![OUT]),
            ("oifname", "==", json!("tow*"), vec![BACK]),
            ("oifname", "!=", json!(BRIDGE_NAME), vec![OUT]),
            (
                "iifname",
                "==",
                json!({"set": ["lo", BRIDGE_NAME]}),
                vec![OUT],
            ),
            ("iifname", "==", json!({"set": ["lo", "eth0"]}), vec![]),
            ("iifname", "!=", json!({"set": ["lo", "eth0"]}), vec![OUT]),
            ("iifname", "!=", json!({"set": ["lo", BRIDGE_NAME]}), vec![]),
            ("nfproto", "==", json!("ipv4"), vec![OUT, BACK]),
        ] {
            assert_eq!(
                blocked("inet", "accept", &[drop_if(meta(key, op, right.clone()))]),
                expected,
                "{key} {op} {right}"
            );
        }
    }

    #[test]
    fn one_family_is_enough_to_block() {
        let only = |family: &str, verdict: &str| {
            (
                "FORWARD",
                json!([meta("nfproto", "==", json!(family)), {verdict: null}]),
            )
        };
        assert_eq!(
            blocked("inet", "drop", &[only("ipv4", "accept")]),
            [OUT, BACK],
            "IPv6 is still dropped"
        );
        assert_eq!(
            blocked(
                "inet",
                "drop",
                &[only("ipv4", "accept"), only("ipv6", "accept")]
            ),
            []
        );
    }

    #[test]
    fn new_connections_to_published_ports_are_no_answers() {
        let established = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}});
        let rules = [
            ("FORWARD", json!([established, {"accept": null}])),
            (
                "FORWARD",
                json!([meta("iifname", "==", json!(BRIDGE_NAME)), {"accept": null}]),
            ),
        ];
        let tables = tables(&ruleset("inet", "drop", &rules));
        let blocked = |needs: Needs| {
            let ways = needs.ways();
            ways.into_iter()
                .filter(|way| tables[0].blocks(*way).is_some())
                .map(|way| (way.interface, way.direction))
                .collect::<Vec<_>>()
        };
        assert_eq!(blocked(Needs::default()), []);
        let needs = Needs {
            published: true,
            ingress: true,
        };
        assert_eq!(
            blocked(needs),
            [
                (BRIDGE_NAME, Direction::Back),
                (INGRESS_NAME, Direction::Back)
            ]
        );
    }

    #[test]
    fn chains_that_jump_in_a_ring_end() {
        let ring = [
            ("FORWARD", json!([{"jump": {"target": "A"}}])),
            ("A", json!([{"jump": {"target": "FORWARD"}}])),
        ];
        assert_eq!(blocked("ip", "accept", &ring), []);
    }
}
