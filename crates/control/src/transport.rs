//! Frames over a stream: a 32-bit length, then that many bytes of message.
//!
//! Everything here works on any stream of bytes: TLS will stand between this and TCP without a change here. Nothing is
//! allocated for a frame before its bytes arrive.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

/// The longest message.
pub(crate) const FRAME_MAX: usize = 1 << 20;
/// The longest message before its sender has shown its token.
pub(crate) const HELLO_MAX: usize = 4096;
/// Bytes waiting for one slow reader; above, its connection ends, and it comes back for a snapshot.
const QUEUE_MAX: usize = 64 << 20;
/// A write that makes no progress for this long ends the connection.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

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

/// Sends messages to one connection without ever waiting. Dropping the last clone closes the connection once what was sent
/// before is written.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    queue: mpsc::UnboundedSender<Bytes>,
    queued: Arc<AtomicUsize>,
    closed: Arc<Notify>,
}

impl Outbox {
    /// An outbox whose messages a task of its own writes; the notifier tells when the connection is to end.
    pub(crate) fn new<W: AsyncWrite + Unpin + Send + 'static>(writer: W) -> (Self, Arc<Notify>) {
        let (queue, messages) = mpsc::unbounded_channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let closed = Arc::new(Notify::new());
        let (task_queued, task_closed) = (Arc::clone(&queued), Arc::clone(&closed));
        tokio::spawn(async move {
            // Why a peer is gone is of no use here: its reader notices too.
            let _ = write_all(writer, messages, &task_queued).await;
            task_closed.notify_one();
        });
        (
            Self {
                queue,
                queued,
                closed: Arc::clone(&closed),
            },
            closed,
        )
    }

    /// Queues a message. Where the peer reads too slowly, the connection ends instead.
    pub(crate) fn send(&self, message: Bytes) {
        let length = message.len();
        if self
            .queued
            .fetch_add(length, Ordering::Relaxed)
            .saturating_add(length)
            > QUEUE_MAX
        {
            self.closed.notify_one();
            return;
        }
        // A writer that has ended has said so by `closed`.
        let _ = self.queue.send(message);
    }
}

async fn write_all<W: AsyncWrite + Unpin>(
    writer: W,
    mut messages: mpsc::UnboundedReceiver<Bytes>,
    queued: &AtomicUsize,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(32 * 1024, writer);
    while let Some(message) = messages.recv().await {
        timeout(WRITE_PATIENCE, write_frame(&mut writer, &message)).await??;
        queued.fetch_sub(message.len(), Ordering::Relaxed);
        if messages.is_empty() {
            timeout(WRITE_PATIENCE, writer.flush()).await??;
        }
    }
    timeout(WRITE_PATIENCE, writer.shutdown()).await?
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_reader_that_does_not_read_is_let_go() {
        run(async {
            let (near, _far) = tokio::io::duplex(16);
            let (outbox, closed) = Outbox::new(near);
            for _ in 0..QUEUE_MAX / FRAME_MAX + 1 {
                outbox.send(Bytes::from(vec![0; FRAME_MAX]));
            }
            closed.notified().await;
        });
    }
}
