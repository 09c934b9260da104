//! Edges that bring the same in every round and take anything: for what is counted or timed, where [`super::Wire`] would be in the way.

use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;

use crate::edge::{Datagram, Offload, SendReport, Tap, TapFeatures, TapFrame, Underlay};
use crate::frame::{DatagramBuf, FrameBuf};

/// A container that sends the same frames in every round, with all offloads.
#[derive(Debug)]
pub struct RepeatingTap {
    frames: Vec<(Vec<u8>, Offload)>,
    next: usize,
}

impl RepeatingTap {
    /// A round is these frames, and then once nothing.
    #[must_use]
    pub const fn new(frames: Vec<(Vec<u8>, Offload)>) -> Self {
        Self { frames, next: 0 }
    }
}

impl Tap for RepeatingTap {
    fn recv(&mut self, bufs: &mut [FrameBuf]) -> io::Result<usize> {
        let rest = &self.frames[self.next..];
        for (buf, (frame, offload)) in bufs.iter_mut().zip(rest) {
            buf.space()[..frame.len()].copy_from_slice(frame);
            buf.set_frame(frame.len(), *offload);
        }
        let count = rest.len().min(bufs.len());
        self.next = if count == 0 { 0 } else { self.next + count };
        Ok(count)
    }

    fn send(&mut self, frames: &[TapFrame<'_>]) -> io::Result<SendReport> {
        Ok(SendReport {
            sent: frames.len(),
            ..SendReport::default()
        })
    }

    fn features(&self) -> TapFeatures {
        TapFeatures::ALL
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        None
    }
}

/// What an underlay brings: the sender, the payload, and the size of each datagram when several were merged.
pub type Merged = (SocketAddr, Vec<u8>, Option<u16>);

/// A wire that brings the same buffers in every round.
#[derive(Debug)]
pub struct RepeatingUnderlay {
    buffers: Vec<Merged>,
    next: usize,
}

impl RepeatingUnderlay {
    /// A round is these buffers, and then once nothing.
    #[must_use]
    pub const fn new(buffers: Vec<Merged>) -> Self {
        Self { buffers, next: 0 }
    }
}

impl Underlay for RepeatingUnderlay {
    fn recv(&mut self, bufs: &mut [DatagramBuf]) -> io::Result<usize> {
        let rest = &self.buffers[self.next..];
        for (buf, (from, payload, segment_size)) in bufs.iter_mut().zip(rest) {
            buf.space()[..payload.len()].copy_from_slice(payload);
            buf.set_payload(payload.len(), *from);
            buf.segment_size = *segment_size;
        }
        let count = rest.len().min(bufs.len());
        self.next = if count == 0 { 0 } else { self.next + count };
        Ok(count)
    }

    fn send(&mut self, datagrams: &[Datagram<'_>]) -> io::Result<SendReport> {
        Ok(SendReport {
            sent: datagrams.iter().map(Datagram::count).sum(),
            ..SendReport::default()
        })
    }

    fn as_raw_fd(&self) -> Option<RawFd> {
        None
    }
}
