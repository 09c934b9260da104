//! Where a command's output goes: to the log, and in the foreground to the client's terminal too.
//!
//! Detached, the log file itself is the command's standard output: nothing is copied. In the foreground two
//! pipes are read, one thread each; a reader that goes away ends its copy and never the command.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Stdios;
use super::folder::Folder;

/// Bytes copied at a time.
const CHUNK: usize = 64 * 1024;

/// The copying threads, if any.
#[derive(Debug)]
pub(crate) struct Output {
    copies: Vec<Copy>,
}

#[derive(Debug)]
struct Copy {
    thread: JoinHandle<()>,
    done: Receiver<()>,
}

impl Output {
    /// Makes the command's three descriptors; `fds` are the client's, when in the foreground.
    pub(crate) fn new(
        folder: &Folder,
        foreground: bool,
        fds: Vec<OwnedFd>,
    ) -> io::Result<(Self, Stdios)> {
        let log = folder.open_log()?;
        if !foreground {
            let input = OwnedFd::from(File::open("/dev/null")?);
            let stdio = Stdios {
                input,
                output: Stdio::from(log.try_clone()?),
                error: Stdio::from(log),
            };
            return Ok((Self { copies: Vec::new() }, stdio));
        }
        let [input, output, error] = <[OwnedFd; 3]>::try_from(fds)
            .map_err(|_| io::Error::other("the client sent no standard input, output and error"))?;
        let (output_copy, output) = start_copy("stdout", File::from(output), log.try_clone()?)?;
        let (error_copy, error) = start_copy("stderr", File::from(error), log)?;
        Ok((
            Self {
                copies: vec![output_copy, error_copy],
            },
            Stdios {
                input,
                output,
                error,
            },
        ))
    }

    /// Waits until all is copied, at most `limit`.
    pub(crate) fn finish(self, limit: Duration) -> Self {
        let deadline = Instant::now() + limit;
        for copy in &self.copies {
            let left = deadline.saturating_duration_since(Instant::now());
            if copy.done.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        self
    }

    /// Waits until all is copied, however slow the reader.
    pub(crate) fn wait(self) {
        for copy in self.copies {
            // A copy that panicked has nothing more to write.
            let _ = copy.thread.join();
        }
    }
}

fn start_copy(name: &str, terminal: File, log: File) -> io::Result<(Copy, Stdio)> {
    let (reader, writer) = io::pipe()?;
    let (done, wait) = channel();
    let thread = std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            copy(reader, log, terminal);
            drop(done);
        })?;
    Ok((Copy { thread, done: wait }, Stdio::from(writer)))
}

/// Copies until the last writer has closed. The log comes first: it must not wait for a terminal.
fn copy(mut from: PipeReader, log: impl Write, terminal: impl Write) {
    let (mut log, mut terminal) = (Some(log), Some(terminal));
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        if log
            .as_mut()
            .is_some_and(|log| log.write_all(bytes).is_err())
        {
            log = None;
        }
        if terminal
            .as_mut()
            .is_some_and(|terminal| terminal.write_all(bytes).is_err())
        {
            terminal = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that went away.
    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_reader_that_went_away_does_not_silence_the_other() {
        for closed_is_log in [true, false] {
            let (reader, mut writer) = io::pipe().expect("pipes exist");
            let sender = std::thread::spawn(move || {
                for _ in 0..3 {
                    writer.write_all(&[b'x'; CHUNK]).expect("the copy reads on");
                }
            });
            let mut kept = Vec::new();
            if closed_is_log {
                copy(reader, Closed, &mut kept);
            } else {
                copy(reader, &mut kept, Closed);
            }
            sender.join().expect("it wrote everything");
            assert_eq!(kept.len(), 3 * CHUNK);
        }
    }
}
