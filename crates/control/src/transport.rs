//! Frames over a stream: a 32-bit length, then that many bytes of message.
//!
//! Everything here works on any stream of bytes: TLS will stand between this and TCP without a change here. Nothing is
//! allocated for a frame before its bytes arrive.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use crate::limits::{MESSAGE_OVERHEAD, OUTBOX_BEHIND, OUTBOX_MAX, OUTBOXES_BEHIND, WRITE_PATIENCE};

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("the connection was closed")]
    Closed,
    #[error("a message of {length} bytes is longer than the {max} allowed")]
    TooLong { length: usize, max: usize },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads one frame of at most `max` bytes.
pub(crate) async fn read_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    max: usize,
) -> Result<Bytes, FrameError> {
    let length = match reader.read_u32().await {
        Ok(length) => usize::try_from(length).unwrap_or(usize::MAX),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(FrameError::Closed);
        }
        Err(error) => return Err(error.into()),
    };
    if length > max {
        return Err(FrameError::TooLong { length, max });
    }
    let mut bytes = Vec::new();
    reader.take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(FrameError::Closed);
    }
    Ok(bytes.into())
}

/// Writes one frame.
pub(crate) async fn write_frame<W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &Bytes,
) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    writer.write_u32(length).await?;
    writer.write_all(message).await
}

/// Bytes that wait in the outboxes of many connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Backlog(Arc<AtomicUsize>);

impl Backlog {
    /// How many.
    pub(crate) fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sends messages to one connection without ever waiting. Dropping the last clone closes the connection once what was sent
/// before is written.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    queue: mpsc::UnboundedSender<Queued>,
    meter: Arc<Meter>,
    closed: Arc<Notify>,
}

/// Counts what waits for one connection, and for all.
#[derive(Debug)]
struct Meter {
    own: AtomicUsize,
    all: Backlog,
}

/// A message on its way, counted until it is dropped, wherever that is.
#[derive(Debug)]
struct Queued {
    message: Bytes,
    meter: Arc<Meter>,
}

impl Queued {
    const fn cost(message: &Bytes) -> usize {
        message.len() + MESSAGE_OVERHEAD
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let cost = Self::cost(&self.message);
        self.meter.own.fetch_sub(cost, Ordering::Relaxed);
        self.meter.all.0.fetch_sub(cost, Ordering::Relaxed);
    }
}

impl Outbox {
    /// An outbox whose messages a task of its own writes; the notifier tells when the connection is to end.
    pub(crate) fn new<W: AsyncWrite + Unpin + Send + 'static>(writer: W) -> (Self, Arc<Notify>) {
        Self::counted(writer, Backlog::default(), ())
    }

    /// As [`Self::new`], counted into `all`. `place` is dropped when nothing of the connection is held any more.
    pub(crate) fn counted<W: AsyncWrite + Unpin + Send + 'static>(
        writer: W,
        all: Backlog,
        place: impl Send + 'static,
    ) -> (Self, Arc<Notify>) {
        let (queue, messages) = mpsc::unbounded_channel();
        let closed = Arc::new(Notify::new());
        let task_closed = Arc::clone(&closed);
        tokio::spawn(async move {
            // Why a peer is gone is of no use here: its reader notices too.
            let _ = write_all(writer, messages).await;
            task_closed.notify_one();
            drop(place);
        });
        let meter = Arc::new(Meter {
            own: AtomicUsize::new(0),
            all,
        });
        (
            Self {
                queue,
                meter,
                closed: Arc::clone(&closed),
            },
            closed,
        )
    }

    /// Queues a message. Where far too much waits already, the connection ends instead.
    pub(crate) fn send(&self, message: Bytes) {
        let cost = Queued::cost(&message);
        let before = self.meter.own.fetch_add(cost, Ordering::Relaxed);
        self.meter.all.0.fetch_add(cost, Ordering::Relaxed);
        let queued = Queued {
            message,
            meter: Arc::clone(&self.meter),
        };
        if before + cost > OUTBOX_MAX {
            self.closed.notify_one();
            return;
        }
        // A writer that has ended has said so by `closed`.
        let _ = self.queue.send(queued);
    }

    /// Whether the reader is so slow, or so much waits for all of them, that what can be made up later is to be left out.
    pub(crate) fn is_behind(&self) -> bool {
        let own = self.meter.own.load(Ordering::Relaxed);
        own > OUTBOX_BEHIND || own > 0 && self.meter.all.bytes() > OUTBOXES_BEHIND
    }
}

async fn write_all<W: AsyncWrite + Unpin>(
    writer: W,
    mut messages: mpsc::UnboundedReceiver<Queued>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(32 * 1024, writer);
    while let Some(queued) = messages.recv().await {
        timeout(WRITE_PATIENCE, write_frame(&mut writer, &queued.message)).await??;
        drop(queued);
        if messages.is_empty() {
            timeout(WRITE_PATIENCE, writer.flush()).await??;
        }
    }
    timeout(WRITE_PATIENCE, writer.shutdown()).await?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::FRAME_MAX;

    fn run<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn frames_survive_a_stream() {
        run(async {
            let (near, mut far) = tokio::io::duplex(16);
            let (outbox, _closed) = Outbox::new(near);
            for length in [0, 1, 100] {
                outbox.send(Bytes::from(vec![7; length]));
            }
            for length in [0, 1, 100] {
                assert_eq!(read_frame(&mut far, 100).await.unwrap(), vec![7; length]);
            }
            drop(outbox);
            assert!(matches!(
                read_frame(&mut far, 100).await,
                Err(FrameError::Closed)
            ));
        });
    }

    #[test]
    fn long_and_cut_frames_are_errors() {
        run(async {
            let mut long = &[0xff, 0xff, 0xff, 0xff, 0][..];
            assert!(matches!(
                read_frame(&mut long, 100).await,
                Err(FrameError::TooLong { .. })
            ));
            let mut cut = &[0, 0, 0, 5, 1, 2][..];
            assert!(matches!(
                read_frame(&mut cut, 100).await,
                Err(FrameError::Closed)
            ));
        });
    }

    #[test]
    fn a_reader_that_does_not_read_is_let_go_and_nothing_of_it_stays() {
        run(async {
            let (near, _far) = tokio::io::duplex(16);
            let all = Backlog::default();
            let (outbox, closed) = Outbox::counted(near, all.clone(), ());
            let message = Bytes::from(vec![0; FRAME_MAX]);
            assert!(!outbox.is_behind());
            for _ in 0..=OUTBOX_MAX / FRAME_MAX {
                outbox.send(message.clone());
            }
            assert!(outbox.is_behind());
            assert!(all.bytes() <= OUTBOX_MAX, "{}", all.bytes());
            closed.notified().await;
            drop((outbox, _far));
            while all.bytes() > 0 {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn where_all_are_slow_even_a_little_is_too_much() {
        run(async {
            let all = Backlog::default();
            let open = |place| {
                let (near, far) = tokio::io::duplex(16);
                (Outbox::counted(near, all.clone(), place).0, far)
            };
            let slow: Vec<_> = (0..3).map(&open).collect();
            let message = Bytes::from(vec![0; OUTBOX_MAX - 2 * MESSAGE_OVERHEAD]);
            for (outbox, _) in &slow {
                outbox.send(message.clone());
            }
            let (outbox, _far) = open(3);
            assert!(!outbox.is_behind(), "who reads all misses nothing");
            outbox.send(Bytes::from_static(b"news"));
            assert!(outbox.is_behind());
            drop(slow);
        });
    }
}
