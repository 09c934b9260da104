//! The error queues of the send sockets: who refused what for its size, and what would pass.
//!
//! An ICMP error lands in the queue of the socket that sent what it quotes (`IP_RECVERR`), and so does the kernel's own refusal. A thread
//! sleeps until there is one; a worker whose send fails reads the queue at once, because its next decision depends on it.
//! Errors of other kinds are thrown away: the tables say who is where, not ICMP.
#![allow(unsafe_code)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use socket2::Socket;

use super::SendSockets;
use super::receive::{SOCKADDR_LEN, socket_address};
use crate::paths::{PathListener, PathReport};

/// Errors taken from one queue at once, so that a storm of ICMP can't hold a worker.
const BATCH: usize = 64;
/// How often the thread looks, at most: a storm costs it a small share of a core.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes kept of what an error quotes. RFC 1812 §4.3.2.3 has routers send 576 bytes in all; what tells lies in the first 40.
const QUOTED_MAX: usize = 576;

/// Room for a `cmsghdr`, a `sock_extended_err` and the address of who sent the error: `CMSG_SPACE(16 + 28)` = 64.
type Control = [u64; 16];

/// Empties the error queue, and tells the listener of each report about a size.
pub(super) fn drain(socket: &Socket, listener: &dyn PathListener) {
    for _ in 0..BATCH {
        let mut quoted = [0; QUOTED_MAX];
        match take(socket, &mut quoted) {
            Ok(Some(report)) => listener.told(&report, Instant::now()),
            Ok(None) => {}
            Err(_) => break,
        }
    }
}

/// Takes one error from the queue; `None` when it is not about a size.
fn take<'q>(
    socket: &Socket,
    quoted: &'q mut [u8; QUOTED_MAX],
) -> io::Result<Option<PathReport<'q>>> {
    let mut name = MaybeUninit::<libc::sockaddr_storage>::uninit();
    let mut control = MaybeUninit::<Control>::uninit();
    let mut space = libc::iovec {
        iov_base: quoted.as_mut_ptr().cast(),
        iov_len: quoted.len(),
    };
    // SAFETY: zero is a valid value for each field of this plain C struct; libc gives no other constructor for `msghdr`, which
    // has private padding on some targets.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut space;
    header.msg_iovlen = 1;
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = SOCKADDR_LEN;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>();
    // SAFETY: the header points to a buffer, a name and a control area that live until the end of this function, each with its
    // true length; the kernel writes only inside those. socket2 has no call that gives control messages, and rustix none that
    // knows this one.
    let result = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
        )
    };
    let length = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `header` was filled by the kernel just now, and its control area is still alive.
    let Some(error) = (unsafe { extended_error(&header) }) else {
        return Ok(None);
    };
    let local = error.ee_origin == libc::SO_EE_ORIGIN_LOCAL;
    let icmp = matches!(
        error.ee_origin,
        libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6
    );
    let about_size = i32::try_from(error.ee_errno) == Ok(libc::EMSGSIZE);
    if !about_size || !(local || icmp) {
        return Ok(None);
    }
    Ok(Some(PathReport {
        // SAFETY: the kernel has written `msg_namelen` bytes of the address that the datagram was sent to.
        to: unsafe { socket_address(name.as_ptr(), header.msg_namelen) },
        mtu: error.ee_info,
        local,
        quoted: &quoted[..length.min(QUOTED_MAX)],
    }))
}

/// The error that came with a message of the queue.
///
/// # Safety
/// `header` was filled by a successful `recvmsg`, and its control area is alive.
unsafe fn extended_error(header: &libc::msghdr) -> Option<libc::sock_extended_err> {
    // SAFETY: the kernel wrote a well-formed control area of `msg_controllen` bytes; CMSG_FIRSTHDR and CMSG_NXTHDR stay inside
    // it, and `cmsg_len` covers the data that is read. No safe iterator for it exists in our dependencies.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(cmsg) = next.as_ref() {
            let kind = (cmsg.cmsg_level, cmsg.cmsg_type);
            let error = matches!(
                kind,
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            );
            let needed = size_of::<libc::cmsghdr>() + size_of::<libc::sock_extended_err>();
            if error && cmsg.cmsg_len >= needed {
                let data = libc::CMSG_DATA(cmsg).cast::<libc::sock_extended_err>();
                return Some(data.read_unaligned());
            }
            next = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    None
}

/// A thread that reads the error queues as soon as something is in one. Dropping it ends the thread.
pub struct ErrorWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    sockets: Arc<SendSockets>,
    wake: OwnedFd,
    stop: AtomicBool,
}

impl ErrorWatch {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the kernel says to a new thread or eventfd.
    pub fn spawn(sockets: Arc<SendSockets>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            sockets,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("vtep-errors".to_owned())
            .spawn(move || theirs.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has the thread watch sockets that have been opened since.
    pub fn refresh(&self) {
        // It fails only at a count that nobody reaches.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for ErrorWatch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.refresh();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the thread that reads ICMP errors panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "can't wait for ICMP errors any more: paths are probed only");
                return;
            }
        }
    }

    /// Sleeps until an error is in a queue or [`ErrorWatch::refresh`] is called, and empties the queues.
    fn wait(&self) -> io::Result<()> {
        let sockets: Vec<_> = self.sockets.iter().collect();
        // No flag asks for errors: poll(2) always tells of them.
        let mut polled: Vec<_> = sockets
            .iter()
            .map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty()))
            .chain([PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)])
            .collect();
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for (socket, polled) in sockets.iter().zip(&polled) {
            if polled.revents().contains(PollFlags::ERR) {
                drain(socket, self.sockets.listener());
                // An error that is pending without standing in the queue would be told for ever; reading it clears it.
                let _ = socket.take_error();
            }
        }
        if polled.last().is_some_and(|wake| !wake.revents().is_empty()) {
            // EAGAIN: reset already.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        } else {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::net::{SocketAddr, UdpSocket};
    use std::sync::Mutex;

    use super::*;
    use crate::edge::{Datagram, OuterFields};
    use crate::udp::Batching;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(SocketAddr, u32, bool)>>);

    impl PathListener for Heard {
        fn told(&self, report: &PathReport<'_>, _: Instant) {
            let mut heard = self.0.lock().unwrap();
            heard.push((report.to, report.mtu, report.local));
        }
    }

    #[test]
    fn the_kernels_refusal_says_what_would_pass() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let receiver = UdpSocket::bind(local).unwrap();
            let to = receiver.local_addr().unwrap();
            let heard = Arc::new(Heard::default());
            let sockets =
                SendSockets::open(to.ip(), Batching::Full, Arc::clone(&heard) as _).unwrap();
            // One byte more than loopback's MTU of 65,536 with IPv6's headers; what IPv4 can't say at all is refused earlier.
            let bytes = vec![0; 65_536];
            let slices = [IoSlice::new(
                &bytes[..if to.is_ipv4() { 65_000 } else { 65_489 }],
            )];
            let report = sockets.send(&[Datagram {
                to,
                flow: 0,
                outer: OuterFields::default(),
                segment_size: None,
                slices: &slices,
            }]);
            if to.is_ipv4() {
                assert_eq!((report.sent, heard.0.lock().unwrap().len()), (1, 0));
            } else {
                assert_eq!(report.too_big, 1);
                let heard = heard.0.lock().unwrap();
                assert_eq!(heard[0], (to, 65_536, true));
            }
        }
    }

    #[test]
    fn other_errors_are_thrown_away_and_the_thread_ends() {
        let closed = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let heard = Arc::new(Heard::default());
        let sockets =
            SendSockets::open(closed.ip(), Batching::Full, Arc::clone(&heard) as _).unwrap();
        let sockets = Arc::new(sockets);
        let watch = ErrorWatch::spawn(Arc::clone(&sockets)).unwrap();
        let slices = [IoSlice::new(b"x")];
        for _ in 0..10 {
            let report = sockets.send(&[Datagram {
                to: closed,
                flow: 0,
                outer: OuterFields::default(),
                segment_size: None,
                slices: &slices,
            }]);
            // "Port unreachable" of an earlier one stops none.
            assert_eq!(report.sent, 1);
        }
        drop(watch);
        assert!(heard.0.lock().unwrap().is_empty());
        assert_eq!(Arc::strong_count(&sockets), 1);
    }
}
