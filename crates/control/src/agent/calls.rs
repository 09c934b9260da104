//! Requests on their way to a manager and their answers: each ends, by an answer or at its deadline.

use std::time::Duration;

use bytes::BytesMut;

use super::{Agent, Call, Link, Output, REQUEST_DEADLINE, millis};
use crate::message::ToManager;
use crate::request::{Request, RequestError, Response};

/// How long a request waits for a manager before it fails.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer put together from its parts.
const REPLY_MAX: usize = 64 << 20;

impl Agent {
    /// Ask the manager. The answer comes as [`Output::Answer`] with this id.
    pub fn call(&mut self, id: u64, request: Request, now: Duration) {
        if let Request::Free { vni, epoch } = request {
            // Freed by its owner: not to be published again, and no loss when the news comes round.
            let freed = self.endpoints.remove(&(vni, epoch));
            self.owner_seqs.remove(&(vni, epoch));
            if let Some((endpoint, _)) = freed {
                self.announce_unless_told(&endpoint, false);
            }
        }
        let sent = matches!(self.link, Link::Up { .. });
        if sent {
            self.messages.push_back(ToManager::Call {
                id,
                request: request.clone(),
            });
        }
        self.calls.insert(
            id,
            Call {
                request,
                asked: now,
                sent,
                reply: BytesMut::new(),
            },
        );
        // Nobody has answered for as long as anybody would wait now.
        if !sent
            && self
                .failing_since
                .is_some_and(|at| now.saturating_sub(at) >= CONNECT_PATIENCE)
        {
            let cause = self.last_error.as_deref().unwrap_or("no connection");
            let error = self.not_connected(cause, now);
            self.answer(id, Err(error));
        }
    }

    /// The error of a request that finds no manager.
    #[must_use]
    pub fn not_connected(&self, cause: &str, now: Duration) -> RequestError {
        let managers: Vec<String> = self.managers.iter().map(ToString::to_string).collect();
        RequestError::NotConnected {
            managers: managers.join(", "),
            cause: cause.to_owned(),
            age_ms: self.link_changed.map(|at| millis(now.saturating_sub(at))),
        }
    }

    pub(super) fn reply(&mut self, id: u64, part: &[u8], last: bool) {
        let Some(call) = self.calls.get_mut(&id) else {
            self.late_reply(id, part);
            return;
        };
        if call.reply.len() + part.len() > REPLY_MAX {
            self.answer(
                id,
                Err(RequestError::Refused(
                    "the manager's answer is longer than 64 MiB".to_owned(),
                )),
            );
            return;
        }
        call.reply.extend_from_slice(part);
        if !last {
            return;
        }
        let result = match serde_json::from_slice::<Result<Response, String>>(&call.reply) {
            Ok(answer) => answer.map_err(RequestError::Refused),
            Err(error) => Err(RequestError::Refused(format!(
                "the manager's answer is not understood: {error}"
            ))),
        };
        if let (Request::Leave, Ok(_)) = (&call.request, &result) {
            self.left = true;
        }
        self.answer(id, result);
    }

    /// The answer to an allocation that nobody waits for any more: it is given back, or it would be held until the next
    /// connection. Not where the same is asked again and the manager answers with the same.
    pub(super) fn late_reply(&mut self, id: u64, part: &[u8]) {
        if !self.given_up.remove(&id) {
            return;
        }
        let Ok(Ok(Response::Endpoint(endpoint))) =
            serde_json::from_slice::<Result<Response, String>>(part)
        else {
            return;
        };
        let asked_again = self.calls.values().any(|call| {
            matches!(&call.request, Request::Allocate { container, .. } if *container == endpoint.container)
        });
        let (vni, epoch) = (endpoint.vni, endpoint.epoch);
        if !asked_again && !self.endpoints.contains_key(&(vni, epoch)) {
            let request = Request::Free { vni, epoch };
            self.messages.push_back(ToManager::Call { id, request });
        }
    }

    pub(super) fn answer(&mut self, id: u64, result: Result<Response, RequestError>) {
        if self.calls.remove(&id).is_some() {
            self.outputs.push_back(Output::Answer { id, result });
        }
    }

    pub(super) fn expire_calls(&mut self, now: Duration) {
        let expired = self.calls.iter().filter(|(_, call)| {
            let patience = if call.sent {
                REQUEST_DEADLINE
            } else {
                CONNECT_PATIENCE
            };
            now.saturating_sub(call.asked) >= patience
        });
        let expired: Vec<u64> = expired.map(|(id, _)| *id).collect();
        for id in expired {
            let given_up = &self.calls[&id];
            if given_up.sent && matches!(given_up.request, Request::Allocate { .. }) {
                self.given_up.insert(id);
            }
            let error = match self.link {
                Link::Up { manager, .. } => RequestError::Timeout {
                    manager,
                    seconds: REQUEST_DEADLINE.as_secs(),
                },
                Link::Down | Link::Greeting { .. } => self.not_connected(
                    self.last_error.as_deref().unwrap_or("no connection yet"),
                    now,
                ),
            };
            self.answer(id, Err(error));
        }
    }
}
