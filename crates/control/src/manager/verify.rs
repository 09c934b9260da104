//! Verifications: is what each host's datapath holds what the rows say it should?
//!
//! A host is sent the digest of what it should hold, on the stream that told it the rows and after them; it answers "the same", or
//! with what it holds. What differs is asked about again before it is told: a port that is being attached is there a moment
//! before its row says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use vtep::Vni;

use super::{Connection, Manager};
use crate::host::HostId;
use crate::installed::{
    self, DIFFERENCES_MAX, Difference, Digest, Entry, Finding, RULE_BYTES_MAX, RuleDifference,
    Verified, differences,
};
use crate::message::ToAgent;
use crate::request::Response;

/// Verifications under way.
const RUNNING_MAX: usize = 8;
/// When a verification ends with what it has: below the deadline of the request that asked for it.
const PATIENCE: Duration = Duration::from_secs(4);
/// The wait before a host that differs is asked again.
const AGAIN: Duration = Duration::from_millis(300);
/// How often a host is asked before its differences count.
const TRIES: u8 = 3;
/// Entries taken from one host above those expected.
const SURPLUS_MAX: usize = 1 << 16;

/// All verifications under way, by their ids.
#[derive(Debug, Default)]
pub(super) struct Verifications {
    next: u64,
    running: BTreeMap<u64, Verification>,
}

#[derive(Debug)]
struct Verification {
    connection: Connection,
    call: u64,
    until: Duration,
    open: BTreeMap<(Vni, HostId), Question>,
    found: Vec<Verified>,
}

/// What one host was asked of one network.
#[derive(Debug, Default)]
struct Question {
    /// Unset: to be sent at the end of this turn. An answer to an earlier asking is not for what is expected now, but it
    /// can't come: one connection keeps the order, and a host is asked again only after its answer.
    expected: Option<Arc<BTreeSet<Entry>>>,
    /// Not to be asked before.
    not_before: Option<Duration>,
    asked: u8,
    installed: BTreeSet<Entry>,
    /// Of all answers: a host mends such rules as it tells of them.
    rules: BTreeSet<RuleDifference>,
}

/// A host's answer, or a part of it.
#[derive(Debug)]
pub(super) struct InstalledPart {
    pub(super) same: bool,
    pub(super) entries: Vec<Entry>,
    pub(super) rules: Vec<RuleDifference>,
    pub(super) last: bool,
}

impl Manager {
    /// Begins a verification; the call is answered when it ends.
    pub(super) fn verify(
        &mut self,
        connection: Connection,
        call: u64,
        network: Option<&str>,
        now: Duration,
    ) -> Result<(), String> {
        let vnis: Vec<Vni> = match network {
            Some(wanted) => vec![self.find_network(wanted)?],
            None => self.state.networks.keys().copied().collect(),
        };
        if self.verifications.running.len() >= RUNNING_MAX {
            return Err(format!(
                "{RUNNING_MAX} verifications are under way: try again in a few seconds"
            ));
        }
        let mut verification = Verification {
            connection,
            call,
            until: now + PATIENCE,
            open: BTreeMap::new(),
            found: Vec::new(),
        };
        for vni in vnis {
            let members = self.state.networks[&vni].table.members();
            let subscribed = self.connections.values();
            let subscribed = subscribed.filter(|peer| peer.subscriptions.contains(&vni));
            let hosts: BTreeSet<HostId> = members.chain(subscribed.map(|peer| peer.host)).collect();
            for host in hosts {
                if self.by_host.contains_key(&host) {
                    verification.open.insert((vni, host), Question::default());
                } else {
                    verification
                        .found
                        .push(self.verified(vni, host, Finding::Unreachable));
                }
            }
        }
        let id = self.verifications.next;
        self.verifications.next += 1;
        self.verifications.running.insert(id, verification);
        self.end_verifications(now);
        Ok(())
    }

    /// Sends what is to be asked now, each network's digest computed once.
    pub(super) fn send_inspections(&mut self) {
        let mut due: BTreeMap<Vni, Vec<(u64, HostId)>> = BTreeMap::new();
        for (id, verification) in &self.verifications.running {
            for (&(vni, host), question) in &verification.open {
                if question.expected.is_none() && question.not_before.is_none() {
                    due.entry(vni).or_default().push((*id, host));
                }
            }
        }
        let mut messages = Vec::new();
        for (vni, asked) in due {
            let vtep = |host: HostId| self.state.hosts.get(&host).map(|info| info.vtep);
            let expected = self.state.networks.get(&vni).map_or_else(
                BTreeSet::new, // removed meanwhile
                |network| installed::expected(&network.table, vtep),
            );
            let all: Digest = expected.iter().collect();
            let expected = Arc::new(expected);
            for (id, host) in asked {
                let mut digest = all;
                for own in own_member(&expected, vtep(host)) {
                    digest.remove(&own);
                }
                let question = self.verifications.running.get_mut(&id);
                if let Some(question) = question.and_then(|v| v.open.get_mut(&(vni, host))) {
                    question.expected = Some(Arc::clone(&expected));
                    question.asked += 1;
                }
                if let Some(&to) = self.by_host.get(&host) {
                    messages.push((to, ToAgent::Inspect { id, vni, digest }));
                }
            }
        }
        for (to, message) in messages {
            self.send(to, message);
        }
    }

    /// A host's answer, or a part of it.
    pub(super) fn installed(
        &mut self,
        id: u64,
        (vni, host): (Vni, HostId),
        answer: InstalledPart,
        now: Duration,
    ) {
        let InstalledPart {
            same,
            entries,
            rules,
            last,
        } = answer;
        let vtep = self.state.hosts.get(&host).map(|info| info.vtep);
        let Some(verification) = self.verifications.running.get_mut(&id) else {
            return;
        };
        let Some(question) = verification.open.get_mut(&(vni, host)) else {
            return;
        };
        let Some(expected) = question.expected.clone() else {
            return;
        };
        if question.installed.len() <= expected.len() + SURPLUS_MAX {
            question.installed.extend(entries);
        }
        let told = rules
            .into_iter()
            .filter(|rule| rule.size() <= RULE_BYTES_MAX)
            .map(RuleDifference::printable);
        let room = DIFFERENCES_MAX.saturating_sub(question.rules.len());
        question.rules.extend(told.take(room));
        if !last {
            return;
        }
        let mut wanted = BTreeSet::clone(&expected);
        for own in own_member(&expected, vtep) {
            wanted.remove(&own);
        }
        let differing = if same {
            Vec::new()
        } else {
            differences(&wanted, &std::mem::take(&mut question.installed))
        };
        if !differing.is_empty() && question.asked < TRIES {
            question.expected = None;
            question.not_before = Some(now + AGAIN);
            return;
        }
        let rules = std::mem::take(&mut question.rules);
        verification.open.remove(&(vni, host));
        let finding = finding(differing, rules, wanted.len());
        let verified = self.verified(vni, host, finding);
        if let Some(verification) = self.verifications.running.get_mut(&id) {
            verification.found.push(verified);
        }
        self.end_verifications(now);
    }

    /// Time has passed.
    pub(super) fn advance_verifications(&mut self, now: Duration) {
        for verification in self.verifications.running.values_mut() {
            for question in verification.open.values_mut() {
                question.not_before = question.not_before.filter(|at| now < *at);
            }
        }
        self.end_verifications(now);
    }

    /// Answers those that are complete or out of time.
    fn end_verifications(&mut self, now: Duration) {
        let ended = self.verifications.running.iter();
        let ended = ended.filter(|(_, v)| v.open.is_empty() || now >= v.until);
        let ended: Vec<u64> = ended.map(|(id, _)| *id).collect();
        for id in ended {
            let Some(verification) = self.verifications.running.remove(&id) else {
                continue;
            };
            let mut found = verification.found;
            for (vni, host) in verification.open.into_keys() {
                let finding = if self.by_host.contains_key(&host) {
                    Finding::Silent
                } else {
                    Finding::Unreachable
                };
                found.push(self.verified(vni, host, finding));
            }
            found.sort_by(|a, b| (&a.network, &a.host).cmp(&(&b.network, &b.host)));
            let answer = Ok(Response::Verified(found));
            self.answer(verification.connection, verification.call, &answer);
        }
    }

    fn verified(&self, vni: Vni, host: HostId, finding: Finding) -> Verified {
        let network = self.state.networks.get(&vni);
        Verified {
            host: self.host_name(host),
            host_id: host,
            network: network.map_or_else(|| vni.to_string(), |known| known.network.name.clone()),
            vni,
            finding,
        }
    }
}

/// A host is no remote of its own.
fn own_member(expected: &BTreeSet<Entry>, vtep: Option<std::net::IpAddr>) -> Vec<Entry> {
    let forms = vtep.map(|vtep| [true, false].map(|flood| Entry::Member { vtep, flood }));
    let there = forms.into_iter().flatten();
    there.filter(|entry| expected.contains(entry)).collect()
}

fn finding(
    mut differing: Vec<Difference>,
    rules: BTreeSet<RuleDifference>,
    entries: usize,
) -> Finding {
    let count = differing.len() + rules.len();
    if count == 0 {
        return Finding::Same { entries };
    }
    differing.truncate(DIFFERENCES_MAX);
    Finding::Differs {
        differences: differing,
        rules: rules.into_iter().collect(),
        count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installed::Fault;
    use crate::manager::testing::{Bench, NOW, vtep};
    use crate::message::ToManager;
    use crate::network::Endpoint;
    use crate::request::Request;

    /// Who was asked what since the last look.
    fn asked(bench: &mut Bench) -> Vec<(Connection, u64, Digest)> {
        let sent = std::mem::take(&mut bench.sent);
        let asked = sent.into_iter().filter_map(|(to, message)| match message {
            ToAgent::Inspect { id, digest, .. } => Some((to, id, digest)),
            _ => None,
        });
        asked.collect()
    }

    fn verify(bench: &mut Bench) {
        let request = Request::Verify(Some("blue".to_owned()));
        bench.say(1, ToManager::Call { id: 7, request });
    }

    /// What a host holds that did all it was told.
    fn held(endpoints: &[Endpoint; 2], own: u8) -> BTreeSet<Entry> {
        let mut entries = BTreeSet::new();
        for (n, endpoint) in (1..).zip(endpoints) {
            let (mac, vtep) = (endpoint.mac, vtep(n));
            entries.insert(Entry::Mac { mac, vtep });
            let ips = endpoint.ips.iter();
            entries.extend(ips.map(|&ip| Entry::Neighbor { ip, mac }));
            if n != own {
                entries.insert(Entry::Member { vtep, flood: true });
            }
        }
        entries
    }

    fn installed(id: u64, vni: Vni, same: bool, entries: Vec<Entry>) -> ToManager {
        ToManager::Installed {
            id,
            vni,
            same,
            entries,
            rules: Vec::new(),
            last: true,
        }
    }

    #[test]
    fn hosts_that_hold_what_they_should_are_found_same() {
        let (mut bench, vni, endpoints) = Bench::new();
        verify(&mut bench);
        let asked = asked(&mut bench);
        assert_eq!(asked.len(), 2);
        for (own, (connection, id, digest)) in (1..).zip(asked) {
            assert_eq!(held(&endpoints, own).iter().collect::<Digest>(), digest);
            bench.say(connection, installed(id, vni, true, Vec::new()));
        }
        let Some(Response::Verified(found)) = bench.answer() else {
            panic!("no answer")
        };
        let same = Finding::Same { entries: 5 };
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|v| v.finding == same), "{found:?}");
    }

    #[test]
    fn a_difference_counts_when_it_stays_and_is_told_entry_by_entry() {
        let (mut bench, vni, endpoints) = Bench::new();
        verify(&mut bench);
        let mut wrong = held(&endpoints, 2);
        let lost = *wrong.first().expect("entries");
        wrong.remove(&lost);
        for tried in 1..=TRIES {
            for (connection, id, _) in asked(&mut bench) {
                let same = connection == 1;
                let entries = wrong.iter().copied().collect();
                bench.say(connection, installed(id, vni, same, entries));
            }
            if tried < TRIES {
                assert_eq!(bench.answer(), None, "asked again first");
                let later = NOW + AGAIN * tried.into();
                bench.manager.handle_timeout(later);
                bench.turn();
            }
        }
        let Some(Response::Verified(found)) = bench.answer() else {
            panic!("no answer")
        };
        let bad: Vec<_> = found.iter().filter(|v| v.host == "h2").collect();
        let differences = vec![Difference {
            entry: lost,
            fault: Fault::Missing,
        }];
        let expected = Finding::Differs {
            differences,
            rules: Vec::new(),
            count: 1,
        };
        assert_eq!(bad[0].finding, expected);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_rule_that_is_wrong_counts_at_once_and_no_host_tells_more_than_is_kept() {
        let (mut bench, vni, _) = Bench::new();
        verify(&mut bench);
        let rule = |number: usize| RuleDifference {
            container: Some("c1".to_owned()),
            service: Some("web".to_owned()),
            rule: format!("rule {number}"),
            fault: Fault::Missing,
        };
        let long = RuleDifference {
            rule: "x".repeat(RULE_BYTES_MAX),
            ..rule(0)
        };
        for (connection, id, _) in asked(&mut bench) {
            let rules = match connection {
                1 => {
                    let coloured = RuleDifference {
                        service: Some("web\u{1b}[0m".to_owned()),
                        ..rule(2)
                    };
                    vec![rule(1), long.clone(), coloured]
                }
                _ => (0..=DIFFERENCES_MAX).map(rule).collect(),
            };
            bench.say(
                connection,
                ToManager::Installed {
                    id,
                    vni,
                    same: true,
                    entries: Vec::new(),
                    rules,
                    last: true,
                },
            );
        }
        let Some(Response::Verified(found)) = bench.answer() else {
            panic!("no answer")
        };
        let expected = Finding::Differs {
            differences: Vec::new(),
            rules: vec![
                rule(1),
                RuleDifference {
                    service: Some("web\u{fffd}[0m".to_owned()),
                    ..rule(2)
                },
            ],
            count: 2,
        };
        assert_eq!(found[0].finding, expected);
        let Finding::Differs { rules, .. } = &found[1].finding else {
            panic!("{found:?}")
        };
        assert_eq!(rules.len(), DIFFERENCES_MAX);
    }

    #[test]
    fn who_does_not_answer_is_named() {
        let (mut bench, vni, _) = Bench::new();
        bench.manager.handle_disconnected(2);
        verify(&mut bench);
        let asked = asked(&mut bench);
        assert_eq!(asked.len(), 1, "only who is connected is asked");
        // An answer of somebody else, of another network, and to another question change nothing.
        bench.say(2, installed(asked[0].1, vni, true, Vec::new()));
        bench.say(1, installed(asked[0].1, Vni::MAX, true, Vec::new()));
        bench.say(1, installed(asked[0].1 + 1, vni, true, Vec::new()));
        bench.manager.handle_timeout(NOW + PATIENCE);
        bench.turn();
        let Some(Response::Verified(found)) = bench.answer() else {
            panic!("no answer")
        };
        let results: Vec<_> = found.into_iter().map(|v| (v.host, v.finding)).collect();
        assert_eq!(
            results,
            [
                ("h1".to_owned(), Finding::Silent),
                ("h2".to_owned(), Finding::Unreachable)
            ]
        );
    }
}
