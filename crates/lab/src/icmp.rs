//! Many pings side by side: one process, one raw socket for each namespace and family.
//!
//! A socket stays in the namespace it was opened in, so one thread can send and listen for all of them. Bytes of
//! ICMP echo (RFC 792, RFC 4443 §4) are here, and nothing else of ICMP.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use netns::Netns;
use rustix::event::{PollFd, PollFlags, Timespec};
use socket2::{Domain, Protocol, Socket, Type};

use crate::interrupt;

/// Time between two pings of one pair, at least.
const INTERVAL: Duration = Duration::from_millis(200);
/// Time between two pings of any pairs, at least.
const SPACING: Duration = Duration::from_micros(300);
/// How long the last answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes after the ICMP header, as `ping` sends them.
const PAYLOAD_LEN: usize = 56;
const HEADER_LEN: usize = 8;

/// Who pings whom.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// The namespace it is sent from.
    pub(crate) netns: Netns,
    /// The address it goes to.
    pub(crate) to: IpAddr,
}

/// What one pair saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sent: u32,
    /// Round-trip times of the answered ones, in the order of their sending.
    pub(crate) rtts: Vec<Duration>,
    /// Why the first one that could not be sent was not.
    pub(crate) refused: Option<String>,
}

/// One echo request's place in the run; it travels in the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    run: u64,
    pair: u32,
    sequence: u32,
}

/// A socket inside one namespace.
struct Station {
    socket: Socket,
    v6: bool,
}

/// Pings all pairs `count` times, all at once in turns.
pub(crate) fn ping(pairs: &[Pair], count: u32) -> anyhow::Result<Vec<Seen>> {
    let (sockets, socket_of) = open_sockets(pairs)?;
    let run = RandomState::new().hash_one(std::process::id());
    let pairs_count = u32::try_from(pairs.len()).context("too many pairs")?;
    let interval = INTERVAL.max(SPACING * pairs_count);
    let spacing = interval / pairs_count.max(1);
    let mut sent_at: Vec<Vec<Instant>> = vec![Vec::new(); pairs.len()];
    let mut rtts: Vec<Vec<Option<Duration>>> = vec![vec![None; count as usize]; pairs.len()];
    let mut seen = vec![Seen::default(); pairs.len()];
    let mut missing = pairs.len() * count as usize;
    let mut collect =
        |wait: Duration, sent_at: &[Vec<Instant>], rtts: &mut [Vec<Option<Duration>>]| {
            receive(&sockets, wait, |socket, stamp, now| {
                let pair = stamp.pair as usize;
                let known = stamp.run == run && socket_of.get(pair) == Some(&socket);
                let at = known
                    .then(|| sent_at[pair].get(stamp.sequence as usize))
                    .flatten();
                if let Some(at) = at {
                    let slot = &mut rtts[pair][stamp.sequence as usize];
                    if slot.is_none() {
                        *slot = Some(now.saturating_duration_since(*at));
                        missing -= 1;
                    }
                }
            })?;
            anyhow::Ok(missing)
        };

    let mut due = Instant::now();
    for sequence in 0..count {
        for pair in 0..pairs_count {
            interrupt::check()?;
            // Also when late: answers must not pile up in the sockets.
            loop {
                let wait = due.saturating_duration_since(Instant::now());
                collect(wait, &sent_at, &mut rtts)?;
                if Instant::now() >= due {
                    break;
                }
            }
            // What was late isn't made up for: a burst would measure itself.
            due = due.max(Instant::now()) + spacing;
            let index = pair as usize;
            let to = pairs[index].to;
            let packet = request(
                to.is_ipv6(),
                Stamp {
                    run,
                    pair,
                    sequence,
                },
            );
            sent_at[index].push(Instant::now());
            seen[index].sent += 1;
            if let Err(error) = sockets[socket_of[index]]
                .socket
                .send_to(&packet, &SocketAddr::new(to, 0).into())
            {
                seen[index].refused.get_or_insert_with(|| error.to_string());
            }
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while let Some(wait) = deadline.checked_duration_since(Instant::now()) {
        interrupt::check()?;
        if collect(wait, &sent_at, &mut rtts)? == 0 {
            break;
        }
    }
    for (seen, rtts) in seen.iter_mut().zip(rtts) {
        seen.rtts = rtts.into_iter().flatten().collect();
    }
    Ok(seen)
}

/// One socket for each namespace and family, and which of them each pair uses.
fn open_sockets(pairs: &[Pair]) -> anyhow::Result<(Vec<Station>, Vec<usize>)> {
    let mut sockets = Vec::new();
    let mut by_place = HashMap::new();
    let mut socket_of = Vec::new();
    for pair in pairs {
        let place = (pair.netns.id(), pair.to.is_ipv6());
        let index = match by_place.get(&place) {
            Some(&index) => index,
            None => {
                let socket = pair.netns.run(|| open(place.1))?.with_context(|| {
                    format!(
                        "can't open an ICMP socket in namespace {}",
                        pair.netns.name().unwrap_or("?")
                    )
                })?;
                sockets.push(Station {
                    socket,
                    v6: place.1,
                });
                by_place.insert(place, sockets.len() - 1);
                sockets.len() - 1
            }
        };
        socket_of.push(index);
    }
    Ok((sockets, socket_of))
}

fn open(v6: bool) -> io::Result<Socket> {
    let socket = if v6 {
        Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?
    } else {
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Hands on what has come to any socket, after waiting for something for at most `wait`.
fn receive(
    sockets: &[Station],
    wait: Duration,
    mut on_reply: impl FnMut(usize, Stamp, Instant),
) -> anyhow::Result<()> {
    let mut fds: Vec<PollFd<'_>> = sockets
        .iter()
        .map(|socket| PollFd::new(&socket.socket, PollFlags::IN))
        .collect();
    let timeout = Timespec::try_from(wait).context("waiting times are short")?;
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("can't wait for answers"),
    }
    let now = Instant::now();
    let ready: Vec<usize> = fds
        .iter()
        .enumerate()
        .filter(|(_, fd)| !fd.revents().is_empty())
        .map(|(index, _)| index)
        .collect();
    drop(fds);
    for index in ready {
        let (mut socket, v6) = (&sockets[index].socket, sockets[index].v6);
        let mut buffer = [0; 512];
        // An error is an earlier packet's, or says that nothing is left.
        while let Ok(len) = socket.read(&mut buffer) {
            if let Some(stamp) = reply(v6, &buffer[..len]) {
                on_reply(index, stamp, now);
            }
        }
    }
    Ok(())
}

/// An echo request; ICMPv6's checksum is the kernel's matter.
fn request(v6: bool, stamp: Stamp) -> [u8; HEADER_LEN + PAYLOAD_LEN] {
    let mut packet = [0; HEADER_LEN + PAYLOAD_LEN];
    packet[0] = if v6 { 128 } else { 8 };
    packet[4..6].copy_from_slice(&stamp.run.to_be_bytes()[..2]);
    packet[6..8].copy_from_slice(&stamp.sequence.to_be_bytes()[2..]);
    packet[8..16].copy_from_slice(&stamp.run.to_be_bytes());
    packet[16..20].copy_from_slice(&stamp.pair.to_be_bytes());
    packet[20..24].copy_from_slice(&stamp.sequence.to_be_bytes());
    if !v6 {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The stamp in an echo reply. A raw IPv4 socket hands over the IP header too.
fn reply(v6: bool, bytes: &[u8]) -> Option<Stamp> {
    let icmp = if v6 {
        bytes
    } else {
        bytes.get(usize::from(bytes.first()? & 0x0f) * 4..)?
    };
    let kind = if v6 { 129 } else { 0 };
    if icmp.len() != HEADER_LEN + PAYLOAD_LEN || icmp[0] != kind {
        return None;
    }
    Some(Stamp {
        run: u64::from_be_bytes(icmp[8..16].try_into().ok()?),
        pair: u32::from_be_bytes(icmp[16..20].try_into().ok()?),
        sequence: u32::from_be_bytes(icmp[20..24].try_into().ok()?),
    })
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        run: 0x0102_0304_0506_0708,
        pair: 9,
        sequence: 0x000a_000b,
    };

    #[test]
    fn a_request_is_a_valid_echo() {
        let packet = request(false, STAMP);
        assert_eq!(packet[..2], [8, 0]);
        assert_eq!(packet[4..8], [1, 2, 0, 0x0b]);
        assert_eq!(
            checksum(&packet),
            0,
            "with its checksum in it, the sum is all ones"
        );
        assert_eq!(checksum(&[0xff; 64]), 0);
        assert_eq!(request(true, STAMP)[..4], [128, 0, 0, 0]);
    }

    #[test]
    fn replies_are_read_and_all_else_is_not() {
        let mut echo = request(false, STAMP);
        echo[0] = 0;
        let ip = |header: &[u8], echo: &[u8]| [header, echo].concat();
        assert_eq!(reply(false, &ip(&[0x45; 20], &echo)), Some(STAMP));
        assert_eq!(
            reply(false, &ip(&[0x46; 24], &echo)),
            Some(STAMP),
            "with IP options"
        );
        echo[0] = 129;
        assert_eq!(reply(true, &echo), Some(STAMP));
        assert_eq!(reply(false, &ip(&[0x45; 20], &echo)), None, "wrong type");
        for len in 0..echo.len() {
            assert_eq!(reply(true, &echo[..len]), None);
            assert_eq!(reply(false, &echo[..len]), None);
        }
        assert_eq!(
            reply(false, &[0x4f; 30]),
            None,
            "a header longer than the packet"
        );
    }
}
