//! Edge: many datagrams in one system call, both ways, each by itself (no UDP_SEGMENT, no UDP_GRO).
//!
//! What a program that sends single datagrams does at its best; the load generator must not be what is measured.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags};

/// Datagrams in one call.
pub(crate) const BATCH: usize = 32;
/// Largest datagram that is received whole; of a larger one only the count is right.
const MAX_DATAGRAM: usize = 2048;

/// Sends each of `payloads` (at most [`BATCH`]) as one datagram on a connected socket. Returns how many went.
pub(crate) fn send(socket: &UdpSocket, payloads: &[&[u8]]) -> io::Result<usize> {
    let payloads = &payloads[..payloads.len().min(BATCH)];
    let slices: Vec<[IoSlice<'_>; 1]> = payloads
        .iter()
        .map(|payload| [IoSlice::new(payload)])
        .collect();
    let mut controls: Vec<SendAncillaryBuffer<'_, '_, '_>> =
        payloads.iter().map(|_| Default::default()).collect();
    let mut messages: Vec<MMsgHdr<'_>> = slices
        .iter()
        .zip(&mut controls)
        .map(|(slice, control)| MMsgHdr::new(slice, control))
        .collect();
    Ok(rustix::net::sendmmsg(
        socket,
        &mut messages,
        SendFlags::empty(),
    )?)
}

/// Receives what has arrived, as it is needed here: counted and forgotten.
pub(crate) struct Drain {
    buffer: Vec<u8>,
}

/// What one drain found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drained {
    pub(crate) datagrams: u64,
    pub(crate) bytes: u64,
}

impl Drain {
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![0; BATCH * MAX_DATAGRAM],
        }
    }

    /// Takes datagrams until none is left; never waits.
    pub(crate) fn all(&mut self, socket: &UdpSocket) -> io::Result<Drained> {
        let mut total = Drained::default();
        loop {
            let batch = self.once(socket)?;
            if batch.datagrams == 0 {
                return Ok(total);
            }
            total.datagrams += batch.datagrams;
            total.bytes += batch.bytes;
        }
    }

    fn once(&mut self, socket: &UdpSocket) -> io::Result<Drained> {
        let mut slices = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
        // SAFETY: `mmsghdr` is plain data for which all zeroes is a value (no name, no control data). rustix has no
        // recvmmsg, and a call for each datagram would make the sink the bottleneck of what is measured.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        for ((slice, header), chunk) in slices
            .iter_mut()
            .zip(&mut headers)
            .zip(self.buffer.chunks_exact_mut(MAX_DATAGRAM))
        {
            let vector = libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: chunk.len(),
            };
            header.msg_hdr.msg_iov = std::ptr::from_mut(slice.write(vector));
            header.msg_hdr.msg_iovlen = 1;
        }
        let flags = libc::MSG_DONTWAIT;
        let batch = libc::c_uint::try_from(BATCH).unwrap_or(libc::c_uint::MAX);
        // SAFETY: the first `BATCH` headers each point to one written iovec, each of those to its own chunk of
        // `buffer`; all of them outlive the call, and nothing else looks at them meanwhile.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                batch,
                flags,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Drained::default()),
                // An earlier ICMP error, reported once: not about the datagrams that wait.
                io::ErrorKind::ConnectionRefused => Ok(Drained::default()),
                _ => Err(error),
            };
        };
        let bytes = headers[..count]
            .iter()
            .map(|header| u64::from(header.msg_len))
            .sum();
        Ok(Drained {
            datagrams: count as u64,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_drained() {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        let source = UdpSocket::bind("127.0.0.1:0").unwrap();
        source.connect(sink.local_addr().unwrap()).unwrap();
        let mut drain = Drain::new();
        assert_eq!(drain.all(&sink).unwrap(), Drained::default());

        let data = [7_u8; 300];
        let payloads: Vec<&[u8]> = (0..40).map(|n| &data[..64 + n]).collect();
        assert_eq!(
            send(&source, &payloads).unwrap(),
            BATCH,
            "one call takes one batch"
        );
        assert_eq!(send(&source, &payloads[BATCH..]).unwrap(), 8);
        let expected: u64 = payloads.iter().map(|payload| payload.len() as u64).sum();
        assert_eq!(
            drain.all(&sink).unwrap(),
            Drained {
                datagrams: 40,
                bytes: expected
            }
        );
    }
}
