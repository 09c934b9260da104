//! What the tests of the agent's parts share: rows of one network, and messages that carry them.

use vtep::{MacAddr, Vni};

use crate::epoch::Epoch;
use crate::host::HostId;
use crate::message::Rows;
use crate::row::{Row, State};

/// The network.
pub(super) fn vni() -> Vni {
    Vni::new(4096).unwrap()
}

/// The row of 10.0.9.`last`, of host 1.
pub(super) fn row(last: u8, counter: u64, state: State) -> Row {
    Row {
        ip: [10, 0, 9, last].into(),
        epoch: Epoch::new(1, counter),
        owner: HostId::from_bytes([1; 16]),
        owner_seq: 1,
        state,
        mac: MacAddr::new([2, 0, 10, 0, 9, last]),
        member: None,
        names: None,
    }
}

/// All that has changed after revision `from` up to `to`.
pub(super) fn rows(from: u64, to: u64, rows: Vec<Row>) -> Rows {
    Rows {
        vni: vni(),
        generation: 1,
        from,
        to,
        part: 0,
        last: true,
        settled: true,
        rows,
    }
}
