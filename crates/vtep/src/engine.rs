//! Decides where each frame and datagram goes: no socket, no clock, nothing learned.
//!
//! ```text
//! handle_frame     port ─► length ─► contents ─► source guard ─► tag ─► ARP/ND ─► gateway ─► group, local, remote, unknown
//! handle_datagram  I flag ─► VNI ─► member ─► length ─► tag ─► source MAC is the sender's ─► group, local
//! ```
//!
//! The first check that fails names the [`DropReason`]. A frame from a container has its checksums completed and its size
//! checked before it comes here (`offload`). A frame that came from a VTEP is never sent to one. Each worker has
//! an engine of its own: it owns the scratch for answers and the ports' flood budgets, and shares nothing.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use hashbrown::HashMap;

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
    /// Copies of flooded frames per second that one port may cause in one worker, remotes and ports counted alike.
    pub flood_rate: u32,
    /// Copies of flooded frames that one port may cause at once. A frame with more copies passes when it is all there.
    pub flood_burst: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            strict_reserved_bits: false,
            flood_rate: 20_000,
            flood_burst: 20_000,
        }
    }
}

/// Decides for one worker.
pub struct Engine {
    settings: Settings,
    budgets: HashMap<PortId, Budget, RandomState>,
    /// What ports may yet be told about frames that are too big; one token is one error.
    errors: HashMap<PortId, Budget, RandomState>,
    answer: Vec<u8>,
}

/// "Too big" errors a second, and at once, that one port gets from one worker: a kernel remembers what it is told for each of
/// its peers, so that honest ones need few.
const ERROR_RATE: f64 = 100.0;
const ERROR_BURST: f64 = 100.0;

/// A token bucket; one token is one copy of a flooded frame.
struct Budget {
    copies: f64,
    at: Instant,
}

impl Engine {
    /// An engine that has seen nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        // Room for the longest answer there is, an echo reply, so that answering never allocates.
        Self {
            settings,
            budgets: HashMap::default(),
            errors: HashMap::default(),
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
            Some(network) => decide_for_arrival(network, from, frame).unwrap_or_else(Verdict::Drop),
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
        let budget = budget(&mut self.errors, tables, port.id, ERROR_BURST, now);
        budget
            .take(1.0, ERROR_RATE, ERROR_BURST, now)
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

    /// Head-end replication: one copy for each host that has an endpoint of the network, and one for each other port here.
    fn flood<'t>(
        &mut self,
        tables: &Tables,
        network: &'t Network,
        port: &Port,
        now: Instant,
    ) -> Result<Verdict<'t>, DropReason> {
        let (ports, remotes) = (network.ports(), network.flood_remotes());
        let burst = f64::from(self.settings.flood_burst);
        let copies = u32::try_from(remotes.len() + ports.len().saturating_sub(1))
            .map_or(f64::INFINITY, f64::from);
        let rate = f64::from(self.settings.flood_rate);
        let budget = budget(&mut self.budgets, tables, port.id, burst, now);
        if !budget.take(copies.min(burst), rate, burst, now) {
            return Err(DropReason::FloodLimit);
        }
        Ok(Verdict::Flood {
            vni: port.vni,
            ports,
            remotes,
        })
    }
}

/// A port's bucket, full when it is new.
fn budget<'b>(
    budgets: &'b mut HashMap<PortId, Budget, RandomState>,
    tables: &Tables,
    port: PortId,
    burst: f64,
    now: Instant,
) -> &'b mut Budget {
    // Ports come and go; budgets of those gone are forgotten when there are twice as many as ports.
    if !budgets.contains_key(&port) && budgets.len() > 2 * tables.ports().count() {
        budgets.retain(|id, _| tables.port(*id).is_some());
    }
    budgets.entry(port).or_insert(Budget {
        copies: burst,
        at: now,
    })
}

impl Budget {
    fn take(&mut self, copies: f64, rate: f64, burst: f64, now: Instant) -> bool {
        let elapsed = now
            .checked_duration_since(self.at)
            .unwrap_or(Duration::ZERO);
        self.copies = (self.copies + elapsed.as_secs_f64() * rate).min(burst);
        self.at = now;
        let enough = self.copies >= copies;
        if enough {
            self.copies -= copies;
        }
        enough
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
