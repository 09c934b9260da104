//! Does a foreign ruleset let our packets through? Read as data, walked as the kernel would, decided without running it.
//!
//! What a rule matches is known only in part: interfaces' names, whether a connection is established, the family. A rule
//! with any other match is taken not to apply, so that the answer errs towards "blocked" where an exotic accept would
//! have let us through, and never takes a specific drop for a general one.

use std::collections::HashMap;

use serde_json::Value;

use crate::BRIDGE_NAME;

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
    /// An accept of ours: everything that enters (or leaves) by the bridge.
    pub(crate) fn ours(direction: Direction) -> Self {
        let name = Pattern {
            name: BRIDGE_NAME.to_owned(),
            prefix: false,
        };
        let matches = match direction {
            Direction::Out => vec![Match::Input {
                pattern: name,
                equal: true,
            }],
            Direction::Back => vec![Match::Output {
                pattern: name,
                equal: true,
            }],
        };
        Self {
            matches,
            verdict: Verdict::Accept,
            handle: None,
            comment: Some("towline".to_owned()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    Input { pattern: Pattern, equal: bool },
    Output { pattern: Pattern, equal: bool },
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

/// The two packets that must pass: a container's to the outside, and the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Out,
    Back,
}

impl Direction {
    pub(crate) const BOTH: [Self; 2] = [Self::Out, Self::Back];
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
    pub(crate) fn blocks(&self, direction: Direction) -> Option<Block> {
        let meets = |family: &Family| self.family == "inet" || self.family == family.table_family();
        Family::BOTH
            .into_iter()
            .filter(meets)
            .find_map(|family| self.blocks_family(family, direction))
    }

    fn blocks_family(&self, family: Family, direction: Direction) -> Option<Block> {
        self.bases.iter().find_map(
            |(chain, drops)| match self.walk(chain, family, direction, 0) {
                Some(Verdict::Accept) => None,
                Some(_) => Some(Block {
                    chain: chain.clone(),
                    by_policy: false,
                }),
                None => drops.then(|| Block {
                    chain: chain.clone(),
                    by_policy: true,
                }),
            },
        )
    }

    /// The first accept or drop that applies; `None` when the chain ends without.
    fn walk(
        &self,
        chain: &str,
        family: Family,
        direction: Direction,
        depth: usize,
    ) -> Option<Verdict> {
        if depth > MAX_DEPTH {
            return None;
        }
        for rule in self.chains.get(chain)? {
            if !rule
                .matches
                .iter()
                .all(|part| part.applies(family, direction))
            {
                continue;
            }
            match &rule.verdict {
                Verdict::Accept => return Some(Verdict::Accept),
                Verdict::Drop => return Some(Verdict::Drop),
                Verdict::Return => return None,
                Verdict::Goto(target) => return self.walk(target, family, direction, depth + 1),
                Verdict::Jump(target) => {
                    if let Some(verdict) = self.walk(target, family, direction, depth + 1) {
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
    fn applies(&self, family: Family, direction: Direction) -> bool {
        let (input, output) = match direction {
            Direction::Out => (Some(BRIDGE_NAME), None),
            Direction::Back => (None, Some(BRIDGE_NAME)),
        };
        // The other side may be any interface but the bridge.
        let fits = |known: Option<&str>, pattern: &Pattern, equal: bool| match known {
            Some(name) => pattern.fits(name) == equal,
            None if pattern.prefix => pattern.name.is_empty() && equal,
            None => pattern.name == BRIDGE_NAME && !equal,
        };
        match self {
            Self::Input { pattern, equal } => fits(input, pattern, *equal),
            Self::Output { pattern, equal } => fits(output, pattern, *equal),
            Self::Established => direction == Direction::Back,
            Self::Family(wanted) => *wanted == family,
            Self::Unknown => false,
        }
    }
}

/// The tables of `nft -j list ruleset` that IP packets may meet.
pub(crate) fn tables(ruleset: &Value) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        let (chain, rule) = (&object["chain"], &object["rule"]);
        let item = if chain.is_object() { chain } else { rule };
        let (Some(family), Some(name)) = (item["family"].as_str(), item["table"].as_str()) else {
            continue;
        };
        let known = tables
            .iter()
            .position(|table| table.family == family && table.name == name);
        let index = known.unwrap_or_else(|| {
            tables.push(Table {
                family: family.to_owned(),
                name: name.to_owned(),
                ..Table::default()
            });
            tables.len() - 1
        });
        let table = &mut tables[index];
        if let Some(chain_name) = chain["name"].as_str() {
            table.chains.entry(chain_name.to_owned()).or_default();
            if chain["hook"] == "forward" {
                table
                    .bases
                    .push((chain_name.to_owned(), chain["policy"] == "drop"));
            }
        } else if let Some(chain_name) = rule["chain"].as_str() {
            table
                .chains
                .entry(chain_name.to_owned())
                .or_default()
                .extend(rules(rule));
        }
    }
    tables.retain(|table| ["ip", "ip6", "inet"].contains(&table.family.as_str()));
    tables
}

/// One nftables rule; several where a verdict map holds several outcomes that we know.
fn rules(rule: &Value) -> Vec<Rule> {
    let mut matches = Vec::new();
    let mut verdict = Verdict::Continue;
    let handle = rule["handle"].as_u64();
    let comment = rule["comment"].as_str().map(str::to_owned);
    for statement in rule["expr"].as_array().into_iter().flatten() {
        let Some((kind, body)) = statement
            .as_object()
            .and_then(|object| object.iter().next())
        else {
            continue;
        };
        let target = || body["target"].as_str().unwrap_or_default().to_owned();
        match kind.as_str() {
            "match" => matches.push(match_of(body)),
            "accept" => verdict = Verdict::Accept,
            "drop" | "reject" => verdict = Verdict::Drop,
            "return" => verdict = Verdict::Return,
            "jump" => verdict = Verdict::Jump(target()),
            "goto" => verdict = Verdict::Goto(target()),
            // A match or target of iptables that nft cannot translate.
            "xt" => match (body["type"].as_str(), body["name"].as_str()) {
                (Some("match"), Some("comment")) => {}
                (Some("target"), Some("REJECT")) => verdict = Verdict::Drop,
                (Some("target"), _) => {}
                _ => matches.push(Match::Unknown),
            },
            "vmap" => {
                let accepts = body["key"]["ct"]["key"] == "state"
                    && body["data"]["set"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .any(|pair| {
                            pair[0] == "established"
                                && pair[1]
                                    .as_object()
                                    .is_some_and(|end| end.contains_key("accept"))
                        });
                if accepts {
                    matches.push(Match::Established);
                    verdict = Verdict::Accept;
                }
            }
            // Statements that decide nothing, or nothing we can know.
            "limit" | "quota" | "ct count" | "meter" => matches.push(Match::Unknown),
            _ => {}
        }
    }
    vec![Rule {
        matches,
        verdict,
        handle,
        comment,
    }]
}

fn match_of(body: &Value) -> Match {
    let (left, right) = (&body["left"], &body["right"]);
    let equal = match body["op"].as_str() {
        Some("==" | "in") => true,
        Some("!=") => false,
        _ => return Match::Unknown,
    };
    if left["ct"]["key"] == "state" && equal {
        let list = right.as_array().or_else(|| right["set"].as_array());
        let established = list.map_or(right == "established", |states| {
            states.iter().any(|state| state == "established")
        });
        return if established {
            Match::Established
        } else {
            Match::Unknown
        };
    }
    let key = left["meta"]["key"].as_str().unwrap_or_default();
    let pattern = |text: &str| Pattern::new(text, '*');
    match (key, right.as_str()) {
        ("iifname" | "iif", Some(name)) => Match::Input {
            pattern: pattern(name),
            equal,
        },
        ("oifname" | "oif", Some(name)) => Match::Output {
            pattern: pattern(name),
            equal,
        },
        ("nfproto", Some("ipv4")) if equal => Match::Family(Family::Ipv4),
        ("nfproto", Some("ipv6")) if equal => Match::Family(Family::Ipv6),
        // A set of names, equal to ours in one of them.
        ("iifname" | "oifname", None) if equal => {
            let named = right["set"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|name| name == BRIDGE_NAME);
            let pattern = pattern(BRIDGE_NAME);
            match (named, key) {
                (false, _) => Match::Unknown,
                (true, "iifname") => Match::Input { pattern, equal },
                (true, _) => Match::Output { pattern, equal },
            }
        }
        _ => Match::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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

    fn blocked(family: &str, policy: &str, rules: &[(&str, Value)]) -> Vec<Direction> {
        let tables = tables(&ruleset(family, policy, rules));
        Direction::BOTH
            .into_iter()
            .filter(|way| tables.iter().any(|t| t.blocks(*way).is_some()))
            .collect()
    }

    fn meta(key: &str, op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}})
    }

    #[test]
    fn a_policy_of_drop_blocks() {
        assert_eq!(blocked("ip", "drop", &[]), Direction::BOTH);
        assert_eq!(blocked("ip", "accept", &[]), []);
        let tables = tables(&ruleset("ip6", "drop", &[]));
        let block = Block {
            chain: "FORWARD".to_owned(),
            by_policy: true,
        };
        assert_eq!(tables[0].blocks(Direction::Out), Some(block));
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
            Direction::BOTH
        );
        assert_eq!(
            blocked("ip", "drop", &[jump.clone(), accept("iifname")]),
            [Direction::Back]
        );
        assert_eq!(
            blocked("ip", "drop", &[jump, accept("iifname"), accept("oifname")]),
            []
        );
        assert_eq!(
            blocked("ip", "drop", &[accept("iifname"), accept("oifname")]),
            Direction::BOTH,
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
        assert_eq!(blocked("ip", "drop", &rules), Direction::BOTH);
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
            [Direction::Out],
            "answers are accepted above"
        );
        let target = (
            "FORWARD",
            json!([{"counter": {}}, {"xt": {"type": "target", "name": "REJECT"}}]),
        );
        assert_eq!(blocked("ip", "accept", &[target]), Direction::BOTH);
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
            ("iifname", "!=", json!("docker0"), vec![Direction::Out]),
            ("iifname", "==", json!("tow*"), vec![Direction::Out]),
            ("oifname", "==", json!("tow*"), vec![Direction::Back]),
            ("oifname", "!=", json!(BRIDGE_NAME), vec![Direction::Out]),
            (
                "iifname",
                "==",
                json!({"set": ["lo", BRIDGE_NAME]}),
                vec![Direction::Out],
            ),
            ("iifname", "==", json!({"set": ["lo", "eth0"]}), vec![]),
            (
                "nfproto",
                "==",
                json!("ipv4"),
                vec![Direction::Out, Direction::Back],
            ),
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
            Direction::BOTH,
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
    fn chains_that_jump_in_a_ring_end() {
        let ring = [
            ("FORWARD", json!([{"jump": {"target": "A"}}])),
            ("A", json!([{"jump": {"target": "FORWARD"}}])),
        ];
        assert_eq!(blocked("ip", "accept", &ring), []);
    }
}
