//! Receiving: one socket a worker, many datagrams a system call, and in each buffer perhaps many datagrams of one sender
//! (`UDP_GRO`).
#![allow(unsafe_code)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};

use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::Socket;

use super::{BUFFER_BYTES, Batching, bind, forbid_fragments, switch_on};
use crate::frame::DatagramBuf;

/// Buffers filled by one `recvmmsg`.
const BATCH: usize = 64;

/// Room for the ancillary data of one datagram, aligned as a `cmsghdr`: traffic class and segment size are an int each at most,
/// `CMSG_SPACE(4)` = 24.
type Control = [u64; 8];

/// linux/udp.h; libc does not have it.
const UDP_NO_CHECK6_RX: libc::c_int = 102;

/// One worker's receive socket.
pub struct ReceiveSocket {
    socket: Socket,
    merges: bool,
    batching: Batching,
}

impl ReceiveSocket {
    /// Binds the first socket on `address`; `AddrInUse` when anybody has it.
    ///
    /// It is bound plainly and shared afterwards: with `SO_REUSEPORT` from the start a second program that sets it, too,
    /// would share the port in silence. A plain bind of another socket before this one would leave a gap, and a process that
    /// is just being started holds a copy of what is closed here until it runs its program.
    pub(super) fn open(address: SocketAddr, batching: Batching) -> io::Result<Self> {
        let socket = bind(address, false)?;
        socket.set_reuse_port(true)?;
        Self::prepare(socket, address, batching)
    }

    /// Binds a further socket that shares the first one's address.
    pub(super) fn open_another(address: SocketAddr, batching: Batching) -> io::Result<Self> {
        Self::prepare(bind(address, true)?, address, batching)
    }

    fn prepare(socket: Socket, address: SocketAddr, batching: Batching) -> io::Result<Self> {
        // The forced size needs CAP_NET_ADMIN; without it the kernel's limit (net.core.rmem_max) rules.
        if set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
            socket.set_recv_buffer_size(BUFFER_BYTES)?;
        }
        match address {
            SocketAddr::V4(_) => socket.set_recv_tos_v4(true)?,
            SocketAddr::V6(_) => socket.set_recv_tclass_v6(true)?,
        }
        forbid_fragments(&socket, address.ip())?;
        // Linux 5.0; without it each buffer holds one datagram.
        let merges = batching == Batching::Full && merge_datagrams(&socket).is_ok();
        Ok(Self {
            socket,
            merges,
            batching,
        })
    }

    /// Whether the kernel puts several datagrams into one buffer (`UDP_GRO`).
    #[must_use]
    pub const fn merges(&self) -> bool {
        self.merges
    }

    /// The receive buffer the kernel granted, in bytes.
    #[must_use]
    pub fn buffer(&self) -> usize {
        self.socket.recv_buffer_size().unwrap_or(0)
    }

    /// Takes datagrams with a zero checksum from now on (RFC 6935 §5). Over IPv4 every socket does.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn accept_unsummed(&self) -> io::Result<()> {
        let own = self.socket.local_addr()?.as_socket();
        if own.is_none_or(|own| own.is_ipv4()) {
            return Ok(());
        }
        switch_on(&self.socket, libc::SOL_UDP, UDP_NO_CHECK6_RX)
    }

    /// Takes what waits, up to [`BATCH`] datagrams; 0 when nothing does.
    pub(super) fn recv(&self, bufs: &mut [DatagramBuf]) -> io::Result<usize> {
        match self.batching {
            Batching::Full => self.recv_batch(bufs),
            Batching::Single => {
                let mut count = 0;
                // An error is one of the next call's, too, if it stays.
                while let Some(buf) = bufs.get_mut(count..=count)
                    && (self.recv_batch(buf).or_else(
                        |error| {
                            if count > 0 { Ok(0) } else { Err(error) }
                        },
                    )? > 0)
                {
                    count += 1;
                }
                Ok(count)
            }
        }
    }

    /// The same by one system call.
    fn recv_batch(&self, bufs: &mut [DatagramBuf]) -> io::Result<usize> {
        let wanted = bufs.len().min(BATCH);
        if wanted == 0 {
            return Ok(0);
        }
        // SAFETY: zero is a valid value for each field of these plain C structs; libc gives no other constructor
        // for `msghdr`, which has private padding on some targets.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let mut names = [MaybeUninit::<libc::sockaddr_storage>::uninit(); BATCH];
        let mut controls = [MaybeUninit::<Control>::uninit(); BATCH];
        let mut spaces = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; BATCH];
        for (index, buf) in bufs.iter_mut().take(BATCH).enumerate() {
            let space = buf.space();
            spaces[index] = libc::iovec {
                iov_base: space.as_mut_ptr().cast(),
                iov_len: space.len(),
            };
            let header = &mut messages[index].msg_hdr;
            header.msg_iov = &raw mut spaces[index];
            header.msg_iovlen = 1;
            header.msg_name = names[index].as_mut_ptr().cast();
            header.msg_namelen = SOCKADDR_LEN;
            header.msg_control = controls[index].as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>();
        }
        let count = loop {
            // SAFETY: the first `wanted` headers point to buffers, names and control areas that live until the end of
            // this function, each with its true length; the kernel writes only inside those. std and socket2 have no
            // call that takes many datagrams at once, and rustix none either.
            let result = unsafe {
                libc::recvmmsg(
                    self.socket.as_raw_fd(),
                    messages.as_mut_ptr(),
                    u32::try_from(wanted).expect("invariant: wanted is at most 64"),
                    // glibc and musl disagree on the sign of this parameter.
                    libc::MSG_DONTWAIT as _,
                    std::ptr::null_mut(),
                )
            };
            match usize::try_from(result) {
                Ok(count) => break count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                    // An earlier ICMP error, reported late: about a datagram, not about the socket. The next call goes on.
                    error if is_icmp(&error) => return Ok(0),
                    error => return Err(error),
                },
            }
        };
        for (index, buf) in bufs.iter_mut().take(count).enumerate() {
            let header = &messages[index].msg_hdr;
            let length = usize::try_from(messages[index].msg_len).unwrap_or(0);
            // SAFETY: the kernel has written `msg_namelen` bytes of this message's address, of a family that
            // `socket_address` asks first; std has no parser for a raw socket address.
            let from = unsafe { socket_address(names[index].as_ptr(), header.msg_namelen) };
            // MSG_TRUNC can't happen while the buffer holds the largest UDP payload; if it did, the rest would be lost, so
            // nothing is left of it. An empty payload is dropped and counted: it has no I flag.
            let whole = header.msg_flags & libc::MSG_TRUNC == 0;
            buf.set_payload(if whole { length } else { 0 }, from);
            // SAFETY: `header` was filled by the kernel just now, and its control area is still alive.
            let (class, segment_size) = unsafe { ancillary(header) };
            buf.class = class;
            buf.segment_size = segment_size;
        }
        Ok(count)
    }
}

impl std::os::fd::AsFd for ReceiveSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for ReceiveSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// `sizeof(struct sockaddr_storage)`.
#[allow(clippy::cast_possible_truncation)] // 128
pub(super) const SOCKADDR_LEN: libc::socklen_t =
    size_of::<libc::sockaddr_storage>() as libc::socklen_t;

/// Errors that the kernel reports on a socket because of an ICMP message.
pub(super) fn is_icmp(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::ENOPROTOOPT
                | libc::EPROTO
                | libc::EACCES
                | libc::ENONET
        )
    )
}

/// Reads a socket address that the kernel wrote; `0.0.0.0:0` for a family that is not IP.
///
/// # Safety
/// `name` points to at least `length` initialised bytes and room for a `sockaddr_storage`.
pub(super) unsafe fn socket_address(
    name: *const libc::sockaddr_storage,
    length: libc::socklen_t,
) -> SocketAddr {
    let length = usize::try_from(length).unwrap_or(0);
    if length >= size_of::<libc::sockaddr_in>() {
        // SAFETY: the caller vouches for `length` bytes, which cover the family and a `sockaddr_in`.
        let v4 = unsafe { name.cast::<libc::sockaddr_in>().read() };
        match i32::from(v4.sin_family) {
            libc::AF_INET => {
                let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
                return SocketAddr::new(IpAddr::V4(ip), u16::from_be(v4.sin_port));
            }
            libc::AF_INET6 if length >= size_of::<libc::sockaddr_in6>() => {
                // SAFETY: as above, now for a whole `sockaddr_in6`.
                let v6 = unsafe { name.cast::<libc::sockaddr_in6>().read() };
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                return SocketAddr::V6(SocketAddrV6::new(
                    ip,
                    u16::from_be(v6.sin6_port),
                    0,
                    v6.sin6_scope_id,
                ));
            }
            _ => {}
        }
    }
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
}

/// The outer TOS or traffic class that came with a datagram, 0 when none did; and the size of each datagram, when several
/// lie in one buffer.
///
/// # Safety
/// `header` was filled by a successful `recvmsg` or `recvmmsg`, and its control area is alive.
unsafe fn ancillary(header: &libc::msghdr) -> (u8, Option<u16>) {
    let (mut class, mut segment_size) = (0, None);
    // SAFETY: the kernel wrote a well-formed control area of `msg_controllen` bytes; CMSG_FIRSTHDR and CMSG_NXTHDR
    // stay inside it. No safe iterator for it exists in our dependencies that doesn't own the system call.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(cmsg) = next.as_ref() {
            let int = || libc::CMSG_DATA(cmsg).cast::<libc::c_int>().read_unaligned();
            match (cmsg.cmsg_level, cmsg.cmsg_type) {
                // ip(7): one byte.
                (libc::IPPROTO_IP, libc::IP_TOS) => class = libc::CMSG_DATA(cmsg).read(),
                // ipv6(7): an int, 0 to 255.
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => class = u8::try_from(int()).unwrap_or(0),
                // udp_cmsg_recv: an int.
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    segment_size = u16::try_from(int()).ok().filter(|size| *size > 0);
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    (class, segment_size)
}

/// Has the kernel merge datagrams of one sender and one size.
fn merge_datagrams(socket: &Socket) -> io::Result<()> {
    switch_on(socket, libc::SOL_UDP, libc::UDP_GRO)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Waits until a datagram lies in the socket, then takes it.
    fn recv_one(socket: &ReceiveSocket, bufs: &mut [DatagramBuf]) -> usize {
        let mut poll = [rustix::event::PollFd::new(
            &socket.socket,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut poll, None).unwrap();
        socket.recv(bufs).unwrap()
    }

    #[test]
    fn datagrams_come_with_sender_and_traffic_class() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let socket = ReceiveSocket::open(local.parse().unwrap(), Batching::Full).unwrap();
            let to = socket.socket.local_addr().unwrap().as_socket().unwrap();
            let sender = UdpSocket::bind(local).unwrap();
            let options = socket2::SockRef::from(&sender);
            if to.is_ipv4() {
                options.set_tos_v4(0b1011_1011)
            } else {
                options.set_tclass_v6(0b1011_1011)
            }
            .unwrap();
            let mut bufs = [DatagramBuf::new(), DatagramBuf::new()];
            assert_eq!(socket.recv(&mut bufs).unwrap(), 0);
            sender.send_to(b"hello", to).unwrap();
            assert_eq!(recv_one(&socket, &mut bufs), 1);
            assert_eq!(bufs[0].payload(), b"hello");
            assert_eq!(bufs[0].from, sender.local_addr().unwrap());
            assert_eq!(bufs[0].class, 0b1011_1011);
        }
    }

    #[test]
    fn the_first_socket_takes_the_port_and_shares_it_with_the_others() {
        let first = ReceiveSocket::open("127.0.0.1:0".parse().unwrap(), Batching::Full).unwrap();
        let address = first.socket.local_addr().unwrap().as_socket().unwrap();
        let second = ReceiveSocket::open_another(address, Batching::Full).unwrap();
        let taken = ReceiveSocket::open(address, Batching::Full).err().unwrap();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        // The kernel spreads flows over both, also over the one that was not shared when it was bound.
        let senders: Vec<_> = (0..64)
            .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
            .collect();
        for sender in &senders {
            sender.send_to(b"x", address).unwrap();
        }
        // A datagram over the loopback has arrived when its sending returns.
        let mut bufs: Vec<_> = std::iter::repeat_with(DatagramBuf::new).take(64).collect();
        let (one, other) = (
            first.recv(&mut bufs).unwrap(),
            second.recv(&mut bufs).unwrap(),
        );
        assert!(one > 0 && other > 0, "{one} and {other}");
        assert_eq!(one + other, senders.len());
    }

    #[test]
    fn the_largest_datagram_fits() {
        let socket = ReceiveSocket::open("127.0.0.1:0".parse().unwrap(), Batching::Full).unwrap();
        let to = socket.socket.local_addr().unwrap().as_socket().unwrap();
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .send_to(&vec![7; 65_507], to)
            .unwrap();
        let mut bufs = [DatagramBuf::new()];
        assert_eq!(recv_one(&socket, &mut bufs), 1);
        assert_eq!(bufs[0].payload().len(), 65_507);
    }
}
