//! A container's interface in memory, and the container behind it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gather;
use crate::edge::{Offload, Refusal, SendReport, Tap, TapFeatures, TapFrame};
use crate::frame::{FrameBuf, MAX_FRAME};

/// A container's interface, as a worker holds it.
pub struct MemoryTap {
    queues: Arc<Mutex<Queues>>,
}

/// The container's side of a [`MemoryTap`].
pub struct Container {
    queues: Arc<Mutex<Queues>>,
}

struct Queues {
    /// From the container.
    outbox: VecDeque<(Vec<u8>, Offload)>,
    /// For the container.
    inbox: Vec<(Vec<u8>, Offload)>,
    /// How many frames `inbox` takes before more are refused.
    room: usize,
    features: TapFeatures,
    unplugged: bool,
}

impl MemoryTap {
    /// An interface and the container behind it, which takes `room` frames before it refuses more.
    #[must_use]
    pub fn new(room: usize) -> (Self, Container) {
        let queues = Queues {
            outbox: VecDeque::new(),
            inbox: Vec::new(),
            room,
            features: TapFeatures::default(),
            unplugged: false,
        };
        let queues = Arc::new(Mutex::new(queues));
        (
            Self {
                queues: Arc::clone(&queues),
            },
            Container { queues },
        )
    }
}

impl Container {
    /// Has the interface take merged frames; to be called before a worker gets it.
    pub fn set_features(&self, features: TapFeatures) {
        lock(&self.queues).features = features;
    }

    /// Sends a whole frame.
    pub fn send(&self, frame: &[u8]) {
        self.send_with(frame, Offload::default());
    }

    /// Sends a frame that leaves work to a network card.
    pub fn send_with(&self, frame: &[u8], offload: Offload) {
        lock(&self.queues)
            .outbox
            .push_back((frame.to_vec(), offload));
    }

    /// Takes what was delivered, with what the container's kernel is to do with it.
    #[must_use]
    pub fn take(&self) -> Vec<(Vec<u8>, Offload)> {
        std::mem::take(&mut lock(&self.queues).inbox)
    }

    /// Takes away the interface: the worker's next call fails.
    pub fn unplug(&self) {
        lock(&self.queues).unplugged = true;
    }
}

impl Tap for MemoryTap {
    fn recv(&mut self, bufs: &mut [FrameBuf]) -> io::Result<usize> {
        let mut queues = lock(&self.queues);
        if queues.unplugged {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let mut count = 0;
        for buf in bufs {
            let Some((frame, offload)) = queues.outbox.pop_front() else {
                break;
            };
            // A kernel cuts what does not fit the reader's buffer.
            let len = frame.len().min(MAX_FRAME);
            buf.space()[..len].copy_from_slice(&frame[..len]);
            buf.set_frame(len, offload);
            count += 1;
        }
        Ok(count)
    }

    fn send(&mut self, frames: &[TapFrame<'_>]) -> io::Result<SendReport> {
        let mut queues = lock(&self.queues);
        if queues.unplugged {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let mut report = SendReport::default();
        for (index, frame) in frames.iter().enumerate() {
            if queues.inbox.len() >= queues.room {
                report.refuse(index, 1, Refusal::Full);
            } else {
                queues.inbox.push((gather(frame.slices), frame.offload));
                report.sent += 1;
            }
        }
        Ok(report)
    }

    fn features(&self) -> TapFeatures {
        lock(&self.queues).features
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        None
    }
}

fn lock(queues: &Mutex<Queues>) -> MutexGuard<'_, Queues> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::IoSlice;

    #[test]
    fn a_full_container_refuses_and_an_unplugged_one_fails() {
        let (mut tap, container) = MemoryTap::new(1);
        let slices = [IoSlice::new(b"a"), IoSlice::new(b"b")];
        let frame = TapFrame {
            slices: &slices,
            offload: Offload::default(),
        };
        assert_eq!(
            tap.send(&[frame, frame]).unwrap(),
            SendReport {
                sent: 1,
                full: 1,
                refused: [0, 0b10, 0],
                ..SendReport::default()
            }
        );
        assert_eq!(container.take(), [(b"ab".to_vec(), Offload::default())]);
        container.unplug();
        assert!(tap.send(&[frame]).is_err() && tap.recv(&mut [FrameBuf::new()]).is_err());
    }
}
