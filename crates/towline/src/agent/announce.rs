//! Tells the containers of this host that an address has another MAC, soon, and no faster than a worker can spare the time.
//!
//! A container that spoke to the address before would go on with the MAC it remembers. What the announcement is, and who hears
//! it, is the datapath's matter (`vtep::announce`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender, bounded};
use vtep::datapath::Announcement;

use super::Member;

/// Announcements that wait, at most; those above are missed, and containers find out when their kernels ask again.
const WAITING_MAX: usize = 16_384;
/// What one port takes of a second: 20,000 copies in all.
const PACE: Duration = Duration::from_micros(50);
/// Sleeps shorter than this cost more than they are worth.
const SLEEP_MIN: Duration = Duration::from_millis(1);

/// Announcements on their way to the datapath.
pub(super) struct Announcements {
    sender: Sender<Announcement>,
    receiver: Receiver<Announcement>,
    missed: AtomicU64,
}

impl Default for Announcements {
    fn default() -> Self {
        let (sender, receiver) = bounded(WAITING_MAX);
        Self {
            sender,
            receiver,
            missed: AtomicU64::new(0),
        }
    }
}

impl Announcements {
    /// Adds what is to be announced; never waits.
    pub(super) fn push(&self, announcement: Announcement) {
        if self.sender.try_send(announcement).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many there was no room for.
    pub(super) fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

/// Starts telling; ends with the member.
///
/// # Errors
/// When no thread can be made.
pub(super) fn start(member: &Arc<Member>) -> anyhow::Result<()> {
    let waiting = member.follower.announcements().receiver.clone();
    // Not the member itself: the thread must not keep alive what ends it.
    let member = Arc::downgrade(member);
    thread::Builder::new()
        .name("announce".into())
        .spawn(move || {
            let mut owed = Duration::ZERO;
            while let Ok(announcement) = waiting.recv() {
                let Some(member) = member.upgrade() else {
                    return;
                };
                let ports = member.datapath.announce(announcement);
                drop(member);
                owed += PACE * u32::try_from(ports).unwrap_or(u32::MAX);
                if owed >= SLEEP_MIN {
                    thread::sleep(owed);
                    owed = Duration::ZERO;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let announcements = Announcements::default();
        let one = Announcement {
            vni: vtep::Vni::MAX,
            ip: [10, 0, 9, 2].into(),
            mac: vtep::MacAddr::new([2; 6]),
        };
        for _ in 0..WAITING_MAX + 3 {
            announcements.push(one);
        }
        assert_eq!(announcements.missed(), 3);
        assert_eq!(announcements.receiver.len(), WAITING_MAX);
    }
}
