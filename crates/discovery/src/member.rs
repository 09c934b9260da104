//! A member that is reached through the ingress network, in its own namespace: tables `inet` and `netdev towline-ingress`.
//!
//! A request comes in by the interface `ingress`, from the MAC address of the host that the client asked, with the client's own
//! address. The answer must leave by that host, wherever the routes would lead it:
//!
//! ```text
//! in    zone         the frame's source MAC ──▶ the zone that the connection is looked up in
//!       prerouting   the frame's source MAC ──▶ the connection's label
//!       unique       another client port, where the member has a connection from that address and port by another host
//! out   rules        from the member's ingress address, or a published UDP port: table 4789 ──▶ a gateway on `ingress`, with a
//!                    neighbour of ours
//!       postrouting  the label ──▶ the packet's mark and priority, because a chain at the interface sees no connection
//!       egress       mark and priority ──▶ the frame's destination MAC
//! ```
//!
//! Nothing of it grows with hosts, it does not disturb the default route, and it passes a strict reverse path filter, because the
//! rule holds for the way back too. The label is taken from any packet of a connection that has none, so that one whose entry was
//! lost goes on. By `ingress` come only connections to the published ports.
//!
//! Connections from one address and port of a client that came by two hosts are two connections: each host's have a zone of their
//! own (two hosts whose MACs end in the same two bytes share one), and the member sees another port of the client for the second,
//! because `unique` is a chain of translation, in which the kernel sees to it that no two connections are the same to the member.
//!
//! What a member cannot do: a UDP server that has bound no address, on a port that is published both by the ingress network and by its host alone, answers all clients
//! beyond the subnets it knows by the ingress network.

use std::collections::BTreeSet;
use std::net::IpAddr;

use control::service;
use ipnet::IpNet;
use netns::nftables::{
    Base, Chain, ChainKind, Data, Element, Family, Field, Hook, Protocol, Rule, Set, Table, Type,
    Value, Verdict, priority, state,
};
use netns::{Hop, NetlinkError, Netns, Rule as RoutingRule, TableRoute};

use crate::client::idle_rules;
use crate::content::Content;
use crate::entry::{number_of, with_netlink};
use crate::error::ApplyError;
use crate::flows;
use crate::plan::{MEMBER_INTERFACE, MemberPlan, ROUTING_TABLE};

/// The kernel's main routing table (`RT_TABLE_MAIN`).
const MAIN_TABLE: u32 = 254;

/// What stands in the namespace of a member.
#[derive(Debug, Default)]
pub struct InstalledMember {
    plan: Option<MemberPlan>,
    inet: Option<Content>,
    netdev: Option<Content>,
}

impl InstalledMember {
    /// Brings the namespace to what the plan says. Nothing is sent when the plan has not changed. The interface
    /// [`MEMBER_INTERFACE`] must be there and up.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is taken as installed then, and the next call makes all anew.
    pub fn apply(&mut self, netns: &Netns, plan: &MemberPlan) -> Result<(), ApplyError> {
        if self.plan.as_ref() == Some(plan) {
            return Ok(());
        }
        let known = self.plan.take();
        let same_way = known.as_ref().is_some_and(|known| {
            (known.gateway_mac, &known.gateways, ways_back(known))
                == (plan.gateway_mac, &plan.gateways, ways_back(plan))
        });
        if !same_way {
            with_netlink(netns, |netlink| {
                for ip in &plan.gateways {
                    netlink.add_neighbor(MEMBER_INTERFACE, *ip, plan.gateway_mac)?;
                    netlink.add_table_route(&TableRoute {
                        table: ROUTING_TABLE,
                        dst: everywhere(ip.is_ipv4()),
                        hop: Hop::Gateway(*ip),
                        dev: MEMBER_INTERFACE.to_owned(),
                    })?;
                }
                let wanted = ways_back(plan);
                for rule in &wanted {
                    netlink.add_rule(rule)?;
                }
                remove_rules(netlink, &wanted)
            })?;
        }
        let (inet, netdev) = (inet(plan), netdev());
        flows::commit(netns, &netdev_table(), &netdev, self.netdev.take().as_ref())
            .map_err(no_egress)?;
        flows::commit(netns, &inet_table(), &inet, self.inet.take().as_ref())?;
        (self.inet, self.netdev) = (Some(inet), Some(netdev));
        self.plan = Some(plan.clone());
        Ok(())
    }

    /// Removes all of ours from the namespace but the interface, with which routes and neighbours go.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, netns: &Netns) -> Result<(), ApplyError> {
        *self = Self::default();
        for table in [netdev_table(), inet_table()] {
            flows::commit(netns, &table, &Content::default(), None)?;
        }
        with_netlink(netns, |netlink| remove_rules(netlink, &BTreeSet::new()))
    }
}

/// `nft_chain_parse_hook`: a hook that the kernel does not have is not supported.
fn no_egress(error: ApplyError) -> ApplyError {
    match error {
        ApplyError::Netfilter { place, cause } if cause.is_unsupported() => {
            ApplyError::NoEgress { place, cause }
        }
        error => error,
    }
}

/// The member's tables, and what is to stand in them.
pub(crate) fn contents(plan: Option<&MemberPlan>) -> [(Table, Content); 2] {
    let of_plan = plan.map(|plan| (netdev(), inet(plan)));
    let (netdev, inet) = of_plan.unwrap_or_default();
    [(netdev_table(), netdev), (inet_table(), inet)]
}

fn inet_table() -> Table {
    Table::new(Family::Inet, "towline-ingress")
}

fn netdev_table() -> Table {
    Table::new(Family::Netdev, "towline-ingress")
}

fn everywhere(is_v4: bool) -> IpNet {
    let all = if is_v4 { "0.0.0.0/0" } else { "::/0" };
    all.parse().expect("a subnet that is written here")
}

/// The rules by which answers find the table of the ingress network.
fn ways_back(plan: &MemberPlan) -> BTreeSet<RoutingRule> {
    let plain = |from, priority| RoutingRule {
        priority,
        from: Some(from),
        to: None,
        input: None,
        source_port: None,
        not_by_default: false,
        table: ROUTING_TABLE,
    };
    let from_own = plan
        .ips
        .iter()
        .map(|ip| plain(IpNet::from(*ip), ROUTING_TABLE));
    let udp = plan.targets.iter().filter_map(|(protocol, port)| {
        (*protocol == service::Protocol::Udp).then_some((Protocol::Udp, *port))
    });
    let families: BTreeSet<bool> = plan.gateways.iter().map(IpAddr::is_ipv4).collect();
    // A server that has bound no address leaves it to the routes whose it answers with. What the main table knows better than by
    // its default route, such as the overlay's subnets, is answered there.
    let of_servers = udp.flat_map(|port| {
        let rules = families.iter().flat_map(move |is_v4| {
            let source_port = Some(port);
            let known = RoutingRule {
                source_port,
                not_by_default: true,
                table: MAIN_TABLE,
                ..plain(everywhere(*is_v4), ROUTING_TABLE + 1)
            };
            let other = RoutingRule {
                source_port,
                ..plain(everywhere(*is_v4), ROUTING_TABLE + 2)
            };
            [known, other]
        });
        rules.collect::<Vec<_>>()
    });
    from_own.chain(of_servers).collect()
}

/// Removes our rules but those that are wanted.
fn remove_rules(
    netlink: &netns::Netlink,
    wanted: &BTreeSet<RoutingRule>,
) -> Result<(), NetlinkError> {
    for rule in netlink.rules()? {
        let ours = (ROUTING_TABLE..=ROUTING_TABLE + 2).contains(&rule.priority);
        if ours && !wanted.contains(&rule) {
            netlink.del_rule(&rule)?;
        }
    }
    Ok(())
}

fn inet(plan: &MemberPlan) -> Content {
    let mut content = Content::default();
    let came_in = |comment: &str| Rule::new(comment).input(MEMBER_INTERFACE);
    let mut prerouting = vec![
        came_in("the host that a connection came by")
            .is(Field::Label, [0; 16])
            .copy(Field::SourceMac, Field::Label),
    ];
    prerouting.extend(idle_rules(&mut content, plan.idle_timeout, |comment| {
        came_in(comment).has_any(Field::State, state::NEW)
    }));
    let before_lookup = Base::new(ChainKind::Filter, Hook::Prerouting, priority::RAW);
    content.chain(
        Chain::base("zone", before_lookup),
        vec![
            came_in("connections of each host by themselves")
                .copy(Field::SourceMacTail, Field::OriginalZone),
        ],
    );
    let unique = Base::new(ChainKind::Nat, Hook::Input, priority::SRCNAT);
    content.chain(Chain::base("unique", unique), Vec::new());
    let mangle = |hook| Base::new(ChainKind::Filter, hook, priority::MANGLE);
    content.chain(
        Chain::base("prerouting", mangle(Hook::Prerouting)),
        prerouting,
    );
    content.chain(
        Chain::base("postrouting", mangle(Hook::Postrouting)),
        vec![
            Rule::new("for the chain at the interface, which sees no connection")
                .output(MEMBER_INTERFACE)
                .copy(Field::Label, Field::Mark)
                .copy_part(Field::Label, 1, Field::Priority),
        ],
    );
    let key = [Field::Protocol, Field::DestinationPort];
    let mut input = vec![
        came_in("connections there are")
            .has_any(Field::State, state::ESTABLISHED | state::RELATED)
            .verdict(Verdict::Accept),
        came_in("published ports")
            .in_set("targets", &key)
            .verdict(Verdict::Accept),
    ];
    // Pings, and neighbour discovery.
    for protocol in [Protocol::Icmp, Protocol::Icmpv6] {
        input.push(came_in("ICMP").protocol(protocol).verdict(Verdict::Accept));
    }
    input.push(came_in("nothing else is published").verdict(Verdict::Drop));
    content.chain(Chain::base("input", Base::filter_input()), input);
    let targets = plan
        .targets
        .iter()
        .map(|(protocol, port)| target(*protocol, *port));
    content.set(
        Set {
            name: "targets".to_owned(),
            key: vec![Type::Protocol, Type::Port],
            data: Data::None,
        },
        targets.collect(),
    );
    content
}

fn target(protocol: service::Protocol, port: u16) -> Element {
    Element::key([number_of(protocol).into(), Value::from(port)])
}

fn netdev() -> Content {
    let mut content = Content::default();
    content.chain(
        Chain::base("egress", Base::egress(MEMBER_INTERFACE)),
        vec![
            Rule::new("back to the host that the connection came by")
                .is_not(Field::Mark, Value::number(0))
                .copy(Field::Mark, Field::DestinationMacHead)
                .copy(Field::Priority, Field::DestinationMacTail),
        ],
    );
    content
}
