//! What a service may be, as far as the specification alone shows: in Docker's words where Docker has them.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::{EndpointMode, HealthCheck, HealthTest, Publish, ServiceSpec};
use crate::network::{is_valid_name, quote};

/// Ports that a published port gets that names none.
pub const AUTO_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// Published ports of one service.
pub const PORTS_MAX: usize = 1024;
/// The largest weight of a member.
pub const WEIGHT_MAX: u16 = 256;
/// The longest time that a specification may name, in milliseconds: a day.
pub const TIMEOUT_MAX_MS: u32 = 24 * 60 * 60 * 1000;
/// Words of a health check's command, and bytes of each and of a path.
pub const COMMAND_MAX: (usize, usize) = (64, 4096);
/// The longest name of an interface (IFNAMSIZ, without its zero).
const INTERFACE_MAX: usize = 15;
/// The longest time that a connection may be idle, in seconds: what the kernel's conntrack allows is more.
const IDLE_MAX: u32 = 30 * 24 * 60 * 60;

/// Whether a service could be like this in any cluster.
pub fn check_spec(spec: &ServiceSpec) -> Result<(), String> {
    if !is_valid_name(&spec.name) {
        return Err(format!(
            "invalid service name {}: it must match [a-z0-9][a-z0-9_.-]{{0,62}}",
            quote(&spec.name)
        ));
    }
    check_mode(spec)?;
    check_publish(&spec.publish)?;
    if let Some(health) = &spec.health {
        check_health(health)?;
    }
    if spec
        .idle_timeout
        .is_some_and(|seconds| !(1..=IDLE_MAX).contains(&seconds))
    {
        return Err(format!(
            "invalid idle timeout: it must be from 1 s to {IDLE_MAX} s"
        ));
    }
    let drain_max = TIMEOUT_MAX_MS / 1000;
    if spec.drain_timeout > drain_max {
        return Err(format!(
            "a drain timeout of {} s is too long: at most {drain_max} s",
            spec.drain_timeout
        ));
    }
    Ok(())
}

fn check_mode(spec: &ServiceSpec) -> Result<(), String> {
    let families = |v4| spec.vips.iter().filter(|ip| ip.is_ipv4() == v4).count();
    if families(true) > 1 || families(false) > 1 {
        return Err(format!(
            "service {} asks for two virtual addresses of one family: give one of each at most",
            spec.name
        ));
    }
    if spec.mode == EndpointMode::Dnsrr {
        if spec.uses_ingress() {
            return Err(
                "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
                    .to_owned(),
            );
        }
        if let Some(ip) = spec.vips.first() {
            return Err(format!(
                "virtual address {ip} can't be used with dnsrr mode, which has none"
            ));
        }
    }
    Ok(())
}

fn check_publish(publish: &[Publish]) -> Result<(), String> {
    if publish.len() > PORTS_MAX {
        return Err(format!(
            "{} published ports are too many: at most {PORTS_MAX}",
            publish.len()
        ));
    }
    for port in publish {
        if port.target == 0 || port.published == Some(0) {
            return Err(format!("invalid published port {port}: 0 is no port"));
        }
        if let Some(super::PublishOn::Interface(name)) = &port.on
            && !is_interface(name)
        {
            return Err(format!("invalid interface name {}", quote(name)));
        }
        if let Some(super::PublishOn::Address(ip)) = &port.on
            && (ip.is_multicast() || is_broadcast(*ip))
        {
            return Err(format!(
                "invalid published port {port}: no host has the address {ip}"
            ));
        }
    }
    for (index, one) in publish.iter().enumerate() {
        if publish[..index].iter().any(|other| overlaps(one, other)) {
            return Err("EndpointSpec: duplicate published ports provided".to_owned());
        }
    }
    Ok(())
}

/// Whether two published ports of one service take the same port of a host: two that are published on different addresses do not,
/// if they lead to the same place in the same way.
#[must_use]
pub fn overlaps(one: &Publish, other: &Publish) -> bool {
    let same_port = one.published.is_some()
        && (one.published, one.protocol) == (other.published, other.protocol);
    let apart = match (&one.on, &other.on) {
        (Some(one), Some(other)) => one != other,
        _ => false,
    };
    same_port && !(apart && (one.target, one.mode) == (other.target, other.mode))
}

fn is_interface(name: &str) -> bool {
    (1..=INTERFACE_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"/:\"*".contains(&byte))
}

fn is_broadcast(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_broadcast())
}

fn check_health(health: &HealthCheck) -> Result<(), String> {
    let (words, bytes) = COMMAND_MAX;
    match &health.test {
        HealthTest::Command(command) => {
            if command.is_empty() || command[0].is_empty() {
                return Err("the health check names no command".to_owned());
            }
            if command.len() > words || command.iter().any(|word| word.len() > bytes) {
                return Err(format!(
                    "the health check's command is too long: at most {words} words of {bytes} bytes"
                ));
            }
            if command.iter().any(|word| word.contains('\0')) {
                return Err("the health check's command has a zero byte".to_owned());
            }
        }
        HealthTest::Tcp { port } | HealthTest::Http { port, .. } if *port == 0 => {
            return Err("the health check names port 0, which is no port".to_owned());
        }
        HealthTest::Http { path, .. } => {
            let clean = path.bytes().all(|byte| byte.is_ascii_graphic());
            if !path.starts_with('/') || !clean || path.len() > bytes {
                return Err(format!(
                    "invalid path of the health check {}: it starts with / and has no spaces",
                    quote(path)
                ));
            }
        }
        HealthTest::Tcp { .. } => {}
    }
    let times = [health.interval, health.timeout];
    if times.iter().any(|ms| !(1..=TIMEOUT_MAX_MS).contains(ms))
        || health.start_period > TIMEOUT_MAX_MS
    {
        return Err(format!(
            "a time of the health check is out of range: from 1 ms to {} s",
            TIMEOUT_MAX_MS / 1000
        ));
    }
    if !(1..=1000).contains(&health.retries) {
        return Err("the health check's retries must be from 1 to 1000".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Protocol, PublishMode, PublishOn};
    use super::*;

    fn port(published: u16, target: u16) -> Publish {
        Publish {
            target,
            published: Some(published),
            protocol: Protocol::Tcp,
            mode: PublishMode::Ingress,
            on: None,
        }
    }

    fn refused(change: impl FnOnce(&mut ServiceSpec)) -> String {
        let mut spec = ServiceSpec::named("web", "blue");
        change(&mut spec);
        check_spec(&spec).expect_err("refused")
    }

    #[test]
    fn one_host_port_leads_to_one_place() {
        let on = |ip: [u8; 4], port: Publish| Publish {
            on: Some(PublishOn::Address(ip.into())),
            ..port
        };
        assert!(overlaps(&port(80, 80), &port(80, 81)));
        assert!(!overlaps(&port(80, 80), &port(81, 80)));
        let udp = Publish {
            protocol: Protocol::Udp,
            ..port(80, 80)
        };
        assert!(!overlaps(&port(80, 80), &udp));
        let one = on([127, 0, 0, 1], port(80, 80));
        assert!(overlaps(&one, &port(80, 80)), "everywhere includes it");
        assert!(overlaps(&one, &one));
        assert!(!overlaps(&one, &on([192, 0, 2, 1], port(80, 80))));
        assert!(overlaps(&one, &on([192, 0, 2, 1], port(80, 81))));
        let auto = Publish {
            published: None,
            ..port(80, 80)
        };
        assert!(!overlaps(&auto, &auto));
    }

    #[test]
    fn refusals_are_dockers_words() {
        assert_eq!(
            check_spec(&ServiceSpec::named("web", "blue")),
            Ok(()),
            "the least that can be asked"
        );
        assert_eq!(
            refused(|spec| spec.publish = vec![port(80, 80), port(80, 81)]),
            "EndpointSpec: duplicate published ports provided"
        );
        assert_eq!(
            refused(|spec| {
                spec.mode = EndpointMode::Dnsrr;
                spec.publish = vec![port(80, 80)];
            }),
            "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
        );
        assert!(refused(|spec| spec.name = "a/b".to_owned()).contains("invalid service name"));
        assert!(refused(|spec| spec.publish = vec![port(0, 80)]).contains("0 is no port"));
        assert!(refused(|spec| spec.publish = vec![port(80, 0)]).contains("0 is no port"));
        assert!(refused(|spec| spec.idle_timeout = Some(0)).contains("idle timeout"));
        assert!(refused(|spec| spec.drain_timeout = u32::MAX).contains("too long"));
        assert!(
            refused(|spec| spec.vips = vec![[10, 0, 0, 2].into(), [10, 0, 0, 3].into()])
                .contains("one family")
        );
    }

    #[test]
    fn a_health_check_names_something_that_can_be_tried() {
        let good = HealthCheck {
            test: HealthTest::Http {
                port: 80,
                path: "/up?x=1".to_owned(),
            },
            interval: 1000,
            timeout: 500,
            retries: 3,
            start_period: 0,
        };
        assert_eq!(check_health(&good), Ok(()));
        let with = |test| {
            check_health(&HealthCheck {
                test,
                ..good.clone()
            })
        };
        assert!(with(HealthTest::Command(Vec::new())).is_err());
        assert!(with(HealthTest::Command(vec!["a\0b".to_owned()])).is_err());
        assert!(with(HealthTest::Tcp { port: 0 }).is_err());
        for path in ["", "up", "/a b", "/a\r\nHost: x"] {
            let path = path.to_owned();
            assert!(with(HealthTest::Http { port: 80, path }).is_err());
        }
        let zero = HealthCheck {
            interval: 0,
            ..good.clone()
        };
        assert!(check_health(&zero).is_err());
        let never = HealthCheck { retries: 0, ..good };
        assert!(check_health(&never).is_err());
    }
}
