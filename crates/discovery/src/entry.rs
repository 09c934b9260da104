//! Published ports on a host that accepts them for the whole cluster: table `inet towline-ingress` in the host's namespace.
//!
//! ```text
//! prerouting, output: to this host, published port ──▶ publish-8080-tcp ──▶ whose turn it is: a member's address and port
//! postrouting: sources that mean nothing elsewhere ──▶ this host's own address on the ingress network
//! forward: by towline_ingress goes what is published, and its answers; nothing else
//! input, output: published ports that no member serves are refused at once; by towline_ingress comes nothing else for this host
//! ```
//!
//! All else keeps the client's address. The answer comes back to this host, because a member sends it to the host that it came by
//! ([`member`](crate::InstalledMember)); conntrack gives it the address that the client asked for.
//!
//! A port on 127.0.0.1 is nobody's but this host's: packets from elsewhere for loopback addresses are never translated. `localhost`
//! works in both families. For IPv4 it takes `route_localnet`, on our interface alone. For IPv6 the kernel looks for `::1`
//! strictly on the interface by which the answer came: a local route in a table of our own says that it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use control::service;
use control::service::PublishOn;
use ipnet::IpNet;
use netns::conntrack::Connection;
use netns::nftables::{
    Base, Chain, Data, Element, Family, Field, Protocol, Rule, Set, Snapshot, Table, Type, Value,
    Verdict, state, status,
};
use netns::{Hop, Netlink, NetlinkError, Netns, Rule as RoutingRule, TableRoute, sysctl};

use crate::client::{idle_rules, lead, refusals};
use crate::content::Content;
use crate::error::ApplyError;
use crate::flows;
use crate::plan::{EntryPlan, EntryPort, HOST_INTERFACE, ROUTING_TABLE};

/// Maps of the table: what is published, and what of it nobody serves.
const PUBLISHED: &str = "published";
const UNSERVED: &str = "unserved";

/// What stands on a host that accepts published ports.
#[derive(Debug, Default)]
pub struct InstalledEntry {
    plan: Option<EntryPlan>,
    content: Option<Content>,
    snapshot: Snapshot,
}

impl InstalledEntry {
    /// Brings the host to what the plan says, in one transaction, and ends what was remembered of connections to members that are
    /// gone and ports that are no longer published. Nothing is sent when the plan has not changed. A plan without ports removes all.
    ///
    /// The host's port on the ingress network, [`HOST_INTERFACE`], must be there and up, and the host must forward.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is taken as installed then, and the next call makes all anew.
    pub fn apply(&mut self, host: &Netns, plan: &EntryPlan) -> Result<(), ApplyError> {
        if self.plan.as_ref() == Some(plan) {
            return Ok(());
        }
        let known = self.plan.take();
        let content = content(plan);
        let before = self.content.take();
        let nothing = content.is_empty();
        if !(known.is_none() && nothing && !flows::has_table(host, &table())?) {
            // Loopback addresses are taken from our interface only while the table stands that keeps others from them.
            if nothing {
                forget(host)?;
            }
            flows::commit(host, &table(), &content, before.as_ref())?;
            if !nothing && known.as_ref().is_none_or(|known| known.ports.is_empty()) {
                prepare(host)?;
            }
            purge(host, known.as_ref(), plan)?;
        }
        self.snapshot = flows::snapshot(host, &table())?;
        self.content = Some(content);
        self.plan = Some(plan.clone());
        Ok(())
    }

    /// Ends what was remembered of connections before this program began that lead to members that are gone, by ports that are
    /// published no more, or, UDP, around a port that is published. To be called after [`Self::apply`], and only where the plan is
    /// known to be no older than those connections.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn purge_unknown(&self, host: &Netns, subnets: &BTreeSet<IpNet>) -> Result<(), ApplyError> {
        let Some(plan) = &self.plan else {
            return Ok(());
        };
        let (flows, published) = (flows_of(plan), udp_ports_of(plan));
        flows::purge(host, |connection| {
            let answers = connection.reply.source;
            let led = connection.original.destination != answers
                && subnets.iter().any(|subnet| subnet.contains(&answers));
            flows::is_led(connection) && led && !flows.contains(&flow_of(connection))
                || passes_by(connection, &published)
        })
    }

    /// Puts the table back if somebody else changed or removed it, as a firewall does that is loaded anew. Says whether it was so.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn repair(&mut self, host: &Netns) -> Result<bool, ApplyError> {
        let Some(plan) = self.plan.clone().filter(|plan| !plan.ports.is_empty()) else {
            return Ok(false);
        };
        if flows::snapshot(host, &table())? == self.snapshot {
            return Ok(false);
        }
        (self.plan, self.content) = (None, None);
        self.apply(host, &plan)?;
        Ok(true)
    }

    /// Removes all of ours from the host, and forgets connections that went through it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, host: &Netns) -> Result<(), ApplyError> {
        self.apply(host, &EntryPlan::default())
    }
}

pub(crate) fn table() -> Table {
    Table::new(Family::Inet, "towline-ingress")
}

/// The rule that leads answers for `::1` to the local route of our table.
fn loopback_rule() -> RoutingRule {
    RoutingRule {
        priority: ROUTING_TABLE,
        from: None,
        to: Some(net("::1/128")),
        input: Some(HOST_INTERFACE.to_owned()),
        source_port: None,
        not_by_default: false,
        table: ROUTING_TABLE,
    }
}

/// Makes answers for loopback addresses find their way.
fn prepare(host: &Netns) -> Result<(), ApplyError> {
    sysctl::set(host, &route_localnet(), "1").map_err(|cause| ApplyError::Namespace {
        place: host.to_string(),
        cause,
    })?;
    with_netlink(host, |netlink| {
        netlink.add_table_route(&TableRoute {
            table: ROUTING_TABLE,
            dst: net("::1/128"),
            hop: Hop::Local,
            dev: HOST_INTERFACE.to_owned(),
        })?;
        netlink.add_rule(&loopback_rule())
    })
}

/// The interface may be gone already, and its setting and the route with it.
fn forget(host: &Netns) -> Result<(), ApplyError> {
    if let Err(error) = sysctl::set(host, &route_localnet(), "0") {
        tracing::debug!("no {HOST_INTERFACE} any more: {error}");
    }
    with_netlink(host, |netlink| netlink.del_rule(&loopback_rule()))
}

fn route_localnet() -> String {
    format!("net/ipv4/conf/{HOST_INTERFACE}/route_localnet")
}

/// Changes the routes of a namespace.
pub(crate) fn with_netlink(
    netns: &Netns,
    change: impl FnOnce(&Netlink) -> Result<(), NetlinkError>,
) -> Result<(), ApplyError> {
    Netlink::open(netns)
        .and_then(|netlink| change(&netlink))
        .map_err(|cause| ApplyError::Netlink {
            place: netns.to_string(),
            cause,
        })
}

/// Ends what is remembered of connections that would not be led as they were: to members that left, by ports that are published no
/// more, and UDP that began to ask before its port was published. What stood before is not known after this program's start: see
/// [`InstalledEntry::purge_unknown`].
fn purge(host: &Netns, known: Option<&EntryPlan>, plan: &EntryPlan) -> Result<(), ApplyError> {
    let Some(known) = known else {
        return Ok(());
    };
    let gone = &flows_of(known) - &flows_of(plan);
    let fresh = &udp_ports_of(plan) - &udp_ports_of(known);
    if gone.is_empty() && fresh.is_empty() {
        return Ok(());
    }
    flows::purge(host, |connection| {
        gone.contains(&flow_of(connection)) || passes_by(connection, &fresh)
    })
}

/// Whether this is UDP that asked one of these ports before it was published, and was answered by nobody.
fn passes_by(connection: &Connection, ports: &BTreeSet<u16>) -> bool {
    connection.protocol == Protocol::Udp.number()
        && connection.status & status::SEEN_REPLY == 0
        && connection.original.destination == connection.reply.source
        && ports.contains(&connection.original.destination_port)
}

/// A protocol's number, a published port, and who answers there.
type Flow = (u8, u16, IpAddr);

fn flow_of(connection: &Connection) -> Flow {
    (
        connection.protocol,
        connection.original.destination_port,
        connection.reply.source,
    )
}

fn flows_of(plan: &EntryPlan) -> BTreeSet<Flow> {
    let ports = plan.ports.iter();
    ports
        .flat_map(|port| {
            let protocol = number_of(port.protocol).number();
            let members = port.pool.members.iter();
            members.map(move |ip| (protocol, port.published, *ip))
        })
        .collect()
}

fn udp_ports_of(plan: &EntryPlan) -> BTreeSet<u16> {
    let udp = |port: &&EntryPort| port.protocol == service::Protocol::Udp;
    plan.ports
        .iter()
        .filter(udp)
        .map(|port| port.published)
        .collect()
}

pub(crate) fn number_of(protocol: service::Protocol) -> Protocol {
    match protocol {
        service::Protocol::Tcp => Protocol::Tcp,
        service::Protocol::Udp => Protocol::Udp,
    }
}

fn word_of(protocol: service::Protocol) -> &'static str {
    match protocol {
        service::Protocol::Tcp => "tcp",
        service::Protocol::Udp => "udp",
    }
}

pub(crate) fn content(plan: &EntryPlan) -> Content {
    let mut content = Content::default();
    if plan.ports.is_empty() {
        return content;
    }
    let key = [Field::Protocol, Field::DestinationPort];
    let published = || {
        Rule::new("published ports")
            .to_this_host()
            .verdict_from(PUBLISHED, &key)
    };
    let from_elsewhere = Rule::new("loopback addresses are this host's alone")
        .is_not(Field::InputName, Value::interface("lo"))
        .to(net("127.0.0.0/8"))
        .verdict(Verdict::Return);
    content.chain(
        Chain::base("prerouting", Base::dnat_prerouting()),
        vec![from_elsewhere, published()],
    );
    content.chain(
        Chain::base("output", Base::dnat_output()),
        vec![published()],
    );
    content.chain(
        Chain::base("postrouting", Base::snat_postrouting()),
        masquerades(plan),
    );
    content.chain(Chain::base("forward", Base::filter_forward()), forwarding());
    let unserved = ports(plan, &mut content);
    content.chain(
        Chain::base("input", Base::filter_input()),
        input(unserved.then_some(&key)),
    );
    if unserved {
        let rule = Rule::new("published ports that nobody serves").to_this_host();
        content.chain(
            Chain::base("unserved-output", Base::filter_output()),
            vec![
                rule.has_any(Field::State, state::NEW)
                    .verdict_from(UNSERVED, &key),
            ],
        );
    }
    content
}

/// A chain for each published port, and the maps that lead there. Says whether there are ports that nobody serves.
fn ports(plan: &EntryPlan, content: &mut Content) -> bool {
    let mut by_port: BTreeMap<(u16, &str), Vec<&EntryPort>> = BTreeMap::new();
    for port in &plan.ports {
        let key = (port.published, word_of(port.protocol));
        by_port.entry(key).or_default().push(port);
    }
    let (mut published, mut unserved) = (BTreeSet::new(), BTreeSet::new());
    for ((number, word), holders) in by_port {
        let Some(protocol) = holders.first().map(|port| number_of(port.protocol)) else {
            continue;
        };
        let element = |chain: &str| {
            let key = [protocol.into(), Value::from(number)];
            Element::verdict(key, Verdict::Goto(chain.to_owned()))
        };
        let (mut led, mut refused) = (Vec::new(), Vec::new());
        for port in holders {
            let pool = &port.pool;
            let served = !(pool.v4.is_empty() && pool.v6.is_empty());
            let idle = port.idle_timeout.filter(|_| served);
            led.extend(idle_rules(content, idle, |comment| {
                accepted_on(Rule::new(comment), port)
            }));
            for (slots, is_v4) in [(&port.pool.v4, true), (&port.pool.v6, false)] {
                if !in_family(port, is_v4) {
                    continue;
                }
                let rule = accepted_on(Rule::new(format!("members of {}", port.service)), port);
                if slots.is_empty() {
                    let why = format!("no member of {} serves it", port.service);
                    let of_family = |rule: Rule| if is_v4 { rule.ipv4() } else { rule.ipv6() };
                    let matched = |rule| of_family(accepted_on(rule, port));
                    refused.extend(refusals(&why, matched));
                } else {
                    let rule = rule.protocol(protocol);
                    led.push(lead(rule, &port.pool, slots, Some(port.target)));
                }
            }
        }
        let [chain, unserved_chain] = chains(number, word);
        published.insert(element(&chain));
        content.chain(Chain::regular(chain), led);
        if !refused.is_empty() {
            unserved.insert(element(&unserved_chain));
            content.chain(Chain::regular(unserved_chain), refused);
        }
    }
    let any_unserved = !unserved.is_empty();
    let map = |name: &str| Set {
        name: name.to_owned(),
        key: vec![Type::Protocol, Type::Port],
        data: Data::Verdict,
    };
    content.set(map(PUBLISHED), published);
    if any_unserved {
        content.set(map(UNSERVED), unserved);
    }
    any_unserved
}

/// The chains of a published port: where members are chosen, and where it is refused that nobody serves.
fn chains(number: u16, word: &str) -> [String; 2] {
    ["publish", "unserved"].map(|kind| format!("{kind}-{number}-{word}"))
}

/// The same of a port.
pub(crate) fn chains_of(port: &EntryPort) -> [String; 2] {
    chains(port.published, word_of(port.protocol))
}

/// Whether the port is accepted in a family at all: one that is published on an address is so in the address's alone.
fn in_family(port: &EntryPort, is_v4: bool) -> bool {
    match &port.on {
        Some(PublishOn::Address(ip)) => ip.is_ipv4() == is_v4,
        _ => true,
    }
}

/// Matches the address or interface that the port is published on. The unspecified address is any of its family.
fn accepted_on(rule: Rule, port: &EntryPort) -> Rule {
    match &port.on {
        None => rule,
        Some(PublishOn::Address(ip)) if ip.is_unspecified() => match ip {
            IpAddr::V4(_) => rule.ipv4(),
            IpAddr::V6(_) => rule.ipv6(),
        },
        Some(PublishOn::Address(ip)) => rule.to(IpNet::from(*ip)),
        // What this host sends to itself leaves by `lo`, and has come in by nothing yet.
        Some(PublishOn::Interface(name)) if name == "lo" => rule.output(name),
        Some(PublishOn::Interface(name)) => rule.input(name),
    }
}

/// The host speaks for sources that a member elsewhere could not answer, and for all clients of services that ask for it.
fn masquerades(plan: &EntryPlan) -> Vec<Rule> {
    let published = |comment: String| {
        Rule::new(comment)
            .output(HOST_INTERFACE)
            .has_any(Field::Status, status::DNAT)
    };
    let local = ["127.0.0.0/8", "169.254.0.0/16", "::1/128", "fe80::/10"].map(net);
    let sources: BTreeSet<_> = local
        .iter()
        .chain(&plan.local_sources)
        .chain(&plan.subnets)
        .copied()
        .collect();
    let for_sources = sources.into_iter().map(|source| {
        published(format!("{source} means nothing elsewhere"))
            .from(source)
            .masquerade()
    });
    let clients = plan.ports.iter().filter(|port| !port.preserve_client);
    let hidden: BTreeSet<_> = clients
        .map(|port| (number_of(port.protocol), port.published))
        .collect();
    let for_ports = hidden.into_iter().map(|(protocol, number)| {
        published(format!("clients of port {number} are not shown"))
            .protocol(protocol)
            .is(Field::OriginalDestinationPort, number)
            .masquerade()
    });
    for_sources.chain(for_ports).collect()
}

/// Between the ingress network and elsewhere passes what was translated here, and what answers it.
fn forwarding() -> Vec<Rule> {
    let mut rules = Vec::new();
    let by: [fn(Rule) -> Rule; 2] = [
        |rule| rule.input(HOST_INTERFACE),
        |rule| rule.output(HOST_INTERFACE),
    ];
    for by in by {
        rules.push(
            by(Rule::new("connections there are"))
                .has_any(Field::State, state::ESTABLISHED | state::RELATED)
                .verdict(Verdict::Accept),
        );
        rules.push(
            by(Rule::new("published ports"))
                .has_any(Field::Status, status::DNAT)
                .verdict(Verdict::Accept),
        );
    }
    for by in by {
        rules.push(
            by(Rule::new("the ingress network is no way to anywhere")).verdict(Verdict::Drop),
        );
    }
    rules
}

/// What of published ports reaches the host itself was led to nobody.
fn input(unserved: Option<&[Field; 2]>) -> Vec<Rule> {
    let mut rules = Vec::new();
    if let Some(key) = unserved {
        rules.push(
            Rule::new("published ports that nobody serves")
                .has_any(Field::State, state::NEW)
                .verdict_from(UNSERVED, key),
        );
    }
    let came_in = |comment: &str| Rule::new(comment).input(HOST_INTERFACE);
    rules.push(
        came_in("connections there are")
            .has_any(Field::State, state::ESTABLISHED | state::RELATED)
            .verdict(Verdict::Accept),
    );
    // Pings, and neighbour discovery.
    for protocol in [Protocol::Icmp, Protocol::Icmpv6] {
        rules.push(came_in("ICMP").protocol(protocol).verdict(Verdict::Accept));
    }
    rules.push(came_in("containers reach nothing else of this host by it").verdict(Verdict::Drop));
    rules
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a subnet that is written here")
}
