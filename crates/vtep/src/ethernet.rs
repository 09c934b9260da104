//! A view over an Ethernet frame: addresses, tags, and where the payload starts.
//!
//! ```text
//! | destination 6 | source 6 | [ 802.1Q tag 4 ]… | EtherType 2 | payload … |
//! ```
//!
//! [`Frame::parse`] checks lengths once; what it returns can be read without further checks. Padding stays in the payload.

use crate::MacAddr;

/// Length of an Ethernet header without tags, in bytes.
pub const HEADER_LEN: usize = 14;
/// Length of one 802.1Q tag, in bytes.
pub const TAG_LEN: usize = 4;

/// EtherType of IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const TYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const TYPE_IPV6: u16 = 0x86dd;
/// Tag protocol identifier of a customer tag (802.1Q).
pub const TYPE_VLAN: u16 = 0x8100;
/// Tag protocol identifier of a service tag (802.1ad).
pub const TYPE_SERVICE_VLAN: u16 = 0x88a8;

/// Tags read before the frame is given up: more than any switch stacks, and a bound for hostile input.
const MAX_TAGS: usize = 4;

/// An Ethernet II or 802.3 frame that is long enough for its header and its tags.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    bytes: &'a [u8],
    destination: MacAddr,
    source: MacAddr,
    ethertype: u16,
    payload_offset: usize,
}

impl<'a> Frame<'a> {
    /// Reads the header; `None` when the frame is too short for it or has too many tags.
    #[inline]
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (destination, rest) = bytes.split_first_chunk::<6>()?;
        let (source, mut rest) = rest.split_first_chunk::<6>()?;
        for tags in 0..=MAX_TAGS {
            let (ethertype, behind) = rest.split_first_chunk::<2>()?;
            let ethertype = u16::from_be_bytes(*ethertype);
            if ethertype != TYPE_VLAN && ethertype != TYPE_SERVICE_VLAN {
                return Some(Self {
                    bytes,
                    destination: MacAddr::new(*destination),
                    source: MacAddr::new(*source),
                    ethertype,
                    payload_offset: HEADER_LEN + tags * TAG_LEN,
                });
            }
            rest = behind.split_first_chunk::<2>()?.1;
        }
        None
    }

    /// Where the frame is to go.
    #[must_use]
    pub const fn destination(&self) -> MacAddr {
        self.destination
    }

    /// Who says it sent the frame.
    #[must_use]
    pub const fn source(&self) -> MacAddr {
        self.source
    }

    /// What the payload is, behind all tags; below 0x0600 it is an 802.3 length.
    #[must_use]
    pub const fn ethertype(&self) -> u16 {
        self.ethertype
    }

    /// Whether the frame carries an 802.1Q or 802.1ad tag.
    #[must_use]
    pub const fn is_tagged(&self) -> bool {
        self.payload_offset != HEADER_LEN
    }

    /// Everything behind the header and the tags.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.payload_offset..]
    }

    /// Where [`Self::payload`] starts, in bytes from the start of the frame.
    #[must_use]
    pub const fn payload_offset(&self) -> usize {
        self.payload_offset
    }
}

/// Writes an Ethernet header without tags.
#[must_use]
pub fn emit(destination: MacAddr, source: MacAddr, ethertype: u16) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..6].copy_from_slice(&destination.octets());
    header[6..12].copy_from_slice(&source.octets());
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 2]);

    #[test]
    fn round_trip() {
        let mut bytes = emit(A, B, TYPE_IPV4).to_vec();
        bytes.push(0x45);
        let frame = Frame::parse(&bytes).unwrap();
        assert_eq!(
            (frame.destination(), frame.source(), frame.ethertype()),
            (A, B, TYPE_IPV4)
        );
        assert_eq!(
            (frame.payload(), frame.payload_offset(), frame.is_tagged()),
            (&[0x45][..], 14, false)
        );
        for len in 0..14 {
            assert!(Frame::parse(&bytes[..len]).is_none(), "{len} bytes");
        }
    }

    #[test]
    fn tags_are_seen_through_and_bounded() {
        let mut bytes = emit(A, B, TYPE_SERVICE_VLAN).to_vec();
        bytes.extend([0, 1, 0x81, 0x00, 0, 2, 0x08, 0x06, 9]);
        let frame = Frame::parse(&bytes).unwrap();
        assert_eq!(
            (frame.ethertype(), frame.payload(), frame.is_tagged()),
            (TYPE_ARP, &[9][..], true)
        );
        for len in 14..22 {
            assert!(Frame::parse(&bytes[..len]).is_none(), "{len} bytes");
        }
        let endless: Vec<u8> = emit(A, B, TYPE_VLAN)
            .into_iter()
            .chain([0, 1, 0x81, 0].repeat(300))
            .collect();
        assert!(Frame::parse(&endless).is_none());
    }
}
