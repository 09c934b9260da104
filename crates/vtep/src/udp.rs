//! The edge to other hosts: UDP sockets on the underlay.
//!
//! ```text
//! worker 0 ── receive socket ┐                         ┌ send socket 0  (port in 49152–65535)
//! worker 1 ── receive socket ┼ VTEP address, VXLAN port │ …
//! worker n ── receive socket ┘ SO_REUSEPORT             └ send socket 63, all shared by all workers
//! ```
//!
//! - Each worker reads its own socket; the kernel spreads senders' flows over them.
//! - A datagram leaves by the send socket its inner flow's hash names, so one flow keeps one source port
//!   whichever worker carries it (RFC 7348 §5), and switches on the way can spread flows.
//! - Don't-fragment is set on all of them (RFC 7348 §4.3): what the link doesn't carry is refused and counted, what a path doesn't
//!   carry is dropped there; nothing is ever cut.
//!
//! What this module does *not* do: look into a payload, or know networks.

#![allow(unsafe_code)]

mod errors;
mod holder;
mod message;
mod receive;
mod segmentation;
mod send;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::edge::{Datagram, SendReport, Underlay};
use crate::frame::DatagramBuf;
use crate::paths::PathListener;

pub use errors::ErrorWatch;
pub use holder::{PortHolder, find_holder};

pub use receive::ReceiveSocket;
pub use send::SendSockets;

/// Asked for as receive and send buffer of each socket: at a few hundred thousand packets a second this
/// rides out some ten milliseconds without the CPU.
const BUFFER_BYTES: usize = 8 << 20;

/// How much of the underlay's work one system call does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Batching {
    /// As much as the kernel knows how: many messages, each cut to many datagrams (`UDP_SEGMENT`) or merged from them (`UDP_GRO`).
    #[default]
    Full,
    /// One datagram.
    Single,
}

/// One worker's sockets.
pub struct UdpUnderlay {
    receive: Arc<ReceiveSocket>,
    send: Arc<SendSockets>,
}

impl UdpUnderlay {
    /// Makes the sockets of `workers` workers in the calling thread's network namespace: all receive on
    /// `vtep`, `port`, and share one set of send sockets. `listener` is told what is said about the paths that they send on.
    ///
    /// # Errors
    /// What the kernel says to one of the steps; `AddrInUse` when somebody has the port ([`find_holder`]
    /// says who), `AddrNotAvailable` when `vtep` is no address of this host.
    pub fn open(
        vtep: IpAddr,
        port: u16,
        workers: usize,
        batching: Batching,
        listener: Arc<dyn PathListener>,
    ) -> io::Result<Vec<Self>> {
        let send = Arc::new(SendSockets::open(vtep, batching, listener)?);
        Self::reopen(vtep, port, workers, &send)
    }

    /// As [`Self::open`], with send sockets that are there already: for another port of the same address.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn reopen(
        vtep: IpAddr,
        port: u16,
        workers: usize,
        send: &Arc<SendSockets>,
    ) -> io::Result<Vec<Self>> {
        let address = SocketAddr::new(vtep, port);
        let first = std::iter::once_with(|| ReceiveSocket::open(address, send.batching()));
        let others = (1..workers).map(|_| ReceiveSocket::open_another(address, send.batching()));
        first
            .chain(others)
            .map(|receive| {
                Ok(Self {
                    receive: Arc::new(receive?),
                    send: Arc::clone(send),
                })
            })
            .collect()
    }

    /// The socket that this worker receives on.
    #[must_use]
    pub const fn receive_socket(&self) -> &Arc<ReceiveSocket> {
        &self.receive
    }

    /// The sockets that all workers send by.
    #[must_use]
    pub fn send_sockets(&self) -> &Arc<SendSockets> {
        &self.send
    }
}

impl Underlay for UdpUnderlay {
    fn recv(&mut self, bufs: &mut [DatagramBuf]) -> io::Result<usize> {
        self.receive.recv(bufs)
    }

    fn send(&mut self, datagrams: &[Datagram<'_>]) -> io::Result<SendReport> {
        Ok(self.send.send(datagrams))
    }

    fn cuts_messages(&self) -> bool {
        self.send.segments_max() > 1
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        Some(self.receive.as_raw_fd())
    }
}

/// A non-blocking UDP socket bound to `address`, for this address family alone.
fn bind(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(shared)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

/// Sets an option that is a switch, and that neither socket2 nor rustix has.
fn switch_on(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>())
        .expect("invariant: an int has four bytes");
    // SAFETY: the kernel reads one int from our stack. No safe call sets an option of any number.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets DF on what the socket sends, and makes it refuse what the link doesn't carry.
///
/// `PROBE` and not `DO`: the kernel believes any ICMP error that names a source port of ours, and would refuse what the path carries
/// for ten minutes. Which errors are believed is [`crate::paths`]' to decide, and probes must be able to try a larger size.
fn forbid_fragments(socket: &Socket, vtep: IpAddr) -> io::Result<()> {
    use rustix::net::sockopt::{
        Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
    };
    match vtep {
        IpAddr::V4(_) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE)?,
        IpAddr::V6(_) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::PROBE)?,
    }
    Ok(())
}
