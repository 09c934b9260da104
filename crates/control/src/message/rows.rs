//! Rows of a network, field by field: nothing is sent more often.

use std::sync::Arc;

use vtep::Vni;

use super::{MessageError, generation, host_id, ip, ip_to_wire, mac, vni, wire};
use crate::epoch::Epoch;
use crate::names::Names;
use crate::row::{Row, State};
use crate::service::Membership;

/// Rows in one message, about 60 bytes each without names: far below the largest message.
const ROWS_PER_MESSAGE: usize = 4096;
/// Bytes of names in one message: with the rows far below the largest message.
const NAMES_PER_MESSAGE: usize = 256 * 1024;

/// Cuts rows into what fits one message each.
pub(crate) fn parts(mut rows: &[Row]) -> Vec<&[Row]> {
    let mut parts = Vec::new();
    while !rows.is_empty() {
        let mut bytes = 0;
        let fit = rows.iter().take(ROWS_PER_MESSAGE).take_while(|row| {
            bytes += row.names.as_deref().map_or(0, Names::size);
            bytes <= NAMES_PER_MESSAGE
        });
        // One row's names are bounded; more than a message's worth is sent alone all the same.
        let (part, rest) = rows.split_at(fit.count().max(1));
        parts.push(part);
        rows = rest;
    }
    parts
}

/// Every change after revision `from`, up to and including revision `to`, in one or more parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The network.
    pub vni: Vni,
    /// The life of the manager's store in which revisions count.
    pub generation: u16,
    /// Changes after this one; 0: a snapshot.
    pub from: u64,
    /// Up to this one.
    pub to: u64,
    /// Which part this is, from 0.
    pub part: u32,
    /// No part follows.
    pub last: bool,
    /// Rows absent from a snapshot do not exist. Unset while a manager is still learning what it lost.
    pub settled: bool,
    /// The rows.
    pub rows: Vec<Row>,
}

impl Rows {
    pub(super) fn to_wire(&self) -> wire::Rows {
        wire::Rows {
            vni: self.vni.get(),
            generation: u32::from(self.generation),
            from: self.from,
            to: self.to,
            part: self.part,
            last: self.last,
            settled: self.settled,
            rows: self.rows.iter().map(row_to_wire).collect(),
        }
    }

    pub(super) fn from_wire(rows: wire::Rows) -> Result<Self, MessageError> {
        Ok(Self {
            vni: vni(rows.vni)?,
            generation: generation(rows.generation)?,
            from: rows.from,
            to: rows.to,
            part: rows.part,
            last: rows.last,
            settled: rows.settled,
            rows: rows
                .rows
                .into_iter()
                .map(row_from_wire)
                .collect::<Result<_, _>>()?,
        })
    }
}

pub(super) fn row_to_wire(row: &Row) -> wire::Row {
    wire::Row {
        ip: ip_to_wire(row.ip),
        epoch: row.epoch.get(),
        owner: row.owner.as_bytes().to_vec(),
        owner_seq: row.owner_seq,
        state: match row.state {
            State::Up => 1,
            State::Down => 2,
            State::Free => 3,
        },
        mac: row.mac.octets().to_vec(),
        member: row.member.map(|member| wire::Member {
            service: member.service.get(),
            weight: u32::from(member.weight),
            serving: member.serving,
        }),
        names: row.names.as_deref().map(|names| wire::Names {
            container: names.container.clone(),
            id: names.id.clone(),
            aliases: names.aliases.clone(),
        }),
    }
}

pub(super) fn row_from_wire(row: wire::Row) -> Result<Row, MessageError> {
    Ok(Row {
        ip: ip(&row.ip)?,
        epoch: Epoch::from_bits(row.epoch),
        owner: host_id(&row.owner)?,
        owner_seq: row.owner_seq,
        state: match row.state {
            1 => State::Up,
            2 => State::Down,
            3 => State::Free,
            _ => return Err(MessageError::Field("state")),
        },
        mac: mac(&row.mac)?,
        member: row.member.map(member).transpose()?,
        names: row.names.map(names).transpose()?,
    })
}

fn member(member: wire::Member) -> Result<Membership, MessageError> {
    Ok(Membership {
        service: Epoch::from_bits(member.service),
        weight: u16::try_from(member.weight).map_err(|_| MessageError::Field("weight"))?,
        serving: member.serving,
    })
}

fn names(names: wire::Names) -> Result<Arc<Names>, MessageError> {
    let names = Names {
        container: names.container,
        id: names.id,
        aliases: names.aliases,
    };
    if !names.is_valid() {
        return Err(MessageError::Field("names"));
    }
    Ok(Arc::new(names))
}

#[cfg(test)]
mod tests {
    use vtep::MacAddr;

    use super::*;
    use crate::names::ALIASES_MAX;

    #[test]
    fn no_part_is_too_long_for_a_message_and_none_is_missing() {
        let longest = Arc::new(Names {
            container: "c".repeat(63),
            id: "0123456789ab".to_owned(),
            aliases: vec!["a".repeat(63); ALIASES_MAX],
        });
        let row = |n: u16| {
            let [high, low] = n.to_be_bytes();
            Row {
                ip: [10, 1, high, low].into(),
                epoch: Epoch::new(1, n.into()),
                owner: crate::HostId::from_bytes([1; 16]),
                owner_seq: 1,
                state: State::Up,
                mac: MacAddr::new([2, 0, 0, 0, high, low]),
                member: None,
                names: n.is_multiple_of(2).then(|| Arc::clone(&longest)),
            }
        };
        let rows: Vec<Row> = (0..10_000).map(row).collect();
        let parts = parts(&rows);
        assert_eq!(parts.concat(), rows);
        for part in parts {
            let bytes: usize = part
                .iter()
                .map(|row| prost::Message::encoded_len(&row_to_wire(row)))
                .sum();
            assert!(bytes < crate::limits::FRAME_MAX / 2, "{bytes}");
        }
    }
}
