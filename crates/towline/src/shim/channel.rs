//! The socket between the client that runs a container, its shim and the process that becomes its command:
//! JSON messages that carry file descriptors.
//!
//! A sequenced-packet Unix socket keeps messages apart and reports the end of the other side. It is handed to
//! a new process as its standard input, the one descriptor that survives an exec without unsafe code; the
//! command's own standard input travels over it (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest message in bytes.
const MAX_MESSAGE: usize = 16 * 1024;
/// Most descriptors in one message.
const MAX_FDS: usize = 3;

/// What the client tells its shim: start. With the command's standard input, output and error when it runs in
/// the foreground, with none when detached.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Whether the three descriptors came along.
    pub(crate) foreground: bool,
}

/// What became of a start, told by the shim to the client and by the child to the shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// The command runs.
    Started,
    /// It doesn't, and nothing of it remains.
    Failed {
        /// The exit code for the caller: 125, 126 or 127.
        code: u8,
        /// One line for a person.
        message: String,
    },
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Two ends.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// The end that this process was given as its standard input. The copy closes at an exec.
    pub(crate) fn from_stdin() -> io::Result<Self> {
        let channel = Self(io::stdin().as_fd().try_clone_to_owned()?);
        let kind = rustix::net::sockopt::socket_type(&channel.0).map_err(|_| {
            io::Error::other("standard input is no channel: this command is not for use by hand")
        })?;
        if kind != SocketType::SEQPACKET {
            return Err(io::Error::other(
                "standard input is no channel: this command is not for use by hand",
            ));
        }
        Ok(channel)
    }

    /// Sends a message with descriptors.
    pub(crate) fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for a message; nothing when the other side is closed.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                // The other side closed with our message unread.
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let fds = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::other(
                "a message was longer than its reader expects",
            ));
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let message = bytes
            .get(..received.bytes)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some((serde_json::from_slice(message)?, fds)))
    }
}

impl From<Channel> for std::process::Stdio {
    fn from(channel: Channel) -> Self {
        channel.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn messages_stay_apart_carry_descriptors_and_end() {
        let (one, other) = Channel::pair().expect("socket pairs exist");
        let (mut reader, writer) = io::pipe().expect("pipes exist");
        one.send(&Start { foreground: true }, &[writer.as_fd()])
            .expect("open");
        drop(writer);
        one.send(
            &Outcome::Failed {
                code: 127,
                message: "no such".into(),
            },
            &[],
        )
        .expect("open");
        drop(one);

        let (start, mut fds) = other.receive::<Start>().expect("sound").expect("sent");
        assert!(start.foreground);
        let mut writer = io::PipeWriter::from(fds.pop().expect("one descriptor came along"));
        writer.write_all(b"through").expect("open");
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        assert_eq!(text, "through");

        let (outcome, fds) = other.receive::<Outcome>().expect("sound").expect("sent");
        assert_eq!(
            outcome,
            Outcome::Failed {
                code: 127,
                message: "no such".into()
            }
        );
        assert!(fds.is_empty());
        assert!(
            other
                .receive::<Outcome>()
                .expect("an end is no error")
                .is_none()
        );
    }

    #[test]
    fn bytes_that_are_no_message_are_an_error() {
        let (one, other) = Channel::pair().expect("socket pairs exist");
        one.send(&"no such message", &[]).expect("open");
        assert!(other.receive::<Start>().is_err());
    }
}
