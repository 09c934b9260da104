//! The last events of the cluster, kept in memory, and who waits for the next.
//!
//! A follower asks where the last answer ended; where there is nothing new, the answer waits until there is, or a few seconds.
//! Nothing is queued for a follower, so a slow one costs nothing: it learns how many events it missed.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Connection, Manager};
use crate::agent::millis;
use crate::events::{Action, ClusterEvent, From, Position, Subject, Told};
use crate::host::HostId;
use crate::network::{Endpoint, Network};
use crate::request::Response;
use crate::row::State as RowState;
use crate::service::Service;

/// Events kept.
const KEPT: usize = 4096;
/// Events in one answer.
const TOLD_MAX: usize = 512;
/// Followers that wait.
const WAITING_MAX: usize = 256;
/// How long an answer waits for an event: below the deadline of a request.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct Journal {
    life: u64,
    events: VecDeque<ClusterEvent>,
    /// The number of the event that comes next.
    next: u64,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    connection: Connection,
    call: u64,
    from: u64,
    until: Duration,
}

impl Journal {
    pub(super) const fn new(life: u64) -> Self {
        Self {
            life,
            events: VecDeque::new(),
            next: 0,
            waiting: Vec::new(),
        }
    }

    fn push(&mut self, event: ClusterEvent) {
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        self.events.push_back(event);
        self.next += 1;
    }

    fn oldest(&self) -> u64 {
        self.next - self.events.len() as u64
    }

    /// The number of the first event that a follower wants.
    fn begin(&self, from: From) -> u64 {
        match from {
            From::Now => self.next,
            From::Time(ms) => {
                let before = self.events.partition_point(|event| event.time_ms < ms);
                self.oldest() + before as u64
            }
            From::Position(Position { life, next }) if life == self.life => next.min(self.next),
            // All that this manager has is news to who followed another.
            From::Position(_) => self.oldest(),
        }
    }

    fn tell(&self, from: u64) -> Told {
        let first = from.max(self.oldest());
        let skipped = usize::try_from(first - self.oldest()).unwrap_or(usize::MAX);
        let events: Vec<ClusterEvent> = self
            .events
            .iter()
            .skip(skipped)
            .take(TOLD_MAX)
            .cloned()
            .collect();
        let position = Position {
            life: self.life,
            next: first + events.len() as u64,
        };
        Told {
            events,
            missed: first - from,
            position,
        }
    }
}

impl Manager {
    /// Tells what happened, at once or when something does.
    pub(super) fn follow(
        &mut self,
        connection: Connection,
        call: u64,
        from: From,
        now: Duration,
    ) -> Result<(), String> {
        let begin = self.journal.begin(from);
        // Who begins wants to know where.
        let at_once = begin < self.journal.next || !matches!(from, From::Position(_));
        if at_once {
            let told = self.journal.tell(begin);
            self.answer(connection, call, &Ok(Response::Events(told)));
            return Ok(());
        }
        if self.journal.waiting.len() >= WAITING_MAX {
            return Err(format!(
                "{WAITING_MAX} followers wait for events already: try again later"
            ));
        }
        self.journal.waiting.push(Waiting {
            connection,
            call,
            from: begin,
            until: now + PATIENCE,
        });
        Ok(())
    }

    /// Answers who has waited long enough, or for something that has happened.
    pub(super) fn tell_followers(&mut self, now: Option<Duration>) {
        let next = self.journal.next;
        let due =
            |waiting: &Waiting| waiting.from < next || now.is_some_and(|now| now >= waiting.until);
        let (due, waiting) = std::mem::take(&mut self.journal.waiting)
            .into_iter()
            .partition(due);
        self.journal.waiting = waiting;
        for Waiting {
            connection,
            call,
            from,
            ..
        } in due
        {
            let told = self.journal.tell(from);
            self.answer(connection, call, &Ok(Response::Events(told)));
        }
    }

    pub(super) fn note_host(&mut self, action: Action, id: HostId) {
        if let Some(info) = self.state.hosts.get(&id) {
            let subject = Subject::Host {
                host: info.name.clone(),
                vtep: info.vtep,
            };
            self.note(action, subject);
        }
    }

    pub(super) fn note_network(&mut self, action: Action, network: &Network) {
        let subject = Subject::Network {
            network: network.name.clone(),
            vni: network.vni,
        };
        self.note(action, subject);
    }

    /// An endpoint's rows became this.
    pub(super) fn note_endpoint(
        &mut self,
        endpoint: &Endpoint,
        owner: HostId,
        owner_seq: u32,
        state: RowState,
    ) {
        let action = match state {
            RowState::Up => Action::Up,
            // Before its owner has said anything.
            RowState::Down if owner_seq == 0 => Action::Create,
            RowState::Down => Action::Down,
            RowState::Free => Action::Remove,
        };
        let network = self.state.networks.get(&endpoint.vni);
        let subject = Subject::Endpoint {
            network: network.map_or_else(String::new, |state| state.network.name.clone()),
            vni: endpoint.vni,
            container: endpoint.container.clone(),
            host: self.host_name(owner),
            mac: endpoint.mac,
            ips: endpoint.ips.clone(),
        };
        self.note(action, subject);
    }

    pub(super) fn note_service(&mut self, action: Action, service: &Service) {
        let subject = Subject::Service {
            service: service.spec.name.clone(),
            network: service.spec.network.clone(),
            vni: service.vni,
        };
        self.note(action, subject);
    }

    /// A member of a service serves, or serves no more.
    pub(super) fn note_member(&mut self, serves: bool, endpoint: &Endpoint, owner: HostId) {
        let service = endpoint.member.and_then(|member| self.service_of(member));
        let Some(service) = service else {
            return;
        };
        let network = self.state.networks.get(&endpoint.vni);
        let subject = Subject::Member {
            service: service.spec.name.clone(),
            network: network.map_or_else(String::new, |state| state.network.name.clone()),
            vni: endpoint.vni,
            container: endpoint.container.clone(),
            host: self.host_name(owner),
        };
        self.note(if serves { Action::Up } else { Action::Down }, subject);
    }

    fn note(&mut self, action: Action, subject: Subject) {
        self.journal.push(ClusterEvent {
            time_ms: millis(self.unix),
            action,
            subject,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::testing::{Bench, NOW};
    use crate::message::ToManager;
    use crate::request::Request;

    fn follow(bench: &mut Bench, from: From) -> Option<Told> {
        let request = Request::Events(from);
        bench.say(1, ToManager::Call { id: 9, request });
        told(bench)
    }

    fn told(bench: &mut Bench) -> Option<Told> {
        bench.answer().map(|answer| match answer {
            Response::Events(told) => told,
            other => panic!("{other:?}"),
        })
    }

    fn actions(told: &Told) -> Vec<Action> {
        told.events.iter().map(|event| event.action).collect()
    }

    #[test]
    fn what_happened_is_told_in_order_and_what_happens_then() {
        let (mut bench, vni, [one, _]) = Bench::new();
        bench.sent.clear();
        let all = follow(&mut bench, From::Time(0)).expect("at once");
        assert_eq!(
            actions(&all),
            [
                Action::Join,
                Action::Join,
                Action::Create,
                Action::Create,
                Action::Up,
                Action::Create,
                Action::Up,
            ]
        );
        let begun = follow(&mut bench, From::Now).expect("where it begins, at once");
        assert_eq!((begun.events.len(), begun.position), (0, all.position));

        assert_eq!(follow(&mut bench, From::Position(begun.position)), None);
        let free = Request::Free {
            vni,
            epoch: one.epoch,
        };
        bench.sent.clear();
        bench.manager.handle_message(
            1,
            ToManager::Call {
                id: 1,
                request: free,
            },
            NOW,
        );
        bench.turn();
        let replies = bench.sent.iter();
        let mut replies = replies.filter_map(|(_, message)| match message {
            crate::message::ToAgent::Reply { id: 9, part, .. } => Some(part.clone()),
            _ => None,
        });
        let part = replies.next().expect("who waits is told in the same turn");
        let answer: Result<Response, String> = serde_json::from_slice(&part).expect("JSON");
        let Ok(Response::Events(told)) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(actions(&told), [Action::Remove]);
        assert_eq!(told.events[0].subject.network(), Some("blue"));
    }

    #[test]
    fn who_waits_for_nothing_is_answered_in_time() {
        let (mut bench, ..) = Bench::new();
        bench.sent.clear();
        let begun = follow(&mut bench, From::Now).expect("at once");
        assert_eq!(follow(&mut bench, From::Position(begun.position)), None);
        for connection in [1, 2] {
            let at = NOW + PATIENCE / 2;
            bench
                .manager
                .handle_message(connection, ToManager::Heartbeat, at);
        }
        bench.sent.clear();
        bench.manager.handle_timeout(NOW + PATIENCE);
        bench.turn();
        let told = told(&mut bench).expect("an answer");
        assert_eq!((told.events.len(), told.position), (0, begun.position));
    }

    #[test]
    fn a_slow_follower_learns_what_it_missed_and_another_life_begins_anew() {
        let mut journal = Journal::new(1);
        let subject = Subject::Network {
            network: "blue".to_owned(),
            vni: vtep::Vni::MAX,
        };
        for time_ms in 0..KEPT as u64 + 10 {
            let (action, subject) = (Action::Create, subject.clone());
            journal.push(ClusterEvent {
                time_ms,
                action,
                subject,
            });
        }
        let told = journal.tell(journal.begin(From::Position(Position { life: 1, next: 3 })));
        assert_eq!((told.missed, told.events.len()), (7, TOLD_MAX));
        assert_eq!(told.position.next, 10 + TOLD_MAX as u64);
        let other = journal.begin(From::Position(Position { life: 2, next: 99 }));
        assert_eq!((other, journal.tell(other).missed), (10, 0));
        assert_eq!(journal.begin(From::Time(20)), 20);
        let future = Position {
            life: 1,
            next: u64::MAX,
        };
        assert_eq!(journal.begin(From::Position(future)), journal.next);
    }
}
