//! Rules that rewrite packets one by one: no connection is remembered, and nothing else in the namespace is tracked for it.

use super::super::field::{Field, write};
use super::super::value::{Protocol, Value};
use super::{FIRST, Rule, immediate};

/// Headers that parts are counted from (`enum nft_payload_bases`): the transport protocol's.
const TRANSPORT: u32 = 2;
/// `enum nft_payload_csum_types`: the internet checksum. The kernel keeps one right that is left to the device, too.
const INTERNET_CHECKSUM: u32 = 1;

impl Rule {
    /// Has conntrack leave the packet alone; only in chains before [`super::super::priority`]'s `MANGLE`, as at `RAW`.
    #[must_use]
    pub fn untracked(self) -> Self {
        self.expression("notrack", |_| {})
    }

    /// Gives a packet of that protocol another source or destination port, and keeps its checksum right.
    ///
    /// # Panics
    /// Where the field is no port, or the protocol has none: both are written in the caller's source.
    #[must_use]
    pub fn rewrite_port(self, field: Field, protocol: Protocol, port: u16) -> Self {
        let offset = match field {
            Field::SourcePort => 0,
            Field::DestinationPort => 2,
            other => panic!("{other:?} is no port"),
        };
        // RFC 9293 §3.1 and RFC 768: where the checksum stands.
        let checksum = match protocol {
            Protocol::Tcp => 16,
            Protocol::Udp => 6,
            other => panic!("{other:?} has no ports"),
        };
        self.protocol(protocol).expressions(|list| {
            immediate(list, FIRST, Value::from(port).bytes());
            write(list, "payload", |data| {
                data.u32(5, FIRST);
                data.u32(2, TRANSPORT);
                data.u32(3, offset);
                data.u32(4, 2);
                data.u32(6, INTERNET_CHECKSUM);
                data.u32(7, checksum);
                data.u32(8, 0);
            });
        })
    }
}
