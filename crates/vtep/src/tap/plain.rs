//! The `plain` backend: the tun-tap crate's TAP, one frame and one system call at a time.
//!
//! It has one queue, no vnet header and no offloads: frames come and go whole, with finished checksums. One
//! worker reads; the others hold the same queue for writing, which the kernel lets many threads do at once.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use tun_tap::{Iface, Mode};

use super::{Backend, Failure, OpenTap, Sharing, TapControl, TapError, failure, write_frame};
use crate::edge::{Offload, SendReport, Tap, TapFeatures, TapFrame};
use crate::frame::FrameBuf;

/// Opens the one queue of `ifname`, which is made if it is not there, and hands it to all workers.
pub(super) fn attach(ifname: &str, sharing: Sharing) -> Result<OpenTap, TapError> {
    let iface = Iface::without_packet_info(ifname, Mode::Tap)
        .map_err(|error| TapError::from_open(ifname, Backend::Plain, error))?;
    let io_error = |operation, source| TapError::Io {
        ifname: ifname.to_owned(),
        operation,
        source,
    };
    // SAFETY: the descriptor is open as long as `iface`, which outlives the borrow. `Iface` implements no
    // `AsFd`, so there is no safe way to lend it.
    let fd = unsafe { BorrowedFd::borrow_raw(iface.as_raw_fd()) };
    rustix::io::ioctl_fionbio(fd, true)
        .map_err(|errno| io_error("stop blocking on", errno.into()))?;
    let control = fd
        .try_clone_to_owned()
        .map_err(|error| io_error("duplicate the queue of", error))?;
    let iface = Arc::new(iface);
    let queues = sharing
        .who_reads()
        .map(|reads| -> Box<dyn Tap> {
            Box::new(PlainTap {
                iface: Arc::clone(&iface),
                reads,
                whole: Vec::new(),
            })
        })
        .collect();
    Ok(OpenTap {
        queues,
        features: TapFeatures::default(),
        control: TapControl::new(control),
    })
}

/// One worker's hold on the only queue.
struct PlainTap {
    iface: Arc<Iface>,
    reads: bool,
    /// A frame of several slices is put together here, because the crate writes from one.
    whole: Vec<u8>,
}

impl Tap for PlainTap {
    fn recv(&mut self, bufs: &mut [FrameBuf]) -> io::Result<usize> {
        let mut count = 0;
        while self.reads
            && let Some(buf) = bufs.get_mut(count)
        {
            match self.iface.recv(buf.space()) {
                Ok(length) => {
                    buf.set_frame(length, Offload::default());
                    count += 1;
                }
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
            let bytes = match frame.slices {
                [one] => one,
                many => {
                    self.whole.clear();
                    many.iter()
                        .for_each(|slice| self.whole.extend_from_slice(slice));
                    self.whole.as_slice()
                }
            };
            write_frame(&mut report, index, || self.iface.send(bytes))?;
        }
        Ok(report)
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        self.reads.then(|| self.iface.as_raw_fd())
    }
}
