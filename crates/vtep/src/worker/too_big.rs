//! Frames that the path to their remote does not carry: TCP is cut smaller, whoever sent anything else is told.
//!
//! Most hosts have no narrow path, and then one comparison for each frame is all that this costs.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use super::WorkerConfig;
use super::delivery::{PortQueue, hand_over};
use super::ledger::Ledger;
use super::sends::{Outgoing, Sends};
use crate::Vni;
use crate::edge::{Datagram, Offload, TapFrame, Underlay};
use crate::engine::{Engine, Verdict};
use crate::ethernet;
use crate::fdb::Tables;
use crate::frame::FrameBuf;
use crate::offload::segment::{MAX_HEADERS, SuperFrame};
use crate::paths::Paths;

impl WorkerConfig {
    /// The longest frame that the path to `to` takes, when it does not take one of `len` bytes.
    #[inline]
    pub(super) fn limit_below(&self, len: usize, to: SocketAddr, now: Instant) -> Option<usize> {
        if len <= self.paths.any_frame() {
            return None;
        }
        let limit = self.paths.frame_limit(to.ip(), now)?;
        (len > limit).then_some(limit)
    }
}

/// What a super-frame is sent with.
pub(super) struct Cutter<'a, 'l, U: Underlay> {
    pub(super) sends: &'a mut Sends,
    pub(super) underlay: &'a mut U,
    pub(super) config: &'a WorkerConfig,
    pub(super) ledger: &'a Ledger<'l>,
    pub(super) now: Instant,
}

impl<U: Underlay> Cutter<'_, '_, U> {
    /// Cuts the batch's frame `index` of a port with this `mtu` and sends it to all of `remotes`, to each in segments that its path
    /// takes, as datagrams otherwise `like` this one.
    pub(super) fn send(
        &mut self,
        (index, frame): (usize, &FrameBuf),
        (vni, remotes, mtu): (Vni, &[SocketAddr], u16),
        like: &Datagram<'_>,
    ) {
        let super_frame = match SuperFrame::requested(frame.frame(), &frame.offload, mtu) {
            Ok(super_frame) => super_frame,
            Err(reason) => {
                let drop = Verdict::Drop(reason);
                return self.ledger.frame_decided(frame.frame(), &drop);
            }
        };
        let len = super_frame.headers_len() + super_frame.segment_len();
        let all_take_it = len <= self.config.paths.any_frame();
        if all_take_it && !self.cut(&super_frame, like, (vni, remotes)) {
            return;
        }
        for &to in remotes {
            match self.config.limit_below(len, to, self.now) {
                // It has been sent, or refused for a cause that nobody knows.
                None if all_take_it => {}
                None => {
                    self.cut(&super_frame, like, (vni, &[to]));
                }
                Some(limit) => match super_frame.cut_to(limit) {
                    Some(smaller) => {
                        self.cut(&smaller, like, (vni, &[to]));
                    }
                    None => {
                        let outgoing = Outgoing {
                            frame: index,
                            to,
                            flow: like.flow,
                            outer: like.outer,
                        };
                        let slices = [IoSlice::new(frame.frame())];
                        let datagram = Datagram {
                            to,
                            slices: &slices,
                            ..*like
                        };
                        self.sends.refuse(outgoing, &datagram, self.ledger);
                    }
                },
            }
        }
    }

    fn cut(
        &mut self,
        super_frame: &SuperFrame<'_>,
        like: &Datagram<'_>,
        to: (Vni, &[SocketAddr]),
    ) -> bool {
        self.sends
            .send_super(self.underlay, super_frame, like, to, self.ledger)
    }
}

/// The batch of a port whose container is to be told.
pub(super) struct Teller<'a, 'l> {
    pub(super) engine: &'a mut Engine,
    pub(super) tables: &'a Tables,
    pub(super) paths: &'a Paths,
    pub(super) origin: &'a mut PortQueue,
    pub(super) frames: &'a [FrameBuf],
    pub(super) ledger: &'a Ledger<'l>,
}

impl Teller<'_, '_> {
    /// Tells the container of each frame that was too big for a path, as far as the path's limit is known.
    pub(super) fn tell(&mut self, sends: &mut Sends, now: Instant) {
        while let Some(Outgoing { frame, to, .. }) = sends.take_too_big() {
            let Some(limit) = self.paths.frame_limit(to.ip(), now) else {
                continue;
            };
            let Ok(mtu) = u16::try_from(limit - ethernet::HEADER_LEN) else {
                continue;
            };
            let (bytes, offload) = (self.frames[frame].frame(), self.frames[frame].offload);
            let mut space = [0; MAX_HEADERS];
            let mut quoted = [bytes, &[]];
            // What did not fit of a super-frame is its segments; the first is as good as any.
            if offload.is_gso()
                && let Ok(cut) = SuperFrame::requested(bytes, &offload, self.origin.mtu)
            {
                let headers = &mut space[..cut.headers_len()];
                let payload = cut.write_headers(0, headers);
                quoted = [headers, payload];
            }
            // It was refused with a longer one that it shared a message with.
            if quoted[0].len() + quoted[1].len() <= limit {
                continue;
            }
            let id = self.origin.id;
            let refused = self.engine.refuse(self.tables, id, bytes, quoted, mtu, now);
            if refused.is_some() {
                self.ledger.told_too_big();
                let slices = [IoSlice::new(self.engine.answer())];
                let answer = TapFrame {
                    slices: &slices,
                    offload: Offload::default(),
                };
                hand_over(self.origin, &[answer], self.ledger);
            }
        }
    }
}
