//! Services and members as text: tables, and lines for one.

use std::fmt::Write as _;

use control::service::{HealthCheck, HealthTest, Publish, PublishMode};

use crate::api::service::{Member, Service, Summary};
use crate::cli::output;
use crate::cli::template::harmless;

/// As `docker service ls`, with ids as `cut` makes them.
pub(super) fn services(services: &[Summary], cut: impl Fn(&str) -> String) -> anyhow::Result<()> {
    output::table(
        &["ID", "NAME", "NETWORK", "MODE", "MEMBERS", "VIP", "PORTS"],
        services.iter().map(|service| {
            [
                cut(&service.id),
                service.name.clone(),
                service.network.clone(),
                service.mode.clone(),
                serving(service),
                output::list(&service.vips),
                output::list(service.ports.iter().map(published)),
            ]
        }),
    )
}

/// How many members serve, of how many.
pub(super) fn serving(service: &Summary) -> String {
    format!("{}/{}", service.serving, service.members)
}

/// As `docker service ps`.
pub(super) fn members(members: &[(&Service, &Member)]) -> anyhow::Result<()> {
    output::table(
        &["NAME", "SERVICE", "HOST", "ADDRESS", "WEIGHT", "STATE"],
        members.iter().map(|(service, member)| {
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

/// As `docker service inspect --pretty`: a line for each property, and one for each member.
pub(super) fn pretty(service: &Service) -> String {
    let spec = &service.spec;
    let labels = spec
        .labels
        .iter()
        .map(|(key, value)| format!("{}={}", harmless(key), harmless(value)));
    let idle = spec.idle_timeout.map_or_else(
        || "as the kernel does".to_owned(),
        |seconds| format!("{seconds}s"),
    );
    let client = if spec.preserve_client {
        "the client's"
    } else {
        "the entry host's"
    };
    let mut text = String::new();
    for (name, value) in [
        ("ID", service.id.clone()),
        ("Name", spec.name.clone()),
        ("Labels", output::list(labels)),
        ("Network", spec.network.clone()),
        ("Endpoint mode", spec.mode.to_string()),
        ("VIP", output::list(&service.vips)),
        ("Ports", output::list(spec.publish.iter().map(published))),
        ("Balance", spec.balance.to_string()),
        ("Members see", format!("{client} address")),
        (
            "Health check",
            spec.health
                .as_ref()
                .map_or_else(|| "none".to_owned(), check),
        ),
        ("Idle timeout", idle),
        ("Drain timeout", format!("{}s", spec.drain_timeout)),
        ("Members", output::list(service.members.iter().map(member))),
    ] {
        // A String takes all that is written.
        let _ = writeln!(text, "{:<15}{value}", format!("{name}:"));
    }
    text
}

fn member(member: &Member) -> String {
    format!("{} on {} ({})", member.container, member.host, member.state)
}

fn check(check: &HealthCheck) -> String {
    let test = match &check.test {
        HealthTest::Command(words) => harmless(&words.join(" ")),
        HealthTest::Tcp { port } => format!("TCP port {port}"),
        HealthTest::Http { port, path } => format!("HTTP port {port}, GET {}", harmless(path)),
    };
    let time = |milliseconds: u32| {
        humantime::format_duration(std::time::Duration::from_millis(milliseconds.into()))
    };
    format!(
        "{test}; every {}, at most {}, unhealthy after {} failures; start period {}",
        time(check.interval),
        time(check.timeout),
        check.retries,
        time(check.start_period)
    )
}

/// A published port as Docker shows it, and which are this host's alone.
pub(super) fn published(port: &Publish) -> String {
    match port.mode {
        PublishMode::Ingress => port.to_string(),
        PublishMode::Host => format!("{port} (host)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::service::{Balance, EndpointMode, Protocol, ServiceSpec};

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

    #[test]
    fn a_service_for_people_has_a_line_for_each_property() {
        let service = Service {
            id: "abc".into(),
            vips: vec![[10, 0, 9, 2].into()],
            created: 0,
            spec: ServiceSpec {
                name: "web".into(),
                network: "blue".into(),
                mode: EndpointMode::Vip,
                balance: Balance::Source,
                vips: Vec::new(),
                publish: Vec::new(),
                health: Some(HealthCheck {
                    test: HealthTest::Http {
                        port: 80,
                        path: "/ok".into(),
                    },
                    interval: 500,
                    timeout: 30_000,
                    retries: 3,
                    start_period: 0,
                }),
                idle_timeout: None,
                drain_timeout: 10,
                preserve_client: true,
                labels: [("tier\u{1b}[2J".to_owned(), "front".to_owned())].into(),
            },
            members: vec![Member {
                container: "c1".into(),
                host: "h1".into(),
                ips: Vec::new(),
                weight: 1,
                state: "serving".into(),
            }],
        };
        let text = pretty(&service);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "ID:            abc",
                "Name:          web",
                "Labels:        tier\\u{1b}[2J=front",
                "Network:       blue",
                "Endpoint mode: vip",
                "VIP:           10.0.9.2",
                "Ports:         -",
                "Balance:       source",
                "Members see:   the client's address",
                "Health check:  HTTP port 80, GET /ok; every 500ms, at most 30s, unhealthy after 3 failures; start period 0s",
                "Idle timeout:  as the kernel does",
                "Drain timeout: 10s",
                "Members:       c1 on h1 (serving)",
            ]
        );
    }
}
