//! Raw frames through an interface, past every protocol of the kernel: `AF_PACKET` (packet(7)).
//!
//! What comes in is told as it stood on the link: a VLAN tag that the kernel took off is put back. What it does *not* do:
//! read or make headers.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use netns::Netns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};
use vtep::edge::Offload;

use crate::wire::netlink;

/// Receive buffer in bytes: a storm must not be thinned out by the listener.
const BUFFER_BYTES: libc::c_int = 32 << 20;
/// `struct tpacket_auxdata` (include/uapi/linux/if_packet.h) has a tag and its type that the kernel took off the frame.
const STATUS_VLAN_VALID: u32 = 1 << 4;

/// A raw socket on one interface. Sees what comes in by it, not what goes out.
pub struct PacketSocket {
    socket: Socket,
    vnet_header: bool,
}

impl PacketSocket {
    /// A socket on the interface `ifname` of `netns`.
    ///
    /// # Panics
    /// When it can't be opened.
    #[must_use]
    pub fn open(netns: &Netns, ifname: &str) -> Self {
        Self::new(netns, ifname, false)
    }

    /// A socket whose frames each have a vnet header, both ways: what [`Self::send_offloaded`] needs.
    ///
    /// # Panics
    /// When it can't be opened.
    #[must_use]
    pub fn with_vnet_header(netns: &Netns, ifname: &str) -> Self {
        Self::new(netns, ifname, true)
    }

    fn new(netns: &Netns, ifname: &str, vnet_header: bool) -> Self {
        let index = netlink(netns)
            .link(ifname)
            .expect("links can be listed")
            .unwrap_or_else(|| panic!("{ifname} is not there"))
            .index;
        // Without a protocol until it is bound, so that it never sees another interface's frames.
        let socket = netns
            .run(|| Socket::new(Domain::PACKET, Type::RAW, None))
            .expect("a running test's namespace")
            .expect("root may open raw sockets");
        let on: libc::c_int = 1;
        set(
            &socket,
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            BUFFER_BYTES,
        );
        set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, on);
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, on);
        if vnet_header {
            set(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, on);
        }
        bind(&socket, index).unwrap_or_else(|error| panic!("can't bind to {ifname}: {error}"));
        Self {
            socket,
            vnet_header,
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// What the kernel says, such as `EMSGSIZE`.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.send_offloaded(Offload::default(), frame)
    }

    /// Sends one frame and has the kernel do what `offload` asks for, or leave it to the interface.
    ///
    /// # Errors
    /// What the kernel says, such as `EINVAL` for a request that it sees to be impossible.
    pub fn send_offloaded(&self, offload: Offload, frame: &[u8]) -> io::Result<()> {
        // `struct virtio_net_hdr`, in the order of the machine.
        let mut header = vec![offload.flags, offload.gso_type];
        for field in [
            offload.hdr_len,
            offload.gso_size,
            offload.csum_start,
            offload.csum_offset,
        ] {
            header.extend(field.to_ne_bytes());
        }
        if !self.vnet_header {
            assert_eq!(offload, Offload::default(), "opened without vnet headers");
            header.clear();
        }
        let slices = [IoSlice::new(&header), IoSlice::new(frame)];
        let sent = self.socket.send_vectored(&slices)?;
        assert_eq!(sent, header.len() + frame.len(), "a packet is sent whole");
        Ok(())
    }

    /// The next frame, within `limit`.
    ///
    /// # Panics
    /// When the socket fails, as it does when its interface goes.
    #[must_use]
    pub fn recv(&self, limit: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(frame) = self.try_recv() {
                return Some(frame);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let left = Timespec::try_from(left).expect("a limit of seconds");
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            // A signal ends the wait early; the loop goes on.
            let _ = poll(&mut ready, Some(&left));
        }
    }

    /// All frames that wait.
    ///
    /// # Panics
    /// See [`Self::recv`].
    #[must_use]
    pub fn drain(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.try_recv()).collect()
    }

    fn try_recv(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0u8; 128 * 1024];
        let mut control = [0u64; 16];
        let mut space = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: zero is a valid value for each field of this plain C struct, and libc has no other constructor for it.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut space;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        // SAFETY: the header points to a buffer and a control area that outlive the call, with their true lengths.
        // Neither std nor socket2 has a call that returns ancillary data.
        let length =
            unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            assert_eq!(
                error.kind(),
                io::ErrorKind::WouldBlock,
                "a raw socket failed: {error}"
            );
            return None;
        };
        buffer.truncate(length);
        if self.vnet_header {
            buffer.drain(..10);
        }
        if let Some((tci, tpid)) = taken_tag(&header) {
            let mut tag = tpid.to_be_bytes().to_vec();
            tag.extend(tci.to_be_bytes());
            buffer.splice(12..12, tag);
        }
        Some(buffer)
    }
}

/// The VLAN tag that the kernel took off the frame that was received with `header`: TCI and type.
fn taken_tag(header: &libc::msghdr) -> Option<(u16, u16)> {
    // SAFETY: `recvmsg` has filled the header, and its control area is alive; CMSG_FIRSTHDR stays inside it. A packet
    // socket's first and only message is the auxiliary data, 20 bytes.
    unsafe {
        let cmsg = libc::CMSG_FIRSTHDR(header).as_ref()?;
        if (cmsg.cmsg_level, cmsg.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            return None;
        }
        let aux = libc::CMSG_DATA(cmsg)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned();
        (aux.tp_status & STATUS_VLAN_VALID != 0).then_some((aux.tp_vlan_tci, aux.tp_vlan_tpid))
    }
}

fn bind(socket: &Socket, index: u32) -> io::Result<()> {
    // SAFETY: zero is a valid value for each field of this plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).expect("AF_PACKET is 17");
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL)
        .expect("ETH_P_ALL is 3")
        .to_be();
    address.sll_ifindex = i32::try_from(index).expect("an index is a positive int");
    // SAFETY: the kernel reads one `sockaddr_ll` from our stack, of the length given. socket2 can't make one.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            length_of(&address),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set(socket: &Socket, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the kernel reads one int from our stack. socket2 has none of these options.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length_of(&value),
        )
    };
    assert_eq!(result, 0, "option {option}: {}", io::Error::last_os_error());
}

fn length_of<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).expect("a small struct")
}
