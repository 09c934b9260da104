//! Interfaces: listed, made, changed, removed. All by name: an index is looked up only where the kernel takes nothing else.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop,
};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};
use rustix::io::Errno;

use crate::{Netlink, NetlinkError, Netns};

/// An interface as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in this namespace.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Bytes of the largest packet, without the Ethernet header.
    pub mtu: u32,
    /// Its Ethernet address; zero for an interface without one.
    pub mac: [u8; 6],
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is up and has a carrier, as far as the kernel has told its users: a moment after the carrier itself.
    pub running: bool,
    /// `bridge`, `veth`, `vxlan`, `tun` …; `None` for hardware and `lo`.
    pub kind: Option<String>,
    /// Index of the bridge (or bond) it is a port of.
    pub master: Option<u32>,
    /// What `ip link set … alias` wrote there.
    pub alias: Option<String>,
    /// Names beside [`Self::name`], of up to 127 bytes.
    pub alternative_names: Vec<String>,
    /// The UDP port of a vxlan device.
    pub vxlan_port: Option<u16>,
}

/// What a kernel vxlan device is to be.
#[derive(Clone, Debug)]
pub struct Vxlan {
    /// Its VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// Outer source address, which also decides the outer family.
    pub local: IpAddr,
    /// UDP port, own and remote.
    pub port: u16,
    /// Whether it learns remotes from what it receives.
    pub learning: bool,
    /// The underlay interface, where routes do not decide.
    pub dev: Option<String>,
    /// Whether outer UDP checksums are computed; over IPv6, without them zero is accepted too.
    pub udp_checksum: bool,
}

impl Netlink {
    /// Every interface of the namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let answers = self.dump(
            || "list interfaces".to_owned(),
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(answers.into_iter().filter_map(link_of).collect())
    }

    /// The interface of that name, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses, as it does a name of more than 15 bytes.
    pub fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let message = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build());
        match self.request(
            || format!("look up interface {name}"),
            message,
            NLM_F_REQUEST,
        ) {
            Ok(answers) => Ok(answers.into_iter().find_map(link_of)),
            Err(error) if error.is(Errno::NODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a bridge, without spanning tree, down.
    ///
    /// # Errors
    /// When the name is taken or bad, or without root.
    pub fn add_bridge(&self, name: &str) -> Result<(), NetlinkError> {
        self.add_link(
            || format!("add bridge {name}"),
            LinkMessageBuilder::<LinkBridge>::new(name).build(),
        )
    }

    /// Makes a veth pair with `peer` born inside `peer_netns`, both down.
    ///
    /// # Errors
    /// As [`Self::add_bridge`], on either side.
    pub fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> Result<(), NetlinkError> {
        let other = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer)
            .setns_by_fd(peer_netns.as_fd().as_raw_fd())
            .build();
        let pair = LinkVeth::new(name, peer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(other)))
            .build();
        self.add_link(
            || format!("add veth {name} with its peer {peer} in {peer_netns}"),
            pair,
        )
    }

    /// Makes a kernel vxlan device, down.
    ///
    /// # Errors
    /// As [`Self::add_bridge`], and when the underlay interface is not there.
    pub fn add_vxlan(&self, name: &str, spec: &Vxlan) -> Result<(), NetlinkError> {
        let operation = || format!("add vxlan device {name}");
        let mut builder = LinkVxlan::new(name, spec.vni)
            .port(spec.port)
            .learning(spec.learning);
        builder = match spec.local {
            IpAddr::V4(local) => builder.local(local).udp_csum(spec.udp_checksum),
            IpAddr::V6(local) => builder
                .local6(local)
                .append_info_data(InfoVxlan::UDPZeroCsumTX(!spec.udp_checksum))
                .append_info_data(InfoVxlan::UDPZeroCsumRX(!spec.udp_checksum)),
        };
        if let Some(dev) = &spec.dev {
            builder = builder.dev(self.index(operation, dev)?);
        }
        self.add_link(operation, builder.build())
    }

    /// Removes an interface (a veth with its peer). Says whether it was there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_link(&self, name: &str) -> Result<bool, NetlinkError> {
        let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_name(name).build());
        match self.change(|| format!("remove interface {name}"), message, 0) {
            Ok(()) => Ok(true),
            Err(error) if error.is(Errno::NODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sets the interface up.
    ///
    /// # Errors
    /// When it is not there, or without root; so for all of the following.
    pub fn set_up(&self, name: &str) -> Result<(), NetlinkError> {
        self.set_link(
            || format!("set {name} up"),
            LinkUnspec::new_with_name(name).up(),
        )
    }

    /// Sets the interface down.
    ///
    /// # Errors
    /// As [`Self::set_up`].
    pub fn set_down(&self, name: &str) -> Result<(), NetlinkError> {
        self.set_link(
            || format!("set {name} down"),
            LinkUnspec::new_with_name(name).down(),
        )
    }

    /// Sets the MTU, in bytes.
    ///
    /// # Errors
    /// As [`Self::set_up`], and when the device cannot carry that much.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), NetlinkError> {
        self.set_link(
            || format!("set the MTU of {name} to {mtu}"),
            LinkUnspec::new_with_name(name).mtu(mtu),
        )
    }

    /// Sets the Ethernet address.
    ///
    /// # Errors
    /// As [`Self::set_up`], and when the address is a multicast one.
    pub fn set_mac(&self, name: &str, mac: [u8; 6]) -> Result<(), NetlinkError> {
        self.set_link(
            || format!("set the MAC address of {name}"),
            LinkUnspec::new_with_name(name).address(mac.to_vec()),
        )
    }

    /// Makes the interface a port of bridge `master`, or of none.
    ///
    /// # Errors
    /// As [`Self::set_up`], for either of the two.
    pub fn set_master(&self, name: &str, master: Option<&str>) -> Result<(), NetlinkError> {
        let operation = || format!("make {name} a port of {}", master.unwrap_or("no bridge"));
        let index = match master {
            Some(master) => self.index(operation, master)?,
            None => 0,
        };
        self.set_link(operation, LinkUnspec::new_with_name(name).controller(index))
    }

    /// Writes the alias, a free text of up to 255 bytes.
    ///
    /// # Errors
    /// As [`Self::set_up`].
    pub fn set_alias(&self, name: &str, alias: &str) -> Result<(), NetlinkError> {
        self.set_link(
            || format!("set the alias of {name}"),
            LinkUnspec::new_with_name(name).alias(alias),
        )
    }

    /// Gives the interface one more name, of up to 127 bytes, under which `ip` finds it too. One it has is fine.
    ///
    /// # Errors
    /// As [`Self::set_up`], and when another interface has that name.
    pub fn add_alternative_name(&self, name: &str, other: &str) -> Result<(), NetlinkError> {
        let operation = || format!("give {name} the alternative name {other}");
        let index = self.index(operation, name)?;
        let mut message = LinkUnspec::new_with_index(index).build();
        message
            .attributes
            .push(LinkAttribute::PropList(vec![Prop::AltIfName(
                other.to_owned(),
            )]));
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_APPEND;
        match self.change(operation, RouteNetlinkMessage::NewLinkProp(message), flags) {
            Err(error) if error.is(Errno::EXIST) => match self.link(name)? {
                Some(link) if link.alternative_names.iter().any(|known| known == other) => Ok(()),
                _ => Err(error),
            },
            done => done,
        }
    }

    /// Whether a bridge port may exchange frames with other isolated ports of its bridge.
    ///
    /// # Errors
    /// As [`Self::set_up`], and when it is no bridge port.
    pub fn set_bridge_port_isolated(&self, name: &str, isolated: bool) -> Result<(), NetlinkError> {
        let operation = || format!("set bridge port {name} isolated");
        let index = self.index(operation, name)?;
        let message = LinkBridgePort::new(index).isolated(isolated).build();
        self.change(operation, RouteNetlinkMessage::NewLink(message), 0)
    }

    /// Gives the interface another name.
    ///
    /// # Errors
    /// As [`Self::set_up`], and when the new name is taken.
    pub fn rename(&self, name: &str, new: &str) -> Result<(), NetlinkError> {
        let operation = || format!("rename {name} to {new}");
        let index = self.index(operation, name)?;
        self.set_link(operation, LinkUnspec::new_with_index(index).name(new))
    }

    /// The index of an interface, or an error that names it.
    pub(crate) fn index(
        &self,
        operation: impl Fn() -> String,
        name: &str,
    ) -> Result<u32, NetlinkError> {
        match self.link(name)? {
            Some(link) => Ok(link.index),
            None => Err(NetlinkError::NoInterface {
                operation: operation(),
                name: name.to_owned(),
            }),
        }
    }

    fn add_link(
        &self,
        operation: impl Fn() -> String,
        message: LinkMessage,
    ) -> Result<(), NetlinkError> {
        self.change(
            operation,
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    fn set_link(
        &self,
        operation: impl Fn() -> String,
        builder: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetlinkError> {
        self.change(operation, RouteNetlinkMessage::SetLink(builder.build()), 0)
    }
}

fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        mac: [0; 6],
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.header.flags.contains(LinkFlags::Running),
        kind: None,
        master: None,
        alias: None,
        alternative_names: Vec::new(),
        vxlan_port: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            // Tunnels without Ethernet have addresses of other lengths.
            LinkAttribute::Address(mac) => link.mac = mac.try_into().unwrap_or_default(),
            LinkAttribute::Controller(index) if index != 0 => link.master = Some(index),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::PropList(properties) => {
                link.alternative_names = properties
                    .into_iter()
                    .filter_map(|property| match property {
                        Prop::AltIfName(name) => Some(name),
                        _ => None,
                    })
                    .collect();
            }
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| match info {
                LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                LinkInfo::Data(InfoData::Vxlan(options)) => {
                    link.vxlan_port = options.into_iter().find_map(|option| match option {
                        InfoVxlan::Port(port) => Some(port),
                        _ => None,
                    });
                }
                _ => {}
            }),
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_listed_without_root() {
        let netns = Netns::current().expect("/proc is mounted");
        let netlink = Netlink::open(&netns).expect("a netlink socket");
        let lo = netlink
            .link("lo")
            .expect("a look-up")
            .expect("every namespace has lo");
        assert_eq!(lo.mac, [0; 6]);
        assert!(netlink.links().expect("a list").contains(&lo));
        assert_eq!(netlink.link("no-such-link").expect("a look-up"), None);
        let error = netlink
            .set_master("lo", Some("no-such-link"))
            .expect_err("no such bridge");
        assert!(error.to_string().contains("no-such-link"), "{error}");
    }
}
