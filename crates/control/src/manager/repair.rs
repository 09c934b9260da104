//! Repair of a sender whose table is not what it should be.
//!
//! ```text
//! receiver ──Misdelivered──▶ manager ──Misdelivered──▶ sender ──Confirm──▶ manager ──Corrections──▶ sender
//! ```
//!
//! The receiver knows only that a frame is not for it. The sender knows which rows sent the frame there and asks about them; rows
//! are registers, so that any answer is safe at any time, whatever else is under way. What one host asks for too often is passed over: it will
//! be told again by the next frame.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use vtep::{MacAddr, Vni};

use super::{Connection, Manager};
use crate::message::ToAgent;

/// Addresses in one question.
pub(crate) const CONFIRM_MAX: usize = 64;

impl Manager {
    /// A frame of the host at `from` came to the host behind `connection`, which does not have `mac`.
    pub(super) fn misdelivered(
        &mut self,
        connection: Connection,
        vni: Vni,
        mac: MacAddr,
        from: IpAddr,
        now: Duration,
    ) {
        if !self.may_repair(connection, vni, now) {
            return;
        }
        let sender = self.state.hosts.values().find(|info| info.vtep == from);
        let sender = sender.and_then(|info| self.by_host.get(&info.id).copied());
        if let Some(sender) = sender {
            self.send(sender, ToAgent::Misdelivered { vni, mac });
        }
    }

    /// A host asks whether what it knows of these addresses and of who has `mac` is still so.
    pub(super) fn confirm(
        &mut self,
        connection: Connection,
        vni: Vni,
        mac: MacAddr,
        ips: &[IpAddr],
        now: Duration,
    ) {
        if !self.may_repair(connection, vni, now) {
            return;
        }
        let Some(state) = self.state.networks.get(&vni) else {
            return;
        };
        let holding = state.table.holders(mac).map(|row| row.ip);
        let asked: BTreeSet<IpAddr> = ips
            .iter()
            .copied()
            .take(CONFIRM_MAX)
            .chain(holding)
            .collect();
        let rows = asked
            .into_iter()
            .filter_map(|ip| state.table.row(ip).cloned())
            .collect();
        self.send(connection, ToAgent::Corrections { vni, rows });
    }

    fn may_repair(&mut self, connection: Connection, vni: Vni, now: Duration) -> bool {
        self.connections
            .get_mut(&connection)
            .is_some_and(|peer| peer.subscriptions.contains(&vni) && peer.repairs.take(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::limits::RATE;
    use crate::manager::testing::{Bench, NOW, vtep};
    use crate::message::ToManager;
    use crate::request::Request;
    use crate::row::State;

    /// Host 2's endpoint is freed and its address goes to host 1, under another MAC; host 2 missed all of it.
    #[test]
    fn a_stale_sender_mends_in_one_round_trip() {
        let (mut bench, vni, [_, old]) = Bench::new();
        for n in [1, 2] {
            let subscribe = ToManager::Subscribe {
                vni,
                generation: 0,
                revision: 0,
                network: None,
            };
            bench.say(n, subscribe);
        }
        let free = Request::Free {
            vni,
            epoch: old.epoch,
        };
        bench.call(2, free);
        let now = NOW + Duration::from_secs(60);
        bench.sent.clear();
        let misdelivered = ToManager::Misdelivered {
            vni,
            mac: old.mac,
            from: vtep(2),
        };
        bench.manager.handle_message(1, misdelivered, now);
        bench.turn();
        let told = (2, ToAgent::Misdelivered { vni, mac: old.mac });
        assert_eq!(std::mem::take(&mut bench.sent), [told]);
        let confirm = ToManager::Confirm {
            vni,
            mac: old.mac,
            ips: old.ips.clone(),
        };
        bench.manager.handle_message(2, confirm, now);
        bench.turn();
        let [(2, ToAgent::Corrections { rows, .. })] = &bench.sent[..] else {
            panic!("{:?}", bench.sent)
        };
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].ip, rows[0].state), (old.ips[0], State::Free));
        assert!(rows[0].epoch > old.epoch);
    }

    #[test]
    fn who_does_not_follow_a_network_repairs_nothing_in_it_and_nobody_repairs_for_ever() {
        let (mut bench, vni, [one, _]) = Bench::new();
        bench.sent.clear();
        let misdelivered = ToManager::Misdelivered {
            vni,
            mac: one.mac,
            from: vtep(2),
        };
        bench.say(1, misdelivered.clone());
        assert_eq!(bench.sent, []);
        let subscribe = ToManager::Subscribe {
            vni,
            generation: 0,
            revision: 0,
            network: None,
        };
        bench.say(1, subscribe);
        bench.sent.clear();
        for _ in 0..10 * RATE {
            bench.say(1, misdelivered.clone());
        }
        assert_eq!(bench.sent.len(), RATE as usize);
    }
}
