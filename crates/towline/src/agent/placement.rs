//! Which hosts a container may run on, and what this host says of itself for that.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use control::{Constraint, HostView, Platform, Request, RequestError, Response};

use super::network::unexpected;
use super::{Agent, Member, container};

/// Most constraints of one container.
const MAX_CONSTRAINTS: usize = 32;

/// Refuses a container that may not run on this host, and says where it may. Returns what the operator should know.
///
/// # Errors
/// Names the constraint that is none or does not hold, and the hosts on which all hold.
pub(super) fn check(
    agent: &Agent,
    member: &Member,
    texts: &[String],
) -> anyhow::Result<Option<String>> {
    if texts.is_empty() {
        return Ok(None);
    }
    if texts.len() > MAX_CONSTRAINTS {
        bail!(
            "{} constraints were given: a container has at most {MAX_CONSTRAINTS}",
            texts.len()
        );
    }
    let constraints: Vec<Constraint> = texts
        .iter()
        .map(|text| Ok(text.parse()?))
        .collect::<anyhow::Result<_>>()?;
    let (mut hosts, warning) = match member.control.request(Request::Hosts) {
        Ok(Response::Hosts(hosts)) => (hosts, None),
        Ok(_) => return Err(unexpected()),
        Err(error @ (RequestError::NotConnected { .. } | RequestError::Timeout { .. })) => (
            member.follower.views(),
            Some(format!(
                "the constraints were checked against the labels that this host last heard of: {error}"
            )),
        ),
        Err(error) => return Err(error.into()),
    };
    let own = hosts
        .iter_mut()
        .find(|view| view.info.id == member.host.id)
        .context("this host is not on the list of hosts: try again in a moment")?;
    // Known best here, and whether or not anybody was told.
    own.traits.platform = Platform::here();
    own.traits.own_labels.clone_from(&agent.config.labels);
    let own = own.clone();
    match constraints.iter().find(|one| !one.holds(&own)) {
        None => Ok(warning),
        Some(broken) => bail!("{}", refusal(broken, &own, &constraints, &hosts)),
    }
}

/// Why not here, and where.
fn refusal(
    broken: &Constraint,
    own: &HostView,
    constraints: &[Constraint],
    hosts: &[HostView],
) -> String {
    let has = match broken.actual(own) {
        None => "nobody knows that key".to_owned(),
        Some(actual) if actual.is_empty() => "it has none".to_owned(),
        Some(actual) => format!("it has '{actual}'"),
    };
    let why = format!(
        "constraint {broken} does not hold on this host, {} ({has})",
        own.info.name
    );
    let mut fitting: Vec<String> = hosts
        .iter()
        .filter(|host| constraints.iter().all(|one| one.holds(host)))
        .map(|host| {
            let state = if host.up { "" } else { " (down)" };
            format!("{}{state}", host.info.name)
        })
        .collect();
    fitting.sort();
    if fitting.is_empty() {
        let (count, word) = (hosts.len(), if hosts.len() == 1 { "node" } else { "nodes" });
        format!(
            "no suitable node (scheduling constraints not satisfied on {count} {word}): {why}; \
             'towline host inspect' shows labels, 'towline host update --label-add' gives them"
        )
    } else {
        format!("{why}: run it on {}", fitting.join(", "))
    }
}

/// Tells the manager what this host is. Returns at once.
pub(super) fn tell(agent: &Agent, member: &Arc<Member>) {
    let member = Arc::clone(member);
    let request = Request::TellTraits {
        platform: Platform::here(),
        labels: agent.config.labels.clone(),
    };
    container::in_background("traits", move || {
        let told = member.control.request(request);
        if let Err(error) = told {
            tracing::warn!("the manager does not know what this host runs on: {error}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::{HostId, HostInfo, HostTraits};

    fn host(name: &str, disk: &str, up: bool) -> HostView {
        let mut traits = HostTraits::default();
        if !disk.is_empty() {
            traits.labels.insert("disk".to_owned(), disk.to_owned());
        }
        HostView {
            info: HostInfo {
                id: HostId::of_name(name),
                name: name.to_owned(),
                vtep: "192.0.2.1".parse().expect("an address"),
                port: 4789,
                link_mtu: 1500,
                incarnation: 1,
            },
            up,
            last_seen_ms_ago: 0,
            manager: false,
            wanted_port: None,
            port_problem: None,
            control: None,
            traits,
        }
    }

    #[test]
    fn a_refusal_says_why_and_where() {
        let hosts = [
            host("h1", "hdd", true),
            host("h3", "ssd", false),
            host("h2", "SSD", true),
            host("h4", "", true),
        ];
        let refused = |own: usize, texts: &[&str]| {
            let constraints: Vec<Constraint> = texts
                .iter()
                .map(|text| text.parse().expect("a constraint"))
                .collect();
            let broken = constraints
                .iter()
                .find(|one| !one.holds(&hosts[own]))
                .expect("one does not hold");
            refusal(broken, &hosts[own], &constraints, &hosts)
        };
        assert_eq!(
            refused(0, &["node.labels.disk==ssd"]),
            "constraint node.labels.disk==ssd does not hold on this host, h1 (it has 'hdd'): run it on h2, h3 (down)"
        );
        let none = refused(3, &["node.labels.disk==ssd", "node.hostname==h4"]);
        assert!(
            none.starts_with(
                "no suitable node (scheduling constraints not satisfied on 4 nodes): constraint node.labels.disk==ssd \
                 does not hold on this host, h4 (it has none)"
            ),
            "{none}"
        );
        let unknown = refused(0, &["node.colour!=red"]);
        assert!(unknown.contains("nobody knows that key"), "{unknown}");
    }
}
