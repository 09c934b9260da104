//! A worker's thread: sleeps until one of its edges has something, and lets the worker take it.
//!
//! Three kinds of things wake it: its UDP socket, its queue of each port, and commands.

use std::io;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use super::Worker;
use super::wait::{Waiter, Waker};
use crate::announce::Announcement;
use crate::edge::{Tap, Underlay};
use crate::fdb::PortId;
use crate::tap::Backend;

/// Marks of events: a port's is its id, which has 32 bits.
const COMMANDS: u64 = 1 << 32;
const UNDERLAY: u64 = 2 << 32;

/// What a worker's thread is told. Dropping `done`, where there is one, says that it has been done.
pub(crate) enum Command<U> {
    /// Here is this worker's queue of a port.
    AddPort {
        id: PortId,
        mtu: u16,
        backend: Backend,
        tap: Box<dyn Tap>,
        done: Sender<()>,
    },
    /// Close the queue.
    RemovePort { id: PortId, done: Sender<()> },
    /// Tell the ports that an address has another MAC.
    Announce(Announcement),
    /// Here is another way to other hosts; close the one before.
    SetUnderlay { underlay: U, done: Sender<()> },
}

/// A running worker. Dropping it stops the thread and waits for it; its queues close.
pub(crate) struct WorkerThread<U: Underlay> {
    // Options, because dropping closes the channel first and waits for the thread last.
    commands: Option<Sender<Command<U>>>,
    thread: Option<JoinHandle<()>>,
    waker: Waker,
}

impl<U: Underlay + 'static> WorkerThread<U> {
    /// Starts the thread.
    pub(crate) fn spawn(name: String, worker: Worker<U>) -> io::Result<Self> {
        let waiter = Waiter::new(COMMANDS)?;
        if let Some(socket) = worker.underlay().as_raw_fd() {
            waiter.watch(socket, UNDERLAY)?;
        }
        let waker = waiter.waker();
        let (commands, receiver) = unbounded();
        let mut thread = Loop {
            worker,
            waiter,
            commands: receiver,
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || thread.run())?;
        Ok(Self {
            commands: Some(commands),
            thread: Some(thread),
            waker,
        })
    }

    /// Hands a command over. When the thread has ended, the command is dropped, and `done` with it.
    pub(crate) fn command(&self, command: Command<U>) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
            self.waker.wake();
        }
    }
}

impl<U: Underlay> Drop for WorkerThread<U> {
    fn drop(&mut self) {
        self.commands = None;
        self.waker.wake();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("a thread of the data path panicked");
        }
    }
}

struct Loop<U: Underlay> {
    worker: Worker<U>,
    waiter: Waiter,
    commands: Receiver<Command<U>>,
}

impl<U: Underlay> Loop<U> {
    fn run(&mut self) {
        let mut marks = Vec::new();
        loop {
            if let Err(error) = self.waiter.wait(&mut marks) {
                tracing::error!(%error, "a worker can't wait for frames any more");
                return;
            }
            let now = Instant::now();
            for mark in &marks {
                match *mark {
                    COMMANDS => {
                        if !self.take_commands() {
                            return;
                        }
                    }
                    UNDERLAY => self.poll_underlay(now),
                    port => self.poll_port(port, now),
                }
            }
        }
    }

    fn poll_underlay(&mut self, now: Instant) {
        if let Err(error) = self.worker.poll_underlay(now) {
            // Nothing makes a bound UDP socket fail for good; the next event tries again.
            tracing::warn!(%error, "can't receive from the underlay");
        }
    }

    fn poll_port(&mut self, mark: u64, now: Instant) {
        let id = PortId(u32::try_from(mark).expect("invariant: every other mark is a port's id"));
        if let Err(error) = self.worker.poll_port(id, now) {
            // The interface went away under us, with its namespace or by somebody's hand. Whoever attached the port learns of
            // that by other ways, and detaches it.
            tracing::debug!(port = %id, %error, "a port's interface is gone");
            self.close_port(id);
        }
    }

    /// Says whether the thread is to go on.
    fn take_commands(&mut self) -> bool {
        self.waiter.reset();
        loop {
            match self.commands.try_recv() {
                Ok(Command::AddPort {
                    id,
                    mtu,
                    backend,
                    tap,
                    done,
                }) => {
                    if let Some(queue) = tap.as_raw_fd()
                        && let Err(error) = self.waiter.watch(queue, u64::from(id.0))
                    {
                        tracing::error!(port = %id, %error, "can't wait for a port's frames");
                    }
                    self.worker.add_port(id, mtu, backend, tap);
                    drop(done);
                }
                Ok(Command::RemovePort { id, done }) => {
                    self.close_port(id);
                    drop(done);
                }
                Ok(Command::Announce(announcement)) => self.worker.announce(&announcement),
                Ok(Command::SetUnderlay { underlay, done }) => {
                    self.set_underlay(underlay);
                    drop(done);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn set_underlay(&mut self, underlay: U) {
        if let Some(socket) = underlay.as_raw_fd()
            && let Err(error) = self.waiter.watch(socket, UNDERLAY)
        {
            // The one before still works for whoever has not heard of another.
            tracing::error!(%error, "can't wait for datagrams on another socket");
            return;
        }
        // Unwatched before it closes: see `Waiter::unwatch`.
        if let Some(socket) = self.worker.underlay().as_raw_fd() {
            self.waiter.unwatch(socket);
        }
        *self.worker.underlay_mut() = underlay;
    }

    fn close_port(&mut self, id: PortId) {
        if let Some(tap) = self.worker.remove_port(id)
            && let Some(queue) = tap.as_raw_fd()
        {
            self.waiter.unwatch(queue);
        }
    }
}
