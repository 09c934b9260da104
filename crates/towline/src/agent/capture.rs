//! Streams copies of frames to a client, in names that people know.
//!
//! The client's thread holds the capture and no part of the data path, so a client that does not read stops nobody: the
//! capture's queue fills and what is more is counted as missed.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::bail;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vtep::Vni;
use vtep::capture::{CaptureFilter, Captured, Fate, Place};
use vtep::datapath::Capture;
use vtep::fdb::PortId;

use super::{Agent, Member, container, network};
use crate::api::capture::{self as api, End, Event, Seen};
use crate::api::container as containers;

/// How often the client's and the host's end are looked for while nothing passes.
const TICK: Duration = Duration::from_millis(100);
/// Copies sent before the client's end is looked for again.
const RUN: usize = 256;
/// How old known names may be.
const NAMES_FRESH: Duration = Duration::from_secs(1);

/// A capture that a client has asked for.
pub(super) struct Running {
    capture: Capture,
    count: u64,
    member: Weak<Member>,
    names: Names,
}

/// Starts what a client asks for.
///
/// # Errors
/// When it names what this host does not have.
pub(super) fn start(agent: &Arc<Agent>, wanted: &api::Capture) -> anyhow::Result<Running> {
    let member = agent.member()?;
    let vni = match &wanted.network {
        Some(name) => Some(network::known(agent, name)?.vni),
        None => None,
    };
    let ports = match &wanted.port {
        Some(name) => ports(agent, name)?,
        None => Vec::new(),
    };
    let filter = CaptureFilter {
        vni,
        ports,
        remote: wanted.remote,
    };
    Ok(Running {
        capture: member.datapath.capture(filter),
        count: wanted.count.unwrap_or(u64::MAX),
        names: Names::load(agent, &member),
        member: Arc::downgrade(&member),
    })
}

/// The ports of a container, by its name or id, or one port by its number.
fn ports(agent: &Arc<Agent>, name: &str) -> anyhow::Result<Vec<PortId>> {
    let of = |container: &str| -> Vec<PortId> {
        agent.state.read(|state| {
            let records = state.endpoints.iter();
            records
                .filter(|record| record.container == container)
                .map(|record| PortId(record.port))
                .collect()
        })
    };
    let mut found = of(name);
    if found.is_empty()
        && let Ok(number) = name.parse()
        && agent
            .state
            .read(|state| state.endpoints.iter().any(|record| record.port == number))
    {
        found.push(PortId(number));
    }
    if found.is_empty() {
        let request = containers::Request::Locate {
            name: name.to_owned(),
        };
        if let containers::Response::Located(located) = container::handle(agent, request)? {
            found = of(&located.name);
        }
    }
    if found.is_empty() {
        bail!(
            "{} has no port on this host: 'towline status' lists them",
            control::quote(name)
        );
    }
    Ok(found)
}

impl Running {
    /// Sends copies until the client, the count or this host's membership ends it.
    ///
    /// # Errors
    /// When the client is gone.
    pub(super) fn stream(mut self, agent: &Agent, stream: &UnixStream) -> anyhow::Result<()> {
        // A reader may pause as long as it likes; only this thread waits for it.
        stream.set_write_timeout(None)?;
        let mut out = BufWriter::with_capacity(1 << 17, stream);
        let mut captured = 0;
        let left = loop {
            let Some(member) = self.member.upgrade() else {
                break true;
            };
            self.names.refresh(agent, &member);
            drop(member);
            if captured >= self.count || has_hung_up(stream)? {
                break false;
            }
            let first = self.capture.next(TICK);
            for copy in first.into_iter().chain(self.capture.waiting()).take(RUN) {
                if captured < self.count && self.names.send(&copy, &mut out)? {
                    captured += 1;
                }
            }
            out.flush()?;
        };
        let missed = self.capture.missed();
        let end = End {
            captured,
            missed,
            left,
        };
        line(&mut out, &Event::End(end))?;
        Ok(out.flush()?)
    }
}

/// The client has closed its side, or all of it. It says nothing while it captures.
fn has_hung_up(stream: &UnixStream) -> anyhow::Result<bool> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&now))? > 0)
}

fn line(out: &mut impl Write, event: &Event) -> anyhow::Result<()> {
    serde_json::to_writer(&mut *out, event)?;
    Ok(out.write_all(b"\n")?)
}

/// What people call networks, ports and remotes.
struct Names {
    vtep: IpAddr,
    networks: HashMap<Vni, String>,
    ports: HashMap<PortId, (String, Vni)>,
    remotes: HashMap<IpAddr, String>,
    at: Instant,
}

impl Names {
    fn load(agent: &Agent, member: &Member) -> Self {
        let remotes = member.follower.host_names().into_iter();
        agent.state.read(|state| Self {
            vtep: member.settled.vtep,
            networks: state
                .networks
                .iter()
                .map(|network| (network.vni, network.name.clone()))
                .collect(),
            ports: state
                .endpoints
                .iter()
                .map(|record| {
                    let place = (record.container.clone(), record.vni);
                    (PortId(record.port), place)
                })
                .collect(),
            remotes: remotes.map(|(addr, name)| (addr.ip(), name)).collect(),
            at: Instant::now(),
        })
    }

    fn refresh(&mut self, agent: &Agent, member: &Member) {
        if self.at.elapsed() > NAMES_FRESH {
            *self = Self::load(agent, member);
        }
    }

    /// Sends one copy. Says whether there was one: outer headers of what no datagram can be are not made.
    fn send(&self, copy: &Captured, out: &mut impl Write) -> anyhow::Result<bool> {
        let packet;
        let bytes = if let Place::FromPort(_) | Place::ToPort(_) = copy.place {
            &copy.bytes
        } else {
            let made = copy.outer.and_then(|outer| outer.packet(&copy.bytes));
            let Some(made) = made else {
                return Ok(false);
            };
            packet = made;
            &packet
        };
        line(
            out,
            &Event::Seen(Box::new(self.describe(copy, bytes.len()))),
        )?;
        out.write_all(bytes)?;
        Ok(true)
    }

    fn describe(&self, copy: &Captured, length: usize) -> Seen {
        let network = copy.vni.map(|vni| self.network(vni));
        let (place, peer, interface) = match copy.place {
            Place::FromPort(id) | Place::ToPort(id) => {
                let place = if matches!(copy.place, Place::FromPort(_)) {
                    api::Place::FromPort
                } else {
                    api::Place::ToPort
                };
                let vni = self.ports.get(&id).map(|(_, vni)| *vni);
                let of = vni.map_or("-".to_owned(), |vni| self.network(vni));
                (place, self.port(id), format!("{of}/{}", self.port(id)))
            }
            Place::FromRemote(remote) | Place::ToRemote(remote) => {
                let place = if matches!(copy.place, Place::FromRemote(_)) {
                    api::Place::FromRemote
                } else {
                    api::Place::ToRemote
                };
                let name = self.remotes.get(&remote.ip()).cloned();
                let peer = name.unwrap_or_else(|| remote.ip().to_string());
                (place, peer, format!("underlay {}", self.vtep))
            }
        };
        let inner = copy.frame().len();
        Seen {
            // After the year 2554 times are wrong.
            time_ns: copy.time.duration_since(UNIX_EPOCH).map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            }),
            place,
            interface,
            peer,
            network,
            vni: copy.vni.map(Vni::get),
            verdict: self.verdict(copy),
            reason: match copy.fate {
                Fate::Drop(reason) => Some(reason.name().to_owned()),
                _ => None,
            },
            frame_at: (inner > 0).then(|| length - inner),
            length,
        }
    }

    fn verdict(&self, copy: &Captured) -> String {
        let passed = match copy.place {
            Place::ToPort(_) => "delivered",
            _ => "sent",
        };
        match copy.fate {
            Fate::Deliver(port) => format!("deliver to {}", self.port(port)),
            Fate::Send(remote) => format!("send to {}", self.remote(remote)),
            Fate::Flood { ports, remotes } => flood(ports, remotes),
            Fate::Answer => "answer".to_owned(),
            Fate::Probe => "probe".to_owned(),
            Fate::Passed => passed.to_owned(),
            Fate::Drop(reason) => format!("drop {}: {}", reason.name(), reason.description()),
        }
    }

    fn network(&self, vni: Vni) -> String {
        let name = self.networks.get(&vni).cloned();
        name.unwrap_or_else(|| format!("vni {vni}"))
    }

    fn port(&self, id: PortId) -> String {
        let name = self.ports.get(&id).map(|(container, _)| container.clone());
        name.unwrap_or_else(|| format!("port {id}"))
    }

    fn remote(&self, remote: SocketAddr) -> String {
        match self.remotes.get(&remote.ip()) {
            Some(name) => format!("{name} ({remote})"),
            None => remote.to_string(),
        }
    }
}

/// A frame from a remote goes to no other, and one from the only port here to none.
fn flood(ports: usize, remotes: usize) -> String {
    let count = |number: usize, one: &str| match number {
        0 => None,
        1 => Some(format!("1 {one}")),
        _ => Some(format!("{number} {one}s")),
    };
    match (count(ports, "port"), count(remotes, "remote")) {
        (Some(ports), Some(remotes)) => format!("flood to {ports} and {remotes}"),
        (Some(some), None) | (None, Some(some)) => format!("flood to {some}"),
        (None, None) => "flood to nobody".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use vtep::capture::Outer;
    use vtep::edge::OuterFields;
    use vtep::stats::DropReason;
    use vtep::vxlan;

    use super::*;

    fn names() -> Names {
        let vni = Vni::new(4096).expect("24 bits");
        Names {
            vtep: IpAddr::from([192, 0, 2, 1]),
            networks: HashMap::from([(vni, "blue".to_owned())]),
            ports: HashMap::from([(PortId(3), ("c1".to_owned(), vni))]),
            remotes: HashMap::from([(IpAddr::from([192, 0, 2, 2]), "h2".to_owned())]),
            at: Instant::now(),
        }
    }

    #[test]
    fn a_flood_names_who_gets_copies() {
        assert_eq!(flood(2, 0), "flood to 2 ports");
        assert_eq!(flood(1, 3), "flood to 1 port and 3 remotes");
        assert_eq!(flood(0, 1), "flood to 1 remote");
        assert_eq!(flood(0, 0), "flood to nobody");
    }

    #[test]
    fn copies_are_described_in_names() {
        let names = names();
        let vni = Vni::new(4096).expect("24 bits");
        let remote = SocketAddr::from(([192, 0, 2, 2], 50_000));
        let mut copy = Captured {
            time: SystemTime::now(),
            place: Place::FromPort(PortId(3)),
            vni: Some(vni),
            fate: Fate::Send(remote),
            outer: None,
            bytes: vec![0; 60],
        };
        let seen = names.describe(&copy, 60);
        assert_eq!((&*seen.interface, &*seen.peer), ("blue/c1", "c1"));
        assert_eq!(seen.verdict, "send to h2 (192.0.2.2:50000)");
        assert_eq!((seen.frame_at, seen.reason), (Some(0), None));
        copy.place = Place::FromRemote(remote);
        copy.fate = Fate::Drop(DropReason::NotAMember);
        copy.bytes = [&vxlan::Header::emit(vni)[..], &[0; 60]].concat();
        copy.outer = Some(Outer {
            from: remote,
            to: SocketAddr::from(([192, 0, 2, 1], 4789)),
            fields: OuterFields::default(),
        });
        let mut sent = Vec::new();
        assert!(names.send(&copy, &mut sent).expect("a vector takes all"));
        let end = sent.iter().position(|byte| *byte == b'\n').expect("a line");
        let (head, packet) = (&sent[..end], &sent[end + 1..]);
        let Event::Seen(seen) = serde_json::from_slice(head).expect("JSON") else {
            panic!("not a copy")
        };
        assert_eq!(seen.length, packet.len());
        assert_eq!(seen.frame_at, Some(20 + 8 + 8));
        assert_eq!(
            (&*seen.interface, &*seen.peer),
            ("underlay 192.0.2.1", "h2")
        );
        assert_eq!(seen.reason.as_deref(), Some("not-a-member"));
        assert!(seen.verdict.starts_with("drop not-a-member: The sender"));
    }
}
