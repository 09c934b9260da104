//! Our nftables table `inet towline`: no traffic between containers, answers and published ports only from outside,
//! masquerade on the way out.
//!
//! ```text
//!   prerouting (raw)     what comes from containers for 127/8 is dropped: the bridge routes it for the host's own sake
//!   prerouting, output   a port of this host → the map of published ports → a container's address and port
//!   forward              containers out, answers and published ports in, nothing else
//!   postrouting          containers' connections get the host's address; those of this host's localhost and of other
//!                        containers to a published port get the bridge's, so that the answers come back through here
//! ```
//!
//! One transaction replaces all rules, so they never stand half-made; the maps keep their elements when an agent takes
//! over what stands, so that published ports answer all the while.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netns::nftables::{
    Base, Batch, Chain, ChainKind, Data, Element, Family, Field, Hook, Rule, Set, Snapshot, Table,
    Type, Value, Verdict, priority, state, status,
};
use netns::{NetfilterSocket, Netns};

use crate::publish::{Leads, MAPS};
use crate::{BRIDGE_NAME, BridgeError};

/// The table's name; its family is `inet`, so that it sees IPv4 and IPv6.
pub(crate) const TABLE: &str = "towline";
const LOOPBACK: &str = "gateway-loopback";
const PREROUTING: &str = "gateway-prerouting";
const OUTPUT: &str = "gateway-output";
const PUBLISHED: &str = "gateway-published";
const FORWARD: &str = "gateway-forward";
const POSTROUTING: &str = "gateway-postrouting";

pub(crate) fn table() -> Table {
    Table::new(Family::Inet, TABLE)
}

/// Puts our table in place with these published ports, instead of the one that stands there.
pub(crate) fn apply(
    netns: &Netns,
    (ipv4, ipv6): (Ipv4Net, Ipv6Net),
    published: &[Leads],
) -> Result<(), BridgeError> {
    let mut batch = Batch::new();
    batch.remove_table(&table());
    add(&mut batch, ipv4, ipv6);
    lead(&mut batch, published);
    run(netns, &batch)
}

/// Puts our rules in place and keeps the published ports that stand there.
pub(crate) fn adopt(netns: &Netns, (ipv4, ipv6): (Ipv4Net, Ipv6Net)) -> Result<(), BridgeError> {
    let mut batch = Batch::new();
    add(&mut batch, ipv4, ipv6);
    match run(netns, &batch) {
        // What stands there is of another shape, as another version made it.
        Err(BridgeError::Netfilter(_)) => apply(netns, (ipv4, ipv6), &[]),
        done => done,
    }
}

/// Removes our table; none is fine.
pub(crate) fn remove(netns: &Netns) -> Result<(), BridgeError> {
    let mut batch = Batch::new();
    batch.remove_table(&table());
    run(netns, &batch)
}

/// Our table as it stands: for comparison. `None` when it is gone.
pub(crate) fn own(socket: &mut NetfilterSocket) -> Result<Option<Snapshot>, BridgeError> {
    let snapshot = socket.snapshot(&table())?;
    Ok((!snapshot.is_empty()).then_some(snapshot))
}

/// Adds published ports, or takes them away.
pub(crate) fn change(netns: &Netns, added: &[Leads], removed: &[Leads]) -> Result<(), BridgeError> {
    let mut batch = Batch::new();
    for leads in removed {
        batch.delete_elements(
            &table(),
            leads.map.name(),
            &[Element::key(leads.key.clone())],
        );
    }
    lead(&mut batch, added);
    run(netns, &batch)
}

/// The published ports alone that are given, in the place of those that stand there.
pub(crate) fn replace(netns: &Netns, published: &[Leads]) -> Result<(), BridgeError> {
    let mut batch = Batch::new();
    for map in MAPS {
        batch.flush_set(&table(), map.name());
    }
    lead(&mut batch, published);
    run(netns, &batch)
}

/// Runs one transaction of commands.
pub(crate) fn run(netns: &Netns, batch: &Batch) -> Result<(), BridgeError> {
    Ok(batch.commit(&mut NetfilterSocket::open(netns)?)?)
}

fn lead(batch: &mut Batch, published: &[Leads]) {
    for leads in published {
        let element = Element::values(leads.key.clone(), leads.to.clone());
        batch.add_elements(&table(), leads.map.name(), &[element]);
    }
}

/// The table with its chains, maps and rules. What stands there is kept, but for the rules.
fn add(batch: &mut Batch, ipv4: Ipv4Net, ipv6: Ipv6Net) {
    let table = table();
    batch.add_table(&table);
    for map in MAPS {
        let mut key = map.key_types();
        key.extend([Type::Protocol, Type::Port]);
        let address = if map.is_ipv6() {
            Type::Ipv6
        } else {
            Type::Ipv4
        };
        batch.add_set(
            &table,
            &Set {
                name: map.name().to_owned(),
                key,
                data: Data::Values(vec![address, Type::Port]),
            },
        );
    }
    let raw = Base::new(ChainKind::Filter, Hook::Prerouting, priority::RAW);
    for chain in [
        Chain::regular(PUBLISHED),
        Chain::base(LOOPBACK, raw),
        Chain::base(PREROUTING, Base::dnat_prerouting()),
        Chain::base(OUTPUT, Base::dnat_output()),
        Chain::base(FORWARD, Base::filter_forward()),
        Chain::base(POSTROUTING, Base::snat_postrouting()),
    ] {
        batch
            .add_chain(&table, &chain)
            .flush_chain(&table, &chain.name);
    }
    for (chain, rule) in rules(ipv4.into(), ipv6.into()) {
        batch.add_rule(&table, chain, &rule);
    }
}

fn rules(ipv4: IpNet, ipv6: IpNet) -> Vec<(&'static str, Rule)> {
    let bridge = || Value::interface(BRIDGE_NAME);
    let from = |comment| Rule::new(comment).input(BRIDGE_NAME);
    let to = |comment| Rule::new(comment).output(BRIDGE_NAME);
    let drop = Verdict::Drop;
    let (localhost4, localhost6) = localhosts();
    let own = "this host's localhost is its own";
    let mut rules = vec![
        (LOOPBACK, from(own).to(localhost4).verdict(drop.clone())),
        (LOOPBACK, from(own).from(localhost4).verdict(drop.clone())),
        // A neighbour may send frames to 127.0.0.1; led to a container, they would no longer be seen to be no business
        // of this host's. (IPv6 drops what comes in for ::1 by itself, before any rule.)
        (
            PREROUTING,
            Rule::new(own)
                .is_not(Field::InputName, Value::interface("lo"))
                .to(localhost4)
                .verdict(Verdict::Return),
        ),
        (
            OUTPUT,
            Rule::new("::1 has no way back")
                .to(localhost6)
                .verdict(Verdict::Return),
        ),
    ];
    for map in MAPS {
        let key = [
            map.field(),
            Some(Field::Protocol),
            Some(Field::DestinationPort),
        ];
        let key: Vec<Field> = key.into_iter().flatten().collect();
        // What this host sends came in by no interface.
        let chain = match map.field() {
            Some(Field::InputName) => PREROUTING,
            _ => PUBLISHED,
        };
        let rule = Rule::new("published ports").to_this_host();
        rules.push((chain, rule.dnat_from(map.name(), &key, map.is_ipv6())));
    }
    let published = Verdict::Jump(PUBLISHED.to_owned());
    for chain in [PREROUTING, OUTPUT] {
        let rule = Rule::new("published ports").verdict(published.clone());
        rules.push((chain, rule));
    }
    let only_given = "nothing from addresses not given out";
    rules.extend([
        (
            FORWARD,
            from(only_given).not_from(ipv4).verdict(drop.clone()),
        ),
        (
            FORWARD,
            from(only_given).not_from(ipv6).verdict(drop.clone()),
        ),
        (
            FORWARD,
            to("published ports")
                .has_any(Field::Status, status::DNAT)
                .verdict(Verdict::Accept),
        ),
        (
            FORWARD,
            from("nothing between containers")
                .output(BRIDGE_NAME)
                .verdict(drop.clone()),
        ),
        (
            FORWARD,
            to("answers")
                .has_any(Field::State, state::ESTABLISHED | state::RELATED)
                .verdict(Verdict::Accept),
        ),
        (FORWARD, to("nothing else to containers").verdict(drop)),
    ]);
    for source in [ipv4, localhost4, ipv6] {
        let rule = to("to published ports")
            .has_any(Field::Status, status::DNAT)
            .from(source)
            .masquerade();
        rules.push((POSTROUTING, rule));
    }
    for subnet in [ipv4, ipv6] {
        let rule = Rule::new("masquerade")
            .from(subnet)
            .is_not(Field::OutputName, bridge())
            .masquerade();
        rules.push((POSTROUTING, rule));
    }
    rules
}

/// 127.0.0.0/8 and ::1.
fn localhosts() -> (IpNet, IpNet) {
    let ipv4 = Ipv4Net::new_assert([127, 0, 0, 0].into(), 8);
    let ipv6 = Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128);
    (ipv4.into(), ipv6.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_say_what_they_are_for() {
        let rules = rules(
            "172.31.0.0/16".parse().expect("a subnet"),
            "fd00::/64".parse().expect("a subnet"),
        );
        assert!(rules.iter().all(|(_, rule)| !rule.comment().is_empty()));
    }

    #[test]
    fn published_ports_are_let_in_before_neighbours_are_kept_out() {
        let subnets = ("172.31.0.0/16", "fd00::/64");
        let rules = rules(
            subnets.0.parse().expect("a subnet"),
            subnets.1.parse().expect("a subnet"),
        );
        let forward: Vec<_> = rules
            .iter()
            .filter(|(chain, _)| *chain == FORWARD)
            .map(|(_, rule)| rule.comment())
            .collect();
        assert_eq!(
            forward[2..],
            [
                "published ports",
                "nothing between containers",
                "answers",
                "nothing else to containers"
            ]
        );
    }
}
