//! What must hold of a cluster: at every moment, and when all is quiet.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use control::manager::GRACE;
use control::table::Table;
use control::testing::Installed;
use control::{Endpoint, EndpointState, HostId, MemberState, Row, State};
use vtep::Vni;

use crate::host::Line;
use crate::plane::check_views;
use crate::world::World;

/// Two connected hosts may both think that an address is theirs for this long: one of them is being told.
const TOLD: Duration = Duration::from_secs(5);

impl World {
    /// At no time is one address on two hosts that nobody disturbs: not at all while the manager's store is whole, no operator
    /// gave up a host that still ran, and no host used what it was leased too long ago.
    pub(crate) fn check_always(&self) {
        let mut holders: HashMap<(Vni, IpAddr), (usize, &Endpoint)> = HashMap::new();
        for (h, host) in self.hosts.iter().enumerate() {
            for (endpoint, _) in &host.runs {
                for &ip in &endpoint.ips {
                    let here = (h, endpoint);
                    if let Some(other) = holders.insert((endpoint.vni, ip), here) {
                        self.check_shared(ip, other, here);
                    }
                }
            }
        }
    }

    fn check_shared(&self, ip: IpAddr, one: (usize, &Endpoint), two: (usize, &Endpoint)) {
        let leased = [one, two].iter().any(|(host, endpoint)| {
            let taken = &self.hosts[*host].leased;
            taken.contains(&(endpoint.vni, endpoint.epoch))
        });
        let (one, two) = (&self.hosts[one.0], &self.hosts[two.0]);
        let replaced = !self.lost.is_empty();
        let given_up = [one, two]
            .iter()
            .any(|host| self.removed.contains(&host.info.id));
        let calm_since = one.disturbed.max(two.disturbed).max(self.disturbed);
        let connected = [one, two]
            .iter()
            .all(|host| matches!(host.line, Line::Open(_)));
        let calm = connected && !self.harsh && self.now() > calm_since + GRACE + TOLD;
        assert!(
            (replaced || given_up || leased) && !calm,
            "{ip} is on {} and on {}, which are connected: {connected}, and calm: {calm}",
            one.info.name,
            two.info.name
        );
    }

    /// After quiet: every view is the allocator's table, every endpoint that runs is in it as its owner said, and nothing is
    /// held for nobody.
    pub(crate) fn check_settled(&self) {
        let manager = self
            .manager
            .as_ref()
            .expect("a settled cluster has a manager");
        assert_eq!(
            manager.counts(),
            (self.hosts.len(), self.hosts.len()),
            "connected, known"
        );
        for &vni in &self.networks {
            let Some(truth) = manager.table(vni) else {
                let follower = self.hosts.iter().find(|host| host.follows.contains(&vni));
                assert!(
                    follower.is_none(),
                    "{} follows {vni}, which is gone",
                    follower.unwrap().info.name
                );
                continue;
            };
            self.check_network(vni, truth);
        }
        check_views(self).unwrap();
    }

    fn check_network(&self, vni: Vni, truth: &Table) {
        let mut running = 0;
        for host in &self.hosts {
            let name = &host.info.name;
            let view = host.agent.as_ref().and_then(|agent| agent.table(vni));
            assert_eq!(
                view.is_some(),
                host.follows.contains(&vni),
                "{name} follows {vni}"
            );
            if let Some(view) = view {
                assert_eq!(
                    sorted(view.rows()),
                    sorted(truth.rows()),
                    "the view of {name}"
                );
                let masked = view
                    .members()
                    .find(|member| view.member(*member) != MemberState::Up);
                assert_eq!(masked, None, "masked by {name}");
                let services = host.services.get(&vni).cloned().unwrap_or_default();
                let truth = self.manager.as_ref().map(|m| m.services_on(vni));
                assert_eq!(Some(services), truth, "the services of {vni} to {name}");
                let afresh = Installed::from_table(view);
                let nothing = Installed::default();
                assert_eq!(
                    host.installed.get(&vni).unwrap_or(&nothing),
                    &afresh,
                    "what {name} was told of {vni}"
                );
            }
            for (endpoint, state) in host.runs.iter().filter(|(endpoint, _)| endpoint.vni == vni) {
                let row = truth.row(endpoint.ips[0]).unwrap();
                let expected = match state {
                    EndpointState::Up => State::Up,
                    EndpointState::Down => State::Down,
                };
                assert_eq!(
                    (row.epoch, row.owner, row.state, row.member, &row.names),
                    (
                        endpoint.epoch,
                        host.info.id,
                        expected,
                        endpoint.member,
                        &endpoint.names
                    ),
                    "{endpoint:?} of {name}"
                );
                if row.state == State::Up {
                    assert_eq!(truth.mac_host(endpoint.mac), Some(host.info.id));
                }
                running += 1;
            }
        }
        let mut aside: HashSet<IpAddr> = HashSet::new();
        for ip in self.hosts.iter().flat_map(|host| host.leased_ahead(vni)) {
            assert!(aside.insert(ip), "{ip} of {vni} is leased twice");
            let row = truth.row(ip).filter(|row| row.state != State::Free);
            assert_eq!(row, None, "{ip} of {vni} is leased and in use");
        }
        let held = truth.rows().filter(|row| row.state != State::Free);
        let (of_services, held): (Vec<&Row>, Vec<&Row>) =
            held.partition(|row| row.owner == HostId::NOBODY);
        assert_eq!(
            held.len(),
            running,
            "no address of {vni} is held for nobody"
        );
        self.check_virtual(vni, truth, of_services.len());
    }

    /// Every service has its virtual address, and no more are held.
    fn check_virtual(&self, vni: Vni, truth: &Table, held: usize) {
        let services = self.manager.as_ref().map(|m| m.services_on(vni));
        let services = services.unwrap_or_default();
        for service in &services {
            let [ip] = service.vips[..] else {
                panic!("{service:?} has no virtual address")
            };
            let row = truth.row(ip).map(|row| (row.epoch, row.owner, row.state));
            let expected = (service.epoch, HostId::NOBODY, State::Down);
            assert_eq!(row, Some(expected), "{service:?}");
        }
        assert_eq!(held, services.len(), "virtual addresses of {vni}");
    }
}

/// Rows by address.
pub(crate) fn sorted<'r>(rows: impl Iterator<Item = &'r Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.cloned().collect();
    rows.sort_by_key(|row| row.ip);
    rows
}
