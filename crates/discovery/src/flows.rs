//! What the kernel remembers of connections through services, and the one way by which rules are changed.
//!
//! Packets of a known connection never meet the rules again. So what is remembered of connections to a member that is gone must go
//! with it: UDP would flow into nothing for as long as somebody sends.

use netns::conntrack::Connection;
use netns::nftables::{Protocol, Snapshot, Table};
use netns::{NetfilterError, NetfilterSocket, Netns};

use crate::content::Content;
use crate::error::ApplyError;

/// Makes the kernel forget the connections of which `is_meant` says so.
pub(crate) fn purge(
    netns: &Netns,
    is_meant: impl Fn(&Connection) -> bool,
) -> Result<(), ApplyError> {
    let count = NetfilterSocket::open(netns)
        .and_then(|mut socket| socket.delete_connections_where(is_meant))
        .map_err(|cause| refused(netns, cause))?;
    if count > 0 {
        tracing::debug!("{count} connections through services forgotten in {netns}");
    }
    Ok(())
}

/// Whether a connection is of a kind that services carry.
pub(crate) fn is_led(connection: &Connection) -> bool {
    [Protocol::Tcp, Protocol::Udp]
        .map(Protocol::number)
        .contains(&connection.protocol)
}

/// A table as it stands.
pub(crate) fn snapshot(netns: &Netns, table: &Table) -> Result<Snapshot, ApplyError> {
    NetfilterSocket::open(netns)
        .and_then(|mut socket| socket.snapshot(table))
        .map_err(|cause| refused(netns, cause))
}

/// Whether the namespace has the table.
pub(crate) fn has_table(netns: &Netns, table: &Table) -> Result<bool, ApplyError> {
    let named = |cause| refused(netns, cause);
    let mut socket = NetfilterSocket::open(netns).map_err(named)?;
    let tables = socket.tables().map_err(named)?;
    Ok(tables.contains(table))
}

/// Brings a table from what stood before to what is to stand; where somebody else removed or changed it, makes it anew.
pub(crate) fn commit(
    netns: &Netns,
    table: &Table,
    content: &Content,
    before: Option<&Content>,
) -> Result<(), ApplyError> {
    let batch = content.since(before, table);
    if batch.is_empty() {
        return Ok(());
    }
    let named = |cause| refused(netns, cause);
    let mut socket = NetfilterSocket::open(netns).map_err(named)?;
    let Err(first) = batch.commit(&mut socket) else {
        return Ok(());
    };
    if before.is_none() {
        return Err(named(first));
    }
    tracing::warn!(
        "{}'s table {} is not as it was left ({first}): making it anew",
        netns,
        table.name
    );
    let anew = content.since(None, table);
    anew.commit(&mut socket).map_err(named)
}

pub(crate) fn refused(netns: &Netns, cause: NetfilterError) -> ApplyError {
    ApplyError::Netfilter {
        place: netns.to_string(),
        cause,
    }
}
