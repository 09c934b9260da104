//! The container's edge: TAP interfaces.
//!
//! A port's interface is a TAP made inside the container's network namespace; the queues are file
//! descriptors that the workers hold. Whoever calls [`create`] or [`open`] must already stand in that
//! namespace: `/dev/net/tun` binds to the namespace of the thread that opens it, and a queue keeps that
//! namespace alive until it is closed.
//!
//! Two backends stand behind the one [`Tap`] trait:
//!
//! | | [`Backend::Offload`] | [`Backend::Plain`] |
//! |---|---|---|
//! | made by | our own ioctls | the tun-tap crate |
//! | queues | one for each worker, or one that they share ([`Sharing`]) | one that they share |
//! | vnet header | yes: partial checksums and super-frames both ways | no |
//!
//! What this module does *not* do: addresses, link state, MAC and MTU (netlink's work), and any
//! decision about a frame.

mod control;
mod offload;
mod plain;

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::edge::{Refusal, SendReport, Tap, TapFeatures};

pub use control::TapControl;

/// Where the kernel makes TUN and TAP interfaces.
const DEVICE: &str = "/dev/net/tun";
/// Longest interface name, without the closing NUL (`IFNAMSIZ - 1`).
const NAME_MAX: usize = 15;

/// Which TAP implementation carries a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Multi-queue with a vnet header: checksums may stay partial, and frames 64 KiB large, between container and worker.
    #[default]
    Offload,
    /// One queue, whole frames with finished checksums: works wherever TAP works.
    Plain,
}

impl Backend {
    /// The word configuration and output use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Offload => "offload",
            Self::Plain => "plain",
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(word: &str) -> Result<Self, UnknownBackend> {
        match word {
            "offload" => Ok(Self::Offload),
            "plain" => Ok(Self::Plain),
            other => Err(UnknownBackend(other.to_owned())),
        }
    }
}

/// A word that names no backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown backend {0:?}: choose offload or plain")]
pub struct UnknownBackend(String);

/// Why a TAP could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no TUN/TAP driver, or its device node is not there.
    #[error(
        "no {DEVICE}: load the kernel module with `modprobe tun`, or give the container this device"
    )]
    NoDevice,
    /// Missing rights.
    #[error("not allowed to make interface {0}: CAP_NET_ADMIN is needed, run as root")]
    NotPermitted(String),
    /// The name does not fit an interface.
    #[error(
        "interface name {0:?} is not usable: it needs 1 to {NAME_MAX} bytes without '/', ':', '%' and spaces"
    )]
    BadName(String),
    /// The namespace already has an interface of that name.
    #[error("interface {0} already exists in this namespace: remove it first")]
    Exists(String),
    /// [`open`] found no such interface.
    #[error("interface {0} is not in this namespace any more")]
    Missing(String),
    /// Another process has the interface's queue.
    #[error("interface {0} is held by another process: stop the other agent first")]
    Busy(String),
    /// The interface is no TAP, or one of the other backend.
    #[error(
        "interface {ifname} can't be opened as a {backend} TAP: it was made another way, remove it and start again"
    )]
    Mismatch {
        /// The interface.
        ifname: String,
        /// The backend that was asked for.
        backend: Backend,
    },
    /// The kernel refused one step.
    #[error("can't {operation} interface {ifname}")]
    Io {
        /// The interface.
        ifname: String,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TapError {
    /// Sorts what the kernel says to opening the device or attaching a queue.
    fn from_open(ifname: &str, backend: Backend, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoDevice,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(ifname.to_owned()),
            Some(libc::EBUSY) => Self::Busy(ifname.to_owned()),
            Some(libc::EINVAL) => Self::Mismatch {
                ifname: ifname.to_owned(),
                backend,
            },
            _ => Self::Io {
                ifname: ifname.to_owned(),
                operation: "open",
                source,
            },
        }
    }
}

/// An interface that is open: what each worker gets, and what rules the interface itself.
pub struct OpenTap {
    /// One for each worker, in the workers' order. Only some may yield frames ([`Tap::as_raw_fd`] is
    /// `None` on the others), all of them deliver.
    pub queues: Vec<Box<dyn Tap>>,
    /// What may be left to whom, on every queue alike.
    pub features: TapFeatures,
    /// Persistence, independent of the name the interface has by now.
    pub control: TapControl,
}

/// Who gets a queue of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Workers, each of which delivers.
    pub workers: usize,
    /// The worker that reads where there is only one queue; counted from 0, past the last one from the first again.
    pub reader: usize,
    /// One queue for all, also where each could have its own.
    pub one_queue: bool,
}

impl Sharing {
    /// For each worker, whether it is the one that reads a shared queue.
    fn who_reads(self) -> impl Iterator<Item = bool> {
        let workers = self.workers.max(1);
        (0..workers).map(move |worker| worker == self.reader % workers)
    }
}

/// Makes a new TAP for the workers in the calling thread's namespace. It is not persistent yet:
/// dropping what is returned removes it.
///
/// # Errors
/// See [`TapError`]; nothing is left behind.
pub fn create(ifname: &str, backend: Backend, sharing: Sharing) -> Result<OpenTap, TapError> {
    check_name(ifname)?;
    check_device()?;
    if exists(ifname) {
        return Err(TapError::Exists(ifname.to_owned()));
    }
    attach(ifname, backend, sharing)
}

/// Opens a persistent TAP again by name, in the calling thread's namespace. Its addresses, routes, MAC,
/// MTU and link state stay as they are.
///
/// # Errors
/// See [`TapError`]; [`TapError::Missing`] when the interface is gone.
pub fn open(ifname: &str, backend: Backend, sharing: Sharing) -> Result<OpenTap, TapError> {
    check_name(ifname)?;
    check_device()?;
    // TUNSETIFF makes what it doesn't find, and there is no flag that forbids it.
    if !exists(ifname) {
        return Err(TapError::Missing(ifname.to_owned()));
    }
    attach(ifname, backend, sharing)
}

fn attach(ifname: &str, backend: Backend, sharing: Sharing) -> Result<OpenTap, TapError> {
    match backend {
        Backend::Offload => offload::attach(ifname, sharing),
        Backend::Plain => plain::attach(ifname, sharing),
    }
}

/// Whether TAPs can be made here at all: asked before anything on the host is changed.
///
/// # Errors
/// [`TapError::NoDevice`] without the device node, [`TapError::NotPermitted`] without the right to use it.
pub fn check_device() -> Result<(), TapError> {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(DEVICE))
    {
        Ok(_) => Ok(()),
        Err(error) => Err(TapError::from_open("(any)", Backend::Offload, error)),
    }
}

/// As the kernel's `dev_valid_name`, and `%`, which would make the kernel choose a number.
fn check_name(ifname: &str) -> Result<(), TapError> {
    let bad = ifname.is_empty()
        || ifname.len() > NAME_MAX
        || ifname == "."
        || ifname == ".."
        || ifname
            .bytes()
            .any(|byte| matches!(byte, b'/' | b':' | b'%' | 0) || byte.is_ascii_whitespace());
    if bad {
        Err(TapError::BadName(ifname.to_owned()))
    } else {
        Ok(())
    }
}

/// Whether the calling thread's namespace has an interface of this name.
fn exists(ifname: &str) -> bool {
    rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .is_ok_and(|socket| rustix::net::netdevice::name_to_index(&socket, ifname).is_ok())
}

/// What a failed read or write on a queue means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// Nothing there, or no room: not an error.
    WouldBlock,
    /// A signal came first: the same call again.
    Again,
    /// The interface is gone for good.
    Gone,
    /// This one frame was refused.
    Refused,
}

fn failure(error: &io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Failure::WouldBlock,
        Some(libc::EINTR) => Failure::Again,
        // tun_chr_read_iter and tun_chr_write_iter: no interface behind the queue any more. EFAULT: the
        // queue was shut down under a read.
        Some(libc::EBADFD | libc::EFAULT | libc::ENODEV) => Failure::Gone,
        _ => Failure::Refused,
    }
}

/// Hands over frame `index` of a batch by `write`, and writes into `report` what became of it.
///
/// # Errors
/// When the interface is gone: the rest of the batch has nowhere to go.
fn write_frame(
    report: &mut SendReport,
    index: usize,
    mut write: impl FnMut() -> io::Result<usize>,
) -> io::Result<()> {
    loop {
        match write() {
            Ok(_) => report.sent += 1,
            Err(error) => match failure(&error) {
                Failure::Again => continue,
                Failure::Gone => return Err(error),
                Failure::WouldBlock => report.refuse(index, 1, Refusal::Full),
                Failure::Refused => report.refuse(index, 1, Refusal::Failed),
            },
        }
        return Ok(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_words_round_trip() {
        for backend in [Backend::Offload, Backend::Plain] {
            assert_eq!(backend.name().parse(), Ok(backend));
        }
        let error = "fast".parse::<Backend>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown backend \"fast\": choose offload or plain"
        );
    }

    #[test]
    fn names_the_kernel_would_refuse_are_refused_first() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "eth%d",
            "e h0",
            "a:b",
            "sixteen-bytes-xx",
            "nul\0",
        ] {
            assert!(
                matches!(check_name(bad), Err(TapError::BadName(_))),
                "{bad:?}"
            );
        }
        for good in ["eth0", "fifteen-bytes-x"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn kernel_answers_are_sorted() {
        let open = |errno| {
            TapError::from_open("eth0", Backend::Plain, io::Error::from_raw_os_error(errno))
        };
        assert!(matches!(open(libc::ENOENT), TapError::NoDevice));
        assert!(matches!(open(libc::EPERM), TapError::NotPermitted(_)));
        assert!(matches!(open(libc::EBUSY), TapError::Busy(_)));
        assert!(matches!(open(libc::EINVAL), TapError::Mismatch { .. }));
        assert!(matches!(open(libc::EMFILE), TapError::Io { .. }));
        let kind = |errno| failure(&io::Error::from_raw_os_error(errno));
        assert_eq!(kind(libc::EAGAIN), Failure::WouldBlock);
        assert_eq!(kind(libc::EBADFD), Failure::Gone);
        assert_eq!(kind(libc::EIO), Failure::Refused);
    }
}
