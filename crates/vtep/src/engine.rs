//! Decides where each frame and datagram goes: no socket, no clock, nothing learned.
//!
//! ```text
//! handle_frame     port ─► length ─► contents ─► source guard ─► tag ─► ARP/ND ─► gateway ─► group, local, remote, unknown
//! handle_datagram  I flag ─► VNI ─► member ─► length ─► tag ─► source MAC is the sender's ─► group, local
//! ```
//!
//! The first check that fails names the [`DropReason`]. A frame from a container has its checksums completed and its size
//! checked before it comes here (`offload`). A frame that came from a VTEP is never sent to one. Each worker has
//! an engine of its own: it owns the scratch for answers. Budgets are the tables', so that all workers draw from one.

use std::net::SocketAddr;
use std::time::Instant;

use crate::budget::Limit;
use crate::ethernet::Frame;
use crate::fdb::{Location, Network, Port, PortId, Tables};
use crate::guard::{self, Contents};
use crate::neighbor::{self, Outcome};
use crate::settings::{Dscp, Vlan};
use crate::stats::DropReason;
use crate::vxlan::Header;
use crate::{MacAddr, Vni, too_big};

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'t> {
    /// Hand it to a container on this host.
    Deliver {
        /// The container's port.
        port: PortId,
    },
    /// Send it to another host.
    Send {
        /// The network to encapsulate it for.
        vni: Vni,
        /// The other host's VTEP.
        remote: SocketAddr,
    },
    /// Hand it to all these ports, except the one it came from, and send it to all these hosts.
    Flood {
        /// The network to encapsulate it for.
        vni: Vni,
        /// All of the network's ports on this host, the origin included.
        ports: &'t [PortId],
        /// The hosts that get a copy; none when the frame came from a host.
        remotes: &'t [SocketAddr],
    },
    /// It has been answered: hand [`Engine::answer`] to the port that it came from.
    Answer {
        /// Length of the answer in bytes.
        len: usize,
    },
    /// Drop and count it.
    Drop(DropReason),
}

/// What a datagram carried, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<'t, 'p> {
    /// What becomes of the frame: delivered, flooded to ports, or dropped.
    pub verdict: Verdict<'t>,
    /// The VNI in the header, whether a network has it or not; `None` when there is no valid header.
    pub vni: Option<Vni>,
    /// The frame behind the header; empty when there is none.
    pub frame: &'p [u8],
    /// What its network does with the outer DSCP.
    pub dscp: Dscp,
}

/// What can be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Drop datagrams with reserved bits set, as Linux and Open vSwitch do, instead of ignoring them as RFC 7348 §5 asks.
    pub strict_reserved_bits: bool,
    /// Copies of flooded frames that one port may cause, remotes and ports counted alike.
    pub port_floods: Limit,
    /// Copies of flooded frames from one remote that may be made for ports here: what a remote's own limit should have held back.
    pub remote_floods: Limit,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            strict_reserved_bits: false,
            port_floods: Limit {
                rate: 20_000,
                burst: 20_000,
            },
            // Several of its ports may flood at once.
            remote_floods: Limit {
                rate: 100_000,
                burst: 100_000,
            },
        }
    }
}

/// Decides for one worker.
pub struct Engine {
    settings: Settings,
    answer: Vec<u8>,
}

/// "Too big" errors that one port gets: a kernel remembers what it is told for each of its peers, so that honest ones need few.
const TOO_BIG_ERRORS: Limit = Limit {
    rate: 100,
    burst: 100,
};

impl Engine {
    /// An engine that has seen nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        // Room for the longest answer there is, an echo reply, so that answering never allocates.
        Self {
            settings,
            answer: Vec::with_capacity(crate::frame::MAX_FRAME),
        }
    }

    /// Decides about a frame that a container sent through `port`.
    #[inline]
    pub fn handle_frame<'t>(
        &mut self,
        tables: &'t Tables,
        port: PortId,
        frame: &[u8],
        now: Instant,
    ) -> Verdict<'t> {
        self.decide_for_frame(tables, port, frame, now)
            .unwrap_or_else(Verdict::Drop)
    }

    /// Decides about the payload of a datagram that the host at `from` sent. Any source port is as good as another.
    #[inline]
    pub fn handle_datagram<'t, 'p>(
        &self,
        tables: &'t Tables,
        from: SocketAddr,
        payload: &'p [u8],
        now: Instant,
    ) -> Arrival<'t, 'p> {
        let Some((header, frame)) = Header::parse(payload) else {
            return Arrival::dropped(DropReason::Truncated);
        };
        // RFC 7348 §5: the I flag must be set for a valid VNI.
        if !header.vni_valid {
            return Arrival::dropped(DropReason::NoVniFlag);
        }
        if header.reserved && self.settings.strict_reserved_bits {
            return Arrival::dropped(DropReason::ReservedBits);
        }
        let network = tables.network(header.vni);
        let verdict = match network {
            Some(network) => decide_for_arrival(network, from, frame)
                .and_then(|verdict| self.limit_arrival(tables, from, verdict, now))
                .unwrap_or_else(Verdict::Drop),
            None => Verdict::Drop(DropReason::UnknownVni),
        };
        Arrival {
            verdict,
            vni: Some(header.vni),
            frame,
            dscp: network.map_or(Dscp::NONE, |network| network.config().settings.dscp),
        }
    }

    /// The frame that answers the last one, after [`Verdict::Answer`].
    #[must_use]
    pub fn answer(&self) -> &[u8] {
        &self.answer
    }

    /// Tells the container behind `port` that no more than `mtu` bytes of IP packet pass to where it sent `frame`; `quoted` is as
    /// [`too_big::answer`] takes it. Says how long [`Self::answer`] is; `None` when there is nothing to tell, or was too much.
    pub fn refuse(
        &mut self,
        tables: &Tables,
        port: PortId,
        frame: &[u8],
        quoted: [&[u8]; 2],
        mtu: u16,
        now: Instant,
    ) -> Option<usize> {
        let port = tables.port(port)?;
        self.answer.clear();
        if !too_big::answer(frame, quoted, mtu, port.mac, &mut self.answer) {
            return None;
        }
        tables
            .port_errors(port.id)?
            .take(1, TOO_BIG_ERRORS, now)
            .then_some(self.answer.len())
    }

    fn decide_for_frame<'t>(
        &mut self,
        tables: &'t Tables,
        port: PortId,
        bytes: &[u8],
        now: Instant,
    ) -> Result<Verdict<'t>, DropReason> {
        let port = tables.port(port).ok_or(DropReason::UnknownPort)?;
        let network = tables.network(port.vni).ok_or(DropReason::UnknownVni)?;
        let frame = Frame::parse(bytes).ok_or(DropReason::Truncated)?;
        if frame.destination().is_link_local_control() {
            return Err(DropReason::LinkLocalControl);
        }
        if frame.is_tagged() && network.config().settings.vlan == Vlan::Drop {
            return Err(DropReason::VlanTag);
        }
        let contents = Contents::parse(&frame).map_err(|_| DropReason::Malformed)?;
        guard::check(port, &frame, &contents)?;

        // A tagged question is about another link than the one the tables describe.
        if !frame.is_tagged() {
            self.answer.clear();
            let mut outcome = neighbor::answer(network, port, &contents, &mut self.answer);
            if outcome == Outcome::NotMine && frame.destination() == network.config().gateway_mac {
                outcome = neighbor::answer_for_gateway(network, port, &contents, &mut self.answer);
            }
            match outcome {
                Outcome::Answered => {
                    return Ok(Verdict::Answer {
                        len: self.answer.len(),
                    });
                }
                Outcome::Dropped(reason) => return Err(reason),
                Outcome::NotMine => {}
            }
        }
        match network.lookup(frame.destination()) {
            Some(Location::Local(to)) if to == port.id => Err(DropReason::ToItself),
            Some(Location::Local(to)) => Ok(Verdict::Deliver { port: to }),
            Some(Location::Remote(remote)) => Ok(Verdict::Send {
                vni: port.vni,
                remote,
            }),
            None if !network.config().settings.flood => Err(DropReason::FloodOff),
            None => self.flood(tables, network, port, now),
        }
    }

    /// A remote that floods more than its share is held back here, too: one frame of it is a copy for each port.
    fn limit_arrival<'t>(
        &self,
        tables: &Tables,
        from: SocketAddr,
        verdict: Verdict<'t>,
        now: Instant,
    ) -> Result<Verdict<'t>, DropReason> {
        let Verdict::Flood { ports, .. } = verdict else {
            return Ok(verdict);
        };
        let budget = tables.remote_floods(from.ip());
        if budget.is_some_and(|budget| !budget.take(ports.len(), self.settings.remote_floods, now))
        {
            return Err(DropReason::FloodLimit);
        }
        Ok(verdict)
    }

    /// Head-end replication: one copy for each host that has an endpoint of the network, and one for each other port here.
    fn flood<'t>(
        &self,
        tables: &Tables,
        network: &'t Network,
        port: &Port,
        now: Instant,
    ) -> Result<Verdict<'t>, DropReason> {
        let (ports, remotes) = (network.ports(), network.flood_remotes());
        let copies = remotes.len() + ports.len().saturating_sub(1);
        let budget = tables.port_floods(port.id);
        if budget.is_some_and(|budget| !budget.take(copies, self.settings.port_floods, now)) {
            return Err(DropReason::FloodLimit);
        }
        Ok(Verdict::Flood {
            vni: port.vni,
            ports,
            remotes,
        })
    }
}

impl Arrival<'_, '_> {
    const fn dropped(reason: DropReason) -> Self {
        Self {
            verdict: Verdict::Drop(reason),
            vni: None,
            frame: &[],
            dscp: Dscp::NONE,
        }
    }
}

fn decide_for_arrival<'t>(
    network: &'t Network,
    from: SocketAddr,
    bytes: &[u8],
) -> Result<Verdict<'t>, DropReason> {
    if !network.is_member(from.ip()) {
        return Err(DropReason::NotAMember);
    }
    let frame = Frame::parse(bytes).ok_or(DropReason::Truncated)?;
    let (destination, source) = (frame.destination(), frame.source());
    if destination.is_link_local_control() {
        return Err(DropReason::LinkLocalControl);
    }
    if source.is_multicast() || source.is_zero() {
        return Err(DropReason::InvalidSource);
    }
    // RFC 7348 §6.1.
    if frame.is_tagged() && network.config().settings.vlan == Vlan::Drop {
        return Err(DropReason::VlanTag);
    }
    check_sender(network, from, source)?;
    Contents::parse(&frame).map_err(|_| DropReason::Malformed)?;
    match network.lookup(destination) {
        Some(Location::Local(port)) => Ok(Verdict::Deliver { port }),
        Some(Location::Remote(_)) => Err(DropReason::SplitHorizon),
        None if !network.config().settings.flood => Err(DropReason::FloodOff),
        None => Ok(Verdict::Flood {
            vni: network.config().vni,
            ports: network.ports(),
            remotes: &[],
        }),
    }
}

/// A MAC may come only from where the tables say it is.
fn check_sender(network: &Network, from: SocketAddr, source: MacAddr) -> Result<(), DropReason> {
    match network.lookup(source) {
        Some(Location::Remote(remote)) if remote.ip() == from.ip() => Ok(()),
        Some(_) => Err(DropReason::SourceElsewhere),
        None if source == network.config().gateway_mac => Err(DropReason::SourceElsewhere),
        None => Err(DropReason::UnknownSource),
    }
}

#[cfg(test)]
mod tests;
