//! The block of addresses that this host was leased, and what is done of its own accord while no manager answers.

use std::net::IpAddr;

use vtep::Vni;

use super::{Agent, Stream};
use crate::epoch::Epoch;
use crate::lease::{LeaseError, Leased};
use crate::message::{ToAgent, ToManager};
use crate::network::Endpoint;

impl Agent {
    /// Takes an endpoint out of this host's block, while no manager answers: once for ever. The message is what a cache must
    /// keep from now on.
    pub fn take_leased(
        &mut self,
        vni: Vni,
        container: &str,
        wanted: &[IpAddr],
    ) -> Result<(Endpoint, ToAgent), LeaseError> {
        if self.is_up() {
            return Err(LeaseError::ManagerAnswers);
        }
        let stream = self
            .streams
            .get_mut(&vni)
            .ok_or(LeaseError::NotFollowed(vni))?;
        let network = stream.name().unwrap_or_default().to_owned();
        let Leased { epoch, mac, ips } = stream.block.take(&network, wanted)?;
        let endpoint = Endpoint {
            vni,
            container: container.to_owned(),
            mac,
            ips,
            epoch,
            member: None,
            names: None,
        };
        let block = stream.block.0.clone();
        Ok((endpoint, ToAgent::Lease { vni, block }))
    }

    /// A manager says what this host's block is.
    pub(super) fn lease(&mut self, vni: Vni, block: Vec<Leased>) {
        let used = |epoch: Epoch| self.endpoints.contains_key(&(vni, epoch));
        let Some(stream) = self.streams.get_mut(&vni) else {
            return;
        };
        let table = stream.table();
        let usable = |leased: &Leased| {
            let newer = |ip: &IpAddr| table.row(*ip).is_some_and(|row| row.epoch >= leased.epoch);
            !leased.ips.is_empty() && !leased.ips.iter().any(newer) && !used(leased.epoch)
        };
        let block: Vec<Leased> = block.into_iter().filter(usable).collect();
        let before = std::mem::replace(&mut stream.block, Block(block));
        let gave_back = before
            .0
            .iter()
            .any(|leased| !stream.block.0.contains(leased));
        // The manager hands nothing of it to others before it hears so.
        if gave_back && self.is_up() {
            self.messages.push_back(self.streams[&vni].held());
        }
    }

    /// Tells the manager which addresses of its blocks this host still has, after what became of the others.
    pub(super) fn tell_blocks(&mut self) {
        let held = self.streams.values().map(Stream::held);
        self.messages.extend(held);
    }
}

/// What is left of a block, the highest address first.
#[derive(Debug, Default)]
pub(super) struct Block(pub(super) Vec<Leased>);

impl Block {
    fn take(&mut self, network: &str, wanted: &[IpAddr]) -> Result<Leased, LeaseError> {
        if self.0.is_empty() {
            return Err(LeaseError::empty(network));
        }
        let fits = |leased: &Leased| wanted.iter().all(|ip| leased.ips.contains(ip));
        match (self.0.iter().position(fits), wanted.first()) {
            (Some(index), _) => Ok(self.0.remove(index)),
            (None, Some(&ip)) => Err(LeaseError::NotLeased {
                ip,
                network: network.to_owned(),
                left: self.ips(),
            }),
            (None, None) => Err(LeaseError::empty(network)),
        }
    }

    pub(super) fn ips(&self) -> Vec<IpAddr> {
        self.0
            .iter()
            .flat_map(|leased| leased.ips.iter().copied())
            .collect()
    }

    pub(super) fn epochs(&self) -> Vec<Epoch> {
        self.0.iter().map(|leased| leased.epoch).collect()
    }
}

impl Stream {
    pub(super) fn held(&self) -> ToManager {
        ToManager::Lease {
            vni: self.vni,
            held: self.block.epochs(),
        }
    }
}
