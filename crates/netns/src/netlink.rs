//! The socket: one request at a time, answered before the call returns.
//!
//! `links.rs`, `addresses.rs`, `routes.rs` and `neighbors.rs` say what can be asked.

use std::io;

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::runtime::{Builder, Runtime};

use crate::Netns;

/// Why a netlink request failed. The text names the operation, the interface and the kernel's reason.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket in {namespace}: {cause}")]
    Open {
        /// The namespace it was to be opened in.
        namespace: String,
        /// Why not.
        cause: io::Error,
    },
    /// The kernel said no.
    #[error("cannot {operation}: {cause}{}", hint(cause))]
    Refused {
        /// What was asked.
        operation: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// An interface that the request names is not there.
    #[error("cannot {operation}: there is no interface {name} (`ip link` lists those that exist)")]
    NoInterface {
        /// What was asked.
        operation: String,
        /// The interface.
        name: String,
    },
}

/// What to do about the commonest refusal. (EACCES is another: IPv6 switched off on the interface.)
fn hint(cause: &io::Error) -> &'static str {
    let not_permitted = rustix::io::Errno::PERM.raw_os_error();
    if cause.raw_os_error() == Some(not_permitted) {
        " (root is needed)"
    } else {
        ""
    }
}

impl NetlinkError {
    /// The kernel's error number, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { cause, .. } | Self::Refused { cause, .. } => cause.raw_os_error(),
            Self::NoInterface { .. } => Some(rustix::io::Errno::NODEV.raw_os_error()),
        }
    }

    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.errno() == Some(errno.raw_os_error())
    }
}

/// A blocking rtnetlink socket of one namespace. Threads may share it; their requests do not mix.
///
/// It brings a small runtime of its own, so it must be neither used nor dropped inside async code. Its socket keeps the
/// namespace alive: drop it when the work is done.
pub struct Netlink {
    // The order of the fields is the order of their end: the handle's before the runtime that drives the socket.
    handle: rtnetlink::Handle,
    runtime: Runtime,
    netns: Netns,
}

impl Netlink {
    /// Opens a socket in `netns`, where it stays bound.
    ///
    /// # Errors
    /// When the namespace may not be entered, or files or threads have run out.
    pub fn open(netns: &Netns) -> Result<Self, NetlinkError> {
        let failed = |cause| NetlinkError::Open {
            namespace: netns.to_string(),
            cause,
        };
        let runtime = Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(failed)?;
        let opened = netns.run(|| {
            let _inside = runtime.enter();
            rtnetlink::new_connection()
        });
        let (connection, handle, _) = opened
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(failed)?;
        runtime.spawn(connection);
        Ok(Self {
            handle,
            runtime,
            netns: netns.clone(),
        })
    }

    /// The namespace the socket is bound to.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A change: sends it with `flags` besides REQUEST and ACK, and waits for the kernel's acknowledgement.
    pub(crate) fn change(
        &self,
        operation: impl Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.request(operation, message, NLM_F_REQUEST | NLM_F_ACK | flags)
            .map(drop)
    }

    /// A question with many answers.
    pub(crate) fn dump(
        &self,
        operation: impl Fn() -> String,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.request(operation, message, NLM_F_REQUEST | NLM_F_DUMP)
    }

    /// Sends one message and gathers what comes back for it.
    pub(crate) fn request(
        &self,
        operation: impl Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let refused = |cause| NetlinkError::Refused {
            operation: operation(),
            cause,
        };
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        self.runtime.block_on(async {
            let mut handle = self.handle.clone();
            let mut answers = handle
                .request(request)
                .map_err(|error| refused(io::Error::other(error.to_string())))?;
            let mut messages = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => messages.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(refused(error.to_io()));
                    }
                    _ => {}
                }
            }
            Ok(messages)
        })
    }
}
