//! The programs of iptables, for rules that nftables cannot see (iptables-legacy) or cannot tell apart.

use std::path::PathBuf;

use netns::Netns;

use crate::program;
use crate::ruleset::{Direction, Family, Match, Pattern, Rule, Table, Verdict, Way};
use crate::{BridgeError, foreign::USER_CHAIN};

/// Seconds to wait for another program that holds the lock of the legacy tables.
const LOCK_SECONDS: &str = "5";

/// Which kernel tables a program works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Legacy,
    Nft,
}

/// `iptables-legacy`, `ip6tables-nft` …
pub(crate) fn program_name(family: Family, backend: Backend) -> &'static str {
    match (family, backend) {
        (Family::Ipv4, Backend::Legacy) => "iptables-legacy",
        (Family::Ipv6, Backend::Legacy) => "ip6tables-legacy",
        (Family::Ipv4, Backend::Nft) => "iptables-nft",
        (Family::Ipv6, Backend::Nft) => "ip6tables-nft",
    }
}

/// Whether the legacy filter table of a family is in use. Only then may its program be run: running it makes the table.
pub(crate) fn legacy_in_use(netns: &Netns, family: Family) -> Result<bool, BridgeError> {
    let file = match family {
        Family::Ipv4 => "/proc/thread-self/net/ip_tables_names",
        Family::Ipv6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // The file is absent where the kernel has no legacy tables at all.
    let names = netns.run(|| std::fs::read_to_string(file).unwrap_or_default())?;
    Ok(names.lines().any(|name| name == "filter"))
}

/// The legacy filter table of a family.
pub(crate) fn legacy_table(netns: &Netns, family: Family) -> Result<Table, BridgeError> {
    let listed = program::run(
        netns,
        &find(family, Backend::Legacy)?,
        &["-w", LOCK_SECONDS, "-S"],
    )?;
    Ok(parse(&listed, family))
}

/// Puts the accept of a direction at the head of the users' chain.
pub(crate) fn insert(
    netns: &Netns,
    family: Family,
    backend: Backend,
    way: Way,
) -> Result<(), BridgeError> {
    program::run(netns, &find(family, backend)?, &rule("-I", way)).map(drop)
}

/// Removes one accept of a direction from the users' chain. Says whether there was one.
pub(crate) fn delete(
    netns: &Netns,
    family: Family,
    backend: Backend,
    way: Way,
) -> Result<bool, BridgeError> {
    let program = find(family, backend)?;
    match program::run(netns, &program, &rule("-C", way)) {
        Ok(_) => program::run(netns, &program, &rule("-D", way)).map(|_| true),
        // The only answer to "is it there?" besides yes.
        Err(BridgeError::Failed { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn rule(action: &'static str, way: Way) -> [&'static str; 12] {
    let side = match way.direction {
        Direction::Out => "-i",
        Direction::Back => "-o",
    };
    [
        "-w",
        LOCK_SECONDS,
        action,
        USER_CHAIN,
        side,
        way.interface,
        "-m",
        "comment",
        "--comment",
        "towline",
        "-j",
        "ACCEPT",
    ]
}

fn find(family: Family, backend: Backend) -> Result<PathBuf, BridgeError> {
    let program = program_name(family, backend);
    program::find(program).ok_or(BridgeError::MissingProgram {
        program,
        package: "iptables",
    })
}

/// The filter table as `iptables -S` prints it.
fn parse(listed: &str, family: Family) -> Table {
    let mut table = Table {
        family: family.table_family().to_owned(),
        name: "filter".to_owned(),
        ..Table::default()
    };
    for line in listed.lines() {
        let words = split(line);
        let mut words = words.iter().map(String::as_str);
        match (words.next(), words.next()) {
            (Some("-P"), Some(chain)) => {
                table.chains.entry(chain.to_owned()).or_default();
                if chain == "FORWARD" {
                    table
                        .bases
                        .push((chain.to_owned(), words.next() == Some("DROP")));
                }
            }
            (Some("-N"), Some(chain)) => {
                table.chains.entry(chain.to_owned()).or_default();
            }
            (Some("-A"), Some(chain)) => {
                table
                    .chains
                    .entry(chain.to_owned())
                    .or_default()
                    .push(parse_rule(words));
            }
            _ => {}
        }
    }
    table
}

fn parse_rule<'a>(mut words: impl Iterator<Item = &'a str>) -> Rule {
    let mut rule = Rule {
        matches: Vec::new(),
        verdict: Verdict::Continue,
        handle: None,
        comment: None,
    };
    let mut equal = true;
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap_or_default();
        match word {
            "!" => {
                equal = false;
                continue;
            }
            "-i" => rule.matches.push(Match::Input {
                names: vec![Pattern::new(next(), '+')],
                equal,
            }),
            "-o" => rule.matches.push(Match::Output {
                names: vec![Pattern::new(next(), '+')],
                equal,
            }),
            "-m" => {
                // The options that follow say what it matches; comments match anything.
                next();
            }
            "--comment" => rule.comment = Some(next().to_owned()),
            "--ctstate" | "--state" if equal => {
                let established = next().split(',').any(|state| state == "ESTABLISHED");
                rule.matches.push(if established {
                    Match::Established
                } else {
                    Match::Unknown
                });
            }
            "-j" | "-g" => {
                let target = next().to_owned();
                rule.verdict = match target.as_str() {
                    "ACCEPT" => Verdict::Accept,
                    "DROP" | "REJECT" => Verdict::Drop,
                    "RETURN" => Verdict::Return,
                    _ if word == "-g" => Verdict::Goto(target),
                    // Targets such as LOG are no chains; a jump to what is not there goes on.
                    _ => Verdict::Jump(target),
                };
                // What follows are the target's options.
                break;
            }
            _ => rule.matches.push(Match::Unknown),
        }
        equal = true;
    }
    rule
}

/// Splits a line at spaces, outside double quotes; inside them a backslash takes the next character as it is.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(characters.next()),
            ' ' if !quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::Needs;

    fn ways() -> Vec<Way> {
        Needs::default().ways()
    }

    const DOCKER: &str = r#"-P INPUT ACCEPT
-P FORWARD DROP
-P OUTPUT ACCEPT
-N DOCKER-USER
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER-USER -m comment --comment "a \"quoted\" -j ACCEPT" -j RETURN
"#;

    #[test]
    fn what_docker_leaves_behind_blocks_until_our_accepts_stand() {
        let mut table = parse(DOCKER, Family::Ipv4);
        for way in ways() {
            let block = table.blocks(way).expect("the policy is drop");
            assert!(block.by_policy && block.chain == "FORWARD");
            table
                .chains
                .get_mut("DOCKER-USER")
                .expect("it is there")
                .insert(0, Rule::ours(way));
            assert_eq!(table.blocks(way), None);
        }
    }

    #[test]
    fn quotes_hide_what_looks_like_options() {
        let table = parse(DOCKER, Family::Ipv4);
        let rule = &table.chains["DOCKER-USER"][0];
        assert_eq!(rule.comment.as_deref(), Some(r#"a "quoted" -j ACCEPT"#));
        assert_eq!(rule.verdict, Verdict::Return);
        assert!(rule.matches.is_empty());
    }

    #[test]
    fn our_own_rule_is_known_again() {
        let line = "-A DOCKER-USER -i towline_gwbr -m comment --comment towline -j ACCEPT";
        assert_eq!(
            parse(line, Family::Ipv6).chains["DOCKER-USER"],
            [Rule::ours(ways()[0])]
        );
    }

    #[test]
    fn a_specific_drop_is_not_taken_for_a_general_one() {
        let listed = "-P FORWARD ACCEPT\n-A FORWARD -s 192.0.2.0/24 -j DROP\n-A FORWARD -j LOG --log-prefix x\n";
        assert_eq!(parse(listed, Family::Ipv4).blocks(ways()[0]), None);
        let listed = format!("{listed}-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n");
        let block = parse(&listed, Family::Ipv4).blocks(ways()[0]);
        assert_eq!(block.map(|block| block.by_policy), Some(false));
    }
}
