//! Frames that a member sent here for a MAC address that is not here: its tables are older than the truth, or newer.
//!
//! A worker leaves a note and goes on: no clock, no lock, nothing allocated, and where nobody takes notes away the next ones are
//! lost. Whoever takes them tells the sender, by way of the control plane, and limits how often.

use std::net::IpAddr;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::ethernet::Frame;
use crate::{MacAddr, Vni};

/// Notes kept until somebody takes them.
const NOTES_MAX: usize = 64;

/// One frame that came to the wrong host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Misdelivered {
    /// Its network.
    pub vni: Vni,
    /// Whom it was for.
    pub mac: MacAddr,
    /// The VTEP that sent it, a member of the network.
    pub from: IpAddr,
}

/// Where workers leave notes.
#[derive(Debug)]
pub struct Misdeliveries {
    sender: Sender<Misdelivered>,
    receiver: Receiver<Misdelivered>,
}

impl Default for Misdeliveries {
    fn default() -> Self {
        let (sender, receiver) = bounded(NOTES_MAX);
        Self { sender, receiver }
    }
}

impl Misdeliveries {
    /// Where the notes come out; ends when the datapath does. Each note comes out once, however many receivers there are.
    #[must_use]
    pub fn receiver(&self) -> Receiver<Misdelivered> {
        self.receiver.clone()
    }

    /// Notes that a frame which no port here owns came from `from`. Group addresses belong to nobody and are passed over.
    #[inline]
    pub fn note(&self, vni: Option<Vni>, frame: &[u8], from: IpAddr) {
        let destination = Frame::parse(frame).map(|frame| frame.destination());
        if let (Some(vni), Some(mac)) = (vni, destination)
            && !mac.is_multicast()
        {
            // Full: there is enough to tell.
            let _ = self.sender.try_send(Misdelivered { vni, mac, from });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_bounded_and_group_addresses_passed_over() {
        let notes = Misdeliveries::default();
        let from = IpAddr::from([192, 0, 2, 2]);
        let mut frame = [0; 60];
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        for _ in 0..2 * NOTES_MAX {
            notes.note(Some(Vni::MAX), &frame, from);
        }
        assert_eq!(notes.receiver().try_iter().count(), NOTES_MAX);
        frame[0] = 0xff;
        notes.note(Some(Vni::MAX), &frame, from);
        notes.note(Some(Vni::MAX), &[], from);
        notes.note(None, &frame, from);
        assert_eq!(notes.receiver().try_iter().count(), 0);
    }
}
