//! Rows of a network, field by field: nothing is sent more often.

use vtep::Vni;

use super::{MessageError, generation, host_id, ip, ip_to_wire, mac, vni, wire};
use crate::epoch::Epoch;
use crate::row::{Row, State};
use crate::service::Membership;

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
    })
}

fn member(member: wire::Member) -> Result<Membership, MessageError> {
    Ok(Membership {
        service: Epoch::from_bits(member.service),
        weight: u16::try_from(member.weight).map_err(|_| MessageError::Field("weight"))?,
        serving: member.serving,
    })
}
