//! One message for the kernel: a remote's address, control messages, and slices.
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::mem;
use std::net::SocketAddr;

use crate::edge::OuterFields;
use crate::settings::DEFAULT_TTL;

/// Room for a `cmsghdr` with an int twice, and one with a `u16`: `CMSG_SPACE(4)` twice + `CMSG_SPACE(2)`.
const CONTROL_LEN: usize = 3 * CONTROL_STEP;
/// What each of them takes: a header of 16 bytes, and up to 8 of data.
const CONTROL_STEP: usize = 24;

/// `msg_control` must be aligned as a `cmsghdr`.
#[repr(align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_LEN]);

/// A remote's address as the kernel reads it.
#[derive(Clone, Copy)]
union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// What one `mmsghdr` points to. Filled first, and not moved while [`Envelope::message`] is in use.
#[derive(Clone, Copy)]
pub(super) struct Envelope {
    name: Name,
    name_len: libc::socklen_t,
    control: Control,
    control_len: usize,
}

impl Envelope {
    /// To a remote, with these outer fields, cut to datagrams of `segment_size` bytes. The checksum is the socket's matter.
    pub(super) fn new(to: SocketAddr, outer: OuterFields, segment_size: Option<u16>) -> Self {
        let (name, name_len) = socket_name(to);
        let mut envelope = Self {
            name,
            name_len,
            control: Control([0; CONTROL_LEN]),
            control_len: 0,
        };
        let (level, class, ttl) = if to.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, libc::IPV6_HOPLIMIT)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_TTL)
        };
        // ip(7) and ipv6(7): an int for all of them. What is not said is as the socket has it.
        if outer.class != 0 {
            envelope.add(level, class, &libc::c_int::from(outer.class).to_ne_bytes());
        }
        if outer.ttl != DEFAULT_TTL.get() {
            envelope.add(level, ttl, &libc::c_int::from(outer.ttl).to_ne_bytes());
        }
        if let Some(size) = segment_size {
            envelope.add(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes());
        }
        envelope
    }

    fn add(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let area = &mut self.control.0[self.control_len..][..CONTROL_STEP];
        let data_len =
            u32::try_from(data.len()).expect("invariant: an option has at most four bytes");
        // SAFETY: CMSG_LEN computes only.
        let length = unsafe { libc::CMSG_LEN(data_len) };
        // SAFETY: an all-zero `cmsghdr` is a valid value of this plain C struct; libc gives no other constructor for it.
        let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
        header.cmsg_len = length as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: the area has 24 bytes, which hold a `cmsghdr` of 16; unaligned writing needs no more. There is no safe way to
        // lay out a C struct in bytes.
        unsafe {
            area.as_mut_ptr()
                .cast::<libc::cmsghdr>()
                .write_unaligned(header)
        };
        area[size_of::<libc::cmsghdr>()..][..data.len()].copy_from_slice(data);
        self.control_len += CONTROL_STEP;
    }

    /// The message with these slices. It points into `self` and `slices`: both must stay where they are while the kernel reads it.
    pub(super) fn message(&self, slices: &[IoSlice<'_>]) -> libc::mmsghdr {
        // SAFETY: zero is a valid value for each field of this plain C struct; libc gives no other constructor for
        // `msghdr`, which has private padding on some targets.
        let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
        let header = &mut message.msg_hdr;
        header.msg_name = (&raw const self.name).cast_mut().cast();
        header.msg_namelen = self.name_len;
        // `IoSlice` is guaranteed to have the layout of `iovec` on Unix; the kernel only reads through it.
        header.msg_iov = slices.as_ptr().cast_mut().cast();
        header.msg_iovlen = slices.len() as _;
        if self.control_len > 0 {
            header.msg_control = self.control.0.as_ptr().cast_mut().cast();
            header.msg_controllen = self.control_len as _;
        }
        message
    }
}

fn socket_name(to: SocketAddr) -> (Name, libc::socklen_t) {
    let length = |bytes: usize| {
        libc::socklen_t::try_from(bytes).expect("invariant: a socket address has at most 28 bytes")
    };
    match to {
        SocketAddr::V4(v4) => {
            let name = libc::sockaddr_in {
                sin_family: libc::sa_family_t::try_from(libc::AF_INET)
                    .expect("invariant: AF_INET is 2"),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            (Name { v4: name }, length(size_of::<libc::sockaddr_in>()))
        }
        SocketAddr::V6(v6) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::sa_family_t::try_from(libc::AF_INET6)
                    .expect("invariant: AF_INET6 is 10"),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            (Name { v6: name }, length(size_of::<libc::sockaddr_in6>()))
        }
    }
}
