//! Services and members as tables.

use control::service::{Publish, PublishMode};

use crate::api::service::{Member, Service, Summary};
use crate::cli::output;

/// As `docker service ls`.
pub(super) fn services(services: &[Summary], quiet: bool, no_trunc: bool) -> anyhow::Result<()> {
    let cut = |id: &str| match id.get(..12) {
        Some(start) if !no_trunc => start.to_owned(),
        _ => id.to_owned(),
    };
    if quiet {
        return services
            .iter()
            .try_for_each(|service| output::line(&cut(&service.id)));
    }
    output::table(
        &["ID", "NAME", "NETWORK", "MODE", "MEMBERS", "VIP", "PORTS"],
        services.iter().map(|service| {
            [
                cut(&service.id),
                service.name.clone(),
                service.network.clone(),
                service.mode.clone(),
                format!("{}/{}", service.serving, service.members),
                output::list(&service.vips),
                output::list(service.ports.iter().map(published)),
            ]
        }),
    )
}

/// As `docker service ps`.
pub(super) fn members<'a>(
    members: impl Iterator<Item = (&'a Service, &'a Member)>,
) -> anyhow::Result<()> {
    output::table(
        &["NAME", "SERVICE", "HOST", "ADDRESS", "WEIGHT", "STATE"],
        members.map(|(service, member)| {
            [
                member.container.clone(),
                service.spec.name.clone(),
                member.host.clone(),
                output::list(&member.ips),
                member.weight.to_string(),
                member.state.clone(),
            ]
        }),
    )
}

/// A published port as Docker shows it, and which are this host's alone.
fn published(port: &Publish) -> String {
    match port.mode {
        PublishMode::Ingress => port.to_string(),
        PublishMode::Host => format!("{port} (host)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::service::Protocol;

    #[test]
    fn ports_look_as_in_docker() {
        let mut port = Publish {
            target: 80,
            published: Some(8080),
            protocol: Protocol::Tcp,
            mode: PublishMode::Ingress,
            on: None,
        };
        assert_eq!(published(&port), "*:8080->80/tcp");
        port.mode = PublishMode::Host;
        assert_eq!(published(&port), "*:8080->80/tcp (host)");
    }
}
