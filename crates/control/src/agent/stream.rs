//! One subscribed network: its table, and where its stream of changes stands.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use vtep::{MacAddr, Vni};

use super::block::Block;
use super::services::Listing;
use super::{Output, millis};
use crate::epoch::Epoch;
use crate::host::HostId;
use crate::message::{Rows, ToAgent, ToManager, rows};
use crate::network::{Endpoint, Network};
use crate::request::{Event, SubscriptionStatus};
use crate::row::{Row, State};
use crate::service::Service;
use crate::table::{Table, TableChange};

/// How long to wait for the answer to one resynchronisation before asking for the next.
const RESYNC_PATIENCE: Duration = Duration::from_secs(1);

/// The table of one network and the place in the manager's order up to which it is complete.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) vni: Vni,
    table: Table,
    /// What this host was leased ahead.
    pub(super) block: Block,
    network: Option<Network>,
    /// The services on it.
    pub(super) services: BTreeMap<Epoch, Service>,
    pub(super) listing: Option<Listing>,
    /// The program knows that there are services, or that there are none.
    pub(super) services_told: bool,
    /// A member of a service changed, or the connection did, since the program was last told how far the news go.
    unmarked: bool,
    /// Addresses of this host's own endpoints that the program was told otherwise of than the table says.
    announced: BTreeSet<IpAddr>,
    /// 0: nothing yet.
    generation: u16,
    revision: u64,
    /// The rows are all there are; unset while the manager is still learning what it lost.
    settled: bool,
    /// The highest place that any news claimed, to notice what is missing.
    claimed: (u16, u64),
    /// What came in answer to the subscription on this connection is complete.
    answered: bool,
    pub(super) said: Said,
    receiving: Option<Receiving>,
    resync_asked: Option<Duration>,
    news_at: Option<Duration>,
}

/// What a manager has said of a network on this connection.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// All its services.
    pub(super) services: bool,
    /// All its rows, or all that have changed.
    rows: bool,
    /// The program was told that both are here.
    told: bool,
}

/// A message in parts.
#[derive(Debug)]
struct Receiving {
    generation: u16,
    from: u64,
    to: u64,
    next_part: u32,
    /// The rows of a snapshot.
    seen: HashMap<IpAddr, Row>,
}

impl Stream {
    pub(super) fn new(vni: Vni, masked: impl Iterator<Item = HostId>) -> Self {
        let mut stream = Self {
            vni,
            table: Table::default(),
            block: Block::default(),
            network: None,
            services: BTreeMap::new(),
            listing: None,
            services_told: false,
            unmarked: true,
            announced: BTreeSet::new(),
            generation: 0,
            revision: 0,
            settled: false,
            claimed: (0, 0),
            answered: false,
            said: Said::default(),
            receiving: None,
            resync_asked: None,
            news_at: None,
        };
        for host in masked {
            stream.table.set_masked(host, true, &mut Vec::new());
        }
        stream
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn name(&self) -> Option<&str> {
        self.network.as_ref().map(|network| network.name.as_str())
    }

    /// The message that makes the stream go on from where it is.
    pub(super) fn subscribe(&self) -> ToManager {
        // A table from an unsettled manager may hold rows that no longer exist: only a snapshot can tell.
        let (generation, revision) = if self.settled {
            (self.generation, self.revision)
        } else {
            (0, 0)
        };
        ToManager::Subscribe {
            vni: self.vni,
            generation,
            revision,
            network: self.network.clone(),
        }
    }

    /// Adds the messages that make another stream know what this one knows.
    pub(super) fn snapshot(&self, messages: &mut Vec<ToAgent>) {
        messages.extend(self.network.clone().map(ToAgent::Network));
        if self.services_told {
            messages.extend(self.services_snapshot());
        }
        if !self.block.0.is_empty() {
            messages.push(ToAgent::Lease {
                vni: self.vni,
                block: self.block.0.clone(),
            });
        }
        if self.generation == 0 {
            return;
        }
        let rows: Vec<Row> = self.table.rows().cloned().collect();
        let mut parts: Vec<&[Row]> = rows::parts(&rows);
        if parts.is_empty() {
            parts.push(&[]);
        }
        let count = parts.len();
        messages.extend((0..).zip(parts).map(|(part, rows)| {
            ToAgent::Rows(Rows {
                vni: self.vni,
                generation: self.generation,
                from: 0,
                to: self.revision,
                part,
                last: part as usize + 1 == count,
                settled: self.settled,
                rows: rows.to_vec(),
            })
        }));
    }

    /// What was said before, on other connections or in an earlier life of this agent, may be old by now.
    pub(super) fn connected(&mut self) {
        self.said = Said::default();
    }

    /// Tells the program once for each connection that all before is the word of a manager that has lost nothing, and no older.
    pub(super) fn tell_caught_up(&mut self, outputs: &mut VecDeque<Output>) {
        let caught_up = self.said.services && self.said.rows && self.settled;
        if caught_up && !std::mem::replace(&mut self.said.told, true) {
            outputs.push_back(Output::Event(Event::CaughtUp(self.vni)));
        }
    }

    /// Parts of an unfinished message do not come any more.
    pub(super) fn disconnected(&mut self) {
        self.receiving = None;
        self.listing = None;
        self.unmarked = true;
        self.answered = false;
        self.resync_asked = None;
        self.claimed = (self.generation, self.revision);
    }

    pub(super) fn handle_network(&mut self, network: Network, outputs: &mut VecDeque<Output>) {
        if self
            .network
            .as_ref()
            .is_some_and(|known| known.id != network.id)
        {
            // Another network with this VNI: nothing of the old one's table means anything.
            outputs.push_back(Output::Event(Event::NetworkRemoved(self.vni)));
            let mut forgotten = Vec::new();
            self.table.retain(|_| false, &mut forgotten);
            (self.generation, self.revision, self.settled) = (0, 0, false);
            self.block = Block::default();
            self.forget_services();
            self.announced.clear();
            self.receiving = None;
        }
        if self.network.as_ref() != Some(&network) {
            self.network = Some(network.clone());
            outputs.push_back(Output::Event(Event::NetworkChanged(network)));
        }
    }

    pub(super) fn set_masked(
        &mut self,
        host: HostId,
        masked: bool,
        outputs: &mut VecDeque<Output>,
    ) {
        let mut changes = Vec::new();
        self.table.set_masked(host, masked, &mut changes);
        self.tell(changes, outputs);
    }

    pub(super) fn handle_rows(
        &mut self,
        rows: Rows,
        now: Duration,
        outputs: &mut VecDeque<Output>,
    ) {
        self.news_at = Some(now);
        self.claimed = self.claimed.max((rows.generation, rows.to));
        let place = self.place(&rows);
        let mut changes = Vec::new();
        let mut complete = false;
        // Out of their order they are asked for again. Merged at once, a row whose epoch is older than a snapshot that is still on
        // its way, but not in it, would be taken for one of a lost life: what was leased ahead has such rows.
        if let Some(mut receiving) = place {
            for row in &rows.rows {
                self.table.apply(row.clone(), &mut changes);
            }
            if rows.from == 0 {
                receiving
                    .seen
                    .extend(rows.rows.into_iter().map(|row| (row.ip, row)));
            }
            if rows.last {
                self.complete(receiving, rows.settled, &mut changes);
                complete = true;
            } else {
                receiving.next_part += 1;
                self.receiving = Some(receiving);
            }
        }
        self.tell(changes, outputs);
        if complete && std::mem::take(&mut self.unmarked) {
            outputs.push_back(Output::Event(Event::Reached {
                vni: self.vni,
                generation: self.generation,
                revision: self.revision,
            }));
        }
    }

    /// Merges rows that came outside the order.
    pub(super) fn correct(&mut self, rows: Vec<Row>, outputs: &mut VecDeque<Output>) {
        let mut changes = Vec::new();
        for row in rows {
            self.table.apply(row, &mut changes);
        }
        self.tell(changes, outputs);
    }

    /// Tells where an own endpoint is before the table can, or in its stead.
    pub(super) fn announce(
        &mut self,
        endpoint: &Endpoint,
        up: bool,
        outputs: &mut VecDeque<Output>,
    ) {
        let mac = up.then_some(endpoint.mac);
        let mut changes = Vec::new();
        let mut called = Vec::new();
        for &ip in &endpoint.ips {
            let known = self.table.row(ip).filter(|row| row.state == State::Up);
            if known.is_some_and(|row| row.epoch != endpoint.epoch) {
                // Another's by now; its names may be as none before, which is no change of the table.
                let names = self.table.names(ip).cloned();
                called.push(TableChange::Names { ip, names });
                continue;
            }
            changes.push((ip, mac, known.map(|row| row.mac)));
            let names = endpoint.names.clone().filter(|_| up);
            called.push(TableChange::Names { ip, names });
        }
        let told = changes.iter();
        let told = told.map(|&(ip, mac, _)| TableChange::Neighbor { ip, mac });
        self.tell(told.chain(called).collect(), outputs);
        let otherwise = changes.into_iter().filter(|(_, told, known)| told != known);
        self.announced.extend(otherwise.map(|(ip, ..)| ip));
    }

    /// Whether what the program was last told of this endpoint is not what the table says: then no change of the table is
    /// certain to put that right.
    pub(super) fn is_announced(&self, endpoint: &Endpoint) -> bool {
        endpoint.ips.iter().any(|ip| self.announced.contains(ip))
    }

    /// Says again where a MAC address is: it may be the datapath that is wrong.
    pub(super) fn restate(&mut self, mac: MacAddr, outputs: &mut VecDeque<Output>) {
        let host = self.table.mac_host(mac);
        self.tell(vec![TableChange::Mac { mac, host }], outputs);
    }

    /// Asks again for what is missing, if something is.
    pub(super) fn poll_resync(&mut self, now: Duration) -> Option<ToManager> {
        let waiting = self
            .resync_asked
            .is_some_and(|at| now.saturating_sub(at) < RESYNC_PATIENCE);
        let complete = self.claimed <= (self.generation, self.revision) || self.receiving.is_some();
        // A stream that never began is waiting for its subscription's answer.
        if complete || waiting {
            return None;
        }
        self.resync_asked = Some(now);
        Some(self.subscribe())
    }

    pub(super) fn status(&self, now: Duration) -> SubscriptionStatus {
        SubscriptionStatus {
            vni: self.vni,
            name: self.name().map(str::to_owned),
            generation: self.generation,
            revision: self.revision,
            rows: self.table.len(),
            age_ms: self.news_at.map(|at| millis(now.saturating_sub(at))),
            leased: self.block.ips(),
        }
    }

    /// The message that this part belongs to, if nothing before it is missing.
    fn place(&mut self, rows: &Rows) -> Option<Receiving> {
        let receiving = self.receiving.take();
        if rows.part > 0 {
            return receiving.filter(|r| {
                (r.generation, r.from, r.to, r.next_part)
                    == (rows.generation, rows.from, rows.to, rows.part)
            });
        }
        let here = (self.generation, self.revision);
        // A snapshot from before what is known, of the same life of the manager, came late.
        let late = self.answered && (rows.generation, rows.to) < here;
        let follows = rows.generation == self.generation && rows.from <= self.revision;
        let placed = if rows.from == 0 { !late } else { follows };
        placed.then(|| Receiving {
            generation: rows.generation,
            from: rows.from,
            to: rows.to,
            next_part: 0,
            seen: HashMap::new(),
        })
    }

    /// The last part is here: the table is complete up to its revision.
    fn complete(&mut self, done: Receiving, settled: bool, changes: &mut Vec<TableChange>) {
        self.resync_asked = None;
        if done.generation < self.generation {
            return;
        }
        self.answered = true;
        self.said.rows = true;
        let newer = done.generation > self.generation;
        if done.from == 0 {
            // A manager that lost nothing never forgets a row and never lowers its epoch. So what a settled snapshot lacks or
            // has an older row for is from a life that was lost; unless it is above the snapshot, and came after it.
            if settled {
                let cut = Epoch::new(done.generation, done.to);
                let stands = |row: &Row| {
                    done.seen
                        .get(&row.ip)
                        .is_some_and(|seen| seen.epoch >= row.epoch)
                };
                self.table
                    .retain(|row| row.epoch > cut || stands(row), changes);
                for row in done.seen.into_values() {
                    self.table.apply(row, changes);
                }
            }
            self.settled = settled;
        }
        self.revision = if newer {
            done.to
        } else {
            self.revision.max(done.to)
        };
        self.generation = done.generation;
    }

    fn tell(&mut self, changes: Vec<TableChange>, outputs: &mut VecDeque<Output>) {
        let of_member = |change: &TableChange| matches!(change, TableChange::Backend { .. });
        self.unmarked |= changes.iter().any(of_member);
        for change in &changes {
            if let TableChange::Neighbor { ip, .. } = change {
                self.announced.remove(ip);
            }
        }
        if !changes.is_empty() {
            outputs.push_back(Output::Event(Event::Table {
                vni: self.vni,
                changes,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::testing::{row, rows};
    use crate::row::State;

    const NOW: Duration = Duration::from_secs(1);

    /// An address that was leased ahead is used: its epoch was drawn long before its row was made.
    fn old_epoch_in_new_row() -> Rows {
        rows(100, 120, vec![row(5, 50, State::Up)])
    }

    fn snapshot() -> Rows {
        let of_old = row(5, 20, State::Free);
        rows(0, 100, vec![of_old, row(6, 90, State::Up)])
    }

    fn heard(messages: &[Rows]) -> Stream {
        let mut stream = Stream::new(Vni::new(4096).unwrap(), std::iter::empty());
        for message in messages {
            stream.handle_rows(message.clone(), NOW, &mut VecDeque::new());
        }
        stream
    }

    #[test]
    fn news_that_overtake_a_snapshot_are_asked_for_again() {
        let mut stream = heard(&[old_epoch_in_new_row()]);
        assert!(stream.table().is_empty());
        assert!(stream.poll_resync(NOW).is_some());
        stream.handle_rows(snapshot(), NOW, &mut VecDeque::new());
        assert_eq!((stream.generation, stream.revision), (1, 100));
        let asked = stream.poll_resync(NOW);
        assert!(
            matches!(asked, Some(ToManager::Subscribe { revision: 100, .. })),
            "{asked:?}"
        );
        stream.handle_rows(old_epoch_in_new_row(), NOW, &mut VecDeque::new());
        let used = old_epoch_in_new_row().rows.remove(0);
        assert_eq!(stream.table().row(used.ip), Some(&used));
        assert_eq!(stream.revision, 120);
    }

    #[test]
    fn a_snapshot_that_comes_again_late_takes_nothing_back() {
        let used = old_epoch_in_new_row().rows.remove(0);
        let mut stream = heard(&[snapshot(), old_epoch_in_new_row(), snapshot()]);
        assert_eq!(stream.table().row(used.ip), Some(&used));
        // On another connection it is another manager's, who does not know that row: it is of a life that was lost.
        stream.disconnected();
        stream.handle_rows(snapshot(), NOW, &mut VecDeque::new());
        let row = stream.table().row(used.ip).unwrap();
        assert_eq!(row.epoch, Epoch::new(1, 20));
    }
}
