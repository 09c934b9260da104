//! What the agent does and sees, in one answer.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::join::NOT_ENCRYPTED;
use super::{Agent, Member, ingress, manager, neighbors, traffic, underlay};
use crate::api::{ClusterStatus, Status};

/// Asks every part; none of them waits for the network.
pub(super) fn status(agent: &Agent) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        name: agent.config.name.clone(),
        state_dir: agent.config.state_dir.display().to_string(),
        cluster: agent.member().ok().map(|member| cluster(agent, &member)),
    }
}

fn cluster(agent: &Agent, member: &Member) -> ClusterStatus {
    let counters = member.datapath.counters();
    let drops = counters
        .drops
        .iter()
        .filter(|&(_, count)| count > 0)
        .map(|(reason, count)| (reason.name().to_owned(), count))
        .collect();
    let control = member.control.status();
    let mut warnings = vec![NOT_ENCRYPTED.to_owned()];
    let source = member.control.static_tables().map(|tables| tables.source());
    if let Some(source) = &source {
        warnings.extend(source.problem.as_ref().map(|problem| {
            format!("the file as it is now is not in force: {problem}; what was read before is")
        }));
        warnings.extend(source.ports.iter().cloned());
    } else if control.connected_to.is_none() {
        let left: usize = control
            .subscriptions
            .iter()
            .map(|known| known.leased.len())
            .sum();
        let block = if left == 0 {
            "and none can be started on a network".to_owned()
        } else {
            format!("and new ones start from {left} leased addresses")
        };
        warnings.push(format!(
            "no manager answers ({}): containers go on, {block}",
            control.last_error.as_deref().unwrap_or("not tried yet")
        ));
    }
    warnings.extend(member.port.problem().map(|problem| {
        format!("this host can't receive on the cluster's VXLAN port: {problem}; it goes on with the one it has")
    }));
    warnings.extend(underlay::changed(
        &agent.netns,
        member.settled.vtep,
        member.settled.link_mtu,
    ));
    let missed = member.follower.announcements().missed();
    if missed > 0 {
        warnings.push(format!(
            "addresses changed faster than containers could be told: {missed} times they were left to find out, within a minute"
        ));
    }
    let remotes = traffic::remotes(member);
    warnings.extend(traffic::narrow_paths(&remotes));
    if !control.masked.is_empty() {
        warnings.push(format!(
            "masked, because the manager heard nothing of them: {}; no floods go there, all else does",
            control.masked.join(", ")
        ));
    }
    let services = member.services.summaries();
    if source.is_none() && control.connected_to.is_none() && !services.is_empty() {
        warnings.push(
            "services are as they were when the last manager was heard: members and hosts that go meanwhile stay in them, \
             connections to all others go on"
                .to_owned(),
        );
    }
    warnings.extend(member.services.problems());
    let gateway = match member.gateway().status() {
        Ok(status) => {
            warnings.extend(status.problems().map(str::to_owned));
            json(&status)
        }
        Err(error) => {
            warnings.push(format!("the gateway bridge cannot be looked at: {error}"));
            Value::Null
        }
    };
    ClusterStatus {
        host: member.host.id.to_string(),
        role: manager::role(member).to_owned(),
        vtep: member.settled.vtep,
        port: member.port.current(),
        link_mtu: member.settled.link_mtu,
        neighbor_limits: neighbors::limits(),
        control: json(&control),
        source,
        datapath: json(&member.datapath.status()),
        drops,
        traffic: numbers(&json(&counters)),
        ports: traffic::ports(agent, member),
        remotes,
        gateway,
        endpoints: agent.state.read(|state| {
            let containers = state.endpoints.iter();
            containers
                .filter(|record| !ingress::is_host(record))
                .count()
        }),
        services,
        names: member.names.status(),
        warnings,
    }
}

/// Plain data of our own always turns into JSON; were it not so, `null` is shown.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// The numbers of an object; its drops are shown by themselves.
fn numbers(value: &Value) -> BTreeMap<String, u64> {
    let fields = value.as_object().into_iter().flatten();
    fields
        .filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)))
        .collect()
}
