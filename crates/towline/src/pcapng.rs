//! Writes pcapng files (draft-ietf-opsawg-pcapng): what Wireshark and its tools read.
//!
//! Only what a capture of ours has: one section, interfaces that may be added at any time, packets with a nanosecond
//! timestamp, a direction and a comment. Nothing is read, and no block of another kind is written.

use std::io::{self, Write};

/// Block types (§4).
const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;

/// Tells a reader which byte order the section has.
const BYTE_ORDER_MAGIC: u32 = 0x1A2B_3C4D;

/// Options: the same in all blocks (§3.5), of the section, of an interface, of a packet.
const COMMENT: u16 = 1;
const SECTION_APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const INTERFACE_DESCRIPTION_TEXT: u16 = 3;
const INTERFACE_RESOLUTION: u16 = 9;
const PACKET_FLAGS: u16 = 2;

/// What the packets of an interface begin with: LINKTYPE_* of the tcpdump group's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum LinkType {
    /// An Ethernet header.
    Ethernet = 1,
    /// An IPv4 or IPv6 header.
    Raw = 101,
}

/// Which way a packet passed its interface: the lowest bits of the packet's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Direction {
    /// Came in.
    Inbound = 1,
    /// Went out.
    Outbound = 2,
}

/// One packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet<'a> {
    /// What [`Writer::add_interface`] returned.
    pub(crate) interface: u32,
    /// Nanoseconds since 1970.
    pub(crate) time_ns: u64,
    /// Which way it passed.
    pub(crate) direction: Direction,
    /// For people.
    pub(crate) comment: &'a str,
    /// All of it.
    pub(crate) bytes: &'a [u8],
}

/// Writes one section.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    out: W,
    interfaces: u32,
    block: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins the section.
    ///
    /// # Errors
    /// What `out` says.
    pub(crate) fn new(out: W, application: &str) -> io::Result<Self> {
        let mut writer = Self {
            out,
            interfaces: 0,
            block: Vec::new(),
        };
        writer.begin(SECTION_HEADER);
        writer.u32(BYTE_ORDER_MAGIC);
        // Version 1.0.
        writer.u16(1);
        writer.u16(0);
        // The section's length is not known beforehand.
        writer.u32(u32::MAX);
        writer.u32(u32::MAX);
        writer.option(SECTION_APPLICATION, application.as_bytes());
        writer.end()?;
        Ok(writer)
    }

    /// Adds an interface and returns its number.
    ///
    /// # Errors
    /// What the output says.
    pub(crate) fn add_interface(
        &mut self,
        name: &str,
        description: &str,
        link_type: LinkType,
    ) -> io::Result<u32> {
        self.begin(INTERFACE_DESCRIPTION);
        self.u16(link_type as u16);
        self.u16(0);
        // No limit of captured lengths.
        self.u32(0);
        self.option(INTERFACE_NAME, name.as_bytes());
        self.option(INTERFACE_DESCRIPTION_TEXT, description.as_bytes());
        // Timestamps count in 10^-9 s.
        self.option(INTERFACE_RESOLUTION, &[9]);
        self.end()?;
        self.interfaces += 1;
        Ok(self.interfaces - 1)
    }

    /// Adds a packet.
    ///
    /// # Errors
    /// What the output says; `InvalidInput` when the packet is larger than the format allows.
    pub(crate) fn packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        let length = u32::try_from(packet.bytes.len()).map_err(too_large)?;
        let [high, low] = [packet.time_ns >> 32, packet.time_ns & u64::from(u32::MAX)]
            .map(|half| u32::try_from(half).expect("invariant: half of 64 bits fits 32"));
        self.begin(ENHANCED_PACKET);
        self.u32(packet.interface);
        self.u32(high);
        self.u32(low);
        // As captured, and as it was: nothing is cut.
        self.u32(length);
        self.u32(length);
        self.padded(packet.bytes);
        self.option(COMMENT, packet.comment.as_bytes());
        self.option(PACKET_FLAGS, &(packet.direction as u32).to_le_bytes());
        self.end()
    }

    /// Passes on what the output still holds back.
    ///
    /// # Errors
    /// What the output says.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// A block is its type, its length, the body, and its length once more.
    fn begin(&mut self, block_type: u32) {
        self.block.clear();
        self.u32(block_type);
        self.u32(0);
    }

    /// Ends the options and writes the block, all at once, so that a reader never finds half of one for long.
    fn end(&mut self) -> io::Result<()> {
        self.u16(0);
        self.u16(0);
        let length = u32::try_from(self.block.len() + 4).map_err(too_large)?;
        self.block[4..8].copy_from_slice(&length.to_le_bytes());
        self.u32(length);
        self.out.write_all(&self.block)
    }

    fn u16(&mut self, value: u16) {
        self.block.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.block.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes, up to the next multiple of four.
    fn padded(&mut self, bytes: &[u8]) {
        self.block.extend_from_slice(bytes);
        self.block.resize(self.block.len().next_multiple_of(4), 0);
    }

    /// An option; what no option holds is left out.
    fn option(&mut self, code: u16, value: &[u8]) {
        if let Ok(length) = u16::try_from(value.len()) {
            self.u16(code);
            self.u16(length);
            self.padded(value);
        }
    }
}

fn too_large<E>(_: E) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "a packet is too large for a capture file",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    }

    /// The blocks of a file as type and body, each checked to be framed by its length.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let length = usize::try_from(u32_at(bytes, 4)).expect("a length");
            assert_eq!(length % 4, 0);
            assert_eq!(u32_at(bytes, length - 4), u32_at(bytes, 4));
            blocks.push((u32_at(bytes, 0), bytes[8..length - 4].to_vec()));
            bytes = &bytes[length..];
        }
        blocks
    }

    #[test]
    fn a_file_is_section_interfaces_and_packets() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, "towline").expect("a vector takes all");
        for (number, link_type) in [(0, LinkType::Ethernet), (1, LinkType::Raw)] {
            let added = writer.add_interface("net/c1", "text", link_type);
            assert_eq!(added.expect("added"), number);
        }
        let packet = Packet {
            interface: 1,
            time_ns: (7 << 32) + 9,
            direction: Direction::Outbound,
            comment: "drop: why",
            bytes: b"five!",
        };
        writer.packet(&packet).expect("written");
        writer.flush().expect("flushed");
        let blocks = blocks(&file);
        let types: Vec<_> = blocks.iter().map(|(block_type, _)| *block_type).collect();
        assert_eq!(types, [0x0A0D_0D0A, 1, 1, 6]);
        assert_eq!(blocks[0].1[..8], [0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0]);
        assert_eq!((blocks[1].1[0], blocks[2].1[0]), (1, 101));
        // if_name, padded to four, is the first option.
        assert_eq!(blocks[1].1[8..20], *b"\x02\0\x06\0net/c1\0\0");
        let body = &blocks[3].1;
        let fields: Vec<_> = (0..5).map(|field| u32_at(body, field * 4)).collect();
        assert_eq!(fields, [1, 7, 9, 5, 5]);
        assert_eq!(body[20..28], *b"five!\0\0\0");
        assert_eq!(body[28..44], *b"\x01\0\x09\0drop: why\0\0\0");
        assert_eq!(body[44..], *b"\x02\0\x04\0\x02\0\0\0\0\0\0\0");
    }

    #[test]
    fn an_option_that_is_too_long_is_left_out() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, "x").expect("a vector takes all");
        let packet = Packet {
            interface: 0,
            time_ns: 0,
            direction: Direction::Inbound,
            comment: &"c".repeat(70_000),
            bytes: b"",
        };
        writer.packet(&packet).expect("written");
        assert_eq!(blocks(&file)[1].1.len(), 20 + 8 + 4);
    }
}
