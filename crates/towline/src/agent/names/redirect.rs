//! How what a container sends to 127.0.0.11:53 reaches this agent's sockets: table `inet towline-names` in its namespace.
//!
//! ```text
//! output, before connections are looked up:
//!   to   127.0.0.11 port 53    ──▶ port P, where the agent listens
//!   from 127.0.0.11 port P     ──▶ port 53, where the answer was asked for
//! ```
//!
//! Ports are rewritten packet by packet, and conntrack never sees them: so nothing else in the namespace is tracked on this table's
//! account, and a container may serve port 53 itself, on all of its addresses. The table stays while no agent runs; the next one
//! replaces it in one transaction.

use anyhow::Context as _;
use discovery::names::Transport;
use ipnet::IpNet;
use netns::nftables::{
    Base, Batch, Chain, ChainKind, Family, Field, Hook, Protocol, Rule, Table, priority,
};
use netns::{NetfilterSocket, Netns};

use super::ADDRESS;

/// Where names are asked for.
const DNS: u16 = 53;
const CHAIN: &str = "output";

/// Leads questions to these ports of 127.0.0.11, and nowhere else.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn put(netns: &Netns, udp: u16, tcp: u16) -> anyhow::Result<()> {
    let table = Table::new(Family::Inet, "towline-names");
    let base = Base::new(ChainKind::Filter, Hook::Output, priority::RAW);
    let mut batch = Batch::new();
    batch
        .remove_table(&table)
        .add_table(&table)
        .add_chain(&table, &Chain::base(CHAIN, base));
    for (transport, port) in [(Transport::Udp, udp), (Transport::Tcp, tcp)] {
        let protocol = match transport {
            Transport::Udp => Protocol::Udp,
            Transport::Tcp => Protocol::Tcp,
        };
        let rules = [
            Rule::new("names: a question")
                .to(IpNet::from(std::net::IpAddr::from(ADDRESS)))
                .protocol(protocol)
                .is(Field::DestinationPort, DNS)
                .untracked()
                .rewrite_port(Field::DestinationPort, protocol, port),
            Rule::new("names: an answer")
                .from(IpNet::from(std::net::IpAddr::from(ADDRESS)))
                .protocol(protocol)
                .is(Field::SourcePort, port)
                .untracked()
                .rewrite_port(Field::SourcePort, protocol, DNS),
        ];
        for rule in &rules {
            batch.add_rule(&table, CHAIN, rule);
        }
    }
    NetfilterSocket::open(netns)
        .and_then(|mut socket| batch.commit(&mut socket))
        .with_context(|| format!("can't lead questions for names in {netns} to this agent"))
}
