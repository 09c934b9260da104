//! What stands in the kernel for services, read back and compared with what should.
//!
//! What should stand is made anew in a namespace of nobody's and read back from there: so the kernel itself says how it tells of it.
//! Nothing is taken from what this program remembers to have installed. Tables of nftables alone are compared, neither routes nor
//! what is remembered of connections. Nothing is mended here.

use std::net::IpAddr;

use netns::nftables::{Difference, Listing, Part, Table};
use netns::{NetfilterSocket, Netlink, Netns};

use crate::content::Content;
use crate::error::ApplyError;
use crate::plan::{ClientPlan, EntryPlan, MEMBER_INTERFACE, MemberPlan};
use crate::{client, entry, flows, member};

/// Something that stands otherwise than it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The service that it is for; `None`: all of them, or one that is not known.
    pub service: Option<String>,
    /// The identifier of the service's network, where that is one of several.
    pub network: Option<u32>,
    /// What it is, such as `rule "members of web" of chain svc-web in table inet towline`.
    pub what: String,
    /// It should be there and is not; else the other way round.
    pub missing: bool,
}

/// Who compares.
#[derive(Debug)]
pub struct Inspector {
    /// Where what should stand is made.
    bench: Netns,
}

impl Inspector {
    /// Makes the namespace that it takes. It goes with the value.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> Result<Self, ApplyError> {
        let bench = Netns::unnamed().map_err(|cause| ApplyError::Namespace {
            place: "a namespace to compare rules with".to_owned(),
            cause,
        })?;
        // A chain at an interface takes one of that name.
        Netlink::open(&bench)
            .and_then(|netlink| netlink.add_bridge(MEMBER_INTERFACE))
            .map_err(|cause| ApplyError::Netlink {
                place: bench.to_string(),
                cause,
            })?;
        Ok(Self { bench })
    }

    /// What is wrong in a namespace that calls services.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn client(&self, netns: &Netns, plan: &ClientPlan) -> Result<Vec<Wrong>, ApplyError> {
        let table = client::table();
        let found = self.differences(netns, &table, &client::content(plan))?;
        let chain = |name: &str| {
            let mut services = plan.services.iter();
            services.find(|service| client::chain_name(plan, service) == name)
        };
        let mut all = Vec::new();
        for difference in found {
            let services = match &difference.part {
                // Each service lacks it.
                Part::Table if difference.missing => plan.services.iter().collect(),
                Part::Chain(name) | Part::Order(name) | Part::Rule { chain: name, .. } => {
                    chain(name).into_iter().collect()
                }
                Part::Element {
                    chain: Some(name),
                    key,
                    ..
                } => {
                    let vip = address(key);
                    let mut services = plan.services.iter();
                    let by_vip =
                        || services.find(|known| vip.is_some_and(|vip| known.vips.contains(&vip)));
                    chain(name).or_else(by_vip).into_iter().collect()
                }
                _ => Vec::new(),
            };
            let named = services
                .iter()
                .map(|service| (service.service.clone(), Some(service.vni)));
            all.extend(wrongs(&table, &difference, named.collect()));
        }
        Ok(all)
    }

    /// What is wrong on a host that accepts published ports.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn entry(&self, host: &Netns, plan: &EntryPlan) -> Result<Vec<Wrong>, ApplyError> {
        let table = entry::table();
        let found = self.differences(host, &table, &entry::content(plan))?;
        let mut all = Vec::new();
        for difference in found {
            let chain = match &difference.part {
                Part::Chain(name) | Part::Order(name) | Part::Rule { chain: name, .. } => {
                    Some(name)
                }
                Part::Element { chain, .. } => chain.as_ref(),
                Part::Table | Part::Set(_) | Part::Limit(_) => None,
            };
            let lacks_all = difference.part == Part::Table && difference.missing;
            let ports = plan.ports.iter().filter(|port| {
                lacks_all || chain.is_some_and(|chain| entry::chains_of(port).contains(chain))
            });
            let mut services: Vec<_> = ports.map(|port| (port.service.clone(), None)).collect();
            services.dedup();
            all.extend(wrongs(&table, &difference, services));
        }
        Ok(all)
    }

    /// What is wrong in the namespace of a member that is reached through the ingress network; `None`: its service publishes nothing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn member(
        &self,
        netns: &Netns,
        plan: Option<&MemberPlan>,
    ) -> Result<Vec<Wrong>, ApplyError> {
        let mut all = Vec::new();
        for (table, content) in member::contents(plan) {
            for difference in self.differences(netns, &table, &content)? {
                let service = plan.map(|plan| (plan.service.clone(), None));
                let service = service.into_iter().collect();
                all.extend(wrongs(&table, &difference, service));
            }
        }
        Ok(all)
    }

    fn differences(
        &self,
        netns: &Netns,
        table: &Table,
        content: &Content,
    ) -> Result<Vec<Difference>, ApplyError> {
        let expected = if content.is_empty() {
            Listing::default()
        } else {
            flows::commit(&self.bench, table, content, None)?;
            listing(&self.bench, table)?
        };
        Ok(listing(netns, table)?.differences(&expected))
    }
}

fn listing(netns: &Netns, table: &Table) -> Result<Listing, ApplyError> {
    NetfilterSocket::open(netns)
        .and_then(|mut socket| socket.listing(table))
        .map_err(|cause| flows::refused(netns, cause))
}

/// A difference, once for each service that it concerns.
fn wrongs(
    table: &Table,
    difference: &Difference,
    services: Vec<(String, Option<u32>)>,
) -> Vec<Wrong> {
    let table = format!("table {} {}", table.family.name(), table.name);
    let what = match &difference.part {
        Part::Table => table,
        part => format!("{part} in {table}"),
    };
    let wrong = |service, network| Wrong {
        service,
        network,
        what: what.clone(),
        missing: difference.missing,
    };
    if services.is_empty() {
        return vec![wrong(None, None)];
    }
    let services = services.into_iter();
    services
        .map(|(service, network)| wrong(Some(service), network))
        .collect()
}

fn address(key: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(key).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(key).map(IpAddr::from))
        .ok()
}
