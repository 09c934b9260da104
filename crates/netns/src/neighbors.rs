//! Static neighbours, and the forwarding entries of kernel vxlan devices and bridges.

use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::{Netlink, NetlinkError};

impl Netlink {
    /// Adds a permanent neighbour, in the place of whatever is known for the address.
    ///
    /// # Errors
    /// When the interface is not there, or without root.
    pub fn add_neighbor(&self, dev: &str, ip: IpAddr, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let operation = || format!("add neighbour {ip} to {dev}");
        let mut message = neighbor(self.index(operation, dev)?, ip);
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.change(
            operation,
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Removes a neighbour; one that is not there is fine.
    ///
    /// # Errors
    /// As [`Self::add_neighbor`].
    pub fn del_neighbor(&self, dev: &str, ip: IpAddr) -> Result<(), NetlinkError> {
        let operation = || format!("remove neighbour {ip} from {dev}");
        let message = neighbor(self.index(operation, dev)?, ip);
        match self.change(operation, RouteNetlinkMessage::DelNeighbour(message), 0) {
            Err(error) if error.is(Errno::NOENT) => Ok(()),
            done => done,
        }
    }

    /// Adds a permanent entry to a vxlan device: frames for `mac` go to `dst`, in the place of where they went. The zero
    /// MAC is the flood list, to which `dst` is added.
    ///
    /// # Errors
    /// As [`Self::add_neighbor`], and when `dev` is no vxlan device.
    pub fn add_fdb(&self, dev: &str, mac: [u8; 6], dst: IpAddr) -> Result<(), NetlinkError> {
        let operation = || format!("add a forwarding entry via {dst} to {dev}");
        let mut message = neighbor(self.index(operation, dev)?, dst);
        message.header.family = AddressFamily::Bridge;
        message.header.state = NeighbourState::Permanent;
        // NTF_SELF: the entry is the device's own, not that of a bridge it may be a port of.
        message.header.flags = NeighbourFlags::Own;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let flags = if mac == [0; 6] {
            NLM_F_APPEND
        } else {
            NLM_F_REPLACE
        };
        self.change(
            operation,
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | flags,
        )
    }
}

fn neighbor(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = index;
    message.header.family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message
        .attributes
        .push(NeighbourAttribute::Destination(match ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        }));
    message
}
