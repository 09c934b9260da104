//! Addresses of interfaces.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::AddressMessageBuilder;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rustix::io::Errno;

use crate::{Netlink, NetlinkError};

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface.
    pub ifname: String,
    /// The address with the length of its subnet's prefix.
    pub net: IpNet,
}

impl Netlink {
    /// Every address of the namespace, link-local ones included.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        let names = self.names()?;
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump(|| "list addresses".to_owned(), message)?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| address_of(answer, &names))
            .collect())
    }

    /// Adds an address; one that is there already is fine. IPv6 ones are usable at once, without duplicate address
    /// detection: whoever gives them out knows that they are unique.
    ///
    /// # Errors
    /// When the interface is not there, or without root.
    pub fn add_address(&self, name: &str, net: IpNet) -> Result<(), NetlinkError> {
        let operation = || format!("add address {net} to {name}");
        let message = message_of(self.index(operation, name)?, net);
        match self.change(
            operation,
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        ) {
            Err(error) if error.is(Errno::EXIST) => Ok(()),
            done => done,
        }
    }

    /// Removes an address; one that is not there is fine.
    ///
    /// # Errors
    /// As [`Self::add_address`].
    pub fn del_address(&self, name: &str, net: IpNet) -> Result<(), NetlinkError> {
        let operation = || format!("remove address {net} from {name}");
        let message = message_of(self.index(operation, name)?, net);
        match self.change(operation, RouteNetlinkMessage::DelAddress(message), 0) {
            Err(error) if error.is(Errno::ADDRNOTAVAIL) => Ok(()),
            done => done,
        }
    }

    /// Interfaces' names by index.
    pub(crate) fn names(&self) -> Result<HashMap<u32, String>, NetlinkError> {
        Ok(self
            .links()?
            .into_iter()
            .map(|link| (link.index, link.name))
            .collect())
    }
}

fn message_of(index: u32, net: IpNet) -> AddressMessage {
    match net {
        IpNet::V4(net) => AddressMessageBuilder::<std::net::Ipv4Addr>::new()
            .index(index)
            .address(net.addr(), net.prefix_len())
            .build(),
        IpNet::V6(net) => {
            let mut message = AddressMessageBuilder::<std::net::Ipv6Addr>::new()
                .index(index)
                .address(net.addr(), net.prefix_len())
                .build();
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
            message
        }
    }
}

fn address_of(message: RouteNetlinkMessage, names: &HashMap<u32, String>) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    let mut own: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link "address" is the other end's and "local" ours; elsewhere they are the same.
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => own = own.or(Some(*address)),
            _ => {}
        }
    }
    let net = IpNet::new(own?, message.header.prefix_len).ok()?;
    // An interface that came between the two lists has no name here, and is not asked for by one either.
    let ifname = names.get(&message.header.index)?.clone();
    Some(Address { ifname, net })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_is_added_without_duplicate_address_detection() {
        let net: IpNet = "fd00::1/64".parse().expect("a prefix");
        let message = message_of(7, net);
        assert!(
            message
                .attributes
                .contains(&AddressAttribute::Flags(AddressFlags::Nodad))
        );
        let names = HashMap::from([(7, "eth0".to_owned())]);
        let read = address_of(RouteNetlinkMessage::NewAddress(message), &names);
        assert_eq!(
            read,
            Some(Address {
                ifname: "eth0".to_owned(),
                net
            })
        );
    }

    #[test]
    fn the_own_end_of_a_point_to_point_link_is_the_address() {
        let mut message = message_of(1, "192.0.2.1/32".parse().expect("a prefix"));
        message.attributes = vec![
            AddressAttribute::Address("192.0.2.2".parse().expect("an address")),
            AddressAttribute::Local("192.0.2.1".parse().expect("an address")),
        ];
        let names = HashMap::from([(1, "ppp0".to_owned())]);
        let read =
            address_of(RouteNetlinkMessage::NewAddress(message), &names).expect("an address");
        assert_eq!(
            read.net.addr(),
            "192.0.2.1".parse::<IpAddr>().expect("an address")
        );
    }
}
