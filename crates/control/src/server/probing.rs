//! Probes that a new host asks for: sent and awaited on a thread of their own, a bounded number at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Prober;
use crate::limits::PROBES_MAX;
use crate::manager::Manager;
use crate::request::{Request, Response};
use crate::transport::Outbox;

/// Probes on a thread of its own, because it waits, and answers the call.
pub(super) fn probe(
    prober: &Arc<dyn Prober>,
    probing: &Arc<AtomicUsize>,
    outbox: Outbox,
    call: u64,
    request: Request,
) {
    let answer = move |result: Result<Response, String>| {
        for part in Manager::reply(call, &result) {
            outbox.send(part.encode());
        }
    };
    if probing.fetch_add(1, Ordering::Relaxed) >= PROBES_MAX {
        probing.fetch_sub(1, Ordering::Relaxed);
        answer(Err(format!(
            "the manager sends {PROBES_MAX} probes already: try again in a few seconds"
        )));
        return;
    }
    let (prober, under_way) = (Arc::clone(prober), Arc::clone(probing));
    let body = move || {
        match request {
            Request::ProbeExpect { nonce } => {
                prober.expect(nonce);
                answer(Ok(Response::Done));
            }
            Request::ProbeReply {
                nonce,
                to,
                back_nonce,
                sizes,
            } => {
                answer(Ok(Response::ProbeSizes(
                    prober.reply(nonce, to, back_nonce, &sizes),
                )));
            }
            other => answer(Err(format!("{other:?} is no probe"))),
        }
        under_way.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(error) = std::thread::Builder::new()
        .name("control-probe".to_owned())
        .spawn(body)
    {
        // The asker's deadline ends its call.
        probing.fetch_sub(1, Ordering::Relaxed);
        tracing::error!(%error, "failed to start a thread for a probe");
    }
}
