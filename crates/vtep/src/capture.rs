//! Copies of frames as they pass, for whoever looks.
//!
//! A capture is lossy by design: workers never wait for a reader, and while nobody captures they pay one relaxed load
//! a batch. Each reader has its own bounded queue; what does not fit is counted and gone.
//!
//! A frame that is dropped on entering is seen entering: `FromPort` and `FromRemote` come before the verdict, `ToPort` and
//! `ToRemote` after it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::Vni;
use crate::fdb::PortId;

/// Frames a reader may lag behind.
const QUEUE_FRAMES: usize = 1024;

/// Where a frame was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A container sent it.
    FromPort(PortId),
    /// Handed to a container.
    ToPort(PortId),
    /// A remote VTEP sent it.
    FromRemote(SocketAddr),
    /// Sent to a remote VTEP.
    ToRemote(SocketAddr),
}

/// One captured frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Where it was seen.
    pub place: Place,
    /// Its network.
    pub vni: Vni,
    /// The inner Ethernet frame. Its checksum may still be partial when it was seen at a remote on the same machine.
    pub frame: Vec<u8>,
}

/// What a capture wants to see; the default is everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureFilter {
    /// Only this network.
    pub vni: Option<Vni>,
    /// Only what enters or leaves by this port.
    pub port: Option<PortId>,
}

impl CaptureFilter {
    fn wants(&self, place: Place, vni: Vni) -> bool {
        let port = match place {
            Place::FromPort(id) | Place::ToPort(id) => Some(id),
            Place::FromRemote(_) | Place::ToRemote(_) => None,
        };
        self.vni.is_none_or(|wanted| wanted == vni) && (self.port.is_none() || self.port == port)
    }
}

/// A running capture; dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    frames: Receiver<Captured>,
    missed: Arc<AtomicU64>,
    hub: Arc<CaptureHub>,
}

impl Capture {
    /// The captured frames.
    #[must_use]
    pub const fn frames(&self) -> &Receiver<Captured> {
        &self.frames
    }

    /// Frames that found the queue full.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.hub.remove(&self.missed);
    }
}

#[derive(Clone, Debug)]
struct Reader {
    filter: CaptureFilter,
    frames: Sender<Captured>,
    missed: Arc<AtomicU64>,
}

/// Where workers hand in what they see.
#[derive(Debug, Default)]
pub struct CaptureHub {
    active: AtomicBool,
    readers: ArcSwap<Vec<Reader>>,
}

impl CaptureHub {
    /// Starts a capture.
    #[must_use]
    pub fn start(self: &Arc<Self>, filter: CaptureFilter) -> Capture {
        let (sender, frames) = bounded(QUEUE_FRAMES);
        let missed = Arc::new(AtomicU64::new(0));
        let reader = Reader {
            filter,
            frames: sender,
            missed: Arc::clone(&missed),
        };
        self.readers.rcu(|readers| {
            let mut readers = Vec::clone(readers);
            readers.push(reader.clone());
            readers
        });
        self.active.store(true, Ordering::Relaxed);
        Capture {
            frames,
            missed,
            hub: Arc::clone(self),
        }
    }

    /// Whether anybody looks: asked once a batch.
    #[inline]
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Gives every reader that wants it a copy of the frame.
    pub fn offer(&self, place: Place, vni: Vni, frame: &[u8]) {
        for reader in self
            .readers
            .load()
            .iter()
            .filter(|reader| reader.filter.wants(place, vni))
        {
            if reader.frames.is_full() {
                reader.missed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let captured = Captured {
                place,
                vni,
                frame: frame.to_vec(),
            };
            if let Err(TrySendError::Full(_)) = reader.frames.try_send(captured) {
                reader.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn remove(&self, missed: &Arc<AtomicU64>) {
        self.readers.rcu(|readers| {
            readers
                .iter()
                .filter(|reader| !Arc::ptr_eq(&reader.missed, missed))
                .cloned()
                .collect::<Vec<_>>()
        });
        // A capture that starts between these two lines sets the flag after its reader is listed, so reading the list
        // again after clearing the flag can't lose it.
        self.active.store(false, Ordering::SeqCst);
        if !self.readers.load().is_empty() {
            self.active.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vni(number: u32) -> Vni {
        Vni::new(number).unwrap()
    }

    #[test]
    fn filters_by_network_and_port() {
        let hub = Arc::new(CaptureHub::default());
        let all = hub.start(CaptureFilter::default());
        let one = hub.start(CaptureFilter {
            vni: Some(vni(7)),
            port: Some(PortId(1)),
        });
        hub.offer(Place::FromPort(PortId(1)), vni(7), b"a");
        hub.offer(Place::ToPort(PortId(2)), vni(7), b"b");
        hub.offer(Place::FromPort(PortId(1)), vni(8), b"c");
        hub.offer(
            Place::ToRemote("192.0.2.1:4789".parse().unwrap()),
            vni(7),
            b"d",
        );
        assert_eq!(all.frames().len(), 4);
        let seen: Vec<_> = one.frames().try_iter().collect();
        assert_eq!(
            seen,
            [Captured {
                place: Place::FromPort(PortId(1)),
                vni: vni(7),
                frame: b"a".to_vec()
            }]
        );
    }

    #[test]
    fn a_slow_reader_loses_frames_and_stops_nobody() {
        let hub = Arc::new(CaptureHub::default());
        let slow = hub.start(CaptureFilter::default());
        for _ in 0..QUEUE_FRAMES + 3 {
            hub.offer(Place::FromPort(PortId(1)), vni(1), b"x");
        }
        assert_eq!((slow.frames().len(), slow.missed()), (QUEUE_FRAMES, 3));
    }

    #[test]
    fn the_last_reader_switches_it_off() {
        let hub = Arc::new(CaptureHub::default());
        assert!(!hub.is_active());
        let (one, two) = (
            hub.start(CaptureFilter::default()),
            hub.start(CaptureFilter::default()),
        );
        drop(one);
        assert!(hub.is_active());
        drop(two);
        assert!(!hub.is_active());
    }
}
