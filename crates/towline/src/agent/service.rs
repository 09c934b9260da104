//! Services: what a client asks becomes a request to the manager, and back.

use anyhow::{Context as _, bail};
use control::service::{PublishMode, Service, ServiceSpec};
use control::{MemberView, Request, Response, ServiceDetails, State};

use super::container::publish;
use super::network::unexpected;
use super::{Agent, Member, ingress};
use crate::api::service::{self as api, Change};

/// How often a change is made anew because somebody else changed the service meanwhile.
const ATTEMPTS: usize = 4;

/// Answers a client.
///
/// # Errors
/// One line for the person who asked.
pub(super) fn handle(agent: &Agent, request: api::Request) -> anyhow::Result<api::Response> {
    let member = agent.member()?;
    Ok(match request {
        api::Request::Create(spec) => {
            prepare(agent, &member, &spec, None)?;
            made(&member, Request::CreateService(*spec))?
        }
        api::Request::Update { service, change } => update(agent, &member, &service, &change)?,
        api::Request::List => {
            let Response::Services(services) = member.control.request(Request::Services)? else {
                return Err(unexpected());
            };
            api::Response::Services(services.into_iter().map(summary).collect())
        }
        api::Request::Inspect(name) => {
            api::Response::Service(Box::new(shown(details(&member, &name)?)))
        }
        api::Request::Remove(name) => {
            member.control.request(Request::RemoveService(name))?;
            api::Response::Done
        }
    })
}

fn update(
    agent: &Agent,
    member: &Member,
    service: &str,
    change: &Change,
) -> anyhow::Result<api::Response> {
    let mut refused = None;
    for _ in 0..ATTEMPTS {
        let before = details(member, service)?.service;
        let spec = change.clone().applied(before.spec.clone())?;
        prepare(agent, member, &spec, Some(&before))?;
        let request = Request::UpdateService {
            version: before.version,
            service: before.id.clone(),
            spec,
        };
        match made(member, request) {
            Ok(made) => return Ok(made),
            Err(error) if details(member, service)?.service.version == before.version => {
                return Err(error);
            }
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.context("invariant: the loop leaves a refusal")?)
}

fn made(member: &Member, request: Request) -> anyhow::Result<api::Response> {
    let Response::Service(service) = member.control.request(request)? else {
        return Err(unexpected());
    };
    // With the members it has.
    let details = details(member, &service.id)?;
    Ok(api::Response::Service(Box::new(shown(details))))
}

fn details(member: &Member, name: &str) -> anyhow::Result<ServiceDetails> {
    match member.control.request(Request::Service(name.to_owned()))? {
        Response::ServiceDetails(details) => Ok(*details),
        _ => Err(unexpected()),
    }
}

/// What must be so before the manager is asked: published ports have their network, and nobody on this host has one of them.
fn prepare(
    agent: &Agent,
    member: &Member,
    spec: &ServiceSpec,
    before: Option<&Service>,
) -> anyhow::Result<()> {
    if spec.uses_ingress() && member.services.ingress_network().is_none() {
        ingress::make_network(agent, member)?;
    }
    check_ports(agent, member, spec, before)
}

/// Refuses to publish what a program or container of this host has. Other hosts say so in their `status`.
fn check_ports(
    agent: &Agent,
    member: &Member,
    spec: &ServiceSpec,
    before: Option<&Service>,
) -> anyhow::Result<()> {
    let known = |publish| before.is_some_and(|before| before.spec.publish.contains(publish));
    let new = || spec.publish.iter().filter(|publish| !known(publish));
    let has_member = agent.state.read(|state| {
        let mut parts = state.endpoints.iter().filter_map(|record| record.member);
        before.is_some_and(|before| parts.any(|part| part.service == before.epoch))
    });
    // Members that run get them at once.
    let own = new().filter(|publish| publish.mode == PublishMode::Host);
    for publish in own.filter(|publish| has_member && publish.published.is_some()) {
        publish::could_be(agent, member, publish)?;
    }
    for publish in new().filter(|publish| publish.mode == PublishMode::Ingress) {
        if let Some(container) = publish::holder(agent, publish) {
            bail!(
                "port '{}' is already in use by container {container} of this host (run --publish): remove that, or publish \
                 another port",
                publish.published.unwrap_or_default()
            );
        }
        if let Err(problem) = member.services.could_publish(publish) {
            bail!(
                "port {}/{} cannot be published: {problem} on this host; stop that, or publish another port",
                publish.published.unwrap_or_default(),
                publish.protocol
            );
        }
    }
    Ok(())
}

fn summary(details: ServiceDetails) -> api::Summary {
    let serving = details.members.iter().filter(|member| serves(member));
    let service = details.service;
    api::Summary {
        id: service.id,
        name: service.spec.name,
        network: service.spec.network,
        mode: service.spec.mode.to_string(),
        vips: service.vips,
        serving: serving.count(),
        members: details.members.len(),
        ports: service.spec.publish,
        labels: service.spec.labels,
    }
}

fn shown(details: ServiceDetails) -> api::Service {
    let service = details.service;
    let members = details.members.into_iter();
    api::Service {
        id: service.id,
        vips: service.vips,
        created: service.created,
        spec: service.spec,
        members: members
            .map(|member| api::Member {
                state: state(&member).to_owned(),
                container: member.container,
                host: member.host,
                ips: member.ips,
                weight: member.member.weight,
            })
            .collect(),
    }
}

fn serves(member: &MemberView) -> bool {
    state(member) == "serving"
}

fn state(member: &MemberView) -> &'static str {
    match () {
        () if member.state != State::Up => "down",
        () if member.masked => "host-lost",
        () if member.member.serving => "serving",
        () => "not-serving",
    }
}
