//! A ruleset as `nft -j` prints it, brought down to what the walk knows.

use serde_json::Value;

use super::{Family, Match, Pattern, Rule, Table, Verdict};

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
    // One name, or a set of them.
    let names: Vec<Pattern> = match right.as_str() {
        Some(name) => vec![pattern(name)],
        None => right["set"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|name| name.as_str().map(pattern))
            .collect(),
    };
    match (key, right.as_str()) {
        ("iifname" | "iif", _) if !names.is_empty() => Match::Input { names, equal },
        ("oifname" | "oif", _) if !names.is_empty() => Match::Output { names, equal },
        ("nfproto", Some("ipv4")) if equal => Match::Family(Family::Ipv4),
        ("nfproto", Some("ipv6")) if equal => Match::Family(Family::Ipv6),
        _ => Match::Unknown,
    }
}
