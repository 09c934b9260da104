//! What is done to a control plane, whichever it is, and what must hold of it when all is quiet.

use std::collections::BTreeMap;
use std::net::IpAddr;

use control::HostId;
use proptest::prelude::*;
use vtep::Vni;

use crate::net::Weather;

/// Something happens. Hosts, networks and endpoints are numbers taken modulo what there is.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A container starts, with the next free address.
    Start { host: usize, network: usize },
    /// A container starts with the address that was freed last.
    StartAgain { host: usize, network: usize },
    /// A container ends.
    Stop { which: usize },
    /// A container ends here and starts there at the same moment, with the same address.
    Move { which: usize, to: usize },
    /// An endpoint that was up is down, or the other way round.
    Toggle { which: usize },
    /// A service comes on a network, or goes from it.
    Service {
        host: usize,
        network: usize,
        name: usize,
        remove: bool,
    },
    /// An endpoint becomes a member of a service that its host knows, or changes its part in it.
    Serve { which: usize, serving: bool },
    /// A network is removed when it is empty, and made when it is not there.
    Network { network: usize },
    /// A connection is reset.
    Cut { host: usize },
    /// A host's wire carries nothing for a while.
    Part { host: usize, milliseconds: u16 },
    /// A host's wire gets slow, or worse.
    Weather { host: usize, weather: Weather },
    /// An agent is killed, and started later from its state file.
    KillAgent { host: usize, milliseconds: u16 },
    /// A whole host stands still, and goes on where it was.
    Freeze { host: usize, milliseconds: u16 },
    /// A host's clock leaps ahead, as after a suspend.
    Leap { host: usize, milliseconds: u16 },
    /// An operator gives a host up while it is away.
    RemoveHost { host: usize },
    /// A host leaves the cluster in order, and comes back as a new one.
    Leave { host: usize },
    /// The manager is killed: before or after what it decided last is on disk.
    KillManager { committed: bool, milliseconds: u16 },
    /// The time of day on the manager's host is set.
    SetClock { minutes: i32 },
    /// A copy of the store is put aside.
    Backup,
    /// The store is lost, and the copy put in its place.
    Restore,
    /// The store is lost.
    Wipe,
    /// The manager is lost, and an operator promotes a host that stood by: an empty store, and above all that the host has seen.
    Promote { host: usize },
    /// Time passes.
    Wait { milliseconds: u16 },
}

/// How hard the steps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hardness {
    /// Connections break, hosts and manager die; what a connection carries comes whole and in order, as TCP's does.
    Streams,
    /// Besides, messages within a connection are lost, doubled and overtake each other.
    Messages,
    /// As [`Hardness::Streams`], and the manager's store is lost or replaced by an older one, and clocks are set.
    Stores,
}

/// Steps of this hardness.
pub(crate) fn step(hardness: Hardness) -> BoxedStrategy<Step> {
    let n = any::<usize>;
    let milliseconds = || prop_oneof![1..100u16, 100..5000u16, 5000..15_000u16];
    let worse = match hardness {
        Hardness::Messages => 20u8,
        Hardness::Streams | Hardness::Stores => 0,
    };
    let weather = (1..400u16, 0..=worse, 0..=worse, 0..=worse * 2).prop_map(
        |(delay, lost, doubled, reordered)| Weather {
            delay,
            lost,
            doubled,
            reordered,
        },
    );
    let common = prop_oneof![
        24 => (n(), n()).prop_map(|(host, network)| Step::Start { host, network }),
        6 => (n(), n()).prop_map(|(host, network)| Step::StartAgain { host, network }),
        14 => n().prop_map(|which| Step::Stop { which }),
        8 => (n(), n()).prop_map(|(which, to)| Step::Move { which, to }),
        8 => n().prop_map(|which| Step::Toggle { which }),
        1 => n().prop_map(|network| Step::Network { network }),
        3 => (n(), n(), n(), any::<bool>()).prop_map(|(host, network, name, remove)| Step::Service { host, network, name, remove }),
        6 => (n(), any::<bool>()).prop_map(|(which, serving)| Step::Serve { which, serving }),
        4 => n().prop_map(|host| Step::Cut { host }),
        4 => (n(), milliseconds()).prop_map(|(host, milliseconds)| Step::Part { host, milliseconds }),
        4 => (n(), weather).prop_map(|(host, weather)| Step::Weather { host, weather }),
        2 => (n(), milliseconds()).prop_map(|(host, milliseconds)| Step::KillAgent { host, milliseconds }),
        1 => (n(), milliseconds()).prop_map(|(host, milliseconds)| Step::Freeze { host, milliseconds }),
        1 => (n(), milliseconds()).prop_map(|(host, milliseconds)| Step::Leap { host, milliseconds }),
        1 => n().prop_map(|host| Step::RemoveHost { host }),
        1 => n().prop_map(|host| Step::Leave { host }),
        2 => (any::<bool>(), milliseconds()).prop_map(|(committed, milliseconds)| Step::KillManager { committed, milliseconds }),
        20 => (1..60u16).prop_map(|milliseconds| Step::Wait { milliseconds }),
        8 => (60..2000u16).prop_map(|milliseconds| Step::Wait { milliseconds }),
    ];
    if hardness != Hardness::Stores {
        return common.boxed();
    }
    let stores = prop_oneof![
        1 => (-100_000..100_000i32).prop_map(|minutes| Step::SetClock { minutes }),
        2 => Just(Step::Backup),
        1 => Just(Step::Restore),
        1 => Just(Step::Wipe),
        1 => n().prop_map(|host| Step::Promote { host }),
    ];
    prop_oneof![24 => common, 1 => stores].boxed()
}

/// Who has an address.
pub(crate) type Owners = BTreeMap<(Vni, IpAddr), HostId>;

/// A control plane in virtual time.
pub(crate) trait Plane {
    /// Hosts, all connected, and empty networks.
    fn new(seed: u64) -> Self;

    /// Does a step; one that means nothing here does nothing.
    fn step(&mut self, step: &Step);

    /// Everything is mended and everybody is back; then time passes, long enough.
    fn settle(&mut self);

    /// Who has which address in truth.
    fn truth(&self) -> Owners;

    /// Where each host sends what is for an address, in networks that it follows.
    fn views(&self) -> Vec<(String, Owners)>;

    /// Whether a host that follows no network of an address need not know it.
    fn follows(&self, host: usize, vni: Vni) -> bool;
}

/// After quiet every view equals the allocator's.
pub(crate) fn check_views(plane: &impl Plane) -> Result<(), String> {
    let truth = plane.truth();
    for (host, (name, view)) in plane.views().into_iter().enumerate() {
        let mut wanted = truth.clone();
        wanted.retain(|(vni, _), _| plane.follows(host, *vni));
        if view != wanted {
            return Err(format!("{name} sends to {view:?}; the truth is {wanted:?}"));
        }
    }
    Ok(())
}
