//! Waiting: one epoll instance and one eventfd for each worker.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, epoll, eventfd};

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// What one worker sleeps on.
pub(super) struct Waiter {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
}

/// Wakes a worker from another thread.
#[derive(Clone)]
pub(super) struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Wakes the worker; it may be awake already.
    pub(super) fn wake(&self) {
        // EAGAIN: the counter is at its top, so the thread is being woken already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Waiter {
    /// A waiter whose waker gives the event `mark`.
    pub(super) fn new(mark: u64) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(mark),
            epoll::EventFlags::IN,
        )?;
        Ok(Self { epoll, wake })
    }

    pub(super) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }

    /// Forgets that the waker was used, before what it announced is looked at.
    pub(super) fn reset(&self) {
        let mut counter = [0; 8];
        // EAGAIN: reset already.
        let _ = rustix::io::read(&self.wake, &mut counter);
    }

    /// Gives the event `mark` while `fd` has something to read. `fd` stays open until [`Self::unwatch`].
    pub(super) fn watch(&self, fd: RawFd, mark: u64) -> io::Result<()> {
        // SAFETY: the caller keeps the edge that lent `fd`, and with it the descriptor. The seams lend raw descriptors, because
        // their twins in memory have none.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(mark),
            epoll::EventFlags::IN,
        )?)
    }

    /// Ends [`Self::watch`]. Closing the descriptor would not do: epoll watches the open file, which a duplicate keeps open.
    pub(super) fn unwatch(&self, fd: RawFd) {
        // SAFETY: as in `watch`: the caller has not dropped the edge yet.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // It is not there when watching it failed.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Sleeps until something happens, and fills `marks` with what; with nothing, when a signal came first.
    pub(super) fn wait(&self, marks: &mut Vec<u64>) -> io::Result<()> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        marks.clear();
        match epoll::wait(&self.epoll, &mut events[..], None) {
            Ok((events, _)) => marks.extend(events.iter().map(|event| event.data.u64())),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }
}
