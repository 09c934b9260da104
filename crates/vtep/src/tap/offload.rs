//! The `offload` backend: multi-queue TAP with a vnet header, by our own ioctls.
//!
//! Every frame on a queue is preceded by a 10-byte `virtio_net_hdr` in the host's byte order (`linux/virtio_net.h`):
//!
//! ```text
//!  0       1          2         4          6            8             10
//!  | flags | gso_type | hdr_len | gso_size | csum_start | csum_offset | frame …
//! ```
//!
//! The container's stack is offered to leave checksums and segmentation to us, as far as the kernel knows how: its
//! frames arrive with partial checksums, and up to 64 KiB large. Inwards the kernel takes partial checksums and TCP
//! super-frames whatever is offered, and UDP super-frames where it can also be offered them (Linux 6.2).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::{
    Backend, DEVICE, Failure, OpenTap, Sharing, TapControl, TapError, failure, write_frame,
};
use crate::edge::{Offload, Refusal, SendReport, Tap, TapFeatures, TapFrame};
use crate::frame::FrameBuf;

/// Bytes of `virtio_net_hdr`.
const VNET_HEADER_LEN: usize = 10;
/// Slices one frame may have; the vnet header takes one more.
const SLICES_MAX: usize = crate::offload::coalesce::PARTS_MAX + 1;
/// A batch ends when it has this many bytes: super-frames should still be in a cache when their payload is sent.
const BATCH_BYTES: usize = 512 << 10;

/// Linux takes these two only together.
const TUN_F_USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Opens the queues of `ifname`, which is made if it is not there: one for each worker, or one for all.
pub(super) fn attach(ifname: &str, sharing: Sharing) -> Result<OpenTap, TapError> {
    let open = |error| TapError::from_open(ifname, Backend::Offload, error);
    let io_error = |operation| {
        move |source| TapError::Io {
            ifname: ifname.to_owned(),
            operation,
            source,
        }
    };
    let open_queue = || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(open)?;
        set_interface(&file, ifname).map_err(open)?;
        // Both belong to the interface, not the queue; setting them again is harmless.
        set_vnet_header_len(&file).map_err(io_error("set the vnet header of"))?;
        let features = offer(&file).map_err(io_error("set the offloads of"))?;
        Ok((Arc::new(file), features))
    };
    let (first, features) = open_queue()?;
    let control = first
        .try_clone()
        .map_err(io_error("duplicate a queue of"))?;
    let mut queues: Vec<Box<dyn Tap>> = Vec::with_capacity(sharing.workers);
    for (worker, reads) in sharing.who_reads().enumerate() {
        let file = if worker == 0 || sharing.one_queue {
            Arc::clone(&first)
        } else {
            open_queue()?.0
        };
        queues.push(Box::new(OffloadTap {
            file,
            features,
            reads: reads || !sharing.one_queue,
        }));
    }
    Ok(OpenTap {
        queues,
        features,
        control: TapControl::new(control.into()),
    })
}

/// A worker's hold on a queue of a multi-queue TAP.
struct OffloadTap {
    file: Arc<File>,
    features: TapFeatures,
    /// Whether frames are read by it: of those that share a queue one does.
    reads: bool,
}

impl Tap for OffloadTap {
    fn recv(&mut self, bufs: &mut [FrameBuf]) -> io::Result<usize> {
        let (mut count, mut bytes) = (0, 0);
        while self.reads
            && bytes < BATCH_BYTES
            && let Some(buf) = bufs.get_mut(count)
        {
            // The header lies before the frame: a read into one place costs a tenth less than into two.
            let space = buf.space_behind(VNET_HEADER_LEN);
            match rustix::io::read(&self.file, &mut *space).map_err(io::Error::from) {
                Ok(length) if length > VNET_HEADER_LEN => {
                    let header = *space
                        .first_chunk()
                        .expect("invariant: the space begins with room for the header");
                    buf.set_frame(length - VNET_HEADER_LEN, parse_vnet_header(header));
                    count += 1;
                    bytes += length;
                }
                // The kernel hands over whole frames; one without a byte of frame is nothing to carry.
                Ok(_) => {}
                Err(error) => match failure(&error) {
                    Failure::Again => {}
                    Failure::WouldBlock => break,
                    // What was read is still to be carried; the next call fails again.
                    Failure::Gone | Failure::Refused if count > 0 => break,
                    Failure::Gone | Failure::Refused => return Err(error),
                },
            }
        }
        Ok(count)
    }

    fn send(&mut self, frames: &[TapFrame<'_>]) -> io::Result<SendReport> {
        let mut report = SendReport::default();
        for (index, frame) in frames.iter().enumerate() {
            let header = vnet_header(frame.offload);
            let mut slices = [IoSlice::new(&[]); SLICES_MAX + 1];
            let used = frame.slices.len() + 1;
            let Some(list) = slices.get_mut(..used) else {
                report.refuse(index, 1, Refusal::Failed);
                continue;
            };
            list[0] = IoSlice::new(&header);
            list[1..].copy_from_slice(frame.slices);
            write_frame(&mut report, index, || {
                Ok(rustix::io::writev(&self.file, list)?)
            })?;
        }
        Ok(report)
    }

    fn features(&self) -> TapFeatures {
        self.features
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        self.reads.then(|| self.file.as_raw_fd())
    }
}

/// Binds a queue to the interface `ifname`, whose length has been checked.
fn set_interface(queue: &File, ifname: &str) -> io::Result<()> {
    // SAFETY: an all-zero `ifreq` is a valid value of this plain C struct; there is no safe constructor.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).expect("invariant: the four flags lie below bit 15");
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives on our stack for the whole call and whose
    // name is closed by a NUL (at most 15 bytes were written). No safe wrapper exists in our dependencies.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn set_vnet_header_len(queue: &File) -> io::Result<()> {
    let length: libc::c_int = 10;
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, alive on our stack during the call. No safe wrapper exists.
    let result =
        unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Offers the container's stack all the work that this kernel lets us take, and says what that is.
///
/// Everything is asked for first, so that taking up a live interface never switches anything off; what an older kernel
/// refuses is then found one by one.
fn offer(queue: &File) -> io::Result<TapFeatures> {
    use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6};
    let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO;
    let mut taken = all;
    if set_offload(queue, all).is_err() {
        // Without this one there is no other.
        set_offload(queue, TUN_F_CSUM)?;
        taken = TUN_F_CSUM;
        for one in [TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO] {
            if set_offload(queue, taken | one).is_ok() {
                taken |= one;
            }
        }
        // The last to be tried may have been refused.
        set_offload(queue, taken)?;
    }
    let has = |flags| taken & flags == flags;
    Ok(TapFeatures {
        checksum: has(TUN_F_CSUM),
        tcp4: has(TUN_F_TSO4),
        tcp6: has(TUN_F_TSO6),
        tcp_ecn: has(TUN_F_TSO_ECN),
        udp: has(TUN_F_USO),
    })
}

fn set_offload(queue: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours. No safe wrapper exists.
    let result = unsafe {
        libc::ioctl(
            queue.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn parse_vnet_header(bytes: [u8; VNET_HEADER_LEN]) -> Offload {
    let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    Offload {
        flags: bytes[0],
        gso_type: bytes[1],
        hdr_len: field(2),
        gso_size: field(4),
        csum_start: field(6),
        csum_offset: field(8),
    }
}

fn vnet_header(offload: Offload) -> [u8; VNET_HEADER_LEN] {
    let mut bytes = [0u8; VNET_HEADER_LEN];
    bytes[0] = offload.flags;
    bytes[1] = offload.gso_type;
    for (at, field) in [
        (2, offload.hdr_len),
        (4, offload.gso_size),
        (6, offload.csum_start),
        (8, offload.csum_offset),
    ] {
        bytes[at..at + 2].copy_from_slice(&field.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vnet_header_round_trips() {
        let offload = Offload {
            flags: 1,
            gso_type: 4,
            hdr_len: 66,
            gso_size: 1388,
            csum_start: 34,
            csum_offset: 16,
        };
        let bytes = vnet_header(offload);
        assert_eq!(parse_vnet_header(bytes), offload);
        assert_eq!(vnet_header(Offload::default()), [0; 10]);
    }
}
