//! Other people's filters: do they let our packets through, and what can be done where they do not.
//!
//! Tried before: accepts in a table of our own, at several priorities. They cannot help: each chain hooked to forwarding
//! judges a packet by itself, and one drop is final. So the accept must stand in the chain that drops, and the one place
//! there that its owner keeps for others is Docker's `DOCKER-USER`. A native rule is put there, in the form that
//! `iptables -S` can print (interface name, counter, accept, comment; nothing like `ct state`, which makes it fail).

use netns::nftables::{self, Batch};
use netns::{NetfilterSocket, Netns};
use serde::Serialize;
use serde_json::Value;

use crate::nat;
use crate::program;
use crate::ruleset::{self, Block, Direction, Family, Needs, Rule, Table, Verdict, Way};
use crate::xtables::{self, Backend};
use crate::{BridgeError, INGRESS_NAME};

/// The chain that Docker keeps for its users' own rules and calls first.
pub(crate) const USER_CHAIN: &str = "DOCKER-USER";
/// The comment by which our rules there are known.
const COMMENT: &str = "towline";
/// Copies of one rule that are removed before something else must be wrong.
const MAX_COPIES: usize = 16;

/// A foreign table that drops forwarded packets, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Foreign {
    /// `ip`, `ip6` or `inet`, as nftables names families.
    pub family: String,
    /// `nftables` (which is also what `iptables-nft` writes to) or `iptables-legacy`.
    pub backend: &'static str,
    /// The table's name.
    pub table: String,
    /// The chain our accepts stand in, or the one that drops.
    pub chain: String,
    /// Whether our packets pass.
    pub state: State,
    /// What blocks, and the command to run.
    pub problem: Option<String>,
}

/// Whether a foreign table lets our packets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Our accepts stand in its chain for users.
    Present,
    /// Our accepts are gone from there; the next repair puts them back.
    Missing,
    /// It drops our packets, and there is no place of ours to accept them in.
    Blocked,
}

/// A table with what must be known to change it.
struct Finding {
    table: Table,
    backend: Backend,
    state: State,
    missing: Vec<Way>,
    block: Option<Block>,
}

/// The nftables of others, as `nft -j list ruleset` prints them, and why they could not be read.
#[derive(Debug, Default)]
pub(crate) struct Ruleset {
    printed: Value,
    unread: Option<String>,
}

/// Reads the nftables of others. Where only ours stand, the program `nft` is not needed.
pub(crate) fn ruleset(netns: &Netns) -> Result<Ruleset, BridgeError> {
    let ours = |table: &nftables::Table| table.name.starts_with(nat::TABLE);
    if NetfilterSocket::open(netns)?.tables()?.iter().all(ours) {
        return Ok(Ruleset::default());
    }
    let program = match program::nft() {
        Ok(program) => program,
        Err(error) => {
            return Ok(Ruleset {
                printed: Value::Null,
                unread: Some(error.to_string()),
            });
        }
    };
    let printed = program::run(netns, &program, &["-j", "list", "ruleset"])?;
    let printed = serde_json::from_str(&printed).map_err(|error| BridgeError::Failed {
        program: "nft -j list ruleset".to_owned(),
        said: format!("its answer cannot be read: {error}"),
    })?;
    Ok(Ruleset {
        printed,
        unread: None,
    })
}

/// What the host's filters do to our packets. Changes nothing.
pub(crate) fn survey(
    netns: &Netns,
    ruleset: &Ruleset,
    needs: Needs,
) -> Result<Vec<Foreign>, BridgeError> {
    let (findings, mut reports) = look(netns, ruleset, needs)?;
    reports.extend(findings.iter().map(Finding::report));
    Ok(reports)
}

/// Puts our accepts where they are missing and can stand. Returns what it put back, in words.
pub(crate) fn put_back(
    netns: &Netns,
    ruleset: &Ruleset,
    needs: Needs,
) -> Result<Vec<String>, BridgeError> {
    let (findings, _) = look(netns, ruleset, needs)?;
    let mut done = Vec::new();
    for finding in findings
        .iter()
        .filter(|finding| finding.state == State::Missing)
    {
        match finding.backend {
            Backend::Nft => nat::run(netns, &accepts(&finding.table, &finding.missing))?,
            Backend::Legacy => {
                for way in &finding.missing {
                    xtables::insert(netns, finding.family(), Backend::Legacy, *way)?;
                }
            }
        }
        done.push(format!(
            "accept rules for {} in {} {} {USER_CHAIN} ({})",
            finding.interfaces().join(" and "),
            finding.table.family,
            finding.table.name,
            backend_name(finding.backend)
        ));
    }
    Ok(done)
}

/// Takes our rules out of every foreign chain, going on past errors.
pub(crate) fn remove(netns: &Netns, errors: &mut Vec<BridgeError>) -> bool {
    let mut docker = false;
    match ruleset(netns) {
        Ok(ruleset) => {
            for table in ruleset::tables(&ruleset.printed)
                .iter()
                .filter(|table| table.chains.contains_key(USER_CHAIN))
            {
                docker = true;
                errors.extend(remove_native(netns, table).err());
            }
        }
        Err(error) => errors.push(error),
    }
    for family in Family::BOTH {
        let removed = xtables::legacy_in_use(netns, family).and_then(|in_use| {
            if in_use {
                let table = xtables::legacy_table(netns, family)?;
                docker |= table.chains.contains_key(USER_CHAIN);
                remove_with_program(netns, &table, family, Backend::Legacy)?;
            }
            Ok(())
        });
        errors.extend(removed.err());
    }
    docker
}

/// Reads every foreign table. What could not be read is reported, and hides nothing else.
fn look(
    netns: &Netns,
    ruleset: &Ruleset,
    needs: Needs,
) -> Result<(Vec<Finding>, Vec<Foreign>), BridgeError> {
    let ways = needs.ways();
    let mut findings: Vec<Finding> = ruleset::tables(&ruleset.printed)
        .into_iter()
        .filter(|table| !table.name.starts_with(nat::TABLE))
        .filter_map(|table| judge(table, Backend::Nft, &ways))
        .collect();
    let mut unread: Vec<Foreign> = ruleset
        .unread
        .iter()
        .map(|error| Foreign {
            family: "inet".to_owned(),
            backend: backend_name(Backend::Nft),
            table: "*".to_owned(),
            chain: "*".to_owned(),
            state: State::Blocked,
            problem: Some(format!(
                "this host has nftables of others, and whether they let containers' packets pass cannot be seen: {error}"
            )),
        })
        .collect();
    for family in Family::BOTH {
        if !xtables::legacy_in_use(netns, family)? {
            continue;
        }
        match xtables::legacy_table(netns, family) {
            Ok(table) => findings.extend(judge(table, Backend::Legacy, &ways)),
            Err(error) => unread.push(Foreign {
                family: family.table_family().to_owned(),
                backend: backend_name(Backend::Legacy),
                table: "filter".to_owned(),
                chain: "FORWARD".to_owned(),
                state: State::Blocked,
                problem: Some(format!(
                    "this host uses legacy iptables, and what they do cannot be seen: {error}"
                )),
            }),
        }
    }
    Ok((findings, unread))
}

/// Whether a table matters to us: it blocks, or our accepts stand in it.
fn judge(table: Table, backend: Backend, ways: &[Way]) -> Option<Finding> {
    let users = table.chains.get(USER_CHAIN);
    let missing: Vec<Way> = ways
        .iter()
        .filter(|way| table.blocks(**way).is_some())
        .copied()
        .collect();
    let block = missing.iter().find_map(|way| table.blocks(*way));
    let Some(block) = block else {
        let present = users.is_some_and(|rules| {
            ways.iter()
                .any(|way| rules.iter().any(|rule| accepts_ours(rule, *way)))
        });
        return present.then_some(Finding {
            table,
            backend,
            state: State::Present,
            missing,
            block: None,
        });
    };
    let mut opened = table.clone();
    if let Some(rules) = opened.chains.get_mut(USER_CHAIN) {
        rules.splice(0..0, missing.iter().map(|way| Rule::ours(*way)));
    }
    let helps = missing.iter().all(|way| opened.blocks(*way).is_none());
    let state = if helps {
        State::Missing
    } else {
        State::Blocked
    };
    Some(Finding {
        table,
        backend,
        state,
        missing,
        block: Some(block),
    })
}

/// Whether a rule does what ours does, whoever wrote its comment.
fn accepts_ours(rule: &Rule, way: Way) -> bool {
    rule.verdict == Verdict::Accept && rule.matches == Rule::ours(way).matches
}

/// Every packet that an accept of ours may be for.
fn all_ways() -> Vec<Way> {
    let all = Needs {
        published: true,
        ingress: true,
    };
    all.ways()
}

impl Finding {
    fn report(&self) -> Foreign {
        let table = &self.table;
        let chain = match (&self.state, &self.block) {
            (State::Blocked, Some(block)) => block.chain.clone(),
            _ => USER_CHAIN.to_owned(),
        };
        let problem = match (&self.state, &self.block) {
            (State::Blocked, Some(block)) => Some(self.problem(block)),
            (State::Missing, _) => Some(format!(
                "the accept rules for {} are missing from {} {} {USER_CHAIN}; they are put back within seconds",
                self.interfaces().join(" and "),
                table.family,
                table.name
            )),
            _ => None,
        };
        Foreign {
            family: table.family.clone(),
            backend: backend_name(self.backend),
            table: table.name.clone(),
            chain,
            state: self.state,
            problem,
        }
    }

    fn problem(&self, block: &Block) -> String {
        let Table {
            family,
            name,
            chains,
            ..
        } = &self.table;
        let chain = &block.chain;
        let cause = if block.by_policy {
            "by its policy"
        } else {
            "by a rule"
        };
        let place = match chains.contains_key(USER_CHAIN) {
            true => format!("its chain {USER_CHAIN} is not called before that"),
            false => format!("has no chain {USER_CHAIN} to accept ours in"),
        };
        let commands: Vec<String> = self
            .missing
            .iter()
            .map(|way| self.command(chain, *way))
            .collect();
        let harm = match self.interfaces()[..] {
            [INGRESS_NAME] => "services' published ports do not lead to other hosts",
            _ => "containers do not reach the outside or cannot be reached at published ports",
        };
        format!(
            "the chain {chain} of table {family} {name} ({}) drops forwarded packets {cause} and {place}, so {harm}: \
             allow them with `{}`",
            backend_name(self.backend),
            commands.join(" && ")
        )
    }

    fn command(&self, chain: &str, way: Way) -> String {
        let Table { family, name, .. } = &self.table;
        let interface = way.interface;
        let (nft, iptables) = match way.direction {
            Direction::Out => ("iifname", "-i"),
            Direction::Back => ("oifname", "-o"),
        };
        match self.backend {
            Backend::Nft => {
                format!("nft insert rule {family} {name} {chain} {nft} {interface} counter accept")
            }
            Backend::Legacy => {
                let program = xtables::program_name(self.family(), Backend::Legacy);
                format!("{program} -I {chain} {iptables} {interface} -j ACCEPT")
            }
        }
    }

    /// The interfaces that something is missing for.
    fn interfaces(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.missing.iter().map(|way| way.interface).collect();
        names.dedup();
        names
    }

    fn family(&self) -> Family {
        if self.table.family == "ip6" {
            Family::Ipv6
        } else {
            Family::Ipv4
        }
    }
}

fn accepts(table: &Table, ways: &[Way]) -> Batch {
    let mut batch = Batch::new();
    for way in ways {
        let rule = nftables::Rule::new(COMMENT);
        let rule = match way.direction {
            Direction::Out => rule.input(way.interface),
            Direction::Back => rule.output(way.interface),
        };
        let accept = rule.counter().verdict(nftables::Verdict::Accept);
        batch.insert_rule(&place(table), USER_CHAIN, &accept);
    }
    batch
}

/// Our native rules by their numbers; copies that iptables wrote (after a save and restore) with its own program.
fn remove_native(netns: &Netns, table: &Table) -> Result<(), BridgeError> {
    let rules = table
        .chains
        .get(USER_CHAIN)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let ours = |rule: &&Rule| {
        rule.comment.as_deref() == Some(COMMENT)
            && all_ways().iter().any(|way| accepts_ours(rule, *way))
    };
    let handles: Vec<u64> = rules
        .iter()
        .filter(ours)
        .filter_map(|rule| rule.handle)
        .collect();
    let mut batch = Batch::new();
    for handle in &handles {
        batch.delete_rule(&place(table), USER_CHAIN, *handle);
    }
    if !handles.is_empty() {
        nat::run(netns, &batch)?;
    }
    let family = match table.family.as_str() {
        "ip" => Family::Ipv4,
        "ip6" => Family::Ipv6,
        _ => return Ok(()),
    };
    let uncommented = Table {
        chains: [(
            USER_CHAIN.to_owned(),
            rules
                .iter()
                .filter(|rule| rule.comment.is_none())
                .cloned()
                .collect(),
        )]
        .into(),
        ..Table::default()
    };
    remove_with_program(netns, &uncommented, family, Backend::Nft)
}

fn remove_with_program(
    netns: &Netns,
    table: &Table,
    family: Family,
    backend: Backend,
) -> Result<(), BridgeError> {
    let rules = table
        .chains
        .get(USER_CHAIN)
        .map(Vec::as_slice)
        .unwrap_or_default();
    for way in all_ways() {
        if !rules.iter().any(|rule| accepts_ours(rule, way)) {
            continue;
        }
        let mut copies = 0;
        while copies < MAX_COPIES && xtables::delete(netns, family, backend, way)? {
            copies += 1;
        }
    }
    Ok(())
}

fn place(table: &Table) -> nftables::Table {
    let family = match table.family.as_str() {
        "ip" => nftables::Family::Ipv4,
        "ip6" => nftables::Family::Ipv6,
        _ => nftables::Family::Inet,
    };
    nftables::Table::new(family, &table.name)
}

fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Nft => "nftables",
        Backend::Legacy => "iptables-legacy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn judge(table: Table, backend: Backend) -> Option<Finding> {
        super::judge(table, backend, &Needs::default().ways())
    }

    fn way(direction: Direction) -> Way {
        let ways = Needs::default().ways();
        *ways
            .iter()
            .find(|way| way.direction == direction)
            .expect("both ways must pass")
    }

    fn table(policy_drops: bool, forward: Vec<Rule>, users: Option<Vec<Rule>>) -> Table {
        let mut chains = HashMap::from([("FORWARD".to_owned(), forward)]);
        chains.extend(users.map(|rules| (USER_CHAIN.to_owned(), rules)));
        Table {
            family: "ip".to_owned(),
            name: "filter".to_owned(),
            bases: vec![("FORWARD".to_owned(), policy_drops)],
            chains,
        }
    }

    fn rule(verdict: Verdict) -> Rule {
        Rule {
            matches: Vec::new(),
            verdict,
            handle: None,
            comment: None,
        }
    }

    #[test]
    fn a_table_that_drops_nothing_is_left_alone() {
        assert!(judge(table(false, Vec::new(), Some(Vec::new())), Backend::Nft).is_none());
    }

    #[test]
    fn accepts_are_missing_only_as_long_as_they_are_not_there() {
        let jump = vec![rule(Verdict::Jump(USER_CHAIN.to_owned()))];
        let finding =
            judge(table(true, jump.clone(), Some(Vec::new())), Backend::Nft).expect("it blocks");
        assert_eq!((finding.state, finding.missing.len()), (State::Missing, 2));
        let half = Some(vec![Rule::ours(way(Direction::Out))]);
        let finding =
            judge(table(true, jump.clone(), half), Backend::Nft).expect("it blocks answers");
        assert_eq!(
            (finding.state, finding.missing),
            (State::Missing, vec![way(Direction::Back)])
        );
        let both = Some(vec![
            Rule::ours(way(Direction::Out)),
            Rule::ours(way(Direction::Back)),
        ]);
        let finding = judge(table(true, jump, both), Backend::Nft).expect("our rules are shown");
        assert_eq!(finding.state, State::Present);
        assert_eq!(finding.report().problem, None);
    }

    #[test]
    fn a_block_without_a_place_for_us_is_told_with_the_command() {
        let finding = judge(table(true, Vec::new(), None), Backend::Nft).expect("it blocks");
        let report = finding.report();
        assert_eq!(
            (report.state, report.chain.as_str()),
            (State::Blocked, "FORWARD")
        );
        let problem = report.problem.expect("a problem");
        assert!(
            problem
                .contains("`nft insert rule ip filter FORWARD iifname towline_gwbr counter accept"),
            "{problem}"
        );
        let legacy = judge(table(true, Vec::new(), None), Backend::Legacy)
            .expect("it blocks")
            .report();
        let problem = legacy.problem.expect("a problem");
        assert!(
            problem.contains("iptables-legacy -I FORWARD -i towline_gwbr -j ACCEPT"),
            "{problem}"
        );
    }

    #[test]
    fn a_users_chain_that_is_called_too_late_does_not_help() {
        let late = vec![
            rule(Verdict::Drop),
            rule(Verdict::Jump(USER_CHAIN.to_owned())),
        ];
        let finding = judge(table(false, late, Some(Vec::new())), Backend::Nft).expect("it blocks");
        assert_eq!(finding.state, State::Blocked);
        assert!(
            finding
                .report()
                .problem
                .expect("a problem")
                .contains("not called before")
        );
    }
}
