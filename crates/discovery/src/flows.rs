//! What the kernel remembers of connections through services, and the one way by which rules are changed.
//!
//! Packets of a known connection never meet the rules again. So what is remembered of connections to a member that is gone must go
//! with it: UDP would flow into nothing for as long as somebody sends.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netns::conntrack::Filter;
use netns::nftables::Table;
use netns::{NetfilterError, NetfilterSocket, Netns};

use crate::content::Content;
use crate::error::ApplyError;

/// Whose connections are to be forgotten.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    /// Members: whatever they answer.
    pub(crate) members: BTreeSet<IpAddr>,
    /// Addresses that clients asked for.
    pub(crate) virtual_addresses: BTreeSet<IpAddr>,
}

impl Flows {
    /// Without those that are still there.
    pub(crate) fn less(
        mut self,
        members: &BTreeSet<IpAddr>,
        virtual_addresses: &BTreeSet<IpAddr>,
    ) -> Self {
        self.members.retain(|ip| !members.contains(ip));
        self.virtual_addresses
            .retain(|ip| !virtual_addresses.contains(ip));
        self
    }

    /// Makes the kernel forget them.
    pub(crate) fn purge(&self, netns: &Netns) -> Result<(), ApplyError> {
        let members = self.members.iter();
        let vips = self.virtual_addresses.iter();
        let filters: Vec<_> = members
            .map(|ip| Filter::new().reply_source(*ip))
            .chain(vips.map(|ip| Filter::new().original_destination(*ip)))
            .collect();
        purge(netns, &filters)
    }
}

/// Makes the kernel forget the connections that any of these describes.
pub(crate) fn purge(netns: &Netns, filters: &[Filter]) -> Result<(), ApplyError> {
    if filters.is_empty() {
        return Ok(());
    }
    let named = |cause| refused(netns, cause);
    let mut socket = NetfilterSocket::open(netns).map_err(named)?;
    for filter in filters {
        let count = socket.delete_connections(filter).map_err(named)?;
        tracing::debug!(count, ?filter, "forgot connections in {netns}");
    }
    Ok(())
}

/// Forgets connections to virtual addresses that are answered by nobody who is a member: they came to be before this program's
/// start, which does not know who left meanwhile.
pub(crate) fn purge_strangers(
    netns: &Netns,
    virtual_addresses: &BTreeSet<IpAddr>,
    members: &BTreeSet<IpAddr>,
) -> Result<(), ApplyError> {
    if virtual_addresses.is_empty() {
        return Ok(());
    }
    let named = |cause| refused(netns, cause);
    let mut socket = NetfilterSocket::open(netns).map_err(named)?;
    let mut strangers = BTreeSet::new();
    for connection in socket.connections(&Filter::new()).map_err(named)? {
        let asked = connection.original.destination;
        let answers = connection.reply.source;
        if virtual_addresses.contains(&asked) && !members.contains(&answers) {
            strangers.insert((asked, answers));
        }
    }
    let filters: Vec<_> = strangers
        .into_iter()
        .map(|(asked, answers)| {
            Filter::new()
                .original_destination(asked)
                .reply_source(answers)
        })
        .collect();
    purge(netns, &filters)
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
