//! The socket to the kernel's packet filter and its connection table.
//!
//! `nftables` and `conntrack` say what can be asked. Each request waits for its answer. A socket belongs to the namespace
//! it was opened in and keeps that alive: open, commit, drop. Dropping one does not wait: see [`close`].

pub(crate) mod attributes;

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;

use netlink_sys::constants::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use crate::Netns;
use attributes::{Attributes, Message, messages};

/// `linux/netlink.h`: kinds and flags of messages.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(crate) const REQUEST: u16 = 0x001;
pub(crate) const ACK: u16 = 0x004;
pub(crate) const DUMP: u16 = 0x300;
/// The list changed while it was read.
const DUMP_INTERRUPTED: u16 = 0x010;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;
/// Flags of an error's answer: the request is not repeated in it; there are attributes behind.
const CAPPED: u16 = 0x100;
const HAS_ATTRIBUTES: u16 = 0x200;
/// The kernel's own words (`NLMSGERR_ATTR_MSG`).
const ERROR_TEXT: u16 = 1;
/// Room for one answer or one part of a list, in bytes; the kernel makes them of at most 32 KiB.
const BUFFER: usize = 1 << 16;
/// Room of the socket: a batch leaves in one datagram, and its answers come all at once.
const SOCKET_BUFFER: usize = 4 << 20;
/// How often a list is asked for again when it changed meanwhile.
const DUMP_TRIES: usize = 8;

/// Why the packet filter or the connection table could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    /// No socket.
    #[error("cannot open a netfilter socket in {namespace}: {cause}")]
    Open {
        /// The namespace it was to be opened in.
        namespace: String,
        /// Why not.
        cause: io::Error,
    },
    /// The kernel said no. Of a transaction, nothing was done.
    #[error("cannot {operation}: {cause}{}{}", said(detail), hint(cause))]
    Refused {
        /// What was asked: of a transaction, the part that the kernel named.
        operation: String,
        /// The kernel's answer.
        cause: io::Error,
        /// The kernel's own words, where it has some.
        detail: Option<String>,
    },
}

fn said(detail: &Option<String>) -> String {
    detail
        .as_ref()
        .map_or_else(String::new, |detail| format!(" ({detail})"))
}

fn hint(cause: &io::Error) -> &'static str {
    let code = |errno: rustix::io::Errno| errno.raw_os_error();
    match cause.raw_os_error() {
        Some(errno) if errno == code(rustix::io::Errno::PERM) => " (root is needed)",
        // nfnetlink answers so for a subsystem that is not there.
        Some(errno) if errno == code(rustix::io::Errno::INVAL) => {
            " (the kernel may lack nf_tables or conntrack: `modprobe nf_tables nf_conntrack_netlink`)"
        }
        _ => "",
    }
}

impl NetfilterError {
    /// The kernel's error number, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { cause, .. } | Self::Refused { cause, .. } => cause.raw_os_error(),
        }
    }

    /// Whether the thing asked for is not there.
    pub fn is_absent(&self) -> bool {
        self.errno() == Some(rustix::io::Errno::NOENT.raw_os_error())
    }

    /// Whether this kernel has no such thing.
    pub fn is_unsupported(&self) -> bool {
        self.errno() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error())
    }
}

/// A blocking netfilter socket of one namespace.
pub struct NetfilterSocket {
    /// There until the value is dropped.
    socket: Option<Socket>,
    sequence: u32,
}

impl Drop for NetfilterSocket {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            close(socket);
        }
    }
}

/// Closes a socket on a thread that does nothing else. The kernel frees what a transaction removed only after all its
/// processors have let go of it, and lets whoever closes a netfilter socket wait for that (`nft_rcv_nl_event`): some 15 ms,
/// where the transaction itself took 30 µs.
fn close(socket: Socket) {
    static CLOSER: OnceLock<Option<Sender<Socket>>> = OnceLock::new();
    let closer = CLOSER.get_or_init(|| {
        let (sender, sockets) = mpsc::channel();
        let closing = thread::Builder::new().name("netfilter-close".to_owned());
        let started = closing.spawn(move || sockets.into_iter().for_each(drop));
        started.is_ok().then_some(sender)
    });
    // Without that thread the socket is closed here, when it goes out of scope.
    if let Some(closer) = closer {
        let _ = closer.send(socket);
    }
}

/// An error's answer.
pub(crate) struct Refusal {
    pub(crate) sequence: u32,
    pub(crate) cause: io::Error,
    pub(crate) detail: Option<String>,
}

impl Refusal {
    pub(crate) fn of(self, operation: String) -> NetfilterError {
        NetfilterError::Refused {
            operation,
            cause: self.cause,
            detail: self.detail,
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Self {
        Self {
            sequence: 0,
            cause,
            detail: None,
        }
    }
}

impl NetfilterSocket {
    /// Opens a socket in `netns`, where it stays bound.
    ///
    /// # Errors
    /// When the namespace may not be entered, or files or threads have run out.
    pub fn open(netns: &Netns) -> Result<Self, NetfilterError> {
        let failed = |cause| NetfilterError::Open {
            namespace: netns.to_string(),
            cause,
        };
        netns
            .run(Self::open_here)
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(failed)
    }

    /// Opens a socket in the calling thread's namespace.
    fn open_here() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        let size = SOCKET_BUFFER;
        if rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, size).is_err() {
            rustix::net::sockopt::set_socket_send_buffer_size(&socket, size)?;
        }
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, size).is_err() {
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, size)?;
        }
        Ok(Self {
            socket: Some(socket),
            sequence: 0,
        })
    }

    /// `count` sequence numbers that no answer on the way may bear.
    pub(crate) fn sequences(&mut self, count: u32) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count);
        first
    }

    fn socket(&self) -> io::Result<&Socket> {
        self.socket
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.socket()?.send(bytes, 0)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::Error::other("the kernel took only a part of it"))
        }
    }

    /// Waits for one answer and hands each of its messages over, until `each` has what it wants.
    pub(crate) fn receive<T>(
        &self,
        buffer: &mut Vec<u8>,
        mut each: impl FnMut(Message<'_>) -> Option<T>,
    ) -> io::Result<T> {
        loop {
            buffer.clear();
            let length = match self.socket()?.recv(buffer, 0) {
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Some(done) = messages(bytes).find_map(&mut each) {
                return Ok(done);
            }
        }
    }

    /// One request that is acknowledged.
    pub(crate) fn request(&self, bytes: &[u8], sequence: u32) -> Result<(), Refusal> {
        self.send(bytes)?;
        let mut buffer = Vec::with_capacity(BUFFER);
        self.receive(&mut buffer, |message| {
            (message.sequence == sequence).then(|| answer(message))?
        })?
    }

    /// A list: each of its messages is handed over. A list that changed while it was read is asked for again, after `reset`.
    pub(crate) fn dump<T>(
        &mut self,
        request: impl Fn(u32) -> Vec<u8>,
        mut each: impl FnMut(Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Refusal> {
        let mut buffer = Vec::with_capacity(BUFFER);
        let mut tries = 0;
        loop {
            let sequence = self.sequences(1);
            self.send(&request(sequence))?;
            let mut list = Vec::new();
            let mut interrupted = false;
            let ended = self.receive(&mut buffer, |message| {
                if message.sequence != sequence {
                    return None;
                }
                interrupted |= message.flags & DUMP_INTERRUPTED != 0;
                match message.kind {
                    NLMSG_ERROR => answer(message),
                    NLMSG_DONE => Some(Ok(())),
                    _ => {
                        list.extend(each(message));
                        None
                    }
                }
            })?;
            tries += 1;
            match ended {
                // EINTR is what nf_tables answers when its generation changed between two parts.
                Err(refusal) if refusal.cause.kind() == io::ErrorKind::Interrupted => {}
                Err(refusal) => return Err(refusal),
                // What changes without end is as right as it can be after so many tries.
                Ok(()) if !interrupted || tries >= DUMP_TRIES => return Ok(list),
                Ok(()) => {}
            }
            if tries >= DUMP_TRIES {
                return Err(io::Error::from(io::ErrorKind::Interrupted).into());
            }
        }
    }
}

/// Reads an acknowledgement or an error: `error:i32`, the request's header, and attributes with the kernel's words.
/// `None` for any other message.
pub(crate) fn answer(message: Message<'_>) -> Option<Result<(), Refusal>> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    let code = message.payload.get(..4)?.try_into().ok()?;
    let errno = i32::from_ne_bytes(code);
    if errno == 0 {
        return Some(Ok(()));
    }
    let request = message.payload.get(4..8)?.try_into().ok()?;
    let behind = match message.flags & CAPPED {
        0 => usize::try_from(u32::from_ne_bytes(request))
            .ok()?
            .next_multiple_of(4),
        _ => Message::HEADER,
    };
    let detail = (message.flags & HAS_ATTRIBUTES != 0)
        .then(|| Attributes(message.payload.get(4 + behind..).unwrap_or_default()))
        .and_then(|attributes| attributes.text(ERROR_TEXT))
        .map(str::to_owned);
    Some(Err(Refusal {
        sequence: message.sequence,
        cause: io::Error::from_raw_os_error(errno.saturating_neg()),
        detail,
    }))
}
