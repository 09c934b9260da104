//! Netlink's messages and attributes as bytes: written into one growing buffer, read without copying.
//!
//! An attribute is `length:u16 type:u16 value`, padded to four bytes; its length counts the four bytes before the value
//! (`linux/netlink.h`). Netfilter's numbers are big-endian, netlink's own are the machine's.

/// Bytes before an attribute's value.
const HEADER: usize = 4;
/// Marks an attribute that holds attributes (`NLA_F_NESTED`).
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its number (`NLA_TYPE_MASK`).
const NUMBER: u16 = 0x3fff;

/// Attributes written one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes as they are, padded to four.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    pub(crate) fn bytes(&mut self, number: u16, value: &[u8]) {
        let start = self.open(number);
        self.bytes.extend_from_slice(value);
        self.close(start);
    }

    /// A text with the zero byte that ends it.
    pub(crate) fn text(&mut self, number: u16, value: &str) {
        let start = self.open(number);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.close(start);
    }

    pub(crate) fn u8(&mut self, number: u16, value: u8) {
        self.bytes(number, &[value]);
    }

    pub(crate) fn u16(&mut self, number: u16, value: u16) {
        self.bytes(number, &value.to_be_bytes());
    }

    pub(crate) fn u32(&mut self, number: u16, value: u32) {
        self.bytes(number, &value.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, number: u16, value: u64) {
        self.bytes(number, &value.to_be_bytes());
    }

    /// An attribute that holds what `inside` writes.
    pub(crate) fn nest(&mut self, number: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.open(number | NESTED);
        inside(self);
        self.close(start);
    }

    /// One netlink message: `length:u32 type:u16 flags:u16 sequence:u32 port:u32`, then `family:u8 version:u8 res_id:u16`
    /// (`struct nfgenmsg`), then what `inside` writes.
    pub(crate) fn message(&mut self, header: MessageHeader, inside: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&header.kind.to_ne_bytes());
        self.bytes.extend_from_slice(&header.flags.to_ne_bytes());
        self.bytes.extend_from_slice(&header.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[header.family, 0]);
        self.bytes.extend_from_slice(&header.resource.to_be_bytes());
        inside(self);
        let length = u32::try_from(self.bytes.len() - start)
            .expect("a message of ours is far below 4 GiB: its attributes are below 64 KiB each");
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.pad();
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        // A longer attribute cannot be said in netlink. Cut short, the kernel refuses the message as malformed.
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// What stands before a message's attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MessageHeader {
    /// Subsystem and message number.
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// The protocol family.
    pub(crate) family: u8,
    /// `res_id` of `struct nfgenmsg`: the subsystem in a batch's first and last message, else 0.
    pub(crate) resource: u16,
}

/// A message as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// What follows the netlink header.
    pub(crate) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Bytes of the netlink header.
    pub(crate) const HEADER: usize = 16;
    /// Bytes of `struct nfgenmsg`, in front of a netfilter message's attributes.
    const NETFILTER: usize = 4;

    /// The protocol family and the attributes of a netfilter message.
    pub(crate) fn netfilter(&self) -> (u8, Attributes<'a>) {
        (
            self.payload.first().copied().unwrap_or_default(),
            Attributes(self.payload.get(Self::NETFILTER..).unwrap_or_default()),
        )
    }
}

/// The messages of a datagram, up to the first that is cut short.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(number32(bytes.get(..4)?)).ok()?;
        let payload = bytes.get(Message::HEADER..length)?;
        let message = Message {
            kind: u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?),
            flags: u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?),
            sequence: number32(bytes.get(8..12)?),
            payload,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn number32(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_ne_bytes)
}

/// The attributes within some bytes. One that is cut short ends the list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The value of the first attribute of that number.
    pub(crate) fn find(self, number: u16) -> Option<&'a [u8]> {
        self.into_iter()
            .find(|(found, _)| *found == number)
            .map(|(_, value)| value)
    }

    /// The attributes inside that attribute; none when it is not there.
    pub(crate) fn inside(self, number: u16) -> Self {
        Self(self.find(number).unwrap_or_default())
    }

    /// A text, without the zero byte that ends it.
    pub(crate) fn text(self, number: u16) -> Option<&'a str> {
        text(self.find(number)?)
    }

    pub(crate) fn u8(self, number: u16) -> Option<u8> {
        self.find(number)?.first().copied()
    }

    pub(crate) fn u16(self, number: u16) -> Option<u16> {
        Some(u16::from_be_bytes(self.find(number)?.try_into().ok()?))
    }

    pub(crate) fn u32(self, number: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.find(number)?.try_into().ok()?))
    }

    pub(crate) fn u64(self, number: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.find(number)?.try_into().ok()?))
    }
}

impl<'a> IntoIterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);
    type IntoIter = AttributesIter<'a>;

    fn into_iter(self) -> AttributesIter<'a> {
        AttributesIter(self.0)
    }
}

/// Goes through [`Attributes`].
pub(crate) struct AttributesIter<'a>(&'a [u8]);

impl<'a> Iterator for AttributesIter<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NUMBER, value))
    }
}

/// A text up to its first zero byte, if it is one.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == 0);
    std::str::from_utf8(&bytes[..end.unwrap_or(bytes.len())]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_are_padded_and_counted_without_their_padding() {
        let mut writer = Writer::default();
        writer.text(1, "ab");
        writer.nest(2, |inner| inner.u16(3, 0x0102));
        let expected: &[u8] = &[
            7, 0, 1, 0, b'a', b'b', 0, 0, // "ab"
            12, 0, 2, 0x80, // a nest
            6, 0, 3, 0, 1, 2, 0, 0, // a number in it
        ];
        #[cfg(target_endian = "little")]
        assert_eq!(writer.as_bytes(), expected);
        let read = Attributes(writer.as_bytes());
        assert_eq!(read.text(1), Some("ab"));
        assert_eq!(read.inside(2).u16(3), Some(0x0102));
        assert_eq!((read.u32(1), read.find(9)), (None, None));
    }

    #[test]
    fn a_message_tells_its_length_and_what_it_is() {
        let header = MessageHeader {
            kind: 0x0a06,
            flags: 5,
            sequence: 7,
            family: 1,
            resource: 10,
        };
        let mut writer = Writer::default();
        writer.message(header, |attributes| attributes.u8(1, 9));
        writer.message(header, |_| {});
        let read: Vec<_> = messages(writer.as_bytes()).collect();
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[0].kind, read[0].flags, read[0].sequence),
            (0x0a06, 5, 7)
        );
        let (family, attributes) = read[0].netfilter();
        assert_eq!((family, attributes.u8(1)), (1, Some(9)));
        assert_eq!(writer.as_bytes().len(), 16 + 4 + 8 + 16 + 4);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_its_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                let (_, attributes) = message.netfilter();
                for (number, value) in attributes {
                    let _ = (Attributes(value).text(number), Attributes(value).u64(number));
                }
            }
            for (_, value) in Attributes(&bytes) {
                let _ = text(value);
            }
        }
    }
}
