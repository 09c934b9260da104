//! What is behind a name: borrowed from the zones, so that a question costs as much as its answer has room for, and not as much as a
//! name has addresses.

use std::net::IpAddr;

use super::zone::Zone;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// The name of an address.
    Ptr,
    /// Where a service's port is.
    Srv,
    /// Something that no name of ours has.
    Other,
}

/// One record behind a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An address.
    Address(IpAddr),
    /// A name, `container.network`.
    Name(String),
    /// A port of a member of a service.
    Service {
        /// Its weight.
        weight: u16,
        /// The port.
        port: u16,
        /// The member's name, `container.network`.
        target: String,
        /// Its addresses.
        ips: Vec<IpAddr>,
    },
}

/// What a name of ours has.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// How long its records may be kept, in seconds.
    pub ttl: u32,
    /// The name would be ours, and there is none.
    pub absent: bool,
    pub(super) records: Records<'a>,
    /// Which of them is the first.
    pub(super) first: usize,
}

/// Where the records are.
#[derive(Clone, Debug)]
pub(super) enum Records<'a> {
    /// The name has none of the kind.
    None,
    /// Addresses of the kind.
    Addresses(&'a [IpAddr]),
    /// The name of a container or service.
    Name { zone: &'a Zone, name: &'a str },
    /// A port of the members that serve.
    Ports {
        zone: &'a Zone,
        members: &'a Ips,
        port: u16,
    },
}

impl<'a> Found<'a> {
    /// The records, each made when it is asked for; those of a name with several begin with another each time.
    pub fn answers(&self) -> impl Iterator<Item = Answer> + use<'a> {
        let (records, count, first) = (self.records.clone(), self.count(), self.first);
        let turned = (0..count).map(move |index| (index + first) % count);
        turned.filter_map(move |index| match records {
            Records::None => None,
            Records::Addresses(ips) => ips.get(index).copied().map(Answer::Address),
            Records::Name { zone, name } => Some(Answer::Name(zone.full(name))),
            Records::Ports {
                zone,
                members,
                port,
            } => zone.port_of_member(members, members.nth(index)?, port),
        })
    }

    /// How many records there may be.
    pub(super) fn count(&self) -> usize {
        match &self.records {
            Records::None => 0,
            Records::Addresses(ips) => ips.len(),
            Records::Name { .. } => 1,
            Records::Ports { members, .. } => members.len(),
        }
    }
}

/// The addresses of a name, in order, IPv4 and IPv6 apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Ips {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
}

impl Ips {
    /// Those of a kind.
    pub(super) fn of(&self, kind: Kind) -> &[IpAddr] {
        match kind {
            Kind::A => &self.v4,
            Kind::Aaaa => &self.v6,
            Kind::Ptr | Kind::Srv | Kind::Other => &[],
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.iter().chain(&self.v6).copied()
    }

    fn nth(&self, index: usize) -> Option<IpAddr> {
        let ip = self.v4.get(index);
        ip.or_else(|| self.v6.get(index.checked_sub(self.v4.len())?))
            .copied()
    }

    fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        let family = if ip.is_ipv4() { &self.v4 } else { &self.v6 };
        family.binary_search(&ip).is_ok()
    }

    pub(super) fn insert(&mut self, ip: IpAddr) {
        let family = self.family(ip);
        if let Err(place) = family.binary_search(&ip) {
            family.insert(place, ip);
        }
    }

    pub(super) fn remove(&mut self, ip: IpAddr) {
        let family = self.family(ip);
        if let Ok(place) = family.binary_search(&ip) {
            family.remove(place);
        }
    }

    fn family(&mut self, ip: IpAddr) -> &mut Vec<IpAddr> {
        if ip.is_ipv4() {
            &mut self.v4
        } else {
            &mut self.v6
        }
    }
}

impl FromIterator<IpAddr> for Ips {
    fn from_iter<T: IntoIterator<Item = IpAddr>>(ips: T) -> Self {
        let mut all = Self::default();
        for ip in ips {
            all.insert(ip);
        }
        all
    }
}
