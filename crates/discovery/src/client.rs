//! Calls of services by their virtual addresses, in the namespace that calls: table `inet towline`.
//!
//! ```text
//! output, nat ── tcp, udp ──▶ services ── by destination ──▶ svc-web ── whose turn it is ──▶ a member's address
//! output, filter ── virtual addresses that nobody serves ──▶ refused at once
//! ```
//!
//! The member sees the client's own address: the packet leaves the namespace as one to the member. Answers come back through the
//! connection's entry in this namespace. Only the first packet of a connection meets these rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use control::service::Balance;
use ipnet::IpNet;
use netns::Netns;
use netns::nftables::{
    Base, Chain, Data, Element, Family, Field, Protocol, Reject, Rule, Set, Table, Type, Value,
    Verdict, status,
};

use crate::content::Content;
use crate::error::ApplyError;
use crate::flows;
use crate::plan::{ClientPlan, ClientService, Pool};

/// The seed of balancing by source: the same everywhere, so that a client's way does not depend on where it enters.
pub(crate) const SOURCE_SEED: u32 = 0x746c_6e65;

/// Names of what the table holds.
const CHAIN_OUTPUT: &str = "services-output";
const CHAIN_SERVICES: &str = "services";
const CHAIN_UNSERVED: &str = "unserved-output";
const CHAIN_REFUSE: &str = "refuse";
const MAPS_SERVICES: [&str; 2] = ["services4", "services6"];
const MAPS_UNSERVED: [&str; 2] = ["unserved4", "unserved6"];

/// What stands in a namespace that calls services.
#[derive(Debug, Default)]
pub struct InstalledClient {
    plan: Option<ClientPlan>,
    content: Option<Content>,
}

impl InstalledClient {
    /// Brings the namespace to what the plan says, in one transaction, and ends what was remembered of connections to members that
    /// are gone. Nothing is sent when the plan has not changed. A plan without services removes the table.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is taken as installed then, and the next call makes all anew.
    pub fn apply(&mut self, netns: &Netns, plan: &ClientPlan) -> Result<(), ApplyError> {
        if self.plan.as_ref() == Some(plan) {
            return Ok(());
        }
        let known = self.plan.take();
        let content = content(plan);
        let before = self.content.take();
        if !(known.is_none() && content.is_empty() && !flows::has_table(netns, &table())?) {
            flows::commit(netns, &table(), &content, before.as_ref())?;
            purge(netns, known.as_ref(), plan)?;
        }
        self.content = Some(content);
        self.plan = Some(plan.clone());
        Ok(())
    }

    /// Ends what was remembered of connections before this program began that lead where nothing leads any more: from what stands
    /// there for virtual addresses, and from addresses of these subnets that were some. To be called after [`Self::apply`], and
    /// only where the plan is known to be no older than those connections: they would be ended for nothing else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn purge_unknown(
        &self,
        netns: &Netns,
        subnets: &BTreeSet<IpNet>,
    ) -> Result<(), ApplyError> {
        let Some(plan) = &self.plan else {
            return Ok(());
        };
        let (vips, ways) = (vips_of(plan), ways_of(plan));
        let inside = |ip: IpAddr| subnets.iter().any(|subnet| subnet.contains(&ip));
        flows::purge(netns, |connection| {
            let (asked, answers) = (connection.original.destination, connection.reply.source);
            // What was led from one address of a network to another was led by a service: it may be gone with its address.
            let led = connection.status & status::DNAT != 0 && inside(asked) && inside(answers);
            flows::is_led(connection)
                && (led || vips.contains(&asked))
                && !ways.contains(&(asked, answers))
        })
    }

    /// Removes all of ours from the namespace, and forgets connections that went through it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&mut self, netns: &Netns) -> Result<(), ApplyError> {
        self.apply(netns, &ClientPlan::default())
    }
}

/// Ends what is remembered of connections to members and virtual addresses that are gone. What stood before is not known after this
/// program's start: see [`InstalledClient::purge_unknown`].
fn purge(netns: &Netns, known: Option<&ClientPlan>, plan: &ClientPlan) -> Result<(), ApplyError> {
    let Some(known) = known else {
        return Ok(());
    };
    let gone_members = &members_of(known) - &members_of(plan);
    let gone_vips = &vips_of(known) - &vips_of(plan);
    if gone_members.is_empty() && gone_vips.is_empty() {
        return Ok(());
    }
    flows::purge(netns, |connection| {
        gone_members.contains(&connection.reply.source)
            || gone_vips.contains(&connection.original.destination)
    })
}

pub(crate) fn table() -> Table {
    Table::new(Family::Inet, "towline")
}

fn members_of(plan: &ClientPlan) -> BTreeSet<IpAddr> {
    let services = plan.services.iter();
    services
        .flat_map(|service| service.pool.members.iter().copied())
        .collect()
}

fn vips_of(plan: &ClientPlan) -> BTreeSet<IpAddr> {
    let services = plan.services.iter();
    services
        .flat_map(|service| service.vips.iter().copied())
        .collect()
}

/// Which virtual address leads to which member.
fn ways_of(plan: &ClientPlan) -> BTreeSet<(IpAddr, IpAddr)> {
    let services = plan.services.iter();
    let ways = services.flat_map(|service| {
        let members = &service.pool.members;
        let of_vip = |vip: IpAddr| members.iter().map(move |member| (vip, *member));
        service.vips.iter().copied().flat_map(of_vip)
    });
    ways.collect()
}

pub(crate) fn content(plan: &ClientPlan) -> Content {
    let mut content = Content::default();
    if plan.services.is_empty() {
        return content;
    }
    content.chain(
        Chain::base(CHAIN_OUTPUT, Base::dnat_output()),
        vec![Rule::new("what services carry").verdict_from_own(
            &[(Field::Protocol, Type::Protocol)],
            [Protocol::Tcp, Protocol::Udp].map(|protocol| {
                Element::verdict([protocol.into()], Verdict::Goto(CHAIN_SERVICES.to_owned()))
            }),
        )],
    );
    content.chain(
        Chain::regular(CHAIN_SERVICES),
        by_destination(MAPS_SERVICES).into(),
    );
    let mut led = Elements::default();
    let mut unserved = Elements::default();
    for service in &plan.services {
        let name = chain_name(plan, service);
        let rules = rules(&mut content, service);
        content.chain(Chain::regular(&name), rules);
        for vip in &service.vips {
            led.lead(*vip, &name);
            if slots_of(&service.pool, *vip).is_empty() {
                unserved.lead(*vip, CHAIN_REFUSE);
            }
        }
    }
    led.into_maps(MAPS_SERVICES, &mut content);
    if !unserved.is_empty() {
        content.chain(
            Chain::base(CHAIN_UNSERVED, Base::filter_output()),
            by_destination(MAPS_UNSERVED).into(),
        );
        content.chain(
            Chain::regular(CHAIN_REFUSE),
            refusals("no member serves it", |rule| rule).into(),
        );
        unserved.into_maps(MAPS_UNSERVED, &mut content);
    }
    content
}

/// Rules that refuse a packet at once, so that nobody waits; `matched` says which.
pub(crate) fn refusals(why: &str, matched: impl Fn(Rule) -> Rule) -> [Rule; 2] {
    [
        matched(Rule::new(why))
            .protocol(Protocol::Tcp)
            .reject(Reject::TcpReset),
        matched(Rule::new(why))
            .protocol(Protocol::Udp)
            .reject(Reject::PortUnreachable),
    ]
}

fn by_destination([v4, v6]: [&str; 2]) -> [Rule; 2] {
    [
        Rule::new("IPv4").verdict_from(v4, &[Field::Destination4]),
        Rule::new("IPv6").verdict_from(v6, &[Field::Destination6]),
    ]
}

/// A name is a service's alone, unless two networks have a service of that name.
pub(crate) fn chain_name(plan: &ClientPlan, service: &ClientService) -> String {
    let same = |other: &&ClientService| other.service == service.service;
    if plan.services.iter().filter(same).count() > 1 {
        format!("svc-{}-{}", service.service, service.vni)
    } else {
        format!("svc-{}", service.service)
    }
}

fn rules(content: &mut Content, service: &ClientService) -> Vec<Rule> {
    let mut rules = idle_rules(content, service.idle_timeout, Rule::new);
    for slots in [&service.pool.v4, &service.pool.v6] {
        if !slots.is_empty() {
            let rule = Rule::new(format!("members of {}", service.service));
            rules.push(lead(rule, &service.pool, slots, None));
        }
    }
    rules
}

/// Ends a rule with the choice of a member.
pub(crate) fn lead(rule: Rule, pool: &Pool, slots: &[IpAddr], port: Option<u16>) -> Rule {
    match pool.balance {
        Balance::RoundRobin | Balance::Weighted => rule.dnat_in_turn(slots, port),
        Balance::Source => {
            let source = if slots.iter().any(IpAddr::is_ipv6) {
                Field::Source6
            } else {
                Field::Source4
            };
            rule.dnat_by_hash(&[source], SOURCE_SEED, slots, port)
        }
    }
}

/// Rules that give a new connection its time limit, and the objects that they name.
pub(crate) fn idle_rules(
    content: &mut Content,
    idle_timeout: Option<u32>,
    rule: impl Fn(&'static str) -> Rule,
) -> Vec<Rule> {
    let Some(seconds) = idle_timeout else {
        return Vec::new();
    };
    let limits = [(Protocol::Tcp, "tcp"), (Protocol::Udp, "udp")];
    limits
        .into_iter()
        .map(|(protocol, word)| {
            let name = format!("idle-{word}-{seconds}s");
            content.timeouts.insert(name.clone(), (protocol, seconds));
            rule("how long it may be idle")
                .protocol(protocol)
                .timeout(&name)
        })
        .collect()
}

fn slots_of(pool: &Pool, vip: IpAddr) -> &[IpAddr] {
    if vip.is_ipv4() { &pool.v4 } else { &pool.v6 }
}

/// Where addresses lead, in the map of their family.
#[derive(Default)]
struct Elements {
    chains: BTreeMap<IpAddr, String>,
}

impl Elements {
    fn lead(&mut self, ip: IpAddr, chain: &str) {
        self.chains.insert(ip, chain.to_owned());
    }

    fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    fn into_maps(self, names: [&str; 2], content: &mut Content) {
        for (name, kind, is_v4) in [(names[0], Type::Ipv4, true), (names[1], Type::Ipv6, false)] {
            let of_family = self.chains.iter().filter(|(ip, _)| ip.is_ipv4() == is_v4);
            let elements = of_family.map(|(ip, chain)| {
                Element::verdict([Value::from(*ip)], Verdict::Goto(chain.clone()))
            });
            content.set(
                Set {
                    name: name.to_owned(),
                    key: vec![kind],
                    data: Data::Verdict,
                },
                elements.collect(),
            );
        }
    }
}
