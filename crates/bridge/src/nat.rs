//! Our nftables table `inet towline`: no traffic between containers, answers only from outside, masquerade on the way out.
//!
//! One transaction replaces the whole table, so it never stands half-made. What it reads like once the kernel has it is
//! kept, to see later whether somebody changed it.

use std::borrow::Cow;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::Netns;
use nftables::batch::Batch;
use nftables::expr::{
    CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix,
};
use nftables::helper::{self, NftablesError};
use nftables::schema::{Chain, NfListObject, Rule, Table};
use nftables::stmt::{Match, Operator, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};
use serde_json::Value;

use crate::program;
use crate::{BRIDGE_NAME, BridgeError};

/// The table's name; its family is `inet`, so that it sees IPv4 and IPv6.
pub(crate) const TABLE: &str = "towline";
const FORWARD: &str = "gateway-forward";
const POSTROUTING: &str = "gateway-postrouting";
/// `filter` and `srcnat`, the priorities of the ordinary chains (`linux/netfilter_ipv4.h`).
const FILTER_PRIORITY: i32 = 0;
const SRCNAT_PRIORITY: i32 = 100;

/// The whole ruleset of the namespace, as `nft -j list ruleset` prints it.
pub(crate) fn ruleset(netns: &Netns) -> Result<Value, BridgeError> {
    let nft = program::nft()?;
    let printed =
        netns.run(|| helper::get_current_ruleset_raw(Some(&nft), helper::DEFAULT_ARGS))?;
    let printed = printed.map_err(refused)?;
    serde_json::from_str(&printed).map_err(|error| BridgeError::Failed {
        program: "nft -j list ruleset".to_owned(),
        said: format!("its answer cannot be read: {error}"),
    })
}

/// Puts our table in place, instead of the one that stands there.
pub(crate) fn apply(netns: &Netns, ipv4: Ipv4Net, ipv6: Ipv6Net) -> Result<(), BridgeError> {
    let mut batch = emptied();
    batch.add(table());
    batch.add(chain(
        FORWARD,
        NfChainType::Filter,
        NfHook::Forward,
        FILTER_PRIORITY,
    ));
    batch.add(chain(
        POSTROUTING,
        NfChainType::NAT,
        NfHook::Postrouting,
        SRCNAT_PRIORITY,
    ));
    for rule in rules(ipv4, ipv6) {
        batch.add(NfListObject::Rule(rule));
    }
    run(netns, batch)
}

/// Removes our table; none is fine.
pub(crate) fn remove(netns: &Netns) -> Result<(), BridgeError> {
    run(netns, emptied())
}

/// Our table within a ruleset, without what changes by itself: what stands there for comparison. `None` when it is gone.
pub(crate) fn own(ruleset: &Value) -> Option<Vec<Value>> {
    let mut own = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        let Some((kind, item)) = object.as_object().and_then(|object| object.iter().next()) else {
            continue;
        };
        let name = if kind == "table" {
            &item["name"]
        } else {
            &item["table"]
        };
        if item["family"] == "inet" && name == TABLE {
            let mut item = item.clone();
            if let Some(fields) = item.as_object_mut() {
                fields.remove("handle");
            }
            own.push(item);
        }
    }
    (!own.is_empty()).then_some(own)
}

/// Runs one transaction of commands.
pub(crate) fn run(netns: &Netns, batch: Batch<'_>) -> Result<(), BridgeError> {
    let nft = program::nft()?;
    let commands = batch.to_nftables();
    netns
        .run(|| helper::apply_ruleset_with_args(&commands, Some(&nft), helper::DEFAULT_ARGS))?
        .map_err(refused)
}

/// A match of the interface that a packet came in (or goes out) by.
pub(crate) fn interface(key: MetaKey, op: Operator) -> Statement<'static> {
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Meta(Meta { key })),
        right: Expression::String(BRIDGE_NAME.into()),
        op,
    })
}

fn rules(ipv4: Ipv4Net, ipv6: Ipv6Net) -> Vec<Rule<'static>> {
    let from = || interface(MetaKey::Iifname, Operator::EQ);
    let to = || interface(MetaKey::Oifname, Operator::EQ);
    let elsewhere = || interface(MetaKey::Oifname, Operator::NEQ);
    let (ipv4, ipv6) = (IpNet::V4(ipv4), IpNet::V6(ipv6));
    vec![
        rule(
            FORWARD,
            "nothing between containers",
            vec![from(), to(), Statement::Drop(None)],
        ),
        rule(
            FORWARD,
            "nothing from addresses not given out",
            vec![from(), source(ipv4, Operator::NEQ), Statement::Drop(None)],
        ),
        rule(
            FORWARD,
            "nothing from addresses not given out",
            vec![from(), source(ipv6, Operator::NEQ), Statement::Drop(None)],
        ),
        rule(
            FORWARD,
            "answers",
            vec![to(), answers(), Statement::Accept(None)],
        ),
        rule(
            FORWARD,
            "nothing else to containers",
            vec![to(), Statement::Drop(None)],
        ),
        rule(
            POSTROUTING,
            "masquerade",
            vec![
                source(ipv4, Operator::EQ),
                elsewhere(),
                Statement::Masquerade(None),
            ],
        ),
        rule(
            POSTROUTING,
            "masquerade",
            vec![
                source(ipv6, Operator::EQ),
                elsewhere(),
                Statement::Masquerade(None),
            ],
        ),
    ]
}

fn rule(
    chain: &'static str,
    comment: &'static str,
    statements: Vec<Statement<'static>>,
) -> Rule<'static> {
    Rule {
        family: NfFamily::INet,
        table: TABLE.into(),
        chain: chain.into(),
        expr: Cow::Owned(statements),
        comment: Some(comment.into()),
        ..Rule::default()
    }
}

fn source(subnet: IpNet, op: Operator) -> Statement<'static> {
    let protocol = match subnet {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    };
    let field = PayloadField {
        protocol: protocol.into(),
        field: "saddr".into(),
    };
    let prefix = Prefix {
        addr: Box::new(Expression::String(subnet.network().to_string().into())),
        len: u32::from(subnet.prefix_len()),
    };
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Payload(Payload::PayloadField(field))),
        right: Expression::Named(NamedExpression::Prefix(prefix)),
        op,
    })
}

fn answers() -> Statement<'static> {
    let state = CT {
        key: "state".into(),
        family: None,
        dir: None,
    };
    let states = ["established", "related"].map(|state| Expression::String(state.into()));
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::CT(state)),
        right: Expression::List(states.to_vec()),
        op: Operator::IN,
    })
}

fn table() -> NfListObject<'static> {
    NfListObject::Table(Table {
        family: NfFamily::INet,
        name: TABLE.into(),
        handle: None,
    })
}

fn chain(
    name: &'static str,
    kind: NfChainType,
    hook: NfHook,
    priority: i32,
) -> NfListObject<'static> {
    NfListObject::Chain(Chain {
        family: NfFamily::INet,
        table: TABLE.into(),
        name: name.into(),
        _type: Some(kind),
        hook: Some(hook),
        prio: Some(priority),
        policy: Some(NfChainPolicy::Accept),
        ..Chain::default()
    })
}

/// Adding before deleting makes the deletion harmless where there is no table.
fn emptied() -> Batch<'static> {
    let mut batch = Batch::new();
    batch.add(table());
    batch.delete(table());
    batch
}

fn refused(error: NftablesError) -> BridgeError {
    match error {
        NftablesError::NftExecution { inner, .. } => BridgeError::Run {
            program: "nft".to_owned(),
            cause: inner,
        },
        NftablesError::NftFailed { hint, stderr, .. } => BridgeError::Failed {
            program: format!("nft ({hint})"),
            said: program::one_line(&stderr),
        },
        other => BridgeError::Failed {
            program: "nft".to_owned(),
            said: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_rules_say_what_they_are_for() {
        let rules = rules(
            "172.31.0.0/16".parse().expect("a subnet"),
            "fd00::/64".parse().expect("a subnet"),
        );
        assert!(rules.iter().all(|rule| rule.comment.is_some()));
        let masquerade = serde_json::to_value(&rules[5]).expect("plain data");
        let expected = json!([
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                       "right": {"prefix": {"addr": "172.31.0.0", "len": 16}}}},
            {"match": {"op": "!=", "left": {"meta": {"key": "oifname"}}, "right": BRIDGE_NAME}},
            {"masquerade": null},
        ]);
        assert_eq!(masquerade["expr"], expected);
    }

    #[test]
    fn only_our_table_is_compared() {
        let ruleset = json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "ip", "name": "towline", "handle": 1}},
            {"table": {"family": "inet", "name": "towline", "handle": 2}},
            {"chain": {"family": "inet", "table": "towline", "name": FORWARD, "handle": 3}},
            {"rule": {"family": "inet", "table": "other", "chain": "x", "handle": 4}},
        ]});
        let own = own(&ruleset).expect("it is there");
        assert_eq!(own.len(), 2);
        assert!(own.iter().all(|item| item.get("handle").is_none()));
        assert_eq!(super::own(&json!({"nftables": []})), None);
    }
}
