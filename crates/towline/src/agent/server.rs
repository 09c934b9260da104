//! The API socket: JSON lines over a Unix socket that only root may use. A capture's answer goes on as a stream.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;

use super::Agent;
use super::dispatch::{self, Answer};
use super::state::make_dir;
use crate::api::{Reply, Request, Response};

/// A request is a few hundred bytes; a command line inside it may be long.
const MAX_REQUEST: u64 = 1 << 20;
const MAX_CLIENTS: usize = 256;
/// A client that stops reading its answer does not hold a thread for ever.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The socket's file; removed when dropped.
pub(super) struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Listens at `path`, which a dead agent may have left behind.
    ///
    /// # Errors
    /// When a living agent has it, or the file cannot be made.
    pub(super) fn bind(path: &Path) -> anyhow::Result<Self> {
        if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
            make_dir(dir)?;
        }
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    anyhow::bail!(
                        "another agent listens at {}: stop it, or give this one its own --socket and --state-dir",
                        path.display()
                    );
                }
                fs::remove_file(path)
                    .with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .with_context(|| format!("cannot listen at {}; give another path with --socket", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot protect {}", path.display()))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Serves clients on threads of its own, until the process ends.
    ///
    /// # Errors
    /// When the thread or a second handle on the socket cannot be made.
    pub(super) fn serve(&self, agent: &Arc<Agent>) -> anyhow::Result<()> {
        let listener = self
            .listener
            .try_clone()
            .context("cannot share the API socket")?;
        let agent = Arc::clone(agent);
        thread::Builder::new()
            .name("api".into())
            .spawn(move || accept(&listener, &agent))
            .context("cannot start a thread")?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already: nothing to do.
        let _ = fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, agent: &Arc<Agent>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!("cannot take a client: {error}");
                // Out of file descriptors, most likely: do not spin.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("turned a client away: {MAX_CLIENTS} are connected");
            continue;
        }
        let (agent, count) = (Arc::clone(agent), Slot(Arc::clone(&clients)));
        let spawned = thread::Builder::new()
            .name("api-client".into())
            .spawn(move || {
                let _count = count;
                if let Err(error) = converse(stream, &agent) {
                    tracing::debug!("a client went away: {error:#}");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!("cannot start a thread for a client: {error}");
        }
    }
}

/// One of the places for clients; given back when dropped, also by a panic.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(stream: UnixStream, agent: &Arc<Agent>) -> anyhow::Result<()> {
    // The file's mode says the same; this also holds where its folder was made by somebody else.
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    if !peer.uid.is_root() {
        return answer(
            &stream,
            &Reply::Error("only root may use this agent: run the command with sudo".into()),
        );
    }
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut reader = BufReader::new(&stream);
    loop {
        let mut line = Vec::new();
        if reader
            .by_ref()
            .take(MAX_REQUEST)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(());
        }
        let reply = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => match dispatch::handle(agent, request) {
                Ok(Answer::Once(response)) => Reply::Ok(response),
                Ok(Answer::Stream(running)) => {
                    answer(&stream, &Reply::Ok(Response::Capturing))?;
                    return running.stream(agent, &stream);
                }
                Err(error) => Reply::Error(one_line(&format!("{error:#}"))),
            },
            Err(error) => {
                let reason = format!(
                    "cannot understand the request: {error}; is the agent of another version?"
                );
                answer(&stream, &Reply::Error(one_line(&reason)))?;
                // What follows may be the rest of a torn line.
                return Ok(());
            }
        };
        answer(&stream, &reply)?;
    }
}

fn answer(mut stream: &UnixStream, reply: &Reply) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Errors of others' libraries may have several lines; ours to a person are one.
fn one_line(text: &str) -> String {
    text.split('\n')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.sock");
        // A process that was killed leaves the file, and nobody listens.
        drop(UnixListener::bind(&path).expect("bind"));
        assert!(path.exists());
        let first = Server::bind(&path).expect("replace");
        assert_eq!(
            fs::metadata(&path).expect("metadata").permissions().mode() & 0o777,
            0o600
        );
        let error = format!("{:#}", Server::bind(&path).err().expect("taken"));
        assert!(error.contains("another agent listens at"), "{error}");
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn messages_are_one_line() {
        assert_eq!(one_line("a\n  b\n"), "a; b");
    }
}
