//! Tells senders whose tables are out of date, through the manager, and not too often.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

use super::Member;

/// How often notes are taken.
const TICK: Duration = Duration::from_millis(100);
/// Different misdeliveries told at once; with [`TICK`], 40 in a second.
const TOLD_MAX: usize = 4;

/// Starts telling; ends with the datapath.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(member: &Arc<Member>) -> anyhow::Result<()> {
    let notes = member.datapath.misdeliveries();
    // Not the member itself: the thread must not keep alive what ends it.
    let member = Arc::downgrade(member);
    thread::Builder::new()
        .name("misdelivery".into())
        .spawn(move || {
            while let Ok(first) = notes.recv() {
                let Some(member) = member.upgrade() else {
                    return;
                };
                let waiting: BTreeSet<_> = notes.try_iter().chain([first]).collect();
                for note in waiting.iter().take(TOLD_MAX) {
                    tracing::debug!(?note, "a frame came to the wrong host");
                    member.control.misdelivered(note.vni, note.mac, note.from);
                }
                drop(member);
                thread::sleep(TICK);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
