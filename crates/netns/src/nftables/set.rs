//! Sets and maps, named ones and those that belong to one rule.

use crate::netfilter::attributes::Writer;

use super::uapi::{elements, expression, set};
use super::value::{Value, Verdict, concatenate};

/// The kinds of values in keys and maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Type {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A MAC address.
    Mac,
    /// A transport protocol's number.
    Protocol,
    /// A port.
    Port,
    /// An interface's name.
    Interface,
    /// A packet's mark.
    Mark,
    /// The outcome of a numbered choice.
    Number,
}

impl Type {
    /// nft's number of the data type, and its bytes.
    fn number_and_length(self) -> (u32, u32) {
        match self {
            Self::Number => (4, 4),
            Self::Ipv4 => (7, 4),
            Self::Ipv6 => (8, 16),
            Self::Mac => (9, 6),
            Self::Protocol => (12, 1),
            Self::Port => (13, 2),
            Self::Mark => (19, 4),
            Self::Interface => (41, 16),
        }
    }

    /// nft's byte order: 1 is the machine's, 2 the network's.
    fn byte_order(self) -> u32 {
        match self {
            Self::Number | Self::Mark | Self::Interface => 1,
            _ => 2,
        }
    }
}

/// The number and the length of one type, or of several side by side. nft counts six bits for each.
fn joined(types: &[Type]) -> (u32, u32) {
    match types {
        [only] => only.number_and_length(),
        types => types.iter().fold((0, 0), |(number, length), part| {
            let (part, bytes) = part.number_and_length();
            (number << 6 | part, length + bytes.next_multiple_of(4))
        }),
    }
}

/// nft's byte order of one type; several side by side have none.
fn byte_order(types: &[Type]) -> u32 {
    match types {
        [only] => only.byte_order(),
        _ => 0,
    }
}

/// What a set's keys lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Data {
    /// Nothing: a plain set.
    None,
    /// A verdict: a verdict map.
    Verdict,
    /// Values: a map.
    Values(Vec<Type>),
}

/// A named set or map of a table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    /// Its name, as `nft list set` knows it.
    pub name: String,
    /// What its keys are made of.
    pub key: Vec<Type>,
    /// What they lead to.
    pub data: Data,
}

/// One key, and what it leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Element {
    key: Vec<Value>,
    data: ElementData,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum ElementData {
    None,
    Verdict(Verdict),
    Values(Vec<Value>),
}

impl Element {
    /// An element of a plain set; of a map, what names the element to be deleted.
    pub fn key(key: impl Into<Vec<Value>>) -> Self {
        Self {
            key: key.into(),
            data: ElementData::None,
        }
    }

    /// An element of a verdict map.
    pub fn verdict(key: impl Into<Vec<Value>>, verdict: Verdict) -> Self {
        Self {
            key: key.into(),
            data: ElementData::Verdict(verdict),
        }
    }

    /// An element of a map.
    pub fn values(key: impl Into<Vec<Value>>, values: impl Into<Vec<Value>>) -> Self {
        Self {
            key: key.into(),
            data: ElementData::Values(values.into()),
        }
    }

    fn write(&self, list: &mut Writer) {
        list.nest(expression::ELEMENT, |element| {
            element.nest(elements::KEY, |key| {
                key.bytes(expression::VALUE, &concatenate(&self.key));
            });
            match &self.data {
                ElementData::None => {}
                ElementData::Verdict(verdict) => {
                    element.nest(elements::DATA, |data| verdict.write(data));
                }
                ElementData::Values(values) => element.nest(elements::DATA, |data| {
                    data.bytes(expression::VALUE, &concatenate(values));
                }),
            }
        });
    }
}

/// The attributes of a set: named, or anonymous with the number that its rule calls it by.
pub(crate) fn write(
    message: &mut Writer,
    (key, data): (&[Type], &Data),
    name: &str,
    id: u32,
    anonymous: Option<usize>,
) {
    let mut flags = 0;
    if anonymous.is_some() {
        flags |= set::ANONYMOUS | set::CONSTANT;
    }
    if *data != Data::None {
        flags |= set::MAP;
    }
    message.text(set::NAME, name);
    message.u32(set::FLAGS, flags);
    let (number, length) = joined(key);
    message.u32(set::KEY_TYPE, number);
    message.u32(set::KEY_LENGTH, length);
    let mut data_order = None;
    match data {
        Data::None => {}
        Data::Verdict => message.u32(set::DATA_TYPE, set::VERDICT),
        Data::Values(types) => {
            let (number, length) = joined(types);
            message.u32(set::DATA_TYPE, number);
            message.u32(set::DATA_LENGTH, length);
            data_order = Some(byte_order(types));
        }
    }
    message.u32(set::ID, id);
    if let Some(size) = anonymous {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        message.nest(set::DESCRIPTION, |description| {
            description.u32(set::DESCRIPTION_SIZE, size);
        });
    }
    // libnftnl's `udata.h`: `type:u8 length:u8 value`; 0 is the key's byte order, 1 the data's.
    let mut notes = Vec::new();
    for (number, order) in [(0_u8, Some(byte_order(key))), (1, data_order)] {
        if let Some(order) = order {
            notes.extend_from_slice(&[number, 4]);
            notes.extend_from_slice(&order.to_ne_bytes());
        }
    }
    message.bytes(set::USER_DATA, &notes);
}

/// How many elements go into one message: an attribute holds at most 64 KiB, and an element far less than 256 bytes but
/// for a chain's name of the same length.
pub(crate) const ELEMENTS_PER_MESSAGE: usize = 64;

/// The attributes of a message with elements of a set that is called by its name, and within a transaction by its number.
pub(crate) fn write_elements(message: &mut Writer, name: &str, id: Option<u32>, list: &[Element]) {
    message.text(elements::SET, name);
    if let Some(id) = id {
        message.u32(elements::SET_ID, id);
    }
    message.nest(elements::LIST, |attributes| {
        for element in list {
            element.write(attributes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_side_by_side_fill_whole_registers() {
        assert_eq!(joined(&[Type::Protocol, Type::Port]), (12 << 6 | 13, 8));
        assert_eq!(joined(&[Type::Ipv6, Type::Port]), (8 << 6 | 13, 20));
        assert_eq!(joined(&[Type::Port]), (13, 2));
    }
}
