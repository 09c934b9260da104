//! Asks the agent: one request, one answer, over its Unix socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::api::{Reply, Request, Response};

/// A connection to the agent of this host.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
}

/// Why the agent could not be asked, or what it refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nothing listens on the socket.
    #[error(
        "no agent answers at {}: start it with 'towline agent' as root, \
         or name its socket with --socket or TOWLINE_SOCKET", .0.display()
    )]
    NoAgent(PathBuf),
    /// The socket is root's.
    #[error("not allowed to use {}: run this command as root (sudo)", .0.display())]
    NotAllowed(PathBuf),
    /// The connection broke or carried something else than an answer.
    #[error("the agent at {} did not answer: {cause}; its log says why", .socket.display())]
    Broken {
        /// Where the agent listens.
        socket: PathBuf,
        /// What went wrong.
        cause: String,
    },
    /// The agent answered with an error; this is its text.
    #[error("{0}")]
    Refused(String),
}

impl Client {
    /// Connects to the agent that listens at `socket`.
    ///
    /// # Errors
    /// When no agent listens there or the caller may not use the socket.
    pub(crate) fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                ClientError::NoAgent(socket.to_owned())
            }
            ErrorKind::PermissionDenied => ClientError::NotAllowed(socket.to_owned()),
            _ => ClientError::Broken {
                socket: socket.to_owned(),
                cause: error.to_string(),
            },
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
            socket: socket.to_owned(),
        })
    }

    /// Sends `request` and waits for the answer, however long it takes: the agent
    /// bounds its own waits.
    ///
    /// # Errors
    /// [`ClientError::Refused`] carries the agent's own message.
    pub(crate) fn request(&mut self, request: &Request) -> Result<Response, ClientError> {
        match self.exchange(request) {
            Ok(Reply::Ok(response)) => Ok(response),
            Ok(Reply::Error(message)) => Err(ClientError::Refused(message)),
            Err(error) => Err(ClientError::Broken {
                socket: self.socket.clone(),
                cause: error.to_string(),
            }),
        }
    }

    /// The connection, for what follows an answer.
    pub(crate) fn into_stream(self) -> BufReader<UnixStream> {
        self.stream
    }

    fn exchange(&mut self, request: &Request) -> std::io::Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&answer)?)
    }
}
