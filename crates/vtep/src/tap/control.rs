//! What outlives a queue: whether the interface stays when nobody holds it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A handle on the interface itself, held beside its queues. It follows the interface through renames.
#[derive(Debug)]
pub struct TapControl {
    queue: OwnedFd,
}

impl TapControl {
    /// `queue` is a duplicate of one queue's descriptor; the queue closes when the last duplicate does.
    pub(super) const fn new(queue: OwnedFd) -> Self {
        Self { queue }
    }

    /// Makes the interface stay (`true`) or go (`false`) when its last queue is closed.
    ///
    /// # Errors
    /// What the kernel says; `EBADFD` when the interface is already gone.
    pub fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of ours; the descriptor
        // is open for as long as `self` lives. No safe wrapper for this ioctl exists in our dependencies.
        let result = unsafe {
            libc::ioctl(
                self.queue.as_raw_fd(),
                libc::TUNSETPERSIST,
                libc::c_ulong::from(persistent),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
