//! Pings from places of a lab, wherever they are: those of this machine from here, those of a virtual machine by
//! `towline lab load ping` in it. All at once.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use netns::{Netlink, Netns};
use serde::{Deserialize, Serialize};

use crate::agent;
use crate::icmp::{self, Pair};
use crate::spot::Spot;
use crate::vm::Machine;

/// One pair, as it is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Aim {
    /// Where it is sent from.
    pub(crate) from: Spot,
    /// Where it goes to; none: to the gateway of the place.
    pub(crate) to: Option<IpAddr>,
}

/// What one pair saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answers {
    /// Where it went to.
    pub(crate) to: IpAddr,
    pub(crate) sent: u32,
    /// Microseconds of the answered ones, in the order of their sending.
    pub(crate) rtts_us: Vec<u64>,
    /// Why the first one that could not be sent was not.
    pub(crate) refused: Option<String>,
}

/// A pair as a guest is asked for it: a namespace's name, or its own.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    from: Option<String>,
    to: Option<IpAddr>,
}

/// Pings each pair `count` times. The answers are in the order of the pairs.
pub(crate) fn ping(aims: &[Aim], count: u32) -> anyhow::Result<Vec<Answers>> {
    let mut here = Vec::new();
    let mut guests: Vec<(&Machine, Vec<(usize, Asked)>)> = Vec::new();
    for (index, aim) in aims.iter().enumerate() {
        match &aim.from {
            Spot::Here(netns) => here.push((index, netns.clone(), aim.to)),
            Spot::Guest(machine, netns) => {
                let asked = Asked {
                    from: netns.clone(),
                    to: aim.to,
                };
                match guests.iter_mut().find(|(of, _)| of.name == machine.name) {
                    Some((_, list)) => list.push((index, asked)),
                    None => guests.push((machine, vec![(index, asked)])),
                }
            }
        }
    }
    let mut seen: Vec<Option<Answers>> = vec![None; aims.len()];
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let mut threads = vec![scope.spawn(move || {
            let (indices, pairs): (Vec<usize>, Vec<_>) = here
                .into_iter()
                .map(|(index, netns, to)| (index, (netns, to)))
                .unzip();
            anyhow::Ok((indices, from_here(pairs, count)?))
        })];
        for (machine, asked) in guests {
            threads.push(scope.spawn(move || {
                let (indices, asked): (Vec<usize>, Vec<Asked>) = asked.into_iter().unzip();
                anyhow::Ok((indices, from_guest(machine, &asked, count)?))
            }));
        }
        for thread in threads {
            let (indices, answers) = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (index, answer) in indices.into_iter().zip(answers) {
                seen[index] = Some(answer);
            }
        }
        Ok(())
    })?;
    seen.into_iter()
        .collect::<Option<Vec<_>>>()
        .context("a guest answered for fewer pairs than it was asked for")
}

/// `towline lab load ping`: reads pairs from stdin, and prints what they saw.
pub(crate) fn serve(count: u32) -> anyhow::Result<Vec<Answers>> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("can't read what to ping")?;
    let asked: Vec<Asked> = serde_json::from_str(&text).context("no list of pairs came")?;
    let pairs = asked
        .into_iter()
        .map(|asked| {
            let netns = match &asked.from {
                Some(name) => Netns::open(name)?,
                None => Netns::current()?,
            };
            Ok((netns, asked.to))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    from_here(pairs, count)
}

fn from_guest(machine: &Machine, asked: &[Asked], count: u32) -> anyhow::Result<Vec<Answers>> {
    let mut command = Command::new(agent::program()?);
    command.args(["lab", "load", "ping", "--count", &count.to_string()]);
    let mut child = Spot::Guest(machine.clone(), None).spawn(
        &mut command,
        [Stdio::piped(), Stdio::piped(), Stdio::piped()],
    )?;
    let text = serde_json::to_vec(asked).context("addresses are plain data")?;
    if let Some(mut input) = child.stdin.take() {
        // Whoever reads no more says why.
        let _ = input.write_all(&text);
    }
    let output = child
        .wait_with_output()
        .context("can't read what a guest has seen")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", machine.name, agent::plain(&said));
    }
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} says not what its pings saw", machine.name))
}

fn from_here(pairs: Vec<(Netns, Option<IpAddr>)>, count: u32) -> anyhow::Result<Vec<Answers>> {
    let pairs = pairs
        .into_iter()
        .map(|(netns, to)| {
            let to = match to {
                Some(to) => to,
                None => gateway(&netns)?.into(),
            };
            Ok(Pair { netns, to })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let seen = icmp::ping(&pairs, count)?;
    let answers = pairs.iter().zip(seen).map(|(pair, seen)| Answers {
        to: pair.to,
        sent: seen.sent,
        rtts_us: seen
            .rtts
            .iter()
            .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX))
            .collect(),
        refused: seen.refused,
    });
    Ok(answers.collect())
}

/// Where the namespace's IPv4 default route leads.
fn gateway(netns: &Netns) -> anyhow::Result<Ipv4Addr> {
    let routes = Netlink::open(netns)?.routes()?;
    routes
        .into_iter()
        .find_map(|route| match (route.dst, route.via) {
            (ipnet::IpNet::V4(net), Some(IpAddr::V4(via))) if net.prefix_len() == 0 => Some(via),
            _ => None,
        })
        .with_context(|| {
            format!(
                "{} has no IPv4 default route",
                netns.name().unwrap_or("a namespace")
            )
        })
}
