//! What of a packet or its connection can be looked at, and how the kernel is told to put it into its registers.

use crate::netfilter::attributes::Writer;

use super::uapi::expression;

/// Something of a packet, its interfaces or its connection.
///
/// Addresses of IP say their family to the rule by themselves; ports do not say their protocol: name it first, or make it
/// a part of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    /// The IPv4 source address.
    Source4,
    /// The IPv4 destination address.
    Destination4,
    /// The IPv6 source address.
    Source6,
    /// The IPv6 destination address.
    Destination6,
    /// The source port; fragments but the first have none and match nothing.
    SourcePort,
    /// The destination port.
    DestinationPort,
    /// The transport protocol: [`super::Protocol`].
    Protocol,
    /// The family of the packet, in a table of the family `inet`: see [`super::Rule::ipv4`].
    PacketFamily,
    /// The name of the interface it came in by.
    InputName,
    /// The name of the interface it goes out by.
    OutputName,
    /// The packet's mark, 4 bytes.
    Mark,
    /// The packet's priority, 4 bytes.
    Priority,
    /// The Ethernet source address.
    SourceMac,
    /// The last 2 bytes of the Ethernet source address.
    SourceMacTail,
    /// The Ethernet destination address.
    DestinationMac,
    /// The first 4 bytes of the Ethernet destination address.
    DestinationMacHead,
    /// The last 2 bytes of the Ethernet destination address.
    DestinationMacTail,
    /// The connection's state: [`super::state`].
    State,
    /// The connection's status: [`super::status`].
    Status,
    /// The connection's mark, 4 bytes.
    ConnectionMark,
    /// The connection's label, 16 bytes. A connection whose first packet came before any rule spoke of labels has none.
    Label,
    /// The zone in which the connection is looked up in the direction of its first packet, 2 bytes: connections of different
    /// zones may have the same addresses and ports. To be set before connections are looked up ([`super::priority::RAW`]).
    OriginalZone,
    /// 0 in the direction of the connection's first packet, 1 in the other.
    Direction,
    /// The destination port that the connection's first packet had before any translation.
    OriginalDestinationPort,
    /// The IPv4 destination that the connection's first packet had before any translation.
    OriginalDestination4,
    /// The IPv6 destination that the connection's first packet had before any translation.
    OriginalDestination6,
    /// What the routes say of the destination address: [`LOCAL`] if it is one of this host's.
    DestinationKind,
    /// What the routes say of the source address.
    SourceKind,
}

/// [`Field::DestinationKind`] and [`Field::SourceKind`] of an address of this host (`RTN_LOCAL`).
pub const LOCAL: u32 = 2;

/// A part of a packet: the header it is counted from, its offset and length.
struct Part(u32, u32, u32);

/// Headers that parts are counted from (`enum nft_payload_bases`).
const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

/// Bits of `NFTA_FIB_FLAGS` and what is asked (`NFT_FIB_RESULT_ADDRTYPE`).
const FIB_SOURCE: u32 = 1;
const FIB_DESTINATION: u32 = 2;
const FIB_ADDRESS_TYPE: u32 = 3;

impl Field {
    /// Its length in bytes.
    pub(crate) fn length(self) -> u32 {
        match self {
            Self::Source4
            | Self::Destination4
            | Self::OriginalDestination4
            | Self::Mark
            | Self::Priority
            | Self::State
            | Self::Status
            | Self::ConnectionMark
            | Self::DestinationMacHead
            | Self::DestinationKind
            | Self::SourceKind => 4,
            Self::Source6
            | Self::Destination6
            | Self::OriginalDestination6
            | Self::Label
            | Self::InputName
            | Self::OutputName => 16,
            Self::SourcePort
            | Self::DestinationPort
            | Self::OriginalDestinationPort
            | Self::OriginalZone
            | Self::SourceMacTail
            | Self::DestinationMacTail => 2,
            Self::Protocol | Self::PacketFamily | Self::Direction => 1,
            Self::SourceMac | Self::DestinationMac => 6,
        }
    }

    /// Whether its place in the packet exists in IPv4 alone, or in IPv6 alone.
    pub(crate) fn family(self) -> Option<u8> {
        match self {
            Self::Source4 | Self::Destination4 | Self::OriginalDestination4 => Some(2),
            Self::Source6 | Self::Destination6 | Self::OriginalDestination6 => Some(10),
            _ => None,
        }
    }

    fn part(self) -> Option<Part> {
        Some(match self {
            Self::Source4 => Part(NETWORK, 12, 4),
            Self::Destination4 => Part(NETWORK, 16, 4),
            Self::Source6 => Part(NETWORK, 8, 16),
            Self::Destination6 => Part(NETWORK, 24, 16),
            Self::SourcePort => Part(TRANSPORT, 0, 2),
            Self::DestinationPort => Part(TRANSPORT, 2, 2),
            Self::DestinationMac => Part(LINK, 0, 6),
            Self::DestinationMacHead => Part(LINK, 0, 4),
            Self::DestinationMacTail => Part(LINK, 4, 2),
            Self::SourceMac => Part(LINK, 6, 6),
            Self::SourceMacTail => Part(LINK, 10, 2),
            _ => return None,
        })
    }

    /// `enum nft_meta_keys`.
    fn meta(self) -> Option<u32> {
        Some(match self {
            Self::Priority => 2,
            Self::Mark => 3,
            Self::InputName => 6,
            Self::OutputName => 7,
            Self::PacketFamily => 15,
            Self::Protocol => 16,
            _ => return None,
        })
    }

    /// `enum nft_ct_keys`, and whether the original direction's is meant.
    fn connection(self) -> Option<(u32, bool)> {
        Some(match self {
            Self::State => (0, false),
            Self::Direction => (1, false),
            Self::Status => (2, false),
            Self::ConnectionMark => (3, false),
            Self::OriginalDestinationPort => (12, true),
            Self::Label => (13, false),
            Self::OriginalZone => (17, true),
            Self::OriginalDestination4 => (20, true),
            Self::OriginalDestination6 => (22, true),
            _ => return None,
        })
    }

    /// The expression that puts it into the registers from `register` on.
    pub(crate) fn load(self, list: &mut Writer, register: u32) {
        if let Some(Part(base, offset, length)) = self.part() {
            write(list, "payload", |data| {
                data.u32(1, register);
                data.u32(2, base);
                data.u32(3, offset);
                data.u32(4, length);
            });
        } else if let Some(key) = self.meta() {
            write(list, "meta", |data| {
                data.u32(1, register);
                data.u32(2, key);
            });
        } else if let Some((key, original)) = self.connection() {
            write(list, "ct", |data| {
                data.u32(1, register);
                data.u32(2, key);
                if original {
                    data.u8(3, 0);
                }
            });
        } else {
            let address = match self {
                Self::SourceKind => FIB_SOURCE,
                _ => FIB_DESTINATION,
            };
            write(list, "fib", |data| {
                data.u32(1, register);
                data.u32(2, FIB_ADDRESS_TYPE);
                data.u32(3, address);
            });
        }
    }

    /// The expression that sets it from the registers from `register` on. What cannot be set is refused by the kernel.
    pub(crate) fn store(self, list: &mut Writer, register: u32) {
        if let Some(Part(base, offset, length)) = self.part() {
            // No checksum covers the Ethernet header; addresses and ports are changed by translation alone.
            write(list, "payload", |data| {
                data.u32(5, register);
                data.u32(2, base);
                data.u32(3, offset);
                data.u32(4, length);
                data.u32(6, 0);
                data.u32(7, 0);
                data.u32(8, 0);
            });
        } else if let Some((key, original)) = self.connection() {
            write(list, "ct", |data| {
                data.u32(2, key);
                if original {
                    data.u8(3, 0);
                }
                data.u32(4, register);
            });
        } else {
            let key = self.meta().unwrap_or(u32::MAX);
            write(list, "meta", |data| {
                data.u32(2, key);
                data.u32(3, register);
            });
        }
    }
}

/// One expression of a rule's list: its name and what `inside` writes.
pub(crate) fn write(list: &mut Writer, name: &str, inside: impl FnOnce(&mut Writer)) {
    list.nest(expression::ELEMENT, |element| {
        element.text(expression::NAME, name);
        element.nest(expression::DATA, inside);
    });
}
